"""Transformations that keep nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import implicitdiff.optim._donation as _donation
from implicitdiff._pytree import Leaves
from implicitdiff.optim._base import GradientTransformation
from implicitdiff.optim._columns import Columns, accumulator
from implicitdiff.optim._rule import Number


def stateless(name: str, compute: Callable[[Columns, Any], Leaves]) -> GradientTransformation:
    """The pair whose updates are ``compute(columns of the gradients, params)``; its state is empty."""

    def init(params: Any) -> tuple[()]:
        return ()

    def update(grads: Any, state: tuple[()], params: Any = None, *, inplace: bool = False) -> tuple[Any, tuple[()]]:
        columns = Columns(name, "grads", grads).checked()
        updates = overwritten(columns, compute(columns, params)) if inplace else compute(columns, params)
        return columns.tree_of(columns.leaves, updates), state

    return GradientTransformation(init, update)


def overwritten(columns: Columns, updates: Leaves) -> Leaves:
    """The updates in the memory of the gradients."""
    _donation.refuse_tracked(columns.caller, "grads, or what the update depends on,", [*columns.first, *updates])
    shared = _donation.shared(columns.first)
    buffers = [None if i in shared else g for i, g in enumerate(columns.first)]
    [updates] = _donation.fill([buffers], [[u.detach() for u in updates]])
    return updates


def widely(g: torch.Tensor, fn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A function of a gradient in its accumulator's precision."""
    return fn(g.to(accumulator(g.dtype))).to(g.dtype)


def factor_like(factor: Number, g: torch.Tensor) -> Number:
    """A number as it multiplies a tensor: a scalar tensor must not change its dtype."""
    return factor.to(g.device, g.dtype.to_real()) if isinstance(factor, torch.Tensor) else factor


def each(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Columns, Any], Leaves]:
    """Compute leaf by leaf."""
    return lambda columns, params: [fn(g) for g in columns.first]
