"""Fewer instructions for the same values: known results, common subexpressions, values read where they lie."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch

from implicitdiff._recorded.tape import Buffer, Instruction, Jump, Kind, Reference, TapeItem

Replaced = dict[Buffer, Buffer]
"""For a buffer the buffer that has the same elements."""


def simplified(items: Sequence[TapeItem]) -> list[TapeItem]:
    """Return instructions that compute the same values.

    A buffer that one instruction writes, as a whole, keeps its value. Such a buffer is replaced by an equal one: by the
    operand of an operation without effect, or by the result of an earlier instruction with the same operands.
    """
    return _Simplifier().run(items)


class _Simplifier:
    def __init__(self) -> None:
        self.same: Replaced = {}
        self.results: dict[Hashable, Instruction] = {}
        self.made_by: dict[Buffer, Instruction] = {}

    def run(self, items: Sequence[TapeItem]) -> list[TapeItem]:
        kept: list[TapeItem] = []
        end = _first_commit(items)
        for item in items[:end]:
            if isinstance(item, Jump) and item.flag is not None:
                flag, count = item.flag
                item = replace(item, flag=(self._moved(flag, _OF_LANE), count))
            elif isinstance(item, Instruction):
                item = self._with_equal_inputs(item, _ALL_KINDS)
                # The result of a rule fits no other rule.
                if (rule := _RULES.get(item.name)) is not None:
                    item = rule(item, self.made_by) or item
                if _is_pure(item):
                    self._note(item)
            kept.append(item)
        # The carried buffers change from here on.
        last = [self._with_equal_inputs(i, _STAYS) if isinstance(i, Instruction) else i for i in items[end:]]
        return kept + [i for i in last if not (isinstance(i, Instruction) and self._keeps_its_target(i))]

    def _with_equal_inputs(self, item: Instruction, kinds: Sequence[Kind]) -> Instruction:
        if any([r.buffer in self.same for r in item.inputs]):
            return item.with_inputs(tuple([self._moved(r, kinds) for r in item.inputs]))
        return item

    def _moved(self, reference: Reference, kinds: Sequence[Kind]) -> Reference:
        buffer = self.same.get(reference.buffer)
        if buffer is None or buffer.kind not in kinds:
            return reference
        return Reference(buffer, reference.offset, reference.strides)

    def _note(self, item: Instruction) -> None:
        """Remember a result; if an instruction only repeats a value, its buffer is replaced by that of the value."""
        out = item.outputs[0]
        if item.name == "COPY" and _lies_like(out, item.inputs[0], item) and not item.rounds:
            self.same[out.buffer] = item.inputs[0].buffer
            return
        # The layout of the result is part of the key: readers keep offsets and strides.
        key = (item.name, item.sizes, item.rounds, out.offset, out.strides, out.buffer.size, *map(_key, item.inputs))
        earlier = self.results.get(key)
        # The earlier result must exist wherever this result is read: made in the same scope or around.
        if earlier is not None and earlier.scope == item.scope[: len(earlier.scope)]:
            self.same[out.buffer] = earlier.outputs[0].buffer
            return
        self.results[key] = item
        self.made_by[out.buffer] = item

    def _keeps_its_target(self, item: Instruction) -> bool:
        """Return whether a carried buffer is to take its own value."""
        if item.name != "COMMIT":
            return False
        (out,), value = item.outputs, item.inputs[0]
        return self.same.get(value.buffer) is out.buffer and value[1:] == out[1:]


_ALL_KINDS = tuple(Kind)
_STAYS = (Kind.LANE, Kind.SHARED, Kind.CONSTANT, Kind.RESULT)
_OF_LANE = (Kind.CARRY, Kind.LANE, Kind.RESULT)
"""The kinds of buffers with a value for each lane, which flags of jumps are."""


def _first_commit(items: Sequence[TapeItem]) -> int:
    commits = (at for at, item in enumerate(items) if isinstance(item, Instruction) and item.name == "COMMIT")
    return next(commits, len(items))


def _is_pure(item: Instruction) -> bool:
    """Return whether an instruction alone writes its result, as a whole, from values that do not change."""
    if item.name == "COMMIT" or len(item.outputs) != 1:
        return False
    # Of the buffers that are read, carried ones change at the end of a step alone.
    read = [r.buffer for r in item.inputs]
    return item.outputs[0].buffer.writes == 1 and all([b.kind is not Kind.RESULT or b.writes == 1 for b in read])


def _lies_like(out: Reference, source: Reference, item: Instruction) -> bool:
    """Return whether a copy has the same positions as its source, in a buffer of the same size."""
    if out.buffer.size == source.buffer.size == 1:
        return source.buffer.kind is not Kind.SHARED
    is_same = (out.offset, out.strides) == (source.offset, source.strides)
    return is_same and out.buffer.size == source.buffer.size and source.buffer.kind in _OF_LANE


def _key(reference: Reference) -> Hashable:
    # By repr: 0 and -0 are equal as numbers, and nan is unequal to itself.
    number = reference.buffer.number
    return reference if number is None else (repr(number), reference.strides)


# --- rules ------------------------------------------------------------------------------------------------------------

Shortening = Callable[[Instruction, dict[Buffer, Instruction]], Instruction | None]


def _flag_with_constant(item: Instruction, made_by: dict[Buffer, Instruction]) -> Instruction | None:
    """``x & True`` and ``x | False`` are ``x``; ``x & False`` and ``x | True`` are the constant."""
    for at, other in ((0, 1), (1, 0)):
        number = item.inputs[at].buffer.number
        if number is not None:
            decides = (number != 0) == (item.name == "OR")
            return item.with_inputs((item.inputs[at if decides else other],), "COPY")
    return None


def _choice_known(item: Instruction, made_by: dict[Buffer, Instruction]) -> Instruction | None:
    """``where(c, x, x)`` is ``x``, and so is ``where(True, x, y)``."""
    condition, a, b = item.inputs
    number = condition.buffer.number
    if number is None and a != b:
        return None
    return item.with_inputs((b if number == 0 else a,), "COPY")


def _sum_with_negative(item: Instruction, made_by: dict[Buffer, Instruction]) -> Instruction | None:
    """``x + (-y)`` and ``(-y) + x`` are ``x - y``."""
    # Exact: IEEE arithmetic rounds ``x + (-y)`` and ``x - y`` alike.
    for at, other in ((1, 0), (0, 1)):
        if (negative := _maker("NEG", item.inputs[at], item, made_by)) is not None:
            return item.with_inputs((item.inputs[other], negative.inputs[0]), "SUB")
    return None


def _is_finite(item: Instruction, made_by: dict[Buffer, Instruction]) -> Instruction | None:
    """``(x == x) * (|x| != inf)``, as torch spells ``isfinite``."""
    equal, unequal = (_maker(n, r, item, made_by) for n, r in zip(("EQ", "NE"), item.inputs, strict=True))
    if equal is None or unequal is None or unequal.inputs[1].buffer.number != torch.inf:
        return None
    size = _maker("ABS", unequal.inputs[0], item, made_by)
    if size is None or {*equal.inputs} != {*size.inputs}:
        return None
    return item.with_inputs(size.inputs, "ISFINITE")


def _maker(name: str, operand: Reference, item: Instruction, made_by: dict[Buffer, Instruction]) -> Instruction | None:
    """Return the instruction of a name that has made an operand, entry by entry as `item` reads it; else None."""
    maker = made_by.get(operand.buffer)
    if maker is None or (maker.name, maker.sizes, maker.outputs) != (name, item.sizes, (operand,)):
        return None
    return maker


_RULES: dict[str, Shortening] = {
    "AND": _flag_with_constant,
    "OR": _flag_with_constant,
    "WHERE": _choice_known,
    "ADD": _sum_with_negative,
    "MUL": _is_finite,
}
