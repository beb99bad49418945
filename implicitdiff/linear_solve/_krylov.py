"""Common part of the iterative solvers: target, limit of iterations, restarts, and the test on the true residual."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from implicitdiff._implicit.linear import LinearSolver
from implicitdiff._implicit.system import System
from implicitdiff._torch.trees import Tree
from implicitdiff.linear_solve._arithmetic import Arithmetic, Iterations, RowScalar, arithmetic
from implicitdiff.linear_solve._outcome import (
    OnFailure,
    Outcome,
    check_integer,
    check_not_negative,
    check_on_failure,
    report_failed_solves,
)


class Cycle(NamedTuple):
    """Result of one run of a method from the zero vector.

    Attributes:
        d: approximate solution of ``A d = r``; zero in rows with ``r = 0``.
        iterations: number of iterations used.
        broken: rows in which the method cannot continue.
        ended: rows in which the recursive residual reached the target; None: all.
    """

    d: Tensor
    iterations: Iterations
    broken: RowScalar
    ended: RowScalar | None = None


Method = Callable[[Arithmetic, Tensor, RowScalar, Iterations], Cycle]
"""``method(ops, r, target, limit)``: solve ``A d = r`` to ``|r - A d| <= target`` in each row, by at most ``limit``
iterations."""


NO_CONVERGENCE = (
    "no convergence; the operator may be singular or ill-conditioned: use solve_lu or solve_lstsq, a preconditioner, "
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
    preconditioner: Callable[[Tree], Tree] | None = None,
    init: Tree = None,
    on_failure: OnFailure,
) -> LinearSolver:
    """Return a linear solver from a method. `broken` is the message for a row in which it breaks down."""
    check_on_failure(name, on_failure)
    check_not_negative(name, "ridge", ridge)
    check_tolerances(name, rtol, atol, maxiter)
    if preconditioner is not None and not callable(preconditioner):
        raise TypeError(f"{name}: preconditioner must be a function v -> M^-1 v, got {type(preconditioner).__name__}")

    algorithm = partial(
        _solve_by_iteration,
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


def _solve_by_iteration(
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
    """Raise unless tolerances and limit are valid."""
    check_not_negative(name, "rtol", rtol, or_none=True)
    check_not_negative(name, "atol", atol)
    check_integer(name, "maxiter", maxiter, 1, or_none=True)


def residual_norm(ops: Arithmetic, r: Tensor) -> RowScalar:
    """Return the norm of a residual, the default size of the convergence test."""
    return ops.norm(r)


def _start_point(
    ops: Arithmetic, system: System, b: Tensor, residual: RowScalar, size: Callable[[Arithmetic, Tensor], RowScalar]
) -> tuple[Tensor, Tensor, RowScalar]:
    """Return the initial guess with residual and its size; rows where the guess is worse than zero start from zero."""
    x = ops.vector(system.b.new_zeros(system.b.shape[0], system.unknowns))
    if system.start is None:
        return x, b, residual
    start = ops.vector(system.start)
    guessed = b - ops.matvec(start)
    error = size(ops, guessed)
    # A comparison with nan is false, so a guess that is not finite is dropped.
    better = error < residual
    return ops.select(better, start, x), ops.select(better, guessed, b), ops.select(better, error, residual)


def iterate(
    system: System,
    method: Method,
    broken: str,
    rtol: float | None,
    atol: float,
    maxiter: int | None,
    size: Callable[[Arithmetic, Tensor], RowScalar] = residual_norm,
    least: Tensor | None = None,
) -> Outcome:
    """Run a method, and restart it on the true residual until this reaches the target or stops to decrease.

    A recursively updated residual drifts from the true residual by rounding. A restart on the true residual is one step
    of iterative refinement.

    Args:
        system: the system.
        method: the method.
        broken: message for rows in which the method breaks down.
        rtol, atol, maxiter: see `implicitdiff.linear_solve`.
        size: the norm of the convergence test.
        least: lower bound of the targets, a column.
    """
    ops = arithmetic(system)
    b = ops.vector(system.b)
    # ``eps^(2/3)`` is above the rounding of the residual for condition numbers up to ``eps^(-1/3)``.
    rtol = system.eps ** (2 / 3) if rtol is None else rtol
    limit = max(100, 10 * system.unknowns) if maxiter is None else maxiter
    residual = size(ops, b)
    # Rows of a system are scaled to largest entry 1, so atol is scaled likewise.
    target = ops.larger(rtol * residual, atol / ops.scalar(system.scale))
    if least is not None:
        target = ops.larger(target, ops.scalar(least))
    x, r, residual = _start_point(ops, system, b, residual, size)

    def is_unfinished(carry: _CycleIterate) -> RowScalar:
        _, _, residual, failed, stalled = carry
        return ops.negate((residual <= target) | failed | stalled)

    def advance(carry: _CycleIterate, active: RowScalar, left: Iterations) -> tuple[_CycleIterate, Iterations]:
        x, r, before, failed, stalled = carry
        # A zero right-hand side stops finished rows at once.
        cycle = method(ops, ops.select(active, r, 0.0), target, left)
        x = ops.select(active, x + cycle.d, x)
        r = b - ops.matvec(x)
        residual = size(ops, r)
        failed = failed | (active & (cycle.broken | ops.negate(ops.finite(residual))))
        # A cycle that ended with its dimension may make slow progress, by a factor of 0.999. A cycle whose recursive
        # residual reached the target has to reduce the true residual to 0.9, or rounding limits it.
        enough = 0.9 if cycle.ended is None else ops.select(cycle.ended, 0.9, 0.999)
        stalled = stalled | (active & ops.negate(residual <= enough * before))
        return (x, r, residual, failed, stalled), cycle.iterations

    start = x, r, residual, ops.negate(ops.finite(residual)), ops.none
    (x, _, residual, broke, _), used = ops.repeat(advance, start, is_unfinished, limit)
    # An integer maxiter is a budget: rows that used it up return their last iterate without failure.
    failed = broke if maxiter is not None else broke | ops.negate(residual <= target)
    figures = ops.per_row(residual), ops.per_row(target)
    return Outcome(
        ops.to_rows(x),
        ops.per_row(failed),
        lambda: broken if ops.any(broke) else NO_CONVERGENCE,
        lambda: figures,
        used,
    )


_CycleIterate = tuple[Tensor, Tensor, RowScalar, RowScalar, RowScalar]
"""The iterate and its residual, the size of the residual, and the rows that have failed or make no progress."""
