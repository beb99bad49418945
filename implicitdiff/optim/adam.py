"""Adam, and AMSGrad."""

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


class AdamState(NamedTuple):
    """State of `adam`, `adamw` and `scale_by_adam`.

    Attributes:
        count: number of gradients so far of each leaf, int64, in the order of the leaves.
        mu: the first moments, a tree like the parameters.
        nu: the second moments.
        nu_max: the largest second moments so far; empty without ``amsgrad``.
    """

    count: torch.Tensor  # type: ignore[assignment]  # not the method of tuples
    mu: Tree
    nu: Tree
    nu_max: Tree = ()


@dataclasses.dataclass(frozen=True)
class AdamRule(UpdateRule):
    """The step of Adam, Kingma and Ba (2015), algorithm 1, with weight decay as L2 penalty or decoupled (AdamW)."""

    numbers: ClassVar[Sequence[str]] = ["lr", "b1", "b2", "eps", "eps_root", "weight_decay", "decoupled", "maximize"]

    b1: Setting
    b2: Setting
    eps: Setting
    eps_root: Setting
    amsgrad: bool
    decoupled: bool = False

    @property
    def kernel(self) -> str:
        return "adam_amsgrad" if self.amsgrad else "adam"

    @property
    def moments(self) -> dict[str, float]:
        return {"mu": 0.0, "nu": 0.0} | ({"nu_max": 0.0} if self.amsgrad else {})

    def constants(self, t: torch.Tensor) -> dict[str, Number]:
        # A mean that starts at 0 has weights of sum 1 - b^t after t steps; both corrections divide by this sum.
        return {
            # For a constant gradient ``g``: ``mu = (1 - b1^t) g`` and ``nu = (1 - b2^t) g^2`` (Kingma and Ba, section
            # 3).
            "step": -self.lr / (1 - self.b1**t),
            "unbias": 1 / (1 - self.b2**t),
            "take1": 1 - self.b1,
            "keep2": self.b2,
            "take2": 1 - self.b2,
            "eps": self.eps,
            "eps_root": self.eps_root,
        }

    def direction(self, g: torch.Tensor, moments: Sequence[torch.Tensor], c: Constants) -> tuple[torch.Tensor, Leaves]:
        # Names in the paper: mu is m, nu is v, take1 and take2 are 1 - beta1 and 1 - beta2.
        mu, nu, *nu_max = moments
        # b1 mu + (1 - b1) g in the form of `torch.lerp`, as in torch.optim, for equal rounding.
        mu = mu + c.take1 * (g - mu)
        nu = c.keep2 * nu + c.take2 * g * g
        nu_max = [torch.maximum(largest, nu) for largest in nu_max]
        # The maximum is over uncorrected moments, as in torch.optim; the paper on AMSGrad has no bias correction.
        top = nu_max[0] if nu_max else nu
        return c.step * mu / (safe_sqrt(top * c.unbias, c.eps_root) + c.eps), [mu, nu, *nu_max]


@shows_call
def adam(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    eps_root: Hyperparameter = 0.0,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    """Adam: steps along the mean of the gradients over the root of the mean of their squares.

    With ``g`` the gradient plus ``weight_decay * p``, at the step number t of its leaf::

        m <- b1 m + (1 - b1) g
        v <- b2 v + (1 - b2) g^2
        update = -lr m_hat / (sqrt(v_hat + eps_root) + eps),    m_hat = m / (1 - b1^t),  v_hat = v / (1 - b2^t)

    Every optimizer here has the arguments of torch.optim, in equal order, with equal defaults. A hyper-parameter is a
    number; a scalar tensor, differentiated like any other input; a tensor that broadcasts to the leaves, with a number
    for each element; a schedule, a function of the number of updates so far (see `implicitdiff.schedule`), whose value
    the state holds as by `inject_hyperparams`; or a tree of all of these, nested like the parameters or a prefix of
    them: ``adam(lr={"body": 1e-4, "head": 1e-3})``. Flags such as ``amsgrad`` and ``maximize`` hold for all leaves.

    Args:
        lr: the learning rate.
        betas: b1 and b2, the decays of the means of gradients and of squares.
        eps: added to the denominator.
        weight_decay: L2 penalty, which needs ``params`` in ``update``.
        amsgrad: divide by the largest ``v`` so far.
        maximize: ascend, by negated gradients.
        eps_root: added under the square root. With 0 the derivative of the step is right wherever it exists, but is
            ``1 / eps`` where all gradients so far are 0; a positive number bounds it.
        use_accelerated_op: None takes the compiled step where it helps, True requires it (and raises if no kernel can
            run), False computes in plain torch. The results agree to rounding. Hyper-parameters may differ between
            leaves, at one kernel call for each group of equal ones; with a number for each element plain torch runs.
            Under vmap, in forward mode and for second derivatives plain torch runs in any case.

    Returns:
        A pair of state `AdamState`. Moments of half-precision parameters are float32, and so is their arithmetic.

    Raises:
        ValueError: a number is out of range; later, in ``init`` and ``update``: trees or tensors that do not match.
        TypeError: a hyper-parameter is not numeric; later, in ``init``: a leaf is not a tensor, in ``update``: a
            gradient is sparse or of integers.
        RuntimeError: ``use_accelerated_op=True`` without the compiled extension.

    Reference:
        Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015, algorithm 1; Reddi, Kale and Kumar, "On the
        Convergence of Adam and Beyond", 2018 (AMSGrad).

    Example:
        >>> import torch
        >>> from implicitdiff import adam, apply_updates
        >>> def trained(lr):  # the loss after three steps, as a function of the learning rate
        ...     init, update = adam(lr)
        ...     w = torch.tensor([1.0, -2.0])
        ...     state = init(w)
        ...     for _ in range(3):
        ...         updates, state = update(2 * w, state)
        ...         w = apply_updates(w, updates)
        ...     return (w**2).sum()
        >>> torch.func.grad(trained)(torch.tensor(0.1))
        tensor(-14.3107)
    """
    _check.require_non_negative("adam", lr=lr)
    rule = adam_rule("adam", lr, betas, eps, weight_decay, amsgrad, maximize, eps_root)
    return transformation("adam", rule, AdamState, use_accelerated_op=use_accelerated_op)


@shows_call
def scale_by_adam(
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    amsgrad: bool = False,
    *,
    eps_root: Hyperparameter = 0.0,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    """The direction of `adam`, uphill and without a learning rate: ``m_hat / (sqrt(v_hat + eps_root) + eps)``."""
    rule = adam_rule("scale_by_adam", UPHILL, betas, eps, 0.0, amsgrad, False, eps_root)
    return transformation("scale_by_adam", rule, AdamState, use_accelerated_op=use_accelerated_op)


def adam_rule(
    name: str,
    lr: Hyperparameter,
    betas: tuple[Hyperparameter, Hyperparameter],
    eps: Hyperparameter,
    weight_decay: Hyperparameter,
    amsgrad: bool,
    maximize: bool,
    eps_root: Hyperparameter,
    decoupled: bool = False,
) -> AdamRule:
    """Return the rule of `adam`, `adamw` or `scale_by_adam`, with checked hyper-parameters."""
    b1, b2 = _check.require_pair(name, betas)
    _check.require_non_negative(name, eps=eps, weight_decay=weight_decay, eps_root=eps_root)
    _check.require_below_one(name, **{"betas[0]": b1, "betas[1]": b2})
    return AdamRule(lr, weight_decay, maximize, b1, b2, eps, eps_root, amsgrad, decoupled)
