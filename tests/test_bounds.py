"""Bounds on the unknowns in `lbfgs_b` and `levenberg_marquardt`; the table of solvers has one row for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.optimize
import torch
from checks.differences import central
from checks.tensors import vector
from problem_sets.hock_schittkowski import hs3, hs4, hs5, hs25, hs45, hs110, wood
from tables.losses import decay_at, rosenbrock
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from implicitdiff.errors import ConvergenceError
from implicitdiff.solvers import LbfgsBMemory, Status, lbfgs_b, levenberg_marquardt
from implicitdiff.solvers._loop.bounds import Limits
from implicitdiff.solvers._steps.line_search import Segment, search
from implicitdiff.solvers.lbfgs_b import _cauchy_point, _model, _subspace_step

F64 = torch.float64
INF = float("inf")


# --- problems of Hock and Schittkowski, Lecture Notes in Economics and Mathematical Systems 187 (1981), and others ---


class Problem(NamedTuple):
    """A function, an initial guess, the bounds, and the minimum if it is known."""

    fn: Callable[[Tensor], Tensor]
    guess: Sequence[float]
    lower: Sequence[float]
    upper: Sequence[float]
    minimum: float | None = None


def six_hump_camel(x: Tensor) -> Tensor:
    return 4 * x[0] ** 2 - 2.1 * x[0] ** 4 + x[0] ** 6 / 3 + x[0] * x[1] - 4 * x[1] ** 2 + 4 * x[1] ** 4


def obstacle(x: Tensor) -> Tensor:
    """A membrane over an obstacle."""
    end = x.new_zeros(1)
    return ((torch.diff(x, prepend=end, append=end)) ** 2).sum() * 20 + x.sum() / 80


HEIGHTS = (0.3 - 4 * (torch.linspace(0.025, 0.975, 39, dtype=F64) - 0.5) ** 2).tolist()
PROBLEMS = {
    "HS1": Problem(rosenbrock, [-2, 1], [-INF, -1.5], [INF, INF], 0.0),
    "HS2": Problem(rosenbrock, [-2, 1.5], [-INF, 1.5], [INF, INF]),
    "HS3": Problem(hs3, [10, 1], [-INF, 0], [INF, INF], 0.0),
    "HS4": Problem(hs4, [1.125, 0.125], [1, 0], [INF, INF], 8 / 3),
    "HS5": Problem(hs5, [0, 0], [-1.5, -3], [4, 3], -(3**0.5) / 2 - torch.pi / 3),
    "HS38": Problem(wood, [-3, -1, -3, -1], [-10] * 4, [10] * 4, 0.0),
    "HS45": Problem(hs45, [2] * 5, [0] * 5, [1, 2, 3, 4, 5], 1.0),
    "HS110": Problem(hs110, [9] * 10, [2.001] * 10, [9.999] * 10, -45.77846971),
    "Rosenbrock, 10": Problem(rosenbrock, [-1.2, 1] * 5, [-5] * 10, [0.5] * 10),
    "Rosenbrock, 40, far from the box": Problem(rosenbrock, [30.0] * 40, [1.5, -10] * 20, [10] * 40),
    "Wood, at bounds": Problem(wood, [-3, -1, -3, -1], [-2] * 4, [0.7, 2, 2, 2]),
    "camel": Problem(six_hump_camel, [1.1, 1.1], [-3, -1.5], [3, 1.5], -1.031628453),
    "obstacle": Problem(obstacle, [1.0] * 39, HEIGHTS, [INF] * 39),
}


def by_scipy(problem: Problem) -> tuple[Tensor, float, int]:
    """The solution, the error of the condition there, and the number of evaluations."""

    def fun(z: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.tensor(z, requires_grad=True)
        value = problem.fn(x)
        return value.item(), torch.autograd.grad(value, x)[0].numpy()

    box = scipy.optimize.Bounds(problem.lower, problem.upper)
    options = {"ftol": 0.0, "gtol": 1e-9}
    found = scipy.optimize.minimize(fun, problem.guess, jac=True, method="L-BFGS-B", bounds=box, options=options)
    error = np.linalg.norm(found.x - np.clip(found.x - fun(found.x)[1], problem.lower, problem.upper))
    return torch.from_numpy(found.x), float(error), found.nfev


@pytest.mark.parametrize("name", PROBLEMS)
def test_bounded_problems_are_solved_as_by_scipy_in_at_most_twice_as_many_evaluations(name):
    problem = PROBLEMS[name]
    lower, upper = vector(*problem.lower), vector(*problem.upper)
    calls = []

    def counted(x: Tensor) -> Tensor:
        calls.append(x)
        return problem.fn(x)

    expected, error, evaluations = by_scipy(problem)
    solver = lbfgs_b(counted, (lower, upper), rtol=0.0, atol=max(error, 1e-9), compile="off")
    x, state = solver.run(vector(*problem.guess))
    assert state.status == Status.CONVERGED and ((x >= lower) & (x <= upper)).all()
    # Two more measure how precise the gradient is, and one finds what the function captures.
    assert len(calls) <= 2 * evaluations + 3
    minimum = problem.fn(expected) if problem.minimum is None else vector(problem.minimum).squeeze()
    torch.testing.assert_close(problem.fn(x), minimum, rtol=1e-9, atol=1e-9)


def test_a_guess_where_the_gradient_is_tiny_is_no_solution_by_default():
    """SciPy's L-BFGS-B stays at Hock and Schittkowski's guess, where the function is 32.8."""
    x, state = lbfgs_b(hs25, (vector(0.1, 0.0, 0.0), vector(100.0, 25.6, 5.0))).run(vector(100.0, 12.5, 3.0))
    assert state.status == Status.CONVERGED
    torch.testing.assert_close(x, vector(50.0, 25.0, 1.5), rtol=1e-6, atol=0.0)


def test_an_iteration_takes_about_one_evaluation():
    calls = []
    problem = PROBLEMS["obstacle"]

    def counted(x: Tensor) -> Tensor:
        calls.append(x)
        return obstacle(x)

    _, state = lbfgs_b(counted, (vector(*problem.lower), None), compile="off").run(vector(*problem.guess))
    assert len(calls) <= 1.25 * state.iter_num + 8


def test_a_linear_function_ends_in_a_corner_or_has_no_lower_bound():
    slope = vector(1.0, -2.0, 1e-3)
    x, state = lbfgs_b(lambda x: slope @ x, (-1.0, vector(1.0, 5.0, 9.0))).run(vector(0.5, 0.0, 3.0))
    torch.testing.assert_close(x, vector(-1.0, 5.0, -1.0), rtol=0, atol=0)
    # The least slope leads on by 1 in the first iteration, and by longer and longer ways in the next.
    assert state.status == Status.CONVERGED and state.iter_num <= 4
    _, state = lbfgs_b(lambda x: slope @ x, (-1.0, None), on_failure="ignore").run(vector(0.5, 0.0, 3.0))
    assert state.status == Status.UNBOUNDED


def test_a_path_along_many_bounds_is_followed_to_its_end():
    """Every unknown of the first step reaches a bound at another time."""
    n = 200
    scale = torch.linspace(0.1, 3.0, n, dtype=F64)
    goal = torch.linspace(-2.0, 2.0, n, dtype=F64)
    x, state = lbfgs_b(lambda x: (scale * (x - goal) ** 2).sum(), (-0.7, 0.4)).run(torch.zeros(n, dtype=F64))
    torch.testing.assert_close(x, goal.clamp(-0.7, 0.4), rtol=1e-9, atol=1e-9)
    assert state.iter_num < 30


def test_single_precision():
    x, state = lbfgs_b(rosenbrock, (torch.tensor([-5.0, 0.5]), torch.tensor([0.6, 5.0]))).run(torch.zeros(2))
    assert state.status == Status.CONVERGED and x.dtype == torch.float32
    expected, _ = lbfgs_b(rosenbrock, (vector(-5.0, 0.5), vector(0.6, 5.0))).run(torch.zeros(2, dtype=F64))
    torch.testing.assert_close(x.double(), expected, rtol=1e-4, atol=1e-4)


def random_memory() -> tuple[LbfgsBMemory, Tensor]:
    """Six unknowns after three steps with a positive definite Hessian, and the matrix that BFGS makes of them."""
    generator = torch.Generator().manual_seed(2)
    root, steps, grad = (torch.randn(*shape, generator=generator, dtype=F64) for shape in ((6, 6), (3, 6), (6,)))
    changes = steps @ (root @ root.T + torch.eye(6, dtype=F64))
    B = curvature = changes[-1] @ changes[-1] / (changes[-1] @ steps[-1]) * torch.eye(6, dtype=F64)
    for s, y in zip(steps, changes, strict=True):
        B = B - torch.outer(B @ s, B @ s) / (s @ B @ s) + torch.outer(y, y) / (s @ y)
    lengths = steps.norm(dim=-1, keepdim=True)
    # One place in the history is empty.
    pad = torch.zeros(1, 6, dtype=F64)
    none = torch.zeros(1, dtype=F64)
    memory = LbfgsBMemory(
        residual=grad[None],
        value=none,
        grad=grad[None],
        magnitude=none,
        curvature=curvature[:1, 0],
        steps=torch.cat([pad, steps / lengths])[None],
        changes=torch.cat([pad, changes / lengths])[None],
        mark=none[:, None],
    )
    return memory, B


def first_minimum_on_path(x: Tensor, g: Tensor, B: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Of ``g'z + z'B z / 2`` along ``clip(x - t g)``, piece by piece."""
    times = torch.where(g > 0, (x - lower) / g, (x - upper) / g)
    t = scalar_zero = torch.zeros((), dtype=F64)
    for end in torch.sort(times).values:
        d = torch.where(times > t, -g, scalar_zero)
        z = (x - t * g).clamp(lower, upper) - x
        ahead = -(g @ d + z @ B @ d) / (d @ B @ d)
        if t + ahead <= end:
            return x + z + ahead.clamp(min=0) * d
        t = end
    return (x - t * g).clamp(lower, upper)


@pytest.mark.parametrize("width", [0.02, 0.1, 0.3, 1.0, 100.0])
def test_the_quadratic_model_is_minimised_as_with_the_dense_matrix(width):
    """The Cauchy point, and the minimum over the unknowns that are free there."""
    memory, B = random_memory()
    x, g = torch.zeros(6, dtype=F64), memory.grad[0]
    lower, upper = -width * torch.arange(1.0, 7.0, dtype=F64), width * torch.arange(6.0, 0.0, -1.0, dtype=F64)
    model, limits = _model(memory), Limits(lower[None], upper[None])
    compact = model.curvature[..., None] * torch.eye(6, dtype=F64) - model.W @ model.M @ model.W.mT
    torch.testing.assert_close(compact[0], B, rtol=1e-10, atol=1e-10)
    cauchy, free = _cauchy_point(model, limits, x[None], g[None], 1e-16)
    torch.testing.assert_close(cauchy[0], first_minimum_on_path(x, g, B, lower, upper), rtol=1e-10, atol=1e-12)
    assert torch.equal(free[0], (cauchy[0] > lower) & (cauchy[0] < upper))
    step, kept = _subspace_step(model, cauchy - x, g[None], free)[0], free[0]
    r = (g + B @ (cauchy[0] - x))[kept]
    torch.testing.assert_close(step[kept], -torch.linalg.solve(B[kept][:, kept], r), rtol=1e-9, atol=1e-12)
    assert (step[~kept] == 0).all()


def test_a_line_that_ends_is_searched_to_its_end_and_no_further():
    steps = []

    def at(step: Tensor) -> Tensor:
        steps.append(float(step))
        return step[:, None]

    one = torch.ones(1, dtype=F64)
    falling = SimpleNamespace(value_and_grad=lambda x: (-x[:, 0], -torch.ones_like(x)))
    rows = SimpleNamespace(fn=falling, eps=1e-16, plain=True)
    memory = SimpleNamespace(value=0 * one, grad=-one[:, None], magnitude=one)
    state = SimpleNamespace(memory=memory, status=torch.zeros(1, dtype=torch.int64))
    segment = Segment(2.5 * one, at)
    point, failed, status = search(rows, 0 * one[:, None], state, one[:, None], one, segment=segment)
    assert steps == [1.0, 2.5] and point.step == 2.5 and not failed and status == Status.RUNNING


# --- least squares ----------------------------------------------------------------------------------------------------

TIMES = torch.linspace(0.0, 4.0, 25, dtype=F64)
Y = 2 * torch.exp(-TIMES) + 0.5 + 0.02 * torch.cos(40 * TIMES)


decay = decay_at(TIMES, Y)


def bumps(p: Tensor, y: Tensor = Y) -> Tensor:
    return p[0] * torch.exp(-(((TIMES - p[1]) / p[2]) ** 2)) + p[3] * TIMES - y


FITS = {
    "free": (decay, [1.0, 0.3, 0.0], [-9, -9, -9], [9, 9, 9]),
    "one bound": (decay, [1.0, 0.3, 0.0], [0, 0, 0], [1.8, 5, 1]),
    "two bounds": (decay, [1.0, 0.3, 0.0], [0, 0, 0], [1.8, 5, 0.4]),
    "all bounds": (decay, [1.0, 0.3, 0.0], [0, 0, 0], [1.5, 0.5, 0.2]),
    "far outside": (decay, [50.0, -30.0, 7.0], [0, 0, 0], [1.8, 5, 0.4]),
    "curved": (bumps, [1.0, 1.0, 1.0, 0.0], [0, 0.2, 0.5, -1], [1.9, 3, 1.2, 0.1]),
}


@pytest.mark.parametrize("name", FITS)
def test_fits_in_a_box_are_those_of_scipy(name):
    fn, guess, lower, upper = FITS[name]
    inside = np.clip(guess, lower, upper)
    how = {"jac": lambda p: jacfwd(fn)(vector(*p)).numpy(), "bounds": (lower, upper), "method": "dogbox"}
    tight = {"xtol": 1e-15, "ftol": 1e-15, "gtol": 1e-15}
    expected = scipy.optimize.least_squares(lambda p: fn(vector(*p)).numpy(), inside, **how, **tight)
    x, state = levenberg_marquardt(fn, bounds=(vector(*lower), vector(*upper))).run(vector(*guess))
    assert state.status == Status.CONVERGED
    torch.testing.assert_close(x, vector(*expected.x), rtol=1e-7, atol=1e-7)
    assert state.iter_num <= 2 * expected.nfev + 5


def test_fewer_residuals_than_unknowns_in_a_box():
    solver = levenberg_marquardt(lambda x: (x.sum() - 5.0)[None], bounds=(0.0, vector(1.0, 2.0, 9.0)))
    x, state = solver.run(torch.zeros(3, dtype=F64))
    assert state.status == Status.CONVERGED
    torch.testing.assert_close(x.sum(), vector(5.0)[0])
    assert (x >= 0).all() and (x <= vector(1.0, 2.0, 9.0)).all()


# --- both: what an unknown at a bound does ----------------------------------------------------------------------------

MIXED = vector([2.0, 0.5, -0.3], [0.5, 1.5, 0.4], [-0.3, 0.4, 1.0])


def nonlinear(x: Tensor, theta: Tensor) -> Tensor:
    """Residuals that do not vanish at the solution."""
    return torch.cat([MIXED @ x - theta, 0.5 * x**2, 0.2 * torch.sin(x + theta)])


def minimise(fn: Callable[..., Tensor], bounds: Any, **options: Any):
    return lbfgs_b(lambda *args: fn(*args).square().sum() / 2, bounds, rtol=0.0, atol=1e-11, **options)


def fit(fn: Callable[..., Tensor], bounds: Any, **options: Any):
    return levenberg_marquardt(fn, bounds=bounds, rtol=0.0, atol=1e-11, **options)


BOTH = pytest.mark.parametrize("make", [minimise, fit])
THETA = vector(3.0, 0.3, -1.0)


@BOTH
def test_an_unknown_at_a_bound_moves_with_the_bound_alone(make):
    """min |x - theta|^2 in a box: x = clip(theta, lower, upper)."""

    def solution(theta: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        return make(lambda x: x - theta, (lower, upper)).run(torch.zeros(3, dtype=F64))[0]

    operands = (vector(-3.0, 0.3, 5.0), vector(-1.0, -1.0, -1.0), vector(1.0, 2.0, 3.0))
    for jacobian in (jacrev, jacfwd):
        at = jacobian(solution, argnums=(0, 1, 2))(*operands)
        for found, diagonal in zip(at, ([0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]), strict=True):
            torch.testing.assert_close(found, torch.diag(vector(*diagonal)), rtol=0, atol=1e-12)


@BOTH
def test_the_others_follow_in_both_modes_and_to_second_order(make):
    def solution(both: Tensor) -> Tensor:
        theta, upper = both.split([3, 1])
        return make(nonlinear, (-0.8, torch.cat([upper, vector(5.0, 5.0)]))).run(torch.zeros(3, dtype=F64), theta)[0]

    at = torch.cat([THETA, vector(0.9)])
    x = solution(at)
    assert x[0] == 0.9 and x[2] == -0.8 and x[1].abs() < 5
    expected = central(solution, at)
    for jacobian in (jacrev, jacfwd):
        found = jacobian(solution)(at)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(found[0], vector(0.0, 0.0, 0.0, 1.0), rtol=0, atol=0)
        torch.testing.assert_close(found[2], torch.zeros(4, dtype=F64), rtol=0, atol=0)
    second = central(lambda at: jacrev(lambda at: solution(at)[1])(at), at)
    assert second.abs().max() > 0.05
    for order in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f))):
        torch.testing.assert_close(order(lambda at: solution(at)[1])(at), second, rtol=1e-6, atol=1e-6)


@BOTH
def test_lanes_have_their_own_bounds_and_derivatives(make):
    uppers = vector([0.9, 5.0, 5.0], [5.0, 5.0, 5.0], [0.3, 0.1, -0.2])

    def solution(upper: Tensor) -> Tensor:
        return make(nonlinear, (-0.8, upper)).run(torch.zeros(3, dtype=F64), THETA)[0]

    x = vmap(solution)(uppers)
    torch.testing.assert_close(x, torch.stack([solution(upper) for upper in uppers]), rtol=1e-12, atol=1e-12)
    expected = torch.stack([central(solution, upper) for upper in uppers])
    for jacobian in (jacrev, jacfwd):
        torch.testing.assert_close(vmap(jacobian(solution))(uppers), expected, rtol=1e-6, atol=1e-6)
    summed = jacrev(lambda uppers: vmap(solution)(uppers).sum(dim=0))(uppers)
    torch.testing.assert_close(summed.permute(1, 0, 2), expected, rtol=1e-6, atol=1e-6)


@BOTH
def test_unrolled_steps_have_the_derivatives_of_the_condition(make):
    def solution(both: Tensor, **how: Any) -> Tensor:
        theta, upper = both.split([3, 1])
        solver = make(nonlinear, (-0.8, torch.cat([upper, vector(5.0, 5.0)])))
        return solver.run(torch.zeros(3, dtype=F64), theta, **how)[0]

    at = torch.cat([THETA, vector(0.9)])
    for jacobian in (jacrev, jacfwd):
        found = jacobian(lambda at: solution(at, implicit_diff=False))(at)
        torch.testing.assert_close(found, jacrev(solution)(at), rtol=1e-6, atol=1e-6)


@BOTH
def test_at_a_bound_with_no_gradient_the_derivative_is_that_of_the_bound(make):
    def solution(theta: Tensor, lower: Tensor) -> Tensor:
        return make(lambda x: x - theta, (lower, None)).run(vector(3.0)[0])[0]

    one = vector(1.0)[0]
    assert [float(d) for d in grad(solution, argnums=(0, 1))(one, one)] == [0.0, 1.0]
    assert [float(d) for d in grad(solution, argnums=(0, 1))(one, 1 - 1e-6 * one)] == [1.0, 0.0]


@BOTH
def test_the_guess_is_moved_into_the_box_and_no_other_point_is_looked_at(make):
    outside = []

    def root(x: Tensor) -> Tensor:
        outside.append(bool(((x < lower) | (x > upper)).any()))
        return torch.sqrt(x) - vector(0.5, 2.0)

    lower, upper = vector(0.36, 0.01), vector(9.0, 3.0)
    solver = make(root, (lower, upper))
    for guess in (vector(-5.0, -7.0), vector(0.36, 3.0), vector(50.0, 2.0)):
        outside.clear()
        x, state = solver.run(guess)
        assert state.status == Status.CONVERGED
        torch.testing.assert_close(x, vector(0.36, 3.0), rtol=1e-12, atol=0.0)
        # The first call, at the guess itself, finds what the function captures.
        assert not any(outside[1:]) and len(outside) > 2


@BOTH
def test_a_guess_outside_of_the_box_is_no_solution(make):
    solver = make(lambda x: x - 2.0, (0.0, 1.0))
    x, state = solver.run(vector(2.0))
    assert state.iter_num >= 1 and x == 1.0
    torch.testing.assert_close(solver.optimality_fn(vector(2.0)), vector(1.0))


@BOTH
def test_an_unknown_with_two_equal_bounds_is_fixed(make):
    value = vector(0.4)[0]

    def solution(value: Tensor) -> Tensor:
        box = (torch.stack([value, -9 * value, -9 * value]), torch.stack([value, 9 * value, 9 * value]))
        return make(nonlinear, box).run(torch.zeros(3, dtype=F64), THETA)[0]

    x = solution(value)
    assert x[0] == value
    rest = make(lambda y: nonlinear(torch.cat([value[None], y]), THETA), (-3.6, 3.6)).run(torch.zeros(2, dtype=F64))
    torch.testing.assert_close(x[1:], rest[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(jacrev(solution)(value), central(lambda v: solution(v[0]), value[None])[:, 0])


@BOTH
def test_bounds_may_be_trees_and_absent(make):
    goal = {"a": vector(3.0, -3.0), "b": vector(2.0)[0]}
    bounds = ({"a": None, "b": 2.5}, {"a": vector(1.0, 9.0), "b": None})
    start = {"a": torch.zeros(2, dtype=F64), "b": vector(0.0)[0]}
    x, _ = make(lambda x: torch.cat([x["a"] - goal["a"], (x["b"] - goal["b"])[None]]), bounds).run(start)
    torch.testing.assert_close(x, {"a": vector(1.0, -3.0), "b": vector(2.5)[0]}, rtol=1e-9, atol=1e-9)


def test_a_small_gradient_beside_large_unknowns_is_seen():
    """In ``x - clip(x - gradient)`` it would be rounded away."""

    def residual(x: Tensor) -> Tensor:
        return 1e-9 * (x - vector(1e3, 5e3))

    for solver in (
        lbfgs_b(lambda x: residual(x).square().sum(), (0.0, 4e3)),
        levenberg_marquardt(residual, bounds=(0.0, 4e3)),
    ):
        x, state = solver.run(vector(1.1e3, 3e3))
        assert state.status == Status.CONVERGED
        torch.testing.assert_close(x, vector(1e3, 4e3), rtol=1e-9, atol=0)


@BOTH
def test_bounds_that_make_no_sense_are_refused(make):
    for bounds in (3.0, (0.0, 1.0, 2.0)):
        with pytest.raises(ValueError, match="bounds must be a pair"):
            make(nonlinear, bounds)
    with pytest.raises(ValueError, match="lower must be at most upper"):
        make(nonlinear, (vector(0.0, 2.0, 0.0), 1.0)).run(torch.zeros(3, dtype=F64), THETA)
    with pytest.raises(ValueError, match="upper must be"):
        make(nonlinear, (0.0, torch.ones(2, dtype=F64))).run(torch.zeros(3, dtype=F64), THETA)


def test_a_history_of_no_steps_is_refused():
    with pytest.raises(ValueError, match="lbfgs_b: history must be an integer >= 1, got 0"):
        lbfgs_b(rosenbrock, (0.0, 1.0), history=0)


@BOTH
def test_a_function_that_is_no_number_fails_in_its_lane_alone(make):
    solver = make(lambda x, theta: x - theta, (0.0, 1.0), on_failure="ignore")
    x, state = vmap(lambda theta: solver.run(vector(0.5), theta))(vector([0.3], [float("nan")], [2.0]))
    assert [Status(int(s)) for s in state.status] == [Status.CONVERGED, Status.DIVERGED, Status.CONVERGED]
    torch.testing.assert_close(x[::2], vector([0.3], [1.0]), rtol=1e-9, atol=1e-9)
    with pytest.raises(ConvergenceError):
        make(lambda x: x - float("nan"), (0.0, 1.0)).run(vector(0.5))
