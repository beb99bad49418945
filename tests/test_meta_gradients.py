"""Derivatives through ten steps of every optimizer, against differences."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from checks.compiled import needs_cpu
from tables.optimizers import ROWS, Row
from torch import Tensor
from torch.func import grad, jvp, vmap

import implicitdiff as idf
from implicitdiff import optim, schedule

F64 = torch.float64
STEPS = 10

# Extrapolated central differences err by H^4 = 1e-14 times a fifth derivative and by 1e-16 / H; steps are small enough,
# and directions are scaled, such that fifth derivatives are no larger than 1e6 times the first.
H = 3e-4
TOLERANCE = 1e-7


# --- a run as a function of one vector: initial parameters, targets, hyper-parameters ---------------------------------


class Case(NamedTuple):
    """A transformation made from hyper-parameters that are learned, and where these start."""

    name: str
    make: Callable[..., idf.GradientTransformation]
    hyper: dict[str, float]
    sign: float = 1.0


def _drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


X, X_OUTER = _drawn(4, 3, seed=0), _drawn(4, 3, seed=1)
W, B, Y = _drawn(3, seed=2), _drawn(seed=3), 0.5 * _drawn(4, seed=4)
FIXED = torch.cat([W, B[None], Y])


def inner_loss(params: Any, y: Tensor) -> Tensor:
    residual = torch.tanh(X @ params["net"][0] + params["b"]) - y
    return (residual**2).sum() / 2 + 0.1 * (params["net"][0] ** 2).sum()


def outer_loss(params: Any) -> Tensor:
    return (torch.sin(X_OUTER @ params["net"][0] + params["b"]) ** 2).sum()


def final(pair: idf.GradientTransformation, params: Any, y: Tensor, sign: float, at_once: bool = False) -> Tensor:
    state = pair.init(params)
    for _ in range(STEPS):
        grads = grad(lambda p: sign * inner_loss(p, y))(params)
        if at_once:
            params, state = pair.step(grads, state, params)
        else:
            updates, state = pair.update(grads, state, params)
            params = idf.apply_updates(params, updates)
    return outer_loss(params)


def run(case: Case, theta: Tensor, at_once: bool = False, **options: Any) -> Tensor:
    params = {"net": (theta[:3],), "b": theta[3]}
    hyper = dict(zip(case.hyper, theta[8:].unbind(), strict=True)) if len(theta) > 8 else case.hyper
    return final(case.make(**hyper, **options), params, theta[4:8], case.sign, at_once)


def theta_of(case: Case, learned: bool = True) -> Tensor:
    return torch.cat([FIXED, torch.tensor(list(case.hyper.values()), dtype=F64)]) if learned else FIXED


# --- the cases --------------------------------------------------------------------------------------------------------

_LEARNED = {
    idf.sgd: {"lr": 0.05},
    idf.adam: {"lr": 0.01, "b1": 0.9, "b2": 0.999},
    idf.adamw: {"lr": 0.01, "b1": 0.9, "b2": 0.999},
    idf.rmsprop: {"lr": 0.002, "alpha": 0.99},
    idf.adagrad: {"lr": 0.02},
    idf.adadelta: {"lr": 1.0, "rho": 0.9},
    idf.adamax: {"lr": 0.01, "b1": 0.9, "b2": 0.999},
    idf.radam: {"lr": 0.01, "b1": 0.9, "b2": 0.999},
}


def _case_of(row: Row) -> Case:
    """All numbers of a row are learned, but for an eps too small for differences."""
    numbers = {k: v for k, v in row.options.items() if type(v) is float and k != "initial_accumulator_value"}
    hyper = {**_LEARNED[row.factory], "weight_decay": 0.1, **numbers}
    statics = {k: v for k, v in row.options.items() if k not in numbers and k != "betas"}
    hyper |= dict(zip(("b1", "b2"), row.options.get("betas", ()), strict=False))

    def make(**values: Any) -> idf.GradientTransformation:
        if "b1" in values:
            values["betas"] = values.pop("b1"), values.pop("b2")
        return row.factory(**statics, **values)

    return Case(row.name, make, hyper, -1.0 if row.options.get("maximize") else 1.0)


def _injected(lr: Any, b1: Any, b2: Any) -> idf.GradientTransformation:
    """The hyper-parameters are learned where they are kept."""
    init, update = optim.inject_hyperparams(idf.adam)(lr=1.0, betas=(0.0, 0.0))

    def init_with(params: Any) -> Any:
        return init(params)._replace(hyperparams={"lr": lr, "betas": (b1, b2)})

    return idf.GradientTransformation(init_with, update)


def _clipped(norm_type: float, inner: Callable[..., Any]) -> Callable[..., Any]:
    return lambda max_norm, lr: idf.chain(idf.clip_grad_norm(max_norm, norm_type), inner(lr))


_BODY = {"net": True, "b": False}

COMPOSED = [
    # All the way, or never: where the norm passes the bound there is no derivative.
    Case("clipped by norm 2", _clipped(2.0, idf.sgd), {"max_norm": 0.1, "lr": 0.3}),
    Case("clipped by norm 1", _clipped(1.0, idf.sgd), {"max_norm": 0.1, "lr": 0.3}),
    Case("clipped by norm 3", _clipped(3.0, functools.partial(idf.adam, eps=0.1)), {"max_norm": 0.1, "lr": 0.01}),
    Case("clipped by norm inf", _clipped(float("inf"), idf.sgd), {"max_norm": 0.1, "lr": 0.3}),
    Case("never clipped", _clipped(2.0, idf.adam), {"max_norm": 100.0, "lr": 0.01}),
    Case(
        "scheduled adam",
        lambda lr, alpha: idf.adam(schedule.cosine(lr, STEPS, alpha=alpha)),
        {"lr": 0.01, "alpha": 0.2},
    ),
    Case(
        "scheduled sgd",
        lambda lr, rate, momentum: idf.sgd(schedule.warmup(schedule.exponential(lr, rate), 3), momentum),
        {"lr": 0.05, "rate": 0.8, "momentum": 0.9},
    ),
    Case(
        "scheduled betas",
        lambda b1, b2: idf.adam(0.01, (schedule.linear(b1, b2, STEPS), b2)),
        {"b1": 0.5, "b2": 0.9},
    ),
    Case("injected", _injected, {"lr": 0.01, "b1": 0.8, "b2": 0.9}),
    Case("masked", lambda lr: optim.masked(idf.adam(lr), _BODY), {"lr": 0.01}),
    Case(
        "adamw of some",
        lambda lr, weight_decay: idf.adamw(lr, weight_decay=weight_decay, mask=_BODY),
        {"lr": 0.01, "weight_decay": 0.3},
    ),
    Case(
        "parts",
        lambda decay, b1, lr: idf.chain(
            optim.clip(10.0),
            optim.add_decayed_weights(decay, _BODY),
            optim.scale_by_radam((b1, 0.9)),
            optim.trace(0.5),
            optim.scale_by_schedule(schedule.polynomial(-lr, -0.1 * lr, 2, STEPS)),
        ),
        {"decay": 0.2, "b1": 0.8, "lr": 0.01},
    ),
]

CASES = [*map(_case_of, ROWS), *COMPOSED]
_SOME = {"sgd-momentum-nesterov", "adam-amsgrad", "adamw", "rmsprop-centered-weight_decay", "adadelta", "adagrad"}
_SOME |= {"adamax", "radam", "clipped by norm 2", "scheduled sgd", "injected"}

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
some_cases = pytest.mark.parametrize("case", [c for c in CASES if c.name in _SOME], ids=lambda case: case.name)
each_row_case = pytest.mark.parametrize("case", CASES[: len(ROWS)], ids=lambda case: case.name)


# --- differences ------------------------------------------------------------------------------------------------------


def direction(case: Case, learned: bool = True) -> Tensor:
    """Along all coordinates at once, on the scale of each: for what is near 1, that is how near."""
    scales = [1.0] * len(FIXED) + [min(x, 1 - x) if 0 < x < 1 else max(x, 0.1) for x in case.hyper.values()]
    v = torch.tensor(scales, dtype=F64) * (0.5 + _drawn(len(scales), seed=7).abs())
    return v if learned else v[: len(FIXED)]


def difference(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    def central(h: float) -> Tensor:
        return (f(x + h * v) - f(x - h * v)) / (2 * h)

    return (4 * central(H / 2) - central(H)) / 3


@functools.cache
def _expected(name: str, learned: bool, order: int) -> Tensor:
    case = next(case for case in CASES if case.name == name)
    theta = theta_of(case, learned)

    def plain(t: Tensor) -> Tensor:
        return run(case, t)

    return difference(plain if order == 1 else grad(plain), theta, direction(case, learned))


def assert_first(derivative: Tensor, case: Case, learned: bool = True) -> None:
    """The derivative is a gradient, or already one along the direction."""
    v = direction(case, learned)
    along = derivative @ v if derivative.ndim else derivative
    expected = _expected(case.name, learned, 1)
    assert expected.abs() > 1e-2
    assert (along - expected).abs() <= TOLERANCE * expected.abs().clamp(min=1.0)


def assert_second(derivative: Tensor, case: Case, learned: bool = True) -> None:
    """The derivative is that of a gradient along the direction. Its coordinates are compared on their scales."""
    expected, v = _expected(case.name, learned, 2), direction(case, learned)
    assert expected.norm() > 1e-2
    assert (v * (derivative - expected)).norm() <= TOLERANCE * (v * expected).norm()


def by_autograd(f: Callable[[Tensor], Tensor], theta: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient, and its derivative along v."""
    theta = theta.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(theta), theta, create_graph=True)
    (second,) = torch.autograd.grad(first @ v, theta)
    return first.detach(), second


# --- first and second derivatives -------------------------------------------------------------------------------------


@each_case
def test_gradients_of_everything_are_right(case):
    assert_first(grad(lambda t: run(case, t))(theta_of(case)), case)


@each_case
def test_derivatives_in_forward_mode_are_right(case):
    theta = theta_of(case)
    assert_first(jvp(lambda t: run(case, t, at_once=True), (theta,), (direction(case),))[1], case)


@each_case
def test_first_and_second_gradients_by_autograd_are_right(case):
    first, second = by_autograd(lambda t: run(case, t, at_once=True), theta_of(case), direction(case))
    assert_first(first, case)
    assert_second(second, case)


SECOND = {
    "jvp of grad": lambda f, t, v: jvp(grad(f), (t,), (v,))[1],
    "grad of jvp": lambda f, t, v: grad(lambda t: jvp(f, (t,), (v,))[1])(t),
    "grad of grad": lambda f, t, v: grad(lambda t: grad(f)(t) @ v)(t),
}


@pytest.mark.parametrize("way", SECOND)
@some_cases
def test_second_derivatives_are_right(case, way):
    theta = theta_of(case)
    assert_second(SECOND[way](lambda t: run(case, t), theta, direction(case)), case)


CHOICES = [None, False, pytest.param(True, marks=needs_cpu)]


# False computes as the learned numbers above do.
@pytest.mark.parametrize("accelerated", [CHOICES[0], CHOICES[2]])
@each_row_case
def test_derivatives_by_compiled_steps_are_right(case, accelerated):
    def f(theta: Tensor, at_once: bool = False) -> Tensor:
        return run(case, theta, at_once, use_accelerated_op=accelerated)

    first, second = by_autograd(f, FIXED, direction(case, learned=False))
    assert_first(first, case, learned=False)
    assert_second(second, case, learned=False)
    assert_first(grad(lambda t: f(t, at_once=True))(FIXED), case, learned=False)


@pytest.mark.parametrize("way", SECOND)
@needs_cpu
@pytest.mark.parametrize("case", [c for c in CASES[: len(ROWS)] if c.name in _SOME], ids=lambda case: case.name)
def test_second_derivatives_by_compiled_steps_are_right(case, way):
    def f(theta: Tensor) -> Tensor:
        return run(case, theta, at_once=True, use_accelerated_op=True)

    assert_second(SECOND[way](f, FIXED, direction(case, learned=False)), case, learned=False)


# --- several tasks ----------------------------------------------------------------------------------------------------

TASKS = torch.stack([Y, Y + 0.2, -Y])
LANES = {"rtol": 1e-11, "atol": 1e-13}

# A product of a batch of matrices rounds unlike that of one, and how depends on the processor. In a derivative by a
# rate b near 1, terms of order 1 / (1 - b) cancel to order 1: a second derivative multiplies rounding by 1 / (1 - b)
# for this, and by 10 to 250 for the coordinates that cancel. With b = 0.999 that is 1e-16 * 1e3 * 1e2 = 1e-11, all of
# the tolerance; with b = 0.9, a hundredth of it.
LARGEST_RATE = 0.9


@pytest.mark.parametrize("accelerated", [CHOICES[0], CHOICES[2]])
@each_row_case
def test_tasks_that_share_their_start_are_what_each_is_alone(case, accelerated):
    def task(shared: Tensor, y: Tensor) -> Tensor:
        return run(case, torch.cat([shared, y]), use_accelerated_op=accelerated)

    shared = FIXED[:4]
    alone = torch.stack([grad(task)(shared, y) for y in TASKS])
    torch.testing.assert_close(vmap(grad(task), (None, 0))(shared, TASKS), alone, **LANES)
    together = grad(lambda shared: vmap(task, (None, 0))(shared, TASKS).sum())(shared)
    torch.testing.assert_close(together, alone.sum(0), **LANES)


@some_cases
def test_what_is_learned_may_differ_from_task_to_task(case):
    theta = theta_of(case)
    lanes = torch.stack([theta, theta * 0.99])
    alone = torch.stack([grad(lambda t: run(case, t))(lane) for lane in lanes])
    torch.testing.assert_close(vmap(grad(lambda t: run(case, t)))(lanes), alone, **LANES)


@some_cases
def test_second_derivatives_of_several_tasks_are_those_of_each(case):
    theta, v = torch.cat([FIXED, theta_of(case)[8:].clamp(max=LARGEST_RATE)]), direction(case)

    def second(y: Tensor) -> Tensor:
        def f(t: Tensor) -> Tensor:
            return run(case, torch.cat([t[:4], y, t[8:]]))

        return jvp(grad(f), (theta,), (v,))[1]

    torch.testing.assert_close(vmap(second)(TASKS), torch.stack([second(y) for y in TASKS]), **LANES)


# --- gradients that are zero ------------------------------------------------------------------------------------------

# Two of the coordinates start at the minimum, and stay there.
CENTER = torch.tensor([0.5, -1.0, 2.0], dtype=F64)
AT_REST = CENTER + torch.tensor([0.0, 0.7, 0.0], dtype=F64)
EPS = 0.1

ZEROS = {
    "sgd": functools.partial(idf.sgd, 0.02, 0.9),
    "adam": functools.partial(idf.adam, 0.02, eps=EPS),
    "adam-amsgrad": functools.partial(idf.adam, 0.02, eps=EPS, amsgrad=True),
    "adamw": functools.partial(idf.adamw, 0.02, eps=EPS, weight_decay=0.0),
    "rmsprop": functools.partial(idf.rmsprop, 0.02, eps=EPS),
    "rmsprop-centered": functools.partial(idf.rmsprop, 0.02, eps=EPS, centered=True, momentum=0.9),
    "adagrad": functools.partial(idf.adagrad, 0.02, eps=EPS),
    "adadelta": functools.partial(idf.adadelta, 0.02, eps=EPS),
    "adamax": functools.partial(idf.adamax, 0.02, eps=EPS),
    "radam": functools.partial(idf.radam, 0.02, (0.5, 0.8), eps=EPS),
}
ROOTED = [name for name in ZEROS if name not in ("sgd", "adadelta", "adamax")]

# Steps like g / (|g| + eps) have one derivative at 0 and no second: central differences err by h, and the
# extrapolation that removes it by (h / eps)^2.
KINK_H = 1e-6
KINK_TOLERANCE = 1e-8


def kinked_difference(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    def central(h: float) -> Tensor:
        return (f(x + h * v) - f(x - h * v)) / (2 * h)

    return 2 * central(KINK_H / 2) - central(KINK_H)


def rested(pair: idf.GradientTransformation) -> Callable[[Tensor], Tensor]:
    def f(p: Tensor) -> Tensor:
        state = pair.init(p)
        for _ in range(8):
            updates, state = pair.update(2 * (p - CENTER), state, p)
            p = p + updates
        return p

    return f


def jacobian_by_autograd(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(f, x, create_graph=True).detach()


JACOBIANS = {
    "autograd": jacobian_by_autograd,
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
}


@pytest.mark.parametrize("way", JACOBIANS)
@pytest.mark.parametrize("accelerated", CHOICES)
@pytest.mark.parametrize(("name", "eps_root"), [(n, 0.0) for n in ZEROS] + [(n, 0.1) for n in ROOTED])
def test_derivatives_at_gradients_of_zero_are_right(name, eps_root, accelerated, way):
    pair = ZEROS[name](use_accelerated_op=accelerated, **({"eps_root": eps_root} if eps_root else {}))
    f = rested(pair)
    jacobian = JACOBIANS[way](f, AT_REST)
    expected = torch.stack([kinked_difference(f, AT_REST, e) for e in torch.eye(3, dtype=F64)], dim=1)
    torch.testing.assert_close(jacobian, expected, rtol=0, atol=KINK_TOLERANCE * float(expected.abs().max()))


# The first steps of RAdam have no denominator.
@pytest.mark.parametrize("name", [name for name in ROOTED if name != "radam"])
def test_the_first_step_from_a_gradient_of_zero_has_the_derivative_one_over_eps(name):
    init, update = ZEROS[name]()
    g, p = torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)
    slope = torch.func.jacrev(lambda g: update(g, init(p), p)[0])(g)
    torch.testing.assert_close(slope, torch.full((1, 1), -0.02 / EPS, dtype=F64), rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", ROOTED)
def test_second_derivatives_at_gradients_of_zero_exist_with_eps_root(name):
    f = rested(ZEROS[name](eps_root=0.1))
    v = torch.tensor([0.3, -0.7, 1.1], dtype=F64)

    def total(p: Tensor) -> Tensor:
        return (f(p) ** 3).sum()

    expected = difference(grad(total), AT_REST, v)
    for way in SECOND.values():
        assert (way(total, AT_REST, v) - expected).norm() <= TOLERANCE * expected.norm()


@pytest.mark.parametrize("name", ZEROS)
def test_derivatives_with_a_tiny_eps_are_finite_at_gradients_of_zero(name):
    options = {} if name == "sgd" else {"eps": 1e-8}
    f = rested(ZEROS[name](**options))
    assert torch.func.jacrev(f)(AT_REST).isfinite().all()
    assert torch.func.jacfwd(f)(AT_REST).isfinite().all()
    assert grad(lambda p: grad(lambda p: f(p).sum())(p).sum())(AT_REST).isfinite().all()


@pytest.mark.parametrize("b2", [1 / 3, 0.6])
def test_radam_is_differentiable_where_its_rectification_has_a_pole(b2):
    def loss(b2: Tensor) -> Tensor:
        return (rested(idf.radam(0.1, (0.9, b2)))(AT_REST) ** 2).sum()

    # Too short a memory ever to adapt: the second moment is not used.
    assert grad(loss)(torch.tensor(b2, dtype=F64)) == 0
    assert jvp(loss, (torch.tensor(b2, dtype=F64),), (torch.tensor(1.0, dtype=F64),))[1] == 0
