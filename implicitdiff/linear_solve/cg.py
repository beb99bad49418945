"""Conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicitdiff._implicit.linear import LinearSolver
from implicitdiff.linear_solve._arithmetic import Arithmetic, Scalar
from implicitdiff.linear_solve._krylov import Cycle, iterative
from implicitdiff.linear_solve._outcome import OnFailure

INDEFINITE = (
    "the operator is not positive definite, or not finite (a search direction has p'Ap <= 0): at a minimum that is not "
    "strict add a ridge, for other operators take solve_gmres, solve_lu or solve_lstsq"
)


def solve_cg(
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    maxiter: int | None = None,
    ridge: float = 0.0,
    preconditioner: Callable[[Any], Any] | None = None,
    init: Any = None,
    on_failure: OnFailure = "raise",
) -> LinearSolver:
    r"""Make a conjugate-gradient solver ``solve(matvec, b) -> x`` for ``A x = b``, ``A`` Hermitian positive definite.

    Stops, lane by lane, at ``|b - A x| <= max(rtol |b|, atol)`` in the Euclidean norm over all leaves together. In
    exact arithmetic it needs as many iterations as ``A`` has distinct eigenvalues; the error shrinks at least by
    ``(sqrt(k) - 1) / (sqrt(k) + 1)`` in each, ``k`` being the condition number.

    The options and what the returned solver does are those of every iterative solver here; see
    `implicitdiff.linear_solve`.

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


def conjugate_gradients(ops: Arithmetic, r: Tensor, target: Scalar, limit: int) -> Cycle:
    """A `Method` for symmetric positive definite operators."""
    x = torch.zeros_like(r)
    z = p = ops.precondition(r)
    rz, broken = ops.dot(r, z), ops.none
    # Where the square of a small residual underflows, the cycle ends: `iterate` takes a norm of the true residual.
    rr, reach = rz if z is r else ops.dot(r, r), target * target
    used = 0
    while used < limit and ops.any(active := ops.negate((rr <= reach) | broken)):
        Ap = ops.matvec(p)
        pAp = ops.dot(p, Ap)
        go = active & (pAp > 0) & (rz > 0)
        broken = broken | (active ^ go)
        # A stopped row takes steps of length zero.
        alpha = ops.ratio(go, rz, pAp)
        x, r = ops.add(x, alpha, p), ops.add(r, -alpha, Ap)
        z = ops.precondition(r)
        rz, before = ops.dot(r, z), rz
        rr = rz if z is r else ops.dot(r, r)
        p = ops.add(z, ops.ratio(go, rz, before), p)
        used += 1
    return Cycle(x, used, broken)
