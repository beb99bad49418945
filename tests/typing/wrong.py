"""Programs with faults: a type checker must report every line that ends with ``# error``, and no other."""

from __future__ import annotations

import torch
from torch import Tensor

from implicitdiff import adam, custom_root, minimize, root
from implicitdiff.linear_solve import solve_cg
from implicitdiff.solvers import lbfgs, newton


def ridge(w: Tensor, penalty: Tensor) -> Tensor:
    return ((w - 1) ** 2).sum() + penalty * (w**2).sum()


def gradient(w: Tensor, penalty: Tensor) -> Tensor:
    return 2 * (w - 1) + 2 * penalty * w


@custom_root(gradient)
def fit(w: Tensor, penalty: Tensor) -> Tensor:
    return w


one, start = torch.tensor(1.0), torch.zeros(2)
solver = lbfgs(ridge)
x, state = solver.run(start, one)

# A missing argument.
fit(start)  # error
solver.run(start)  # error
solver.init()  # error
newton()  # error
minimize(ridge)  # error

# An argument of the wrong type.
fit(start, "1.0")  # error
solver.run([0.0, 0.0], one)  # error
solver.run(start, "1.0")  # error
solver.update(x, x, one)  # error
newton(3.0)  # error
fit(start, one).keys()  # error

# A misspelt option.
lbfgs(ridge, rtoll=1e-6)  # error
lbfgs(ridge, histroy=5)  # error
solver.run(start, one, keep_hystory=True)  # error
minimize(ridge, start, one, tol=1e-6)  # error
custom_root(gradient, argnum=1)  # error
solve_cg(tol=1e-6)  # error
adam(learning_rate=0.1)  # error

# An option of the wrong type.
lbfgs(ridge, rtol="1e-6")  # error
lbfgs(ridge, on_failure="print")  # error
newton(gradient, solve=3)  # error
solver.run(start, one, keep_history="yes")  # error
root(gradient, start, one, maxiter=1.5)  # error
solve_cg(rtol="1e-6")  # error

# A misspelt field.
print(state.convergd)  # error
print(state.memory.gard)  # error
print(solver.runn)  # error


# A solver with has_aux=True that returns no pair.
@custom_root(gradient, has_aux=True)  # error
def fit_without_aux(w: Tensor, penalty: Tensor) -> Tensor:
    return w
