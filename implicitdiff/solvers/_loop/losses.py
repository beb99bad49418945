"""Robust losses ``rho(z)`` of squared residuals ``z = (r / scale)^2``, with ``rho(z) = z`` to first order at 0."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import implicitdiff._torch.trees as pytree
from implicitdiff._closures.evaluation import gradient
from implicitdiff._closures.signature import name_of
from implicitdiff.projections._point import broadcasts, holds

Elementwise = Callable[[Tensor], Tensor]


class Loss(NamedTuple):
    """A loss and its derivatives, entry by entry.

    Attributes:
        rho: ``rho(z)``.
        first: ``rho'(z)``.
        second: ``rho''(z)``.
    """

    rho: Elementwise
    first: Elementwise
    second: Elementwise


def _inside(z: Tensor, value: Elementwise, outside: float | Elementwise) -> Tensor:
    """Return ``value(z)`` for ``z <= 1`` and ``outside(z)`` beyond; nan stays nan."""
    beyond = z > 1
    # Evaluate neither branch outside of its interval: `torch.where` differentiates both branches.
    other = outside if isinstance(outside, float) else outside(torch.where(beyond, z, 1.0))
    return torch.where(beyond, other, value(torch.where(beyond, 0.0, z)))


# Formulas as in SciPy's `least_squares`, with Tukey's biweight scaled to ``rho'(0) = 1``.
_LOSSES = {
    "linear": Loss(lambda z: z, torch.ones_like, torch.zeros_like),
    # ``2 (sqrt(1 + z) - 1)``, without cancellation for small ``z``.
    "soft_l1": Loss(
        lambda z: 2 * z / (1 + torch.sqrt(1 + z)), lambda z: (1 + z) ** -0.5, lambda z: -0.5 * (1 + z) ** -1.5
    ),
    "huber": Loss(
        lambda z: _inside(z, lambda z: z, lambda z: 2 * torch.sqrt(z) - 1),
        lambda z: _inside(z, torch.ones_like, lambda z: z**-0.5),
        lambda z: _inside(z, torch.zeros_like, lambda z: -0.5 * z**-1.5),
    ),
    "cauchy": Loss(torch.log1p, lambda z: 1 / (1 + z), lambda z: -((1 + z) ** -2)),
    "arctan": Loss(torch.atan, lambda z: 1 / (1 + z**2), lambda z: -2 * z / (1 + z**2) ** 2),
    # ``(1 - (1 - z)^3) / 3``, multiplied out against cancellation for small ``z``.
    "tukey": Loss(
        lambda z: _inside(z, lambda z: z * (1 - z + z**2 / 3), 1 / 3),
        lambda z: _inside(z, lambda z: (1 - z) ** 2, 0.0),
        lambda z: _inside(z, lambda z: -2 * (1 - z), 0.0),
    ),
}


def loss_of(name: str, loss: str | Elementwise) -> Loss:
    """Return the loss of a name, or of a user's function ``rho(z)`` with derivatives by autograd."""
    if isinstance(loss, str) and loss in _LOSSES:
        return _LOSSES[loss]
    if not callable(loss):
        raise ValueError(f"{name}: loss must be one of {', '.join(_LOSSES)}, or a function rho(z), got {loss!r}")
    first = partial(_entrywise_derivative, partial(_checked, loss))
    return Loss(partial(_checked, loss), first, partial(_entrywise_derivative, first))


def _checked(loss: Elementwise, z: Tensor) -> Tensor:
    """Return ``loss(z)``; raise ValueError unless the result is a floating-point tensor of the shape of `z`."""
    value = loss(z)
    if not (isinstance(value, Tensor) and value.shape == z.shape and value.is_floating_point()):
        raise ValueError(
            f"{name_of(loss)} must return a floating-point tensor of the shape of its argument, {list(z.shape)}, got "
            f"{pytree.describe(value)}"
        )
    return value


def _entrywise_derivative(fn: Elementwise, z: Tensor) -> Tensor:
    """Return the derivative of a function that acts entry by entry."""
    slope: Tensor = gradient(lambda z: fn(z).sum(), z)
    return slope


def check_loss_scale(name: str, scale: object) -> None:
    """Raise ValueError unless the scale is a finite number > 0 or a tensor; a tensor's values are checked later."""
    good = isinstance(scale, (int, float)) and not isinstance(scale, bool) and 0 < scale < math.inf
    if not (good or isinstance(scale, Tensor)):
        raise ValueError(f"{name}: loss_scale must be a finite number > 0 or a tensor of these, got {scale!r}")


def relative_squares(residual: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(r / scale)^2``, and the scale as a tensor with the dtype of ``r``."""
    if residual.is_complex():
        raise ValueError(
            f"a loss needs real residuals, got {pytree.describe(residual)}; stack real and imaginary parts"
        )
    if isinstance(scale, Tensor):
        if not broadcasts(scale.shape, residual.shape):
            raise ValueError(
                f"loss_scale must be a number or a tensor that broadcasts to the residuals of shape "
                f"{list(residual.shape)}, got shape {list(scale.shape)}"
            )
        if not holds(scale > 0):
            raise ValueError(f"loss_scale must be positive in every entry, got {pytree.describe(scale)}")
        # Shape (1,) in the place of (): under a vmap of size 0, torch cannot divide a vector by a batched scalar.
        like = (scale.reshape(1) if residual.dim() and not scale.dim() else scale).to(residual.dtype)
    else:
        like = torch.full((), scale, dtype=residual.dtype, device=residual.device)
    squares = (residual / like).square()
    # Report an infinite residual as a failure: a robust loss would treat the residual as an outlier with a finite cost.
    return torch.where(torch.isfinite(squares), squares, torch.nan), like
