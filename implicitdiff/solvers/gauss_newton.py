"""The Gauss-Newton method for nonlinear least squares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import implicitdiff.solvers._condition as _condition
import implicitdiff.solvers._dense as _dense
import implicitdiff.solvers._gap as _gap
from implicitdiff.solvers._rows import Rows, norm, times
from implicitdiff.solvers._solver import Method, Solver, make


class GaussNewtonState(NamedTuple):
    """The state of `gauss_newton`; the first five fields are those of every solver.

    Attributes:
        iter_num: iterations so far.
        error: ``|J' r|``, the norm of the gradient of ``|r|^2 / 2``.
        target: what ``error`` has to reach.
        status: an `implicitdiff.solvers.Status`.
        history: the errors of a run that kept them, ``(iterations + 1,)``, else empty.
        residual: ``r(x)``, as one vector of length ``m``.
        jacobian: ``J = dr/dx``, ``(m, n)``.
    """

    iter_num: Tensor
    error: Tensor
    target: Tensor
    status: Tensor
    history: Tensor
    residual: Tensor
    jacobian: Tensor


def gauss_newton(residual_fn: Callable[..., Any], **options: Any) -> Solver:
    r"""Make a minimiser of ``|r(x, *args)|^2 / 2`` that goes to ``x + argmin_d |r + J d|^2``, ``J = dr/dx``.

    ``r`` may have any length ``m``, at least that of ``x``. Converges quadratically where the residual is zero at the
    solution, linearly where it is small, and may not converge where it is large or the initial guess is far:
    `levenberg_marquardt` does. ``J`` must have full column rank; where it has not, the status is ``DIVERGED``. The
    least-squares problem is solved by QR.

    The derivative is that of the exact stationarity condition ``J' r = 0``, second derivatives of ``r`` included, not
    that of the Gauss-Newton model.

    Args:
        residual_fn: ``r(x, *args)``, a tree of any tensors.
        options: see `implicitdiff.solvers`.

    Reference:
        Nocedal and Wright, "Numerical Optimization", 2nd ed., section 10.3.

    Example:
        >>> import torch
        >>> from implicitdiff.solvers import gauss_newton
        >>> t = torch.tensor([0.0, 1.0, 2.0])
        >>> solver = gauss_newton(lambda x, y: x[0] * torch.exp(-x[1] * t) - y)
        >>> solver.run(torch.tensor([1.0, 0.1]), 2.0 * torch.exp(-0.5 * t))[0]
        tensor([2.0000, 0.5000])
    """
    method = Method(_start, _step, GaussNewtonState, 1_000, _gap.least_squares)
    return make("gauss_newton", _condition.least_squares, (residual_fn,), method, options)


def _start(rows: Rows, x: Tensor) -> GaussNewtonState:
    residual, jacobian = rows.fn.jacobian(x)
    if residual.shape[-1] < x.shape[-1]:
        raise ValueError(
            f"gauss_newton: {residual.shape[-1]} residuals do not determine {x.shape[-1]} unknowns; use "
            "levenberg_marquardt, or add a regularising residual"
        )
    header = rows.header(norm(gradient(jacobian, residual)), lambda: normal_size(jacobian, x))
    return GaussNewtonState(**header, residual=residual, jacobian=jacobian)


def _step(rows: Rows, x: Tensor, state: GaussNewtonState) -> tuple[Tensor, GaussNewtonState]:
    x = x - _dense.lstsq(state.jacobian, state.residual)
    residual, jacobian = rows.fn.jacobian(x)
    return x, state._replace(error=norm(gradient(jacobian, residual)), residual=residual, jacobian=jacobian)


def normal_size(jacobian: Tensor, x: Tensor) -> Tensor:
    """``|J'J x|``: how much the gradient changes from zero to here, if the residual is linear."""
    return norm(gradient(jacobian, times(x, jacobian.mT)))


def gradient(jacobian: Tensor, residual: Tensor) -> Tensor:
    """``J' r``."""
    product: Tensor = torch.einsum("lmn,lm->ln", jacobian, residual)
    return product
