"""Transformations that keep nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

import implicitdiff._torch.trees as pytree
import implicitdiff.optim._donation as _donation
from implicitdiff._torch.trees import Leaves
from implicitdiff.optim._base import GradientTransformation
from implicitdiff.optim._columns import Columns, accumulator, refuse_others, spread
from implicitdiff.optim._rule import Number


def stateless(name: str, compute: Callable[[Columns, Any], Leaves]) -> GradientTransformation:
    """The pair whose updates are ``compute(columns of the gradients, params)``; its state is empty."""
    update = _Update(name, compute)
    return GradientTransformation(update.init, update)


@dataclasses.dataclass(frozen=True, eq=False)
class _Update:
    """The pair of a computation."""

    name: str
    compute: Callable[[Columns, Any], Leaves]

    def init(self, params: Any) -> tuple[()]:
        refuse_others(self.name, pytree.leaves_of(params)[0])
        return ()

    def __call__(
        self, grads: Any, state: tuple[()], params: Any = None, *, inplace: bool = False
    ) -> tuple[Any, tuple[()]]:
        columns = Columns(self.name, "grads", grads).checked()
        if inplace:
            params = pytree.map_tensors(lambda p: p.detach() if _donation.is_leaf(p) else p, params)
            updates = overwritten(columns, self.compute(columns, params))
        else:
            updates = self.compute(columns, params)
        return columns.tree_of(columns.leaves, updates), state


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


def factors(key: str, factor: Any, columns: Columns) -> list[Any]:
    """A number for each row, of what is one for all leaves, or a tree that is nested like them or a prefix."""
    if isinstance(factor, (int, float)) or (isinstance(factor, torch.Tensor) and not factor.ndim):
        return [factor] * len(columns.rows)
    values = spread(columns.caller, key, factor, columns.spec)
    columns.refuse_misfits(key, values)
    return columns.pick(values)


def factor_like(factor: Number, g: torch.Tensor) -> Number:
    """A number as it multiplies a tensor: a scalar tensor must not change its dtype."""
    return factor.to(g.device, g.dtype.to_real()) if isinstance(factor, torch.Tensor) else factor


def each(fn: Callable[[torch.Tensor], torch.Tensor], columns: Columns, params: Any) -> Leaves:
    """Compute leaf by leaf."""
    return [fn(g) for g in columns.first]
