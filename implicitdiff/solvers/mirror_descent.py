"""Mirror descent."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Concatenate, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

import implicitdiff._torch.trees as pytree
import implicitdiff.solvers._loop.equations as _equations
from implicitdiff._torch.trees import P, Tree, X
from implicitdiff.solvers._loop.equations import Composite, Equation, Functions
from implicitdiff.solvers._loop.measures import composite_size
from implicitdiff.solvers._loop.method import IterativeMethod, Start
from implicitdiff.solvers._loop.options import SolverOptions, solver_factory
from implicitdiff.solvers._loop.problem import BatchedProblem, row_dot, row_norm
from implicitdiff.solvers._loop.solver import Solver, make_solver
from implicitdiff.solvers._loop.state import State
from implicitdiff.solvers._loop.status import Status
from implicitdiff.solvers._steps.backtracking import GROWTH, TrialPoint, backtrack, lies_below
from implicitdiff.solvers._steps.proximal_gradient import check_stepsize


class MirrorDescentMemory(NamedTuple):
    """The memory of `mirror_descent`.

    Attributes:
        residual: ``x - projection(mapping(x) - grad f(x))``, as one vector.
        stepsize: the size of the last step.
        value: ``f(x)``.
        grad: ``grad f(x)``, as one vector.
    """

    residual: Tensor
    stepsize: Tensor
    value: Tensor
    grad: Tensor


# The gradient of ``sum x log x`` is ``1 + log x``; `softmax` does not depend on the constant.
def entropy(x: Tree) -> Tree:
    """The mirror map ``log(x)``, leaf by leaf, with entries clamped to the smallest positive number."""
    return pytree.map_tensors(lambda t: torch.log(t.clamp(min=torch.finfo(t.dtype).tiny)), x)


# The point of the simplex nearest to ``exp(y)`` in the Kullback-Leibler divergence is ``exp(y) / sum exp(y)``.
def softmax(y: Tree) -> Tree:
    """The map from the dual space to the probability simplex, with each leaf as one vector."""
    return pytree.map_tensors(lambda t: torch.softmax(t.flatten(), dim=0).reshape(t.shape), y)


@solver_factory
def mirror_descent(
    objective_fn: Callable[Concatenate[X, P], Tensor],
    projection: Callable[[Tree], Tree] = softmax,
    mapping: Callable[[Tree], Tree] = entropy,
    stepsize: float | None = None,
    **options: Unpack[SolverOptions],
) -> Solver[X, P, MirrorDescentMemory]:
    r"""Make a minimiser of a smooth ``f(x, *args)`` over a convex set by
    ``x <- projection(mapping(x) - stepsize grad f(x))``.

    ``mapping``, the gradient of a strictly convex potential, maps ``x`` to the dual space. ``projection`` maps a dual
    point to the nearest point of the set in the potential's Bregman divergence. The defaults are those of the
    probability simplex, a simplex for each leaf: the entropy, with multiplicative steps. The solution is the fixed
    point of the step of size 1, and differentiated as a fixed point. Start with positive entries: a zero entry stays
    zero. The error is the change by the step of size 1. An entry's contribution is proportional to the entry, so small
    entries contribute little, whatever their gradients.

    Args:
        objective_fn: ``f(x, *args)``, a real number.
        projection: from the dual space to the set, a tree like its argument; default: the softmax of each leaf.
        mapping: from the set to the dual space; default: the logarithm.
        stepsize: positive; None for backtracking, with growth between iterations, until the step ``d`` satisfies
            ``f(x + d) <= f(x) + grad f(x).d + (mapping(x + d) - mapping(x)).d / (2 stepsize)``.
        options: see `SolverOptions`.

    Raises:
        ValueError: ``stepsize`` is not positive.

    Reference:
        Beck and Teboulle, "Mirror descent and nonlinear projected subgradient methods", Oper. Res. Lett. 31 (2003).

    Example:
        >>> import torch
        >>> from implicitdiff.solvers import mirror_descent
        >>> solver = mirror_descent(lambda x, y: ((x - y) ** 2).sum())
        >>> solver.run(torch.ones(3) / 3, torch.tensor([1.0, 0.5, -2.0]))[0].round(decimals=4)
        tensor([0.7500, 0.2500, 0.0000])
    """
    check_stepsize("mirror_descent", stepsize)

    start, step = partial(_start, stepsize=stepsize or 1.0), partial(_step, search=stepsize is None)
    method = IterativeMethod(start, step, MirrorDescentMemory, 100_000, residual=attrgetter("residual"), size=_size)
    return make_solver("mirror_descent", _mirror, (objective_fn, projection, mapping), method, options)


def _mirror(fn: Callable[..., Tensor], projection: Callable[[Tree], Tree], mapping: Callable[[Tree], Tree]) -> Equation:
    smooth = _equations.stationary_equation(fn)
    onto, into = _equations.returning_like_x(projection), _equations.returning_like_x(mapping)

    def on_trees(functions: Functions, x: Tree, args: tuple[Tree, ...]) -> Tree:
        grad = smooth.on_trees(functions, x, args)
        dual = _equations.subtract(functions["mapping"](x, args), grad)
        return _equations.subtract(x, functions["projection"](dual, args))

    # Both maps take the unknowns alone; the arguments of the objective are not theirs.
    own = {"projection": lambda y, args: onto(y, ()), "mapping": lambda x, args: into(x, ())}
    return Equation({**smooth.functions, **own}, on_trees, Composite(smooth.on_rows, _mirror_residual))


def _mirror_residual(problem: BatchedProblem, x: Tensor, grad: Tensor) -> Tensor:
    return x - problem.function("projection")(problem.function("mapping")(x) - grad)


def _start(problem: BatchedProblem, x: Tensor, *, stepsize: float) -> Start[MirrorDescentMemory]:
    value, grad = problem.fn.value_and_grad(x)
    residual = _mirror_residual(problem, x, grad)
    memory = MirrorDescentMemory(residual, torch.ones_like(value) * stepsize, value, grad)
    return Start(row_norm(residual), memory)


def _size(problem: BatchedProblem, x: Tensor, memory: MirrorDescentMemory) -> Tensor:
    return composite_size(problem, x, memory.grad)


def _step(
    problem: BatchedProblem, x: Tensor, state: State[MirrorDescentMemory], *, search: bool
) -> tuple[Tensor, State[MirrorDescentMemory]]:
    mapping, projection = problem.function("mapping"), problem.function("projection")
    # All trials of a search start from the same dual point.
    dual, memory = mapping(x), state.memory

    def at(size: Tensor) -> TrialPoint:
        # A gradient step in the dual space, then the Bregman projection.
        new = projection(dual - size[:, None] * memory.grad)
        return (new, *problem.fn.value_and_grad(new))

    def enough(new: TrialPoint, size: Tensor) -> Tensor:
        # The symmetrised Bregman divergence over ``2 size``, in the place of ``|d|^2 / (2 size)``.
        # ``D(a, b) + D(b, a) = (mapping(a) - mapping(b))'(a - b)``, equal to ``|d|^2`` for the identity as the map.
        bound = row_dot(mapping(new[0]) - dual, new[0] - x) / (2.0 * size)
        return lies_below(problem, (x, memory.value, memory.grad), new, bound)

    if search:
        # Let the size grow again before each search, except for the first guess.
        size = torch.where(state.iter_num > 0, GROWTH * memory.stepsize, memory.stepsize)
        new, size, failed = backtrack(at, enough, size, state.status == Status.RUNNING)
    else:
        new, size, failed = at(memory.stepsize), memory.stepsize, torch.zeros_like(state.status, dtype=torch.bool)
    x, value, grad = new
    residual = _mirror_residual(problem, x, grad)
    return x, state._replace(
        error=row_norm(residual),
        status=torch.where(failed, int(Status.LINE_SEARCH_FAILED), state.status),
        memory=MirrorDescentMemory(residual, size, value, grad),
    )
