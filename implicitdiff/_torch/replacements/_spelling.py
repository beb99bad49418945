"""The names under which torch has an operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Operation = Callable[..., Any]


def of_aten(*overloads: str, **replacements: Operation) -> dict[Operation, Operation]:
    """What replaces ``torch.ops.aten`` operations of these names and overloads, ``default`` if none are given."""
    table: dict[Operation, Operation] = {}
    for name, replacement in replacements.items():
        packet = getattr(torch.ops.aten, name)
        table[packet] = replacement
        table |= {getattr(packet, overload): replacement for overload in overloads or ("default",)}
    return table
