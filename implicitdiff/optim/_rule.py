"""An optimizer's step on one leaf, and what makes a transformation of trees out of it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from implicitdiff._torch.trees import Leaves
from implicitdiff.optim._columns import accumulator

Number = float | torch.Tensor
# A number, a tensor that broadcasts to a leaf, a schedule, or a tree of these: `Any` stands for trees.
Hyperparameter = Number | Callable[[torch.Tensor], Number] | Any

# The learning rate of a transformation that leaves the sign and the scale of its direction to others.
UPHILL = -1.0


@dataclasses.dataclass(frozen=True)
class Rule(ABC):
    """The step of an optimizer on one leaf, as equations over real tensors; its fields are the hyper-parameters.

    The compiled kernels compute the same: `kernel` is what they are called there, and `numbers` the fields that they
    take, in their order.

    Attributes:
        takes_sparse: whether torch.optim has it for sparse gradients: where they are zero nothing moves but momentum.
        lr: the learning rate.
        weight_decay: adds ``weight_decay * p`` to the gradient, or ``-lr * weight_decay * p`` to the update if
            `decoupled`.
        maximize: climb.
    """

    numbers: ClassVar[Sequence[str]]
    takes_sparse: ClassVar[bool] = False
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

    @property
    def is_elementwise(self) -> bool:
        """Whether a hyper-parameter has a number for each element of a leaf."""
        return any(isinstance(v, torch.Tensor) and v.ndim > 0 for v in vars(self).values())

    def with_tensors(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> Rule:
        """The rule with a function of its tensors in their places."""
        tensors: dict[str, Any] = {k: fn(v) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
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
    """The step in plain torch, leaf by leaf: the updates, or new parameters where there is a base, and new moments.

    The leaves have one device and one dtype.
    """
    results: list[Leaves] = [[] for _ in range(1 + len(moments))]
    if not grads:
        return results
    stored = grads[0].dtype
    dtype = accumulator(stored)
    # In float64, so that `1 - beta**t` loses nothing.
    constants = _constants(rule.with_tensors(lambda v: v.double()), counts.double(), grads[0].device, dtype)
    for c, g, p, base, *old in zip(constants, grads, decayed, bases, *moments, strict=True):
        u, new = rule.apply(c, _cast(g, dtype), None if p is None else _cast(p, dtype), old)
        for column, result in zip(results, [_cast(u if base is None else base + u, stored), *new], strict=True):
            column.append(result)
    return results


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


class _Constants:
    """Numbers by name; Dynamo does not trace a SimpleNamespace."""

    def __init__(self, values: dict[str, Number]) -> None:
        for name, value in values.items():
            setattr(self, name, value)


def _constants(rule: Rule, t: torch.Tensor, device: torch.device, dtype: torch.dtype) -> list[_Constants]:
    """The constants of each leaf: scalars, or tensors that broadcast to it where a hyper-parameter is one."""
    if rule.is_elementwise:
        rule = rule.with_tensors(lambda v: v.to(device))
        return [_Constants(_named(rule, now, device, dtype)) for now in t.to(device).unbind()]
    shared = _named(rule, t, device, dtype)
    columns = {k: v.unbind() for k, v in shared.items() if isinstance(v, torch.Tensor) and v.ndim}
    if not columns:
        return [_Constants(shared)] * t.shape[0]
    return [_Constants({**shared, **dict(zip(columns, of, strict=True))}) for of in zip(*columns.values(), strict=True)]


def _named(rule: Rule, t: torch.Tensor, device: torch.device, dtype: torch.dtype) -> dict[str, Number]:
    values = {"lr": rule.lr, "weight_decay": rule.weight_decay, **rule.constants(t)}
    return {k: v.to(device, dtype) if isinstance(v, torch.Tensor) else v for k, v in values.items()}


def root(x: torch.Tensor, shift: Number = 0.0) -> torch.Tensor:
    """The square root of ``x + shift``, with the derivative 0 at 0.

    A second moment is 0 where every gradient so far was 0. There the step ``m / (root(v) + eps)`` is, up to constants,
    ``g / (|g| + eps)``, whose derivative at 0 is ``1 / eps``: what the denominator contributes vanishes, though the
    square root alone has no derivative.
    """
    if isinstance(shift, torch.Tensor) or shift != 0:
        x = x + shift
    zero = x.logical_not()
    return x.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)
