"""A recorder: a mode that turns the operations of one step into a `Tape`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import implicitdiff._torch.dispatch as _dispatch
import implicitdiff._torch.trees as pytree
from implicitdiff._recorded.tape import (
    Buffer,
    Kind,
    NotRecordableError,
    Tape,
    View,
    contiguous,
    refuse_change,
)
from implicitdiff._torch.dispatch import AtenOperation, aten
from implicitdiff._torch.messages import line_of_user
from implicitdiff._torch.modes import no_modes, with_modes
from implicitdiff._torch.trees import Leaves

BranchT = TypeVar("BranchT")
Emitter = Callable[..., None]
"""``emitter(recorder, result, *args, **kwargs)`` adds the instructions of an operation with this result."""


FACTORIES = (
    aten.full_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.empty_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
)
"""Operations that read the shape and the dtype of their argument alone."""
INTEGERS, _FLOATS = (torch.int64, torch.int32), (torch.float64, torch.float32)
_RECORDED_DTYPES = (*_FLOATS, *INTEGERS, torch.bool)
_CONVERSIONS = {
    **{(torch.bool, source): "TO_BOOL" for source in (*_FLOATS, *INTEGERS)},
    **{(target, source): "TRUNC" for target in INTEGERS for source in _FLOATS},
    **{(torch.float32, source): "COPY" for source in (torch.float64, *INTEGERS)},
}
"""The instruction for a target and a source dtype, where a conversion of doubles changes values."""


_Reads = Callable[[tuple[Any, ...], dict[str, Any]], Any]


def _always(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return True


def _of_list(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Leaves:
    """Return the tensors in the lists of numbers of which a function makes a tensor."""
    return pytree.tensors([v for v in (*args, *kwargs.values()) if isinstance(v, (list, tuple))])


def _of_places(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Leaves:
    """Return the argument with the places of a split, if it is a tensor."""
    return pytree.tensors((args[1:], {**kwargs, "input": None}))


_VALUE_READERS = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.data_ptr, Tensor.__repr__)
_READERS_OF_LISTS = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor, Tensor.new)
_GUARDED: dict[Any, tuple[str, _Reads]] = {
    **dict.fromkeys(_VALUE_READERS, ("Tensor.{} reads the value of a tensor", _always)),
    **dict.fromkeys((Tensor.apply_, Tensor.map_, Tensor.map2_), ("Tensor.{} runs Python code for each entry", _always)),
    Tensor.register_hook: ("Tensor.{} runs Python code in the backward pass", _always),
    **dict.fromkeys(_READERS_OF_LISTS, ("{} reads the value of a tensor", _of_list)),
    **dict.fromkeys((torch.tensor_split, Tensor.tensor_split), ("{} reads the value of a tensor", _of_places)),
}
"""Functions that no operation of the dispatcher shows: why they are refused, and for which arguments."""


def _refuse_numbers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    why, reads = _GUARDED[func]
    if reads(args, kwargs):
        raise NotRecordableError(why.format(func.__name__) + line_of_user())


class Guard(TorchFunctionMode):
    """A mode around a recording that refuses what the recorder would not see."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # One question, since this runs for each attribute of a tensor as well.
        if func in _GUARDED:
            _refuse_numbers(func, args, kwargs)
        return func(*args, **kwargs)


class Recorder(_dispatch.TorchDispatchMode):
    """A mode that records every operation below autograd and torch.func.

    The operations run as well, on the numbers of the recording, so that shapes and dtypes are known; the numbers do not
    matter. A decision of Python on a number would be recorded as it fell, so reading a number raises.

    Args:
        emitters: the operations with instructions of their own.
        constants: captured tensors that no transform differentiates or batches; the last operands.

    Attributes:
        tape: the instructions.
        shared: the sources of the `SHARED` buffers, see `share`.
        left: the flags of the lanes that are left to Python, see `leave_to_python`.
    """

    def __init__(self, emitters: dict[AtenOperation, Emitter], constants: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = Tape()
        self.emitters = emitters
        self.shared: list[int] = []
        self.left: list[Tensor] = []
        keys = [_dispatch.storage_key(t) for t in constants]
        # Counted from the end of the operands; tensors of one memory have the number of the first.
        self._constants = {key: i - len(keys) for i, key in reversed([*enumerate(keys)])}
        # Buffers by key of the storage, views by id of the tensor, numbers by text and dtype.
        self._buffers: dict[int, Buffer] = {}
        self._views: dict[int, View] = {}
        self._numbers: dict[tuple[str, torch.dtype], View] = {}
        # Keys of storages are unique as long as the storages live.
        self._alive: list[Tensor] = []

    # --- tensors and views --------------------------------------------------------------------------------------------

    def operand(self, tensor: Tensor, kind: Kind) -> Buffer:
        """Declare a contiguous tensor as carried, or as an operand with a value for each lane."""
        return self._keep(tensor, Buffer(kind, tensor.numel()))

    def share(self, tensor: Tensor, source: int) -> Buffer:
        """Declare a contiguous tensor as an operand for all lanes; `source` is its number."""
        self.shared.append(source)
        return self._keep(tensor, Buffer(Kind.SHARED, tensor.numel(), index=len(self.shared) - 1))

    def view(self, tensor: Tensor) -> View:
        """Return the view of a tensor."""
        if (known := self._views.get(id(tensor))) is not None:
            return known
        check_recordable(tensor)
        return self._noted(tensor, self._buffers.get(_dispatch.storage_key(tensor)) or self._foreign(tensor))

    def result(self, tensor: Tensor) -> View:
        """Return the view of a new tensor."""
        check_recordable(tensor)
        # The size of the storage and not of the tensor: a result may have gaps between its rows.
        buffer = Buffer(Kind.RESULT, _dispatch.storage_size(tensor), self.tape.scope)
        self._buffers[_dispatch.storage_key(tensor)] = buffer
        return self._noted(tensor, buffer)

    def temporary(self, shape: Sequence[int], dtype: torch.dtype) -> View:
        """Return a view of a new contiguous buffer."""
        buffer = Buffer(Kind.RESULT, math.prod(shape), self.tape.scope)
        return View(buffer, 0, tuple(shape), contiguous(shape), dtype)

    def constant(self, number: float, dtype: torch.dtype) -> View:
        """Return a number as a view of shape ()."""
        # 0 and -0 are equal, and nan is not equal to itself.
        key = (repr(number), dtype)
        if (known := self._numbers.get(key)) is not None:
            return known
        with _dispatch.outside_dispatch():
            buffer = _known_buffer(torch.tensor([number], dtype=dtype))
        made = self._numbers[key] = View(buffer, 0, (), (), dtype)
        return made

    def as_dtype(self, value: Tensor | View | float, dtype: torch.dtype) -> View:
        """Return an argument of an operation that computes in `dtype`, rounded as torch rounds the argument."""
        if isinstance(value, (int, float)):
            return self.constant(value, dtype)
        view = self.view(value) if isinstance(value, Tensor) else value
        if view.dtype == dtype:
            return view
        # A double holds every value of a narrower dtype, so a widening costs no instruction.
        return self.copy(view, dtype) if (dtype, view.dtype) in _CONVERSIONS else View(*view[:-1], dtype)

    def copy(self, view: View, dtype: torch.dtype | None = None) -> View:
        """Return a contiguous copy."""
        new = self.temporary(view.shape, dtype or view.dtype)
        self.convert(new, view)
        return new

    def convert(self, out: View, view: View) -> None:
        """Copy a view to another of the same shape, with the conversion of the dtype."""
        name = _CONVERSIONS.get((out.dtype, view.dtype), "COPY")
        # Source and target may overlap: the copy acts as if all entries moved at once.
        if view.buffer is out.buffer and (view.offset, view.strides) != (out.offset, out.strides):
            view = self.copy(view)
        self.tape.emit(name, [out], [view], out.shape)

    def known(self, tensor: Tensor) -> View:
        """Return the view of a tensor whose numbers do not depend on an operand."""
        with _dispatch.outside_dispatch():
            self._keep(tensor, _known_buffer(tensor))
        # The view of a known tensor stays, so that common subexpressions of constants are found.
        return self.view(tensor)

    def begin_part(self) -> None:
        """Record on an empty tape from now on. No tensor that was computed on the tape before can be used any more."""
        self.tape = Tape()
        self._buffers = {key: b for key, b in self._buffers.items() if b.kind is not Kind.RESULT}
        self._views.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run the body without recording its operations."""
        with _dispatch.outside_dispatch(), no_modes(), torch.no_grad():
            yield

    def _keep(self, tensor: Tensor, buffer: Buffer) -> Buffer:
        """Let a buffer stand for the memory of a tensor."""
        self._alive.append(tensor)
        self._buffers[_dispatch.storage_key(tensor)] = buffer
        return buffer

    def _noted(self, tensor: Tensor, buffer: Buffer) -> View:
        """Note and return the view of a tensor in its buffer."""
        view = View(buffer, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        # The tensor stays alive, so that Python does not reuse its id.
        self._alive.append(tensor)
        self._views[id(tensor)] = view
        return view

    def _foreign(self, tensor: Tensor) -> Buffer:
        """Return the buffer of a tensor that no recorded operation made."""
        whole = _dispatch.whole_storage(tensor)
        if (source := self._constants.get(_dispatch.storage_key(tensor))) is not None:
            return self.share(whole, source)
        # Its numbers may be others at the next call, unseen by the key of the recording.
        raise NotRecordableError("the function uses a tensor of unknown origin, such as one over memory of NumPy")

    # --- operations ---------------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: AtenOperation, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Outside of the Guard, which would take each question for the geometry of a tensor for one of the user.
        with no_modes():
            return _way(func)(self, func, args, kwargs or {})

    def _computed(self, func: AtenOperation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a function of the arguments."""
        if self._are_constant(_dispatch.tensors_among(args, kwargs)):
            return self._folded(func, args, kwargs)
        if (emitter := self.emitters.get(func)) is None:
            return self._decomposed(func, args, kwargs)
        result = func(*args, **kwargs)
        self._emit(func, emitter, result, args, kwargs)
        return result

    def _viewed(self, func: AtenOperation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation that returns views, for which the geometry of the tensors is enough."""
        # A tensor of unknown origin raises.
        dtype = self.view(args[0]).dtype
        result = func(*args, **kwargs)
        made = pytree.tensors(result)
        # In inference mode torch hands over `reshape` and the like, which may copy.
        if not self._buffers.keys() >= {*map(_dispatch.storage_key, made)}:
            return self._decomposed(func, args, kwargs)
        if any([t.is_neg() or t.dtype != dtype for t in made]):
            raise self._refusal(func, "interprets the memory of a tensor in another way")
        return result

    def _asking(self, func: AtenOperation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record an operation that reads the values of some arguments."""
        is_known = self._are_constant(_dispatch.tensors_among(args, kwargs))
        if not is_known and asks_for_values(func, args, self._are_constant):
            raise self._refusal(func, "reads the value of a tensor")
        return self._computed(func, args, kwargs)

    def _strided(self, func: AtenOperation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.view(args[0]).buffer.kind in (Kind.LANE, Kind.SHARED):
            raise self._refusal(func, "reads the memory of an operand, whose strides may be others in a later call")
        return self._viewed(func, args, kwargs)

    def _random(self, func: AtenOperation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise self._refusal(func, "draws random numbers")

    def _lifted(self, func: AtenOperation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # The argument is a tensor that `torch.tensor` has just made of numbers.
        self.known(args[0])
        return self._folded(func, args, kwargs)

    def _emit(
        self, func: AtenOperation, emitter: Emitter, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        try:
            emitter(self, result, *args, **kwargs)
        # Emitters expect the usual arguments; whatever fails in an emitter is left to Python.
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise self._refusal(func, f"has unusual arguments ({error})") from error

    def _are_constant(self, tensors: Sequence[Tensor]) -> bool:
        # All of them, also behind the first that varies: a tensor of unknown origin raises.
        views = self._views
        return all([(views.get(id(t)) or self.view(t)).buffer.kind is Kind.CONSTANT for t in tensors])

    def _folded(self, func: AtenOperation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation whose results are constants."""
        result = func(*args, **kwargs)
        for tensor in pytree.tensors(result):
            if _dispatch.storage_key(tensor) not in self._buffers:
                check_recordable(tensor)
                self.known(tensor)
        return result

    def _decomposed(self, func: AtenOperation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        parts = _dispatch.decomposition(func)
        # torch keeps a mode off the stack while its handler runs. Entered again, the mode sees the parts.
        with with_modes(), self:
            # In inference mode torch hands over operations that it otherwise decomposes itself.
            result = func.decompose(*args, **kwargs) if parts is None else parts(*args, **kwargs)
        if result is NotImplemented:
            raise self._refusal(func, "has no instruction in the compiled machine")
        return result

    def _other_view(self, func: AtenOperation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let a tensor have another shape, as ``squeeze_`` does."""
        size = _dispatch.storage_size(args[0])
        self.view(args[0])
        result = func(*args, **kwargs)
        if _dispatch.storage_size(args[0]) != size:
            raise self._refusal(func, "changes the memory of a tensor")
        # The noted view has the former shape.
        del self._views[id(args[0])]
        return result

    def _in_place(self, func: AtenOperation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target = args[0]
        if func is aten.copy_.default:
            new = args[1]
        elif (functional := _dispatch.out_of_place(func)) is not None:
            with self:
                new = functional(*args, **kwargs)
        else:
            raise self._refusal(func, "writes to a tensor")
        out, value = self._writable(target), self.view(new).broadcast(target.shape)
        self.convert(out, value)
        # Later operations of the recording run on the new numbers.
        func(*args, **kwargs)
        return target

    def _writable(self, tensor: Tensor) -> View:
        """Return the view of a tensor for a write; a constant becomes a buffer of the tape first."""
        view = self.view(tensor)
        if view.buffer.kind is not Kind.CONSTANT:
            return view
        old, whole = view.buffer, _dispatch.whole_storage(tensor)
        # A constant belongs to all lanes and iterations, and keeps its numbers from before the write.
        old.value = whole.clone()
        new = self._keep(tensor, Buffer(Kind.RESULT, whole.numel(), self.tape.scope))
        # Views of this memory refer to the old buffer.
        self._views.clear()
        shape = (whole.numel(),)
        target, source = (View(b, 0, shape, (1,), tensor.dtype) for b in (new, old))
        self.tape.emit("COPY", [target], [source], shape)
        return view._replace(buffer=new)

    def _refusal(self, func: AtenOperation, why: str) -> NotRecordableError:
        return NotRecordableError(f"the operation {func} {why}{line_of_user()}")

    # --- branches and loops -------------------------------------------------------------------------------------------

    def if_any(self, flag: Tensor, then: Callable[[BranchT], BranchT], carry: BranchT) -> BranchT:
        """Record `then` behind a jump, see `implicitdiff._torch.control.if_any`."""
        tape = self.tape
        leaves, structure = pytree.flatten(carry)
        end, variables = tape.label(), self._variables(leaves)
        # The variables hold the old values before the jump, so both ways end with the same buffers.
        tape.jump_unless_any(end, self.view(flag))
        with self._scope():
            self._assign(variables, structure.tensors_of(then(structure.unflatten(variables))))
        tape.items.append(end)
        made: BranchT = structure.unflatten(variables)
        return made

    def repeat(
        self, body: Callable[[BranchT], BranchT], carry: BranchT, flag: Callable[[BranchT], Tensor], at_most: int
    ) -> BranchT:
        """Record `body` as a loop, see `implicitdiff._torch.control.repeat`."""
        tape = self.tape
        leaves, structure = pytree.flatten(carry)
        variables = self._variables(leaves)
        # The count of passes has one value in all lanes, so the bound ends the loop for all lanes at once.
        count = self.copy(self.constant(0, torch.int64))
        begin, end = tape.label(), tape.label()
        tape.items.append(begin)
        with self._scope():
            asked = self.view(flag(structure.unflatten(variables)))
            goes_on, within = (self.temporary(asked.shape, torch.bool) for _ in range(2))
            tape.emit("LT", [within], [count, self.constant(at_most, torch.int64)], asked.shape)
            tape.emit("AND", [goes_on], [asked, within], asked.shape)
            tape.jump_unless_any(end, goes_on)
            self._assign(variables, structure.tensors_of(body(structure.unflatten(variables))))
            tape.emit("ADD", [count], [count, self.constant(1, torch.int64)], ())
            tape.jump(begin)
        tape.items.append(end)
        tape.loops.append((begin, end))
        made: BranchT = structure.unflatten(variables)
        return made

    def take_linear_solver(self) -> None:
        """Take the loops of a linear solver, see `implicitdiff._torch.control.takes_linear_solver`."""

    def leave_to_python(self, flag: Tensor) -> None:
        """Note the lanes whose step Python has to make, see `implicitdiff._torch.control.leave_to_python`."""
        self.left.append(flag)

    @contextmanager
    def _scope(self) -> Iterator[None]:
        self.tape.open()
        try:
            yield
        finally:
            self.tape.close()

    def _variables(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors that a branch or a loop assigns to, with the numbers of `leaves`."""
        with self.paused():
            variables = [t.detach().clone(memory_format=torch.contiguous_format) for t in leaves]
        # Outside of the Guard, see `__torch_dispatch__`.
        with no_modes():
            for new, old in zip(variables, leaves, strict=True):
                self.convert(self.result(new), self.view(old))
        return variables

    def _assign(self, variables: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Assign to the variables, as if to all at once."""
        with no_modes():
            targets, sources = [[self.view(t) for t in ts] for ts in (variables, values)]
        own = {id(v.buffer) for v in targets}
        pairs = [(a, b) for a, b in zip(targets, sources, strict=True) if a != b]
        # Equal views: the branch returns the variable itself.
        for target, source in pairs:
            refuse_change("a branch changes", target, source)
        # A value may be another variable: copy these before the first write.
        pairs = [(a, self.copy(b) if id(b.buffer) in own else b) for a, b in pairs]
        for target, source in pairs:
            self.convert(target, source)
        # The tensors of the recording take the new numbers too.
        with self.paused():
            for variable, value in zip(variables, [v.detach().clone() for v in values], strict=True):
                variable.copy_(value)


def asks_for_values(func: AtenOperation, args: Sequence[Any], are_known: Callable[[Sequence[Tensor]], bool]) -> bool:
    """Return whether an operation reads values, or has results of a shape that depends on values.

    The shape that an index gives depends on masks alone, and not on masks that are known.
    """
    if func is not aten.index.Tensor:
        return _dispatch.reads_values(func)
    return not are_known([i for i in pytree.tensors(args[1]) if i.dtype in (torch.bool, torch.uint8)])


def _known_buffer(tensor: Tensor) -> Buffer:
    """Return a buffer for the memory of a tensor whose numbers are known."""
    size = _dispatch.storage_size(tensor)
    number = float(_dispatch.whole_storage(tensor)) if size == 1 else None
    return Buffer(Kind.CONSTANT, size, value=tensor, number=number)


@cache
def _way(func: AtenOperation) -> Callable[[Recorder, AtenOperation, tuple[Any, ...], dict[str, Any]], Any]:
    """Return the method that records an operation."""
    # The order counts. Random operations and writes come before folding, since their arguments may all be constants.
    ways = (
        (_dispatch.is_random(func), Recorder._random),
        (func is aten.lift_fresh.default, Recorder._lifted),
        (_dispatch.changes_geometry(func), Recorder._other_view),
        (_dispatch.changes_arguments(func), Recorder._in_place),
        (func in FACTORIES, Recorder._folded),
        (func is aten.as_strided.default, Recorder._strided),
        (_dispatch.returns_views(func), Recorder._viewed),
        (func is aten.index.Tensor or _dispatch.reads_values(func), Recorder._asking),
    )
    return next((way for is_wanted, way in ways if is_wanted), Recorder._computed)


def check_recordable(tensor: Tensor) -> None:
    """Raise unless the machine can hold a tensor."""
    if tensor.dtype not in _RECORDED_DTYPES:
        raise NotRecordableError(f"a tensor has the dtype {tensor.dtype}")
    if (tensor.layout, tensor.device.type) != (torch.strided, "cpu"):
        raise NotRecordableError(f"a tensor has the layout {tensor.layout} on {tensor.device}")
