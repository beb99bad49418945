"""The proximal gradient iteration, with gradient descent and projected gradient as special cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from implicitdiff._torch.control import if_any
from implicitdiff.solvers._loop.equations import Composite
from implicitdiff.solvers._loop.measures import change_with_x, composite_size
from implicitdiff.solvers._loop.method import IterativeMethod, Start
from implicitdiff.solvers._loop.options import check_number
from implicitdiff.solvers._loop.problem import (
    BatchedProblem,
    largest_entry,
    row_dot,
    row_norm,
    safe_divide,
    select,
    select_tree,
)
from implicitdiff.solvers._loop.state import State
from implicitdiff.solvers._loop.status import Status
from implicitdiff.solvers._steps.backtracking import GROWTH, TrialPoint, backtrack, lies_below

Prox = Callable[[BatchedProblem, Tensor, Tensor], Tensor]
"""``prox(problem, v, stepsize) -> x``, step sizes of shape ``(lanes,)``."""


class ProximalGradientMemory(NamedTuple):
    """The memory of `gradient_descent`, `projected_gradient` and `proximal_gradient`.

    Attributes:
        residual: ``grad f(x)``, or ``x - prox(x - grad f(x), 1)``, as one vector.
        stepsize: the size of the last step along the negative gradient.
        point: the start of the next step, one vector of length ``n``; ``x`` itself without acceleration.
        value: ``f(point)``.
        grad: ``grad f(point)``.
        momentum: the sequence ``t`` of Nesterov's acceleration; 1 after a restart.
        least: the least ``f(x)`` so far, but for decreases that are no progress; as at the initial guess with a line
            search or a budget.
        overshoots: the number of unstable steps since the last progress; 0 with a line search or a budget.
    """

    residual: Tensor
    stepsize: Tensor
    point: Tensor
    value: Tensor
    grad: Tensor
    momentum: Tensor
    least: Tensor
    overshoots: Tensor


# On a quadratic with the curvature ``h`` and ``q = 1 - size h`` an error ``e`` becomes ``q e``, stable for ``|q| < 1``.
# With momentum near 1 the roots of ``z^2 - 2 q z + q = 0`` lie inside of the unit circle for ``-1/3 < q < 1``.
_STABLE = {False: 2.0, True: 4 / 3}
"""Bound on the product of step size and curvature without and with acceleration (momentum near 1)."""
_MAX_OVERSHOOTS = 1000
"""Bound on the number of unstable steps without progress. Of a linear convergence from the first error to ``4e-11`` of
it, within the limit of 100,000 iterations, a tenth takes at most 440."""


def check_stepsize(name: str, stepsize: float | None) -> None:
    """Raise ValueError unless the step size is None or a finite number > 0."""
    if stepsize is not None:
        check_number(
            name, "stepsize", stepsize, "a finite number > 0, or None for a line search", lambda s: 0 < s < math.inf
        )


def proximal_gradient_method(
    name: str, prox: Prox, stepsize: float | None, acceleration: bool, maxiter: int | None
) -> IterativeMethod:
    """Make a proximal gradient method with a fixed step size or backtracking, optionally with Nesterov's acceleration.

    Steps of a fixed size are watched without a budget `maxiter`; a budget asks for its iterations.

    FISTA of Beck and Teboulle, SIAM J. Imaging Sciences 2 (2009). The momentum restarts if the last step goes uphill:
    gradient scheme of O'Donoghue and Candes, Found. Comput. Math. 15 (2015).
    """
    check_stepsize(name, stepsize)
    start = partial(_start, stepsize=stepsize or 1.0)
    watches = stepsize is not None and maxiter is None
    step = partial(_step, prox=prox, search=stepsize is None, acceleration=acceleration, watches=watches)
    return IterativeMethod(
        start,
        step,
        ProximalGradientMemory,
        100_000,
        residual=attrgetter("residual"),
        size=_size,
        runs_off=Status.UNBOUNDED,
    )


def _start(problem: BatchedProblem, x: Tensor, *, stepsize: float) -> Start[ProximalGradientMemory]:
    value, grad = problem.fn.value_and_grad(x)
    one = torch.ones_like(value)
    residual = _optimality_residual(problem, x, grad)
    none = torch.zeros_like(value, dtype=torch.int64)
    memory = ProximalGradientMemory(
        residual, one * stepsize, x, value, grad, momentum=one, least=value.detach(), overshoots=none
    )
    return Start(row_norm(residual), memory)


def _optimality_residual(problem: BatchedProblem, x: Tensor, grad: Tensor) -> Tensor:
    """Return the residual of the equation, from the gradient at `x`."""
    # The fixed points of the proximal step do not depend on its size, so the residual takes size 1.
    return problem.residual.prox_residual(problem, x, grad) if isinstance(problem.residual, Composite) else grad


def _size(problem: BatchedProblem, x: Tensor, memory: ProximalGradientMemory) -> Tensor:
    """Return ``|J x|`` at the initial guess, where ``point`` is ``x``."""
    if isinstance(problem.residual, Composite):
        return composite_size(problem, x, memory.grad)
    return row_norm(change_with_x(problem.residual, problem, x, memory.grad, is_guess=True))


def _step(
    problem: BatchedProblem,
    x: Tensor,
    state: State[ProximalGradientMemory],
    *,
    prox: Prox,
    search: bool,
    acceleration: bool,
    watches: bool,
) -> tuple[Tensor, State[ProximalGradientMemory]]:
    old = state.memory
    new, size, failed = _descend(problem, prox, state, search)
    new_x, value, grad = new
    residual = _optimality_residual(problem, new_x, grad)
    # Without acceleration the next step starts at the new iterate.
    memory = ProximalGradientMemory(residual, size, new_x, value, grad, old.momentum, old.least, old.overshoots)
    if watches:
        memory = _watched(state, new, memory, _STABLE[acceleration])
    if acceleration:
        memory = _accelerate(problem, x, old, memory)
    status = torch.where(failed, int(Status.LINE_SEARCH_FAILED), state.status)
    status = torch.where(memory.overshoots >= _MAX_OVERSHOOTS, int(Status.DIVERGED), status)
    # The gradient may be finite although the last trial of a search has no value, as of ``log(x)`` at ``x < 0``.
    error = torch.where(torch.isfinite(value.detach()), row_norm(residual), torch.inf)
    return new_x, state._replace(error=error, status=status, memory=memory)


def _descend(
    problem: BatchedProblem, prox: Prox, state: State[ProximalGradientMemory], search: bool
) -> tuple[TrialPoint, Tensor, Tensor]:
    """Return the next point from ``point``, the step size, and the lanes without an acceptable size."""
    memory = state.memory

    def at(size: Tensor) -> TrialPoint:
        x = prox(problem, memory.point - size[:, None] * memory.grad, size)
        return (x, *problem.fn.value_and_grad(x))

    def enough(new: TrialPoint, size: Tensor) -> Tensor:
        d = new[0] - memory.point
        # Upper bound of the model: ``f(point) + g'd + |d|^2 / (2 size)``. The bound holds for every size up to
        # ``1 / L``, with the Lipschitz constant ``L`` of the gradient, so the halving ends.
        return lies_below(problem, (memory.point, memory.value, memory.grad), new, row_dot(d, d) / (2.0 * size))

    if not search:
        return at(memory.stepsize), memory.stepsize, torch.zeros_like(state.status, dtype=torch.bool)
    # Let the size grow again before each search, except for the first guess.
    size = torch.where(state.iter_num > 0, GROWTH * memory.stepsize, memory.stepsize)
    return backtrack(at, enough, size, state.status == Status.RUNNING)


def _watched(
    state: State[ProximalGradientMemory], new: TrialPoint, memory: ProximalGradientMemory, stable: float
) -> ProximalGradientMemory:
    """Return the memory with ``least`` and ``overshoots`` after a step of fixed size to the point `new`.

    A step is unstable if its size times the mean curvature along it exceeds what is `stable`: it climbs the other side
    of a valley as far as it came down.
    """
    old = state.memory
    x, value, grad = (t.detach() for t in new)
    d, slope = x - old.point.detach(), old.grad.detach()
    # Divide by the largest entry, against overflow of the squares.
    way = safe_divide(d, largest_entry(d)[:, None])
    # Less than the bound by 5 %: an oscillation between two points meets the bound exactly.
    unstable = old.stepsize * row_dot(way, grad - slope) > 0.95 * stable * row_dot(way, d)
    # Values decrease less and less towards an oscillation, so ask for Armijo's part of what the slope promises.
    lower = value < old.least + 1e-4 * row_dot(d, slope).clamp(max=0.0)
    progress = lower | (state.progress.idle == 0)
    return memory._replace(
        least=torch.where(lower, value, old.least), overshoots=torch.where(progress, 0, old.overshoots + unstable)
    )


def _accelerate(
    problem: BatchedProblem, x: Tensor, old: ProximalGradientMemory, new: ProximalGradientMemory
) -> ProximalGradientMemory:
    """Move the start of the next step ahead of the new iterate, ``new.point``, by Nesterov's extrapolation."""
    new_x = new.point
    # The gradient mapping at the last start is along ``point - new_x``: restart if the last step goes against it.
    uphill = row_dot(old.point - new_x, new_x - x) > 0
    t = torch.where(uphill, 1.0, old.momentum)
    # (4.2) and (4.3) of Beck and Teboulle. ``next_t^2 - next_t = t^2``: with this sequence the bounds of successive
    # steps telescope.
    next_t = (1.0 + torch.sqrt(1.0 + 4.0 * t**2)) / 2.0
    ahead = new_x + ((t - 1.0) / next_t)[:, None] * (new_x - x)
    value, grad = problem.fn.value_and_grad(ahead)
    outside = ~(torch.isfinite(value) & torch.isfinite(grad).all(dim=-1))

    def restart(moved: ProximalGradientMemory) -> ProximalGradientMemory:
        if not problem.plain:
            # Evaluate again without the points outside: ``0 * inf`` in the backward of a masked value is nan.
            inside = select(outside, new_x, moved.point)
            value, grad = problem.fn.value_and_grad(inside)
            moved = moved._replace(point=inside, value=value, grad=grad)
        restarted: ProximalGradientMemory = select_tree(outside, new._replace(momentum=torch.ones_like(next_t)), moved)
        return restarted

    # The extrapolated point may leave the domain although all iterates are inside: restart the momentum.
    return if_any(outside, restart, new._replace(point=ahead, value=value, grad=grad, momentum=next_t))
