"""AdaMax."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch

import implicitdiff.optim._check as _check
from implicitdiff._calls import shows_call
from implicitdiff._torch.trees import Leaves, Number, Tree
from implicitdiff.optim._base import GradientTransformation
from implicitdiff.optim._rule import UPHILL, Constants, Hyperparameter, Setting, UpdateRule
from implicitdiff.optim._transformation import transformation


class AdamaxState(NamedTuple):
    """State of `adamax` and `scale_by_adamax`.

    Attributes:
        count: number of gradients so far of each leaf, int64, in the order of the leaves.
        mu: the first moments, a tree like the parameters.
        nu: the largest absolute gradients, with decay.
    """

    count: torch.Tensor  # type: ignore[assignment]  # not the method of tuples
    mu: Tree
    nu: Tree


@dataclasses.dataclass(frozen=True)
class AdamaxRule(UpdateRule):
    """The step of AdaMax, Kingma and Ba (2015), algorithm 2."""

    numbers: ClassVar[Sequence[str]] = ["lr", "b1", "b2", "eps", "weight_decay", "maximize"]
    kernel: ClassVar[str] = "adamax"
    moments: ClassVar[dict[str, float]] = {"mu": 0.0, "nu": 0.0}

    b1: Setting
    b2: Setting
    eps: Setting

    def constants(self, t: torch.Tensor) -> dict[str, Number]:
        # The infinity norm starts at its first value, so only the mean needs a correction.
        return {"step_size": self.lr / (1 - self.b1**t), "take": 1 - self.b1, "keep": self.b2, "eps": self.eps}

    def direction(self, g: torch.Tensor, moments: Sequence[torch.Tensor], c: Constants) -> tuple[torch.Tensor, Leaves]:
        mu, nu = moments
        mu = mu + c.take * (g - mu)
        # eps inside of the maximum, as in torch.optim: nu is positive, and needs no eps in the quotient. The limit for
        # ``p`` to infinity of ``(b2^p nu^p + (1 - b2^p) |g|^p)^(1/p)`` (Kingma and Ba, section 7.1).
        nu = torch.maximum(c.keep * nu, g.abs() + c.eps)
        return -c.step_size * mu / nu, [mu, nu]


@shows_call
def adamax(
    lr: Hyperparameter = 2e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    *,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    """AdaMax: `adam` with the infinity norm.

    With ``g`` the gradient plus ``weight_decay * p``::

        mu <- b1 mu + (1 - b1) g
        nu <- max(b2 nu, |g| + eps)
        update = -lr / (1 - b1^t) * mu / nu

    Hyper-parameters as in `adam`; the step has no root, so ``eps_root`` is not an argument.

    Returns:
        A pair of state `AdamaxState`.

    Raises:
        ValueError: a number is out of range.

    Reference:
        Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015, algorithm 2.

    Example:
        >>> import torch
        >>> from implicitdiff import adamax
        >>> init, update = adamax(lr=0.1)
        >>> update(torch.tensor([1.0, -20.0]), init(torch.zeros(2)))[0]
        tensor([-0.1000,  0.1000])
    """
    _check.require_non_negative("adamax", lr=lr)
    rule = _rule("adamax", lr, betas, eps, weight_decay, maximize)
    return transformation("adamax", rule, AdamaxState, use_accelerated_op=use_accelerated_op)


@shows_call
def scale_by_adamax(
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    *,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    """The direction of `adamax`, uphill and without a learning rate."""
    rule = _rule("scale_by_adamax", UPHILL, betas, eps, 0.0, False)
    return transformation("scale_by_adamax", rule, AdamaxState, use_accelerated_op=use_accelerated_op)


def _rule(
    name: str,
    lr: Hyperparameter,
    betas: tuple[Hyperparameter, Hyperparameter],
    eps: Hyperparameter,
    weight_decay: Hyperparameter,
    maximize: bool,
) -> AdamaxRule:
    b1, b2 = _check.require_pair(name, betas)
    _check.require_non_negative(name, eps=eps, weight_decay=weight_decay)
    _check.require_below_one(name, **{"betas[0]": b1, "betas[1]": b2})
    return AdamaxRule(lr, weight_decay, maximize, b1, b2, eps)
