"""Programs with types: a type checker must accept every line. `test_typing.py` runs mypy and pyright, both strict."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import assert_type

import torch
from torch import Tensor
from typing_extensions import Unpack

import implicitdiff
from implicitdiff import (
    adam,
    apply_updates,
    chain,
    clip_grad_norm,
    custom_fixed_point,
    custom_root,
    fixed_point,
    least_squares,
    minimize,
    root,
    root_jvp,
    root_vjp,
    unroll,
)
from implicitdiff.linear_solve import solve_cg, solve_gmres
from implicitdiff.nn import ImplicitMetaGradientModule
from implicitdiff.projections import simplex
from implicitdiff.prox import lasso
from implicitdiff.schedule import cosine
from implicitdiff.solvers import (
    LbfgsMemory,
    NewtonMemory,
    Solver,
    SolverOptions,
    State,
    Status,
    anderson,
    from_optimizer,
    lbfgs,
    lbfgs_b,
    levenberg_marquardt,
    newton,
    projected_gradient,
    proximal_gradient,
    qp,
    scipy_minimize,
)

Weights = dict[str, Tensor]


def ridge(w: Tensor, penalty: Tensor, scale: float = 1.0) -> Tensor:
    return scale * ((w - 1) ** 2).sum() + penalty * (w**2).sum()


def gradient(w: Tensor, penalty: Tensor) -> Tensor:
    return 2 * (w - 1) + 2 * penalty * w


def tree_residual(x: Weights, a: Tensor) -> Weights:
    return {"w": x["w"] - a}


def double(v: Tensor) -> Tensor:
    return 2 * v


one, start = torch.tensor(1.0, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)


# Decorated solvers keep their signatures.
@custom_root(gradient)
def fit(w: Tensor, penalty: Tensor, steps: int = 100) -> Tensor:
    for _ in range(steps):
        w = w - 0.1 * gradient(w, penalty)
    return w


@custom_root(gradient, has_aux=True, argnums=1, solve=solve_cg())
def fit_with_aux(w: Tensor, penalty: Tensor) -> tuple[Tensor, dict[str, int]]:
    return fit(w, penalty), {"steps": 100}


def cosine_plus(x: Tensor, a: Tensor) -> Tensor:
    return torch.cos(x) + a


@custom_fixed_point(cosine_plus, check=1e-3)
def cosine_fixed_point(x: Tensor, a: Tensor) -> Tensor:
    for _ in range(100):
        x = cosine_plus(x, a)
    return x


assert_type(fit(start, one), Tensor)
assert_type(fit(start, penalty=one), Tensor)
assert_type(fit_with_aux(start, one), tuple[Tensor, dict[str, int]])
assert_type(cosine_fixed_point(start, 0.1 * one), Tensor)

# A solver knows its unknowns, its arguments, and its memory.
solver = lbfgs(ridge, history=5, rtol=1e-8, maxiter=None, on_failure="warn", solve=solve_gmres(rtol=1e-6))
x, state = solver.run(start, one)
assert_type(x, Tensor)
assert_type(state, State[LbfgsMemory])
assert_type(state.memory.grad, Tensor)
assert_type(state.converged, Tensor)
solver.run(start, one, 2.0)
solver.run(start, one, scale=2.0)
solver.run(start, one, keep_history=True, verbose=False)
solver.run(start, penalty=one, implicit_diff=False, checkpoint_every=10)
x, state = solver.update(x, solver.init(x, one), one)
assert_type(solver.optimality_fn(x, one), Tensor)
done = bool((state.status == Status.CONVERGED).all())

weights, tree_state = newton(tree_residual).run({"w": start}, start)
assert_type(weights, Weights)
assert_type(tree_state.memory, NewtonMemory)

# Functions without types, and objects that are called.
newton(torch.func.grad(ridge)).run(start, one)
newton(partial(gradient, penalty=one)).run(start)


class Distance(torch.nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return ((w - 1) ** 2).sum()


lbfgs(Distance()).run(start)


class Objective:
    def __call__(self, w: Tensor) -> Tensor:
        return self.method(w)

    def method(self, w: Tensor, *terms: Tensor) -> Tensor:
        return (w**2).sum() + sum(terms, torch.zeros(()))


lbfgs(Objective()).run(start)
lbfgs(Objective().method).run(start, one, one)


def any_solver(solver: Solver, x: Tensor) -> Tensor:
    solution: Tensor = solver.run(x, one)[0]
    return solution


def tensor_solver(solver: Solver[Tensor], x: Tensor) -> Tensor:
    return solver.run(x, one)[0]


def with_options(fn: Callable[[Tensor], Tensor], **options: Unpack[SolverOptions]) -> Tensor:
    return newton(fn, **options).run(start)[0]


any_solver(solver, start)
tensor_solver(solver, start)
with_options(torch.sin, rtol=1e-6)

# Projections and proximal operators return what they are given.
assert_type(simplex(start), Tensor)
assert_type(lasso({"w": start}, strength=0.1), Weights)

# Other factories.
lbfgs_b(ridge, bounds=(torch.zeros(2), None)).run(start, one)
levenberg_marquardt(gradient, loss="huber", loss_scale=0.1).run(start, one)
projected_gradient(ridge, simplex).run(start, one)
proximal_gradient(ridge, partial(lasso, strength=0.1)).run(start, one)
from_optimizer(ridge, adam(lr=cosine(0.1, 100)), maxiter=50).run(start, one)
scipy_minimize(ridge, method="BFGS").run(start, one)
anderson(torch.cos, history=3).run(start)
solution, _ = qp().run(None, torch.eye(2, dtype=torch.float64), start)
primal: Tensor = solution.primal

# One call for each kind of problem.
x, state = minimize(ridge, start, one, rtol=1e-6, verbose=False)
assert_type(state.memory, LbfgsMemory)
x, _ = minimize(ridge, start, one, solver=lbfgs_b, bounds=(0.0, 1.0))
assert_type(root(tree_residual, {"w": start}, start)[0], Weights)
assert_type(fixed_point(torch.cos, start, maxiter=20)[0], Tensor)
assert_type(least_squares(gradient, start, one, keep_history=True)[1].history, Tensor)

# Products with the Jacobian of a solution; linear solvers.
root_vjp(gradient, x, (one,), start)
root_jvp(gradient, x, (one,), (one,))
solve_cg(rtol=1e-6, on_failure="ignore")(double, start)

# Optimizers, schedules and loops of steps.
init, update = chain(clip_grad_norm(1.0), adam(lr=0.1))
optimizer_state = init(x)
updates, optimizer_state = update(start, optimizer_state, params=x)
x = apply_updates(x, updates)
unroll(double, 3)(start)
implicitdiff.sgd(lr=implicitdiff.schedule.linear(0.1, 0.0, 100), momentum=0.9)


class Ridge(ImplicitMetaGradientModule):
    def __init__(self, penalty: Tensor) -> None:
        super().__init__()
        self.penalty, self.w = penalty, torch.nn.Parameter(torch.zeros(2))

    def objective(self) -> Tensor:
        return ridge(self.w, self.penalty)

    def solve(self) -> Ridge:
        return self


Ridge(one).solve()
net = torch.nn.Linear(2, 1)
implicitdiff.MetaAdam(net, lr=0.1).step(net(start.float()).sum())
implicitdiff.Adam(torch.nn.Linear(2, 1).parameters(), lr=0.1).step()
