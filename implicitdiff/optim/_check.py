"""Checks of hyper-parameters, run when a transformation is made."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import NoneType

import torch

import implicitdiff._torch.trees as pytree
from implicitdiff._torch.trees import Tree


def require_pair(name: str, betas: object) -> tuple[Tree, Tree]:
    """Return the two betas, or raise a TypeError."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"{name}: betas must be a pair of numbers, got {betas!r}")
    return betas[0], betas[1]


def require_non_negative(name: str, **values: object) -> None:
    """Raise unless every number in the values is finite and at least 0. Tensors and schedules are not read."""
    _require(name, values, _is_non_negative, "a finite number, at least 0")


def require_one_non_negative(name: str, **values: object) -> None:
    """Raise unless each value is a finite number of at least 0, or a scalar tensor."""
    for key, value in values.items():
        if isinstance(value, torch.Tensor) and value.ndim:
            raise ValueError(
                f"{name}: {key} must be a number or a scalar tensor, because it is one for all leaves, got "
                f"{value.dtype} of shape {list(value.shape)}"
            )
        _require_number(name, key, value, _is_non_negative, "a finite number, at least 0")


def require_below_one(name: str, **values: object) -> None:
    """Raise unless every number is at least 0 and less than 1."""
    _require(name, values, lambda x: 0 <= x < 1, "at least 0 and less than 1")


def require_at_most_one(name: str, **values: object) -> None:
    """Raise unless every number is in [0, 1]."""
    _require(name, values, lambda x: 0 <= x <= 1, "from 0 to 1")


def require_finite(name: str, **values: object) -> None:
    """Raise unless every number is finite."""
    _require(name, values, math.isfinite, "a finite number")


def _is_non_negative(x: float) -> bool:
    return 0 <= x < math.inf


def _require(name: str, values: dict[str, Tree], holds: Callable[[float], bool], wanted: str) -> None:
    for key, number in [pair for item in values.items() for pair in _numbers_in(*item)]:
        _require_number(name, key, number, holds, wanted)


def _numbers_in(key: str, value: Tree) -> list[tuple[str, Tree]]:
    """Return the leaves of a hyper-parameter by name. Inside a tree, None marks a parameter that is not optimized."""
    # The common case, without a walk through a tree.
    if isinstance(value, (int, float, torch.Tensor, NoneType)):
        return [(key, value)]
    leaves, spec = pytree.leaves_of(value)
    ways = zip(pytree.names_of(spec), leaves, strict=True)
    return [(f"{key}{way}", leaf) for way, leaf in ways if leaf is not None]


def _require_number(name: str, key: str, value: object, holds: Callable[[float], bool], wanted: str) -> None:
    if callable(value):  # a schedule, whose values are known in a step only
        return
    if isinstance(value, torch.Tensor):
        # The values of a tensor are not compared: a comparison would wait for the device, and fail under transforms.
        if not value.is_floating_point():
            raise ValueError(
                f"{name}: {key} must be of floating point if it is a tensor, got {value.dtype} of shape "
                f"{list(value.shape)}"
            )
    elif not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(
            f"{name}: {key} must be a number, a tensor, a schedule, or a tree of these nested like the parameters, "
            f"got {value!r}"
        )
    elif not holds(value):
        raise ValueError(f"{name}: {key} must be {wanted}, got {value!r}")
