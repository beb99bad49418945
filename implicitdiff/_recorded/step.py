"""A recorded step, ready to run: the machine with its operands."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import compress
from operator import not_
from typing import Any, NamedTuple

import torch
from torch import Tensor

import implicitdiff._C as _C
import implicitdiff._torch.dispatch as _dispatch
from implicitdiff._recorded.emitters import EMITTERS
from implicitdiff._recorded.lower import Code, Tapes, lower
from implicitdiff._recorded.record import Guard, Recorder
from implicitdiff._recorded.tape import Instruction, Kind, NotRecordableError, Reference, Tape, View, refuse_change
from implicitdiff._torch.trees import Leaves

OneStep = Callable[[Recorder, Leaves, Leaves], tuple[Leaves, Tensor]]
"""``step(recorder, carried, operands)`` makes a step of one lane under the recorder; returns the new carried tensors,
and a flag, shape ``(1,)``, set where Python has to look at the state before the next step."""

OneChange = Callable[[Recorder, Leaves, Leaves], Leaves]
"""``change(recorder, carried, operands)`` returns new carried tensors of one lane, computed under the recorder."""

# The numbers of dtypes in `with_type` of `src/cpu/machine.cpp`.
_CODES = {torch.float64: 0, torch.float32: 1, torch.int64: 2, torch.bool: 3, torch.int32: 4}


@dataclass(eq=False)
class RecordedStep:
    """A step that the compiled machine repeats, with the first state before it and the judgement after it.

    Attributes:
        machine: the machine with the instructions.
        starts: True if the first state is recorded.
        judges: True if the judgement is recorded.
        lane_operands: the numbers of the operands with a value for each lane.
        shared: the numbers of the operands for all lanes; negative numbers count from the end.
        constants: the numbers known while recording.
    """

    machine: Any
    starts: bool
    judges: bool
    lane_operands: list[int]
    shared: list[int]
    constants: Tensor

    def run(
        self, carried: Leaves, operands: Leaves, lanes: int, at_most: int, starts: bool = False, judges: bool = False
    ) -> None:
        """Repeat the step until, block by block, all lanes have stopped or a lane asks to be looked at.

        Args:
            carried: the unknowns and the state, with `lanes` in front, contiguous; they change in place.
            operands: the operands; those with a value for each lane have the lanes in front. The memories of the
                constants are the last.
            lanes: the number of lanes.
            at_most: bound on the number of steps.
            starts: True to compute the first state before; of `carried` only the unknowns are read then.
            judges: True to judge a block whose lanes have all stopped, which may let lanes go on.
        """
        # The lists keep the tensors alive as long as the machine reads at their addresses.
        own = [operands[i].contiguous() for i in self.lane_operands]
        shared = [self.constants, *[operands[i].detach().to(torch.float64).contiguous() for i in self.shared]]
        addresses = partial(map, Tensor.data_ptr)
        tensors = [*addresses(carried)], [*addresses(own)], [*addresses(shared)]
        self.machine.run(*tensors, lanes, at_most, torch.get_num_threads(), starts, judges)


def _by_python(recorder: Recorder, carried: Leaves, operands: Leaves) -> Leaves:
    raise NotRecordableError("the part is left to Python")


class Parts(NamedTuple):
    """The parts of a search that are recorded.

    Attributes:
        step: makes a step.
        start: computes the first state, by default left to Python.
        judge: judges lanes that have stopped, by default left to Python.
    """

    step: OneStep
    start: OneChange = _by_python
    judge: OneChange = _by_python


@contextmanager
def _without_collection() -> Iterator[None]:
    """Run the body without the collector of cycles: a recording keeps many objects, which the collector visits again
    and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_without_collection()
def record_step(
    parts: Parts,
    carried: Sequence[Tensor],
    operands: Sequence[Tensor],
    is_lane: Sequence[bool],
    constants: Sequence[Tensor],
    status: int,
    width: int,
) -> RecordedStep:
    """Record a step and make it ready for the machine. The other parts are left out if they cannot be recorded.

    Args:
        parts: the step, and what precedes and follows the steps.
        carried: the unknowns and the state of one lane.
        operands: the operands of one lane.
        is_lane: for each operand, whether it has a value for each lane.
        constants: captured tensors that are neither differentiated nor batched.
        status: the position among `carried` of the status, 0 in running lanes.
        width: the number of lanes that the machine runs together.

    Raises:
        NotRecordableError: the machine has no instruction for an operation, or Python decides on values.
    """
    recorder = Recorder(EMITTERS, constants)
    # Copies, since a buffer is known by its storage, and two operands may share one.
    carried = [t.detach().clone(memory_format=torch.contiguous_format) for t in carried]
    operands = [t.detach().clone(memory_format=torch.contiguous_format) for t in operands]
    buffers = [recorder.operand(t, Kind.CARRY) for t in carried]
    own = [(i, recorder.operand(t, Kind.LANE)) for i, t in compress(enumerate(operands), is_lane)]
    for i, tensor in compress(enumerate(operands), map(not_, is_lane)):
        recorder.share(tensor, i)
    with Guard():
        # The step comes last, so the recorder's tape is that of the step.
        start, judge = (_recorded_change(recorder, part, carried, operands) for part in (parts.start, parts.judge))
        recorder.begin_part()
        new, asks = parts.step(recorder, carried, operands)
    running, paused, first = _commit(recorder, carried, new, asks, status)
    flags = [running.buffer, paused.buffer]
    # The numbers in `recorder.shared` are places in this list, negative ones from its end.
    of_all = [*operands, *map(_dispatch.whole_storage, constants)]
    tapes = Tapes(start.tape, recorder.tape, judge.tape)
    code = lower(tapes, [b for _, b in own], buffers, flags, first, _C.cpu.operations())
    return RecordedStep(
        machine=_machine(
            width,
            code,
            [(code.offsets[b], t.numel(), _CODES[t.dtype]) for b, t in zip(buffers, carried, strict=True)],
            [(code.offsets[b], operands[i].numel(), _CODES[operands[i].dtype]) for i, b in own],
            [of_all[i].numel() for i in recorder.shared],
            [code.offsets[b] for b in flags],
        ),
        starts=start.is_recorded,
        judges=judge.is_recorded,
        lane_operands=[i for i, _ in own],
        shared=recorder.shared,
        constants=code.constants,
    )


def _machine(
    width: int,
    code: Code,
    carries: Sequence[tuple[int, int, int]],
    inputs: Sequence[tuple[int, int, int]],
    shared: Iterable[int],
    flags: Sequence[int],
) -> Any:
    sizes = [code.constants.numel(), *shared]
    # The constructor checks the reach of every instruction, and raises ValueError before anything runs.
    return _C.cpu.Machine(width, code.instructions, code.sections, code.arena, carries, inputs, sizes, *flags)


class _Change(NamedTuple):
    """A recorded part that changes all lanes; its tape is empty if the part is left to Python."""

    tape: Tape
    is_recorded: bool


def _recorded_change(recorder: Recorder, change: OneChange, carried: Leaves, operands: Leaves) -> _Change:
    recorder.begin_part()
    try:
        _assign(recorder, carried, change(recorder, carried, operands), recorder.constant(True, torch.bool))
    except NotRecordableError:
        return _Change(Tape(), is_recorded=False)
    return _Change(recorder.tape, is_recorded=True)


def _commit(
    recorder: Recorder, carried: Leaves, new: Leaves, asks: Tensor, status: int
) -> tuple[View, View, list[Instruction]]:
    """Emit the end of a step: running lanes take their new values. Return the flags `running` and `paused`, and the
    instructions that compute `running` before the first step."""
    tape = recorder.tape
    running, paused = (recorder.temporary((1,), torch.bool) for _ in range(2))
    # Before the assignments: `running` still holds the lanes that made this step.
    tape.emit("AND", [paused], [recorder.view(asks), running], (1,))
    _assign(recorder, carried, new, running)
    zero = recorder.constant(0, torch.int64)
    # For the next step; before the first step the same instruction runs by itself.
    tape.emit("EQ", [running], [recorder.view(carried[status]), zero], (1,))
    last = tape.items[-1]
    assert isinstance(last, Instruction)
    return running, paused, [last]


def _assign(recorder: Recorder, carried: Leaves, new: Leaves, mask: View) -> None:
    """Emit instructions by which the carried tensors take their new values in the lanes of a mask."""
    targets, sources = [[recorder.view(t) for t in ts] for ts in (carried, new)]
    changed = [(a, b) for a, b in zip(targets, sources, strict=True) if a != b and a.buffer.size]
    for target, source in changed:
        refuse_change("a step changes a part of the state from", target, source)
    where = Reference(mask.buffer, mask.offset, ())
    for target, source in _in_order(recorder, changed):
        value = Reference(source.buffer, source.offset, source.strides)
        out = Reference(target.buffer, target.offset, target.strides)
        # A stride of 0: one flag of a lane masks all elements.
        inputs = (value, where._replace(strides=(0,) * len(target.shape)))
        recorder.tape.items.append(Instruction("COMMIT", target.shape, (out,), inputs))


def _in_order(recorder: Recorder, changed: Sequence[tuple[View, View]]) -> list[tuple[View, View]]:
    """Order targets and sources so that a carried tensor changes after it is read; copy what is read in a circle."""
    ordered: list[tuple[View, View]] = []
    left = list(changed)
    while left:
        read = {source.buffer for _, source in left}
        # A target that no remaining source reads can be written now.
        free = [pair for pair in left if pair[0].buffer not in read]
        if not free:
            free = [(target, recorder.copy(source)) for target, source in left]
            left = []
        ordered += free
        left = [pair for pair in left if pair not in free]
    return ordered


def is_available() -> bool:
    """Return whether the compiled machine was built."""
    return _C.cpu is not None
