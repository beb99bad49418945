"""Multiplication of updates by a number or a schedule."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

import implicitdiff._torch.trees as pytree
import implicitdiff.optim._check as _check
from implicitdiff._calls import Remembers, shows_call
from implicitdiff._torch.trees import Leaves, Number, Tree
from implicitdiff.optim._base import GradientTransformation
from implicitdiff.optim._columns import Columns, refuse_others
from implicitdiff.optim._stateless import (
    convert_factor,
    factor_of_each_row,
    in_accumulator_dtype,
    stateless,
    write_into_gradients,
)


class ScheduleState(NamedTuple):
    """State of `scale_by_schedule`.

    Attributes:
        count: number of updates so far, an int64 scalar.
    """

    count: torch.Tensor  # type: ignore[assignment]  # not the method of tuples


@shows_call
def scale(factor: Number | Tree) -> GradientTransformation:
    """Multiply by a constant or learned number: ``update = factor * g``.

    Args:
        factor: a number, a tensor that broadcasts to every leaf, or a tree of these, nested like the gradients or a
            prefix of them.

    Example:
        >>> import torch
        >>> from implicitdiff.optim import scale
        >>> init, update = scale(-0.1)
        >>> update(torch.tensor([1.0, 2.0]), init(None))[0]
        tensor([-0.1000, -0.2000])
    """
    _check.require_finite("scale", factor=factor)
    return stateless("scale", functools.partial(_all_scaled, factor))


@shows_call
def scale_by_schedule(schedule: Callable[[torch.Tensor], Number]) -> GradientTransformation:
    """Multiply by the value of a schedule: ``update = schedule(count) * g``, for count = 0, 1, 2, ...

    Args:
        schedule: a function of the number of updates so far, an int64 scalar tensor; see `implicitdiff.schedule`.

    Example:
        >>> import torch
        >>> from implicitdiff.optim import scale_by_schedule
        >>> from implicitdiff.schedule import exponential
        >>> init, update = scale_by_schedule(exponential(1.0, decay_rate=0.5))
        >>> updates, state = update(torch.tensor([1.0]), init(None))
        >>> update(torch.tensor([1.0]), state)[0]
        tensor([0.5000])
    """
    if not callable(schedule):
        raise TypeError(f"scale_by_schedule: schedule must be a function of a count, got {schedule!r}; see scale")
    update = _Scheduled(schedule)
    return GradientTransformation(update.init, update)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Scheduled(Remembers):
    """``init`` and ``update`` of a schedule."""

    schedule: Callable[[torch.Tensor], Number]

    def init(self, params: Tree) -> ScheduleState:
        refuse_others("scale_by_schedule", pytree.leaves_of(params)[0])
        return ScheduleState(torch.zeros((), dtype=torch.int64, device="cpu"))

    def __call__(
        self, grads: Tree, state: ScheduleState, params: Tree = None, *, inplace: bool = False
    ) -> tuple[Tree, ScheduleState]:
        # The schedule is evaluated before the count increases: the first update has count 0.
        columns = Columns("scale_by_schedule", "grads", grads).checked()
        updates = _scaled(columns, self.schedule(state.count))
        if inplace:
            updates = write_into_gradients(columns, updates)
        return columns.tree_of(columns.leaves, updates), ScheduleState(state.count + 1)


def _all_scaled(factor: Tree, columns: Columns, params: Tree) -> Leaves:
    return _scaled(columns, factor)


def _scaled(columns: Columns, factor: Tree) -> Leaves:
    each = zip(columns.first, factor_of_each_row("factor", factor, columns), strict=True)
    return [in_accumulator_dtype(g, functools.partial(_times, number)) for g, number in each]


def _times(factor: Number, g: torch.Tensor) -> torch.Tensor:
    return convert_factor(factor, g) * g
