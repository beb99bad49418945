"""Weights of a robust loss in a least-squares problem, and its cost, from the values of the function "loss"."""

from __future__ import annotations

import torch
from torch import Tensor

from implicitdiff.solvers._loop.status import Status

_MIN_WEIGHT = 0.01
"""Smallest weight of a residual in the model, relative to the weight in the gradient."""


def flat_status(measured: Tensor, error: Tensor) -> Tensor:
    """Return `Status.DIVERGED` in lanes with a zero weight for every residual (and at least one residual), else
    `Status.RUNNING`."""
    _, first, _ = measured.detach().chunk(3, dim=-1)
    flat = (first == 0).all(dim=-1) & (first.shape[-1] > 0)
    return torch.where(flat & torch.isfinite(error), int(Status.DIVERGED), int(Status.RUNNING))


def weighted(r: Tensor, J: Tensor, measured: Tensor, robust: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the residual and the Jacobian with the weights of the loss, the terms of the cost, and the squared norms
    of the columns for `scale`."""
    if not robust:
        return r, J, 0.5 * r.square(), J.square().sum(dim=1)
    # The terms of the cost, the weights ``rho'`` of its gradient ``J'(rho' r)``, and their derivatives
    # ``d(rho' r) / dr = rho' + 2 z rho''``, each ``(lanes, m)``.
    losses, first, second = measured.chunk(3, dim=-1)
    # The rows of ``J`` get the root of the Hessian's weight ``rho' + 2 z rho''``, and ``r`` the quotient that leaves
    # ``J'r`` the gradient. Residuals of weight 0 are dropped from both. Beyond the inflection of the loss
    # ``rho' + 2 z rho''`` is negative: the bound keeps the model convex.
    square = torch.where(second > _MIN_WEIGHT * first, second, _MIN_WEIGHT * first)
    ignored = square == 0
    root = torch.where(ignored, 1.0, square).sqrt()
    squares = (first[..., None] * J.square()).sum(dim=1)
    r, J = first * r / root, torch.where(ignored, 0.0, root)[..., None] * J
    return torch.where(ignored, 0.0, r), J, losses, squares


def gain_of_losses(losses: Tensor, measured: Tensor) -> Tensor:
    """Return the decrease of the cost, summed term by term: a difference of two sums would lose a small change in the
    many constant terms."""
    return (losses - losses_of(measured)).sum(dim=-1)


def losses_of(measured: Tensor) -> Tensor:
    """Return the terms of the cost from the values of the function "loss"."""
    return measured.chunk(3, dim=-1)[0]
