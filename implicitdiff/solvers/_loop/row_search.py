"""The loop of every search, and a search below the transforms: compiled, replayed or eager."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import NamedTuple

from implicitdiff.solvers._loop.compiled import CompiledLoop, Compiler, SearchParts
from implicitdiff.solvers._loop.problem import BatchedProblem, any_lane
from implicitdiff.solvers._loop.replayed import GraphedLoop, of_running_lanes
from implicitdiff.solvers._loop.state import PATIENCE, State, Verdict
from implicitdiff.solvers._loop.status import Status


class Frame(NamedTuple):
    """The operations of the loop in one frame: the caller's, on trees, or below the transforms, on rows.

    Attributes:
        see: ``see(x, state)`` reports progress and returns the number of running lanes.
        advance: ``advance(x, state, running) -> (x, state)`` makes some iterations.
        judge: ``judge(x, state, verdict) -> (state, verdict)``, called when every lane has stopped.
        settle: ``settle(x, state) -> state``, called at the end of a search that has made an iteration.
    """

    see: Callable[[Any, State[Any]], int]
    advance: Callable[[Any, State[Any], int], tuple[Any, State[Any]]]
    judge: Callable[[Any, State[Any], Verdict], tuple[State[Any], Verdict]]
    settle: Callable[[Any, State[Any]], State[Any]]


def until_stopped(
    x: Any, state: State[Any], verdict: Verdict, frame: Frame, *, is_moved: bool = False
) -> tuple[Any, State[Any]]:
    """Run the loop of every search; `is_moved` if a compiled loop has made iterations already."""
    # A judgement may let lanes run on, so each round counts the running lanes anew.
    while running := frame.see(x, state):
        is_moved = True
        x, state = frame.advance(x, state, running)
        if not any_lane(state.status == Status.RUNNING):
            state, verdict = frame.judge(x, state, verdict)
    return x, frame.settle(x, state) if is_moved else state


@dataclass(eq=False)
class RowSearch:
    """A search below the transforms, on rows.

    Attributes:
        parts: the parts of the search.
        problem: the problem.
        compiler: makes the compiled loop, or the replayed step; None: the search is eager.
        every: the number of eager iterations between two looks at the status.
        see: see `Frame`.
        loop: the compiled loop, as long as it runs.
    """

    parts: SearchParts
    problem: BatchedProblem
    compiler: Compiler | None
    every: int
    see: Callable[[Tensor, State[Any]], int]
    loop: CompiledLoop | None = None
    # Eager iterations so far, and whether a verdict may have let lanes run on.
    _count: int = 0
    _is_judged: bool = False

    def run(self, first_x: Tensor) -> tuple[Tensor, State[Any]]:
        """Iterate from an initial guess until every lane has stopped."""
        self.loop = None if self.compiler is None else self.compiler.loop(first_x)
        is_recorded = self._is_judged = self.loop is not None
        x, state, verdict = self._begun(first_x)

        def judge(x: Tensor, state: State[Any], verdict: Verdict) -> tuple[State[Any], Verdict]:
            self._is_judged = True
            if self.compiler is not None and self.loop is not None:
                return self.compiler.judged(self.loop, x, state, verdict)
            return self.parts.judge(self.problem, first_x, x, state, verdict)

        frame = Frame(self.see, self._advance, judge, partial(self.parts.settle, self.problem))
        x, state = until_stopped(x, self._taken_over(state), verdict, frame, is_moved=is_recorded)
        is_recorded = is_recorded or (self.compiler is not None and self.compiler.is_replayed)
        if not is_recorded or (above := unfinished(self.problem, x, state)) is None:
            return x, state
        # The user's own function has the last word: where it disagrees with the recording, go on without.
        self.compiler = self.loop = None
        running = torch.where(above, int(Status.RUNNING), state.status)
        return until_stopped(x, state._replace(status=running), verdict, frame)

    def _begun(self, first_x: Tensor) -> tuple[Tensor, State[Any], Verdict]:
        if self.loop is not None:
            x, state, verdict = self.loop.begun()
            if not self.loop.leaves_start(state):
                return x, state, verdict
            # The eager start says what is wrong with the guess.
            self.loop = None
        state = self.parts.start(self.problem, first_x)
        return first_x, state, Verdict.initial(state)

    def _advance(self, x: Tensor, state: State[Any], running: int) -> tuple[Tensor, State[Any]]:
        problem, measure = self.problem, self.parts.measure
        if self.loop is not None:
            # The machine returns early where a lane asks; `measure` answers, and without a question does nothing.
            x, state = self.loop(x, measure(problem, x, state))
            return x, self._taken_over(state)
        replay = None if self.compiler is None else self.compiler.replay(x, state)
        if isinstance(replay, GraphedLoop):
            return replay(x, measure(problem, x, state))
        # If all lanes run and the status is read after each iteration, no old value has to be kept.
        mask = self.every > 1 or running < state.status.numel()
        step = replay or (of_running_lanes(self.parts.step) if mask else self.parts.step)
        for _ in range(self.every):
            x, state = step(problem, x, state)
            self._count += 1
            # A lane with a verdict to run on counts its own idle iterations, so every iteration asks. Before any
            # verdict a question every few iterations saves synchronisations.
            if self._is_judged or self._count % PATIENCE == 0:
                state = measure(problem, x, state)
        return x, state

    def _taken_over(self, state: State[Any]) -> State[Any]:
        """Return the state, with lanes running whose next step the compiled loop leaves to Python."""
        if self.loop is None or (left := self.loop.left(state)) is None:
            return state
        # A linear solver fails in the next step, which is made eagerly for its report.
        self.loop = None
        return state._replace(status=torch.where(left, int(Status.RUNNING), state.status))


def unfinished(problem: BatchedProblem, x: Tensor, state: State[Any]) -> Tensor | None:
    """Return the lanes that converged by the recorded error and not by the user's own function; None if there are none.

    A recorded error and an eager one differ by rounding, so twice the target is allowed.
    """
    residual = problem.last_residual or problem.residual
    size = torch.linalg.vector_norm(residual(problem, x).detach(), dim=-1, dtype=torch.float64)
    # Negated, so that a residual of nan counts as above the target.
    above = state.converged & ~(size <= 2 * torch.maximum(state.target, state.error))
    return above if any_lane(above) else None
