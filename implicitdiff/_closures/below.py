"""Run a user's solver below all derivatives: no transform differentiates its steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

import implicitdiff._torch.context as _context
import implicitdiff._torch.functions as _functions
import implicitdiff._torch.levels as _levels
import implicitdiff._torch.switches as _switches
from implicitdiff._closures.modes import Rewriting, is_traced, substitutes
from implicitdiff._torch.modes import no_modes, uncached
from implicitdiff._torch.trees import Leaves

Derived = dict[int, "weakref.ref[torch.Tensor]"]
"""Weak references to tensors, by id."""

_BACKWARD: Callable[..., None] = torch.Tensor.backward
# `Tensor.backward` raises under any level of functorch, including an inert level.
_REFUSES_LEVELS = (_BACKWARD,)


@contextmanager
def below_autodiff(form: type[DropGradientLayers]) -> Iterator[Derived]:
    """Run the body without the running grad, vjp and jvp levels, and with gradients off; vmaps stay. Yield the tensors
    that the body computes from differentiated tensors.

    In the body, a tensor that was taken through `_levels.plain_under_vmap` is plain, or batched by the running vmaps
    alone. On plain tensors, in-place updates, NumPy, host control flow and `torch.autograd` work as outside of any
    transform.

    Args:
        form: `DropGradientLayers`, or `DropOutside` to run the body with no level at all.
    """
    depth = _context.depth()
    # Entered first, `KeepGradients` is the outer mode: operations arrive with the layers dropped already.
    with KeepGradients() as gradients, uncached(), form.levels(), torch.no_grad():
        try:
            # Without running transforms and modes, no tensor has a layer to drop.
            with form(depth, gradients.bare) if depth or is_traced() else _switches.UNCHANGED:
                yield gradients.derived
        finally:
            gradients.restore()


class KeepGradients(TorchFunctionMode):
    """A mode that undoes what `backward()` adds to the `grad` of leaves, and records which tensors are computed from
    differentiated tensors.

    Attributes:
        derived: the computed tensors.
        bare: differentiated tensors without the layers of the transforms that differentiate them.
    """

    # This mode changes no argument, so kernels may bypass the mode.
    lets_addresses_through = True

    def __init__(self) -> None:
        super().__init__()
        self.derived: Derived = {}
        self.bare: Derived = {}
        # The gradients of the caller. Tensors hash by identity, so a dictionary of tensors compares no entries.
        self.before: dict[torch.Tensor, torch.Tensor | None] = {}

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func is _BACKWARD:
            self._put_aside(_functions.graph_leaves([args[0]]))
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            # Gradients are off in the body, so `requires_grad` of a result tells nothing. Ids of results are noted
            # instead.
            if self._is_derived([*args, *kwargs.values()]):
                self.derived[id(result)] = weakref.ref(result)
            else:
                # Python may have reused the id of a dead tensor.
                self.derived.pop(id(result), None)
                self.bare.pop(id(result), None)
        return result

    def _put_aside(self, leaves: Leaves) -> None:
        """Save the gradients of the caller. `backward` accumulates in place, here into copies."""
        with no_modes():
            for leaf in {*leaves} - self.before.keys():
                self.before[leaf] = leaf.grad
                leaf.grad = None if leaf.grad is None else leaf.grad.clone()

    def _is_derived(self, values: Sequence[Any]) -> bool:
        for value in values:
            if isinstance(value, torch.Tensor):
                if value.requires_grad or id(value) in self.derived or id(value) in self.bare:
                    return True
            elif type(value) in (tuple, list) and self._is_derived(value):
                return True
        return False

    def restore(self) -> None:
        """Restore the saved gradients."""
        with no_modes():
            # A mode would rewrite or record these writes.
            for leaf, grad in self.before.items():
                leaf.grad = grad


class DropGradientLayers(Rewriting):
    """A mode that removes the gradient layers of outer transforms from the arguments of torch functions.

    The closure of a function that runs below the transforms may contain tensors of outer transforms, and tensors that
    an outer `Substitute` replaces by operands.

    Attributes:
        levels: the context of the levels of the body.
    """

    # The body is evaluated once, so no later evaluation needs the operands of its autograd.Functions.
    is_traced = False
    levels: Callable[[], AbstractContextManager[object]] = staticmethod(_levels.inert_gradient_levels)

    def __init__(self, outer: int, bare: Derived) -> None:
        super().__init__()
        self.outer, self.bare = outer, bare
        # The modes around the body, outside of any that the body starts.
        self.around = substitutes()

    @property
    def lets_addresses_through(self) -> bool:
        # Without a `Substitute` around, the mode changes wrappers alone, and never a plain tensor.
        return not self.around

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        # functorch forbids `requires_grad_` again after each backward pass inside the body.
        _switches.allow_requires_grad()
        args, kwargs = self.rewritten(args, kwargs)
        if func in _REFUSES_LEVELS and _levels.is_plain(args[0]):
            with _switches.no_levels():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def resolve(self, tensor: torch.Tensor) -> torch.Tensor:
        for substitute in self.around:
            tensor = substitute.resolve(tensor)
        if _levels.is_plain(tensor):
            return tensor
        # A wrapper of the body's own transforms stays; the tensor inside may belong to an outer transform.
        if not self._is_outer(tensor):
            return self.resolve_inside(tensor)
        value = _levels.without_gradient_layers(tensor)
        if value is not tensor:
            self.bare[id(value)] = weakref.ref(value)
        return value

    def _is_outer(self, tensor: torch.Tensor) -> bool:
        """True if a wrapper belongs to a transform that runs around the function."""
        # Inert levels keep the count, so transforms that start in the body have higher levels.
        return 0 < _levels.level(tensor) <= self.outer


class DropOutside(DropGradientLayers):
    """`DropGradientLayers` for a function that runs with no level: its own transforms reuse the outer level numbers.

    A wrapper with an outer level number is ambiguous while an inner transform of this number runs. Keeping the layer is
    safe inside an inner gradient transform: results of the function are constants of the outer transform. Inside an
    inner vmap the layer must go, because vmap refuses the wrapper. So the body should use no wrapper of a running
    transform.
    """

    levels = staticmethod(_switches.no_transforms)

    def _is_outer(self, tensor: torch.Tensor) -> bool:
        level = _levels.level(tensor)
        if not 0 < level <= self.outer or _levels.is_batched(tensor):
            return False
        # A gradient wrapper of the body has a level that runs here as a gradient transform.
        return level > _context.depth() or _levels.is_vmap(level)
