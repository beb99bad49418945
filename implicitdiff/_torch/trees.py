"""Pytrees split into their tensors and everything else."""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.utils import _pytree as torch_pytree

Tree: TypeAlias = Any  # a pytree of tensors, nested as its user likes
Leaves = list[torch.Tensor]
_LEAF_TYPES = {torch.Tensor, torch.nn.Parameter, type(None)}
TreeSpec = torch_pytree.TreeSpec
Builder = Callable[[Iterator[Any]], Any]
"""Makes a tree of the next leaves of an iterator."""
Number: TypeAlias = float | torch.Tensor
"""A number, or a tensor of numbers that is differentiated."""


@dataclass(frozen=True)
class Structure:
    """What remains of a pytree when its tensors are taken out.

    Attributes:
        spec: the nesting.
        statics: every leaf in order, ``None`` where a tensor stood.
        slots: positions of the tensors among the leaves.
    """

    spec: TreeSpec
    statics: tuple[Any, ...]
    slots: tuple[int, ...]

    @property
    def others(self) -> list[Any]:
        """The leaves that are no tensors."""
        slots = set(self.slots)
        return [leaf for i, leaf in enumerate(self.statics) if i not in slots]

    def unflatten(self, tensors: Sequence[torch.Tensor]) -> Any:
        if self.spec.is_leaf() and self.slots:
            return tensors[0]
        leaves = list(self.statics)
        for slot, tensor in zip(self.slots, tensors, strict=True):
            leaves[slot] = tensor
        return self._build(iter(leaves))

    @functools.cached_property
    def _build(self) -> Builder:
        return _builder(self.spec)

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


def _builder(spec: TreeSpec) -> Builder:
    """As `torch.utils._pytree.tree_unflatten`, with what depends on the nesting alone done once."""
    if spec.is_leaf():
        return next
    parts = [_builder(child) for child in spec.children()]
    if spec.type is dict:
        return lambda leaves: dict(zip(spec.context, [part(leaves) for part in parts], strict=True))
    if spec.type in (tuple, list):
        return lambda leaves: spec.type([part(leaves) for part in parts])
    if spec.type is namedtuple:
        return lambda leaves: spec.context._make([part(leaves) for part in parts])
    return lambda leaves: torch_pytree.tree_unflatten([next(leaves) for _ in range(spec.num_leaves)], spec)


_ONE_TENSOR = Structure(torch_pytree.treespec_leaf(), (None,), (0,))


def flatten(tree: Any) -> tuple[Leaves, Structure]:
    """Split a pytree into the list of its tensors and its `Structure`."""
    if isinstance(tree, torch.Tensor):
        return [tree], _ONE_TENSOR
    leaves: list[Any] = []
    nesting = _nesting(_walk(tree, leaves), tree)
    are_tensors = [isinstance(leaf, torch.Tensor) for leaf in leaves]
    if all(are_tensors):
        return leaves, nesting
    slots = tuple([i for i, is_tensor in enumerate(are_tensors) if is_tensor])
    statics = tuple([None if is_tensor else t for t, is_tensor in zip(leaves, are_tensors, strict=True)])
    structure = Structure(nesting.spec, statics, slots)
    structure.__dict__["_build"] = nesting._build
    return [leaves[i] for i in slots], structure


def tensors(tree: Any) -> Leaves:
    """The tensors of a pytree, in order."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    leaves: list[Any] = []
    _walk(tree, leaves)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def map_tensors(fn: Any, tree: Any) -> Any:
    """The same tree with ``fn`` applied to its tensors."""
    if isinstance(tree, torch.Tensor):
        return fn(tree)
    kind = type(tree)
    if kind is tuple or kind is list:
        return kind([map_tensors(fn, child) for child in tree])
    if kind is dict:
        return {key: map_tensors(fn, child) for key, child in tree.items()}
    if _is_named(kind):
        return kind._make([map_tensors(fn, child) for child in tree])
    return torch_pytree.tree_map_only(torch.Tensor, fn, tree)


Key = Any
"""What a nesting is known by: 0 for a leaf, for a node its type with what is beside its children, and their keys."""
# To make a `TreeSpec` takes longer than all else, and it is the same in each call.
_NESTINGS: dict[Key, Structure] = {}
_MANY = 1000


def _walk(tree: Any, leaves: list[Any]) -> Key:
    """Append the leaves of a tree, and return its key."""
    kind = type(tree)
    if kind in _LEAF_TYPES:
        leaves.append(tree)
        return 0
    if kind is tuple or kind is list:
        return (kind, *[_walk(child, leaves) for child in tree])
    if kind is dict:
        names = tuple(tree) if set(map(type, tree)) <= _NAMES else [*tree]
        return (dict, names, *[_walk(child, leaves) for child in tree.values()])
    if _is_named(kind):
        return (kind, *[_walk(child, leaves) for child in tree])
    if kind not in torch_pytree.SUPPORTED_NODES:
        leaves.append(tree)
        return 0
    children, context = torch_pytree.SUPPORTED_NODES[kind].flatten_fn(tree)
    return (kind, context, *[_walk(child, leaves) for child in children])


_is_named: Callable[[type], bool] = functools.lru_cache(maxsize=1024)(torch_pytree.is_namedtuple_class)
# Other objects are not kept, as they may be large.
_NAMES = {str, int}


def _nesting(key: Key, tree: Any) -> Structure:
    """The structure of a tree like this whose leaves are all tensors."""
    try:
        known = _NESTINGS.get(key)
    except TypeError:  # what is beside its children has no hash
        return _all_tensors(tree)
    if known is None:
        if len(_NESTINGS) >= _MANY:
            _NESTINGS.clear()
        known = _NESTINGS[key] = _all_tensors(tree)
    return known


def _all_tensors(tree: Any) -> Structure:
    spec = torch_pytree.tree_structure(tree)
    return Structure(spec, (None,) * spec.num_leaves, tuple(range(spec.num_leaves)))


def map_leaves(fn: Any, tree: Any) -> Any:
    """The same tree with ``fn`` applied to all of its leaves."""
    return torch_pytree.tree_map(fn, tree)


def describe(tree: Any) -> str:
    """One line that shows a tree's nesting with shapes and dtypes, for error messages."""
    text = repr(map_tensors(lambda t: f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}", tree)).replace("'", "")
    return text if len(text) <= 300 else text[:297] + "..."


def leaves_of(tree: Any) -> tuple[list[Any], TreeSpec]:
    """The leaves of a pytree, None and everything else among them, and its nesting."""
    if torch.compiler.is_compiling():  # which does not trace what is cached
        return torch_pytree.tree_flatten(tree)
    if type(tree) in _LEAF_TYPES:
        return [tree], _ONE_TENSOR.spec
    if type(tree) is dict and set(map(type, tree.values())) <= _LEAF_TYPES:
        return list(tree.values()), _flat_spec(tuple(tree))
    if type(tree) is list and set(map(type, tree)) <= _LEAF_TYPES:
        return list(tree), _flat_spec(len(tree))
    leaves: list[Any] = []
    return leaves, _nesting(_walk(tree, leaves), tree).spec


def match(spec: TreeSpec, tree: Any) -> list[Any]:
    """What a tree has in the place of each leaf of `spec`; ValueError if it is nested otherwise."""
    if spec.is_leaf():
        return [tree]
    if _is_flat(spec, tree):
        return [tree[key] for key in spec.context] if spec.type is dict else list(tree)
    leaves, nesting = leaves_of(tree)
    return leaves if nesting is spec else spec.flatten_up_to(tree)


def unflatten(leaves: list[Any], spec: TreeSpec) -> Any:
    """The tree of these leaves."""
    if spec.is_leaf():
        return leaves[0]
    if spec.num_leaves + 1 == spec.num_nodes and spec.type is list:
        return list(leaves)
    if spec.num_leaves + 1 == spec.num_nodes and spec.type is dict:
        return dict(zip(spec.context, leaves, strict=True))
    return torch_pytree.tree_unflatten(leaves, spec)


# Flat lists and dictionaries, as most models' parameters are, need none of the recursion.


@functools.lru_cache(maxsize=256)
def _flat_spec(keys: int | tuple[Any, ...]) -> TreeSpec:
    return torch_pytree.tree_structure([None] * keys if isinstance(keys, int) else dict.fromkeys(keys))


def _is_flat(spec: TreeSpec, tree: Any) -> bool:
    if type(tree) is not spec.type or spec.num_leaves + 1 != spec.num_nodes or len(tree) != spec.num_leaves:
        return False
    return spec.type is list or (spec.type is dict and tree.keys() == set(spec.context))


def broadcast(spec: TreeSpec, prefix: Any) -> list[Any]:
    """The leaves of `prefix`, each repeated for all that lies below it in a tree nested like `spec`; ValueError if it
    is no prefix."""
    if isinstance(prefix, _PLAIN_LEAVES):
        return [prefix] * spec.num_leaves
    if _is_flat(spec, prefix):  # without what torch.compile does not trace
        leaves = match(spec, prefix)
        if all(leaf is None or isinstance(leaf, _PLAIN_LEAVES) for leaf in leaves):
            return leaves
    if torch_pytree.tree_structure(prefix).is_leaf():
        return [prefix] * spec.num_leaves
    if spec.is_leaf():
        raise ValueError("a leaf was expected where there is a node")
    # One level at a time: `flatten_up_to` matches dictionaries by key.
    level = TreeSpec(spec.type, spec.context, [torch_pytree.treespec_leaf() for _ in spec.children()])
    pairs = zip(spec.children(), level.flatten_up_to(prefix), strict=True)
    return [leaf for child, below in pairs for leaf in broadcast(child, below)]


_PLAIN_LEAVES = (int, float, torch.Tensor)


def names_of(spec: TreeSpec) -> list[str]:
    """How Python writes the way to each leaf, e.g. ``['layer'][0]``."""
    tree = unflatten([0] * spec.num_leaves, spec)
    return [torch_pytree.keystr(path) for path, _ in torch_pytree.tree_flatten_with_path(tree)[0]]
