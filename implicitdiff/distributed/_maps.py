"""Functions of replicated values that the ranks compute in parts: a sum of local terms, and a vmap over all lanes."""

from __future__ import annotations

import functools
import weakref
from typing import Any, NamedTuple

import torch
import torch.distributed as c10d
from torch import Tensor
from torch.distributed import ProcessGroup

import implicitdiff._torch.compile as _compile
import implicitdiff._torch.tracking as _tracking
import implicitdiff._torch.trees as pytree
from implicitdiff._closures.signature import name_of
from implicitdiff._torch.lanes import numbered
from implicitdiff._torch.modes import is_any_running
from implicitdiff._torch.trees import Tree, UserFunction
from implicitdiff._torch.values import is_shard
from implicitdiff.distributed._agreement import agree, together
from implicitdiff.distributed._collectives import Collective, on_leaves, psum
from implicitdiff.distributed._groups import Axis, group_of, numbers_of_ranks
from implicitdiff.distributed._histories import with_equal_histories
from implicitdiff.distributed._local import refuse_inside
from implicitdiff.distributed._varying import LocalCall, refuse_unlike

# --- a sum over ranks -------------------------------------------------------------------------------------------------

# Weak keys: the entry ends with the code of the function.
_compared: weakref.WeakKeyDictionary[object, set[tuple[object, ...]]] = weakref.WeakKeyDictionary()


def psum_of(fn: UserFunction, axis: Axis = None) -> UserFunction:
    """Return the function ``F(*args) = sum_r fn_r(*args)``, where rank ``r`` evaluates its own ``fn_r``.

    ``F`` is a function of replicated arguments, and of the replicated tensors that `fn` captures: its derivatives are
    those of the sum, on every rank. What only one rank holds, such as its part of the data, may be captured or be an
    argument, as long as nothing differentiates it.

    Args:
        fn: a function of pytrees; its result is a pytree of tensors of the same shapes on all ranks.
        axis: the ranks, see `Axis`.

    Raises:
        RankError: an argument that is differentiated differs between the ranks. Asked at the first call.
    """

    @_compile.outside_compile
    @functools.wraps(fn)
    def total(*args: Tree) -> Tree:
        group = group_of(axis)
        call = LocalCall.of(f"psum_of({name_of(fn)})", fn, group, args)
        _refuse_unlike_once(call, group)
        return psum(call.run(group), group)

    return total


def pmean_of(fn: UserFunction, axis: Axis = None) -> UserFunction:
    """Return the function ``F(*args) = mean_r fn_r(*args)``; see `psum_of`."""
    summed = psum_of(fn, axis)

    @_compile.outside_compile
    @functools.wraps(fn)
    def mean(*args: Tree) -> Tree:
        size = c10d.get_world_size(group_of(axis))
        return pytree.map_tensors(lambda t: t / size, summed(*args))

    return mean


def _refuse_unlike_once(call: LocalCall, group: ProcessGroup) -> None:
    """Compare what is differentiated over the ranks, at the first such call of a function."""
    named = call.differentiated()
    known = _compared.setdefault(_code_of(call.fn), set())
    key = (group.group_name, *named)
    if named and key not in known:
        refuse_unlike(call.name, named, group)
        known.add(key)


def _code_of(fn: Any) -> object:
    """Return what two calls of a function have in common: its code, or the function if it is built in."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    # The code, since a closure is a new function at each definition.
    return getattr(fn, "__code__", None) or getattr(type(fn).__call__, "__code__", fn)


# --- lanes over ranks -------------------------------------------------------------------------------------------------


class _Lanes(NamedTuple):
    """The lanes of a vmap, in consecutive parts over the ranks.

    Attributes:
        counts: the number of lanes of each rank.
        rank: this rank.
    """

    counts: tuple[int, ...]
    rank: int

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def most(self) -> int:
        """The number of lanes of the rank with most."""
        return max(self.counts)

    @property
    def run(self) -> int:
        """The number of lanes that this rank runs: at least one, since the results of none have no shape."""
        return max(1, self.counts[self.rank])

    @property
    def first(self) -> int:
        """The number of the first lane that this rank runs."""
        # A rank without lanes runs the last lane again, and its results are left out by `places`.
        return min(sum(self.counts[: self.rank]), self.total - 1)

    @property
    def is_even(self) -> bool:
        return len(set(self.counts)) == 1

    def padded(self) -> list[int]:
        """Return the lanes of all ranks, those of each rank filled up to the same number by its last lane."""
        ends = [sum(self.counts[: r + 1]) for r in range(len(self.counts))]
        parts = zip(ends, self.counts, strict=True)
        return [min(end - count + i, max(end - 1, 0)) for end, count in parts for i in range(self.most)]

    def places(self) -> list[int]:
        """Return the place of each lane among the lanes of `padded`."""
        return [r * self.most + i for r, count in enumerate(self.counts) for i in range(count)]


def vmap(
    fn: UserFunction,
    in_dims: Any = 0,
    out_dims: Any = 0,
    *,
    axis: Axis = None,
    chunk_size: int | None = None,
) -> UserFunction:
    """`torch.func.vmap` with its lanes spread over the ranks: each rank computes its part, and all get all results.

    A function of replicated arguments, and of the replicated tensors that `fn` captures, with replicated results. The
    ranks take consecutive lanes, in numbers that differ by one at most. An error in a lane is raised on all ranks, with
    the lane's number among all lanes. Random numbers inside of `fn` are refused.

    Args:
        fn: a function of one lane.
        in_dims: as of `torch.func.vmap`. A placement ``Shard(dim)`` of ``torch.distributed.tensor`` in the place of a
            number says that each rank passes its own lanes alone, along this dimension, in any number but none.
        out_dims: as of `torch.func.vmap`, without None. ``Shard(dim)`` keeps the results of a rank's own lanes on this
            rank, a varying value.
        axis: the ranks, see `Axis`.
        chunk_size: the number of lanes that a rank computes at once; None: all.

    Raises:
        RankError: replicated arguments differ between the ranks.
    """

    @_compile.outside_compile
    @functools.wraps(fn)
    def mapped(*args: Tree) -> Tree:
        group = group_of(axis)
        with together(group):
            refuse_inside(f"vmap({name_of(fn)})", group)
            # Stage 1: the lanes of each rank, and the arguments for those of this rank.
            leaves, spec = pytree.leaves_of(args)
            dims = _dims_of(leaves, spec, in_dims)
            lanes = _lanes_of_ranks(leaves, dims, group)
            name = f"vmap({name_of(fn)})"
            own, own_dims = _own_lanes(leaves, dims, lanes, group)
            is_own = [d is not None for t, d in zip(leaves, own_dims, strict=True) if isinstance(t, Tensor)]
            over_lanes = torch.func.vmap(fn, in_dims=tuple(pytree.unflatten(own_dims, spec)), chunk_size=chunk_size)
            call = LocalCall.of(name, over_lanes, group, pytree.unflatten(own, spec), is_own)
            # Stage 2: arguments that all ranks pass, and differentiated tensors, must be the same everywhere.
            shared = {
                f"of {lanes.total} lanes, leaf {i} of the arguments": t
                for i, (t, d) in enumerate(zip(leaves, dims, strict=True))
                if isinstance(t, Tensor) and not is_shard(d)
            }
            refuse_unlike(name, shared | call.differentiated(), group)
            # Stage 3: the lanes of this rank, then the results of all ranks, with equal shapes.
            with numbered(lanes.first, lanes.run, lanes.total):
                result = call.run(group)
            return _on_all_ranks(with_equal_histories(result, group), out_dims, lanes, group)

    return mapped


def _dims_of(leaves: list[Any], spec: pytree.TreeSpec, in_dims: Any) -> list[Any]:
    """Return for each leaf of the arguments its entry of `in_dims`, with dimensions counted from the front."""
    try:
        dims = pytree.broadcast(spec, in_dims)
    except ValueError:
        raise ValueError(
            f"vmap: in_dims must be a number, None, a Shard, or a tuple of these for each argument; got "
            f"{in_dims!r} for {spec.num_children} arguments"
        ) from None
    for i, leaf, dim in [(i, leaves[i], dim) for i, dim in enumerate(dims) if dim is not None]:
        at = _number_of(dim)
        if not (isinstance(leaf, Tensor) and isinstance(at, int) and -leaf.dim() <= at < leaf.dim()):
            shown = f"a tensor of shape {list(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)[:100]
            raise ValueError(f"vmap: in_dims has {dim!r} for {shown}, leaf {i} of the arguments")
        dims[i] = type(dim)(at % leaf.dim()) if is_shard(dim) else at % leaf.dim()
    return dims


def _number_of(dim: Any) -> Any:
    """Return the dimension that an entry of `in_dims` or `out_dims` names, as a number."""
    return dim.dim if is_shard(dim) else dim


def _lanes_of_ranks(leaves: list[Any], dims: list[Any], group: ProcessGroup) -> _Lanes:
    """Return the lanes of each rank: of `Shard` those that it passes, else about equal parts."""
    pairs = [(t, d) for t, d in zip(leaves, dims, strict=True) if d is not None]
    own = {t.shape[d.dim] for t, d in pairs if is_shard(d)}
    shared = {t.shape[d] for t, d in pairs if not is_shard(d)}
    sizes = max(own, shared, key=len)
    if len(sizes) != 1:
        raise ValueError(f"vmap: the mapped arguments must have one number of lanes; got {sorted(sizes) or 'none'}")
    counts = _own_counts(own, shared, group) if own else _equal_counts(min(shared), c10d.get_world_size(group))
    return _Lanes(counts, c10d.get_rank(group))


def _own_counts(own: set[int], shared: set[int], group: ProcessGroup) -> tuple[int, ...]:
    """Return the number of lanes that each rank passes; raise unless shared arguments have as many in sum."""
    agree(group, "the numbers of lanes")
    counts = tuple(count for (count,) in numbers_of_ranks(own, group))
    if shared - {sum(counts)}:
        raise ValueError(f"vmap: the ranks pass {sum(counts)} lanes of their own, and {max(shared)} that all have")
    _refuse_none(min(counts), counts)
    return counts


def _equal_counts(total: int, size: int) -> tuple[int, ...]:
    """Return about equal numbers of lanes for all ranks."""
    counts = tuple(total // size + (r < total % size) for r in range(size))
    _refuse_none(total, counts)
    return counts


def _refuse_none(lanes: int, counts: tuple[int, ...]) -> None:
    """Raise if `lanes`, the lanes of all ranks or the fewest of one, are none."""
    if not lanes:
        raise ValueError(f"vmap: each rank must pass a lane at least; the ranks pass {list(counts)}")


def _own_lanes(
    leaves: list[Any], dims: list[Any], lanes: _Lanes, group: ProcessGroup
) -> tuple[list[Any], list[int | None]]:
    """Return the arguments with the lanes of this rank, and the dimensions of the lanes."""
    own, own_dims = list(leaves), [_number_of(d) for d in dims]
    shared = [i for i, dim in enumerate(dims) if dim is not None and not is_shard(dim)]
    # Under a mode always the same operation, whatever is differentiated in this evaluation.
    sent = [i for i in shared if is_any_running() or _tracking.may_be_differentiated(leaves[i])]
    for i in set(shared).difference(sent):
        own[i] = leaves[i].narrow(dims[i], lanes.first, lanes.run)
    # The transpose of `shard` is `all_gather`, so the gradient reaches all ranks.
    by_ranks = [_by_ranks(leaves[i].movedim(dims[i], 0), lanes) for i in sent]
    for i, part in zip(sent, on_leaves(Collective("shard", weakref.ref(group)), by_ranks), strict=True):
        # The last rows are padding where the ranks have unequal numbers of lanes.
        own[i], own_dims[i] = part[: lanes.run], 0
    return own, own_dims


def _by_ranks(tensor: Tensor, lanes: _Lanes) -> Tensor:
    """Return a tensor with lanes in front, with the ranks in front of the lanes, as many for each rank."""
    if not lanes.is_even:
        tensor = tensor.index_select(0, torch.tensor(lanes.padded(), device=tensor.device))
    parts: Tensor = tensor.unflatten(0, (len(lanes.counts), lanes.most))
    return parts


def _on_all_ranks(result: Tree, out_dims: Any, lanes: _Lanes, group: ProcessGroup) -> Tree:
    """Return the results of all lanes on all ranks, but those that `out_dims` keeps on their rank."""
    leaves, spec = pytree.leaves_of(result)
    try:
        dims = pytree.broadcast(spec, out_dims)
    except ValueError:
        raise ValueError(f"vmap: out_dims {out_dims!r} do not fit the result {pytree.describe(result)}") from None
    if None in dims:
        raise ValueError("vmap: out_dims must not have None; return such a value from outside of the function")
    sent = [i for i, d in enumerate(dims) if not is_shard(d)]
    gathered = on_leaves(Collective("all_gather", weakref.ref(group)), [_padded_lanes(leaves[i], lanes) for i in sent])
    for i, t in zip(sent, gathered, strict=True):
        whole = t.flatten(0, 1)
        if not lanes.is_even:
            whole = whole.index_select(0, torch.tensor(lanes.places(), device=t.device))
        leaves[i] = whole
    placed = [t.movedim(0, _number_of(d)) for t, d in zip(leaves, dims, strict=True)]
    return pytree.unflatten(placed, spec)


def _padded_lanes(tensor: Tensor, lanes: _Lanes) -> Tensor:
    """Return a tensor with as many lanes in front on every rank, its last lane repeated."""
    missing = lanes.most - tensor.shape[0]
    return tensor if not missing else torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])
