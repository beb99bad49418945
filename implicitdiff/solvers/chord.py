"""The chord method: Newton's with the first Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

import implicitdiff.solvers._condition as _condition
import implicitdiff.solvers._dense as _dense
import implicitdiff.solvers._gap as _gap
import implicitdiff.solvers._newton as _newton
from implicitdiff._linear import LinearSolver
from implicitdiff.solvers._rows import Rows, norm, times
from implicitdiff.solvers._solver import Method, Solver, make


class ChordState(NamedTuple):
    """The state of `chord`; the first five fields are those of every solver.

    Attributes:
        iter_num: iterations so far.
        error: ``|F(x)|``.
        target: what ``error`` has to reach.
        status: an `implicitdiff.solvers.Status`.
        history: the errors of a run that kept them, ``(iterations + 1,)``, else empty.
        residual: ``F(x)``, as one vector of length ``n``.
        point: where the Jacobian is taken, the initial guess.
        inverse: its inverse, ``(n, n)``; empty if a linear solver was given.
    """

    iter_num: Tensor
    error: Tensor
    target: Tensor
    status: Tensor
    history: Tensor
    residual: Tensor
    point: Tensor
    inverse: Tensor


def chord(
    residual_fn: Callable[..., Any],
    linear_solve: LinearSolver | None = None,
    backtracking: bool = False,
    **options: Any,
) -> Solver:
    r"""Make a solver of ``F(x, *args) = 0`` by ``x <- x - J0^-1 F(x)``, ``J0`` being the Jacobian at the initial guess.

    One factorisation serves all iterations, each of which takes one evaluation of ``F``. Converges linearly, the
    faster the closer the initial guess is.

    Args:
        residual_fn: ``F(x, *args)``, a tree like ``x``.
        linear_solve: of `implicitdiff.linear_solve`; None: the inverse is made once.
        backtracking: see `newton`.
        options: see `implicitdiff.solvers`.

    Raises:
        TypeError: ``linear_solve`` is no linear solver of this library.

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
    method = Method(start, step, ChordState, 1_000, _gap.root)
    return make("chord", _condition.root, (residual_fn,), method, options)


def _start(rows: Rows, x: Tensor, *, linear_solve: LinearSolver | None) -> ChordState:
    residual = rows.fn(x)
    empty = x.new_zeros((x.shape[0], 0, 0))
    inverse = _dense.inverse(rows.fn.jacobian(x)[1]) if linear_solve is None else empty
    header = rows.header(norm(residual), lambda: norm(_gap.change(_gap.root, rows, x, residual)))
    return ChordState(**header, residual=residual, point=x, inverse=inverse)


def _step(
    rows: Rows, x: Tensor, state: ChordState, *, linear_solve: LinearSolver | None, backtracking: bool
) -> tuple[Tensor, ChordState]:
    r = state.residual
    if linear_solve is None:
        direction = -times(r, state.inverse.mT)
    else:
        direction = -_newton.solve(rows, state.point, r, linear_solve)
    x, residual, status = _newton.move(rows, x, state, direction, backtracking)
    return x, state._replace(error=norm(residual), status=status, residual=residual)
