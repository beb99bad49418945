"""The chord method: Newton's with the first Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Concatenate, NamedTuple

from torch import Tensor
from typing_extensions import Unpack

import implicitdiff.solvers._loop.dense as _dense
import implicitdiff.solvers._loop.equations as _equations
import implicitdiff.solvers._steps.newton as _newton
from implicitdiff._implicit.linear import LinearSolver
from implicitdiff._torch.trees import P, X
from implicitdiff.solvers._loop.method import IterativeMethod, Start
from implicitdiff.solvers._loop.options import SolverOptions, solver_factory
from implicitdiff.solvers._loop.problem import BatchedProblem, row_norm, vecmat
from implicitdiff.solvers._loop.solver import Solver, make_solver
from implicitdiff.solvers._loop.state import State


class ChordMemory(NamedTuple):
    """The memory of `chord`.

    Attributes:
        residual: ``F(x)``, as one vector of length ``n``.
        point: the point of the Jacobian, the initial guess.
        inverse: the inverse of the Jacobian, ``(n, n)``; empty with a linear solver.
    """

    residual: Tensor
    point: Tensor
    inverse: Tensor


@solver_factory
def chord(
    residual_fn: Callable[Concatenate[X, P], X],
    linear_solve: LinearSolver | None = None,
    backtracking: bool = False,
    **options: Unpack[SolverOptions],
) -> Solver[X, P, ChordMemory]:
    r"""Make a solver of ``F(x, *args) = 0`` by ``x <- x - J0^-1 F(x)``, ``J0`` the Jacobian at the initial guess.

    A single factorisation serves all iterations, and an iteration costs one evaluation of ``F``. Converges linearly; a
    closer initial guess gives a better rate.

    Args:
        residual_fn: ``F(x, *args)``, a tree like ``x``.
        linear_solve: a solver of `implicitdiff.linear_solve`; None for the inverse, computed once.
        backtracking: see `newton`.
        options: see `SolverOptions`.

    Raises:
        TypeError: ``linear_solve`` is not a linear solver of this library.

    Reference:
        Kelley, "Iterative Methods for Linear and Nonlinear Equations", 1995, section 5.4.1.

    Example:
        >>> import torch
        >>> from implicitdiff.solvers import chord
        >>> solver = chord(lambda x, theta: x**3 + x.sum() - theta)
        >>> solver.run(torch.ones(2, dtype=torch.float64), torch.tensor([3.0, 4.0]))[0]
        tensor([0.9414, 1.2241], dtype=torch.float64)
    """
    _newton.check_linear_solve("chord", linear_solve)

    start = partial(_start, linear_solve=linear_solve)
    step = partial(_step, linear_solve=linear_solve, backtracking=backtracking)
    method = IterativeMethod(start, step, ChordMemory, 1_000, residual=attrgetter("residual"))
    return make_solver("chord", _equations.root_equation, (residual_fn,), method, options)


def _start(problem: BatchedProblem, x: Tensor, *, linear_solve: LinearSolver | None) -> Start[ChordMemory]:
    residual = problem.fn(x)
    # With a linear solver the Jacobian at the initial guess is applied by products in each step.
    empty = x.new_zeros((x.shape[0], 0, 0))
    inverse = _dense.invert_dense(problem.fn.jacobian(x)[1]) if linear_solve is None else empty
    return Start(row_norm(residual), ChordMemory(residual=residual, point=x, inverse=inverse))


def _step(
    problem: BatchedProblem,
    x: Tensor,
    state: State[ChordMemory],
    *,
    linear_solve: LinearSolver | None,
    backtracking: bool,
) -> tuple[Tensor, State[ChordMemory]]:
    memory = state.memory
    if linear_solve is None:
        # ``J0^-1 r`` as ``r'J0^-T``, row by row.
        direction = -vecmat(memory.residual, memory.inverse.mT)
    else:
        # The Jacobian at the first point, and the residual at the present point.
        direction = -_newton.newton_direction(problem, memory.point, memory.residual, linear_solve)
    x, residual, status = _newton.take_step(problem, x, state, direction, backtracking)
    return x, state._replace(error=row_norm(residual), status=status, memory=memory._replace(residual=residual))
