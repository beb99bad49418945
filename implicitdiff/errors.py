"""The library's own exception and warning types."""

from __future__ import annotations

from functools import partial
from typing import Any

__all__ = [
    "ConvergenceError",
    "ConvergenceWarning",
    "LinearSolveError",
    "LinearSolveWarning",
    "NotARootError",
    "TransformError",
]


class LinearSolveError(RuntimeError):
    """A linear solve broke down or met its safety net before its target.

    Attributes:
        solver: name of the linear solver, e.g. ``"solve_cg"``.
        residual: largest residual norm among the failed systems, in the units of the right-hand side.
        target: the residual norm that this system had to reach.
        failed: how many systems failed.
        total: how many systems were solved together (lanes of ``vmap`` times right-hand sides).
        iterations: iterations used (0 for a direct solver).
    """

    def __init__(
        self, message: str, *, solver: str, residual: float, target: float, failed: int, total: int, iterations: int
    ) -> None:
        super().__init__(message)
        self.solver = solver
        self.residual = residual
        self.target = target
        self.failed = failed
        self.total = total
        self.iterations = iterations

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), **vars(self)), self.args


class LinearSolveWarning(RuntimeWarning):
    """What `LinearSolveError` says, under ``on_failure="warn"``."""


class NotARootError(RuntimeError):
    """The decorated solver returned a point where the optimality condition does not hold.

    Attributes:
        residual: largest residual norm among the failed lanes.
        check: the tolerance it was held against.
        failed: how many lanes failed.
        total: how many lanes there were.
    """

    def __init__(self, message: str, *, residual: float, check: float, failed: int, total: int) -> None:
        super().__init__(message)
        self.residual = residual
        self.check = check
        self.failed = failed
        self.total = total

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), **vars(self)), self.args


class TransformError(RuntimeError):
    """A derivative or a batch was asked for that takes a transform of torch.func, of a function that torch.func cannot
    transform. The message names the operation."""


class ConvergenceError(RuntimeError):
    """A solver stopped before its target.

    Attributes:
        solver: name of the solver and of the function that it was given.
        status: why, of the lane that is worst; an `implicitdiff.solvers.Status`.
        iterations: how many that lane took.
        error: its error, in the units of the optimality condition.
        target: what the error had to reach.
        lanes: the numbers of the lanes that failed, counted over all vmaps.
        total: how many lanes there were.
    """

    def __init__(
        self,
        message: str,
        *,
        solver: str,
        status: int,
        iterations: int,
        error: float,
        target: float,
        lanes: tuple[int, ...],
        total: int,
    ) -> None:
        super().__init__(message)
        self.solver = solver
        self.status = status
        self.iterations = iterations
        self.error = error
        self.target = target
        self.lanes = lanes
        self.total = total

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), **vars(self)), self.args


class ConvergenceWarning(RuntimeWarning):
    """What `ConvergenceError` says, under ``on_failure="warn"``."""
