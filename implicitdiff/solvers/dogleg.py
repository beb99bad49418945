"""Powell's dogleg method for nonlinear least squares."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Concatenate

from torch import Tensor
from typing_extensions import Unpack

import implicitdiff.solvers._loop.equations as _equations
import implicitdiff.solvers._steps.dogleg as _dogleg
from implicitdiff._torch.control import if_any
from implicitdiff._torch.trees import P, Tree, X
from implicitdiff.solvers._loop.method import LEAST_SQUARES_STEP, IterativeMethod, Start
from implicitdiff.solvers._loop.newton_step import NewtonStep
from implicitdiff.solvers._loop.options import SolverOptions, solver_factory
from implicitdiff.solvers._loop.problem import BatchedProblem, row_norm, select
from implicitdiff.solvers._loop.solver import Solver, make_solver
from implicitdiff.solvers._loop.state import State
from implicitdiff.solvers._steps.dogleg import DoglegMemory
from implicitdiff.solvers._steps.least_squares import (
    curvature,
    half_squares,
    least_squares_newton_step,
    normal_gradient,
    normal_residual,
    normal_size,
)
from implicitdiff.solvers._steps.trust_region import check_radius, scaling_of


@solver_factory
def dogleg(
    residual_fn: Callable[Concatenate[X, P], Tree], radius: float = 1.0, **options: Unpack[SolverOptions]
) -> Solver[X, P, DoglegMemory]:
    r"""Make a minimiser of ``|r(x, *args)|^2 / 2`` by Powell's dogleg steps.

    A step ``d`` reduces the model ``|r + J d|``, ``J = dr/dx``, within ``|D d| <= Delta``. A Gauss-Newton step inside
    of the region is taken whole. Otherwise ``d`` is the last point inside of the region on the path from 0 to the
    minimum along the negative gradient and then to the Gauss-Newton step. A step is accepted if the cost decreases by
    at least 1e-4 of the model's prediction, and ``Delta`` grows and shrinks with the ratio of the two. ``D`` holds the
    norms of the columns of ``J``, at least 0.95 times the last ``D``, so the units of the unknowns do not matter.

    ``r`` may have any length, even shorter than ``x``, and ``J`` any rank; the derivative of the solution needs a
    strict minimum. A refused step costs one ``r``; in `levenberg_marquardt` also a factorisation. If the columns of
    ``J`` are nearly dependent, or ``r`` is large at the solution, steps zigzag, and `levenberg_marquardt` needs far
    fewer.

    The derivative is that of the exact stationarity condition ``J' r = 0``, second derivatives of ``r`` included.

    Args:
        residual_fn: ``r(x, *args)``, a tree of any tensors.
        radius: the first ``Delta`` in units of ``|D x|``, or of ``|r|`` for a zero ``x``; positive.
        options: see `SolverOptions`.

    Raises:
        ValueError: ``radius`` is not positive.

    Reference:
        Powell, "A hybrid method for nonlinear equations", 1970; Nocedal and Wright, "Numerical Optimization", 2nd ed.,
        section 4.1; for the scaling and the radius, More, Garbow and Hillstrom, "User guide for MINPACK-1", 1980.

    Example:
        >>> import torch
        >>> from implicitdiff.solvers import dogleg
        >>> t = torch.tensor([0.0, 1.0, 2.0])
        >>> solver = dogleg(lambda x, y: x[0] * torch.exp(-x[1] * t) - y)
        >>> solver.run(torch.tensor([1.0, 3.0]), 2.0 * torch.exp(-0.5 * t))[0]
        tensor([2.0000, 0.5000])
    """
    check_radius("dogleg", radius)

    start = partial(_start, radius=radius)
    method = IterativeMethod(
        start,
        _step,
        DoglegMemory,
        1_000,
        residual=normal_residual,
        size=normal_size,
        steps_tell=True,
        step_powers=LEAST_SQUARES_STEP,
        newton_step=_newton_step,
    )
    return make_solver("dogleg", _equations.least_squares_equation, (residual_fn,), method, options)


def _start(problem: BatchedProblem, x: Tensor, *, radius: float) -> Start[DoglegMemory]:
    memory = _dogleg.initial_memory(problem, x, radius)
    return Start(row_norm(normal_residual(memory)), memory)


def _step(problem: BatchedProblem, x: Tensor, state: State[DoglegMemory]) -> tuple[Tensor, State[DoglegMemory]]:
    old = state.memory
    # The least-squares step has a tiny ridge, because the columns of ``J`` may be dependent.
    trial, radius = _dogleg.try_dogleg(problem, x, state, partial(_dogleg.regularised_step, eps=problem.eps))
    asked = trial.good | trial.by_gradient

    def judge(_: _Judged) -> _Judged:
        # Lanes that stay evaluate ``x`` again, whose Jacobian is finite.
        r, J = problem.fn.jacobian(select(asked, trial.x, x))
        # If rounding hides the gain, the scaled gradient decides.
        flatter = _steepness(r, J, old.scale) < _steepness(old.residual, old.jacobian, old.scale)
        return asked & (flatter | ~trial.unresolved), r, J

    accepted, *at_trial = if_any(asked, judge, (asked, old.residual, old.jacobian))
    x, state = _dogleg.finish_step(x, state, trial, radius, accepted, at_trial)
    return x, state._replace(error=row_norm(normal_residual(state.memory)))


_Judged = tuple[Tensor, Tensor, Tensor]
"""The lanes that accept the step, and the residual and the Jacobian at its end."""


def _newton_step(problem: BatchedProblem, x: Tensor, memory: DoglegMemory) -> NewtonStep:
    r, J = memory.residual, memory.jacobian
    return least_squares_newton_step(problem, x, r, J, half_squares(r), curvature(x, problem.fn.summed(half_squares)))


def _steepness(r: Tensor, J: Tensor, scale: Tensor) -> Tensor:
    """Return ``|D^-1 J' r|``."""
    # The gradient in the variable ``D x`` of the trust region, independent of the units of the unknowns.
    return row_norm(normal_gradient(J, r) / scaling_of(scale))
