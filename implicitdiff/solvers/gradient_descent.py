"""Gradient descent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Concatenate

from torch import Tensor
from typing_extensions import Unpack

import implicitdiff.solvers._loop.equations as _equations
import implicitdiff.solvers._steps.proximal_gradient as _proximal_gradient
from implicitdiff._torch.trees import P, X
from implicitdiff.solvers._loop.newton_step import gradient_newton_step
from implicitdiff.solvers._loop.options import SolverOptions, solver_factory
from implicitdiff.solvers._loop.problem import BatchedProblem
from implicitdiff.solvers._loop.solver import Solver, make_solver
from implicitdiff.solvers._steps.proximal_gradient import ProximalGradientMemory


@solver_factory
def gradient_descent(
    objective_fn: Callable[Concatenate[X, P], Tensor],
    stepsize: float | None = None,
    acceleration: bool = True,
    **options: Unpack[SolverOptions],
) -> Solver[X, P, ProximalGradientMemory]:
    r"""Make a minimiser of a smooth ``f(x, *args)`` by ``x <- y - stepsize grad f(y)``.

    Without acceleration ``y`` is ``x``. With Nesterov's acceleration ``y = x + (x - x_before) (t_before - 1) / t``; the
    momentum restarts when it points uphill. A convex ``f`` of condition number ``k`` takes about ``k
    log(1/tolerance)`` iterations, with acceleration ``sqrt(k) log(1/tolerance)``. For steps of an optimizer see
    `from_optimizer`.

    Args:
        objective_fn: ``f(x, *args)``, a real number.
        stepsize: positive; None for backtracking, with growth between iterations. A fixed step size must be less than
            ``2 / L``, ``L`` the largest curvature, and with acceleration less than ``4 / (3 L)``. The status is
            ``DIVERGED`` after 1000 larger steps without progress, unless ``maxiter`` is an integer.
        acceleration: True to accelerate, at the cost of one more gradient per iteration.
        options: see `SolverOptions`.

    Raises:
        ValueError: ``stepsize`` is not positive.

    Reference:
        Nesterov, "Introductory Lectures on Convex Optimization", 2004, section 2.2; O'Donoghue and Candes, Found.
        Comput. Math. 15 (2015), for the restarts.

    Example:
        >>> import torch
        >>> from implicitdiff.solvers import gradient_descent
        >>> solver = gradient_descent(lambda x, theta: ((x - theta) ** 2).sum() + x.sum() ** 2)
        >>> solver.run(torch.zeros(2), torch.tensor([1.0, 3.0]))[0]
        tensor([-0.3333,  1.6667])
    """
    maxiter = options.get("maxiter")
    make = _proximal_gradient.proximal_gradient_method
    method = make("gradient_descent", _no_prox, stepsize, acceleration, maxiter)
    method = method._replace(newton_step=gradient_newton_step)
    return make_solver("gradient_descent", _equations.stationary_equation, (objective_fn,), method, options)


def _no_prox(problem: BatchedProblem, v: Tensor, stepsize: Tensor) -> Tensor:
    """The proximal operator of 0."""
    return v
