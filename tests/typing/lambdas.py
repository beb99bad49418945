# pyright: standard
"""Programs with lambdas, whose parameters have no types: a type checker must accept every line."""

from __future__ import annotations

import torch

from implicitdiff import custom_fixed_point, minimize, root_jvp, unroll
from implicitdiff.linear_solve import solve_cg
from implicitdiff.prox import lasso
from implicitdiff.solvers import lbfgs, newton, proximal_gradient

one, start = torch.tensor(1.0), torch.zeros(2)


@custom_fixed_point(lambda x, a: torch.cos(x) + a)
def solve(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    for _ in range(100):
        x = torch.cos(x) + a
    return x


torch.func.grad(lambda a: solve(one, a))(0.1 * one)
newton(lambda x, a: x**3 - a).run(one, one)
newton(lambda x, a: {"w": x["w"] - a}).run({"w": start}, start)
lbfgs(lambda x: (x**2).sum()).run(start)
lbfgs(lambda x, a: ((x - a) ** 2).sum()).run(start, one)
proximal_gradient(lambda x: (x**2).sum(), lambda x, step: lasso(x, step)).run(start)
minimize(lambda x: (x**2).sum(), start)
root_jvp(lambda x, a: x - a, one, (one,), (one,))
solve_cg()(lambda v: 2 * v, start)
unroll(lambda x: x + 1, 3)(start)
