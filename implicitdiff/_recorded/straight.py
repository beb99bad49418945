"""A user's function as a straight line: the operations of one evaluation, which later evaluations repeat.

A recording evaluates the functions of a search many times: under the recorder, and in the eager steps with which it is
compared. The Python of a user may take long, so it runs once, and its operations are repeated from then on. They are
noted below autograd and repeated above, so that transforms and derivatives see them.

The operations do not show everything that a function says about its derivatives. `torch.no_grad`, forward mode, and
the rules of an autograd.Function leave no trace; and a derivative that is taken inside of a function detaches tensors
that it saves, where no graph is cut. Such functions are refused, and evaluated each time. What is noted is repeated at
once, and has to give the same value, and the same derivatives of the first and the second order.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

import implicitdiff._torch.context as _context
import implicitdiff._torch.dispatch as _dispatch
import implicitdiff._torch.functions as _functions
import implicitdiff._torch.switches as _switches
import implicitdiff._torch.trees as pytree
from implicitdiff._recorded.record import FACTORIES, Guard, asks_for_values
from implicitdiff._recorded.tape import NotRecordableError
from implicitdiff._torch.dispatch import AtenOperation, aten
from implicitdiff._torch.messages import is_torch_asking
from implicitdiff._torch.modes import no_modes
from implicitdiff._torch.tracking import is_continuous
from implicitdiff._torch.trees import Leaves

Function = Callable[..., Any]
"""``function(operands, *more)``, a pytree; the tensors of `more` are operands as well."""

_BY_STRIDES = (
    aten.as_strided.default,
    aten.as_strided_copy.default,
    aten.as_strided_scatter.default,
    aten._reshape_alias.default,
    aten.view.dtype,
)
"""Operations that read memory, so that the strides of a later argument change their result."""
_CUTS = (aten.detach.default, aten.detach_copy.default, aten.detach_.default)
_DETACH = (Tensor.detach, torch.detach)
_ABOUT_GRADIENTS = ("requires_grad", "is_leaf", "grad_fn", "grad", "retains_grad")
_ORDERS = 2
"""The derivatives that are compared."""
_UNITS_APART = 2**10
"""Largest difference between two evaluations, in units of the last place of the largest entry."""


class _Variable(NamedTuple):
    """Stands for a tensor among the arguments of an operation."""

    number: int


class _Operation(NamedTuple):
    """One operation.

    Attributes:
        function: the operation.
        args, kwargs: its arguments, with a `_Variable` in the place of each tensor.
        made: the slots of the tensors among its results.
        writes: whether it writes to an argument.
        fault: why the operation cannot be repeated, in words; None if it can.
    """

    function: AtenOperation
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: tuple[int, ...]
    writes: bool
    fault: str | None


class StraightLine(NamedTuple):
    """The operations of a function.

    Attributes:
        operations: the operations in order.
        tensors: the constants at their slots, and None at the slots of operands and results; the operands come first.
        results: the slots of the results.
    """

    operations: Sequence[_Operation]
    tensors: Sequence[Tensor | None]
    results: Sequence[int]

    def __call__(self, operands: Sequence[Tensor]) -> Leaves:
        """Return the results of the operations with these operands."""
        values: list[Any] = [*operands, *self.tensors[len(operands) :]]
        # All are operations of the dispatcher, in which no Guard has anything to refuse.
        with no_modes():
            for function, args, kwargs, made, *_ in self.operations:
                found = function(*_substituted(args, values), **_substituted(kwargs, values))
                results = [found] if isinstance(found, Tensor) else pytree.tensors(found)
                for slot, tensor in zip(made, results, strict=True):
                    values[slot] = tensor
        return [values[slot] for slot in self.results]


def _substituted(value: Any, values: Sequence[Tensor]) -> Any:
    """Return arguments with tensors in the place of slots."""
    kind = type(value)
    if kind is _Variable:
        return values[value.number]
    if kind is tuple or kind is list:
        return kind([_substituted(v, values) for v in value])
    return {k: _substituted(v, values) for k, v in value.items()} if kind is dict else value


class _StateGuard(Guard):
    """A `Guard` that refuses questions about gradients as well: another evaluation may have another answer."""

    def __init__(self, notes: _Notes) -> None:
        super().__init__()
        self.notes = notes

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # An accessor is a method of the attribute's descriptor.
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if attribute in _ABOUT_GRADIENTS and not is_torch_asking():
            raise NotRecordableError("the function asks whether gradients are recorded")
        if func not in _DETACH:
            return super().__torch_function__(func, types, args, kwargs)
        with self.notes.detaching():
            return super().__torch_function__(func, types, args, kwargs)


class _Notes(_dispatch.TorchDispatchMode):
    """A mode that notes the operations of a function, and what about them cannot be repeated.

    Args:
        operands: the operands.
        constants: other tensors that the function may use.

    Attributes:
        refusal: why no later evaluation can repeat the operations, in words; None if they can be repeated. An error
            inside of the user's function would be the function's to handle.
    """

    def __init__(self, operands: Sequence[Tensor], constants: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.refusal: str | None = None
        self._is_detaching = False
        self._operations: list[_Operation] = []
        # A slot is an index into this list; the operands have the first slots.
        self._tensors: list[Tensor | None] = []
        # By id of the tensor. Memory is known by the key of its storage.
        self._slots: dict[int, int] = {}
        # The ids of tensors and of memories are unique as long as the tensors live.
        self._alive: list[Tensor] = []
        self._constants = {id(t) for t in constants}
        for operand in operands:
            self._new(operand)
        # Memory that depends on an operand, and memory that the function must not write to.
        self._varying = {_dispatch.storage_key(t) for t in operands}
        self._foreign = {_dispatch.storage_key(t) for t in (*operands, *constants)}

    @contextmanager
    def detaching(self) -> Iterator[None]:
        """Run a call of `detach`, which cuts all graphs. Saving a tensor for a derivative detaches it as well, and cuts
        none."""
        before, self._is_detaching = self._is_detaching, True
        try:
            yield
        finally:
            self._is_detaching = before

    def line(self, results: Sequence[Tensor]) -> StraightLine:
        """Return the operations that the results need.

        Raises:
            NotRecordableError: a later evaluation could not repeat the operations.
        """
        slots = [self._slot(t).number for t in results]
        if self.refusal is not None:
            raise NotRecordableError(self.refusal)
        operations = self._needed(slots)
        if faults := [operation.fault for operation in operations if operation.fault is not None]:
            raise NotRecordableError(faults[0])
        if not any([operation.writes for operation in operations]):
            # No write shows whether a result is a view; a view fails in a batch that lies otherwise in memory.
            operations = [_with_reshape(operation) for operation in operations]
        return StraightLine(operations, self._tensors, slots)

    def _needed(self, slots: Sequence[int]) -> list[_Operation]:
        needed, kept = set(slots), []
        for operation in reversed(self._operations):
            # All writes are kept: a later operation may read the memory as another slot.
            if operation.writes or not needed.isdisjoint(operation.made):
                kept.append(operation)
                needed.update(_variables_in((operation.args, operation.kwargs)))
        return kept[::-1]

    def __torch_dispatch__(
        self, func: AtenOperation, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten.lift_fresh.default:
            # The argument is a tensor that `torch.tensor` has just made of numbers, once for all evaluations.
            self._constants.add(id(args[0]))
            self._foreign.add(_dispatch.storage_key(args[0]))
        # Before the operation runs: a write returns its argument, under a new slot.
        shown_args, shown_kwargs = self._shown(args), self._shown(kwargs)
        result = func(*args, **kwargs)
        self._note(func, (args, kwargs), (shown_args, shown_kwargs), result)
        return result

    def _note(self, func: AtenOperation, given: Any, shown: tuple[Any, Any], result: Any) -> None:
        self._refuse_unrepeatable(func, given)
        if _dispatch.changes_geometry(func):
            # The argument, which is the result as well, becomes a view of what it was.
            func = _as_view(func) or func
        used, made = pytree.tensors(given), pytree.tensors(result)
        varies = func not in FACTORIES and not self._are_fixed(used)
        fault = self._fault(func) if varies else None
        writes = _dispatch.changes_arguments(func)
        if varies:
            # By memory, so a view of varying memory varies as well.
            self._varying.update(map(_dispatch.storage_key, [*made, *_dispatch.written(func, *given)]))
        self._operations.append(_Operation(func, *shown, tuple(map(self._new, made)), writes, fault))

    def _fault(self, func: AtenOperation) -> str | None:
        """Return why an operation on varying tensors shows too little of a derivative, in words."""
        if func in _CUTS and not self._is_detaching:
            return "detaches a tensor"
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return "switches gradients off"
        return "runs in forward mode" if _context.now().forward else None

    def _refuse_unrepeatable(self, func: AtenOperation, given: Any) -> None:
        if _dispatch.is_random(func):
            self._note_refusal(f"{func} draws random numbers")
        if asks_for_values(func, given[0], self._are_fixed):
            self._note_refusal(f"{func} reads the value of a tensor")
        if func in _BY_STRIDES or (_dispatch.changes_geometry(func) and _as_view(func) is None):
            self._note_refusal(f"{func} depends on how a tensor lies in memory")
        if _dispatch.is_custom(func):
            self._note_refusal(f"{func} is not of torch")
        if any([_dispatch.storage_key(t) in self._foreign for t in _dispatch.written(func, *given)]):
            self._note_refusal(f"{func} writes to a tensor from outside")

    def _are_fixed(self, tensors: Sequence[Tensor]) -> bool:
        return all([_dispatch.storage_key(t) not in self._varying for t in tensors])

    def _note_refusal(self, why: str) -> None:
        self.refusal = self.refusal or why

    def _shown(self, value: Any) -> Any:
        """Return arguments with slots in the place of tensors."""
        if isinstance(value, Tensor):
            return self._slot(value)
        if isinstance(value, (list, tuple)):
            return type(value)([self._shown(v) for v in value])
        return {k: self._shown(v) for k, v in value.items()} if isinstance(value, dict) else value

    def _slot(self, tensor: Tensor) -> _Variable:
        if (known := self._slots.get(id(tensor))) is not None:
            return _Variable(known)
        if id(tensor) not in self._constants:
            self._note_refusal("uses a tensor of unknown origin")
        slot = self._new(tensor)
        self._tensors[slot] = tensor
        return _Variable(slot)

    def _new(self, tensor: Tensor) -> int:
        """Return a new slot. A write returns its argument, which the new slot then stands for."""
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
            self._note_refusal("uses a tensor of another kind")
        self._slots[id(tensor)] = slot = len(self._tensors)
        self._tensors.append(None)
        self._alive.append(tensor)
        return slot


def _variables_in(value: Any) -> Iterator[int]:
    if type(value) is _Variable:
        yield value.number
    elif isinstance(value, (tuple, list, dict)):
        for v in value.values() if isinstance(value, dict) else value:
            yield from _variables_in(v)


def _as_view(operation: AtenOperation) -> AtenOperation | None:
    """Return the view that an operation such as ``squeeze_`` makes of its argument; None for other operations."""
    view = _dispatch.out_of_place(operation)
    return view if view is not None and _dispatch.returns_views(view) and view not in _BY_STRIDES else None


def _with_reshape(operation: _Operation) -> _Operation:
    return operation._replace(function=aten.reshape.default) if operation.function is aten.view.default else operation


def straight_line(
    function: Function, operands: Sequence[Tensor], more: Sequence[Tensor], constants: Sequence[Tensor]
) -> StraightLine:
    """Evaluate a function once, and return its operations.

    Args:
        function: the function.
        operands, more: where the function is evaluated; `more` are arguments of their own.
        constants: other tensors that the function may use.

    Raises:
        NotRecordableError: repeated operations would not do what the function does.
        FloatingPointError: the value is not finite, so that it tells nothing.
    """
    with _alone():
        given = [_as_leaf(t) for t in (*operands, *more)]
        first = len(operands)
        notes = _Notes(given, constants)
        with notes, _StateGuard(notes):
            made = pytree.tensors(function(given[:first], *given[first:]))
        line = notes.line(made)
        if not all([bool(t.isfinite().all()) for t in made]):
            raise FloatingPointError("the value of the function is not finite")
        if not _agree_in_derivatives(made, line(given), [t for t in given if t.requires_grad]):
            raise NotRecordableError("repeated operations give other numbers")
    return line


def has_values_of(line: StraightLine, function: Function, operands: Sequence[Tensor], more: Sequence[Tensor]) -> bool:
    """Return whether a line has the values of a function that is evaluated without gradients: Python may ask whether
    gradients are on."""
    with _alone(), torch.no_grad():
        given = [t.detach() for t in operands]
        return _are_same(pytree.tensors(function(given, *more)), line([*given, *more]))


@contextmanager
def _alone() -> Iterator[None]:
    """Run the body outside of transforms and recorders, with gradients on."""
    with _switches.nothing_running(), _dispatch.no_dispatch_modes(), _switches.recording():
        yield


def _as_leaf(tensor: Tensor) -> Tensor:
    # Composite operations choose their parts for tensors with derivatives.
    return tensor.detach().clone().requires_grad_(is_continuous(tensor))


def _agree_in_derivatives(made: Leaves, again: Leaves, leaves: Leaves) -> bool:
    """Return whether two evaluations have the same values and derivatives."""
    # Round k compares the derivatives of order k - 1, then takes a derivative of both; the last order follows the loop.
    for _ in range(_ORDERS):
        if not _are_same(made, again):
            return False
        pairs = [(a, b) for a, b in zip(made, again, strict=True) if a.requires_grad]
        if not pairs:
            return True
        of_made, of_again = map(list, zip(*pairs, strict=True))
        try:
            made = _slopes(of_made, leaves)
        except RuntimeError:
            # torch lacks the derivative.
            return True
        again = _slopes(of_again, leaves)
    return _are_same(made, again)


def _slopes(values: Leaves, leaves: Leaves) -> Leaves:
    """Return the derivatives of a sum of all entries with irregular weights; 0 where there are none."""
    # Irregular weights, so no symmetry of the function cancels the sum.
    weights = [torch.cos(torch.arange(t.numel(), device=t.device)).reshape(t.shape).to(t.dtype) for t in values]
    found = _functions.gradients(values, leaves, weights, create_graph=True)
    return [torch.zeros_like(t) if slope is None else slope for t, slope in zip(leaves, found, strict=True)]


def _are_same(made: Leaves, again: Leaves) -> bool:
    return all([_is_same(a, b) for a, b in zip(made, again, strict=True)])


def _is_same(a: Tensor, b: Tensor) -> bool:
    if (a.shape, a.dtype, a.requires_grad) != (b.shape, b.dtype, b.requires_grad):
        return False
    a, b = a.detach(), b.detach()
    if not is_continuous(a) or not a.numel():
        return torch.equal(a, b)
    size = float(torch.where(a.isfinite(), a.abs(), 0.0).amax())
    return torch.allclose(a, b, rtol=0.0, atol=_UNITS_APART * torch.finfo(a.dtype).eps * size, equal_nan=True)


class StraightLines:
    """Functions of operands, each evaluated once and repeated from then on.

    A function whose operations cannot be repeated is evaluated each time.

    Args:
        function: ``function(operands, name, *more)``, the functions by name.
        near, at: operands; a function is noted at `near`, or at `at` where that fails.
        constants: other tensors that the functions may use.
        compares: whether each function is evaluated once more, at `at`, to compare its values.
    """

    def __init__(
        self, function: Function, near: Leaves, at: Leaves, constants: Sequence[Tensor], *, compares: bool
    ) -> None:
        self.function, self.near, self.at, self.constants, self.compares = function, near, at, constants, compares
        self._lines: dict[Hashable, StraightLine | None] = {}

    def __call__(self, operands: Sequence[Tensor], name: str, *more: Tensor) -> Any:
        """Return the result of a function, a list of tensors if the function is repeated."""
        key = (name, *((t.shape, t.dtype) for t in more))
        if key not in self._lines:
            # Numbers for each lane, such as step sizes, are noted at 1.
            ones = [torch.ones(t.shape, dtype=t.dtype, device=t.device) for t in more]
            self._lines[key] = self._noted(lambda operands, *more: self.function(operands, name, *more), ones)
        if (line := self._lines[key]) is None:
            return self.function(operands, name, *more)
        return line([*operands, *more])

    @property
    def repeats(self) -> bool:
        """True if any function is repeated."""
        return any([line is not None for line in self._lines.values()])

    def _noted(self, function: Function, more: Sequence[Tensor]) -> StraightLine | None:
        try:
            line = straight_line(function, self.near, more, self.constants)
        except NotRecordableError:
            return None
        except Exception:
            # The function may be undefined at this point.
            return self._noted_at_last(function, more)
        try:
            return line if not self.compares or has_values_of(line, function, self.at, more) else None
        except Exception:
            return None

    def _noted_at_last(self, function: Function, more: Sequence[Tensor]) -> StraightLine | None:
        try:
            return straight_line(function, self.at, more, self.constants)
        except Exception:
            # If the function is nowhere defined, the search will say so.
            return None
