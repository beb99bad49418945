"""Derivatives by central differences, extrapolated once: the error is of order h^4, and rounding over h."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def central(f: Callable[[Tensor], Tensor], at: Tensor, h: float = 1e-4) -> Tensor:
    """Derivative of ``f`` in every entry of ``at``, whose dimensions come last."""
    units = torch.eye(at.numel(), dtype=at.dtype).reshape(-1, *at.shape)
    one, two = (
        torch.stack([f(at + d * u) - f(at - d * u) for u in units], dim=-1).detach() / (2 * d) for d in (h, 2 * h)
    )
    columns = (4 * one - two) / 3
    return columns.reshape((*columns.shape[:-1], *at.shape))


def slope(f: Callable[[float], float], at: float, h: float = 1e-4) -> float:
    """Derivative of a function of one number of Python."""
    one, two = ((f(at + d) - f(at - d)) / (2 * d) for d in (h, 2 * h))
    return (4 * one - two) / 3
