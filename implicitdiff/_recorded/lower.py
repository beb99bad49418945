"""The code of the compiled machine for a `Tape`: what runs once, where buffers lie, how instructions are spelt."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from operator import itemgetter
from typing import NamedTuple

import torch

import implicitdiff._torch.dispatch as _dispatch
from implicitdiff._recorded.placement import placed
from implicitdiff._recorded.simplify import simplified
from implicitdiff._recorded.tape import (
    MATRICES,
    REDUCTIONS,
    TAKES_SHARED,
    Buffer,
    Instruction,
    Jump,
    Kind,
    Label,
    NotRecordableError,
    Reference,
    Tape,
    TapeItem,
    grouped,
)

_MAX_WORK, _THIN = 2**21, 16
"""Bound on the products of numbers in one operation on matrices, none of whose sizes is so small."""
_MAX_ARENA = 2**23
"""Bound on the elements of the memory of a block."""
_MAX_SPREAD = 32
"""Bound on the elements of values of all lanes that are copied, once, to each lane of a block."""


class Code(NamedTuple):
    """The arguments of the machine.

    Attributes:
        instructions: each a list of integers.
        sections: the indices at which the sections after the first begin: what runs once for each block, the first
            state, what precedes the first iteration, the iteration, the judgement.
        arena: the number of elements of a block's memory.
        offsets: the places of the operands, of the carried tensors, and of the flags.
        constants: the numbers known while recording, the first shared array.
    """

    instructions: list[list[int]]
    sections: list[int]
    arena: int
    offsets: dict[Buffer, int]
    constants: torch.Tensor


class Tapes(NamedTuple):
    """The recorded parts of a search, with their `COMMIT` instructions; a part that is not recorded is empty."""

    start: Tape
    step: Tape
    judge: Tape


def lower(
    tapes: Tapes,
    operands: Sequence[Buffer],
    carried: Sequence[Buffer],
    flags: Sequence[Buffer],
    first: Sequence[Instruction],
    names: Sequence[str],
) -> Code:
    """Return the code of a search.

    Args:
        tapes: the recorded parts.
        operands: the buffers with a value for each lane.
        carried: the buffers of the unknowns and the state.
        flags: buffers that keep their place.
        first: instructions that run before the first iteration, and after a judgement.
        names: the operations of the machine; the position is the code.
    """
    return _Lowering(tapes, operands, carried, flags, first, names).code()


# The passes run in this order. `simplified` counts on `Buffer.writes`, and leaves results that nothing reads to
# `_needed`. `_sections` needs the items in order. `placed` needs the final items, since lives are positions on the
# tape. `_Spelling` needs all places.
@dataclass(eq=False)
class _Lowering:
    tapes: Tapes
    operands: Sequence[Buffer]
    carried: Sequence[Buffer]
    flags: Sequence[Buffer]
    first: Sequence[TapeItem]
    names: Sequence[str]
    # Instructions of the first section: values that all lanes share, once for each thread.
    once: list[TapeItem] = field(default_factory=list)
    # Instructions of the second section: values that no iteration changes, once for each block.
    entry: list[TapeItem] = field(default_factory=list)
    # The buffers outside of a block's memory that are read, in order.
    outside: dict[Buffer, None] = field(default_factory=dict)
    # Copies of shared values in the memory of a block, by number or by buffer.
    spread: dict[Hashable, Buffer] = field(default_factory=dict)

    def code(self) -> Code:
        # First of all, since the division into sections fills `once` and `entry`.
        parts = [self._varying(tape) for tape in self.tapes]
        once_a_block = [self._with_local_inputs(item) for item in self.entry]
        head = [self._with_local_inputs(item) for item in self.first]
        # Buffers of several sections get fixed places at the beginning of the arena, and no other buffer shares these.
        fixed = chain(self.carried, self.operands, self.flags, _outputs(self.once), _outputs(self.entry))
        offsets, top = _in_a_row(dict.fromkeys(fixed))
        # The parts run one after the other, so their buffers share memory.
        placements = [placed(items, tape.loops, offsets, top) for items, tape in zip(parts, self.tapes, strict=True)]
        arena = max(end for _, end in placements)
        if arena > _MAX_ARENA:
            raise NotRecordableError(f"a step needs {8 * arena} bytes for each problem")
        constants = {b: b.value for b in self.outside if b.value is not None}
        shared = torch.cat([_dispatch.whole_storage(t).to(torch.float64) for t in constants.values()])
        start, step, judge = (items for items, _ in placements)
        # The spaces are 0, the arena of the block; 1, the constants; from 2 on, the shared operands.
        places = {b: (2 + b.index, 0) for b in self.outside}
        places |= {b: (1, at) for b, at in _in_a_row(constants)[0].items()}
        places |= {b: (0, at) for b, at in offsets.items()}
        spelt = _Spelling(self.names, places)
        instructions: list[list[int]] = []
        begins = []
        # In the order of `Code.sections`. A section falls through to its end, and jumps stay inside.
        for section in (self.once, once_a_block, start, head, step, judge):
            begins.append(len(instructions))
            instructions += spelt.section(section, len(instructions))
        return Code(instructions, begins[1:], arena, offsets, shared)

    def _varying(self, tape: Tape) -> list[TapeItem]:
        """Return the items of a part that depend on carried values; the others run once."""
        # Simplify first: merged instructions leave results that nothing reads.
        items = _needed(simplified(tape.items), self.flags)
        _refuse_large_matrices(items)
        return [*map(self._with_local_inputs, self._sections(items))]

    def _sections(self, items: Sequence[TapeItem]) -> list[TapeItem]:
        """Move instructions that do not depend on carried values out of the iteration; return the others."""
        # Buffers with the same numbers in all iterations, and whether lanes differ in them. A tape is in order, so one
        # pass finds all.
        varies: dict[Buffer, bool] = dict.fromkeys(self.operands, True)
        left: list[TapeItem] = []
        for item in items:
            read = [r.buffer for r in item.inputs if r.buffer.kind not in _COMMON]
            if not self._may_leave(item) or not varies.keys() >= {*read}:
                left.append(item)
                continue
            of_lane = any([varies[b] for b in read])
            varies.update(dict.fromkeys(_outputs([item]), of_lane))
            if of_lane:
                self.entry.append(item)
            else:
                self.once.append(self._with_local_inputs(item))
        return left

    def _may_leave(self, item: TapeItem) -> bool:
        """Return whether an item computes the same in each iteration if its inputs stay the same."""
        # An instruction in a branch may not run.
        if item.scope or item.name in _ACTS:
            return False
        # A buffer with several writers has no single value, and flags are read at their places by the machine.
        return not any([r.buffer.writes > 1 or r.buffer in self.flags for r in item.outputs])

    def _with_local_inputs(self, item: TapeItem) -> TapeItem:
        """Return an item whose inputs lie where the machine takes them; copies are made once."""
        if _COMMON.isdisjoint([r.buffer.kind for r in item.inputs]):
            return item
        return item.with_inputs(tuple([self._within_reach(item, r) for r in item.inputs]))

    def _within_reach(self, item: TapeItem, reference: Reference) -> Reference:
        buffer = reference.buffer
        if buffer.kind not in _COMMON:
            return reference
        self.outside.setdefault(buffer)
        return reference if _reads_shared(item, buffer) else reference._replace(buffer=self._local(buffer))

    def _local(self, buffer: Buffer) -> Buffer:
        # 0 and -0 are equal, and nan is not equal to itself.
        key = buffer if buffer.number is None else repr(buffer.number)
        if key not in self.spread:
            new = Buffer(Kind.RESULT, buffer.size, writes=1)
            self.spread[key] = new
            source, target = (Reference(b, 0, (1,)) for b in (buffer, new))
            self.once.append(Instruction("COPY", (buffer.size,), (target,), (source,)))
        return self.spread[key]


_COMMON = {Kind.SHARED, Kind.CONSTANT}
"""The kinds of buffers that blocks share, outside of the memory of each."""


_ACTS = {"LABEL", "JUMP", "JUMP_UNLESS_ANY", "COMMIT"}
"""Items that do more than compute results."""


def _in_a_row(buffers: Iterable[Buffer]) -> tuple[dict[Buffer, int], int]:
    """Return places of buffers one behind the other, and the end."""
    *begins, end = accumulate([b.size for b in buffers], initial=0)
    return dict(zip(buffers, begins, strict=True)), end


def _refuse_large_matrices(items: Sequence[TapeItem]) -> None:
    """Raise if a step multiplies or factorises matrices that libraries of linear algebra treat faster."""
    for item in items:
        if item.name in MATRICES and _work(item) > _MAX_WORK:
            raise NotRecordableError(f"a step has matrices of sizes {list(item.sizes)}, which are faster in torch")


def _work(item: TapeItem) -> int:
    """Return the number of products of numbers in a product or a factorisation; 0 for products with a thin matrix."""
    rows, columns, *inner = item.sizes[-3:] if item.name == "MATMUL" else item.sizes[-2:]
    if not inner:
        return rows * columns * min(rows, columns)
    return math.prod(item.sizes) if min(rows, columns, *inner) > _THIN else 0


def _reads_shared(item: TapeItem, buffer: Buffer) -> bool:
    """Return whether an instruction reads a buffer of all lanes where it lies, and is not slower for it."""
    return item.name in TAKES_SHARED and (item.name == "MATMUL" or buffer.size > _MAX_SPREAD)


def _outputs(items: Iterable[TapeItem]) -> list[Buffer]:
    return [r.buffer for i in items for r in i.outputs]


def _needed(items: Sequence[TapeItem], flags: Sequence[Buffer]) -> list[TapeItem]:
    """Leave out the instructions whose results nothing reads."""
    makers = grouped([(r.buffer, item) for item in items for r in item.outputs])
    left = [item for item in items if item.name in _ACTS]
    for flag in flags:
        left += makers.pop(flag, ())
    needed: set[TapeItem] = set()
    # From readers to makers, in any order: a loop reads at its beginning what was computed at its end.
    while left:
        needed.add(item := left.pop())
        for reference in item.inputs:
            left += makers.pop(reference.buffer, ())
    return [i for i in items if i in needed]


class _Spelling:
    """The integers of instructions."""

    def __init__(self, names: Sequence[str], places: Mapping[Buffer, tuple[int, int]]) -> None:
        self.codes = {name: i for i, name in enumerate(names)}
        # The space and the offset of each buffer.
        self.places = places

    def section(self, items: Sequence[TapeItem], begin: int) -> list[list[int]]:
        """Return the instructions of a section, the first of which has the index `begin`."""
        words = [item for item in items if not isinstance(item, Label)]
        own = {item: at for at, item in enumerate(words, start=begin)}
        places, place = dict[TapeItem, int](), begin + len(words)
        # A label takes no instruction: its place is that of the next.
        for item in reversed(items):
            places[item] = place = own.get(item, place)
        return [self.jump(i, places) if isinstance(i, Jump) else self.instruction(i) for i in words]

    def instruction(self, item: TapeItem) -> list[int]:
        references = [*item.outputs, *item.inputs]
        dims: list[Dim] = list(zip(item.sizes, *[r.strides for r in references], strict=True))
        if item.name in REDUCTIONS:
            dims = [*_coalesced(dims[:-1]), dims[-1]]
        elif item.name not in MATRICES:
            # In the order of the strides of the first operand, the longest first.
            dims = _coalesced(sorted(dims, key=itemgetter(1), reverse=True))
        # `most_dimensions` of `src/cpu/kernels.h`, counted after neighbours are merged.
        if len(dims) > 6:
            raise NotRecordableError(f"an operation has {len(dims)} dimensions")
        # The words are opcode, rounding, number of dimensions, sizes, number of operands, and for each operand space,
        # offset and strides. `Reader` in `program.cpp` takes them in this order.
        sizes, *strides = zip(*dims, strict=True) if dims else [()] * (1 + len(references))
        words = [self.codes[item.name], int(item.rounds), len(dims), *sizes, len(references)]
        for reference, steps in zip(references, strides, strict=True):
            words += (*self._place(reference), *steps)
        return words

    def jump(self, item: Jump, places: Mapping[TapeItem, int]) -> list[int]:
        # The words are opcode, index of the target instruction, and with a flag its offset and number of elements.
        offsets = [self._place(r)[1] for r in item.inputs]
        return [self.codes[item.name], places[item.target], *offsets, *item.sizes]

    def _place(self, reference: Reference) -> tuple[int, int]:
        space, begin = self.places[reference.buffer]
        return space, begin + reference.offset


Dim = tuple[int, ...]
"""The size of a dimension, and the stride of each operand."""


def _coalesced(dims: Sequence[Dim]) -> list[Dim]:
    """Merge neighbouring dimensions that all operands step through evenly; leave out those of size 1."""
    merged: list[Dim] = []
    for dim in [d for d in dims if d[0] != 1]:
        size, *steps = dim
        # For every operand one outer step must pass the whole inner dimension.
        if merged and merged[-1][1:] == tuple([size * step for step in steps]):
            dim = (size * merged.pop()[0], *steps)
        merged.append(dim)
    return merged
