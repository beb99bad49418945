"""Checks of the trees that users pass and return, and probe vectors for checks."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

import torch
from torch import Tensor

import implicitdiff._torch.trees as pytree
from implicitdiff._torch.tracking import is_continuous
from implicitdiff._torch.trees import Leaves, Structure, Tree
from implicitdiff._torch.values import refuse_distributed


def check_leaves(name: str, leaves: Leaves) -> None:
    """Raise unless unknowns, or right-hand sides, are floating-point or complex tensors on one device."""
    if not leaves:
        raise TypeError(f"{name} holds no tensor")
    refuse_distributed(name, leaves)
    if not all(map(is_continuous, leaves)):
        wrong = next(t.dtype for t in leaves if not is_continuous(t))
        raise TypeError(
            f"{name} has a leaf of dtype {wrong}; every tensor in it must be floating point or complex: convert "
            "the leaf, for example by .to(torch.get_default_dtype())"
        )
    if len(devices := set(map(_DEVICE, leaves))) > 1:
        raise ValueError(f"{name} has leaves on several devices, {sorted(map(str, devices))}; move them to one device")


_DEVICE: Callable[[Tensor], torch.device] = attrgetter("device")


def check_unknowns(name: str, leaves: Leaves, structure: Structure) -> None:
    """Raise unless a tree of unknowns holds floating-point or complex tensors alone, apart from None and strings."""
    check_leaves(name, leaves)
    for leaf in structure.others:
        if leaf is not None and not isinstance(leaf, str):
            raise TypeError(
                f"{name} holds {repr(leaf)[:100]}, of type {type(leaf).__name__}, where a tensor was expected; the "
                "unknowns are tensors: convert it to a tensor, or pass it as another argument"
            )


def is_like(tree: Tree, leaves: Leaves, structure: Structure) -> bool:
    """True if the tree has this structure, and the shapes and dtypes of these leaves."""
    try:
        return [(r.shape, r.dtype) for r in structure.tensors_of(tree)] == [(t.shape, t.dtype) for t in leaves]
    except ValueError:
        return False


def check_like(name: str, result: Tree, like: Tree, leaves: Leaves, structure: Structure, of: str) -> None:
    """Raise unless a user's tree is like the tree `like`, with the given leaves and structure; `of` names `like`."""
    if not is_like(result, leaves, structure):
        is_number = isinstance(result, torch.Tensor) and result.is_floating_point() and not result.dim()
        hint = "; for a minimum pass the gradient of the objective, torch.func.grad(f)" if is_number else ""
        raise ValueError(
            f"{name} must have the structure, shapes and dtypes of {of}: expected {pytree.describe(like)}, "
            f"got {pytree.describe(result)}{hint}"
        )


def max_abs_or_one(tensor: Tensor) -> Tensor:
    """Return the largest absolute entry, or 1 for a zero or empty tensor; all dimensions are kept with size 1."""
    everything = tuple(range(tensor.dim()))
    entries = tensor.abs()
    # `amax` of an empty tensor raises, and the sum has the same shape.
    largest = entries.amax(everything, keepdim=True) if tensor.numel() else entries.sum(everything, keepdim=True)
    return torch.where(largest > 0, largest, 1.0)


def probe_vector(like: Leaves) -> Leaves:
    """Return irregular numbers of both signs, at most 1 in absolute value, with the shapes of `like`."""
    return [_probe_entries(t.numel(), t).reshape(t.shape) for t in like]


def _probe_entries(count: int, like: Tensor) -> Tensor:
    # Squares make the angles irregular, so no symmetry of a function cancels the probe.
    angles = 7.0 * torch.arange(1, count + 1, dtype=torch.float32, device=like.device) ** 2
    return (torch.polar(torch.ones_like(angles), angles) if like.is_complex() else angles.cos()).to(like.dtype)
