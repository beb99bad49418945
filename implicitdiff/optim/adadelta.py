"""Adadelta."""

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


class AdadeltaState(NamedTuple):
    """State of `adadelta` and `scale_by_adadelta`.

    Attributes:
        count: number of gradients so far of each leaf, int64, in the order of the leaves.
        nu: the mean squares of the gradients, a tree like the parameters.
        delta: the mean squares of the directions.
    """

    count: torch.Tensor  # type: ignore[assignment]  # not the method of tuples
    nu: Tree
    delta: Tree


@dataclasses.dataclass(frozen=True)
class AdadeltaRule(UpdateRule):
    """The step of Adadelta, Zeiler (2012), algorithm 1."""

    numbers: ClassVar[Sequence[str]] = ["lr", "rho", "eps", "weight_decay", "maximize"]
    kernel: ClassVar[str] = "adadelta"
    moments: ClassVar[dict[str, float]] = {"nu": 0.0, "delta": 0.0}

    rho: Setting
    eps: Setting

    def constants(self, t: torch.Tensor) -> dict[str, Number]:
        return {"keep": self.rho, "take": 1 - self.rho, "eps": self.eps}

    def direction(self, g: torch.Tensor, moments: Sequence[torch.Tensor], c: Constants) -> tuple[torch.Tensor, Leaves]:
        nu, delta = moments
        nu = c.keep * nu + c.take * g * g
        # RMS(d) of the steps before over RMS(g): d has the units of a parameter. The first `delta` is 0, so `eps` in
        # the numerator starts the motion.
        d = safe_sqrt(delta + c.eps) / safe_sqrt(nu + c.eps) * g
        return -c.lr * d, [nu, c.keep * delta + c.take * d * d]


@shows_call
def adadelta(
    lr: Hyperparameter = 1.0,
    rho: Hyperparameter = 0.9,
    eps: Hyperparameter = 1e-6,
    weight_decay: Hyperparameter = 0.0,
    *,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    """Adadelta: gradients scaled to the units of the parameters, by the root mean square of earlier directions.

    With ``g`` the gradient plus ``weight_decay * p``::

        nu <- rho nu + (1 - rho) g^2
        d  =  sqrt(delta + eps) / sqrt(nu + eps) * g
        delta <- rho delta + (1 - rho) d^2
        update = -lr d

    Hyper-parameters as in `adam`; ``eps`` stands under the roots, so ``eps_root`` is not an argument.

    Args:
        rho: decay of both mean squares.

    Returns:
        A pair of state `AdadeltaState`.

    Raises:
        ValueError: a number is out of range.

    Reference:
        Zeiler, "ADADELTA: An Adaptive Learning Rate Method", 2012, algorithm 1.

    Example:
        >>> import torch
        >>> from implicitdiff import adadelta
        >>> init, update = adadelta(eps=1e-2)
        >>> update(torch.tensor([1.0, -20.0]), init(torch.zeros(2)))[0]
        tensor([-0.3015,  0.3162])
    """
    _check.require_non_negative("adadelta", lr=lr)
    rule = _rule("adadelta", lr, rho, eps, weight_decay, maximize)
    return transformation("adadelta", rule, AdadeltaState, use_accelerated_op=use_accelerated_op)


@shows_call
def scale_by_adadelta(
    rho: Hyperparameter = 0.9, eps: Hyperparameter = 1e-6, *, use_accelerated_op: bool | None = None
) -> GradientTransformation:
    """The direction of `adadelta`, uphill and without a learning rate."""
    rule = _rule("scale_by_adadelta", UPHILL, rho, eps, 0.0, False)
    return transformation("scale_by_adadelta", rule, AdadeltaState, use_accelerated_op=use_accelerated_op)


def _rule(
    name: str,
    lr: Hyperparameter,
    rho: Hyperparameter,
    eps: Hyperparameter,
    weight_decay: Hyperparameter,
    maximize: bool,
) -> AdadeltaRule:
    _check.require_non_negative(name, eps=eps, weight_decay=weight_decay)
    _check.require_at_most_one(name, rho=rho)
    return AdadeltaRule(lr, weight_decay, maximize, rho, eps)
