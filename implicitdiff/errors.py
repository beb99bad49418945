"""Exceptions and warnings of the library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

__all__ = [
    "CompileError",
    "ConvergenceError",
    "ConvergenceWarning",
    "LinearSolveError",
    "LinearSolveWarning",
    "NotARootError",
    "RankError",
    "TransformError",
]


ErrorT = TypeVar("ErrorT", bound=Exception)


def __dir__() -> list[str]:
    return __all__


def _restored(of: type[ErrorT], args: tuple[Any, ...], attributes: dict[str, Any]) -> ErrorT:
    """Return an error with these attributes, without a call of its `__init__`, which takes others than `args`."""
    # `BaseException.__new__` stores `args`, so the message is complete without `__init__`.
    error = of.__new__(of, *args)
    vars(error).update(attributes)
    return error


class CompileError(RuntimeError):
    """The loop of a search with ``compile="always"`` cannot run in compiled code."""


class LinearSolveError(RuntimeError):
    """A linear solve broke down, or reached the default limit of iterations before its target.

    Attributes:
        solver: name of the linear solver, e.g. ``"solve_cg"``.
        residual: residual norm of the worst failed system, in the units of the right-hand side.
        target: the residual norm required of this system.
        failed: number of systems that failed.
        total: number of systems solved together (lanes of ``vmap`` times right-hand sides).
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

    def __reduce__(self) -> tuple[object, ...]:
        return _restored, (type(self), self.args, vars(self))


class LinearSolveWarning(RuntimeWarning):
    """Issued instead of a `LinearSolveError` with ``on_failure="warn"``."""


class NotARootError(RuntimeError):
    """The decorated solver returned a point where the optimality condition does not hold.

    Attributes:
        residual: largest residual norm among the failed lanes.
        check: the tolerance of the check.
        failed: number of lanes that failed.
        total: number of lanes.
    """

    def __init__(self, message: str, *, residual: float, check: float, failed: int, total: int) -> None:
        super().__init__(message)
        self.residual = residual
        self.check = check
        self.failed = failed
        self.total = total

    def __reduce__(self) -> tuple[object, ...]:
        return _restored, (type(self), self.args, vars(self))


class TransformError(RuntimeError):
    """A derivative or batch needs a transform of torch.func that fails for the user's function.

    The message names the operation.
    """


class RankError(RuntimeError):
    """The ranks of a process group came to different collectives, or a rank has ended or does not answer."""


class ConvergenceError(RuntimeError):
    """A solver stopped before its target.

    Attributes:
        solver: name of the solver and of the user's function.
        status: reason of the failure in the worst lane; an `implicitdiff.solvers.Status`.
        iterations: number of iterations of the worst lane.
        error: error of the worst lane, in the units of the optimality condition.
        target: the error required of the worst lane.
        lanes: indices of the lanes that failed, counted over all vmaps.
        total: number of lanes.
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

    def __reduce__(self) -> tuple[object, ...]:
        return _restored, (type(self), self.args, vars(self))

    @staticmethod
    def of_all(errors: Sequence[ConvergenceError]) -> ConvergenceError:
        """Return one error for those of parts of the same lanes: that of the worst lane, with the lanes of all."""

        def excess(e: ConvergenceError) -> tuple[float, float]:
            # nan counts as infinite: compared with nan, `max` would depend on the order of the errors.
            error = math.inf if math.isnan(e.error) else e.error
            return (error / e.target if e.target else math.inf), error

        worst = max(errors, key=excess)
        lanes = tuple(sorted({lane for e in errors for lane in e.lanes}))
        # The message of the worst rank names that rank's lanes.
        before, now = (lanes_in_words(some, worst.total) for some in (worst.lanes, lanes))
        return _restored(ConvergenceError, (str(worst).replace(before, now),), {**vars(worst), "lanes": lanes})


def lanes_in_words(lanes: Sequence[int], total: int) -> str:
    """Return the lanes that failed, in words."""
    return f"lanes {', '.join(map(str, lanes[:5]))}{', ...' if len(lanes) > 5 else ''}: {len(lanes)} of {total}"


class ConvergenceWarning(RuntimeWarning):
    """Issued instead of a `ConvergenceError` with ``on_failure="warn"``."""
