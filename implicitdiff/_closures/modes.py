"""Modes that exchange the tensors which torch functions receive.

Three functions run under one each: a condition while it is watched, a condition while it runs with substitutes for what
it captures, and a solver while it runs below the transforms.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch.overrides import TorchFunctionMode

import implicitdiff._torch.levels as functorch
import implicitdiff._torch.trees as pytree
from implicitdiff._closures.program import Program
from implicitdiff._closures.program import version as version
from implicitdiff._torch.modes import DeviceContext, in_place_of, running, uncached
from implicitdiff._torch.replacements import EXCHANGED, Exchange, exchanged
from implicitdiff._torch.sparse import call as sparse_call
from implicitdiff._torch.sparse import have_sparse
from implicitdiff._torch.trees import Leaves

Fn = TypeVar("Fn", bound=Callable[..., Any])
Derived = dict[int, "weakref.ref[torch.Tensor]"]
"""Tensors by id; those that have died are among them."""


@contextmanager
def below_gradients(outside: bool = False) -> Iterator[Derived]:
    """Run the body as if there were no grad, vjp and jvp level, and with gradients off; vmaps stay. Yields the tensors
    that the body makes of what is differentiated.

    Inside, tensors taken through `functorch.plain_under_vmap` are plain tensors, or batched by the running vmaps alone:
    in-place updates, NumPy, host control flow and `torch.autograd` work on the former as they do outside of any
    transform.

    Args:
        outside: whether to run the body with no level at all. It should use no wrapper of a running transform, which
            cannot always be told from one of its own.
    """
    depth = functorch.depth()
    levels = functorch.no_transforms() if outside else functorch.inert_gradient_levels()
    with _KeepGradients() as gradients, uncached(), levels, torch.no_grad():
        try:
            if depth or is_traced():
                with (_DropOutside if outside else _DropGradientLayers)(depth, gradients.bare):
                    yield gradients.derived
            else:
                yield gradients.derived
        finally:
            gradients.restore()


def alias(tensors: Sequence[torch.Tensor]) -> Leaves:
    """The tensors as operands of an autograd.Function: views, for two reasons.

    `apply` is no torch function, so a mode does not see its operands; the view is one, and a function that is watched
    or run with substitutes gets the right operands. And captured tensors are told by identity: what a Function saves
    and evaluates the function with must not be the very object that the function captures. Sparse tensors have no
    views, and are copied.
    """
    return [t.view_as(t) if t.layout is torch.strided else t.clone() for t in tensors]


def without_own_modes() -> AbstractContextManager[None]:
    """Run the body without the modes that are handled here, as the body of an autograd.Function runs.

    Below all transforms the levels begin anew, and the tensors of the first would be taken for those of the first level
    outside.
    """
    return in_place_of([mode for mode in running() if not isinstance(mode, (Watch, Substitute, _DropGradientLayers))])


def is_traced() -> bool:
    """Whether a watched or substituted function is running."""
    return any(isinstance(mode, (Watch, Substitute)) for mode in running())


def is_inside() -> bool:
    """Whether any function that is handled here is running."""
    return any(isinstance(mode, (Watch, Substitute, _DropGradientLayers)) for mode in running())


def lets_addresses_through() -> bool:
    """Whether no mode has to see, or may exchange, the plain tensors whose memory is read directly."""
    return all(
        isinstance(mode, (DeviceContext, _KeepGradients)) or (isinstance(mode, _DropGradientLayers) and not mode.around)
        for mode in running()
    )


def _substitutes() -> list[Substitute]:
    """Those that run, innermost first."""
    return [mode for mode in reversed(running()) if isinstance(mode, Substitute)]


class Watch(TorchFunctionMode):
    """Writes down the `Program` of a function, whether some of its operations have to be exchanged, and whether it
    uses sparse tensors.

    Args:
        operands: what the function is given.
        inert: how many levels are running, if all of them are inert, else -1.
        exchanges: whether to exchange those operations here, in the place of `Exchange`.
    """

    def __init__(self, operands: Leaves, inert: int, *, exchanges: bool = False) -> None:
        super().__init__()
        self.program, self.inert, self.exchanges_here = Program(operands), inert, exchanges
        self.given = [(t, version(t)) for t in operands]
        self.exchanges = self.is_sparse = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        program, kwargs = self.program, kwargs or {}
        # What is asked of tensors to write the program down is nobody's operation.
        with functorch.no_modes():
            arguments = program.receive(args, kwargs)
            is_sparse = program.has_sparse and have_sparse(args, kwargs)
        is_exchanged = func in EXCHANGED
        self.exchanges = self.exchanges or is_exchanged
        if is_sparse:
            self.is_sparse = True
            with Exchange() if self.exchanges_here else nullcontext():
                result = sparse_call(func, args, kwargs)
        elif is_exchanged and self.exchanges_here:
            result = functorch.call_inert(*exchanged(func, args, kwargs), self.inert)
        else:
            result = functorch.call_inert(func, args, kwargs, self.inert)
        with functorch.no_modes():
            program.add(func, arguments, result)
        return result

    def changed(self) -> Leaves:
        """The tensors, given or captured, that the function has changed in place."""
        return [t for t, before in (*self.given, *self.program.outside.values()) if version(t) != before]


def watches() -> list[Watch]:
    """Those that run, outermost first."""
    return [mode for mode in running() if isinstance(mode, Watch)]


def one_operation(fn: Fn) -> Fn:
    """Decorate a function of the library that counts as one operation to a function that is watched.

    How it computes may depend on the transforms that run. The functions that it is given are compared all the same,
    see `Program.nest`.
    """

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        programs = [mode.program for mode in watches()]
        if not programs:
            return fn(*args, **kwargs)
        for program in programs:
            program.silent += 1
        try:
            result = fn(*args, **kwargs)
        finally:
            for program in programs:
                program.silent -= 1
        for program in programs:
            program.add(run, ([], {}), tuple(pytree.tensors(result)))
        return result

    return cast(Fn, run)


@contextmanager
def heard() -> Iterator[None]:
    """Run a function of the user, within such a function of the library, as a part of the function that is watched."""
    running = watches()
    if not running:
        yield
        return
    # Functions further out are told by `Program.nest`.
    program = running[-1].program
    silent, program.silent = program.silent, 0
    try:
        yield
    finally:
        program.silent = silent


class Substitute(TorchFunctionMode):
    """Gives torch functions other tensors in the place of captured ones."""

    def __init__(self, captured: Sequence[torch.Tensor], values: Sequence[torch.Tensor], inert: int) -> None:
        super().__init__()
        self.inert = inert
        self.values = {id(old): new for old, new in zip(captured, values, strict=True)}
        # A wrapper round a captured tensor and its substitute: one for one, since transforms mark and compare their
        # wrappers.
        self.wrappers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replaced = tuple(functorch.swap(a, self.resolve) for a in args)
        options = {k: functorch.swap(v, self.resolve) for k, v in (kwargs or {}).items()}
        return functorch.call_inert(func, replaced, options, self.inert)

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
    """Takes back what `backward()` accumulates into leaves, which may be captured ones, and follows what is made of
    tensors that need gradients.

    Attributes:
        derived: what is made of them.
        bare: such tensors without the layers of the transforms that differentiate them.
    """

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


_BACKWARD: Any = torch.Tensor.backward
# Also inert ones.
_REFUSES_LEVELS = (torch.Tensor.backward,)


class _DropGradientLayers(TorchFunctionMode):
    """Takes the gradient layers of outer transforms off every tensor that reaches a torch function.

    A function that runs below the transforms may still hold tensors of theirs in its closure, or tensors for which a
    function round it was given substitutes.
    """

    def __init__(self, outer: int, bare: Derived) -> None:
        super().__init__()
        self.outer, self.bare = outer, bare
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
        if self._is_outer(tensor):
            value = functorch.without_gradient_layers(tensor)
            if value is not tensor:
                self.bare[id(value)] = weakref.ref(value)
            return value
        # One for one, as in `Substitute`.
        if id(tensor) not in self.wrappers:
            self.wrappers[id(tensor)] = (tensor, functorch.replace_inside(tensor, self._drop))
        return self.wrappers[id(tensor)][1]

    def _is_outer(self, tensor: torch.Tensor) -> bool:
        """Whether a wrapper is one of a transform that runs round the function."""
        return 0 < functorch.level(tensor) <= self.outer


class _DropOutside(_DropGradientLayers):
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
