"""Schedules: hyper-parameters as functions of the number of updates so far.

A schedule is a function ``schedule(count) -> value`` of an integer or an integer tensor; the value is a float64 tensor
of the shape of ``count``. Optimizers accept a schedule for every number, e.g. ``adam(lr=cosine(1e-3, 1000))``, and so
does `implicitdiff.optim.scale_by_schedule`. Arguments of a schedule may be scalar tensors, with derivatives. Schedules
can be pickled.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch

from implicitdiff._calls import Remembers, shows_call
from implicitdiff._torch.trees import Number

__all__ = ["constant", "cosine", "exponential", "linear", "piecewise", "polynomial", "warmup"]


def __dir__() -> list[str]:
    return __all__


Count = int | torch.Tensor
Schedule = Callable[[Count], torch.Tensor]


class _Schedule(Remembers, functools.partial[torch.Tensor]):
    """A schedule: a partial function, which unlike a closure can be pickled."""


@shows_call
def constant(value: Number) -> Schedule:
    """Constant ``value``.

    Example:
        >>> from implicitdiff.schedule import constant
        >>> constant(0.1)(3)
        tensor(0.1000, dtype=torch.float64)
    """
    return _Schedule(_constant, value)


def _constant(value: Number, count: Count) -> torch.Tensor:
    # Broadcast to the shape of `count`, in float64.
    return value + 0 * _float(count)


@shows_call
def polynomial(
    init_value: Number, end_value: Number, power: Number, transition_steps: int, *, begin: int = 0
) -> Schedule:
    """Polynomial decay from ``init_value`` to ``end_value``.

    The value is::

        end_value + (init_value - end_value) (1 - s)^power,    s = clamp((count - begin) / transition_steps, 0, 1)

    Args:
        power: 1 is a straight line; 2 flattens at the end.
        transition_steps: number of updates from ``init_value`` to ``end_value``; at least 1.
        begin: number of updates at ``init_value`` before the decay.

    Example:
        >>> from implicitdiff.schedule import polynomial
        >>> polynomial(1.0, 0.0, power=2, transition_steps=4)(torch.arange(5))
        tensor([1.0000, 0.5625, 0.2500, 0.0625, 0.0000], dtype=torch.float64)
    """
    _at_least_one("polynomial", transition_steps=transition_steps)
    return _Schedule(_polynomial, init_value, end_value, power, transition_steps, begin)


def _polynomial(
    init_value: Number, end_value: Number, power: Number, transition_steps: int, begin: int, count: Count
) -> torch.Tensor:
    # As a convex combination, which gives both ends exactly.
    left = 1 - _elapsed_share(count, begin, transition_steps)
    return end_value * (1 - left**power) + init_value * left**power


@shows_call
def linear(init_value: Number, end_value: Number, transition_steps: int, *, begin: int = 0) -> Schedule:
    """A straight line from ``init_value`` to ``end_value`` in ``transition_steps`` updates, constant before and after.

    Example:
        >>> from implicitdiff.schedule import linear
        >>> linear(1.0, 0.0, 4)(torch.arange(6))
        tensor([1.0000, 0.7500, 0.5000, 0.2500, 0.0000, 0.0000], dtype=torch.float64)
    """
    return polynomial(init_value, end_value, 1, transition_steps, begin=begin)


@shows_call
def exponential(
    init_value: Number,
    decay_rate: Number,
    transition_steps: int = 1,
    *,
    begin: int = 0,
    staircase: bool = False,
    end_value: float | None = None,
) -> Schedule:
    """Geometric decay: ``init_value * decay_rate^((count - begin) / transition_steps)``.

    Args:
        decay_rate: the factor for ``transition_steps`` updates, positive.
        begin: number of updates at ``init_value`` before the decay.
        staircase: round the exponent down to an integer.
        end_value: bound of the value: from below for a ``decay_rate`` less than 1, else from above.

    Example:
        >>> from implicitdiff.schedule import exponential
        >>> exponential(1.0, 0.5, 2, staircase=True)(torch.arange(5))
        tensor([1.0000, 1.0000, 0.5000, 0.5000, 0.2500], dtype=torch.float64)
    """
    _at_least_one("exponential", transition_steps=transition_steps)
    if not isinstance(decay_rate, torch.Tensor) and not decay_rate > 0:
        raise ValueError(f"exponential: decay_rate must be positive, got {decay_rate!r}")
    return _Schedule(_exponential, init_value, decay_rate, transition_steps, begin, staircase, end_value)


def _exponential(
    init_value: Number,
    decay_rate: Number,
    transition_steps: int,
    begin: int,
    staircase: bool,
    end_value: float | None,
    count: Count,
) -> torch.Tensor:
    exponent = (_float(count) - begin).clamp(min=0) / transition_steps
    # The exponent is clamped, so the value is constant before `begin`.
    value = init_value * decay_rate ** (exponent.floor() if staircase else exponent)
    if end_value is None:
        return value
    # decay_rate may be a tensor, also under vmap, so the side of the bound is selected by torch.where.
    falls = torch.as_tensor(decay_rate, device=value.device) < 1
    return torch.where(falls, value.clamp(min=end_value), value.clamp(max=end_value))


@shows_call
def cosine(init_value: Number, decay_steps: int, *, alpha: Number = 0.0, begin: int = 0) -> Schedule:
    """Half a period of a cosine from ``init_value`` to ``alpha * init_value``.

    The value is::

        init_value ((1 - alpha) (1 + cos(pi s)) / 2 + alpha),    s = clamp((count - begin) / decay_steps, 0, 1)

    Reference:
        Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017, equation 5.

    Example:
        >>> from implicitdiff.schedule import cosine
        >>> cosine(1.0, 4)(torch.arange(5))
        tensor([1.0000, 0.8536, 0.5000, 0.1464, 0.0000], dtype=torch.float64)
    """
    _at_least_one("cosine", decay_steps=decay_steps)
    return _Schedule(_cosine, init_value, decay_steps, alpha, begin)


def _cosine(init_value: Number, decay_steps: int, alpha: Number, begin: int, count: Count) -> torch.Tensor:
    # From 1 to 0 over the decay.
    fall = (1 + torch.cos(math.pi * _elapsed_share(count, begin, decay_steps))) / 2
    return init_value * ((1 - alpha) * fall + alpha)


@shows_call
def warmup(schedule: Schedule, warmup_steps: int, *, init_value: Number = 0.0) -> Schedule:
    """A straight line from ``init_value`` to the first value of a schedule, then the schedule.

    Args:
        schedule: the schedule that follows, with its count from the end of the warm-up.
        warmup_steps: number of updates of the line; at least 1.

    Reference:
        Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017, section 2.2.

    Example:
        >>> from implicitdiff.schedule import cosine, warmup
        >>> warmup(cosine(1.0, 2), 2)(torch.arange(5))
        tensor([0.0000, 0.5000, 1.0000, 0.5000, 0.0000], dtype=torch.float64)
    """
    _at_least_one("warmup", warmup_steps=warmup_steps)
    return _Schedule(_warmed, schedule, warmup_steps, init_value)


def _warmed(schedule: Schedule, warmup_steps: int, init_value: Number, count: Count) -> torch.Tensor:
    count = _count_tensor(count)
    share = _elapsed_share(count, 0, warmup_steps)
    # The line ends at ``schedule(0)``, the first value after the warm-up, so the value has no jump.
    rising = init_value + (schedule(torch.zeros_like(count)) - init_value) * share
    # `torch.where` evaluates both branches: the clamp keeps negative counts from the schedule.
    return torch.where(count < warmup_steps, rising, schedule((count - warmup_steps).clamp(min=0)))


@shows_call
def piecewise(schedules: Sequence[Schedule | float], boundaries: Sequence[int]) -> Schedule:
    """A sequence of schedules, each with its count from its own start.

    Args:
        schedules: schedules or numbers, one more than boundaries.
        boundaries: numbers of updates at which the next schedule starts, increasing.

    Raises:
        ValueError: the numbers of schedules and boundaries do not fit, or the boundaries do not increase.

    Example:
        >>> from implicitdiff.schedule import linear, piecewise
        >>> piecewise([1.0, linear(0.5, 0.0, 2)], [2])(torch.arange(5))
        tensor([1.0000, 1.0000, 0.5000, 0.2500, 0.0000], dtype=torch.float64)
    """
    if len(schedules) != len(boundaries) + 1 or list(boundaries) != sorted({b for b in boundaries if b > 0}):
        raise ValueError(
            "piecewise: there must be one schedule more than boundaries, and boundaries must be positive and "
            f"increase, got {len(schedules)} schedules and boundaries {list(boundaries)}"
        )
    pieces = [functools.partial(_widened, piece) if callable(piece) else constant(piece) for piece in schedules]
    return _Schedule(_joined, pieces, list(boundaries))


def _joined(pieces: Sequence[Schedule], boundaries: Sequence[int], count: Count) -> torch.Tensor:
    count = _count_tensor(count)
    value = pieces[0](count)
    for piece, start in zip(pieces[1:], boundaries, strict=True):
        # All pieces are evaluated, as `count` may be traced; counts before a start are clamped to 0.
        value = torch.where(count < start, value, piece((count - start).clamp(min=0)))
    return value


def _widened(schedule: Callable[[Count], Number], count: Count) -> torch.Tensor:
    # A number becomes a float64 tensor of the shape of `count`.
    return schedule(count) + 0 * _float(count)


def _elapsed_share(count: Count, begin: int, steps: int) -> torch.Tensor:
    return ((_float(count) - begin) / steps).clamp(0, 1)


def _float(count: Count) -> torch.Tensor:
    return _count_tensor(count).double()


def _count_tensor(count: Count) -> torch.Tensor:
    # `torch.as_tensor` would move a tensor to the default device.
    return count if isinstance(count, torch.Tensor) else torch.tensor(count, device="cpu")


def _at_least_one(name: str, **values: int) -> None:
    for key, value in values.items():
        # Negated, so that nan is refused as well.
        if not value >= 1:
            raise ValueError(f"{name}: {key} must be at least 1, got {value!r}")
