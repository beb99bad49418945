"""RMSprop."""

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


class RMSPropState(NamedTuple):
    """State of `rmsprop` and `scale_by_rmsprop`.

    Attributes:
        count: number of gradients so far of each leaf, int64, in the order of the leaves.
        nu: the mean squares, a tree like the parameters.
        mean: the mean gradients; empty unless ``centered``.
        trace: the momentum; empty without.
    """

    count: torch.Tensor  # type: ignore[assignment]  # not the method of tuples
    nu: Tree
    mean: Tree = ()
    trace: Tree = ()


@dataclasses.dataclass(frozen=True)
class RMSPropRule(UpdateRule):
    """The step of RMSprop, plain (Hinton, 2012) or centered (Graves, 2013)."""

    numbers: ClassVar[Sequence[str]] = ["lr", "alpha", "eps", "eps_root", "weight_decay", "momentum", "maximize"]

    alpha: Setting
    eps: Setting
    eps_root: Setting
    momentum: Setting
    centered: bool

    @property
    def has_momentum(self) -> bool:
        return isinstance(self.momentum, torch.Tensor) or self.momentum != 0

    @property
    def kernel(self) -> str:
        return "rmsprop" + "_centered" * self.centered + "_momentum" * self.has_momentum

    @property
    def moments(self) -> dict[str, float]:
        return {"nu": 0.0} | ({"mean": 0.0} if self.centered else {}) | ({"trace": 0.0} if self.has_momentum else {})

    def constants(self, t: torch.Tensor) -> dict[str, Number]:
        return {
            "keep": self.alpha,
            "take": 1 - self.alpha,
            "eps": self.eps,
            "eps_root": self.eps_root,
            "momentum": self.momentum,
        }

    def direction(self, g: torch.Tensor, moments: Sequence[torch.Tensor], c: Constants) -> tuple[torch.Tensor, Leaves]:
        nu, *rest = moments
        nu = c.keep * nu + c.take * g * g
        news, variance = [nu], nu
        if self.centered:
            mean = rest.pop(0)
            # Graves, equations 38 and 39: nu is n, and mean is g.
            mean = mean + c.take * (g - mean)
            # A variance, E g^2 - (E g)^2. Rounding can make the difference negative.
            variance = (nu - mean * mean).clamp(min=0)
            news.append(mean)
        d = g / (safe_sqrt(variance, c.eps_root) + c.eps)
        if self.has_momentum:
            # The momentum sums directions without the learning rate, as in torch.optim: a new rate scales the whole
            # sum.
            d = c.momentum * rest.pop(0) + d
            news.append(d)
        return -c.lr * d, news


@shows_call
def rmsprop(
    lr: Hyperparameter = 1e-2,
    alpha: Hyperparameter = 0.99,
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    momentum: Hyperparameter = 0.0,
    centered: bool = False,
    *,
    maximize: bool = False,
    eps_root: Hyperparameter = 0.0,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    """RMSprop: gradients divided by the root of their mean squares.

    With ``g`` the gradient plus ``weight_decay * p``::

        nu <- alpha nu + (1 - alpha) g^2
        d  =  g / (sqrt(nu + eps_root) + eps)
        trace <- momentum trace + d
        update = -lr trace    (without momentum: -lr d)

    Hyper-parameters as in `adam`.

    Args:
        alpha: decay of the mean square.
        momentum: decay of the trace.
        centered: divide by the standard deviation: ``max(nu - mean^2, 0)`` replaces ``nu``, with ``mean`` the mean of
            the gradients with decay ``alpha``.

    Returns:
        A pair of state `RMSPropState`.

    Raises:
        ValueError: a number is out of range.

    Reference:
        Hinton, "Neural Networks for Machine Learning", lecture 6e, 2012; centered: Graves, "Generating Sequences With
        Recurrent Neural Networks", 2013, equations 38 to 45.

    Example:
        >>> import torch
        >>> from implicitdiff import rmsprop
        >>> init, update = rmsprop(lr=0.1, alpha=0.75)
        >>> update(torch.tensor([1.0, -20.0]), init(torch.zeros(2)))[0]
        tensor([-0.2000,  0.2000])
    """
    _check.require_non_negative("rmsprop", lr=lr)
    rule = _rule("rmsprop", lr, alpha, eps, weight_decay, momentum, centered, maximize, eps_root)
    return transformation("rmsprop", rule, RMSPropState, use_accelerated_op=use_accelerated_op)


@shows_call
def scale_by_rmsprop(
    alpha: Hyperparameter = 0.99,
    eps: Hyperparameter = 1e-8,
    centered: bool = False,
    *,
    eps_root: Hyperparameter = 0.0,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    """The direction of `rmsprop` without momentum, uphill and without a learning rate."""
    rule = _rule("scale_by_rmsprop", UPHILL, alpha, eps, 0.0, 0.0, centered, False, eps_root)
    return transformation("scale_by_rmsprop", rule, RMSPropState, use_accelerated_op=use_accelerated_op)


def _rule(
    name: str,
    lr: Hyperparameter,
    alpha: Hyperparameter,
    eps: Hyperparameter,
    weight_decay: Hyperparameter,
    momentum: Hyperparameter,
    centered: bool,
    maximize: bool,
    eps_root: Hyperparameter,
) -> RMSPropRule:
    _check.require_non_negative(name, eps=eps, weight_decay=weight_decay, momentum=momentum, eps_root=eps_root)
    _check.require_non_negative(name, alpha=alpha)
    return RMSPropRule(lr, weight_decay, maximize, alpha, eps, eps_root, momentum, centered)
