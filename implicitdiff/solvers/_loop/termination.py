"""The stopping rule of all searches: target of the error, rounding floor and status.

A search has CONVERGED at ``x`` if a relative change ``p`` of the unknowns would explain the residual,

    |F(x)| <= p |J x|,    p = max(4 eps, 4e-11),

or if the residual is no larger than its own rounding. ``F`` is the residual of the equation, ``J`` its Jacobian. A
method whose steps measure the error of ``x`` (a Newton-type method) must also have made a short last step, for roots
``eps^(1/3) |x|``: convergence is quadratic, so the remaining error is about the square of that step. `StepPowers` has
these bounds. A user's tolerance replaces the first condition. A search that cannot decrease the error further has
STALLED.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from implicitdiff._torch.control import if_any
from implicitdiff.solvers._loop.equations import Composite
from implicitdiff.solvers._loop.measures import change_with_x, precision, rounding, rounding_floor, solution_scale
from implicitdiff.solvers._loop.method import IterativeMethod, Start
from implicitdiff.solvers._loop.newton_step import NewtonStep, if_twice_differentiable
from implicitdiff.solvers._loop.problem import BatchedProblem, any_lane, row_norm, select_tree
from implicitdiff.solvers._loop.state import PATIENCE, MemoryT, Progress, State, Verdict
from implicitdiff.solvers._loop.status import Status

_DECREASE = 0.9
"""Factor by which an error must decrease to count as smaller."""
_MAX_ZERO_STEPS = 16
"""Bound on the number of steps of length zero in a row."""

_RELIABLE = 1e-3
"""Value of ``|F(x)| / |J x|`` below which ``|J x|`` is about the value at the solution."""
_LONG_IDLE = 64
"""Number of iterations without progress after which the rounding of constants is measured too."""
_NEXT_TARGET = 0.1
"""Factor from the error to the next target, for a search near its target but far from the solution."""
_FAR = 1e-3
"""Factor of the error between two decisions that are compared to find a way to infinity."""
_ZERO = 100.0
"""Ratio ``|F(x)| / |J x*|`` above which ``|J x*|`` is rounding."""

_ROUNDING = 16
"""Multiple of the rounding floor that is no change of the function: errors are computed in several ways."""
_SURE_POWER = 1 / 2
"""A last step of at most ``eps^power |x|`` needs no second measurement of ``|J x|``."""


@dataclass(frozen=True)
class Termination:
    """The stopping rule with a user's tolerances.

    Attributes:
        rtol: tolerance relative to the error of the initial guess; None if not given.
        atol: tolerance in units of the error; None if not given.
        limit: the largest number of iterations.
        is_budget: True if the user gave the limit; reaching a user's limit is no failure.
    """

    rtol: float | None
    atol: float | None
    limit: int
    is_budget: bool

    @property
    def is_default(self) -> bool:
        """True if the user gave no tolerance."""
        return self.rtol is None and self.atol is None

    # --- without an evaluation ----------------------------------------------------------------------------------------

    def begin(
        self, method: IterativeMethod[MemoryT], problem: BatchedProblem, x: Tensor, start: Start[MemoryT]
    ) -> State[MemoryT]:
        """Return the state at an initial guess; default tolerances cost one evaluation that measures ``|J x|``."""
        error = start.error.detach()
        zero, zeros = torch.zeros_like(error, dtype=torch.int64), torch.zeros_like(error)
        # Only Newton-type steps are measured against `reach`; other methods carry an empty tensor.
        near = method.steps_tell or method.newton_step is not None
        state = State(
            iter_num=zero,
            error=error,
            target=self._first_target(method, problem, x, start),
            status=zero if start.status is None else start.status,
            history=error.new_zeros((error.shape[0], 0)),
            progress=Progress(
                best=error,
                idle=zero,
                still=zero,
                step=zeros,
                reach=x.detach().abs() if near else x.new_zeros((x.shape[0], 0)),
                patience=zero + PATIENCE,
                floor=zeros,
                enough=zeros,
            ),
            memory=start.memory,
        )
        return self._advanced(state, error <= state.target)

    def advance(
        self, method: IterativeMethod[MemoryT], problem: BatchedProblem, x: Tensor, new_x: Tensor, new: State[MemoryT]
    ) -> State[MemoryT]:
        """Return the state after a step from `x` to `new_x`; `new` is the state as the method returned it."""
        error = new.error.detach()
        new = new._replace(iter_num=new.iter_num + 1, error=error)
        reached = error <= new.target
        if not method.is_judged:
            return self._advanced(new, reached)
        # Measures of progress for the tests of a stall and of the last step.
        new = new._replace(progress=_next_progress(x.detach(), new_x.detach(), error, new.progress))
        # A small residual alone is not enough for a Newton-type method: for a nearly singular Jacobian the error of
        # ``x`` may be large. Wait for a short step.
        if method.steps_tell and self.is_default:
            reached = reached & (new.progress.step <= problem.eps**method.step_powers.near)
        new = self._advanced(new, reached)
        stands = (new.status == Status.RUNNING) & (new.progress.still >= _MAX_ZERO_STEPS) & self._may_stall(new)
        return new._replace(status=torch.where(stands, int(Status.STALLED), new.status))

    def idle(self, state: State[MemoryT]) -> Tensor:
        """Return the lanes whose rounding floor is due for measurement."""
        # At multiples of PATIENCE only, the iterations at which the loop of `run` tests, so that a loop over `update`
        # makes the same decisions.
        patient = state.progress.idle >= state.progress.patience
        return (state.status == Status.RUNNING) & patient & (state.iter_num % PATIENCE == 0)

    def asks(self, method: IterativeMethod[MemoryT], state: State[MemoryT]) -> Tensor:
        """Return the lanes that `measure_rounding` would measure."""
        if not method.is_judged:
            return torch.zeros_like(state.status, dtype=torch.bool)
        return self.idle(state) & self._may_stall(state)

    def _advanced(self, state: State[MemoryT], reached: Tensor) -> State[MemoryT]:
        # Later lines win: not finite over converged, converged over the budget.
        status = torch.where(state.iter_num >= self.limit, int(Status.BUDGET_SPENT), int(Status.RUNNING))
        status = torch.where(reached, int(Status.CONVERGED), status)
        status = torch.where(torch.isfinite(state.error), status, int(Status.DIVERGED))
        # A failed line search may have stopped at a solution; a user's tolerance may accept a point on the way to an
        # infimum at infinity.
        ended = state.status == Status.LINE_SEARCH_FAILED
        if not self.is_default:
            ended = ended | (state.status == Status.UNBOUNDED)
        arrived = ended & (status == Status.CONVERGED)
        return state._replace(status=torch.where((state.status == Status.RUNNING) | arrived, status, state.status))

    def _may_stall(self, state: State[MemoryT]) -> Tensor:
        """True in lanes that may stop before the limit. Zero tolerances with a budget ask for exactly that many
        iterations."""
        return (state.target > 0) | (not self.is_budget)

    def _first_target(
        self, method: IterativeMethod[MemoryT], problem: BatchedProblem, x: Tensor, start: Start[MemoryT]
    ) -> Tensor:
        error = start.error.detach() if start.reference is None else start.reference.detach()
        # With `atol` the error has units, and no measurement of ``|J x|`` is necessary.
        if self.atol is not None:
            return torch.clamp((self.rtol or 0.0) * error, min=self.atol)
        p = precision(problem.eps)
        target = (p if self.rtol is None else self.rtol) * error
        if not method.is_judged:
            return target
        # A difference that leaves the domain gives no size: keep the target relative to the first error.
        size = _first_size(method, problem, x, start.memory)
        return torch.maximum(target, torch.where(torch.isfinite(size), p * size, 0.0))

    # --- with evaluations ---------------------------------------------------------------------------------------------

    def measure_rounding(
        self, method: IterativeMethod[MemoryT], problem: BatchedProblem, x: Tensor, state: State[MemoryT], asked: Tensor
    ) -> State[MemoryT]:
        """Measure the rounding floor in the `asked` lanes, by two evaluations; lanes whose error is at most the floor
        end."""
        if not method.is_judged:
            return state
        asked = asked & self._may_stall(state)
        return if_any(asked, lambda state: self._with_floor(method, problem, x, state, asked), state)

    def _with_floor(
        self, method: IterativeMethod[MemoryT], problem: BatchedProblem, x: Tensor, state: State[MemoryT], asked: Tensor
    ) -> State[MemoryT]:
        floor = rounding_floor(problem.residual, problem, x, _current_residual(method, problem, x, state))
        old = state.progress
        # Slow progress shows in as many iterations as there were before.
        is_idle = (state.status != Status.RUNNING) | (old.idle >= (state.iter_num // 2).clamp(min=_LONG_IDLE))
        enough = is_idle & (state.error <= old.enough)
        if not method.steps_tell:
            enough = enough & (old.step <= problem.eps**method.step_powers.failed)
        progress = old._replace(
            floor=torch.where(asked, torch.where(enough, torch.maximum(floor, state.error), floor), old.floor),
            # Double the patience: measurements after 4, 8, 16, ... idle iterations cost a vanishing share.
            patience=torch.where(asked, old.idle + old.idle, old.patience),
        )
        # Valid at this point only: the floor depends on ``x``.
        at_floor = asked & (state.error <= progress.floor)
        found = self._at_floor(method, problem, x, state._replace(progress=progress), at_floor)
        good = asked & enough
        return found._replace(
            status=torch.where(good, int(Status.CONVERGED), found.status),
            target=torch.where(good, progress.floor, found.target),
        )

    def _at_floor(
        self, method: IterativeMethod[MemoryT], problem: BatchedProblem, x: Tensor, state: State[MemoryT], where: Tensor
    ) -> State[MemoryT]:
        """Return the state, with the end of some lanes, whose error is rounding."""
        # With a user's tolerances rounding above the target is a stall, with default tolerances convergence, unless a
        # Newton-type step shows that ``x`` is far from a solution.
        good = where & self.is_default

        def settled(good: Tensor) -> Tensor:
            stepped = _with_step(state, _distance_step(method, problem, x, state), good, good)
            is_short: Tensor = stepped.progress.step <= problem.eps**method.step_powers.failed
            return good & is_short

        good = if_any(good, settled, good)
        # A search whose steps are long gets another PATIENCE iterations, because it may still find a way down.
        hopes = (state.status == Status.RUNNING) & (state.progress.idle < 2 * PATIENCE) & self.is_default
        status = torch.where(where & ~hopes, int(Status.STALLED), state.status)
        return state._replace(
            status=torch.where(good, int(Status.CONVERGED), status),
            target=torch.where(good, state.progress.floor, state.target),
        )

    def judge(
        self,
        method: IterativeMethod[MemoryT],
        problem: BatchedProblem,
        first_x: Tensor,
        x: Tensor,
        state: State[MemoryT],
        verdict: Verdict,
    ) -> tuple[State[MemoryT], Verdict]:
        """Decide, after every lane has stopped, which lanes continue.

        The initial guess sets a default target, and a poor guess sets a coarse target. So ``|J x|`` is measured again
        at the target, and a lane continues as long as its error halves, until the measurement is reliable. With default
        tolerances a lane whose line search failed has converged if its error is at most ``eps^(2/3) |J x|`` or
        rounding, and a lane at its limit if its error is rounding.

        Args:
            method: the method.
            problem: the problem.
            first_x: the initial guess.
            x: the unknowns.
            state: the state at `x`.
            verdict: the verdict of earlier calls.

        Returns:
            The state, with status ``RUNNING`` in the lanes that continue, and the new verdict.
        """
        if not method.is_judged:
            return state, verdict
        # A failed lane may be at a solution, and a lane at its target may have a target that is too coarse. Lanes
        # accepted at the rounding floor are final.
        may_end = (state.iter_num > 0) & self._may_stall(state)
        failed = (state.status == Status.LINE_SEARCH_FAILED) & may_end
        # A target equal to the floor marks a lane that `_with_floor` has accepted.
        reached = (state.status == Status.CONVERGED) & (state.iter_num > 0) & (state.target != state.progress.floor)
        # Skip lanes with a final target whose last step was very short.
        reached = reached & ~((verdict.error == 0) & (state.progress.step <= problem.eps**_SURE_POWER))
        if self.is_default:
            judged = partial(self._judged, method, problem, first_x, x, failed, reached)
            state, verdict = if_any(failed | reached, judged, (state, verdict))
            failed = failed & (state.status != Status.CONVERGED)
        # A search that stands still, or is at its limit, may have reached the rounding floor before the floor was due
        # for measurement.
        stands = (state.status == Status.STALLED) & (state.progress.still >= _MAX_ZERO_STEPS)
        spent = (state.status == Status.BUDGET_SPENT) & may_end
        return self.measure_rounding(method, problem, x, state, failed | stands | spent), verdict

    def look(
        self, method: IterativeMethod[MemoryT], problem: BatchedProblem, x: Tensor, state: State[MemoryT]
    ) -> State[MemoryT]:
        """Return the state, with the rounding floor measured in lanes that have made no progress for long enough."""
        asked = self.idle(state)
        state = self.measure_rounding(method, problem, x, state, asked)
        return self._at_zero(method, problem, x, state, asked & (state.progress.idle >= _LONG_IDLE))

    def settle(
        self, method: IterativeMethod[MemoryT], problem: BatchedProblem, x: Tensor, state: State[MemoryT]
    ) -> State[MemoryT]:
        """Decide, after the search, which lanes that have stopped without success are at a solution of zero."""
        stopped = (state.status == Status.LINE_SEARCH_FAILED) | (state.status == Status.STALLED)
        if not self.is_budget:
            stopped = stopped | (state.status == Status.BUDGET_SPENT)
        return self._at_zero(method, problem, x, state, stopped)

    def _at_zero(
        self, method: IterativeMethod[MemoryT], problem: BatchedProblem, x: Tensor, state: State[MemoryT], asked: Tensor
    ) -> State[MemoryT]:
        """Return the state; the `asked` lanes at a solution of zero, up to the rounding of constants, end."""
        if not method.is_judged:
            return state
        asked = asked & torch.isfinite(state.error) & (state.error > 0) & self._may_stall(state)

        def with_constants(state: State[MemoryT]) -> State[MemoryT]:
            here, progress = problem.residual(problem, x).detach(), state.progress
            noise = rounding(problem.residual, problem, x, here)
            # Jumps look like rounding, but for this: a compiled loop rounds otherwise than torch. The gain that a
            # minimiser's Newton-type step predicts shows jumps that are large.
            is_rounding = (row_norm(here) - state.error).abs() > 0.01 * state.error
            if method.newton_step is not None and not method.steps_tell:
                is_rounding = is_rounding | noise.everywhere
            # Other solutions have a rounding floor, so only a zero is looked for.
            where = asked & is_rounding & (state.error <= _ROUNDING * noise.size) & (row_norm(x) <= noise.length)
            floor = torch.where(where, state.error, progress.floor)
            found = self._at_floor(method, problem, x, state._replace(progress=progress._replace(floor=floor)), where)
            good = found.status == Status.CONVERGED
            if self.is_default and method.steps_tell:
                # Against rounding itself no step is short; one that rounding explains is no longer than this length.
                good = good | (where & (progress.step * progress.scale(x) <= noise.length))
            # Without a solution found, a lane that has stopped keeps its status.
            status = torch.where(state.status == Status.RUNNING, found.status, state.status)
            return found._replace(
                status=torch.where(good, int(Status.CONVERGED), status),
                target=torch.where(where & good, state.error, state.target),
            )

        return if_any(asked, with_constants, state)

    def of_other_function(
        self, problem: BatchedProblem, x: Tensor, state: State[MemoryT], found: Tensor
    ) -> Tensor | None:
        """Return the lanes whose residual, found by an evaluation after the search, is of another function; None if
        there are none.

        A function that counts its evaluations, say, may be one function in the search and another in the derivative.
        Where the residual found exceeds the error, the function of the search is evaluated twice more. A difference
        by rounding, which may also choose the other side of a kink, does not appear again.
        """
        bound = 2 * torch.maximum(state.target, state.error)
        # Negated, so that nan counts as above the bound. A search that has left the domain has no residual.
        above = ~(row_norm(found) <= bound) & torch.isfinite(state.error)
        if not any_lane(above):
            return None
        here, there = (problem.residual(problem, x).detach() for _ in range(2))
        bound = bound + _ROUNDING * rounding_floor(problem.residual, problem, x, here)
        other = above & ~(torch.maximum(row_norm(here), row_norm(there)) <= bound)
        if not any_lane(other):
            return None
        # A loop that is compiled rounds otherwise than torch. The evaluations in between belong to one function only
        # if those before and after agree.
        bound = bound + _ROUNDING * rounding(problem.residual, problem, x, here).most
        last = problem.residual(problem, x).detach()
        steady = (row_norm(there - here) == 0) & (row_norm(last - here) == 0)
        other = other & ~(steady & (row_norm(here) <= bound))
        return other if any_lane(other) else None

    def _judged(
        self,
        method: IterativeMethod[MemoryT],
        problem: BatchedProblem,
        first_x: Tensor,
        x: Tensor,
        failed: Tensor,
        reached: Tensor,
        carry: tuple[State[MemoryT], Verdict],
    ) -> tuple[State[MemoryT], Verdict]:
        state, verdict = carry
        # Error 0 in the verdict marks a final target: measuring ``|J x|`` again would not change the target.
        coarse = reached & (verdict.error > 0)
        # A Newton-type method at its target has just made a step.
        asked = failed if method.steps_tell else failed | reached
        # A step costs a factorisation or several products; without one the size is measured by a difference.
        makes = method.newton_step is not None and any_lane(asked) if method.steps_tell else True
        step = _distance_step(method, problem, x, state) if makes else None
        state = _with_step(state, step, asked, failed)
        measured = partial(self._measured_again, method, problem, first_x, x, step, failed, coarse)
        state, verdict = if_any(failed | coarse, measured, (state, verdict))
        good, reached = failed & (state.error <= state.target), reached & (state.status == Status.CONVERGED)
        return if_any(good | reached, partial(self._stepped, method, problem, step, good, reached), (state, verdict))

    def _measured_again(
        self,
        method: IterativeMethod[MemoryT],
        problem: BatchedProblem,
        first_x: Tensor,
        x: Tensor,
        step: NewtonStep | None,
        failed: Tensor,
        reached: Tensor,
        carry: tuple[State[MemoryT], Verdict],
    ) -> tuple[State[MemoryT], Verdict]:
        """Measure ``|J x|`` at `x`; lanes that have `reached` a coarse target continue towards a finer target.

        A lane goes to infinity if, since an earlier decision, ``|x|`` has grown while ``|J x|`` has shrunk about as
        much as the error; the lane gets the status ``method.runs_off``.
        """
        state, verdict = carry
        error, here = state.error, _current_residual(method, problem, x, state)
        scale = solution_scale(problem, x, here, first_x, error, None if step is None else step.size)
        size, known, guess = scale.size, scale.known, problem.eps ** (1 / 6) * scale.guess
        p, part, length = precision(problem.eps), (error / size).clamp(max=_ZERO), row_norm(x)
        ratio = error / scale.here
        # The solution is zero if ``|J x*|`` has decreased with the error. Then the distance of the initial guess is the
        # scale, with a stricter factor ``eps^(1/6)`` because that distance may be large.
        is_zero = ~known & (verdict.part > 0) & (2 * part >= verdict.part)
        rough = problem.eps ** (2 / 3) * torch.fmax(size, guess)
        size = torch.where(is_zero, torch.fmax(size, guess), size)
        fine = p * size
        # Continue above the finer target, as long as each round has halved the error. A size of 0 or nan gives no
        # target.
        # `verdict.error` begins infinite, so the first round passes the test of halves.
        again = reached & (error > fine) & (2 * error < verdict.error) & (size > 0)
        smaller = error <= _FAR * verdict.since
        off = again & smaller & (ratio > 0.1 * verdict.ratio) & (length > 1.2 * verdict.length)
        again = again & ~off
        # Rounding rarely exceeds 256 eps of the scale; the bound saves two evaluations in most searches.
        near = again & (error <= 256.0 * problem.eps * size)

        def above_floor(again: Tensor) -> Tensor:
            return again & (~near | (error > rounding_floor(problem.residual, problem, x, here)))

        again = if_any(near, above_floor, again)
        # A failed line search leaves more error than a regular end: accept two thirds of the digits. An infinite scale
        # gives no target.
        good = failed & (error <= rough) & torch.isfinite(rough)
        # An uncertain scale is measured again on the way.
        next_target = torch.where(known, fine, torch.maximum(fine, _NEXT_TARGET * error))
        # If it cannot be reached, the scale of the guess decides.
        enough = torch.where(again & ~known, p * torch.fmax(size, guess), 0.0)
        state = self._running_on(state, again)
        state = state._replace(
            progress=state.progress._replace(enough=torch.where(again, enough, state.progress.enough)),
            target=torch.where(again, next_target, torch.where(good, rough, state.target)),
            status=torch.where(off, int(method.runs_off), state.status),
        )
        # Close to the solution ``|J x|`` changes little, so the next target is final.
        is_final = known & (ratio <= _RELIABLE)
        anew = again & (smaller | (verdict.since == 0))
        return state, Verdict(
            error=torch.where(again, torch.where(is_final, 0.0, error), verdict.error),
            part=torch.where(again, part, verdict.part),
            since=torch.where(anew, error, verdict.since),
            ratio=torch.where(anew, ratio, verdict.ratio),
            length=torch.where(anew, length, verdict.length),
        )

    def _stepped(
        self,
        method: IterativeMethod[MemoryT],
        problem: BatchedProblem,
        step: NewtonStep | None,
        good: Tensor,
        reached: Tensor,
        carry: tuple[State[MemoryT], Verdict],
    ) -> tuple[State[MemoryT], Verdict]:
        """Judge lanes near their target by the length of a Newton-type step.

        A lane that is still far from the solution continues and tries the step next.
        """
        state, verdict = carry
        good = good & (state.progress.step <= problem.eps**method.step_powers.failed)
        state = state._replace(status=torch.where(good, int(Status.CONVERGED), state.status))
        if step is None or method.steps_tell:
            return state, verdict
        # A gradient method may meet its target far from the solution along directions of small curvature. Continue to a
        # tenth of the error, starting with the Newton-type step.
        far = reached & ~(state.progress.step <= problem.eps**method.step_powers.near)
        state = self._running_on(state, far)._replace(
            target=torch.where(far, _NEXT_TARGET * state.error, state.target),
            memory=state.memory if step.memory is None else select_tree(far, step.memory, state.memory),
        )
        # Unless the finer target is final, the next one is measured at the next point.
        return state, verdict._replace(error=torch.where(far, torch.minimum(state.error, verdict.error), verdict.error))

    def _running_on(self, state: State[MemoryT], where: Tensor) -> State[MemoryT]:
        on = torch.where(state.iter_num < self.limit, int(Status.RUNNING), int(Status.BUDGET_SPENT))
        return state._replace(status=torch.where(where, on, state.status))


def _next_progress(x: Tensor, new_x: Tensor, error: Tensor, old: Progress) -> Progress:
    # Rounding lowers an error slightly now and then, so require a decrease by a tenth.
    better, stays = error < _DECREASE * old.best, (new_x == x).all(dim=-1)
    return old._replace(
        best=torch.where(better, error, old.best),
        idle=torch.where(better, 0, old.idle + 1),
        still=torch.where(stays, old.still + 1, 0),
    )


def _current_residual(
    method: IterativeMethod[MemoryT], problem: BatchedProblem, x: Tensor, state: State[MemoryT]
) -> Tensor:
    """Return the residual at ``x``, from the memory if the memory holds it."""
    return (problem.residual(problem, x) if method.residual is None else method.residual(state.memory)).detach()


def _distance_step(
    method: IterativeMethod[MemoryT], problem: BatchedProblem, x: Tensor, state: State[MemoryT]
) -> NewtonStep | None:
    """Return a Newton-type step, or None if the method or the user's function does not provide one."""
    make = method.newton_step
    return None if make is None else if_twice_differentiable(lambda: make(problem, x, state.memory))


def _with_step(state: State[MemoryT], step: NewtonStep | None, where: Tensor, failed: Tensor) -> State[MemoryT]:
    """Record the length of a step in some lanes: 0 if the predicted gain is negligible, as for long steps along the
    null space of a Hessian; at least 1 if a curvature is negative, so that no minimum is near."""
    if step is None:
        return state
    # Ignore a step from a Hessian that is not finite.
    where = where & torch.isfinite(step.size)
    # After a failure, a predicted gain below rounding leaves the distance unknown, so only `promises` counts.
    counts = torch.where(failed, step.promises, step.counts)
    progress = state.progress.stepped(step.d, step.x, step.units)
    length = torch.where(counts, progress.step, 0.0)
    length = torch.where(step.bends_down, progress.step.clamp(min=1.0), length)
    return state._replace(progress=state.progress._replace(step=torch.where(where, length, state.progress.step)))


def _first_size(method: IterativeMethod[MemoryT], problem: BatchedProblem, x: Tensor, memory: MemoryT) -> Tensor:
    if method.size is not None:
        size = method.size(problem, x, memory).detach()
        if not isinstance(problem.residual, Composite):
            return size
        # A residual under constraints is at most the distance to the boundary, whatever its gradient.
        # With the bound the part ``p size`` of the target is at most ``sqrt(p) |x|``.
        return torch.minimum(size, row_norm(x) / precision(problem.eps) ** 0.5)
    here = problem.residual(problem, x) if method.residual is None else method.residual(memory)
    return row_norm(change_with_x(problem.residual, problem, x, here.detach(), is_guess=True))
