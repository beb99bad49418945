"""Hyper-parameters that live in the state."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import implicitdiff._torch.trees as pytree
from implicitdiff.optim._base import GradientTransformation


class InjectState(NamedTuple):
    """State of `inject_hyperparams`.

    Attributes:
        count: how many updates there were, an int64 scalar.
        hyperparams: the values for the next update, by name, as given but for numbers in float64 (those of schedules
            are evaluated anew each time).
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
        A function of the same keyword arguments. Numbers, tensors, schedules (functions of the number of updates so
        far, a tensor) and trees of these become tensors in ``state.hyperparams``; whatever else is given (None, bool,
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
    return functools.partial(_injected, factory)


def _injected(factory: Callable[..., GradientTransformation], **given: Any) -> GradientTransformation:
    schedules = {k: v for k, v in given.items() if k != "mask" and _is_numeric(v, scheduled=True)}
    numbers = {k: schedules.pop(k) for k in [*schedules] if _is_numeric(schedules[k])}
    statics = {k: v for k, v in given.items() if k not in schedules and k not in numbers}
    update = _Injected(factory, statics, numbers, schedules)
    return GradientTransformation(update.init, update)


@dataclasses.dataclass(frozen=True, eq=False)
class _Injected:
    """The pair of a factory.

    Attributes:
        factory: makes the pair of each update.
        statics: its arguments that stay out of the state.
        numbers: those that begin in the state.
        schedules: those that a number of updates gives.
    """

    factory: Callable[..., GradientTransformation]
    statics: dict[str, Any]
    numbers: dict[str, Any]
    schedules: dict[str, Any]

    def init(self, params: Any) -> InjectState:
        count = torch.zeros((), dtype=torch.int64, device="cpu")
        values = self._hyperparams(count, {k: pytree.map_leaves(_own, v) for k, v in self.numbers.items()})
        return InjectState(count, values, self._of(values).init(params))

    def __call__(
        self, grads: Any, state: InjectState, params: Any = None, *, inplace: bool = False
    ) -> tuple[Any, InjectState]:
        values = self._hyperparams(state.count, state.hyperparams)
        updates, inner = self._of(values).update(grads, state.inner, params=params, inplace=inplace)
        return updates, InjectState(state.count + 1, values, inner)

    def step(self, grads: Any, state: InjectState, params: Any, *, inplace: bool = False) -> tuple[Any, InjectState]:
        values = self._hyperparams(state.count, state.hyperparams)
        pair = self._of(values)
        if inplace and getattr(pair.update, "step", None) is None:  # which overwrites the gradients
            grads = pytree.map_tensors(torch.clone, grads)
        params, inner = pair.step(grads, state.inner, params, inplace=inplace)
        return params, InjectState(state.count + 1, values, inner)

    def _of(self, values: dict[str, Any]) -> GradientTransformation:
        return self.factory(**self.statics, **values)

    def _hyperparams(self, count: torch.Tensor, kept: dict[str, Any]) -> dict[str, Any]:
        return kept | {k: pytree.map_leaves(functools.partial(_at, count), v) for k, v in self.schedules.items()}


def _is_numeric(value: Any, scheduled: bool = False) -> bool:
    """Whether a value is a number or a tree of some, or, `scheduled`, of schedules as well."""
    leaves = pytree.leaves_of(value)[0]
    some = [leaf for leaf in leaves if leaf is not None]
    return bool(some or leaves != [None]) and all(
        (isinstance(leaf, (int, float, torch.Tensor)) and not isinstance(leaf, bool)) or (scheduled and callable(leaf))
        for leaf in some
    )


def _at(count: torch.Tensor, value: Any) -> Any:
    """A leaf of a hyper-parameter after so many updates."""
    value = value(count) if callable(value) else value
    return pytree.map_leaves(_double, value)


def _own(value: Any) -> torch.Tensor | None:
    double = _double(value)
    return None if double is None else double.clone()


def _double(value: Any) -> torch.Tensor | None:
    if value is None or isinstance(value, torch.Tensor):
        return None if value is None else value.double()
    return torch.tensor(float(value), dtype=torch.float64, device="cpu")
