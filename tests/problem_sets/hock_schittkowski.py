"""Minimisation between simple bounds: Hock and Schittkowski's nine, and small ones of CUTEst and of Gay.

Those of Gay are More, Garbow and Hillstrom's with bounds, of which some hold at the solution. The values with more than
a few digits, and the solutions that have no closed form, were computed with SciPy's L-BFGS-B from many starts.
Where CUTEst's size is large (EXPLIN, QUDLIN, MCCORMCK, BIGGSB1) ours is smaller.

References:
    Hock and Schittkowski, "Test examples for nonlinear programming codes" (1981), problems 1-5, 25, 38, 45 and 110.
    Gould, Orban and Toint, "CUTEst", Comput. Optim. Appl. 60 (2015): the problems by their names there.
    Gay, "A trust-region approach to linearly constrained optimization", Lecture Notes in Mathematics 1066 (1984).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from problem_sets.minpack_roots import chebyshev_moments, numbers, turn
from problem_sets.problem import Bounded, Function, constant, library


def rosenbrock(x: Any) -> Any:
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def hs3(x: Any) -> Any:
    return x[1] + 1e-5 * (x[1] - x[0]) ** 2


def hs4(x: Any) -> Any:
    return (x[0] + 1) ** 3 / 3 + x[1]


def hs5(x: Any) -> Any:
    return library(x).sin(x[0] + x[1]) + (x[0] - x[1]) ** 2 - 1.5 * x[0] + 2.5 * x[1] + 1


def hs25(x: Any) -> Any:
    """Not defined where ``x_2`` exceeds its bound."""
    xp, t = library(x), np.arange(1, 100) / 100
    u = constant(x, 25 + (-50 * np.log(t)) ** (2 / 3))
    return ((xp.exp(-((u - x[1]) ** x[2]) / x[0]) - constant(x, t)) ** 2).sum()


def wood(x: Any) -> Any:
    _, b, c, d = x
    return (
        rosenbrock(x[:2])
        + 90 * (d - c**2) ** 2
        + (1 - c) ** 2
        + 10.1 * ((b - 1) ** 2 + (d - 1) ** 2)
        + 19.8 * (b - 1) * (d - 1)
    )


def hs45(x: Any) -> Any:
    return 2 - x.prod() / 120


def hs110(x: Any) -> Any:
    xp = library(x)
    return (xp.log(x - 2) ** 2 + xp.log(10 - x) ** 2).sum() - x.prod() ** 0.2


def hatflda(x: Any) -> Any:
    return (x[0] - 1) ** 2 + ((x[:-1] - library(x).sqrt(x[1:])) ** 2).sum()


def hatfldc(x: Any) -> Any:
    return (x[0] - 1) ** 2 + ((x[2:] - x[1:-1] ** 2) ** 2).sum() + (x[-1] - 1) ** 2


def biggsb1(x: Any) -> Any:
    return (x[0] - 1) ** 2 + ((x[1:] - x[:-1]) ** 2).sum() + (1 - x[-1]) ** 2


def logros(x: Any) -> Any:
    return library(x).log1p(10_000 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2)


def mdhole(x: Any) -> Any:
    return 100 * (library(x).sin(x[0]) - x[1]) ** 2 + x[0]


def camel6(x: Any) -> Any:
    a, b = x
    return (4 - 2.1 * a**2 + a**4 / 3) * a**2 + a * b + (-4 + 4 * b**2) * b**2


def pspdoc(x: Any) -> Any:
    return library(x).sqrt(1 + x[:-2] ** 2 + (x[1:-1] - x[2:]) ** 2).sum()


def explin(x: Any) -> Any:
    n = len(x)
    half = constant(x, 0.1 * np.arange(1, n // 2 + 1))
    products = half * x[: n // 2] * x[1 : n // 2 + 1]
    return library(x).exp(products).sum() - 10 * (constant(x, np.arange(1, n + 1)) * x).sum()


def qudlin(x: Any) -> Any:
    n = len(x)
    return (x[: n // 2] * x[1 : n // 2 + 1]).sum() - 10 * (constant(x, np.arange(1, n + 1)) * x).sum()


def mccormck(x: Any) -> Any:
    a, b = x[:-1], x[1:]
    return (-1.5 * a + 2.5 * b + 1 + (a - b) ** 2 + library(x).sin(a + b)).sum()


def chebyquad(x: Any) -> Any:
    return (chebyshev_moments(2 * x - 1, len(x)) ** 2).sum()


def beale(x: Any) -> Any:
    return sum((y - x[0] * (1 - x[1] ** k)) ** 2 for k, y in ((1, 1.5), (2, 2.25), (3, 2.625)))


def helical_valley(x: Any) -> Any:
    radius = library(x).sqrt(x[0] ** 2 + x[1] ** 2)
    return 100 * ((x[2] - 10 * turn(x[0], x[1])) ** 2 + (radius - 1) ** 2) + x[2] ** 2


def powell_singular(x: Any) -> Any:
    a, b, c, d = x
    return (a + 10 * b) ** 2 + 5 * (c - d) ** 2 + (b - 2 * c) ** 4 + 10 * (a - d) ** 4


def box(x: Any) -> Any:
    xp, t = library(x), constant(x, np.arange(1, 11) / 10)
    return ((xp.exp(-t * x[0]) - xp.exp(-t * x[1]) - x[2] * (xp.exp(-t) - xp.exp(-10 * t))) ** 2).sum()


def freudenstein_roth(x: Any) -> Any:
    a, b = x
    return (a - 13 + ((5 - b) * b - 2) * b) ** 2 + (a - 29 + ((b + 1) * b - 14) * b) ** 2


def _problem(
    name: str,
    objective: Function,
    start: Sequence[float] | np.ndarray,
    lower: Any,
    upper: Any,
    value: float,
    solution: Any = None,
) -> Bounded:
    """Bounds that are numbers hold for every unknown."""
    lower, upper = (numbers(np.broadcast_to(np.asarray(b, dtype=np.float64), len(start))) for b in (lower, upper))
    return Bounded(
        name, objective, numbers(start), lower, upper, value, None if solution is None else numbers(solution)
    )


def _hs2() -> tuple[float, float]:
    a = (598 / 1200) ** 0.5
    return 2 * a * math.cos(math.acos(1 / (400 * a**3)) / 3), 1.5


_INF = math.inf
HOCK_SCHITTKOWSKI = (
    _problem("HS1", rosenbrock, (-2, 1), (-_INF, -1.5), _INF, 0.0, (1, 1)),
    _problem("HS2", rosenbrock, (-2, 1), (-_INF, 1.5), _INF, rosenbrock(_hs2()), _hs2()),
    _problem("HS3", hs3, (10, 1), (-_INF, 0), _INF, 0.0, (0, 0)),
    _problem("HS4", hs4, (1.125, 0.125), (1, 0), _INF, 8 / 3, (1, 0)),
    _problem(
        "HS5",
        hs5,
        (0, 0),
        (-1.5, -3),
        (4, 3),
        -(3**0.5) / 2 - math.pi / 3,
        (0.5 - math.pi / 3, -0.5 - math.pi / 3),
    ),
    _problem("HS25", hs25, (100, 12.5, 3), (0.1, 0, 0), (100, 25.6, 5), 0.0, (50, 25, 1.5)),
    _problem("HS38", wood, (-3, -1, -3, -1), -10, 10, 0.0, np.ones(4)),
    _problem("HS45", hs45, np.full(5, 2.0), 0, (1, 2, 3, 4, 5), 1.0, (1, 2, 3, 4, 5)),
    _problem("HS110", hs110, np.full(10, 9.0), 2.001, 9.999, -45.7784697074463, np.full(10, 9.350265836155792)),
)
CUTEST = (
    _problem("HATFLDA", hatflda, np.full(4, 0.1), 1e-7, _INF, 0.0, np.ones(4)),
    _problem("HATFLDB", hatflda, np.full(4, 0.1), 1e-7, (_INF, 0.8, _INF, _INF), 0.005572809000084123),
    _problem("HATFLDC", hatfldc, np.full(25, 0.9), 0, 10, 0.0, np.ones(25)),
    _problem(
        "BIGGSB1 25",
        biggsb1,
        np.zeros(25),
        0,
        np.append(np.full(24, 0.9), _INF),
        0.015,
        np.append(np.full(24, 0.9), 0.95),
    ),
    _problem("LOGROS", logros, (-1.2, 1), 0, _INF, 0.0, (1, 1)),
    _problem("MDHOLE", mdhole, (10, 1), (0, -_INF), _INF, 0.0, (0, 0)),
    _problem("CAMEL6", camel6, (1.1, 1.1), (-3, -1.5), (3, 1.5), -1.0316284534898774),
    _problem("PSPDOC", pspdoc, np.full(4, 3.0), -_INF, (-1, _INF, _INF, _INF), 1 + 2**0.5),
    _problem("EXPLIN 12", explin, np.zeros(12), 0, 10, -6625.614819895685),
    _problem("QUDLIN 12", qudlin, np.zeros(12), 0, 10, -7200.0),
    _problem(
        "MCCORMCK 10", mccormck, np.zeros(10), (-1.5, *np.full(9, -3.0)), (4, *np.full(9, 3.0)), -15.282241209954325
    ),
    _problem("CHEBYQAD 8", chebyquad, np.arange(1, 9) / 9, 0, 1, 0.003516873725677921),
)
GAY = (
    _problem("Rosenbrock, bounded", rosenbrock, (-1.2, 1), (-50, 0), (0.5, 100), 0.25, (0.5, 0.25)),
    _problem(
        "Freudenstein-Roth, bounded", freudenstein_roth, (0.5, -2), (0, -30), (20, -0.9), 48.985202, (11.37, -0.9)
    ),
    _problem("Beale, bounded", beale, (1, 1), (0.6, 0.5), (10, 100), 0.0, (3, 0.5)),
    _problem("helical valley, bounded", helical_valley, (-1, 0, 0), (-100, -1, -1), (0.8, 1, 1), 0.9904221209613994),
    _problem("Box, bounded", box, (0, 10, 20), (0, 5, 0), (2, 9.5, 20), 1.14348180264142e-4),
    _problem(
        "Powell singular, bounded",
        powell_singular,
        (3, -1, 0, 1),
        (0.1, -20, -1, -1),
        (100, 20, 1, 50),
        1.878196300583e-4,
    ),
    _problem("Wood, bounded", wood, (-3, -1, -3, -1), -100, (0, 10, 100, 100), 1.556700800438559),
)
PROBLEMS = HOCK_SCHITTKOWSKI + CUTEST + GAY
