"""Pytrees split into their tensors and everything else."""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeAlias

import torch
from torch.utils import _pytree as torch_pytree
from typing_extensions import ParamSpec, TypeVar

Tree: TypeAlias = Any  # a pytree of tensors, nested as its user likes
UserFunction: TypeAlias = Callable[..., Any]
# For annotations: the unknowns, a tree; and the parameters of a user's function after its first.
X = TypeVar("X", bound=Any, default=Any)
P = ParamSpec("P", default=...)
Leaves = list[torch.Tensor]
_TENSOR_TYPES = {torch.Tensor, torch.nn.Parameter}
_LEAF_TYPES = {*_TENSOR_TYPES, type(None)}
TreeSpec = torch_pytree.TreeSpec
Node: TypeAlias = tuple[Callable[[list[Any]], Any], int, int]
"""A function that makes a node from the list of its children, and where among the leaves and finished nodes they are:
the first, and the end."""
Number: TypeAlias = float | torch.Tensor
"""A number, or a tensor of numbers that is differentiated."""


@dataclass(frozen=True)
class Structure:
    """A pytree without its tensors: the nesting, and the other leaves.

    Attributes:
        spec: the nesting.
        statics: all leaves in order, with ``None`` in the place of each tensor.
        slots: positions of the tensors among the leaves.
    """

    spec: TreeSpec
    statics: tuple[Any, ...]
    slots: tuple[int, ...]

    @property
    def others(self) -> list[Any]:
        """The leaves other than tensors."""
        slots = set(self.slots)
        return [leaf for i, leaf in enumerate(self.statics) if i not in slots]

    def unflatten(self, tensors: Sequence[torch.Tensor]) -> Tree:
        if self.spec.is_leaf() and self.slots:
            return tensors[0]
        leaves = list(self.statics)
        for slot, tensor in zip(self.slots, tensors, strict=True):
            leaves[slot] = tensor
        # A node takes the place of its children, so the root is left.
        for make, first, end in self._nodes:
            leaves[first:end] = [make(leaves[first:end])]
        return leaves[0]

    @functools.cached_property
    def _nodes(self) -> list[Node]:
        return _nodes(self.spec, 0)

    def tensors_of(self, tree: Tree) -> Leaves:
        """Return the tensors of a tree of this structure; raise ValueError for a tree of another structure.

        Dictionaries are matched by key, in any order.
        """
        leaves = match(self.spec, tree)
        tensors = [leaves[slot] for slot in self.slots]
        if not all([isinstance(leaf, torch.Tensor) for leaf in tensors]):
            raise ValueError("a tensor was expected where there is none")
        return tensors

    def fill(self, values: Mapping[int, torch.Tensor]) -> Tree:
        """Return the tree with the given tensors, by position among the tensors, and None for all other leaves."""
        leaves: list[Any] = [None] * len(self.statics)
        for i, value in values.items():
            leaves[self.slots[i]] = value
        return torch_pytree.tree_unflatten(leaves, self.spec)

    def positions_of(self, tree: Tree) -> dict[int, torch.Tensor]:
        """Return the tensors of a tree of this structure, by position; None may stand for any tensor.

        Raise ValueError for a tree of another structure.
        """
        leaves = self.spec.flatten_up_to(tree)
        values = {i: leaves[slot] for i, slot in enumerate(self.slots) if leaves[slot] is not None}
        if not all(isinstance(value, torch.Tensor) for value in values.values()):
            raise ValueError("a tensor or None was expected where there is something else")
        return values


def _nodes(spec: TreeSpec, first: int) -> list[Node]:
    """Return the nodes of one nesting, children before parents; the nesting is analysed once, not at each call.

    Args:
        spec: the nesting.
        first: the number of leaves and finished nodes in front.
    """
    if spec.is_leaf():
        return []
    if spec.type not in _MAKERS:
        return [(functools.partial(torch_pytree.tree_unflatten, treespec=spec), first, first + spec.num_leaves)]
    children = spec.children()
    nodes = [node for i, child in enumerate(children) for node in _nodes(child, first + i)]
    return [*nodes, (_MAKERS[spec.type](spec.context), first, first + len(children))]


def _dictionary(names: Sequence[Any], values: Iterable[Any]) -> dict[Any, Any]:
    return dict(zip(names, values, strict=True))


# For a type of nodes, a function of the context that returns a function from the list of children to the node. The
# context of a dictionary is the list of its keys in the order of insertion, that of a named tuple its class.
_MAKERS: dict[Any, Callable[[Any], Callable[[list[Any]], Any]]] = {
    dict: lambda names: functools.partial(_dictionary, names),
    tuple: lambda _: tuple,
    list: lambda _: list,
    namedtuple: attrgetter("_make"),
}
_ONE_TENSOR = Structure(torch_pytree.treespec_leaf(), (None,), (0,))


def flatten(tree: Tree) -> tuple[Leaves, Structure]:
    """Split a pytree into the list of its tensors and its `Structure`."""
    if isinstance(tree, torch.Tensor):
        return [tree], _ONE_TENSOR
    leaves: list[Any] = []
    nesting = _nesting(_walk(tree, leaves), tree)
    if _TENSOR_TYPES.issuperset(map(type, leaves)):
        return leaves, nesting
    slots = tuple([i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)])
    statics = tuple([None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves])
    structure = Structure(nesting.spec, statics, slots)
    # Share the nodes of the nesting. A frozen dataclass permits this assignment through `__dict__` only.
    structure.__dict__["_nodes"] = nesting._nodes
    return [leaves[i] for i in slots], structure


def tensors(tree: Tree) -> Leaves:
    """Return the tensors of a pytree, in order."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    # Most often a list of tensors, which needs no walk.
    if type(tree) in _LISTS and _TENSOR_TYPES.issuperset(map(type, tree)):
        return [*tree]
    leaves: list[Any] = []
    _walk(tree, leaves)
    return [*filter(torch.is_tensor, leaves)]


def map_tensors(fn: Callable[[torch.Tensor], Any], tree: Tree) -> Tree:
    """Return the tree with ``fn`` applied to its tensors."""
    if isinstance(tree, torch.Tensor):
        return fn(tree)
    kind = type(tree)
    if kind in _LISTS:
        return kind([map_tensors(fn, child) for child in tree])
    if kind is dict:
        return {key: map_tensors(fn, child) for key, child in tree.items()}
    if _is_named(kind):
        return kind._make([map_tensors(fn, child) for child in tree])
    return torch_pytree.tree_map_only(torch.Tensor, fn, tree)


NestingKey = Any
"""Key of a nesting: 0 for a leaf; for a node its type, its context such as dictionary keys, and its children's keys."""
# Making a `TreeSpec` takes most of the time of `flatten`, and trees of the same nesting come again in each call.
# Keys hold types, names and contexts, and no tensor, so the table keeps no memory of users alive.
_NESTINGS: dict[NestingKey, Structure] = {}
_MAX_NESTINGS = 1000


def _walk(tree: Tree, leaves: list[Any]) -> NestingKey:
    """Append the leaves of a tree to `leaves`, and return the key of its nesting."""
    kind = type(tree)
    context: Any = None
    if kind is dict:
        # A list of names makes the key unhashable on purpose, so `_nesting` does not keep this tree.
        context, children = tuple(tree) if _NAMES.issuperset(map(type, tree)) else [*tree], tree.values()
    elif kind in _LISTS or _is_named(kind):
        children = tree
    elif kind in torch_pytree.SUPPORTED_NODES:
        given, context = torch_pytree.SUPPORTED_NODES[kind].flatten_fn(tree)
        children = [*given]
    else:
        leaves.append(tree)
        return 0
    # Most nodes have leaves alone: these avoid a loop in Python.
    if _LEAF_TYPES.issuperset(map(type, children)):
        leaves += children
        return (kind, context) + (0,) * len(children)
    key: list[Any] = [kind, context]
    for child in children:
        if type(child) in _LEAF_TYPES:
            leaves.append(child)
            key.append(0)
        else:
            key.append(_walk(child, leaves))
    return tuple(key)


_LISTS = {tuple, list}
_is_named: Callable[[type], bool] = functools.lru_cache(maxsize=1024)(torch_pytree.is_namedtuple_class)
# A dictionary with keys of other types is not cached: such keys may be large objects, and the cache would keep them.
_NAMES = {str, int}


def _nesting(key: NestingKey, tree: Tree) -> Structure:
    """Return the structure of a tree of this nesting whose leaves are all tensors."""
    try:
        known = _NESTINGS.get(key)
    except TypeError:  # the context of a node is not hashable
        return _all_tensors(tree)
    if known is None:
        if len(_NESTINGS) >= _MAX_NESTINGS:
            # Trees that are nested otherwise in each call would let the table grow without end.
            _NESTINGS.clear()
        known = _NESTINGS[key] = _all_tensors(tree)
    return known


def _all_tensors(tree: Tree) -> Structure:
    spec = torch_pytree.tree_structure(tree)
    return Structure(spec, (None,) * spec.num_leaves, tuple(range(spec.num_leaves)))


def map_leaves(fn: Callable[[Any], Any], tree: Tree) -> Tree:
    """Return the tree with ``fn`` applied to all of its leaves."""
    return torch_pytree.tree_map(fn, tree)


def nodes(tree: Tree, is_node: Callable[[Any], bool]) -> list[Any]:
    """Return the nodes of a tree for which a predicate is true, the outermost."""
    return [leaf for leaf in torch_pytree.tree_flatten(tree, is_leaf=is_node)[0] if is_node(leaf)]


def map_nodes(fn: Callable[[Any], Any], tree: Tree, is_node: Callable[[Any], bool]) -> Tree:
    """Return the tree with ``fn`` applied to the nodes for which a predicate is true, the outermost."""
    return torch_pytree.tree_map(lambda leaf: fn(leaf) if is_node(leaf) else leaf, tree, is_leaf=is_node)


def describe(tree: Tree) -> str:
    """Return one line with a tree's nesting, shapes and dtypes, for error messages."""
    text = repr(map_tensors(lambda t: f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}", tree)).replace("'", "")
    return text if len(text) <= 300 else text[:297] + "..."


def leaves_of(tree: Tree) -> tuple[list[Any], TreeSpec]:
    """Return all leaves of a pytree, including None and other objects, and the nesting."""
    if type(tree) in _LEAF_TYPES:
        return [tree], _ONE_TENSOR.spec
    if torch.compiler.is_compiling():  # torch.compile cannot trace the cache of nestings
        return torch_pytree.tree_flatten(tree)
    leaves: list[Any] = []
    return leaves, _nesting(_walk(tree, leaves), tree).spec


def match(spec: TreeSpec, tree: Tree) -> list[Any]:
    """Return the subtree of `tree` at each leaf of `spec`; raise ValueError for another nesting."""
    # The parameters of most models are a flat list or dictionary, for which no walk is needed.
    if _is_flat(spec, tree):
        return [tree[key] for key in spec.context] if spec.type is dict else list(tree)
    leaves, nesting = leaves_of(tree)
    # Equal nestings share one cached `spec`, most often.
    return leaves if nesting is spec else spec.flatten_up_to(tree)


def _is_flat(spec: TreeSpec, tree: Any) -> bool:
    if type(tree) is not spec.type or spec.num_leaves + 1 != spec.num_nodes or len(tree) != spec.num_leaves:
        return False
    # Keys are compared without order, and `match` then reads by key.
    return spec.type is list or (spec.type is dict and tree.keys() == set(spec.context))


def unflatten(leaves: list[Any], spec: TreeSpec) -> Tree:
    """Return the tree of these leaves."""
    if spec.is_leaf():
        return leaves[0]
    # One node more than leaves: all children are leaves, as the parameters of most models, and no recursion is needed.
    if spec.num_leaves + 1 == spec.num_nodes:
        return torch_pytree.SUPPORTED_NODES[spec.type].unflatten_fn(leaves, spec.context)
    return torch_pytree.tree_unflatten(leaves, spec)


def broadcast(spec: TreeSpec, prefix: Any) -> list[Any]:
    """Return one leaf of `prefix` for each leaf of a tree nested like `spec`: a leaf of the prefix is repeated for all
    leaves of the subtree in its place. Raise ValueError if `prefix` is not a prefix of `spec`."""
    if isinstance(prefix, _PLAIN_LEAVES) or torch_pytree.tree_structure(prefix).is_leaf():
        return [prefix] * spec.num_leaves
    if spec.is_leaf():
        raise ValueError("a leaf was expected where there is a node")
    # Descend one level at a time with `flatten_up_to`, which matches dictionaries by key and not by order.
    level = TreeSpec(spec.type, spec.context, [torch_pytree.treespec_leaf() for _ in spec.children()])
    pairs = zip(spec.children(), level.flatten_up_to(prefix), strict=True)
    return [leaf for child, below in pairs for leaf in broadcast(child, below)]


_PLAIN_LEAVES = (int, float, torch.Tensor)


def names_of(spec: TreeSpec) -> list[str]:
    """Return the path to each leaf as Python code, for example ``['layer'][0]``."""
    tree = unflatten([0] * spec.num_leaves, spec)
    return [torch_pytree.keystr(path) for path, _ in torch_pytree.tree_flatten_with_path(tree)[0]]
