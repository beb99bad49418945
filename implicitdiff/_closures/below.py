"""A function run below the derivatives: a user's solver, whose steps no derivative sees."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

import implicitdiff._torch.levels as functorch
from implicitdiff._closures.modes import Rewriting, is_traced, substitutes
from implicitdiff._torch.modes import uncached

Derived = dict[int, "weakref.ref[torch.Tensor]"]
"""Tensors by id. Some of them may have died."""

_BACKWARD: Any = torch.Tensor.backward
# Torch functions that raise where a level runs, even an inert one.
_REFUSES_LEVELS = (_BACKWARD,)


@contextmanager
def below_autodiff(outside: bool = False) -> Iterator[Derived]:
    """Run the body as if there were no grad, vjp and jvp level, and with gradients off; vmaps stay. Yield the tensors
    that the body computes from tensors that are differentiated.

    Inside, tensors that were taken through `functorch.plain_under_vmap` are plain tensors, or batched by the running
    vmaps alone. In-place updates, NumPy, host control flow and `torch.autograd` work on plain ones as they do outside
    of any transform.

    Args:
        outside: whether to run the body with no level at all. Then the body should use no wrapper of a running
            transform: such a wrapper cannot always be told from a wrapper of the body's own transforms.
    """
    depth = functorch.depth()
    levels = functorch.no_transforms() if outside else functorch.inert_gradient_levels()
    with KeepGradients() as gradients, uncached(), levels, torch.no_grad():
        try:
            if depth or is_traced():
                with (DropOutside if outside else DropGradientLayers)(depth, gradients.bare):
                    yield gradients.derived
            else:
                yield gradients.derived
        finally:
            gradients.restore()


class KeepGradients(TorchFunctionMode):
    """Undoes what `backward()` accumulates into leaves, some of which may be captured, and follows tensors that are
    computed from tensors that need gradients.

    Attributes:
        derived: the computed tensors.
        bare: tensors that need gradients, without the layers of the transforms that differentiate them.
    """

    lets_addresses_through = True

    def __init__(self) -> None:
        super().__init__()
        self.derived: Derived = {}
        self.bare: Derived = {}
        self.before: dict[torch.Tensor, torch.Tensor | None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _BACKWARD:
            for leaf in functorch.leaves_of(args[0]):
                if leaf not in self.before:
                    # Accumulated in place, so kept as a copy.
                    self.before[leaf] = None if leaf.grad is None else leaf.grad.clone()
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            if self._is_derived(args) or (kwargs and self._is_derived(tuple(kwargs.values()))):
                self.derived[id(result)] = weakref.ref(result)
            else:
                # An id that a tensor which has died had.
                self.derived.pop(id(result), None)
                self.bare.pop(id(result), None)
        return result

    def _is_derived(self, values: Sequence[Any]) -> bool:
        for value in values:
            if isinstance(value, torch.Tensor):
                if value.requires_grad or id(value) in self.derived or id(value) in self.bare:
                    return True
            elif type(value) in (tuple, list) and self._is_derived(value):
                return True
        return False

    def restore(self) -> None:
        with functorch.no_modes():
            for leaf, grad in self.before.items():
                if grad is None or leaf.grad is None:
                    leaf.grad = grad
                else:
                    leaf.grad.copy_(grad)


class DropGradientLayers(Rewriting):
    """Takes the gradient layers of outer transforms off every tensor that reaches a torch function.

    A function that runs below the transforms may still hold tensors of outer transforms in its closure, or tensors for
    which an outer `Substitute` has operands.
    """

    is_traced = False

    def __init__(self, outer: int, bare: Derived) -> None:
        super().__init__()
        self.outer, self.bare = outer, bare
        self.around = substitutes()

    @property
    def lets_addresses_through(self) -> bool:
        return not self.around

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        functorch.allow_requires_grad()
        args, kwargs = self.rewritten(args, kwargs)
        if func in _REFUSES_LEVELS and functorch.is_plain(args[0]):
            with functorch.no_levels():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def resolve(self, tensor: torch.Tensor) -> torch.Tensor:
        for substitute in self.around:
            tensor = substitute.resolve(tensor)
        if functorch.is_plain(tensor):
            return tensor
        if not self._is_outer(tensor):
            return self.resolve_inside(tensor)
        value = functorch.without_gradient_layers(tensor)
        if value is not tensor:
            self.bare[id(value)] = weakref.ref(value)
        return value

    def _is_outer(self, tensor: torch.Tensor) -> bool:
        """Return whether a wrapper belongs to a transform that runs round the function."""
        return 0 < functorch.level(tensor) <= self.outer


class DropOutside(DropGradientLayers):
    """Takes outer gradient layers off in a function that runs with no level. The transforms that the function starts
    have the numbers of the outer ones.

    A gradient wrapper of an outer transform that gets into one of the function's own changes no value there, as the
    function's results are constants to the outer transform. But a vmap cannot take it.
    """

    def _is_outer(self, tensor: torch.Tensor) -> bool:
        level = functorch.level(tensor)
        if not 0 < level <= self.outer or functorch.is_batched(tensor):
            return False
        return level > functorch.depth() or functorch.is_vmap(level)
