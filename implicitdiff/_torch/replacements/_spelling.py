"""Tables of replacements, and the arguments that a replacement leaves to torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

Operation = Callable[..., Any]


class UnfitError(Exception):
    """A replacement does not take its arguments: torch refuses them, or takes another path."""


def only_if(*conditions: bool) -> None:
    """Leave the arguments of a replacement to torch unless all conditions hold."""
    if not all(conditions):
        raise UnfitError


def or_torchs(operation: Operation, replacement: Operation) -> Operation:
    """Return the replacement, with torch's own operation for the arguments that the replacement does not take."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with suppress(UnfitError):
            return replacement(*args, **kwargs)
        return operation(*args, **kwargs)

    return run


def of_aten(overload: str = "default", /, **replacements: Operation) -> dict[Operation, Operation]:
    """Return a table of replacements for ``torch.ops.aten`` operations, of one overload.

    Names that torch has dropped, as 2.14 has dropped ``cholesky``, are left out: nothing can call them.
    """
    aten = torch.ops.aten
    packets = {getattr(aten, name): replacement for name, replacement in replacements.items() if hasattr(aten, name)}
    # A TorchFunctionMode sees the packet or an overload, depending on the caller's spelling.
    return packets | {getattr(packet, overload): replacement for packet, replacement in packets.items()}
