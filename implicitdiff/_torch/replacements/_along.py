"""Operations along one dimension.

The second derivative of `select_scatter` is wrong if it is taken outside of a vmap (no issue is known). The second
derivative of `cumprod` is wrong in forward mode over forward mode (pytorch #196701).
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from implicitdiff._torch.replacements._spelling import Operation, of_aten, only_if


def _select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    only_if(input.select(dim, index).shape == src.shape)
    at = index % input.shape[dim]
    # src replaces the slice at the index: concatenation of the parts before and after.
    before, after = input.narrow(dim, 0, at), input.narrow(dim, at + 1, input.shape[dim] - at - 1)
    # As torch does, convert the source to the dtype of the input.
    return torch.cat([before, src.unsqueeze(dim).to(input.dtype), after], dim)


def _cumprod(input: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    only_if(input.is_floating_point(), -input.dim() <= dim < input.dim())
    # An empty product has no derivative.
    only_if(input.shape[dim] > 0)
    # In sequence, as torch does: a tree of partial products may overflow where the cumulative products do not.
    return torch.stack([*accumulate(input.to(dtype=dtype).unbind(dim), torch.mul)], dim)


REPLACEMENTS: dict[Operation, Operation] = {
    torch.select_scatter: _select_scatter,
    torch.Tensor.select_scatter: _select_scatter,
    torch.cumprod: _cumprod,
    torch.Tensor.cumprod: _cumprod,
    **of_aten(select_scatter=_select_scatter, cumprod=_cumprod),
}
