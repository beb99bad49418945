"""Limited-memory BFGS."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import implicitdiff.solvers._condition as _condition
import implicitdiff.solvers._gap as _gap
from implicitdiff.solvers._line_search import arrive, begin, search, unit_step
from implicitdiff.solvers._options import check_count
from implicitdiff.solvers._rows import Rows, any_lane, dot, norm, safe_divide, select
from implicitdiff.solvers._solver import Method, Solver, make
from implicitdiff.solvers._status import Status


class LbfgsState(NamedTuple):
    """The state of `lbfgs`; the first five fields are those of every solver.

    Attributes:
        iter_num: iterations so far.
        error: ``|grad f(x)|``.
        target: what ``error`` has to reach.
        status: an `implicitdiff.solvers.Status`.
        history: the errors of a run that kept them, ``(iterations + 1,)``, else empty.
        value: ``f(x)``.
        grad: ``grad f(x)``, as one vector of length ``n``.
        magnitude: the largest ``|f|`` so far, by which it is judged how precise its values are.
        scale: the inverse Hessian is ``scale I`` before the corrections.
        steps: the last changes ``s`` of ``x``, ``(history, n)``, the latest last; zero where there is none yet.
        changes: the changes ``y`` of the gradient that belong to them.
        products: ``s_i'y_j`` in row ``j`` and column ``i <= j``, else zero; ``(history, history)``, on the diagonal 1
            where there is no step.
    """

    iter_num: Tensor
    error: Tensor
    target: Tensor
    status: Tensor
    history: Tensor
    value: Tensor
    grad: Tensor
    magnitude: Tensor
    scale: Tensor
    steps: Tensor
    changes: Tensor
    products: Tensor


def lbfgs(objective_fn: Callable[..., Any], history: int = 10, **options: Any) -> Solver:
    r"""Make a solver of ``min_x f(x, *args)``, ``f`` smooth, by limited-memory BFGS.

    It goes along ``-H grad f(x)`` to a point that satisfies the strong Wolfe conditions. ``H`` is what the BFGS
    updates by the last steps ``s`` and changes ``y`` of the gradient make of ``(s'y / y'y) I``. An iteration takes
    about one evaluation of ``f`` and its gradient, and ``O(history n)`` more. Pairs without positive curvature, which
    rounding makes, are left out. A lane that finds no step forgets its history, and fails if it has none.

    Args:
        objective_fn: ``f(x, *args)``, a real number; `x` is a pytree.
        history: how many steps to remember, at least 1.
        options: see `implicitdiff.solvers`.

    Raises:
        ValueError: ``history`` is less than 1.

    Reference:
        Nocedal and Wright, "Numerical Optimization", 2006, algorithms 7.4 and 7.5.

    Example:
        >>> import torch
        >>> from implicitdiff.solvers import lbfgs
        >>> rosenbrock = lambda x, a: (a - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
        >>> solver = lbfgs(rosenbrock)
        >>> a = torch.tensor(1.0, dtype=torch.float64)
        >>> x, state = solver.run(torch.tensor([-1.2, 1.0], dtype=torch.float64), a)
        >>> torch.allclose(x, torch.stack([a, a**2])), bool(state.iter_num < 50)
        (True, True)
        >>> torch.func.jacrev(lambda a: solver.run(x, a)[0])(a)  # of (a, a^2)
        tensor([1.0000, 2.0000], dtype=torch.float64)
    """
    check_count("lbfgs", "history", history)

    method = Method(partial(_start, history=history), _step, LbfgsState, 10_000, _gap.stationary)
    return make("lbfgs", _condition.stationary, (objective_fn,), method, options)


def _start(rows: Rows, x: Tensor, *, history: int) -> LbfgsState:
    fields = begin(rows, x)
    none = torch.zeros_like(x)[:, None].repeat(1, history, 1)
    eye = torch.eye(history, dtype=x.dtype, device=x.device).repeat(len(x), 1, 1)
    return LbfgsState(**fields, scale=unit_step(fields["grad"]), steps=none, changes=none, products=eye)


def _step(rows: Rows, x: Tensor, state: LbfgsState) -> tuple[Tensor, LbfgsState]:
    point, failed, status = search(rows, x, state, _direction(state), torch.ones_like(state.value))
    new = _remember(state, point.x - x, point.grad - state.grad, rows.eps)
    new = new._replace(**arrive(state, point), status=status)
    return point.x, _forget(failed, new) if any_lane(failed) else new


def _direction(state: LbfgsState) -> Tensor:
    """``-H g``. The loops of the two-loop recursion are back and forward substitution."""
    s, y, triangle, grad = state.steps, state.changes, state.products, state.grad[:, None]
    a = torch.linalg.solve_triangular(triangle.mT, s @ grad.mT, upper=True)
    middle = state.scale[:, None, None] * (a.mT @ y - grad)
    b = triangle.diagonal(dim1=-2, dim2=-1)[..., None] * a + y @ middle.mT
    b = torch.linalg.solve_triangular(triangle, b, upper=False)
    direction: Tensor = middle - b.mT @ s
    return direction[:, 0]


def _remember(state: LbfgsState, s: Tensor, y: Tensor, eps: float) -> LbfgsState:
    """The state with one pair more, zero where its curvature is not positive."""
    sy, yy = dot(s, y), dot(y, y)
    good = (sy > eps * norm(s) * norm(y)) & (yy > 0)
    s, y = (torch.where(good[:, None], t, 0.0)[:, None] for t in (s, y))
    steps = torch.cat([state.steps[:, 1:], s], dim=1)
    last = torch.cat([y @ steps[:, :-1].mT, torch.where(good, sy, 1.0)[:, None, None]], dim=2)
    return state._replace(
        scale=torch.where(good, safe_divide(sy, yy), state.scale),
        steps=steps,
        changes=torch.cat([state.changes[:, 1:], y], dim=1),
        products=torch.cat([torch.nn.functional.pad(state.products[:, 1:, 1:], (0, 1)), last], dim=1),
    )


def _forget(failed: Tensor, state: LbfgsState) -> LbfgsState:
    """The lanes that found no step begin again, down the gradient; those that have just done so fail."""
    nothing = (state.steps == 0).all(dim=2).all(dim=1)
    eye = torch.eye(state.products.shape[1], dtype=state.products.dtype, device=state.products.device)
    return state._replace(
        status=torch.where(failed & nothing, int(Status.LINE_SEARCH_FAILED), state.status),
        scale=torch.where(failed, unit_step(state.grad), state.scale),
        steps=select(failed, torch.zeros_like(state.steps), state.steps),
        changes=select(failed, torch.zeros_like(state.changes), state.changes),
        products=select(failed, eye.expand_as(state.products), state.products),
    )
