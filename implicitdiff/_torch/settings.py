"""Global settings of torch that change results: read at the call of a function, restored for its derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from operator import call
from typing import Any, TypeVar, cast

import torch

import implicitdiff._torch.trees as pytree
from implicitdiff._torch.switches import UNCHANGED
from implicitdiff._torch.trees import Tree

Autocast = tuple[tuple[str, bool, torch.dtype], ...]
Settings = tuple[Autocast, torch.device, tuple[Any, ...]]
_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])


def autocast_state() -> Autocast:
    """Return the state of autocast for each device type."""
    return (
        ("cpu", torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        ("cuda", torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")),
    )


def autocast(state: Autocast) -> AbstractContextManager[None]:
    """Run the body with autocast in this state."""
    return UNCHANGED if state == autocast_state() else _autocast(state)


@contextmanager
def _autocast(state: Autocast) -> Iterator[None]:
    with ExitStack() as stack:
        for device, enabled, dtype in [setting for setting in state if setting not in autocast_state()]:
            # Without the cache of casts, which belong to the graph of another evaluation.
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
        yield


def full_precision() -> AbstractContextManager[None]:
    """Context without autocast, for linear algebra."""
    return (
        _autocast(tuple([(device, False, dtype) for device, _, dtype in autocast_state()])) if _is_on() else UNCHANGED
    )


_is_on: Callable[[], bool] = torch._C._is_any_autocast_enabled
"""Return whether autocast is on for any device type."""


def outside_autocast(fn: _Decorated) -> _Decorated:
    """Decorate a function to run without autocast.

    Arguments of half precision are cast to single precision, as by `torch.amp.custom_fwd` with
    ``cast_inputs=torch.float32``.
    """

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not _is_on():
            return fn(*args, **kwargs)
        args, kwargs = in_single((args, kwargs))
        with full_precision():
            try:
                return fn(*args, **kwargs)
            except RuntimeError as error:
                # torch has no class for this error, so the text decides: a product of half and single precision.
                if "same dtype" not in str(error) or not any(half in str(error) for half in ("BFloat16", "Half")):
                    raise
                raise RuntimeError(
                    f"{error}; a search runs without autocast, in single precision: convert a captured tensor of half "
                    "precision by .float(), or pass it as an argument, which the search converts"
                ) from error

    return cast(_Decorated, run)


def in_single(tree: Tree) -> Tree:
    """Return a tree with its half-precision tensors in single precision, if autocast is on for their device."""
    if not _is_on():
        return tree
    return pytree.map_tensors(_single, tree)


def _single(tensor: torch.Tensor) -> torch.Tensor:
    is_half = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.float() if is_half and torch.is_autocast_enabled(tensor.device.type) else tensor


def settings() -> Settings:
    """Return the current settings: autocast, the default device, and every flag of `_FLAGS`."""
    return autocast_state(), torch.get_default_device(), tuple(map(call, _READERS))


def with_settings(state: Settings) -> AbstractContextManager[None]:
    """Run the body with these settings. Settings that are equal already are not touched."""
    now = settings()
    return UNCHANGED if state == now else _with_settings(state, now)


@contextmanager
def _with_settings(state: Settings, now: Settings) -> Iterator[None]:
    changed = [
        (write, then, current)
        for (_, write), then, current in zip(_FLAGS, state[2], now[2], strict=True)
        if then != current
    ]
    with ExitStack() as stack:
        for write, then, current in changed:
            # Each flag is restored by a callback of its own, also where a later setter raises.
            write(then)
            stack.callback(write, current)
        stack.enter_context(autocast(state[0]))
        if state[1] != now[1]:
            # As a context, a `torch.device` pushes a function mode, `DeviceContext`.
            stack.enter_context(state[1])
        yield


def _flag(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return functools.partial(getattr, owner, name), functools.partial(setattr, owner, name)


# A pair of functions for each flag: the getter and the setter.
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
_READERS = [read for read, _ in _FLAGS]
