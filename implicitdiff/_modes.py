"""Modes that exchange the tensors which torch functions receive.

Three functions run under one each: a condition while it is watched, a condition while it runs with substitutes for what
it captures, and a solver while it runs below the transforms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

import implicitdiff._functorch as functorch
import implicitdiff._pytree as pytree
from implicitdiff._elementary import is_exchanged
from implicitdiff._pytree import Leaves


@contextmanager
def below_gradients() -> Iterator[None]:
    """Run the body as if there were no grad, vjp and jvp level, and with gradients off; vmaps stay.

    Inside, tensors taken through `functorch.plain_under_vmap` are plain tensors, or batched by the running vmaps alone:
    in-place updates, NumPy, host control flow and `torch.autograd` work on the former as they do outside of any
    transform.
    """
    with _KeepGradients() as gradients, functorch.inert_gradient_levels() as levels, torch.no_grad():
        try:
            if levels or is_traced():
                with _DropGradientLayers(levels):
                    yield
            else:
                yield
        finally:
            gradients.restore()


def alias(tensors: Sequence[torch.Tensor]) -> Leaves:
    """The tensors as operands of an autograd.Function: views, for two reasons.

    `apply` is no torch function, so a mode does not see its operands; the view is one, and a function that is watched
    or run with substitutes gets the right operands. And captured tensors are told by identity: what a Function saves
    and evaluates the function with must not be the very object that the function captures.
    """
    return [t.view_as(t) for t in tensors]


@contextmanager
def unseen() -> Iterator[None]:
    """Run the body without the modes that are handled here, as the body of an autograd.Function runs.

    Below all transforms the levels begin anew, and the tensors of the first would be taken for those of the first level
    outside.
    """
    modes = _modes()
    others = [mode for mode in modes if not isinstance(mode, (Watch, Substitute, _DropGradientLayers))]
    _exchange(modes, others)
    try:
        yield
    finally:
        _exchange(others, modes)


def _exchange(old: Sequence[TorchFunctionMode], new: Sequence[TorchFunctionMode]) -> None:
    for _ in old:
        torch.overrides._pop_mode()
    for mode in new:
        torch.overrides._push_mode(mode)


def is_traced() -> bool:
    """Whether a watched or substituted function is running."""
    return any(isinstance(mode, (Watch, Substitute)) for mode in _modes())


def is_inside() -> bool:
    """Whether any function that is handled here is running."""
    return any(isinstance(mode, (Watch, Substitute, _DropGradientLayers)) for mode in _modes())


def any_running() -> bool:
    """Whether any mode at all looks at torch functions."""
    return bool(_modes())


def lets_addresses_through() -> bool:
    """Whether no mode has to see, or may exchange, the plain tensors whose memory is read directly."""
    return all(
        isinstance(mode, (DeviceContext, _KeepGradients)) or (isinstance(mode, _DropGradientLayers) and not mode.around)
        for mode in _modes()
    )


def _substitutes() -> list[Substitute]:
    """Those that run, innermost first."""
    return [mode for mode in reversed(_modes()) if isinstance(mode, Substitute)]


def _modes() -> list[TorchFunctionMode]:
    return list(torch.overrides._get_current_function_mode_stack())


class Watch(TorchFunctionMode):
    """Notes the tensors that torch functions receive and that none of them returned, and whether some of the functions
    have to be exchanged."""

    def __init__(self, given: Leaves) -> None:
        super().__init__()
        self.depth = functorch.depth()
        # Ids are enough: a tensor captured from outside lives as long as the function runs, so no tensor made inside
        # shares its id.
        self.inside = {id(t) for t in given}
        self.outside: dict[int, tuple[torch.Tensor, int]] = {}
        self.given = [(t, version(t)) for t in given]
        self.exchanges = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in (*args, *kwargs.values()):
            functorch.swap(value, self._see)
        self.exchanges = self.exchanges or is_exchanged(func)
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            self.inside.add(id(result))
        elif isinstance(result, (tuple, list, dict)):
            self.inside.update(id(t) for t in pytree.tensors(result))
        return result

    def see(self, tensors: Leaves) -> None:
        for tensor in tensors:
            self._see(tensor)

    def _see(self, seen: torch.Tensor) -> torch.Tensor:
        tensor = seen
        # Transforms that the function itself starts wrap what they are given without a torch function that could be
        # seen.
        while id(tensor) not in self.inside and functorch.level(tensor) > self.depth:
            tensor = functorch.unwrap(tensor)
        if id(tensor) not in self.inside and id(tensor) not in self.outside:
            self.outside[id(tensor)] = (tensor, version(tensor))
        return seen

    def changed(self) -> Leaves:
        return [t for t, before in (*self.given, *self.outside.values()) if version(t) != before]


def version(tensor: torch.Tensor) -> int:
    """Counts the changes of a plain tensor in place; constant for tensors that do not count them."""
    return tensor._version if functorch.is_plain(tensor) and not tensor.is_inference() else 0


class Substitute(TorchFunctionMode):
    """Gives torch functions other tensors in the place of captured ones."""

    def __init__(self, captured: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.values = {id(old): new for old, new in zip(captured, values, strict=True)}
        # A wrapper round a captured tensor and its substitute: one for one, since transforms mark and compare their
        # wrappers.
        self.wrappers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replaced = tuple(functorch.swap(a, self.resolve) for a in args)
        return func(*replaced, **{k: functorch.swap(v, self.resolve) for k, v in (kwargs or {}).items()})

    def resolve(self, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) in self.values:
            return self.values[id(tensor)]
        if id(tensor) in self.wrappers:
            return self.wrappers[id(tensor)][1]
        if functorch.is_plain(tensor):
            return tensor
        replaced = functorch.replace_inside(tensor, self.resolve)
        if replaced is not tensor:
            self.wrappers[id(tensor)] = (tensor, replaced)
        return replaced


class _KeepGradients(TorchFunctionMode):
    """Takes back what `backward()` accumulates into leaves, which may be captured ones."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[torch.Tensor, torch.Tensor | None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _BACKWARD:
            for leaf in functorch.leaves_of(args[0]):
                if leaf not in self.before:
                    # Accumulated in place, so kept as a copy.
                    self.before[leaf] = None if leaf.grad is None else leaf.grad.clone()
        return func(*args, **(kwargs or {}))

    def restore(self) -> None:
        with functorch.no_modes():
            for leaf, grad in self.before.items():
                if grad is None or leaf.grad is None:
                    leaf.grad = grad
                else:
                    leaf.grad.copy_(grad)


_BACKWARD: Any = torch.Tensor.backward
# Also inert ones.
_REFUSES_LEVELS = (torch.Tensor.backward,)


class _DropGradientLayers(TorchFunctionMode):
    """Takes the gradient layers of outer transforms off every tensor that reaches a torch function.

    A function that runs below the transforms may still hold tensors of theirs in its closure, or tensors for which a
    function round it was given substitutes.
    """

    def __init__(self, outer: int) -> None:
        super().__init__()
        self.outer = outer
        self.wrappers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.around = _substitutes()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        functorch.allow_requires_grad()
        dropped = tuple(functorch.swap(a, self._drop) for a in args)
        options = {k: functorch.swap(v, self._drop) for k, v in (kwargs or {}).items()}
        if func in _REFUSES_LEVELS and functorch.is_plain(dropped[0]):
            with functorch.no_levels():
                return func(*dropped, **options)
        return func(*dropped, **options)

    def _drop(self, tensor: torch.Tensor) -> torch.Tensor:
        for substitute in self.around:
            tensor = substitute.resolve(tensor)
        if functorch.is_plain(tensor):
            return tensor
        if 0 < functorch.level(tensor) <= self.outer:
            return functorch.without_gradient_layers(tensor)
        # One for one, as in `Substitute`.
        if id(tensor) not in self.wrappers:
            self.wrappers[id(tensor)] = (tensor, functorch.replace_inside(tensor, self._drop))
        return self.wrappers[id(tensor)][1]
