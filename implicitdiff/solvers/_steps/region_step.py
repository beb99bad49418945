"""The Levenberg-Marquardt step: least squares within a trust region, and within a box."""

from __future__ import annotations

import torch
from torch import Tensor

import implicitdiff.solvers._steps.trust_region as _trust_region
from implicitdiff.solvers._loop.bounds import Limits
from implicitdiff.solvers._loop.problem import any_lane, select, vecmat
from implicitdiff.solvers._steps.least_squares import damped
from implicitdiff.solvers._steps.trust_region import length

_MAX_ROUNDS_IN_BOX = 10
"""Bound on the number of solutions of a step in a box."""


def step_in_region(J: Tensor, r: Tensor, D: Tensor, radius: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``argmin |r + J d|`` within ``|D d| <= radius``, the weights ``lambda D^2`` of the equivalent damped
    problem, and the step without the region."""
    weights = least_weights(J, D.square(), eps)
    d = whole = damped(J, r, weights)
    size = length(D * whole)
    # As in MINPACK, a step up to 10 % longer than the radius is taken whole.
    beyond = size > 1.1 * radius
    if any_lane(beyond):
        damping = _trust_region.multiplier(J / D[:, None], r, torch.where(beyond, radius, 0.5 * size))
        weights = select(beyond, damping[:, None] * D.square(), weights)
        d = select(beyond, damped(J, r, weights), d)
    return d, weights, whole


def end_in_box(limits: Limits, x: Tensor, r: Tensor, J: Tensor, g: Tensor, weights: Tensor) -> Tensor:
    """Return the end of the damped step in a box. Unknowns that would leave the box are moved to their bounds, and the
    step of the others is solved again."""
    held = limits.held(x, g)
    trial = x
    for _ in range(min(x.shape[-1], _MAX_ROUNDS_IN_BOX)):
        # The unknowns at their bounds contribute ``J (trial - x)`` to the residual of the others.
        there = vecmat(torch.where(held, trial - x, 0.0), J.mT)
        step = damped(torch.where(held[:, None], 0.0, J), r + there, weights)
        aim = torch.where(held, trial, x + step)
        trial = limits.clip(aim)
        # Each round fixes the unknowns that would leave the box; the loop ends when no unknown does.
        out = ~held & ((aim > limits.upper) | (aim < limits.lower))
        if not any_lane(out):
            break
        held = held | out
    return trial


def least_weights(J: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Return weights that make a step unique for any rank of ``J``, and negligible for a ``J`` of full rank."""
    squares = J.square().sum(dim=1)
    weights: Tensor = eps**1.5 * torch.where(squares > 0, squares, torch.where(scale > 0, scale, 1.0))
    return weights
