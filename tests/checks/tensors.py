"""Tensors in double precision, given or drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

F64 = torch.float64


def draw(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=F64)


def vector(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=F64)


def close(found: Any, expected: Any) -> None:
    """Assert that tensors, or trees of them, are the same but for rounding."""
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
