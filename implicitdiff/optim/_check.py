"""Hyper-parameters checked where a transformation is made."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

import implicitdiff._torch.trees as pytree


def pair(name: str, betas: Any) -> tuple[Any, Any]:
    """Raise unless betas are two."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"{name}: betas has to be a pair of numbers, but it is {betas!r}")
    return betas[0], betas[1]


def non_negative(name: str, **values: Any) -> None:
    """Raise unless all numbers among the values are finite and at least 0."""
    _check(name, values, _is_non_negative, "a finite number, at least 0")


def one_non_negative(name: str, **values: Any) -> None:
    """Raise unless each value is one such number, or a scalar tensor."""
    for key, value in values.items():
        if isinstance(value, torch.Tensor) and value.ndim:
            raise ValueError(
                f"{name}: {key} is a {value.dtype} tensor of shape {list(value.shape)}; it is one for all leaves, "
                "and as a tensor has to be a scalar"
            )
        _check_number(name, key, value, _is_non_negative, "a finite number, at least 0")


def below_one(name: str, **values: Any) -> None:
    """Raise unless all numbers are at least 0 and less than 1."""
    _check(name, values, lambda x: 0 <= x < 1, "at least 0 and less than 1")


def at_most_one(name: str, **values: Any) -> None:
    """Raise unless all numbers are from 0 to 1."""
    _check(name, values, lambda x: 0 <= x <= 1, "from 0 to 1")


def finite(name: str, **values: Any) -> None:
    """Raise unless all numbers are finite."""
    _check(name, values, math.isfinite, "a finite number")


def _is_non_negative(x: float) -> bool:
    return 0 <= x < math.inf


def _check(name: str, values: dict[str, Any], holds: Callable[[float], bool], wanted: str) -> None:
    for key, value in values.items():
        if isinstance(value, (int, float, torch.Tensor)):
            _check_number(name, key, value, holds, wanted)
            continue
        leaves, spec = pytree.leaves_of(value)
        for way, leaf in zip(pytree.names_of(spec), leaves, strict=True):
            if leaf is not None or not way:  # in a tree, None stands for a leaf that is not optimized
                _check_number(name, f"{key}{way}", leaf, holds, wanted)


def _check_number(name: str, key: str, value: Any, holds: Callable[[float], bool], wanted: str) -> None:
    if callable(value):  # a schedule
        return
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point():
            raise ValueError(
                f"{name}: {key} is a {value.dtype} tensor of shape {list(value.shape)}; as a tensor it has to be of "
                "floating point"
            )
    elif not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(
            f"{name}: {key} is {value!r}; it has to be a number, a tensor, a schedule, or a tree of these that is "
            "nested like the parameters"
        )
    elif not holds(value):
        raise ValueError(f"{name}: {key} has to be {wanted}, but it is {value!r}")
