"""Stochastic gradient descent with momentum."""

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


class SGDState(NamedTuple):
    """State of `sgd` and `trace`.

    Attributes:
        count: number of gradients so far of each leaf, int64, in the order of the leaves.
        trace: the momentum, a tree like the parameters; empty without momentum.
    """

    count: torch.Tensor  # type: ignore[assignment]  # not the method of tuples
    trace: Tree = ()


@dataclasses.dataclass(frozen=True)
class SGDRule(UpdateRule):
    """The step of gradient descent, with heavy-ball or Nesterov momentum in the form of torch.optim.SGD."""

    numbers: ClassVar[Sequence[str]] = ["lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"]
    takes_sparse: ClassVar[bool] = True

    momentum: Setting
    dampening: Setting
    nesterov: bool

    @property
    def has_momentum(self) -> bool:
        return isinstance(self.momentum, torch.Tensor) or self.momentum != 0

    @property
    def kernel(self) -> str:
        return "sgd_momentum" if self.has_momentum else "sgd"

    @property
    def moments(self) -> dict[str, float]:
        return {"trace": 0.0} if self.has_momentum else {}

    def constants(self, t: torch.Tensor) -> dict[str, Number]:
        if not self.has_momentum:
            return {}
        # 0 at t = 1, then 1, as a factor instead of a branch: t is a vector over leaves, and may be traced.
        later = (t > 1).double()
        return {
            "momentum": self.momentum,
            # As in torch.optim, the first trace is the gradient, without dampening.
            "keep": self.momentum * later,
            "take": 1 - self.dampening * later,
        }

    def direction(self, g: torch.Tensor, moments: Sequence[torch.Tensor], c: Constants) -> tuple[torch.Tensor, Leaves]:
        if not moments:
            return -c.lr * g, []
        # The learning rate is outside of the sum, so a new rate scales earlier gradients too.
        trace = c.keep * moments[0] + c.take * g
        # Nesterov's method at the look-ahead point, as in torch.optim.SGD: the iterate is the point of section 2.1 of
        # Sutskever et al. plus momentum times trace.
        return -c.lr * (g + c.momentum * trace if self.nesterov else trace), [trace]


@shows_call
def sgd(
    lr: Hyperparameter = 1e-3,
    momentum: Hyperparameter = 0.0,
    dampening: Hyperparameter = 0.0,
    weight_decay: Hyperparameter = 0.0,
    nesterov: bool = False,
    *,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    """Gradient descent, with optional momentum.

    With ``g`` the gradient plus ``weight_decay * p``::

        trace <- momentum * trace + (1 - dampening) * g    (the first time: g)
        update = -lr * trace, or with nesterov, -lr * (g + momentum * trace)

    Hyper-parameters as in `adam`. Sparse gradients (COO) are converted to dense ones, so momentum and decay act on
    every entry.

    Args:
        momentum: decay of the trace. With 0 the state has no trace.
        dampening: share of the gradient that does not enter the trace.
        nesterov: step along ``g + momentum * trace``; needs momentum and no dampening.

    Returns:
        A pair of state `SGDState`.

    Raises:
        ValueError: a number is out of range, or ``nesterov`` without momentum or with dampening.

    Reference:
        Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013; the learning rate
        stands outside of the trace, as in torch.optim.SGD.

    Example:
        >>> import torch
        >>> from implicitdiff import sgd
        >>> init, update = sgd(lr=0.1, momentum=0.9)
        >>> state, g = init(torch.zeros(2)), torch.tensor([1.0, 2.0])
        >>> updates, state = update(g, state)
        >>> update(g, state)[0]
        tensor([-0.1900, -0.3800])
    """
    _check.require_non_negative("sgd", lr=lr)
    rule = _rule("sgd", lr, momentum, dampening, weight_decay, nesterov, maximize)
    return transformation("sgd", rule, SGDState, use_accelerated_op=use_accelerated_op)


@shows_call
def trace(
    momentum: Hyperparameter = 0.9,
    dampening: Hyperparameter = 0.0,
    nesterov: bool = False,
    *,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    """The direction of `sgd` with momentum, uphill and without a learning rate: a decaying sum of gradients."""
    rule = _rule("trace", UPHILL, momentum, dampening, 0.0, nesterov, False)
    return transformation("trace", rule, SGDState, use_accelerated_op=use_accelerated_op)


def _rule(
    name: str,
    lr: Hyperparameter,
    momentum: Hyperparameter,
    dampening: Hyperparameter,
    weight_decay: Hyperparameter,
    nesterov: bool,
    maximize: bool,
) -> SGDRule:
    _check.require_non_negative(name, momentum=momentum, weight_decay=weight_decay)
    _check.require_finite(name, dampening=dampening)
    rule = SGDRule(lr, weight_decay, maximize, momentum, dampening, nesterov)
    # A tensor or a schedule is accepted: its values are not known here.
    damped = isinstance(dampening, (int, float)) and dampening != 0
    if nesterov and (damped or not rule.has_momentum):
        raise ValueError(f"{name}: nesterov needs a momentum and no dampening, got {momentum!r} and {dampening!r}")
    return rule
