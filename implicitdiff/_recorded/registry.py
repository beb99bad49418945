"""Tables of emitters, the functions that add the instructions of torch's operations to a recorder's program."""

from __future__ import annotations

from collections.abc import Callable

from implicitdiff._recorded.record import Emitter
from implicitdiff._torch.dispatch import AtenOperation, aten

Emitters = dict[AtenOperation, Emitter]


def registers(table: Emitters, *operations: AtenOperation) -> Callable[[Emitter], Emitter]:
    """Decorate the emitter of some operations."""

    def register(emitter: Emitter) -> Emitter:
        table.update(dict.fromkeys(operations, emitter))
        return emitter

    return register


def overloads(name: str) -> list[AtenOperation]:
    """Return the operations of a name, without those that write to an argument."""
    packet = getattr(aten, name)
    return [op for each in packet.overloads() if not (op := getattr(packet, each))._schema.is_mutable]
