"""Updates times a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import implicitdiff.optim._check as _check
from implicitdiff._pytree import Leaves
from implicitdiff.optim._base import GradientTransformation
from implicitdiff.optim._columns import Columns
from implicitdiff.optim._rule import Number
from implicitdiff.optim._stateless import factor_like, overwritten, stateless, widely


class ScheduleState(NamedTuple):
    """State of `scale_by_schedule`.

    Attributes:
        count: how many updates there were, an int64 scalar.
    """

    count: torch.Tensor  # type: ignore[assignment]  # not the method of tuples


def scale(factor: Number) -> GradientTransformation:
    """Multiply by a number or a scalar tensor, which may be learned: ``update = factor * g``.

    Example:
        >>> import torch
        >>> from implicitdiff.optim import scale
        >>> init, update = scale(-0.1)
        >>> update(torch.tensor([1.0, 2.0]), init(None))[0]
        tensor([-0.1000, -0.2000])
    """
    _check.finite("scale", factor=factor)
    return stateless("scale", lambda columns, params: _scaled(columns, factor))


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

    def init(params: Any) -> ScheduleState:
        return ScheduleState(torch.zeros((), dtype=torch.int64, device="cpu"))

    def update(
        grads: Any, state: ScheduleState, params: Any = None, *, inplace: bool = False
    ) -> tuple[Any, ScheduleState]:
        columns = Columns("scale_by_schedule", "grads", grads).checked()
        updates = _scaled(columns, schedule(state.count))
        if inplace:
            updates = overwritten(columns, updates)
        return columns.tree_of(columns.leaves, updates), ScheduleState(state.count + 1)

    return GradientTransformation(init, update)


def _scaled(columns: Columns, factor: Number) -> Leaves:
    return [widely(g, lambda g: factor_like(factor, g) * g) for g in columns.first]
