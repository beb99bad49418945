"""Operations of ``torch.ops.aten`` by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Operation = Callable[..., Any]


def of_aten(*overloads: str, **replacements: Operation) -> dict[Operation, Operation]:
    """Return a table of replacements for ``torch.ops.aten`` operations, of the overload ``default`` unless given.

    Names that torch has dropped, as 2.14 has dropped ``cholesky``, are left out: nothing can call them.
    """
    table: dict[Operation, Operation] = {}
    for name, replacement in replacements.items():
        # A TorchFunctionMode sees the packet or an overload, depending on the caller's spelling.
        packet = getattr(torch.ops.aten, name, None)
        if packet is None:
            continue
        table[packet] = replacement
        table |= {getattr(packet, overload): replacement for overload in overloads or ("default",)}
    return table
