"""What a solver's file defines: an iteration on rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from implicitdiff.solvers._loop.newton_step import NewtonStep
from implicitdiff.solvers._loop.problem import BatchedProblem
from implicitdiff.solvers._loop.state import State
from implicitdiff.solvers._loop.status import Status


class Start(NamedTuple):
    """A method at an initial guess.

    Attributes:
        error: the norm of the residual of the equation there, ``(lanes,)``.
        memory: what the method remembers.
        status: a `Status` other than ``RUNNING``, where the method cannot begin; None: it can.
        reference: what the default target and ``rtol`` are relative to; None: ``error``.
    """

    error: Tensor
    memory: Any
    status: Tensor | None = None
    reference: Tensor | None = None


class IterativeMethod(NamedTuple):
    """An iteration on rows, and what the stopping rule asks of it.

    Attributes:
        start: ``start(problem, x)``.
        step: ``step(problem, x, state) -> (x, state)``. Sets the new ``error``, that of the new ``x``, the ``memory``, and
            ``status`` where it fails; the rest is the loop's. What it does in lanes that have stopped is thrown away,
            but must be finite, since transforms differentiate it.
        memory: the class of the memory.
        default_maxiter: how many iterations ``maxiter=None`` allows.
        residual: ``residual(memory)``, the residual of the equation at the current unknowns, if the memory holds it.
        size: ``size(problem, x, memory)``, ``|J x|`` for the Jacobian ``J`` of the residual, if the memory holds it.
        steps_tell: whether the length of a step measures the error of ``x``, as in Newton's method; such a method sets
            it by `Progress.stepped`.
        newton_step: ``newton_step(problem, x, memory)``, a step of Newton's kind at x, for methods whose own steps say
            nothing, or nothing where they fail. It may use second derivatives.
        runs_off: the status of a search that goes away from everything, though its error falls.
        is_judged: whether the stopping rule judges the error; False: the method itself does.
        only_implicit: why ``implicit_diff=False`` makes no sense, if it makes none.
    """

    start: Callable[[BatchedProblem, Tensor], Start]
    step: Callable[[BatchedProblem, Tensor, State[Any]], tuple[Tensor, State[Any]]]
    memory: type[Any]
    default_maxiter: int
    residual: Callable[[Any], Tensor] | None = None
    size: Callable[[BatchedProblem, Tensor, Any], Tensor] | None = None
    steps_tell: bool = False
    newton_step: Callable[[BatchedProblem, Tensor, Any], NewtonStep] | None = None
    runs_off: Status = Status.DIVERGED
    is_judged: bool = True
    only_implicit: str | None = None
