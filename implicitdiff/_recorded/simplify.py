"""Fewer instructions for the same values: known results, common subexpressions, values read where they lie."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import chain

import torch

from implicitdiff._recorded.tape import Buffer, Kind, Reference, TapeItem

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
        self.results: dict[Hashable, TapeItem] = {}
        self.made_by: dict[Buffer, TapeItem] = {}

    def run(self, items: Sequence[TapeItem]) -> list[TapeItem]:
        kept: list[TapeItem] = []
        end = next((at for at, item in enumerate(items) if item.name == "COMMIT"), len(items))
        for item in items[:end]:
            item = self._with_equal_inputs(item, _KINDS_READ.get(item.name, _ALL_KINDS))
            # The result of a rule fits no other rule.
            if (rule := _RULES.get(item.name)) is not None:
                item = rule(item, self.made_by)
            if _is_pure(item):
                self._note(item)
            kept.append(item)
        # The carried buffers change from here on.
        last = [self._with_equal_inputs(item, _STAYS) for item in items[end:]]
        return kept + [item for item in last if not self._keeps_its_target(item)]

    def _with_equal_inputs(self, item: TapeItem, kinds: Sequence[Kind]) -> TapeItem:
        if any([r.buffer in self.same for r in item.inputs]):
            return item.with_inputs(tuple([self._moved(r, kinds) for r in item.inputs]))
        return item

    def _moved(self, reference: Reference, kinds: Sequence[Kind]) -> Reference:
        buffer, offset, strides = reference
        equal = self.same.get(buffer, buffer)
        return Reference(equal, offset, strides) if equal.kind in kinds else reference

    def _note(self, item: TapeItem) -> None:
        """Remember a result; if an instruction only repeats a value, its buffer is replaced by that of the value."""
        out = item.outputs[0]
        if item.name == "COPY" and _repeats(item):
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

    def _keeps_its_target(self, item: TapeItem) -> bool:
        """Return whether a carried buffer is to take its own value."""
        return item.name == "COMMIT" and self._moved(item.inputs[0], _ALL_KINDS) == item.outputs[0]


_ALL_KINDS = tuple(Kind)
_STAYS = (Kind.LANE, Kind.SHARED, Kind.CONSTANT, Kind.RESULT)
_OF_LANE = (Kind.CARRY, Kind.LANE, Kind.RESULT)
"""The kinds of buffers with a value for each lane."""
_KINDS_READ = {"JUMP_UNLESS_ANY": _OF_LANE}
"""The kinds of buffers that an operation may read, if not all."""


def _is_pure(item: TapeItem) -> bool:
    """Return whether an instruction alone writes its result, as a whole, from values that do not change."""
    # Instructions write to results alone. Of other buffers carried ones change, at the end of a step.
    return len(item.outputs) == 1 and all([r.buffer.writes <= 1 for r in (*item.outputs, *item.inputs)])


def _repeats(item: TapeItem) -> bool:
    """Return whether a copy has the same positions as its source, in a buffer of the same size."""
    if item.rounds:
        return False
    (out,), (source,) = item.outputs, item.inputs
    if out.buffer.size == source.buffer.size == 1:
        return source.buffer.kind is not Kind.SHARED
    return (out.buffer.size, *out[1:]) == (source.buffer.size, *source[1:]) and source.buffer.kind in _OF_LANE


def _key(reference: Reference) -> Hashable:
    # By repr: 0 and -0 are equal as numbers, and nan is unequal to itself.
    number = reference.buffer.number
    return reference if number is None else (repr(number), reference.strides)


# --- rules ------------------------------------------------------------------------------------------------------------

Shortening = Callable[[TapeItem, dict[Buffer, TapeItem]], TapeItem]


def _flag_with_constant(item: TapeItem, made_by: dict[Buffer, TapeItem]) -> TapeItem:
    """``x & True`` and ``x | False`` are ``x``; ``x & False`` and ``x | True`` are the constant."""
    for constant, other in (item.inputs, item.inputs[::-1]):
        number = constant.buffer.number
        if number is not None:
            decides = (number != 0) == (item.name == "OR")
            return item.with_inputs((constant if decides else other,), "COPY")
    return item


def _choice_known(item: TapeItem, made_by: dict[Buffer, TapeItem]) -> TapeItem:
    """``where(c, x, x)`` is ``x``, and so is ``where(True, x, y)``."""
    condition, a, b = item.inputs
    number = condition.buffer.number
    if number is None and a != b:
        return item
    return item.with_inputs((b if number == 0 else a,), "COPY")


def _sum_with_negative(item: TapeItem, made_by: dict[Buffer, TapeItem]) -> TapeItem:
    """``x + (-y)`` and ``(-y) + x`` are ``x - y``."""
    # Exact: IEEE arithmetic rounds ``x + (-y)`` and ``x - y`` alike.
    for term, other in (item.inputs[::-1], item.inputs):
        if negated := _operands("NEG", term, item, made_by):
            return item.with_inputs((other, *negated), "SUB")
    return item


def _is_finite(item: TapeItem, made_by: dict[Buffer, TapeItem]) -> TapeItem:
    """``(x == x) * (|x| != inf)``, as torch spells ``isfinite``."""
    equal, unequal = _operands("EQ", item.inputs[0], item, made_by), _operands("NE", item.inputs[1], item, made_by)
    values = [*equal, *chain(*[_operands("ABS", size, item, made_by) for size in unequal[:1]])]
    bounds = [r.buffer.number for r in unequal[1:]]
    # All three are the same operand.
    if (len(values), len({*values}), bounds) != (3, 1, [torch.inf]):
        return item
    return item.with_inputs((values[0],), "ISFINITE")


def _operands(name: str, operand: Reference, item: TapeItem, made_by: dict[Buffer, TapeItem]) -> tuple[Reference, ...]:
    """Return the inputs of the instruction of a name that has made an operand, entry by entry as `item` reads it; none
    if another has made it."""
    maker = made_by.get(operand.buffer, item)
    return maker.inputs if (maker.name, maker.sizes, maker.outputs) == (name, item.sizes, (operand,)) else ()


_RULES: dict[str, Shortening] = {
    "AND": _flag_with_constant,
    "OR": _flag_with_constant,
    "WHERE": _choice_known,
    "ADD": _sum_with_negative,
    "MUL": _is_finite,
}
