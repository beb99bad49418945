"""Broyden's method for roots."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import implicitdiff.solvers._condition as _condition
import implicitdiff.solvers._dense as _dense
import implicitdiff.solvers._gap as _gap
import implicitdiff.solvers._low_rank as _low_rank
import implicitdiff.solvers._newton as _newton
from implicitdiff.solvers._options import check_count
from implicitdiff.solvers._rows import Rows, norm, times
from implicitdiff.solvers._solver import Method, Solver, make


class BroydenRootState(NamedTuple):
    """The state of `broyden_root`; the first five fields are those of every solver.

    Attributes:
        iter_num: iterations so far.
        error: ``|F(x)|``.
        target: what ``error`` has to reach.
        status: an `implicitdiff.solvers.Status`.
        history: the errors of a run that kept them, ``(iterations + 1,)``, else empty.
        residual: ``F(x)``, as one vector of length ``n``.
        inverse: the inverse Jacobian at the initial guess, ``(n, n)``.
        u: now it is about ``inverse + sum_j u_j v_j'``; ``(history, n)``.
        v: the other factors.
        rank: how many of them there are.
    """

    iter_num: Tensor
    error: Tensor
    target: Tensor
    status: Tensor
    history: Tensor
    residual: Tensor
    inverse: Tensor
    u: Tensor
    v: Tensor
    rank: Tensor


def broyden_root(
    residual_fn: Callable[..., Any], history: int = 20, backtracking: bool = False, **options: Any
) -> Solver:
    r"""Make a solver of ``F(x, *args) = 0`` by Broyden's method from the Jacobian at the initial guess.

    As `chord`, with the inverse Jacobian corrected after every step as in `broyden`: superlinear for one evaluation of
    ``F`` an iteration and one Jacobian in all.

    Args:
        residual_fn: ``F(x, *args)``, a tree like ``x``.
        history: how many rank-one corrections to hold, at least 1; when there is no room left, it starts again from
            the first Jacobian.
        backtracking: see `newton`.
        options: see `implicitdiff.solvers`.

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
    method = Method(start, step, BroydenRootState, 1_000, _gap.root)
    return make("broyden_root", _condition.root, (residual_fn,), method, options)


def _start(rows: Rows, x: Tensor, *, history: int) -> BroydenRootState:
    residual = rows.fn(x)
    none = torch.zeros_like(x)[:, None].repeat(1, history, 1)
    header = rows.header(norm(residual), lambda: norm(_gap.change(_gap.root, rows, x, residual)))
    inverse = _dense.inverse(rows.fn.jacobian(x)[1])
    return BroydenRootState(**header, residual=residual, inverse=inverse, u=none, v=none, rank=header["iter_num"])


def _step(rows: Rows, x: Tensor, state: BroydenRootState, *, backtracking: bool) -> tuple[Tensor, BroydenRootState]:
    first, adjoint = _times(state.inverse), _times(state.inverse.mT)
    direction = -_low_rank.product(first, state.u, state.v, state.residual)
    new_x, new_r, status = _newton.move(rows, x, state, direction, backtracking)
    u, v, rank = _low_rank.updated(first, adjoint, state.u, state.v, state.rank, new_x - x, new_r - state.residual)
    return new_x, state._replace(error=norm(new_r), status=status, residual=new_r, u=u, v=v, rank=rank)


def _times(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: times(x, matrix.mT)
