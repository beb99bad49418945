"""Newton's method for minimisation, with conjugate gradients for its linear systems."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Concatenate, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

import implicitdiff.solvers._loop.equations as _equations
from implicitdiff._torch.control import if_any, repeat
from implicitdiff._torch.trees import P, X
from implicitdiff.solvers._loop.method import IterativeMethod, Start
from implicitdiff.solvers._loop.newton_step import MAX_PRODUCTS, NewtonStep, objective_newton_step
from implicitdiff.solvers._loop.options import SolverOptions, check_count, solver_factory
from implicitdiff.solvers._loop.problem import BatchedProblem, VectorMap, row_dot, row_norm, safe_divide, select
from implicitdiff.solvers._loop.solver import Solver, make_solver
from implicitdiff.solvers._loop.state import State
from implicitdiff.solvers._loop.status import Status
from implicitdiff.solvers._steps.line_search import fields_at, initial_fields, search, unit_step, value_fell


class NewtonCgMemory(NamedTuple):
    """The memory of `newton_cg`.

    Attributes:
        value: ``f(x)``.
        grad: ``grad f(x)``, as one vector of length ``n``.
        magnitude: the largest ``|f|`` so far, a measure of the rounding of its values.
        first_error: ``|grad f|`` at the initial guess; infinite for a forcing term of zero.
        ahead: the direction of the next step instead of that of conjugate gradients; zero for none.
    """

    value: Tensor
    grad: Tensor
    magnitude: Tensor
    first_error: Tensor
    ahead: Tensor


@solver_factory
def newton_cg(
    objective_fn: Callable[Concatenate[X, P], Tensor],
    inner_maxiter: int | None = None,
    **options: Unpack[SolverOptions],
) -> Solver[X, P, NewtonCgMemory]:
    r"""Make a solver of ``min_x f(x, *args)``, ``f`` smooth, by Newton's method with conjugate gradients.

    Conjugate gradients solve ``hess f(x) d = -g``, ``g = grad f(x)``, for the direction ``d`` until the residual is at
    most::

        min(1/2, sqrt(|g| / |g_0|)) |g|,

    ``g_0`` at the initial guess, or until a direction of negative curvature appears; its step then uses the absolute
    value of the curvature. A line search along ``d`` finds a point that satisfies the strong Wolfe conditions, with the
    whole step as the first trial. Converges superlinearly. An inner iteration costs one product with the Hessian, about
    two gradients; the Hessian is never formed.

    Iterates near a saddle move away from the saddle. At a zero ``g``, even at a saddle, the status is ``CONVERGED``,
    without a test of the curvature.

    Args:
        objective_fn: ``f(x, *args)``, a real number; ``x`` is a pytree.
        inner_maxiter: bound on the inner iterations of a step; None for twice the number of unknowns.
        options: see `SolverOptions`.

    Raises:
        ValueError: ``inner_maxiter`` is less than 1.

    Reference:
        Nocedal and Wright, "Numerical Optimization", 2006, algorithm 7.1, with the forcing term ``sqrt(|g|)``,
        dependent on the units of ``f``.

    Example:
        >>> import torch
        >>> from implicitdiff.solvers import newton_cg
        >>> solver = newton_cg(lambda x, b: (torch.cosh(x) - b * x).sum())
        >>> b = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
        >>> x, state = solver.run(torch.zeros(3, dtype=torch.float64), b)
        >>> torch.allclose(x, torch.asinh(b)), bool(state.iter_num < 10)
        (True, True)
    """
    if inner_maxiter is not None:
        check_count("newton_cg", "inner_maxiter", inner_maxiter)

    step = partial(_step, inner_maxiter=inner_maxiter)
    method = IterativeMethod(
        _start,
        step,
        NewtonCgMemory,
        1_000,
        residual=attrgetter("grad"),
        newton_step=_newton_step,
        runs_off=Status.UNBOUNDED,
    )
    return make_solver("newton_cg", _equations.stationary_equation, (objective_fn,), method, options)


def _start(problem: BatchedProblem, x: Tensor) -> Start[NewtonCgMemory]:
    error, fields = initial_fields(problem, x)
    return Start(error, NewtonCgMemory(**fields, first_error=error, ahead=torch.zeros_like(x)))


def _step(
    problem: BatchedProblem, x: Tensor, state: State[NewtonCgMemory], *, inner_maxiter: int | None
) -> tuple[Tensor, State[NewtonCgMemory]]:
    active, memory = state.status == Status.RUNNING, state.memory
    # A forcing term that tends to 0 gives superlinear convergence; relative to the first gradient, so independent of
    # units.
    forcing = torch.sqrt(safe_divide(state.error, memory.first_error)).clamp(max=0.5)
    _, grad, product = problem.fn.hessian(x)
    # A Newton-type step of the stopping rule replaces the direction once.
    replaced = (memory.ahead != 0).any(dim=-1)
    inner_limit = inner_maxiter or 2 * x.shape[1]
    d = _truncated_newton_direction(product, grad, forcing, active & ~replaced, inner_limit, problem.eps)
    d = if_any(replaced, lambda d: select(replaced, memory.ahead, d), d)
    point, failed, status = search(problem, x, state, d, torch.ones_like(memory.value))
    status = torch.where(failed, int(Status.LINE_SEARCH_FAILED), status)
    memory = memory._replace(**fields_at(memory, point), ahead=torch.zeros_like(memory.ahead))
    progress = state.progress.fallen(value_fell(problem, state.memory, point))
    return point.x, state._replace(error=row_norm(point.grad), status=status, progress=progress, memory=memory)


def _newton_step(problem: BatchedProblem, x: Tensor, memory: NewtonCgMemory) -> NewtonStep:
    """Return a Newton-type step; if the step is long, the next iteration tries the step, and the forcing term is zero
    from then on."""
    step = objective_newton_step(problem, x, memory.magnitude, min(x.shape[-1], MAX_PRODUCTS))
    # The forcing term ``sqrt(|g| / inf)`` is 0.
    first_error = torch.full_like(memory.first_error, torch.inf)
    return step._replace(memory=memory._replace(first_error=first_error, ahead=step.d))


def _truncated_newton_direction(
    product: VectorMap, grad: Tensor, target: Tensor, active: Tensor, limit: int, eps: float
) -> Tensor:
    """Run conjugate gradients from zero; a lane stops at its target, relative to the gradient, or at a curvature that
    is not positive. The last step then uses the absolute value of the curvature, so that iterates leave a saddle."""
    # Products of a large gradient and a large curvature overflow, so the system is solved for a gradient of length 1.
    length, unit = row_norm(grad), unit_step(grad)

    def advance(cg: _Cg, *, is_first: bool = False) -> _Cg:
        # Invariant: ``r = H d + g``, and ``p`` is conjugate to the earlier directions.
        d, r, p, rr, stiffest, active = cg
        image = product(p)
        curvature = row_dot(p, image)
        # A curvature of rounding size relative to the stiffest direction counts as zero.
        stiffest = torch.maximum(stiffest, safe_divide(row_norm(image), row_norm(p)))
        rounding = 4 * eps * stiffest * row_dot(p, p)
        positive = active & (curvature > rounding)
        if is_first:
            # A first direction without positive curvature: steepest descent.
            d = torch.where(positive[:, None], d, _downhill(p, rr, curvature, unit))
        bends = positive if is_first else active & (curvature.abs() > rounding)
        # The minimum of the model along ``p`` is at ``-p'r / p'H p``, and conjugacy gives ``p'r = -r'r``.
        a = torch.where(bends, safe_divide(rr, curvature.abs()), 0.0)[:, None]
        # A selection in addition to ``a = 0``: ``p`` of a stopped lane may be infinite, and ``0 * inf`` is nan.
        d, r = select(bends, d + a * p, d), r + a * image
        new_rr = row_dot(r, r)
        # Fletcher and Reeves' coefficient for the next conjugate direction.
        p = safe_divide(new_rr, rr)[:, None] * p - r
        # After a step along negative curvature a lane stops.
        return _Cg(d, r, p, new_rr, stiffest, positive & (row_norm(r) > target))

    r = safe_divide(grad, length[:, None])
    rr = row_dot(r, r)
    # Only the first product may lead to steepest descent, so the first step is outside of the loop.
    cg = _Cg(torch.zeros_like(grad), r, -r, rr, torch.zeros_like(rr), active)
    cg = repeat(advance, advance(cg, is_first=True), attrgetter("active"), limit - 1) if limit else cg
    return length[:, None] * cg.d


class _Cg(NamedTuple):
    """Conjugate gradients after some products.

    Attributes:
        d: the step.
        r: the residual ``H d + g``.
        p: the next direction.
        rr: ``r'r``.
        stiffest: the largest ``|H p| / |p|`` so far.
        active: the lanes that have not stopped.
    """

    d: Tensor
    r: Tensor
    p: Tensor
    rr: Tensor
    stiffest: Tensor
    active: Tensor


def _downhill(p: Tensor, rr: Tensor, curvature: Tensor, unit: Tensor) -> Tensor:
    """Return a step along the negative gradient, with the absolute value of the curvature; without curvature by the
    factor `unit`."""
    step = torch.where(curvature == 0, unit, safe_divide(rr, curvature.abs()))
    return step[:, None] * p
