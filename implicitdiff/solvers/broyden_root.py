"""Broyden's method for roots."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Concatenate, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

import implicitdiff.solvers._loop.dense as _dense
import implicitdiff.solvers._loop.equations as _equations
import implicitdiff.solvers._steps.low_rank as _low_rank
from implicitdiff._torch.control import if_any
from implicitdiff._torch.trees import P, X
from implicitdiff.solvers._loop.method import IterativeMethod, Start
from implicitdiff.solvers._loop.options import SolverOptions, check_count, solver_factory
from implicitdiff.solvers._loop.problem import BatchedProblem, row_norm, select, vecmat
from implicitdiff.solvers._loop.solver import Solver, make_solver
from implicitdiff.solvers._loop.state import State
from implicitdiff.solvers._loop.status import Status
from implicitdiff.solvers._steps.newton import shorten_step


class BroydenRootMemory(NamedTuple):
    """The memory of `broyden_root`.

    Attributes:
        residual: ``F(x)``, as one vector of length ``n``.
        inverse: the inverse of the last computed Jacobian, ``(n, n)``.
        u: the first factors of the present inverse, about ``inverse + sum_j u_j v_j'``; ``(history, n)``.
        v: the second factors, ``(history, n)``.
        rank: the number of terms.
        slow: the number of consecutive steps that have not halved the error.
        age: the number of steps since the Jacobian was computed.
    """

    residual: Tensor
    inverse: Tensor
    u: Tensor
    v: Tensor
    rank: Tensor
    slow: Tensor
    age: Tensor


@solver_factory
def broyden_root(
    residual_fn: Callable[Concatenate[X, P], X],
    history: int = 20,
    backtracking: bool = False,
    **options: Unpack[SolverOptions],
) -> Solver[X, P, BroydenRootMemory]:
    r"""Make a solver of ``F(x, *args) = 0`` by Broyden's method from a Jacobian.

    The inverse Jacobian of `chord`, corrected after every step as in `broyden`: superlinear convergence for one
    evaluation of ``F`` per iteration. The Jacobian is computed at the initial guess, and again if three consecutive
    steps have not halved the error, if backtracking fails, or if the history is full.

    Args:
        residual_fn: ``F(x, *args)``, a tree like ``x``.
        history: the largest number of rank-one corrections, at least 1; a full history starts anew from a new Jacobian.
        backtracking: see `newton`.
        options: see `SolverOptions`.

    Raises:
        ValueError: ``history`` is less than 1.

    Reference:
        Broyden, Math. Comp. 19 (1965); Nocedal and Wright, "Numerical Optimization", 2nd ed., algorithm 11.3.

    Example:
        >>> import torch
        >>> from implicitdiff.solvers import broyden_root
        >>> solver = broyden_root(lambda x, theta: x**3 + x.sum() - theta)
        >>> solver.run(torch.ones(2), torch.tensor([3.0, 4.0]))[0]
        tensor([0.9414, 1.2241])
    """
    check_count("broyden_root", "history", history)

    start, step = partial(_start, history=history), partial(_step, backtracking=backtracking)
    method = IterativeMethod(start, step, BroydenRootMemory, 1_000, residual=attrgetter("residual"))
    return make_solver("broyden_root", _equations.root_equation, (residual_fn,), method, options)


def _start(problem: BatchedProblem, x: Tensor, *, history: int) -> Start[BroydenRootMemory]:
    residual = problem.fn(x)
    zeros = torch.zeros_like(x)[:, None].repeat(1, history, 1)
    # An explicit inverse, because the update needs products with ``H0`` and with ``H0'`` in every step.
    inverse = _dense.invert_dense(problem.fn.jacobian(x)[1])
    error = row_norm(residual)
    zero = torch.zeros_like(error, dtype=torch.int64)
    return Start(error, BroydenRootMemory(residual, inverse, zeros, zeros, rank=zero, slow=zero, age=zero))


def _step(
    problem: BatchedProblem, x: Tensor, state: State[BroydenRootMemory], *, backtracking: bool
) -> tuple[Tensor, State[BroydenRootMemory]]:
    old, running = state.memory, state.status == Status.RUNNING
    # Renew before the step: `broyden_update` would restart a full history from the outdated inverse.
    state = _renew_jacobian(problem, x, state, running & ((old.rank >= old.u.shape[1]) | (old.slow >= _SLOW_STEPS)))
    direction = _broyden_direction(state.memory)
    # The corrected inverse may give an ascent direction of ``|F|``, so a failed line search renews the Jacobian too.
    if backtracking:
        new_x, new_r, state = _shorten_or_renew(problem, x, direction, state)
    else:
        new_x = x + direction
        new_r = problem.fn(new_x)
    memory, error = state.memory, row_norm(new_r)
    # ``H0`` is the inverse of the last computed Jacobian; the update also needs ``H0'``.
    first, adjoint = _product_with(memory.inverse), _product_with(memory.inverse.mT)
    s, y = new_x - x, new_r - memory.residual
    u, v, rank = _low_rank.broyden_update(first, adjoint, memory.u, memory.v, memory.rank, s, y)
    # Superlinear convergence at least halves the error; slower steps show an outdated Jacobian.
    slow = torch.where(error > 0.5 * state.error, memory.slow + 1, 0)
    memory = BroydenRootMemory(new_r, memory.inverse, u, v, rank, slow, memory.age + 1)
    return new_x, state._replace(error=error, memory=memory)


def _shorten_or_renew(
    problem: BatchedProblem, x: Tensor, direction: Tensor, state: State[BroydenRootMemory]
) -> tuple[Tensor, Tensor, State[BroydenRootMemory]]:
    """Return the next point, its residual and the state before the step. If a few halvings do not help, Broyden's
    direction may point uphill; a new Jacobian gives a descent direction of ``|F|``."""

    def renew(
        carry: tuple[Tensor, Tensor, State[BroydenRootMemory]],
    ) -> tuple[Tensor, Tensor, State[BroydenRootMemory]]:
        new_x, new_r, state = carry
        state = _renew_jacobian(problem, x, state, refused)
        # Search again in the refused lanes only; the others keep their points. A Newton step of the new Jacobian
        # descends, so the second search has the full number of halvings.
        again_x, again_r, still = shorten_step(problem, x, state, _broyden_direction(state.memory), refused)
        status = torch.where(refused & still, int(Status.LINE_SEARCH_FAILED), state.status)
        new_x, new_r = select(refused, again_x, new_x), select(refused, again_r, new_r)
        return new_x, new_r, state._replace(status=status)

    new_x, new_r, refused = shorten_step(problem, x, state, direction, state.status == Status.RUNNING, _HALVINGS)
    return if_any(refused, renew, (new_x, new_r, state))


def _renew_jacobian(
    problem: BatchedProblem, x: Tensor, state: State[BroydenRootMemory], where: Tensor
) -> State[BroydenRootMemory]:
    """Return the state with the Jacobian at ``x`` and no corrections in the flagged lanes, except lanes whose Jacobian
    is at ``x`` already."""
    where = where & (state.memory.age > 0)

    def renewed(old: BroydenRootMemory) -> BroydenRootMemory:
        return old._replace(
            # Computed for all lanes if a single lane asks; the others keep their inverse.
            inverse=select(where, _dense.invert_dense(problem.fn.jacobian(x)[1]), old.inverse),
            u=select(where, torch.zeros_like(old.u), old.u),
            v=select(where, torch.zeros_like(old.v), old.v),
            rank=torch.where(where, 0, old.rank),
            slow=torch.where(where, 0, old.slow),
            age=torch.where(where, 0, old.age),
        )

    return state._replace(memory=if_any(where, renewed, state.memory))


def _broyden_direction(memory: BroydenRootMemory) -> Tensor:
    return -_low_rank.apply_inverse(_product_with(memory.inverse), memory.u, memory.v, memory.residual)


def _product_with(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: vecmat(x, matrix.mT)


_SLOW_STEPS = 3
"""Number of consecutive steps without a halved error before a new Jacobian."""
_HALVINGS = 3
"""Number of halvings of a step before a new Jacobian."""
