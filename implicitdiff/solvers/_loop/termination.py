"""The stopping rule of all searches: the target, the judgement, the rounding floor and the status.

A search has CONVERGED at ``x`` when a change of the unknowns by ``p`` of themselves would explain the residual,

    |F(x)| <= p |J x|,    p = max(4 eps, 4e-11),

or when the residual is no more than its own rounding. ``F`` is the residual of the equation, ``J`` its Jacobian. A
method whose steps measure the error of ``x`` (those of Newton's kind) must besides have made a last step of at most
``eps^(1/3) |x|``: the error that is left is about the square of that. A tolerance that the user gives takes the place
of the first condition. A search that cannot get closer has STALLED.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicitdiff.solvers._loop.equations import Composite, RowResidual
from implicitdiff.solvers._loop.method import IterativeMethod, Start
from implicitdiff.solvers._loop.newton_step import NewtonStep, if_twice_differentiable
from implicitdiff.solvers._loop.problem import BatchedProblem, any_lane, row_norm, scattered_signs, select, select_tree
from implicitdiff.solvers._loop.state import Progress, State
from implicitdiff.solvers._loop.status import Status, is_any_of

PATIENCE = 4
"""After how many iterations without a smaller error the rounding floor is measured first."""
_DECREASE = 0.9
"""What an error has to be multiplied by to count as smaller."""
_MAX_ZERO_STEPS = 16
"""How many steps of length zero in a row there may be."""

_RELIABLE = 1e-3
"""``|F(x)| / |J x|`` at which ``|J x|`` is that of the solution."""
_NEXT_TARGET = 0.1
"""The part of its error that a search has to reach which is near its target, but not near the solution."""


class _Powers(NamedTuple):
    """Powers of ``eps`` that bound the length of a step of Newton's kind, relative to ``x``.

    Attributes:
        near: where the search has come to its target.
        failed: where rounding refuses the next step.
        sure: where the search need not be looked at again.
    """

    near: float
    failed: float
    sure: float


_OWN_STEP_POWERS = _Powers(near=1 / 3, failed=1 / 6, sure=1 / 2)
"""Of a method that has made the step: the error that is left is about its square."""
_TRIAL_STEP_POWERS = _Powers(near=2 / 5, failed=2 / 5, sure=1 / 2)
"""Of a method that has not: the step is the error."""


class Verdict(NamedTuple):
    """What the rule remembers of the lanes that it told to run on.

    Attributes:
        error: when a lane was last told so; at first infinite, and 0 where its target is final.
        ratio: ``|F(x)| / |J x|`` then; at first 0.
        length: ``|x|`` then.
    """

    error: Tensor
    ratio: Tensor
    length: Tensor

    @classmethod
    def initial(cls, state: State[Any]) -> Verdict:
        """At the beginning."""
        none = torch.zeros_like(state.error)
        return cls(error=torch.full_like(none, torch.inf), ratio=none, length=none)


def precision(eps: float) -> float:
    """``p``, the relative change of the unknowns that may explain the residual of a solution."""
    return max(4.0 * eps, 4e-11)


@dataclass(frozen=True)
class Termination:
    """The rule with a user's tolerances.

    Attributes:
        rtol: relative to the error of the initial guess; None: not given.
        atol: in units of the error; None: not given.
        limit: the largest number of iterations.
        is_budget: whether the user gave the limit, so that reaching it is no failure.
    """

    rtol: float | None
    atol: float | None
    limit: int
    is_budget: bool

    @property
    def is_default(self) -> bool:
        """Whether the user gave no tolerance."""
        return self.rtol is None and self.atol is None

    # --- without an evaluation ----------------------------------------------------------------------------------------

    def begin(self, method: IterativeMethod, problem: BatchedProblem, x: Tensor, start: Start) -> State[Any]:
        """The state at an initial guess; with default tolerances this takes an evaluation to measure ``|J x|``."""
        error = start.error.detach()
        zero, none = torch.zeros_like(error, dtype=torch.int64), torch.zeros_like(error)
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
                step=none,
                reach=x.detach().abs() if near else x.new_zeros((x.shape[0], 0)),
                patience=zero + PATIENCE,
                floor=none,
            ),
            memory=start.memory,
        )
        return self._advanced(state, error <= state.target)

    def advance(
        self, method: IterativeMethod, problem: BatchedProblem, x: Tensor, new_x: Tensor, new: State[Any]
    ) -> State[Any]:
        """The state after a step from ``x`` to ``new_x``, from that which the method gave."""
        error = new.error.detach()
        new = new._replace(iter_num=new.iter_num + 1, error=error)
        reached = error <= new.target
        if not method.is_judged:
            return self._advanced(new, reached)
        new = new._replace(progress=_next_progress(x.detach(), new_x.detach(), error, new.progress))
        if method.steps_tell and self.is_default:
            reached = reached & _is_settled(method, problem, new, "near")
        new = self._advanced(new, reached)
        stands = (new.status == Status.RUNNING) & (new.progress.still >= _MAX_ZERO_STEPS) & self._may_stall(new)
        return new._replace(status=torch.where(stands, int(Status.STALLED), new.status))

    def idle(self, state: State[Any]) -> Tensor:
        """The lanes whose rounding floor is due to be measured."""
        patient = state.progress.idle >= state.progress.patience
        return (state.status == Status.RUNNING) & patient & (state.iter_num % PATIENCE == 0)

    def _advanced(self, state: State[Any], reached: Tensor) -> State[Any]:
        status = torch.where(state.iter_num >= self.limit, int(Status.BUDGET_SPENT), int(Status.RUNNING))
        status = torch.where(reached, int(Status.CONVERGED), status)
        status = torch.where(torch.isfinite(state.error), status, int(Status.DIVERGED))
        # A line search that fails may have found a solution.
        arrived = (state.status == Status.LINE_SEARCH_FAILED) & (status == Status.CONVERGED)
        return state._replace(status=torch.where((state.status == Status.RUNNING) | arrived, status, state.status))

    def _may_stall(self, state: State[Any]) -> Tensor:
        """Where the search has a target: with zero tolerances and a budget it makes so many iterations."""
        return (state.target > 0) | (not self.is_budget)

    def _first_target(self, method: IterativeMethod, problem: BatchedProblem, x: Tensor, start: Start) -> Tensor:
        error = start.error.detach() if start.reference is None else start.reference.detach()
        if self.atol is not None:
            return torch.clamp((self.rtol or 0.0) * error, min=self.atol)
        p = precision(problem.eps)
        target = (p if self.rtol is None else self.rtol) * error
        if not method.is_judged:
            return target
        size = _first_size(method, problem, x, start.memory)
        return torch.maximum(target, torch.where(torch.isfinite(size), p * size, 0.0))

    # --- with evaluations ---------------------------------------------------------------------------------------------

    def measure_rounding(
        self, method: IterativeMethod, problem: BatchedProblem, x: Tensor, state: State[Any], asked: Tensor
    ) -> State[Any]:
        """The state with the rounding floor measured in the lanes that are asked for; they end where their error is no
        more than that. Takes two evaluations."""
        asked = asked & self._may_stall(state)
        if not (method.is_judged and any_lane(asked)):
            return state
        floor = rounding_floor(problem.residual, problem, x, _current_residual(method, problem, x, state))
        old = state.progress
        progress = old._replace(
            floor=torch.where(asked, floor, old.floor), patience=torch.where(asked, 2 * old.idle, old.patience)
        )
        # Only here: at another point the floor may be another.
        there = asked & (state.error <= floor)
        good = there & self.is_default
        if any_lane(good):
            state = _with_step(state, _distance_step(method, problem, x, state), good, good)
            good = good & _is_settled(method, problem, state, "failed")
        status = torch.where(there, int(Status.STALLED), state.status)
        return state._replace(
            status=torch.where(good, int(Status.CONVERGED), status),
            target=torch.where(good, floor, state.target),
            progress=progress,
        )

    def judge(
        self,
        method: IterativeMethod,
        problem: BatchedProblem,
        first_x: Tensor,
        x: Tensor,
        state: State[Any],
        verdict: Verdict,
    ) -> tuple[State[Any], Verdict]:
        """The state where every lane has stopped, some of which may have to run on.

        A default target was made at the initial guess, and a poor guess makes a coarse target. So ``|J x|`` is measured
        again where the target is reached, and a lane runs on as long as that halves its error, until ``|J x|`` is
        reliable. A lane that failed with default tolerances has converged where its error is ``eps^(2/3) |J x|`` or
        rounding.

        Args:
            method: the method.
            problem: the problem.
            first_x: the initial guess.
            x: the unknowns.
            state: the state there.
            told: of earlier judgements; returned with the state.
        """
        if not method.is_judged:
            return state, verdict
        failed = is_any_of(state.status, Status.LINE_SEARCH_FAILED, Status.BUDGET_SPENT) & (state.iter_num > 0)
        failed = failed & self._may_stall(state)
        reached = (state.status == Status.CONVERGED) & (state.iter_num > 0) & (state.target != state.progress.floor)
        # A lane that came near the solution on its way to its last target is there now.
        reached = reached & ~((verdict.error == 0) & _is_settled(method, problem, state, "sure"))
        if self.is_default and any_lane(failed | reached):
            coarse = reached & (verdict.error > 0)
            # A method of Newton's kind that came to its target has made a step.
            asked = failed if method.steps_tell else failed | reached
            step = _distance_step(method, problem, x, state) if any_lane(asked) else None
            state = _with_step(state, step, asked, failed)
            state, verdict = self._measured_again(method, problem, first_x, x, state, step, failed, coarse, verdict)
            state, verdict = self._stepped(method, problem, state, step, failed, reached, verdict)
            failed = failed & (state.status != Status.CONVERGED)
        return self.measure_rounding(method, problem, x, state, failed), verdict

    def _measured_again(
        self,
        method: IterativeMethod,
        problem: BatchedProblem,
        first_x: Tensor,
        x: Tensor,
        state: State[Any],
        step: NewtonStep | None,
        failed: Tensor,
        reached: Tensor,
        verdict: Verdict,
    ) -> tuple[State[Any], Verdict]:
        """The state with ``|J x|`` measured at x; lanes that `reached` a coarse target run on.

        There is no solution near a lane that was told so before, has gone farther away, and for which ``|J x|`` has
        become smaller as the error has.
        """
        if not any_lane(failed | reached):
            return state, verdict
        error, here = state.error, _current_residual(method, problem, x, state)
        size, known = solution_scale(problem, x, here, first_x, error, None if step is None else step.size)
        fine, rough = precision(problem.eps) * size, problem.eps ** (2 / 3) * size
        again = reached & (error > fine) & (2 * error < verdict.error) & (size > 0)
        ratio, length = error / size, row_norm(x)
        off = again & (verdict.ratio > 0) & (ratio > 0.1 * verdict.ratio) & (length > 1.2 * verdict.length)
        again = again & ~off
        # Rounding is hardly ever more than this.
        if any_lane(again & (error <= 256.0 * problem.eps * size)):
            again = again & (error > rounding_floor(problem.residual, problem, x, here))
        good = failed & (error <= rough)
        state = self._running_on(state, again)
        state = state._replace(
            target=torch.where(again, fine, torch.where(good, rough, state.target)),
            status=torch.where(off, int(method.runs_off), state.status),
        )
        is_final = known & (ratio <= _RELIABLE)
        return state, Verdict(
            error=torch.where(again, torch.where(is_final, 0.0, error), verdict.error),
            ratio=torch.where(again, ratio, verdict.ratio),
            length=torch.where(again, length, verdict.length),
        )

    def _stepped(
        self,
        method: IterativeMethod,
        problem: BatchedProblem,
        state: State[Any],
        step: NewtonStep | None,
        failed: Tensor,
        reached: Tensor,
        verdict: Verdict,
    ) -> tuple[State[Any], Verdict]:
        """The state with the length of a step of Newton's kind where it has come near its target; a lane that is far
        from the solution all the same tries this step."""
        good, reached = failed & (state.error <= state.target), reached & (state.status == Status.CONVERGED)
        if not any_lane(good | reached):
            return state, verdict
        good = good & _is_settled(method, problem, state, "failed")
        state = state._replace(status=torch.where(good, int(Status.CONVERGED), state.status))
        if step is None or method.steps_tell:
            return state, verdict
        far = reached & ~_is_settled(method, problem, state, "near")
        state = self._running_on(state, far)._replace(
            target=torch.where(far, _NEXT_TARGET * state.error, state.target),
            memory=select_tree(far, step.memory, state.memory),
        )
        return state, verdict._replace(error=torch.where(far, 0.0, verdict.error))

    def _running_on(self, state: State[Any], where: Tensor) -> State[Any]:
        on = torch.where(state.iter_num < self.limit, int(Status.RUNNING), int(Status.BUDGET_SPENT))
        return state._replace(status=torch.where(where, on, state.status))


def _next_progress(x: Tensor, new_x: Tensor, error: Tensor, old: Progress) -> Progress:
    # Rounding makes an error a little smaller now and then.
    better, stays = error < _DECREASE * old.best, (new_x == x).all(dim=-1)
    return old._replace(
        best=torch.where(better, error, old.best),
        idle=torch.where(better, 0, old.idle + 1),
        still=torch.where(stays, old.still + 1, 0),
    )


def _is_settled(method: IterativeMethod, problem: BatchedProblem, state: State[Any], when: str) -> Tensor:
    """Whether the last step of Newton's kind was so short that ``x`` is near the solution."""
    powers = _OWN_STEP_POWERS if method.newton_step is None else _TRIAL_STEP_POWERS
    settled: Tensor = state.progress.step <= problem.eps ** getattr(powers, when)
    return settled


def _current_residual(method: IterativeMethod, problem: BatchedProblem, x: Tensor, state: State[Any]) -> Tensor:
    """The residual at ``x``, which many memories hold."""
    return (problem.residual(problem, x) if method.residual is None else method.residual(state.memory)).detach()


def _distance_step(method: IterativeMethod, problem: BatchedProblem, x: Tensor, state: State[Any]) -> NewtonStep | None:
    """A step of Newton's kind, if the method can make one."""
    make = method.newton_step
    return None if make is None else if_twice_differentiable(lambda: make(problem, x, state.memory))


def _with_step(state: State[Any], step: NewtonStep | None, where: Tensor, failed: Tensor) -> State[Any]:
    """The state with the length of a step in some lanes; 0 if it promises next to no gain, as where a Hessian without
    full rank makes it long; at least 1 where there is no minimum near."""
    if step is None:
        return state
    # A Hessian that is not finite says nothing.
    where = where & torch.isfinite(step.size)
    # Where a search failed, a gain that rounding hides is a reason not to know.
    counts = torch.where(failed, step.promises, step.counts)
    progress = state.progress.stepped(step.d, step.x, step.units)
    length = torch.where(counts, progress.step, 0.0)
    length = torch.where(step.bends_down, progress.step.clamp(min=1.0), length)
    return state._replace(progress=state.progress._replace(step=torch.where(where, length, state.progress.step)))


def _first_size(method: IterativeMethod, problem: BatchedProblem, x: Tensor, memory: Any) -> Tensor:
    if method.size is not None:
        size = method.size(problem, x, memory).detach()
        if not isinstance(problem.residual, Composite):
            return size
        # A residual under constraints is no longer than the way to their boundary, whatever its gradient is.
        return torch.minimum(size, row_norm(x) / precision(problem.eps) ** 0.5)
    here = problem.residual(problem, x) if method.residual is None else method.residual(memory)
    return row_norm(change_with_x(problem.residual, problem, x, here.detach(), is_guess=True))


# --- what a residual is small against ---------------------------------------------------------------------------------


def change_with_x(
    residual: RowResidual, problem: BatchedProblem, x: Tensor, here: Tensor, *, is_guess: bool = False
) -> Tensor:
    """``J x`` to a few digits, for the Jacobian ``J`` of a residual whose value ``here`` is given.

    By a difference, as the derivative of a gradient is more than the user's function may have; where the domain ends
    before that, the other way, or not so far. The difference with a long step is rough where the residual is curved,
    and that with a short one where it has a kink nearby, which makes it too large. So an initial guess that the short
    one would take for a solution is judged by the smaller of the two.
    """
    x = x.detach()

    def slope(step: float) -> Tensor:
        return (residual(problem, x + step * x) - here).detach() / step

    long, far, near = (problem.eps**power for power in (1 / 3, 1 / 2, 2 / 3))
    difference = slope(far)
    for step in (-far, near, -near):
        outside = ~torch.isfinite(difference).all(dim=-1)
        if not any_lane(outside):
            break
        difference = select(outside, slope(step), difference)
    if not (is_guess and any_lane(row_norm(here) <= precision(problem.eps) * row_norm(difference))):
        return difference
    other = slope(long)
    return select(row_norm(other) < row_norm(difference), other, difference)


def composite_size(problem: BatchedProblem, x: Tensor, gradient: Tensor) -> Tensor:
    """How much a `Composite` residual changes where its gradient changes by ``H x``."""
    composite = problem.residual
    assert isinstance(composite, Composite)
    unbalanced = gradient - change_with_x(composite.gradient, problem, x, gradient, is_guess=True)
    return row_norm(composite.prox_residual(problem, x, unbalanced) - composite.prox_residual(problem, x, gradient))


def solution_scale(
    problem: BatchedProblem, x: Tensor, here: Tensor, first_x: Tensor, error: Tensor, size: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``|J x|``, unless it is given, at a point that may be a solution, after a search from ``first_x``; and whether it
    is that.

    Where that is hardly more than the error, the solution may be zero. There ``|J (first_x - x)|`` counts, with more
    digits, as it may be large.
    """
    x, back, step = x.detach(), (first_x - x).detach(), problem.eps ** (1 / 2)
    size = row_norm(change_with_x(problem.residual, problem, x, here)) if size is None else size
    small = ~(size > 100 * error)
    if not any_lane(small):
        return size, ~small
    # No further than `change` goes, where that is anywhere.
    ratio = (row_norm(x) / row_norm(back)).nan_to_num(nan=1.0).clamp(max=1.0)
    step = step * torch.where(ratio < problem.eps ** (1 / 4), 1.0, ratio)
    way = row_norm(problem.residual(problem, x + step[:, None] * back) - here) / step
    return torch.where(small, torch.fmax(size, problem.eps ** (1 / 6) * way), size), ~small


def rounding_floor(residual: RowResidual, problem: BatchedProblem, x: Tensor, here: Tensor) -> Tensor:
    """The rounding floor: the change of the residual when every unknown moves by 4 units in the last place.

    Constraints may keep a residual small whatever its gradient is, so there the gradient is what moves.
    """
    x = x.detach()
    own = row_norm(_noise(residual, problem, x, here))
    if not isinstance(residual, Composite):
        return own
    gradient = residual.gradient(problem, x).detach()
    moved = residual.prox_residual(problem, x, gradient + _noise(residual.gradient, problem, x, gradient))
    return torch.maximum(own, row_norm(moved - here))


def _noise(residual: RowResidual, problem: BatchedProblem, x: Tensor, here: Tensor) -> Tensor:
    """Where a longer move changes the residual by less than in proportion, there is a kink, and the jump there is no
    rounding."""
    way = problem.eps * scattered_signs(x) * x
    short, long = ((residual(problem, x + units * way) - here).detach() for units in (4, 1024))
    part = row_norm(long) / 256 / row_norm(short)
    # Not so if the domain ends in between.
    return short * torch.where(part < 1, part, 1.0)[:, None]
