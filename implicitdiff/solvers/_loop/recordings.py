"""The recordings that are kept from call to call, and the keys under which a later call finds them.

A key holds all that a recording depends on: the method with its options, the operations of the user's functions with
the numbers of Python among their arguments, shapes, dtypes, and which operands the lanes share. Values of tensors are
not in the key, since tensors are operands.
"""

from __future__ import annotations

import enum
import functools
import operator
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import chain
from types import NoneType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

import implicitdiff._torch.dispatch as _dispatch
from implicitdiff._closures.lift import Lifted
from implicitdiff._closures.program import OPAQUE, Origin, Program, is_exact
from implicitdiff._implicit.linear_problem import LinearMethod
from implicitdiff._recorded.graph import StepGraph
from implicitdiff._recorded.replay import Replay
from implicitdiff._recorded.step import RecordedStep
from implicitdiff._recorded.tape import NotRecordableError
from implicitdiff._torch.trees import Structure

MadeT = TypeVar("MadeT")
Kinds = tuple[tuple[Sequence[int], torch.dtype], ...]
"""Shapes and dtypes of tensors."""

_KEPT = 256
"""Bound on the number of recordings that are kept."""


class Recording(NamedTuple):
    """A recorded search.

    Attributes:
        step: the program, ready to run.
        structure: the structure of the state and the verdict.
        kinds: their shapes and dtypes, without the lanes.
        can_leave: "start" and "step", those that may be left to Python.
        is_stepped: True once a step was compared with its eager twin; without a running lane there is none.
        is_checked: True once the judgement was compared with its eager twin.
    """

    step: RecordedStep
    structure: Structure
    kinds: Kinds
    can_leave: frozenset[str]
    is_stepped: bool = False
    is_checked: bool = False


class _Kept:
    """Recordings by key, the one used last at the end; a reason in words where a recording failed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._recordings: OrderedDict[Hashable, Recording | Replay | StepGraph | str] = OrderedDict()

    def get(self, key: Hashable) -> Any:
        """Return the recording of a key, or the reason for a failed recording; None before the first attempt."""
        with self._lock:
            found = self._recordings.get(key)
            if found is not None:
                self._recordings.move_to_end(key)
            return found

    def put(self, key: Hashable, found: Recording | Replay | StepGraph | str) -> None:
        """Keep a recording."""
        with self._lock:
            self._recordings[key] = found
            while len(self._recordings) > _KEPT:
                self._recordings.popitem(last=False)

    def made(
        self, key: Hashable, make: Callable[[], MadeT], refusals: tuple[type[Exception], ...] = (NotRecordableError,)
    ) -> MadeT:
        """Return what is kept under a key, made by the first call; a result of None is not kept.

        Raises:
            NotRecordableError: `make` raised one of `refusals`, in this call or in an earlier one.
        """
        found = self.get(key)
        if found is None:
            try:
                found = make()
            except refusals as error:
                found = str(error)
            if found is not None:
                self.put(key, found)
        if isinstance(found, str):
            raise NotRecordableError(found)
        made: MadeT = found
        return made

    def clear(self) -> None:
        """Forget all recordings."""
        with self._lock:
            self._recordings.clear()


kept = _Kept()


def memories(tensors: Sequence[Tensor]) -> Hashable:
    """Return how tensors lie in memory, as a part of a key, with the first tensor of the same memory for each."""
    storages = [*map(Tensor.untyped_storage, tensors)]
    keys = [storage._cdata for storage in storages]  # see `storage_key`
    return tuple(
        [
            (t.dtype, t.shape, t.stride(), t.storage_offset(), storage.nbytes(), keys.index(key))
            for t, storage, key in zip(tensors, storages, keys, strict=True)
        ]
    )


def fingerprint(lifted: Lifted) -> Hashable:
    """Return the operations of a user's function with their arguments, in a form that two calls can compare.

    Tensors stand as the numbers of the operands, of the results, or of the constants. The results of the function
    and the operations without gradients belong to the form.

    Raises:
        NotRecordableError: the operations do not tell all that the function does.
    """
    program, places = lifted.program, lifted.places
    _refuse_unseen(program)

    def place(origin: Any) -> Hashable:
        # An alias may stand for another alias; the last origin of the chain counts.
        while origin in program.aliases:
            origin = program.aliases[origin]
        if origin[0] == "constant" and origin[1] not in places:
            raise NotRecordableError("the function uses a tensor of unknown origin")
        return ("constant", places[origin[1]]) if origin[0] == "constant" else origin

    def shown(values: Iterable[Any]) -> Hashable:
        # This loop runs for each argument, so common cases avoid a call of a Python function.
        found: list[Hashable] = []
        for value in values:
            if type(value) is Origin:
                found.append(value if value[0] == "result" and value not in program.aliases else place(value))
            elif isinstance(value, dict):
                found.append(("dict", tuple(value), shown(value.values())))
            elif isinstance(value, list):
                if value[:1] == ["array"]:
                    _refuse_inexact_checksum(value)
                found.append(("list", shown(value)))
            elif value is OPAQUE:
                raise NotRecordableError("the function passes an object that cannot be compared to an operation")
            else:
                is_number = isinstance(value, (int, float, complex, np.generic))
                found.append((type(value), repr(value)) if is_number else value)
        return tuple(found)

    functions, args, kwargs = zip(*program.operations, strict=True) if program.operations else ((), (), ())
    names = tuple(map(_torch_function, functions))
    # The arguments of all operations in one tuple; their numbers tell which operation has which.
    by_position = tuple(map(len, args)), shown(chain.from_iterable(args))
    by_keyword = tuple(map(len, kwargs)), shown(filter(None, kwargs))
    wrappers = tuple([(place(origin), *dims) for origin, *dims in program.wrappers])
    return names, by_position, by_keyword, wrappers, shown(program.results), tuple(program.recorded)


def _refuse_unseen(program: Program) -> None:
    """Raise if a function does more than its operations tell."""
    if program.has_dispatch_mode:
        raise NotRecordableError("the function runs operations under a TorchDispatchMode")
    if program.communicates:
        raise NotRecordableError("the function communicates with other processes")
    if program.unseen is not None:
        raise NotRecordableError(f"the function {program.unseen}")


def _refuse_inexact_checksum(array: list[Any]) -> None:
    """Raise if the checksum of an array does not tell its numbers, see `checksum`."""
    if array[3] is None or not is_exact(array[3], array[4]):
        raise NotRecordableError("the function uses a large NumPy array")


@functools.cache
def _torch_function(function: Any) -> Hashable:
    """Return a function of torch; raise for others, such as an autograd.Function, whose rules no operation shows."""
    # An exception is not cached, so the cache keeps functions of torch alone, and no function of the user alive.
    if isinstance(function, Program):
        raise NotRecordableError("the function calls another solver")
    # The accessor of an attribute, such as `Tensor.T`, is a method of a descriptor.
    owner = function.__self__ if isinstance(function, types.MethodWrapperType) else function
    module = getattr(owner, "__module__", None) or getattr(getattr(owner, "__objclass__", None), "__module__", "")
    if _dispatch.is_higher_order(owner) or not (module or "torch").startswith("torch") or _dispatch.is_custom(owner):
        raise NotRecordableError(f"the function calls {function}")
    hashable: Hashable = function
    return hashable


@functools.singledispatch
def kind_of(value: Any) -> Hashable:
    """Return an option or a function of a method as a part of a key.

    Tensors among them are operands of the user's functions, so their shapes suffice.

    Raises:
        NotRecordableError: a function or an object of the user, such as a schedule, may do something else at each call;
            a linear solver has tensors of its own, which are no operands.
    """
    if _is_ours(type(value)) and hasattr(value, "__dict__"):
        return (type(value), kind_of(vars(value)))
    raise NotRecordableError(f"an option is a {type(value).__name__}, which may change")


@kind_of.register(int | float | complex | operator.attrgetter)
def _(value: object) -> Hashable:
    return type(value), repr(value)  # 1, 1.0 and True are equal, as are 0.0 and -0.0


@kind_of.register(str | type | torch.dtype | types.BuiltinFunctionType | NoneType)
def _(value: Hashable) -> Hashable:
    return type(value), value


@kind_of.register
def _(value: LinearMethod) -> Hashable:
    if value.preconditioner is not None or value.init is not None:
        raise NotRecordableError("the linear solver has a preconditioner or an initial guess")
    return (type(value), kind_of(vars(value)))


@kind_of.register
def _(value: functools.partial) -> Hashable:  # type: ignore[type-arg]
    return kind_of(value.func), tuple(map(kind_of, value.args)), kind_of(dict(sorted(value.keywords.items())))


@kind_of.register
def _(value: Tensor) -> Hashable:
    return (value.shape, value.dtype)


@kind_of.register(list | tuple)
def _(value: Sequence[Any]) -> Hashable:
    return (type(value), *map(kind_of, value))


@kind_of.register
def _(value: dict) -> Hashable:  # type: ignore[type-arg]
    return (dict, tuple(value), *map(kind_of, value.values()))


@kind_of.register
def _(value: types.MethodType) -> Hashable:
    return kind_of(value.__func__), kind_of(value.__self__)


@kind_of.register
def _(value: types.FunctionType) -> Hashable:
    # Of a user's function nothing is known: a new object equals no later key, so the search is recorded again.
    cells = value.__closure__ or ()
    return (value, *map(kind_of, map(_CONTENTS, cells))) if _is_ours(value) else object()


def is_fixed(value: Any) -> bool:
    """True if nothing in an option or in a tuple of options can change, so that its `kind_of` is made once."""
    if isinstance(value, functools.partial):
        return is_fixed((value.func, *value.args, *value.keywords.values()))
    if isinstance(value, tuple):
        return all(map(is_fixed, value))
    if isinstance(value, types.FunctionType):
        return _is_ours(value) and not value.__closure__
    # A subclass of a number may have state.
    is_plain = type(value) in (bool, int, float, complex, str, NoneType)
    return is_plain or isinstance(value, (enum.Enum, operator.attrgetter, type, torch.dtype))


_CONTENTS = operator.attrgetter("cell_contents")


def _is_ours(function: Any) -> bool:
    """Return whether a function or a class is of this library or of torch."""
    return (function.__module__ or "").partition(".")[0] in (__name__.partition(".")[0], "torch")


def kinds(tensors: Sequence[Tensor]) -> Kinds:
    """Return the shapes, without the lanes in front, and the dtypes of tensors."""
    return tuple([(t.shape[1:], t.dtype) for t in tensors])
