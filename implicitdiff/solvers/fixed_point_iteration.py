"""Plain iteration of a map."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Concatenate, NamedTuple

from torch import Tensor
from typing_extensions import Unpack

import implicitdiff.solvers._loop.equations as _equations
from implicitdiff._torch.trees import P, X
from implicitdiff.solvers._loop.method import IterativeMethod, Start
from implicitdiff.solvers._loop.options import SolverOptions, check_number, solver_factory
from implicitdiff.solvers._loop.problem import BatchedProblem, row_norm
from implicitdiff.solvers._loop.solver import Solver, make_solver
from implicitdiff.solvers._loop.state import State


class FixedPointMemory(NamedTuple):
    """The memory of `fixed_point_iteration`.

    Attributes:
        image: ``f(x)``, as one vector.
    """

    image: Tensor


@solver_factory
def fixed_point_iteration(
    fixed_point_fn: Callable[Concatenate[X, P], X], damping: float = 0.0, **options: Unpack[SolverOptions]
) -> Solver[X, P, FixedPointMemory]:
    r"""Make a solver of ``f(x, *args) = x`` that iterates ``x <- damping x + (1 - damping) f(x, *args)``.

    Converges if ``f`` is a contraction near the solution, with ``damping`` also for some maps with oscillating
    iterates: the eigenvalues ``mu`` of ``df/dx`` must satisfy ``|damping + (1 - damping) mu| < 1``. An iteration
    multiplies the error by the largest of these numbers, and costs one evaluation of ``f``. The error is ``|f(x) -
    x|``, whatever the damping, so small damped steps do not count as convergence.

    Args:
        fixed_point_fn: ``f(x, *args)``, a tree like ``x``.
        damping: weight of the old iterate, in [0, 1).
        options: see `SolverOptions`.

    Raises:
        ValueError: ``damping`` is not in [0, 1).

    Reference:
        Kelley, "Iterative Methods for Linear and Nonlinear Equations", 1995, section 4.2.

    Example:
        >>> import torch
        >>> from implicitdiff.solvers import fixed_point_iteration
        >>> solver = fixed_point_iteration(lambda z, theta: torch.cos(z) + theta)
        >>> z, state = solver.run(torch.tensor(1.0), torch.tensor(0.0))
        >>> z
        tensor(0.7391)
        >>> torch.func.grad(lambda theta: solver.run(torch.tensor(1.0), theta)[0])(torch.tensor(0.0))
        tensor(0.5975)
    """
    check_number("fixed_point_iteration", "damping", damping, "a number in [0, 1)", lambda d: 0 <= d < 1)

    method = IterativeMethod(_start, partial(_step, damping=damping), FixedPointMemory, 100_000, size=_size)
    return make_solver("fixed_point_iteration", _equations.fixed_point_equation, (fixed_point_fn,), method, options)


def _start(problem: BatchedProblem, x: Tensor) -> Start[FixedPointMemory]:
    image = problem.fn(x)
    return Start(row_norm(x - image), FixedPointMemory(image))


def _size(problem: BatchedProblem, x: Tensor, memory: FixedPointMemory) -> Tensor:
    """Return ``|f(x)|``, the size of the two terms whose difference is the residual."""
    return row_norm(memory.image)


def _step(
    problem: BatchedProblem, x: Tensor, state: State[FixedPointMemory], *, damping: float
) -> tuple[Tensor, State[FixedPointMemory]]:
    image = state.memory.image
    # The damped map has the fixed points of ``f``, and the error is that of ``f`` itself.
    x = damping * x + (1.0 - damping) * image if damping else image
    image = problem.fn(x)
    return x, state._replace(error=row_norm(x - image), memory=FixedPointMemory(image))
