"""Newton's method for roots."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Concatenate, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

import implicitdiff.solvers._loop.equations as _equations
import implicitdiff.solvers._steps.newton as _newton
from implicitdiff._implicit.linear import LinearSolver
from implicitdiff._torch.trees import P, X
from implicitdiff.solvers._loop.method import ROOT_STEP, IterativeMethod, Start
from implicitdiff.solvers._loop.options import SolverOptions, solver_factory
from implicitdiff.solvers._loop.problem import BatchedProblem, row_norm
from implicitdiff.solvers._loop.solver import Solver, make_solver
from implicitdiff.solvers._loop.state import State


class NewtonMemory(NamedTuple):
    """The memory of `newton`.

    Attributes:
        residual: ``F(x)``, as one vector.
        growth: factor by which the last consecutive growing steps have increased ``|F|``; 1 after a step without
            growth. A step counts for at most ``eps^(-1/8)``.
    """

    residual: Tensor
    growth: Tensor


@solver_factory
def newton(
    residual_fn: Callable[Concatenate[X, P], X],
    linear_solve: LinearSolver | None = None,
    backtracking: bool = False,
    **options: Unpack[SolverOptions],
) -> Solver[X, P, NewtonMemory]:
    r"""Make a solver of ``F(x, *args) = 0`` by Newton's method, ``x <- x - J^-1 F(x)`` with ``J = dF/dx``.

    Converges quadratically near a solution with a non-singular ``J``. An iteration factorises ``J``, computed from
    products with unit vectors; with a linear solver an iteration uses products only. The status is ``DIVERGED`` for a
    singular ``J``, and for diverging iterates: ``|F|`` has grown by a factor ``1 / eps`` in 8 or more consecutive steps
    that all increased both ``|F|`` and ``|x|``.

    Args:
        residual_fn: ``F(x, *args)``, a tree like ``x``.
        linear_solve: a solver of `implicitdiff.linear_solve`, e.g. ``solve_gmres(rtol=1e-3)``, that raises for its own
            failures. None for LU.
        backtracking: True to halve steps until the residual decreases, for convergence from farther away. Lanes without
            such a step get the status ``LINE_SEARCH_FAILED``.
        options: see `SolverOptions`.

    Raises:
        TypeError: ``linear_solve`` is not a linear solver of this library.

    Reference:
        Nocedal and Wright, "Numerical Optimization", 2nd ed., algorithms 11.1 and 11.4.

    Example:
        >>> import torch
        >>> from implicitdiff.solvers import newton
        >>> solver = newton(lambda x, theta: x**3 + x.sum() - theta)
        >>> x, state = solver.run(torch.ones(2), torch.tensor([3.0, 4.0]))
        >>> x, int(state.iter_num)
        (tensor([0.9414, 1.2241]), 4)
    """
    _newton.check_linear_solve("newton", linear_solve)

    step = partial(_step, linear_solve=linear_solve, backtracking=backtracking)
    method = IterativeMethod(
        _start,
        step,
        NewtonMemory,
        1_000,
        residual=attrgetter("residual"),
        steps_tell=True,
        step_powers=ROOT_STEP,
    )
    return make_solver("newton", _equations.root_equation, (residual_fn,), method, options)


def _start(problem: BatchedProblem, x: Tensor) -> Start[NewtonMemory]:
    residual = problem.fn(x)
    error = row_norm(residual)
    return Start(error, NewtonMemory(residual, growth=torch.ones_like(error)))


def _step(
    problem: BatchedProblem,
    x: Tensor,
    state: State[NewtonMemory],
    *,
    linear_solve: LinearSolver | None,
    backtracking: bool,
) -> tuple[Tensor, State[NewtonMemory]]:
    direction = -_newton.newton_direction(problem, x, state.memory.residual, linear_solve)
    new_x, residual, status = _newton.take_step(problem, x, state, direction, backtracking)
    growth, status = _newton.watch_growth(
        state._replace(status=status), x, new_x, state.memory.residual, residual, problem.eps
    )
    # The full Newton step measures the error of ``x``, even if backtracking has shortened the step.
    progress, memory = state.progress.stepped(direction, new_x), NewtonMemory(residual, growth)
    return new_x, state._replace(error=row_norm(residual), status=status, progress=progress, memory=memory)
