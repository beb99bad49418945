"""Schedules against formulas written a second time, in NumPy and for one count."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from implicitdiff import schedule

F64 = torch.float64
# A handful of operations in float64.
CLOSE = {"rtol": 1e-14, "atol": 1e-15}

COUNTS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 15, 19, 20, 21, 1000]


def polynomial(t, a, b, power, steps, begin=0):
    left = 1 - np.clip(t - begin, 0, steps) / steps
    return (a - b) * left**power + b


def exponential(t, a, rate, steps=1, begin=0, staircase=False, end=None):
    if t <= begin:
        value = a
    else:
        p = (t - begin) / steps
        value = a * rate ** (np.floor(p) if staircase else p)
    if end is None:
        return value
    return max(value, end) if rate < 1 else min(value, end)


def cosine(t, a, steps, alpha=0.0, begin=0):
    fall = 0.5 * (1 + np.cos(np.pi * np.clip(t - begin, 0, steps) / steps))
    return a * ((1 - alpha) * fall + alpha)


def warmup(t, rest, steps, a=0.0):
    return a + (rest(0) - a) * t / steps if t < steps else rest(t - steps)


def piecewise(t, pieces, boundaries):
    k = int(np.searchsorted(boundaries, t, side="right"))
    return pieces[k](t - ([0, *boundaries])[k])


# A schedule as a function of the value it starts from, and its formula for one count.
CASES: dict[str, tuple[Callable[[Any], schedule.Schedule], Callable[[int, float], float]]] = {
    "constant": (lambda a: schedule.constant(a), lambda t, a: a),
    "linear": (lambda a: schedule.linear(a, 0.1, 10), lambda t, a: polynomial(t, a, 0.1, 1, 10)),
    "linear later": (lambda a: schedule.linear(a, 2.0, 6, begin=4), lambda t, a: polynomial(t, a, 2.0, 1, 6, 4)),
    "polynomial": (lambda a: schedule.polynomial(a, 0.1, 3, 10), lambda t, a: polynomial(t, a, 0.1, 3, 10)),
    "polynomial later": (
        lambda a: schedule.polynomial(a, -1.0, 0.5, 7, begin=3),
        lambda t, a: polynomial(t, a, -1.0, 0.5, 7, 3),
    ),
    "polynomial at once": (lambda a: schedule.polynomial(a, 0.0, 2, 1), lambda t, a: polynomial(t, a, 0.0, 2, 1)),
    "exponential": (lambda a: schedule.exponential(a, 0.9), lambda t, a: exponential(t, a, 0.9)),
    "exponential later": (
        lambda a: schedule.exponential(a, 0.5, 3, begin=4),
        lambda t, a: exponential(t, a, 0.5, 3, 4),
    ),
    "staircase": (
        lambda a: schedule.exponential(a, 0.5, 3, begin=1, staircase=True),
        lambda t, a: exponential(t, a, 0.5, 3, 1, True),
    ),
    "exponential down to": (
        lambda a: schedule.exponential(a, 0.5, 2, end_value=0.07),
        lambda t, a: exponential(t, a, 0.5, 2, end=0.07),
    ),
    "exponential up to": (
        lambda a: schedule.exponential(a, 1.5, 2, end_value=5.0),
        lambda t, a: exponential(t, a, 1.5, 2, end=5.0),
    ),
    "cosine": (lambda a: schedule.cosine(a, 10), lambda t, a: cosine(t, a, 10)),
    "cosine later": (
        lambda a: schedule.cosine(a, 8, alpha=0.2, begin=3),
        lambda t, a: cosine(t, a, 8, 0.2, 3),
    ),
    "warmup": (
        lambda a: schedule.warmup(schedule.cosine(a, 10, alpha=0.1), 5),
        lambda t, a: warmup(t, lambda t: cosine(t, a, 10, 0.1), 5),
    ),
    "warmup from a value": (
        lambda a: schedule.warmup(schedule.exponential(a, 0.8), 1, init_value=0.3),
        lambda t, a: warmup(t, lambda t: exponential(t, a, 0.8), 1, 0.3),
    ),
    "piecewise": (
        lambda a: schedule.piecewise([schedule.linear(0.0, a, 4), a, schedule.cosine(a, 6), 0.01], [4, 10, 20]),
        lambda t, a: piecewise(
            t,
            [lambda t: polynomial(t, 0.0, a, 1, 4), lambda t: a, lambda t: cosine(t, a, 6), lambda t: 0.01],
            [4, 10, 20],
        ),
    ),
    "piecewise of one": (
        lambda a: schedule.piecewise([schedule.exponential(a, 0.9)], []),
        lambda t, a: exponential(t, a, 0.9),
    ),
    "nested": (
        lambda a: schedule.warmup(schedule.piecewise([a, schedule.linear(a, 0.0, 5)], [3]), 2),
        lambda t, a: warmup(t, lambda t: piecewise(t, [lambda t: a, lambda t: polynomial(t, a, 0.0, 1, 5)], [3]), 2),
    ),
}

START = 0.8
each_case = pytest.mark.parametrize(("make", "formula"), CASES.values(), ids=CASES)


def expected(formula: Callable[[int, float], float], a: float = START) -> Tensor:
    return torch.tensor([float(formula(t, a)) for t in COUNTS], dtype=F64)


@each_case
def test_values_for_ints_are_those_of_the_formula(make, formula):
    values = [make(START)(t) for t in COUNTS]
    assert all(isinstance(v, Tensor) and v.dtype == F64 and v.shape == () for v in values)
    torch.testing.assert_close(torch.stack(values), expected(formula), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@each_case
def test_values_for_tensors_have_the_shape_of_the_counts(make, formula, dtype):
    s = make(START)
    counts = torch.tensor(COUNTS, dtype=dtype)
    for shape in [(-1,), (2, -1), (3, 1, -1)]:
        values = s(counts.reshape(shape))
        assert values.dtype == F64 and values.shape == counts.reshape(shape).shape
        torch.testing.assert_close(values.flatten(), expected(formula), **CLOSE)
    torch.testing.assert_close(torch.stack([s(t) for t in counts]), expected(formula), **CLOSE)


@each_case
def test_counts_and_starts_may_be_batched(make, formula):
    counts = torch.tensor(COUNTS)
    torch.testing.assert_close(vmap(make(START))(counts), expected(formula), **CLOSE)
    starts = torch.tensor([START, 0.2], dtype=F64)
    values = vmap(lambda a: vmap(lambda t: make(a)(t))(counts))(starts)
    torch.testing.assert_close(values, torch.stack([expected(formula), expected(formula, 0.2)]), **CLOSE)


@each_case
def test_values_are_differentiated_with_respect_to_where_they_start(make, formula):
    # All formulas are linear in it, save where they stop.
    h = 1e-3
    slopes = (expected(formula, START + h) - expected(formula, START - h)) / (2 * h)
    a = torch.tensor(START, dtype=F64)
    counts = torch.tensor(COUNTS)
    close = {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(torch.func.jacrev(lambda a: make(a)(counts))(a), slopes, **close)
    torch.testing.assert_close(jvp(lambda a: make(a)(counts), (a,), (torch.ones_like(a),))[1], slopes, **close)
    each = torch.stack([grad(lambda a, t=t: make(a)(t))(a) for t in COUNTS])
    torch.testing.assert_close(each, slopes, **close)
    tracked = a.clone().requires_grad_()
    make(tracked)(counts).sum().backward()
    torch.testing.assert_close(tracked.grad, slopes.sum(), **close)


@each_case
def test_a_float32_start_is_computed_with_in_float64(make, formula):
    a = torch.tensor(0.5)
    values = make(a)(torch.tensor(COUNTS))
    assert values.dtype == F64
    torch.testing.assert_close(values, expected(formula, 0.5), **CLOSE)


NUMBERS = {
    "end of linear": (lambda x: schedule.linear(1.0, x, 10), lambda x, t: x * t / 10, 0.3),
    "power": (lambda x: schedule.polynomial(1.0, 0.0, x, 10), lambda x, t: (1 - t / 10) ** x, 1.7),
    "decay rate": (lambda x: schedule.exponential(2.0, x, 4), lambda x, t: 2 * x ** (t / 4), 0.7),
    "alpha": (lambda x: schedule.cosine(1.0, 10, alpha=x), lambda x, t: x * (1 - math.cos(math.pi * t / 10)) / 2, 0.2),
    "start of warmup": (
        lambda x: schedule.warmup(schedule.constant(1.0), 10, init_value=x),
        lambda x, t: x - x * t / 10,
        0.1,
    ),
}


@pytest.mark.parametrize(("make", "formula", "x"), NUMBERS.values(), ids=NUMBERS)
def test_the_other_numbers_are_differentiated_as_well(make, formula, x):
    counts, h = range(10), 1e-6
    slopes = torch.tensor([(formula(x + h, t) - formula(x - h, t)) / (2 * h) for t in counts], dtype=F64)
    derivative = torch.func.jacrev(lambda x: make(x)(torch.tensor(counts)))(torch.tensor(x, dtype=F64))
    # Central differences: 1e-16 / h.
    torch.testing.assert_close(derivative, slopes, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_derivative_by_the_power_is_finite_at_the_end(power):
    slopes = torch.func.jacrev(lambda x: schedule.polynomial(1.0, 0.0, x, 4)(torch.arange(8)))(torch.tensor(power))
    assert slopes.isfinite().all() and (slopes[4:] == 0).all()


ERRORS = {
    "linear": (lambda: schedule.linear(1.0, 0.0, 0), "polynomial: transition_steps must be at least 1, got 0"),
    "polynomial": (lambda: schedule.polynomial(1.0, 0.0, 2, -3), "transition_steps must be at least 1, got -3"),
    "exponential": (lambda: schedule.exponential(1.0, 0.5, 0), "exponential: transition_steps must be at least 1"),
    "growth": (lambda: schedule.exponential(1.0, 0.0), "exponential: decay_rate must be positive, got 0.0"),
    "nan": (lambda: schedule.exponential(1.0, math.nan), "decay_rate must be positive"),
    "cosine": (lambda: schedule.cosine(1.0, 0), "cosine: decay_steps must be at least 1, got 0"),
    "warmup": (lambda: schedule.warmup(schedule.constant(1.0), 0), "warmup: warmup_steps must be at least 1"),
    "too few": (lambda: schedule.piecewise([1.0], [3]), "1 schedules and boundaries [3]"),
    "a negative boundary": (lambda: schedule.piecewise([1.0, 2.0], [-1]), "boundaries must be positive"),
    "too many": (lambda: schedule.piecewise([1.0, 2.0, 3.0], [3]), "one schedule more than boundaries"),
    "unsorted": (lambda: schedule.piecewise([1.0, 2.0, 3.0], [5, 3]), "boundaries [5, 3]"),
    "repeated": (lambda: schedule.piecewise([1.0, 2.0, 3.0], [3, 3]), "boundaries [3, 3]"),
    "zero": (lambda: schedule.piecewise([1.0, 2.0], [0]), "positive and increase"),
    "none": (lambda: schedule.piecewise([], []), "0 schedules"),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS)
def test_what_makes_no_schedule_is_refused(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


@pytest.mark.parametrize(
    "made",
    [
        schedule.exponential(0.1, 0.9, end_value=1e-3),
        schedule.warmup(schedule.constant(0.1), 3),
        schedule.piecewise([0.1, lambda count: 0.2], [2]),
    ],
)
def test_schedules_stay_where_their_count_is(made):
    with torch.device("meta"):
        value = made(torch.tensor(1, device="cpu"))
    assert value.device.type == "cpu" and value.dtype == torch.float64
