"""Powell's dogleg method for roots."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Concatenate

import torch
from torch import Tensor
from typing_extensions import Unpack

import implicitdiff.solvers._loop.dense as _dense
import implicitdiff.solvers._loop.equations as _equations
import implicitdiff.solvers._steps.dogleg as _dogleg
from implicitdiff._torch.control import if_any
from implicitdiff._torch.trees import P, X
from implicitdiff.solvers._loop.method import ROOT_STEP, IterativeMethod, Start
from implicitdiff.solvers._loop.options import SolverOptions, solver_factory
from implicitdiff.solvers._loop.problem import BatchedProblem, row_norm, select, vecmat
from implicitdiff.solvers._loop.solver import Solver, make_solver
from implicitdiff.solvers._loop.state import State
from implicitdiff.solvers._loop.status import Status
from implicitdiff.solvers._steps.dogleg import DoglegMemory
from implicitdiff.solvers._steps.trust_region import check_radius


@solver_factory
def dogleg_root(
    residual_fn: Callable[Concatenate[X, P], X], radius: float = 1.0, **options: Unpack[SolverOptions]
) -> Solver[X, P, DoglegMemory]:
    r"""Make a solver of ``F(x, *args) = 0`` by Powell's dogleg steps, which converge from farther away than Newton's.

    A step ``d`` reduces ``|F + J d|``, ``J = dF/dx``, within ``|D d| <= Delta``. A Newton step inside of the region is
    taken whole. Otherwise ``d`` is the last point inside of the region on the path from 0 to the minimum along the
    negative gradient of ``|F|^2`` and then to the Newton step; see `dogleg` for details. For a singular ``J`` the
    shortest least-squares step replaces the Newton step. Converges quadratically near a solution with a regular ``J``.

    The method may converge to a minimum of ``|F|`` other than a root. The status is then ``LINE_SEARCH_FAILED``, at the
    latest after 20 consecutive steps that each lowered ``|F|`` by less than a thousandth.

    An iteration costs one Jacobian, and one ``F`` for each radius tried.

    Args:
        residual_fn: ``F(x, *args)``, a tree like ``x``.
        radius: the first ``Delta`` in units of ``|D x|``, or of ``|F|`` for a zero ``x``; positive.
        options: see `SolverOptions`.

    Raises:
        ValueError: ``radius`` is not positive.

    Reference:
        Powell, "A hybrid method for nonlinear equations", 1970; Nocedal and Wright, "Numerical Optimization", 2nd ed.,
        section 11.2; for the scaling and the radius, More, Garbow and Hillstrom, "User guide for MINPACK-1", 1980,
        which replaces most Jacobians by Broyden's corrections.

    Example:
        >>> import torch
        >>> from implicitdiff.solvers import dogleg_root
        >>> solver = dogleg_root(lambda x, theta: x**3 + x.sum() - theta)
        >>> solver.run(torch.ones(2), torch.tensor([3.0, 4.0]))[0]
        tensor([0.9414, 1.2241])
    """
    check_radius("dogleg_root", radius)

    start = partial(_start, radius=radius)
    method = IterativeMethod(
        start,
        _step,
        DoglegMemory,
        1_000,
        residual=attrgetter("residual"),
        size=_size,
        steps_tell=True,
        step_powers=ROOT_STEP,
    )
    return make_solver("dogleg_root", _equations.root_equation, (residual_fn,), method, options)


def _start(problem: BatchedProblem, x: Tensor, *, radius: float) -> Start[DoglegMemory]:
    memory = _dogleg.initial_memory(problem, x, radius)
    error = row_norm(memory.residual)
    # A Jacobian that is not finite gives no step.
    known = torch.isfinite(memory.jacobian).flatten(1).all(dim=-1) | (error == 0)
    return Start(torch.where(known, error, torch.nan), memory)


def _size(problem: BatchedProblem, x: Tensor, memory: DoglegMemory) -> Tensor:
    return row_norm(vecmat(x, memory.jacobian.mT))


def _step(problem: BatchedProblem, x: Tensor, state: State[DoglegMemory]) -> tuple[Tensor, State[DoglegMemory]]:
    trial, radius = _dogleg.try_dogleg(problem, x, state, partial(_newton_or_least_squares, eps=problem.eps))
    # If rounding hides the gain, compare the norms themselves, computed without squares.
    accepted = trial.known & torch.where(trial.unresolved, row_norm(trial.residual) < state.error, trial.good)
    old = state.memory.residual, state.memory.jacobian
    # Lanes that stay evaluate ``x`` again, whose Jacobian is finite.
    at_trial = if_any(accepted, lambda _: problem.fn.jacobian(select(accepted, trial.x, x)), old)
    x, state = _dogleg.finish_step(x, state, trial, radius, accepted, at_trial)
    memory = state.memory
    status = torch.where(memory.slow >= _MAX_SLOW_STEPS, int(Status.LINE_SEARCH_FAILED), state.status)
    return x, state._replace(error=row_norm(memory.residual), status=status)


_MAX_SLOW_STEPS = 20
"""Number of consecutive steps with negligible gain after which ``x`` counts as a minimum of ``|F|``."""


def _newton_or_least_squares(A: Tensor, r: Tensor, *, eps: float) -> Tensor:
    """Return ``-A^-1 r`` in lanes with a solution of the system, else the least-squares step."""
    # Newton's step ``r + A s = 0`` minimises ``|r + A s|``; a singular system takes the least-squares step.
    s = -_dense.solve_dense(A, r)
    # LU of a nearly singular matrix may return large, wrong numbers without a zero pivot, so test the residual.
    # Negated, so that nan counts as singular.
    singular = ~(row_norm(vecmat(s, A.mT) + r) <= _MAX_LINEAR_RESIDUAL * row_norm(r))

    def again(_: Tensor) -> Tensor:
        # Solve again with regular matrices, so that no nan reaches the derivative of the other lanes.
        eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        regular = _dense.solve_dense(select(singular, eye.expand_as(A), A), r)
        return select(singular, _dogleg.regularised_step(A, r, eps=eps), -regular)

    return if_any(singular, again, s)


_MAX_LINEAR_RESIDUAL = 1e-2
"""Largest relative residual of a solved linear system; a larger residual shows a singular matrix."""
