"""Runs of every optimizer against torch.optim."""

from __future__ import annotations

import functools
import io
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks.copies import assert_same, copied
from tables.optimizers import ROWS, Row, each_row
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_unflatten

import implicitdiff as idf
from implicitdiff import schedule

F64, F32, C128 = torch.float64, torch.float32, torch.complex128

# The runs contract, so that at their end rounding is what the last few dozen steps have added: a small multiple of the
# unit roundoff, 1e-16 and 6e-8.
CLOSE = {F64: 1e-12, C128: 1e-12, F32: 1e-6}

STEPS = 200

# Large enough for the start to be forgotten within a run.
LR = {idf.sgd: 0.02, idf.adagrad: 0.3, idf.adadelta: 1.0}

# What a step may be made of: (one call, in place, use_accelerated_op).
WAYS = list(itertools.product([False, True], [False, True], [None, False]))
WAY_NAMES = ["-".join(["step" if s else "update", "inplace" if i else "fresh", str(a)]) for s, i, a in WAYS]


def lr_of(row: Row) -> float:
    return LR.get(row.factory, 0.05)


def made(row: Row, **options: Any) -> idf.GradientTransformation:
    return row.factory(**{"lr": lr_of(row)} | row.options | options)


@functools.cache
def start(dtype: torch.dtype) -> Any:
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(shape, dtype=F64, generator=generator).to(dtype) for shape in [(3, 2), (), (2, 1, 2)])
    if dtype.is_complex:
        a, b, c = (x * (1 - 0.5j) for x in (a, b, c))
    return {"layers": [(a, b)], "head": {"w": c}}


SPEC = torch.utils._pytree.tree_structure(start(F64))


@functools.cache
def noise(dtype: torch.dtype) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    drawn = dtype if dtype.is_complex else F64
    leaves = tree_leaves(start(dtype))
    return [[torch.randn(p.shape, dtype=drawn, generator=generator).to(dtype) for p in leaves] for _ in range(STEPS)]


def gradient(p: Tensor, k: int, i: int, sign: float) -> Tensor:
    """Of a quadratic of curvature 1 with its minimum at 1.5, or the maximum, and of a random slope at each step."""
    return sign * (p - 1.5 + 0.5 * noise(p.dtype)[k][i])


def gradients(params: Any, k: int, sign: float, missing: set[tuple[int, int]]) -> Any:
    leaves = tree_leaves(params)
    return tree_unflatten(
        [None if (k, i) in missing else gradient(p.detach(), k, i, sign) for i, p in enumerate(leaves)], SPEC
    )


def sign_of(row: Row) -> float:
    return -1.0 if row.options.get("maximize") else 1.0


def advance(
    pair: idf.GradientTransformation,
    params: Any,
    state: Any,
    steps: range,
    *,
    sign: float = 1.0,
    way: tuple[bool, bool] = (False, False),
    missing: set[tuple[int, int]] = frozenset(),
) -> tuple[Any, Any]:
    at_once, inplace = way
    for k in steps:
        grads = gradients(params, k, sign, missing)
        if at_once:
            params, state = pair.step(grads, state, params, inplace=inplace)
        else:
            updates, state = pair.update(grads, state, params, inplace=inplace)
            params = idf.apply_updates(params, updates, inplace=inplace)
    return params, state


def trained(pair: idf.GradientTransformation, dtype: torch.dtype, steps: int, **options: Any) -> tuple[Any, Any]:
    params = copied(start(dtype))
    return advance(pair, params, pair.init(params), range(steps), **options)


def trained_by_torch(
    row: Row,
    dtype: torch.dtype,
    steps: int,
    missing: set[tuple[int, int]] = frozenset(),
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
) -> list[Tensor]:
    params = [p.clone().requires_grad_() for p in tree_leaves(start(dtype))]
    optimizer = row.reference(params, **{"lr": lr_of(row), "foreach": False} | row.options)
    after = scheduler(optimizer) if scheduler else None
    for k in range(steps):
        for i, p in enumerate(params):
            p.grad = None if (k, i) in missing else gradient(p.detach(), k, i, sign_of(row))
        optimizer.step()
        if after:
            after.step()
    return [p.detach() for p in params]


@functools.cache
def long_run_by_torch(name: str, dtype: torch.dtype) -> list[Tensor]:
    return trained_by_torch(next(row for row in ROWS if row.name == name), dtype, STEPS)


def assert_close(tree: Any, expected: Any) -> None:
    for p, q in zip(tree_leaves(tree), tree_leaves(expected), strict=True):
        assert (p.dtype, p.shape) == (q.dtype, q.shape)
        error = torch.linalg.vector_norm(p - q) / torch.linalg.vector_norm(q)
        assert error <= CLOSE[p.dtype], f"{error:.1e}"


# --- whole runs -------------------------------------------------------------------------------------------------------


# Each choice with each other one; all eight ways are compared with each other below.
@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("dtype", "way"),
    [pytest.param(F64, i, id=f"float64-{WAY_NAMES[i]}") for i in (0, 3, 5, 6)]
    + [pytest.param(F32, i, id=f"float32-{WAY_NAMES[i]}") for i in (2, 5)],
)
@each_row
def test_a_long_run_ends_where_that_of_torch_does(row, dtype, way):
    at_once, inplace, accelerated = WAYS[way]
    pair = made(row, use_accelerated_op=accelerated)
    params, _ = trained(pair, dtype, STEPS, sign=sign_of(row), way=(at_once, inplace))
    assert_close(tree_leaves(params), long_run_by_torch(row.name, dtype))


@each_row
def test_all_ways_to_take_a_step_agree(row):
    runs = [
        trained(made(row, use_accelerated_op=accelerated), F64, 6, sign=sign_of(row), way=(at_once, inplace))
        for at_once, inplace, accelerated in WAYS
    ]
    for params, state in runs[1:]:
        assert_close(params, runs[0][0])
        assert_same(state.count, runs[0][1].count)
        for moments, expected in zip(state[1:], runs[0][1][1:], strict=True):
            assert_close(moments, expected)


@pytest.mark.parametrize("accelerated", [None, False])
@each_row
def test_parameters_without_a_gradient_are_left_alone_as_in_torch(row, accelerated):
    generator = torch.Generator().manual_seed(2)
    steps, leaves = 40, len(tree_leaves(start(F64)))
    drawn = (torch.rand(steps, leaves, generator=generator) < 0.4).nonzero().tolist()
    never = 2
    missing = {(k, i) for k, i in drawn} | {(k, never) for k in range(steps)}
    pair = made(row, use_accelerated_op=accelerated)
    params, state = trained(pair, F64, steps, sign=sign_of(row), missing=missing)
    assert_close(tree_leaves(params), trained_by_torch(row, F64, steps, missing))
    assert_same(tree_leaves(params)[never], tree_leaves(start(F64))[never])
    assert state.count.tolist() == [steps - sum((k, i) in missing for k in range(steps)) for i in range(leaves)]
    started = pair.init(start(F64))
    for moments, initial in zip(state[1:], started[1:], strict=True):
        if tree_leaves(moments):
            assert_same(tree_leaves(moments)[never], tree_leaves(initial)[never])


@pytest.mark.parametrize(("at_once", "inplace"), [(False, False), (True, True)])
@each_row
def test_complex_parameters_are_trained_as_by_torch(row, at_once, inplace):
    params, _ = trained(made(row), C128, 40, sign=sign_of(row), way=(at_once, inplace))
    assert_close(tree_leaves(params), trained_by_torch(row, C128, 40))


# --- runs are functions of their state --------------------------------------------------------------------------------


@each_row
def test_a_run_goes_on_bit_for_bit_from_a_saved_state(row):
    pair = made(row)
    half = trained(pair, F32, 7, sign=sign_of(row))
    file = io.BytesIO()
    torch.save(half, file)
    file.seek(0)
    params, state = torch.load(file, weights_only=False)
    assert type(state) is type(half[1])
    resumed = advance(pair, params, state, range(7, 15), sign=sign_of(row))
    assert_same(resumed, trained(pair, F32, 15, sign=sign_of(row)))


@each_row
def test_one_pair_serves_two_interleaved_runs(row):
    pair, sign = made(row), sign_of(row)
    one, other = copied(start(F64)), tree_map(lambda t: t + 1, start(F64))
    runs = [(p, pair.init(p)) for p in (one, other)]
    for k in range(6):
        runs = [advance(pair, *run, range(k, k + 1), sign=sign, way=(True, True)) for run in runs]
    for run, p in zip(runs, (start(F64), tree_map(lambda t: t + 1, start(F64))), strict=True):
        alone = made(row)
        assert_same(run, advance(alone, p, alone.init(p), range(6), sign=sign, way=(True, False)))


# --- learning rates that change ---------------------------------------------------------------------------------------

_lr = torch.optim.lr_scheduler
RUN = 30
SCHEDULES = {
    "linear": (
        lambda lr: schedule.linear(lr, 0.1 * lr, 20),
        lambda o: _lr.LinearLR(o, start_factor=1.0, end_factor=0.1, total_iters=20),
    ),
    "polynomial": (
        lambda lr: schedule.polynomial(lr, 0.0, 2, 20),
        lambda o: _lr.PolynomialLR(o, total_iters=20, power=2.0),
    ),
    "exponential": (lambda lr: schedule.exponential(lr, 0.9), lambda o: _lr.ExponentialLR(o, gamma=0.9)),
    "staircase": (
        lambda lr: schedule.exponential(lr, 0.5, 7, staircase=True),
        lambda o: _lr.StepLR(o, step_size=7, gamma=0.5),
    ),
    # torch's cosine rises again after T_max.
    "cosine": (
        lambda lr: schedule.cosine(lr, RUN, alpha=0.1),
        lambda o: _lr.CosineAnnealingLR(o, T_max=RUN, eta_min=0.1 * o.param_groups[0]["lr"]),
    ),
    "warmup": (
        lambda lr: schedule.warmup(schedule.cosine(lr, RUN), 10, init_value=0.1 * lr),
        lambda o: _lr.SequentialLR(
            o,
            [_lr.LinearLR(o, start_factor=0.1, total_iters=10), _lr.CosineAnnealingLR(o, T_max=RUN)],
            milestones=[10],
        ),
    ),
    "piecewise": (
        lambda lr: schedule.piecewise([lr, 0.1 * lr, schedule.constant(0.01 * lr)], [10, 20]),
        lambda o: _lr.MultiStepLR(o, milestones=[10, 20], gamma=0.1),
    ),
}
SCHEDULED = [row for row in ROWS if row.name in ("sgd-momentum", "adam", "adamw", "rmsprop", "adadelta")]


@pytest.mark.parametrize("accelerated", [None, False])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("row", SCHEDULED, ids=lambda row: row.name)
# SequentialLR calls a method of its parts that torch deprecates.
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
def test_a_schedule_is_the_scheduler_of_torch(row, name, accelerated):
    ours, theirs = SCHEDULES[name]
    pair = made(row, lr=ours(lr_of(row)), use_accelerated_op=accelerated)
    params, state = trained(pair, F64, RUN)
    assert_close(tree_leaves(params), trained_by_torch(row, F64, RUN, scheduler=theirs))
    assert state.count == RUN


# --- late steps -------------------------------------------------------------------------------------------------------

LATE, B1, B2, EPS = 100_000, 0.9999, 0.99999, 1e-8


def late_adam(g: float) -> float:
    m_hat, v_hat = (1 - B1) * g / (1 - B1**LATE), (1 - B2) * g * g / (1 - B2**LATE)
    return -0.1 * m_hat / (math.sqrt(v_hat) + EPS)


def late_adamax(g: float) -> float:
    return -0.1 * (1 - B1) * g / (1 - B1**LATE) / (abs(g) + EPS)


def late_radam(g: float) -> float:
    limit = 2 / (1 - B2) - 1
    length = limit - 2 * LATE * B2**LATE / (1 - B2**LATE)
    assert length > 5
    r = math.sqrt((length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length))
    v = math.sqrt((1 - B2) * g * g)
    return -0.1 * (1 - B1) * g / (1 - B1**LATE) * r * math.sqrt(1 - B2**LATE) / (v + EPS)


@pytest.mark.parametrize("learned", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("accelerated", [None, False])
@pytest.mark.parametrize(
    ("factory", "closed_form"), [(idf.adam, late_adam), (idf.adamax, late_adamax), (idf.radam, late_radam)]
)
def test_bias_is_corrected_in_float64(factory, closed_form, accelerated, learned):
    numbers = (0.1, B1, B2)
    lr, b1, b2 = (torch.tensor(x, dtype=F64) if learned else x for x in numbers)
    init, update = factory(lr, (b1, b2), eps=EPS, use_accelerated_op=accelerated)
    g = torch.tensor([0.3, -2.0], dtype=F64)
    state = init(g)._replace(count=torch.tensor([LATE - 1]))
    updates, _ = update(g, state)
    expected = torch.tensor([closed_form(x) for x in g.tolist()], dtype=F64)
    assert_close(updates, expected)
