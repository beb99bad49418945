"""The loop round every iterative solver: budget, target, restarts, and the true residual at the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicitdiff._linear import LinearSolver
from implicitdiff._system import System
from implicitdiff.linear_solve._outcome import OnFailure, Outcome, check_on_failure, check_ridge, settle


class Cycle(NamedTuple):
    """What one run of a method from the zero vector came to.

    Attributes:
        d: approximately solves ``A d = r``; zero in rows where ``r`` is.
        iterations: how many were used.
        broken: rows in which the method cannot go on.
        ended: rows in which the method takes its target for reached; None: all.
    """

    d: Tensor
    iterations: int
    broken: Tensor
    ended: Tensor | None = None


Method = Callable[[System, Tensor, Tensor, int], Cycle]
"""``method(system, r, target, limit)``: solve ``A d = r`` until ``|r - A d| <= target`` row by row, in at most
``limit`` iterations."""


NO_CONVERGENCE = (
    "no convergence; the operator may be singular or ill-conditioned: try solve_lu or solve_lstsq, a preconditioner, "
    "or a larger rtol"
)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row, kept as a column."""
    return (a * b).sum(dim=-1, keepdim=True)


def norm(a: Tensor) -> Tensor:
    """Euclidean, row by row, kept as a column; no square leaves the range of the dtype."""
    largest = a.abs().amax(dim=-1, keepdim=True)
    largest = torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)
    size: Tensor = largest * torch.linalg.vector_norm(a / largest, dim=-1, keepdim=True)
    return size


def safe_divide(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, and 0 where ``b`` is 0."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


def iterative(
    name: str,
    method: Method,
    broken: str,
    *,
    rtol: float | None,
    atol: float,
    maxiter: int | None,
    ridge: float = 0.0,
    preconditioner: Callable[[Any], Any] | None = None,
    init: Any = None,
    on_failure: OnFailure,
) -> LinearSolver:
    """A linear solver from a method; `broken` says what its breakdown means."""
    check_on_failure(name, on_failure)
    check_ridge(name, ridge)
    check_tolerances(name, rtol, atol, maxiter)
    if preconditioner is not None and not callable(preconditioner):
        raise TypeError(f"{name}: preconditioner must be a function v -> M^-1 v, got {type(preconditioner).__name__}")

    algorithm = partial(
        _solve,
        name=name,
        method=method,
        broken=broken,
        rtol=rtol,
        atol=atol,
        maxiter=maxiter,
        ridge=ridge,
        on_failure=on_failure,
    )
    return LinearSolver(name, algorithm, preconditioner, init, ridge=ridge)


def _solve(
    system: System,
    *,
    name: str,
    method: Method,
    broken: str,
    rtol: float | None,
    atol: float,
    maxiter: int | None,
    ridge: float,
    on_failure: OnFailure,
) -> Tensor:
    system = system.shifted(ridge)
    return settle(name, iterate(system, method, broken, rtol, atol, maxiter), system, on_failure)


def check_tolerances(name: str, rtol: float | None, atol: float, maxiter: int | None) -> None:
    """Refuse tolerances and budgets that make no sense."""
    if rtol is not None and not (isinstance(rtol, (int, float)) and 0 <= rtol < math.inf):
        raise ValueError(f"{name}: rtol must be a finite number >= 0 or None, got {rtol!r}")
    if not (isinstance(atol, (int, float)) and 0 <= atol < math.inf):
        raise ValueError(f"{name}: atol must be a finite number >= 0, got {atol!r}")
    if maxiter is not None and (not isinstance(maxiter, int) or maxiter < 1):
        raise ValueError(f"{name}: maxiter must be an integer >= 1 or None, got {maxiter!r}")


def iterate(
    system: System,
    method: Method,
    broken: str,
    rtol: float | None,
    atol: float,
    maxiter: int | None,
    size: Callable[[Tensor], Tensor] = norm,
    least: Tensor | float = 0.0,
) -> Outcome:
    """Run the method, again from where it came to as long as the true residual says that it is needed and helps.

    A recursively updated residual drifts from the true one; a restart on the true residual is one step of iterative
    refinement. Residuals are judged by `size`, and no target is below `least`.
    """
    b = system.b
    rtol = system.eps ** (2 / 3) if rtol is None else rtol
    limit = max(100, 10 * system.unknowns) if maxiter is None else maxiter
    target = torch.maximum(rtol * size(b), atol / system.scale).clamp(min=least)
    x, r, residual = b.new_zeros(b.shape[0], system.unknowns), b, size(b)
    if system.start is not None:
        # A guess that is worse than zero is none.
        guessed = b - system.matvec(system.start)
        better = size(guessed) < residual
        x, r = torch.where(better, system.start, x), torch.where(better, guessed, r)
        residual = size(r)
    failed = ~torch.isfinite(residual)
    stalled = torch.zeros_like(failed)
    used = 0
    while used < limit and bool((active := ~(residual <= target) & ~failed & ~stalled).any()):
        cycle = method(system, torch.where(active, r, 0.0), target, limit - used)
        used += cycle.iterations
        x = torch.where(active, x + cycle.d, x)
        r = b - system.matvec(x)
        before, residual = residual, size(r)
        failed = failed | (active & (cycle.broken | ~torch.isfinite(residual)))
        # A method that ended at its restart, short of its target, may go on slowly; one that took itself for done may
        # not.
        enough = 0.9 if cycle.ended is None else torch.where(cycle.ended, 0.9, 0.999)
        stalled = stalled | (active & ~(residual <= enough * before))
    why = broken if bool(failed.any()) else NO_CONVERGENCE
    if maxiter is None:
        failed = failed | ~(residual <= target)
    return Outcome(x, failed[:, 0], why, residual[:, 0], target[:, 0], used)
