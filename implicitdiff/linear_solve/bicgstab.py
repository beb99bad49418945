"""The stabilised biconjugate gradient method."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from implicitdiff._calls import shows_call
from implicitdiff._implicit.linear import LinearSolver
from implicitdiff._torch.trees import Tree
from implicitdiff.linear_solve._arithmetic import Arithmetic, Iterations, RowScalar
from implicitdiff.linear_solve._krylov import Cycle, iterative
from implicitdiff.linear_solve._outcome import OnFailure


@shows_call
def solve_bicgstab(
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    maxiter: int | None = None,
    ridge: float = 0.0,
    preconditioner: Callable[[Tree], Tree] | None = None,
    init: Tree = None,
    on_failure: OnFailure = "raise",
) -> LinearSolver:
    r"""Make a BiCGSTAB solver ``solve(matvec, b) -> x`` for ``A x = b``, ``A`` any non-singular operator.

    Short recurrences, with two products with ``A`` an iteration and none with the adjoint, without a guarantee of
    convergence. After a breakdown the recurrence restarts from the true residual, and fails if this does not decrease.
    Stopping test as in `solve_cg`.

    Args:
        rtol: relative tolerance; stops at ``|b - A x| <= max(rtol |b|, atol)``. None: ``eps^(2/3)`` of the dtype.
        atol: absolute tolerance, in the units of ``b``.
        maxiter: budget of iterations. None: ``max(100, 10 n)``; reaching this limit is a failure.
        ridge: solve ``(A + ridge I) x = b``; a number >= 0.
        preconditioner: ``r -> M^-1 r`` with ``M`` close to ``A``; changes the speed, not the solution.
        init: initial guess, a tree like ``b``; changes the speed, not the solution.
        on_failure: ``"raise"`` a `LinearSolveError`, ``"warn"`` with a `LinearSolveWarning`, or ``"ignore"``.

    Raises (when solving):
        LinearSolveError: breakdown, or no convergence with ``maxiter=None``.

    Reference:
        van der Vorst (1992); Saad, "Iterative Methods for Sparse Linear Systems", 2nd ed., algorithm 7.7.

    Example:
        >>> import torch
        >>> from implicitdiff.linear_solve import solve_bicgstab
        >>> A = torch.tensor([[4.0, 1.0], [-1.0, 3.0]])
        >>> solve_bicgstab()(lambda v: A @ v, torch.tensor([5.0, 2.0])).round(decimals=4)
        tensor([1., 1.])
    """
    return iterative(
        "solve_bicgstab",
        bicgstab,
        "the iteration has produced values that are not finite: use solve_gmres or solve_lu",
        rtol=rtol,
        atol=atol,
        maxiter=maxiter,
        ridge=ridge,
        preconditioner=preconditioner,
        init=init,
        on_failure=on_failure,
    )


def bicgstab(ops: Arithmetic, r: Tensor, target: RowScalar, limit: Iterations) -> Cycle:
    """A `Method` for any operator, with short recurrences. Notation of Saad, algorithm 7.7, right preconditioned."""
    # The usual choice; any vector with ``(r*, r) != 0`` would do.
    shadow = r

    def is_unfinished(carry: _BicgstabIterate) -> RowScalar:
        _, _, _, size, _, stopped = carry
        return ops.negate((size <= target) | stopped)

    def advance(carry: _BicgstabIterate, active: RowScalar, left: Iterations) -> tuple[_BicgstabIterate, Iterations]:
        x, r, p, _, rho, stopped = carry
        p_hat = ops.precondition(p)
        # alpha = rho / (r*, A p), with the shadow residual r* the first residual.
        v = ops.matvec(p_hat)
        slope = ops.dot(shadow, v)
        alpha = ops.ratio(active & (slope != 0), rho, slope)
        # ``alpha`` makes ``s = r - alpha A p`` orthogonal to the shadow residual.
        s = ops.add(r, -alpha, v)
        s_hat = ops.precondition(s)
        t = ops.matvec(s_hat)
        length = ops.norm(t)
        moves = active & (length != 0)
        # omega = t.s / t.t, divided by |t| twice: the square of |t| may overflow or underflow. ``omega`` minimises
        # ``|s - omega t|``.
        omega = ops.ratio(moves, ops.ratio(moves, ops.dot(t, s), length), length)
        # Right preconditioning: ``x`` moves along ``M^-1 p`` and ``M^-1 s``, and ``r`` remains the residual of ``x``.
        x, r = ops.add(ops.add(x, alpha, p_hat), omega, s_hat), ops.add(s, -omega, t)
        size = ops.norm(r)
        # beta = (rho_new / rho) (alpha / omega), and p = r + beta (p - omega A p).
        rho, before = ops.dot(shadow, r), rho
        go = active & (alpha != 0) & (omega != 0) & (rho != 0) & ops.finite(size)
        stopped = stopped | (active ^ go)
        beta = ops.ratio(go, rho, before) * ops.ratio(go, alpha, omega)
        p = ops.add(r, beta, ops.add(p, -omega, v))
        return (x, r, p, size, rho, stopped), 1

    start = torch.zeros_like(r), r, r, ops.norm(r), ops.dot(r, r), ops.none
    (x, *_), used = ops.repeat(advance, start, is_unfinished, limit)
    # A restart chooses another shadow residual, so no row is broken.
    return Cycle(x, used, ops.none)


_BicgstabIterate = tuple[Tensor, Tensor, Tensor, RowScalar, RowScalar, RowScalar]
"""``x``, ``r``, ``p``, ``|r|``, ``rho``, and the rows with a division by zero in the recurrence."""
