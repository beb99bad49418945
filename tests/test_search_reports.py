"""What is seen of a search while it runs and when it ends; and what is refused before it starts."""

from __future__ import annotations

import copy
import math
import pickle
import sys
import types
import warnings
from typing import Any

import pytest
import torch
from tables.solvers import SEARCHES, THETA, Row
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._pytree import tree_leaves

import implicitdiff.solvers as solvers
from implicitdiff.errors import ConvergenceError, ConvergenceWarning, lanes_in_words
from implicitdiff.solvers import Status, anderson, fixed_point_iteration

F64 = torch.float64
every_solver = pytest.mark.parametrize("row", SEARCHES, ids=str)
both_ways = pytest.mark.parametrize("implicit_diff", [True, False], ids=["implicit", "unrolled"])


def halve(x: Tensor, theta: Tensor) -> Tensor:
    return x / 2 + theta


# 2 - 2^(1 - k) after k iterations, where the error is 2^-k.
START, ONE = torch.tensor(0.0, dtype=F64), torch.tensor(1.0, dtype=F64)
SIX = {"rtol": 0.0, "atol": 2.0**-6}


# --- the callback -----------------------------------------------------------------------------------------------------


@both_ways
def test_a_callback_sees_every_iterate_the_first_and_the_last_among_them(implicit_diff: bool) -> None:
    seen: list[Any] = []
    solver = fixed_point_iteration(halve, **SIX)
    x, state = solver.run(START, ONE, implicit_diff=implicit_diff, callback=lambda *now: seen.append(now))
    assert [i for i, _, _ in seen] == list(range(7))
    assert [float(x) for _, x, _ in seen] == [2 - 2.0 ** (1 - k) for k in range(7)]
    assert [float(s.error) for _, _, s in seen] == [2.0**-k for k in range(7)]
    assert type(seen[0][2]) is type(state) and torch.equal(seen[-1][1], x)
    assert [int(s.status) for _, _, s in seen] == [Status.RUNNING] * 6 + [Status.CONVERGED]


@both_ways
def test_a_callback_sees_plain_tensors_with_the_lanes_in_front(implicit_diff: bool) -> None:
    seen: list[Any] = []
    solver = fixed_point_iteration(lambda x, theta: {"a": x["a"] / 2 + theta}, **SIX)

    def run(start: Tensor, theta: Tensor) -> Tensor:
        how = {"implicit_diff": implicit_diff, "callback": lambda *now: seen.append(now)}
        return solver.run({"a": start + torch.zeros(5, dtype=F64)}, theta, **how)[0]["a"].sum()

    theta = torch.tensor([0.0, 1e-3, 1.0], dtype=F64)
    vmap(grad(run, argnums=1), in_dims=(None, 0))(START, theta)
    iterations = [i for i, _, _ in seen]
    assert iterations == list(range(len(seen))) and len(seen) > 6
    for i, x, state in seen:
        assert x["a"].shape == (3, 5) or (i == 0 and not implicit_diff)  # nothing has met theta yet
        assert state.error.shape == (3,)
        for t in tree_leaves((x, state)):
            assert not t.requires_grad
            t.numpy()
    assert seen[-1][2].iter_num.tolist()[0] == 0


def test_a_callback_sees_one_dimension_for_every_vmap() -> None:
    shapes: list[Any] = []
    solver = fixed_point_iteration(halve, **SIX)
    theta = torch.ones(2, 3, dtype=F64)
    for how in (True, False):
        run = vmap(
            vmap(
                lambda theta, how=how: solver.run(
                    START, theta, implicit_diff=how, callback=lambda i, x, s: shapes.append((x.shape, s.error.shape))
                )
            )
        )
        run(theta)
    assert set(shapes) >= {((2, 3), (2, 3))}
    # Before the first unrolled step nothing has met theta.
    assert set(shapes) <= {((2, 3), (2, 3)), ((), (2, 3))}


def test_a_callback_is_called_whenever_the_test_is() -> None:
    seen: list[int] = []
    solver = fixed_point_iteration(halve, check_every=4, **SIX)
    solver.run(START, ONE, callback=lambda i, x, state: seen.append(i))
    assert seen == [0, 4, 6]


def test_a_callback_that_raises_stops_the_search() -> None:
    class Enough(Exception):
        pass

    def stop(i: int, x: Tensor, state: Any) -> None:
        if i == 2:
            raise Enough

    with pytest.raises(Enough):
        fixed_point_iteration(halve).run(START, ONE, callback=stop)
    # Nothing is left behind.
    assert float(grad(lambda theta: fixed_point_iteration(halve).run(START, theta)[0])(ONE)) == 2.0


def test_a_callback_that_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match=r"fixed_point_iteration\(halve\): callback must be a function of"):
        fixed_point_iteration(halve).run(START, ONE, callback=3)


# --- the history ------------------------------------------------------------------------------------------------------


@both_ways
def test_the_history_holds_the_error_of_every_iterate(implicit_diff: bool) -> None:
    solver = fixed_point_iteration(halve, **SIX)
    state = solver.run(START, ONE, implicit_diff=implicit_diff, keep_history=True)[1]
    assert state.history.tolist() == [2.0**-k for k in range(7)]
    assert solver.run(START, ONE, implicit_diff=implicit_diff)[1].history.shape == (0,)


def test_the_history_is_complete_however_seldom_the_test_is_made() -> None:
    solver = fixed_point_iteration(halve, check_every=5, **SIX)
    assert solver.run(START, ONE, keep_history=True)[1].history.tolist() == [2.0**-k for k in range(7)]


@both_ways
def test_the_history_of_a_lane_stands_still_when_it_has_stopped(implicit_diff: bool) -> None:
    solver = fixed_point_iteration(halve, **SIX)
    theta = torch.tensor([1.0, 2.0**-3, 0.0], dtype=F64)
    state = vmap(lambda t: solver.run(START, t, implicit_diff=implicit_diff, keep_history=True)[1])(theta)
    assert state.history.shape == (3, 7) and state.iter_num.tolist() == [6, 3, 0]
    assert state.history[1].tolist() == [2.0**-3, 2.0**-4, 2.0**-5, *[2.0**-6] * 4]
    assert state.history[2].tolist() == [0.0] * 7


@pytest.mark.parametrize("row", [row for row in SEARCHES if row.unrolls], ids=str)
def test_the_history_ends_with_the_error_of_the_state(row: Row) -> None:
    state = row.solver().run(row.family.start(THETA), THETA, keep_history=True)[1]
    assert state.history.shape == (int(state.iter_num) + 1,)
    assert state.history[-1] == state.error <= state.target < state.history[0]


# --- the progress bar -------------------------------------------------------------------------------------------------


class Bar:
    """What tqdm is used for."""

    made: list[Bar] = []  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        self.options, self.n, self.closed, self.shown = options, 0, False, {}
        Bar.made.append(self)

    def set_postfix(self, **shown: Any) -> None:
        self.shown = shown

    def update(self, n: int) -> None:
        self.n += n

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Bar]:
    module = types.ModuleType("tqdm.auto")
    module.tqdm = Bar  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tqdm", types.ModuleType("tqdm"))
    monkeypatch.setitem(sys.modules, "tqdm.auto", module)
    monkeypatch.setattr(Bar, "made", [])
    return Bar.made


@both_ways
def test_verbose_shows_a_bar_that_ends_where_the_search_does(bars: list[Bar], implicit_diff: bool) -> None:
    solver = fixed_point_iteration(halve, maxiter=50, **SIX)
    theta = torch.tensor([1.0, 0.5], dtype=F64)
    vmap(lambda t: solver.run(START, t, implicit_diff=implicit_diff, verbose=True)[0])(theta)
    (bar,) = bars
    assert bar.n == 6 and bar.closed
    assert bar.options["total"] == 50 and bar.options["desc"] == "fixed_point_iteration(halve)"
    assert bar.shown["error"] == "1.6e-02"


def test_a_bar_is_closed_when_the_search_fails(bars: list[Bar]) -> None:
    with pytest.raises(ZeroDivisionError):
        fixed_point_iteration(halve).run(START, ONE, verbose=True, callback=lambda *_: 1 / 0)
    assert bars[0].closed


def test_nothing_is_imported_or_shown_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    fixed_point_iteration(halve).run(START, ONE)
    with pytest.raises(ImportError, match="pip install tqdm"):
        fixed_point_iteration(halve).run(START, ONE, verbose=True)


# --- the errors -------------------------------------------------------------------------------------------------------


def test_the_error_tells_who_why_when_and_how_far() -> None:
    solver = fixed_point_iteration(lambda x, theta: theta * x + 1, rtol=0.0, atol=1e-3)
    theta = torch.tensor([0.5, 1e200, 0.25, 1e200], dtype=F64)
    with pytest.raises(ConvergenceError) as caught:
        vmap(lambda theta: solver.run(ONE, theta))(theta)
    error = caught.value
    assert error.solver.startswith("fixed_point_iteration(") and "<lambda>" in error.solver
    assert error.status == Status.DIVERGED and isinstance(error.status, Status)
    assert error.lanes == (1, 3) and error.total == 4
    assert error.target == 1e-3 and not error.error <= 1e300
    assert error.iterations == 1
    assert str(error).startswith(error.solver)


def test_errors_survive_pickling_and_copying() -> None:
    with pytest.raises(ConvergenceError) as caught:
        fixed_point_iteration(lambda x: x * 1e300).run(ONE)
    for again in (pickle.loads(pickle.dumps(caught.value)), copy.copy(caught.value)):
        assert type(again) is ConvergenceError and str(again) == str(caught.value)
        for name in ("solver", "status", "iterations", "target", "lanes", "total"):
            assert getattr(again, name) == getattr(caught.value, name)


@both_ways
def test_the_unrolled_search_fails_as_the_other_does(implicit_diff: bool) -> None:
    theta = torch.tensor([0.5, 1e200], dtype=F64)

    def solve(**options: Any) -> Any:
        solver = fixed_point_iteration(lambda x, theta: theta * x + 1, **options)
        return vmap(lambda theta: solver.run(ONE, theta, implicit_diff=implicit_diff)[1].status)(theta)

    with pytest.raises(ConvergenceError, match="lanes 1: 1 of 2") as caught:
        solve()
    assert caught.value.lanes == (1,)
    with pytest.warns(ConvergenceWarning, match="lanes 1: 1 of 2"):
        solve(on_failure="warn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert solve(on_failure="ignore").tolist() == [Status.CONVERGED, Status.DIVERGED]


def test_the_warning_points_at_the_caller() -> None:
    with pytest.warns(ConvergenceWarning) as caught:
        fixed_point_iteration(lambda x: x * 1e300, on_failure="warn").run(ONE)
    assert caught[0].filename == __file__


# --- what is refused --------------------------------------------------------------------------------------------------

BAD_OPTIONS = [
    ({"rtol": -1e-3}, ValueError, "rtol must be a finite number >= 0 or None, got -0.001"),
    ({"rtol": "small"}, ValueError, "rtol must be"),
    ({"rtol": float("nan")}, ValueError, "rtol must be"),
    ({"atol": -1}, ValueError, "atol must be a finite number >= 0 or None, got -1"),
    ({"atol": True}, ValueError, "atol must be"),
    ({"maxiter": 0}, ValueError, "maxiter must be an integer >= 1 or None, got 0"),
    ({"maxiter": 2.5}, ValueError, "maxiter must be"),
    ({"maxiter": True}, ValueError, "maxiter must be"),
    ({"check_every": 0}, ValueError, "check_every must be an integer >= 1, got 0"),
    ({"check_every": None}, ValueError, "check_every must be"),
    ({"solve": "cg"}, TypeError, "solve must be a function solve"),
    ({"on_failure": "shout"}, ValueError, 'on_failure must be "raise", "warn" or "ignore", got'),
    ({"tol": 1e-3}, TypeError, "tol"),
]


@pytest.mark.parametrize(
    ("options", "kind", "message"), BAD_OPTIONS, ids=lambda v: str(v) if isinstance(v, dict) else ""
)
@every_solver
def test_bad_options_are_refused_by_name_when_the_solver_is_made(
    row: Row, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        row.solver(**options)
    assert row.name.split(",")[0] in str(caught.value)


@every_solver
def test_what_is_no_function_is_refused_when_the_solver_is_made(row: Row) -> None:
    for i in range(len(row.family.functions)):
        functions = [*row.family.functions]
        functions[i] = torch.zeros(3)
        with pytest.raises(TypeError, match=f"{row.name.split(',')[0]}.*function"):
            row.factory(*functions)


def test_checkpoints_of_an_implicit_derivative_are_refused() -> None:
    with pytest.raises(ValueError, match="checkpoint_every needs implicit_diff=False"):
        fixed_point_iteration(halve).run(START, ONE, checkpoint_every=3)


def test_checkpoints_must_be_positive() -> None:
    for every in (0, -1):
        with pytest.raises(ValueError, match="checkpoint_every"):
            fixed_point_iteration(halve).run(START, ONE, implicit_diff=False, checkpoint_every=every)


def test_misspelt_words_of_run_are_refused() -> None:
    with pytest.raises(TypeError, match="implicit_dif"):
        fixed_point_iteration(halve).run(START, ONE, implicit_dif=False)


BAD_GUESSES = [
    (1.0, "the initial guess holds no tensor"),
    (None, "the initial guess holds no tensor"),
    (torch.tensor([1, 2]), "dtype torch.int64"),
    ({"a": torch.zeros(2), "b": torch.tensor([True])}, "dtype torch.bool"),
]


@pytest.mark.parametrize(("guess", "message"), BAD_GUESSES, ids=["number", "None", "integers", "booleans"])
def test_a_guess_without_real_or_complex_tensors_is_refused(guess: Any, message: str) -> None:
    solver = fixed_point_iteration(lambda x: x)
    for start in (solver.run, solver.init, lambda x: solver.run(x, implicit_diff=False)):
        with pytest.raises(TypeError, match=message):
            start(guess)


def test_a_result_that_is_not_like_the_unknowns_is_refused_and_both_are_shown() -> None:
    x = {"a": torch.zeros(2), "b": torch.zeros(())}
    results = {
        "list": lambda x: [x["a"], x["b"]],
        "shape": lambda x: {"a": x["a"][:1], "b": x["b"]},
        "dtype": lambda x: {"a": x["a"].double(), "b": x["b"]},
        "key": lambda x: {"a": x["a"], "c": x["b"]},
        "number": lambda x: {"a": x["a"], "b": 1.0},
        "None": lambda x: None,
    }
    for make in (fixed_point_iteration, solvers.broyden_root, solvers.newton):
        for fn in results.values():
            solver = make(fn)
            for start in (solver.run, solver.init, lambda x, solver=solver: solver.run(x, implicit_diff=False)):
                with pytest.raises((TypeError, ValueError), match="<lambda>'s result"):
                    start(x)


@pytest.mark.parametrize("value", [torch.zeros(1), torch.zeros(2, 2), torch.tensor(1), 1.0, None], ids=str)
def test_an_objective_that_is_not_one_real_number_is_refused(value: Any) -> None:
    solver = solvers.gradient_descent(
        lambda x: value if not isinstance(value, Tensor) else value + 0 * x.sum().to(value)
    )
    for start in (solver.run, solver.init):
        with pytest.raises((TypeError, ValueError), match=r"must return one real number.*shape \(\)"):
            start(torch.ones(2))


def test_a_complex_objective_is_refused() -> None:
    with pytest.raises(ValueError, match="must return one real number"):
        solvers.gradient_descent(lambda x: (x**2).sum()).run(torch.ones(2, dtype=torch.complex64))


def test_a_projection_of_another_shape_is_refused() -> None:
    solver = solvers.projected_gradient(lambda x: (x**2).sum(), lambda v: v[:1])
    with pytest.raises((TypeError, ValueError), match="<lambda>'s result"):
        solver.run(torch.ones(2))


def test_functions_that_change_what_they_are_given_are_refused() -> None:
    kept = torch.zeros(2)
    functions = [lambda x: x.mul_(0.5), lambda x: (kept.add_(1.0), x / 2)[1]]
    for fn in functions:
        with pytest.raises(ValueError, match="in place"):
            anderson(fn).run(torch.ones(2))


@pytest.mark.parametrize("maker", [anderson, fixed_point_iteration])
def test_an_unrolled_search_runs_outside_of_autocast(maker) -> None:
    seen = []

    def image(z, t):
        seen.append(torch.is_autocast_enabled("cpu"))
        return 0.5 * torch.tanh(z + t)

    t = torch.tensor([0.4, 0.9, -0.3])
    plain, _ = maker(image).run(torch.zeros(3), t, implicit_diff=False)
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = maker(image).run(torch.zeros(3), t, implicit_diff=False)
    assert not any(seen) and torch.equal(plain, cast)


def test_errors_with_a_target_of_zero_are_joined_in_that_of_the_largest_error() -> None:
    def failed(lane: int, error: float) -> ConvergenceError:
        message = f"newton: {lanes_in_words([lane], 3)}"
        why = Status.BUDGET_SPENT
        return ConvergenceError(
            message, solver="newton", status=why, iterations=9, error=error, target=0.0, lanes=(lane,), total=3
        )

    joined = ConvergenceError.of_all([failed(0, 1e-3), failed(1, math.nan), failed(2, 1.0)])
    assert joined.lanes == (0, 1, 2) and math.isnan(joined.error)
    assert ConvergenceError.of_all([failed(0, 1e-3), failed(2, 1.0)]).error == 1.0
