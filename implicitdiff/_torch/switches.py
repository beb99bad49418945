"""Context managers that switch transforms, modes and recording off, or on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch._C import _functorch as functorch
from torch._functorch.eager_transforms import enable_inplace_requires_grad
from torch._functorch.pyfunctorch import (
    VmapInterpreter,
    retrieve_all_functorch_interpreters,
    temporarily_clear_interpreter_stack,
)
from torch.autograd import forward_ad

from implicitdiff._torch.context import depth, dispatch_modes, in_saved_tensor_hooks, now

# Context for a body where nothing has to be switched.
UNCHANGED: AbstractContextManager[None] = nullcontext()


# Not `DisableTorchFunctionSubclass`, under which function modes still run.
no_modes: Callable[[], AbstractContextManager[None]] = torch._C.DisableTorchFunction
"""Run the body outside of every TorchFunctionMode."""


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
    return UNCHANGED if now().is_silent and not torch._C._is_fwd_grad_enabled() else _nothing_running()


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


def without_saved_tensor_hooks() -> AbstractContextManager[None]:
    """Run the body without hooks on saved tensors, under which torch.func refuses to run."""
    return _hooks_put_aside() if in_saved_tensor_hooks() else UNCHANGED


@contextmanager
def _hooks_put_aside() -> Iterator[None]:
    hooks = []
    try:
        while (top := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
            torch._C._autograd._pop_saved_tensors_default_hooks()
            hooks.append(top)
        yield
    finally:
        # The innermost hooks were popped first, and are pushed last.
        for pack, unpack in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


@contextmanager
def inert_gradient_levels() -> Iterator[int]:
    """Run the body with every vmap kept, and every level of grad, vjp and jvp inert. Yield the number of levels.

    An inert level is a vmap that batches nothing. So levels keep their numbers: batched tensors in a closure stay
    valid, and a transform that starts in the body has a number of its own.
    """
    outer = retrieve_all_functorch_interpreters()
    if not outer:
        yield 0
        return
    # The kind of a running level cannot change, so the stack is built again from the outermost level inwards.
    with temporarily_clear_interpreter_stack():
        opened = 0
        try:
            for interpreter in outer:
                if isinstance(interpreter, VmapInterpreter):
                    functorch._vmap_increment_nesting(interpreter.batch_size(), interpreter.randomness())
                else:
                    # With "same", random numbers are drawn once and carry no batch dimension; "error" would refuse
                    # random numbers.
                    functorch._vmap_increment_nesting(1, "same")
                opened += 1
            with requires_grad_allowed():
                yield len(outer)
        finally:
            for _ in range(opened):
                functorch._vmap_decrement_nesting()


class levels_up_to:
    """Run the body with at least `count` levels; missing levels are added, inert. Yield the number of levels if all are
    inert, else -1.

    torch.func refuses to wrap a tensor of a level that does not run.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def __enter__(self) -> int:
        running = depth()
        self.missing = max(0, self.count - running)
        for _ in range(self.missing):
            functorch._vmap_increment_nesting(1, "same")
        # With a level of the caller running, the rules of an autograd.Function must apply, see `call_inert`.
        return -1 if running else self.missing

    def __exit__(self, *error: object) -> None:
        for _ in range(self.missing):
            functorch._vmap_decrement_nesting()


def requires_grad_allowed() -> AbstractContextManager[None]:
    """Let `requires_grad_` work on plain tensors where only vmaps run, until a backward pass runs in the body."""
    return enable_inplace_requires_grad(True)


def allow_requires_grad() -> None:
    """Let `requires_grad_` work again, after a backward pass inside of `requires_grad_allowed`."""
    functorch.set_inplace_requires_grad_allowed(True)


def random_state() -> bytes:
    """Return the state of the default generator of the CPU, read outside of every mode and level."""
    if depth() == 0 and not dispatch_modes():
        with no_modes():
            return torch.default_generator.get_state().numpy().tobytes()
    # Under a grad level the state is a wrapper, whose memory `numpy` cannot read.
    with no_levels(), torch._C._DisableTorchDispatch(), no_modes():
        return torch.default_generator.get_state().numpy().tobytes()
