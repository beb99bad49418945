"""Projections onto boxes, entry by entry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import implicitdiff._pytree as pytree
from implicitdiff._point import Point, holds


def box(v: Any, lower: Any, upper: Any) -> Any:
    """Project onto ``{x: lower <= x <= upper}``, entry by entry.

    Args:
        v: a tensor or a tree.
        lower: the least values: a number, a tensor that broadcasts to every leaf, or a tree of these, nested like ``v``
            or cut off above. May be ``-inf``.
        upper: the greatest, likewise.

    Raises:
        ValueError: ``lower`` exceeds ``upper``, or one of them does not fit ``v``.

    Example:
        >>> from implicitdiff.projections import box
        >>> box(torch.tensor([-2.0, 0.5, 2.0]), 0.0, torch.tensor([1.0, 1.0, 3.0]))
        tensor([0.0000, 0.5000, 2.0000])
    """
    point = Point.of("box", v)
    lowers, uppers = point.operands("lower", lower), point.operands("upper", upper)
    if not all(low is None or holds(low <= high) for low, high in zip(lowers, uppers, strict=True)):
        raise ValueError(
            "box: lower has to be at most upper in every entry, but lower is "
            f"{pytree.describe(lower)} and upper is {pytree.describe(upper)}"
        )
    return point.map(clamp, lowers, uppers)


def non_negative(v: Any) -> Any:
    """Project onto ``{x: x >= 0}``, entry by entry.

    Example:
        >>> from implicitdiff.projections import non_negative
        >>> non_negative({"a": torch.tensor([-1.0, 2.0]), "b": torch.tensor(-0.5)})
        {'a': tensor([0., 2.]), 'b': tensor(0.)}
    """
    return Point.of("non_negative", v).map(torch.relu)


def clamp(v: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    return torch.where(v >= upper, upper, torch.where(v <= lower, lower, v))
