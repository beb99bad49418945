"""Measures of a residual: the scale ``|J x|`` of the relative test, and the rounding floor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from implicitdiff._torch.control import if_any
from implicitdiff.solvers._loop.equations import Composite, RowResidual
from implicitdiff.solvers._loop.problem import BatchedProblem, row_norm, scattered_signs, select


def precision(eps: float) -> float:
    """Return ``p``, the relative change of the unknowns that may explain the residual of a solution."""
    # 4e-11 is about ``eps^(2/3)`` in float64; float32 reaches 4 eps at best.
    return max(4.0 * eps, 4e-11)


def change_with_x(
    residual: RowResidual, problem: BatchedProblem, x: Tensor, here: Tensor, *, is_guess: bool = False
) -> Tensor:
    """Return ``J x`` to a few digits, ``J`` being the Jacobian of a residual with the value `here` at `x`.

    The product is a difference quotient, because the derivative of a gradient may be more than the user's function has.
    If the forward difference leaves the domain, a backward difference and shorter ones follow. A long difference is
    inaccurate for a curved residual, a short difference is too large next to a kink. So if the short difference would
    accept an initial guess as a solution, the smaller of the two decides.
    """
    x = x.detach()

    def slope(step: float) -> Tensor:
        # The move is along x itself, so the quotient is J x.
        return (residual(problem, x + step * x) - here).detach() / step

    # Lengths of the differences: ``eps^(1/2)`` balances truncation and rounding.
    long, far, near = (problem.eps**power for power in (1 / 3, 1 / 2, 2 / 3))
    difference = _inside_domain(slope, slope(far), (-far, near, -near))
    if not is_guess:
        return difference
    accepts = row_norm(here) <= precision(problem.eps) * row_norm(difference)

    def with_long(difference: Tensor) -> Tensor:
        other = slope(long)
        return select(accepts & (row_norm(other) < row_norm(difference)), other, difference)

    return if_any(accepts, with_long, difference)


def _inside_domain(slope: Callable[[float], Tensor], difference: Tensor, others: tuple[float, ...]) -> Tensor:
    """Return the difference quotient, of another length in lanes where the quotient is not finite."""
    if not others:
        return difference
    outside = ~torch.isfinite(difference).all(dim=-1)
    return if_any(
        outside, lambda d: _inside_domain(slope, select(outside, slope(others[0]), d), others[1:]), difference
    )


def composite_size(problem: BatchedProblem, x: Tensor, gradient: Tensor) -> Tensor:
    """Return the change of a `Composite` residual for a change ``H x`` of its gradient."""
    composite = problem.residual
    assert isinstance(composite, Composite)
    unbalanced = gradient - change_with_x(composite.gradient, problem, x, gradient, is_guess=True)
    return row_norm(composite.prox_residual(problem, x, unbalanced) - composite.prox_residual(problem, x, gradient))


def solution_scale(
    problem: BatchedProblem, x: Tensor, here: Tensor, first_x: Tensor, error: Tensor, size: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the scale ``|J x|`` of the relative residual test at a possible solution, and whether the scale is
    reliable.

    If ``|J x|`` is hardly more than the error, the solution may be zero. Then the scale is ``|J (first_x - x)|``, the
    distance of the initial guess, with a stricter factor ``eps^(1/6)`` because that distance may be large. `size` is
    ``|J x|`` if already known.
    """
    x, back, step = x.detach(), (first_x - x).detach(), problem.eps ** (1 / 2)
    size = row_norm(change_with_x(problem.residual, problem, x, here)) if size is None else size
    # Negated, so that a size of nan counts as small.
    small = ~(size > 100 * error)

    def with_distance(size: Tensor) -> Tensor:
        # Limit the move to that of `change_with_x`, which stays in the domain, unless that move is negligible.
        # A move of length ``eps^(1/2) |x|``, if shorter than ``eps^(1/2) |back|``.
        ratio = (row_norm(x) / row_norm(back)).nan_to_num(nan=1.0).clamp(max=1.0)
        length = step * torch.where(ratio < problem.eps ** (1 / 4), 1.0, ratio)
        way = row_norm(problem.residual(problem, x + length[:, None] * back) - here) / length
        return torch.where(small, torch.fmax(size, problem.eps ** (1 / 6) * way), size)

    return if_any(small, with_distance, size), ~small


def rounding_floor(residual: RowResidual, problem: BatchedProblem, x: Tensor, here: Tensor) -> Tensor:
    """Return the rounding floor: the change of the residual if every unknown moves by 4 units in the last place.

    Constraints may keep a residual small for any gradient, so for a `Composite` residual the change that the rounding
    of the gradient causes counts too.
    """
    x = x.detach()
    own = row_norm(_noise(residual, problem, x, here))
    if not isinstance(residual, Composite):
        return own
    gradient = residual.gradient(problem, x).detach()
    moved = residual.prox_residual(problem, x, gradient + _noise(residual.gradient, problem, x, gradient))
    return torch.maximum(own, row_norm(moved - here))


def _noise(residual: RowResidual, problem: BatchedProblem, x: Tensor, here: Tensor) -> Tensor:
    """Return the change of a residual if every unknown moves by 4 units in the last place.

    A change that grows less than linearly with the length of the move shows a kink; the jump of the residual at a kink
    is no rounding, and is scaled down.
    """
    # Irregular signs: along a uniform move the terms of a function may cancel.
    way = problem.eps * scattered_signs(x) * x
    short, long = ((residual(problem, x + units * way) - here).detach() for units in (4, 1024))
    # 1024 / 4 = 256: the ratio is 1 for a smooth residual.
    part = row_norm(long) / 256 / row_norm(short)
    # nan if the domain ends in between: then keep the short difference.
    return short * torch.where(part < 1, part, 1.0)[:, None]
