"""Searches by SciPy that fail, and arguments that are refused."""

from __future__ import annotations

import traceback
import warnings

import pytest
import scipy.optimize
import torch
from tables.scipy_methods import F64, LEAST_SQUARES, MINIMIZE, ROOT, enzyme, rosenbrock, tensor
from torch.func import vmap

from implicitdiff.errors import ConvergenceError, ConvergenceWarning
from implicitdiff.solvers import Status
from implicitdiff.solvers.scipy_least_squares import scipy_least_squares
from implicitdiff.solvers.scipy_minimize import scipy_minimize
from implicitdiff.solvers.scipy_root import scipy_root

# --- failures -------------------------------------------------------------------------------------------------------


def no_root(x, shift=1.0):
    return x**2 + shift


@pytest.mark.parametrize("method", ["hybr", "lm"])
def test_a_search_that_cannot_go_on_says_so(method):
    with pytest.raises(ConvergenceError, match="LINE_SEARCH_FAILED") as caught:
        scipy_root(no_root, method).run(tensor([0.5, 0.3]))
    assert caught.value.status == Status.LINE_SEARCH_FAILED
    assert caught.value.iterations > 0


def test_a_net_that_is_met_is_a_failure_and_a_budget_is_not():
    with pytest.raises(ConvergenceError, match="BUDGET_SPENT"):
        scipy_root(no_root, "df-sane").run(tensor([0.5, 0.3]))
    x, state = scipy_minimize(rosenbrock, maxiter=3).run(tensor(-1.2, 1.0))
    assert state.status == Status.BUDGET_SPENT
    assert state.iter_num == 3
    assert rosenbrock(x) < rosenbrock(tensor(-1.2, 1.0))


@pytest.mark.parametrize("method", [*ROOT, *MINIMIZE, *LEAST_SQUARES])
def test_every_method_keeps_to_its_budget(method):
    def residuals(x):
        return torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])

    factory = scipy_root if method in ROOT else scipy_minimize if method in MINIMIZE else scipy_least_squares
    fn = rosenbrock if factory is scipy_minimize else residuals
    _, state = factory(fn, method, maxiter=5).run(tensor(-1.2, 1.0))
    assert state.status == Status.BUDGET_SPENT
    # SciPy may count the evaluations with which it checks its arguments.
    assert 5 <= state.iter_num <= 8


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_divergence(value):
    for solver, start in (
        (scipy_root(lambda x: torch.where(x > 0, value, x - 1)), tensor([-0.5])),
        (scipy_minimize(lambda x: torch.where(x > 0, value, (x - 1) ** 2).sum(), "trust-exact"), tensor([0.5])),
        (scipy_least_squares(lambda x: torch.where(x > 0, value, x - 1)), tensor([0.5])),
    ):
        with pytest.raises(ConvergenceError) as caught:
            solver.run(start)
        assert caught.value.status in (Status.DIVERGED, Status.LINE_SEARCH_FAILED)


def test_a_constant_infinite_value_is_no_minimum_though_its_gradient_is_zero():
    _, state = scipy_minimize(lambda x: torch.where(x[0] > 0.5, torch.inf, x[0] ** 2), on_failure="ignore").run(
        tensor([1.0])
    )
    assert state.status == Status.DIVERGED


def test_an_objective_without_a_lower_bound_diverges():
    with pytest.raises(ConvergenceError, match="DIVERGED"):
        scipy_minimize(lambda x: -torch.exp(x).sum()).run(tensor(1.0, 1.0))


@pytest.mark.parametrize(
    ("solver", "start"),
    [
        (scipy_root(lambda x: 0 * x + 1, "krylov", on_failure="ignore"), tensor(1.0, 1.0)),
        (scipy_minimize(lambda x: x.sum(), "trust-constr", on_failure="ignore"), tensor(1.0, 1.0)),
    ],
)
def test_a_search_that_scipy_breaks_off_with_an_exception_diverges(solver, start):
    _, state = solver.run(start)
    assert state.status == Status.DIVERGED


def test_in_a_batch_lanes_fail_alone():
    shifts = tensor(-4.0, 1.0, -9.0, 2.0)
    solver = scipy_root(no_root, on_failure="ignore")
    x, state = vmap(solver.run)(torch.full((4, 1), 1.5, dtype=F64), shifts)
    failed = int(Status.LINE_SEARCH_FAILED)
    assert state.status.tolist() == [1, failed, 1, failed]
    assert (x[[0, 2], 0] - tensor(2.0, 3.0)).abs().max() < 1e-10
    with pytest.raises(ConvergenceError, match="lanes 1, 3: 2 of 4") as caught:
        vmap(scipy_root(no_root).run)(torch.full((4, 1), 1.5, dtype=F64), shifts)
    assert caught.value.lanes == (1, 3) and caught.value.total == 4


def test_in_a_batch_each_lane_has_its_own_status():
    def objective(x, kind):
        unbounded = torch.where(kind == 1, -torch.exp(x).sum(), rosenbrock(x))
        return torch.where(kind == 0, (x**2).sum(), unbounded)

    def one(kind):
        return scipy_minimize(objective, on_failure="ignore", maxiter=5).run(tensor(2.0, 1.0), kind)[1].status

    statuses = vmap(one)(torch.arange(3))
    assert statuses.tolist() == [Status.CONVERGED, Status.DIVERGED, Status.BUDGET_SPENT]
    assert statuses.tolist() == [int(one(k)) for k in torch.arange(3)]


def test_a_failure_may_be_a_warning():
    with pytest.warns(ConvergenceWarning, match="scipy_root"):
        scipy_root(no_root, on_failure="warn").run(tensor([0.5]))


def test_a_failure_in_an_update_is_a_status():
    solver = scipy_root(no_root)
    start = tensor([0.5])
    _, state = solver.update(start, solver.init(start))
    assert state.status == Status.LINE_SEARCH_FAILED


class Oops(Exception):
    pass


@pytest.mark.parametrize("method", [*ROOT, *MINIMIZE, *LEAST_SQUARES])
def test_an_exception_of_the_users_function_comes_through_with_its_traceback(method):
    calls = []

    def breaks(x):
        calls.append(None)
        if len(calls) > 4:
            raise Oops("of the user")
        return rosenbrock(x) if method in MINIMIZE else torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])

    factory = scipy_root if method in ROOT else scipy_minimize if method in MINIMIZE else scipy_least_squares
    with pytest.raises(Oops, match="of the user") as caught:
        factory(breaks, method).run(tensor(-1.2, 1.0))
    assert "breaks" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]


def test_a_warning_of_the_users_function_comes_through():
    def warns(x):
        warnings.warn("of the user", RuntimeWarning, stacklevel=1)
        return rosenbrock(x)

    with pytest.warns(RuntimeWarning, match="of the user"):
        scipy_minimize(warns).run(tensor(2.0, 0.0))


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scipy_root(no_root, "newton"), "scipy_root: method must be one of hybr, .*, got 'newton'"),
        (lambda: scipy_minimize(rosenbrock, "sgd"), "scipy_minimize: method must be one of .*, got 'sgd'"),
        (lambda: scipy_least_squares(enzyme, "gn"), "scipy_least_squares: method must be one of trf, dogbox, lm"),
        (lambda: scipy_root(no_root, None), "method must be one of"),
        (lambda: scipy_minimize(rosenbrock, "BFGS", bounds=(0.0, 1.0)), "'BFGS' takes no bounds; use one of nelder"),
        (lambda: scipy_least_squares(enzyme, "lm", bounds=(0.0, 1.0)), 'method "lm" takes no bounds; use "trf"'),
        (lambda: scipy_minimize(rosenbrock, bounds=3.0), "bounds must be a pair"),
        (lambda: scipy_minimize(rosenbrock, bounds=(0.0, 1.0, 2.0)), "bounds must be a pair"),
        (lambda: scipy_minimize(rosenbrock, scipy_options={"maxiter": 3}), "'maxiter', got 3; give maxiter="),
        (lambda: scipy_root(no_root, scipy_options={"maxfev": 3}), "'maxfev', got 3; give maxiter="),
        (lambda: scipy_least_squares(enzyme, scipy_options={"loss": "huber"}), "'loss', got 'huber'"),
        (lambda: scipy_root(no_root, maxiter=0), "maxiter must be an integer >= 1"),
        (lambda: scipy_root(no_root, rtol=-1.0), "rtol must be a finite number >= 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_where_the_solver_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bounds_that_cross_or_do_not_fit_are_refused():
    for factory, fn in ((scipy_minimize, rosenbrock), (scipy_least_squares, enzyme)):
        with pytest.raises(ValueError, match="lower must be at most upper"):
            factory(fn, bounds=(tensor(0.0, 2.0), 1.0)).run(tensor(0.5, 0.5))
        with pytest.raises(ValueError, match="upper must be"):
            factory(fn, bounds=(0.0, torch.ones(3, dtype=F64))).run(tensor(0.5, 0.5))


def test_an_option_that_scipy_does_not_know_is_told():
    with pytest.warns(scipy.optimize.OptimizeWarning, match="Unknown solver options: nonsense"):
        scipy_minimize(rosenbrock, scipy_options={"nonsense": 1}).run(tensor(2.0, 0.0))
    with pytest.raises(TypeError, match="nonsense"):
        scipy_least_squares(enzyme, scipy_options={"nonsense": 1}).run(tensor(0.9, 0.2))


def test_what_is_no_function_is_refused():
    with pytest.raises(TypeError, match="scipy_root: fn must be a function, got int"):
        scipy_root(3)
