"""Bisection."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Concatenate, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

import implicitdiff._torch.trees as pytree
import implicitdiff.solvers._loop.equations as _equations
from implicitdiff._torch.control import is_recorded, leave_to_python
from implicitdiff._torch.trees import P, Tree, X
from implicitdiff.solvers._loop.bounds import Bound
from implicitdiff.solvers._loop.equations import Equation
from implicitdiff.solvers._loop.method import IterativeMethod, Start
from implicitdiff.solvers._loop.options import SolverOptions, solver_factory
from implicitdiff.solvers._loop.problem import BatchedProblem, any_lane, row_norm
from implicitdiff.solvers._loop.solver import Solver, make_solver
from implicitdiff.solvers._loop.state import State
from implicitdiff.solvers._loop.status import Status


class BisectionMemory(NamedTuple):
    """The memory of `bisection`.

    Attributes:
        residual: ``F(x)``, as one vector.
        lower: the lower ends of the brackets.
        upper: the upper ends.
        rising: 1 in entries with ``F`` increasing over the bracket, -1 with ``F`` decreasing.
        largest: the larger ``|F|`` at the two ends of the first bracket.
    """

    residual: Tensor
    lower: Tensor
    upper: Tensor
    rising: Tensor
    largest: Tensor


@solver_factory
def bisection(
    fn: Callable[Concatenate[X, P], X], lower: Bound, upper: Bound, **options: Unpack[SolverOptions]
) -> Solver[X, P, BisectionMemory]:
    r"""Make a solver of ``F(x, *args) = 0`` by bisection, entry by entry: ``F(x)[i]`` may depend on ``x[i]`` alone.

    Every iteration halves the brackets ``[lower, upper]``; ``F`` must have different signs at the two ends. A search
    ends when the error reaches its target, or when the ends of the brackets are neighbouring floating-point numbers. In
    the latter case a residual larger than at the ends of the first bracket shows a pole instead of a root, and gives
    the status ``DIVERGED``. Every search ends, so ``atol=None`` means 0 here, and a guess near the root saves little.

    ``init`` and ``run`` take an initial guess, the first point of the search, or None for the middle. Bisection has no
    derivative of its own, so ``run(..., implicit_diff=False)`` is refused.

    Args:
        fn: ``F(x, *args)``, a tree like ``x``.
        lower: a number, or a tensor or a tree that broadcasts to ``x``; lanes of a vmap may have different values.
        upper: likewise.
        options: see `SolverOptions`.

    Raises (when solving):
        ValueError: ``F`` has the same sign at both ends of a bracket, or ``lower > upper``.

    Reference:
        Burden and Faires, "Numerical Analysis", section 2.1.

    Example:
        >>> import torch
        >>> from implicitdiff.solvers import bisection
        >>> solver = bisection(lambda x, theta: x**3 - theta, 0.0, 10.0)
        >>> x, state = solver.run(torch.ones(3), torch.tensor([1.0, 8.0, 27.0]))
        >>> x.round(decimals=4)
        tensor([1., 2., 3.])
        >>> torch.func.grad(lambda theta: solver.run(None, theta)[0])(torch.tensor(8.0))  # 1 / (3 x^2)
        tensor(0.0833)
    """
    why = "the iterations of bisection have no derivative"
    method = IterativeMethod(_start, _step, BisectionMemory, 10_000, is_judged=False, only_implicit=why)
    pose, guess = partial(_bracketed_equation, lower=lower, upper=upper), partial(_guess_or_middle, lower, upper)
    return make_solver("bisection", pose, (fn,), method, options, guess)


def _bracketed_equation(fn: Callable[..., Tree], *, lower: Bound, upper: Bound) -> Equation:
    root = _equations.root_equation(fn)
    # The bounds enter as functions, so that they are differentiated and batched like the captures of `fn`.
    ends = {
        "lower": lambda x, args: _expand_bound("lower", lower, x),
        "upper": lambda x, args: _expand_bound("upper", upper, x),
    }
    return root._replace(functions={**root.functions, **ends})


def _guess_or_middle(lower: Bound, upper: Bound, params: Tree, /, *args: Tree, **kwargs: Tree) -> Tree:
    # The middle has the structure of the bounds, and stands in for a missing tree of unknowns.
    return _middle(lower, upper) if params is None else params


def _start(problem: BatchedProblem, x: Tensor) -> Start[BisectionMemory]:
    lower, upper = problem.function("lower")(x), problem.function("upper")(x)
    low, high = problem.fn(lower), problem.fn(upper)
    # Negated comparisons refuse nan as well. The sign replaces the factor `high`: a product of two tiny values
    # underflows to 0, and would hide equal signs.
    _refuse_brackets(~(lower <= upper) | ~(low * high.sign() <= 0))
    # With a root at both ends no sign orients the search; the lower end is the solution.
    upper = torch.where((low == 0) & (high == 0), lower, upper)
    inside = _clip(x, lower, upper)
    residual = problem.fn(inside)
    size = row_norm(residual)
    # A guess outside of its bracket is no solution, even if the residual at the clipped point is zero. Its error is the
    # largest finite number, because infinity would count as divergence.
    error = torch.where((inside == x).all(dim=-1), size, torch.finfo(x.dtype).max)
    largest = torch.maximum(low.abs(), high.abs())
    # The ends of the first bracket fix the orientation of the search.
    return Start(error, BisectionMemory(residual, lower, upper, (high - low).sign(), largest), reference=size)


def _refuse_brackets(wrong: Tensor) -> None:
    if is_recorded():
        leave_to_python(wrong.any(dim=-1))
    elif any_lane(wrong):
        raise ValueError(
            "bisection: fn must have different signs at lower and upper, and lower must not exceed upper, in every "
            "entry of every lane; widen the brackets"
        )


def _step(problem: BatchedProblem, x: Tensor, state: State[BisectionMemory]) -> tuple[Tensor, State[BisectionMemory]]:
    residual, lower, upper, rising, largest = state.memory
    # ``side <= 0``: the root lies at or above ``x``. Both ends move if ``x`` is a root.
    side = rising * residual
    # Only an initial guess lies outside; its residual was evaluated at the clipped point.
    x = _clip(x, lower, upper)
    # Invariant: ``rising F(lower) <= 0 <= rising F(upper)`` in every entry.
    lower, upper = torch.where(side <= 0, x, lower), torch.where(side >= 0, x, upper)
    # ``(lower + upper) / 2`` may overflow.
    x = lower + (upper - lower) / 2
    residual = problem.fn(x)
    # The middle of neighbouring numbers rounds to an end.
    collapsed = ((x <= lower) | (x >= upper)).all(dim=-1)
    # A change of sign is a root or a pole. Near a pole ``|F|`` exceeds the values at the first ends.
    sound = (residual.abs() <= largest).all(dim=-1)
    ended = torch.where(sound, int(Status.CONVERGED), int(Status.DIVERGED))
    status = torch.where(collapsed, ended, state.status)
    memory = BisectionMemory(residual, lower, upper, rising, largest)
    return x, state._replace(error=row_norm(residual), status=status, memory=memory)


def _clip(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, lower), upper)


def _expand_bound(name: str, value: Bound, x: Tree) -> Tree:
    """Return a bound as a tree like `x`."""
    leaves, structure = pytree.flatten(x)
    try:
        ends = pytree.broadcast(structure.spec, value)
        # The unknowns are the leaves with tensors; `broadcast` gives an end for every leaf.
        values = [ends[slot] for slot in structure.slots]
        return structure.unflatten(
            [
                torch.as_tensor(v, dtype=t.dtype, device=t.device).expand_as(t)
                for v, t in zip(values, leaves, strict=True)
            ]
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"bisection: {name} must be a number, or a tensor or a tree of these that broadcasts to "
            f"{pytree.describe(x)}, got {pytree.describe(value)}"
        ) from error


def _middle(lower: Bound, upper: Bound) -> Tree:
    """Return the middles of brackets, whose ends are trees of numbers and tensors; an end may be a single number or
    tensor for all leaves."""
    _, spec = pytree.leaves_of(upper if isinstance(lower, (int, float, Tensor)) else lower)
    try:
        pairs = zip(pytree.broadcast(spec, lower), pytree.broadcast(spec, upper), strict=True)
        return pytree.unflatten([torch.as_tensor(low + (high - low) / 2) for low, high in pairs], spec)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "bisection: without an initial guess, lower and upper must be numbers, tensors, or trees of the same "
            f"structure, got {pytree.describe(lower)} and {pytree.describe(upper)}"
        ) from error
