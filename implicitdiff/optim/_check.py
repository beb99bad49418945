"""Hyper-parameters checked where a transformation is made."""

from __future__ import annotations

import math
from typing import Any

import torch


def pair(name: str, betas: Any) -> tuple[Any, Any]:
    """Raise unless betas are two."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"{name}: betas has to be a pair of numbers, but it is {betas!r}")
    return betas[0], betas[1]


def non_negative(name: str, **values: Any) -> None:
    """Raise unless all numbers among the values are finite and at least 0."""
    _check(name, values, lambda x: 0 <= x < math.inf, "a finite number, at least 0")


def below_one(name: str, **values: Any) -> None:
    """Raise unless all numbers are at least 0 and less than 1."""
    _check(name, values, lambda x: 0 <= x < 1, "at least 0 and less than 1")


def at_most_one(name: str, **values: Any) -> None:
    """Raise unless all numbers are from 0 to 1."""
    _check(name, values, lambda x: 0 <= x <= 1, "from 0 to 1")


def finite(name: str, **values: Any) -> None:
    """Raise unless all numbers are finite."""
    _check(name, values, math.isfinite, "a finite number")


def _check(name: str, values: dict[str, Any], holds: Any, wanted: str) -> None:
    for key, value in values.items():
        if callable(value):  # a schedule
            continue
        if isinstance(value, torch.Tensor):
            if value.ndim or not value.is_floating_point():
                raise ValueError(
                    f"{name}: {key} is a {value.dtype} tensor of shape {list(value.shape)}; as a tensor it has to be a "
                    "scalar of floating point"
                )
        elif not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{name}: {key} is {value!r}; it has to be a number, a scalar tensor or a schedule")
        elif not holds(value):
            raise ValueError(f"{name}: {key} has to be {wanted}, but it is {value!r}")
