"""A Newton-type step for minimisers without one of their own, as a measure of the distance from a minimum."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicitdiff._torch.control import if_any, repeat
from implicitdiff.solvers._loop.problem import (
    BatchedProblem,
    ResultT,
    VectorMap,
    row_dot,
    row_norm,
    safe_divide,
    scattered_signs,
    select,
)


class NewtonStep(NamedTuple):
    """A step from ``x``.

    Attributes:
        x: the start of the step.
        d: the step, about ``-H^-1 g``.
        promises: True if the quadratic model predicts a gain that is more than a small fraction of the objective.
        counts: True if the predicted gain also exceeds rounding of the objective.
        size: ``|H x|``.
        bends_down: True if a curvature is negative beyond rounding, so that no minimum is near.
        down: the direction of the negative curvature, rounding or not; 0 if none was found.
        curvature: the curvature ``p'H p`` along this direction.
        memory: the method's memory with this step to be tried next; None if the next iteration cannot try the step.
        units: scale of each unknown for the length of the step; None for the unknowns' own.
    """

    x: Tensor
    d: Tensor
    promises: Tensor
    counts: Tensor
    size: Tensor
    bends_down: Tensor
    down: Tensor
    curvature: Tensor
    memory: Any = None
    units: Tensor | None = None


MAX_PRODUCTS = 60
"""Bound on the Hessian products of a step by a method that computes such steps anyway."""
_SOLVED = 1e-4
"""Part of the squared preconditioned residual that a step may leave after its first products."""
_FEW_UNKNOWNS = 12
"""Bound on the number of unknowns for which a step that leaves more takes products for all directions."""


def if_twice_differentiable(make: Callable[[], ResultT]) -> ResultT | None:
    """Return ``make()``, or None if the user's function has first derivatives only, as an `torch.autograd.Function`
    may."""
    try:
        return make()
    # For a missing second derivative torch raises one or the other.
    except (RuntimeError, NotImplementedError):
        return None


def few_products(problem: BatchedProblem, x: Tensor) -> int:
    """Return the number of Hessian products for a method that makes no others; more in float32, whose gradients
    determine less."""
    return min(2 * x.shape[-1], 8 if problem.eps < 1e-10 else 16)


def gradient_newton_step(problem: BatchedProblem, x: Tensor, memory: Any) -> NewtonStep:
    """Return the step for a method that follows gradients alone, and that cannot try the step."""
    largest_value = x.new_full(x.shape[:1], torch.inf)
    return objective_newton_step(problem, x, largest_value, lambda v: v, few_products(problem, x))


def objective_newton_step(
    problem: BatchedProblem, x: Tensor, largest_value: Tensor, precondition: VectorMap, products: int
) -> NewtonStep:
    """Return the step of `truncated_cg` for an objective, at the cost of one evaluation and the products.

    `largest_value` is the largest absolute value of the objective so far, infinite if unknown.
    """
    value, grad, product = problem.fn.hessian(x)
    value = value.detach()
    step, gain = truncated_cg(x, grad, product, precondition, products, eps=problem.eps)
    step = step._replace(bends_down=_bends_down(problem, x, step))
    # A gain below ``sqrt(eps)`` of the value is what the null space of a Hessian gives.
    counts = promises = gain > problem.eps**0.5 * value.abs()
    # The objective may be a small difference of large terms. Their size is about ``|x| |H x|``, and at most the largest
    # value seen.
    terms = torch.minimum(row_norm(x) * step.size, largest_value)
    # Spend an evaluation only if the answer matters: a long step with a gain near rounding.
    doubtful = counts & (row_norm(step.d) > problem.eps ** (2 / 5) * row_norm(x)) & (gain <= problem.eps**0.5 * terms)

    def beyond_rounding(counts: Tensor) -> Tensor:
        # Measure the rounding of the objective: the change of its value if every unknown moves by 4 units in the last
        # place.
        moved = problem.fn(x.detach() + 4 * problem.eps * scattered_signs(x) * x.detach())[:, 0].detach()
        resolved: Tensor = counts & ~(doubtful & (gain <= 16.0 * (moved - value).abs()))
        return resolved

    counts = if_any(doubtful, beyond_rounding, counts)
    return step._replace(promises=promises, counts=counts)


def _bends_down(problem: BatchedProblem, x: Tensor, step: NewtonStep) -> Tensor:
    """Return the lanes with a negative curvature beyond rounding, if the bound of `truncated_cg` leaves a doubt.

    That bound is relative to the stiffest direction, so hides the curvature of an unknown in much larger units, as on a
    plateau. Rounding is measured instead: the change of the curvature if the unknowns and the direction move by 4 units
    in the last place.
    """
    doubtful = (step.curvature < 0) & ~step.bends_down

    def beyond_rounding(bends_down: Tensor) -> Tensor:
        x_moved, way = (t.detach() * (1 + 4 * problem.eps * scattered_signs(t)) for t in (x, step.down))
        moved = row_dot(way, problem.fn.hessian(x_moved)[2](way))
        return bends_down | (doubtful & (step.curvature < -16.0 * (moved - step.curvature).abs()))

    return if_any(doubtful, beyond_rounding, step.bends_down)


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
        products: the number of products; a large residual in few unknowns takes two for each.
        eps: machine epsilon of the objective's values.
    """

    def advance(cg: _Preconditioned) -> _Preconditioned:
        d, r, p, rz, gain, stiffest, bends_down, down, below, active = cg
        image = product(p)
        curvature = row_dot(p, image)
        stiffest = torch.maximum(stiffest, safe_divide(row_norm(image), row_norm(p)))
        # A curvature of rounding size relative to the stiffest direction is not negative.
        bends_down = bends_down | (active & (curvature < -(eps**0.5) * stiffest * row_dot(p, p)))
        negative = active & (curvature < 0)
        down, below = select(negative, p, down), torch.where(negative, curvature, below)
        bends = active & (curvature != 0)
        a = torch.where(bends, safe_divide(rz, curvature.abs()), 0.0)
        # ``r`` is ``H d + g``, so a preconditioned ``-r`` points downhill; `p` begins with this sign in `_at_zero`.
        d, r = d + a[:, None] * p, r + a[:, None] * image
        # Each CG step lowers the model by ``a r'z / 2``, without cancellation.
        # With ``|p'H p|`` in the model the formula holds along negative curvature as well.
        gain = gain + 0.5 * a * rz
        z = precondition(r)
        rz, before = row_dot(r, z), rz
        # Stop a lane after a step along negative curvature: conjugate gradients assume a positive definite matrix.
        active = bends & (curvature > 0) & (rz > 0) & torch.isfinite(rz)
        p = safe_divide(rz, before)[:, None] * p - z
        return _Preconditioned(d, r, p, rz, gain, stiffest, bends_down, down, below, active)

    def again(cg: _Preconditioned) -> _Preconditioned:
        # In a lane that has stopped ``p`` may be infinite, and ``0 * inf`` is nan.
        new = advance(cg)
        return new._replace(d=select(cg.active, new.d, cg.d), gain=select(cg.active, new.gain, cg.gain))

    # Products of a large gradient and a large curvature overflow, so the system is solved for a gradient of length 1.
    length = row_norm(grad)
    unit = safe_divide(grad, length[:, None])
    cg = first = _at_zero(unit, precondition(unit))
    if products:
        cg = repeat(again, advance(cg), attrgetter("active"), products - 1)
        # A large residual means that the flattest directions are missing, along which the step may be long.
        cg = cg._replace(active=cg.active & (cg.rz > _SOLVED * first.rz))
        more = 2 * x.shape[-1] - products if x.shape[-1] <= _FEW_UNKNOWNS else 0
        cg = repeat(again, cg, attrgetter("active"), more)
    # One more product: ``|H x|``, the scale of the residual test, without a difference.
    size, gain = row_norm(product(x)), length * (length * cg.gain)
    return NewtonStep(x, length[:, None] * cg.d, gain > 0, gain > 0, size, cg.bends_down, cg.down, cg.below), gain


class _Preconditioned(NamedTuple):
    """Preconditioned conjugate gradients after some products.

    Attributes:
        d: the step.
        r: the residual ``H d + g``.
        p: the next direction.
        rz: ``r'z`` with the preconditioned residual ``z``.
        gain: the gain that the model predicts for ``d``.
        stiffest: the largest ``|H p| / |p|`` so far.
        bends_down: True if a curvature was negative beyond rounding.
        down: the direction of negative curvature; 0 if none.
        below: the curvature along this direction.
        active: the lanes that have not stopped.
    """

    d: Tensor
    r: Tensor
    p: Tensor
    rz: Tensor
    gain: Tensor
    stiffest: Tensor
    bends_down: Tensor
    down: Tensor
    below: Tensor
    active: Tensor


def _at_zero(grad: Tensor, z: Tensor) -> _Preconditioned:
    """Return conjugate gradients before the first product."""
    rz = row_dot(grad, z)
    zero, no = torch.zeros_like(rz), torch.zeros_like(rz, dtype=torch.bool)
    active = (rz > 0) & torch.isfinite(rz)
    none = torch.zeros_like(grad)
    return _Preconditioned(none, grad, -z, rz, zero, zero, bends_down=no, down=none, below=zero, active=active)
