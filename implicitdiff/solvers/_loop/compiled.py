"""The compiled loop of a search: when it is recorded, and how it is checked.

A search computes a first state, repeats one step of its method, and judges lanes that have stopped.
`implicitdiff._recorded` records these parts for one lane as one program, which the compiled machine runs for all lanes.
A first state or a judgement that cannot be recorded stays in Python.

Three checks keep a wrong recording from a wrong result. A recording is compared with its eager twin before its first
use. A key tells for which calls it is good, see `recordings`. At the end of each search the user's own function
measures the error, and lanes above their target go on eagerly.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

import implicitdiff._closures.modes as _modes
import implicitdiff._torch.context as _context
import implicitdiff._torch.control as _control
import implicitdiff._torch.dispatch as _dispatch
import implicitdiff._torch.trees as pytree
from implicitdiff._recorded.graph import StepGraph, several
from implicitdiff._recorded.record import Recorder, check_recordable
from implicitdiff._recorded.replay import Replay
from implicitdiff._recorded.step import Parts, RecordedStep, is_available, record_step
from implicitdiff._recorded.tape import NotRecordableError
from implicitdiff._torch.trees import Leaves, Structure
from implicitdiff.errors import CompileError
from implicitdiff.linear_solve._outcome import unreported
from implicitdiff.solvers._loop.options import Compile
from implicitdiff.solvers._loop.problem import BatchedProblem, Noted, SearchOperands, any_lane, select, select_tree
from implicitdiff.solvers._loop.recordings import MadeT, Recording, fingerprint, kept, kinds, memories
from implicitdiff.solvers._loop.replayed import (
    GraphedLoop,
    ReplayedStep,
    StepFn,
    layouts,
    of_running_lanes,
    record_replay,
)
from implicitdiff.solvers._loop.state import State, Verdict

_logger = logging.getLogger("implicitdiff.solvers")

_LANES_AT_ONCE = 8
"""The number of lanes that the machine runs together; as many doubles as the widest registers hold."""
_FEW = 4
"""Below this number of lanes the machine runs each by itself."""
_AT_MOST = 1000
"""Bound on the iterations of a call of the machine: in between Python handles signals."""
_MAX_COPIED = 2**26
"""Bound on the elements of copies, one for each lane, of operands that not every vmap batches."""
_STEPS_OF_GRAPH = 8
"""The number of steps in a CUDA graph. The host asks once a launch whether a lane still runs."""
_LEFT = -1
"""The status of a lane whose step is left to Python, see `implicitdiff._torch.control.leave_to_python`."""
_LARGEST_INTEGER = 2**53
"""Bound on integers: the machine computes with doubles."""
_AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-2}
"""Largest difference between a recorded step and its eager twin, relative to the largest entry of a tensor."""
_OF_SIZES = dict.fromkeys(_AGREEMENT, 0.5)
"""The same of a judgement, which measures sizes as small differences of residuals."""


_LAYOUT, _DTYPE = attrgetter("layout"), attrgetter("dtype")


class SearchParts(NamedTuple):
    """The parts of a search, as functions of all lanes.

    Attributes:
        start: ``start(problem, x)``, the first state.
        step: an iteration, without a mask.
        asks: ``asks(state)``, the lanes that Python has to look at before the next iteration.
        measure: ``measure(problem, x, state)``, the look: the state with the rounding floor of lanes that are idle.
        judge: ``judge(problem, first_x, x, state, verdict) -> (state, verdict)``.
        settle: ``settle(problem, x, state)``, the state at the end of the search; not recorded.
    """

    start: Callable[[BatchedProblem, Tensor], State[Any]]
    step: StepFn
    asks: Callable[[State[Any]], Tensor]
    measure: Callable[[BatchedProblem, Tensor, State[Any]], State[Any]]
    judge: Callable[[BatchedProblem, Tensor, Tensor, State[Any], Verdict], tuple[State[Any], Verdict]]
    settle: Callable[[BatchedProblem, Tensor, State[Any]], State[Any]]


@dataclass(eq=False)
class Compiler:
    """The decision, for one search, between the compiled and the eager loop.

    Attributes:
        name: the name of the solver, for messages.
        kind: returns all that the recording depends on apart from the user's functions and operands; see `kind_of`.
        parts: the parts of the search.
        problem: the problem.
        compile: the option.
    """

    name: str
    kind: Callable[[], Hashable]
    parts: SearchParts
    problem: BatchedProblem
    compile: Compile
    # Why the machine does not apply. A replay is tried next, at the state after the start.
    _refusal: NotRecordableError | None = None
    _replay: ReplayedStep | GraphedLoop | None = None

    def loop(self, x: Tensor) -> CompiledLoop | None:
        """Return the compiled loop from an initial guess; None if the machine does not apply.

        Raises:
            CompileError: with ``compile="always"``, if the loop cannot be compiled.
        """
        # First the reasons against any recording, then those against the machine alone: a replay may still serve.
        operands = self._operands
        try:
            self._refuse_unrecordable(x, operands)
        except NotRecordableError as error:
            self._end(error)
            return None
        try:
            self._refuse_unusable(x, operands)
            recording = self._recording(x)
        except NotRecordableError as error:
            self._refusal = error
            return None
        if recording is None:
            return None
        _logger.info("%s: compiled loop", self.name)
        return self._made(recording, x)

    def judged(self, loop: CompiledLoop, x: Tensor, state: State[Any], verdict: Verdict) -> tuple[State[Any], Verdict]:
        """Judge lanes that have all stopped. The first time, the recorded judgement is compared with its eager twin."""
        recording = loop.recording
        if recording.is_checked and recording.step.judges:
            return loop.judged(x, state, verdict)

        def eager() -> tuple[State[Any], Verdict]:
            return self.parts.judge(self.problem, loop.first_x, x, state, verdict)

        if recording.is_checked or not recording.step.judges:
            return eager()
        found = loop.judged(x, state, verdict)
        twin = self._with_noted(eager)
        agrees = _agree(pytree.tensors(found), pytree.tensors(twin), within=_OF_SIZES)
        loop.recording = recording._replace(step=replace(recording.step, judges=agrees), is_checked=True)
        kept.put(self._key, loop.recording)
        # The first search too takes the recorded judgement, so that a later search returns the same bits.
        return found if agrees else eager()

    def replay(self, x: Tensor, state: State[Any]) -> ReplayedStep | GraphedLoop | None:
        """Return the replayed step of a search for which there was no `loop`; None if the search is eager.

        Raises:
            CompileError: with ``compile="always"``, if the step cannot be replayed.
        """
        if self._replay is None and self._refusal is not None:
            try:
                self._replay = self._replayed(x, state)
            except NotRecordableError as error:
                same = str(self._refusal) == str(error)
                self._end(error if same else NotRecordableError(f"{self._refusal}; nor replayed by torch: {error}"))
                self._refusal = None
        return self._replay

    @property
    def is_replayed(self) -> bool:
        """True if steps are replayed."""
        return self._replay is not None

    def _made(self, recording: Recording, x: Tensor) -> CompiledLoop:
        return CompiledLoop(recording, self.parts.start, self.problem, x, [*self._operands.flat(), x, *self._constants])

    def _recording(self, x: Tensor) -> Recording | None:
        """Return the recording; None if all lanes leave the step to Python, or if this search makes the recording but
        makes no step."""
        is_known = kept.get(self._key) is not None
        recording = kept.made(self._key, lambda: self._with_noted(lambda: self._recorded(x)))
        if recording is None or recording.is_stepped:
            return recording
        # Not stepped: no lane ran after the first state, so the search that made the recording needs no machine.
        return self._stepped(recording, x) if is_known else None

    def _stepped(self, recording: Recording, x: Tensor) -> Recording | None:
        """Compare the step of a recording that was made where no lane ran. If no lane runs here either, only the first
        state is used."""
        loop = self._made(recording, x)
        state = loop.begun()[1]
        if not any_lane(state.status == 0):
            return recording
        try:
            if not self._with_noted(lambda: self._verify(loop, x, state)):
                return None
        except NotRecordableError as error:
            kept.put(self._key, str(error))
            raise
        stepped = recording._replace(is_stepped=True)
        kept.put(self._key, stepped)
        return stepped

    def _with_noted(self, make: Callable[[], MadeT]) -> MadeT:
        """Return ``make()``, computed with the noted operations of the user's functions. If an error occurs, call the
        functions themselves, so that the error message names the user's line."""
        given, self.problem = self.problem, self._noted.problem
        try:
            return make()
        except Exception:
            if not self._noted.lines.repeats:
                raise
        finally:
            self.problem = given
        return make()

    def _recorded(self, x: Tensor) -> Recording | None:
        # The eager start gives the shapes of the carried tensors, and a twin for the recorded start.
        state = self.parts.start(self.problem, x)
        leaves, structure = pytree.flatten((state, Verdict.initial(state)))
        # `carried` begins with x, so its leaves count from 1.
        status = next(i for i, t in enumerate(leaves, start=1) if t is state.status)
        can_leave: set[str] = set()
        step = self._record(self._parts_of_lane(structure, can_leave), [x, *leaves], x, status)
        return self._checked(Recording(step, structure, kinds(leaves), frozenset(can_leave)), x, state)

    def _parts_of_lane(self, structure: Structure, can_leave: set[str]) -> Parts:
        """Return the parts of one lane for a recorder; `can_leave` receives those that may be left to Python."""
        parts, operands = self.parts, self._operands

        def start(recorder: Recorder, carried: Leaves, given: Leaves) -> Leaves:
            with _recorded_by(recorder, "the first state"):
                # The last operand is the initial guess, for the judgement alone.
                state = parts.start(operands.alone(given[:-1]), carried[0])
                for flag in recorder.left:
                    state = state._replace(status=torch.where(flag, _LEFT, state.status))
                    can_leave.add("start")
                recorder.left.clear()
                return [carried[0], *structure.tensors_of((state, Verdict.initial(state)))]

        def step(recorder: Recorder, carried: Leaves, given: Leaves) -> tuple[Leaves, Tensor]:
            x, *own = carried
            state, verdict = structure.unflatten(own)
            with _control.recorded_by(recorder), recorder:
                new_x, new = parts.step(operands.alone(given[:-1]), x, state)
                for flag in recorder.left:
                    new_x, new = select(flag, x, new_x), _left_where(flag, state, new)
                    can_leave.add("step")
                return [new_x, *structure.tensors_of((new, verdict))], parts.asks(new)

        def judge(recorder: Recorder, carried: Leaves, given: Leaves) -> Leaves:
            x, *own = carried
            with _recorded_by(recorder, "the judgement"):
                judged = parts.judge(operands.alone(given[:-1]), given[-1], x, *structure.unflatten(own))
                return [x, *structure.tensors_of(judged)]

        return Parts(step, start, judge)

    def _record(self, parts: Parts, carried: Leaves, x: Tensor, status: int) -> RecordedStep:
        operands = self._operands
        try:
            return record_step(
                parts,
                # One lane stands for all: shapes and dtypes matter, numbers do not.
                [t[:1] for t in carried],
                [*operands.of_first_lane(), x[:1]],
                [*operands.is_lane, True],
                self._captured,
                status,
                self._width(len(x)),
            )
        except NotRecordableError:
            raise
        except Exception as error:
            # The step runs eagerly, and so fails under a recorder alone.
            raise NotRecordableError(f"the recording raised {type(error).__name__}: {error}") from error

    def _checked(self, recording: Recording, x: Tensor, state: State[Any]) -> Recording | None:
        """Return the recording, without a first state that differs from its eager twin; None if the step is left to
        Python in all lanes.

        Raises:
            NotRecordableError: the step does not agree with its twin.
        """
        loop = self._made(recording, x)
        runs = any_lane(state.status == 0)
        if runs and not self._verify(loop, x, state):
            return None
        step = recording.step
        starts = step.starts and self._starts_alike(recording, x, state)
        return recording._replace(step=replace(step, starts=starts), is_stepped=runs)

    def _starts_alike(self, recording: Recording, x: Tensor, state: State[Any]) -> bool:
        """Return whether the recorded first state agrees with its eager twin, here or, as in `_verify`, at another
        point."""
        if _agree(*map(pytree.tensors, (self._made(recording, x).begun()[1], state))):
            return True
        point = x + _shift(x)
        try:
            with unreported():
                twin = self.parts.start(self.problem, point)
        except Exception:
            return False
        return _agree(*map(pytree.tensors, (self._made(recording, point).begun()[1], twin)))

    def _verify(self, loop: CompiledLoop, x: Tensor, state: State[Any]) -> bool:
        """Raise unless the recorded step agrees with its eager twin; return False if the step is left to Python in all
        lanes, so that there is nothing to compare.

        Close to a solution residuals are rounding errors, which differ. So a step that differs is compared once more,
        at another point.
        """
        # At the second point the state does not belong to x any more, but the twins still receive the same numbers.
        for point in (x, x + _shift(x)):
            recorded = loop(point, state, at_most=1)
            active = (state.status == 0) & (recorded[1].status != _LEFT)
            if not any_lane(active):
                return False
            with unreported():
                twins = [pytree.tensors(t) for t in (recorded, self.parts.step(self.problem, point, state))]
            if _agree(*([t[active] for t in twin] for twin in twins)):
                return True
        raise NotRecordableError("the recorded step differs from the eager step")

    # --- replays ------------------------------------------------------------------------------------------------------

    def _replayed(self, x: Tensor, state: State[Any]) -> GraphedLoop | ReplayedStep:
        leaves, structure = pytree.flatten(state)
        operands = [*self._operands.theta, *self._captured]
        step = of_running_lanes(self.parts.step, self.parts.asks if _on_cuda(x) else None)
        # Lanes and strides as well, since torch chooses operations by both.
        key = (self._key, "replay", self._operands.lanes, x.device, kinds(leaves), layouts(operands))
        replay = kept.made(key, lambda: self._recorded_replay(step, x, state, operands))
        if _on_cuda(x) and (graph := self._graph(key, replay, [x, *leaves], operands)) is not None:
            _logger.info("%s: replayed loop, CUDA graph", self.name)
            return GraphedLoop(graph, structure, operands)
        _logger.info("%s: replayed loop", self.name)
        return ReplayedStep(replay, structure, replay.prepared(operands), step)

    def _recorded_replay(self, step: StepFn, x: Tensor, state: State[Any], operands: Leaves) -> Replay:
        """Make an eager step, record the next step, and compare the recording with the eager step."""
        with unreported():
            twin = step(self.problem, x, state)
        # Recorded at the state after a step, with the strides of all later states.
        replay = record_replay(step, self._operands, *twin)
        if not _agree(replay(pytree.tensors((x, state)), replay.prepared(operands)), pytree.tensors(twin)):
            raise NotRecordableError("the replayed step differs from the eager step")
        return replay

    def _graph(self, key: Hashable, replay: Replay, carried: Leaves, operands: Leaves) -> StepGraph | None:
        """Return the CUDA graph of a replay; None where CUDA cannot capture the step."""
        try:
            return kept.made(
                (key, "graph"), lambda: _captured_graph(replay, carried, operands), (NotRecordableError, RuntimeError)
            )
        except NotRecordableError as error:
            _logger.info("%s: no CUDA graph, since %s", self.name, error)
            return None

    def _end(self, error: NotRecordableError) -> None:
        """Report that the loop is eager."""
        if self.compile == "always":
            raise CompileError(
                f'{self.name}: compile="always", but the loop cannot be compiled: {error}; use compile="auto"'
            ) from None
        _logger.info("%s: eager loop, since %s", self.name, error)

    # --- operands and keys --------------------------------------------------------------------------------------------

    def _refuse_unrecordable(self, x: Tensor, operands: SearchOperands) -> None:
        """Raise where nothing can record the search."""
        if operands.lifted.refusal is not None:
            raise NotRecordableError(operands.lifted.refusal)
        if _context.dispatch_modes() or not _modes.let_addresses_through():
            raise NotRecordableError("another mode of torch records or changes operations")
        if not len(x):
            raise NotRecordableError("there is no lane")
        _, default, _ = operands.lifted.settings
        if default.type not in ("cpu", x.device.type):
            raise NotRecordableError(f"the default device is {default}")
        if not {torch.strided}.issuperset(map(_LAYOUT, (*operands.theta, *self._captured))):
            raise NotRecordableError("the function uses a sparse tensor")
        for tensor in (x, *operands.theta):
            if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_neg():
                raise NotRecordableError(f"an operand is a {type(tensor).__name__}")
        # A key is made now, so that an option without a key refuses in time.
        hash(self._key)

    def _refuse_unusable(self, x: Tensor, operands: SearchOperands) -> None:
        """Raise where the machine does not apply."""
        if not is_available():
            raise NotRecordableError("implicitdiff._C was not built (see python -m implicitdiff)")
        _, default, _ = operands.lifted.settings
        if default.type != "cpu":
            raise NotRecordableError(f"the default device is {default}")
        for tensor in (x, *operands.theta):
            check_recordable(tensor)
        for tensor in (*operands.theta, *self._captured):
            if tensor.dtype == torch.int64 and tensor.numel() and tensor.abs().max() > _LARGEST_INTEGER:
                raise NotRecordableError("an operand has integers that no double represents")
        if operands.copied > _MAX_COPIED:
            raise NotRecordableError("some vmaps batch large operands, and others do not")

    @property
    def _operands(self) -> SearchOperands:
        # Not cached: `_with_noted` exchanges the problem.
        assert self.problem.operands is not None
        return self.problem.operands

    @cached_property
    def _noted(self) -> Noted:
        return self._operands.noted(self._operands.of_first_lane())

    @cached_property
    def _captured(self) -> Leaves:
        return [*map(itemgetter(0), self._operands.lifted.constants)]

    @cached_property
    def _constants(self) -> Leaves:
        # The machine reads memory from the beginning of a storage, and views of constants keep their offsets.
        return [*map(_dispatch.whole_storage, self._captured)]

    @cached_property
    def _key(self) -> Hashable:
        operands, inputs = self._operands, self.problem.inputs
        lifted = operands.lifted
        constants = memories(self._captured)
        shapes = tuple(zip(operands.shapes_of_lane, map(_DTYPE, operands.theta), *operands.dims, strict=True))
        unknowns = (tuple(inputs.shapes), tuple(inputs.dtypes), self._width(math.prod(operands.lanes)))
        try:
            key = (self.kind(), unknowns, shapes, constants, lifted.settings, fingerprint(lifted))
            hash(key)
        except TypeError as error:
            raise NotRecordableError(f"an option cannot be compared from call to call: {error}") from None
        return key

    def _width(self, lanes: int) -> int:
        return _LANES_AT_ONCE if lanes >= _FEW else 1


@dataclass(eq=False)
class CompiledLoop:
    """The compiled loop of one search.

    Attributes:
        recording: the recorded search.
        start: computes the first state where it is not recorded.
        problem: the problem.
        first_x: the initial guess.
        operands: the operands, with the lanes in front where lanes differ.
    """

    recording: Recording
    start: Callable[[BatchedProblem, Tensor], State[Any]]
    problem: BatchedProblem
    first_x: Tensor
    operands: Leaves

    def begun(self) -> tuple[Tensor, State[Any], Verdict]:
        """Iterate from the initial guess; a block of lanes that have all stopped is judged, and may go on.

        Without a recorded judgement that was compared only the first state is computed.
        """
        step, x, lanes = self.recording.step, self.first_x, len(self.first_x)
        judges = step.judges and self.recording.is_checked
        if step.starts:
            # Not initialised: the machine writes each value before the first read.
            own = [torch.empty((lanes, *shape), dtype=dtype) for shape, dtype in self.recording.kinds]
        else:
            state = self.start(self.problem, x)
            if not judges:
                return x, state, Verdict.initial(state)
            own = [_copied(t) for t in pytree.tensors((state, Verdict.initial(state)))]
        carried = [_copied(x), *own]
        step.run(carried, self.operands, lanes, _AT_MOST if judges else 0, step.starts, judges)
        return carried[0], *self.recording.structure.unflatten(carried[1:])

    def __call__(self, x: Tensor, state: State[Any], at_most: int = _AT_MOST) -> tuple[Tensor, State[Any]]:
        """Iterate until, block by block, all lanes have stopped or a lane asks to be looked at."""
        return self._run(x, state, Verdict.initial(state), at_most, judges=False)[:2]

    def judged(self, x: Tensor, state: State[Any], verdict: Verdict) -> tuple[State[Any], Verdict]:
        """Judge lanes that have all stopped."""
        return self._run(x, state, verdict, at_most=0, judges=True)[1:]

    def _run(
        self, x: Tensor, state: State[Any], verdict: Verdict, at_most: int, judges: bool
    ) -> tuple[Tensor, State[Any], Verdict]:
        structure = self.recording.structure
        carried = [_copied(t) for t in (x, *structure.tensors_of((state, verdict)))]
        self.recording.step.run(carried, self.operands, len(x), at_most, judges=judges)
        return carried[0], *structure.unflatten(carried[1:])

    def left(self, state: State[Any]) -> Tensor | None:
        """Return the lanes whose next step Python has to make; None if there are none."""
        if "step" not in self.recording.can_leave:
            return None
        flags = state.status == _LEFT
        return flags if any_lane(flags) else None

    def leaves_start(self, state: State[Any]) -> bool:
        """Return whether Python has to make the first state of a lane."""
        return "start" in self.recording.can_leave and any_lane((state.status == _LEFT) & (state.iter_num == 0))


def _copied(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _shift(x: Tensor) -> Tensor:
    """Return a small displacement, another for each unknown."""
    # The first unknown moves by 1e-4 at least, so that a guess of zeros moves as well.
    waves = torch.cos(torch.arange(x.shape[-1], dtype=x.dtype))
    return 1e-2 * x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-2) * waves if x.numel() else torch.zeros_like(x)


@contextmanager
def _recorded_by(recorder: Recorder, part: str) -> Iterator[None]:
    """Record a part of a search that may also stay in Python; whatever fails, fails as not recordable."""
    try:
        with _control.recorded_by(recorder), recorder:
            yield
    except Exception as error:
        raise NotRecordableError(f"{part} raised {type(error).__name__}: {error}") from error
    if recorder.left:
        recorder.left.clear()
        raise NotRecordableError(f"a linear solver of {part} may fail")


def _left_where(flag: Tensor, state: State[Any], new: State[Any]) -> State[Any]:
    """Return the new state; where a flag is set, the old one with the status `_LEFT`."""
    chosen: State[Any] = select_tree(flag, state, new)
    return chosen._replace(status=torch.where(flag, _LEFT, new.status))


def _captured_graph(replay: Replay, carried: Leaves, operands: Leaves) -> StepGraph:
    step = replay.straight()
    expected = several(step, _STEPS_OF_GRAPH, carried, step.prepared(operands))
    graph = StepGraph(step, _STEPS_OF_GRAPH, step.restrided(carried), operands)
    if not _agree(graph(carried, operands), expected):
        raise NotRecordableError("the graph differs from the steps one by one")
    return graph


def _on_cuda(x: Tensor) -> bool:
    return x.is_cuda


def _agree(recorded: Leaves, eager: Leaves, *, within: dict[torch.dtype, float] = _AGREEMENT) -> bool:
    return all(map(partial(_is_near, within=within), recorded, eager))


def _is_near(recorded: Tensor, eager: Tensor, within: dict[torch.dtype, float]) -> bool:
    if not eager.is_floating_point():
        return bool((recorded == eager).all())
    if not eager.numel():
        return True
    # Relative to the largest entry, since small entries are often differences of large ones.
    size = torch.where(torch.isfinite(eager), eager.abs(), 0.0).amax()
    # The difference of equal infinities is nan, so `recorded == eager` is asked below as well.
    near = (recorded - eager).abs() <= within[eager.dtype] * size
    return bool((near | (recorded == eager) | (recorded.isnan() & eager.isnan())).all())
