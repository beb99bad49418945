"""The minimisers of smooth functions with a line search: against SciPy, closed forms and central differences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from checks.tensors import draw
from scipy.optimize import minimize
from tables.losses import rosenbrock
from tables.solvers import LINE_SEARCHES
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from implicitdiff import ConvergenceError
from implicitdiff.solvers import Solver, Status
from implicitdiff.solvers.lbfgs import lbfgs
from implicitdiff.solvers.newton_cg import newton_cg
from implicitdiff.solvers.nonlinear_cg import fletcher_reeves, hestenes_stiefel, nonlinear_cg

F64 = torch.float64


class Row(NamedTuple):
    """A solver, SciPy's method of the same name, and how many evaluations it may take for each of SciPy's."""

    name: str
    factory: Callable[..., Solver]
    scipy: str
    evaluations: float

    def __str__(self) -> str:
        return self.name


PEERS = {"lbfgs": ("L-BFGS-B", 1.3), "nonlinear_cg": ("CG", 2.0), "newton_cg": ("Newton-CG", 3.0)}
# What a minimiser is compared with whose method SciPy does not have.
DEFAULT_PEER = ("L-BFGS-B", 3.0)
SOLVERS = [
    *(Row(row.name, row.factory, *PEERS.get(row.name, DEFAULT_PEER)) for row in LINE_SEARCHES),
    Row("lbfgs, short", partial(lbfgs, history=2), "L-BFGS-B", float("inf")),
    Row("nonlinear_cg, Fletcher-Reeves", partial(nonlinear_cg, formula=fletcher_reeves), "CG", 2.0),
    Row("nonlinear_cg, Hestenes-Stiefel", partial(nonlinear_cg, formula=hestenes_stiefel), "CG", 2.0),
]
every_solver = pytest.mark.parametrize("row", SOLVERS, ids=str)


# --- problems ---------------------------------------------------------------------------------------------------------

X, Y = draw(0, 30, 6), draw(1, 30)


def ridge(w: Tensor, penalty: Tensor | float = 0.5) -> Tensor:
    return 0.5 * ((X @ w - Y) ** 2).sum() + 0.5 * (penalty * w**2).sum()


def ridge_solution(penalty: Tensor | float = 0.5) -> Tensor:
    return torch.linalg.inv(X.T @ X + torch.diag_embed(penalty * torch.ones(6, dtype=F64))) @ (X.T @ Y)


def logistic(w: Tensor) -> Tensor:
    return torch.nn.functional.softplus(-torch.sign(Y) * (X @ w)).sum() + 0.05 * (w @ w)


SCALES = torch.logspace(-2, 2, 8, dtype=F64)


def badly_scaled(x: Tensor) -> Tensor:
    return 0.5 * (SCALES * x**2).sum() - x.sum()


class Problem(NamedTuple):
    """A function, an initial guess, its minimum if that has a closed form, and how far its gradient tells how near it
    is."""

    name: str
    fn: Callable[[Tensor], Tensor]
    start: Tensor
    solution: Tensor | None = None
    tolerance: float = 1e-8

    def __str__(self) -> str:
        return self.name


PROBLEMS = [
    Problem("rosenbrock, 2", rosenbrock, torch.tensor([-1.2, 1.0], dtype=F64), torch.ones(2, dtype=F64), 1e-6),
    Problem("rosenbrock, 10", rosenbrock, torch.zeros(10, dtype=F64), torch.ones(10, dtype=F64), 1e-6),
    Problem("ridge", ridge, torch.zeros(6, dtype=F64), ridge_solution()),
    Problem("logistic", logistic, torch.zeros(6, dtype=F64)),
    Problem("badly scaled", badly_scaled, torch.zeros(8, dtype=F64), 1 / SCALES, 1e-7),
]


def counted(fn: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], list[None]]:
    calls: list[None] = []

    def counting(*args: Any) -> Tensor:
        calls.append(None)
        return fn(*args)

    return counting, calls


def by_scipy(problem: Problem, method: str, error: float) -> Any:
    def gradient(x: np.ndarray) -> np.ndarray:
        return grad(problem.fn)(torch.from_numpy(x)).numpy()

    size = len(problem.start) ** 0.5
    options = {
        "L-BFGS-B": {"ftol": 0.0, "gtol": error / size, "maxiter": 10_000, "maxfun": 20_000},
        "CG": {"gtol": error, "norm": 2, "maxiter": 10_000},
        "Newton-CG": {"xtol": 1e-9},
    }
    second = {"hess": lambda x: hessian(problem.fn)(torch.from_numpy(x)).numpy()} if method == "Newton-CG" else {}
    return minimize(
        lambda x: float(problem.fn(torch.from_numpy(x))),
        problem.start.numpy(),
        jac=gradient,
        method=method,
        options=options[method],
        **second,
    )


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@every_solver
def test_the_minimum_is_the_closed_form_and_scipys(row: Row, problem: Problem) -> None:
    # A compiled loop does not call the function.
    fn, calls = counted(problem.fn)
    x, state = row.factory(fn, compile="off").run(problem.start)
    scipy = by_scipy(problem, row.scipy, float(state.target))
    evaluations = len(calls)
    assert state.status == Status.CONVERGED
    expected = torch.from_numpy(scipy.x) if problem.solution is None else problem.solution
    torch.testing.assert_close(x, expected, rtol=problem.tolerance, atol=problem.tolerance)
    torch.testing.assert_close(torch.from_numpy(scipy.x), expected, rtol=1e-4, atol=1e-4)
    # Each iteration of newton_cg takes one more, for its products with the Hessian.
    assert evaluations <= row.evaluations * scipy.nfev + 10


@every_solver
def test_the_state_tells_the_value_and_the_gradient_at_the_solution(row: Row) -> None:
    x, state = row.factory(rosenbrock, maxiter=7).run(PROBLEMS[0].start)
    gradient = grad(rosenbrock)(x)
    torch.testing.assert_close(state.memory.value, rosenbrock(x), rtol=1e-13, atol=0)
    torch.testing.assert_close(state.memory.grad, gradient, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(state.error, gradient.norm(), rtol=1e-13, atol=0)
    assert state.status == Status.BUDGET_SPENT and state.iter_num == 7


@every_solver
def test_every_step_satisfies_the_strong_wolfe_conditions(row: Row) -> None:
    c2 = 0.1 if row.scipy == "CG" else 0.9
    solver = row.factory(rosenbrock)
    x = PROBLEMS[0].start
    state = solver.init(x)
    for _ in range(20):
        new_x, new = solver.update(x, state)
        slope, new_slope = state.memory.grad @ (new_x - x), new.memory.grad @ (new_x - x)
        assert slope < 0
        assert new.memory.value <= state.memory.value + 1e-4 * slope * (1 - 1e-9)
        assert new_slope.abs() <= -c2 * slope * (1 + 1e-9)
        x, state = new_x, new


def test_lbfgs_goes_along_the_direction_of_dense_bfgs() -> None:
    solver = lbfgs(rosenbrock, history=4)
    x = 0.3 * draw(5, 6)
    state = solver.init(x)
    for count in range(8):
        H = state.memory.scale * torch.eye(6, dtype=F64)
        for s, y in list(zip(state.memory.steps, state.memory.changes, strict=True))[max(0, 4 - count) :]:
            v = torch.eye(6, dtype=F64) - torch.outer(y, s) / (s @ y)
            H = v.T @ H @ v + torch.outer(s, s) / (s @ y)
        direction = -H @ state.memory.grad
        new_x, state = solver.update(x, state)
        step = (new_x - x) @ direction / (direction @ direction)
        torch.testing.assert_close(new_x - x, step * direction, rtol=1e-9, atol=1e-12)
        x = new_x


def test_newton_cg_converges_superlinearly() -> None:
    fn = lambda x: (torch.cosh(x) * SCALES - x).sum()  # noqa: E731
    x, state = newton_cg(fn).run(torch.zeros(8, dtype=F64), keep_history=True)
    torch.testing.assert_close(x, torch.asinh(1 / SCALES), rtol=1e-9, atol=1e-10)
    errors = state.history
    assert bool((errors[-2:] < 0.02 * errors[-3:-1]).all())


def test_newton_cg_leaves_a_saddle_along_negative_curvature() -> None:
    fn = lambda x: (x**4 / 4 - x**2 / 2).sum()  # noqa: E731
    x, _ = newton_cg(fn).run(torch.tensor([0.1, -0.2, 1e-3], dtype=F64))
    torch.testing.assert_close(x, torch.tensor([1.0, -1.0, 1.0], dtype=F64), rtol=1e-9, atol=0)


# --- where values say nothing -----------------------------------------------------------------------------------------


@every_solver
def test_a_minimum_that_is_a_difference_of_large_terms_is_found_by_slopes(row: Row) -> None:
    """The divergence is 0 at the minimum, give or take 1e-16, where the gradient is still 1e-8."""
    target = torch.log_softmax(draw(2, 6), dim=0)

    def divergence(x: Tensor) -> Tensor:
        log_q = torch.log_softmax(x, dim=0)
        return (log_q.exp() * (log_q - target)).sum()

    fn, calls = counted(divergence)
    x, state = row.factory(fn).run(torch.zeros(6, dtype=F64))
    assert state.error <= 4e-11
    torch.testing.assert_close(torch.log_softmax(x, dim=0), target, rtol=1e-8, atol=1e-8)
    assert len(calls) < 200


@every_solver
def test_a_large_constant_hides_no_minimum(row: Row) -> None:
    x, _ = row.factory(lambda w: ridge(w) + 1e6).run(torch.zeros(6, dtype=F64))
    torch.testing.assert_close(x, ridge_solution(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("units", [1e-30, 1e-8, 1e8, 1e30])
@every_solver
def test_the_units_of_the_objective_do_not_matter(row: Row, units: float) -> None:
    solver = row.factory(lambda w: units * ridge(w), atol=0.0, rtol=1e-9)
    x, _ = solver.run(torch.zeros(6, dtype=F64))
    torch.testing.assert_close(x, ridge_solution(), rtol=1e-6, atol=1e-6)


@every_solver
def test_single_precision(row: Row) -> None:
    data, target = X.float(), Y.float()

    def fn(w: Tensor) -> Tensor:
        return 0.5 * ((data @ w - target) ** 2).sum() + 0.25 * (w**2).sum()

    x, state = row.factory(fn).run(torch.zeros(6))
    assert x.dtype == torch.float32 and state.memory.value.dtype == torch.float32
    assert state.target <= 1e-4 * grad(fn)(torch.zeros(6)).norm()
    torch.testing.assert_close(x, ridge_solution().float(), rtol=1e-4, atol=1e-4)


# --- lanes ------------------------------------------------------------------------------------------------------------


def kink(x: Tensor) -> Tensor:
    """Its gradient is nowhere shorter than 1, nor ever turns but at the minimum."""
    above = x.sum() - 0.3
    return torch.where(above > 0, above, -2 * above)


def several(x: Tensor, which: Tensor, scale: Tensor) -> Tensor:
    smooth = torch.cosh(x - 1).sum() + 0.5 * (torch.tensor([0.0, 1.0, 1.0], dtype=F64) * scale * (x - 1) ** 2).sum()
    valley = rosenbrock(x)
    return torch.where(which == 0, smooth, torch.where(which == 1, valley, kink(x)))


WHICH = torch.tensor([0, 0, 1, 0, 2])
SCALE = torch.tensor([1.0, 1e3, 1.0, 10.0, 1.0], dtype=F64)
START = torch.stack(
    [torch.zeros(3, dtype=F64)] * 3 + [torch.ones(3, dtype=F64), torch.tensor([1.0, 0.2, 2.1], dtype=F64)]
)
FAILS = 4


@every_solver
def test_a_batch_is_its_lanes_one_by_one(row: Row) -> None:
    solver = row.factory(several, on_failure="ignore")
    found, state = vmap(solver.run)(START, WHICH, SCALE)
    for i in range(5):
        x, state_i = solver.run(START[i], WHICH[i], SCALE[i])
        assert state.status[i] == state_i.status == (Status.CONVERGED if i != FAILS else Status.LINE_SEARCH_FAILED)
        assert state.iter_num[i] == state_i.iter_num
        torch.testing.assert_close(found[i], x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[:FAILS], torch.ones(4, 3, dtype=F64), rtol=1e-6, atol=1e-6)
    assert state.iter_num[3] == 0 and torch.equal(found[3], START[3])
    assert len(set(state.iter_num.tolist())) >= 4


@every_solver
def test_lanes_that_have_stopped_spoil_no_unrolled_derivative(row: Row) -> None:
    solver = row.factory(several, on_failure="ignore", maxiter=4)

    def run(scale: Tensor) -> Tensor:
        return vmap(lambda *lane: solver.run(*lane, implicit_diff=False)[0])(START, WHICH, scale)

    reverse = grad(lambda scale: run(scale).sin().sum())(SCALE)
    forward = jvp(run, (SCALE,), (SCALE,))[1]
    assert bool(reverse.isfinite().all()) and bool(forward.isfinite().all())
    torch.testing.assert_close((run(SCALE).cos() * forward).sum(dim=1), reverse * SCALE, rtol=1e-10, atol=1e-13)
    assert reverse[0] != 0 and not reverse[2:].any()


# --- derivatives ------------------------------------------------------------------------------------------------------

THETA = torch.tensor([0.5, 1.0, 2.0, 0.8, 0.3, 1.5], dtype=F64)
TANGENT = draw(7, 6)


def central_difference(f: Callable[[Tensor], Tensor], theta: Tensor, tangent: Tensor, h: float) -> Tensor:
    """Extrapolated once."""
    coarse, fine = ((f(theta + e * tangent) - f(theta - e * tangent)) / (2 * e) for e in (h, h / 2))
    return (4 * fine - coarse) / 3


def quartic(x: Tensor, theta: Tensor) -> Tensor:
    return 0.5 * ((X @ x - Y) ** 2).sum() + (theta * x**4).sum() + rosenbrock(x)


@every_solver
def test_the_derivative_of_three_unrolled_steps_is_their_central_difference(row: Row) -> None:
    fn, calls = counted(quartic)
    solver = row.factory(fn, maxiter=3)

    def run(theta: Tensor) -> Tensor:
        return solver.run(torch.full((6,), 0.2, dtype=F64), theta, implicit_diff=False)[0]

    run(THETA)
    assert len(calls) > 1 + 3, "the search must interpolate for this to test anything"
    expected = central_difference(run, THETA, TANGENT, 1e-3)
    torch.testing.assert_close(jvp(run, (THETA,), (TANGENT,))[1], expected, rtol=1e-7, atol=1e-10)
    reverse = grad(lambda theta: (run(theta) * TANGENT).sum())(THETA)
    torch.testing.assert_close(reverse @ TANGENT, expected @ TANGENT, rtol=1e-7, atol=1e-10)


@every_solver
def test_implicit_and_unrolled_derivatives_and_central_differences_agree(row: Row) -> None:
    solver = row.factory(ridge, rtol=1e-12, atol=1e-12)
    start = torch.zeros(6, dtype=F64)
    implicit = jvp(lambda t: solver.run(start, t)[0], (THETA,), (TANGENT,))[1]
    unrolled = jvp(lambda t: solver.run(start, t, implicit_diff=False)[0], (THETA,), (TANGENT,))[1]
    difference = central_difference(lambda t: solver.run(start, t)[0], THETA, TANGENT, 1e-2)
    expected = jvp(ridge_solution, (THETA,), (TANGENT,))[1]
    torch.testing.assert_close(implicit, expected, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(unrolled, expected, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(difference, expected, rtol=1e-7, atol=1e-8)


@every_solver
def test_transforms_of_the_solution_are_those_of_the_closed_form(row: Row) -> None:
    solver = row.factory(ridge, rtol=1e-13, atol=1e-12)

    def loss(theta: Tensor) -> Tensor:
        return (solver.run(torch.zeros(6, dtype=F64), theta)[0] ** 3).sum()

    def expected(theta: Tensor) -> Tensor:
        return (ridge_solution(theta) ** 3).sum()

    batch = torch.stack([THETA, 10 * THETA, 0.1 * THETA])
    for transform, theta in ((grad, THETA), (hessian, THETA), (lambda f: vmap(grad(f)), batch), (jacfwd, THETA)):
        torch.testing.assert_close(transform(loss)(theta), transform(expected)(theta), rtol=1e-8, atol=1e-9)


@every_solver
def test_parameters_may_be_a_tree(row: Row) -> None:
    def fn(params: dict[str, Any], theta: Tensor) -> Tensor:
        return ridge(torch.cat([params["w"].reshape(4), params["rest"][0][None], params["rest"][1]]), theta)

    start = {"w": torch.zeros(2, 2, dtype=F64), "rest": (torch.zeros((), dtype=F64), torch.zeros(1, dtype=F64))}
    solver = row.factory(fn, rtol=1e-12, atol=1e-12)

    def solution(theta: Tensor) -> Tensor:
        params, _ = solver.run(start, theta)
        assert params["w"].shape == (2, 2) and params["rest"][0].shape == ()
        return torch.cat([params["w"].reshape(4), params["rest"][0][None], params["rest"][1]])

    torch.testing.assert_close(solution(THETA), ridge_solution(THETA), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(jacrev(solution)(THETA), jacrev(ridge_solution)(THETA), rtol=1e-8, atol=1e-9)


# --- what can go wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fn", [lambda x: -x.sum(), lambda x: -(x**2).sum(), lambda x: -torch.exp(x).sum()])
@every_solver
def test_an_objective_without_a_lower_bound_is_reported(row: Row, fn: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ConvergenceError, match="no minimum") as caught:
        row.factory(fn).run(torch.ones(2, dtype=F64))
    assert caught.value.status == Status.UNBOUNDED


@every_solver
def test_a_trial_outside_the_domain_shortens_the_step(row: Row) -> None:
    trials: list[bool] = []

    def fn(x: Tensor) -> Tensor:
        value = (-5 * x - 3 * torch.sqrt(1 - x)).sum()
        trials.append(bool(value.detach().isnan()))
        return value

    x, _ = row.factory(fn, rtol=1e-12).run(torch.tensor([0.5, 0.2], dtype=F64))
    assert any(trials)
    torch.testing.assert_close(x, torch.full((2,), 1 - 0.3**2, dtype=F64), rtol=1e-10, atol=0)


def overshooting(x: Tensor, theta: Tensor) -> Tensor:
    """A step of length 1 down its gradient at 0.5 leaves its domain, where even zero times its derivative is nan."""
    return (theta * torch.sqrt(x) + 0.1 * x**2 + 0.02 / x).sum()


@every_solver
def test_trials_outside_the_domain_spoil_no_unrolled_derivative(row: Row) -> None:
    seen: list[bool] = []

    def fn(x: Tensor, theta: Tensor) -> Tensor:
        seen.append(bool(torch.func.debug_unwrap(x).detach().min() < 0))
        return overshooting(x, theta)

    theta = torch.tensor(1.0, dtype=F64)
    start = torch.tensor([0.5, 0.6], dtype=F64)

    def run(theta: Tensor, fn: Callable[..., Tensor] = overshooting) -> Tensor:
        return row.factory(fn, maxiter=3).run(start, theta, implicit_diff=False)[0]

    run(theta, fn)
    assert any(seen)
    expected = central_difference(run, theta, torch.ones_like(theta), 2e-5)
    torch.testing.assert_close(jacfwd(run)(theta), expected, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(jacrev(run)(theta), expected, rtol=1e-7, atol=1e-8)
    batch = torch.stack([theta, theta])
    torch.testing.assert_close(vmap(jacrev(run))(batch), torch.stack([expected] * 2), rtol=1e-7, atol=1e-8)


@every_solver
def test_an_initial_guess_with_zero_gradient_stays(row: Row) -> None:
    fn = lambda x: torch.cosh(x).sum()  # noqa: E731
    x, state = row.factory(fn).run(torch.zeros(3, dtype=F64))
    assert not x.any() and state.iter_num == 0 and state.status == Status.CONVERGED
    unrolled = row.factory(fn).run(torch.zeros(3, dtype=F64), implicit_diff=False)[0]
    assert not unrolled.any()


@every_solver
def test_a_kink_makes_the_line_search_fail(row: Row) -> None:
    with pytest.raises(ConvergenceError, match="no step decreases") as caught:
        row.factory(kink).run(torch.tensor([1.0, 0.2, 2.1], dtype=F64))
    assert caught.value.status == Status.LINE_SEARCH_FAILED
    assert caught.value.iterations < 200


@every_solver
def test_a_gradient_that_is_not_that_of_the_values_makes_the_line_search_fail(row: Row) -> None:
    def fn(x: Tensor) -> Tensor:
        return (x**2).sum() - 2 * ((x - x.detach()) * x.detach() * 2).sum()

    x, state = row.factory(fn, on_failure="ignore").run(torch.ones(2, dtype=F64))
    assert state.status == Status.LINE_SEARCH_FAILED
    torch.testing.assert_close(x, torch.ones(2, dtype=F64), rtol=1e-14, atol=0)


@every_solver
def test_a_function_that_is_not_a_number_at_the_start_diverges(row: Row) -> None:
    _, state = row.factory(lambda x: torch.log(x).sum(), on_failure="ignore").run(-torch.ones(2, dtype=F64))
    assert state.status == Status.DIVERGED and state.iter_num == 0


@every_solver
def test_a_budget_is_kept_and_is_no_failure(row: Row) -> None:
    _, state = row.factory(rosenbrock, maxiter=4).run(torch.zeros(10, dtype=F64))
    assert state.iter_num == 4 and state.status == Status.BUDGET_SPENT


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="lbfgs: history must be an integer >= 1, got 0"):
        lbfgs(ridge, history=0)
    with pytest.raises(ValueError, match="newton_cg: inner_maxiter must be an integer >= 1, got 0"):
        newton_cg(ridge, inner_maxiter=0)
    with pytest.raises(TypeError, match="nonlinear_cg: formula must be a function"):
        nonlinear_cg(ridge, formula="polak-ribiere")
