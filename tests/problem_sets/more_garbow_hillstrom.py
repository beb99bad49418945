"""The least-squares problems of More, Garbow and Hillstrom, and fits in common use.

More, Garbow and Hillstrom, "Testing unconstrained optimization software", ACM TOMS 7, 1981: all 35, in their order and
by their numbers, those of any size in their usual ones. The values have more digits than theirs, and are those at which
SciPy's "lm" and "trf" end. Bard's second, and that of Kowalik and Osborne, are of minima at infinity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from problem_sets.problem import LeastSquares, constant, library

# fmt: off
BARD = (0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39)
GAUSSIAN = (0.0009, 0.0044, 0.0175, 0.0540, 0.1295, 0.2420, 0.3521, 0.3989,
            0.3521, 0.2420, 0.1295, 0.0540, 0.0175, 0.0044, 0.0009)
MEYER = (34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744, 8261, 7030, 6005, 5147, 4427, 3820, 3307, 2872)
KOWALIK = (0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246)
KOWALIK_AT = (4.0, 2.0, 1.0, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625)
OSBORNE_1 = (0.844, 0.908, 0.932, 0.936, 0.925, 0.908, 0.881, 0.850, 0.818, 0.784, 0.751, 0.718, 0.685, 0.658, 0.628,
             0.603, 0.580, 0.558, 0.538, 0.522, 0.506, 0.490, 0.478, 0.467, 0.457, 0.448, 0.438, 0.431, 0.424, 0.420,
             0.414, 0.411, 0.406)
OSBORNE_2 = (1.366, 1.191, 1.112, 1.013, 0.991, 0.885, 0.831, 0.847, 0.786, 0.725, 0.746, 0.679, 0.608, 0.655, 0.616,
             0.606, 0.602, 0.626, 0.651, 0.724, 0.649, 0.649, 0.694, 0.644, 0.624, 0.661, 0.612, 0.558, 0.533, 0.495,
             0.500, 0.423, 0.395, 0.375, 0.372, 0.391, 0.396, 0.405, 0.428, 0.429, 0.523, 0.562, 0.607, 0.653, 0.672,
             0.708, 0.633, 0.668, 0.645, 0.632, 0.591, 0.559, 0.597, 0.625, 0.739, 0.710, 0.729, 0.720, 0.636, 0.581,
             0.428, 0.292, 0.162, 0.098, 0.054)
TRIGONOMETRIC = (0.0429645643823, 0.0439762874782, 0.0450933979491, 0.0463389162462, 0.0477443817828, 0.0493547325133,
                 0.0512373485008, 0.195209463914, 0.164977665276, 0.060148577838)
TEMPERATURES = (61, 65, 72, 78, 85, 90, 92, 92, 88, 81, 72, 63)
# fmt: on


def counts(x: Any, last: int, first: int = 1) -> Any:
    """``first, ..., last``"""
    return constant(x, np.arange(first, last + 1))


def joined(x: Any, *parts: Any) -> Any:
    """Vectors and numbers as one vector."""
    return library(x).concatenate([part.reshape(-1) for part in parts])


# --- problems of fixed size -------------------------------------------------------------------------------------------


def rosenbrock(x: Any) -> Any:
    return library(x).stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def freudenstein_roth(x: Any) -> Any:
    first = -13 + x[0] + ((5 - x[1]) * x[1] - 2) * x[1]
    return library(x).stack([first, -29 + x[0] + ((x[1] + 1) * x[1] - 14) * x[1]])


def powell_badly_scaled(x: Any) -> Any:
    xp = library(x)
    return xp.stack([1e4 * x[0] * x[1] - 1, xp.exp(-x[0]) + xp.exp(-x[1]) - 1.0001])


def brown_badly_scaled(x: Any) -> Any:
    return library(x).stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2])


def beale(x: Any) -> Any:
    return constant(x, (1.5, 2.25, 2.625)) - x[0] * (1 - library(x).stack([x[1], x[1] ** 2, x[1] ** 3]))


def jennrich_sampson(x: Any) -> Any:
    xp, i = library(x), counts(x, 10)
    return 2 + 2 * i - (xp.exp(i * x[0]) + xp.exp(i * x[1]))


def helical_valley(x: Any) -> Any:
    xp = library(x)
    # The angle jumps where x[0] = 0 and x[1] < 0; that of arctan2(x[1], x[0]) would do so at the initial guess.
    turns = 0.25 + xp.arctan2(-x[0], x[1]) / (2 * math.pi)
    return xp.stack([10 * (x[2] - 10 * turns), 10 * (xp.sqrt(x[0] ** 2 + x[1] ** 2) - 1), x[2]])


def bard(x: Any) -> Any:
    u = counts(x, 15)
    v = 16 - u
    return constant(x, BARD) - (x[0] + u / (v * x[1] + library(x).minimum(u, v) * x[2]))


def gaussian(x: Any) -> Any:
    t = (8 - counts(x, 15)) / 2
    return x[0] * library(x).exp(-x[1] * (t - x[2]) ** 2 / 2) - constant(x, GAUSSIAN)


def meyer(x: Any) -> Any:
    return x[0] * library(x).exp(x[1] / (45 + 5 * counts(x, 16) + x[2])) - constant(x, MEYER)


def scaled_meyer(x: Any) -> Any:
    t = 0.45 + 0.05 * counts(x, 16)
    return x[0] * library(x).exp(10 * x[1] / (t + x[2]) - 13) - 1e-3 * constant(x, MEYER)


def gulf(x: Any) -> Any:
    """With ``|y - x[1]|``, which has their solution; in the paper's print ``m i`` is in the place of the minus."""
    t = np.arange(1, 100) / 100
    y = constant(x, 25 + (-50 * np.log(t)) ** (2 / 3))
    return library(x).exp(-(abs(y - x[1]) ** x[2]) / x[0]) - constant(x, t)


def box_3d(x: Any) -> Any:
    xp, t = library(x), counts(x, 10) / 10
    return xp.exp(-t * x[0]) - xp.exp(-t * x[1]) - x[2] * (xp.exp(-t) - xp.exp(-10 * t))


def powell_singular(x: Any) -> Any:
    return extended_powell(x)


def wood(x: Any) -> Any:
    a, b, c, d = x[0], x[1], x[2], x[3]
    last = [math.sqrt(10.0) * (b + d - 2), (b - d) / math.sqrt(10.0)]
    return library(x).stack([10 * (b - a**2), 1 - a, math.sqrt(90.0) * (d - c**2), 1 - c, *last])


def kowalik_osborne(x: Any) -> Any:
    u = constant(x, KOWALIK_AT)
    return constant(x, KOWALIK) - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


def brown_dennis(x: Any) -> Any:
    xp, t = library(x), counts(x, 20) / 5
    return (x[0] + t * x[1] - xp.exp(t)) ** 2 + (x[2] + x[3] * xp.sin(t) - xp.cos(t)) ** 2


def osborne_1(x: Any) -> Any:
    xp, t = library(x), 10 * counts(x, 32, 0)
    return constant(x, OSBORNE_1) - (x[0] + x[1] * xp.exp(-t * x[3]) + x[2] * xp.exp(-t * x[4]))


def biggs_exp6(x: Any) -> Any:
    xp, t = library(x), counts(x, 13) / 10
    y = xp.exp(-t) - 5 * xp.exp(-10 * t) + 3 * xp.exp(-4 * t)
    return x[2] * xp.exp(-t * x[0]) - x[3] * xp.exp(-t * x[1]) + x[5] * xp.exp(-t * x[4]) - y


def osborne_2(x: Any) -> Any:
    xp, t = library(x), counts(x, 64, 0) / 10
    peaks = sum(x[i] * xp.exp(-((t - x[i + 7]) ** 2) * x[i + 4]) for i in (1, 2, 3))
    return constant(x, OSBORNE_2) - (x[0] * xp.exp(-t * x[4]) + peaks)


def temperature(x: Any) -> Any:
    """A sinus through the mean temperatures of the months."""
    sinus = x[0] * library(x).sin(counts(x, 12) * x[1] + x[2])
    return constant(x, TEMPERATURES) - (sinus + x[3])


# --- problems of any size ---------------------------------------------------------------------------------------------


def watson(x: Any) -> Any:
    j = np.arange(len(x))
    powers = (np.arange(1, 30)[:, None] / 29.0) ** j
    slopes = np.concatenate([np.zeros((29, 1)), j[1:] * powers[:, :-1]], axis=1)
    first = constant(x, slopes) @ x - (constant(x, powers) @ x) ** 2 - 1
    return joined(x, first, x[0], x[1] - x[0] ** 2 - 1)


def extended_rosenbrock(x: Any) -> Any:
    pairs = x.reshape(-1, 2)
    return library(x).stack([10 * (pairs[:, 1] - pairs[:, 0] ** 2), 1 - pairs[:, 0]]).T.reshape(-1)


def extended_powell(x: Any) -> Any:
    a, b, c, d = (x.reshape(-1, 4)[:, i] for i in range(4))
    parts = [a + 10 * b, math.sqrt(5.0) * (c - d), (b - 2 * c) ** 2, math.sqrt(10.0) * (a - d) ** 2]
    return library(x).stack(parts).T.reshape(-1)


def penalty_1(x: Any) -> Any:
    return joined(x, math.sqrt(1e-5) * (x - 1), (x**2).sum() - 0.25)


def penalty_2(x: Any) -> Any:
    n, e = len(x), library(x).exp(x / 10)
    steps = np.exp(np.arange(1, n + 1) / 10)
    small = joined(x, e[1:] + e[:-1] - constant(x, steps[1:] + steps[:-1]), e[1:] - math.exp(-0.1))
    return joined(x, x[0] - 0.2, math.sqrt(1e-5) * small, (constant(x, np.arange(n, 0, -1)) * x**2).sum() - 1)


def variably_dimensioned(x: Any) -> Any:
    weighted = (counts(x, len(x)) * (x - 1)).sum()
    return joined(x, x - 1, weighted, weighted**2)


def trigonometric(x: Any) -> Any:
    n, cos, sin = len(x), library(x).cos(x), library(x).sin(x)
    return n - cos.sum() + counts(x, n) * (1 - cos) - sin


def brown_almost_linear(x: Any) -> Any:
    return joined(x, x[:-1] + x.sum() - (len(x) + 1), x.prod() - 1)


def cubed(x: Any) -> tuple[Any, Any, float]:
    """``(x + t + 1)^3`` on a grid ``t`` of ``[0, 1]``, the grid, and its step."""
    h = 1 / (len(x) + 1)
    t = np.arange(1, len(x) + 1) * h
    return (x + constant(x, t) + 1) ** 3, t, h


def discrete_boundary(x: Any) -> Any:
    (cubes, _, h), n = cubed(x), len(x)
    return constant(x, 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)) @ x + h**2 * cubes / 2


def discrete_integral(x: Any) -> Any:
    cubes, t, h = cubed(x)
    lower = np.tril(np.ones((len(x), len(x))))
    kernel = lower * (1 - t)[:, None] * t + (1 - lower) * t[:, None] * (1 - t)
    return x + h / 2 * (constant(x, kernel) @ cubes)


def broyden_tridiagonal(x: Any) -> Any:
    n = len(x)
    return (3 - 2 * x) * x - constant(x, np.eye(n, k=-1) + 2 * np.eye(n, k=1)) @ x + 1


def broyden_banded(x: Any) -> Any:
    n = len(x)
    band = sum(np.eye(n, k=k) for k in (-5, -4, -3, -2, -1, 1))
    return x * (2 + 5 * x**2) + 1 - constant(x, band) @ (x * (1 + x))


def linear_full_rank(x: Any, m: int = 20) -> Any:
    return constant(x, np.eye(m, len(x)) - 2 / m) @ x - 1


def linear_rank_1(x: Any, m: int = 20) -> Any:
    return counts(x, m) * (counts(x, len(x)) * x).sum() - 1


def linear_rank_1_zeros(x: Any, m: int = 20) -> Any:
    """Columns and rows of zeros about a matrix of rank 1."""
    rows, columns = np.arange(m), np.arange(1, len(x) + 1)
    rows[-1], columns[[0, -1]] = 0, 0
    return constant(x, rows) * (constant(x, columns) * x).sum() - 1


def chebyquad(x: Any) -> Any:
    n, z = len(x), 2 * x - 1
    values, before = [z], 1 + 0 * z
    for _ in range(n - 1):
        before, after = values[-1], 2 * z * values[-1] - before
        values.append(after)
    integrals = np.array([0 if i % 2 else -1 / (i**2 - 1) for i in range(1, n + 1)])
    return library(x).stack([value.sum() for value in values]) / n - constant(x, integrals)


# --- the table --------------------------------------------------------------------------------------------------------

Residual = Callable[[Any], Any]


def row(name: str, residual: Residual, start: Any, *values: float, at: Any = None) -> LeastSquares:
    solution = None if at is None else tuple(map(float, at))
    return LeastSquares(name, residual, tuple(map(float, start)), values, solution)


def sized(name: str, residual: Residual, start: Any, *values: float, at: Any = None) -> LeastSquares:
    return row(f"{name}, n = {len(start)}", residual, start, *values, at=at)


def grid(n: int) -> Any:
    t = np.arange(1, n + 1) / (n + 1)
    return t * (t - 1)


ONES = np.ones(10)
PROBLEMS = [
    row("1 Rosenbrock", rosenbrock, (-1.2, 1), 0, at=(1, 1)),
    row("2 Freudenstein and Roth", freudenstein_roth, (0.5, -2), 0, 48.984253679, at=(5, 4)),
    row("3 Powell badly scaled", powell_badly_scaled, (0, 1), 0),
    row("4 Brown badly scaled", brown_badly_scaled, (1, 1), 0, at=(1e6, 2e-6)),
    row("5 Beale", beale, (1, 1), 0, at=(3, 0.5)),
    row("6 Jennrich and Sampson", jennrich_sampson, (0.3, 0.4), 124.36218236),
    row("7 helical valley", helical_valley, (-1, 0, 0), 0, at=(1, 0, 0)),
    row("8 Bard", bard, (1, 1, 1), 8.2148773066e-3, 17.428693333),
    row("9 Gaussian", gaussian, (0.4, 1, 0), 1.1279327696e-8),
    row("10 Meyer", meyer, (0.02, 4000, 250), 87.945855171),
    row("10 Meyer, scaled", scaled_meyer, (8.85, 4, 2.5), 8.7945855171e-5),
    row("11 Gulf", gulf, (5, 2.5, 0.15), 0, at=(50, 25, 1.5)),
    row("12 Box, three-dimensional", box_3d, (0, 10, 20), 0, at=(1, 10, 1)),
    row("13 Powell singular", powell_singular, (3, -1, 0, 1), 0, at=(0, 0, 0, 0)),
    row("14 Wood", wood, (-3, -1, -3, -1), 0, at=(1, 1, 1, 1)),
    row("15 Kowalik and Osborne", kowalik_osborne, (0.25, 0.39, 0.415, 0.39), 3.0750560385e-4, 1.0273430487e-3),
    row("16 Brown and Dennis", brown_dennis, (25, 5, -5, -1), 85822.201626),
    row("17 Osborne 1", osborne_1, (0.5, 1.5, -1, 0.01, 0.02), 5.4648946975e-5),
    # The second is no minimum, as the paper has it, but a saddle; the symmetry of the initial guess leads there.
    row("18 Biggs EXP6", biggs_exp6, (1, 2, 1, 1, 1, 1), 0, 5.6556499255e-3, at=(1, 10, 1, 5, 4, 3)),
    row("19 Osborne 2", osborne_2, (1.3, 0.65, 0.65, 0.7, 0.6, 3, 5, 7, 2, 4.5, 5.5), 4.0137736294e-2),
    sized("20 Watson", watson, 6 * [0], 2.2876700536e-3),
    sized("20 Watson", watson, 9 * [0], 1.3997601381e-6),
    sized("20 Watson", watson, 12 * [0], 4.722381103e-10),
    sized("21 extended Rosenbrock", extended_rosenbrock, 5 * [-1.2, 1], 0, at=ONES),
    sized("22 extended Powell singular", extended_powell, 3 * [3, -1, 0, 1], 0, at=12 * [0]),
    sized("23 penalty I", penalty_1, range(1, 5), 2.2499775009e-5),
    sized("23 penalty I", penalty_1, range(1, 11), 7.0876514671e-5),
    sized("24 penalty II", penalty_2, 4 * [0.5], 9.3762930074e-6),
    sized("24 penalty II", penalty_2, 10 * [0.5], 2.9366053746e-4),
    sized("25 variably dimensioned", variably_dimensioned, 1 - np.arange(1, 11) / 10, 0, at=ONES),
    sized("26 trigonometric", trigonometric, ONES / 10, 0, 2.7950561219e-5, 8.7882225182e-4, at=TRIGONOMETRIC),
    sized("27 Brown almost linear", brown_almost_linear, ONES / 2, 0, 1, at=ONES),
    sized("27 Brown almost linear", brown_almost_linear, 30 * [0.5], 0, 1, at=30 * [1]),
    sized("28 discrete boundary value", discrete_boundary, grid(10), 0),
    sized("29 discrete integral equation", discrete_integral, grid(10), 0),
    sized("30 Broyden tridiagonal", broyden_tridiagonal, -ONES, 0),
    sized("31 Broyden banded", broyden_banded, -ONES, 0),
    sized("32 linear, full rank", linear_full_rank, ONES, 10, at=-ONES),
    sized("33 linear, rank 1", linear_rank_1, ONES, 190 / 41),
    sized("34 linear, rank 1 with zeros", linear_rank_1_zeros, ONES, 227 / 37),
    sized("35 Chebyquad", chebyquad, np.arange(1, 9) / 9, 3.5168737257e-3),
    sized("35 Chebyquad", chebyquad, np.arange(1, 10) / 10, 0),
    sized("35 Chebyquad", chebyquad, np.arange(1, 11) / 11, 6.5039548009e-3),
    row("yearly temperature", temperature, (10, 0.5, 10.5, 50), 13.023514856, 1230.0372289),
]
