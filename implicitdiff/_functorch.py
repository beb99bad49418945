"""Every private functorch name that the library touches, and nothing else touches them.

functorch keeps a stack of interpreters, one level for each transform that is running. A tensor that takes part in a
transform is a wrapper that carries its level: a batch wrapper for vmap, a gradient wrapper for grad, vjp and jvp;
wrappers nest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._C import _functorch as functorch
from torch._functorch.eager_transforms import enable_inplace_requires_grad
from torch._functorch.pyfunctorch import (
    VmapInterpreter,
    retrieve_all_functorch_interpreters,
    temporarily_clear_interpreter_stack,
)
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from implicitdiff import pytree

_PLAIN = -1


def depth() -> int:
    """How many transforms are running."""
    return len(retrieve_all_functorch_interpreters())


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is no functorch wrapper."""
    return functorch.maybe_get_level(tensor) == _PLAIN


def level(tensor: torch.Tensor) -> int:
    """The level of the transform a wrapper belongs to; negative for plain tensors and for what a finished transform
    left."""
    return int(functorch.maybe_get_level(tensor))


def unwrap(tensor: torch.Tensor) -> torch.Tensor:
    """A wrapper without its outermost layer."""
    return functorch.get_unwrapped(tensor)


def rewrap(inner: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`inner` in a layer like the outermost one of `like`."""
    if functorch.is_batchedtensor(like):
        return functorch._add_batch_dim(inner, functorch.maybe_get_bdim(like), level(like))
    return functorch._wrap_for_grad(inner, level(like))


def base(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor inside all wrappers."""
    while not is_plain(tensor):
        tensor = unwrap(tensor)
    return tensor


def may_be_differentiated(tensor: torch.Tensor) -> bool:
    """Whether a derivative or a batch dimension can hang on this tensor."""
    return tensor.requires_grad or not is_plain(tensor) or forward_ad.unpack_dual(tensor).tangent is not None


def without_gradient_layers(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as the vmaps alone see it."""
    if is_plain(tensor):
        return tensor
    inner = without_gradient_layers(unwrap(tensor))
    return rewrap(inner, tensor) if functorch.is_batchedtensor(tensor) else inner


def plain_under_vmap(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's value alone: detached, and of the running transforms only the vmaps see it."""
    return without_gradient_layers(tensor.detach())


class _DropGradientLayers(TorchFunctionMode):
    """Takes the gradient layers of outer transforms off every tensor that reaches a torch function.

    A function that runs below the transforms may still hold tensors of theirs in its closure.
    """

    def __init__(self, outer: int) -> None:
        super().__init__()
        self.outer = outer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # The inert levels would refuse `requires_grad_`, which is safe on what they do not batch; torch forgets the
        # permission whenever a backward pass has run.
        functorch.set_inplace_requires_grad_allowed(True)
        return func(*(swap(a, self._drop) for a in args), **{k: swap(v, self._drop) for k, v in (kwargs or {}).items()})

    def _drop(self, tensor: torch.Tensor) -> torch.Tensor:
        if is_plain(tensor):
            return tensor
        if level(tensor) <= self.outer:
            return without_gradient_layers(tensor)
        inner = unwrap(tensor)
        dropped = self._drop(inner)
        return tensor if dropped is inner else rewrap(dropped, tensor)


def swap(value: Any, replace: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value`, an argument of a torch function, with its tensors replaced."""
    if isinstance(value, torch.Tensor):
        return replace(value)
    if type(value) in (tuple, list, dict):
        return pytree.map_tensors(replace, value)
    return value


@contextmanager
def below_gradients() -> Iterator[None]:
    """Run the body with every vmap kept and every grad, vjp and jvp level made inert.

    Inside, tensors taken through `without_gradient_layers` are plain tensors, or batched by the running vmaps alone:
    in-place updates, NumPy, host control flow and `torch.autograd` work on the former as they do outside of any
    transform. The levels keep their numbers (an inert level is a vmap that batches nothing), so batched tensors in a
    closure stay valid, and a transform that starts inside cannot be taken for one of the outer ones.
    """
    outer = retrieve_all_functorch_interpreters()
    if not outer:
        with torch.no_grad():
            yield
        return
    with temporarily_clear_interpreter_stack():
        opened = 0
        try:
            for interpreter in outer:
                if isinstance(interpreter, VmapInterpreter):
                    functorch._vmap_increment_nesting(interpreter.batch_size(), interpreter.randomness())
                else:
                    functorch._vmap_increment_nesting(1, "same")
                opened += 1
            with enable_inplace_requires_grad(True), torch.no_grad(), _DropGradientLayers(len(outer)):
                yield
        finally:
            for _ in range(opened):
                functorch._vmap_decrement_nesting()


Rule = Callable[..., tuple[torch.Tensor | None, ...]]


def nested_forward_mode(jvp: Rule) -> Rule:
    """Decorate an autograd.Function's `jvp` so that outer forward-mode levels see through it.

    torch runs `jvp` with forward mode off and with saved tensors that still carry this level's tangents; both lose
    the tangents of the levels outside (pytorch #197867: the second forward derivative of x**4 comes out as 0). So
    forward mode is switched on, and `primal` takes this level's tangent off everything that enters.
    """

    @functools.wraps(jvp)
    def rule(ctx: Any, *tangents: Any) -> tuple[torch.Tensor | None, ...]:
        with forward_ad._set_fwd_grad_enabled(True):
            saved = [primal(t) for t in ctx.saved_tensors]
            return jvp(ctx, saved, *(None if t is None else primal(t) for t in tangents))

    return rule


def primal(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without the tangent of the innermost forward-mode level."""
    inner: torch.Tensor = forward_ad.unpack_dual(tensor, level=0).primal
    return inner
