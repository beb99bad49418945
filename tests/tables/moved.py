"""The tables of functions that look a number up where it may have been replaced since the call.

A `Route` makes a function ``fn(x, t) = s x^2 - t`` and what replaces the ``s`` that it finds; a `Door` solves for
``x = sqrt(t / s)`` with it, in one of the ways that the library has, or for something else that s determines.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from checks.derivatives import ways_at
from torch import Tensor, nn

import implicitdiff as idf
from implicitdiff import custom_fixed_point, custom_root, linear_solve, projections, root_jvp, root_vjp, solvers, unroll
from implicitdiff.nn import ImplicitMetaGradientModule
from implicitdiff.solvers import KKTSolution, make_kkt_optimality_fn
from tables.routes import ROUTES, Route
from tables.solvers import MINIMISERS
from tables.unusual_routes import UNUSUAL

__all__ = ["DOORS", "ROUTES", "UNUSUAL", "WAYS", "Door", "Route", "T"]

F64 = torch.float64
T = torch.tensor(4.0, dtype=F64)
Residual = Callable[[Tensor, Tensor], Tensor]


class Door(NamedTuple):
    """``solve(fn, t, s)`` solves with a residual that has s now, which is for guesses; ``closed(t, s)`` is right."""

    name: str
    solve: Callable[[Residual, Tensor, float], Tensor]
    closed: Callable[[Tensor, float], Tensor]
    tolerance: float = 1e-8

    def __str__(self) -> str:
        return self.name


# --- ways to take a derivative of a function of one number -----------------------------------------------------------


WAYS = ways_at(T)

# --- ways to have a solution -----------------------------------------------------------------------------------------


def root(t: Tensor, s: float) -> Tensor:
    return torch.sqrt(t / s)


def near(t: Tensor, s: float) -> Tensor:
    return 1.05 * root(t, s).detach()


def objective(fn: Residual) -> Residual:
    """With the gradient s x^2 - t."""
    return lambda x, t: (x * fn(x, t) - 2 * t * x) / 3


def contraction(fn: Residual) -> Residual:
    return lambda x, t: x - fn(x, t) / 8


def factor(fn: Residual, t: Tensor) -> Tensor:
    """s itself."""
    return fn(torch.ones_like(t), t) + t


def by_custom_root(fn: Residual, t: Tensor, s: float) -> Tensor:
    return custom_root(fn)(lambda init, t: root(t, s))(None, t)


def by_custom_root_captured(fn: Residual, t: Tensor, s: float) -> Tensor:
    return custom_root(lambda x: fn(x, t))(lambda init: root(t, s))(None)


def by_custom_fixed_point(fn: Residual, t: Tensor, s: float) -> Tensor:
    return custom_fixed_point(contraction(fn))(lambda init, t: root(t, s))(None, t)


def by_search(factory: Callable[..., solvers.Solver], pose: Callable[[Residual], Any] = lambda fn: fn, **how: Any):
    def solve(fn: Residual, t: Tensor, s: float) -> Tensor:
        return factory(pose(fn), rtol=1e-12, atol=1e-12).run(near(t, s), t, **how)[0]

    return solve


def by_bisection(fn: Residual, t: Tensor, s: float) -> Tensor:
    return solvers.bisection(fn, 0.3, 5.0).run(near(t, s), t)[0]


def by_scipy(fn: Residual, t: Tensor, s: float) -> Tensor:
    return solvers.scipy_minimize(objective(fn), method="trust-exact", rtol=0.0, atol=1e-9).run(near(t, s), t)[0]


def by_prox(fn: Residual, t: Tensor, s: float) -> Tensor:
    """Least (x - t^2)^2 / 2 + s x^2 / 2."""
    solver = solvers.proximal_gradient(
        lambda x: (x - t**2) ** 2 / 2, lambda v, size: v / (1 + size * factor(fn, t)), rtol=1e-12, atol=1e-12
    )
    return solver.run(near(t, s))[0]


def by_kkt(fn: Residual, t: Tensor, s: float) -> Tensor:
    """Least x^2 / 2 subject to s x^2 = t, with the multiplier -1 / (2 s)."""
    condition = make_kkt_optimality_fn(lambda x: (x**2).sum() / 2, eq_fn=fn)

    def found(init: Any, params_eq: Tensor) -> KKTSolution:
        return KKTSolution(root(params_eq, s), torch.full_like(params_eq, -0.5 / s))

    return custom_root(condition)(found)(None, params_eq=t).primal


class ByObjective(ImplicitMetaGradientModule):
    def __init__(self, fn: Residual, t: Tensor, s: float) -> None:
        super().__init__()
        self.fn, self.t, self.s = fn, t, s
        self.x = nn.Parameter(torch.ones((), dtype=F64))

    def objective(self) -> Tensor:
        return objective(self.fn)(self.x, self.t)

    def solve(self) -> Tensor:
        self.x = nn.Parameter(root(self.t, self.s))
        return self.x


class ByOptimality(ByObjective):
    def optimality(self) -> Tensor:
        return self.fn(self.x, self.t)


def by_linear_solve(solver: Callable[..., Tensor]):
    def solve(fn: Residual, t: Tensor, s: float) -> Tensor:
        return solver(lambda v: (factor(fn, t) + t) * v, t)

    return solve


def quotient(t: Tensor, s: float) -> Tensor:
    return t / (s + t)


def by_preconditioner(fn: Residual, t: Tensor, s: float) -> Tensor:
    solver = linear_solve.solve_gmres(rtol=1e-13, preconditioner=lambda v: v / (factor(fn, t) + t))
    return solver(lambda v: (3 + t) * v, t)


def by_steps(fn: Residual, t: Tensor, s: float) -> Tensor:
    return unroll(contraction(fn), 6, 2)(torch.ones_like(t), t)


def six_steps(t: Tensor, s: float) -> Tensor:
    x = torch.ones_like(t)
    for _ in range(6):
        x = x - (s * x**2 - t) / 8
    return x


def by_root_vjp(fn: Residual, t: Tensor, s: float) -> Tensor:
    return root_vjp(fn, root(t, s), (t,), torch.ones_like(t))[0]


def by_root_jvp(fn: Residual, t: Tensor, s: float) -> Tensor:
    return root_jvp(fn, root(t, s), (t,), (torch.ones_like(t),))


def slope(t: Tensor, s: float) -> Tensor:
    return 1 / (2 * s * root(t, s))


def as_row(fn: Residual) -> Residual:
    return lambda x, t: fn(x, t)[None]


def identity(v: Any) -> Any:
    return v


sgd = partial(solvers.from_optimizer, transformation=idf.sgd(0.2))
projected = partial(solvers.projected_gradient, projection=projections.non_negative)
mirror = partial(solvers.mirror_descent, projection=identity, mapping=identity)
DOORS = [
    Door("custom_root", by_custom_root, root),
    Door("newton", by_search(solvers.newton), root),
    Door("custom_root, captured", by_custom_root_captured, root),
    Door("custom_fixed_point", by_custom_fixed_point, root),
    Door("root_vjp", by_root_vjp, slope),
    Door("root_jvp", by_root_jvp, slope),
    Door("broyden_root", by_search(solvers.broyden_root), root),
    Door("chord", by_search(solvers.chord), root),
    Door("bisection", by_bisection, root),
    Door("anderson", by_search(solvers.anderson, contraction), root),
    Door("broyden", by_search(solvers.broyden, contraction), root),
    Door("fixed_point_iteration", by_search(solvers.fixed_point_iteration, contraction), root),
    *(Door(row.name, by_search(row.factory, objective), root) for row in MINIMISERS),
    Door("from_optimizer", by_search(sgd, objective), root),
    Door("gauss_newton", by_search(solvers.gauss_newton, as_row), root),
    Door("levenberg_marquardt", by_search(solvers.levenberg_marquardt, as_row), root),
    Door("projected_gradient", by_search(projected, objective), root),
    Door("proximal_gradient", by_prox, lambda t, s: t**2 / (1 + s)),
    Door("mirror_descent", by_search(mirror, objective), root),
    Door("scipy_root", by_search(solvers.scipy_root), root),
    Door("scipy_minimize", by_scipy, root, 1e-6),
    Door("scipy_least_squares", by_search(solvers.scipy_least_squares, as_row), root),
    Door("newton, iterations", by_search(solvers.newton, implicit_diff=False, checkpoint_every=2), root),
    Door("lbfgs, iterations", by_search(solvers.lbfgs, objective, implicit_diff=False, checkpoint_every=3), root),
    Door("unroll", by_steps, six_steps),
    Door("solve_lu", by_linear_solve(linear_solve.solve_lu()), quotient),
    Door("solve_cg", by_linear_solve(linear_solve.solve_cg(rtol=1e-13)), quotient),
    Door("solve_gmres", by_linear_solve(linear_solve.solve_gmres(rtol=1e-13)), quotient),
    Door("preconditioner", by_preconditioner, lambda t, s: t / (3 + t)),
    Door("module, objective", lambda *args: ByObjective(*args).solve(), root),
    Door("module, optimality", lambda *args: ByOptimality(*args).solve(), root),
    Door("make_kkt_optimality_fn", by_kkt, root),
]
