"""Hyper-parameters in the state of a transformation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import NoneType
from typing import NamedTuple

import torch

import implicitdiff._torch.trees as pytree
from implicitdiff._calls import Remembers
from implicitdiff._torch.trees import Tree
from implicitdiff.optim._base import GradientTransformation, step_beside_grads


class InjectState(NamedTuple):
    """State of `inject_hyperparams`.

    Attributes:
        count: number of updates so far, an int64 scalar.
        hyperparams: values by name, float64 tensors or trees of them. Values of schedules are those of the last update
            and are evaluated again in the next.
        inner: the state of the transformation.
    """

    count: torch.Tensor  # type: ignore[assignment]  # not the method of tuples
    hyperparams: dict[str, Tree]
    inner: Tree


def inject_hyperparams(factory: Callable[..., GradientTransformation]) -> Callable[..., GradientTransformation]:
    """Wrap a factory of transformations, to hold its hyper-parameters in the state.

    Args:
        factory: e.g. ``implicitdiff.adam``.

    Returns:
        A function of the same keyword arguments. Numbers, tensors, schedules (functions of the number of updates so
        far, a tensor) and trees of these become tensors in ``state.hyperparams``. Other arguments (None, bool, strings,
        masks) are passed to the factory unchanged. Change a value between updates with ``state._replace``, learn it by
        differentiating with respect to the state, or vmap over it.

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


def _injected(factory: Callable[..., GradientTransformation], **given: Tree) -> GradientTransformation:
    # A mask may be a function too, but of the parameters.
    hyperparams = {k: v for k, v in given.items() if k != "mask" and _is_hyperparameter(v)}
    schedules = schedules_among(hyperparams)
    numbers = {k: v for k, v in hyperparams.items() if k not in schedules}
    statics = {k: v for k, v in given.items() if k not in hyperparams}
    update = _Injected(factory, statics, numbers, schedules)
    return GradientTransformation(update.init, update)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Injected(Remembers):
    """``init``, ``update`` and ``step`` of a factory's pair, which is made again for each update.

    Attributes:
        factory: makes the pair from hyper-parameters.
        statics: arguments that stay out of the state.
        numbers: arguments in the state, constant unless the user replaces them.
        schedules: arguments that are functions of the number of updates.
    """

    factory: Callable[..., GradientTransformation]
    statics: dict[str, Tree]
    numbers: dict[str, Tree]
    schedules: dict[str, Tree]

    def init(self, params: Tree) -> InjectState:
        # On the CPU, so that the value of a schedule is read without a wait for the device.
        count = torch.zeros((), dtype=torch.int64, device="cpu")
        values = self._hyperparams(count, {k: pytree.map_leaves(_as_own_tensor, v) for k, v in self.numbers.items()})
        return InjectState(count, values, self._of(values).init(params))

    def __call__(
        self, grads: Tree, state: InjectState, params: Tree = None, *, inplace: bool = False
    ) -> tuple[Tree, InjectState]:
        # The pair is made again in each update, because its factory takes values, and schedules change them.
        values = self._hyperparams(state.count, state.hyperparams)
        updates, inner = self._of(values).update(grads, state.inner, params=params, inplace=inplace)
        return updates, InjectState(state.count + 1, values, inner)

    def step(self, grads: Tree, state: InjectState, params: Tree, *, inplace: bool = False) -> tuple[Tree, InjectState]:
        values = self._hyperparams(state.count, state.hyperparams)
        params, inner = step_beside_grads(self._of(values), grads, state.inner, params, inplace=inplace)
        return params, InjectState(state.count + 1, values, inner)

    def _of(self, values: dict[str, Tree]) -> GradientTransformation:
        return self.factory(**self.statics, **values)

    def _hyperparams(self, count: torch.Tensor, kept: dict[str, Tree]) -> dict[str, Tree]:
        return kept | {k: pytree.map_leaves(functools.partial(_value_at, count), v) for k, v in self.schedules.items()}


def schedules_among(values: dict[str, Tree]) -> dict[str, Tree]:
    """Return the hyper-parameters that are schedules or contain schedules."""
    return {k: v for k, v in values.items() if any(map(callable, pytree.leaves_of(v)[0]))}


def _is_hyperparameter(value: Tree) -> bool:
    """True if a value is a number, a tensor or a schedule, or a tree of these."""
    leaves = pytree.leaves_of(value)[0]
    # None is not a hyper-parameter, but an empty tree is one, for parameters without leaves.
    return [*map(type, leaves)] != [NoneType] and all(
        callable(leaf) or (isinstance(leaf, (int, float, torch.Tensor, NoneType)) and not isinstance(leaf, bool))
        for leaf in leaves
    )


def _value_at(count: torch.Tensor, value: Tree) -> Tree:
    """Value of a leaf of a hyper-parameter after `count` updates, as float64 tensors."""
    return pytree.map_leaves(_double, value(count) if callable(value) else value)


def _as_own_tensor(value: Tree) -> torch.Tensor | None:
    # A copy: the state may be donated and overwritten, and must not share memory with the user's tensor.
    double = _double(value)
    return None if double is None else double.clone()


def _double(value: Tree) -> torch.Tensor | None:
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return value.double()
    return torch.tensor(float(value), dtype=torch.float64, device="cpu")
