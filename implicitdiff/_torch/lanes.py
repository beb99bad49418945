"""A vmap that also works for a batch of size 0. A lane is one element of the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import implicitdiff._torch.trees as pytree


def vmap(fn: Callable[..., Any], in_dims: Any, out_dims: int = 0) -> Callable[..., Any]:
    """`torch.func.vmap`, also where there is no lane.

    torch's batching rules for numbers look at the first lane, so ``vmap(lambda x: 2.0 * x)(torch.zeros(0))`` raises.
    Without lanes the function runs on one lane of made-up numbers, and nothing of its result is kept.
    """
    mapped = torch.func.vmap(fn, in_dims=in_dims, out_dims=out_dims)

    def over_lanes(*args: Any) -> Any:
        if all([t.numel() for t in pytree.tensors(args)]):
            return mapped(*args)
        leaves, spec = pytree.leaves_of(args)
        dims = pytree.broadcast(spec, in_dims)
        pairs = [(t, d if isinstance(t, Tensor) else None) for t, d in zip(leaves, dims, strict=True)]
        if all(d is None or leaf.shape[d] for leaf, d in pairs):
            return mapped(*args)
        one_lane = [leaf if d is None else torch.cat([leaf, _numbers(leaf, d)], dim=d) for leaf, d in pairs]
        return pytree.map_tensors(lambda t: t.narrow(out_dims, 0, 0), mapped(*pytree.unflatten(one_lane, spec)))

    return over_lanes


def over_levels(fn: Callable[..., Any], levels: Sequence[Any]) -> Callable[..., Any]:
    """The function under one vmap for each of `levels`, the ``in_dims`` of the innermost first."""
    for dims in levels:
        fn = vmap(fn, dims)
    return fn


def _numbers(like: Tensor, dim: int) -> Tensor:
    """One lane of positive numbers without a pattern: functions that check their arguments refuse few of them."""
    ones = like.new_ones([1 if i == dim else size for i, size in enumerate(like.shape)])
    if not (like.is_floating_point() or like.is_complex()):
        return ones
    places = torch.arange(ones.numel(), dtype=torch.float32, device=like.device).reshape(ones.shape)
    return ones + 0.5 * torch.cos(7.0 * places**2).to(like.dtype)
