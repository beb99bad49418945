"""Result of a linear solve, and the report of failure."""

from __future__ import annotations

import inspect
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor

import implicitdiff._torch.control as _control
from implicitdiff._implicit.system import System
from implicitdiff.errors import LinearSolveError, LinearSolveWarning

OnFailure = Literal["raise", "warn", "ignore"]


class Outcome(NamedTuple):
    """Result of a linear solve.

    Attributes:
        x: the solution, ``(rows, n)``.
        failed: the rows that failed, ``(rows,)``.
        why: returns the message for failed rows, with a remedy.
        figures: computes residual norms and targets of all rows, in the scaling of the system.
        iterations: number of iterations; 0 for a direct solver.
        has_failed: True if a row failed, or None if that is not known yet.
    """

    x: Tensor
    failed: Tensor
    why: Callable[[], str]
    figures: Callable[[], tuple[Tensor, Tensor]]
    iterations: int
    has_failed: bool | None = None


class _Reports(threading.local):
    is_silent = False


_reports = _Reports()


@contextmanager
def unreported() -> Iterator[None]:
    """Report no failure of this thread in the body."""
    before, _reports.is_silent = _reports.is_silent, True
    try:
        yield
    finally:
        _reports.is_silent = before


def report_failed_solves(name: str, outcome: Outcome, system: System, on_failure: OnFailure) -> Tensor:
    """Report failure as the user asked, and return the solution."""
    if on_failure == "ignore" or _reports.is_silent:
        return outcome.x
    if _control.is_recorded():
        _control.leave_to_python(outcome.failed)
        return outcome.x
    if not (bool(outcome.failed.any()) if outcome.has_failed is None else outcome.has_failed):
        return outcome.x
    # Residuals are those of scaled rows: multiply by `scale` for the user's units.
    scale, (residual, target) = system.scale[:, 0], outcome.figures()
    # The worst system by residual / target; nan counts as infinite.
    excess = torch.where(outcome.failed, residual / target, -torch.inf).nan_to_num(nan=torch.inf)
    worst = int(excess.argmax())
    figures = float((residual * scale)[worst]), float((target * scale)[worst])
    report(name, outcome.why(), outcome.failed, *figures, outcome.iterations, on_failure)
    return outcome.x


def report(
    name: str, why: str, failed: Tensor, residual: float, target: float, iterations: int, on_failure: OnFailure
) -> None:
    """Raise or warn, with the figures of the worst failed system."""
    count, total = int(failed.sum()), failed.numel()
    after = f" after {iterations} iterations" if iterations else ""
    numbers = f"{count} of {total} systems failed{after}; worst residual {residual:.3e}, target {target:.3e}"
    message = f"{name}: {why} ({numbers})"
    if on_failure == "warn":
        warnings.warn(message, LinearSolveWarning, stacklevel=level_of_caller())
        return
    raise LinearSolveError(
        message, solver=name, residual=residual, target=target, failed=count, total=total, iterations=iterations
    )


def level_of_caller() -> int:
    """Return the number of stack frames between this function and the user's code, for `warnings.warn`."""
    # A warning points at the user's call: skip the frames of this library and of torch.
    level, frame = 0, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("implicitdiff", "torch"):
        level, frame = level + 1, frame.f_back
    return level


def check_on_failure(name: str, on_failure: str) -> None:
    """Raise unless `on_failure` is one of the three strings."""
    if on_failure not in ("raise", "warn", "ignore"):
        raise ValueError(f'{name}: on_failure must be "raise", "warn" or "ignore", got {on_failure!r}')


def check_not_negative(name: str, option: str, value: object, *, or_none: bool = False) -> None:
    """Raise unless an option is a finite number >= 0, or None where allowed."""
    is_valid = isinstance(value, (int, float)) and 0 <= value < math.inf
    _check_option(name, option, value, is_valid, "a finite number >= 0", or_none)


def check_integer(name: str, option: str, value: object, least: int, *, or_none: bool = False) -> None:
    """Raise unless an option is an integer >= `least`, or None where allowed."""
    is_valid = isinstance(value, int) and value >= least
    _check_option(name, option, value, is_valid, f"an integer >= {least}", or_none)


def _check_option(name: str, option: str, value: object, is_valid: bool, wanted: str, or_none: bool) -> None:
    if not (or_none if value is None else is_valid):
        raise ValueError(f"{name}: {option} must be {wanted}{' or None' * or_none}, got {value!r}")
