"""What a solution makes zero, as rows, and what rounding makes of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from implicitdiff.solvers._rows import Rows, norm

Gap = Callable[[Rows, Tensor], Tensor]
"""``gap(rows, x)``, ``(lanes, n)``."""


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


def change(gap: Gap, rows: Rows, x: Tensor, value: Tensor) -> Tensor:
    """``J x`` for the Jacobian ``J`` of a gap, whose value is given: how much it changes from zero to here, if linear.

    A few digits of it, and no derivative. By a difference, as the derivative of a gradient is more than the user's
    function may have.
    """
    x, step = x.detach(), rows.eps ** (1 / 3)
    difference: Tensor = (gap(rows, x + step * x) - value).detach() / step
    return difference


def rounding(gap: Gap, rows: Rows, x: Tensor) -> Tensor:
    """An error that says nothing: what becomes of a gap where all unknowns move by 4 units of their precision.

    In directions without a pattern: in a common one, the terms of the gap may cancel. Where a longer move changes it by
    less than in proportion, there is a kink, and what a gap jumps by there is no rounding.
    """
    x = x.detach()
    places = torch.arange(x.shape[-1], dtype=torch.float64, device=x.device)
    signs = torch.where(torch.cos(places**2) < 0, -1.0, 1.0).to(x.dtype)
    here = gap(rows, x)
    short, long = (norm(gap(rows, x + units * rows.eps * signs * x) - here) for units in (4, 1024))
    return torch.minimum(short, long / 256)


def scale(gap: Gap, rows: Rows, x: Tensor, start: Tensor, error: Tensor) -> Tensor:
    """What a small error is small against, at a point that may be a solution and after a search that began at `start`.

    That is ``|J x|``, how precisely the unknowns are determined, relative to themselves. Where it is hardly more than
    the error, the solution may be zero, and ``|J (start - x)|`` has to do; with more digits, as it may be large.
    """
    here = gap(rows, x).detach()
    x, back, step = x.detach(), (start - x).detach(), rows.eps ** (1 / 3)
    size = norm(change(gap, rows, x, here))
    # No further than `change` goes, where that is anywhere.
    step = step * (norm(x) / norm(back)).nan_to_num(nan=1.0).clamp(min=step, max=1.0)
    way = norm(gap(rows, x + step[:, None] * back) - here) / step
    return torch.where(size > 100 * error, size, torch.maximum(size, rows.eps ** (1 / 6) * way))
