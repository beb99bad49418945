"""A Newton-type step for minimisers without one of their own, as a measure of the distance from a minimum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicitdiff.solvers._loop.problem import (
    BatchedProblem,
    ResultT,
    VectorMap,
    any_lane,
    row_dot,
    row_norm,
    safe_divide,
    scattered_signs,
)
from implicitdiff.solvers._loop.state import ObjectiveMemory


class NewtonStep(NamedTuple):
    """A step from ``x``.

    Attributes:
        x: the start of the step.
        d: the step, about ``-H^-1 g``.
        promises: True if the quadratic model predicts a gain that is more than a small fraction of the objective.
        counts: True if the predicted gain also exceeds rounding of the objective.
        size: ``|H x|``.
        bends_down: True if a curvature is negative beyond rounding, so that no minimum is near.
        memory: the method's memory with this step to be tried next; None if the next iteration cannot try the step.
        units: scale of each unknown for the length of the step; None for the unknowns' own.
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
"""Bound on the Hessian products of a step by a method that computes such steps anyway."""


def if_twice_differentiable(make: Callable[[], ResultT]) -> ResultT | None:
    """Return ``make()``, or None if the user's function has first derivatives only, as an `torch.autograd.Function`
    may."""
    try:
        return make()
    except (RuntimeError, NotImplementedError):
        return None


def few_products(problem: BatchedProblem, x: Tensor) -> int:
    """Return the number of Hessian products for a method that makes no others; more in float32, whose gradients
    determine less."""
    return min(2 * x.shape[-1], 8 if problem.eps < 1e-10 else 16)


def objective_newton_step(
    problem: BatchedProblem, x: Tensor, memory: ObjectiveMemory, precondition: VectorMap, products: int
) -> NewtonStep:
    """Return the step of `truncated_cg` for an objective, at the cost of one evaluation and the products."""
    _, grad, product = problem.fn.hessian(x)
    step, gain = truncated_cg(x, grad, product, precondition, products, eps=problem.eps)
    value = memory.value.detach()
    # A gain below ``sqrt(eps)`` of the value is what the null space of a Hessian gives.
    counts = promises = gain > problem.eps**0.5 * value.abs()
    # The objective may be a small difference of large terms. Their size is about ``|x| |H x|``, and at most the largest
    # value seen.
    terms = torch.minimum(row_norm(x) * step.size, memory.magnitude)
    # Spend an evaluation only if the answer matters: a long step with a gain near rounding.
    doubtful = counts & (row_norm(step.d) > problem.eps ** (2 / 5) * row_norm(x)) & (gain <= problem.eps**0.5 * terms)
    if any_lane(doubtful):
        # Measure the rounding of the objective: the change of its value if every unknown moves by 4 units in the last
        # place.
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
    """Solve ``H d = -g`` approximately by preconditioned conjugate gradients; return the step and the gain that the
    quadratic model predicts.

    A small gradient is a poor measure of the distance along directions in which an objective is much flatter than in
    others, and a quasi-Newton method knows the curvature of its own steps only. Preconditioned by the method's inverse
    Hessian, conjugate gradients find the other directions first. Along a direction of negative curvature the step uses
    the absolute value of the curvature.

    Args:
        x: the start of the step.
        grad: the gradient ``g`` at `x`.
        product: ``v -> H v``.
        precondition: an approximation of ``v -> H^-1 v``.
        products: bound on the number of products.
        eps: machine epsilon of the objective's values.
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
        # A curvature of rounding size relative to the stiffest direction is not negative.
        bends_down = bends_down | (active & (curvature < -(eps**0.5) * stiffest * row_dot(p, p)))
        bends = active & (curvature != 0)
        a = torch.where(bends, safe_divide(rz, curvature.abs()), 0.0)
        d, r = d + a[:, None] * p, r + a[:, None] * image
        # Each CG step lowers the model by ``a r'z / 2``, without cancellation.
        gain = gain + 0.5 * a * rz
        z = precondition(r)
        rz, before = row_dot(r, z), rz
        # Stop a lane after a step along negative curvature: conjugate gradients assume a positive definite matrix.
        active = bends & (curvature > 0) & (rz > 0) & torch.isfinite(rz)
        if not any_lane(active):
            break
        p = safe_divide(rz, before)[:, None] * p - z
    # One more product: ``|H x|``, the scale of the residual test, without a difference.
    size = row_norm(product(x))
    return NewtonStep(x, d, gain > 0, gain > 0, size, bends_down), gain
