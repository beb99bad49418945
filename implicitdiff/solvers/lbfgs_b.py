"""Limited-memory BFGS with bounds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Concatenate, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

import implicitdiff.solvers._loop.dense as _dense
import implicitdiff.solvers._loop.equations as _equations
from implicitdiff._torch.control import if_any
from implicitdiff._torch.trees import P, X
from implicitdiff.solvers._loop.bounds import Bound, Limits, limits_of, limits_on
from implicitdiff.solvers._loop.measures import composite_size
from implicitdiff.solvers._loop.method import IterativeMethod, Start
from implicitdiff.solvers._loop.options import SolverOptions, check_count, solver_factory
from implicitdiff.solvers._loop.problem import (
    BatchedProblem,
    largest_entry,
    row_dot,
    row_norm,
    safe_divide,
    select,
    vecmat,
)
from implicitdiff.solvers._loop.solver import Solver, make_solver
from implicitdiff.solvers._loop.state import State
from implicitdiff.solvers._loop.status import Status
from implicitdiff.solvers._steps.line_search import Segment, fields_at, search, unit_step


class LbfgsBMemory(NamedTuple):
    """The memory of `lbfgs_b`.

    Attributes:
        residual: ``x - clip(x - grad f(x))``, as one vector of length ``n``.
        value: ``f(x)``.
        grad: ``grad f(x)``.
        magnitude: the largest ``|f|`` so far, a measure of the rounding of its values.
        curvature: the initial Hessian is ``curvature I``.
        steps: the last changes ``s`` of ``x``, divided by their lengths, ``(history, n)``, the latest last; zero rows
            before the history is full.
        changes: the corresponding changes ``y`` of the gradient, divided by the lengths of the steps.
        mark: ``f`` and the error at the last failed line search, ``(2,)``; infinite before the first failure.
    """

    residual: Tensor
    value: Tensor
    grad: Tensor
    magnitude: Tensor
    curvature: Tensor
    steps: Tensor
    changes: Tensor
    mark: Tensor


@solver_factory
def lbfgs_b(
    objective_fn: Callable[Concatenate[X, P], Tensor],
    bounds: tuple[Bound, Bound],
    history: int = 10,
    **options: Unpack[SolverOptions],
) -> Solver[X, P, LbfgsBMemory]:
    r"""Make a solver of ``min f(x, *args)`` subject to ``lower <= x <= upper``, ``f`` smooth, by L-BFGS-B.

    An iteration minimises the quadratic model ``g'd + d'B d / 2`` twice: along the path ``clip(x - t g)`` up to the
    first local minimum, the Cauchy point, and then over the unknowns inside of their bounds at the Cauchy point. A line
    search for the strong Wolfe conditions follows, towards the clipped minimum and within the box. ``B`` is ``(y'y /
    s'y) I`` with the BFGS updates by the last steps. An iteration costs about one evaluation of ``f`` and its gradient,
    and ``O(history n)`` more, with one sort of the ``n`` unknowns. Pairs with ``s'y <= eps |s| |y|`` are skipped. A
    lane whose line search fails restarts from steepest descent; a lane fails that has just restarted, or has made no
    progress since the last restart.

    ``f`` is evaluated in the box only, except for differences that measure the size and the rounding of the error. The
    initial guess is moved into the box.

    The solution has the derivative of the condition ``x = clip(x - grad f, lower, upper)``. An unknown at a bound with
    a nonzero gradient moves with the bound only, and the other unknowns follow. An unknown at a bound with a zero
    gradient has two one-sided derivatives. The result is the derivative of the side that keeps the unknown at the
    bound, but rounding of the gradient may select the other side.

    Args:
        objective_fn: ``f(x, *args)``, a real number; ``x`` is a pytree.
        bounds: a pair ``(lower, upper)``, each a number, a tensor that broadcasts to every leaf of ``x``, a tree of
            these like ``x``, or None. They are differentiated and batched like what ``objective_fn`` captures. An
            unknown with two equal bounds is fixed.
        history: the number of steps to remember, at least 1.
        options: see `SolverOptions`.

    Raises:
        ValueError: ``history`` is less than 1, or ``bounds`` is not a pair. When solving: a lower bound
            exceeds the upper bound.

    Reference:
        Byrd, Lu, Nocedal and Zhu, "A limited memory algorithm for bound constrained optimization", SIAM J. Sci. Comput.
        16 (1995), sections 3 to 5; Morales and Nocedal, "Remark on Algorithm 778", ACM Trans. Math. Softw. 38 (2011),
        for the step to the clipped minimum.

    Example:
        >>> import torch
        >>> from implicitdiff.solvers import lbfgs_b
        >>> def rosenbrock(x, a):
        ...     return (a - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
        >>> def solution(upper):
        ...     return lbfgs_b(rosenbrock, (0.0, upper)).run(torch.zeros(2), torch.tensor(1.0))[0]
        >>> upper = torch.tensor([0.5, 5.0])
        >>> solution(upper)
        tensor([0.5000, 0.2500])
        >>> torch.func.jacrev(solution)(upper)  # of (u, u^2)
        tensor([[1., 0.],
                [1., 0.]])
    """
    check_count("lbfgs_b", "history", history)

    start = partial(_start, history=history)
    equation_of = partial(
        _equations.boxed_by, smooth_of=_equations.stationary_equation, limits=limits_of("lbfgs_b", bounds)
    )
    method = IterativeMethod(
        start, _step, LbfgsBMemory, 10_000, residual=attrgetter("residual"), size=_size, runs_off=Status.UNBOUNDED
    )
    return make_solver("lbfgs_b", equation_of, (objective_fn,), method, options)


def _start(problem: BatchedProblem, x: Tensor, *, history: int) -> Start[LbfgsBMemory]:
    limits = limits_on(problem)
    value, grad = problem.fn.value_and_grad(limits.clip(x))
    # The residual of the guess itself: a guess outside of the box is no solution.
    residual = limits.residual(x, grad)
    zeros = torch.zeros_like(x)[:, None].repeat(1, history, 1)
    memory = LbfgsBMemory(
        residual=residual,
        value=value,
        grad=grad,
        magnitude=value.detach().abs(),
        curvature=_first_curvature(limits, limits.clip(x), grad, problem.eps),
        steps=zeros,
        changes=zeros,
        # Infinite marks: the first restart counts as progress.
        mark=torch.full_like(x[:, :1].detach(), torch.inf).repeat(1, 2),
    )
    # The gradient of an infinite value may be finite: report such a guess as not finite.
    return Start(torch.where(torch.isfinite(value), row_norm(residual), torch.nan), memory)


def _size(problem: BatchedProblem, x: Tensor, memory: LbfgsBMemory) -> Tensor:
    return composite_size(problem, limits_on(problem).clip(x), memory.grad)


def _first_curvature(limits: Limits, x: Tensor, grad: Tensor, eps: float) -> Tensor:
    """Return 1 in a box, else ``max(1, |g|)``, so that the first step is no longer than 1, as in the code of the
    paper's authors. A step that would vanish in the rounding of ``x`` is lengthened."""
    is_box = (torch.isfinite(limits.lower) & torch.isfinite(limits.upper)).all(dim=-1)
    # Unknowns held at a bound do not move in the first step.
    pull = limits.free_gradient(x, grad)
    usual = torch.where(is_box, 1.0, 1 / unit_step(pull))
    # The first step is ``pull / curvature``: enlarge to ``sqrt(eps) |x|``, measured by largest entries.
    step, shortest = largest_entry(pull), eps ** (1 / 2) * largest_entry(x)
    return torch.where((step > 0) & (step < shortest * usual), safe_divide(step, shortest), usual)


def _step(problem: BatchedProblem, x: Tensor, state: State[LbfgsBMemory]) -> tuple[Tensor, State[LbfgsBMemory]]:
    old, limits = state.memory, limits_on(problem)
    x = limits.clip(x)
    # Minimise the model over the box, and search along the way to its minimum.
    direction = _model_minimum(old, limits, x, problem.eps) - x
    one = torch.ones_like(old.value)
    point, failed, status = search(problem, x, state, direction, one, segment=_segment(limits, x, direction))
    residual = limits.residual(point.x, point.grad)
    new = _append_scaled_pair(old, point.x - x, point.grad - old.grad, problem.eps)
    new = new._replace(**fields_at(old, point), residual=residual)
    state = state._replace(error=row_norm(residual), status=status, memory=new)
    restart = partial(_restart_in_box, failed, limits, point.x, problem.eps)
    return point.x, if_any(failed, restart, state)


def _segment(limits: Limits, x: Tensor, direction: Tensor) -> Segment:
    """Return the part of the line inside of the box; the line ends exactly at the first bound."""
    bound, known = limits.ahead(direction)
    # The step at which each unknown reaches its bound; the inner selections keep ``0 / 0`` out of the derivative.
    reach = torch.where(known, torch.where(known, bound - x, 1.0) / torch.where(known, direction, 1.0), torch.inf)

    def at(step: Tensor) -> Tensor:
        # Unknowns that have arrived take their bound exactly, without rounding of ``x + step d``.
        arrived = step[:, None] >= reach
        return torch.where(arrived, bound, limits.clip(x + torch.where(arrived, 0.0, step[:, None] * direction)))

    return Segment(reach.amin(dim=-1) if x.shape[-1] else torch.full_like(x.sum(dim=-1), torch.inf), at)


# --- the quadratic model ----------------------------------------------------------------------------------------------


class _Model(NamedTuple):
    """The model ``B = curvature I - W M W'``: compact form of Byrd, Nocedal and Schnabel, Math. Program. 63 (1994),
    theorem 2.3.

    The columns of ``W`` are the columns of ``Y D^(-1/2)`` and ``curvature^(1/2) S``, so that ``M^-1`` has entries of
    size 1 in any units; ``D`` has the products ``s'y`` on its diagonal.

    Attributes:
        curvature: ``(lanes, 1)``.
        W: ``(lanes, n, 2 history)``.
        inverse: ``M^-1``.
        M: the matrix ``M``.
    """

    curvature: Tensor
    W: Tensor
    inverse: Tensor
    M: Tensor


def _model(memory: LbfgsBMemory) -> _Model:
    """Return the model of a memory."""
    s, y, curvature = memory.steps, memory.changes, memory.curvature[:, None, None]
    # ``products[i, j]`` is ``s_i'y_j``, ``(lanes, history, history)``.
    products = s @ y.mT
    D = products.diagonal(dim1=-2, dim2=-1)
    # A pair of the history has ``s'y > 0``.
    absent = D == 0
    # ``B`` does not depend on the scales of the columns, so the scales need no derivative.
    a, b = torch.where(absent, 1.0, D.detach()).sqrt(), curvature.detach().sqrt()
    # ``M^-1 = [[-D, L'], [L, curvature S'S]]`` with ``L`` the strict lower triangle of ``S'Y``, scaled by rows and
    # columns. Absent pairs get -1 and 1 on the diagonal.
    lower = products.tril(-1) / (a[:, None] * b)
    above = torch.cat([torch.diag_embed(torch.where(absent, -1.0, -D / a**2)), lower.mT], dim=-1)
    squares = curvature / b**2 * (s @ s.mT) + torch.diag_embed(absent.to(s.dtype))
    inverse = torch.cat([above, torch.cat([lower, squares], dim=-1)], dim=-2)
    # A diagonal ``T`` that scales ``W`` to ``W T`` and ``M^-1`` to ``T M^-1 T`` leaves ``W M W'``.
    W = torch.cat([y / a[..., None], curvature / b * s], dim=1).mT
    return _Model(memory.curvature[:, None], W, inverse, _dense.invert_dense(inverse))


def _model_minimum(memory: LbfgsBMemory, limits: Limits, x: Tensor, eps: float) -> Tensor:
    """Return the minimum of the model over the unknowns that are free at the Cauchy point, clipped to the box."""
    model, grad = _model(memory), memory.grad
    # First the Cauchy point, which decides the active bounds, then Newton's step of the model in the free unknowns.
    cauchy, free = _cauchy_point(model, limits, x, grad, eps)
    step = _subspace_step(model, cauchy - x, grad, free)
    # A matrix that is singular to rounding gives no step: stay at the Cauchy point.
    step = torch.where(torch.isfinite(step).all(dim=-1, keepdim=True), step, 0.0)
    target = limits.clip(cauchy + step)
    uphill = ~(row_dot(target - x, grad) < 0)

    def to_bound(target: Tensor) -> Tensor:
        part = _segment(limits, cauchy, step)
        return select(uphill, part.at(torch.where(part.largest < 1, part.largest, 1.0)), target)

    # The model decreases towards its minimum, but possibly not towards the clipped minimum: stop at the first bound
    # instead.
    return if_any(uphill, to_bound, target)


def _cauchy_point(model: _Model, limits: Limits, x: Tensor, grad: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the first local minimum of the model along ``clip(x - t g)``, and the flags of unknowns inside of their
    bounds there.

    The path is straight between two consecutive times at which unknowns reach their bounds. Piece ``j`` begins at the
    time ``t_j`` with the displacement ``z_j`` and has the direction ``d_j``. With ``p_j = W'd_j`` and ``c_j = W'z_j``::

        m' = - d_j'd_j + curvature t_j d_j'd_j - p_j'M c_j,    m'' = curvature d_j'd_j - p_j'M p_j

    (section 4 of the paper). All pieces are computed at once, by sums over the unknowns in the order of their times.
    """
    bound, known = limits.ahead(-grad)
    time = torch.where(known, (x - torch.where(known, bound, x)) / torch.where(known, grad, 1.0), torch.inf)
    # An unknown at the bound against which its gradient presses has the time 0, and never moves.
    d = torch.where(time > 0, -grad, 0.0)

    # Sort the unknowns by the times at which they reach their bounds: piece ``j`` moves the unknowns from ``j`` on.
    order = time.argsort(dim=-1)
    sorted_time, sorted_d = time.gather(-1, order), d.gather(-1, order)
    # ``images[:, i]`` is ``d_i W_i``, ``(lanes, n, 2 history)``. ``p_j`` sums the images of the unknowns that still
    # move.
    images = sorted_d[..., None] * model.W.gather(1, order[..., None].expand_as(model.W))
    begin = _with_zero_in_front(sorted_time)
    end = torch.cat([sorted_time, torch.full_like(sorted_time[:, :1], torch.inf)], dim=-1)
    # A piece beginning at infinity is never reached; the 0 keeps ``inf * 0`` out of the sums.
    finite = torch.where(torch.isfinite(sorted_time), sorted_time, 0.0)
    p, square = _sums_from_here(images), _sums_from_here(sorted_d.square()[..., None])[..., 0]
    # ``c_j = W'z_j``: a stopped unknown contributes ``t_i d_i W_i``, a moving unknown ``t_j d_i W_i``.
    c = _with_zero_in_front((finite[..., None] * images).cumsum(dim=1)) + _with_zero_in_front(finite)[..., None] * p
    Mp = p @ model.M
    # Slope and second derivative of the model at the begin of each piece, as in the docstring.
    bent = model.curvature * square
    # ``m' = g'd + d'B z`` with ``g'd = -d'd`` and ``z'd = t d'd``, because ``d`` is ``-g`` or 0, and a moving unknown
    # has gone ``t d_i``.
    slope = _with_zero_in_front(finite) * bent - square - (Mp * c).sum(dim=-1)
    second = bent - (Mp * p).sum(dim=-1)
    # The model is convex: a second derivative of rounding size counts as rounding of 0.
    second = torch.where(second > eps * bent, second, eps * bent)
    ahead = torch.where(slope < 0, safe_divide(-slope, second), 0.0)
    # The minimum lies in the first piece that does not decrease to its end.
    passed = ~((slope >= 0) | (begin + ahead <= end))
    # The number of leading pieces that decrease to their ends.
    piece = passed.to(torch.int64).cumprod(dim=-1).sum(dim=-1, keepdim=True)
    # The last piece ends at infinity, so only nan passes the last piece.
    piece = piece.clamp(max=x.shape[-1])
    stop = (begin + ahead).gather(-1, piece)

    free = (time > stop) & (limits.lower < limits.upper)
    # Unknowns that have reached their bounds are exactly at them, not up to rounding.
    path = torch.where(free, limits.clip(x + torch.where(free, stop, 0.0) * d), torch.where(known, bound, x))
    return path, free


def _with_zero_in_front(t: Tensor) -> Tensor:
    """Prepend a zero along dimension 1."""
    return torch.cat([torch.zeros_like(t[:, :1]), t], dim=1)


def _sums_from_here(t: Tensor) -> Tensor:
    """Return the sums over all entries from each entry on, and 0 at the end; differences of total sums would cancel."""
    return _with_zero_in_front(t.flip(1).cumsum(dim=1)).flip(1)


def _subspace_step(model: _Model, z: Tensor, grad: Tensor, free: Tensor) -> Tensor:
    """Return the step from the Cauchy point ``x + z`` to the minimum of the model over the free unknowns:
    ``- B_FF^-1 r`` for the gradient ``r`` of the model there, by the formula of Sherman, Morrison and Woodbury (section
    5.1 of the paper)."""
    # With zero rows for the fixed unknowns ``W'W`` is ``W_F'W_F``, and all lanes keep the shape ``(n, 2 history)``.
    W = torch.where(free[..., None], model.W, 0.0)
    # The gradient ``g + B z`` of the model at the Cauchy point.
    r = grad + model.curvature * z - vecmat(vecmat(vecmat(z, model.W), model.M), model.W.mT)
    r = torch.where(free, r, 0.0)
    # ``B_FF^-1 = (I + W_F N^-1 W_F' / curvature) / curvature`` with ``N = M^-1 - W_F'W_F / curvature``.
    small = model.inverse - W.mT @ W / model.curvature[..., None]
    return -(r + vecmat(_dense.solve_dense(small, vecmat(r, W)), W.mT) / model.curvature) / model.curvature


# --- the history ------------------------------------------------------------------------------------------------------


def _append_scaled_pair(memory: LbfgsBMemory, s: Tensor, y: Tensor, eps: float) -> LbfgsBMemory:
    """Append a pair to the history if its curvature is positive."""
    # ``B`` does not depend on the length of a pair, so the length needs no derivative.
    length = row_norm(s)
    s, y = (safe_divide(t, length[:, None].expand_as(t)) for t in (s, y))
    sy, yy = row_dot(s, y), row_dot(y, y)
    good = (sy > eps * row_norm(y)) & (yy > 0) & torch.isfinite(yy)
    # ``y'y / s'y`` does not change if both vectors are divided by ``|s|``.
    curvature = torch.where(good, yy, 1.0) / torch.where(good, sy, 1.0)
    return memory._replace(
        curvature=torch.where(good, curvature, memory.curvature),
        # Lane by lane: a skipped pair takes no place.
        steps=select(good, torch.cat([memory.steps[:, 1:], s[:, None]], dim=1), memory.steps),
        changes=select(good, torch.cat([memory.changes[:, 1:], y[:, None]], dim=1), memory.changes),
    )


def _restart_in_box(
    failed: Tensor, limits: Limits, x: Tensor, eps: float, state: State[LbfgsBMemory]
) -> State[LbfgsBMemory]:
    """Restart failed lanes from steepest descent. A lane fails that has just restarted, or whose value has not
    decreased and error has not halved since the last restart."""
    memory = state.memory
    fresh = (memory.steps == 0).all(dim=2).all(dim=1)
    # Progress since the last restart: a value lower by more than rounding, or half of the error.
    here = torch.stack([memory.value.detach(), row_norm(memory.residual)], dim=-1)
    noise = 10 * eps * memory.magnitude
    nowhere = (here[:, 0] >= memory.mark[:, 0] - noise) & (2 * here[:, 1] >= memory.mark[:, 1])
    return state._replace(
        status=torch.where(failed & (fresh | nowhere), int(Status.LINE_SEARCH_FAILED), state.status),
        memory=memory._replace(
            curvature=torch.where(failed, _first_curvature(limits, x, memory.grad, eps), memory.curvature),
            steps=select(failed, torch.zeros_like(memory.steps), memory.steps),
            changes=select(failed, torch.zeros_like(memory.changes), memory.changes),
            mark=select(failed, here, memory.mark),
        ),
    )
