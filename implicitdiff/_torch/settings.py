"""torch's global settings that change what a function computes, as they are now, and a function run with them later."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch

import implicitdiff._torch.trees as pytree

Autocast = tuple[tuple[str, bool, torch.dtype], ...]
Settings = tuple[Any, ...]
Fn = TypeVar("Fn", bound=Callable[..., Any])
_UNCHANGED: AbstractContextManager[None] = nullcontext()


def autocast_state() -> Autocast:
    """The state of autocast on each kind of device."""
    return tuple([(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")])


def autocast(state: Autocast) -> AbstractContextManager[None]:
    """Run the body with autocast in this state."""
    return _UNCHANGED if state == autocast_state() else _autocast(state)


@contextmanager
def _autocast(state: Autocast) -> Iterator[None]:
    with ExitStack() as stack:
        for (device, enabled, dtype), now in zip(state, autocast_state(), strict=True):
            if (device, enabled, dtype) != now:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
        yield


def full_precision() -> AbstractContextManager[None]:
    """Run linear algebra outside of autocast."""
    return autocast(tuple([(device, False, dtype) for device, _, dtype in autocast_state()]))


def outside_autocast(fn: Fn) -> Fn:
    """Decorate a function that runs outside of autocast, wherever it is called.

    As `torch.amp.custom_fwd` with ``cast_inputs=torch.float32`` has it, its arguments of half precision are cast.
    """

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not any(enabled for _, enabled, _ in autocast_state()):
            return fn(*args, **kwargs)
        args, kwargs = in_single((args, kwargs))
        with full_precision():
            try:
                return fn(*args, **kwargs)
            except RuntimeError as error:
                if "same dtype" not in str(error) or not any(half in str(error) for half in ("BFloat16", "Half")):
                    raise
                raise RuntimeError(
                    f"{error}; a search runs outside of autocast, in single precision: a tensor of half precision that "
                    "its function captures has to be cast by .float(), or passed as an argument, which is cast"
                ) from error

    return cast(Fn, run)


def in_single(tree: Any) -> Any:
    """A tree with the tensors of half precision in single precision, where autocast is on for their device."""
    if not any(enabled for _, enabled, _ in autocast_state()):
        return tree
    return pytree.map_tensors(_single, tree)


def _single(tensor: torch.Tensor) -> torch.Tensor:
    is_half = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.float() if is_half and torch.is_autocast_enabled(tensor.device.type) else tensor


def settings() -> Settings:
    """Autocast, the default device, and every flag of `_FLAGS`."""
    return autocast_state(), torch.get_default_device(), tuple([read() for read, _ in _FLAGS])


def applied(state: Settings) -> AbstractContextManager[None]:
    """Run the body with these settings; what is so already is not touched."""
    now = settings()
    return _UNCHANGED if state == now else _applied(state, now)


@contextmanager
def _applied(state: Settings, now: Settings) -> Iterator[None]:
    changed = [
        (write, then, current)
        for (_, write), then, current in zip(_FLAGS, state[2], now[2], strict=True)
        if then != current
    ]
    with ExitStack() as stack:
        for write, then, current in changed:
            write(then)
            stack.callback(write, current)
        stack.enter_context(autocast(state[0]))
        if state[1] != now[1]:
            stack.enter_context(state[1])
        yield


def _flag(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


# Each as a pair of functions: read it, and set it.
_FLAGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    _flag(torch.backends.mkldnn, "enabled"),
    _flag(torch.backends.cudnn, "enabled"),
    _flag(torch.backends.cudnn, "benchmark"),
    _flag(torch.backends.cudnn, "deterministic"),
)
