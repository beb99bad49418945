"""The tables of problems are right: SciPy finds the minima that they name, and every library the same residuals."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from problem_sets import more_garbow_hillstrom, nist
from problem_sets.problem import LeastSquares
from scipy.optimize import least_squares
from torch.func import jacfwd, jacrev, vmap

PROBLEMS = more_garbow_hillstrom.PROBLEMS + nist.PROBLEMS
NAMED = {problem.name: problem for problem in PROBLEMS}
F64, F32 = torch.float64, torch.float32
EPS = float(np.finfo(np.float64).eps)
# From their initial guess the least value is not reached, but the second.
SECOND = {"2 Freudenstein and Roth", "26 trigonometric, n = 10"}
# Initial guesses that lead to the other values.
OTHER = [
    ("8 Bard", (10.0, 10.0, 10.0), 1),
    ("15 Kowalik and Osborne", (2.5, 3.9, 4.15, 3.9), 1),
    ("26 trigonometric, n = 10", 10 * (10.0,), 2),
    ("27 Brown almost linear, n = 10", (*(9 * (0.0,)), 11.0), 1),
    ("27 Brown almost linear, n = 30", (*(29 * (0.0,)), 31.0), 1),
    ("yearly temperature", (100.0, 5.0, 105.0, 500.0), 1),
]
# Of Biggs' function, among the points with x[4] = x[0] and x[5] = x[2].
SADDLE = (1.7114159935759936, 17.683198283280277, 1.163143659885539, 5.186561596824974)
each_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=str)


def starts(problem: LeastSquares) -> tuple[tuple[float, ...], ...]:
    return (problem.start, *problem.starts)


def value(problem: LeastSquares, x: Any) -> float:
    return float(np.square(problem.residual(np.asarray(x, dtype=np.float64))).sum())


def jacobian(problem: LeastSquares, x: Any) -> np.ndarray:
    return jacfwd(problem.residual)(torch.tensor(x, dtype=F64)).numpy()


def near(problem: LeastSquares, found: float, v: float) -> bool:
    """Six digits, but for what becomes of ``v`` if rounding moves the residual by a few eps of its terms."""
    terms = max(np.linalg.norm(problem.residual(np.asarray(x))) for x in problem.starts or [problem.start])
    terms += np.linalg.norm(jacobian(problem, problem.start) * np.asarray(problem.start))
    noise = (v**0.5 + 4 * EPS * terms) ** 2 - v
    return abs(found - v) <= max(1e-6 * v, noise)


def finds(problem: LeastSquares, start: Any, v: float) -> bool:
    tight = {"xtol": EPS, "ftol": EPS, "gtol": EPS, "max_nfev": 1000}

    def fall(method: str) -> float:
        with np.errstate(all="ignore"):
            run = least_squares(problem.residual, start, lambda x: jacobian(problem, x), method=method, **tight)
        return 2 * run.cost

    return any(near(problem, fall(method), v) for method in ("lm", "trf"))


@each_problem
def test_scipy_finds_the_least_value(problem: LeastSquares) -> None:
    # The last initial guess is NIST's better one.
    assert finds(problem, starts(problem)[-1], problem.values[problem.name in SECOND])


@pytest.mark.parametrize(("name", "start", "index"), OTHER, ids=[f"{name}, {index}" for name, _, index in OTHER])
def test_scipy_finds_the_other_values(name: str, start: tuple[float, ...], index: int) -> None:
    assert finds(NAMED[name], start, NAMED[name].values[index])


def test_the_second_value_of_biggs_is_stationary() -> None:
    problem, (a, b, c, d) = NAMED["18 Biggs EXP6"], SADDLE
    x = np.array([a, b, c, d, a, c])
    assert abs(value(problem, x) - problem.values[1]) <= 1e-9 * problem.values[1]
    J, r = jacobian(problem, x), problem.residual(x)
    assert np.all(np.abs(J.T @ r) <= 1e-9 * np.linalg.norm(J, axis=0))


def test_every_value_is_looked_for() -> None:
    found = {(problem.name, int(problem.name in SECOND)) for problem in PROBLEMS} | {(n, i) for n, _, i in OTHER}
    found |= {("18 Biggs EXP6", 1)}
    found |= {(name, 0) for name in SECOND}  # at their solution
    assert found == {(problem.name, i) for problem in PROBLEMS for i in range(len(problem.values))}
    assert all(NAMED[name].solution for name in SECOND)


@pytest.mark.parametrize("problem", [problem for problem in PROBLEMS if problem.solution], ids=str)
def test_the_solution_has_the_least_value_and_no_slope(problem: LeastSquares) -> None:
    x = np.asarray(problem.solution)
    r, J = problem.residual(x), jacobian(problem, x)
    # The solutions have 11 digits: an error in x moves the residual by J dx.
    moved = 1e-10 * np.linalg.norm(J * x)
    assert abs(r @ r - problem.values[0]) <= max(1e-6 * problem.values[0], 2 * moved * np.linalg.norm(r) + moved**2)
    columns = np.linalg.norm(J, axis=0)
    assert np.all(np.abs(J.T @ r) <= columns * (moved + 4 * EPS * value(problem, problem.start) ** 0.5))


@each_problem
def test_torch_and_numpy_compute_the_same_residual(problem: LeastSquares) -> None:
    for start in starts(problem):
        r = problem.residual(np.asarray(start))
        double = problem.residual(torch.tensor(start, dtype=F64))
        torch.testing.assert_close(double, torch.from_numpy(r), rtol=0, atol=1e-12 * size(r))
        single = problem.residual(np.asarray(start, dtype=np.float32))
        assert single.dtype == np.float32
        np.testing.assert_allclose(single, r, rtol=0, atol=1e-4 * size(r))


@pytest.mark.skipif(find_spec("jax") is None, reason="JAX is not installed")
@each_problem
def test_jax_computes_the_same_residual(problem: LeastSquares) -> None:
    numpy = importlib.import_module("jax.numpy")
    r = problem.residual(np.asarray(problem.start))
    single = problem.residual(numpy.asarray(problem.start, dtype=numpy.float32))
    assert single.dtype == numpy.float32
    np.testing.assert_allclose(np.asarray(single), r, rtol=0, atol=1e-4 * size(r))


@each_problem
def test_residuals_take_every_transform(problem: LeastSquares) -> None:
    for dtype in (F64, F32):
        points = torch.tensor(starts(problem), dtype=dtype)
        values, reverse = vmap(problem.residual)(points), vmap(jacrev(problem.residual))(points)
        assert values.dtype == reverse.dtype == dtype
        # torch makes a float64 tangent of ``1e4 * x[0]`` in float32.
        forward = vmap(jacfwd(problem.residual))(points).to(dtype)
        tol = 1e3 * torch.finfo(dtype).eps
        close(forward, reverse, tol)
        close(values, torch.stack([problem.residual(point) for point in points]), tol)


def close(found: torch.Tensor, expected: torch.Tensor, tol: float) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tol, atol=tol * float(other.abs().max()))


def size(r: np.ndarray) -> float:
    return float(np.abs(r).max()) + 1.0
