"""The 23 systems of equations on which NonlinearSolve.jl compares its methods, each from its one start.

They come from ``test_nonlin`` by Burkardt and, partly, from MINPACK. The formulas are those of NonlinearProblemLibrary,
also where they differ from the papers': Watson's polynomial has other derivatives, and its second equation another
end; Chebyquad takes [-1, 1]; and the integral equation counts the diagonal of its kernel twice.

References:
    SciML, NonlinearProblemLibrary.jl, ``nlprob_23_testcases``; Burkardt, "test_nonlin".
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

import problem_sets.minpack_roots as minpack
from problem_sets.minpack_roots import bent_start, numbers
from problem_sets.problem import Roots, constant, library


def watson(x: Any) -> Any:
    """As published there, with factors ``j`` where Watson's function has ``j - 1``."""
    t, powers = np.arange(1, 30)[:, None] / 29, np.arange(len(x))
    value, less = constant(x, t**powers), constant(x, t ** (powers - 1.0))
    factors = powers + 1.0
    slope = np.where(powers > 0, factors * t ** (powers - 1.0), 0.0)
    p = value @ x
    r = constant(x, slope) @ x - p**2 - 1
    first = library(x).stack((x[0] * (3 - 2 * x[1] + 2 * x[0] ** 2), x[1] * (1 - x[1]) - 1))
    rows = constant(x, factors) * (r @ less) - 2 * (r * p) @ value
    return rows + library(x).concatenate((first, 0 * x[2:]))


def chebyquad(x: Any) -> Any:
    return minpack.chebyshev_moments(x, len(x))


def discrete_integral(x: Any) -> Any:
    """As published there, with the diagonal in both sums."""
    n = len(x)
    t = np.arange(1, n + 1) / (n + 1)
    kernel = np.minimum(t, t[:, None]) * (1 - np.maximum(t, t[:, None])) * (1 + np.eye(n)) / (2 * (n + 1))
    return x + constant(x, kernel) @ (x + constant(x, t) + 1) ** 3


def matrix_square_root(x: Any) -> Any:
    """``X^2 = A``, for a Jordan block of ``1e-4``; `x` holds the rows of ``X``."""
    n = math.isqrt(len(x))
    target = 1e-4 * np.eye(n)
    target[0, 1] = 1.0
    square = x.reshape(n, n)
    return (square @ square - constant(x, target)).reshape(-1)


def dennis_schnabel(x: Any) -> Any:
    return library(x).stack((x[0] + x[1] - 3, x[0] ** 2 + x[1] ** 2 - 9))


def _ratio(x: Any) -> Any:
    """``(1 - exp(-x^2)) / x``, and 0 at 0."""
    xp = library(x)
    zero = x == 0
    return xp.where(zero, 0.0, (1 - xp.exp(-(x**2))) / xp.where(zero, 1.0, x))


def sample_18(x: Any) -> Any:
    """Both axes are roots."""
    return library(x).stack((x[1] ** 2 * _ratio(x[0]), x[0] * _ratio(x[1])))


def sample_19(x: Any) -> Any:
    """A triple root, at zero."""
    return x * (x**2).sum()


def scalar(x: Any) -> Any:
    """A root at 0 and a double one at 5."""
    return x * (x - 5) ** 2


def freudenstein_roth(x: Any) -> Any:
    a, b = x
    return library(x).stack((a - b**3 + 5 * b**2 - 2 * b - 13, a + b**3 + b**2 - 14 * b - 29))


def boggs(x: Any) -> Any:
    xp = library(x)
    return xp.stack((x[0] ** 2 - x[1] + 1, x[0] - xp.cos(math.pi / 2 * x[1])))


def chandrasekhar(x: Any) -> Any:
    """The H equation, with ``c = 0.9``."""
    n = len(x)
    places = np.arange(1, n + 1) / n
    kernel = places[:, None] / (places[:, None] + places) * 0.9 / (2 * n)
    return x - 1 / (1 - constant(x, kernel) @ x)


def _problem(number: int, name: str, residual: Any, start: Any) -> Roots:
    return Roots(f"{number} {name}", residual, numbers(start))


PROBLEMS = (
    _problem(1, "generalized Rosenbrock", minpack.rosenbrock, (-1.2, *np.ones(9))),
    _problem(2, "Powell singular", minpack.powell_singular, (3, -1, 0, 1)),
    _problem(3, "Powell badly scaled", minpack.powell_badly_scaled, (0, 1)),
    _problem(4, "Wood", minpack.wood, (-3, -1, -3, -1)),
    _problem(5, "helical valley", minpack.helical_valley, (-1, 0, 0)),
    _problem(6, "Watson", watson, (0, 0)),
    _problem(7, "Chebyquad", chebyquad, (0, 2 / 3)),
    _problem(8, "Brown almost linear", minpack.brown_almost_linear, np.full(10, 0.5)),
    _problem(9, "discrete boundary value", minpack.discrete_boundary_value, bent_start(10)),
    _problem(10, "discrete integral equation", discrete_integral, bent_start(10)),
    _problem(11, "trigonometric", minpack.trigonometric, np.full(10, 0.1)),
    _problem(12, "variably dimensioned", minpack.variably_dimensioned, 1 - np.arange(1, 11) / 10),
    _problem(13, "Broyden tridiagonal", minpack.broyden_tridiagonal, np.full(10, -1.0)),
    _problem(14, "Broyden banded", minpack.broyden_banded, np.full(10, -1.0)),
    _problem(15, "Hammarling 2 by 2", matrix_square_root, np.eye(2).reshape(-1)),
    _problem(16, "Hammarling 3 by 3", matrix_square_root, np.eye(3).reshape(-1)),
    _problem(17, "Dennis and Schnabel", dennis_schnabel, (1, 5)),
    _problem(18, "sample 18", sample_18, (2, 2)),
    _problem(19, "sample 19", sample_19, (3, 3)),
    _problem(20, "scalar", scalar, (1,)),
    _problem(21, "Freudenstein-Roth", freudenstein_roth, (0.5, -2)),
    _problem(22, "Boggs", boggs, (1, 0)),
    _problem(23, "Chandrasekhar", chandrasekhar, np.ones(10)),
)
