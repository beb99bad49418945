"""The loop round every iterative solver: budget, target, restarts, and the true residual at the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from implicitdiff._implicit.linear import LinearSolver
from implicitdiff._implicit.system import System
from implicitdiff.linear_solve._arithmetic import Arithmetic, Scalar, arithmetic
from implicitdiff.linear_solve._outcome import OnFailure, Outcome, check_on_failure, check_ridge, report_failed_solves


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
    broken: Scalar
    ended: Scalar | None = None


Method = Callable[[Arithmetic, Tensor, Scalar, int], Cycle]
"""``method(ops, r, target, limit)``: solve ``A d = r`` until ``|r - A d| <= target`` row by row, in at most ``limit``
iterations."""


NO_CONVERGENCE = (
    "no convergence; the operator may be singular or ill-conditioned: try solve_lu or solve_lstsq, a preconditioner, "
    "or a larger rtol"
)


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
    return report_failed_solves(name, iterate(system, method, broken, rtol, atol, maxiter), system, on_failure)


def check_tolerances(name: str, rtol: float | None, atol: float, maxiter: int | None) -> None:
    """Refuse tolerances and budgets that make no sense."""
    if rtol is not None and not (isinstance(rtol, (int, float)) and 0 <= rtol < math.inf):
        raise ValueError(f"{name}: rtol must be a finite number >= 0 or None, got {rtol!r}")
    if not (isinstance(atol, (int, float)) and 0 <= atol < math.inf):
        raise ValueError(f"{name}: atol must be a finite number >= 0, got {atol!r}")
    if maxiter is not None and (not isinstance(maxiter, int) or maxiter < 1):
        raise ValueError(f"{name}: maxiter must be an integer >= 1 or None, got {maxiter!r}")


def residual_norm(ops: Arithmetic, r: Tensor) -> Scalar:
    """The size by which most methods judge a residual."""
    return ops.norm(r)


def iterate(
    system: System,
    method: Method,
    broken: str,
    rtol: float | None,
    atol: float,
    maxiter: int | None,
    size: Callable[[Arithmetic, Tensor], Scalar] = residual_norm,
    least: Tensor | None = None,
) -> Outcome:
    """Run the method, again from where it came to as long as the true residual says that it is needed and helps.

    A recursively updated residual drifts from the true one; a restart on the true residual is one step of iterative
    refinement. Residuals are judged by `size`, and no target is below `least`.
    """
    ops = arithmetic(system)
    b = ops.vector(system.b)
    rtol = system.eps ** (2 / 3) if rtol is None else rtol
    limit = max(100, 10 * system.unknowns) if maxiter is None else maxiter
    residual = size(ops, b)
    target = ops.larger(rtol * residual, atol / ops.scalar(system.scale))
    if least is not None:
        target = ops.larger(target, ops.scalar(least))
    x, r = ops.vector(system.b.new_zeros(system.b.shape[0], system.unknowns)), b
    if system.start is not None:
        # A guess that is worse than zero is none.
        start = ops.vector(system.start)
        guessed = b - ops.matvec(start)
        error = size(ops, guessed)
        better = error < residual
        x, r, residual = (ops.select(better, *pair) for pair in ((start, x), (guessed, r), (error, residual)))
    failed = ops.negate(ops.finite(residual))
    stalled = ops.none
    used = 0
    while used < limit and ops.any(active := ops.negate((residual <= target) | failed | stalled)):
        cycle = method(ops, ops.select(active, r, 0.0), target, limit - used)
        used += cycle.iterations
        x = ops.select(active, x + cycle.d, x)
        r = b - ops.matvec(x)
        before, residual = residual, size(ops, r)
        failed = failed | (active & (cycle.broken | ops.negate(ops.finite(residual))))
        # A method that ended at its restart, short of its target, may go on slowly; one that took itself for done may
        # not.
        enough = 0.9 if cycle.ended is None else ops.select(cycle.ended, 0.9, 0.999)
        stalled = stalled | (active & ops.negate(residual <= enough * before))
    why = broken if ops.any(failed) else NO_CONVERGENCE
    if maxiter is None:
        failed = failed | ops.negate(residual <= target)
    figures = ops.per_row(residual), ops.per_row(target)
    return Outcome(ops.to_rows(x), ops.per_row(failed), why, lambda: figures, used)
