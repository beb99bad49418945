"""Every way in which a search can fail, alone and in a batch: what the state says, what is raised, and what is not
touched by the failure of another lane."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from checks.tensors import number
from problem_sets.hock_schittkowski import rosenbrock
from tables.solvers import MINIMISERS, factories, of_kind
from torch import Tensor
from torch.func import grad, vmap

import implicitdiff.solvers as solvers
from implicitdiff.errors import ConvergenceError, ConvergenceWarning
from implicitdiff.solvers import Solver, Status

F64 = torch.float64


class Failure(NamedTuple):
    """A way to fail: with `bad` as its argument, from `start`, while all goes well with `good`."""

    name: str
    make: Callable[..., Solver]
    status: Status
    bad: float
    good: float
    start: float = 1.0

    def __str__(self) -> str:
        return self.name


def rate(solver: Callable[..., Solver]) -> Callable[..., Solver]:
    """``x = theta x + 1``, a contraction for |theta| < 1, without solution for theta = 1."""
    return lambda **options: solver(lambda x, theta: theta * x + 1, **options)


def square(solver: Callable[..., Solver], **more: Any) -> Callable[..., Solver]:
    """``x^2 = theta``."""
    return lambda **options: solver(lambda x, theta: x**2 - theta, **more, **options)


def logarithm(solver: Callable[..., Solver]) -> Callable[..., Solver]:
    return lambda **options: solver(lambda x, theta: torch.log(x) - theta, **options)


def bowl(solver: Callable[..., Solver], *more: Any) -> Callable[..., Solver]:
    """Unbounded below for theta < 0."""
    return lambda **options: solver(lambda x, theta: theta * x**2 / 2 - x, *more, **options)


FAILURES = [
    Failure("the map expands", rate(solvers.fixed_point_iteration), Status.DIVERGED, bad=1e30, good=0.5),
    Failure("a value is not a number", rate(solvers.fixed_point_iteration), Status.DIVERGED, bad=math.nan, good=0.5),
    Failure("no fixed point", rate(solvers.fixed_point_iteration), Status.BUDGET_SPENT, bad=1.0, good=0.5),
    Failure("no fixed point, anderson", rate(solvers.anderson), Status.BUDGET_SPENT, bad=1.0, good=0.5),
    Failure("no fixed point, broyden", rate(solvers.broyden), Status.BUDGET_SPENT, bad=1.0, good=0.5),
    Failure("a rotation", lambda **o: solvers.fixed_point_iteration(lambda x, theta: theta - x, **o),
            Status.BUDGET_SPENT, bad=4.0, good=2.0),
    Failure("nan, anderson", rate(solvers.anderson), Status.DIVERGED, bad=math.nan, good=0.5),
    Failure("nan, broyden", rate(solvers.broyden), Status.DIVERGED, bad=math.nan, good=0.5),
    Failure("a singular Jacobian", square(solvers.newton), Status.DIVERGED, bad=1.0, good=0.0, start=0.0),
    Failure("outside of the domain", logarithm(solvers.newton), Status.DIVERGED, bad=-9.0, good=0.5),
    Failure("a singular Jacobian, chord", square(solvers.chord), Status.DIVERGED, bad=1.0, good=0.0, start=0.0),
    Failure("nan, newton", square(solvers.newton), Status.DIVERGED, bad=math.nan, good=2.0),
    Failure("nan, broyden_root", square(solvers.broyden_root), Status.DIVERGED, bad=math.nan, good=1.1),
    Failure("no root, newton", square(solvers.newton), Status.BUDGET_SPENT, bad=-3.0, good=2.0),
    Failure("a pole", lambda **o: solvers.bisection(lambda x, theta: (x - 0.3) ** theta, 0.0, 1.0, **o),
            Status.DIVERGED, bad=-1.0, good=1.0),
    Failure("a singular Jacobian, gauss_newton", square(solvers.gauss_newton), Status.DIVERGED, bad=math.nan, good=4.0),
    Failure("nan, levenberg_marquardt", square(solvers.levenberg_marquardt), Status.DIVERGED, bad=math.nan, good=4.0),
    Failure("nan, gradient_descent", bowl(solvers.gradient_descent), Status.DIVERGED, bad=math.nan, good=1.0),
    Failure("nan, projected_gradient", bowl(solvers.projected_gradient, lambda v: v.clamp(-3, 3)), Status.DIVERGED,
            bad=math.nan, good=1.0),
    Failure("the steps are too long",
            lambda **o: solvers.gradient_descent(
                lambda x, theta: theta * x**2 / 2, stepsize=1.0, acceleration=False, **o),
            Status.DIVERGED, bad=1e9, good=0.5),
]  # fmt: skip

every_failure = pytest.mark.parametrize("failure", FAILURES, ids=str)
# The safety net, without which a spent budget is no failure, is far.
every_failure_that_raises = pytest.mark.parametrize(
    "failure", [f for f in FAILURES if f.status is not Status.BUDGET_SPENT], ids=str
)


@every_failure_that_raises
def test_a_search_that_fails_raises_what_happened(failure: Failure) -> None:
    with pytest.raises(ConvergenceError) as caught:
        failure.make().run(number(failure.start), number(failure.bad))
    error = caught.value
    assert error.status == failure.status and error.lanes == (0,) and error.total == 1
    assert failure.status.name in str(error) and error.solver in str(error)


@every_failure
def test_on_request_it_says_so_in_the_status_alone(failure: Failure) -> None:
    solver = failure.make(maxiter=100, on_failure="ignore")
    for solve in (solver.run, vmap(solver.run)):
        state = solve(*(number(v) if solve == solver.run else number(v)[None] for v in (failure.start, failure.bad)))[1]
        assert state.status == failure.status
        assert not state.error <= state.target


@every_failure
def test_a_lane_that_fails_leaves_the_others_alone(failure: Failure) -> None:
    solver = failure.make(maxiter=100, on_failure="ignore")
    theta = torch.tensor([failure.good, failure.bad, failure.good], dtype=F64)
    x = torch.full((3,), failure.start, dtype=F64)
    found, state = vmap(solver.run)(x, theta)
    alone, state_alone = solver.run(x[0], theta[0])
    assert state.status.tolist() == [Status.CONVERGED, failure.status, Status.CONVERGED]
    assert found[0] == found[2] and state.iter_num[0] == state_alone.iter_num
    torch.testing.assert_close(found[0], alone, rtol=1e-12, atol=0.0)


@every_failure_that_raises
def test_a_batch_raises_and_names_the_lanes(failure: Failure) -> None:
    solver = failure.make()
    theta = torch.tensor([[failure.good, failure.bad, failure.good], [failure.bad] * 3], dtype=F64)
    x = torch.full((2, 3), failure.start, dtype=F64)
    with pytest.raises(ConvergenceError, match="lanes 1, 3, 4, 5: 4 of 6") as caught:
        vmap(vmap(solver.run))(x, theta)
    assert caught.value.lanes == (1, 3, 4, 5) and caught.value.total == 6 and caught.value.status == failure.status


@every_failure_that_raises
def test_a_failed_search_warns_if_asked_to(failure: Failure) -> None:
    with pytest.warns(ConvergenceWarning, match=failure.status.name):
        failure.make(on_failure="warn").run(number(failure.start), number(failure.bad))


# --- the budget -------------------------------------------------------------------------------------------------------


def half(x: Tensor, theta: Tensor) -> Tensor:
    return x / 2 + theta


def test_to_spend_an_integer_budget_is_no_failure() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x, state = solvers.fixed_point_iteration(half, maxiter=5).run(number(0.0), number(1.0))
    assert state.status == Status.BUDGET_SPENT and state.iter_num == 5
    assert x == 2 - 2 / 2**5 and state.error == 1 / 2**5


def test_to_converge_with_the_last_iteration_of_the_budget_is_to_converge() -> None:
    options = {"rtol": 0.0, "atol": 1 / 2**5}
    x, state = solvers.fixed_point_iteration(half, maxiter=5, **options).run(number(0.0), number(1.0))
    assert state.status == Status.CONVERGED and state.iter_num == 5
    assert solvers.fixed_point_iteration(half, maxiter=4, **options).run(x, number(1.0))[1].iter_num == 0


def test_to_meet_the_safety_net_is_a_failure() -> None:
    solver = solvers.newton(lambda x: x + torch.where(x > 0, 1.0, -1.0))
    with pytest.raises(
        ConvergenceError, match=r"BUDGET_SPENT after 1000 iterations; at the end error 2\.000e"
    ) as caught:
        solver.run(number(1.0))
    assert caught.value.iterations == 1000 and caught.value.error == 2.0


@pytest.mark.parametrize("every", [1, 3, 7, 100])
def test_no_more_iterations_are_made_than_the_budget_allows(every: int) -> None:
    _, state = solvers.fixed_point_iteration(lambda x: x + 1, maxiter=5, check_every=every).run(number(0.0))
    assert state.iter_num == 5 and state.status == Status.BUDGET_SPENT


def test_divergence_is_an_error_also_with_a_budget() -> None:
    with pytest.raises(ConvergenceError, match="DIVERGED"):
        solvers.fixed_point_iteration(lambda x: x * 1e200, maxiter=100).run(number(1.0))


@pytest.mark.parametrize(
    ("fn", "stepsize", "acceleration"),
    [
        (lambda x: torch.log(torch.cosh(x)), 2.5, False),  # between two points
        (lambda x: torch.log(torch.cosh(x)), 1.5, True),  # stable without acceleration
        (torch.cos, 3.0, False),  # without a period
        (torch.square, 1.001, False),  # slow growth
    ],
)
def test_a_step_size_that_is_too_large_is_answered_soon(fn: Any, stepsize: float, acceleration: bool) -> None:
    solver = solvers.gradient_descent(fn, stepsize=stepsize, acceleration=acceleration, on_failure="ignore")
    _, state = solver.run(number(1.0))
    assert state.status == Status.DIVERGED and state.iter_num < 3000


def test_a_budget_is_spent_with_a_step_size_that_is_too_large() -> None:
    """As where a search goes on at the level of rounding, whose steps look unstable."""
    solver = solvers.gradient_descent(torch.cos, stepsize=3.0, acceleration=False, maxiter=2000)
    assert solver.run(number(1.0))[1].status == Status.BUDGET_SPENT


def test_a_step_size_that_is_just_small_enough_converges() -> None:
    fn = lambda x: torch.log(torch.cosh(x))  # noqa: E731
    _, state = solvers.gradient_descent(fn, stepsize=1.99, acceleration=False).run(number(3.0))
    assert state.converged and state.iter_num > 2000


def test_the_derivative_of_a_spent_budget_is_that_of_the_condition_at_the_point_that_was_reached() -> None:
    solver = solvers.fixed_point_iteration(lambda x, theta: x / 2 + theta, maxiter=3)
    assert grad(lambda theta: solver.run(number(0.0), theta)[0])(number(1.0)) == 2


# --- brackets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lower", "upper"),
    [({"a": 0.0, "b": -9}, {"a": 10, "b": 9.0}), (-9, {"a": 10, "b": 9.0}), ({"a": number(0.0), "b": -9.0}, 11.0)],
)
def test_the_ends_of_brackets_may_be_trees_of_numbers(lower, upper) -> None:
    solver = solvers.bisection(lambda x, theta: {"a": x["a"] ** 3 - theta, "b": x["b"] + theta}, lower, upper)
    x, _ = vmap(lambda theta: solver.run(None, theta))(torch.tensor([8.0, 1.0]))
    torch.testing.assert_close(x["a"].float(), torch.tensor([2.0, 1.0]), rtol=1e-3, atol=0)
    torch.testing.assert_close(x["b"].float(), torch.tensor([-8.0, -1.0]), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("lower", "upper"), [({"a": 0.0}, {"b": 9.0}), (None, 3.0), ({"a": "low"}, 3.0)])
def test_brackets_without_a_middle_are_refused(lower, upper) -> None:
    with pytest.raises(ValueError, match="bisection: without an initial guess, lower and upper must be"):
        solvers.bisection(lambda x: x, lower, upper).run(None)


@pytest.mark.parametrize(("lower", "upper"), [(1.5, 3.0), (3.0, 1.5), (0.0, 1.0), (math.nan, 2.0)])
def test_a_bracket_without_a_change_of_sign_is_refused(lower: float, upper: float) -> None:
    solver = solvers.bisection(lambda x, theta: x**2 - theta, lower, upper)
    with pytest.raises(ValueError, match="bracket"):
        solver.run(None, number(2.0))


@pytest.mark.parametrize("guess", [0.5, 0.3, 2.0])
def test_a_bracket_with_a_root_at_both_ends_has_a_solution(guess: float) -> None:
    fn = lambda x, a: a * x * (x - 1) * (x - 0.3)  # noqa: E731
    x, state = solvers.bisection(fn, 0.0, 1.0).run(number(guess), number(1.0))
    assert state.converged and abs(fn(x, 1.0)) < 1e-15


def test_a_bracket_without_a_change_of_sign_in_one_lane_is_refused() -> None:
    solver = solvers.bisection(lambda x, theta: x**2 - theta, number(0.0), number(2.0))
    with pytest.raises(ValueError, match="bracket"):
        vmap(lambda theta: solver.run(None, theta))(torch.tensor([1.0, 2.0, 5.0], dtype=F64))


TIMES = torch.linspace(0, 4, 30, dtype=torch.float64)

# From guesses where the error is larger than at the solution by many orders of magnitude, or changes as fast.
POOR = {
    "newton, exp": (solvers.newton(lambda x: x.exp() - 2), -4.0, math.log(2)),
    "newton, exp, from above": (solvers.newton(lambda x: x.exp() - 2), 30.0, math.log(2)),
    "newton, x^4": (solvers.newton(lambda x: x**4 - 2), 0.01, 2**0.25),
    "newton, x^3": (solvers.newton(lambda x: x**3 - 2), 1e4, 2 ** (1 / 3)),
    "newton, radiation": (solvers.newton(lambda t: 5.67e-8 * t**4 - 1000), 1.0, (1000 / 5.67e-8) ** 0.25),
    "lbfgs, exp": (solvers.lbfgs(lambda x: x.exp() - 2 * x), 20.0, math.log(2)),
    "lbfgs": (solvers.lbfgs(rosenbrock), [1000.0, 1000.0], [1.0, 1.0]),
    "newton_cg": (solvers.newton_cg(rosenbrock), [1000.0, 1000.0], [1.0, 1.0]),
    "nonlinear_cg": (solvers.nonlinear_cg(rosenbrock), [30.0, -30.0], [1.0, 1.0]),
    "levenberg_marquardt": (
        solvers.levenberg_marquardt(lambda p: p[0] * torch.exp(-p[1] * TIMES) - 2 * torch.exp(-1.3 * TIMES)),
        [1.0, -2.0],
        [2.0, 1.3],
    ),
}


@pytest.mark.parametrize("name", POOR)
def test_a_poor_guess_makes_no_poor_solution(name):
    solver, guess, solution = POOR[name]
    guess, solution = (torch.tensor(v, dtype=torch.float64) for v in (guess, solution))
    found, state = solver.run(guess)
    assert state.status == Status.CONVERGED
    torch.testing.assert_close(found, solution, rtol=1e-6, atol=0)
    # As a lane among others it is the same.
    lanes, _ = torch.func.vmap(solver.run)(torch.stack([guess, solution]))
    torch.testing.assert_close(lanes[0], found, rtol=1e-9, atol=0)


@pytest.mark.parametrize("guess", [10.0, 1e3, 1e4])
def test_a_poor_guess_makes_no_poor_solution_in_float32(guess):
    found, _ = solvers.newton(lambda x: x**3 - 2).run(torch.tensor(guess))
    torch.testing.assert_close(found, torch.tensor(2.0) ** (1 / 3), rtol=1e-5, atol=0)


def test_unrolled_a_poor_guess_makes_no_poor_solution():
    solver = solvers.newton(lambda x, c: x**3 - c)
    guess, c = torch.tensor(1e4, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    slope = torch.func.grad(lambda c: solver.run(guess, c, implicit_diff=False)[0])(c)
    torch.testing.assert_close(slope, c ** (-2 / 3) / 3, rtol=1e-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factory", factories(MINIMISERS))
def test_a_kink_is_no_solution(factory, dtype):
    # The minimum is at the kink, where the gradient jumps from one sign to the other and is zero nowhere.
    solver = factory(lambda x: ((x - 3).abs() + (x - 3.5) ** 2 / 2).sum(), maxiter=30, on_failure="ignore")
    _, state = solver.run(torch.zeros(1, dtype=dtype))
    assert state.status != Status.CONVERGED


@pytest.mark.parametrize(("dtype", "centre", "off"), [(F64, 2e6, 1.0), (torch.float32, 2e3, 3.0)])
@pytest.mark.parametrize("row", [*of_kind("root"), *MINIMISERS], ids=str)
def test_an_unknown_far_from_zero_does_not_make_the_guess_a_solution(row, dtype, centre, off):
    # To have solved it to the precision of x^(1/2), or of the least bits of x.
    fn = torch.sinh if row.family.name == "root" else lambda x: torch.cosh(x).sum()
    found, state = row.factory(lambda x: fn(x - centre)).run(torch.tensor([centre + off], dtype=dtype))
    assert state.iter_num > 0
    assert abs(found - centre) < (1e-4 if dtype == F64 else 0.1)


@pytest.mark.parametrize("factory", factories(MINIMISERS))
def test_a_size_out_of_range_is_no_measure_of_the_error(factory):
    # log x has no minimum. Its second derivative at the guess is beyond float32; below 0 only its gradient is finite.
    guess = torch.full((2,), 3e-20, dtype=torch.float32)
    _, state = factory(lambda x: x.log().sum(), on_failure="ignore").run(guess)
    assert state.status in (Status.LINE_SEARCH_FAILED, Status.UNBOUNDED, Status.DIVERGED)
    assert not state.error < 1


@pytest.mark.parametrize(("dtype", "curvature"), [(torch.float32, 0.05), (F64, 0.002)])
@pytest.mark.parametrize("factory", factories(MINIMISERS))
def test_a_kink_at_the_guess_does_not_make_it_a_solution(factory, dtype, curvature):
    solver = factory(lambda x: curvature / 2 * ((x - 2) ** 2).sum() + (x - 3).relu().sum())
    found, _ = solver.run(torch.tensor([3.0], dtype=dtype))
    torch.testing.assert_close(found, torch.tensor([2.0], dtype=dtype), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["newton", "broyden_root"])
def test_the_end_of_a_domain_near_the_solution_makes_no_poor_solution(name):
    # Where the size of things is looked into, x0 (1 + step) is beyond 1.
    def residual(x):
        return torch.stack([torch.log(x[0]) - torch.log1p(-x[0]) - 18, torch.exp(x[1]) - 2])

    found, _ = getattr(solvers, name)(residual).run(torch.tensor([1 - 2e-8, 30.0], dtype=F64))
    assert abs(found[1] - math.log(2)) < 0.01


def slope_of_entropy(x):
    return torch.log(x) - torch.log1p(-x) - 12


def entropy(x):
    return (x * torch.log(x) + (1 - x) * torch.log1p(-x) - 12 * x).sum()


@pytest.mark.parametrize(
    "solver",
    [
        pytest.param(solvers.newton(slope_of_entropy, backtracking=True), id="newton, backtracking"),
        *(pytest.param(row.factory(entropy), id=row.name) for row in MINIMISERS),
    ],
)
def test_the_end_of_a_domain_near_the_solution_is_no_failure(solver):
    found, _ = solver.run(torch.tensor([0.5]))
    torch.testing.assert_close(found, torch.sigmoid(torch.tensor([12.0])), rtol=2e-6, atol=0)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1e4), (F64, 1e12)])
def test_constraints_do_not_hide_what_rounding_makes_of_a_gradient(dtype, factor):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(80, 20, generator=generator, dtype=F64)
    b = torch.randn(80, generator=generator, dtype=F64)

    def objective(x, factor=1.0):
        return factor * ((matrix.to(x.dtype) @ x - b.to(x.dtype)) ** 2).sum() / 2

    solver = solvers.projected_gradient(objective, lambda x: x.clamp(0, 1))
    found, state = solver.run(torch.zeros(20, dtype=dtype), factor)
    assert state.iter_num < 1000
    expected, _ = solvers.scipy_minimize(objective, bounds=(0, 1)).run(torch.zeros(20, dtype=F64))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_no_curvature_but_rounding_makes_no_step_of_newton_cg(seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(200, 8, generator=generator, dtype=F64)
    y = torch.randn(200, generator=generator, dtype=F64)
    # Far away, most of Huber's loss is linear.
    guess = 1e3 * torch.randn(8, generator=generator, dtype=F64)
    objective = lambda x: torch.nn.functional.huber_loss(features @ x, y)  # noqa: E731
    found, _ = solvers.newton_cg(objective).run(guess)
    expected, _ = solvers.lbfgs(objective).run(torch.zeros(8, dtype=F64))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_a_search_that_finds_no_step_at_a_solution_has_found_it():
    t = torch.linspace(0, 1, 50)
    for seed in range(2, 8):
        y = 3e3 + 1.3 * t + 0.01 * torch.randn(50, generator=torch.Generator().manual_seed(seed))
        solver = solvers.nonlinear_cg(lambda x, y: ((3e3 + x * t - y) ** 2).mean(), on_failure="ignore")
        _, state = solver.run(torch.zeros(()), y)
        assert (state.status == Status.CONVERGED) == (state.error <= state.target)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("factory", [solvers.newton, solvers.chord])
def test_unknowns_may_be_real_and_complex(factory, order):
    guess = [torch.tensor([1.3], dtype=F64), torch.tensor([-0.4 + 0.8j], dtype=torch.complex128)]
    guess = guess[::-1] if order else guess

    def residual(x, c):
        return [v**3 - c if v.is_complex() else v**2 - 2 * c for v in x]

    c = torch.tensor(1.0, dtype=F64)
    expected = [(2 * c).sqrt()[None], torch.exp(torch.tensor([2j * math.pi / 3], dtype=torch.complex128))]
    found, _ = factory(residual).run(guess, c)
    torch.testing.assert_close(found, expected[::-1] if order else expected)
    slope = grad(lambda c: sum(v.real.sum() for v in factory(residual).run(guess, c)[0]))(c)
    torch.testing.assert_close(slope, (expected[0] / 2 + expected[1].real / 3)[0])
