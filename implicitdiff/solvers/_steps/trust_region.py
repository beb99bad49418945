"""Parts of the trust-region methods: radii, and the step of least squares within a region."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import implicitdiff._torch.control as _control
from implicitdiff._implicit.operators import Dims
from implicitdiff._implicit.primitive import Problem, solve_problem
from implicitdiff._torch.trees import Leaves
from implicitdiff.solvers._loop.options import check_number
from implicitdiff.solvers._loop.problem import largest_entry, row_dot, safe_divide
from implicitdiff.solvers._steps.least_squares import damped

MIN_GAIN_RATIO = 1e-4
"""Smallest ratio of actual and predicted gain of an accepted step, as in MINPACK."""
MAX_REFUSALS = 5
"""Number of consecutive refusals of steps that seemed good, after which a search ends."""
_MAX_NEWTON_STEPS = 100
"""Bound on the Newton steps for the multiplier; fewer than ten are usual."""


def check_radius(name: str, radius: float) -> None:
    """Raise ValueError unless the radius is a finite number > 0."""
    check_number(name, "radius", radius, "a finite number > 0", lambda r: 0 < r < math.inf)


def first_radius(x: Tensor, residual: Tensor, scale: Tensor) -> Tensor:
    """Return ``|D x|``, or ``|r|``, of the same units, if ``|D x|`` is negligible (MINPACK takes 1)."""
    # In the units of ``r``, as ``D`` holds derivatives of ``r``.
    size, other = length(scaling_of(scale) * x), length(residual)
    return torch.where(size > torch.finfo(x.dtype).eps * other, size, other)


def next_radius(
    radius: Tensor, step_length: Tensor, gain: Tensor, predicted: Tensor, slope: Tensor, known: Tensor
) -> Tensor:
    """Return the radius after a step.

    The radius grows if the actual gain is near the prediction. After a much smaller gain the radius becomes the length
    of the step to the minimum of the parabola through the known values along the step, as in MINPACK's lmder.

    Args:
        radius: the radius of the step.
        step_length: the length of the step in the norm of the region.
        gain: the actual gain.
        predicted: the gain predicted by the model.
        slope: the derivative of the cost along the whole step.
        known: False in lanes whose new residual is not finite.
    """
    # An infinite residual counts as the worst gain, and shrinks the region most.
    agreement = torch.where(known, safe_divide(gain, predicted), -torch.inf)
    loses = known & (gain < 0)
    below = torch.where(loses, slope + gain, -1.0)
    # The parabola with value 0 and slope at 0 and value ``-gain`` at 1 has its minimum at
    # ``slope / (2 (slope + gain))``.
    part = torch.where(loses, (0.5 * slope / torch.where(below < 0, below, -1.0)).clamp(0.1, 0.5), 0.5)
    # A much longer radius than the step would need many refusals to matter, hence the bound of 10 lengths.
    shorter = torch.where(known, part, 0.1) * torch.minimum(radius, 10.0 * step_length)
    # Thresholds 1/4 and 3/4 and the factors as in MINPACK's lmder.
    longer = torch.where(agreement >= 0.75, 2.0 * step_length, radius)
    return torch.where(agreement <= 0.25, shorter, longer)


def length(x: Tensor) -> Tensor:
    """Return the norms of rows with their derivatives; the derivative is 0 for zero rows."""
    # Divide by the largest entry first, against overflow of the squares; the scale cancels, so needs no derivative.
    size = largest_entry(x.detach())
    size = torch.where((size > 0) & torch.isfinite(size), size, 1.0)
    square = (x / size[..., None]).square().sum(dim=-1)
    # In a zero row `square` itself is the value 0, with the derivative 0; the root of 0 has the derivative infinity.
    return torch.where(square > 0, size * torch.sqrt(torch.where(square > 0, square, 1.0)), square)


def scaling_of(scale: Tensor) -> Tensor:
    """Return the diagonal of ``D`` from ``D^2``; 1 for unknowns on which no residual has depended so far."""
    return torch.where(scale > 0, scale, 1.0).sqrt()


def multiplier(A: Tensor, r: Tensor, radius: Tensor) -> Tensor:
    """Return ``lambda > 0`` with ``|s| = radius`` for ``s = -(A'A + lambda)^-1 A'r``; the least-squares step must be
    longer than `radius`."""
    return solve_problem(_Multiplier(), [A, r, radius])[0]


@dataclass(frozen=True)
class _Multiplier(Problem):
    """The secular equation ``|s(lambda, A, r)|^2 / radius^2 - 1 = 0``."""

    def residual(self, x: Leaves, theta: Leaves) -> Leaves:
        A, r, radius = theta
        # Divide before the square, against overflow.
        return [(_damped_step(A, r, x[0]) / radius[..., None]).square().sum(dim=-1) - 1.0]

    def primal(self, theta: Leaves) -> Leaves:
        A, r, radius = (t.double() for t in theta)
        # `eigh` raises for a matrix that is not finite: solve lanes of zeros instead, and return nan.
        known = torch.isfinite(A).flatten(-2).all(dim=-1)
        A = torch.where(known[..., None, None], A, 0.0)
        # ``A'A = V diag(values) V'`` and ``part = V'A'r``: ``|s|^2 = sum (part / (values + lambda))^2``.
        values, vectors = torch.linalg.eigh(A.mT @ A)
        values, part = values.clamp(min=0.0), (vectors.mT @ (A.mT @ r[..., None]))[..., 0]
        eps = torch.finfo(A.dtype).eps
        damping = _newton_for_multiplier(eps**2 * values[..., -1], partial(_by_eigenvalues, values, part), radius)
        # ``A'A`` squares the condition number: singular values below ``sqrt(eps) |A|`` are lost, and a small multiplier
        # depends on them. Repeat with factorisations of ``A``.
        lost = known & (damping < 1e-8 * values[..., -1])

        def by_factors(damping: Tensor) -> Tensor:
            # QR keeps the relative accuracy of each column, also of columns far smaller than others, which a singular
            # value decomposition loses. ``|A d + r| = |R d + t|`` with ``[R, t]`` from QR of ``[A, r]``.
            R = torch.linalg.qr(torch.cat([A, r[..., None]], dim=-1), mode="r")[1]
            squares = A.square().sum(dim=-2)
            least = eps**2 * torch.where(squares > 0, squares, torch.inf).amin(dim=-1)
            first = torch.where(lost & torch.isfinite(least), least.clamp(min=torch.finfo(A.dtype).tiny), 1.0)
            step = partial(_by_factors, R[..., :-1], R[..., -1])
            return torch.where(lost, _newton_for_multiplier(first, step, radius), damping)

        damping = _control.if_any(lost, by_factors, damping)
        return [torch.where(known, damping, torch.nan).to(theta[0].dtype)]

    def solve(self, x: Leaves, theta: Leaves, b: Leaves, *, adjoint: bool) -> Leaves:
        A, r, radius = theta
        s = _damped_step(A, r, x[0])
        moved = _damped_inverse(A, s, x[0])
        # Derivative of the residual in lambda: ``-2 s'(A'A + lambda)^-1 s / radius^2``.
        slope = -2.0 * row_dot(s / radius[..., None], moved / radius[..., None])
        return [b[0] / torch.where(slope < 0, slope, -1.0)]

    def batched(self, dims: Dims, size: int) -> tuple[Problem, Dims, int]:
        return self, (-1,) * len(dims), 0


def _damped_step(A: Tensor, r: Tensor, multiplier: Tensor) -> Tensor:
    return damped(A, r, multiplier[..., None].expand_as(A[..., 0, :]))


def _by_eigenvalues(values: Tensor, part: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``|s|`` and ``s'P^-1 s / |s|^2`` for ``s = P^-1 part``, ``P = diag(values) + lambda``."""
    poles = values + damping[..., None]
    # A zero component has no pole: ``0 / 0`` would be nan for a zero eigenvalue.
    s = torch.where(part == 0, 0.0, part / poles)
    size = length(s)
    return size, ((s / size[..., None]).square() / poles).sum(dim=-1)


def _by_factors(A: Tensor, r: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``|s|`` and ``s'P^-1 s / |s|^2`` for ``s = -P^-1 A'r``, ``P = A'A + lambda``."""
    s = _damped_step(A, r, damping)
    size = length(s)
    s = s / size[..., None]
    return size, row_dot(s, _damped_inverse(A, s, damping))


def _damped_inverse(A: Tensor, s: Tensor, damping: Tensor) -> Tensor:
    """Return ``(A'A + lambda)^-1 s`` as a least-squares solution, so that ``A'A`` is not formed."""
    # The minimum of ``|A d|^2 + lambda |d - s / lambda|^2`` satisfies ``(A'A + lambda) d = s``.
    zeros, damping = torch.zeros_like(A[..., 0]), damping[..., None]
    return damped(A, zeros, damping.expand_as(s), -s / damping.sqrt())


def _newton_for_multiplier(first: Tensor, step_at: Callable[[Tensor], tuple[Tensor, Tensor]], radius: Tensor) -> Tensor:
    """Return ``lambda`` with ``|s| = radius``, ``s`` being the step for ``lambda``.

    Newton's method for ``1 / radius - 1 / |s| = 0``, a convex function of ``lambda``, from a point with
    ``|s| > radius``, so that the iterates increase monotonically (Nocedal and Wright, 2nd ed., algorithm 4.3).

    Args:
        first: a multiplier left of the solution, next to the pole at 0.
        step_at: ``lambda -> (|s|, s'P^-1 s / |s|^2)``, ``P`` being the matrix of the equation of ``s``.
        radius: the radius.
    """

    def next_to(damping: Tensor) -> Tensor:
        # ``d|s| / dlambda = -s'P^-1 s / |s|``, so Newton's step is ``(|s| / radius - 1) |s|^2 / (s'P^-1 s)``.
        size, inverse = step_at(damping)
        step = (size / radius - 1.0) / inverse
        # From the left Newton's method never passes the root of a decreasing convex function: a step back is rounding.
        return torch.where(step > 0, damping + step, damping)

    # Monotone iterates: stop when no lane increases.
    def increases(both: tuple[Tensor, Tensor]) -> Tensor:
        return both[1] > both[0] * (1.0 + 4.0 * torch.finfo(both[0].dtype).eps)

    def again(both: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        going = increases(both)
        return torch.where(going, both[1], both[0]), torch.where(going, next_to(both[1]), both[1])

    return _control.repeat(again, (first, next_to(first)), increases, _MAX_NEWTON_STEPS)[0]
