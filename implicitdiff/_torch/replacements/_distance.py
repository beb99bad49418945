"""Distances. `cdist` lacks second derivatives and forward mode (pytorch #83510)."""

from __future__ import annotations

import torch
from torch import Tensor

from implicitdiff._torch.replacements._spelling import Operation, only_if

_MODES = ("use_mm_for_euclid_dist_if_necessary", "use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist")


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str = "use_mm_for_euclid_dist_if_necessary") -> Tensor:
    only_if(p > 0, compute_mode in _MODES, min(x1.dim(), x2.dim()) >= 2)
    only_if(x1.shape[-1] == x2.shape[-1] > 0, x1.dtype == x2.dtype, x1.is_floating_point())
    # All differences, without the expansion |a|^2 - 2 a.b + |b|^2 that torch uses for large inputs and that cancels.
    away = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    if p != 2:
        return torch.linalg.vector_norm(away, p, dim=-1)  # type: ignore[no-any-return]
    square = away.square().sum(-1)
    # torch defines the derivative at coinciding points as 0. Here the distance is constant 0 there, so derivatives of
    # every order are 0.
    zero = square == 0
    # The inner `where` keeps the derivative of the square root finite at 0, where the branch is not taken.
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())


REPLACEMENTS: dict[Operation, Operation] = {torch.cdist: _cdist}
