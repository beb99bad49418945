"""The compiled loop of a search: when it is recorded, and how it is checked.

A search repeats one step of its method. `implicitdiff._recorded` records the step of one lane as a program, and the
compiled machine repeats the program for all lanes. The first state and the judgement at the end are recorded as well,
as programs that run once.

Three checks keep a wrong recording from a wrong result. A recording is compared with its eager twin before its first
use. A key tells for which calls it is good, see `recordings`. At the end of each search the user's own function
measures the error, and lanes above their target go on eagerly.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import implicitdiff._closures.modes as _modes
import implicitdiff._torch.context as _context
import implicitdiff._torch.control as _control
import implicitdiff._torch.dispatch as _dispatch
import implicitdiff._torch.trees as pytree
from implicitdiff._recorded.record import Recorder, check_recordable
from implicitdiff._recorded.step import RecordedStep, is_available, record_step
from implicitdiff._recorded.tape import NotRecordableError
from implicitdiff._torch.trees import Leaves, Tree
from implicitdiff.errors import CompileError
from implicitdiff.linear_solve._outcome import unreported
from implicitdiff.solvers._loop.options import Compile
from implicitdiff.solvers._loop.problem import BatchedProblem, SearchOperands, any_lane, select, select_tree
from implicitdiff.solvers._loop.recordings import Recording, fingerprint, kept, kind_of, kinds, memories
from implicitdiff.solvers._loop.state import State

StepFn = Callable[[BatchedProblem, Tensor, State[Any]], tuple[Tensor, State[Any]]]
"""``step(problem, x, state) -> (x, state)``, one iteration in all lanes."""

_logger = logging.getLogger("implicitdiff.solvers")

_LANES_AT_ONCE = 8
"""The number of lanes that the machine runs together; as many doubles as the widest registers hold."""
_FEW = 4
"""Below this number of lanes the machine runs each by itself."""
_AT_MOST = 1000
"""Bound on the iterations of a call of the machine: in between Python handles signals."""
_MAX_COPIED = 2**26
"""Bound on the elements of copies, one for each lane, of operands that not every vmap batches."""
_LEFT = -1
"""The status of a lane whose step is left to Python, see `implicitdiff._torch.control.leave_to_python`."""
_LARGEST_INTEGER = 2**53
"""Bound on integers: the machine computes with doubles."""
_AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-2}
"""Largest difference between a recorded step and its eager twin, relative to the largest entry of a tensor."""


@dataclass(eq=False)
class Compiler:
    """The decision, for one search, between compiled and eager functions.

    Attributes:
        name: the name of the solver, for messages.
        method: all that the recordings depend on apart from the user's functions and operands; see `kind_of`.
        problem: the problem.
        compile: the option.
        is_over: True once the search is eager.
        is_left: True once a step was left to Python; the steps after it are eager.
    """

    name: str
    method: tuple[Any, ...]
    problem: BatchedProblem
    compile: Compile
    is_over: bool
    is_left: bool = False
    _is_checked: bool = False

    def loop(
        self, step: StepFn, asks: Callable[[State[Any]], Tensor], x: Tensor, state: State[Any]
    ) -> CompiledLoop | None:
        """Return the compiled loop; None if the search is eager.

        Args:
            step: an iteration, without a mask.
            asks: ``asks(state)``, the lanes that Python has to look at before the next iteration.
            x: the unknowns.
            state: the state.

        Raises:
            CompileError: with ``compile="always"``, if the loop cannot be compiled.
        """
        if self.is_left or not self._is_usable(x):
            return None
        try:
            return self._loop(step, asks, x, state)
        except NotRecordableError as error:
            self._end(error)
            return None

    def call(self, part: str, fn: Callable[[BatchedProblem, Leaves], Tree], inputs: Leaves) -> Any:
        """Return ``fn(problem, inputs)``, a tree of tensors with the lanes in front, by a recording if there is one."""
        if not self._is_usable(inputs[0]):
            return fn(self.problem, inputs)
        key = (self._key, part, kinds(inputs))
        known = kept.get(key)
        eager = None if isinstance(known, Recording) else fn(self.problem, inputs)
        if known is None:
            known = self._recorded_call(fn, inputs, eager)
            kept.put(key, known)
        # The first call too returns the recorded result, so that a later call returns the same bits.
        return self._called(known, inputs) if isinstance(known, Recording) else eager

    def _called(self, known: Recording, inputs: Leaves) -> Any:
        lanes = len(inputs[0])
        results = [torch.empty((lanes, *shape), dtype=dtype) for shape, dtype in known.kinds]
        return known.structure.unflatten(known.step.run(results, [*self._flat, *inputs, *self._constants], lanes, 1))

    def _recorded_call(
        self, fn: Callable[[BatchedProblem, Leaves], Tree], inputs: Leaves, eager: Tree
    ) -> Recording | str:
        results, structure = pytree.flatten(eager)
        theta = len(self._flat)

        def once(recorder: Recorder, carried: Leaves, operands: Leaves) -> tuple[Leaves, Tensor | None]:
            with _control.recorded_by(recorder), recorder:
                made = fn(self._operands.alone(operands[:theta]), operands[theta:])
            if recorder.left:
                raise NotRecordableError("a linear solver outside of the iteration may fail")
            return structure.tensors_of(made), None

        try:
            step = self._record(once, results, inputs, None)
        except NotRecordableError as error:
            return str(error)
        recording = Recording(step, structure, kinds(results))
        if not _agree(pytree.tensors(self._called(recording, inputs)), results):
            return "the recording differs from its eager twin"
        return recording

    def _loop(
        self, step: StepFn, asks: Callable[[State[Any]], Tensor], x: Tensor, state: State[Any]
    ) -> CompiledLoop | None:
        leaves, structure = pytree.flatten(state)
        key = (self._key, "step", kinds(leaves))
        known = kept.get(key)
        if isinstance(known, str):
            raise NotRecordableError(known)
        if known is not None:
            return self._made(known)

        can_leave = False

        def once(recorder: Recorder, carried: Leaves, operands: Leaves) -> tuple[Leaves, Tensor | None]:
            nonlocal can_leave
            x, *own = carried
            state = structure.unflatten(own)
            with _control.recorded_by(recorder), recorder:
                new_x, new = step(self._operands.alone(operands), x, state)
                for flag in recorder.left:
                    new_x, new, can_leave = select(flag, x, new_x), _left_where(flag, state, new), True
                return [new_x, *structure.tensors_of(new)], asks(new)

        try:
            status = next(i for i, t in enumerate(leaves, start=1) if t is state.status)
            program = self._record(once, [x, *leaves], [], status)
            recording = Recording(program, structure, (), can_leave)
            loop = self._made(recording)
            if not self._verify(step, loop, x, state):
                self.is_left = True
                return None
        except NotRecordableError as error:
            kept.put(key, str(error))
            raise
        kept.put(key, recording)
        return loop

    def _made(self, recording: Recording) -> CompiledLoop:
        _logger.info("%s: compiled loop", self.name)
        return CompiledLoop(recording, [*self._flat, *self._constants])

    def _record(self, once: Any, carried: Leaves, more: Leaves, status: int | None) -> RecordedStep:
        operands = self._operands
        try:
            return record_step(
                once,
                [t[:1] for t in carried],
                [*operands.of_first_lane(), *(t[:1] for t in more)],
                [*operands.is_lane, *(True for _ in more)],
                [t for t, _ in operands.lifted.constants],
                status,
                self._width(len(carried[0])),
            )
        except NotRecordableError:
            raise
        except Exception as error:
            # The step runs eagerly, and so fails under a recorder alone.
            raise NotRecordableError(f"the recording raised {type(error).__name__}: {error}") from error

    def _verify(self, step: StepFn, loop: CompiledLoop, x: Tensor, state: State[Any]) -> bool:
        """Raise unless the recorded step agrees with its eager twin; return False if the step is left to Python in all
        lanes, so that there is nothing to compare.

        Close to a solution residuals are rounding errors, which differ. So a step that differs is compared once more,
        at another point.
        """
        waves = torch.cos(torch.arange(x.shape[-1], dtype=x.dtype))
        shift = 1e-2 * x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-2) * waves if x.numel() else x
        for point in (x, x + shift):
            recorded = loop(point, state, at_most=1)
            active = (state.status == 0) & (recorded[1].status != _LEFT)
            if not any_lane(active):
                return False
            with unreported():
                twins = [pytree.tensors(t) for t in (recorded, step(self.problem, point, state))]
            if _agree(*([t[active] for t in twin] for twin in twins)):
                return True
        raise NotRecordableError("the recorded step differs from the eager step")

    def _end(self, error: NotRecordableError) -> None:
        """Go on eagerly."""
        self.is_over = True
        if self.compile == "always":
            raise CompileError(
                f'{self.name}: compile="always", but the loop cannot be compiled: {error}; use compile="auto"'
            ) from None
        _logger.info("%s: eager loop, since %s", self.name, error)

    # --- operands and keys --------------------------------------------------------------------------------------------

    def _is_usable(self, x: Tensor) -> bool:
        if not (self.is_over or self._is_checked):
            try:
                self._refuse_unusable(x)
            except NotRecordableError as error:
                self._end(error)
            self._is_checked = True
        return not self.is_over

    def _refuse_unusable(self, x: Tensor) -> None:
        operands = self.problem.operands
        if operands is None or not is_available():
            raise NotRecordableError("implicitdiff._C was not built (see python -m implicitdiff)")
        if operands.lifted.refusal is not None:
            raise NotRecordableError(operands.lifted.refusal)
        if _context.in_dispatch_mode() or not _modes.let_addresses_through():
            raise NotRecordableError("another mode of torch records or changes operations")
        if not len(x):
            raise NotRecordableError("there is no lane")
        if torch.get_default_device().type != "cpu":
            raise NotRecordableError(f"the default device is {torch.get_default_device()}")
        if any([t.layout is not torch.strided for t in (*operands.theta, *(t for t, _ in operands.lifted.constants))]):
            raise NotRecordableError("the function uses a sparse tensor")
        for tensor in (x, *operands.theta):
            if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_neg():
                raise NotRecordableError(f"an operand is a {type(tensor).__name__}")
            check_recordable(tensor)
        for tensor in (*operands.theta, *(t for t, _ in operands.lifted.constants)):
            if tensor.dtype == torch.int64 and tensor.numel() and tensor.abs().max() > _LARGEST_INTEGER:
                raise NotRecordableError("an operand has integers that no double represents")
        if operands.copied > _MAX_COPIED:
            raise NotRecordableError("some vmaps batch large operands, and others do not")
        hash(self._key)

    @property
    def _operands(self) -> SearchOperands:
        assert self.problem.operands is not None
        return self.problem.operands

    @cached_property
    def _flat(self) -> Leaves:
        return self._operands.flat()

    @cached_property
    def _constants(self) -> Leaves:
        return [_dispatch.whole_storage(t) for t, _ in self._operands.lifted.constants]

    @cached_property
    def _key(self) -> Hashable:
        operands, inputs = self._operands, self.problem.inputs
        lifted = operands.lifted
        constants = memories([t for t, _ in lifted.constants])
        shapes = tuple(zip(operands.shapes_of_lane, [t.dtype for t in operands.theta], *operands.dims, strict=True))
        unknowns = (tuple(map(tuple, inputs.shapes)), tuple(inputs.dtypes), self._width(math.prod(operands.lanes)))
        try:
            key = (kind_of(self.method), unknowns, shapes, constants, lifted.settings, fingerprint(lifted))
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
        recording: the recorded step.
        operands: the operands, with the lanes in front where lanes differ.
    """

    recording: Recording
    operands: Leaves

    def __call__(self, x: Tensor, state: State[Any], at_most: int = _AT_MOST) -> tuple[Tensor, State[Any]]:
        """Iterate until, block by block, all lanes have stopped or a lane asks to be looked at."""
        structure = self.recording.structure
        x, *leaves = self.recording.step.run([x, *structure.tensors_of(state)], self.operands, len(x), at_most)
        return x, structure.unflatten(leaves)

    def left(self, state: State[Any]) -> Tensor | None:
        """Return the lanes whose next step Python has to make; None if there are none."""
        if not self.recording.can_leave:
            return None
        flags = state.status == _LEFT
        return flags if any_lane(flags) else None


def _left_where(flag: Tensor, state: State[Any], new: State[Any]) -> State[Any]:
    """Return the new state; where a flag is set, the old one with the status `_LEFT`."""
    chosen: State[Any] = select_tree(flag, state, new)
    return chosen._replace(status=torch.where(flag, _LEFT, new.status))


def _agree(recorded: Leaves, eager: Leaves) -> bool:
    return all(map(_is_near, recorded, eager))


def _is_near(recorded: Tensor, eager: Tensor) -> bool:
    if not eager.is_floating_point():
        return bool((recorded == eager).all())
    if not eager.numel():
        return True
    size = torch.where(torch.isfinite(eager), eager.abs(), 0.0).amax()
    near = (recorded - eager).abs() <= _AGREEMENT[eager.dtype] * size
    return bool((near | (recorded == eager) | (recorded.isnan() & eager.isnan())).all())


def unfinished(problem: BatchedProblem, x: Tensor, error: Tensor, target: Tensor, converged: Tensor) -> Tensor | None:
    """Return the lanes whose error, by the user's own function, is above the target; None if there are none.

    A recorded error and an eager one differ by rounding, so twice the target is allowed.
    """
    size = torch.linalg.vector_norm(problem.residual(problem, x).detach(), dim=-1, dtype=torch.float64)
    above = converged & ~(size <= 2 * torch.maximum(target, error))
    return above if any_lane(above) else None
