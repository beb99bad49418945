"""Outcomes of a search, lane by lane, and their report as an error or a warning."""

from __future__ import annotations

import enum
import warnings
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from implicitdiff._torch.lanes import VmapSize, global_numbers
from implicitdiff.errors import ConvergenceError, ConvergenceWarning, lanes_in_words
from implicitdiff.linear_solve._outcome import OnFailure, level_of_caller


class Status(enum.IntEnum):
    """The values of a state's `status`.

    Attributes:
        RUNNING: not finished.
        CONVERGED: the error has reached its target, and ``x`` the solution as far as the method can tell.
        BUDGET_SPENT: the search has made `maxiter` iterations, or the limit of ``maxiter=None``.
        DIVERGED: a value is not finite, or the method cannot continue (a singular matrix, a fixed step size that is too
            large).
        LINE_SEARCH_FAILED: no step along the method's direction is good enough.
        INFEASIBLE: no point satisfies the constraints.
        UNBOUNDED: the objective has no minimum: no lower bound on the feasible set, or an infimum at infinity only.
        STALLED: no progress is possible in this precision: rounding keeps the error above its target or far from a
            poorly determined solution, or steps have length zero.
    """

    RUNNING = 0
    CONVERGED = 1
    BUDGET_SPENT = 2
    DIVERGED = 3
    LINE_SEARCH_FAILED = 4
    INFEASIBLE = 5
    UNBOUNDED = 6
    STALLED = 7


_ADVICE = {
    Status.BUDGET_SPENT: (
        "no convergence; the problem may have no solution, or the method may be unsuitable: inspect the errors "
        "(keep_history=True), try another solver, another initial guess, or a larger rtol or atol"
    ),
    Status.DIVERGED: "the iterates are not finite, a fixed step size is too large, a matrix is singular, or a "
    "quadratic program is not convex: try another initial guess, a smaller step, or a solver with a line search",
    Status.LINE_SEARCH_FAILED: "no step decreases the error; the function may not be smooth at this point, or its "
    "values too imprecise for rtol and atol",
    Status.STALLED: "no further progress in this precision: the tolerances are below rounding, the problem is "
    "ill-conditioned, or steps have become zero; raise the tolerances, use float64, or scale the problem",
    Status.INFEASIBLE: "no point satisfies the constraints: relax a constraint",
    Status.UNBOUNDED: (
        "the objective has no minimum, because values decrease without bound or towards an infimum at infinity: add "
        "a penalty or a constraint"
    ),
}


class SearchOutcome(Protocol):
    """The fields of a state that `report_failures` reads; lanes in front."""

    @property
    def iter_num(self) -> Tensor: ...
    @property
    def error(self) -> Tensor: ...
    @property
    def target(self) -> Tensor: ...
    @property
    def status(self) -> Tensor: ...


def report_failures(
    name: str, state: SearchOutcome, on_failure: OnFailure, *, budget: bool, vmaps: Sequence[VmapSize] = ()
) -> None:
    """Raise or warn if a lane failed.

    With an integer budget (``maxiter`` given by the user), ``BUDGET_SPENT`` and ``STALLED`` are no failures.

    Args:
        name: the solver's name.
        state: a state of plain tensors, lanes in front.
        on_failure: the user's choice of raising, warning or neither.
        budget: True if the user gave ``maxiter``.
        vmaps: the vmaps over the lanes, the outermost first; empty: count the lanes as they lie.

    Raises:
        ConvergenceError: a lane failed and `on_failure` is ``"raise"``; describes the lane with the largest
            ``error / target``.
    """
    status = state.status.reshape(-1)
    good = (Status.CONVERGED, Status.BUDGET_SPENT, Status.STALLED) if budget else (Status.CONVERGED,)
    failed = torch.stack([status != int(s) for s in good]).all(dim=0)
    if on_failure == "ignore" or not bool(failed.any()):
        return
    lanes, total = global_numbers(failed.nonzero()[:, 0].tolist(), vmaps or [VmapSize(0, status.numel())])
    error, target = state.error.reshape(-1), state.target.reshape(-1)
    # Describe the lane with the largest excess over its target; nan counts as infinite.
    excess = torch.where(failed, error / target, -torch.inf).nan_to_num(nan=torch.inf)
    worst = int(excess.argmax())
    why, iterations = Status(int(status[worst])), int(state.iter_num.reshape(-1)[worst])
    which = f"{lanes_in_words(lanes, total)}; worst" if state.status.dim() else "at the end"
    message = (
        f"{name}: {_ADVICE[why]} ({why.name} after {iterations} iterations; {which} error {float(error[worst]):.3e}, "
        f"target {float(target[worst]):.3e})"
    )
    if on_failure == "warn":
        warnings.warn(message, ConvergenceWarning, stacklevel=level_of_caller())
        return
    raise ConvergenceError(
        message,
        solver=name,
        status=why,
        iterations=iterations,
        error=float(error[worst]),
        target=float(target[worst]),
        lanes=tuple(lanes),
        total=total,
    )
