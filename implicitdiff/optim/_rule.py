"""The step of an optimizer on one leaf, as equations in plain torch.

`_transformation` lifts a rule to trees; `_fused` computes the same equations by compiled kernels.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch

from implicitdiff._torch.trees import Leaves, Number, Tree
from implicitdiff.optim._columns import accumulator

Hyperparameter: TypeAlias = Number | Callable[[torch.Tensor], Number] | Tree
"""A number, a tensor that broadcasts to a leaf, a schedule, or a tree of these."""
Setting: TypeAlias = Any
"""A field of a rule: a `Hyperparameter` until `transformation` resolves schedules and trees, then a `Number`."""

# Learning rate of ``scale_by_*``: `UpdateRule.direction` multiplies by -lr, so -1 gives the ascent direction.
UPHILL = -1.0


class Constants:
    """Numbers of one leaf and step as attributes: scalars, or tensors that broadcast to the leaf.

    `types.SimpleNamespace` would do, but Dynamo cannot trace it.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, values: dict[str, Number]) -> None:
        for name, value in values.items():
            setattr(self, name, value)


@dataclasses.dataclass(frozen=True)
class UpdateRule(ABC):
    """The step of an optimizer on one leaf, as equations over real tensors. The fields are the hyper-parameters.

    Attributes:
        numbers: names of the fields, in the order of the arguments of the compiled kernel.
        takes_sparse: True if torch.optim accepts sparse gradients for this optimizer. A zero entry then moves no
            parameter, except by momentum or decay, so that sparse and dense gradients agree.
        lr: the learning rate.
        weight_decay: adds ``weight_decay * p`` to the gradient, or ``-lr * weight_decay * p`` to the update if
            `decoupled`.
        maximize: negate the gradient.
    """

    numbers: ClassVar[Sequence[str]]
    takes_sparse: ClassVar[bool] = False
    decoupled = False

    lr: Setting
    weight_decay: Setting
    maximize: bool

    @property
    @abstractmethod
    def kernel(self) -> str:
        """Name of the compiled kernel."""

    @property
    @abstractmethod
    def moments(self) -> dict[str, Tree]:
        """Names of the moments that the state keeps for each leaf, with initial values, in the kernel's order."""

    @abstractmethod
    def constants(self, t: torch.Tensor) -> dict[str, Number]:
        """Return the coefficients of a step by name, at step numbers t = 1, 2, ..., a float64 vector over leaves."""

    @abstractmethod
    def direction(self, g: torch.Tensor, moments: Sequence[torch.Tensor], c: Constants) -> tuple[torch.Tensor, Leaves]:
        """Return the update and the new moments, from a gradient with sign and L2 decay applied."""

    @property
    def decays(self) -> bool:
        # The values of a tensor are not read.
        return isinstance(self.weight_decay, torch.Tensor) or self.weight_decay != 0

    @property
    def is_elementwise(self) -> bool:
        """True if a hyper-parameter is a tensor with a number for each element of a leaf."""
        return any(isinstance(v, torch.Tensor) and v.ndim > 0 for v in vars(self).values())

    def with_tensors(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> UpdateRule:
        """Return the rule with `fn` applied to hyper-parameters that are tensors."""
        tensors: dict[str, Tree] = {k: fn(v) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return dataclasses.replace(self, **tensors) if tensors else self

    def apply(
        self, c: Constants, g: torch.Tensor, p: torch.Tensor | None, moments: Leaves
    ) -> tuple[torch.Tensor, Leaves]:
        """Return the update and the new moments of a leaf. `p` is None without weight decay."""
        # The sign and the L2 penalty belong to the gradient, so moments see both.
        if self.maximize:
            g = -g
        if p is None:
            return self.direction(g, moments, c)
        # L2 penalty: the gradient of weight_decay |p|^2 / 2 enters the moments. Decoupled decay bypasses them.
        if not self.decoupled:
            return self.direction(g + c.weight_decay * p, moments, c)
        u, moments = self.direction(g, moments, c)
        return u - c.lr * c.weight_decay * p, moments


def apply_rule(
    rule: UpdateRule,
    counts: torch.Tensor,
    grads: Leaves,
    decayed: Sequence[torch.Tensor | None],
    bases: Sequence[torch.Tensor | None],
    moments: Sequence[Leaves],
) -> list[Leaves]:
    """Compute a step in plain torch, leaf by leaf, for one leaf or more of one device and dtype.

    Returns:
        Columns: the updates (``base + update`` for a leaf with a base), then the new moments.
    """
    # Half-precision leaves are computed in float32 and rounded once, at the end.
    stored = grads[0].dtype
    dtype = accumulator(stored)
    # Coefficients are float64: in float32, 1 - 0.999**t is off by about 3e-8 / (1e-3 t).
    constants = _constants(rule.with_tensors(lambda v: v.double()), counts.double(), grads[0].device, dtype)
    rows = []
    for c, g, p, base, *old in zip(constants, grads, decayed, bases, *moments, strict=True):
        u, new = rule.apply(c, _cast(g, dtype), None if p is None else _cast(p, dtype), old)
        rows.append([_cast(u if base is None else base + u, stored), *new])
    return [list(column) for column in zip(*rows, strict=True)]


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _constants(rule: UpdateRule, t: torch.Tensor, device: torch.device, dtype: torch.dtype) -> list[Constants]:
    """Return the `Constants` of each leaf."""
    # With a number for each element, coefficients cannot be vectors over leaves: one evaluation for each leaf.
    if rule.is_elementwise:
        rule = rule.with_tensors(lambda v: v.to(device))
        return [Constants(_named(rule, now, device, dtype)) for now in t.to(device).unbind()]
    # One evaluation for all leaves: the coefficients are vectors over leaves, or one number if independent of t.
    shared = _named(rule, t, device, dtype)
    columns = {k: v.unbind() for k, v in shared.items() if isinstance(v, torch.Tensor) and v.ndim}
    if not columns:
        return [Constants(shared)] * t.shape[0]
    return [Constants({**shared, **dict(zip(columns, of, strict=True))}) for of in zip(*columns.values(), strict=True)]


def _named(rule: UpdateRule, t: torch.Tensor, device: torch.device, dtype: torch.dtype) -> dict[str, Number]:
    values = {"lr": rule.lr, "weight_decay": rule.weight_decay, **rule.constants(t)}
    # Computed in float64 up to here, and rounded once.
    return {k: v.to(device, dtype) if isinstance(v, torch.Tensor) else v for k, v in values.items()}


def safe_sqrt(x: torch.Tensor, shift: Number = 0.0) -> torch.Tensor:
    """Return ``sqrt(x + shift)`` with derivative 0 at 0, where autograd would give infinity times zero, a nan.

    A second moment is 0 where all gradients so far were 0. Near this point the step ``m / (sqrt(v) + eps)`` is, up to
    constants, ``g / (|g| + eps)``, whose derivative at 0 is ``1 / eps``. The numerator alone contributes ``1 / eps``,
    so 0 is the right share of the denominator.
    """
    if isinstance(shift, torch.Tensor) or shift != 0:
        x = x + shift
    # 1 stands in for 0 before the root: a mask behind the root alone would leave the derivative infinity times zero.
    zero = x.logical_not()
    return x.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)
