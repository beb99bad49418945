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
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

import implicitdiff._torch.context as _context
import implicitdiff._torch.dispatch as _dispatch
import implicitdiff._torch.functions as _functions
import implicitdiff._torch.switches as _switches
import implicitdiff._torch.trees as pytree
from implicitdiff._recorded.record import FACTORIES, Guard, asks_for_values
from implicitdiff._recorded.replay import Block, ListedCall, ListItem, Slot, function_of, target_of, with_slots
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
_NO_SLOT = Slot(-1)
_ORDERS = 2
"""The derivatives that are compared."""
_UNITS_APART = 2**10
"""Largest difference between two evaluations, in units of the last place of the largest entry."""


class StraightLine(NamedTuple):
    """The operations of a function.

    Attributes:
        function: the operations, without those that the results do not need, as a function of operands and constants.
        text: the function in Python.
        constants: tensors that are the same in each evaluation.
    """

    function: Callable[..., Leaves]
    text: str
    constants: Sequence[Tensor]

    def __call__(self, operands: Sequence[Tensor]) -> Leaves:
        """Return the results of the operations with these operands."""
        # All are operations of the dispatcher, in which no Guard has anything to refuse.
        with no_modes():
            return self.function(*operands, *self.constants)


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
        self._operations: list[ListItem] = []
        # Why an operation cannot be repeated, in words.
        self._faults: dict[ListItem, str] = {}
        # By id of the tensor. Memory is known by the key of its storage.
        self._slots: dict[int, Slot] = {}
        # The ids of tensors and of memories are unique as long as the tensors live. A slot is an index into this list.
        self._alive: list[Tensor] = []
        self._operands = [self._new(t) for t in operands]
        self._constants = {self._new(t): t for t in constants}
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
        slots = [self._slot(t) for t in results]
        if self.refusal is not None:
            raise NotRecordableError(self.refusal)
        # All writes are kept: a later operation may read the memory as another slot.
        block = Block(self._operations, slots).needed()
        operations = [item for item in block.items if isinstance(item, ListedCall)]
        if faults := [self._faults[operation] for operation in operations if operation in self._faults]:
            raise NotRecordableError(faults[0])
        if not any([operation.writes for operation in operations]):
            # No write shows whether a result is a view; a view fails in a batch that lies otherwise in memory.
            operations = [_with_reshape(operation) for operation in operations]
        given = [*self._operands, *self._constants]
        return StraightLine(*function_of(Block([*operations], slots), given), [*self._constants.values()])

    def __torch_dispatch__(
        self, func: AtenOperation, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten.lift_fresh.default:
            # The argument is a tensor that `torch.tensor` has just made of numbers, once for all evaluations.
            self._constants[self._new(args[0])] = args[0]
            self._foreign.add(_dispatch.storage_key(args[0]))
        # Before the operation runs: a write returns its argument, under a new slot.
        shown = with_slots(args, self._slot), {k: with_slots(v, self._slot) for k, v in kwargs.items()}
        result = func(*args, **kwargs)
        self._refuse_unrepeatable(func, (args, kwargs))
        self._note(_repeated(func), (args, kwargs), shown, result)
        return result

    def _note(self, func: AtenOperation, given: Any, shown: tuple[list[Any], dict[str, Any]], result: Any) -> None:
        made, writes, first = pytree.tensors(result), _dispatch.changes_arguments(func), len(self._alive)
        if not made and not writes:
            return
        target = target_of(result, self._new) if made else []
        operation = ListedCall(func, *shown, range(first, len(self._alive)), target, writes)
        self._operations.append(operation)
        if func in FACTORIES or self._are_fixed(pytree.tensors(given)):
            return
        # By memory, so a view of varying memory varies as well.
        self._varying.update(map(_dispatch.storage_key, [*made, *_dispatch.written(func, *given)]))
        faults = (
            (func in _CUTS and not self._is_detaching, "detaches a tensor"),
            (not torch.is_grad_enabled() or torch.is_inference_mode_enabled(), "switches gradients off"),
            (_context.now().forward, "runs in forward mode"),
        )
        # An operation on varying tensors shows too little of a derivative.
        if reasons := [why for holds, why in faults if holds]:
            self._faults[operation] = reasons[0]

    def _refuse_unrepeatable(self, func: AtenOperation, given: Any) -> None:
        written = [_dispatch.storage_key(t) for t in _dispatch.written(func, *given)]
        by_memory = func in _BY_STRIDES or _dispatch.changes_geometry(_repeated(func))
        refusals = (
            (_dispatch.is_random(func), "draws random numbers"),
            (asks_for_values(func, given[0], self._are_fixed), "reads the value of a tensor"),
            (by_memory, "depends on how a tensor lies in memory"),
            (_dispatch.is_custom(func), "is not of torch"),
            (not self._foreign.isdisjoint(written), "writes to a tensor from outside"),
        )
        for why in [why for holds, why in refusals if holds]:
            self._note_refusal(f"{func} {why}")

    def _are_fixed(self, tensors: Sequence[Tensor]) -> bool:
        return self._varying.isdisjoint(map(_dispatch.storage_key, tensors))

    def _note_refusal(self, why: str) -> None:
        self.refusal = self.refusal or why

    def _slot(self, tensor: Tensor) -> Slot:
        if id(tensor) not in self._slots:
            self._note_refusal("uses a tensor of unknown origin")
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
            self._note_refusal("uses a tensor of another kind")
        return self._slots.get(id(tensor), _NO_SLOT)

    def _new(self, tensor: Tensor) -> Slot:
        """Return a new slot. A write returns its argument, which the new slot then stands for."""
        self._slots[id(tensor)] = slot = Slot(len(self._alive))
        self._alive.append(tensor)
        return slot


@cache
def _repeated(operation: AtenOperation) -> AtenOperation:
    """Return the operation that stands for another: for ``squeeze_``, whose argument becomes a view of what it was, the
    view ``squeeze``."""
    view = _dispatch.out_of_place(operation)
    if view is None or view in _BY_STRIDES or not _dispatch.returns_views(view):
        return operation
    return view


def _with_reshape(operation: ListedCall) -> ListedCall:
    return replace(operation, function=aten.reshape.default) if operation.function is aten.view.default else operation


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
        # If the function is nowhere defined, the search will say so.
        with suppress(Exception):
            line = self._line(function, more)
            if not self.compares or has_values_of(line, function, self.at, more):
                return line
        return None

    def _line(self, function: Function, more: Sequence[Tensor]) -> StraightLine:
        try:
            return straight_line(function, self.near, more, self.constants)
        except NotRecordableError:
            raise
        except Exception:
            # The function may be undefined at this point.
            return straight_line(function, self.at, more, self.constants)
