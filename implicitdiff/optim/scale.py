"""Updates times a number."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import implicitdiff._torch.trees as pytree
import implicitdiff.optim._check as _check
from implicitdiff._torch.trees import Leaves
from implicitdiff.optim._base import GradientTransformation
from implicitdiff.optim._columns import Columns, refuse_others
from implicitdiff.optim._rule import Number
from implicitdiff.optim._stateless import factor_like, factors, overwritten, stateless, widely


class ScheduleState(NamedTuple):
    """State of `scale_by_schedule`.

    Attributes:
        count: how many updates there were, an int64 scalar.
    """

    count: torch.Tensor  # type: ignore[assignment]  # not the method of tuples


def scale(factor: Number | Any) -> GradientTransformation:
    """Multiply by a number, which may be learned: ``update = factor * g``.

    Args:
        factor: a number, a tensor that broadcasts to every leaf, or a tree of these that is nested like the gradients,
            or a prefix of them.

    Example:
        >>> import torch
        >>> from implicitdiff.optim import scale
        >>> init, update = scale(-0.1)
        >>> update(torch.tensor([1.0, 2.0]), init(None))[0]
        tensor([-0.1000, -0.2000])
    """
    _check.finite("scale", factor=factor)
    return stateless("scale", functools.partial(_all_scaled, factor))


def scale_by_schedule(schedule: Callable[[torch.Tensor], Number]) -> GradientTransformation:
    """Multiply by a number that changes: ``update = schedule(count) * g``, for count = 0, 1, 2, ...

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
        raise TypeError(f"scale_by_schedule: schedule has to be a function of a count, got {schedule!r}; see scale")
    update = _Scheduled(schedule)
    return GradientTransformation(update.init, update)


@dataclasses.dataclass(frozen=True, eq=False)
class _Scheduled:
    """The pair of a schedule."""

    schedule: Callable[[torch.Tensor], Number]

    def init(self, params: Any) -> ScheduleState:
        refuse_others("scale_by_schedule", pytree.leaves_of(params)[0])
        return ScheduleState(torch.zeros((), dtype=torch.int64, device="cpu"))

    def __call__(
        self, grads: Any, state: ScheduleState, params: Any = None, *, inplace: bool = False
    ) -> tuple[Any, ScheduleState]:
        columns = Columns("scale_by_schedule", "grads", grads).checked()
        updates = _scaled(columns, self.schedule(state.count))
        if inplace:
            updates = overwritten(columns, updates)
        return columns.tree_of(columns.leaves, updates), ScheduleState(state.count + 1)


def _all_scaled(factor: Any, columns: Columns, params: Any) -> Leaves:
    return _scaled(columns, factor)


def _scaled(columns: Columns, factor: Any) -> Leaves:
    each = zip(columns.first, factors("factor", factor, columns), strict=True)
    return [widely(g, functools.partial(_times, number)) for g, number in each]


def _times(factor: Number, g: torch.Tensor) -> torch.Tensor:
    return factor_like(factor, g) * g
