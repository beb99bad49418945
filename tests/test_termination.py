"""The stopping rule: every sentence of its documentation."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import tables.solvers as searches
import torch
from problem_sets import more_garbow_hillstrom, nist
from problem_sets.problem import LeastSquares
from tables.solvers import LINE_SEARCHES, MINIMISERS, SEARCHES, THETA, Row, factories
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, vmap

import implicitdiff.solvers as solvers
from implicitdiff import ConvergenceError, sgd
from implicitdiff.solvers import Progress, State, Status
from implicitdiff.solvers._loop.measures import rounding

F32, F64 = torch.float32, torch.float64
every_solver = pytest.mark.parametrize("row", SEARCHES, ids=str)
JUDGED = [row for row in SEARCHES if row.name.split(",")[0] not in ("bisection", "qp") and "scipy" not in row.name]
every_judged_solver = pytest.mark.parametrize("row", JUDGED, ids=str)
A = torch.tensor([[3.0, 1.0, 0.5], [1.0, 2.0, 0.3], [0.5, 0.3, 1.5]], dtype=F64)
B = torch.tensor([1.0, -2.0, 0.5], dtype=F64)


def status_of(state: Any) -> Status:
    return Status(int(state.status))


# --- the state --------------------------------------------------------------------------------------------------------


@every_solver
def test_the_state_has_one_header_and_the_memory_of_the_method(row: Row) -> None:
    _, state = row.solution_and_state(THETA)
    assert type(state) is State and type(state.progress) is Progress
    assert state.memory.__class__.__name__.endswith("Memory") and hasattr(solvers, type(state.memory).__name__)
    assert state.converged.dtype == torch.bool and bool(state.converged) == (state.status == Status.CONVERGED)


def test_a_state_of_another_method_is_refused() -> None:
    x = torch.ones(3, dtype=F64)
    state = solvers.newton(lambda x: x**3 - 1).init(x)
    with pytest.raises(TypeError, match=r"memory of type LbfgsMemory.*one with a memory of type NewtonMemory"):
        solvers.lbfgs(lambda x: (x**2).sum()).update(x, state)


# --- the target -------------------------------------------------------------------------------------------------------


def cubic(x: Tensor) -> Tensor:
    return A @ x + x**3 - B


def slope_times_x(x: Tensor) -> Tensor:
    return (A + torch.diag(3 * x**2)) @ x


def test_the_default_target_is_a_part_of_what_x_makes_of_the_residual() -> None:
    x = torch.tensor([2.0, 1.0, -1.0], dtype=F64)
    for dtype, p in ((F64, 4e-11), (F32, 4 * torch.finfo(F32).eps)):
        fn = lambda x, dtype=dtype: A.to(dtype) @ x + x**3 - B.to(dtype)  # noqa: E731
        state = solvers.newton(fn).init(x.to(dtype))
        size = max(float(slope_times_x(x).norm()), float(cubic(x).norm()))
        assert float(state.target) == pytest.approx(p * size, rel=1e-2)


@pytest.mark.parametrize(
    ("options", "target"),
    [
        ({"atol": 1e-3}, lambda first, size: 1e-3),
        ({"rtol": 1e-3}, lambda first, size: 1e-3 * first),
        ({"rtol": 1e-15}, lambda first, size: 4e-11 * size),
        ({"rtol": 1e-3, "atol": 1e-9}, lambda first, size: 1e-3 * first),
        ({"rtol": 1e-3, "atol": 1.0}, lambda first, size: 1.0),
        ({"rtol": 0.0, "atol": 0.0}, lambda first, size: 0.0),
    ],
)
def test_a_given_tolerance_is_the_target(options: dict[str, float], target: Callable[[float, float], float]) -> None:
    x = torch.tensor([2.0, 1.0, -1.0], dtype=F64)
    state = solvers.newton(cubic, **options).init(x)
    expected = target(float(cubic(x).norm()), float(slope_times_x(x).norm()))
    assert float(state.target) == pytest.approx(expected, rel=1e-2)


def energy(x: Tensor) -> Tensor:
    return 0.5 * x @ (A @ x) - B @ x + (x**4).sum() / 4


COUNTED = {
    "minimum": energy,
    "root": cubic,
    "fixed point": lambda x: torch.cos(A @ x / 8) + B / 4,
    "least squares": lambda x: torch.cat([cubic(x), x]),
}
# A step size that is given is one of the family's problem.
COUNTING = [row for row in JUDGED if row.family.name in COUNTED and row.in_units is None]


@pytest.mark.parametrize("guess", [0.5, 2.5])
@pytest.mark.parametrize("row", COUNTING, ids=str)
def test_the_default_costs_two_evaluations_more_than_a_given_tolerance(row: Row, guess: float) -> None:
    def run(**options: Any) -> tuple[int, Any]:
        calls = [0]

        def counted(x: Tensor) -> Tensor:
            calls[0] += 1
            return COUNTED[row.family.name](x)

        _, state = row.factory(counted, **options).run(torch.full((3,), guess, dtype=F64))
        return calls[0], state

    # A compiled loop does not call the function.
    by_default, state = run(compile="off")
    given, _ = run(compile="off", rtol=0.0, atol=1.0001 * float(state.error))
    assert by_default <= given + 2


# --- standing still ---------------------------------------------------------------------------------------------------


def impossible(row: Row, dtype: torch.dtype, **options: Any) -> tuple[Tensor, Any]:
    """A search for less than rounding."""
    functions = searches.in_single_precision(row.family.functions) if dtype == F32 else row.family.functions
    solver = row.factory(*functions, **{"rtol": 0.0, "atol": 1e-300 if dtype == F64 else 1e-37, **options})
    theta = THETA.to(dtype)
    return solver.run(row.family.start(theta), theta)


@pytest.mark.parametrize("dtype", [F32, F64])
@every_judged_solver
def test_a_tolerance_below_rounding_is_answered_soon(row: Row, dtype: torch.dtype) -> None:
    functions = searches.in_single_precision(row.family.functions) if dtype == F32 else row.family.functions
    theta = THETA.to(dtype)
    _, arrived = row.factory(*functions, on_failure="ignore").run(row.family.start(theta), theta)
    x, state = impossible(row, dtype, on_failure="ignore")
    assert status_of(state) in (Status.STALLED, Status.CONVERGED, Status.LINE_SEARCH_FAILED)
    # The digits that the default leaves, and then some iterations.
    assert int(state.iter_num) <= 2.5 * int(arrived.iter_num) + 40
    if status_of(state) is Status.STALLED:
        assert state.error <= state.progress.floor or state.progress.still >= 16
    tolerance = 1e-3 if dtype == F32 else 1e-7
    torch.testing.assert_close(x.double(), row.family.closed_form(THETA), rtol=tolerance, atol=tolerance)


def test_it_raises_and_says_why_unless_the_iterations_were_a_budget() -> None:
    newton = lambda **options: solvers.newton(cubic, rtol=0.0, atol=1e-30, **options).run(torch.ones(3, dtype=F64))  # noqa: E731
    with pytest.raises(ConvergenceError, match="no further progress in this precision") as caught:
        newton()
    assert caught.value.status is Status.STALLED
    _, state = newton(maxiter=1000)
    assert status_of(state) is Status.STALLED and state.iter_num < 30


def test_zero_tolerances_and_a_budget_make_exactly_so_many_iterations() -> None:
    for factory, fn in ((solvers.newton, cubic), (solvers.lbfgs, energy), (solvers.gradient_descent, energy)):
        _, state = factory(fn, rtol=0.0, atol=0.0, maxiter=37, on_failure="ignore").run(torch.ones(3, dtype=F64))
        assert state.iter_num == 37 or (state.error == 0) or status_of(state) is Status.LINE_SEARCH_FAILED


def test_steps_of_length_zero_are_no_progress() -> None:
    solver = solvers.gradient_descent(energy, stepsize=1e-30, acceleration=False, on_failure="ignore")
    x, state = solver.run(torch.ones(3, dtype=F64))
    assert status_of(state) is Status.STALLED and state.iter_num == 16 and torch.equal(x, torch.ones(3, dtype=F64))


def test_steps_by_hand_stall_as_a_run_does() -> None:
    solver = solvers.newton(cubic, rtol=0.0, atol=1e-30, on_failure="ignore")
    x = torch.ones(3, dtype=F64)
    found, expected = solver.run(x)
    state = solver.init(x)
    while state.status == Status.RUNNING:
        x, state = solver.update(x, state)
    assert status_of(state) is Status.STALLED and state.iter_num == expected.iter_num
    torch.testing.assert_close(x, found, rtol=0, atol=0)


def test_lanes_stall_as_they_do_alone() -> None:
    solver = solvers.newton(lambda x, c: A @ x + x**3 - c, rtol=0.0, atol=1e-30, on_failure="ignore")
    c = torch.stack([B, 10 * B, torch.zeros(3, dtype=F64)])
    x = torch.ones(3, dtype=F64)
    _, together = vmap(lambda c: solver.run(x, c))(c)
    alone = [solver.run(x, row)[1] for row in c]
    assert together.status.tolist() == [int(s.status) for s in alone]
    assert together.status[0] == Status.STALLED and together.iter_num.max() < 40


# --- far from a solution, and at zero ---------------------------------------------------------------------------------


FAR = {
    "gradient_descent": lambda gradient, objective: solvers.gradient_descent(objective),
    "nonlinear_cg": lambda gradient, objective: solvers.nonlinear_cg(objective),
    "lbfgs": lambda gradient, objective: solvers.lbfgs(objective),
    "newton_cg": lambda gradient, objective: solvers.newton_cg(objective),
    "anderson": lambda gradient, objective: solvers.anderson(lambda x: x - gradient(x)),
    "broyden": lambda gradient, objective: solvers.broyden(lambda x: x - gradient(x)),
    "fixed_point_iteration": lambda gradient, objective: solvers.fixed_point_iteration(lambda x: x - gradient(x)),
}


@pytest.mark.parametrize("far", [1e6, 1e7])
@pytest.mark.parametrize("name", FAR)
def test_a_far_guess_hides_no_error_in_float32(name: str, far: float) -> None:
    """The guess is so far away that its distance, times the precision, is as large as the solution."""
    slopes, solution = torch.tensor([1.0, 0.5, 0.1]), torch.tensor([1.0, -2.0, 3.0])
    solver = FAR[name](lambda x: slopes * (x - solution), lambda x: 0.5 * (slopes * (x - solution) ** 2).sum())
    x, _ = solver.run(far * torch.tensor([1.0, 0.5, -0.7]))
    # The condition number is 10, and the residual is at most p |J x|.
    torch.testing.assert_close(x, solution, rtol=0, atol=10 * 4 * torch.finfo(F32).eps * float(solution.norm()))


def best_already(dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Data ``X, y`` of a fit whose best weights are zero."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(20, 3, dtype=F64, generator=generator)
    y = torch.randn(20, dtype=F64, generator=generator)
    assert torch.linalg.eigvalsh(X.mT @ X)[0] > 5
    return X.to(dtype), (y - X @ torch.linalg.lstsq(X, y[:, None]).solution[:, 0]).to(dtype)


OF_FIT = {
    "residual": lambda X, y: lambda w: X @ w - y,
    "gradient": lambda X, y: lambda w: X.mT @ (X @ w - y),
    "objective": lambda X, y: lambda w: ((X @ w - y) ** 2).sum() / 2,
}
FITTED = {
    **dict.fromkeys((solvers.gauss_newton, solvers.levenberg_marquardt), "residual"),
    **dict.fromkeys((solvers.newton, solvers.broyden_root), "gradient"),
}


@pytest.mark.parametrize("start", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("factory", [solvers.gradient_descent, *factories(LINE_SEARCHES), *FITTED])
def test_a_solution_of_zero_is_found_up_to_the_rounding_of_the_data(
    factory: Any, dtype: torch.dtype, start: float
) -> None:
    """The terms that cancel at zero are data alone, and the error is their rounding."""
    of_fit, converged = OF_FIT[FITTED.get(factory, "objective")], 0
    for seed in range(8):
        w, state = factory(of_fit(*best_already(dtype, seed)), on_failure="ignore").run(
            torch.full((3,), start, dtype=dtype)
        )
        # The gradient at zero is a sum of 20 terms of order 1, divided by the eigenvalue of above 5.
        assert w.abs().max() <= 20 * torch.finfo(dtype).eps + 1e-12 * start
        converged += bool(state.converged)
    # From a guess of zero no size is known: rounding is recognised by a statistic of 16 values, and methods without a
    # measure of the distance report a failure instead.
    least = 6 if start else 0 if factory in FITTED else 4
    assert converged >= least


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("factory", [solvers.levenberg_marquardt, solvers.dogleg, *factories(LINE_SEARCHES)])
def test_a_quantised_function_is_not_taken_for_rounding(factory: Any, dtype: torch.dtype) -> None:
    """With many unknowns the jumps of a straight-through function look like white noise."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(100, 50, dtype=dtype, generator=generator)
    b = A @ (0.3 * torch.randn(50, dtype=dtype, generator=generator))
    fn = lambda x: A @ Straight.apply(x) - b  # noqa: E731
    if factory not in (solvers.levenberg_marquardt, solvers.dogleg):
        fn = lambda x: (A @ Straight.apply(x) - b).square().sum()  # noqa: E731
    _, state = factory(fn, on_failure="ignore").run(torch.zeros(50, dtype=dtype))
    assert state.error > 10 and not state.converged


NO_ROUNDING = {
    "dead zone": lambda x: torch.relu(x - 1) - torch.relu(-x - 1) + 0.1,
    "soft threshold": lambda x: torch.nn.functional.softshrink(x, 0.5) + 0.2,
    "sign": lambda x: torch.sign(x) + 0.5,
    "root of a relu": lambda x: torch.relu(x) - 0.1,
    "cubic": lambda x: x**3 + 1e-9,
    "bounded": lambda x: torch.sin(1000 * x) + 0.5,
    "spike": lambda x: 1e4 * x - torch.exp(-(x**2)),
    "many kinks": lambda x: (
        torch.relu(torch.linspace(-1, 1, 40)[:, None] * x + torch.linspace(-0.1, 0.1, 40)[:, None]).sum(0) - 3
    ),
}


@pytest.mark.parametrize("name", NO_ROUNDING)
@pytest.mark.parametrize("at", [0.0, 1e-3])
def test_a_residual_that_is_no_rounding_is_not_taken_for_it(name: str, at: float) -> None:
    fn = NO_ROUNDING[name]
    residual = lambda problem, x: torch.stack([fn(row) for row in x])  # noqa: E731
    x = at * torch.tensor([[1.0, -0.5, 0.7]])
    here = residual(None, x)
    found = rounding(residual, SimpleNamespace(eps=torch.finfo(F32).eps), x, here)
    assert float(found.size) <= 1e-3 * float(here.norm())


def test_the_rounding_of_constants_is_measured() -> None:
    c = torch.linspace(1, 2, 300)
    residual = lambda problem, x: ((x[..., None] + c) - c).sum(-1) - 1e-9  # noqa: E731
    x = torch.tensor([[1e-9, -1e-9, 2e-9]])
    found = rounding(residual, SimpleNamespace(eps=torch.finfo(F32).eps), x, torch.full((1, 3), 1e-5))
    # Each of the 300 terms is rounded to a multiple of eps, with errors of both signs.
    assert 3e-7 <= float(found.size) <= 3e-5


# --- near the solution ------------------------------------------------------------------------------------------------


def problem(name: str) -> LeastSquares:
    return next(p for p in (*more_garbow_hillstrom.PROBLEMS, *nist.PROBLEMS) if p.name == name)


def squares(p: LeastSquares) -> Callable[[Tensor], Tensor]:
    return lambda x: (p.residual(x) ** 2).sum()


def value(p: LeastSquares, x: Tensor) -> float:
    return float((p.residual(x.double()) ** 2).sum())


@pytest.mark.parametrize("factory", [*factories(LINE_SEARCHES), solvers.gradient_descent, solvers.levenberg_marquardt])
@pytest.mark.parametrize("name", ["yearly temperature", "17 Osborne 1", "10 Meyer, scaled", "24 penalty II, n = 4"])
def test_an_ill_conditioned_minimum_in_float32_is_claimed_only_where_it_is(factory: Any, name: str) -> None:
    p = problem(name)
    fn = p.residual if factory is solvers.levenberg_marquardt else squares(p)
    x, state = factory(fn, on_failure="ignore").run(torch.tensor(p.start, dtype=F32))
    assert status_of(state) in (Status.CONVERGED, Status.STALLED)
    if state.converged:
        assert value(p, x) <= 1.01 * p.values[0]


@pytest.mark.parametrize(
    ("factory", "name", "factor"),
    [
        (solvers.gauss_newton, "20 Watson, n = 12", 1.0),
        (solvers.levenberg_marquardt, "20 Watson, n = 12", 10.0),
        (solvers.levenberg_marquardt, "20 Watson, n = 12", 100.0),
        (solvers.levenberg_marquardt, "Bennett5", 1.0),
    ],
)
def test_least_squares_that_float32_does_not_determine_are_not_claimed(factory: Any, name: str, factor: float) -> None:
    """The Jacobian is singular to the precision of float32, and steps along its flattest directions are refused."""
    p = problem(name)
    start = factor * torch.tensor(p.start, dtype=F32)
    start = start if start.any() or factor == 1.0 else torch.full_like(start, factor)
    x, state = factory(p.residual, on_failure="ignore").run(start)
    assert status_of(state) in (Status.CONVERGED, Status.STALLED)
    if state.converged:
        assert value(p, x) <= 1.25 * p.values[0]


@pytest.mark.parametrize("name", ["20 Watson, n = 6", "20 Watson, n = 9", "20 Watson, n = 12", "yearly temperature"])
def test_levenberg_marquardt_arrives_where_the_gradient_says_little(name: str) -> None:
    p = problem(name)
    x, state = solvers.levenberg_marquardt(p.residual).run(torch.tensor(p.start, dtype=F64))
    assert state.converged and value(p, x) == pytest.approx(p.values[0], rel=1e-6)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("condition", [1e4, 1e6])
@pytest.mark.parametrize("steps", ["gradient_descent", "momentum"])
def test_a_small_gradient_across_a_valley_is_no_minimum(steps: str, condition: float, dtype: torch.dtype) -> None:
    """Steps that the largest curvature limits reach a small gradient far from the minimum along the valley."""
    stiff, minimum = torch.logspace(0, math.log10(condition), 6, dtype=dtype), torch.linspace(1, 2, 6, dtype=dtype)
    objective = lambda x: (stiff * (x - minimum) ** 2).sum() / 2  # noqa: E731
    if steps == "momentum":
        solver = solvers.from_optimizer(objective, sgd(1 / condition, momentum=0.9), on_failure="ignore")
    else:
        solver = solvers.gradient_descent(objective, on_failure="ignore")
    x, state = solver.run(torch.zeros(6, dtype=dtype))
    # The step that is at most eps^(2/5) |x| is the distance of this quadratic's minimum.
    if state.converged:
        assert torch.linalg.norm(x - minimum) <= torch.finfo(dtype).eps ** (2 / 5) * torch.linalg.norm(x)
    else:
        assert status_of(state) in (Status.STALLED, Status.BUDGET_SPENT)


def test_a_fixed_point_that_is_still_approached_at_the_limit_is_not_claimed() -> None:
    """After 1000 iterations the error is small, as the map hardly moves any point along its slowest direction."""
    slow, point = torch.logspace(-6, 0, 6), torch.linspace(1, 2, 6)
    x, state = solvers.broyden(lambda x: x - slow * (x - point), on_failure="ignore").run(torch.zeros(6))
    assert not torch.allclose(x, point, rtol=1e-2)
    assert status_of(state) is Status.BUDGET_SPENT


def test_a_root_that_is_still_approached_at_the_limit_is_not_claimed() -> None:
    """The third iterate has an error of 1e-6, the fourth would have all digits of float32."""
    solver = solvers.newton(lambda x: x**2 - 2, maxiter=3)
    x, state = solver.run(torch.tensor(1.0))
    assert status_of(state) is Status.BUDGET_SPENT and 1e-6 < (x - 2**0.5).abs() < 1e-5


# Not by `gradient_descent`, whose steps are at most as long as the largest curvature allows.
@pytest.mark.parametrize("factory", factories(LINE_SEARCHES))
def test_a_step_that_is_long_is_tried(factory: Any) -> None:
    """A gradient of 1e-11 at the guess, with the minimum 1000 times as far away as the guess from zero."""
    stiff = torch.tensor([1.0, 1e-9], dtype=F64)
    objective = lambda x: (stiff * (x - torch.tensor([1.0, 1.0], dtype=F64)) ** 2).sum() / 2  # noqa: E731
    x, state = factory(objective).run(torch.tensor([0.5, 1e-3], dtype=F64))
    assert state.converged
    torch.testing.assert_close(x, torch.ones(2, dtype=F64), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("dtype", "away"), [(F32, 500.0), (F64, 900.0)])
@pytest.mark.parametrize("factory", factories(LINE_SEARCHES))
def test_a_plateau_is_no_minimum(factory: Any, dtype: torch.dtype, away: float) -> None:
    """Far out on a bell curve the gradient is below its target, and a negative curvature far below the others."""

    def objective(x: Tensor) -> Tensor:
        return 100 * (x[2] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2 + 1 - torch.exp(-((x[1] / 100) ** 2) / 2)

    x, state = factory(objective).run(torch.tensor([-1.2, away, 1.0], dtype=dtype))
    assert state.converged and objective(x) < 1e-6


@pytest.mark.parametrize("flattest", [-11, -12])
@pytest.mark.parametrize("factory", factories(LINE_SEARCHES))
def test_the_flattest_of_many_directions_is_found(factory: Any, flattest: int) -> None:
    """The gradient says nothing of it, nor do the first products with the Hessian."""
    stiff = torch.logspace(0, flattest, 12, dtype=F64)
    objective = lambda x: (stiff * (x - 1) ** 2).sum() / 2  # noqa: E731
    x, state = factory(objective).run(torch.full((12,), 0.5, dtype=F64))
    assert state.converged
    torch.testing.assert_close(x, torch.ones(12, dtype=F64), rtol=1e-7, atol=0)


class Once(torch.autograd.Function):
    """``x^2 / 2``, differentiable once only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square() / 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0]


@pytest.mark.parametrize("factory", factories(MINIMISERS))
def test_an_objective_without_a_second_derivative_is_judged_by_its_gradient(factory: Any) -> None:
    weight = torch.tensor([1.0, 3.0], dtype=F64)
    with torch.no_grad():
        x, state = factory(lambda x: (weight * Once.apply(x - 1)).sum()).run(torch.zeros(2, dtype=F64))
    assert state.converged
    torch.testing.assert_close(x, torch.ones(2, dtype=F64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("factory", factories(MINIMISERS))
def test_many_minima_are_as_good_as_one(factory: Any, dtype: torch.dtype) -> None:
    """The Hessian has a null space, in which rounding makes steps of any length."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(20, 40, generator=generator, dtype=dtype)
    tall = torch.randn(40, 20, generator=generator, dtype=dtype)
    tall = torch.cat([tall, tall[:, :5]], dim=1)
    for matrix in (wide, tall):
        b = torch.randn(len(matrix), generator=generator, dtype=dtype)
        objective = lambda x, matrix=matrix, b=b: ((matrix @ x - b) ** 2).mean()  # noqa: E731
        x, state = factory(objective).run(torch.zeros(matrix.shape[1], dtype=dtype))
        least = torch.linalg.lstsq(matrix.double(), b.double()[:, None], driver="gelsd").solution[:, 0]
        off = (matrix.double() @ (x.double() - least)).norm() / b.double().norm()
        assert state.converged and off < (1e-3 if dtype == F32 else 1e-8)


@pytest.mark.parametrize("factory", factories(MINIMISERS))
def test_a_solution_at_zero_is_found_from_elsewhere(factory: Any) -> None:
    weights = torch.tensor([[1.0, 2.0], [-2.0, 0.5], [1.0, -2.5]], dtype=F64)
    x, state = factory(lambda x: torch.logsumexp(weights @ x, 0)).run(torch.full((2,), 0.1, dtype=F64))
    assert state.converged and x.abs().max() < 1e-9


@pytest.mark.parametrize("fn", [lambda x: x**2 + 1, torch.cosh])
def test_a_minimum_may_owe_its_curvature_to_the_residual(fn: Callable[[Tensor], Tensor]) -> None:
    """There the Jacobian is zero."""
    x, state = solvers.levenberg_marquardt(fn).run(torch.full((1,), 2.0, dtype=F64))
    assert state.converged and x.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("unit", [1.0, 2e3, 1e6])
def test_a_guess_near_a_bound_is_not_taken_for_a_solution(unit: float, dtype: torch.dtype) -> None:
    """The residual is no longer than the way to the bound, and the gradient is as large as can be."""
    s = torch.tensor([1.0, 2.0, 3.0], dtype=dtype)
    x, _ = solvers.levenberg_marquardt(lambda x: unit * (x - s), bounds=(0.0, None)).run(1.3 * s)
    torch.testing.assert_close(x, s, rtol=1e-5, atol=0)
    x, _ = solvers.lbfgs_b(lambda x: 0.5 * unit**2 * ((x - s) ** 2).sum(), (0.0, None)).run(1.3 * s)
    torch.testing.assert_close(x, s, rtol=1e-5, atol=0)


# --- statuses ---------------------------------------------------------------------------------------------------------

POINTS = torch.tensor([[1.0, 2.0], [2.0, 1.0], [-1.0, -1.5], [-2.0, -0.5]], dtype=F64)
LABELS = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=F64)


@pytest.mark.parametrize("factory", factories(MINIMISERS))
def test_separable_classes_have_no_minimum(factory: Any) -> None:
    loss = lambda w: torch.nn.functional.softplus(-LABELS * (POINTS @ w)).mean()  # noqa: E731
    with pytest.raises(ConvergenceError, match="no minimum") as caught:
        factory(loss).run(torch.zeros(2, dtype=F64))
    assert caught.value.status is Status.UNBOUNDED


class Straight(torch.autograd.Function):
    """Rounding whose gradient is that of the identity."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("factory", factories(LINE_SEARCHES))
def test_a_gradient_that_is_not_of_the_value_fails_soon(factory: Any, dtype: torch.dtype) -> None:
    aim, calls = torch.tensor([0.3, 1.7, -0.4], dtype=dtype), [0]

    def objective(w: Tensor) -> Tensor:
        calls[0] += 1
        return ((Straight.apply(w) - aim) ** 2).sum()

    _, state = factory(objective, on_failure="ignore").run(torch.zeros(3, dtype=dtype))
    assert status_of(state) is Status.LINE_SEARCH_FAILED and calls[0] < 300


@pytest.mark.parametrize("factory", factories(MINIMISERS))
@pytest.mark.parametrize("implicit_diff", [True, False])
def test_a_barrier_is_minimised_where_momentum_would_leave_the_domain(factory: Any, implicit_diff: bool) -> None:
    barrier = lambda x, c: -torch.log(x).sum() + c @ x  # noqa: E731
    c = torch.tensor([1.0, 100.0], dtype=F64)
    solve = lambda c: factory(barrier).run(torch.ones(2, dtype=F64), c, implicit_diff=implicit_diff)[0]  # noqa: E731
    torch.testing.assert_close(solve(c), 1 / c, rtol=1e-5, atol=0)
    slope = jacrev(solve)(c)
    assert slope.isfinite().all()
    if implicit_diff:
        torch.testing.assert_close(slope, torch.diag(-1 / c**2), rtol=1e-6, atol=1e-12)


def test_scipys_own_status_and_message_are_kept() -> None:
    fn = lambda x: ((x - 1) ** 4).sum() + 100 * (x[1:] - x[:-1] ** 2).square().sum()  # noqa: E731
    options = {"method": "L-BFGS-B", "on_failure": "ignore"}
    _, state = solvers.scipy_minimize(fn, scipy_options={"maxfun": 20}, **options).run(torch.zeros(10, dtype=F64))
    assert status_of(state) is Status.BUDGET_SPENT
    assert state.memory.code == 1 and "EXCEEDS LIMIT" in state.memory.text
    _, state = solvers.scipy_minimize(fn, **options).run(torch.zeros(10, dtype=F64))
    assert state.memory.code == 0 and "CONVERGENCE" in state.memory.text


# --- a failed lane and its derivative ---------------------------------------------------------------------------------


@pytest.mark.parametrize("derivative", [grad, jacfwd])
def test_one_bad_lane_has_a_derivative_that_is_nan_where_that_was_asked_for(derivative: Any) -> None:
    fn = lambda x, c: c * (x - 1) ** 2 + (1 - c) * (x - 1)  # noqa: E731  # a double root at 1 for c = 1
    run = lambda solver: lambda c: solver.run(torch.ones((), dtype=F64), c)[0] * (1 + c)  # noqa: E731
    c = torch.tensor([0.0, 1.0, 0.5], dtype=F64)
    slopes = vmap(derivative(run(solvers.newton(fn, on_failure="ignore"))))(c)
    assert slopes.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(slopes[::2], torch.ones(2, dtype=F64))
    with pytest.raises(Exception, match="singular"):
        vmap(derivative(run(solvers.newton(fn))))(c)


# --- methods ----------------------------------------------------------------------------------------------------------


def test_broyden_makes_a_new_jacobian_where_steps_fail() -> None:
    def helical(x: Tensor) -> Tensor:
        angle = torch.atan2(x[1], x[0]) / (2 * math.pi)
        return torch.stack([10 * (x[2] - 10 * angle), 10 * (x[:2].norm() - 1), x[2]])

    x, state = solvers.broyden_root(helical, backtracking=True).run(torch.tensor([-1.0, 1e-9, 0.0], dtype=F64))
    assert state.iter_num < 30
    torch.testing.assert_close(x, torch.tensor([1.0, 0.0, 0.0], dtype=F64), rtol=1e-8, atol=1e-8)
