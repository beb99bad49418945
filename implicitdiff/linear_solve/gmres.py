"""The generalised minimal residual method."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from implicitdiff._linear import LinearSolver
from implicitdiff._system import System
from implicitdiff.linear_solve._krylov import Cycle, iterative, norm, safe_divide
from implicitdiff.linear_solve._outcome import OnFailure

NOT_FINITE = "the iteration met values that are not finite; is the operator finite?"


def solve_gmres(
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    maxiter: int | None = None,
    restart: int = 30,
    ridge: float = 0.0,
    preconditioner: Callable[[Any], Any] | None = None,
    init: Any = None,
    on_failure: OnFailure = "raise",
) -> LinearSolver:
    r"""Make a restarted GMRES solver ``solve(matvec, b) -> x`` for ``A x = b``, ``A`` any non-singular operator.

    Minimises ``|b - A x|`` over a Krylov space of at most ``restart`` dimensions (which it stores), then starts again
    from there. Without a restart, in exact arithmetic, it needs no more iterations than ``A`` has distinct
    eigenvalues, if ``A`` is diagonalisable. The preconditioner acts from the right, so the residual that is minimised
    and tested is the true one. Stops as `solve_cg` does. The options: `implicitdiff.linear_solve`.

    Args:
        restart: dimension of the Krylov space, an integer >= 1.

    Raises (when solving):
        LinearSolveError: no convergence with ``maxiter=None`` (also when restarts stop to help), or values that are
            not finite.

    Reference:
        Saad and Schultz (1986); Saad, "Iterative Methods for Sparse Linear Systems", 2nd ed., algorithm 9.5.
        Orthogonalised twice by classical Gram-Schmidt: Giraud et al., Numerische Mathematik 101 (2005).

    Example:
        >>> import torch
        >>> from implicitdiff.linear_solve import solve_gmres
        >>> A = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> solve_gmres()(lambda v: A @ v, torch.tensor([1.0, 2.0])).round(decimals=4)
        tensor([-2.,  1.])
    """
    if not isinstance(restart, int) or restart < 1:
        raise ValueError(f"solve_gmres: restart must be an integer >= 1, got {restart!r}")
    return iterative(
        "solve_gmres",
        partial(gmres, restart=restart),
        NOT_FINITE,
        rtol=rtol,
        atol=atol,
        maxiter=maxiter,
        ridge=ridge,
        preconditioner=preconditioner,
        init=init,
        on_failure=on_failure,
    )


def gmres(system: System, r: Tensor, target: Tensor, limit: int, *, restart: int) -> Cycle:
    """A `Method` for any operator: one space of at most `restart` dimensions."""
    precondition = system.precondition or (lambda v: v)
    rows, n = r.shape
    m = min(restart, limit, n)
    size = norm(r)
    basis = r.new_zeros(m + 1, rows, n)
    basis[0] = safe_divide(r, size)
    # The Hessenberg matrix, made triangular as it grows by one rotation (c, s) a column; g is the rotated right-hand
    # side, and its last entry the norm of the residual.
    h = r.new_zeros(rows, m + 1, m)
    c, s = r.new_zeros(rows, m), r.new_zeros(rows, m)
    g = r.new_zeros(rows, m + 1)
    g[:, 0] = size[:, 0]
    used = 0
    while used < m and bool((~(g[:, used].abs() <= target[:, 0])).any()):
        k, used = used, used + 1
        w = system.matvec(precondition(basis[k]))
        w_size = norm(w)
        for _ in range(2):
            overlap = torch.einsum("krn,rn->rk", basis[: k + 1], w)
            w = w - torch.einsum("krn,rk->rn", basis[: k + 1], overlap)
            h[:, : k + 1, k] += overlap
        # What rounding leaves of a vector that lies in the space is no direction.
        w = torch.where(norm(w) <= 10 * torch.finfo(w.dtype).eps * w_size, 0.0, w)
        basis[used] = safe_divide(w, norm(w))
        h[:, used, k] = norm(w)[:, 0]
        for j in range(k):
            h[:, j, k], h[:, j + 1, k] = _rotate(c[:, j], s[:, j], h[:, j, k], h[:, j + 1, k])
        length = torch.hypot(h[:, k, k], h[:, used, k])
        c[:, k] = torch.where(length == 0, 1.0, safe_divide(h[:, k, k], length))
        s[:, k] = safe_divide(h[:, used, k], length)
        h[:, k, k], h[:, used, k] = length, 0.0
        g[:, k], g[:, used] = _rotate(c[:, k], s[:, k], g[:, k], g[:, used])
        # A row that is done adds nothing more.
        basis[used] = torch.where(g[:, used].abs() <= target[:, 0], 0.0, basis[used].mT).mT
    return Cycle(
        precondition(torch.einsum("krn,rk->rn", basis[:used], _back_substitute(h, g, used))),
        used,
        norm(r) < 0,
        g[:, used, None].abs() <= target,
    )


def _rotate(c: Tensor, s: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return c * a + s * b, c * b - s * a


def _back_substitute(h: Tensor, g: Tensor, k: int) -> Tensor:
    """``y`` with ``h y = g``; a zero on the diagonal (a row that was done earlier) gives a zero."""
    y = torch.zeros_like(g[:, :k])
    for j in reversed(range(k)):
        y[:, j] = safe_divide(g[:, j] - (h[:, j, j + 1 : k] * y[:, j + 1 :]).sum(dim=-1), h[:, j, j])
    return y
