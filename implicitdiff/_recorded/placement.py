"""The places of the buffers of an iteration: those that are not needed at the same time share memory."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Container, Sequence
from itertools import chain

from implicitdiff._recorded.tape import (
    MATRICES,
    REDUCTIONS,
    Buffer,
    Instruction,
    Kind,
    Label,
    Reference,
    TapeItem,
    grouped,
)


def placed(
    items: Sequence[TapeItem], loops: Sequence[tuple[Label, Label]], offsets: dict[Buffer, int], top: int
) -> tuple[list[TapeItem], int]:
    """Place the buffers of an iteration in a block's memory, behind `top`.

    Args:
        items: the iteration.
        loops: the first and the last label of each loop.
        offsets: the places of the buffers that have one; those of the others are added.
        top: the end of the memory in use.

    Returns:
        The items without copies from a place to itself, and the end of the memory.
    """
    lives = _Lives(items, loops, offsets)
    # Copies first: joined buffers share one place.
    kept = _without_copies(items, lives)
    return kept, _placed_from(len(items), lives, offsets, top)


class _Lives:
    """The positions on the tape where buffers are used, for the buffers that have no place yet.

    Buffers of one group share memory. `group` leads from a buffer, step by step, to the one that stands for its group.
    This one alone has an entry in `uses`. `ends` are the positions of labels and jumps.
    """

    def __init__(
        self, items: Sequence[TapeItem], loops: Sequence[tuple[Label, Label]], fixed: Container[Buffer]
    ) -> None:
        used = [[r.buffer for r in (*item.outputs, *item.inputs)] for item in items]
        pairs = [(b, at) for at, buffers in enumerate(used) for b in buffers]
        self.uses = grouped([(b, at) for b, at in pairs if b.kind is Kind.RESULT and b not in fixed])
        self.group: dict[Buffer, Buffer] = {}
        self.ends = [at for at, item in enumerate(items) if not isinstance(item, Instruction)]
        places = {items[at]: at for at in self.ends}
        # A value from before a loop is read again in the next round.
        for begin, end in ((places[a], places[b]) for a, b in loops):
            inside = self.uses.keys() & {*chain(*used[begin:end])}
            for positions in [self.uses[b] for b in inside if self.uses[b][0] < begin]:
                insort(positions, end)

    def join(self, a: Buffer, b: Buffer) -> None:
        """Let two groups share memory."""
        self.uses[a] = sorted({*self.uses[a], *self.uses.pop(b)})
        self.group[b] = a

    def of(self, buffer: Buffer) -> Buffer:
        """Return the buffer that stands for a group."""
        while buffer in self.group:
            buffer = self.group[buffer]
        return buffer


def _without_copies(items: Sequence[TapeItem], lives: _Lives) -> list[TapeItem]:
    """Let a copy share the memory of its source where the source is not used any more, or the copy not yet; leave out
    the copying."""
    kept = []
    for at, item in enumerate(items):
        if item.name == "COPY" and _is_mere_copy(item):
            target, source = (lives.of(r.buffer) for r in (*item.outputs, *item.inputs))
            if _may_share(items, lives, target, source, at):
                lives.join(target, source)
                continue
        kept.append(item)
    return kept


def _may_share(items: Sequence[TapeItem], lives: _Lives, target: Buffer, source: Buffer, at: int) -> bool:
    """Return whether target and source of the copy at a position can share memory."""
    # Buffers with a fixed place, and operands, keep their memory.
    if len(lives.uses.keys() & {target, source}) < 2 or lives.uses[source][-1] != at:
        return False
    # The target begins with this copy, so nothing is overwritten.
    if lives.uses[target][0] == at:
        return True
    # The source may be computed where the copy is to lie, unless the old value is used in between.
    made = lives.uses[source][0]
    between = {i for i in (*lives.uses[target], *lives.ends) if made <= i < at}
    return not between or (between == {made} and _works_in_place(items[made], lives, target))


def _is_mere_copy(item: TapeItem) -> bool:
    """Return whether a copy is of a whole buffer, element for element."""
    if item.rounds:
        return False
    (out,), (source,) = item.outputs, item.inputs
    steps = [s for s, n in zip(out.strides, item.sizes, strict=True) if n > 1]
    is_whole = all(steps) and out.buffer.size == source.buffer.size == math.prod(item.sizes)
    return is_whole and _lie(out, item.sizes) == _lie(source, item.sizes)


def _works_in_place(item: TapeItem, lives: _Lives, buffer: Buffer) -> bool:
    """Return whether an instruction may write its result in the place of `buffer`, one of its operands."""
    place = _lie(item.outputs[0], item.sizes)
    reads = [_lie(r, item.sizes) for r in item.inputs if lives.of(r.buffer) is buffer]
    # The others read an entry again after they have written to one.
    return item.name not in REDUCTIONS | MATRICES and all([read == place for read in reads])


def _lie(reference: Reference, sizes: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Return offset and strides; the strides of dimensions with one element are 0."""
    return reference.offset, tuple([s if n != 1 else 0 for s, n in zip(reference.strides, sizes, strict=True)])


def _placed_from(length: int, lives: _Lives, offsets: dict[Buffer, int], top: int) -> int:
    """Place the buffers that are used at the positions of the iteration; return the end of the memory."""
    births = grouped([(uses[0], buffer) for buffer, uses in lives.uses.items()])
    deaths = grouped([(uses[-1], buffer) for buffer, uses in lives.uses.items()])
    free = _FreeMemory(top)
    for at in range(length):
        # Births before deaths: a result must not lie on an operand that the same instruction reads.
        for buffer in births.get(at, []):
            offsets[buffer] = free.take(buffer.size)
        for buffer in deaths.get(at, []):
            free.give(offsets[buffer], buffer.size)
    offsets.update({buffer: offsets[lives.of(buffer)] for buffer in lives.group})
    return free.top


class _FreeMemory:
    """Pieces of memory between `bottom` and `top` that are free, by their beginnings and by their ends."""

    def __init__(self, bottom: int) -> None:
        self.top = bottom
        self.ends: dict[int, int] = {}
        self.begins: dict[int, int] = {}

    def take(self, size: int) -> int:
        fitting = [(end - at, at) for at, end in self.ends.items() if end - at >= size]
        if not fitting:
            at, self.top = self.top, self.top + size
            return at
        # The smallest piece that fits leaves larger pieces whole.
        n, at = min(fitting)
        del self.begins[self.ends.pop(at)]
        self.give(at + size, n - size)
        return at

    def give(self, at: int, size: int) -> None:
        # Merge the piece with the free pieces on both sides.
        begin, end = self.begins.pop(at, at), self.ends.pop(at + size, at + size)
        if begin < end:
            self.ends[begin], self.begins[end] = end, begin
