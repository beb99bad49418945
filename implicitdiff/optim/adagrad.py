"""Adagrad."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch

import implicitdiff.optim._check as _check
from implicitdiff._calls import shows_call
from implicitdiff._torch.trees import Leaves, Number, Tree
from implicitdiff.optim._base import GradientTransformation
from implicitdiff.optim._rule import UPHILL, Constants, Hyperparameter, Setting, UpdateRule, safe_sqrt
from implicitdiff.optim._transformation import transformation


class AdagradState(NamedTuple):
    """State of `adagrad` and `scale_by_adagrad`.

    Attributes:
        count: number of gradients so far of each leaf, int64, in the order of the leaves.
        total: the sums of squares, a tree like the parameters.
    """

    count: torch.Tensor  # type: ignore[assignment]  # not the method of tuples
    total: Tree


@dataclasses.dataclass(frozen=True)
class AdagradRule(UpdateRule):
    """The step of Adagrad, Duchi, Hazan and Singer (2011), with a diagonal matrix, as in torch.optim.Adagrad."""

    # `initial` is no argument of the kernel, since the state begins with this value.
    numbers: ClassVar[Sequence[str]] = ["lr", "lr_decay", "eps", "eps_root", "weight_decay", "maximize"]
    kernel: ClassVar[str] = "adagrad"
    takes_sparse: ClassVar[bool] = True

    lr_decay: Setting
    initial: Setting
    eps: Setting
    eps_root: Setting

    @property
    def moments(self) -> dict[str, Tree]:
        return {"total": self.initial}

    def constants(self, t: torch.Tensor) -> dict[str, Number]:
        # torch.optim counts from 0 in the decay of the learning rate.
        return {"step_size": self.lr / (1 + (t - 1) * self.lr_decay), "eps": self.eps, "eps_root": self.eps_root}

    def direction(self, g: torch.Tensor, moments: Sequence[torch.Tensor], c: Constants) -> tuple[torch.Tensor, Leaves]:
        # The sum has no decay: for gradients of constant size steps shrink like ``1 / sqrt(t)``.
        total = moments[0] + g * g
        return -c.step_size * g / (safe_sqrt(total, c.eps_root) + c.eps), [total]


@shows_call
def adagrad(
    lr: Hyperparameter = 1e-2,
    lr_decay: Hyperparameter = 0.0,
    weight_decay: Hyperparameter = 0.0,
    initial_accumulator_value: Number | Tree = 0.0,
    eps: Hyperparameter = 1e-10,
    *,
    maximize: bool = False,
    eps_root: Hyperparameter = 0.0,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    """Adagrad: gradients over the root of the sum of their squares.

    With ``g`` the gradient plus ``weight_decay * p``::

        total <- total + g^2
        update = -lr / (1 + (t - 1) lr_decay) * g / (sqrt(total + eps_root) + eps)

    Hyper-parameters as in `adam`. Sparse gradients (COO) are converted to dense ones.

    Args:
        lr_decay: decay of the learning rate with the step number t, see above.
        initial_accumulator_value: initial value of ``total``.

    Returns:
        A pair of state `AdagradState`.

    Raises:
        ValueError: a number is out of range.

    Reference:
        Duchi, Hazan and Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization", 2011.

    Example:
        >>> import torch
        >>> from implicitdiff import adagrad
        >>> init, update = adagrad(lr=0.1)
        >>> updates, state = update(torch.tensor([3.0]), init(torch.zeros(1)))
        >>> update(torch.tensor([4.0]), state)[0]
        tensor([-0.0800])
    """
    _check.require_non_negative("adagrad", lr=lr)
    rule = _rule("adagrad", lr, lr_decay, weight_decay, initial_accumulator_value, eps, maximize, eps_root)
    return transformation("adagrad", rule, AdagradState, use_accelerated_op=use_accelerated_op)


@shows_call
def scale_by_adagrad(
    initial_accumulator_value: Number = 0.0,
    eps: Hyperparameter = 1e-10,
    *,
    eps_root: Hyperparameter = 0.0,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    """The direction of `adagrad`, uphill and without a learning rate."""
    rule = _rule("scale_by_adagrad", UPHILL, 0.0, 0.0, initial_accumulator_value, eps, False, eps_root)
    return transformation("scale_by_adagrad", rule, AdagradState, use_accelerated_op=use_accelerated_op)


def _rule(
    name: str,
    lr: Hyperparameter,
    lr_decay: Hyperparameter,
    weight_decay: Hyperparameter,
    initial: Number,
    eps: Hyperparameter,
    maximize: bool,
    eps_root: Hyperparameter,
) -> AdagradRule:
    _check.require_non_negative(name, lr_decay=lr_decay, weight_decay=weight_decay, eps=eps, eps_root=eps_root)
    _check.require_non_negative(name, initial_accumulator_value=initial)
    return AdagradRule(lr, weight_decay, maximize, lr_decay, initial, eps, eps_root)
