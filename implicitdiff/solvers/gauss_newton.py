"""The Gauss-Newton method for nonlinear least squares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Concatenate, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

import implicitdiff.solvers._loop.dense as _dense
import implicitdiff.solvers._loop.equations as _equations
import implicitdiff.solvers._steps.newton as _newton
from implicitdiff._torch.trees import P, Tree, X
from implicitdiff.solvers._loop.method import LEAST_SQUARES_STEP, IterativeMethod, Start
from implicitdiff.solvers._loop.options import SolverOptions, solver_factory
from implicitdiff.solvers._loop.problem import BatchedProblem, row_norm, select, vecmat
from implicitdiff.solvers._loop.solver import Solver, make_solver
from implicitdiff.solvers._loop.state import State
from implicitdiff.solvers._loop.status import Status
from implicitdiff.solvers._steps.least_squares import normal_gradient, normal_residual, normal_size


class GaussNewtonMemory(NamedTuple):
    """The memory of `gauss_newton`.

    Attributes:
        residual: ``r(x)``, as one vector of length ``m``.
        jacobian: ``J = dr/dx``, ``(m, n)``.
        growth: factor by which the last consecutive growing steps have increased ``|r|``; 1 after a step without
            growth. A step counts for at most ``eps^(-1/8)``.
    """

    residual: Tensor
    jacobian: Tensor
    growth: Tensor


@solver_factory
def gauss_newton(
    residual_fn: Callable[Concatenate[X, P], Tree], **options: Unpack[SolverOptions]
) -> Solver[X, P, GaussNewtonMemory]:
    r"""Make a minimiser of ``|r(x, *args)|^2 / 2`` by ``x <- x + argmin_d |r + J d|^2``, ``J = dr/dx``.

    ``r`` must be at least as long as ``x``. Converges quadratically to a solution with zero residual and linearly to
    a solution with a small residual. May fail for a large residual or a distant initial guess; then use
    `levenberg_marquardt`. ``J`` must have full column rank: the status is ``DIVERGED`` if the rank is deficient to
    working precision, so that ``|r + J d|`` exceeds ``|r|``, or if the iterates diverge, see `newton`. The
    least-squares problem is solved by QR.

    The derivative is that of the exact stationarity condition ``J' r = 0``, second derivatives of ``r`` included.

    Args:
        residual_fn: ``r(x, *args)``, a tree of any tensors.
        options: see `SolverOptions`.

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
    method = IterativeMethod(
        _start,
        _step,
        GaussNewtonMemory,
        1_000,
        residual=normal_residual,
        size=normal_size,
        steps_tell=True,
        step_powers=LEAST_SQUARES_STEP,
    )
    return make_solver("gauss_newton", _equations.least_squares_equation, (residual_fn,), method, options)


def _start(problem: BatchedProblem, x: Tensor) -> Start[GaussNewtonMemory]:
    residual, jacobian = problem.fn.jacobian(x)
    if residual.shape[-1] < x.shape[-1]:
        raise ValueError(
            f"gauss_newton: {residual.shape[-1]} residuals do not determine {x.shape[-1]} unknowns; use "
            "levenberg_marquardt, or add a regularising residual"
        )
    error = row_norm(normal_gradient(jacobian, residual))
    return Start(error, GaussNewtonMemory(residual, jacobian, growth=torch.ones_like(error)))


def _step(
    problem: BatchedProblem, x: Tensor, state: State[GaussNewtonMemory]
) -> tuple[Tensor, State[GaussNewtonMemory]]:
    r, J, _ = state.memory
    # QR of ``J``, because the matrix of the normal equations ``J'J d = -J'r`` has the squared condition number.
    d = -_dense.lstsq_dense(*_dense.sorted_rows(J, r))
    # The exact minimum is at most ``|r|``, the value at ``d = 0``. The factor 2 leaves room for rounding.
    solved = row_norm(r + vecmat(d, J.mT)) <= 2.0 * row_norm(r)
    # Lanes without a solution stay, so that the user's function sees no meaningless point.
    new_x = select(solved, x + d, x)
    # The Jacobian of the next step comes with the residual of this point, and gives the error ``|J'r|``.
    new_r, J = problem.fn.jacobian(new_x)
    growth, status = _newton.watch_growth(state, x, new_x, r, new_r, problem.eps)
    # A QR solution worse than ``d = 0`` shows a rank-deficient ``J``.
    status = torch.where(solved, status, int(Status.DIVERGED))
    return new_x, state._replace(
        error=row_norm(normal_gradient(J, new_r)),
        status=status,
        progress=state.progress.stepped(d, new_x),
        memory=GaussNewtonMemory(new_r, J, growth),
    )
