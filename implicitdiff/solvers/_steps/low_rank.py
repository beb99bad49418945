"""Broyden's inverse Jacobian as an initial inverse and a sum of outer products, ``H = H0 + sum_j u_j v_j'``."""

from __future__ import annotations

import torch
from torch import Tensor

from implicitdiff.solvers._loop.problem import VectorMap, row_dot, safe_divide, select


def apply_inverse(first: VectorMap, u: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """Return ``H x``; `first` is ``x -> H0 x``, and `u` and `v` have the shape ``(lanes, history, n)``."""
    # ``(x'V') U`` with the rows ``u_j`` and ``v_j``: the first product is ``(lanes, 1, history)``, and no ``(n, n)``
    # matrix is formed.
    return first(x) + (x[:, None] @ v.mT @ u)[:, 0]


def broyden_update(
    first: VectorMap, first_adjoint: VectorMap, u: Tensor, v: Tensor, rank: Tensor, s: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the new ``u``, ``v`` and rank after a step ``s`` that changed the residual by ``y``.

    Broyden's good update ``H + (s - H y) s'H / (s'H y)``, in Sherman and Morrison's form. A full history restarts from
    ``H0``.
    """
    # Rows from `rank` on are zero, so products with all rows are right in every lane.
    full = rank >= u.shape[1]
    u, v = (select(full, torch.zeros_like(t), t) for t in (u, v))
    rank = torch.where(full, 0, rank)
    # Of all ``B`` with ``B s = y`` the nearest to the last Jacobian ``B_0``, in the Frobenius norm, is
    # ``B_0 + (y - B_0 s) s' / s's`` (Broyden). Sherman and Morrison's formula inverts the change of rank 1.
    Hy = apply_inverse(first, u, v, y)
    # ``H' = H0' + sum_j v_j u_j'``: the factors change places.
    sH = apply_inverse(first_adjoint, v, u, s)
    # The vectors of the new term: ``u = (s - H y) / (s'H y)`` and ``v = H's``. A zero ``s'H y`` would make the new
    # Jacobian singular; the zero quotient leaves ``H``. Transposed, so that the divisor of each lane broadcasts.
    new_u = safe_divide((s - Hy).T, row_dot(sH, y)).T
    # Lanes may have different ranks, so each writes to its own row.
    here = (torch.arange(u.shape[1], device=u.device) == rank[:, None])[..., None]
    return torch.where(here, new_u[:, None], u), torch.where(here, sH[:, None], v), rank + 1
