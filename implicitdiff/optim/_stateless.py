"""Transformations that keep nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import implicitdiff.optim._donation as _donation
from implicitdiff.optim._base import GradientTransformation
from implicitdiff.optim._columns import Columns
from implicitdiff.pytree import Leaves


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


def each(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Columns, Any], Leaves]:
    """Compute leaf by leaf."""
    return lambda columns, params: [fn(g) for g in columns.first]
