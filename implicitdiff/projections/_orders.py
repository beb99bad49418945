"""Projection onto vectors in increasing order."""

from __future__ import annotations

import torch
from torch import Tensor

from implicitdiff._torch.trees import X
from implicitdiff.projections._point import Point


def isotonic(v: X) -> X:
    """Project onto the vectors whose entries do not decrease, ``v`` being one vector.

    The result is constant on blocks of consecutive entries, with the mean of ``v`` on a block as value. The Jacobian is
    ``1 / |block|`` within a block and 0 elsewhere. Equal neighbours of the result form one block. For decreasing order
    take ``-isotonic(-v)``; for additional bounds apply `box` to the result.

    Pooling neighbouring runs of 1, 2, 4, ... entries finds the blocks in ``O(n log(n)^2)``, without a loop whose length
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
    # bfloat16 has 8 bits, too few for counts above 256.
    wide = v.to(torch.promote_types(v.dtype, torch.float32))
    levels = _levels(wide.detach())
    begins = torch.cat([torch.zeros_like(levels[:1], dtype=torch.bool), levels[1:] != levels[:-1]])
    block = begins.cumsum(0)
    # `levels` is the projection up to rounding, without a derivative. The means of v - levels over blocks correct the
    # rounding and carry the derivative.
    totals, sizes = (
        torch.zeros_like(levels).scatter_add(0, block, t) for t in (wide - levels, torch.ones_like(levels))
    )
    x = levels + (totals / sizes.clamp(min=1.0)).gather(0, block)
    # Restore the order after rounding, and keep the derivatives of the blocks.
    return x + (x.detach().cummax(0).values - x.detach())


def _levels(v: Tensor) -> Tensor:
    """Return the projection up to rounding, exactly equal within a block."""
    n = len(v)
    # Pad to a power of two with the maximum, which is in order behind every entry and is never pooled.
    rows = torch.cat([v, v.amax(0, keepdim=True).expand((1 << (n - 1).bit_length()) - n)]).unsqueeze(1)
    while len(rows) > 1:
        rows = _pooled(rows[0::2], rows[1::2])
    return rows[0, :n]


def _pooled(left: Tensor, right: Tensor) -> Tensor:
    """Project rows ``(left, right)``, of which both halves are in order.

    The projection replaces entries of the left above a level, and entries of the right below it, by the level, which is
    the mean of the replaced entries: ``sum of max(left - level, 0) = sum of max(level - right, 0)``. The difference of
    the sums is piecewise linear in the level, with kinks at the entries, so its root follows from cumulative sums.
    """
    # Relative to an entry: sums of entries with a large common offset would lose digits.
    offset = right[:, :1]
    # ``(rows, 2 width)``: the entries of both halves in order.
    y, order = (torch.cat([left, right], dim=1) - offset).sort(dim=1, stable=True)
    is_left = order < left.shape[1]
    lefts, rights = (torch.where(mask, y, 0.0).cumsum(1) for mask in (is_left, ~is_left))
    left_counts, right_counts = (mask.to(y.dtype).cumsum(1) for mask in (is_left, ~is_left))
    # For a level at sorted entry k: sum and number of left entries above, and of right entries up to k.
    total = lefts[:, -1:] - lefts + rights
    count = left_counts[:, -1:] - left_counts + right_counts
    # At level y_k the difference of the sums is total - count y_k, nonincreasing in k: take the last k with a
    # value of at least 0.
    at = ((total - count * y >= 0).sum(1, keepdim=True) - 1).clamp(min=0)
    # Between ``y_k`` and the next entry the difference of the sums is ``total - count level``: the root is the mean.
    level = offset + total.gather(1, at) / count.gather(1, at).clamp(min=1.0)
    # Halves in order are kept exactly. A negated comparison is true for nan.
    is_out_of_order = ~(left[:, -1:] <= right[:, :1])
    pooled = [torch.where(is_out_of_order, f(t, level), t) for f, t in ((torch.minimum, left), (torch.maximum, right))]
    return torch.cat(pooled, dim=1)
