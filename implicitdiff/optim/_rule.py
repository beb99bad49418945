"""An optimizer's step on one leaf, and what makes a transformation of trees out of it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from implicitdiff._pytree import Leaves
from implicitdiff.optim._columns import accumulator

Number = float | torch.Tensor
# A number, a scalar tensor, or a schedule.
Hyperparameter = Number | Callable[[torch.Tensor], Number]

# The learning rate of a transformation that leaves the sign and the scale of its direction to others.
UPHILL = -1.0


@dataclasses.dataclass(frozen=True)
class Rule(ABC):
    """The step of an optimizer on one leaf, as equations over real tensors; its fields are the hyper-parameters.

    The compiled kernels compute the same: `kernel` is what they are called there, and `numbers` the fields that they
    take, in their order.

    Attributes:
        lr: the learning rate.
        weight_decay: adds ``weight_decay * p`` to the gradient, or ``-lr * weight_decay * p`` to the update if
            `decoupled`.
        maximize: climb.
    """

    numbers: ClassVar[Sequence[str]]
    decoupled = False

    lr: Any
    weight_decay: Any
    maximize: bool

    @property
    @abstractmethod
    def kernel(self) -> str:
        """The name of the compiled step."""

    @property
    @abstractmethod
    def moments(self) -> dict[str, Any]:
        """What the state keeps for each leaf, and the number each starts from, in the kernel's order."""

    @abstractmethod
    def constants(self, t: torch.Tensor) -> dict[str, Number]:
        """What is the same for all elements of a leaf at its step number t = 1, 2, ..., a vector over leaves."""

    @abstractmethod
    def direction(self, g: torch.Tensor, moments: Sequence[torch.Tensor], c: Any) -> tuple[torch.Tensor, Leaves]:
        """The update and the new moments, from a gradient that has its sign and its L2 decay."""

    @property
    def decays(self) -> bool:
        return isinstance(self.weight_decay, torch.Tensor) or self.weight_decay != 0

    def resolved(self) -> Rule:
        """The rule with its tensors in float64, so that ``1 - beta**t`` loses nothing."""
        tensors: dict[str, Any] = {k: v.double() for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return dataclasses.replace(self, **tensors) if tensors else self

    def apply(self, c: Any, g: torch.Tensor, p: torch.Tensor | None, moments: Leaves) -> tuple[torch.Tensor, Leaves]:
        if self.maximize:
            g = -g
        if p is not None and not self.decoupled:
            g = g + c.weight_decay * p
        u, moments = self.direction(g, moments, c)
        if p is not None and self.decoupled:
            u = u - c.lr * c.weight_decay * p
        return u, moments


def run(
    rule: Rule,
    counts: torch.Tensor,
    grads: Leaves,
    decayed: Sequence[torch.Tensor | None],
    bases: Sequence[torch.Tensor | None],
    moments: Sequence[Leaves],
) -> list[Leaves]:
    """The step in plain torch, leaf by leaf: the updates, or new parameters where there is a base, and new moments."""
    rule = rule.resolved()
    t = counts.double()
    constants = {"lr": rule.lr, "weight_decay": rule.weight_decay, **rule.constants(t)}
    results: list[Leaves] = [[] for _ in range(1 + len(moments))]
    for i, (g, p, base, *old) in enumerate(zip(grads, decayed, bases, *moments, strict=True)):
        dtype = accumulator(g.dtype)
        c = _Constants({k: _of_leaf(v, i, g.device, dtype) for k, v in constants.items()})
        u, new = rule.apply(c, g.to(dtype), None if p is None else p.to(dtype), old)
        for column, result in zip(results, [(u if base is None else base + u).to(g.dtype), *new], strict=True):
            column.append(result)
    return results


class _Constants:
    """Numbers by name; Dynamo does not trace a SimpleNamespace."""

    def __init__(self, values: dict[str, Number]) -> None:
        for name, value in values.items():
            setattr(self, name, value)


def _of_leaf(value: Number, i: int, device: torch.device, dtype: torch.dtype) -> Number:
    if not isinstance(value, torch.Tensor):
        return value
    return (value[i] if value.ndim else value).to(device, dtype)


def root(x: torch.Tensor) -> torch.Tensor:
    """The square root, with the derivative 0 at 0.

    A second moment is 0 where every gradient so far was 0. There the step ``m / (root(v) + eps)`` is, up to constants,
    ``g / (|g| + eps)``, whose derivative at 0 is ``1 / eps``: what the denominator contributes vanishes, though the
    square root alone has no derivative.
    """
    zero = x == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())
