"""Pytrees split into their tensors and everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as torch_pytree

Leaves = list[torch.Tensor]


@dataclass(frozen=True)
class Structure:
    """What remains of a pytree when its tensors are taken out.

    Attributes:
        spec: the nesting.
        statics: every leaf in order, ``None`` where a tensor stood.
        slots: positions of the tensors among the leaves.
    """

    spec: torch_pytree.TreeSpec
    statics: tuple[Any, ...]
    slots: tuple[int, ...]

    def unflatten(self, tensors: Sequence[torch.Tensor]) -> Any:
        if self.spec.is_leaf() and self.slots:
            return tensors[0]
        leaves = list(self.statics)
        for slot, tensor in zip(self.slots, tensors, strict=True):
            leaves[slot] = tensor
        return torch_pytree.tree_unflatten(leaves, self.spec)

    def tensors_of(self, tree: Any) -> Leaves:
        """The tensors of another tree of this structure; ValueError if it has another one.

        Dictionaries are matched by key, whatever their order.
        """
        leaves = [tree] if self.spec.is_leaf() else self.spec.flatten_up_to(tree)
        tensors = [leaves[slot] for slot in self.slots]
        if not all(isinstance(leaf, torch.Tensor) for leaf in tensors):
            raise ValueError("a tensor was expected where there is none")
        return tensors

    def fill(self, values: Mapping[int, torch.Tensor]) -> Any:
        """The tree with these tensors, by position among the tensors, and None for every other leaf."""
        leaves: list[Any] = [None] * len(self.statics)
        for i, value in values.items():
            leaves[self.slots[i]] = value
        return torch_pytree.tree_unflatten(leaves, self.spec)

    def positions_of(self, tree: Any) -> dict[int, torch.Tensor]:
        """The tensors of a tree of this structure, by position, where None may stand for any of them; ValueError if
        it has another."""
        leaves = self.spec.flatten_up_to(tree)
        values = {i: leaves[slot] for i, slot in enumerate(self.slots) if leaves[slot] is not None}
        if not all(isinstance(value, torch.Tensor) for value in values.values()):
            raise ValueError("a tensor or None was expected where there is something else")
        return values


def flatten(tree: Any) -> tuple[Leaves, Structure]:
    """Split a pytree into the list of its tensors and its `Structure`."""
    leaves, spec = torch_pytree.tree_flatten(tree)
    slots = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor))
    statics = tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
    return [leaves[i] for i in slots], Structure(spec, statics, slots)


def tensors(tree: Any) -> Leaves:
    """The tensors of a pytree, in order."""
    return [leaf for leaf in torch_pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def map_tensors(fn: Any, tree: Any) -> Any:
    """The same tree with ``fn`` applied to its tensors."""
    return torch_pytree.tree_map_only(torch.Tensor, fn, tree)


def describe(tree: Any) -> str:
    """One line that shows a tree's nesting with shapes and dtypes, for error messages."""
    text = repr(map_tensors(lambda t: f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}", tree)).replace("'", "")
    return text if len(text) <= 300 else text[:297] + "..."
