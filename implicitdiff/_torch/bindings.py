"""torch's Python functions for the operations of ATen. A call of such a function is faster than a call
of the operation by its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from implicitdiff._torch.dispatch import AtenOperation, TorchDispatchMode
from implicitdiff._torch.modes import no_modes

# The order is the order of preference: a method of `Tensor` serves only without a function of `torch`.
_HOMES = ((torch, ""), (torch.Tensor, ""), (torch.nn.functional, ""), (torch.linalg, "linalg_"))
"""Modules and classes with functions of torch, and what they leave out at the beginning of names."""


def binding_of(
    operation: AtenOperation, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> Callable[..., Any]:
    """Return the function of torch that applies an operation to these arguments, and does nothing else; the operation
    itself if there is none.

    The functions of one name take arguments that several operations take. So each is tried with the arguments; nothing
    is computed.
    """
    for function in _candidates(operation):
        mode = _Expecting(operation, args, kwargs, result)
        try:
            # A `Guard` around the recording must not see the trial calls.
            with no_modes(), mode:
                function(*args, **kwargs)
        except Exception:
            # Another signature raises TypeError, another operation the AssertionError of the mode.
            continue
        # A function may return its argument without any operation, as `contiguous` does for a contiguous tensor.
        if mode.is_met:
            return function
    return operation


def _candidates(operation: AtenOperation) -> Iterator[Callable[..., Any]]:
    name = operation._schema.name.split("::")[-1]
    found = [getattr(home, name.removeprefix(prefix), None) for home, prefix in _HOMES]
    # Functions in Python are slower, and may decide by more than their arguments.
    yield from [f for f in found if inspect.isbuiltin(f) or inspect.ismethoddescriptor(f)]


class _Expecting(TorchDispatchMode):
    """A mode that answers one operation by a known result, and raises at any other.

    Attributes:
        is_met: True after the operation.
    """

    def __init__(self, operation: AtenOperation, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._expected = operation, _comparable((args, kwargs))
        self._result = result
        self.is_met = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.is_met or (func, _comparable((args, kwargs or {}))) != self._expected:
            # A second operation means a function that is composed of several.
            raise AssertionError("another operation")
        self.is_met = True
        return self._result


def _comparable(value: Any) -> Any:
    """Return a value that is equal for the same tensor, and for equal arguments."""
    if isinstance(value, torch.Tensor):
        return id(value)
    if type(value) in (list, tuple):
        return [*map(_comparable, value)]
    if type(value) is dict:
        return {name: _comparable(v) for name, v in value.items()}
    # `repr` separates 0.0 from -0.0 and True from 1, and makes nan equal to itself, unlike `==`.
    return type(value), repr(value)
