"""A step of Newton's kind for methods that make none: how far their iterate may be from a minimum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from implicitdiff.solvers._loop.problem import (
    BatchedProblem,
    VectorMap,
    any_lane,
    row_dot,
    row_norm,
    safe_divide,
    scattered_signs,
)


class NewtonStep(NamedTuple):
    """A step from ``x``.

    Attributes:
        x: where it begins.
        d: about ``-H^-1 g``.
        promises: whether the quadratic model promises a gain by it that is more than next to nothing beside the value.
        counts: whether that is also more than rounding makes of one.
        size: ``|H x|``.
        bends_down: whether a curvature is negative, and not by rounding; so there is no minimum near.
        memory: the memory of the method that tries this step next.
        units: in which the step is measured; None: those of the unknowns.
    """

    x: Tensor
    d: Tensor
    promises: Tensor
    counts: Tensor
    size: Tensor
    bends_down: Tensor
    memory: Any = None
    units: Tensor | None = None


MAX_PRODUCTS = 60
"""Bound on the Hessian products of one step that measures the distance from the solution."""

ResultT = TypeVar("ResultT")


def if_twice_differentiable(make: Callable[[], ResultT]) -> ResultT | None:
    """What takes second derivatives; None where a function has first ones alone, as a function of autograd may."""
    try:
        return make()
    except (RuntimeError, NotImplementedError):
        return None


def few_products(problem: BatchedProblem, x: Tensor) -> int:
    """How many products a method makes that makes none otherwise: more in float32, which determines less."""
    return min(2 * x.shape[-1], 8 if problem.eps < 1e-10 else 16)


def objective_newton_step(
    problem: BatchedProblem, x: Tensor, memory: Any, precondition: VectorMap, products: int
) -> NewtonStep:
    """`truncated_cg` for an objective, by one evaluation."""
    _, grad, product = problem.fn.hessian(x)
    step, gain = truncated_cg(x, grad, product, precondition, products, eps=problem.eps)
    value = memory.value.detach()
    counts = promises = gain > problem.eps**0.5 * value.abs()
    # The terms that cancel in a value are about as large as |x||H x|, and no larger than the largest value so far.
    terms = torch.minimum(row_norm(x) * step.size, memory.magnitude)
    doubtful = counts & (row_norm(step.d) > problem.eps ** (2 / 5) * row_norm(x)) & (gain <= problem.eps**0.5 * terms)
    if any_lane(doubtful):
        moved = problem.fn(x.detach() + 4 * problem.eps * scattered_signs(x) * x.detach())[:, 0].detach()
        counts = counts & ~(doubtful & (gain <= 16.0 * (moved - value).abs()))
    return step._replace(promises=promises, counts=counts)


def truncated_cg(
    x: Tensor,
    grad: Tensor,
    product: VectorMap,
    precondition: VectorMap,
    products: int,
    *,
    eps: float,
) -> tuple[NewtonStep, Tensor]:
    """What conjugate gradients make of ``H d = -g`` with so many products, and what the quadratic model promises to
    gain by it.

    A gradient tells little of the directions in which an objective is flat beside others, and a quasi-Newton method
    knows the curvature of the directions it took. Preconditioned by its inverse Hessian, conjugate gradients see the
    others first. Where the curvature is negative, the step goes as far as one of the other sign would have it.
    """
    d, r, z = torch.zeros_like(grad), grad, precondition(grad)
    p, rz = -z, row_dot(grad, z)
    gain, stiffest = torch.zeros_like(rz), torch.zeros_like(rz)
    bends_down = torch.zeros_like(rz, dtype=torch.bool)
    active = (rz > 0) & torch.isfinite(rz)
    for _ in range(products):
        image = product(p)
        curvature = row_dot(p, image)
        stiffest = torch.maximum(stiffest, safe_divide(row_norm(image), row_norm(p)))
        bends_down = bends_down | (active & (curvature < -(eps**0.5) * stiffest * row_dot(p, p)))
        bends = active & (curvature != 0)
        a = torch.where(bends, safe_divide(rz, curvature.abs()), 0.0)
        d, r = d + a[:, None] * p, r + a[:, None] * image
        gain = gain + 0.5 * a * rz
        z = precondition(r)
        rz, before = row_dot(r, z), rz
        active = bends & (curvature > 0) & (rz > 0) & torch.isfinite(rz)
        if not any_lane(active):
            break
        p = safe_divide(rz, before)[:, None] * p - z
    size = row_norm(product(x))
    return NewtonStep(x, d, gain > 0, gain > 0, size, bends_down), gain
