"""Anderson acceleration."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Concatenate, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

import implicitdiff.solvers._loop.dense as _dense
import implicitdiff.solvers._loop.equations as _equations
from implicitdiff._torch.control import if_any
from implicitdiff._torch.trees import P, X
from implicitdiff.solvers._loop.method import IterativeMethod, Start
from implicitdiff.solvers._loop.options import SolverOptions, check_count, check_number, solver_factory
from implicitdiff.solvers._loop.problem import BatchedProblem, row_norm, select, vecmat
from implicitdiff.solvers._loop.solver import Solver, make_solver
from implicitdiff.solvers._loop.state import State


class AndersonMemory(NamedTuple):
    """The memory of `anderson`.

    Attributes:
        residual: ``x - f(x)``, as one vector of length ``n``.
        steps: the last changes of ``x``, ``(min(history, n), n)``, the latest last; zero rows before the history is
            full.
        changes: the corresponding changes of the residual.
    """

    residual: Tensor
    steps: Tensor
    changes: Tensor


@solver_factory
def anderson(
    fixed_point_fn: Callable[Concatenate[X, P], X],
    history: int = 5,
    ridge: float = 1e-14,
    mixing: float = 1.0,
    safeguard: float | None = 10.0,
    **options: Unpack[SolverOptions],
) -> Solver[X, P, AndersonMemory]:
    r"""Make a solver of ``f(x, *args) = x`` by Anderson acceleration.

    Let ``r(x) = f(x) - x`` be the residual, and ``S`` and ``Y`` the last changes of ``x`` and ``r`` as columns. The
    next iterate is::

        x + mixing r - (S + mixing Y) c,    c = argmin |r - Y c|^2.

    On a linear map the iteration is equivalent to GMRES as long as ``history`` holds all steps, so the map need not be
    a contraction. An iteration costs one evaluation of ``f`` and ``O(history^2 n)`` more.

    Args:
        fixed_point_fn: ``f(x, *args)``, a tree like ``x``.
        history: the number of steps to remember, at least 1; at most as many as unknowns are kept.
        ridge: Tikhonov term of the least-squares problem, after scaling of its columns to norm 1.
        mixing: step along the residual, not zero; values below 1 damp.
        safeguard: bound on the growth of the error in a step. Instead of a step beyond the bound the iteration clears
            its history and takes a plain step. None for no bound.
        options: see `SolverOptions`.

    Raises:
        ValueError: an option is out of its range.

    Reference:
        Walker and Ni, "Anderson acceleration for fixed-point iterations", SIAM J. Numer. Anal. 49 (2011), type II.

    Example:
        >>> import torch
        >>> from implicitdiff.solvers import anderson
        >>> solver = anderson(lambda z, rate: rate * z)  # plain iteration takes thousands of steps
        >>> rate = torch.tensor([0.9, 0.99, 0.999], dtype=torch.float64)
        >>> z, state = solver.run(torch.tensor([1.0, 0.4, -0.2], dtype=torch.float64), rate)
        >>> bool(z.abs().max() < 1e-6), bool(state.iter_num < 30)
        (True, True)
    """
    check_count("anderson", "history", history)
    check_number("anderson", "ridge", ridge, "a finite number >= 0", lambda r: 0 <= r < math.inf)
    check_number("anderson", "mixing", mixing, "a finite number other than 0", lambda m: m != 0 and math.isfinite(m))
    if safeguard is not None:
        check_number("anderson", "safeguard", safeguard, "a number >= 1 or None", lambda s: s >= 1)

    step = partial(_step, ridge=ridge, mixing=mixing, safeguard=safeguard)
    start = partial(_start, history=history)
    method = IterativeMethod(start, step, AndersonMemory, 1_000, residual=attrgetter("residual"), size=_size)
    return make_solver("anderson", _equations.fixed_point_equation, (fixed_point_fn,), method, options)


def _start(problem: BatchedProblem, x: Tensor, *, history: int) -> Start[AndersonMemory]:
    residual = x - problem.fn(x)
    # ``n`` changes determine ``c``. With more, the ridge would select among the many ``c`` with ``Y c = r``, and so
    # small a ridge leaves the selection to rounding.
    kept = max(1, min(history, x.shape[-1]))
    zeros = torch.zeros_like(x)[:, None].repeat(1, kept, 1)
    return Start(row_norm(residual), AndersonMemory(residual=residual, steps=zeros, changes=zeros))


def _size(problem: BatchedProblem, x: Tensor, memory: AndersonMemory) -> Tensor:
    """Return ``|f(x)|``, the size of the two terms whose difference is the residual."""
    return row_norm(x - memory.residual)


def _step(
    problem: BatchedProblem,
    x: Tensor,
    state: State[AndersonMemory],
    *,
    ridge: float,
    mixing: float,
    safeguard: float | None,
) -> tuple[Tensor, State[AndersonMemory]]:
    r, steps, changes = state.memory
    # The memory holds ``x - f(x)``, so ``r`` and `changes` have the opposite signs of the docstring's. The ridge is at
    # least eps, because a smaller number vanishes in the rounding of a unit diagonal.
    c = _coefficients(changes, r, max(ridge, torch.finfo(x.dtype).eps))
    # If ``f`` is affine, ``x - S c`` has the residual ``r - Y c``, and ``c`` minimises its norm. The step goes to
    # ``x - S c``, then by ``mixing`` along the residual at this point (Walker and Ni, section 2).
    new_x = x - mixing * r - vecmat(c, steps - mixing * changes)
    new_r = new_x - problem.fn(new_x)
    if safeguard is not None:
        # Negated, so that a residual of nan is refused too.
        refused = ~(row_norm(new_r) <= safeguard * state.error)
        plainly = partial(_plain_step, problem, x, r, mixing, refused)
        new_x, new_r, steps, changes = if_any(refused, plainly, (new_x, new_r, steps, changes))
    # The oldest pair leaves. The pair of a plain step is the first of an empty history.
    steps = torch.cat([steps[:, 1:], (new_x - x)[:, None]], dim=1)
    changes = torch.cat([changes[:, 1:], (new_r - r)[:, None]], dim=1)
    return new_x, state._replace(error=row_norm(new_r), memory=AndersonMemory(new_r, steps, changes))


_Reached = tuple[Tensor, Tensor, Tensor, Tensor]
"""The next iterate, its residual, and the history before the step."""


def _plain_step(
    problem: BatchedProblem, x: Tensor, r: Tensor, mixing: float, where: Tensor, reached: _Reached
) -> _Reached:
    """Return the result of a plain step, with an empty history, in the flagged lanes."""
    new_x, new_r, steps, changes = reached
    plain_x = x - mixing * r
    new_x, new_r = select(where, plain_x, new_x), select(where, plain_x - problem.fn(plain_x), new_r)
    steps, changes = (select(where, torch.zeros_like(t), t) for t in (steps, changes))
    return new_x, new_r, steps, changes


def _coefficients(changes: Tensor, residual: Tensor, ridge: float) -> Tensor:
    """Return ``c = argmin |r - Y c|^2`` by the normal equations with columns scaled to norm 1; zero columns get
    coefficient 0."""
    # Scale the columns, so that the ridge is relative and the normal equations better conditioned.
    size = row_norm(changes)[..., None]
    # `row_norm` is detached: up to the ridge, ``c`` does not depend on the scale.
    scale = torch.where(size > 0, 1.0 / torch.where(size > 0, size, 1.0), 0.0)
    unit = scale * changes
    # The rows of `changes` are the columns of ``Y``: with ``U = Y diag(scale)`` `gram` is ``U'U``,
    # ``(lanes, kept, kept)``.
    gram = unit @ unit.mT
    # An identity row for a zero column keeps the matrix regular.
    shift = ridge + (size[..., 0] == 0).to(gram.dtype)
    rhs = vecmat(residual, unit.mT)
    # ``(U'U + ridge) e = U'r``, and ``c = diag(scale) e``.
    return _dense.solve_dense(gram + torch.diag_embed(shift), rhs) * scale[..., 0]
