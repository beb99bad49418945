"""Quadratic programs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import implicitdiff._torch.trees as pytree
import implicitdiff.solvers._loop.dense as _dense
import implicitdiff.solvers._qp.admm as _admm
from implicitdiff.solvers._loop.equations import Equation, Functions
from implicitdiff.solvers._loop.method import IterativeMethod, Start
from implicitdiff.solvers._loop.problem import BatchedProblem, all_of, any_lane, select, vecmat
from implicitdiff.solvers._loop.solver import Solver, make_solver
from implicitdiff.solvers._loop.state import State
from implicitdiff.solvers._loop.status import Status
from implicitdiff.solvers._qp.interior import interior_point
from implicitdiff.solvers._qp.kkt_solve import solve_kkt
from implicitdiff.solvers._qp.polish import active_set, picked, polish, put, regularisation
from implicitdiff.solvers._qp.program import (
    PrimalDual,
    QuadraticProgram,
    certificates,
    clamp_to_bounds,
    error_parts,
    factor,
    kkt_error,
    kkt_violation,
    of_active_rows,
    point,
    program,
    rounding_of_parts,
    without_noise,
)
from implicitdiff.solvers.kkt import KKTSolution


class QPMemory(NamedTuple):
    """The memory of `qp`, with ``m`` constraints of both kinds.

    Attributes:
        image: ``A x`` and ``G x``, ``(m,)``.
        slope: the gradient of the Lagrangian, ``(n,)``.
        values: what ADMM has in the place of ``image``, at which the constraints hold.
        rho: the step size of ADMM.
        factor: what an iteration solves with: a Cholesky factor, or without inequalities the inverse of the matrix of
            the KKT conditions.
        review: the number of the next iteration after which the active constraints are guessed, what makes a solution
            impossible is looked for, and ``rho`` is adapted.
        record: the least error of those that a guess has led to.
    """

    image: Tensor
    slope: Tensor
    values: Tensor
    rho: Tensor
    factor: Tensor
    review: Tensor
    record: Tensor


def qp(**options: Any) -> Solver:
    r"""Make a solver of convex quadratic programs.

    These are::

        min x'Q x / 2 + c'x    subject to    A x = b,    l <= G x <= h.

    ``solver.run(init, Q, c, A, b, G, h, l)`` returns a `KKTSolution` and the state. What is absent is None, and may be
    left out at the end; its multipliers are then empty, not None, so that they can leave a vmap. The solution is
    differentiable in all seven by the KKT conditions::

        Q x + c + A' dual_eq + G' dual_ineq = 0,    A x = b,    clip(G x + dual_ineq, l, h) = G x.

    A row has one multiplier: positive at the upper bound ``h``, negative at the lower bound ``l``, and zero in between.
    Without ``l`` the last equation is ``min(dual_ineq, h - G x) = 0``. An infinite entry of ``h`` or ``l`` is no bound,
    and equal entries make the row an equality.

    Without inequalities these are a linear system, and one factorisation solves it. With them: ADMM, as OSQP has it
    (over-relaxation, a ``rho`` that adapts). After 10, 20, 40, ... iterations (later if there are more than 100
    unknowns, and at once if ``init`` has multipliers) the active constraints are guessed, by a step of a proximal
    method of multipliers from there, or from where an interior-point method arrives, or by a longer search. The
    equations that hold if these are the ones are solved by iterative refinement, and what that gives is taken where its
    error is smaller; if the guess is right, it is exact but for rounding.

    - The units of rows and of unknowns do not matter: a row of ``G``, ``l`` and ``h`` (of ``A`` and ``b``) may be
      multiplied by any number, and an unknown measured in another unit, without effect on the iterations. Rows and
      columns are equilibrated, and the errors are those of the scaled program, so ``atol`` is a number without units.
    - ``Q``, which need not be symmetric, counts as ``(Q + Q') / 2``, also in its derivative. It has to be positive
      semidefinite on the null space of ``A``. If it is not, then without inequalities the status is ``UNBOUNDED``, and
      with them, where all of it may be, ``DIVERGED``.
    - A direction that proves that there is no solution sets ``INFEASIBLE`` or ``UNBOUNDED``, lane by lane. If neither
      the constraints nor those of the dual can be satisfied, either may be found.
    - A linear program has ``Q = 0``.
    - Linearly dependent active constraints, such as a row given twice, leave the multipliers undetermined. The
      derivative of the primal is that along changes that keep the dependence, with the multipliers' tangents those of
      least norm; reverse mode shares it equally among copies of a row. In forward mode a change that makes dependent
      constraints contradict each other raises `LinearSolveError`, in reverse mode a cotangent of multipliers that are
      not unique.
    - Where the minimiser is not unique, the derivative is not either: it raises `LinearSolveError`, or is the one of
      least norm with ``qp(solve=solve_lstsq())``.
    - A constraint that touches without pressing (``G x = h`` with a multiplier that is zero but for rounding) has a
      derivative to each side. In all arguments the one returned is that of the program without this constraint, which
      holds for changes that make it inactive.
    - The first error, to which ``rtol`` refers, is that at zero, whatever ``init`` is: of the gradient and of the
      constraints there the smaller. What is left of either part may be as large as rounding makes it.
    - Matrices are dense. The factorisations need their entries, so functions in their place are not taken; for
      ``Q``, ``A`` and ``G`` as products only, differentiate a solver of your own by `make_kkt_optimality_fn` and
      `implicitdiff.custom_root`.

    ``init`` is None for zeros, a tensor like ``c``, or a `KKTSolution`,
    with None for multipliers that are zero. ``update`` takes and gives a `KKTSolution`. All tensors have one dtype; a
    batch of problems is vmapped.

    Args:
        options: see `implicitdiff.solvers`. The default of ``solve`` is `solve_auto` with matrices of up to 4000 rows.

    Raises (when solving):
        TypeError: an argument is no real floating-point tensor.
        ValueError: shapes, dtypes or devices do not match, or a matrix is given without its right-hand side.
        ConvergenceError: there is no solution, or none was found, as ``on_failure`` says.

    Raises (when differentiating):
        LinearSolveError: the derivative is not determined.

    References:
        Stellato et al., "OSQP: an operator splitting solver for quadratic programs", Math. Prog. Comp. 12 (2020).
        Mehrotra, "On the implementation of a primal-dual interior point method", SIAM J. Optim. 2 (1992).

    Example:
        >>> import torch
        >>> from implicitdiff.solvers import qp
        >>> Q, c = torch.tensor([[4.0, 1.0], [1.0, 2.0]]), torch.tensor([1.0, 1.0])
        >>> A = torch.tensor([[1.0, 1.0]])
        >>> solution, state = qp().run(None, Q, c, A, torch.tensor([1.0]))
        >>> solution.primal, solution.dual_eq
        (tensor([0.2500, 0.7500]), tensor([-2.7500]))
        >>> torch.func.jacrev(lambda b: qp().run(None, Q, c, A, b)[0].primal)(torch.tensor([1.0]))
        tensor([[0.2500],
                [0.7500]])
        >>> l, h = torch.tensor([0.0, -1.0]), torch.tensor([1.0, 1.0])
        >>> qp().run(None, Q, c, None, None, torch.eye(2), h, l)[0].dual_ineq  # at the lower bound of the first row
        tensor([-0.5000,  0.0000])
    """
    method = IterativeMethod(_start, _step, QPMemory, 10_000, is_judged=False)
    solve = options.get("solve") or solve_kkt(options.get("on_failure", "raise"))
    return make_solver("qp", _kkt, (data,), method, {**options, "solve": solve}, _filled_guess, is_named=True)


# --- what the user gives ----------------------------------------------------------------------------------------------

_Data = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def data(
    x: Any,
    Q: Tensor,
    c: Tensor,
    A: Tensor | None = None,
    b: Tensor | None = None,
    G: Tensor | None = None,
    h: Tensor | None = None,
    l: Tensor | None = None,  # noqa: E741
) -> _Data:
    """In the place of the user's function: all that makes a program, symmetric and with everything in it."""
    no_rows, nothing = c.new_zeros((0, *c.shape)), c.new_zeros((0,))
    A, G = (no_rows if t is None else t for t in (A, G))
    b, h, lower = (nothing if t is None else t for t in (b, h, l))
    return 0.5 * (Q + Q.mT), c, A, b, G, h, lower


def _filled_guess(
    init: Any,
    Q: Any,
    c: Any,
    A: Any = None,
    b: Any = None,
    G: Any = None,
    h: Any = None,
    l: Any = None,  # noqa: E741
) -> KKTSolution:
    """The initial guess with everything in it, as far as the shapes allow."""
    _check_data({"Q": Q, "c": c, "A": A, "b": b, "G": G, "h": h, "l": l})
    like = KKTSolution(*(c.new_zeros((0,)) if t is None else torch.zeros_like(t) for t in (c, b, h)))
    given = init if isinstance(init, KKTSolution) else KKTSolution(init)
    filled = KKTSolution(*(zero if t is None else t for t, zero in zip(given, like, strict=True)))
    for name, t, zero in zip(KKTSolution._fields, filled, like, strict=True):
        if not (isinstance(t, Tensor) and t.shape == zero.shape and t.dtype == zero.dtype):
            raise ValueError(
                f"qp: the initial guess must be None, a tensor like c or a KKTSolution; its {name} must be "
                f"{pytree.describe(zero)}, got {pytree.describe(t)}"
            )
    return filled


def _check_data(named: dict[str, Any]) -> None:
    for name, t in named.items():
        if not (isinstance(t, Tensor) and t.is_floating_point()) and (t is not None or name in "Qc"):
            raise TypeError(f"qp: {name} must be a real floating-point tensor, got {pytree.describe(t)}")
    for matrix, vector in ("Ab", "Gh"):
        if (named[matrix] is None) != (named[vector] is None):
            raise ValueError(f"qp: {matrix} and {vector} go together: give both, or None for both")
    if named["l"] is not None and named["G"] is None:
        raise ValueError("qp: l are lower bounds of G x: give G and h with it (h may be infinite)")
    n, p, m = (t.shape[0] if isinstance(t, Tensor) and t.dim() else 0 for t in (named[name] for name in "cbh"))
    expected = {"Q": (n, n), "c": (n,), "A": (p, n), "b": (p,), "G": (m, n), "h": (m,), "l": (m,)}
    given = {name: t for name, t in named.items() if t is not None}
    if any(tuple(t.shape) != expected[name] for name, t in given.items()):
        raise ValueError(
            "qp: for n unknowns the shapes must be Q (n, n), c (n,), A (p, n), b (p,), G (m, n), h (m,), l (m,), with "
            f"batches by vmap, got {', '.join(f'{name} {tuple(t.shape)}' for name, t in given.items())}"
        )
    if len({(t.dtype, t.device) for t in given.values()}) > 1:
        raise ValueError(f"qp: all arguments must have one dtype and device, got {pytree.describe(given)}")


def _kkt(fn: Callable[..., _Data]) -> Equation:
    def on_trees(functions: Functions, x: KKTSolution, args: tuple[Any, ...]) -> KKTSolution:
        Q, c, A, b, G, h, lower = functions["fn"](x, args)
        return KKTSolution(
            Q @ x.primal + c + A.mT @ x.dual_eq + G.mT @ x.dual_ineq,
            A @ x.primal - b,
            _complementarity(x.primal, x.dual_ineq, G, h, lower),
        )

    def on_rows(problem: BatchedProblem, x: Tensor) -> Tensor:
        of, n = problem.once(_program), problem.inputs.sizes[0]
        return torch.cat(kkt_violation(of, point(of, x[:, :n], x[:, n:])), dim=-1)

    return Equation({"fn": lambda x, args: fn(x, *args)}, on_trees, on_rows)


def _complementarity(x: Tensor, y: Tensor, G: Tensor, h: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """Zero where the row is at the bound on which ``y`` presses, or ``y`` is zero and the bounds hold.

    Which of these it is does not depend on units: the search has set the multipliers to zero that are rounding.
    """
    up = h - G @ x
    at_upper = y > 0
    if not l.numel():
        return torch.where(at_upper, up, y + up.detach().clamp(max=0))
    down = l - G @ x
    kkt_violation = up.clamp(max=0) + down.clamp(min=0)
    inactive = torch.where(h == l, 0.5 * (up + down), y + kkt_violation.detach())
    return torch.where(at_upper, up, torch.where(y < 0, down, inactive))


def _program(problem: BatchedProblem) -> QuadraticProgram:
    n, p, m = problem.inputs.sizes
    unused = torch.zeros(
        math.prod(problem.inputs.batch), n + p + m, dtype=problem.inputs.dtype, device=problem.inputs.device
    )
    values = problem.fn(unused)
    sizes = [n * n, n, p * n, p, m * n, m]
    Q, c, A, b, G, h, lower = values.split([*sizes, values.shape[-1] - sum(sizes)], dim=-1)
    Q, A, G = (t.unflatten(-1, (k, n)) for t, k in ((Q, n), (A, p), (G, m)))
    return program(Q, c, A, b, G, h, lower)


# --- the iteration ----------------------------------------------------------------------------------------------------

_GUESSES = 3
"""How many active sets to try in a review."""


def _first_review(problem: BatchedProblem) -> int:
    """The more unknowns there are, the more iterations a guess costs."""
    return min(max(problem.inputs.sizes[0] // 10, 10), 100)


def _start(problem: BatchedProblem, x: Tensor) -> Start:
    of = problem.once(_program)
    n, _, inequalities = problem.inputs.sizes
    at = point(of, x[:, :n], x[:, n:])
    error, zero = kkt_error(of, at), torch.zeros_like
    # Of the two parts of the first error, at zero, the smaller that is not zero: a target for the units of the larger
    # would hide the other.
    parts = torch.stack(error_parts(of, point(of, zero(at.x), zero(at.y))))
    first = torch.where(parts > 0, parts, torch.inf).amin(dim=0)
    delta, shift = regularisation(problem.eps)
    # Q is positive on the null space of A if it is so with A'A added often enough.
    _, curved = factor(of, torch.where(of.equal, of.rows / delta, 0.0), shift, problem.plain)
    why = int(Status.DIVERGED if inequalities else Status.UNBOUNDED)
    status = torch.where(curved & torch.isfinite(error), why, int(Status.RUNNING))
    crossed = torch.isposinf(of.l) | torch.isneginf(of.u) | (of.below & of.above & (of.l > of.u))
    status = torch.where(crossed.any(dim=-1), int(Status.INFEASIBLE), status)
    rho = torch.full_like(error, _admm.RHO)
    warm = (at.y.detach() != 0).any(dim=-1)
    memory = QPMemory(
        image=at.image,
        slope=at.slope,
        values=clamp_to_bounds(of, at.image),
        rho=rho,
        factor=_admm.admm_factor(of, rho) if inequalities else _kkt_inverse(of, problem.eps),
        review=torch.where(warm, 1, _first_review(problem)),
        record=torch.full_like(error, torch.inf),
    )
    return Start(error, memory, status, reference=torch.where(torch.isinf(first), error, first))


def _step(problem: BatchedProblem, x: Tensor, state: State[QPMemory]) -> tuple[Tensor, State[QPMemory]]:
    of = problem.once(_program)
    n, _, inequalities = problem.inputs.sizes
    at = PrimalDual(x[:, :n], x[:, n:], state.memory.image, state.memory.slope)
    new, after = (_admm_step if inequalities else _newton_on_kkt)(problem, of, at, state)
    running = after.status == Status.RUNNING
    there = running & (after.error <= after.target)
    # ADMM alone does not come down to rounding.
    if not inequalities or any_lane(after.memory.review != state.memory.review):
        there = there | (running & _parts_converged(problem, of, new, after))
    if inequalities and any_lane(there):
        # The derivative takes a row with a multiplier for an active one.
        new = _select_point(there, point(of, new.x, of_active_rows(of, new)), new)
        clear = point(of, new.x, without_noise(of, new, problem.eps))
        new = _select_point(there & _parts_converged(problem, of, clear, after), clear, new)
    status = torch.where(there, int(Status.CONVERGED), after.status)
    memory = after.memory._replace(image=new.image, slope=new.slope)
    return torch.cat([new.x, new.y], dim=-1), after._replace(status=status, memory=memory)


def _select_point(where: Tensor, new: PrimalDual, old: PrimalDual) -> PrimalDual:
    return PrimalDual(*(select(where, a, b) for a, b in zip(new, old, strict=True)))


def _parts_converged(problem: BatchedProblem, of: QuadraticProgram, at: PrimalDual, state: State[QPMemory]) -> Tensor:
    # No part of the error can be made smaller than rounding makes it.
    pairs = zip(error_parts(of, at), rounding_of_parts(of, at, problem.eps), strict=True)
    return all_of([part <= torch.maximum(state.target, floor) for part, floor in pairs])


def _kkt_inverse(of: QuadraticProgram, eps: float) -> Tensor:
    """The inverse of ``[[Q, C'], [C, 0]]``, shifted by so little that the corrections make up for it."""
    delta = eps**0.75
    shift = torch.cat([delta * of.columns, -delta / of.rows], dim=-1)
    upper = torch.cat([of.Q, of.C.mT], dim=-1)
    lower = torch.cat([of.C, torch.zeros_like(of.C @ of.C.mT)], dim=-1)
    return _dense.invert_dense(torch.cat([upper, lower], dim=-2) + torch.diag_embed(shift))


def _newton_on_kkt(
    problem: BatchedProblem, of: QuadraticProgram, at: PrimalDual, state: State[QPMemory]
) -> tuple[PrimalDual, State[QPMemory]]:
    """Newton's method on the linear KKT conditions; once is enough but for rounding."""
    d = -vecmat(torch.cat([at.slope, at.image - of.u], dim=-1), state.memory.factor.mT)
    dx, dy = d.split([at.x.shape[-1], at.y.shape[-1]], dim=-1)
    new = point(of, at.x + dx, at.y + dy)
    error = kkt_error(of, new)
    stuck = (error > state.target) & ~(error < 0.5 * state.error)
    status = _with_certificates(of, dx, dy, problem.eps, stuck, state.status) if any_lane(stuck) else state.status
    return new, state._replace(error=error, status=status)


def _admm_step(
    problem: BatchedProblem, of: QuadraticProgram, at: PrimalDual, state: State[QPMemory]
) -> tuple[PrimalDual, State[QPMemory]]:
    new, values = _admm.admm_iteration(of, at, state.memory.values, state.memory.rho, state.memory.factor)
    state = state._replace(error=kkt_error(of, new), memory=state.memory._replace(values=values))
    due = (state.status == Status.RUNNING) & (state.iter_num + 1 >= state.memory.review) & (state.error > state.target)
    if any_lane(due):
        status = _with_certificates(of, new.x - at.x, new.y - at.y, problem.eps, due, state.status)
        new, state = _try_active_sets(problem, of, new, state._replace(status=status), due)
        state = _adapt_rho(problem, of, new, state, due & (state.error > state.target))
    return new, state


def _with_certificates(
    of: QuadraticProgram, dx: Tensor, dy: Tensor, eps: float, asked: Tensor, status: Tensor
) -> Tensor:
    infeasible, unbounded = certificates(of, dx, dy, eps)
    status = torch.where(asked & unbounded, int(Status.UNBOUNDED), status)
    return torch.where(asked & infeasible, int(Status.INFEASIBLE), status)


def _try_active_sets(
    problem: BatchedProblem, of: QuadraticProgram, at: PrimalDual, state: State[QPMemory], due: Tensor
) -> tuple[PrimalDual, State[QPMemory]]:
    """The best of the points that some guesses of the active set lead to, where it is better."""
    again = torch.clamp(2 * (state.iter_num + 1), min=_first_review(problem))
    memory = state.memory._replace(review=torch.where(due, again, state.memory.review))
    state = state._replace(memory=memory)
    x, y, asked, first = at.x, at.y, due, due & torch.isinf(state.memory.record)
    for guess in range(_GUESSES):
        if not any_lane(asked):
            break
        lanes = picked(asked, problem.plain)
        part, near = of.of(lanes), (x[lanes], y[lanes])
        if guess == 1:
            if not any_lane(asked & first):
                continue
            inner_x, inner_y = interior_point(part, problem.eps)
            near = select(first[lanes], inner_x, near[0]), select(first[lanes], inner_y, near[1])
            x, y = put(x, asked, lanes, near[0]), put(y, asked, lanes, near[1])
        ahead = active_set(part, *near, problem.eps, problem.plain, patient=guess > 1)
        at, state = _take_polished(problem, part, at, state, ahead, asked, lanes)
        asked = asked & (state.error > state.target) & (state.status == Status.RUNNING)
    return at, state


def _take_polished(
    problem: BatchedProblem,
    part: QuadraticProgram,
    at: PrimalDual,
    state: State[QPMemory],
    ahead: tuple[Tensor, Tensor, Tensor],
    asked: Tensor,
    lanes: Tensor | slice,
) -> tuple[PrimalDual, State[QPMemory]]:
    """The point that a guess of the active set leads to, in the `asked` lanes, whose program is `part`; `ahead` is what
    `active_set` gives."""
    x, y, side = ahead
    found, dx, dy, broken = polish(part, x, y, side, problem.eps, problem.plain)
    error, before, target, record = (
        kkt_error(part, found),
        state.error[lanes],
        state.target[lanes],
        state.memory.record[lanes],
    )
    # Every guess that is taken, but for the last, has a tenth of the error of the one before, lest they take turns.
    better = ~broken & (error < before) & ((error <= target) | (error < 0.1 * record))
    values = clamp_to_bounds(part, torch.where(side > 0, part.u, torch.where(side < 0, part.l, found.image)))
    status = _with_certificates(part, dx, dy, problem.eps, ~broken & (error > target), state.status[lanes])

    def merged(old: Tensor, new: Tensor) -> Tensor:
        return put(old, asked, lanes, select(better, new, old[lanes]))

    old = state.memory
    memory = old._replace(record=merged(old.record, error), values=merged(old.values, values))
    return PrimalDual(*(merged(old, new) for old, new in zip(at, found, strict=True))), state._replace(
        error=merged(state.error, error), status=put(state.status, asked, lanes, status), memory=memory
    )


def _adapt_rho(
    problem: BatchedProblem, of: QuadraticProgram, at: PrimalDual, state: State[QPMemory], due: Tensor
) -> State[QPMemory]:
    rho = torch.where(due, _admm.balanced_rho(of, at, state.memory.values, state.memory.rho), state.memory.rho)
    changed = rho != state.memory.rho
    if not any_lane(changed):
        return state
    lanes = picked(changed, problem.plain)
    lower = put(state.memory.factor, changed, lanes, _admm.admm_factor(of.of(lanes), rho[lanes]))
    return state._replace(memory=state.memory._replace(rho=rho, factor=lower))
