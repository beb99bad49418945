"""Conjugate gradients on the normal equations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicitdiff._linear import LinearSolver
from implicitdiff._system import System
from implicitdiff.linear_solve._krylov import Cycle, dot, iterative, norm, safe_divide
from implicitdiff.linear_solve._outcome import OnFailure


def solve_normal_cg(
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    maxiter: int | None = None,
    ridge: float = 0.0,
    preconditioner: Callable[[Any], Any] | None = None,
    init: Any = None,
    on_failure: OnFailure = "raise",
) -> LinearSolver:
    r"""Make a solver ``solve(matvec, b) -> x`` for ``A x = b``, ``A`` any non-singular operator, by conjugate
    gradients on ``A^H A x = A^H b``.

    Minimises ``|b - A x|`` over the Krylov space of ``A^H A`` and stops as `solve_cg` does, on that norm. Works for
    every matrix, but as slowly as `solve_cg` on one of squared condition number. A preconditioner approximates the
    inverse of ``A^H A``.

    ``ridge`` is added to ``A``, as in every solver here, not to ``A^H A`` as in JAXopt: the result then solves a
    linear system, whose derivative is the one computed. The other options: `implicitdiff.linear_solve`.

    Raises (when solving):
        LinearSolveError: ``A`` is singular and ``b`` not in its range, or no convergence with ``maxiter=None``.

    Reference:
        Saad, "Iterative Methods for Sparse Linear Systems", 2nd ed., algorithm 8.4 (CGNR).

    Example:
        >>> import torch
        >>> from implicitdiff.linear_solve import solve_normal_cg
        >>> A = torch.tensor([[0.0, 2.0], [-1.0, 0.0]])
        >>> solve_normal_cg()(lambda v: A @ v, torch.tensor([2.0, 3.0])).round(decimals=4)
        tensor([-3.,  1.])
    """
    return iterative(
        "solve_normal_cg",
        normal_conjugate_gradients,
        "the operator is singular and the right-hand side not in its range, or it is not finite: take solve_lstsq, "
        "or add a ridge",
        rtol=rtol,
        atol=atol,
        maxiter=maxiter,
        ridge=ridge,
        preconditioner=preconditioner,
        init=init,
        on_failure=on_failure,
    )


def normal_conjugate_gradients(system: System, r: Tensor, target: Tensor, limit: int) -> Cycle:
    """A `Method` for any operator, by conjugate gradients on the normal equations."""
    precondition = system.precondition or (lambda v: v)
    x = torch.zeros_like(r)
    s = system.rmatvec(r)
    # In units in which the first gradient has length one, no square leaves the range of the dtype.
    unit = norm(s)
    s = safe_divide(s, unit)
    z = p = precondition(s)
    sz = dot(s, z)
    broken = torch.zeros_like(sz, dtype=torch.bool)
    used = 0
    while used < limit and bool((active := ~(norm(r) <= target) & ~broken).any()):
        Ap = system.matvec(p)
        length = norm(Ap)
        broken = broken | (active & ~((length > 0) & (sz > 0)))
        alpha = torch.where(active & ~broken, safe_divide(sz, length) * safe_divide(unit, length), 0.0)
        x, r = x + alpha * p, r - alpha * Ap
        s = safe_divide(system.rmatvec(r), unit)
        z = precondition(s)
        sz, before = dot(s, z), sz
        p = torch.where(active, z + safe_divide(sz, before) * p, p)
        used += 1
    return Cycle(x, used, broken)
