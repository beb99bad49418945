"""Measures of a residual: the scale ``|J x|`` of the relative test, and the rounding floor."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from implicitdiff._torch.control import if_any
from implicitdiff.solvers._loop.equations import Composite, RowResidual
from implicitdiff.solvers._loop.problem import BatchedProblem, row_dot, row_norm, scattered_signs, select

_KNOWN = 100
"""Ratio of ``|J x|`` to the error from which ``|J x|`` is ``|J x*|`` to a hundredth."""

_LONG = 256
"""Ratio to the residual of a change that rounding does not disturb."""
_ROUNDS = 8
"""Number of rounds that search for this length, each by a factor of at most 1e4."""


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


class SolutionScale(NamedTuple):
    """The scale of the relative residual test at a possible solution ``x*``.

    Attributes:
        here: ``|J x|``.
        size: about ``|J x*|``.
        guess: ``|J (first_x - x*)|``, the distance of the initial guess, in lanes that are not `known`, else 0.
        known: True if ``|J x|`` is much more than the error, so that `size` is `here`.
    """

    here: Tensor
    size: Tensor
    guess: Tensor
    known: Tensor


def solution_scale(
    problem: BatchedProblem, x: Tensor, here: Tensor, first_x: Tensor, error: Tensor, size: Tensor | None
) -> SolutionScale:
    """Measure the scale of the residual `here` at ``x``. `size` is ``|J x|`` if already known."""
    x, back, step = x.detach(), (first_x - x).detach(), problem.eps ** (1 / 2)
    change = None
    if size is None:
        change = change_with_x(problem.residual, problem, x, here)
        size = row_norm(change)
    # Negated, so that a size of nan is not known.
    unknown = ~(size > _KNOWN * error)

    def with_distance(carry: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        size, guess = carry
        # ``F(x) = J (x - x*)`` to first order, so ``J x - F(x)`` is ``J x*``, which is 0 at a solution of zero.
        product = change_with_x(problem.residual, problem, x, here) if change is None else change
        at_solution = row_norm(product - here)
        # Limit the move to that of `change_with_x`, which stays in the domain, unless that move is negligible.
        # A move of length ``eps^(1/2) |x|``, if shorter than ``eps^(1/2) |back|``.
        ratio = (row_norm(x) / row_norm(back)).nan_to_num(nan=1.0).clamp(max=1.0)
        length = step * torch.where(ratio < problem.eps ** (1 / 4), 1.0, ratio)
        way = row_norm(problem.residual(problem, x + length[:, None] * back) - here) / length
        return torch.where(unknown, at_solution, size), torch.where(unknown, way, guess)

    return SolutionScale(size, *if_any(unknown, with_distance, (size, torch.zeros_like(error))), known=~unknown)


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


class Rounding(NamedTuple):
    """The rounding of a residual, of constants too.

    Attributes:
        size: the rounding; 0 in lanes in which it could not be told from other changes.
        most: a bound of the rounding, which includes other changes; 0 in lanes with a residual that is not linear.
        length: the length of a move that changes the residual by 256 times its size.
        everywhere: True if all second differences are of one order, as they are unless the residual has a few jumps.
    """

    size: Tensor
    most: Tensor
    length: Tensor
    everywhere: Tensor


def rounding(residual: RowResidual, problem: BatchedProblem, x: Tensor, here: Tensor) -> Rounding:
    """Measure the rounding of a small residual without the size of ``x``, by 27 evaluations.

    At a solution of zero the terms that cancel may be constants, whose rounding no small part of ``x`` shows. So the
    residual is evaluated at points on a line around ``x``, from each to the next of which it changes by about twice its
    size. Rounding shows in the second differences, which alternate: those of white noise have a correlation of -2/3
    with their neighbours. Those of a smooth function, and of kinks, do not alternate. Over a large change the residual
    has to be linear.
    """
    x, size, way = x.detach(), row_norm(here), scattered_signs(x)

    def at(length: Tensor) -> Tensor:
        return residual(problem, x + length[:, None] * way).detach()

    length = torch.where(row_norm(x) > 0, row_norm(x), problem.eps)
    for _ in range(_ROUNDS):
        length = length * (_LONG * size / row_norm(at(length) - here)).nan_to_num(posinf=1e4).clamp(1e-4, 1e4)
    up, down, far = (at(factor * length) - here for factor in (1, -1, 2))
    linear = (row_norm(up) <= 2 * _LONG * size) & (row_norm(up + down) <= 0.25 * row_norm(up))
    linear = linear & (row_norm(far - 2 * up) <= 0.25 * row_norm(up))
    # Without ``x`` itself, which may be a point unlike all others.
    values = [at((2 * i + 1) * length / _LONG) for i in range(-8, 8)]
    bends = [a - 2 * b + c for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    squares = torch.stack([row_dot(bend, bend) for bend in bends])
    products = torch.stack([row_dot(a, b) for a, b in itertools.pairwise(bends)])
    alternates = products.mean(dim=0) < -0.3 * squares.mean(dim=0)
    # The variance of a second difference is 6 times that of the values.
    everywhere = squares.amin(dim=0) > 0.01 * squares.mean(dim=0)
    most = torch.where(linear, (squares.mean(dim=0) / 6).sqrt(), 0.0)
    return Rounding(torch.where(alternates, most, 0.0), most, length, everywhere)


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
