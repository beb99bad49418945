"""Checks of the trees that users pass and return, and the vectors that checks are made with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import implicitdiff._torch.trees as pytree
from implicitdiff._torch.trees import Leaves, Structure


def check_leaves(name: str, leaves: Leaves) -> None:
    """Unknowns and right-hand sides are floating or complex tensors on one device."""
    if not leaves:
        raise TypeError(f"{name} holds no tensor")
    if wrong := [t.dtype for t in leaves if not (t.is_floating_point() or t.is_complex())]:
        raise TypeError(
            f"{name} has a leaf of dtype {wrong[0]}; every tensor in it must be floating point or complex: convert it, "
            "by .to(torch.get_default_dtype()) for one"
        )
    if len(devices := {t.device for t in leaves}) > 1:
        raise ValueError(f"{name} has leaves on several devices, {sorted(map(str, devices))}; put them on one")


def check_unknowns(name: str, leaves: Leaves, structure: Structure) -> None:
    """A tree to be solved for holds such tensors alone; None and strings may stand beside them."""
    check_leaves(name, leaves)
    for leaf in structure.others:
        if leaf is not None and not isinstance(leaf, str):
            raise TypeError(
                f"{name} holds {repr(leaf)[:100]}, of type {type(leaf).__name__}, where a tensor was expected; only "
                "tensors are solved for: make it a tensor, or pass it as another argument"
            )


def is_like(tree: Any, leaves: Leaves, structure: Structure) -> bool:
    """Whether it has this structure, and the shapes and dtypes of these leaves."""
    try:
        return [(r.shape, r.dtype) for r in structure.tensors_of(tree)] == [(t.shape, t.dtype) for t in leaves]
    except ValueError:
        return False


def check_like(name: str, result: Any, like: Any, leaves: Leaves, structure: Structure, of: str) -> None:
    """A tree that a user gave or returned is one like `like`, whose leaves and structure these are."""
    if not is_like(result, leaves, structure):
        raise ValueError(
            f"{name} must have the structure, shapes and dtypes of {of}: expected {pytree.describe(like)}, "
            f"got {pytree.describe(result)}"
        )


def size(tensor: Tensor) -> Tensor:
    """Of the largest number, or 1 if there is none but zero; with the dimensions of the tensor."""
    everything = tuple(range(tensor.dim()))
    entries = tensor.abs()
    largest = entries.amax(everything, keepdim=True) if tensor.numel() else entries.sum(everything, keepdim=True)
    return torch.where(largest > 0, largest, 1.0)


def pattern(like: Leaves) -> Leaves:
    """Numbers without a pattern, of both signs and up to 1 in size, in the places of those of `like`."""
    return [_wave(t.numel(), t).reshape(t.shape) for t in like]


def _wave(count: int, like: Tensor) -> Tensor:
    angles = 7.0 * torch.arange(1, count + 1, dtype=torch.float32, device=like.device) ** 2
    return (torch.polar(torch.ones_like(angles), angles) if like.is_complex() else angles.cos()).to(like.dtype)
