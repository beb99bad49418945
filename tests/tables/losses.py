"""Losses that several files of tests minimise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def rosenbrock(x: Tensor) -> Tensor:
    """The chained valley; of two unknowns, Rosenbrock's."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def decay_at(times: Tensor, y: Tensor) -> Callable[..., Tensor]:
    """Residuals of an exponential decay to a level, which take other data as their second argument."""

    def residuals(p: Tensor, y: Tensor = y) -> Tensor:
        return p[0] * torch.exp(-p[1] * times) + p[2] - y

    return residuals
