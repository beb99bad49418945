"""The proximal gradient method."""

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
def proximal_gradient(
    objective_fn: Callable[Concatenate[X, P], Tensor],
    prox: Callable[[Tree, float | Tensor], Tree],
    stepsize: float | None = None,
    acceleration: bool = True,
    **options: Unpack[SolverOptions],
) -> Solver[X, P, ProximalGradientMemory]:
    r"""Make a minimiser of ``f(x, *args) + g(x)``, ``f`` smooth, by ``x <- prox(y - stepsize grad f(y), stepsize)``.

    ``prox(v, s)`` is the minimiser of ``s g(x) + |x - v|^2 / 2``. Acceleration (FISTA) and the choice of the step size
    are those of `gradient_descent`. The solution is the fixed point of the step of size 1, and differentiated as a
    fixed point.

    Args:
        objective_fn: ``f(x, *args)``, a real number.
        prox: ``prox(v, stepsize)``, a tree like ``v``, e.g. a function of `implicitdiff.prox`; captured tensors, such
            as the strength of a penalty, are differentiated too.
        stepsize: see `gradient_descent`.
        acceleration: see `gradient_descent`.
        options: see `SolverOptions`.

    Raises:
        ValueError: ``stepsize`` is not positive.

    Reference:
        Beck and Teboulle, "A Fast Iterative Shrinkage-Thresholding Algorithm", SIAM J. Imaging Sciences 2 (2009).

    Example:
        >>> import torch
        >>> from implicitdiff import prox
        >>> from implicitdiff.solvers import proximal_gradient
        >>> def fit(strength):
        ...     def penalty(v, stepsize):
        ...         return prox.lasso(v, strength * stepsize)
        ...     solver = proximal_gradient(lambda x, y: ((x - y) ** 2).sum() / 2, penalty)
        ...     return solver.run(torch.zeros(3), torch.tensor([3.0, 0.5, -2.0]))[0]
        >>> fit(torch.tensor(1.0))
        tensor([ 2.,  0., -1.])
        >>> torch.func.jacrev(fit)(torch.tensor(1.0))
        tensor([-1.,  0.,  1.])
    """
    maxiter = options.get("maxiter")
    make = _proximal_gradient.proximal_gradient_method
    method = make("proximal_gradient", _prox, stepsize, acceleration, maxiter)
    return make_solver("proximal_gradient", _equations.proximal_equation, (objective_fn, prox), method, options)


def _prox(problem: BatchedProblem, v: Tensor, stepsize: Tensor) -> Tensor:
    return problem.function("prox")(v, stepsize)
