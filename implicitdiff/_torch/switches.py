"""Context managers that switch transforms, modes and recording off, or on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch._C import _functorch as functorch
from torch._functorch.eager_transforms import enable_inplace_requires_grad
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

from implicitdiff._torch.context import dispatch_modes, now, saved_tensor_hooks
from implicitdiff._torch.modes import no_modes, uncached

# Context for a body where nothing has to be switched.
UNCHANGED: AbstractContextManager[None] = nullcontext()


def no_levels() -> AbstractContextManager[object]:
    """Run the body with an empty stack of transforms."""
    return temporarily_clear_interpreter_stack()


@contextmanager
def no_transforms() -> Iterator[None]:
    """Run the body with an empty stack of transforms and forward mode off. Transforms may start in the body."""
    # Forward mode is a state of the thread, and stays on when the stack is empty.
    forward_mode = forward_ad._set_fwd_grad_enabled(False) if now().forward else nullcontext()
    with temporarily_clear_interpreter_stack(), forward_mode:
        yield


def nothing_running() -> AbstractContextManager[None]:
    """Run the body with an empty stack of transforms and nothing recorded, as inside of an autograd.Function."""
    # Forward mode is enabled by default, also without a dual level, and the body might open one.
    return _nothing_running() if torch._C._is_fwd_grad_enabled() or not now().is_silent else UNCHANGED


@contextmanager
def _nothing_running() -> Iterator[None]:
    with temporarily_clear_interpreter_stack(), torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
        yield


@contextmanager
def unobserved() -> Iterator[None]:
    """Run the body with no transform and no mode, and with nothing recorded."""
    with _nothing_running(), torch._C._DisableTorchDispatch(), no_modes():
        yield


@contextmanager
def recording() -> Iterator[None]:
    """Let autograd record on plain tensors, also in inference mode, `no_grad`, or under hooks on saved tensors."""
    # `enable_grad` alone records nothing in inference mode: new tensors are inference tensors there.
    with torch.inference_mode(False), torch.enable_grad(), requires_grad_allowed(), without_saved_tensor_hooks():
        yield


@contextmanager
def without_saved_tensor_hooks() -> Iterator[None]:
    """Run the body without hooks on saved tensors, under which torch.func refuses to run."""
    hooks = []
    try:
        while (top := saved_tensor_hooks()) is not None:
            torch._C._autograd._pop_saved_tensors_default_hooks()
            hooks.append(top)
        yield
    finally:
        # The innermost hooks were popped first, and are pushed last.
        for pack, unpack in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


def isolated_from_caller() -> AbstractContextManager[None]:
    """Run the body without the weight caches (`parametrize.cached`) and the hooks on saved tensors of the caller."""
    return _isolated() if parametrize._cache_enabled or saved_tensor_hooks() else UNCHANGED


@contextmanager
def _isolated() -> Iterator[None]:
    with uncached(), without_saved_tensor_hooks():
        yield


def requires_grad_allowed() -> AbstractContextManager[None]:
    """Let `requires_grad_` work on plain tensors where only vmaps run, until a backward pass runs in the body."""
    return enable_inplace_requires_grad(True)


def allow_requires_grad() -> None:
    """Let `requires_grad_` work again, after a backward pass inside of `requires_grad_allowed`."""
    functorch.set_inplace_requires_grad_allowed(True)


def random_state() -> bytes:
    """Return the state of the default generator of the CPU, read outside of every mode and level."""
    if not functorch.get_interpreter_stack() and not dispatch_modes():  # most often, and faster
        with no_modes():
            return torch.default_generator.get_state().numpy().tobytes()
    # Under a grad level the state is a wrapper, whose memory `numpy` cannot read.
    with no_levels(), torch._C._DisableTorchDispatch(), no_modes():
        return torch.default_generator.get_state().numpy().tobytes()
