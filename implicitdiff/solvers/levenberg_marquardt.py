"""The Levenberg-Marquardt method for nonlinear least squares."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Concatenate, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

import implicitdiff.solvers._loop.equations as _equations
import implicitdiff.solvers._steps.trust_region as _trust_region
from implicitdiff._torch.control import if_any
from implicitdiff._torch.trees import P, Tree, X
from implicitdiff.solvers._loop.bounds import Bound, limits_of, limits_on
from implicitdiff.solvers._loop.losses import check_loss_scale, loss_of
from implicitdiff.solvers._loop.measures import precision
from implicitdiff.solvers._loop.method import LEAST_SQUARES_STEP, IterativeMethod, Start
from implicitdiff.solvers._loop.newton_step import NewtonStep, if_twice_differentiable
from implicitdiff.solvers._loop.options import SolverOptions, solver_factory
from implicitdiff.solvers._loop.problem import BatchedProblem, row_dot, row_norm, safe_divide, select, vecmat
from implicitdiff.solvers._loop.solver import Solver, make_solver
from implicitdiff.solvers._loop.state import Progress, State
from implicitdiff.solvers._loop.status import Status
from implicitdiff.solvers._steps.least_squares import (
    Curvature,
    curvature,
    damped,
    half_squares,
    least_squares_newton_step,
    normal_gradient,
    normal_residual,
    normal_size,
    rounding_of_cost,
    units_of,
)
from implicitdiff.solvers._steps.region_step import end_in_box, least_weights, step_in_region
from implicitdiff.solvers._steps.robust_weights import flat_status, gain_of_losses, losses_of, weighted
from implicitdiff.solvers._steps.trust_region import length, scaling_of


class LevenbergMarquardtMemory(NamedTuple):
    """The memory of `levenberg_marquardt`.

    Attributes:
        residual: ``r(x)``, as one vector of length ``m``; with a loss, multiplied by weights so that ``J'r`` is the
            gradient of the cost.
        jacobian: ``J = dr/dx``, ``(m, n)``; with a loss, multiplied by weights so that ``J'J`` is the model of the
            Hessian.
        losses: the terms of the cost, ``(m,)``; ``r^2 / 2`` without a loss.
        scale: ``D^2``, the largest squared norms of the columns of ``J`` so far, with weights ``rho'``, ``(n,)``.
        radius: ``Delta``, the radius of the trust region.
        refusals: the number of steps, with gains hidden by rounding, that were refused since the last accepted step.
        slow: the number of steps since the last step that halved the gradient, not counting steps refused for their
            gain; one more if that step was a Newton step.
    """

    residual: Tensor
    jacobian: Tensor
    losses: Tensor
    scale: Tensor
    radius: Tensor
    refusals: Tensor
    slow: Tensor


@solver_factory
def levenberg_marquardt(
    residual_fn: Callable[Concatenate[X, P], Tree],
    radius: float = 1.0,
    bounds: tuple[Bound, Bound] | None = None,
    loss: str | Callable[[Tensor], Tensor] = "linear",
    loss_scale: float | Tensor = 1.0,
    **options: Unpack[SolverOptions],
) -> Solver[X, P, LevenbergMarquardtMemory]:
    r"""Make a minimiser of ``|r(x, *args)|^2 / 2`` by Gauss-Newton steps within a trust region, optionally in a box
    and with a robust loss.

    Each iteration solves::

        min |r + J d|  subject to  |D d| <= Delta,    J = dr/dx,

    equivalent to ``(J'J + lambda D^2) d = - J' r`` for a ``lambda >= 0``, with ``lambda = 0`` if the Gauss-Newton step
    lies in the region. The step is accepted if the cost decreases by at least 1e-4 of the model's prediction, or, where
    rounding may hide that, if the gradient decreases. ``Delta`` grows and shrinks with the ratio of gain and
    prediction. ``D`` holds the largest norms of the columns of ``J`` so far, so the units of the unknowns do not
    matter. ``r`` may have any length, even shorter than ``x``, and ``J`` any rank; the derivative of the solution needs
    a strict minimum.

    If the residual is large at the solution, ``J'J`` is far from the Hessian of the cost, and Gauss-Newton steps gain
    little. So if four steps have not halved the gradient, or rounding hides the gain of a step, the next step is a
    Newton step, cut to the region, provided that the Hessian is positive definite. A Newton step costs ``n`` products
    with the Hessian, by second derivatives of ``r``; without second derivatives all steps are Gauss-Newton steps.

    With default tolerances the status is ``UNBOUNDED`` if the gradient is at its target, but the step without a region
    is longer than ``x``, and a step that lengthens ``x`` by a fifth hardly changes the cost.

    The derivative is that of the exact stationarity condition ``J' r = 0``, second derivatives of ``r`` included.

    Bounds
        Unknowns stay at a bound against which the negative gradient presses. The step is solved for the other unknowns;
        unknowns that would leave the box are moved to their bounds, and the step is solved again for the rest. Gain and
        predicted gain refer to the final step. The condition is ``x = clip(x - J' r, lower, upper)``: an unknown at a
        bound with a nonzero gradient moves with the bound only. With a zero gradient the derivative is that of the side
        that keeps the unknown at the bound, but rounding may select the other side. ``r`` is evaluated in the box only,
        except for differences that measure the rounding of the error. The initial guess is moved into the box.

    Losses
        With ``z_i = (r_i / loss_scale)^2`` the cost is ``loss_scale^2 sum_i rho(z_i) / 2``, and the condition, also for
        the derivative of the solution, is ``J' (rho'(z) r) = 0``. ``rho`` is as in SciPy's `least_squares`::

            linear    z                                     huber    z,  2 sqrt(z) - 1 beyond 1
            soft_l1   2 (sqrt(1 + z) - 1)                   cauchy   log(1 + z)
            arctan    arctan(z)                             tukey    (1 - (1 - z)^3) / 3,  1 / 3 beyond 1

        The model of the Hessian is ``J' diag(rho' + 2 z rho'') J`` (Triggs) with weights of at least ``rho' / 100``,
        hence positive; the true cost decides on the steps. The last three losses are not convex: several minima are
        possible, and an initial guess should have most residuals within the scale, as a fit with ``huber`` may. If
        ``rho'`` is 0 in all residuals, as Tukey's is beyond the scale, the cost is flat and every point stationary: a
        search that begins at such a point has the status ``DIVERGED``. If fewer residuals than unknowns are within
        Tukey's scale, the minimum is not strict: the search may converge to one of many points, and the linear solve of
        the derivative raises.

    Args:
        residual_fn: ``r(x, *args)``, a tree of any tensors.
        radius: the first ``Delta`` in units of ``|D x|``, or of ``|r|`` for a zero ``x``; positive.
        bounds: None, or a pair ``(lower, upper)``, each a number, a tensor that broadcasts to every leaf of ``x``, a
            tree of these like ``x``, or None. They are differentiated and batched like what ``residual_fn`` captures.
        loss: a name, or a function ``rho(z)``, entry by entry and twice differentiable, with ``rho(0) = 0`` and
            ``rho'(0) = 1``; captured tensors are differentiated and batched too.
        loss_scale: the size above which a residual counts as an outlier (SciPy's ``f_scale``), a positive number or a
            tensor that broadcasts to every leaf of ``r``; differentiated and batched.
        options: see `SolverOptions`.

    Raises:
        ValueError: ``radius`` or ``loss_scale`` is not positive, ``bounds`` is not a pair, or the loss is unknown. When
            solving: a lower bound exceeds the upper bound; the residuals of a loss are complex.

    Reference:
        More, "The Levenberg-Marquardt algorithm: implementation and theory", 1978; for the losses Triggs, McLauchlan,
        Hartley and Fitzgibbon, "Bundle adjustment: a modern synthesis", 2000, section 4.3.

    Example:
        >>> import torch
        >>> from implicitdiff.solvers import levenberg_marquardt
        >>> t = torch.tensor([0.0, 1.0, 2.0])
        >>> solver = levenberg_marquardt(lambda x, y: x[0] * torch.exp(-x[1] * t) - y)
        >>> solver.run(torch.tensor([1.0, 3.0]), 2.0 * torch.exp(-0.5 * t))[0]
        tensor([2.0000, 0.5000])
        >>> y = torch.tensor([1.0, 2.0, 3.0, 40.0])
        >>> solver = levenberg_marquardt(lambda m, y: m - y, loss="huber", loss_scale=1.5)
        >>> solver.run(torch.tensor(0.0), y)[0]  # the outlier pulls with its sign alone: (1 + 2 + 3 + 1.5) / 3
        tensor(2.5000)
    """
    name = "levenberg_marquardt"
    _trust_region.check_radius(name, radius)
    check_loss_scale(name, loss_scale)
    robust, bounded = loss != "linear", bounds is not None
    equation_of: _equations.EquationOf = _equations.least_squares_equation
    if robust:
        loss_of(name, loss)
        equation_of = partial(_robust, loss=loss, scale=loss_scale)
    if bounds is not None:
        equation_of = partial(_equations.boxed_by, smooth_of=equation_of, limits=limits_of(name, bounds))
    method = IterativeMethod(
        partial(_start, radius=radius, robust=robust, bounded=bounded),
        partial(_step, robust=robust, bounded=bounded),
        LevenbergMarquardtMemory,
        1_000,
        residual=None if bounded else normal_residual,
        size=_size_in_box if bounded else normal_size,
        steps_tell=True,
        step_powers=LEAST_SQUARES_STEP,
        newton_step=partial(_newton_step, robust=robust, bounded=bounded),
    )
    return make_solver(name, equation_of, (residual_fn,), method, options)


def _robust(
    fn: Callable[..., Tree], loss: str | Callable[[Tensor], Tensor], scale: float | Tensor
) -> _equations.Equation:
    return _equations.robust_equation(fn, loss_of("levenberg_marquardt", loss), scale)


def _start(
    problem: BatchedProblem, x: Tensor, *, radius: float, robust: bool, bounded: bool
) -> Start[LevenbergMarquardtMemory]:
    # The function is evaluated in the box only.
    inside = limits_on(problem).clip(x) if bounded else x
    raw, raw_jacobian = problem.fn.jacobian(inside)
    measured = problem.function("loss")(inside) if robust else raw
    residual, jacobian, losses, squares = weighted(raw, raw_jacobian, measured, robust)
    memory = LevenbergMarquardtMemory(
        residual=residual,
        jacobian=jacobian,
        losses=losses,
        scale=squares,
        radius=radius * _trust_region.first_radius(inside, residual, squares),
        refusals=torch.zeros(x.shape[0], dtype=torch.int64, device=x.device),
        slow=torch.zeros(x.shape[0], dtype=torch.int64, device=x.device),
    )
    # The error of the guess itself: a guess outside of the box is no solution.
    error = _error_at(problem, x, normal_gradient(jacobian, residual), bounded)
    return Start(error, memory, flat_status(measured, error) if robust else None)


def _error_at(problem: BatchedProblem, x: Tensor, g: Tensor, bounded: bool) -> Tensor:
    """Return the norm of the condition's residual, from the gradient."""
    return row_norm(limits_on(problem).residual(x, g) if bounded else g)


def _size_in_box(problem: BatchedProblem, x: Tensor, memory: LevenbergMarquardtMemory) -> Tensor:
    """Return the change of the condition's residual for a change ``J'J x`` of the gradient, the analogue of
    `normal_size`."""
    limits, J = limits_on(problem), memory.jacobian
    x, g = limits.clip(x), normal_gradient(J, memory.residual)
    return row_norm(limits.residual(x, g - normal_gradient(J, vecmat(x, J.mT))) - limits.residual(x, g))


def _step(
    problem: BatchedProblem, x: Tensor, state: State[LevenbergMarquardtMemory], *, robust: bool, bounded: bool
) -> tuple[Tensor, State[LevenbergMarquardtMemory]]:
    old = state.memory
    x = limits_on(problem).clip(x) if bounded else x
    noise = rounding_of_cost(problem, x, old.residual, old.jacobian, old.losses)
    base = _Base(x, normal_residual(old), scaling_of(old.scale), noise)
    trial = _next_trial(problem, x, old, noise, robust, bounded)
    found = _evaluate(problem, base, old, trial, robust, bounded)
    # A step below the rounding of ``x`` is no step.
    moves = (trial.x != x).any(dim=-1)
    accepted = found.accepted & moves
    refusals = torch.where(accepted, 0, old.refusals + found.unresolved)
    # Stuck: the step rounds to zero, or several steps with unresolved gains have been refused.
    refused = ~accepted & (~moves | (refusals >= _trust_region.MAX_REFUSALS))
    radius = _radius_after(state, base, trial, found, accepted)
    # A refusal by the gain is no slow step: the next step from the same point is shorter. A Newton step counts as one,
    # so that another follows where rounding hides the gain of a Gauss-Newton step.
    halved = accepted & (found.ratio < 0.5)
    slow = torch.where(halved, trial.by_hessian.long(), old.slow + (accepted | found.unresolved))
    memory = old._replace(radius=radius, refusals=refusals, slow=slow)
    x, memory = if_any(accepted, partial(_moved, trial.x, found.new, accepted), (x, memory))
    falls = accepted & (~found.unresolved | (found.gain > 8.0 * problem.eps * old.losses.detach().sum(dim=-1)))
    progress = state.progress.fallen(falls).stepped(trial.whole, x, units_of(memory.jacobian))
    error = _error_at(problem, x, normal_residual(memory), bounded)
    ends, arrived = ~accepted | found.unresolved, error <= state.target
    progress = _with_distance(problem, x, memory, progress, trial, ends, arrived, robust, bounded)
    status = torch.where(refused, int(Status.LINE_SEARCH_FAILED), state.status)
    endless = accepted & arrived & (progress.step >= 1.0) & _runs_off(problem, base, old, trial, found)
    status = torch.where(endless, int(Status.UNBOUNDED), status)
    return x, state._replace(error=error, progress=progress, status=status, memory=memory)


def _runs_off(
    problem: BatchedProblem, base: _Base, memory: LevenbergMarquardtMemory, trial: _Trial, found: _Evaluation
) -> Tensor:
    """Return the lanes with a step away from the origin that hardly changes the cost, by the model and measured, as on
    the way to an infimum at infinity."""
    gain = torch.maximum(found.gain, trial.predicted)
    little = gain <= precision(problem.eps) * memory.losses.detach().sum(dim=-1)
    return little & (length(base.D * trial.x) >= _GROWTH * length(base.D * base.x))


class _Base(NamedTuple):
    """The start of a step.

    Attributes:
        x: the point.
        gradient: ``J' r``.
        D: the diagonal of ``D``.
        noise: the rounding of the cost.
    """

    x: Tensor
    gradient: Tensor
    D: Tensor
    noise: Tensor


Weighted = tuple[Tensor, Tensor, Tensor, Tensor]


class _Evaluation(NamedTuple):
    """The cost at the end of a trial step.

    Attributes:
        gain: the actual gain.
        known: True if the residual, and the gradient if computed, are finite.
        unresolved: True if rounding of the cost may hide the gain.
        accepted: True if the step is good enough.
        ratio: factor of the scaled gradient, ``|D^-1 J' r|`` at the end relative to the start; 1 if not computed.
        new: the results of `weighted` at the end; those at the start if no lane may accept the step.
    """

    gain: Tensor
    known: Tensor
    unresolved: Tensor
    accepted: Tensor
    ratio: Tensor
    new: Weighted


def _evaluate(
    problem: BatchedProblem,
    base: _Base,
    memory: LevenbergMarquardtMemory,
    trial: _Trial,
    robust: bool,
    bounded: bool,
) -> _Evaluation:
    """Evaluate a trial step; the Jacobian is computed if a lane may accept the step."""
    r, x = memory.residual, base.x
    measured = problem.function("loss")(trial.x) if robust else problem.fn(trial.x)
    # ``(|r|^2 - |new_r|^2) / 2`` as a product, without cancellation.
    gain = gain_of_losses(memory.losses, measured) if robust else 0.5 * row_dot(r - measured, r + measured)
    known = torch.isfinite(measured).all(dim=-1)
    # Rounding of the cost may hide the gain if neither the predicted nor the measured gain is larger.
    unresolved = (trial.predicted.abs() <= base.noise) & ~(gain > base.noise)
    accepted = (gain > _trust_region.MIN_GAIN_RATIO * trial.predicted.clamp(min=0.0)) & known

    def judge(found: _Evaluation) -> _Evaluation:
        # Lanes outside of the domain evaluate the old point, so that no derivative is nan.
        there = select(known, trial.x, x)
        new = weighted(*problem.fn.jacobian(there), select(known, measured, torch.ones_like(measured)), robust)
        new_g = normal_gradient(new[1], new[0])
        gradients = _free_gradient(problem, there, new_g, bounded), _free_gradient(problem, x, base.gradient, bounded)
        ratio = safe_divide(*(row_norm(gradient / base.D) for gradient in gradients))
        # The Jacobian may overflow where the residual does not.
        inside = known & torch.isfinite(new_g).all(dim=-1)
        # `noise` is a bound, several times the usual rounding, and the gradient rises on the way into a narrow valley.
        # So the measured gain may accept an unresolved step too. Errors of such steps do not add up: each step lowers
        # the measured cost.
        accepted = inside & (found.accepted | (unresolved & (ratio < 1.0)))
        return found._replace(known=inside, accepted=accepted, ratio=ratio, new=new)

    here = r, memory.jacobian, memory.losses, memory.scale
    found = _Evaluation(gain, known, unresolved, accepted, torch.ones_like(gain), here)
    return if_any(known & (accepted | unresolved), judge, found)


def _radius_after(
    state: State[LevenbergMarquardtMemory], base: _Base, trial: _Trial, found: _Evaluation, accepted: Tensor
) -> Tensor:
    """Return the radius after a step: by the gain, or by the gradient if rounding hides the gain."""
    d, radius = trial.x - base.x, state.memory.radius
    # In the norm ``|D d|`` of the region.
    step_length, slope = length(base.D * d), row_dot(d, base.gradient)
    # MINPACK: after the first step the radius is at most the length of the step.
    radius = torch.where(state.iter_num == 0, torch.minimum(radius, step_length), radius)
    by_gain = _trust_region.next_radius(radius, step_length, found.gain, trial.predicted, slope, found.known)
    # A halved gradient allows a longer step.
    longer = torch.where(accepted & (found.ratio < 0.5), torch.maximum(radius, 2.0 * step_length), radius)
    by_gradient = torch.where(accepted, longer, 0.25 * step_length)
    return torch.where(found.unresolved & found.known, by_gradient, by_gain)


def _moved(
    new_x: Tensor, new: Weighted, accepted: Tensor, old: tuple[Tensor, LevenbergMarquardtMemory]
) -> tuple[Tensor, LevenbergMarquardtMemory]:
    """Return the point, and the memory with the values of `weighted` there, after a step of the accepted lanes."""
    (x, memory), (r, J, losses, squares) = old, new
    return select(accepted, new_x, x), memory._replace(
        residual=select(accepted, r, memory.residual),
        jacobian=select(accepted, J, memory.jacobian),
        losses=select(accepted, losses, memory.losses),
        # The largest norms so far, as in MINPACK.
        scale=torch.maximum(memory.scale, select(accepted, squares, memory.scale)),
    )


class _Trial(NamedTuple):
    """A trial step.

    Attributes:
        x: the end of the step.
        predicted: the gain predicted by the model.
        whole: the step without a trust region.
        by_hessian: True if the model has the full Hessian.
    """

    x: Tensor
    predicted: Tensor
    whole: Tensor
    by_hessian: Tensor


def _next_trial(
    problem: BatchedProblem, x: Tensor, memory: LevenbergMarquardtMemory, noise: Tensor, robust: bool, bounded: bool
) -> _Trial:
    """Return the Gauss-Newton trial, or the Newton trial in lanes with slow progress or gains hidden by rounding."""
    trial, slow = _gauss_newton_trial(problem, x, memory, bounded), memory.slow
    # Second derivatives are expensive: ask after several slow steps, or near the end, when rounding hides the
    # Gauss-Newton gain.
    asked = (slow >= _SLOW_GRADIENT_STEPS) | ((slow > 0) & (trial.predicted.abs() <= noise))

    def by_hessian(trial: _Trial) -> _Trial:
        g = normal_gradient(memory.jacobian, memory.residual)
        at = if_twice_differentiable(lambda: _curvature(problem, x, g, robust, bounded))
        return trial if at is None else _newton_trial(problem, x, memory, at, trial, asked, noise, bounded)

    return if_any(asked, by_hessian, trial)


def _gauss_newton_trial(problem: BatchedProblem, x: Tensor, memory: LevenbergMarquardtMemory, bounded: bool) -> _Trial:
    """Return the end of the Gauss-Newton step within the region."""
    r, J, D, radius = memory.residual, memory.jacobian, scaling_of(memory.scale), memory.radius
    g = normal_gradient(J, r)
    # Zero columns for held unknowns give them a step of zero.
    free = torch.where(limits_on(problem).held(x, g)[:, None], 0.0, J) if bounded else J
    d, weights, whole = step_in_region(free, r, D, radius, problem.eps)
    by_hessian = torch.zeros_like(radius, dtype=torch.bool)
    if not bounded:
        # ``(|r|^2 - |r + J d|^2) / 2`` without cancellation, by ``(J'J + lambda D^2) d = -g``. Both terms are
        # nonnegative: ``-g'd = |J d|^2 + lambda |D d|^2`` (More, section 4).
        return _Trial(x + d, 0.5 * (row_dot(d, weights * d) - row_dot(d, g)), whole, by_hessian)
    trial = end_in_box(limits_on(problem), x, r, J, g, weights)
    d = trial - x
    # A step cut by the box satisfies no multiplier equation: expand ``(|r|^2 - |r + J d|^2) / 2``.
    return _Trial(trial, -row_dot(d, g) - 0.5 * vecmat(d, J.mT).square().sum(dim=-1), whole, by_hessian)


def _newton_trial(
    problem: BatchedProblem,
    x: Tensor,
    memory: LevenbergMarquardtMemory,
    at: Curvature,
    other: _Trial,
    asked: Tensor,
    noise: Tensor,
    bounded: bool,
) -> _Trial:
    """Return the Newton trial in the `asked` lanes with a positive definite Hessian and an end inside of the box, else
    the other trial."""
    convex, D, radius = at.convex, scaling_of(memory.scale), memory.radius
    step = at.step(convex)
    # ``H p = -g`` gives the gain ``-g'p - p'H p / 2 = -g'p / 2`` of a whole Newton step.
    size, promised = length(D * step), -0.5 * row_dot(step, at.gradient)
    # If rounding hides the gain, the radius carries no information, so do not cut the step, unless a step from this
    # point has been refused.
    limited = (size > radius) & ((promised > noise) | (memory.refusals > 0))
    part = torch.where(limited, radius / torch.where(limited, size, 1.0), 1.0)
    # The quadratic model along a Newton step: ``m(t) = m(1) t (2 - t)``.
    ahead, predicted = x + part[:, None] * step, promised * part * (2.0 - part)
    inside = (limits_on(problem).clip(ahead) == ahead).all(dim=-1) if bounded else True
    # A Newton step out of the box is not cut to the box: the Gauss-Newton trial handles bounds. A step that promises a
    # loss shows that rounding hides the curvature.
    good = asked & convex & (promised >= 0) & torch.isfinite(ahead).all(dim=-1) & inside
    return _Trial(
        select(good, ahead, other.x), select(good, predicted, other.predicted), select(good, step, other.whole), good
    )


def _with_distance(
    problem: BatchedProblem,
    x: Tensor,
    memory: LevenbergMarquardtMemory,
    progress: Progress,
    ahead: _Trial,
    ends: Tensor,
    arrived: Tensor,
    robust: bool,
    bounded: bool,
) -> Progress:
    """Record the distance from the solution, the length of the step without a region, in lanes that may end."""
    # A Gauss-Newton search may end with a long last step, cut by the region: measure the step without the region.
    looks = (ends | arrived) & ~ahead.by_hessian

    def look(step: Tensor) -> Tensor:
        return torch.where(looks, _distance(problem, x, memory, progress, ends, bounded), step)

    looks_far = arrived & ahead.by_hessian

    def look_far(step: Tensor) -> Tensor:
        whole = _whole_distance(problem, x, memory, progress, robust, bounded)
        return torch.where(looks_far, torch.maximum(whole, step), step)

    return progress._replace(step=if_any(looks_far, look_far, if_any(looks, look, progress.step)))


def _distance(
    problem: BatchedProblem,
    x: Tensor,
    memory: LevenbergMarquardtMemory,
    progress: Progress,
    ends: Tensor,
    bounded: bool,
) -> Tensor:
    """Return the length of the step without damping, in the measure of `Progress.stepped`.

    The length is 0 if the step predicts a negligible gain, as long steps along the null space of a Jacobian do. The
    length is at least 1 if steps are refused despite a predicted gain and the value exceeds its rounding.
    """
    x, r, losses = (t.detach() for t in (x, memory.residual, memory.losses))
    J = _free_jacobian(problem, x, memory, bounded)
    # Singular values that are rounding of 0 predict a gain of at most ``sqrt(eps)`` of the cost.
    d = _whole_step(problem, x, memory, bounded)
    step = progress.stepped(d, x, units_of(J)).step
    value, promised = losses.sum(dim=-1), -0.5 * row_dot(d, normal_gradient(J, r))
    # Steps refused although the cost is far above rounding: ``x`` is not near a minimum of the model.
    in_vain = ends & (value > 16.0 * rounding_of_cost(problem, x, r, J, losses))
    step = torch.where(in_vain, step.clamp(min=1.0), step)
    return torch.where(promised <= problem.eps**0.5 * value.abs(), 0.0, step)


def _whole_step(problem: BatchedProblem, x: Tensor, memory: LevenbergMarquardtMemory, bounded: bool) -> Tensor:
    """Return the Gauss-Newton step without damping."""
    J = _free_jacobian(problem, x, memory, bounded)
    return damped(J, memory.residual.detach(), least_weights(J, memory.scale.detach(), problem.eps))


def _free_jacobian(problem: BatchedProblem, x: Tensor, memory: LevenbergMarquardtMemory, bounded: bool) -> Tensor:
    """Return the Jacobian, detached, with zero columns for unknowns held at a bound."""
    x, r, J = (t.detach() for t in (x, memory.residual, memory.jacobian))
    return torch.where(limits_on(problem).held(x, normal_gradient(J, r))[:, None], 0.0, J) if bounded else J


def _whole_distance(
    problem: BatchedProblem,
    x: Tensor,
    memory: LevenbergMarquardtMemory,
    progress: Progress,
    robust: bool,
    bounded: bool,
) -> Tensor:
    """Return the length of the Newton step with the full Hessian; 0 if the step predicts a negligible gain.

    If rounding of the Hessian hides its curvature along the Gauss-Newton step, the length is at least that of the
    Gauss-Newton step.
    """
    at = _curvature(problem, x, normal_residual(memory), robust, bounded)
    step = least_squares_newton_step(problem, x, memory.residual, memory.jacobian, memory.losses, at)
    size = torch.where(step.counts, progress.stepped(step.d, step.x, step.units).step, 0.0)
    d, H = _whole_step(problem, x, memory, bounded), at.hessian.detach()
    # QR of ``J`` resolves curvatures of ``eps^2 |H|``, ``H`` itself of ``eps |H|`` only.
    rounding = problem.eps * row_dot(d.abs(), vecmat(d.abs(), H.abs()))
    hidden = row_dot(d, vecmat(d, H)).abs() <= 4.0 * rounding
    nowhere = torch.zeros_like(hidden)
    return torch.where(hidden, torch.maximum(size, _distance(problem, x, memory, progress, nowhere, bounded)), size)


def _newton_step(
    problem: BatchedProblem, x: Tensor, memory: LevenbergMarquardtMemory, *, robust: bool, bounded: bool
) -> NewtonStep:
    r, J = memory.residual, memory.jacobian
    return least_squares_newton_step(
        problem, x, r, J, memory.losses, _curvature(problem, x, normal_gradient(J, r), robust, bounded)
    )


def _curvature(problem: BatchedProblem, x: Tensor, g: Tensor, robust: bool, bounded: bool) -> Curvature:
    """Return the cost to second order in the unknowns that no bound holds."""
    cost = problem.function("loss").summed(losses_of) if robust else problem.fn.summed(half_squares)
    return curvature(x, cost, ~limits_on(problem).held(x, g) if bounded else None)


def _free_gradient(problem: BatchedProblem, x: Tensor, g: Tensor, bounded: bool) -> Tensor:
    """Return the gradient, with 0 for unknowns held at a bound."""
    return limits_on(problem).free_gradient(x, g) if bounded else g


_SLOW_GRADIENT_STEPS = 4
"""Number of steps without a halved gradient before a step with the full Hessian."""
_GROWTH = 1.2
"""Factor by which ``|D x|`` must grow in a step without a gain to show that the minimum is at infinity."""
