"""Quadratic programs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

import implicitdiff._torch.settings as _settings
import implicitdiff._torch.trees as pytree
import implicitdiff.solvers._loop.dense as _dense
import implicitdiff.solvers._qp.admm as _admm
from implicitdiff._torch.trees import Tree
from implicitdiff.solvers._loop.equations import Equation, Functions
from implicitdiff.solvers._loop.method import IterativeMethod, Start
from implicitdiff.solvers._loop.options import SolverOptions, solver_factory
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
    make_point,
    make_program,
    of_active_rows,
    rounding_of_parts,
    without_noise,
)
from implicitdiff.solvers.kkt import KKTSolution


class QPMemory(NamedTuple):
    """The memory of `qp`, with ``m`` constraints of both kinds.

    Attributes:
        image: ``A x`` and ``G x``, ``(m,)``.
        slope: the gradient of the Lagrangian, ``(n,)``.
        values: ADMM's copy of ``image``, within the bounds.
        rho: the step size of ADMM.
        factor: the factor for the linear systems of the iteration: a Cholesky factor, or without inequalities the
            inverse of the KKT matrix.
        review: the number of the next iteration followed by a review: guesses of the active constraints, tests for
            certificates, and an update of ``rho``.
        record: the smallest error of an accepted guess.
        best: the unknowns at the review that halved the error last.
        least: the error there.
        halved: the number of the iteration.
    """

    image: Tensor
    slope: Tensor
    values: Tensor
    rho: Tensor
    factor: Tensor
    review: Tensor
    record: Tensor
    best: Tensor
    least: Tensor
    halved: Tensor


@solver_factory
def qp(**options: Unpack[SolverOptions]) -> Solver[Tree, ..., QPMemory]:
    r"""Make a solver of convex quadratic programs.

    A program is::

        min x'Q x / 2 + c'x    subject to    A x = b,    l <= G x <= h.

    ``solver.run(init, Q, c, A, b, G, h, l)`` returns a `KKTSolution` and the state. Absent arguments are None, and may
    be omitted at the end. Multipliers of absent constraints are empty tensors, which unlike None can leave a vmap. The
    solution is differentiable in all seven arguments by the KKT conditions::

        Q x + c + A' dual_eq + G' dual_ineq = 0,    A x = b,    clip(G x + dual_ineq, l, h) = G x.

    A row has a single multiplier: positive at the upper bound ``h``, negative at the lower bound ``l``, zero in
    between. Without ``l`` the last equation is ``min(dual_ineq, h - G x) = 0``. Infinite entries of ``h`` or ``l`` mean
    no bound, equal entries an equality.

    Without inequalities the conditions are a linear system, solved by a single factorisation. With inequalities the
    method is ADMM as in OSQP, with over-relaxation and an adaptive ``rho``. After 10, 20, 40, ... iterations (later for
    more than 100 unknowns, at once for an ``init`` with multipliers) the solver guesses the active constraints: by a
    step of a proximal method of multipliers from the present point, then from the end of an interior-point method, then
    by a longer search. Iterative refinement solves the equations of the guessed active set, and the result replaces the
    present point if its error is smaller. For a correct guess the result is exact up to rounding. From iteration 1280
    on the status is ``STALLED``, at the best point, if the error has not halved since an eighth of the iterations.

    - Units of rows and of unknowns do not matter: multiplying a row of ``G``, ``l`` and ``h`` (of ``A`` and ``b``) by a
      number, or measuring an unknown in another unit, does not affect the iterations. Rows and columns are
      equilibrated, and errors refer to the scaled program, so ``atol`` has no units.
    - ``Q`` need not be symmetric; the program and its derivative use ``(Q + Q') / 2``. ``Q`` must be positive
      semidefinite on the null space of ``A``. Otherwise the status is ``UNBOUNDED`` without inequalities, and
      ``DIVERGED`` with inequalities.
    - A certificate, a direction that proves that no solution exists, sets the status ``INFEASIBLE`` or ``UNBOUNDED``,
      lane by lane. If both the program and its dual are infeasible, either status may result.
    - A linear program has ``Q = 0``.
    - Linearly dependent active constraints, such as a repeated row, leave the multipliers undetermined. The derivative
      of the primal refers to changes that keep the dependence, with multipliers' tangents of least norm; reverse mode
      distributes the derivative equally among copies of a row. `LinearSolveError` is raised in forward mode for a
      change that makes dependent constraints contradict each other, and in reverse mode for a cotangent of multipliers
      that are not unique.
    - The derivative of a minimiser that is not unique raises `LinearSolveError`, or is the derivative of least norm
      with ``qp(solve=solve_lstsq())``.
    - A weakly active constraint (``G x = h`` with a multiplier of zero up to rounding) has a derivative for each side.
      The result, in all arguments, is the derivative of the program without the constraint, valid for changes that make
      the constraint inactive.
    - The first error, to which ``rtol`` refers, is the error at zero for any ``init``: the smaller of the errors of the
      gradient and of the constraints. Each part of the final error may be as large as its rounding.
    - Matrices are dense, because factorisations need their entries. For ``Q``, ``A`` and ``G`` as functions, write a
      solver and differentiate by `make_kkt_optimality_fn` and `implicitdiff.custom_root`.

    ``init`` is None for zeros, a tensor like ``c``, or a `KKTSolution` with None for multipliers of zero. ``update``
    takes and returns a `KKTSolution`. All tensors have the same dtype; vmap solves a batch of programs.

    Args:
        options: see `SolverOptions`. The default of ``solve`` is `solve_auto` with matrices of up to 4000 rows.

    Raises (when solving):
        TypeError: an argument is not a real floating-point tensor.
        ValueError: shapes, dtypes or devices do not match, or a matrix is given without its right-hand side.
        ConvergenceError: no solution exists, or the search failed, subject to ``on_failure``.

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
    x: KKTSolution,
    Q: Tensor,
    c: Tensor,
    A: Tensor | None = None,
    b: Tensor | None = None,
    G: Tensor | None = None,
    h: Tensor | None = None,
    l: Tensor | None = None,  # noqa: E741
) -> _Data:
    """Return the complete data of a program, with a symmetric ``Q``; stands in for a user's function."""
    no_rows, nothing = c.new_zeros((0, *c.shape)), c.new_zeros((0,))
    A, G = (no_rows if t is None else t for t in (A, G))
    b, h, lower = (nothing if t is None else t for t in (b, h, l))
    # ``x'Q x`` depends on the symmetric part of ``Q`` alone.
    return 0.5 * (Q + Q.mT), c, A, b, G, h, lower


@_settings.outside_autocast
def _filled_guess(
    init: Tensor | KKTSolution | None,
    Q: Tensor,
    c: Tensor,
    A: Tensor | None = None,
    b: Tensor | None = None,
    G: Tensor | None = None,
    h: Tensor | None = None,
    l: Tensor | None = None,  # noqa: E741
) -> KKTSolution:
    """Return the initial guess with all parts, of zeros if absent."""
    _check_data({"Q": Q, "c": c, "A": A, "b": b, "G": G, "h": h, "l": l})
    # Empty tensors for absent multipliers: unlike None they can enter and leave a vmap.
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


def _check_data(named: dict[str, Tensor | None]) -> None:
    for name, t in named.items():
        if not (isinstance(t, Tensor) and t.is_floating_point()) and (t is not None or name in "Qc"):
            raise TypeError(f"qp: {name} must be a real floating-point tensor, got {pytree.describe(t)}")
    if named["l"] is not None and (named["G"] is None or named["h"] is None):
        raise ValueError("qp: l are lower bounds of G x, so G and h must be given too (h may be infinite)")
    for matrix, vector in ("Ab", "Gh"):
        if (named[matrix] is None) != (named[vector] is None):
            raise ValueError(
                f"qp: {matrix} and {vector} go together: give both, or None for both; the first argument of run is the "
                "initial guess, as in run(None, Q, c, A, b, G, h, l)"
            )
    # A tensor without dimensions counts as length 0, and fails the comparison of shapes.
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
    def on_trees(functions: Functions, x: KKTSolution, args: tuple[Tree, ...]) -> KKTSolution:
        Q, c, A, b, G, h, lower = functions["fn"](x, args)
        return KKTSolution(
            Q @ x.primal + c + A.mT @ x.dual_eq + G.mT @ x.dual_ineq,
            A @ x.primal - b,
            _complementarity(x.primal, x.dual_ineq, G, h, lower),
        )

    # The search measures the scaled violation; the derivative refers to `on_trees`, in the user's units.
    def on_rows(problem: BatchedProblem, x: Tensor) -> Tensor:
        prog, n = problem.once(_program), problem.inputs.sizes[0]
        return torch.cat(kkt_violation(prog, make_point(prog, x[:, :n], x[:, n:])), dim=-1)

    return Equation({"fn": lambda x, args: fn(x, *args)}, on_trees, on_rows)


def _complementarity(x: Tensor, y: Tensor, G: Tensor, h: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """Return a residual that is zero for rows at the bound on which ``y`` presses, and for rows within bounds with
    ``y = 0``.

    The selection of the case depends on no units: the search has already set the multipliers of rounding size to zero.
    """
    up = h - G @ x
    at_upper = y > 0
    if not l.numel():
        # The derivative of an active row is ``dh - G dx - dG x``, of an inactive row ``dy``.
        return torch.where(at_upper, up, y + up.detach().clamp(max=0))
    down = l - G @ x
    kkt_violation = up.clamp(max=0) + down.clamp(min=0)
    # An inactive row has residual ``y``, plus its detached violation so that the residual of an infeasible point is not
    # zero. An equality has the mean of both distances.
    inactive = torch.where(h == l, 0.5 * (up + down), y + kkt_violation.detach())
    return torch.where(at_upper, up, torch.where(y < 0, down, inactive))


def _program(problem: BatchedProblem) -> QuadraticProgram:
    """Return the program of a problem; the function of the data ignores the unknowns."""
    inputs = problem.inputs
    lanes = math.prod(inputs.batch)
    # The unknowns are an argument of every user's function; `data` ignores them.
    unused = torch.zeros(lanes, inputs.dimension, dtype=inputs.dtype, device=inputs.device)
    leaves = problem.fn.leaves(unused)
    return make_program(*[t.reshape(lanes, *t.shape[len(inputs.batch) :]).to(inputs.dtype) for t in leaves])


# --- the iteration ----------------------------------------------------------------------------------------------------

_GUESSES = 3
"""Number of active sets to try in a review."""
_MIN_PATIENCE = 1280
"""Least number of iterations before a search stalls; certificates may take hundreds."""
_PATIENCE_FACTOR = 8
"""Factor of the number of iterations in which the error must halve."""


def _first_review(problem: BatchedProblem) -> int:
    """Return the iteration of the first review; a review is more expensive with more unknowns."""
    return min(max(problem.inputs.sizes[0] // 10, 10), 100)


def _start(problem: BatchedProblem, x: Tensor) -> Start[QPMemory]:
    prog = problem.once(_program)
    n, _, inequalities = problem.inputs.sizes
    # A row of unknowns is ``x``, then the multipliers of ``A``, then those of ``G``, as in `KKTSolution`.
    at = make_point(prog, x[:, :n], x[:, n:])
    error, zero = kkt_error(prog, at), torch.zeros_like
    # Take the smaller nonzero part of the first error, at zero: a target in the units of the larger part would hide the
    # other part.
    parts = torch.stack(error_parts(prog, make_point(prog, zero(at.x), zero(at.y))))
    first = torch.where(parts > 0, parts, torch.inf).amin(dim=0)
    delta, shift = regularisation(problem.eps)
    # ``Q + w A'A`` is positive definite for large ``w`` exactly if ``Q`` is positive definite on the null space of
    # ``A`` (Debreu, Finsler).
    _, curved = factor(prog, torch.where(prog.equal, prog.rows / delta, 0.0), shift, problem.plain)
    # Without inequalities a direction of negative curvature is unbounded; inequalities may bound the direction.
    why = int(Status.DIVERGED if inequalities else Status.UNBOUNDED)
    status = torch.where(curved & torch.isfinite(error), why, int(Status.RUNNING))
    # Bounds that exclude every value.
    crossed = torch.isposinf(prog.l) | torch.isneginf(prog.u) | (prog.below & prog.above & (prog.l > prog.u))
    status = torch.where(crossed.any(dim=-1), int(Status.INFEASIBLE), status)
    # Multipliers in ``init`` are worth an immediate guess of the active set.
    rho = torch.full_like(error, _admm.RHO)
    warm = (at.y.detach() != 0).any(dim=-1)
    memory = QPMemory(
        image=at.image,
        slope=at.slope,
        values=clamp_to_bounds(prog, at.image),
        rho=rho,
        factor=_admm.admm_factor(prog, rho) if inequalities else _kkt_inverse(prog, problem.eps),
        review=torch.where(warm, 1, _first_review(problem)),
        record=torch.full_like(error, torch.inf),
        best=x,
        least=error.detach(),
        halved=torch.ones_like(status),
    )
    return Start(error, memory, status, reference=torch.where(torch.isinf(first), error, first))


def _step(problem: BatchedProblem, x: Tensor, state: State[QPMemory]) -> tuple[Tensor, State[QPMemory]]:
    prog = problem.once(_program)
    n, _, inequalities = problem.inputs.sizes
    # The memory holds the products ``C x`` and ``Q x + c + C'y``, so no product is computed twice.
    at = PrimalDual(x[:, :n], x[:, n:], state.memory.image, state.memory.slope)
    new, after = (_admm_step if inequalities else _newton_on_kkt)(problem, prog, at, state)
    running = after.status == Status.RUNNING
    # Three stages: test for convergence, clean the multipliers of converged lanes, look for stalled lanes.
    converged = running & (after.error <= after.target)
    reviewed = after.memory.review != state.memory.review
    # ADMM alone does not reach rounding, so test for rounding after reviews only.
    if not inequalities or any_lane(reviewed):
        converged = converged | (running & _parts_converged(problem, prog, new, after))
    if inequalities and any_lane(converged):
        # The derivative treats a row with a nonzero multiplier as active: clear multipliers of inactive rows, then of
        # weakly active rows if the point stays a solution.
        new = _select_point(converged, make_point(prog, new.x, of_active_rows(prog, new)), new)
        clear = make_point(prog, new.x, without_noise(prog, new, problem.eps))
        new = _select_point(converged & _parts_converged(problem, prog, clear, after), clear, new)
    if any_lane(reviewed):
        new, after = _stop_stalled(prog, new, after, running & reviewed & ~converged)
    status = torch.where(converged, int(Status.CONVERGED), after.status)
    memory = after.memory._replace(image=new.image, slope=new.slope)
    return torch.cat([new.x, new.y], dim=-1), after._replace(status=status, memory=memory)


def _select_point(where: Tensor, new: PrimalDual, old: PrimalDual) -> PrimalDual:
    return PrimalDual(*(select(where, a, b) for a, b in zip(new, old, strict=True)))


def _parts_converged(problem: BatchedProblem, prog: QuadraticProgram, at: PrimalDual, state: State[QPMemory]) -> Tensor:
    """True in lanes with both parts of the error at most the target or their rounding."""
    # Rounding bounds each part of the error from below.
    pairs = zip(error_parts(prog, at), rounding_of_parts(prog, at, problem.eps), strict=True)
    return all_of([part <= torch.maximum(state.target, floor) for part, floor in pairs])


def _kkt_inverse(prog: QuadraticProgram, eps: float) -> Tensor:
    """Return the inverse of ``[[Q, C'], [C, 0]]`` with a shift small enough for the iteration to correct."""
    delta = eps**0.75
    # The shift makes the matrix regular also for dependent rows, and in the units of rows and columns. A matrix with a
    # positive definite first block and a negative definite second block, quasi-definite, is regular (Vanderbei, SIAM J.
    # Optim. 5, 1995).
    shift = torch.cat([delta * prog.columns, -delta / prog.rows], dim=-1)
    upper = torch.cat([prog.Q, prog.C.mT], dim=-1)
    lower = torch.cat([prog.C, torch.zeros_like(prog.C @ prog.C.mT)], dim=-1)
    return _dense.invert_dense(torch.cat([upper, lower], dim=-2) + torch.diag_embed(shift))


def _newton_on_kkt(
    problem: BatchedProblem, prog: QuadraticProgram, at: PrimalDual, state: State[QPMemory]
) -> tuple[PrimalDual, State[QPMemory]]:
    """Make a Newton step on the linear KKT conditions; a single step suffices up to rounding."""
    # ``[[Q, C'], [C, 0]] (dx, dy) = -(slope, C x - u)``, because all rows are equalities here. The residual is exact,
    # so further steps refine the result of the shifted inverse.
    d = -vecmat(torch.cat([at.slope, at.image - prog.u], dim=-1), state.memory.factor.mT)
    dx, dy = d.split([at.x.shape[-1], at.y.shape[-1]], dim=-1)
    new = make_point(prog, at.x + dx, at.y + dy)
    error = kkt_error(prog, new)
    # A Newton step on a linear system that does not halve the error: the system has no solution, or none within
    # rounding.
    stuck = (error > state.target) & ~(error < 0.5 * state.error)
    status = _with_certificates(prog, dx, dy, problem.eps, stuck, state.status) if any_lane(stuck) else state.status
    return new, state._replace(error=error, status=status)


def _admm_step(
    problem: BatchedProblem, prog: QuadraticProgram, at: PrimalDual, state: State[QPMemory]
) -> tuple[PrimalDual, State[QPMemory]]:
    """Make an iteration of ADMM, and a review if due."""
    new, values = _admm.admm_iteration(prog, at, state.memory.values, state.memory.rho, state.memory.factor)
    state = state._replace(error=kkt_error(prog, new), memory=state.memory._replace(values=values))
    due = (state.status == Status.RUNNING) & (state.iter_num + 1 >= state.memory.review) & (state.error > state.target)
    if any_lane(due):
        # The steps of ADMM converge to a certificate if the program has no solution; test before the guesses replace
        # the point.
        status = _with_certificates(prog, new.x - at.x, new.y - at.y, problem.eps, due, state.status)
        new, state = _try_active_sets(problem, prog, new, state._replace(status=status), due)
        # ``rho`` changes in lanes that continue only, because a change costs a factorisation.
        state = _adapt_rho(problem, prog, new, state, due & (state.error > state.target))
    return new, state


def _stop_stalled(
    prog: QuadraticProgram, at: PrimalDual, state: State[QPMemory], due: Tensor
) -> tuple[PrimalDual, State[QPMemory]]:
    """End the `due` lanes whose error has not halved while the number of iterations grew eightfold, at their best
    point. Even an error in proportion to the inverse of that number would have shrunk to an eighth."""
    count, error, memory = state.iter_num + 1, state.error.detach(), state.memory
    # Reviews come at doubled numbers of iterations, so ``halved`` is known up to a factor of 2.
    halves = due & (error < 0.5 * memory.least)
    memory = memory._replace(
        best=select(halves, torch.cat([at.x, at.y], dim=-1), memory.best),
        least=torch.where(halves, error, memory.least),
        halved=torch.where(halves, count, memory.halved),
    )
    waits = (count >= _MIN_PATIENCE) & (count >= _PATIENCE_FACTOR * memory.halved)
    stalls = due & waits & (state.target > 0)
    status = torch.where(stalls, int(Status.STALLED), state.status)
    worse = stalls & (error > memory.least)
    if any_lane(worse):
        best = make_point(prog, *memory.best.split([at.x.shape[-1], at.y.shape[-1]], dim=-1))
        at, state = _select_point(worse, best, at), state._replace(error=torch.where(worse, memory.least, state.error))
    return at, state._replace(status=status, memory=memory)


def _with_certificates(
    prog: QuadraticProgram, dx: Tensor, dy: Tensor, eps: float, asked: Tensor, status: Tensor
) -> Tensor:
    """Set the status of the `asked` lanes whose step is a certificate."""
    infeasible, unbounded = certificates(prog, dx, dy, eps)
    status = torch.where(asked & unbounded, int(Status.UNBOUNDED), status)
    return torch.where(asked & infeasible, int(Status.INFEASIBLE), status)


def _try_active_sets(
    problem: BatchedProblem, prog: QuadraticProgram, at: PrimalDual, state: State[QPMemory], due: Tensor
) -> tuple[PrimalDual, State[QPMemory]]:
    """Try guesses of the active set, and keep the best point if better than the present point."""
    # Reviews at 10, 20, 40, ...: their total cost is proportional to the iterations.
    again = torch.clamp(2 * (state.iter_num + 1), min=_first_review(problem))
    memory = state.memory._replace(review=torch.where(due, again, state.memory.review))
    state = state._replace(memory=memory)
    x, y, asked, first = at.x, at.y, due, due & torch.isinf(state.memory.record)
    for guess in range(_GUESSES):
        if not any_lane(asked):
            break
        lanes = picked(asked, problem.plain)
        # Below the transforms the other lanes are left out, because a guess costs several factorisations.
        part, near = prog.pick(lanes), (x[lanes], y[lanes])
        # Guess 0 starts from ADMM's point, guess 1 from the interior point (at the first review only), guess 2 searches
        # longer.
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
    """Move the `asked` lanes, whose program is `part`, to the point of an active set; `ahead` is the result of
    `active_set`."""
    x, y, side = ahead
    found, dx, dy, broken = polish(part, x, y, side, problem.eps, problem.plain)
    error, before, target, record = (
        kkt_error(part, found),
        state.error[lanes],
        state.target[lanes],
        state.memory.record[lanes],
    )
    # Each accepted guess, except the last, must reduce the error tenfold relative to the last accepted guess; otherwise
    # guesses could alternate.
    better = ~broken & (error < before) & ((error <= target) | (error < 0.1 * record))
    # ADMM continues from the new point, with active rows exactly at their bounds.
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
    problem: BatchedProblem, prog: QuadraticProgram, at: PrimalDual, state: State[QPMemory], due: Tensor
) -> State[QPMemory]:
    """Balance ``rho`` in the `due` lanes, with a new factorisation if changed."""
    rho = torch.where(due, _admm.balanced_rho(prog, at, state.memory.values, state.memory.rho), state.memory.rho)
    changed = rho != state.memory.rho
    if not any_lane(changed):
        return state
    lanes = picked(changed, problem.plain)
    lower = put(state.memory.factor, changed, lanes, _admm.admm_factor(prog.pick(lanes), rho[lanes]))
    return state._replace(memory=state.memory._replace(rho=rho, factor=lower))
