"""Projections onto the vectors in order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from implicitdiff.projections._point import Point


def isotonic(v: Any) -> Any:
    """Project onto the vectors whose entries do not decrease, ``v`` being one vector.

    ``x`` is constant on blocks of consecutive entries, and is the mean of ``v`` there; the Jacobian is ``1 / |block|``
    within a block and 0 elsewhere. Neighbours that come out equal are one block. For the vectors in falling order take
    ``-isotonic(-v)``, and for bounds too the `box` of the result.

    Blocks are found by pooling neighbours of 1, 2, 4, ... entries, in ``O(n log(n)^2)``, with no loop whose length
    depends on values.

    Args:
        v: a tensor or a tree.

    Reference:
        Best and Chakravarti, "Active set algorithms for isotonic regression; a unifying framework", Math. Prog. 47
        (1990); Djolonga and Krause, "Differentiable Learning of Submodular Models", 2017, section 4, for the Jacobian.

    Example:
        >>> from implicitdiff.projections import isotonic
        >>> isotonic(torch.tensor([1.0, 3.0, 2.0, 4.0]))
        tensor([1.0000, 2.5000, 2.5000, 4.0000])
    """
    return Point.of("isotonic", v).map_flat(_onto_order)


def _onto_order(v: Tensor) -> Tensor:
    # A half-precision dtype cannot count.
    wide = v.to(torch.promote_types(v.dtype, torch.float32))
    levels = _levels(wide.detach())
    begins = torch.cat([torch.zeros_like(levels[:1], dtype=torch.bool), levels[1:] != levels[:-1]])
    block = begins.cumsum(0)
    # Levels are the means but for rounding, and are constant on blocks.
    totals, sizes = (
        torch.zeros_like(levels).scatter_add(0, block, t) for t in (wide - levels, torch.ones_like(levels))
    )
    x = levels + (totals / sizes.clamp(min=1.0)).gather(0, block)
    # Rounding may put the means out of order. Their derivatives remain those of the blocks.
    return x + (x.detach().cummax(0).values - x.detach())


def _levels(v: Tensor) -> Tensor:
    """The projection but for rounding; equal on a block."""
    n = len(v)
    # What is added at the end is pooled with nothing.
    rows = torch.cat([v, v.amax(0, keepdim=True).expand((1 << (n - 1).bit_length()) - n)]).unsqueeze(1)
    while len(rows) > 1:
        rows = _pooled(rows[0::2], rows[1::2])
    return rows[0, :n]


def _pooled(left: Tensor, right: Tensor) -> Tensor:
    """Rows ``(left, right)``, both in order, put into order.

    Entries of the left above a level, and of the right below it, become that level, where they have it as their mean:
    ``sum of max(left - level, 0) = sum of max(level - right, 0)``. That is linear between the entries.
    """
    # Relative to an entry, so that a common offset costs no digits.
    offset = right[:, :1]
    y, order = (torch.cat([left, right], dim=1) - offset).sort(dim=1, stable=True)
    is_left = order < left.shape[1]
    lefts, rights = (torch.where(mask, y, 0.0).cumsum(1) for mask in (is_left, ~is_left))
    left_counts, right_counts = (mask.to(y.dtype).cumsum(1) for mask in (is_left, ~is_left))
    # Of the left after an entry, and of the right up to it.
    total = lefts[:, -1:] - lefts + rights
    count = left_counts[:, -1:] - left_counts + right_counts
    at = ((total - count * y >= 0).sum(1, keepdim=True) - 1).clamp(min=0)
    level = offset + total.gather(1, at) / count.gather(1, at).clamp(min=1.0)
    is_out_of_order = ~(left[:, -1:] <= right[:, :1])
    pooled = [torch.where(is_out_of_order, f(t, level), t) for f, t in ((torch.minimum, left), (torch.maximum, right))]
    return torch.cat(pooled, dim=1)
