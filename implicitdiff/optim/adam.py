"""Adam, and AMSGrad."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch

import implicitdiff.optim._check as _check
from implicitdiff._torch.trees import Leaves
from implicitdiff.optim._base import GradientTransformation
from implicitdiff.optim._rule import UPHILL, Hyperparameter, Number, Rule, root
from implicitdiff.optim._transformation import transformation


class AdamState(NamedTuple):
    """State of `adam`, `adamw` and `scale_by_adam`.

    Attributes:
        count: how many gradients each leaf has had, int64, in the order of the leaves.
        mu: the first moments, a tree like the parameters.
        nu: the second moments.
        nu_max: the largest second moments so far; empty without ``amsgrad``.
    """

    count: torch.Tensor  # type: ignore[assignment]  # not the method of tuples
    mu: Any
    nu: Any
    nu_max: Any = ()


@dataclasses.dataclass(frozen=True)
class Adam(Rule):
    """The step of Adam, with L2 decay or (AdamW) decoupled from the gradient."""

    numbers: ClassVar[Sequence[str]] = ["lr", "b1", "b2", "eps", "eps_root", "weight_decay", "decoupled", "maximize"]

    b1: Any
    b2: Any
    eps: Any
    eps_root: Any
    amsgrad: bool
    decoupled: bool = False

    @property
    def kernel(self) -> str:
        return "adam_amsgrad" if self.amsgrad else "adam"

    @property
    def moments(self) -> dict[str, float]:
        return {"mu": 0.0, "nu": 0.0} | ({"nu_max": 0.0} if self.amsgrad else {})

    def constants(self, t: torch.Tensor) -> dict[str, Number]:
        return {
            "step": -self.lr / (1 - self.b1**t),
            "unbias": 1 / (1 - self.b2**t),
            "take1": 1 - self.b1,
            "keep2": self.b2,
            "take2": 1 - self.b2,
            "eps": self.eps,
            "eps_root": self.eps_root,
        }

    def direction(self, g: torch.Tensor, moments: Sequence[torch.Tensor], c: Any) -> tuple[torch.Tensor, Leaves]:
        mu, nu, *nu_max = moments
        mu = mu + c.take1 * (g - mu)
        nu = c.keep2 * nu + c.take2 * g * g
        nu_max = [torch.maximum(largest, nu) for largest in nu_max]
        top = nu_max[0] if nu_max else nu
        return c.step * mu / (root(top * c.unbias, c.eps_root) + c.eps), [mu, nu, *nu_max]


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

    The parameters of every optimizer here are those of torch.optim, in their order, with their defaults. A number may
    be a scalar tensor, which is then differentiated like any other input, or a tensor that broadcasts to the leaves,
    with a number for each element; or a schedule: a function of the number of updates so far (see
    `implicitdiff.schedule`), whose value is kept in the state as by `inject_hyperparams`. And it may be a tree of all
    of these that is nested like the parameters, or a prefix of them: ``adam(lr={"body": 1e-4, "head": 1e-3})``.
    ``amsgrad``, ``maximize`` and their like hold for all leaves.

    Args:
        lr: the learning rate.
        betas: b1 and b2, how much of the means is kept.
        eps: added to the denominator.
        weight_decay: L2 penalty, which needs ``params`` in ``update``.
        amsgrad: take the largest ``v`` so far in the place of ``v``.
        maximize: climb.
        eps_root: added under the square root. With 0 the derivative of the step is right wherever it exists, but it is
            ``1 / eps`` where all gradients so far are 0; this keeps it small.
        use_accelerated_op: None computes with the compiled step where that helps, True insists on it (where it cannot
            run for want of a kernel, that is an error), False computes in plain torch. The numbers agree to rounding.
            It takes a number for each leaf, once for each kind of leaves, and none for each element.
            Under vmap, in forward mode, and for derivatives of derivatives the plain formula is used in any case.

    Returns:
        A pair of state `AdamState`. Moments of half-precision parameters are kept in float32, and computed in it.

    Raises:
        ValueError: a number is out of range; later, in ``init`` and ``update``: trees or tensors that do not match.
        TypeError: a hyper-parameter is no number; later, in ``init``: a leaf is no tensor, in ``update``: a gradient is
            sparse or of integers.
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
    _check.non_negative("adam", lr=lr)
    rule = adam_rule("adam", lr, betas, eps, weight_decay, amsgrad, maximize, eps_root)
    return transformation("adam", rule, AdamState, use_accelerated_op=use_accelerated_op)


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
) -> Adam:
    """The checked rule of all that is called Adam."""
    b1, b2 = _check.pair(name, betas)
    _check.non_negative(name, eps=eps, weight_decay=weight_decay, eps_root=eps_root)
    _check.below_one(name, **{"betas[0]": b1, "betas[1]": b2})
    return Adam(lr, weight_decay, maximize, b1, b2, eps, eps_root, amsgrad, decoupled)
