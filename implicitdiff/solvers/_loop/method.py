"""The definition of an iterative method, as each solver's file fills in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic

from torch import Tensor
from typing_extensions import NamedTuple, TypeVar  # generic tuples and defaults need Python 3.11 and 3.13

from implicitdiff.solvers._loop.newton_step import NewtonStep
from implicitdiff.solvers._loop.problem import BatchedProblem
from implicitdiff.solvers._loop.state import State
from implicitdiff.solvers._loop.status import Status

MethodMemory = TypeVar("MethodMemory", default=Any)
"""The class of a method's memory; `IterativeMethod` alone stands for any."""


class Start(NamedTuple, Generic[MethodMemory]):
    """A method at an initial guess.

    Attributes:
        error: norm of the residual of the equation at the guess, ``(lanes,)``.
        memory: the method's memory.
        status: a `Status` per lane, other than ``RUNNING`` if the method cannot begin in a lane; None if the method can
            begin in all.
        reference: the error to which ``rtol`` and the default target refer; None for ``error``.
    """

    error: Tensor
    memory: MethodMemory
    status: Tensor | None = None
    reference: Tensor | None = None


class StepPowers(NamedTuple):
    """Bounds ``eps^power`` on the length of the last Newton-type step relative to ``x``.

    Attributes:
        near: for a search whose error has reached the target.
        failed: for a search that rounding has ended.
    """

    near: float
    failed: float


TRIAL_STEP = StepPowers(near=1 / 2, failed=1 / 2)
"""For a step that is not made, so that the step itself is the error of ``x``."""
ROOT_STEP = StepPowers(near=1 / 3, failed=1 / 6)
"""For a step to a root that is made, so that the error is about its square. Rounding ends the search for a multiple
root early: a root of multiplicity ``m`` is determined to ``eps^(1/m)``."""
LEAST_SQUARES_STEP = StepPowers(near=2 / 5, failed=1 / 2)
"""For a step of least squares that is made; convergence is linear if the residual is not zero. A step that rounding
refuses is itself the error of ``x``. The bound is strict, because rounding hides the cost along flat directions."""


class IterativeMethod(NamedTuple, Generic[MethodMemory]):
    """An iteration on rows, with the properties that the stopping rule uses.

    Attributes:
        start: ``start(problem, x)``.
        step: ``step(problem, x, state) -> (x, state)``. Returns the new ``x``, and the state with the new ``error`` and
            ``memory``, and with ``status`` changed in lanes that fail, such as ``LINE_SEARCH_FAILED``; at a solution
            the stopping rule changes it to ``CONVERGED``. The loop updates the other fields. The loop
            discards the results of lanes that have stopped, but these results must be finite because transforms
            differentiate them.
        memory: the class of the memory.
        default_maxiter: the limit of iterations for ``maxiter=None``.
        residual: ``residual(memory)``, the residual of the equation at the current unknowns; None if the memory does
            not hold the residual.
        size: ``size(problem, x, memory)``, ``|J x|`` with ``J`` the Jacobian of the residual; None to measure ``|J x|``
            by a difference.
        steps_tell: True if the length of a step measures the error of ``x``, as in Newton's method. Such a method calls
            `Progress.stepped` at each step.
        newton_step: ``newton_step(problem, x, memory)``, a Newton-type step at `x` for methods whose own steps do not
            measure the error of ``x``, or do not after a failure. May use second derivatives.
        step_powers: bounds on the last Newton-type step.
        runs_off: the status of a search whose iterates go to infinity while the error falls.
        is_judged: True if the stopping rule judges the error; False if the method itself does.
        only_implicit: the reason why ``implicit_diff=False`` is refused; None if allowed.
    """

    start: Callable[[BatchedProblem, Tensor], Start[MethodMemory]]
    step: Callable[[BatchedProblem, Tensor, State[MethodMemory]], tuple[Tensor, State[MethodMemory]]]
    memory: type[MethodMemory]
    default_maxiter: int
    residual: Callable[[MethodMemory], Tensor] | None = None
    size: Callable[[BatchedProblem, Tensor, MethodMemory], Tensor] | None = None
    steps_tell: bool = False
    newton_step: Callable[[BatchedProblem, Tensor, MethodMemory], NewtonStep] | None = None
    step_powers: StepPowers = TRIAL_STEP
    runs_off: Status = Status.DIVERGED
    is_judged: bool = True
    only_implicit: str | None = None
