"""Newton steps for roots: the linear system, a step with backtracking, and a test for divergence."""

from __future__ import annotations

import torch
from torch import Tensor

import implicitdiff.solvers._loop.dense as _dense
from implicitdiff._implicit.linear import LinearSolver
from implicitdiff._implicit.linear_problem import LinearProblem, solve_linear
from implicitdiff._implicit.linearisation import Product
from implicitdiff._implicit.operators import Linearised, Products
from implicitdiff._torch.trees import Tree
from implicitdiff.solvers._loop.problem import BatchedProblem, VectorMap, row_norm, safe_divide, select
from implicitdiff.solvers._loop.state import GrowthMemoryT, ResidualMemoryT, State
from implicitdiff.solvers._loop.status import Status
from implicitdiff.solvers._steps.backtracking import HALVINGS, TrialPoint, backtrack


def check_linear_solve(name: str, linear_solve: object) -> None:
    """Raise TypeError unless the linear solver is the library's; a user's own function solves no batch of lanes."""
    if linear_solve is not None and not isinstance(linear_solve, LinearSolver):
        raise TypeError(
            f"{name}: linear_solve must be made by a factory of implicitdiff.linear_solve, or be None for a dense "
            f"factorisation, got {type(linear_solve).__name__}"
        )


def newton_direction(problem: BatchedProblem, at: Tensor, r: Tensor, linear_solve: LinearSolver | None) -> Tensor:
    """Return ``d`` with ``J(at) d = r``, by LU if `linear_solve` is None."""
    if linear_solve is None:
        return _dense.solve_dense(problem.fn.jacobian(at)[1], r)
    inputs, structure = problem.inputs, problem.structure
    # A linear solver takes trees, and its preconditioner is the user's function of trees.
    b = inputs.unravel(r)
    if problem.plain:
        _, push, pull = problem.fn.linearise(at)
        # Below the transforms: one linearisation serves all products of the linear solver. Nothing differentiates plain
        # tensors, so the matrix needs no operands (``count=0``).
        operator = Linearised(Products(lambda: _on_leaves(problem, push), lambda: _on_leaves(problem, pull)))
        linear = LinearProblem(operator, linear_solve, structure, count=0, lanes=inputs.batch)
        return inputs.ravel(solve_linear(linear, b, []))

    def matvec(v: Tree) -> Tree:
        # Linearise inside of `matvec`: the linear solver's derivative must find the operands on which its matrix
        # depends.
        push = _on_leaves(problem, problem.fn.linearise(at)[1])
        return structure.unflatten(push(structure.tensors_of(v)))

    return inputs.ravel(structure.tensors_of(linear_solve(matvec, structure.unflatten(b))))


def _on_leaves(problem: BatchedProblem, product: VectorMap) -> Product:
    return lambda v: problem.inputs.unravel(product(problem.inputs.ravel(v)))


def take_step(
    problem: BatchedProblem, x: Tensor, state: State[ResidualMemoryT], step: Tensor, backtracking: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``x + step``, its residual and the status; with backtracking a step is halved in lanes whose residual does
    not decrease sufficiently (Armijo's condition on the norm)."""
    if not backtracking:
        new_x = x + step
        return new_x, problem.fn(new_x), state.status
    new_x, new_r, refused = shorten_step(problem, x, state, step, state.status == Status.RUNNING)
    return new_x, new_r, torch.where(refused, int(Status.LINE_SEARCH_FAILED), state.status)


def shorten_step(
    problem: BatchedProblem,
    x: Tensor,
    state: State[ResidualMemoryT],
    step: Tensor,
    active: Tensor,
    halvings: int = HALVINGS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first of the points ``x + step, x + step / 2, ...`` with a sufficiently smaller residual, the
    residual, and the `active` lanes without such a point; the latter stay at ``x``."""

    def at(length: Tensor) -> TrialPoint:
        new_x = x + length[:, None] * step
        return new_x, problem.fn(new_x)

    def enough(new: TrialPoint, length: Tensor) -> Tensor:
        # Refuse a step that rounds to zero. Armijo's condition for ``|r|``, whose slope along a Newton step is
        # ``-|r|``. The slope is ``r'J d / |r|`` with ``J d = -r``.
        smaller: Tensor = row_norm(new[1]) <= (1.0 - 1e-4 * length) * state.error
        return smaller & (new[0] != x).any(dim=-1)

    whole = torch.ones_like(state.error)
    (new_x, new_r), _, refused = backtrack(at, enough, whole, active, halvings)
    return select(refused, x, new_x), select(refused, state.memory.residual, new_r), refused


def watch_growth(
    state: State[GrowthMemoryT], x: Tensor, new_x: Tensor, r: Tensor, new_r: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the new ``growth`` and the status.

    ``growth`` is the factor by which ``|r|`` has grown in consecutive steps that increased both ``|r|`` and ``|x|``.
    Iterates diverge, status ``DIVERGED``, if ``growth`` exceeds ``1 / eps``. A step counts for at most ``eps^(-1/8)``,
    because a single large step is no divergence: from near the minimum of ``x^3 - 1``, say, Newton's method jumps far
    away and comes back.
    """
    # Both must grow: a residual may grow on the way to a solution, and ``|x|`` in any search.
    rate = safe_divide(row_norm(new_r), row_norm(r)).clamp(max=eps ** (-1 / 8))
    growth = torch.where((rate > 1) & (row_norm(new_x) > row_norm(x)), state.memory.growth * rate, 1.0)
    gone = (growth > 1 / eps) | ~torch.isfinite(new_x).all(dim=-1)
    return growth, torch.where(gone & (state.status == Status.RUNNING), int(Status.DIVERGED), state.status)
