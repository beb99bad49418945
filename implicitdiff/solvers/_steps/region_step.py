"""The Levenberg-Marquardt step: least squares within a trust region, and within a box."""

from __future__ import annotations

from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

import implicitdiff.solvers._steps.trust_region as _trust_region
from implicitdiff._torch.control import if_any, repeat
from implicitdiff.solvers._loop.bounds import Limits
from implicitdiff.solvers._loop.problem import select, vecmat
from implicitdiff.solvers._steps.least_squares import damped
from implicitdiff.solvers._steps.trust_region import length

_MAX_ROUNDS_IN_BOX = 10
"""Bound on the number of solutions of a step in a box."""


def step_in_region(J: Tensor, r: Tensor, D: Tensor, radius: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``argmin |r + J d|`` within ``|D d| <= radius``, the weights ``lambda D^2`` of the equivalent damped
    problem, and the step without the region."""
    weights = least_weights(J, D.square(), eps, _least_power(J))
    whole = _damped_in_double(J, r, weights)
    size = length(D * whole)
    # As in MINPACK, a step up to 10 % longer than the radius is taken whole.
    beyond = size > 1.1 * radius

    def shorten(step: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        d, weights = step
        # A lane inside of the region gets any positive radius: no nan may reach its derivative.
        inner = torch.where(size > 0, 0.5 * size, 1.0)
        # In the variable ``D d``: ``(D^-1 J'J D^-1 + lambda) D d = -D^-1 J'r``, so the weights are ``lambda D^2``.
        damping = _trust_region.multiplier(J / D[:, None], r, torch.where(beyond, radius, inner))
        weights = select(beyond, damping[:, None] * D.square(), weights)
        return select(beyond, _damped_in_double(J, r, weights), d), weights

    d, weights = if_any(beyond, shorten, (whole, weights))
    return d, weights, whole


def end_in_box(limits: Limits, x: Tensor, r: Tensor, J: Tensor, g: Tensor, weights: Tensor) -> Tensor:
    """Return the end of the damped step in a box. Unknowns that would leave the box are moved to their bounds, and the
    step of the others is solved again."""

    def solve(end: _End) -> _End:
        trial, held, out = end
        # Held unknowns never return within a step, so the rounds are bounded by the number of unknowns.
        held = held | out
        # The unknowns at their bounds contribute ``J (trial - x)`` to the residual of the others.
        there = vecmat(torch.where(held, trial - x, 0.0), J.mT)
        step = _damped_in_double(torch.where(held[:, None], 0.0, J), r + there, weights)
        aim = torch.where(held, trial, x + step)
        return _End(limits.clip(aim), held, ~held & ((aim > limits.upper) | (aim < limits.lower)))

    rounds, held = min(x.shape[-1], _MAX_ROUNDS_IN_BOX), limits.held(x, g)
    if not rounds:
        return x
    # Each round fixes the unknowns that would leave the box; the loop ends when no unknown does.
    first = solve(_End(x, held, torch.zeros_like(held)))
    return repeat(solve, first, attrgetter("out"), rounds - 1).trial


class _End(NamedTuple):
    """The end of a step in a box.

    Attributes:
        trial: the end.
        held: the unknowns that the step does not move.
        out: the unknowns that the step has moved to their bounds.
    """

    trial: Tensor
    held: Tensor
    out: Tensor


def least_weights(J: Tensor, scale: Tensor, eps: float, power: float = 3 / 4) -> Tensor:
    """Return weights that make a step unique for any rank of ``J``, and negligible for a ``J`` of full rank."""
    squares = J.square().sum(dim=1)
    # Singular values below ``eps^power`` times the norms of the columns count as zero.
    weights: Tensor = eps ** (2 * power) * torch.where(squares > 0, squares, torch.where(scale > 0, scale, 1.0))
    return weights


def _least_power(J: Tensor) -> float:
    """Return the power of `least_weights` for a step by `_damped_in_double`."""
    # Below ``eps`` the singular values are rounding of ``J``. In float64 QR rounds too.
    return 3 / 4 if J.dtype == torch.float64 else 1.0


def _damped_in_double(J: Tensor, r: Tensor, weights: Tensor) -> Tensor:
    """Return the solution of `damped`, computed in float64: QR in float32 loses the singular values near ``eps |J|``,
    along which a valley is flat."""
    return damped(J.double(), r.double(), weights.double()).to(J.dtype)
