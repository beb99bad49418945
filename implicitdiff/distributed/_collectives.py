"""The linear maps between replicated and varying values, with all derivatives.

    psum        varying -> replicated    sum over the ranks     transpose: pvary
    pvary       replicated -> varying    the same value         transpose: psum
    all_gather  varying -> replicated    all ranks' values      transpose: shard
    shard       replicated -> varying    this rank's part       transpose: all_gather

Each map is linear. So it is its own derivative in forward mode, its transpose is the derivative in reverse mode, and
under a vmap the same map acts on tensors of one dimension more. The rules apply the maps themselves, never plain code:
so derivatives of any order hold.
"""

from __future__ import annotations

import inspect
import weakref
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as c10d
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary

import implicitdiff._closures.modes as _modes
import implicitdiff._torch.compile as _compile
import implicitdiff._torch.functions as _functions
import implicitdiff._torch.tracking as _tracking
import implicitdiff._torch.trees as pytree
from implicitdiff._torch.decisions import add_leader
from implicitdiff._torch.modes import no_modes
from implicitdiff._torch.trees import Leaves, Tree
from implicitdiff._torch.values import is_recorded_for_later
from implicitdiff.distributed._agreement import agree, broken_by, rounds_differently
from implicitdiff.distributed._groups import Axis, group_of
from implicitdiff.distributed._local import is_local, refuse_inside
from implicitdiff.errors import RankError

# `of_first` is the identity on replicated values, so its own transpose.
_TRANSPOSED = {"psum": "pvary", "pvary": "psum", "all_gather": "shard", "shard": "all_gather", "of_first": "of_first"}
_UNSUMMABLE = (torch.bool, torch.int16)


@dataclass(frozen=True)
class Collective:
    """One of the four maps, or `OfFirst`, on one tensor.

    Attributes:
        name: the map's name.
        reference: refers to the group of the ranks. A graph holds collectives, and must not keep the group alive: torch
            may abort a process that ends with a group.
        lanes: the number of batch dimensions in front. `all_gather` puts a dimension of the ranks behind them, and
            `shard` takes its own entry of this dimension.
    """

    name: str
    reference: weakref.ref[ProcessGroup]
    lanes: int = 0

    @property
    def group(self) -> ProcessGroup:
        """The group of the ranks."""
        group = self.reference()
        if group is None:
            raise RankError(f"{self.name}: the process group was destroyed; take derivatives before that")
        return group

    @property
    def transposed(self) -> Collective:
        return replace(self, name=_TRANSPOSED[self.name])

    @property
    def over_one_lane_more(self) -> Collective:
        return replace(self, lanes=self.lanes + 1)

    def on_plain(self, x: Tensor) -> Tensor:
        """Return the map of a plain tensor, a new tensor, with nothing recorded."""
        if self.name == "pvary":
            # An autograd.Function has to return a new tensor.
            return x.clone()
        if self.name == "shard":
            return x.select(self.lanes, c10d.get_rank(self.group)).clone()
        self._refuse_unsendable(x)
        agree(self.group, f"{self.name} of {tuple(x.shape)} {x.dtype}")
        # A backend sends memory as is, without lazy conjugation or negation.
        plain = x.resolve_conj().resolve_neg()
        numbers = torch.view_as_real(plain) if x.is_complex() else plain
        follow_first(self.group)
        with broken_by(self.group, self.name):
            result = self._communicated(numbers)
        return torch.view_as_complex(result) if x.is_complex() else result

    def _refuse_unsendable(self, x: Tensor) -> None:
        if is_recorded_for_later():
            raise NotImplementedError(
                f"{self.name}: make_fx, torch.export and torch.func.linearize record operations without the messages "
                "to other ranks; keep the call outside of what they record, and take jvp in the place of linearize"
            )
        if _tracking.have_legacy_batch([x]):
            raise NotImplementedError(
                f"{self.name}: gradients by is_grads_batched=True or vectorize=True cannot be sent to other ranks; use "
                "torch.func.jacrev, torch.func.hessian or torch.func.vmap"
            )

    def _communicated(self, x: Tensor) -> Tensor:
        if self.name == "all_gather":
            return self._gathered(x)
        copy = x.clone(memory_format=torch.contiguous_format)
        # A thread of the backend may hold the tensor that it received a little longer than the call takes, and a tensor
        # that is alive after an evaluation counts as stored by the user's function: give it another tensor.
        sent = copy.detach()
        if self.name == "psum":
            c10d.all_reduce(sent, group=self.group)
        else:
            c10d.broadcast(sent, c10d.get_global_rank(self.group, 0), group=self.group)
        return copy

    def _gathered(self, x: Tensor) -> Tensor:
        parts = [
            torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(c10d.get_world_size(self.group))
        ]
        c10d.all_gather(parts, x.detach().contiguous(), group=self.group)
        return torch.stack(parts, dim=self.lanes)


@dataclass(frozen=True)
class OfFirst:
    """The values of the first rank, for replicated values that unlike machines round differently: the identity."""

    reference: weakref.ref[ProcessGroup]

    def __call__(self, leaves: Leaves) -> Leaves:
        return on_leaves(Collective("of_first", self.reference), leaves)


def follow_first(group: ProcessGroup) -> None:
    """Let the first rank decide in the search that runs, unless all machines of a group round alike."""
    if rounds_differently(group):
        add_leader(OfFirst(weakref.ref(group)))


class _LinearMap(torch.autograd.Function):
    """A `Collective` as a differentiable function of one tensor."""

    @staticmethod
    @_compile.outside_compile
    def forward(collective: Collective, x: Tensor) -> tuple[Tensor]:
        # The operations of a backend are no operations of the user's function.
        with no_modes():
            return (collective.on_plain(x),)

    @staticmethod
    @_compile.outside_compile
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor]) -> None:
        # No tensor is saved: a rule of a linear map needs the tangent or the cotangent alone.
        ctx.collective = inputs[0]
        ctx.set_materialize_grads(False)

    @staticmethod
    @_compile.outside_compile
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple[None, Tensor | None]:
        return None, None if cotangent is None else applied(ctx.collective.transposed, cotangent)

    @staticmethod
    @_compile.outside_compile
    @_functions.nested_forward_mode
    def jvp(ctx: Any, saved: Leaves, _: None, tangent: Tensor | None) -> tuple[Tensor | None]:
        return (None if tangent is None else applied(ctx.collective, tangent),)

    @staticmethod
    @_compile.outside_compile
    def vmap(info: Any, in_dims: Any, collective: Collective, x: Tensor) -> tuple[tuple[Tensor], tuple[int]]:
        return (applied(collective.over_one_lane_more, x.movedim(in_dims[1], 0)),), (0,)


# `apply` reads the signature of `forward` in each call. Store it: `inspect.signature` is slow.
vars(_LinearMap)["forward"].__func__.__signature__ = inspect.signature(_LinearMap.forward)


def applied(collective: Collective, x: Tensor) -> Tensor:
    """Return the map of a tensor. A mode sees the call as one operation."""
    # `Function.apply` is no torch function: a mode would take its result for a captured tensor.
    return _seen(collective.name, collective.reference, collective.lanes, x)


def _seen(name: str, reference: weakref.ref[ProcessGroup], lanes: int, x: Tensor) -> Tensor:
    if has_torch_function_unary(x):
        # The handler of the mode calls this function again, without the mode.
        result: Tensor = handle_torch_function(_seen, (x,), name, reference, lanes, x)
        _modes.note_communication()
        return result
    return _functions.apply(_LinearMap, Collective(name, reference, lanes), x)[0]


def varied(group: ProcessGroup, leaves: Leaves) -> Leaves:
    """Return `pvary` of the tensors that may be differentiated, and other tensors unchanged.

    A mode sees one operation, whichever tensors these are: so each evaluation of a function applies the same ones.
    """
    return [*_seen_varied(group, *leaves)]


def _seen_varied(group: ProcessGroup, *leaves: Tensor) -> tuple[Tensor, ...]:
    if has_torch_function(leaves):
        result: tuple[Tensor, ...] = handle_torch_function(_seen_varied, leaves, group, *leaves)
        _modes.note_communication()
        return result
    places = [i for i, t in enumerate(leaves) if _tracking.may_be_differentiated(t)]
    # Views, since a mode would take the result for the tensor that it received.
    result_leaves = _modes.alias(leaves)
    for i, t in zip(
        places, on_leaves(Collective("pvary", weakref.ref(group)), [leaves[i] for i in places]), strict=True
    ):
        result_leaves[i] = t
    return tuple(result_leaves)


@_compile.outside_compile
def psum(tree: Tree, axis: Axis = None) -> Tree:
    """Return the sums over the ranks, ``sum_r tree_r``, on every rank.

    A map from varying to replicated values; its transpose is `pvary`. One collective for each dtype. In the function of
    `psum_of` or `vmap` over the same ranks the result is varying, as every value there.

    Args:
        tree: a pytree of tensors of the same shapes on all ranks.
        axis: the ranks, see `Axis`.
    """
    return _on_tree("psum", tree, axis)


@_compile.outside_compile
def pmean(tree: Tree, axis: Axis = None) -> Tree:
    """Return the means over the ranks, ``psum(tree) / ranks``, on every rank; see `psum`."""
    size = c10d.get_world_size(group_of(axis))
    return pytree.map_tensors(lambda t: t / size, psum(tree, axis))


@_compile.outside_compile
def pvary(tree: Tree, axis: Axis = None) -> Tree:
    """Return replicated values as varying ones: the same numbers, and the transpose is `psum`."""
    return _on_tree("pvary", tree, axis)


@_compile.outside_compile
def all_gather(tree: Tree, axis: Axis = None, dim: int = 0) -> Tree:
    """Return the tensors of all ranks, joined along an existing dimension in the order of the ranks, on every rank.

    A map from varying to replicated values; its transpose is `shard`. One collective for each dtype.

    Args:
        tree: a pytree of tensors of the same shapes on all ranks.
        axis: the ranks, see `Axis`.
        dim: the dimension.
    """

    def joined(gathered: Tensor) -> Tensor:
        at = dim % (gathered.dim() - 1)
        parts = gathered.movedim(0, at)
        return parts.flatten(at, at + 1)

    _check_dim("all_gather", tree, dim)
    return pytree.map_tensors(joined, _on_tree("all_gather", tree, axis))


@_compile.outside_compile
def shard(tree: Tree, axis: Axis = None, dim: int = 0) -> Tree:
    """Return this rank's part of tensors that are split into equal parts along a dimension.

    A map from replicated to varying values; its transpose is `all_gather`.

    Args:
        tree: a pytree of tensors whose size along `dim` is a multiple of the number of ranks.
        axis: the ranks, see `Axis`.
        dim: the dimension.
    """
    size = c10d.get_world_size(group_of(axis))

    def split(whole: Tensor) -> Tensor:
        at = dim % whole.dim()
        if whole.shape[at] % size:
            raise ValueError(
                f"shard: dimension {dim} of a tensor of shape {list(whole.shape)} does not split into equal parts for "
                f"{size} ranks; pad it to a multiple of {size}"
            )
        parts: Tensor = whole.unflatten(at, (size, whole.shape[at] // size))
        return parts.movedim(at, 0)

    _check_dim("shard", tree, dim)
    return _on_tree("shard", pytree.map_tensors(split, tree), axis)


def _check_dim(name: str, tree: Tree, dim: int) -> None:
    if short := [t for t in pytree.tensors(tree) if not -t.dim() <= dim < t.dim()]:
        raise ValueError(f"{name}: a tensor of shape {list(short[0].shape)} has no dimension {dim}")


def _on_tree(name: str, tree: Tree, axis: Axis) -> Tree:
    """Apply a map to the tensors of a tree, those of one dtype and device at once."""
    group = group_of(axis)
    leaves, structure = pytree.flatten(tree)
    for leaf in leaves:
        _check_leaf(name, leaf)
    if not is_local(group):
        return structure.unflatten(on_leaves(Collective(name, weakref.ref(group)), leaves))
    # In a local function every value is varying already: `pvary` changes nothing, and what is the same on all ranks
    # becomes varying at once, so that a gradient reaches all ranks.
    if name == "shard":
        refuse_inside(name, group)
    if name == "pvary":
        return tree
    same = on_leaves(Collective(name, weakref.ref(group)), leaves)
    return structure.unflatten(on_leaves(Collective("pvary", weakref.ref(group)), same))


def on_leaves(collective: Collective, leaves: Leaves) -> Leaves:
    """Apply a map to tensors, those of one dtype and device at once. `shard` takes its entry of their first dimension,
    which `all_gather` adds."""
    # A dictionary keeps the order of the leaves, so all ranks send in one order.
    together: defaultdict[Any, list[int]] = defaultdict(list)
    for i, leaf in enumerate(leaves):
        together[leaf.dtype, leaf.device].append(i)
    mapped = list(leaves)
    for places in together.values():
        found = _packed(collective, [leaves[i] for i in places])
        for i, t in zip(places, found, strict=True):
            mapped[i] = t
    return mapped


def _packed(collective: Collective, leaves: Leaves) -> Leaves:
    if len(leaves) == 1:
        return [applied(collective, leaves[0])]
    # Sent tensors of `shard` have the dimension of the ranks in front, and only the rest is packed.
    lead, size = int(collective.name == "shard"), c10d.get_world_size(collective.group)
    shapes = [t.shape[lead:] for t in leaves]
    rows = torch.cat([t.reshape(*t.shape[:lead], -1) for t in leaves], dim=-1)
    mapped = applied(collective, rows).split([shape.numel() for shape in shapes], dim=-1)
    front = (size,) if collective.name == "all_gather" else ()
    return [t.reshape((*front, *shape)) for t, shape in zip(mapped, shapes, strict=True)]


def _check_leaf(name: str, leaf: Tensor) -> None:
    if leaf.layout is not torch.strided:
        raise TypeError(f"{name}: a tensor of layout {leaf.layout} cannot be sent; convert it by to_dense()")
    if name == "psum" and leaf.dtype in _UNSUMMABLE:
        raise TypeError(f"psum: sums of {leaf.dtype} over ranks are not defined; convert it, for example by .long()")
