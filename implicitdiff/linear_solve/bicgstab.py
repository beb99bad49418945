"""The stabilised biconjugate gradient method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicitdiff._linear import LinearSolver
from implicitdiff._system import System
from implicitdiff.linear_solve._krylov import Cycle, dot, iterative, norm, safe_divide
from implicitdiff.linear_solve._outcome import OnFailure


def solve_bicgstab(
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    maxiter: int | None = None,
    ridge: float = 0.0,
    preconditioner: Callable[[Any], Any] | None = None,
    init: Any = None,
    on_failure: OnFailure = "raise",
) -> LinearSolver:
    r"""Make a BiCGSTAB solver ``solve(matvec, b) -> x`` for ``A x = b``, ``A`` any non-singular operator.

    Short recurrences, two products with ``A`` in each iteration, none with its adjoint, and no guarantee: where the
    recurrence breaks down it starts again from the true residual, and where that does not help it fails. Stops as
    `solve_cg` does. The options: `implicitdiff.linear_solve`.

    Raises (when solving):
        LinearSolveError: breakdown, or no convergence with ``maxiter=None``.

    Reference:
        van der Vorst (1992); Saad, "Iterative Methods for Sparse Linear Systems", 2nd ed., algorithm 7.7.

    Example:
        >>> import torch
        >>> from implicitdiff.linear_solve import solve_bicgstab
        >>> A = torch.tensor([[4.0, 1.0], [-1.0, 3.0]])
        >>> solve_bicgstab()(lambda v: A @ v, torch.tensor([5.0, 2.0]))
        tensor([1., 1.])
    """
    return iterative(
        "solve_bicgstab",
        bicgstab,
        "the recurrence broke down on values that are not finite; take solve_gmres or solve_lu",
        rtol=rtol,
        atol=atol,
        maxiter=maxiter,
        ridge=ridge,
        preconditioner=preconditioner,
        init=init,
        on_failure=on_failure,
    )


def bicgstab(system: System, r: Tensor, target: Tensor, limit: int) -> Cycle:
    """A `Method` for any operator, with short recurrences."""
    precondition = system.precondition or (lambda v: v)
    x = torch.zeros_like(r)
    shadow = p = r
    rho = dot(shadow, r)
    # Rows whose recurrence came to a division by zero: not broken yet, a restart gives them another shadow residual.
    stopped = torch.zeros_like(rho, dtype=torch.bool)
    used = 0
    while used < limit and bool((active := ~(norm(r) <= target) & ~stopped).any()):
        p_hat = precondition(p)
        v = system.matvec(p_hat)
        alpha = torch.where(active, safe_divide(rho, dot(shadow, v)), 0.0)
        s = r - alpha * v
        s_hat = precondition(s)
        t = system.matvec(s_hat)
        omega = torch.where(active, safe_divide(dot(safe_divide(t, norm(t)), s), norm(t)), 0.0)
        x, r = x + alpha * p_hat + omega * s_hat, s - omega * t
        rho, before = dot(shadow, r), rho
        stopped = stopped | (active & ((alpha == 0) | (omega == 0) | (rho == 0) | ~torch.isfinite(norm(r))))
        beta = safe_divide(rho, before) * safe_divide(alpha, omega)
        p = torch.where(active, r + beta * (p - omega * v), p)
        used += 1
    return Cycle(x, used, torch.zeros_like(stopped))
