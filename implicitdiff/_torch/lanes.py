"""A vmap that also works for a batch of size 0. A lane is one problem of the batch."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

import implicitdiff._torch.trees as pytree
from implicitdiff._torch.context import depth
from implicitdiff._torch.tracking import is_continuous
from implicitdiff._torch.trees import UserFunction


def vmap(fn: UserFunction, in_dims: Any, out_dims: int = 0) -> UserFunction:
    """`torch.func.vmap` for any number of lanes, including zero.

    torch's batching rules read the first lane of a batch of scalars, so ``vmap(lambda x: 2.0 * x)(torch.zeros(0))``
    raises. For a batch of size 0, the function runs on one lane of arbitrary numbers, which the result leaves out.
    """
    mapped = torch.func.vmap(fn, in_dims=in_dims, out_dims=out_dims)

    def over_lanes(*args: Any) -> Any:
        # A batch of size 0 has an empty tensor. Whether an empty tensor is such a batch, its `in_dims` tells.
        if all([t.numel() for t in pytree.tensors(args)]):
            return mapped(*args)
        leaves, spec = pytree.leaves_of(args)
        dims = pytree.broadcast(spec, in_dims)
        pairs = [(t, d if isinstance(t, Tensor) else None) for t, d in zip(leaves, dims, strict=True)]
        if all(d is None or leaf.shape[d] for leaf, d in pairs):
            return mapped(*args)
        # `cat` hands the wrappers and the graph of the empty tensor on to the made-up lane.
        one_lane = [leaf if d is None else torch.cat([leaf, _made_up_lane(leaf, d)], dim=d) for leaf, d in pairs]
        return pytree.map_tensors(lambda t: t.narrow(out_dims, 0, 0), mapped(*pytree.unflatten(one_lane, spec)))

    return over_lanes


def over_levels(fn: UserFunction, levels: Sequence[Any]) -> UserFunction:
    """Return the function under one vmap for each of `levels`: the ``in_dims`` of the vmaps, the innermost first."""
    for dims in levels:
        fn = vmap(fn, dims)
    return fn


def _made_up_lane(like: Tensor, dim: int) -> Tensor:
    """Return one lane of irregular positive numbers, which few checks of arguments refuse."""
    ones = like.new_ones([1 if i == dim else size for i, size in enumerate(like.shape)])
    if not is_continuous(like):
        return ones
    places = torch.arange(ones.numel(), dtype=torch.float32, device=like.device).reshape(ones.shape)
    return ones + 0.5 * torch.cos(7.0 * places**2).to(like.dtype)


class VmapSize(NamedTuple):
    """A vmap: its level, and its number of lanes in this process."""

    level: int
    size: int


class _Part(NamedTuple):
    """The lanes of a vmap that are a part of more: the number of the first, how many, and how many there are in all."""

    first: int
    size: int
    total: int


class _Parts(threading.local):
    # By level too, since a vmap inside of the body may have the same size.
    of_vmap: dict[VmapSize, _Part] = {}  # noqa: RUF012 - replaced, never changed


_parts = _Parts()


@contextmanager
def numbered(first: int, count: int, total: int) -> Iterator[None]:
    """Say that a vmap in the body, as the outermost transform there, runs `count` of `total` lanes from `first` on."""
    # The next transform that starts in the body has the level `depth() + 1`.
    key = VmapSize(depth() + 1, count)
    before, _parts.of_vmap = _parts.of_vmap, {**_parts.of_vmap, key: _Part(first, count, total)}
    try:
        yield
    finally:
        _parts.of_vmap = before


def global_numbers(lanes: Sequence[int], vmaps: Sequence[VmapSize]) -> tuple[list[int], int]:
    """Return the numbers of lanes among all that there are, in other processes too, and how many there are.

    Args:
        lanes: numbers of lanes among those that run here, counted over all vmaps.
        vmaps: the vmaps, the outermost first.
    """
    # A vmap without a part, or of another size, has all of its lanes in this process.
    parts = [_parts.of_vmap.get(key, _Part(0, key.size, key.size)) for key in vmaps]
    numbers = []
    for lane in lanes:
        number, stride = 0, 1
        # A number with one digit for each vmap, the innermost last; the bases are the sizes.
        for part in reversed(parts):
            lane, at = divmod(lane, part.size)
            number, stride = number + (part.first + at) * stride, stride * part.total
        numbers.append(number)
    return numbers, math.prod([part.total for part in parts])
