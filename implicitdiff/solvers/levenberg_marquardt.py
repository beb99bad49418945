"""The Levenberg-Marquardt method for nonlinear least squares."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import implicitdiff.solvers._condition as _condition
import implicitdiff.solvers._dense as _dense
import implicitdiff.solvers._gap as _gap
from implicitdiff.solvers._options import check_number
from implicitdiff.solvers._rows import Rows, any_lane, dot, norm, select
from implicitdiff.solvers._solver import Method, Solver, make
from implicitdiff.solvers._status import Status
from implicitdiff.solvers.gauss_newton import gradient, normal_size


class LevenbergMarquardtState(NamedTuple):
    """The state of `levenberg_marquardt`; the first five fields are those of every solver.

    Attributes:
        iter_num: iterations so far, those that were refused among them.
        error: ``|J' r|``, the norm of the gradient of ``|r|^2 / 2``.
        target: what ``error`` has to reach.
        status: an `implicitdiff.solvers.Status`.
        history: the errors of a run that kept them, ``(iterations + 1,)``, else empty.
        residual: ``r(x)``, as one vector of length ``m``.
        jacobian: ``J = dr/dx``, ``(m, n)``.
        scale: ``D^2``, the largest squared norms that the columns of ``J`` have had, ``(n,)``.
        damping: ``lambda``.
        growth: what it is multiplied by when the next step is refused.
    """

    iter_num: Tensor
    error: Tensor
    target: Tensor
    status: Tensor
    history: Tensor
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

    method = Method(partial(_start, damping=damping), _step, LevenbergMarquardtState, 1_000, _gap.least_squares)
    return make("levenberg_marquardt", _condition.least_squares, (residual_fn,), method, options)


def _start(rows: Rows, x: Tensor, *, damping: float) -> LevenbergMarquardtState:
    residual, jacobian = rows.fn.jacobian(x)
    header = rows.header(norm(gradient(jacobian, residual)), lambda: normal_size(jacobian, x))
    return LevenbergMarquardtState(
        **header,
        residual=residual,
        jacobian=jacobian,
        scale=jacobian.square().sum(dim=1),
        damping=torch.full_like(header["error"], damping),
        growth=torch.full_like(header["error"], 2.0),
    )


def _step(rows: Rows, x: Tensor, state: LevenbergMarquardtState) -> tuple[Tensor, LevenbergMarquardtState]:
    r, J, damping = state.residual, state.jacobian, state.damping
    g = gradient(J, r)
    weights = damping[:, None] * torch.where(state.scale > 0, state.scale, 1.0)
    d = -_dense.solve(J.mT @ J + torch.diag_embed(weights), g)
    trial = x + d
    trial_r = rows.fn(trial)
    # (|r|^2 - |r + J d|^2) / 2, in a form that does not cancel.
    foretold = 0.5 * (dot(d, weights * d) - dot(d, g))
    gain = 0.5 * dot(r - trial_r, r + trial_r)
    # Where rounding drowns the gain, it says nothing: steps go on with the damping that was good so far.
    noise = 4.0 * rows.eps * dot(r, r)
    drowned = foretold <= noise
    accepted = (gain > 0) | (drowned & (gain >= -noise))
    agreement = torch.where(foretold > 0, gain / torch.where(foretold > 0, foretold, 1.0), 1.0).clamp(0.0, 1.0)
    shrink = torch.where(drowned, 1.0, torch.clamp(1.0 - (2.0 * agreement - 1.0) ** 3, min=1.0 / 3.0))
    next_damping = torch.where(accepted, damping * shrink, damping * state.growth)
    state = state._replace(
        damping=next_damping.clamp(min=rows.eps**2), growth=torch.where(accepted, 2.0, 2.0 * state.growth)
    )
    if any_lane(accepted):
        x = select(accepted, trial, x)
        r, J = rows.fn.jacobian(x)
        state = state._replace(
            residual=r,
            jacobian=J,
            scale=torch.maximum(state.scale, J.square().sum(dim=1)),
            error=norm(gradient(J, r)),
        )
    stuck = ~accepted & ~(next_damping <= 1.0 / rows.eps**2)
    return x, state._replace(status=torch.where(stuck, int(Status.LINE_SEARCH_FAILED), state.status))
