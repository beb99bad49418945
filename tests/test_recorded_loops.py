"""Compiled loops against eager ones: solutions, statuses, numbers of iterations, derivatives, and operations."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from checks.compiled import needs_cpu
from tables.solvers import SEARCHES, THETA, Row
from torch import Tensor
from torch.func import hessian, jacfwd, jacrev, vmap
from torch.utils.checkpoint import checkpoint

import implicitdiff.solvers as solvers
from implicitdiff.errors import CompileError
from implicitdiff.solvers._loop.compiled import CompiledLoop
from implicitdiff.solvers._loop.recordings import Recording, kept
from implicitdiff.solvers._loop.termination import Verdict

pytestmark = needs_cpu
F64 = torch.float64
NAN, INF = float("nan"), float("inf")
ROWS = {row.name: row for row in SEARCHES}
NOT_COMPILED = {
    "scipy_root": "dtype torch.uint8",
    "scipy_minimize": "dtype torch.uint8",
    "scipy_least_squares": "dtype torch.uint8",
}
"""The rows whose loop cannot be compiled, with a part of the reason."""
COMPILED = [name for name in ROWS if name not in NOT_COMPILED]


@pytest.fixture(autouse=True)
def no_recordings():
    kept.clear()
    yield
    kept.clear()


def solved(row: Row, theta: Tensor, compile: str, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    solver = row.solver(compile=compile, on_failure="ignore", **options)

    def one(theta):
        x, state = solver.run(row.family.start(theta), theta)
        return x, state.status, state.iter_num

    result: tuple[Tensor, Tensor, Tensor] = (vmap(one) if theta.dim() > 1 else one)(theta)
    return result


def batch(row: Row, lanes: int) -> Tensor:
    """Problems of different length; in two lanes there is no solution, or none that is near."""
    theta = THETA * torch.linspace(0.2, 1.2, lanes, dtype=F64)[:, None]
    if lanes > 2 and row.name != "bisection":
        theta[1] = NAN
        theta[2] = 10 * THETA
    return theta


def assert_same(result: Any, expected: Any, rtol: float = 1e-8) -> None:
    for a, b in zip(result, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.allclose(a, b, rtol=rtol, atol=rtol, equal_nan=True), (a, b)


# --- the solvers' table -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NOT_COMPILED)
def test_the_reason_is_named(name):
    row = ROWS[name]
    with pytest.raises(CompileError, match=NOT_COMPILED[name]):
        solved(row, THETA, "always")
    for _ in range(2):
        assert_same(solved(row, THETA, "auto"), solved(row, THETA, "off"))


@pytest.mark.parametrize("lanes", [1, 3, 9])
@pytest.mark.parametrize("name", COMPILED)
def test_every_lane_ends_as_in_the_eager_loop(name, lanes):
    row = ROWS[name]
    theta = batch(row, lanes)
    # So few iterations that lanes spend their budget; a target that rounding does not reach at different times.
    for options in ({"maxiter": 6}, {"rtol": 1e-5, "atol": 1e-5, "check_every": 3, "maxiter": 300}):
        assert_same(solved(row, theta, "always", **options), solved(row, theta, "off", **options), 1e-6)


@pytest.mark.parametrize("name", COMPILED)
def test_a_hopeless_search_ends_as_in_the_eager_loop(name):
    row = ROWS[name]
    if row.family.hopeless is None:
        pytest.skip("the family has no such problem")
    hopeless = row.family.hopeless

    def ended(compile: str) -> tuple[Tensor, ...]:
        solver = row.solver(lambda x, theta: hopeless(x), compile=compile, on_failure="ignore", maxiter=30)
        state = solver.run(row.family.start(THETA), THETA)[1]
        return state.status, state.iter_num

    assert_same(ended("always"), ended("off"))


@pytest.mark.parametrize("name", COMPILED)
def test_a_kept_recording_gives_the_bits_of_a_new_one(name):
    row = ROWS[name]
    solved(row, THETA * 0.7, "always")
    again = solved(row, THETA, "always")
    kept.clear()
    solved(row, THETA, "always")
    for a, b in zip(again, solved(row, THETA, "always"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", COMPILED)
def test_derivatives_are_those_of_the_eager_search(name):
    row = ROWS[name]

    def derivatives(compile: str) -> tuple[Tensor, ...]:
        solver = row.solver(compile=compile)
        found = lambda theta: solver.run(row.family.start(theta), theta)[0]  # noqa: E731
        return jacrev(found)(THETA), vmap(jacfwd(found))(THETA * torch.linspace(0.5, 1, 5, dtype=F64)[:, None])

    for _ in range(2):
        assert_same(derivatives("always"), derivatives("off"))


# --- vmaps, threads, kinds of operands --------------------------------------------------------------------------------

A = 0.1 * torch.randn(3, 5, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
B = 0.1 * torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
ZEROS = torch.zeros(3, dtype=F64)


def image(x, a, b):
    return 0.3 * torch.cos(x) * b + a


def found(compile: str) -> Callable[..., Tensor]:
    solver = solvers.fixed_point_iteration(image, compile=compile, rtol=1e-12, atol=1e-12)
    return lambda a, b, x=ZEROS: solver.run(x, a, b)[0]


VMAPS: dict[str, Callable[[Callable[..., Tensor]], Any]] = {
    "in_dims": lambda f: vmap(f, in_dims=(1, 0))(A[0].T, B),
    "each by one vmap": lambda f: vmap(lambda a: vmap(lambda b: f(a, b))(B))(A[0]),
    "one by both": lambda f: vmap(vmap(f, in_dims=(0, None)), in_dims=(0, None))(A, B[0]),
    "one by both, the other by one": lambda f: vmap(vmap(f), in_dims=(0, None))(A, B),
    "the guess alone": lambda f: vmap(lambda x: f(A[0, 0], B[0], x))(B),
    "an expanded operand": lambda f: vmap(f)(A[0, :1].expand(5, 3), B.flip(0)),
    "the Hessian": lambda f: hessian(lambda a: f(a, B[0]).sin().sum())(A[0, 0]),
    "a third derivative": lambda f: jacrev(jacfwd(jacrev(lambda a: f(a, B[0]).sin().sum())))(A[0, 0]),
}


@pytest.mark.parametrize("name", VMAPS)
def test_transforms_of_a_compiled_search(name):
    for _ in range(2):
        assert_same([VMAPS[name](found("always"))], [VMAPS[name](found("off"))])


def test_threads_share_a_recording():
    points = [A[0] * (1 + k) for k in range(40)]
    expected = [vmap(found("off"))(a, B) for a in points]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda a: vmap(found("always"))(a, B), points))
    assert_same(results, expected)


TREES: dict[str, tuple[Callable[..., Any], Any]] = {
    "two dtypes": (
        lambda x: (0.3 * torch.cos(x[0]) * x[1].sum().double(), torch.sin(x[1]) * 0.3 + x[0][0].float()),
        (torch.rand(3, dtype=F64), torch.rand(2)),
    ),
    "no dimension": (lambda x: 0.3 * torch.cos(x), torch.tensor(0.5, dtype=F64)),
    "no entry in a leaf": (lambda x: {"a": 0.3 * torch.cos(x["a"]), "b": x["b"]}, {"a": ZEROS, "b": ZEROS[:0]}),
    "a view as a guess": (lambda x: 0.3 * torch.cos(x), A[:, 2, 1]),
}


@pytest.mark.parametrize("name", TREES)
def test_trees_of_unknowns(name):
    fn, x = TREES[name]
    options = {"maxiter": 9, "rtol": 0.0, "atol": 0.0, "on_failure": "ignore"}
    results = [
        torch.utils._pytree.tree_leaves(solvers.fixed_point_iteration(fn, compile=compile, **options).run(x)[0])
        for compile in ("off", "always", "always")
    ]
    assert_same(results[1], results[0], 1e-5)
    assert_same(results[2], results[1], 0.0)


# --- operations on numbers that no recording has seen -----------------------------------------------------------------

NUMBERS = torch.tensor(
    [
        [0.0, -0.0, 1.0, -1.0],
        [0.5, -0.5, 2.5, -2.5],
        [INF, -INF, NAN, 3.0],
        [7.3, -7.3, 1e-300, 1e300],
        [100.0, -100.0, 0.1, 1e-8],
    ],
    dtype=F64,
)


def filled(x: Tensor) -> Tensor:
    y = x.clone()
    y[1:].mul_(2)
    y[0] = 7.0
    y[2:].add_(y[:2].clone(), alpha=3)
    return y


def turned(x: Tensor) -> Tensor:
    """Changes of shapes in place."""
    y = x.reshape(2, 2).clone()
    return y.t_().unsqueeze_(0).squeeze_(0).flatten() * 2


def as_scalar(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: fn(x).to(x.dtype).expand(4)


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "pow 2": lambda x: x**2,
    "pow 3": lambda x: x**3,
    "pow 0.5": lambda x: x**0.5,
    "pow -0.5": lambda x: x**-0.5,
    "pow -1": lambda x: x**-1,
    "rpow": lambda x: 2**x,
    "sign": torch.sign,
    "round": torch.round,
    "remainder": lambda x: torch.remainder(x, x.flip(0)),
    "remainder -2.5": lambda x: x % -2.5,
    "fmod": lambda x: torch.fmod(x, x.flip(0)),
    "floor_divide": lambda x: x // x.flip(0),
    "trunc_divide": lambda x: torch.div(x, x.flip(0), rounding_mode="trunc"),
    "atan2": lambda x: torch.atan2(x, x.flip(0)),
    "maximum": lambda x: torch.maximum(x, x.flip(0)),
    "fmin": lambda x: torch.fmin(x, x.flip(0)),
    "clamp": lambda x: x.clamp(-0.5, 1.0),
    "clamp, exchanged": lambda x: x.clamp(1.0, -0.5),
    "clamp at nan": lambda x: x.clamp(min=NAN),
    "where": lambda x: torch.where(x > 0, x, -1.0),
    "masked_fill": lambda x: x.masked_fill(x != x, 3.0),
    "nan_to_num": torch.nan_to_num,
    "nan_to_num, to numbers": lambda x: torch.nan_to_num(x, 0.5, 2.5, -3.5),
    "isposinf": lambda x: torch.isposinf(x).to(F64),
    "isneginf": lambda x: torch.isneginf(x).to(F64),
    "int": lambda x: x.clamp(-50, 50).nan_to_num().to(torch.int64).to(F64),
    "int remainder": lambda x: (x.clamp(-50, 50).nan_to_num().to(torch.int64) % 3).to(F64),
    "float32": lambda x: (x.float() * 0.1 + 1).to(F64),
    "bool": lambda x: x.bool().to(F64),
    "sum to int": as_scalar(lambda x: (x.clamp(-50, 50).nan_to_num() * 0.7).sum(dtype=torch.int64)),
    "prod": as_scalar(torch.prod),
    "mean": as_scalar(torch.mean),
    "amax": as_scalar(torch.amax),
    "argmax": as_scalar(torch.argmax),
    "argmin": as_scalar(torch.argmin),
    "norm": as_scalar(torch.linalg.vector_norm),
    "norm 1": as_scalar(lambda x: torch.linalg.vector_norm(x, 1)),
    "norm inf": as_scalar(lambda x: torch.linalg.vector_norm(x, INF)),
    "softmax": lambda x: torch.softmax(x, 0),
    "logsumexp": as_scalar(lambda x: torch.logsumexp(x, 0)),
    "softplus": torch.nn.functional.softplus,
    "gelu": torch.nn.functional.gelu,
    "logaddexp": lambda x: torch.logaddexp(x, x.flip(0)),
    "in place": filled,
    "geometry in place": turned,
    "pow_": lambda x: x.clone().pow_(2),
    "copy_": lambda x: torch.zeros_like(x).copy_(x.flip(0)),
    "roll": lambda x: x.roll(1),
    "index": lambda x: x[torch.tensor([2, 0, 0, 3])],
    "pad": lambda x: torch.nn.functional.pad(x, (2, -2), value=0.5),
    "einsum": lambda x: torch.einsum("i,j->ij", x, x).diagonal() * 1.0,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_on_special_numbers(name):
    """One step of ``x <- f(x)`` is recorded at ordinary numbers, and runs at others."""
    fn = OPERATIONS[name]

    def step(compile: str, x: Tensor) -> Tensor:
        solver = solvers.fixed_point_iteration(fn, compile=compile, maxiter=1, on_failure="ignore")
        result: Tensor = vmap(lambda x: solver.run(x)[0])(x)
        return result

    for _ in range(2):
        step("always", torch.linspace(0.3, 0.9, 20, dtype=F64).reshape(5, 4))
    # The judgement of an ordinary step may differ in its last digits, and is then eager.
    (made,) = kept._recordings.values()
    assert isinstance(made, Recording) and made.step.starts, made
    result, expected = step("always", NUMBERS), step("off", NUMBERS)
    assert torch.allclose(result, expected, rtol=1e-12, atol=0, equal_nan=True), (result, expected)


# --- the first state --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [2, 12])
def test_a_wrong_bracket_of_one_lane_raises_in_a_recorded_search_too(lanes):
    solver = solvers.bisection(lambda x, c: x**3 - c, 0.0, 2.0, compile="always")
    x, c = torch.ones((), dtype=F64), torch.linspace(0.5, 7.5, lanes, dtype=F64)
    torch.testing.assert_close(vmap(lambda c: solver.run(x, c)[0])(c), c ** (1 / 3))
    (made,) = kept._recordings.values()
    assert made.step.starts and made.can_leave == {"start"}
    c[1] = 8.5
    with pytest.raises(ValueError, match="must have different signs"):
        vmap(lambda c: solver.run(x, c)[0])(c)


def test_a_judgement_that_differs_from_its_twin_stays_in_python(monkeypatch):
    judged = CompiledLoop.judged

    def wrong(*args):
        state, verdict = judged(*args)
        return state._replace(target=3 * state.target), verdict

    monkeypatch.setattr(CompiledLoop, "judged", wrong)
    x, (found, expected) = torch.ones(3, dtype=F64), (solvers.lbfgs(valley, compile=c) for c in ("always", "off"))
    for _ in range(2):
        torch.testing.assert_close(found.run(x)[1].target, expected.run(x)[1].target, rtol=1e-5, atol=0.0)
        (made,) = kept._recordings.values()
        assert made.is_checked and not made.step.judges


def test_a_step_is_compared_in_a_search_that_makes_one():
    """A step from a solution is rounding, and so differs from its twin."""
    matrix = 0.1 * torch.randn(10, 10, generator=torch.Generator().manual_seed(0), dtype=F64)
    solver = solvers.newton(lambda x: x - torch.tanh(matrix @ x + 0.5))
    x, _ = solver.run(torch.ones(10, dtype=F64))
    kept.clear()
    for guess, is_stepped in ((x, False), (x, False), (torch.ones_like(x), True), (x, True)):
        torch.testing.assert_close(solver.run(guess)[0], x)
        (made,) = kept._recordings.values()
        assert made.is_stepped == is_stepped


# --- the last word ----------------------------------------------------------------------------------------------------


def claimed(monkeypatch, x: Tensor) -> None:
    """Let a recorded search claim a solution with an error of zero."""

    def wrong(loop):
        state = loop.start(loop.problem, x[None])
        target, error = torch.full_like(state.error, 1e-8), torch.zeros_like(state.error)
        claim = state._replace(target=target, error=error, status=torch.ones_like(state.status))
        return x[None], claim, Verdict.initial(claim)

    monkeypatch.setattr(CompiledLoop, "begun", wrong)


@pytest.mark.parametrize(("under", "count"), [(lambda f, t: f(t), 2), (partial(checkpoint, use_reentrant=False), 5)])
def test_a_differentiated_search_evaluates_its_function_twice(under, count):
    """At the guess and at the solution, where one evaluation measures the error and is kept for the derivative.

    A checkpoint repeats both, and keeps no evaluation for the derivative.
    """
    evaluations = []

    def counted(x, theta):
        evaluations.append(1)
        return quartic(x, theta)

    solver = solvers.lbfgs(counted, compile="always")
    for _ in range(3):
        evaluations.clear()
        theta = THETA.clone().requires_grad_()
        x = under(lambda t: solver.run(torch.zeros_like(THETA), t)[0], theta)
        (slope,) = torch.autograd.grad(x.sum(), theta)
    assert len(evaluations) == count
    torch.testing.assert_close(slope, 1 / (1 + 3 * x.detach() ** 2))


def test_a_wrong_recording_does_not_decide_where_the_derivative_is_taken(monkeypatch):
    solver, x0 = solvers.lbfgs(quartic, compile="always", on_failure="ignore"), torch.zeros_like(THETA)
    expected, _ = solver.run(x0, THETA)
    claimed(monkeypatch, expected + 0.1)
    theta = THETA.clone().requires_grad_()
    x, _ = solver.run(x0, theta)
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)
    (slope,) = torch.autograd.grad(x.sum(), theta)
    torch.testing.assert_close(slope, 1 / (1 + 3 * expected**2), rtol=1e-6, atol=1e-8)


def test_a_solution_where_the_function_is_infinite_is_not_believed(monkeypatch):
    """Its gradient is zero there."""
    solver = solvers.lbfgs(lambda x, theta, c: quartic(x, theta) + c, compile="always", on_failure="ignore")
    theta, x0 = THETA.clone().requires_grad_(), torch.zeros_like(THETA)
    expected, _ = solver.run(x0, theta, torch.tensor(0.0, dtype=F64))
    claimed(monkeypatch, expected.detach())
    found, above = [], solvers._loop.row_search.unfinished
    monkeypatch.setattr(solvers._loop.row_search, "unfinished", lambda *args: found.append(above(*args)) or found[-1])
    for c in (0.0, INF):
        solver.run(x0, theta, torch.tensor(c, dtype=F64))
    assert found == [None, torch.tensor([True])]


def quartic(x, theta):
    return (x**4 / 4 + (x - theta) ** 2 / 2).sum()


def valley(x):
    return ((x - 0.3) ** 4).sum() + (x**2).sum()
