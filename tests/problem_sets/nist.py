"""Nonlinear regressions of NIST: data, two initial guesses, and a solution that is certified to 11 digits.

NIST/ITL, Statistical Reference Datasets, "Nonlinear Regression". ``nist.json`` has the numbers of all 27 data sets, in
NIST's order: from lower over average to higher difficulty.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from problem_sets.problem import LeastSquares, constant, library

Model = Callable[[Any, Any, Any], Any]
"""``model(xp, b, x)``: what the parameters ``b`` predict at ``x``; ``xp`` is the library of both."""


def saturation(xp: Any, b: Any, x: Any) -> Any:
    return b[0] * (1 - xp.exp(-b[1] * x))


def misra1b(xp: Any, b: Any, x: Any) -> Any:
    return b[0] * (1 - (1 + b[1] * x / 2) ** -2)


def misra1c(xp: Any, b: Any, x: Any) -> Any:
    return b[0] * (1 - (1 + 2 * b[1] * x) ** -0.5)


def misra1d(xp: Any, b: Any, x: Any) -> Any:
    return b[0] * b[1] * x / (1 + b[1] * x)


def chwirut(xp: Any, b: Any, x: Any) -> Any:
    return xp.exp(-b[0] * x) / (b[1] + b[2] * x)


def three_exponentials(xp: Any, b: Any, x: Any) -> Any:
    return b[0] * xp.exp(-b[1] * x) + b[2] * xp.exp(-b[3] * x) + b[4] * xp.exp(-b[5] * x)


def two_exponentials(xp: Any, b: Any, x: Any) -> Any:
    return b[0] + b[1] * xp.exp(-b[3] * x) + b[2] * xp.exp(-b[4] * x)


def two_peaks(xp: Any, b: Any, x: Any) -> Any:
    peaks = b[2] * xp.exp(-(((x - b[3]) / b[4]) ** 2)) + b[5] * xp.exp(-(((x - b[6]) / b[7]) ** 2))
    return b[0] * xp.exp(-b[1] * x) + peaks


def power(xp: Any, b: Any, x: Any) -> Any:
    return b[0] * x ** b[1]


def quadratics(xp: Any, b: Any, x: Any) -> Any:
    return (b[0] + x * (b[1] + x * b[2])) / (1 + x * (b[3] + x * b[4]))


def cubics(xp: Any, b: Any, x: Any) -> Any:
    return (b[0] + x * (b[1] + x * (b[2] + x * b[3]))) / (1 + x * (b[4] + x * (b[5] + x * b[6])))


def nelson(xp: Any, b: Any, x: Any) -> Any:
    """Of the logarithm of ``y``, by which the fit is made."""
    return b[0] - b[1] * x[0] * xp.exp(-b[2] * x[1])


def roszman(xp: Any, b: Any, x: Any) -> Any:
    return b[0] - b[1] * x - xp.arctan(b[2] / (x - b[3])) / math.pi


def enso(xp: Any, b: Any, x: Any) -> Any:
    year, slow, slower = (2 * math.pi * x / period for period in (12, b[3], b[6]))
    first = b[0] + b[1] * xp.cos(year) + b[2] * xp.sin(year)
    return first + b[4] * xp.cos(slow) + b[5] * xp.sin(slow) + b[7] * xp.cos(slower) + b[8] * xp.sin(slower)


def mgh09(xp: Any, b: Any, x: Any) -> Any:
    return b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3])


def mgh10(xp: Any, b: Any, x: Any) -> Any:
    return b[0] * xp.exp(b[1] / (x + b[2]))


def rat42(xp: Any, b: Any, x: Any) -> Any:
    return b[0] / (1 + xp.exp(b[1] - b[2] * x))


def rat43(xp: Any, b: Any, x: Any) -> Any:
    return b[0] / (1 + xp.exp(b[1] - b[2] * x)) ** (1 / b[3])


def eckerle(xp: Any, b: Any, x: Any) -> Any:
    return b[0] / b[1] * xp.exp(-0.5 * ((x - b[2]) / b[1]) ** 2)


def bennett(xp: Any, b: Any, x: Any) -> Any:
    return b[0] * (b[1] + x) ** (-1 / b[2])


MODELS: dict[str, Model] = {
    "Misra1a": saturation,
    "Misra1b": misra1b,
    "Misra1c": misra1c,
    "Misra1d": misra1d,
    "Chwirut1": chwirut,
    "Chwirut2": chwirut,
    "Lanczos1": three_exponentials,
    "Lanczos2": three_exponentials,
    "Lanczos3": three_exponentials,
    "Gauss1": two_peaks,
    "Gauss2": two_peaks,
    "Gauss3": two_peaks,
    "DanWood": power,
    "Kirby2": quadratics,
    "Hahn1": cubics,
    "Thurber": cubics,
    "Nelson": nelson,
    "MGH09": mgh09,
    "MGH10": mgh10,
    "MGH17": two_exponentials,
    "Roszman1": roszman,
    "ENSO": enso,
    "BoxBOD": saturation,
    "Rat42": rat42,
    "Rat43": rat43,
    "Eckerle4": eckerle,
    "Bennett5": bennett,
}


def fit(name: str, data: dict[str, Any]) -> LeastSquares:
    model, x, y = MODELS[name], np.array(data["x"], dtype=np.float64), np.array(data["y"], dtype=np.float64)
    y = np.log(y) if name == "Nelson" else y

    def residual(b: Any) -> Any:
        return model(library(b), b, constant(b, x)) - constant(b, y)

    first, *others = (tuple(map(float, start)) for start in data["starts"])
    certified = tuple(map(float, data["certified"]))
    return LeastSquares(name, residual, first, (data["sum_of_squares"],), certified, tuple(others))


PROBLEMS = [
    fit(name, data) for name, data in json.loads(Path(__file__).with_name("nist.json").read_text("utf-8")).items()
]
