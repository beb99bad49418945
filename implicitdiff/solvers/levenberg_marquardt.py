"""The Levenberg-Marquardt method for nonlinear least squares."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import implicitdiff.solvers._dense as _dense
import implicitdiff.solvers._equations as _equations
from implicitdiff.solvers._method import Method, Start
from implicitdiff.solvers._options import check_number
from implicitdiff.solvers._rows import Rows, any_lane, dot, norm, safe_divide, select, times
from implicitdiff.solvers._solver import Solver, make
from implicitdiff.solvers._state import Progress, State
from implicitdiff.solvers._status import Status
from implicitdiff.solvers.gauss_newton import gradient, normal_residual, normal_size


class LevenbergMarquardtMemory(NamedTuple):
    """The memory of `levenberg_marquardt`.

    Attributes:
        residual: ``r(x)``, as one vector of length ``m``.
        jacobian: ``J = dr/dx``, ``(m, n)``.
        scale: ``D^2``, the largest squared norms that the columns of ``J`` have had, ``(n,)``.
        damping: ``lambda``.
        growth: what it is multiplied by when the next step is refused.
    """

    residual: Tensor
    jacobian: Tensor
    scale: Tensor
    damping: Tensor
    growth: Tensor


def levenberg_marquardt(residual_fn: Callable[..., Any], damping: float = 1e-3, **options: Any) -> Solver:
    r"""Make a minimiser of ``|r(x, *args)|^2 / 2`` by damped Gauss-Newton steps.

    Each iteration solves::

        (J'J + lambda D^2) d = - J' r,    J = dr/dx,

    and goes to ``x + d`` if that makes ``|r|`` smaller; ``lambda`` shrinks with the agreement between the gain and that
    which the linear model foretold, and grows where a step is refused. ``D^2`` are the squared norms of the columns of
    ``J``, the largest so far, so the units of the unknowns do not matter. ``r`` may have any length, also less than
    ``x`` has, and ``J`` any rank; the derivative of the solution needs a strict minimum.

    The derivative is that of the exact stationarity condition ``J' r = 0``, second derivatives of ``r`` included.

    Args:
        residual_fn: ``r(x, *args)``, a tree of any tensors.
        damping: the first ``lambda``, positive; larger makes the first steps shorter.
        options: see `implicitdiff.solvers`.

    Raises:
        ValueError: ``damping`` is not positive.

    Reference:
        More, "The Levenberg-Marquardt algorithm", 1978, for the scaling; Nielsen, "Damping parameter in Marquardt's
        method", 1999, for the damping.

    Example:
        >>> import torch
        >>> from implicitdiff.solvers import levenberg_marquardt
        >>> t = torch.tensor([0.0, 1.0, 2.0])
        >>> solver = levenberg_marquardt(lambda x, y: x[0] * torch.exp(-x[1] * t) - y)
        >>> solver.run(torch.tensor([1.0, 3.0]), 2.0 * torch.exp(-0.5 * t))[0]
        tensor([2.0000, 0.5000])
    """
    check_number("levenberg_marquardt", "damping", damping, "a finite number > 0", lambda d: 0 < d < math.inf)

    start = partial(_start, damping=damping)
    method = Method(
        start, _step, LevenbergMarquardtMemory, 1_000, residual=normal_residual, size=normal_size, steps_tell=True
    )
    return make("levenberg_marquardt", _equations.least_squares, (residual_fn,), method, options)


def _start(rows: Rows, x: Tensor, *, damping: float) -> Start:
    residual, jacobian = rows.fn.jacobian(x)
    error = norm(gradient(jacobian, residual))
    memory = LevenbergMarquardtMemory(
        residual=residual,
        jacobian=jacobian,
        scale=jacobian.square().sum(dim=1),
        damping=torch.full_like(error, damping),
        growth=torch.full_like(error, 2.0),
    )
    return Start(error, memory)


def _step(
    rows: Rows, x: Tensor, state: State[LevenbergMarquardtMemory]
) -> tuple[Tensor, State[LevenbergMarquardtMemory]]:
    r, J, scale, damping, growth = state.memory
    g, D2 = gradient(J, r), torch.where(scale > 0, scale, 1.0)
    weights = damping[:, None] * D2
    d = -_damped(J, r, weights)
    trial = x + d
    trial_r = rows.fn(trial)
    # (|r|^2 - |r + J d|^2) / 2, in a form that does not cancel.
    foretold = 0.5 * (dot(d, weights * d) - dot(d, g))
    gain = 0.5 * dot(r - trial_r, r + trial_r)
    known = torch.isfinite(trial_r).all(dim=-1)
    # Below the rounding of |r|^2 the gain says nothing; there the gradient judges.
    drowned = foretold <= _noise(rows, x, r, J)
    accepted, ratio = (gain > 0) & known, torch.ones_like(gain)
    if any_lane(known & (accepted | drowned)):
        new_r, new_J = rows.fn.jacobian(select(known, trial, x))
        root = D2.sqrt()
        ratio = safe_divide(norm(gradient(new_J, new_r) / root), norm(g / root))
        accepted = torch.where(drowned, known & (ratio < 1.0), accepted)
    moves = (trial != x).any(dim=-1)
    accepted = accepted & moves
    agreement = torch.where(foretold > 0, gain / torch.where(foretold > 0, foretold, 1.0), 1.0).clamp(0.0, 1.0)
    shrink = torch.clamp(1.0 - (2.0 * agreement - 1.0) ** 3, min=1.0 / 3.0)
    shrink = torch.where(drowned, torch.where(ratio < 0.5, 1.0 / 3.0, 1.0), shrink)
    next_damping = torch.where(accepted, damping * shrink, damping * growth)
    refused = ~accepted & (~moves | (drowned & (growth >= _REFUSALS)) | ~(next_damping <= 1.0 / rows.eps**2))
    memory = state.memory._replace(
        damping=next_damping.clamp(min=rows.eps**2), growth=torch.where(accepted, 2.0, 2.0 * growth)
    )
    if any_lane(accepted):
        x, r, J = select(accepted, trial, x), select(accepted, new_r, r), select(accepted, new_J, J)
        memory = memory._replace(residual=r, jacobian=J, scale=torch.maximum(scale, J.square().sum(dim=1)))
    progress = state.progress.fallen(accepted & ~drowned).stepped(d, x)
    error = norm(gradient(J, r))
    # Where the search may end, the step that tells how far x is from the solution is that without damping.
    ends = ~accepted | drowned
    if any_lane(ends | (error <= state.target)):
        step = _distance(rows, x, r, J, progress, ends)
        progress = progress._replace(step=torch.where(ends | (error <= state.target), step, progress.step))
    return x, state._replace(
        error=error,
        progress=progress,
        status=torch.where(refused, int(Status.LINE_SEARCH_FAILED), state.status),
        memory=memory,
    )


def _distance(rows: Rows, x: Tensor, r: Tensor, J: Tensor, progress: Progress, ends: Tensor) -> Tensor:
    """How far x is from the solution: the length of the step without damping, as `Progress.stepped` has it.

    It is 0 if that step promises next to no gain, as where a Jacobian without full rank makes it long; and at least 1
    if steps are refused although it promises one, and the value is more than rounding.
    """
    r, J, x = r.detach(), J.detach(), x.detach()
    # Singular values that rounding makes of zero promise no more than a square root of eps.
    d = -_damped(J, r, rows.eps**1.5 * J.square().sum(dim=1))
    step = progress.stepped(d, x).step
    value, promised = 0.5 * dot(r, r), -0.5 * dot(d, gradient(J, r))
    in_vain = ends & (value > 16.0 * _noise(rows, x, r, J))
    step = torch.where(in_vain, step.clamp(min=1.0), step)
    return torch.where(promised <= rows.eps**0.5 * value, 0.0, step)


_REFUSALS = 32.0
"""The growth of the damping at which steps below rounding have been refused often enough."""


def _damped(J: Tensor, r: Tensor, weights: Tensor) -> Tensor:
    """``argmin |J d - r|^2 + d' diag(weights) d`` by QR, which does not square the condition number."""
    # A column of zeros is damped all the same.
    below = torch.diag_embed(torch.where(weights > 0, weights, 1.0).sqrt())
    return _dense.lstsq(torch.cat([J, below], dim=-2), torch.cat([r, torch.zeros_like(weights)], dim=-1))


def _noise(rows: Rows, x: Tensor, r: Tensor, J: Tensor) -> Tensor:
    """The rounding of ``|r|^2 / 2``."""
    terms = _terms(x.detach(), r.detach(), J.detach())
    return rows.eps * dot(r.detach().abs() + rows.eps * terms, terms)


def _terms(x: Tensor, r: Tensor, J: Tensor) -> Tensor:
    """The size of the terms that cancel in a residual: they are as large as ``|J| |x|``."""
    return r.abs() + times(x.abs(), J.abs().mT)
