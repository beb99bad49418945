"""The proximal gradient iteration, of which gradient descent and projected gradient are special cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import implicitdiff.solvers._gap as _gap
from implicitdiff.solvers._backtracking import GROWTH, Point, backtrack, lies_below
from implicitdiff.solvers._options import check_number
from implicitdiff.solvers._rows import Rows, dot, norm
from implicitdiff.solvers._solver import Method
from implicitdiff.solvers._status import Status

Prox = Callable[[Rows, Tensor, Tensor], Tensor]
"""``prox(rows, v, stepsize) -> x``, with stepsizes of shape ``(lanes,)``."""


class ProximalGradientState(NamedTuple):
    """The state of `gradient_descent`, `projected_gradient` and `proximal_gradient`; the first five fields are those
    of every solver.

    Attributes:
        iter_num: iterations so far.
        error: ``|grad f(x)|``, or ``|x - prox(x - grad f(x), 1)|``.
        target: what ``error`` has to reach.
        status: an `implicitdiff.solvers.Status`.
        history: the errors of a run that kept them, ``(iterations + 1,)``, else empty.
        stepsize: the length of the last step along the negative gradient.
        point: where the next step starts from, ``x`` itself without acceleration; one vector of length ``n``.
        value: ``f(point)``.
        grad: its gradient.
        momentum: the sequence ``t`` of Nesterov's acceleration; 1 where it has just begun.
    """

    iter_num: Tensor
    error: Tensor
    target: Tensor
    status: Tensor
    history: Tensor
    stepsize: Tensor
    point: Tensor
    value: Tensor
    grad: Tensor
    momentum: Tensor


def check_stepsize(name: str, stepsize: float | None) -> None:
    """Refuse what is no size of a step."""
    if stepsize is not None:
        check_number(
            name, "stepsize", stepsize, "a finite number > 0, or None for a line search", lambda s: 0 < s < math.inf
        )


def by_prox(prox: Prox) -> _gap.Away:
    """``x - prox(x - grad, 1)``."""
    return partial(_away, prox)


def _away(prox: Prox, rows: Rows, x: Tensor, grad: Tensor) -> Tensor:
    return x - prox(rows, x - grad, x.new_ones(x.shape[:1]))


def method(name: str, prox: Prox, away: _gap.Away, stepsize: float | None, acceleration: bool) -> Method:
    """Proximal gradient with a backtracking line search, or a given step size, and Nesterov's acceleration.

    Beck and Teboulle, SIAM J. Imaging Sciences 2 (2009); the momentum starts again where it points uphill, after
    O'Donoghue and Candes, Found. Comput. Math. 15 (2015), gradient scheme.
    """
    check_stepsize(name, stepsize)
    gap = _gap.Constrained(_gap.stationary, away)
    start = partial(_start, gap=gap, stepsize=stepsize or 1.0)
    step = partial(_step, prox=prox, away=away, search=stepsize is None, acceleration=acceleration)
    return Method(start, step, ProximalGradientState, 100_000, gap)


def _start(rows: Rows, x: Tensor, *, gap: _gap.Constrained, stepsize: float) -> ProximalGradientState:
    value, grad = rows.fn.value_and_grad(x)
    one = torch.ones_like(value)
    return ProximalGradientState(
        **rows.header(norm(gap.away(rows, x, grad)), lambda: gap.size(rows, x, grad)),
        stepsize=one * stepsize,
        point=x,
        value=value,
        grad=grad,
        momentum=one,
    )


def _step(
    rows: Rows,
    x: Tensor,
    state: ProximalGradientState,
    *,
    prox: Prox,
    away: _gap.Away,
    search: bool,
    acceleration: bool,
) -> tuple[Tensor, ProximalGradientState]:
    (new_x, value, grad), size, failed = _descend(rows, prox, state, search)
    state = state._replace(
        error=norm(away(rows, new_x, grad)),
        status=torch.where(failed, int(Status.LINE_SEARCH_FAILED), state.status),
        stepsize=size,
    )
    if not acceleration:
        return new_x, state._replace(point=new_x, value=value, grad=grad)
    return new_x, _accelerate(rows, x, new_x, state)


def _descend(rows: Rows, prox: Prox, state: ProximalGradientState, search: bool) -> tuple[Point, Tensor, Tensor]:
    """A step from ``point``, its size, and the lanes in which no size will do."""

    def at(size: Tensor) -> Point:
        x = prox(rows, state.point - size[:, None] * state.grad, size)
        return (x, *rows.fn.value_and_grad(x))

    def enough(new: Point, size: Tensor) -> Tensor:
        d = new[0] - state.point
        return lies_below(rows, (state.point, state.value, state.grad), new, dot(d, d) / (2.0 * size))

    if not search:
        return at(state.stepsize), state.stepsize, torch.zeros_like(state.status, dtype=torch.bool)
    size = torch.where(state.iter_num > 0, GROWTH * state.stepsize, state.stepsize)
    return backtrack(at, enough, size, state.status == Status.RUNNING)


def _accelerate(rows: Rows, x: Tensor, new_x: Tensor, state: ProximalGradientState) -> ProximalGradientState:
    uphill = dot(state.point - new_x, new_x - x) > 0
    t = torch.where(uphill, 1.0, state.momentum)
    next_t = (1.0 + torch.sqrt(1.0 + 4.0 * t**2)) / 2.0
    ahead = new_x + ((t - 1.0) / next_t)[:, None] * (new_x - x)
    value, grad = rows.fn.value_and_grad(ahead)
    return state._replace(point=ahead, value=value, grad=grad, momentum=next_t)
