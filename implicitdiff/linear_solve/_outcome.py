"""What came out of a solve, and what is said when it failed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from implicitdiff._implicit.system import System
from implicitdiff.errors import LinearSolveError, LinearSolveWarning

OnFailure = Literal["raise", "warn", "ignore"]


class Outcome(NamedTuple):
    """Attributes:
    x: the solution, row by row.
    failed: which rows failed.
    why: what went wrong in them, and what to do.
    figures: computes the residual norms, in the system's scaled rows, and what they had to reach.
    iterations: how many were used; 0 for a direct solver.
    """

    x: Tensor
    failed: Tensor
    why: str
    figures: Callable[[], tuple[Tensor, Tensor]]
    iterations: int


def report_failed_solves(name: str, outcome: Outcome, system: System, on_failure: OnFailure) -> Tensor:
    """The solution, once failure has been raised, warned of, or ignored as the user asked."""
    if on_failure == "ignore" or not bool(outcome.failed.any()):
        return outcome.x
    scale, (residual, target) = system.scale[:, 0], outcome.figures()
    excess = torch.where(outcome.failed, residual / target, -torch.inf).nan_to_num(nan=torch.inf)
    worst = int(excess.argmax())
    figures = float((residual * scale)[worst]), float((target * scale)[worst])
    report(name, outcome.why, outcome.failed, *figures, outcome.iterations, on_failure)
    return outcome.x


def report(
    name: str, why: str, failed: Tensor, residual: float, target: float, iterations: int, on_failure: OnFailure
) -> None:
    """Raise, or warn, with the figures of the worst of the systems that `failed`."""
    count, total = int(failed.sum()), failed.numel()
    after = f" after {iterations} iterations" if iterations else ""
    numbers = f"{count} of {total} systems failed{after}; worst residual {residual:.3e}, target {target:.3e}"
    message = f"{name}: {why} ({numbers})"
    if on_failure == "warn":
        warnings.warn(message, LinearSolveWarning, stacklevel=2)
        return
    raise LinearSolveError(
        message, solver=name, residual=residual, target=target, failed=count, total=total, iterations=iterations
    )


def check_on_failure(name: str, on_failure: str) -> None:
    """Refuse what is no way to report failure."""
    if on_failure not in ("raise", "warn", "ignore"):
        raise ValueError(f'{name}: on_failure must be "raise", "warn" or "ignore", got {on_failure!r}')


def check_ridge(name: str, ridge: float) -> None:
    """Refuse a ridge that is no finite number >= 0."""
    if not (isinstance(ridge, (int, float)) and 0 <= ridge < math.inf):
        raise ValueError(f"{name}: ridge must be a number >= 0, got {ridge!r}")
