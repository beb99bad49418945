"""RAdam."""

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


class RAdamState(NamedTuple):
    """State of `radam` and `scale_by_radam`.

    Attributes:
        count: number of gradients so far of each leaf, int64, in the order of the leaves.
        mu: the first moments, a tree like the parameters.
        nu: the second moments.
    """

    count: torch.Tensor  # type: ignore[assignment]  # not the method of tuples
    mu: Tree
    nu: Tree


@dataclasses.dataclass(frozen=True)
class RAdamRule(UpdateRule):
    """The step of RAdam, Liu et al. (2020), algorithm 2."""

    numbers: ClassVar[Sequence[str]] = ["lr", "b1", "b2", "eps", "eps_root", "weight_decay", "decoupled", "maximize"]
    kernel: ClassVar[str] = "radam"
    moments: ClassVar[dict[str, float]] = {"mu": 0.0, "nu": 0.0}

    b1: Setting
    b2: Setting
    eps: Setting
    eps_root: Setting
    decoupled: bool

    def constants(self, t: torch.Tensor) -> dict[str, Number]:
        # `length` is the number of gradients in a simple moving average of equal centre of mass (section 4.1), and
        # `limit` its value for t to infinity.
        unbias = 1 - self.b2**t
        limit = 2 / (1 - self.b2) - 1
        length = limit - 2 * t * self.b2**t / unbias
        adapts = length > 5
        # The variance of the adaptive rate exists for more than 4 gradients; torch.optim asks for more than 5. Below,
        # the quotient may be infinite with derivative nan, so 6 stands in and `adapts` selects the other branch.
        # ``+ 0 * t`` gives the number `limit` the shape, dtype and device of ``t``.
        limit, length = torch.where(adapts, limit + 0 * t, 6.0), torch.where(adapts, length, 6.0)
        # The variance of the adaptive rate is about ``rho / (2 (rho - 2) (rho - 4))`` times a constant for an average
        # of length ``rho``. `variance` is the quotient of its values at `limit` and at `length`.
        variance = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
        return {
            "step_size": self.lr / (1 - self.b1**t),
            "take1": 1 - self.b1,
            "keep2": self.b2,
            "take2": 1 - self.b2,
            "eps": self.eps,
            "eps_root": self.eps_root,
            "adapts": adapts,
            # ``sqrt(variance) / sqrt(nu / unbias)``: the bias correction of ``nu``, moved into the numerator.
            "rectified": (variance * unbias).sqrt(),
        }

    def direction(self, g: torch.Tensor, moments: Sequence[torch.Tensor], c: Constants) -> tuple[torch.Tensor, Leaves]:
        mu, nu = moments
        mu = mu + c.take1 * (g - mu)
        nu = c.keep2 * nu + c.take2 * g * g
        # As in torch.optim `eps` is added to the root of the uncorrected ``nu``.
        adaptive = c.rectified / (safe_sqrt(nu + c.eps_root) + c.eps)
        return -c.step_size * mu * torch.where(c.adapts != 0, adaptive, 1.0), [mu, nu]


@shows_call
def radam(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    decoupled_weight_decay: bool = False,
    *,
    maximize: bool = False,
    eps_root: Hyperparameter = 0.0,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    """RAdam: `adam` with the adaptive learning rate rectified for its variance in the first steps.

    At the step number t of a leaf, with::

        n_inf = 2 / (1 - b2) - 1,    n = n_inf - 2 t b2^t / (1 - b2^t)

    and m and v the means of `adam`::

        update = -lr m_hat r sqrt(1 - b2^t) / (sqrt(v + eps_root) + eps)    if n > 5, else  -lr m_hat
        r^2 = (n - 4) (n - 2) n_inf / ((n_inf - 4) (n_inf - 2) n)

    Hyper-parameters as in `adam`.

    Args:
        decoupled_weight_decay: decay as in `adamw`.

    Returns:
        A pair of state `RAdamState`.

    Raises:
        ValueError: a number is out of range.

    Reference:
        Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", 2020, algorithm 2.

    Example:
        >>> import torch
        >>> from implicitdiff import radam
        >>> init, update = radam(lr=0.1)
        >>> update(torch.tensor([1.0, -20.0]), init(torch.zeros(2)))[0]
        tensor([-0.1000,  2.0000])
    """
    _check.require_non_negative("radam", lr=lr)
    rule = _rule("radam", lr, betas, eps, weight_decay, decoupled_weight_decay, maximize, eps_root)
    return transformation("radam", rule, RAdamState, use_accelerated_op=use_accelerated_op)


@shows_call
def scale_by_radam(
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    *,
    eps_root: Hyperparameter = 0.0,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    """The direction of `radam`, uphill and without a learning rate."""
    rule = _rule("scale_by_radam", UPHILL, betas, eps, 0.0, False, False, eps_root)
    return transformation("scale_by_radam", rule, RAdamState, use_accelerated_op=use_accelerated_op)


def _rule(
    name: str,
    lr: Hyperparameter,
    betas: tuple[Hyperparameter, Hyperparameter],
    eps: Hyperparameter,
    weight_decay: Hyperparameter,
    decoupled: bool,
    maximize: bool,
    eps_root: Hyperparameter,
) -> RAdamRule:
    b1, b2 = _check.require_pair(name, betas)
    _check.require_non_negative(name, eps=eps, weight_decay=weight_decay, eps_root=eps_root)
    _check.require_below_one(name, **{"betas[0]": b1, "betas[1]": b2})
    return RAdamRule(lr, weight_decay, maximize, b1, b2, eps, eps_root, decoupled)
