"""The projected gradient method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Concatenate

from torch import Tensor
from typing_extensions import Unpack

import implicitdiff.solvers._loop.equations as _equations
import implicitdiff.solvers._steps.proximal_gradient as _proximal_gradient
from implicitdiff._torch.trees import P, Tree, X
from implicitdiff.solvers._loop.options import SolverOptions, solver_factory
from implicitdiff.solvers._loop.problem import BatchedProblem
from implicitdiff.solvers._loop.solver import Solver, make_solver
from implicitdiff.solvers._steps.proximal_gradient import ProximalGradientMemory


@solver_factory
def projected_gradient(
    objective_fn: Callable[Concatenate[X, P], Tensor],
    projection: Callable[[Tree], Tree],
    stepsize: float | None = None,
    acceleration: bool = True,
    **options: Unpack[SolverOptions],
) -> Solver[X, P, ProximalGradientMemory]:
    r"""Make a minimiser of a smooth ``f(x, *args)`` over a convex set by ``x <- projection(y - stepsize grad f(y))``.

    The iteration of `proximal_gradient` with the projection as the proximal operator. Every iterate after the initial
    guess lies in the set. The solution is the fixed point of the step of size 1, and differentiated as a fixed point.

    Args:
        objective_fn: ``f(x, *args)``, a real number.
        projection: ``projection(v)``, the nearest point of the set, a tree like ``v``; e.g. one of
            `implicitdiff.projections`. Captured tensors, such as a radius, are differentiated too.
        stepsize: see `gradient_descent`.
        acceleration: see `gradient_descent`.
        options: see `SolverOptions`.

    Raises:
        ValueError: ``stepsize`` is not positive.

    Reference:
        Beck and Teboulle, "A Fast Iterative Shrinkage-Thresholding Algorithm", SIAM J. Imaging Sciences 2 (2009).

    Example:
        >>> import torch
        >>> from implicitdiff import projections
        >>> from implicitdiff.solvers import projected_gradient
        >>> solver = projected_gradient(lambda x, y: ((x - y) ** 2).sum(), projections.simplex)
        >>> solver.run(torch.ones(3) / 3, torch.tensor([1.0, 0.5, -2.0]))[0]
        tensor([0.7500, 0.2500, 0.0000])
    """
    maxiter = options.get("maxiter")
    method = _proximal_gradient.proximal_gradient_method(
        "projected_gradient", _project, stepsize, acceleration, maxiter
    )
    return make_solver("projected_gradient", _equations.projected_equation, (objective_fn, projection), method, options)


def _project(problem: BatchedProblem, v: Tensor, stepsize: Tensor) -> Tensor:
    return problem.function("prox")(v)
