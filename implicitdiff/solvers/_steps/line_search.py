"""A line search for the strong Wolfe conditions, in all lanes at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from implicitdiff._torch.control import if_any, repeat
from implicitdiff.solvers._loop.problem import (
    BatchedProblem,
    any_lane,
    largest_entry,
    row_dot,
    row_norm,
    safe_divide,
    select,
)
from implicitdiff.solvers._loop.state import ObjectiveMemory, ObjectiveMemoryT, State
from implicitdiff.solvers._loop.status import Status

_MAX_TRIALS = 30
# Values closer than this number of units in the last place count as equal.
_NOISE_ULPS = 10
# Limits of a trial as fractions of the bracket, and as multiples beyond the last point, as in MINPACK's dcsrch.
_BRACKET_MARGINS = (0.1, 0.9)
_EXTRAPOLATION = (1.1, 4.0)
# After this many trials without a bracket the first trial had the wrong scale: extrapolate farther.
_SLOW_TRIALS, _FAR_EXTRAPOLATION = 6, 100.0


class Segment(NamedTuple):
    """A line of finite length.

    Attributes:
        largest: the step to the end of the line, ``(lanes,)``, at least the first trial.
        at: ``at(step)``, the point ``x + step d`` up to rounding; step 0 gives ``x`` exactly.
    """

    largest: Tensor
    at: Callable[[Tensor], Tensor]


class LinePoint(NamedTuple):
    """A point ``x + step d`` of a line.

    Attributes:
        step: the step, ``(lanes,)``.
        x: the point.
        value: the objective at the point.
        slope: the derivative of the objective along the line.
        grad: the gradient of the objective.
    """

    step: Tensor
    x: Tensor
    value: Tensor
    slope: Tensor
    grad: Tensor

    def pick(self, where: Tensor, other: LinePoint) -> LinePoint:
        """Return the other point in the flagged lanes."""
        return LinePoint(*(select(where, b, a) for a, b in zip(self, other, strict=True)))


def search(
    problem: BatchedProblem,
    x: Tensor,
    state: State[ObjectiveMemoryT],
    direction: Tensor,
    first_step: Tensor,
    # The usual constants for quasi-Newton directions (Nocedal and Wright, section 3.1).
    c1: float = 1e-4,
    c2: float = 0.9,
    segment: Segment | None = None,
) -> tuple[LinePoint, Tensor, Tensor]:
    """Find a point with ``f(x + a d) <= f(x) + c1 a g'd`` and ``|grad f(x + a d)'d| <= c2 |g'd|``.

    Algorithms 3.5 and 3.6 of Nocedal and Wright in a single loop: an interval extends from the best point so far to
    another point; the latter lies behind the best point until a point beyond a minimum is known. If values differ by no
    more than rounding, the first condition counts as satisfied, as in Hager and Zhang's approximate conditions: near a
    minimum, slopes have twice as many correct digits as values. A lane returns its best point after 30 trials.

    Args:
        problem: the problem.
        x: the start.
        state: a state whose memory has the fields of `initial_fields`; lanes that are not running stay at ``x``. The
            memory's ``magnitude`` is the largest ``|f|`` so far: a small value, as the difference of large terms, is no
            more precise than these terms.
        direction: the direction ``d``.
        first_step: the first trial, ``(lanes,)``.
        c1: constant of the sufficient decrease, less than ``c2``.
        c2: constant of the curvature condition, less than 1.
        segment: the line if finite; at its end the second condition holds if the objective still decreases. None for an
            infinite line.

    Returns:
        The point, the lanes without a point that satisfies the conditions, and the status: `Status.UNBOUNDED` in lanes
            whose values decrease without end.

    Reference:
        Nocedal and Wright, "Numerical Optimization", 2006, section 3.5; Hager and Zhang, "A new conjugate gradient
            method with guaranteed descent and an efficient line search", SIAM J. Optim. 16 (2005), section 4.
    """
    line = _Line(problem, x, state.memory, direction, c1, c2, segment)
    active = state.status == Status.RUNNING
    # Evaluate stopped lanes at ``x``, inside of the domain: the backward multiplies by zero, and ``0 * inf`` is nan.
    trial = line.at(torch.where(active, first_step, 0.0))
    low, flat = line.test(trial, line.start)
    ends = low & flat
    first = _Found(trial, torch.zeros_like(active), state.status)
    # If the first trial ends the search in every lane, as near a solution, the loop is skipped.
    point, failed, status = if_any(active & ~ends, partial(_zoom, line, active, ends), first)
    return point, failed, status


def unit_step(grad: Tensor) -> Tensor:
    """Return ``min(1, 1 / |g|)``, the first step along a negative gradient without knowledge of the curvature."""
    largest = largest_entry(grad.detach())
    # Divide by the largest entry, because squares of tiny or huge gradients underflow or overflow. The scale cancels,
    # so needs no derivative.
    largest = torch.where(largest > 0, largest, 1.0)
    square = (grad / largest[:, None]).square().sum(dim=-1)
    length = largest * torch.sqrt(torch.where(square > 0, square, 1.0))
    return torch.where(length > 1, 1 / length, 1.0)


def initial_fields(problem: BatchedProblem, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the error at an initial guess, and the memory's fields that `search` needs."""
    value, grad = problem.fn.value_and_grad(x)
    # The gradient of an infinite value may be finite: report such a guess as not finite.
    error = torch.where(torch.isfinite(value), row_norm(grad), torch.nan)
    return error, {"value": value, "grad": grad, "magnitude": value.detach().abs()}


def fields_at(memory: ObjectiveMemory, point: LinePoint) -> dict[str, Tensor]:
    """Return the memory's fields that `search` needs, at a new point."""
    magnitude = torch.maximum(memory.magnitude, point.value.detach().abs())
    return {"value": point.value, "grad": point.grad, "magnitude": magnitude}


def value_fell(problem: BatchedProblem, memory: ObjectiveMemory, point: LinePoint) -> Tensor:
    """True in lanes whose value is lower at the new point by more than its rounding."""
    lower: Tensor = point.value.detach() < memory.value.detach() - _NOISE_ULPS * problem.eps * memory.magnitude
    return lower


class _Line:
    """The objective along a line, with the conditions of the search."""

    def __init__(
        self,
        problem: BatchedProblem,
        x: Tensor,
        memory: ObjectiveMemory,
        direction: Tensor,
        c1: float,
        c2: float,
        segment: Segment | None,
    ) -> None:
        value = memory.value
        self.problem, self.direction, self.c1, self.c2, self.segment = problem, direction, c1, c2, segment
        self.start = LinePoint(torch.zeros_like(value), x, value, row_dot(memory.grad, direction), memory.grad)
        self.noise = _NOISE_ULPS * problem.eps * memory.magnitude

    def at(self, step: Tensor) -> LinePoint:
        """Evaluate the objective at a step."""
        x = self.start.x + step[:, None] * self.direction if self.segment is None else self.segment.at(step)
        value, grad = self.problem.fn.value_and_grad(x)
        return LinePoint(step, x, value, row_dot(grad, self.direction), grad)

    def finite(self, trial: LinePoint) -> LinePoint:
        """Return the trial with infinity as the value in lanes with a value or slope that is not finite."""
        finite = torch.isfinite(trial.value) & torch.isfinite(trial.slope)
        step = trial.step
        if not self.problem.plain and any_lane(~finite):
            # Evaluate again without the points outside of the domain: ``0 * inf`` in the backward of a masked value is
            # nan.
            trial = self.at(torch.where(finite, step, 0.0))
        return trial._replace(step=step, value=torch.where(finite, trial.value, torch.inf))

    def test(self, trial: LinePoint, best: LinePoint) -> tuple[Tensor, Tensor]:
        """Return two flags: the value is low enough, and the slope is flat enough."""
        change = trial.value - self.start.value
        # Sufficient decrease, or no change beyond rounding (approximate Wolfe condition).
        enough = (change <= self.c1 * trial.step * self.start.slope) | (change.abs() <= self.noise)
        low = enough & (trial.value <= best.value + self.noise) & (change > -torch.inf)
        flat = trial.slope.abs() < -self.c2 * self.start.slope
        if self.segment is not None:
            # At the end of a finite line a descending slope is acceptable.
            flat = flat | ((trial.step >= self.segment.largest) & (trial.slope < 0))
        return low, flat

    def within(self, step: Tensor) -> Tensor:
        """Return the step, or the step to the end of the line if smaller."""
        if self.segment is None:
            return step
        return torch.where(step > self.segment.largest, self.segment.largest, step)


class _Found(NamedTuple):
    """The result of a search, see `search`."""

    point: LinePoint
    failed: Tensor
    status: Tensor


class _Bracket(NamedTuple):
    """A search after some trials.

    Attributes:
        best: the best point so far.
        other: the other end of the interval.
        bracketed: True if a minimum lies between the two.
        searching: the lanes without a point that satisfies the conditions.
        status: a `Status` per lane.
        trials: the number of trials.
    """

    best: LinePoint
    other: LinePoint
    bracketed: Tensor
    searching: Tensor
    status: Tensor
    trials: Tensor


def _zoom(line: _Line, active: Tensor, ends: Tensor, first: _Found) -> _Found:
    """Continue the search from the first trial, in the active lanes whose first trial does not end it."""
    # A direction that does not descend fails at once.
    sought = active & (ends | (line.start.slope < 0))
    none, no_trials = torch.zeros_like(active), torch.zeros_like(active, dtype=torch.int64)
    # An interval of length 0 at the start; the first trial becomes `best` or `other`.
    bracket = _Bracket(line.start, line.start, none, sought, first.status, no_trials)
    bracket = _digest(line, bracket, first.point)
    bracket = repeat(partial(_try_next, line), bracket, attrgetter("searching"), _MAX_TRIALS - 1)
    # Without a bracket after all extrapolations, the objective decreases as steeply as at the start.
    endless = bracket.searching & ~bracket.bracketed
    status = torch.where(endless, int(Status.UNBOUNDED), bracket.status)
    failed = bracket.searching | (active & ~sought)
    return _Found(bracket.best, failed & (status == Status.RUNNING), status)


def _digest(line: _Line, bracket: _Bracket, trial: LinePoint) -> _Bracket:
    """Return the bracket after a trial."""
    best, other, bracketed, searching, status, trials = bracket
    # An objective of minus infinity ends the search.
    status = torch.where(searching & (trial.value == -torch.inf), int(Status.UNBOUNDED), status)
    searching = searching & (status == Status.RUNNING)
    trial = line.finite(trial)
    low, flat = line.test(trial, best)
    # Direction from the best point to the other end of the bracket; forward before a bracket is known. Invariants of
    # zoom (Nocedal and Wright, section 3.5), up to rounding: `best` has the lowest value of the trials with sufficient
    # decrease, and, once bracketed, `other` lies in the direction of descent from `best`.
    ahead = torch.where(bracketed, torch.sign(other.step - best.step), 1.0)
    # A trial without sufficient decrease, or above `best`, becomes the other end of the bracket.
    moved, beyond = searching & low, searching & ~low
    # The best point moved past a minimum: the old best point becomes the other end of the bracket.
    turned = moved & (trial.slope * ahead >= 0)
    other = other.pick(turned | (moved & ~bracketed), best).pick(beyond, trial)
    best = best.pick(moved, trial)
    return _Bracket(best, other, bracketed | turned | beyond, searching & ~(moved & flat), status, trials + 1)


def _try_next(line: _Line, bracket: _Bracket) -> _Bracket:
    """Make the next trial."""
    best, searching = bracket.best, bracket.searching
    fraction = _next_fraction(bracket, line.noise)
    # Stopped lanes evaluate their best point again, inside of the domain.
    step = line.within(best.step + fraction * (bracket.other.step - best.step))
    return _digest(line, bracket, line.at(torch.where(searching, step, best.step)))


def _next_fraction(bracket: _Bracket, noise: Tensor) -> Tensor:
    """Return the next trial as a fraction of the interval from the best point (0) to the other point (1).

    The trial is the minimum of the cubic with the values and slopes of both points; every third trial bisects, so that
    brackets shrink.
    """
    best, other, bracketed, _, _, trials = bracket
    width = other.step - best.step
    # A point outside of the domain ends the bracket, but gives no cubic.
    known = torch.isfinite(other.value)
    # The slopes per unit of the interval; ``width`` may be negative.
    p, q = best.slope * width, other.slope * width
    rise = torch.where(known, other.value, best.value) - best.value
    # If rounding hides the difference of the values, use the parabola with the two slopes: its rise is their mean.
    rise = torch.where(rise.abs() <= noise, 0.5 * (p + q), rise)
    # Scale the cubic's coefficients, against overflow of their squares.
    size = torch.stack([p, q, rise]).detach().abs().amax(dim=0)
    size = torch.where(size > 0, size, 1.0)
    p, q, rise = p / size, q / size, rise / size
    middle = p + q - 3 * rise
    square = middle.square() - p * q
    known = known & (square > 0)
    root = torch.sqrt(torch.where(known, square, 1.0))
    # (3.59) of Nocedal and Wright, with the interval scaled to [0, 1]. The cubic ``c`` has
    # ``c'(t) = p - 2 (p + middle) t + (p + q + 2 middle) t^2``, so the discriminant is ``middle^2 - p q``; the root
    # with ``c'' > 0`` is the minimum.
    at = 1 - safe_divide(q + root - middle, q - p + 2 * root)
    # Before a bracket is known only an extrapolation (``at < 0``) makes sense.
    known = known & torch.where(bracketed, trials % 3 != 0, at < 0)
    farthest = torch.where(trials < _SLOW_TRIALS, _EXTRAPOLATION[1], _FAR_EXTRAPOLATION)
    # Before a bracket is known `other` lies behind `best`, so a step ahead is a negative fraction.
    lower = torch.where(bracketed, _BRACKET_MARGINS[0], -farthest)
    upper = torch.where(bracketed, _BRACKET_MARGINS[1], -_EXTRAPOLATION[0])
    at = torch.where(at < lower, lower, torch.where(at > upper, upper, at))
    # Without a usable cubic bisect the bracket, or extrapolate as far as allowed.
    return torch.where(known, at, torch.where(bracketed, 0.5, -farthest))
