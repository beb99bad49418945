"""What methods with a trust region share: its first radius, the next one, and the shortest step of least squares."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitdiff._implicit.operators import Dims
from implicitdiff._implicit.primitive import Problem, solve_problem
from implicitdiff._torch.trees import Leaves
from implicitdiff.solvers._loop.options import check_number
from implicitdiff.solvers._loop.problem import any_lane, largest_entry, row_dot, safe_divide
from implicitdiff.solvers._steps.least_squares import damped

MIN_GAIN_RATIO = 1e-4
"""The part of the foretold gain that a step has to make, as in MINPACK."""
MAX_REFUSALS = 5
"""After how many refusals in a row of steps that seemed good a search ends."""
_MAX_NEWTON_STEPS = 100
"""How many steps of Newton's method the multiplier may take; it takes less than ten."""


def check_radius(name: str, radius: float) -> None:
    check_number(name, "radius", radius, "a finite number > 0", lambda r: 0 < r < math.inf)


def first_radius(x: Tensor, residual: Tensor, scale: Tensor) -> Tensor:
    """``|D x|``, and where that is next to nothing ``|r|``: it has the same units (in MINPACK, 1 does)."""
    size, other = length(scaling_of(scale) * x), length(residual)
    return torch.where(size > torch.finfo(x.dtype).eps * other, size, other)


def next_radius(
    radius: Tensor, step_length: Tensor, gain: Tensor, predicted: Tensor, slope: Tensor, known: Tensor
) -> Tensor:
    """After a step of the length ``went``: longer where it gained what was foretold; where it gained much less, about
    as long as the step that makes least the parabola through what is known along it. ``slope`` is the derivative
    along the step."""
    agreement = torch.where(known, safe_divide(gain, predicted), -torch.inf)
    loses = known & (gain < 0)
    below = torch.where(loses, slope + gain, -1.0)
    part = torch.where(loses, (0.5 * slope / torch.where(below < 0, below, -1.0)).clamp(0.1, 0.5), 0.5)
    shorter = torch.where(known, part, 0.1) * torch.minimum(radius, 10.0 * step_length)
    longer = torch.where(agreement >= 0.75, 2.0 * step_length, radius)
    return torch.where(agreement <= 0.25, shorter, longer)


def length(x: Tensor) -> Tensor:
    """The norms of rows with their derivatives; 0 has none."""
    size = largest_entry(x.detach())
    size = torch.where((size > 0) & torch.isfinite(size), size, 1.0)
    square = (x / size[..., None]).square().sum(dim=-1)
    return torch.where(square > 0, size * torch.sqrt(torch.where(square > 0, square, 1.0)), square)


def scaling_of(scale: Tensor) -> Tensor:
    """``D``, 1 for the unknowns on which nothing has depended so far."""
    return torch.where(scale > 0, scale, 1.0).sqrt()


def multiplier(A: Tensor, r: Tensor, radius: Tensor) -> Tensor:
    """The ``lambda > 0`` with ``|s| = radius`` for ``s = -(A'A + lambda)^-1 A'r``, where the least-squares step is
    longer than that."""
    return solve_problem(_Multiplier(), [A, r, radius])[0]


@dataclass(frozen=True)
class _Multiplier(Problem):
    """``|s(lambda, A, r)|^2 / radius^2 - 1 = 0``."""

    def residual(self, x: Leaves, theta: Leaves) -> Leaves:
        A, r, radius = theta
        return [(_damped_step(A, r, x[0]) / radius[..., None]).square().sum(dim=-1) - 1.0]

    def primal(self, theta: Leaves) -> Leaves:
        A, r, radius = (t.double() for t in theta)
        known = torch.isfinite(A).flatten(-2).all(dim=-1)
        A = torch.where(known[..., None, None], A, 0.0)
        values, vectors = torch.linalg.eigh(A.mT @ A)
        values, part = values.clamp(min=0.0), (vectors.mT @ (A.mT @ r[..., None]))[..., 0]
        damping = _newton_for_multiplier(values, part, radius)
        # A'A has lost the singular values that matter to a smaller multiplier.
        lost = damping < 1e-8 * values[..., -1]
        if any_lane(lost & known):
            U, S, _ = torch.linalg.svd(A, full_matrices=False)
            exact = _newton_for_multiplier(S.square(), S * (U.mT @ r[..., None])[..., 0], radius)
            damping = torch.where(lost, exact, damping)
        return [torch.where(known, damping, torch.nan).to(theta[0].dtype)]

    def solve(self, x: Leaves, theta: Leaves, b: Leaves, *, adjoint: bool) -> Leaves:
        A, r, radius = theta
        s = _damped_step(A, r, x[0])
        # (A'A + lambda)^-1 s, in the same way.
        moved = damped(A, torch.zeros_like(r), x[0][..., None].expand_as(s), -s / x[0].sqrt()[..., None])
        slope = -2.0 * row_dot(s / radius[..., None], moved / radius[..., None])
        return [b[0] / torch.where(slope < 0, slope, -1.0)]

    def batched(self, dims: Dims, size: int) -> tuple[Problem, Dims, int]:
        return self, (-1,) * len(dims), 0


def _damped_step(A: Tensor, r: Tensor, multiplier: Tensor) -> Tensor:
    return damped(A, r, multiplier[..., None].expand_as(A[..., 0, :]))


def _newton_for_multiplier(values: Tensor, part: Tensor, radius: Tensor) -> Tensor:
    """The ``lambda`` with ``|s| = radius``, ``s = part / (values + lambda)``: Newton's method for ``1 / radius - 1 /
    |s|``, which is convex, from where ``|s|`` is greater."""
    eps = torch.finfo(values.dtype).eps
    damping = eps**2 * values.amax(dim=-1)
    for _ in range(_MAX_NEWTON_STEPS):
        poles = values + damping[..., None]
        s = torch.where(part == 0, 0.0, part / poles)
        size = length(s)
        step = (size / radius - 1.0) / ((s / size[..., None]).square() / poles).sum(dim=-1)
        new = torch.where(step > 0, damping + step, damping)
        if not any_lane(new > damping * (1.0 + 4.0 * eps)):
            break
        damping = new
    return damping
