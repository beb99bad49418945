"""Transformations without a state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

import implicitdiff._torch.trees as pytree
import implicitdiff.optim._donation as _donation
from implicitdiff._calls import Remembers
from implicitdiff._torch.trees import Leaves, Number, Tree
from implicitdiff.optim._base import GradientTransformation
from implicitdiff.optim._columns import Columns, accumulator, refuse_others, value_of_each_leaf


def stateless(name: str, compute: Callable[[Columns, Tree], Leaves]) -> GradientTransformation:
    """Return the pair with updates ``compute(columns of the gradients, params)`` and an empty state."""
    update = _StatelessUpdate(name, compute)
    return GradientTransformation(update.init, update)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _StatelessUpdate(Remembers):
    """``init`` and ``update`` of a transformation without a state."""

    name: str
    compute: Callable[[Columns, Tree], Leaves]

    def init(self, params: Tree) -> tuple[()]:
        refuse_others(self.name, pytree.leaves_of(params)[0])
        return ()

    def __call__(
        self, grads: Tree, state: tuple[()], params: Tree = None, *, inplace: bool = False
    ) -> tuple[Tree, tuple[()]]:
        columns = Columns(self.name, "grads", grads).checked()
        if inplace:
            # Leaves of a graph are read outside of the graph; other parameters with history are refused below.
            params = pytree.map_tensors(lambda p: p.detach() if _donation.is_leaf(p) else p, params)
            updates = write_into_gradients(columns, self.compute(columns, params))
        else:
            updates = self.compute(columns, params)
        return columns.tree_of(columns.leaves, updates), state


def write_into_gradients(columns: Columns, updates: Leaves) -> Leaves:
    """Write the updates into the memory of the gradients, except memory of several gradients."""
    _donation.refuse_tracked(columns.caller, "grads, or what the update depends on,", [*columns.first, *updates])
    shared = _donation.shared(columns.first)
    buffers = [None if i in shared else g for i, g in enumerate(columns.first)]
    [updates] = _donation.fill([buffers], [[u.detach() for u in updates]])
    return updates


def in_accumulator_dtype(g: torch.Tensor, fn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Apply a function to a gradient in the dtype of its accumulator; round the result to the gradient's dtype."""
    return fn(g.to(accumulator(g.dtype))).to(g.dtype)


def factor_of_each_row(key: str, factor: Tree, columns: Columns) -> list[Number]:
    """Return the factor of each row, from one factor for all leaves or a tree of factors."""
    values = value_of_each_leaf(columns.caller, key, factor, columns.spec)
    columns.refuse_misfits(key, values)
    return columns.pick(values)


def convert_factor(factor: Number, g: torch.Tensor) -> Number:
    """Convert a factor to the real dtype and the device of `g`: a float64 factor would promote the product."""
    return factor.to(g.device, g.dtype.to_real()) if isinstance(factor, torch.Tensor) else factor


def each(fn: Callable[[torch.Tensor], torch.Tensor], columns: Columns, params: Tree) -> Leaves:
    """Apply a function to each gradient."""
    return [fn(g) for g in columns.first]
