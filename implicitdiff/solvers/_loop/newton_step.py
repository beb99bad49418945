"""A Newton-type step for minimisers without one of their own, as a measure of the distance from a minimum."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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
    vecmat,
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
        hidden: the step along directions whose curvature rounding hides, for the largest curvature that it hides.
        hope: the gain of this step by the model, the least gain that the gradient allows for.
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
    hidden: Tensor
    hope: Tensor
    memory: Any = None
    units: Tensor | None = None


MAX_PRODUCTS = 60
"""Bound on the Hessian products of a step by a method that computes such steps anyway."""
RESOLVED = 16
"""Multiple of its rounding that a curvature must exceed."""
_DOUBTFUL = 1000
"""Multiple of ``eps`` of the stiffest curvature below which the rounding of a curvature is measured."""
_NULL_LENGTH = 10
"""Multiple of ``x`` from which a step along directions of unresolved curvature counts as one along a null space."""
_NOTHING = 100
"""Multiple of ``eps`` of its length that Gram-Schmidt leaves of a dependent direction."""


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
    return min(x.shape[-1], 12 if problem.eps < 1e-10 else 16)


def gradient_newton_step(problem: BatchedProblem, x: Tensor, memory: Any) -> NewtonStep:
    """Return the step for a method that follows gradients alone, and that cannot try the step."""
    largest_value = x.new_full(x.shape[:1], torch.inf)
    return objective_newton_step(problem, x, largest_value, few_products(problem, x))


def objective_newton_step(problem: BatchedProblem, x: Tensor, largest_value: Tensor, products: int) -> NewtonStep:
    """Return the step of `conjugate_directions` for an objective, at the cost of one evaluation and the products.

    `largest_value` is the largest absolute value of the objective so far, infinite if unknown.
    """
    value, grad, product = problem.fn.hessian(x)
    value = value.detach()
    step, gain = conjugate_directions(x, grad, product, products, eps=problem.eps)
    step = step._replace(bends_down=_bends_down(problem, x, step))
    # A gain below ``eps^(2/3)`` of the value is what the null space of a Hessian gives.
    counts = promises = gain > problem.eps ** (2 / 3) * value.abs()
    # The objective may be a small difference of large terms. Their size is about ``|x| |H x|``, and at most the largest
    # value seen.
    terms = torch.minimum(row_norm(x) * step.size, largest_value)
    # Spend an evaluation only if the answer matters: a long step with a gain near rounding.
    doubtful = counts & (row_norm(step.d) > problem.eps ** (2 / 5) * row_norm(x)) & (gain <= problem.eps**0.5 * terms)

    def beyond_rounding(counts: Tensor) -> Tensor:
        # Measure the rounding of the objective: the change of its value if every unknown moves by 4 units in the last
        # place.
        moved = problem.fn(x.detach() + 4 * problem.eps * scattered_signs(x) * x.detach())[:, 0].detach()
        resolved: Tensor = counts & ~(doubtful & (gain <= 2.0 * (moved - value).abs()))
        return resolved

    counts = if_any(doubtful, beyond_rounding, counts)
    return _with_hidden_step(problem, x, value, step._replace(promises=promises, counts=counts))


def _with_hidden_step(problem: BatchedProblem, x: Tensor, value: Tensor, step: NewtonStep) -> NewtonStep:
    """Return the step with its hidden part in lanes where an evaluation shows that the objective falls along it.

    Along such directions neither the curvature nor the gradient tells a flat minimum from a slope, but values do.
    """
    length, size = row_norm(step.hidden), row_norm(x)
    # Along the null space of a Hessian the step is many times as long as ``x``.
    matters = (length > problem.eps**0.5 * size) & (length < _NULL_LENGTH * size)
    doubtful = matters & (step.hope > problem.eps ** (2 / 3) * value.abs())

    def values(x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the objective, and its rounding: its change if the unknowns move by 4 units in the last place."""
        here, up, down = (problem.fn(x * (1 + 4 * k * problem.eps * scattered_signs(x)))[:, 0] for k in (0, 1, -1))
        return here.detach(), torch.maximum((up - here).abs(), (down - here).abs()).detach()

    def measured(old: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        d = step.d + step.hidden
        (_, near), (there, far) = values(x.detach()), values(x.detach() + d)
        falls = doubtful & (value - there > 4.0 * torch.maximum(torch.maximum(near, far), problem.eps * value.abs()))
        return select(falls, d, old[0]), old[1] | falls, old[2] | falls

    d, promises, counts = if_any(doubtful, measured, (step.d, step.promises, step.counts))
    return step._replace(d=d, promises=promises, counts=counts)


def _bends_down(problem: BatchedProblem, x: Tensor, step: NewtonStep) -> Tensor:
    """Return the lanes with a negative curvature beyond rounding, where `conjugate_directions` leaves a doubt.

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


def conjugate_directions(
    x: Tensor,
    grad: Tensor,
    product: VectorMap,
    products: int,
    *,
    eps: float,
    basis: Tensor | None = None,
) -> tuple[NewtonStep, Tensor]:
    """Solve ``H d = -g`` by conjugate directions; return the step and the gain that the quadratic model predicts.

    A small gradient is a poor measure of the distance along directions in which an objective is much flatter than in
    others, and a quasi-Newton method knows the curvature of its own steps only. With conjugate directions ``p_i``,
    ``p_i'H p_j = 0``, the step is the sum of ``-(p_i'g / |p_i'H p_i|) p_i``, so that it follows a negative curvature
    downhill. Gram-Schmidt makes the directions from the unit vectors if there is a product for each unknown, which
    makes them independent of units, else from the residuals ``H d + g``, as conjugate gradients do.

    Only directions whose curvature ``p'H p`` exceeds its rounding have a part in the step. For products ``J'(J p)``, as
    automatic differentiation of a sum of squares computes them, the rounding is about ``eps |p|'|H p|``. As ``J p`` is
    small along a flat direction, curvatures are resolved down to ``eps^2 |H|``. Conjugate gradients and a factorisation
    of ``H`` resolve them down to ``eps |H|``.

    Args:
        x: the start of the step.
        grad: the gradient ``g`` at `x`.
        product: ``v -> H v``.
        products: the number of products, at most that of the unknowns.
        eps: machine epsilon of the products.
        basis: other vectors instead of the unit vectors, in rows, ``(lanes, n, n)``, whose curvatures are far above
            rounding.

    Reference:
        Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems", J. Res. Natl. Bur. Stand. 49
            (1952), section 4.
    """

    def seed(found: _Directions) -> Tensor:
        if products < x.shape[-1]:
            return safe_divide(found.residual, row_norm(found.residual)[:, None])
        return found.slot if basis is None else vecmat(found.slot, basis)

    # Products of a large gradient and a large curvature overflow, so the system is solved for a gradient of length 1.
    length = row_norm(grad)
    unit = safe_divide(grad, length[:, None])

    def advance(found: _Directions) -> _Directions:
        return _with_direction(found, seed(found), product, unit, eps, measures=basis is None)

    found = repeat(advance, _no_directions(unit, products), attrgetter("active"), products)
    # One more product: ``|H x|``, the scale of the residual test, without a difference.
    size, gain = row_norm(product(x)), length * (length * found.gain)
    step, hidden, hope = length[:, None] * found.d, length[:, None] * found.hidden, length * (length * found.hope)
    good = gain > 0
    return NewtonStep(x, step, good, good, size, found.bends_down, found.down, found.below, hidden, hope), gain


class _Directions(NamedTuple):
    """Conjugate directions after some products; rows of the others are zero.

    Attributes:
        slot: 1 at the row of the next direction, else 0, ``(lanes, products)``.
        directions: the directions ``p_i``, ``(lanes, products, n)``.
        images: ``H p_i``, but ``p_i`` if the curvature is not resolved.
        curvatures: the products of rows of both, ``(lanes, products)``.
        d: the step.
        residual: ``H d + g``.
        gain: the gain that the model predicts for ``d``.
        stiffest: the largest ``|H p| / |p|`` so far.
        bends_down: True if a curvature was negative beyond rounding.
        down: the direction of negative curvature; 0 if none.
        below: the curvature along this direction.
        doubt: this curvature in units of its rounding.
        hidden: the step along directions whose curvature is not resolved.
        hope: the gain that the model predicts for `hidden`.
        active: the lanes with a gradient.
    """

    slot: Tensor
    directions: Tensor
    images: Tensor
    curvatures: Tensor
    d: Tensor
    residual: Tensor
    gain: Tensor
    stiffest: Tensor
    bends_down: Tensor
    down: Tensor
    below: Tensor
    doubt: Tensor
    hidden: Tensor
    hope: Tensor
    active: Tensor


def _with_direction(
    found: _Directions, p: Tensor, product: VectorMap, grad: Tensor, eps: float, *, measures: bool
) -> _Directions:
    """Return the directions and one more, made from `p`; `measures` the rounding of small curvatures."""
    whole = row_norm(p)
    # A second pass removes what rounding leaves of the first (Kahan: "twice is enough").
    for _ in range(2):
        p = p - vecmat(safe_divide(vecmat(p, found.images.mT), found.curvatures), found.directions)
    image = product(p)
    curvature, length = row_dot(p, image), row_norm(p)
    rounding = eps * row_dot(p.abs(), image.abs())
    stiffest = torch.maximum(found.stiffest, safe_divide(row_norm(image), length))
    if measures:
        small = curvature.abs() <= _DOUBTFUL * eps * stiffest * length * length
        rounding = if_any(small, partial(_measured, p, curvature, small, product, eps), rounding)
    # A curvature of rounding size relative to the stiffest direction is not negative.
    bends_down = found.bends_down | (found.active & (curvature < -(eps**0.5) * stiffest * length * length))
    doubt = safe_divide(curvature, rounding)
    negative = found.active & (doubt < found.doubt)
    # Of a dependent vector only rounding is left. Products may be infinite, and ``0 * inf`` is nan.
    usable = found.active & torch.isfinite(rounding) & (length > _NOTHING * eps * whole)
    resolved = usable & (curvature.abs() > RESOLVED * rounding)
    p = select(usable, p, torch.zeros_like(p))
    # An upper bound of a curvature that is not resolved.
    most, slope = curvature.abs() + RESOLVED * rounding, row_dot(p, grad)
    b = -torch.where(usable & ~resolved, safe_divide(slope, most), 0.0)
    # Orthogonal to a direction of the null space is conjugate to it.
    image = select(resolved, image, p)
    curvature = row_dot(p, image)
    a = -torch.where(resolved, safe_divide(slope, curvature.abs()), 0.0)
    return _Directions(
        slot=torch.cat([found.slot[:, -1:], found.slot[:, :-1]], dim=1),
        directions=found.directions + found.slot[:, :, None] * p[:, None],
        images=found.images + found.slot[:, :, None] * image[:, None],
        curvatures=found.curvatures + found.slot * curvature[:, None],
        d=found.d + a[:, None] * p,
        residual=found.residual + a[:, None] * image,
        # Each step lowers the model by ``-a p'g / 2``, without cancellation.
        # With ``|p'H p|`` in the model the formula holds along negative curvature as well.
        gain=found.gain - 0.5 * a * slope,
        stiffest=stiffest,
        bends_down=bends_down,
        down=select(negative, p, found.down),
        below=torch.where(negative, curvature, found.below),
        doubt=torch.where(negative, doubt, found.doubt),
        hidden=found.hidden + b[:, None] * p,
        hope=found.hope - 0.5 * b * slope,
        active=found.active,
    )


def _measured(p: Tensor, curvature: Tensor, where: Tensor, product: VectorMap, eps: float, rounding: Tensor) -> Tensor:
    """Return the rounding of the curvatures along `p`, in the flagged lanes at least their change if the entries of `p`
    move by 4 units in the last place: a product with a matrix has an error of ``eps |H|``."""
    for sign in (1, -1):
        moved = p * (1 + 4 * sign * eps * scattered_signs(p))
        change = (row_dot(moved, product(moved)) - curvature).abs()
        rounding = torch.where(where, torch.maximum(rounding, change), rounding)
    return rounding


def _no_directions(grad: Tensor, products: int) -> _Directions:
    """Return conjugate directions before the first product."""
    none, zero = torch.zeros_like(grad), torch.zeros_like(grad[:, 0])
    rows = zero[:, None].repeat(1, products)
    square = rows[:, :, None] * none[:, None]
    no, active = torch.zeros_like(zero, dtype=torch.bool), (grad != 0).any(dim=-1)
    return _Directions(
        slot=torch.cat([torch.ones_like(rows[:, :1]), rows[:, 1:]], dim=1),
        directions=square,
        images=square,
        curvatures=rows,
        d=none,
        residual=grad,
        gain=zero,
        stiffest=zero,
        bends_down=no,
        down=none,
        below=zero,
        doubt=zero,
        hidden=none,
        hope=zero,
        active=active,
    )
