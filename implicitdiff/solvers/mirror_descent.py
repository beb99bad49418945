"""Mirror descent."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import implicitdiff._pytree as pytree
import implicitdiff.solvers._condition as _condition
import implicitdiff.solvers._gap as _gap
from implicitdiff._lift import gradient
from implicitdiff.solvers._backtracking import GROWTH, Point, backtrack, lies_below
from implicitdiff.solvers._condition import Condition, Parts
from implicitdiff.solvers._proximal_gradient import check_stepsize
from implicitdiff.solvers._rows import Rows, dot, norm
from implicitdiff.solvers._solver import Method, Solver, make
from implicitdiff.solvers._status import Status


class MirrorDescentState(NamedTuple):
    """The state of `mirror_descent`; the first five fields are those of every solver.

    Attributes:
        iter_num: iterations so far.
        error: ``|x - projection(mapping(x) - grad f(x))|``.
        target: what ``error`` has to reach.
        status: an `implicitdiff.solvers.Status`.
        history: the errors of a run that kept them, ``(iterations + 1,)``, else empty.
        stepsize: the length of the last step.
        value: ``f(x)``.
        grad: its gradient, as one vector.
    """

    iter_num: Tensor
    error: Tensor
    target: Tensor
    status: Tensor
    history: Tensor
    stepsize: Tensor
    value: Tensor
    grad: Tensor


def entropy(x: Any) -> Any:
    """The mirror map ``log(x)``, leaf by leaf; numbers below the smallest positive one count as that."""
    return pytree.map_tensors(lambda t: torch.log(t.clamp(min=torch.finfo(t.dtype).tiny)), x)


def softmax(y: Any) -> Any:
    """Back from the dual space onto the probability simplex, each leaf as one vector."""
    return pytree.map_tensors(lambda t: torch.softmax(t.flatten(), dim=0).reshape(t.shape), y)


def mirror_descent(
    objective_fn: Callable[..., Any],
    projection: Callable[[Any], Any] = softmax,
    mapping: Callable[[Any], Any] = entropy,
    stepsize: float | None = None,
    **options: Any,
) -> Solver:
    r"""Make a minimiser of a smooth ``f(x, *args)`` over a convex set by
    ``x <- projection(mapping(x) - stepsize grad f(x))``.

    ``mapping`` is the gradient of a strictly convex potential, which takes ``x`` to the dual space, and ``projection``
    comes back from there to the nearest point of the set in the potential's Bregman divergence. The defaults are those
    of the probability simplex, each leaf being one: the entropy, whose steps multiply. The solution is the fixed point
    of the step of size 1, and is differentiated as such. Start inside: an entry that is zero stays zero. The error is
    that of this step too, in which an entry counts by its size: one that has become small counts little, whatever its
    gradient.

    Args:
        objective_fn: ``f(x, *args)``, a real number.
        projection: from the dual space to the set, a tree like its argument; default: the softmax of each leaf.
        mapping: from the set to the dual space; default: the logarithm.
        stepsize: positive; None finds one by backtracking, such that ``f(x') <= f(x) + grad f(x).d + (mapping(x') -
            mapping(x)).d / (2 stepsize)`` for the step ``d``, and lets it grow again.
        options: see `implicitdiff.solvers`.

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
    method = Method(start, step, MirrorDescentState, 100_000, _GAP)
    return make("mirror_descent", _pose, (objective_fn, projection, mapping), method, options)


def _pose(fn: Callable[..., Any], projection: Callable[[Any], Any], mapping: Callable[[Any], Any]) -> Condition:
    smooth = _condition.stationary(fn)
    onto, into = _condition.root(projection).parts["fn"], _condition.root(mapping).parts["fn"]

    def optimality(parts: Parts, x: Any, args: tuple[Any, ...]) -> Any:
        grad = gradient(parts["fn"], x, args)
        return _condition.subtract(x, parts["projection"](_condition.subtract(parts["mapping"](x, args), grad), args))

    own = {"projection": lambda y, args: onto(y, ()), "mapping": lambda x, args: into(x, ())}
    return Condition({**smooth.parts, **own}, optimality)


def _away(rows: Rows, x: Tensor, grad: Tensor) -> Tensor:
    return x - rows.part("projection")(rows.part("mapping")(x) - grad)


_GAP = _gap.Constrained(_gap.stationary, _away)


def _start(rows: Rows, x: Tensor, *, stepsize: float) -> MirrorDescentState:
    value, grad = rows.fn.value_and_grad(x)
    header = rows.header(norm(_away(rows, x, grad)), lambda: _GAP.size(rows, x, grad))
    return MirrorDescentState(**header, stepsize=torch.ones_like(value) * stepsize, value=value, grad=grad)


def _step(rows: Rows, x: Tensor, state: MirrorDescentState, *, search: bool) -> tuple[Tensor, MirrorDescentState]:
    mapping, projection = rows.part("mapping"), rows.part("projection")
    dual = mapping(x)

    def at(size: Tensor) -> Point:
        new = projection(dual - size[:, None] * state.grad)
        return (new, *rows.fn.value_and_grad(new))

    def enough(new: Point, size: Tensor) -> Tensor:
        bound = dot(mapping(new[0]) - dual, new[0] - x) / (2.0 * size)
        return lies_below(rows, (x, state.value, state.grad), new, bound)

    if search:
        size = torch.where(state.iter_num > 0, GROWTH * state.stepsize, state.stepsize)
        new, size, failed = backtrack(at, enough, size, state.status == Status.RUNNING)
    else:
        new, size, failed = at(state.stepsize), state.stepsize, torch.zeros_like(state.status, dtype=torch.bool)
    x, value, grad = new
    return x, state._replace(
        error=norm(_away(rows, x, grad)),
        status=torch.where(failed, int(Status.LINE_SEARCH_FAILED), state.status),
        stepsize=size,
        value=value,
        grad=grad,
    )
