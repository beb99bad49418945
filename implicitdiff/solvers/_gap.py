"""What a solution makes zero, as rows, and what rounding makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitdiff.solvers._rows import Rows, any_lane, norm, select

Gap = Callable[[Rows, Tensor], Tensor]
"""``gap(rows, x)``, ``(lanes, n)``."""
Away = Callable[[Rows, Tensor, Tensor], Tensor]
"""``away(rows, x, gradient)``, what a solution under constraints or with a penalty makes zero."""


def fixed_point(rows: Rows, x: Tensor) -> Tensor:
    """``f(x) - x``."""
    return rows.fn(x) - x


def root(rows: Rows, x: Tensor) -> Tensor:
    """``F(x)``."""
    return rows.fn(x)


def stationary(rows: Rows, x: Tensor) -> Tensor:
    """``grad f(x)``."""
    return rows.fn.value_and_grad(x)[1]


def least_squares(rows: Rows, x: Tensor) -> Tensor:
    """``J' r``."""
    residual, pull = rows.fn.pull(x)
    return pull(residual)


@dataclass(frozen=True)
class Constrained:
    """``away(rows, x, gradient(rows, x))``."""

    gradient: Gap
    away: Away

    def __call__(self, rows: Rows, x: Tensor) -> Tensor:
        return self.away(rows, x, self.gradient(rows, x))

    def size(self, rows: Rows, x: Tensor, gradient: Tensor) -> Tensor:
        """How much it changes where the gradient, which is given, does as `change` tells."""
        unbalanced = gradient - change(self.gradient, rows, x, gradient)
        return norm(self.away(rows, x, unbalanced) - self.away(rows, x, gradient))


def change(gap: Gap, rows: Rows, x: Tensor, value: Tensor) -> Tensor:
    """``J x`` for the Jacobian ``J`` of a gap, whose value is given: how much it changes from zero to here, if linear.

    A few digits of it, and no derivative. By a difference, as the derivative of a gradient is more than the user's
    function may have; where its domain ends before that, the other way, or not so far. The least of two: with a long
    step, a large x would come to where the function is another, and with a short one a kink makes too much of it.
    """
    x = x.detach()

    def slope(step: float) -> Tensor:
        return (gap(rows, x + step * x) - value).detach() / step

    long, far, near = (rows.eps**power for power in (1 / 3, 1 / 2, 2 / 3))
    difference = slope(far)
    for step in (-far, near, -near):
        outside = ~torch.isfinite(difference).all(dim=-1)
        if not any_lane(outside):
            break
        difference = select(outside, slope(step), difference)
    other = slope(long)
    return select(norm(other) < norm(difference), other, difference)


def size(gap: Gap, rows: Rows, x: Tensor) -> Tensor:
    """How large the terms are that cancel in a gap, as `change` tells."""
    if isinstance(gap, Constrained):
        return gap.size(rows, x, gap.gradient(rows, x))
    return norm(change(gap, rows, x, gap(rows, x)))


def rounding(gap: Gap, rows: Rows, x: Tensor, here: Tensor) -> Tensor:
    """An error that says nothing: what becomes of a gap, whose value is given, where all unknowns move by 4 units of
    their precision.

    Constraints may keep a gap small where its gradient is anything, so there the gradient is what moves.
    """
    x = x.detach()
    own = norm(_noise(gap, rows, x, here))
    if not isinstance(gap, Constrained):
        return own
    gradient = gap.gradient(rows, x).detach()
    moved = gap.away(rows, x, gradient + _noise(gap.gradient, rows, x, gradient))
    return torch.maximum(own, norm(moved - here))


def _noise(gap: Gap, rows: Rows, x: Tensor, here: Tensor) -> Tensor:
    """In directions without a pattern: in a common one, the terms of the gap may cancel. Where a longer move changes it
    by less than in proportion, there is a kink, and what a gap jumps by there is no rounding."""
    places = torch.arange(x.shape[-1], dtype=torch.float64, device=x.device)
    signs = torch.where(torch.cos(places**2) < 0, -1.0, 1.0).to(x.dtype)
    short, long = ((gap(rows, x + units * rows.eps * signs * x) - here).detach() for units in (4, 1024))
    part = norm(long) / 256 / norm(short)
    # Not so if the domain ends in between.
    return short * torch.where(part < 1, part, 1.0)[:, None]


def scale(gap: Gap, rows: Rows, x: Tensor, here: Tensor, start: Tensor, error: Tensor) -> Tensor:
    """What a small error is small against, at a point that may be a solution and after a search that began at `start`.

    That is ``|J x|``, how precisely the unknowns are determined, relative to themselves. Where it is hardly more than
    the error, the solution may be zero, and ``|J (start - x)|`` has to do; with more digits, as it may be large.

    Args:
        here: the gap at ``x``.
        error: its norm.
    """
    x, back, step = x.detach(), (start - x).detach(), rows.eps ** (1 / 2)
    size = norm(change(gap, rows, x, here))
    small = ~(size > 100 * error)
    if not any_lane(small):
        return size
    # No further than `change` goes, where that is anywhere.
    step = step * (norm(x) / norm(back)).nan_to_num(nan=1.0).clamp(min=step, max=1.0)
    way = norm(gap(rows, x + step[:, None] * back) - here) / step
    return torch.where(small, torch.fmax(size, rows.eps ** (1 / 6) * way), size)
