"""Broyden's method for fixed points."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Concatenate, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

import implicitdiff.solvers._loop.equations as _equations
import implicitdiff.solvers._steps.low_rank as _low_rank
from implicitdiff._torch.trees import P, X
from implicitdiff.solvers._loop.method import IterativeMethod, Start
from implicitdiff.solvers._loop.options import SolverOptions, check_count, solver_factory
from implicitdiff.solvers._loop.problem import BatchedProblem, row_norm
from implicitdiff.solvers._loop.solver import Solver, make_solver
from implicitdiff.solvers._loop.state import State


class BroydenMemory(NamedTuple):
    """The memory of `broyden`.

    Attributes:
        residual: ``x - f(x)``, as one vector of length ``n``.
        u: the first factors of the inverse Jacobian of the residual, about ``I + sum_j u_j v_j'``; ``(history, n)``.
        v: the second factors, ``(history, n)``.
        rank: the number of terms.
    """

    residual: Tensor
    u: Tensor
    v: Tensor
    rank: Tensor


@solver_factory
def broyden(
    fixed_point_fn: Callable[Concatenate[X, P], X], history: int = 20, **options: Unpack[SolverOptions]
) -> Solver[X, P, BroydenMemory]:
    r"""Make a solver of ``f(x, *args) = x`` by Broyden's method on ``x - f(x) = 0``, from the identity as Jacobian.

    The next iterate is ``x - H (x - f(x))``. After each step a rank-one correction of least norm makes the inverse
    Jacobian ``H`` agree with the step. An iteration costs one evaluation of ``f`` and ``O(history n)`` more. Converges
    superlinearly near a solution; linear maps take at most ``2 n`` steps.

    Args:
        fixed_point_fn: ``f(x, *args)``, a tree like ``x``.
        history: the largest number of rank-one corrections, at least 1; a full history restarts from the identity.
        options: see `SolverOptions`.

    Raises:
        ValueError: ``history`` is less than 1.

    Reference:
        Broyden, Math. Comp. 19 (1965); Kelley, "Iterative Methods for Linear and Nonlinear Equations", 1995, chapter 7.

    Example:
        >>> import torch
        >>> from implicitdiff.solvers import broyden
        >>> solver = broyden(lambda z, rate: rate * z)
        >>> rate = torch.tensor([0.9, 0.99, 0.999], dtype=torch.float64)
        >>> z, state = solver.run(torch.tensor([1.0, 0.4, -0.2], dtype=torch.float64), rate)
        >>> bool(z.abs().max() < 1e-6), bool(state.iter_num <= 10)
        (True, True)
    """
    check_count("broyden", "history", history)

    start = partial(_start, history=history)
    method = IterativeMethod(start, _step, BroydenMemory, 1_000, residual=attrgetter("residual"), size=_size)
    return make_solver("broyden", _equations.fixed_point_equation, (fixed_point_fn,), method, options)


def _start(problem: BatchedProblem, x: Tensor, *, history: int) -> Start[BroydenMemory]:
    residual = x - problem.fn(x)
    zeros = torch.zeros_like(x)[:, None].repeat(1, history, 1)
    rank = torch.zeros_like(x[:, :1].sum(dim=-1), dtype=torch.int64)
    return Start(row_norm(residual), BroydenMemory(residual=residual, u=zeros, v=zeros, rank=rank))


def _size(problem: BatchedProblem, x: Tensor, memory: BroydenMemory) -> Tensor:
    """Return ``|f(x)|``, the size of the two terms whose difference is the residual."""
    return row_norm(x - memory.residual)


def _step(problem: BatchedProblem, x: Tensor, state: State[BroydenMemory]) -> tuple[Tensor, State[BroydenMemory]]:
    r, u, v, rank = state.memory
    # A quasi-Newton step for ``x - f(x) = 0``: ``H`` approximates ``(I - f'(x))^-1``.
    new_x = x - _low_rank.apply_inverse(_initial_inverse, u, v, r)
    new_r = new_x - problem.fn(new_x)
    # ``H0 = I``, exact for a constant map ``f``.
    u, v, rank = _low_rank.broyden_update(_initial_inverse, _initial_inverse, u, v, rank, new_x - x, new_r - r)
    return new_x, state._replace(error=row_norm(new_r), memory=BroydenMemory(new_r, u, v, rank))


def _initial_inverse(x: Tensor) -> Tensor:
    return x
