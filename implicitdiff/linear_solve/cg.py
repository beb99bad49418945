"""Conjugate gradients."""

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

INDEFINITE = (
    "the operator is not positive definite, or not finite (a search direction has p'Ap <= 0): add a ridge at a "
    "minimum that is not strict; for other operators use solve_gmres, solve_lu or solve_lstsq"
)


@shows_call
def solve_cg(
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    maxiter: int | None = None,
    ridge: float = 0.0,
    preconditioner: Callable[[Tree], Tree] | None = None,
    init: Tree = None,
    on_failure: OnFailure = "raise",
) -> LinearSolver:
    r"""Make a conjugate-gradient solver ``solve(matvec, b) -> x`` for ``A x = b``, ``A`` Hermitian positive definite.

    Stops in each lane at ``|b - A x| <= max(rtol |b|, atol)``, in the Euclidean norm over all leaves. In exact
    arithmetic the number of iterations is at most the number of distinct eigenvalues of ``A``. The error bound
    decreases in each iteration by ``(sqrt(k) - 1) / (sqrt(k) + 1)`` for condition number ``k``.

    Args:
        rtol: relative tolerance; stops at ``|b - A x| <= max(rtol |b|, atol)``. None: ``eps^(2/3)`` of the dtype.
        atol: absolute tolerance, in the units of ``b``.
        maxiter: budget of iterations. None: ``max(100, 10 n)``; reaching this limit is a failure.
        ridge: solve ``(A + ridge I) x = b``; a number >= 0.
        preconditioner: ``r -> M^-1 r`` with ``M`` close to ``A``; changes the speed, not the solution.
        init: initial guess, a tree like ``b``; changes the speed, not the solution.
        on_failure: ``"raise"`` a `LinearSolveError`, ``"warn"`` with a `LinearSolveWarning`, or ``"ignore"``.

    Raises (when solving):
        LinearSolveError: ``A`` is not positive definite, or no convergence with ``maxiter=None``.

    Reference:
        Hestenes and Stiefel (1952); Saad, "Iterative Methods for Sparse Linear Systems", 2nd ed., algorithm 9.1.

    Example:
        >>> import torch
        >>> from implicitdiff.linear_solve import solve_cg
        >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
        >>> solve_cg()(lambda v: A @ v, torch.tensor([1.0, 2.0]))
        tensor([0.0909, 0.6364])
    """
    return iterative(
        "solve_cg",
        conjugate_gradients,
        INDEFINITE,
        rtol=rtol,
        atol=atol,
        maxiter=maxiter,
        ridge=ridge,
        preconditioner=preconditioner,
        init=init,
        on_failure=on_failure,
    )


def conjugate_gradients(ops: Arithmetic, r: Tensor, target: RowScalar, limit: Iterations) -> Cycle:
    """A `Method` for symmetric positive definite operators. Notation of Saad, algorithm 9.1."""
    z = ops.precondition(r)
    rz = ops.dot(r, z)
    # If the square of a small residual underflows, the cycle ends; `iterate` then tests a norm safe from underflow.
    rr, reach = rz if z is r else ops.dot(r, r), target * target

    def is_unfinished(carry: _CgIterate) -> RowScalar:
        _, _, _, _, rr, broken = carry
        return ops.negate((rr <= reach) | broken)

    def advance(carry: _CgIterate, active: RowScalar, left: Iterations) -> tuple[_CgIterate, Iterations]:
        # Invariant: ``r`` is the residual of ``x``, up to rounding, and orthogonal to ``M^-1`` times the earlier
        # residuals.
        x, r, p, rz, _, broken = carry
        # alpha = (r, z) / (p, A p) is the minimiser of the quadratic along p.
        Ap = ops.matvec(p)
        pAp = ops.dot(p, Ap)
        # p'Ap <= 0 proves that A is not positive definite; r'z <= 0 the same of the preconditioner.
        go = active & (pAp > 0) & (rz > 0)
        broken = broken | (active ^ go)
        # `ratio` is 0 in stopped rows, which keeps x and r there.
        alpha = ops.ratio(go, rz, pAp)
        x, r = ops.add(x, alpha, p), ops.add(r, -alpha, Ap)
        z = ops.precondition(r)
        rz, before = ops.dot(r, z), rz
        rr = rz if z is r else ops.dot(r, r)
        # beta = (r_new, z_new) / (r, z) makes p conjugate to the earlier directions.
        p = ops.add(z, ops.ratio(go, rz, before), p)
        return (x, r, p, rz, rr, broken), 1

    start = torch.zeros_like(r), r, z, rz, rr, ops.none
    (x, *_, broken), used = ops.repeat(advance, start, is_unfinished, limit)
    return Cycle(x, used, broken)


_CgIterate = tuple[Tensor, Tensor, Tensor, RowScalar, RowScalar, RowScalar]
"""``x``, ``r``, ``p``, ``(r, z)``, ``(r, r)``, and the rows in which the method has broken down."""
