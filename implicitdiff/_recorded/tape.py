"""A step of a search as a list of instructions on buffers.

A buffer is the memory of one or several tensors of the recording. A view is a tensor: a buffer with offset, shape and
strides, as torch has them. So an operation that returns a view of its argument needs no instruction, and an operation
in place writes to a view.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")

_SPELT = (
    "COPY ADD SUB MUL DIV POW ATAN2 HYPOT MAXIMUM MINIMUM FMAX FMIN REMAINDER FMOD FLOOR_DIVIDE COPYSIGN EQ NE LT LE "
    "GT GE AND OR XOR MATMUL",
    "SUM PROD AMAX AMIN ANY ALL ARGMAX ARGMIN NORM SORT SORT_DESCENDING GATHER SCATTER SCATTER_ADD CUMSUM CUMPROD",
    "MATMUL LU LU_SOLVE CHOLESKY SOLVE_LOWER SOLVE_UPPER SOLVE_UNIT_LOWER SOLVE_UNIT_UPPER QR APPLY_Q "
    "APPLY_Q_TRANSPOSED EIGH SVD",
)
# Inputs of the first may lie outside of a block's memory. The last dimension of the second and all dimensions of the
# third have a meaning each, so that they are not merged.
TAKES_SHARED, REDUCTIONS, MATRICES = (frozenset(names.split()) for names in _SPELT)


class NotRecordableError(Exception):
    """A step cannot be recorded; the message says why."""


class Kind(Enum):
    """The origin of a buffer.

    `CARRY`: unknowns and state, changed by each step. `LANE`: an operand with a value for each lane. `SHARED`: an
    operand with one value for all lanes. `CONSTANT`: known while recording. `RESULT`: computed by instructions.
    """

    CARRY = "carry"
    LANE = "lane"
    SHARED = "shared"
    CONSTANT = "constant"
    RESULT = "result"


@dataclass(eq=False, slots=True)
class Buffer:
    """A piece of memory.

    Attributes:
        kind: the origin.
        size: the number of elements.
        scope: the numbers of the open branches and loops where the buffer was made, the outermost first.
        index: the number of the operand or of the carried tensor.
        value: a tensor in the memory of a constant.
        number: the value of a constant of one element; None for other buffers.
        writes: the number of instructions that write to the buffer.
    """

    kind: Kind
    size: int
    scope: tuple[int, ...] = ()
    index: int = -1
    value: Tensor | None = None
    number: float | None = None
    writes: int = 0


class View(NamedTuple):
    """A tensor in a buffer.

    Attributes:
        buffer: the buffer.
        offset: the position of the first element.
        shape: the shape.
        strides: the distances between neighbours in each dimension, in elements.
        dtype: the dtype.
    """

    buffer: Buffer
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def broadcast(self, shape: Sequence[int]) -> View:
        """Return the view expanded to a shape."""
        if self.shape == shape:
            return self
        return View(self.buffer, self.offset, tuple(shape), self._strides_over(shape), self.dtype)

    def over(self, shape: Sequence[int]) -> Reference:
        """Return the operand of an instruction that goes through a shape, to which the view is expanded."""
        buffer, offset, own, strides, _ = self
        return Reference(buffer, offset, strides if own == shape else self._strides_over(shape))

    def _strides_over(self, shape: Sequence[int]) -> tuple[int, ...]:
        # torch leaves the stride of a dimension of size 1 arbitrary.
        moved = [0 if n == 1 else s for n, s in zip(self.shape, self.strides, strict=True)]
        return (*(0,) * (len(shape) - len(moved)), *moved)

    def moved(self, order: Sequence[int]) -> View:
        """Return the view with its dimensions in another order."""
        return self._replace(shape=tuple(self.shape[d] for d in order), strides=tuple(self.strides[d] for d in order))

    def like(self, tensor: Tensor) -> View:
        """Return the view with the geometry of a tensor, whose storage represents the buffer."""
        offset = self.offset + int(tensor.storage_offset())
        return self._replace(offset=offset, shape=tuple(tensor.shape), strides=tensor.stride())


class Reference(NamedTuple):
    """An operand of an instruction: a buffer, the offset, and a stride for each dimension of the instruction."""

    buffer: Buffer
    offset: int
    strides: tuple[int, ...]


@dataclass(eq=False, slots=True)
class TapeItem:
    """An instruction, a label or a jump.

    Attributes:
        name: the operation.
        sizes: the iteration space.
        outputs: the operands that are written.
        inputs: the operands that are read.
        rounds: True if results are rounded to float32.
        scope: the open branches and loops.
    """

    name: str
    sizes: tuple[int, ...] = ()
    outputs: tuple[Reference, ...] = ()
    inputs: tuple[Reference, ...] = ()
    rounds: bool = False
    scope: tuple[int, ...] = ()

    def with_inputs(self, inputs: tuple[Reference, ...], name: str | None = None) -> TapeItem:
        """Return the item with other operands, or another operation on these."""
        return Instruction(name or self.name, self.sizes, self.outputs, inputs, self.rounds, self.scope)


class Instruction(TapeItem):
    """One operation of the machine."""

    __slots__ = ()


class Label(TapeItem):
    """A position on the tape, the target of jumps."""

    __slots__ = ()


@dataclass(eq=False, slots=True)
class Jump(TapeItem):
    """A jump. One with a flag, its input with the number of elements as size, is made if no lane has the flag.

    Attributes:
        target: where to.
    """

    target: Label = field(kw_only=True)

    def with_inputs(self, inputs: tuple[Reference, ...], name: str | None = None) -> TapeItem:
        """Return the jump with another flag."""
        return replace(self, inputs=inputs)


@dataclass(eq=False)
class Tape:
    """The instructions of one step, in order.

    Attributes:
        items: instructions, labels and jumps.
        scope: the numbers of the open branches and loops.
        loops: the first and the last label of each loop.
    """

    items: list[TapeItem] = field(default_factory=list)
    scope: tuple[int, ...] = ()
    loops: list[tuple[Label, Label]] = field(default_factory=list)
    # The number of scopes that were ever opened.
    _scopes: int = 0

    def emit(self, name: str, outputs: Sequence[View], inputs: Sequence[View], shape: Sequence[int]) -> None:
        """Add an instruction over `shape`; every view is broadcast to this shape."""
        written, read = [v.over(shape) for v in outputs], [v.over(shape) for v in inputs]
        # Numbers in the machine are doubles; a result of float32 is rounded after each instruction.
        self.add(name, shape, written, read, rounds=outputs[0].dtype == torch.float32)

    def add(
        self,
        name: str,
        sizes: Sequence[int],
        outputs: Sequence[Reference],
        inputs: Sequence[Reference],
        rounds: bool = False,
    ) -> None:
        """Add an instruction with references as given."""
        for reference in outputs:
            # Counted for later passes: a buffer with one write keeps its value.
            reference.buffer.writes += 1
            if reference.buffer.kind is not Kind.RESULT:
                raise NotRecordableError("an operand is changed in place")
            if not self._is_open(reference.buffer):
                raise NotRecordableError("a value of a closed branch is changed in place")
        if not all([r.buffer.scope == self.scope[: len(r.buffer.scope)] for r in inputs]):
            raise NotRecordableError("a value of a closed branch is used outside")
        self.items.append(Instruction(name, tuple(sizes), tuple(outputs), tuple(inputs), rounds, self.scope))

    def label(self) -> Label:
        """Return a new label, not yet placed."""
        return Label("LABEL", scope=self.scope)

    def jump(self, target: Label) -> None:
        """Add a jump."""
        self.items.append(Jump("JUMP", scope=self.scope, target=target))

    def jump_unless_any(self, target: Label, flag: View) -> None:
        """Add a jump that is made if a flag is not set in any lane."""
        read = (Reference(flag.buffer, flag.offset, ()),)
        self.items.append(Jump("JUMP_UNLESS_ANY", (math.prod(flag.shape),), (), read, scope=self.scope, target=target))

    def open(self) -> None:
        """Open a branch or a loop."""
        # A new number for each scope, since two branches after one another are different scopes.
        self._scopes += 1
        self.scope = (*self.scope, self._scopes)

    def close(self) -> None:
        """Close the innermost branch or loop."""
        self.scope = self.scope[:-1]

    def _is_open(self, buffer: Buffer) -> bool:
        """Return whether the branch or the loop that made a buffer is still open."""
        # Open scopes form a stack, so a prefix is the same scope or one around.
        scope = buffer.scope
        return scope == self.scope[: len(scope)]


def refuse_change(what: str, old: View, new: View) -> None:
    """Raise if a value is to be replaced by one of another shape or dtype."""
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        raise change(what, old, new)


def change(what: str, old: View | Tensor, new: View | Tensor) -> NotRecordableError:
    """Return the refusal of a value in the place of another."""
    return NotRecordableError(f"{what} {list(old.shape)}, {old.dtype} to {list(new.shape)}, {new.dtype}")


def grouped(pairs: Iterable[tuple[KeyT, ValueT]]) -> dict[KeyT, list[ValueT]]:
    """Return the values of each key, in order."""
    found: dict[KeyT, list[ValueT]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        # Of a dimension of size 0 torch counts size 1.
        step *= max(n, 1)
    return tuple(reversed(strides))
