"""The systems of equations on which MINPACK's ``hybrd`` is tested: 14 problems, 22 with their sizes, 55 with starts.

`PROBLEMS` has the sizes and the initial guesses of the test driver: the standard guess, and it times 10 and 100
(Watson's, which is zero, is replaced by all 10). Chebyquad 8 has no root; whoever finds one is wrong. `ROOTLESS` names
it.

References:
    More, Garbow and Hillstrom, "Testing unconstrained optimization software", ACM Trans. Math. Softw. 7 (1981), and
    "Algorithm 566", the same volume: the functions VECFCN and INITPT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from problem_sets.problem import Function, Roots, constant, library


def rosenbrock(x: Any) -> Any:
    """For more than two unknowns, the chain of NonlinearSolve's tests."""
    return library(x).concatenate((1 - x[:1], 10 * (x[1:] - x[:-1] ** 2)))


def powell_singular(x: Any) -> Any:
    """A double root, at zero."""
    a, b, c, d = x
    return library(x).stack((a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2))


def powell_badly_scaled(x: Any) -> Any:
    """The root is at about ``(1.1e-5, 9.1)``."""
    xp = library(x)
    return xp.stack((1e4 * x[0] * x[1] - 1, xp.exp(-x[0]) + xp.exp(-x[1]) - 1.0001))


def wood(x: Any) -> Any:
    """The gradient of Wood's function, that of HS38, with the first and the third entry halved."""
    a, b, c, d = x
    first, second = b - a**2, d - c**2
    return library(x).stack(
        (
            -200 * a * first - (1 - a),
            200 * first + 20.2 * (b - 1) + 19.8 * (d - 1),
            -180 * c * second - (1 - c),
            180 * second + 20.2 * (d - 1) + 19.8 * (b - 1),
        )
    )


def turn(a: Any, b: Any) -> Any:
    """The angle of ``(a, b)``, in turns, from -1/4 to 3/4."""
    xp = library(a)
    # Not arctan(b / a), whose derivative is not finite at a = 0.
    left = a < 0
    sign = xp.where(left, -1.0, 1.0)
    return xp.arctan2(sign * b, sign * a) / (2 * math.pi) + xp.where(left, 0.5, 0.0)


def helical_valley(x: Any) -> Any:
    xp = library(x)
    return xp.stack((10 * (x[2] - 10 * turn(x[0], x[1])), 10 * (xp.sqrt(x[0] ** 2 + x[1] ** 2) - 1), x[2]))


def watson(x: Any) -> Any:
    """Half the gradient of ``sum_i (p'(t_i) - p(t_i)^2 - 1)^2 + x_1^2 + (x_2 - x_1^2 - 1)^2`` for a polynomial ``p``
    with the coefficients ``x``."""
    t, powers = np.arange(1, 30)[:, None] / 29, np.arange(len(x))
    value, slope = constant(x, t**powers), constant(x, powers * t ** np.maximum(powers - 1, 0))
    p = value @ x
    r = slope @ x - p**2 - 1
    last = x[1] - x[0] ** 2 - 1
    first = library(x).stack((x[0] * (1 - 2 * last), last))
    return r @ slope - 2 * (r * p) @ value + library(x).concatenate((first, 0 * x[2:]))


def chebyshev_moments(x: Any, n: int) -> Any:
    """The means of the Chebyshev polynomials ``T_1 .. T_n`` over the entries of ``x``, less their means on [-1, 1]."""
    previous, current, means = 0 * x + 1, x, []
    for i in range(1, n + 1):
        means.append(current.mean() + (1 / (i**2 - 1) if i % 2 == 0 else 0))
        previous, current = current, 2 * x * current - previous
    return library(x).stack(means)


def chebyquad(x: Any) -> Any:
    """The nodes on [0, 1] of Chebyshev's quadrature with equal weights, which has none for ``n = 8`` and 10."""
    return chebyshev_moments(2 * x - 1, len(x))


def brown_almost_linear(x: Any) -> Any:
    return library(x).concatenate((x[:-1] + x.sum() - (len(x) + 1), x.prod()[None] - 1))


def discrete_boundary_value(x: Any) -> Any:
    """``u'' = (u + t + 1)^3 / 2``, with ``u(0) = u(1) = 0``, by central differences."""
    n = len(x)
    t, end = constant(x, np.arange(1, n + 1) / (n + 1)), constant(x, [0])
    around = library(x).concatenate((end, x[:-1])) + library(x).concatenate((x[1:], end))
    return 2 * x - around + (x + t + 1) ** 3 / (2 * (n + 1) ** 2)


def discrete_integral(x: Any) -> Any:
    """The same, as an integral equation."""
    n = len(x)
    t = np.arange(1, n + 1) / (n + 1)
    kernel = np.minimum(t, t[:, None]) * (1 - np.maximum(t, t[:, None])) / (2 * (n + 1))
    return x + constant(x, kernel) @ (x + constant(x, t) + 1) ** 3


def trigonometric(x: Any) -> Any:
    xp, n = library(x), len(x)
    cosine = xp.cos(x)
    return n - cosine.sum() + constant(x, np.arange(1, n + 1)) * (1 - cosine) - xp.sin(x)


def variably_dimensioned(x: Any) -> Any:
    places = constant(x, np.arange(1, len(x) + 1))
    total = (places * (x - 1)).sum()
    return x - 1 + places * (total * (1 + 2 * total**2))


def broyden_tridiagonal(x: Any) -> Any:
    end, xp = constant(x, [0]), library(x)
    return (3 - 2 * x) * x - xp.concatenate((end, x[:-1])) - 2 * xp.concatenate((x[1:], end)) + 1


def broyden_banded(x: Any) -> Any:
    """Five neighbours below and one above."""
    n = len(x)
    band = np.tri(n, n, 1) - np.tri(n, n, -6) - np.eye(n)
    return x * (2 + 5 * x**2) + 1 - constant(x, band) @ (x * (1 + x))


def quadrature_start(n: int) -> np.ndarray:
    return np.arange(1, n + 1) / (n + 1)


def bent_start(n: int) -> np.ndarray:
    t = np.arange(1, n + 1) / (n + 1)
    return t * (t - 1)


def numbers(x: Any) -> tuple[float, ...]:
    return tuple(map(float, x))


def _problem(name: str, residual: Function, start: Sequence[float] | np.ndarray, tries: int) -> Roots:
    start = np.asarray(start, dtype=np.float64)
    others = [factor * start if start.any() else factor + start for factor in (10.0, 100.0)]
    return Roots(f"{name} {len(start)}", residual, numbers(start), tuple(map(numbers, others[: tries - 1])))


PROBLEMS = (
    _problem("Rosenbrock", rosenbrock, (-1.2, 1.0), 3),
    _problem("Powell singular", powell_singular, (3, -1, 0, 1), 3),
    _problem("Powell badly scaled", powell_badly_scaled, (0, 1), 2),
    _problem("Wood", wood, (-3, -1, -3, -1), 3),
    _problem("helical valley", helical_valley, (-1, 0, 0), 3),
    *(_problem("Watson", watson, np.zeros(n), 2) for n in (6, 9)),
    *(_problem("Chebyquad", chebyquad, quadrature_start(n), 3 if n < 8 else 1) for n in (5, 6, 7, 8, 9)),
    *(_problem("Brown almost linear", brown_almost_linear, np.full(n, 0.5), 3 if n == 10 else 1) for n in (10, 30, 40)),
    _problem("discrete boundary value", discrete_boundary_value, bent_start(10), 3),
    *(_problem("discrete integral equation", discrete_integral, bent_start(n), 3) for n in (1, 10)),
    _problem("trigonometric", trigonometric, np.full(10, 0.1), 3),
    _problem("variably dimensioned", variably_dimensioned, 1 - np.arange(1, 11) / 10, 3),
    _problem("Broyden tridiagonal", broyden_tridiagonal, np.full(10, -1.0), 3),
    _problem("Broyden banded", broyden_banded, np.full(10, -1.0), 3),
)
ROOTLESS = ("Chebyquad 8",)
