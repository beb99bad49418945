"""Modes under which a user's function runs: watched, or with other tensors in the place of captured ones.

A mode sees every torch function that is called, with its arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch.overrides import TorchFunctionMode

import implicitdiff._torch.levels as functorch
import implicitdiff._torch.trees as pytree
from implicitdiff._closures.program import Program
from implicitdiff._closures.program import version as version
from implicitdiff._torch.modes import DeviceContext, in_place_of, running
from implicitdiff._torch.replacements import EXCHANGED, Exchange, exchanged
from implicitdiff._torch.sparse import call as sparse_call
from implicitdiff._torch.sparse import have_sparse
from implicitdiff._torch.trees import Leaves

Fn = TypeVar("Fn", bound=Callable[..., Any])


def alias(tensors: Sequence[torch.Tensor]) -> Leaves:
    """The tensors as operands of an autograd.Function: views, for two reasons.

    `apply` is no torch function, so a mode does not see its operands; the view is one, and a function that is watched
    or run with substitutes gets the right operands. And captured tensors are told by identity: what a Function saves
    and evaluates the function with must not be the very object that the function captures. Sparse tensors have no
    views, and are copied.
    """
    return [t.view_as(t) if t.layout is torch.strided else t.clone() for t in tensors]


class OwnMode(TorchFunctionMode):
    """A mode of this library, round a function of the user.

    Attributes:
        is_traced: whether the function will be evaluated again, so that the mode has to see the operands of every
            autograd.Function.
    """

    is_traced: ClassVar[bool] = True


def without_own_modes() -> AbstractContextManager[None]:
    """Run the body without the modes of this library, as the body of an autograd.Function runs.

    Below all transforms the levels begin anew, and the tensors of the first level would be taken for those of the first
    level outside.
    """
    return in_place_of([mode for mode in running() if not isinstance(mode, OwnMode)])


def is_traced() -> bool:
    """Return whether a watched or substituted function is running."""
    return any([isinstance(mode, OwnMode) and mode.is_traced for mode in running()])


def is_inside() -> bool:
    """Return whether any function runs under a mode of this library."""
    return any([isinstance(mode, OwnMode) for mode in running()])


def let_addresses_through() -> bool:
    """Return whether every running mode may be bypassed, so that kernels may read the memory of plain tensors."""
    return all([isinstance(m, DeviceContext) or getattr(m, "lets_addresses_through", False) for m in running()])


class Watch(OwnMode):
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


class Rewriting(OwnMode):
    """A mode that gives torch functions other tensors in the place of some of their arguments.

    Inside of a wrapper of a transform the wrapped tensor is replaced. There is one new wrapper for each old one, since
    transforms mark and compare their wrappers.
    """

    def __init__(self) -> None:
        super().__init__()
        self._wrappers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def resolve(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor that stands for another one, or that one itself."""
        raise NotImplementedError

    def rewritten(self, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with their tensors replaced."""
        new = tuple([functorch.swap(a, self.resolve) for a in args])
        return new, {k: functorch.swap(v, self.resolve) for k, v in (kwargs or {}).items()}

    def resolve_inside(self, wrapper: torch.Tensor) -> torch.Tensor:
        """Return the wrapper with the tensor that it wraps replaced."""
        if (known := self._wrappers.get(id(wrapper))) is not None:
            return known[1]
        new = functorch.replace_inside(wrapper, self.resolve)
        if new is not wrapper:
            # The old wrapper is kept as well: its id must not go to another tensor.
            self._wrappers[id(wrapper)] = (wrapper, new)
        return new


class Substitute(Rewriting):
    """Gives torch functions operands in the place of captured tensors."""

    def __init__(self, captured: Sequence[torch.Tensor], values: Sequence[torch.Tensor], inert: int) -> None:
        super().__init__()
        self.inert = inert
        self.values = {id(old): new for old, new in zip(captured, values, strict=True)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return functorch.call_inert(func, *self.rewritten(args, kwargs), self.inert)

    def resolve(self, tensor: torch.Tensor) -> torch.Tensor:
        if (value := self.values.get(id(tensor))) is not None:
            return value
        return tensor if functorch.is_plain(tensor) else self.resolve_inside(tensor)


def substitutes() -> list[Substitute]:
    """Return the running `Substitute` modes, the innermost first."""
    return [mode for mode in reversed(running()) if isinstance(mode, Substitute)]
