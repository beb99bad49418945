"""The places of the buffers of an iteration: those that are not needed at the same time share memory."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence

from implicitdiff._recorded.tape import (
    MATRICES,
    REDUCTIONS,
    Buffer,
    Instruction,
    Kind,
    Label,
    Reference,
    TapeItem,
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
    lives = _Lives(items, loops)
    # Copies first: joined buffers share one place.
    kept = _without_copies(items, lives, offsets)
    return kept, _placed_from(len(items), lives, offsets, top)


class _Lives:
    """The first and the last position on the tape where buffers are used.

    Buffers of one group share memory. `group` leads from a buffer, step by step, to the one that stands for its group.
    """

    def __init__(self, items: Sequence[TapeItem], loops: Sequence[tuple[Label, Label]]) -> None:
        self.uses: dict[Buffer, list[int]] = {}
        self.group: dict[Buffer, Buffer] = {}
        at_label: dict[Label, int] = {}
        for at, item in enumerate(items):
            if isinstance(item, Label):
                at_label[item] = at
            for reference in (*item.outputs, *item.inputs):
                self.uses.setdefault(reference.buffer, []).append(at)
        # A value from before a loop is read again in the next round. Inner loops come first.
        for begin, end in ((at_label[a], at_label[b]) for a, b in loops):
            for buffer in {r.buffer for item in items[begin:end] for r in (*item.outputs, *item.inputs)}:
                uses = self.uses[buffer]
                if uses[0] < begin and uses[-1] < end:
                    uses.append(end)

    def join(self, a: Buffer, b: Buffer) -> None:
        """Let two groups share memory."""
        self.uses[a] = sorted({*self.uses[a], *self.uses[b]})
        self.group[b] = a

    def of(self, buffer: Buffer) -> Buffer:
        """Return the buffer that stands for a group."""
        while buffer in self.group:
            buffer = self.group[buffer]
        return buffer


def _without_copies(items: Sequence[TapeItem], lives: _Lives, fixed: Container[Buffer]) -> list[TapeItem]:
    """Let a copy share the memory of its source where the source is not used any more, or the copy not yet; leave out
    the copying."""
    straight, kept = 0, []
    for at, item in enumerate(items):
        if not isinstance(item, Instruction):
            straight = at + 1
        elif item.name == "COPY" and _is_mere_copy(item):
            target, source = (lives.of(r.buffer) for r in (*item.outputs, *item.inputs))
            # Buffers with a fixed place, and operands, keep their memory.
            is_free = not any([b in fixed or b.kind is not Kind.RESULT for b in (target, source)])
            if is_free and _may_share(items, lives, target, source, at, straight):
                lives.join(target, source)
                continue
        kept.append(item)
    return kept


def _may_share(
    items: Sequence[TapeItem], lives: _Lives, target: Buffer, source: Buffer, at: int, straight: int
) -> bool:
    """Return whether target and source of the copy at a position can share memory; from `straight` on there is no
    label and no jump before the copy."""
    of_source, of_target = lives.uses[source], lives.uses[target]
    if target is source or of_source[-1] != at:
        return False
    # The target begins with this copy, so nothing is overwritten.
    if of_target[0] == at:
        return True
    # The source may be computed where the copy is to lie, unless the old value is used in between.
    made = of_source[0]
    between = [i for i in of_target if made <= i < at]
    if made < straight or any(i != made for i in between):
        return False
    maker = items[made]
    return not between or (isinstance(maker, Instruction) and _works_in_place(maker, lives, target))


def _is_mere_copy(item: Instruction) -> bool:
    """Return whether a copy is of a whole buffer, element for element."""
    if item.rounds:
        return False
    (out,), (source,) = item.outputs, item.inputs
    steps = [s for s, n in zip(out.strides, item.sizes, strict=True) if n > 1]
    is_whole = all(steps) and out.buffer.size == source.buffer.size == math.prod(item.sizes)
    return is_whole and _lie(out, item.sizes) == _lie(source, item.sizes)


def _works_in_place(item: Instruction, lives: _Lives, buffer: Buffer) -> bool:
    """Return whether an instruction may write its result in the place of `buffer`, one of its inputs."""
    if item.name in REDUCTIONS | MATRICES or len(item.outputs) != 1:
        return False
    place = _lie(item.outputs[0], item.sizes)
    return all(_lie(r, item.sizes) == place for r in item.inputs if lives.of(r.buffer) is buffer)


def _lie(reference: Reference, sizes: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Return offset and strides; the strides of dimensions with one element are 0."""
    return reference.offset, tuple([s if n != 1 else 0 for s, n in zip(reference.strides, sizes, strict=True)])


def _placed_from(length: int, lives: _Lives, offsets: dict[Buffer, int], top: int) -> int:
    """Place the buffers that are used at the positions of the iteration; return the end of the memory."""
    births: dict[int, list[Buffer]] = {}
    deaths: dict[int, list[Buffer]] = {}
    for buffer, uses in lives.uses.items():
        # A group has one place, that of the buffer that stands for the group.
        if buffer not in offsets and buffer.kind is Kind.RESULT and lives.of(buffer) is buffer:
            births.setdefault(uses[0], []).append(buffer)
            deaths.setdefault(uses[-1], []).append(buffer)
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
    """Pieces of memory between `bottom` and `top` that are free."""

    def __init__(self, bottom: int) -> None:
        self.top = bottom
        self.pieces: list[tuple[int, int]] = []

    def take(self, size: int) -> int:
        fitting = [(n, at) for at, n in self.pieces if n >= size]
        if not fitting:
            at, self.top = self.top, self.top + size
            return at
        # The smallest piece that fits leaves larger pieces whole.
        n, at = min(fitting)
        self.pieces.remove((at, n))
        if n > size:
            self.pieces.append((at + size, n - size))
        return at

    def give(self, at: int, size: int) -> None:
        # Free pieces never touch, since touching pieces are merged here, so a new piece has two neighbours at most.
        for piece in list(self.pieces):
            if piece[0] + piece[1] == at or at + size == piece[0]:
                self.pieces.remove(piece)
                at, size = min(at, piece[0]), size + piece[1]
        if size:
            self.pieces.append((at, size))
