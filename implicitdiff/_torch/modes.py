"""The stack of `TorchFunctionMode`s, and the cache of parametrised weights, which bypasses modes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext as DeviceContext

# Not `DisableTorchFunctionSubclass`, under which function modes still run.
no_modes: Callable[[], AbstractContextManager[None]] = torch._C.DisableTorchFunction
"""Run the body outside of every TorchFunctionMode."""

with_modes: Callable[[], AbstractContextManager[None]] = torch._C._EnableTorchFunction
"""Run the body under the running modes again, inside of `no_modes`."""

is_any_running: Callable[[], int] = torch._C._len_torch_function_stack
"""Return the number of running modes."""

running: Callable[[], list[TorchFunctionMode]] = torch.overrides._get_current_function_mode_stack
"""Return the running modes, the outermost first."""


@contextmanager
def in_place_of(modes: Sequence[TorchFunctionMode]) -> Iterator[None]:
    """Run the body under these modes instead of the running modes."""
    before = running()
    _exchange(before, modes)
    try:
        yield
    finally:
        _exchange(modes, before)


def _exchange(old: Sequence[TorchFunctionMode], new: Sequence[TorchFunctionMode]) -> None:
    # Modes are popped by number: the body must leave the stack as deep as it was at the start.
    for _ in old:
        torch.overrides._pop_mode()
    for mode in new:
        torch.overrides._push_mode(mode)


@contextmanager
def uncached() -> Iterator[None]:
    """Context without `torch.nn.utils.parametrize.cached`.

    The cache would give an evaluation the weights of another evaluation, with other operands or without gradients.
    """
    # `parametrize.cached` counts its nesting in this variable, and 0 switches the cache off.
    before, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled = before
