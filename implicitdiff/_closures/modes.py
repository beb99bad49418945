"""Modes under which a user's function runs: `Watch` records its operations, `Substitute` replaces captured tensors.

A mode (`torch.overrides.TorchFunctionMode`) intercepts every call of a torch function, with its arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, cast

import torch
from torch.overrides import TorchFunctionMode

import implicitdiff._torch.context as _context
import implicitdiff._torch.functions as _functions
import implicitdiff._torch.levels as _levels
import implicitdiff._torch.trees as pytree
from implicitdiff._closures.program import COMPARED, Program
from implicitdiff._closures.program import version as version
from implicitdiff._torch.compile import Fn
from implicitdiff._torch.modes import DeviceContext, in_place_of, is_any_running, no_modes, running
from implicitdiff._torch.replacements import EXCHANGED, Exchange, exchanged
from implicitdiff._torch.sparse import call as sparse_call
from implicitdiff._torch.sparse import have_sparse
from implicitdiff._torch.switches import UNCHANGED
from implicitdiff._torch.trees import Leaves


def alias(tensors: Sequence[torch.Tensor]) -> Leaves:
    """Return views of the tensors, as operands of an autograd.Function, for two reasons.

    `apply` is not a torch function, so a mode cannot see its operands. `view_as` is a torch function, so a mode records
    or substitutes the operands. Second, captured tensors are recognised by identity. So an operand that an
    autograd.Function saves must be another object than the captured tensor. Sparse tensors have no views, and are
    copied.
    """
    return [t.view_as(t) if t.layout is torch.strided else t.clone() for t in tensors]


class OwnMode(TorchFunctionMode):
    """A mode of this library, around a function of the user.

    Attributes:
        is_traced: whether the function will be evaluated again: the mode must then see the operands of every
            autograd.Function.
    """

    is_traced: ClassVar[bool] = True


def without_own_modes() -> AbstractContextManager[None]:
    """Run the body without the modes of this library, like the body of an autograd.Function.

    Below all transforms, level numbers start at 1 again. The modes would confuse tensors of an inner level with tensors
    of the outer level of the same number.
    """
    if not is_any_running():
        return UNCHANGED
    return in_place_of([mode for mode in running() if not isinstance(mode, OwnMode)])


def is_traced() -> bool:
    """True if a function runs under `Watch` or `Substitute`."""
    return any([isinstance(mode, OwnMode) and mode.is_traced for mode in running()])


def is_inside() -> bool:
    """True if any function runs under a mode of this library."""
    return is_any_running() > 0 and any([isinstance(mode, OwnMode) for mode in running()])


def let_addresses_through() -> bool:
    """True if every running mode may be bypassed, so that kernels may read the memory of plain tensors."""
    return all([isinstance(m, DeviceContext) or getattr(m, "lets_addresses_through", False) for m in running()])


class Watch(OwnMode):
    """A mode that records the `Program` of a function, and whether the function needs `Exchange` or sparse products.

    Args:
        operands: the operands of the function.
        inert: the number of running levels, if all are inert, else -1.
        at_call: whether this is an evaluation at the call. The mode then exchanges operations itself, in the place of
            `Exchange`, and its program notes memory for later comparisons.
    """

    def __init__(self, operands: Leaves, inert: int, *, at_call: bool = False) -> None:
        super().__init__()
        self.program, self.inert, self.at_call = Program(operands, notes_memory=at_call), inert, at_call
        self.exchanges = self.is_sparse = False

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        program, kwargs = self.program, kwargs or {}
        # The queries that the recording itself makes are not operations of the function.
        with no_modes():
            # This runs for each operation: without a call of a Python function if the arguments are known tensors and
            # numbers.
            shown: list[Any] = [*map(program.origins.get, map(id, args), args)]
            if not COMPARED.issuperset(map(type, shown)):
                shown = program.as_compared(args)
            named = program.named_as_compared(kwargs) if kwargs else {}
            is_sparse = len(program.layouts) > 1 and have_sparse(args, kwargs)
            program.has_dispatch_mode = program.has_dispatch_mode or _context.dispatch_modes() > 0
        # While a handler runs, torch keeps the mode itself off the stack. So the record has the user's operation, and
        # no part of a replacement.
        is_special = is_sparse or func in EXCHANGED or func is _functions.function_call
        result = self._specially(func, args, kwargs, is_sparse) if is_special else func(*args, **kwargs)
        with no_modes():
            program.add(func, shown, named, result)
        return result

    def _specially(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], is_sparse: bool) -> object:
        """Call a function of sparse tensors, a function that is exchanged, or an autograd.Function."""
        is_exchanged = func in EXCHANGED
        self.exchanges, self.is_sparse = self.exchanges or is_exchanged, self.is_sparse or is_sparse
        if is_sparse:
            with Exchange() if self.at_call else nullcontext():
                return sparse_call(func, args, kwargs)
        if is_exchanged and self.at_call:
            func, args, kwargs = exchanged(func, args, kwargs)
        return _functions.call_inert(func, args, kwargs, self.inert)


def watches() -> list[Watch]:
    """Return the running `Watch` modes, the outermost first."""
    return [mode for mode in running() if isinstance(mode, Watch)]


def note_communication() -> None:
    """Tell every running `Watch` that its function sends tensors to other processes."""
    for mode in watches():
        mode.program.communicates = True


def one_operation(fn: Fn) -> Fn:
    """Decorate a function of the library so that `Watch` records a call as one operation.

    The operations inside may differ between two evaluations, since the library chooses them by the running transforms.
    User functions among the arguments are compared nevertheless, see `Program.nest`.
    """

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not is_any_running() or not (programs := [mode.program for mode in watches()]):
            return fn(*args, **kwargs)
        # A counter, since library calls nest.
        for program in programs:
            program.silent += 1
        try:
            result = fn(*args, **kwargs)
        finally:
            for program in programs:
                program.silent -= 1
        for program in programs:
            # The decorated function stands for the operation, and gives its name in messages.
            program.add(run, [], {}, pytree.tensors(result))
        return result

    return cast(Fn, run)


@contextmanager
def as_user_code() -> Iterator[None]:
    """Run user code inside a `one_operation` function so that `Watch` records the operations of the user code."""
    running = watches()
    if not running:
        yield
        return
    # The innermost program alone; `Program.nest` adds this program to the outer programs.
    program = running[-1].program
    silent, program.silent = program.silent, 0
    try:
        yield
    finally:
        program.silent = silent


class Rewriting(OwnMode):
    """A mode that replaces tensors among the arguments of torch functions.

    A tensor inside a wrapper of a transform is replaced too. Each wrapper gets one new wrapper only, since transforms
    mark their wrappers and compare them by identity.
    """

    def __init__(self) -> None:
        super().__init__()
        self._wrappers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def resolve(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the replacement of a tensor, or the tensor itself."""
        raise NotImplementedError

    def rewritten(self, args: Sequence[Any], kwargs: dict[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with their tensors replaced."""
        new = tuple([_levels.swap(a, self.resolve) for a in args])
        return new, {k: _levels.swap(v, self.resolve) for k, v in (kwargs or {}).items()}

    def resolve_inside(self, wrapper: torch.Tensor) -> torch.Tensor:
        """Return a wrapper of the replacement of the wrapped tensor."""
        if (known := self._wrappers.get(id(wrapper))) is not None:
            return known[1]
        new = _levels.replace_inside(wrapper, self.resolve)
        if new is not wrapper:
            # Keep the old wrapper alive, so that Python does not reuse its id.
            self._wrappers[id(wrapper)] = (wrapper, new)
        return new


class Substitute(Rewriting):
    """A mode that replaces captured tensors by operands."""

    def __init__(self, captured: Sequence[torch.Tensor], values: Sequence[torch.Tensor], inert: int) -> None:
        super().__init__()
        self.inert = inert
        # The keys stay unique: the `Lifted` keeps the captured tensors alive.
        self.values = {id(old): new for old, new in zip(captured, values, strict=True)}

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        return _functions.call_inert(func, *self.rewritten(args, kwargs), self.inert)

    def resolve(self, tensor: torch.Tensor) -> torch.Tensor:
        if (value := self.values.get(id(tensor))) is not None:
            return value
        return tensor if _levels.is_plain(tensor) else self.resolve_inside(tensor)


def substitutes() -> list[Substitute]:
    """Return the running `Substitute` modes, the innermost first."""
    return [mode for mode in reversed(running()) if isinstance(mode, Substitute)]
