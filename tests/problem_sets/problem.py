"""What the tables of problems are made of."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

Function = Callable[[Any], Any]


def library(x: Any) -> Any:
    """The module of functions for an array: torch, numpy or jax.numpy."""
    if isinstance(x, torch.Tensor):
        return torch
    return np if isinstance(x, (np.ndarray, np.generic)) else importlib.import_module("jax.numpy")


def constant(x: Any, values: Any) -> Any:
    """Values as an array of the library and the dtype of x."""
    values = np.asarray(values, dtype=np.float64)
    if isinstance(x, torch.Tensor):
        return torch.as_tensor(values, dtype=x.dtype, device=x.device)
    return library(x).asarray(values, dtype=x.dtype)


class LeastSquares(NamedTuple):
    """``min |r(x)|^2``.

    Attributes:
        name: of the problem, with its sizes where these vary.
        residual: ``r(x)``, a vector.
        start: the standard initial guess.
        values: ``|r|^2`` at the minima that are known; the first is the global one.
        solution: the minimiser of the first, where it is known and unique.
        starts: other initial guesses.
    """

    name: str
    residual: Function
    start: tuple[float, ...]
    values: tuple[float, ...]
    solution: tuple[float, ...] | None = None
    starts: tuple[tuple[float, ...], ...] = ()

    def __str__(self) -> str:
        return self.name


class Roots(NamedTuple):
    """``F(x) = 0`` of as many equations as unknowns."""

    name: str
    residual: Function
    start: tuple[float, ...]
    starts: tuple[tuple[float, ...], ...] = ()

    def __str__(self) -> str:
        return self.name


class Bounded(NamedTuple):
    """``min f(x)`` subject to ``lower <= x <= upper``; `value` is the least ``f``, of `solution` if that is unique."""

    name: str
    objective: Function
    start: tuple[float, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    value: float
    solution: tuple[float, ...] | None = None

    def __str__(self) -> str:
        return self.name


class FixedPoint(NamedTuple):
    """``f(x) = x``."""

    name: str
    fn: Function
    start: tuple[float, ...]
    solution: tuple[float, ...] | None = None

    def __str__(self) -> str:
        return self.name
