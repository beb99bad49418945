"""A line search for the strong Wolfe conditions, in all lanes at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicitdiff.solvers._loop.problem import (
    BatchedProblem,
    any_lane,
    largest_entry,
    row_dot,
    row_norm,
    safe_divide,
    select,
)
from implicitdiff.solvers._loop.status import Status

_MAX_TRIALS = 30
# Values that differ by less, in units of their precision, say nothing.
_NOISE_ULPS = 10
# How far inside a bracket a trial has to be, and how far beyond the last point it may be, as in MINPACK's dcsrch.
_BRACKET_MARGINS = (0.1, 0.9)
_EXTRAPOLATION = (1.1, 4.0)
# Where that leads nowhere, the first trial was in quite other units.
_SLOW_TRIALS, _FAR_EXTRAPOLATION = 6, 100.0


class Segment(NamedTuple):
    """A line that ends.

    Attributes:
        largest: the step to its end, ``(lanes,)``, at least the first trial.
        at: ``at(step)``, the point ``x + step d`` but for rounding; a step of zero leads to ``x``.
    """

    largest: Tensor
    at: Callable[[Tensor], Tensor]


class LinePoint(NamedTuple):
    """A point ``x + step d`` of a line.

    Attributes:
        step: ``(lanes,)``.
        x: the point.
        value: of the objective.
        slope: its derivative along the line.
        grad: its gradient.
    """

    step: Tensor
    x: Tensor
    value: Tensor
    slope: Tensor
    grad: Tensor

    def pick(self, where: Tensor, other: LinePoint) -> LinePoint:
        """The other point in the lanes where a flag is up."""
        return LinePoint(*(select(where, b, a) for a, b in zip(self, other, strict=True)))


def search(
    problem: BatchedProblem,
    x: Tensor,
    state: Any,
    direction: Tensor,
    first_step: Tensor,
    c1: float = 1e-4,
    c2: float = 0.9,
    segment: Segment | None = None,
) -> tuple[LinePoint, Tensor, Tensor]:
    """A point with ``f(x + a d) <= f(x) + c1 a g'd`` and ``|grad f(x + a d)'d| <= c2 |g'd|``.

    Nocedal and Wright's algorithms 3.5 and 3.6 in one: an interval runs from the best point so far to another one,
    which lies behind it until one beyond a minimum is known. Where values differ by no more than rounding, the first
    condition is taken to hold, as in Hager and Zhang's approximate conditions: near a minimum, slopes have twice the
    digits that values have. A lane that has made 30 trials in vain takes the best point that it has seen.

    Args:
        problem: the problem.
        x: where to start.
        state: with a `Memory` of x; lanes that are not running stay where they are. Its ``magnitude`` is the largest
            ``|f|`` so far: values that are small as differences of large terms, say at a
            minimum that is 0, are no more precise than that.
        direction: where to.
        first_step: the first trial, ``(lanes,)``.
        c1: sufficient decrease, less than ``c2``.
        c2: curvature, less than 1.
        segment: where the line ends; the second condition holds there if the objective still falls. None: nowhere.

    Returns:
        The point, the lanes in which it does not satisfy the conditions, and the status, `Status.UNBOUNDED` where
        values go down and down.

    Reference:
        Nocedal and Wright, "Numerical Optimization", 2006, section 3.5; Hager and Zhang, "A new conjugate gradient
        method with guaranteed descent and an efficient line search", SIAM J. Optim. 16 (2005), section 4.
    """
    line = _Line(problem, x, state.memory, direction, c1, c2, segment)
    active = state.status == Status.RUNNING
    # A lane that has stopped must not leave the domain: zero times the derivative there need not be zero.
    trial = line.at(torch.where(active, first_step, 0.0))
    low, flat = line.test(trial, line.start)
    if any_lane(active & ~(low & flat)):
        return _zoom(line, trial, active, state.status)
    return trial, torch.zeros_like(active), state.status


def unit_step(grad: Tensor) -> Tensor:
    """``min(1, 1 / |g|)``: how far to go down a gradient as long as nothing is known of the curvature."""
    largest = largest_entry(grad.detach())
    # The squares of tiny or huge gradients are not numbers; the derivative is that of the whole, this cancels out.
    largest = torch.where(largest > 0, largest, 1.0)
    square = (grad / largest[:, None]).square().sum(dim=-1)
    length = largest * torch.sqrt(torch.where(square > 0, square, 1.0))
    return torch.where(length > 1, 1 / length, 1.0)


def initial_fields(problem: BatchedProblem, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The error at an initial guess, and the fields of a memory that `search` asks for."""
    value, grad = problem.fn.value_and_grad(x)
    # The gradient of a value that is not a number may be finite.
    error = torch.where(torch.isfinite(value), row_norm(grad), torch.nan)
    return error, {"value": value, "grad": grad, "magnitude": value.detach().abs()}


def fields_at(memory: Any, point: LinePoint) -> dict[str, Tensor]:
    """These fields at a new point."""
    magnitude = torch.maximum(memory.magnitude, point.value.detach().abs())
    return {"value": point.value, "grad": point.grad, "magnitude": magnitude}


def value_fell(problem: BatchedProblem, memory: Any, point: LinePoint) -> Tensor:
    """Whether the value is lower at a new point, by more than its rounding."""
    lower: Tensor = point.value.detach() < memory.value.detach() - _NOISE_ULPS * problem.eps * memory.magnitude
    return lower


class _Line:
    """The objective along a line, and the conditions."""

    def __init__(
        self,
        problem: BatchedProblem,
        x: Tensor,
        memory: Any,
        direction: Tensor,
        c1: float,
        c2: float,
        segment: Segment | None,
    ) -> None:
        value = memory.value
        self.rows, self.direction, self.c1, self.c2, self.segment = problem, direction, c1, c2, segment
        self.start = LinePoint(torch.zeros_like(value), x, value, row_dot(memory.grad, direction), memory.grad)
        self.noise = _NOISE_ULPS * problem.eps * memory.magnitude

    def at(self, step: Tensor) -> LinePoint:
        x = self.start.x + step[:, None] * self.direction if self.segment is None else self.segment.at(step)
        value, grad = self.rows.fn.value_and_grad(x)
        return LinePoint(step, x, value, row_dot(grad, self.direction), grad)

    def finite(self, trial: LinePoint) -> LinePoint:
        """The trial with infinity as the value of what is not finite."""
        finite = torch.isfinite(trial.value) & torch.isfinite(trial.slope)
        step = trial.step
        if not self.rows.plain and any_lane(~finite):
            # No derivative may pass through such a point, not even one that is multiplied by zero.
            trial = self.at(torch.where(finite, step, 0.0))
        return trial._replace(step=step, value=torch.where(finite, trial.value, torch.inf))

    def test(self, trial: LinePoint, best: LinePoint) -> tuple[Tensor, Tensor]:
        """Whether the value is low enough, and the slope flat enough."""
        change = trial.value - self.start.value
        enough = (change <= self.c1 * trial.step * self.start.slope) | (change.abs() <= self.noise)
        low = enough & (trial.value <= best.value + self.noise) & (change > -torch.inf)
        flat = trial.slope.abs() < -self.c2 * self.start.slope
        if self.segment is not None:
            flat = flat | ((trial.step >= self.segment.largest) & (trial.slope < 0))
        return low, flat

    def within(self, step: Tensor) -> Tensor:
        """The step, or that to the end of the line."""
        if self.segment is None:
            return step
        return torch.where(step > self.segment.largest, self.segment.largest, step)


def _zoom(line: _Line, trial: LinePoint, active: Tensor, status: Tensor) -> tuple[LinePoint, Tensor, Tensor]:
    best = other = line.start
    bracketed = torch.zeros_like(active)
    searching = active & (line.start.slope < 0)
    for count in range(1, _MAX_TRIALS + 1):
        status = torch.where(searching & (trial.value == -torch.inf), int(Status.UNBOUNDED), status)
        searching = searching & (status == Status.RUNNING)
        trial = line.finite(trial)
        low, flat = line.test(trial, best)
        ahead = torch.where(bracketed, torch.sign(other.step - best.step), 1.0)
        moved, beyond = searching & low, searching & ~low
        turned = moved & (trial.slope * ahead >= 0)
        other = other.pick(turned | (moved & ~bracketed), best).pick(beyond, trial)
        best = best.pick(moved, trial)
        bracketed = bracketed | turned | beyond
        searching = searching & ~(moved & flat)
        if count == _MAX_TRIALS or not any_lane(searching):
            break
        beyond_by = _EXTRAPOLATION[1] if count < _SLOW_TRIALS else _FAR_EXTRAPOLATION
        fraction = _next_fraction(best, other, bracketed, line.noise, beyond_by, bisect=count % 3 == 0)
        step = line.within(best.step + fraction * (other.step - best.step))
        trial = line.at(torch.where(searching, step, best.step))
    # However far it went, it is as steep as at the start.
    status = torch.where(searching & ~bracketed, int(Status.UNBOUNDED), status)
    failed = searching | (active & ~(line.start.slope < 0))
    return best, failed & (status == Status.RUNNING), status


def _next_fraction(
    best: LinePoint, other: LinePoint, bracketed: Tensor, noise: Tensor, farthest: float, *, bisect: bool
) -> Tensor:
    """Where to try next, the best point being at 0 and the other at 1: at the minimum of the cubic through both.

    Every third trial bisects, so that the bracket shrinks.
    """
    width = other.step - best.step
    known = torch.isfinite(other.value)
    p, q = best.slope * width, other.slope * width
    rise = torch.where(known, other.value, best.value) - best.value
    # Where values say nothing, the cubic is the parabola that has the two slopes.
    rise = torch.where(rise.abs() <= noise, 0.5 * (p + q), rise)
    size = torch.stack([p, q, rise]).detach().abs().amax(dim=0)
    size = torch.where(size > 0, size, 1.0)
    p, q, rise = p / size, q / size, rise / size
    middle = p + q - 3 * rise
    square = middle.square() - p * q
    known = known & (square > 0)
    root = torch.sqrt(torch.where(known, square, 1.0))
    at = 1 - safe_divide(q + root - middle, q - p + 2 * root)
    known = known & torch.where(bracketed, not bisect, at < 0)
    lower = torch.where(bracketed, _BRACKET_MARGINS[0], -farthest)
    upper = torch.where(bracketed, _BRACKET_MARGINS[1], -_EXTRAPOLATION[0])
    at = torch.where(at < lower, lower, torch.where(at > upper, upper, at))
    return torch.where(known, at, torch.where(bracketed, 0.5, -farthest))
