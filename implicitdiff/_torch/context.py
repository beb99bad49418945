"""The context of a call: the running transforms, and whether autograd and forward mode record."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch._C import _functorch as functorch
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_all_functorch_interpreters
from torch.autograd import forward_ad


class Context(NamedTuple):
    """The mechanisms that see the operations of torch at one moment.

    Attributes:
        transforms: the kinds of the running transforms of torch.func, the outermost first.
        records: whether autograd records on plain tensors (its grad mode is on).
        forward: whether forward mode runs.
    """

    transforms: tuple[TransformType, ...]
    records: bool
    forward: bool

    @property
    def is_silent(self) -> bool:
        """True if no derivative is recorded, in either mode, and no transform runs."""
        return not (self.records or self.forward or self.transforms)

    @property
    def is_outside(self) -> bool:
        """True if no transform runs, and no forward mode. Autograd may record."""
        return not (self.forward or self.transforms)

    @property
    def only_vmaps(self) -> bool:
        """True if every running transform is a vmap."""
        return all([kind == TransformType.Vmap for kind in self.transforms])

    @property
    def only_reverse_mode(self) -> bool:
        """True if every running transform is grad, vjp or their kin, so that an autograd.Function needs no other rule
        than `backward`."""
        return not self.forward and all([kind == TransformType.Grad for kind in self.transforms])

    def has_one(self, kind: TransformType) -> bool:
        """Return whether the innermost transform is of this kind, and all others are vmaps."""
        return self.transforms[-1:] == (kind,) and all([k == TransformType.Vmap for k in self.transforms[:-1]])


# Most calls run outside of torch.func: the contexts of an empty stack are made once.
_OUTSIDE = {(records, forward): Context((), records, forward) for records in (False, True) for forward in (False, True)}


def now() -> Context:
    """Return the context of this moment."""
    # `torch.func.jvp` opens a level of `forward_ad` as well. Inside of an autograd.Function the level stays open, but
    # forward mode is disabled: no operation propagates a tangent then.
    forward = bool(forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled())
    stack = functorch.get_interpreter_stack()
    if not stack:
        return _OUTSIDE[torch.is_grad_enabled(), forward]
    return Context(tuple([interpreter.key() for interpreter in stack]), torch.is_grad_enabled(), forward)


def depth() -> int:
    """Return the number of running transforms."""
    # `retrieve_all_functorch_interpreters` would make a Python object for each.
    stack = functorch.get_interpreter_stack()
    return 0 if stack is None else len(stack)


def randomness() -> set[str]:
    """Return the `randomness` options of the running vmaps: "error", "same" or "different"."""
    return {i.randomness() for i in retrieve_all_functorch_interpreters() if isinstance(i, VmapInterpreter)}


dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
"""Return the number of running TorchDispatchModes, such as tracing, fake tensors, or a counter of operations."""


_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
# True: hooks count also while a tracer runs, for whose operations torch ignores the hooks.
saved_tensor_hooks: Callable[[], tuple[Any, Any] | None] = partial(_top_hooks, True)
"""Return the innermost hooks on saved tensors, such as those of `torch.utils.checkpoint`; None if there are none."""
