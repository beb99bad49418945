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

    In directions without a pattern: in a common one, the terms of the gap may cancel.
    """
    x = x.detach()
    places = torch.arange(x.shape[-1], dtype=torch.float64, device=x.device)
    signs = torch.where(torch.cos(places**2) < 0, -1.0, 1.0).to(x.dtype)
    return norm(gap(rows, x + 4 * rows.eps * signs * x) - gap(rows, x))
