"""A step of Newton's kind for methods that form no Hessian: how far their iterate may be from a minimum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicitdiff.solvers._rows import Rows, any_lane, dot, norm, safe_divide


class NewtonStep(NamedTuple):
    """A step from ``x``.

    Attributes:
        x: where it begins.
        d: about ``-H^-1 g``.
        gain: what the quadratic model promises to gain by it, relative to ``|f|`` and its rounding.
        size: ``|H x|``.
        memory: the memory of the method that tries this step next.
    """

    x: Tensor
    d: Tensor
    gain: Tensor
    size: Tensor
    memory: Any = None


def few_products(rows: Rows, x: Tensor) -> int:
    """How many products a method makes that makes none otherwise: more in float32, which determines less."""
    return min(2 * x.shape[-1], 8 if rows.eps < 1e-10 else 16)


def newton_step(
    rows: Rows, x: Tensor, memory: Any, precondition: Callable[[Tensor], Tensor], products: int
) -> NewtonStep:
    """What conjugate gradients make of ``H d = -g`` with so many products, by one evaluation.

    A gradient tells little of the directions in which an objective is flat beside others, and a quasi-Newton method
    knows the curvature of the directions it took. Preconditioned by its inverse Hessian, conjugate gradients see the
    others first. Where the curvature is negative, the step goes as far as one of the other sign would have it.
    """
    _, grad, product = rows.fn.hessian(x)
    d, r, z = torch.zeros_like(grad), grad, precondition(grad)
    p, rz = -z, dot(grad, z)
    gain = torch.zeros_like(rz)
    active = (rz > 0) & torch.isfinite(rz)
    for _ in range(products):
        image = product(p)
        curvature = dot(p, image)
        bends = active & (curvature != 0)
        a = torch.where(bends, safe_divide(rz, curvature.abs()), 0.0)
        d, r = d + a[:, None] * p, r + a[:, None] * image
        gain = gain + 0.5 * a * rz
        z = precondition(r)
        rz, before = dot(r, z), rz
        active = bends & (curvature > 0) & (rz > 0) & torch.isfinite(rz)
        if not any_lane(active):
            break
        p = safe_divide(rz, before)[:, None] * p - z
    size = norm(product(x))
    # The terms that cancel in a value are about as large as |x||H x|, and no larger than the largest value so far.
    terms = torch.minimum(norm(x) * size, memory.magnitude)
    value_size = memory.value.detach().abs() + rows.eps**0.5 * terms
    return NewtonStep(x, d, safe_divide(gain, value_size), size)
