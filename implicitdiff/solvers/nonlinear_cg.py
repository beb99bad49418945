"""Nonlinear conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Concatenate, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

import implicitdiff.solvers._loop.equations as _equations
from implicitdiff._torch.control import if_any
from implicitdiff._torch.trees import P, X
from implicitdiff.solvers._loop.method import IterativeMethod, Start
from implicitdiff.solvers._loop.newton_step import NewtonStep, few_products, objective_newton_step
from implicitdiff.solvers._loop.options import SolverOptions, solver_factory
from implicitdiff.solvers._loop.problem import BatchedProblem, row_dot, row_norm, safe_divide, select
from implicitdiff.solvers._loop.solver import Solver, make_solver
from implicitdiff.solvers._loop.state import State
from implicitdiff.solvers._loop.status import Status
from implicitdiff.solvers._steps.line_search import fields_at, initial_fields, search, unit_step, value_fell

# Restart bound (5.52) of Nocedal and Wright; without restarts Rosenbrock's function in ten dimensions takes three times
# as many steps.
_CONJUGATE = 0.1

Formula = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``formula(grad, old_grad, old_direction) -> beta``, from vectors ``(lanes, n)`` to numbers ``(lanes,)``."""


class NonlinearCgMemory(NamedTuple):
    """The memory of `nonlinear_cg`.

    Attributes:
        value: ``f(x)``.
        grad: ``grad f(x)``, as one vector of length ``n``.
        magnitude: the largest ``|f|`` so far, a measure of the rounding of its values.
        direction: the direction of the next step from ``x``.
        first_step: the first trial of the next line search, equal to the last step.
    """

    value: Tensor
    grad: Tensor
    magnitude: Tensor
    direction: Tensor
    first_step: Tensor


# The three formulas, (5.45), (5.41a) and (5.46) of Nocedal and Wright, agree for a quadratic and exact line searches:
# then ``g'g_old = 0`` and ``d_old'(g - g_old) = g_old'g_old``.
def polak_ribiere(grad: Tensor, old_grad: Tensor, old_direction: Tensor) -> Tensor:
    """``max(0, g'(g - g_old) / g_old'g_old)``, PR+; close to 0 (a restart) after a step with little change of ``g``."""
    return safe_divide(row_dot(grad, grad - old_grad), row_dot(old_grad, old_grad)).clamp(min=0.0)


def fletcher_reeves(grad: Tensor, old_grad: Tensor, old_direction: Tensor) -> Tensor:
    """``g'g / g_old'g_old``."""
    return safe_divide(row_dot(grad, grad), row_dot(old_grad, old_grad))


def hestenes_stiefel(grad: Tensor, old_grad: Tensor, old_direction: Tensor) -> Tensor:
    """``max(0, g'y / d_old'y)`` with ``y = g - g_old``."""
    change = grad - old_grad
    return safe_divide(row_dot(grad, change), row_dot(old_direction, change)).clamp(min=0.0)


@solver_factory
def nonlinear_cg(
    objective_fn: Callable[Concatenate[X, P], Tensor],
    formula: Formula = polak_ribiere,
    **options: Unpack[SolverOptions],
) -> Solver[X, P, NonlinearCgMemory]:
    r"""Make a solver of ``min_x f(x, *args)``, ``f`` smooth, by nonlinear conjugate gradients.

    With ``g = grad f(x)`` a step goes along::

        d = -g + beta d_old

    to a point that satisfies the strong Wolfe conditions with constants 1e-4 and 0.1, at the cost of about two
    evaluations of ``f`` and its gradient. The memory holds a few vectors. The method restarts with ``-g`` if
    ``|g'g_old| >= 0.1 g'g``, if ``d`` is not a descent direction, or if the line search fails; a lane whose line search
    along ``-g`` fails has failed.

    Args:
        objective_fn: ``f(x, *args)``, a real number; ``x`` is a pytree.
        formula: ``formula(grad, old_grad, old_direction) -> beta``, from ``(lanes, n)`` to ``(lanes,)``: one of
            `polak_ribiere`, `fletcher_reeves`, `hestenes_stiefel`, or a user's function.
        options: see `SolverOptions`.

    Raises:
        TypeError: ``formula`` is not a function.

    Reference:
        Nocedal and Wright, "Numerical Optimization", 2006, section 5.2, with the restarts of (5.52), due to Powell,
        "Restart procedures for the conjugate gradient method", Math. Program. 12 (1977).

    Example:
        >>> import torch
        >>> from implicitdiff.solvers import nonlinear_cg
        >>> solver = nonlinear_cg(lambda x, b: (torch.cosh(x) - b * x).sum())
        >>> b = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
        >>> x, state = solver.run(torch.zeros(3, dtype=torch.float64), b)
        >>> torch.allclose(x, torch.asinh(b))
        True
    """
    if not callable(formula):
        raise TypeError(f"nonlinear_cg: formula must be a function of (grad, old_grad, old_direction), got {formula!r}")

    step = partial(_step, formula=formula)
    method = IterativeMethod(
        _start,
        step,
        NonlinearCgMemory,
        10_000,
        residual=attrgetter("grad"),
        newton_step=_newton_step,
        runs_off=Status.UNBOUNDED,
    )
    return make_solver("nonlinear_cg", _equations.stationary_equation, (objective_fn,), method, options)


def _start(problem: BatchedProblem, x: Tensor) -> Start[NonlinearCgMemory]:
    error, fields = initial_fields(problem, x)
    grad = fields["grad"]
    return Start(error, NonlinearCgMemory(**fields, direction=-grad, first_step=unit_step(grad)))


def _newton_step(problem: BatchedProblem, x: Tensor, memory: NonlinearCgMemory) -> NewtonStep:
    """Return a Newton-type step; the next iteration tries the step."""
    step = objective_newton_step(problem, x, memory.magnitude, few_products(problem, x))
    # A Newton-type step has its length, so the first trial is 1.
    return step._replace(memory=memory._replace(direction=step.d, first_step=torch.ones_like(memory.first_step)))


def _step(
    problem: BatchedProblem, x: Tensor, state: State[NonlinearCgMemory], *, formula: Formula
) -> tuple[Tensor, State[NonlinearCgMemory]]:
    memory = state.memory
    g, d = memory.grad, memory.direction
    # A tight curvature condition, ``c2 = 0.1``: conjugacy needs an almost exact line search.
    point, failed, status = search(problem, x, state, d, memory.first_step, c2=0.1)
    new_direction = formula(point.grad, g, d)[:, None] * d - point.grad
    # Restart unless consecutive gradients are nearly orthogonal and the new direction descends. Conjugate gradients of
    # a quadratic are orthogonal.
    conjugate = row_dot(point.grad, g).abs() < _CONJUGATE * row_dot(point.grad, point.grad)
    new_direction = select(conjugate & (row_dot(new_direction, point.grad) < 0) & ~failed, new_direction, -point.grad)

    def restart(carry: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        status, first_step = carry
        # A failure along steepest descent cannot be helped by a restart.
        steepest = (d == -g).all(dim=1)
        status = torch.where(failed & steepest, int(Status.LINE_SEARCH_FAILED), status)
        return status, torch.where(failed, unit_step(g), first_step)

    status, first_step = if_any(failed, restart, (status, point.step))
    new = NonlinearCgMemory(**fields_at(memory, point), direction=new_direction, first_step=first_step)
    progress = state.progress.fallen(value_fell(problem, memory, point))
    return point.x, state._replace(error=row_norm(point.grad), status=status, progress=progress, memory=new)
