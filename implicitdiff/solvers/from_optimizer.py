"""Minimisation by any optimizer of this library."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Concatenate, NamedTuple

from torch import Tensor
from typing_extensions import Unpack

import implicitdiff._torch.trees as pytree
import implicitdiff.solvers._loop.equations as _equations
from implicitdiff._torch.lanes import vmap
from implicitdiff._torch.trees import Leaves, P, Structure, Tree, X
from implicitdiff.optim import GradientTransformation
from implicitdiff.solvers._loop.method import IterativeMethod, Start
from implicitdiff.solvers._loop.newton_step import gradient_newton_step
from implicitdiff.solvers._loop.options import SolverOptions, solver_factory
from implicitdiff.solvers._loop.problem import BatchedProblem, row_norm
from implicitdiff.solvers._loop.solver import Solver, make_solver
from implicitdiff.solvers._loop.state import State


class FromOptimizerMemory(NamedTuple):
    """The memory of `from_optimizer`.

    Attributes:
        grad: the gradient, as one vector.
        inner: the state of the optimizer.
    """

    grad: Tensor
    inner: Tree


@solver_factory
def from_optimizer(
    objective_fn: Callable[Concatenate[X, P], Tensor],
    transformation: GradientTransformation,
    **options: Unpack[SolverOptions],
) -> Solver[X, P, FromOptimizerMemory]:
    r"""Make a minimiser of a smooth ``f(x, *args)`` by an optimizer's steps, until the gradient is zero.

    An iteration is ``x, inner = transformation.step(grad f(x), inner, x)``. Optimizers are designed for noisy
    gradients: most converge only with a decaying learning rate or a coarse ``rtol`` or ``atol``. The solution is
    differentiated as a stationary point, for any optimizer.

    Args:
        objective_fn: ``f(x, *args)``, a real number.
        transformation: e.g. ``implicitdiff.adam(1e-2)``.
        options: see `SolverOptions`.

    Raises:
        TypeError: ``transformation`` is not a `GradientTransformation`.

    Example:
        >>> import torch
        >>> import implicitdiff
        >>> from implicitdiff.solvers import from_optimizer
        >>> solver = from_optimizer(lambda x, theta: ((x - theta) ** 2).sum(), implicitdiff.sgd(0.1, momentum=0.5))
        >>> solver.run(torch.zeros(2), torch.tensor([1.0, 2.0]))[0]
        tensor([1.0000, 2.0000])
    """
    if not isinstance(transformation, GradientTransformation):
        raise TypeError(
            "from_optimizer: transformation must be a GradientTransformation, such as implicitdiff.adam(1e-2), got "
            f"{type(transformation).__name__}"
        )

    start, step = partial(_start, transformation=transformation), partial(_step, transformation=transformation)
    method = IterativeMethod(
        start,
        step,
        FromOptimizerMemory,
        100_000,
        residual=attrgetter("grad"),
        newton_step=gradient_newton_step,
    )
    return make_solver("from_optimizer", _equations.stationary_equation, (objective_fn,), method, options)


def _start(problem: BatchedProblem, x: Tensor, *, transformation: GradientTransformation) -> Start[FromOptimizerMemory]:
    _, grad = problem.fn.value_and_grad(x)
    # The state of the optimizer has the lanes in front, like every tensor of a memory.
    inner = _over_lanes(transformation.init, _rows_to_tree(problem, x))
    return Start(row_norm(grad), FromOptimizerMemory(grad=grad, inner=inner))


def _step(
    problem: BatchedProblem, x: Tensor, state: State[FromOptimizerMemory], *, transformation: GradientTransformation
) -> tuple[Tensor, State[FromOptimizerMemory]]:
    # The memory has the gradient at ``x``, so an iteration costs a single evaluation.
    old = state.memory
    params, inner = _over_lanes(
        transformation.step, _rows_to_tree(problem, old.grad), old.inner, _rows_to_tree(problem, x)
    )
    x = _tree_to_rows(problem, params)
    _, grad = problem.fn.value_and_grad(x)
    return x, state._replace(error=row_norm(grad), memory=FromOptimizerMemory(grad=grad, inner=inner))


def _rows_to_tree(problem: BatchedProblem, x: Tensor) -> Tree:
    """Return the tree of rows, with a single dimension for the lanes and with None in the place of leaves other than
    tensors: optimizers take no other leaves."""
    leaves = problem.inputs.unravel(x)
    batch = len(problem.inputs.batch)
    # ``(*batch, ...)`` becomes ``(lanes, ...)``, so that `_over_lanes` needs a single vmap.
    return problem.structure.fill({i: t.reshape(x.shape[0], *t.shape[batch:]) for i, t in enumerate(leaves)})


def _tree_to_rows(problem: BatchedProblem, tree: Tree) -> Tensor:
    """Return the rows of a tree like `_rows_to_tree`'s."""
    leaves = problem.structure.tensors_of(tree)
    # The inverse: ``(lanes, ...)`` becomes ``(*batch, ...)``, then rows.
    return problem.inputs.ravel([t.reshape((*problem.inputs.batch, *t.shape[1:])) for t in leaves])


def _over_lanes(fn: Callable[..., Tree], *trees: Tree) -> Tree:
    """Apply a function of trees to every lane."""
    leaves, given = pytree.flatten(trees)
    # A single lane needs no vmap.
    if leaves[0].shape[0] == 1:
        out = fn(*given.unflatten([t[0] for t in leaves]))
        return pytree.map_tensors(lambda t: t[None], out)
    # The structure of the result is known after the first call.
    made: list[Structure] = []

    def on_leaves(leaves: Leaves) -> Leaves:  # vmap takes and returns tensors alone
        tensors, structure = pytree.flatten(fn(*given.unflatten(leaves)))
        made.append(structure)
        return tensors

    results = vmap(on_leaves, 0)(leaves)
    return made[0].unflatten(results)
