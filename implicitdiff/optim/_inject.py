"""Hyper-parameters that live in the state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import implicitdiff._pytree as pytree
from implicitdiff.optim._base import GradientTransformation


class InjectState(NamedTuple):
    """State of `inject_hyperparams`.

    Attributes:
        count: how many updates there were, an int64 scalar.
        hyperparams: the values for the next update, by name, float64 scalars on the CPU; schedules are
            evaluated anew each time.
        inner: the state of the transformation.
    """

    count: torch.Tensor  # type: ignore[assignment]  # not the method of tuples
    hyperparams: dict[str, Any]
    inner: Any


def inject_hyperparams(factory: Callable[..., GradientTransformation]) -> Callable[..., GradientTransformation]:
    """Make a factory of transformations keep its hyper-parameters in the state.

    Args:
        factory: e.g. ``implicitdiff.adam``.

    Returns:
        A function of the same keyword arguments. Numbers, tensors, tuples of these, and schedules (functions of the
        number of updates so far, a tensor) become tensors in ``state.hyperparams``; whatever else is given (None, bool,
        strings, masks) goes to the factory as it is. Change a value between updates with ``state._replace``, learn it
        by differentiating with respect to the state, or vmap over it.

    Example:
        >>> import torch
        >>> import implicitdiff
        >>> from implicitdiff.optim import inject_hyperparams
        >>> init, update = inject_hyperparams(implicitdiff.sgd)(lr=lambda count: 0.1 / (1 + count))
        >>> state, g = init(torch.zeros(2)), torch.ones(2)
        >>> for _ in range(2):
        ...     updates, state = update(g, state)
        ...     print(updates)
        tensor([-0.1000, -0.1000])
        tensor([-0.0500, -0.0500])
    """

    def injected(**given: Any) -> GradientTransformation:
        schedules = {k: v for k, v in given.items() if callable(v) and k != "mask"}
        numbers = {k: v for k, v in given.items() if _is_numeric(v)}
        statics = {k: v for k, v in given.items() if k not in schedules and k not in numbers}

        def hyperparams(count: torch.Tensor, kept: dict[str, Any]) -> dict[str, Any]:
            return kept | {k: _scalar(schedule(count)) for k, schedule in schedules.items()}

        def init(params: Any) -> InjectState:
            count = torch.zeros((), dtype=torch.int64, device="cpu")
            values = hyperparams(count, {k: pytree.map_leaves(_own, v) for k, v in numbers.items()})
            return InjectState(count, values, factory(**statics, **values).init(params))

        def update(
            grads: Any, state: InjectState, params: Any = None, *, inplace: bool = False
        ) -> tuple[Any, InjectState]:
            values = hyperparams(state.count, state.hyperparams)
            updates, inner = factory(**statics, **values).update(grads, state.inner, params=params, inplace=inplace)
            return updates, InjectState(state.count + 1, values, inner)

        return GradientTransformation(init, update)

    return injected


def _is_numeric(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_numeric, value))
    return isinstance(value, (int, float, torch.Tensor)) and not isinstance(value, bool)


def _own(value: Any) -> torch.Tensor:
    return _scalar(value).clone()


def _scalar(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.double()
    return torch.tensor(float(value), dtype=torch.float64, device="cpu")
