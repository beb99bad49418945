"""The tables of systems, bounded problems, fixed points and first-order problems are right, and so are their checks."""

from __future__ import annotations

import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from problem_sets import checks, fixed_points, hock_schittkowski, minpack_roots, nonlinear_solve
from problem_sets.problem import Roots
from scipy.optimize import Bounds, brentq, minimize, root
from torch.func import grad, hessian, jacfwd, vmap

SYSTEMS = (*minpack_roots.PROBLEMS, *nonlinear_solve.PROBLEMS, *fixed_points.ROOTS)
ROOTLESS = (*minpack_roots.ROOTLESS, *fixed_points.ROOTLESS)
BOUNDED = (*hock_schittkowski.PROBLEMS, *fixed_points.BOUNDED)
DTYPES = (torch.float32, torch.float64)
each = partial(pytest.mark.parametrize, "problem", ids=str)


def functions_of(problem):
    """Every function of a record and a point to call it at."""
    start = getattr(problem, "start", None) or (0.3 * problem.lower + 0.7 * problem.upper,)
    names = ("residual", "fn", "objective", "penalty", "projection", "softmax")
    functions = [getattr(problem, name) for name in names if getattr(problem, name, None)]
    if hasattr(problem, "prox"):
        functions.append(partial(lambda prox, v: prox(v + 30.0, 0.5), problem.prox))
    return functions, np.array(start, dtype=np.float64)


ALL = (
    *SYSTEMS,
    *BOUNDED,
    *fixed_points.FIXED_POINTS,
    *fixed_points.BRACKETS,
    *fixed_points.MINIMA,
    *fixed_points.COMPOSITES,
    *fixed_points.CONSTRAINED,
)


@each(ALL)
def test_functions_are_the_same_in_numpy_and_torch_and_under_vmap(problem):
    functions, start = functions_of(problem)
    for fn in functions:
        expected = np.asarray(fn(start))
        close = {"rtol": 1e-12, "atol": 1e-13 * max(1.0, np.abs(expected).max())}
        np.testing.assert_allclose(fn(torch.tensor(start)).numpy(), expected, **close)
        lanes = vmap(fn)(torch.tensor(np.stack((start, start + 0.01))))
        np.testing.assert_allclose(lanes[0].numpy(), expected, **close)
        assert fn(torch.tensor(start, dtype=torch.float32)).dtype == torch.float32


@each(ALL)
def test_functions_have_finite_derivatives_in_both_modes_at_the_start(problem):
    functions, start = functions_of(problem)
    x = torch.tensor(start)
    for fn in functions:
        forward, reverse = jacfwd(fn)(x), torch.func.jacrev(fn)(x)
        assert forward.isfinite().all()
        torch.testing.assert_close(forward, reverse, rtol=1e-10, atol=1e-10 * float(1 + forward.abs().max()))


def test_functions_are_the_same_in_jax():
    jax = pytest.importorskip("jax")
    seen = set()
    with warnings.catch_warnings(), jax.enable_x64(True):
        warnings.simplefilter("ignore")
        for problem in ALL:
            functions, start = functions_of(problem)
            for fn in functions:
                code = getattr(fn, "func", fn).__code__
                if code in seen:  # its operations are compiled for every size
                    continue
                seen.add(code)
                expected = np.asarray(fn(start))
                found = fn(jax.numpy.asarray(start))
                np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13 * max(1.0, np.abs(expected).max()))


# Systems

FOUND_ELSEWHERE = {
    "15 Hammarling 2 by 2": (0.01, 50.0, 0.0, 0.01),
    "16 Hammarling 3 by 3": (0.01, 50.0, 0.0, 0.0, 0.01, 0.0, 0.0, 0.0, 0.01),
    "21 Freudenstein-Roth": (5.0, 4.0),
    "11 trigonometric": None,
}


def ends_of(problem, starts):
    jacobian = partial(checks.jacobian, problem.residual)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for start in starts:
            for method in ("lm", "hybr"):
                yield root(problem.residual, np.array(start), jac=jacobian, method=method, tol=1e-15).x


def is_root(problem, x):
    return checks.norm_at(problem.residual, x) <= max(
        1e-12 * checks.norm_at(problem.residual, np.array(problem.start)),
        checks.rounding(problem.residual, x, torch.float64),
    )


@each([p for p in SYSTEMS if p.name not in ROOTLESS])
def test_system_has_a_root(problem):
    if known := FOUND_ELSEWHERE.get(problem.name):
        assert is_root(problem, np.array(known))
        return
    starts = (problem.start, *problem.starts)
    if problem.name == "11 trigonometric":
        starts = tuple(100 * np.array([problem.start]))
    assert any(is_root(problem, x) for x in ends_of(problem, starts))


def test_chebyquad_of_8_nodes_has_no_root():
    """Its least squares are bounded problem CHEBYQAD 8, whose value is that of More, Garbow and Hillstrom."""
    system, bounded = (next(p for p in ALL if p.name == name) for name in ("Chebyquad 8", "CHEBYQAD 8"))
    for x in np.random.RandomState(0).uniform(size=(5, 8)):
        assert float(bounded.objective(x)) == pytest.approx((system.residual(x) ** 2).sum(), rel=1e-13)
    assert bounded.value == pytest.approx(3.51687e-3, abs=5e-9)


def test_systems_that_are_gradients_are_those_of_their_objectives():
    def watson_objective(x):
        t = torch.arange(1, 30, dtype=x.dtype) / 29
        value = sum(c * t**j for j, c in enumerate(x))
        slope = sum(j * c * t ** (j - 1) for j, c in enumerate(x) if j)
        return ((slope - value**2 - 1) ** 2).sum() + x[0] ** 2 + (x[1] - x[0] ** 2 - 1) ** 2

    draws = torch.tensor(np.random.RandomState(0).normal(size=9))
    torch.testing.assert_close(minpack_roots.watson(draws), grad(watson_objective)(draws) / 2, rtol=1e-12, atol=1e-10)
    x = draws[:4]
    half = torch.tensor([0.5, 1, 0.5, 1])
    torch.testing.assert_close(minpack_roots.wood(x), half * grad(hock_schittkowski.wood)(x), rtol=1e-12, atol=1e-10)


def test_helical_valley_turns_as_the_arc_tangent_of_its_definition():
    for a, b in ((0.3, -0.7), (0.3, 0.7), (-0.3, 0.7), (-0.3, -0.7), (-1.0, 0.0), (1.0, 0.0)):
        expected = math.atan(b / a) / (2 * math.pi) + (0.5 if a < 0 else 0.0)
        assert float(minpack_roots.turn(np.array(a), np.array(b))) == pytest.approx(expected, abs=1e-15)
    assert float(minpack_roots.turn(np.array(0.0), np.array(-2.0))) == -0.25


@pytest.mark.parametrize("doubled", [False, True])
def test_integral_equation_is_that_of_the_loops(doubled):
    x = np.random.RandomState(0).normal(size=6)
    n, h = len(x), 1 / 7
    t = [j * h for j in range(1, n + 1)]
    expected = []
    for k in range(n):
        below = sum(t[j] * (x[j] + t[j] + 1) ** 3 for j in range(k + 1))
        above = sum((1 - t[j]) * (x[j] + t[j] + 1) ** 3 for j in range(k if doubled else k + 1, n))
        expected.append(x[k] + h * ((1 - t[k]) * below + t[k] * above) / 2)
    residual = nonlinear_solve.discrete_integral if doubled else minpack_roots.discrete_integral
    np.testing.assert_allclose(residual(x), expected, rtol=1e-13)


def test_banded_and_boundary_systems_are_those_of_the_loops():
    x = np.random.RandomState(0).normal(size=9)
    n = len(x)
    banded, boundary = [], []
    for k in range(n):
        near = [j for j in range(max(0, k - 5), min(n, k + 2)) if j != k]
        banded.append(x[k] * (2 + 5 * x[k] ** 2) + 1 - sum(x[j] * (1 + x[j]) for j in near))
        left, right = (x[j] if 0 <= j < n else 0.0 for j in (k - 1, k + 1))
        boundary.append(2 * x[k] - left - right + (x[k] + (k + 1) / (n + 1) + 1) ** 3 / (2 * (n + 1) ** 2))
    np.testing.assert_allclose(minpack_roots.broyden_banded(x), banded, rtol=1e-13)
    np.testing.assert_allclose(minpack_roots.discrete_boundary_value(x), boundary, rtol=1e-13)


def test_watson_of_nonlinear_solve_is_that_of_its_loops():
    x = np.array([0.3, -0.7, 0.2])
    n, expected = len(x), np.zeros(3)
    for i in range(1, 30):
        t = i / 29
        first = sum(j * t ** (j - 2) * x[j - 1] for j in range(2, n + 1))
        second = sum(t ** (j - 1) * x[j - 1] for j in range(1, n + 1))
        for k in range(1, n + 1):
            expected[k - 1] += t ** (k - 2) * (first - second**2 - 1) * (k - 2 * t * second)
    expected[0] += x[0] * (3 - 2 * x[1] + 2 * x[0] ** 2)
    expected[1] += x[1] * (1 - x[1]) - 1
    np.testing.assert_allclose(nonlinear_solve.watson(x), expected, rtol=1e-12)


# Minimisation

LOCAL_FROM_START = ("HS2", "HS25")
"""Their standard guesses lead to a local minimum, and to a saddle."""


def descents(problem, starts):
    lower, upper = getattr(problem, "lower", -np.inf), getattr(problem, "upper", np.inf)
    value = partial(checks.value_and_gradient, problem.objective)
    options = {"ftol": 0, "gtol": 1e-13, "maxiter": 5_000, "maxfun": 20_000}
    for start in starts:
        inside = np.clip(start, lower, upper)
        found = minimize(value, inside, jac=True, method="L-BFGS-B", bounds=Bounds(lower, upper), options=options)
        yield found.fun


@each((*BOUNDED, *fixed_points.MINIMA))
def test_least_value_is_attained_and_nothing_is_less(problem):
    start = np.array(problem.start)
    draws = np.random.RandomState(1)
    others = [start + (1 + np.abs(start)) * draws.normal(size=len(start)) for _ in range(4)]
    if problem.name == "HS2":
        others.append(np.array([2.0, 2.0]))
    if problem.name == "HS25":
        others = [np.array([60.0, 24.0, 1.4])]
    with np.errstate(all="ignore"):
        values = list(descents(problem, (start, *others)))
    scale = 1e-10 * max(1.0, abs(problem.value))
    assert min(v for v in values if np.isfinite(v)) == pytest.approx(problem.value, abs=scale)
    assert problem.name in LOCAL_FROM_START or values[0] == pytest.approx(problem.value, abs=scale)


@each([p for p in (*BOUNDED, *fixed_points.MINIMA) if p.solution is not None])
def test_solution_is_feasible_and_has_the_least_value(problem):
    x = np.array(problem.solution)
    lower, upper = getattr(problem, "lower", -np.inf), getattr(problem, "upper", np.inf)
    assert ((lower <= x) & (x <= upper)).all()
    assert float(problem.objective(x)) == pytest.approx(problem.value, abs=1e-12 * max(1.0, abs(problem.value)))
    assert hessian(problem.objective)(torch.tensor(x)).shape == (len(x), len(x))


# Fixed points and brackets


@each(fixed_points.FIXED_POINTS)
def test_fixed_point_is_one(problem):
    if problem.solution is None:
        system = Roots(problem.name, checks.residual_of(problem), problem.start)
        assert any(is_root(system, x) for x in ends_of(system, (problem.start,)))
        return
    x = np.array(problem.solution)
    np.testing.assert_allclose(problem.fn(x), x, rtol=1e-13, atol=1e-15)


@each(fixed_points.BRACKETS)
def test_bracket_holds_its_root(problem):
    low, high = (float(problem.fn(np.array(end))) for end in (problem.lower, problem.upper))
    assert low * high <= 0
    found = brentq(lambda t: float(problem.fn(np.array(t))), problem.lower, problem.upper, xtol=1e-15, rtol=1e-15)
    assert found == pytest.approx(problem.root, rel=1e-13, abs=1e-14)


# Composite and constrained


@each(fixed_points.COMPOSITES)
def test_solution_of_the_lasso_has_a_subgradient_of_zero(problem):
    x = np.array(problem.solution)
    _, slope = checks.value_and_gradient(problem.objective, x)
    strength = float(problem.penalty(np.ones_like(x))) / len(x)
    slack = 1e-11 * max(1.0, np.abs(x).max())
    np.testing.assert_allclose(slope[x != 0], -strength * np.sign(x[x != 0]), atol=slack)
    assert (np.abs(slope[x == 0]) <= strength + slack).all()
    assert float(problem.objective(x) + problem.penalty(x)) == pytest.approx(problem.value, rel=1e-14)


@each(fixed_points.COMPOSITES)
def test_prox_trades_the_penalty_for_the_distance(problem):
    v = 20 * np.random.RandomState(0).normal(size=len(problem.start))
    new = problem.prox(v, 0.7)

    def cost(x):
        return 0.7 * problem.penalty(x) + ((x - v) ** 2).sum() / 2

    for i in range(len(v)):
        for move in (1e-4, -1e-4):
            assert cost(new + move * (np.arange(len(v)) == i)) > cost(new)


@each(fixed_points.CONSTRAINED)
def test_solution_under_constraints_is_stationary(problem):
    if problem.solution is None:
        return
    x = np.array(problem.solution)
    _, slope = checks.value_and_gradient(problem.objective, x)
    np.testing.assert_allclose(problem.projection(x - slope), x, atol=1e-13)
    assert float(problem.objective(x)) == pytest.approx(problem.value, rel=1e-12, abs=1e-14)


def test_dual_of_the_support_vector_machine_has_the_value_of_the_primal():
    problem = fixed_points.SIMPLICES[0]
    X, labels = fixed_points._classes(0, 20, 5, 3)
    Y, strength = np.eye(3)[labels], 10.0
    dual = checks.accelerated(problem, np.array(problem.start)).reshape(20, 3)
    w = X.T @ (Y - dual) / strength
    margins = 1 - Y + X @ w - ((X @ w) * Y).sum(axis=1)[:, None]
    primal = strength / 2 * (w**2).sum() + margins.max(axis=1).sum()
    assert problem.value == pytest.approx(-primal, rel=1e-12)
    assert float(problem.objective(dual.reshape(-1))) == pytest.approx(problem.value, rel=1e-12)


@each(fixed_points.CONSTRAINED)
def test_projection_is_the_nearest_point_of_the_set(problem):
    """The angle between ``v - p`` and ``z - p`` is not acute for any ``z`` of the set."""
    draws = np.random.RandomState(0)
    inside = [problem.projection(2 * draws.normal(size=len(problem.start))) for _ in range(20)]
    for size in (0.3, 3.0):
        v = size * draws.normal(size=len(problem.start))
        p = problem.projection(v)
        np.testing.assert_allclose(problem.projection(p), p, atol=1e-14)
        assert max((v - p) @ (z - p) for z in (*inside, np.array(problem.start))) <= 1e-12


def test_sets_are_what_they_are_called():
    draws = np.random.RandomState(0).normal(size=(20, 60)) * 2
    for v in draws:
        assert np.linalg.norm(fixed_points.ball(v, 0.1)) <= 0.1 + 1e-15
        assert (fixed_points.non_negative(v) >= 0).all()
        for point in (fixed_points.simplices(v, 20), fixed_points.softmaxes(v, 20)):
            assert (point >= 0).all()
            np.testing.assert_allclose(point.reshape(20, 3).sum(axis=1), 1.0, rtol=1e-14)
        a, b = fixed_points.triangle(v[:2])
        assert min(a + b - 1, 1 - b, 1 - a + b) >= -1e-14


# The checks


def cast(x, dtype):
    return torch.tensor(x, dtype=dtype)


SOLVED = [p for p in ALL if getattr(p, "solution", getattr(p, "root", None)) is not None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each(SOLVED)
def test_known_solution_has_arrived_and_is_a_true_claim(problem, dtype):
    x = cast(np.atleast_1d(getattr(problem, "solution", getattr(problem, "root", None))), dtype)
    assert checks.arrived(problem, x, dtype)
    assert checks.true_claim(problem, x, dtype)


@each([p for p in SOLVED if p.name not in ("HS3", "HS25")])  # so flat that a third of the way is not far
def test_point_beside_the_solution_has_not_arrived_and_is_a_false_claim(problem):
    """Not in float32 either, in which less is asked."""
    solution = np.atleast_1d(getattr(problem, "solution", getattr(problem, "root", None)))
    start = checks.start_of(problem) if hasattr(problem, "start") else np.array([problem.upper])
    x = solution + 0.3 * (start - solution) if np.abs(start - solution).max() > 1e-3 else solution + 0.3
    assert not checks.arrived(problem, cast(x, torch.float32), torch.float32)
    assert not checks.true_claim(problem, cast(x, torch.float32), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_no_root_is_a_false_claim(dtype):
    vanishing = Roots("vanishing", lambda x: torch.exp(-x), (0.0,))
    x = cast([25.0], dtype)
    assert checks.arrived(vanishing, x, dtype)
    assert not checks.true_claim(vanishing, x, dtype)
    by_name = {p.name: p for p in SYSTEMS}
    for name, point in (
        ("21 Freudenstein-Roth", (11.412779, -0.8968053)),
        ("tangents, no root", (-20.0, 0.5, 0.0)),
        ("Rosenbrock 2", (math.nan, 1.0)),
    ):
        assert not checks.arrived(by_name[name], cast(point, dtype), dtype)
        assert not checks.true_claim(by_name[name], cast(point, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_another_root_or_a_local_minimum_is_a_true_claim(dtype):
    by_name = {p.name: p for p in ALL}
    x = cast([-2.805118086952745, 3.131312518250573], dtype)
    assert checks.true_claim(by_name["Himmelblau"], x, dtype)
    local = cast([-1.2210262421071016, 1.5], dtype)  # of HS2
    assert checks.true_claim(by_name["HS2"], local, dtype)
    assert not checks.arrived(by_name["HS2"], local, dtype)
    assert not checks.true_claim(by_name["HS2"], cast([-1.2210262421071016, 1.4], dtype), dtype)  # outside


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_multiple_root_is_claimed_from_farther_away_than_a_simple_one(dtype):
    by_name = {p.name: p for p in SYSTEMS}
    near = 3 * 0.1 * torch.finfo(dtype).eps ** (1 / 5)
    assert checks.true_claim(by_name["19 sample 19"], cast([near, near], dtype), dtype)
    assert not checks.true_claim(by_name["Rosenbrock 2"], cast([1 + near, 1 + near], dtype), dtype)


def test_a_claim_near_a_root_is_true_where_constant_terms_round():
    problem = next(p for p in SYSTEMS if p.name == "trigonometric 10")
    near = np.array(
        [
            0.04791195,
            0.04918452,
            0.05060870,
            0.05222305,
            0.05408309,
            0.05627330,
            0.05893214,
            0.186397,
            0.15434196,
            0.12462538,
        ]
    )
    x = checks.polished_root(problem.residual, near) + 3e-13
    assert checks.arrived(problem, x, torch.float64)
    assert checks.true_claim(problem, x, torch.float64)
