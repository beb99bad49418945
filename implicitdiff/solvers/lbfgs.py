"""Limited-memory BFGS."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Concatenate, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

import implicitdiff.solvers._loop.equations as _equations
from implicitdiff._torch.control import if_any
from implicitdiff._torch.trees import P, X
from implicitdiff.solvers._loop.method import IterativeMethod, Start
from implicitdiff.solvers._loop.newton_step import NewtonStep, few_products, objective_newton_step
from implicitdiff.solvers._loop.options import SolverOptions, check_count, solver_factory
from implicitdiff.solvers._loop.problem import BatchedProblem, row_dot, row_norm, safe_divide, select
from implicitdiff.solvers._loop.solver import Solver, make_solver
from implicitdiff.solvers._loop.state import State
from implicitdiff.solvers._loop.status import Status
from implicitdiff.solvers._steps.line_search import fields_at, initial_fields, search, unit_step, value_fell


class LbfgsMemory(NamedTuple):
    """The memory of `lbfgs`.

    Attributes:
        value: ``f(x)``.
        grad: ``grad f(x)``, as one vector of length ``n``.
        magnitude: the largest ``|f|`` so far, a measure of the rounding of its values.
        scale: the initial inverse Hessian is ``scale I``.
        steps: the last changes ``s`` of ``x``, ``(history, n)``, the latest last; zero rows before the history is full.
        changes: the corresponding changes ``y`` of the gradient.
        products: ``s_i'y_j`` in row ``j`` and column ``i <= j``, else zero; ``(history, history)``, 1 on the diagonal
            for absent steps.
        ahead: the direction of the next step instead of ``-H grad f(x)``; zero for none.
        mark: ``f`` and ``|grad f|`` at the last failed line search, ``(2,)``; infinite before the first failure.
    """

    value: Tensor
    grad: Tensor
    magnitude: Tensor
    scale: Tensor
    steps: Tensor
    changes: Tensor
    products: Tensor
    ahead: Tensor
    mark: Tensor


@solver_factory
def lbfgs(
    objective_fn: Callable[Concatenate[X, P], Tensor], history: int = 20, **options: Unpack[SolverOptions]
) -> Solver[X, P, LbfgsMemory]:
    r"""Make a solver of ``min_x f(x, *args)``, ``f`` smooth, by limited-memory BFGS.

    Steps along ``-H grad f(x)`` to a point that satisfies the strong Wolfe conditions. ``H`` is ``(s'y / y'y) I`` with
    the BFGS updates by the last steps ``s`` and changes ``y`` of the gradient. An iteration costs about one evaluation
    of ``f`` and its gradient, and ``O(history n)`` more. Pairs with ``s'y <= eps |s| |y|`` are skipped. A lane whose
    line search fails restarts from steepest descent; a lane fails that has just restarted, or has made no progress
    since the last restart.

    Args:
        objective_fn: ``f(x, *args)``, a real number; ``x`` is a pytree.
        history: the number of steps to remember, at least 1.
        options: see `SolverOptions`.

    Raises:
        ValueError: ``history`` is less than 1.

    Reference:
        Nocedal and Wright, "Numerical Optimization", 2006, algorithms 7.4 and 7.5.

    Example:
        >>> import torch
        >>> from implicitdiff.solvers import lbfgs
        >>> rosenbrock = lambda x, a: (a - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
        >>> solver = lbfgs(rosenbrock)
        >>> a = torch.tensor(1.0, dtype=torch.float64)
        >>> x, state = solver.run(torch.tensor([-1.2, 1.0], dtype=torch.float64), a)
        >>> torch.allclose(x, torch.stack([a, a**2])), bool(state.iter_num < 50)
        (True, True)
        >>> torch.func.jacrev(lambda a: solver.run(x, a)[0])(a)  # of (a, a^2)
        tensor([1.0000, 2.0000], dtype=torch.float64)
    """
    check_count("lbfgs", "history", history)

    start = partial(_start, history=history)
    method = IterativeMethod(
        start,
        _step,
        LbfgsMemory,
        10_000,
        residual=attrgetter("grad"),
        newton_step=_newton_step,
        runs_off=Status.UNBOUNDED,
    )
    return make_solver("lbfgs", _equations.stationary_equation, (objective_fn,), method, options)


def _start(problem: BatchedProblem, x: Tensor, *, history: int) -> Start[LbfgsMemory]:
    error, fields = initial_fields(problem, x)
    zeros = torch.zeros_like(x)[:, None].repeat(1, history, 1)
    eye = torch.eye(history, dtype=x.dtype, device=x.device).repeat(len(x), 1, 1)
    # Infinite marks: the first restart counts as progress.
    mark = torch.full_like(x[:, :1].detach(), torch.inf).repeat(1, 2)
    scale = unit_step(fields["grad"])
    return Start(
        error,
        LbfgsMemory(
            **fields, scale=scale, steps=zeros, changes=zeros, products=eye, ahead=torch.zeros_like(x), mark=mark
        ),
    )


def _step(problem: BatchedProblem, x: Tensor, state: State[LbfgsMemory]) -> tuple[Tensor, State[LbfgsMemory]]:
    old = state.memory
    replaced = (old.ahead != 0).any(dim=-1)
    # A Newton-type step of the stopping rule replaces the direction once.
    direction = if_any(replaced, lambda d: select(replaced, old.ahead, d), _lbfgs_direction(old, old.grad))
    # The length 1 of a quasi-Newton step is right near a minimum, so the first trial is 1.
    point, failed, status = search(problem, x, state, direction, torch.ones_like(old.value))
    new = _append_pair(old, point.x - x, point.grad - old.grad, problem.eps)
    new = new._replace(**fields_at(old, point), ahead=torch.zeros_like(old.ahead))
    progress = state.progress.fallen(value_fell(problem, old, point))
    state = state._replace(error=row_norm(point.grad), status=status, progress=progress, memory=new)
    return point.x, if_any(failed, lambda state: _restart_lanes(failed, state, problem.eps), state)


def _newton_step(problem: BatchedProblem, x: Tensor, memory: LbfgsMemory) -> NewtonStep:
    """Return a Newton-type step; the next iteration tries the step."""
    step = objective_newton_step(problem, x, memory.magnitude, few_products(problem, x))
    return step._replace(memory=memory._replace(ahead=step.d))


def _lbfgs_direction(memory: LbfgsMemory, grad: Tensor) -> Tensor:
    """Return ``-H g`` (algorithm 7.4); both loops of the two-loop recursion are substitutions with the triangle of the
    products ``s_i'y_j``."""
    # An absent pair has zero rows, and 1 on the diagonal of the triangle, so its coefficients are 0.
    s, y, triangle, grad = memory.steps, memory.changes, memory.products, grad[:, None]
    # First loop, ``a_i = (s_i'q) / (s_i'y_i)``, ``q = g - sum_(j > i) a_j y_j``: back substitution. Times ``s_i'y_i``:
    # ``sum_(j >= i) (s_i'y_j) a_j = s_i'g``, an upper triangle. ``a`` has the shape ``(lanes, history, 1)``.
    a = torch.linalg.solve_triangular(triangle.mT, s @ grad.mT, upper=True)
    middle = memory.scale[:, None, None] * (a.mT @ y - grad)
    # Second loop, ``r <- r + s_i (a_i - y_i'r / s_i'y_i)``: forward substitution with the same triangle. Signs are
    # those of ``-H g``. With ``e_i = a_i - y_i'r / s_i'y_i`` and the first ``r``, ``r_0``:
    # ``sum_(j <= i) (s_j'y_i) e_j = (s_i'y_i) a_i - y_i'r_0``.
    b = triangle.diagonal(dim1=-2, dim2=-1)[..., None] * a + y @ middle.mT
    b = torch.linalg.solve_triangular(triangle, b, upper=False)
    direction: Tensor = middle - b.mT @ s
    return direction[:, 0]


def _append_pair(memory: LbfgsMemory, s: Tensor, y: Tensor, eps: float) -> LbfgsMemory:
    """Append a pair to the history; zeros if its curvature is not positive."""
    sy, yy = row_dot(s, y), row_dot(y, y)
    # Rounding of ``s'y`` is about ``eps |s| |y|``: a smaller curvature is not resolved.
    good = (sy > eps * row_norm(s) * row_norm(y)) & (yy > 0)
    # All lanes shift together, so a skipped pair takes a place too.
    s, y = (torch.where(good[:, None], t, 0.0)[:, None] for t in (s, y))
    steps = torch.cat([memory.steps[:, 1:], s], dim=1)
    # Shift the triangle up and left, and append the row ``s_i'y`` of the new pair.
    last = torch.cat([y @ steps[:, :-1].mT, torch.where(good, sy, 1.0)[:, None, None]], dim=2)
    return memory._replace(
        # (7.20) of Nocedal and Wright: the inverse curvature along the last step.
        scale=torch.where(good, safe_divide(sy, yy), memory.scale),
        steps=steps,
        changes=torch.cat([memory.changes[:, 1:], y], dim=1),
        products=torch.cat([torch.nn.functional.pad(memory.products[:, 1:, 1:], (0, 1)), last], dim=1),
    )


def _restart_lanes(failed: Tensor, state: State[LbfgsMemory], eps: float) -> State[LbfgsMemory]:
    """Restart failed lanes from steepest descent. A lane fails that has just restarted, or whose value has not
    decreased and gradient has not halved since the last restart."""
    memory = state.memory
    fresh = (memory.steps == 0).all(dim=2).all(dim=1)
    # Compare with the point of the last restart: a value lower by more than rounding, or half of the gradient, counts
    # as progress.
    here = torch.stack([memory.value.detach(), row_norm(memory.grad)], dim=-1)
    noise = 10 * eps * memory.magnitude
    nowhere = (here[:, 0] >= memory.mark[:, 0] - noise) & (2 * here[:, 1] >= memory.mark[:, 1])
    eye = torch.eye(memory.products.shape[1], dtype=memory.products.dtype, device=memory.products.device)
    return state._replace(
        status=torch.where(failed & (fresh | nowhere), int(Status.LINE_SEARCH_FAILED), state.status),
        memory=memory._replace(
            scale=torch.where(failed, unit_step(memory.grad), memory.scale),
            steps=select(failed, torch.zeros_like(memory.steps), memory.steps),
            changes=select(failed, torch.zeros_like(memory.changes), memory.changes),
            products=select(failed, eye.expand_as(memory.products), memory.products),
            mark=select(failed, here, memory.mark),
        ),
    )
