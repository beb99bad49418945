"""A recorder: a mode that turns the operations of one step of all lanes into a `Replay`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import implicitdiff._torch.dispatch as _dispatch
import implicitdiff._torch.trees as pytree
from implicitdiff._recorded.record import FACTORIES, BranchT, asks_for_values
from implicitdiff._recorded.replay import Block, Branch, ListedCall, ListItem, Loop, Replay, Slot, target_of, with_slots
from implicitdiff._recorded.tape import NotRecordableError, change
from implicitdiff._torch.bindings import binding_of
from implicitdiff._torch.dispatch import AtenOperation, aten
from implicitdiff._torch.messages import line_of_user
from implicitdiff._torch.modes import no_modes
from implicitdiff._torch.trees import Leaves

_UNTAGGED = (aten._pack_padded_sequence.default,)
"""Operations with a result whose shape depends on values, though their tags do not tell."""


_QUESTIONS = (aten.is_same_size.default, aten._has_same_storage_numel.default)
"""Questions about shapes and memory, by which derivatives choose where to put a result, and not its numbers."""


@dataclass(eq=False)
class _Memory:
    """The memory of a tensor.

    Attributes:
        storage: keeps the number of the memory from being used again, and not the memory itself.
        is_own: True if a recorded operation made it, so that recorded operations may write to it.
        is_known: True if its numbers depend on no operand.
        level: the number of open branches and loops where it was made.
    """

    storage: StorageWeakRef
    is_own: bool
    is_known: bool
    level: int


class Lister(_dispatch.TorchDispatchMode):
    """A mode that lists every operation below autograd and torch.func.

    A tensor is known by its memory and its place there: autograd and torch.func make new objects for the same tensor
    that no operation shows. The operations run as well, on the numbers of the recording, so that shapes and strides are
    known; the numbers do not matter.

    Args:
        carried: the unknowns and the state, each with memory of its own.
        operands: the other operands; two may share memory only if they share it in every later call.
    """

    def __init__(self, carried: Sequence[Tensor], operands: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memories: dict[int, _Memory] = {}
        # The open lists, the innermost last, and the numbers of the tensors that these have made.
        self._lists: list[list[ListItem]] = [[]]
        self._slots: dict[Hashable, Slot] = {}
        # The number of a slot is an index into `_keys`, its storage.
        self._keys: list[int] = []
        # Storages to which an operation writes. A replay keeps all operations on these in order.
        self._written: set[int] = set()
        self._strides, self._operands = [t.stride() for t in carried], len(operands)
        for tensor in (*carried, *operands):
            self._new_slot(tensor, is_own=False, is_known=False)

    def replay(self, results: Sequence[Tensor]) -> Replay:
        """Return the recorded step with these results."""
        slots = [self._slot(t) for t in results]
        changing = {slot for slot, key in enumerate(self._keys) if key in self._written}
        return Replay(Block(self._lists[0], slots), self._strides, self._operands, changing)

    # --- tensors ------------------------------------------------------------------------------------------------------

    def _slot(self, tensor: Tensor) -> Slot:
        if (slot := self._slots.get(_spot(tensor))) is not None:
            return slot
        raise NotRecordableError("the function uses a tensor of unknown origin, such as one over memory of NumPy")

    def _new_slot(self, tensor: Tensor, *, is_own: bool, is_known: bool) -> Slot:
        """Number a tensor that no open list has."""
        slot, key = Slot(len(self._keys)), _dispatch.storage_key(tensor)
        self._keys.append(key)
        # Two tensors of one place share the first slot; the second number stays unused in the list.
        self._slots.setdefault(_spot(tensor), slot)
        if key not in self._memories:
            storage = StorageWeakRef(tensor.untyped_storage())
            self._memories[key] = _Memory(storage, is_own, is_known, len(self._lists))
        return slot

    def _memory(self, tensor: Tensor) -> _Memory:
        return self._memories[_dispatch.storage_key(tensor)]

    def _is_known(self, tensors: Sequence[Tensor]) -> bool:
        return all([self._memory(t).is_known for t in tensors])

    # --- operations ---------------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: AtenOperation, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten.lift_fresh.default:
            return self._lifted(args[0])
        if _dispatch.changes_geometry(func):
            return self._other_view(func, args, kwargs)
        given = self._given(args, kwargs)
        self._refuse_unsafe(func, args, kwargs)
        tensors = pytree.tensors((args, kwargs))
        # A factory reads shape and dtype alone, so its result is known also for a varying argument.
        is_known = func in FACTORIES or self._is_known(tensors)
        written = [*_dispatch.written(func, args, kwargs)]
        for target in written:
            self._refuse_write(func, target)
            # Memory stays known only as long as all writes are known.
            self._memory(target).is_known &= is_known
            self._written.add(_dispatch.storage_key(target))
        result = func(*args, **kwargs)
        if not isinstance(result, (Tensor, list, tuple, NoneType)):
            return self._answer(func, tensors, result)
        made = self._numbered(func, result, is_known)
        if made[0] or written or not pytree.tensors(result):
            function = binding_of(func, args, kwargs, result)
            self._lists[-1].append(ListedCall(function, *given, *made, bool(written)))
        return result

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return arguments with a slot for each tensor."""
        return [with_slots(a, self._slot) for a in args], {k: with_slots(v, self._slot) for k, v in kwargs.items()}

    def _answer(self, func: AtenOperation, tensors: Leaves, result: Any) -> Any:
        """Return the answer to a question about dtypes or shapes, which stays the same."""
        if tensors and func not in _QUESTIONS:
            raise self._refusal(func, "has unusual results")
        return result

    def _numbered(self, func: AtenOperation, result: Any, is_known: bool) -> tuple[Sequence[int], list[str]]:
        """Number the results of an operation; return none if all are known tensors, as of ``detach``."""
        results, first = list(result) if isinstance(result, (list, tuple)) else [result], len(self._keys)
        tensors = [t for t in results if t is not None]
        if not all([isinstance(t, Tensor) and t.layout is torch.strided for t in tensors]):
            raise self._refusal(func, "has unusual results")
        if all([_spot(t) in self._slots for t in tensors]):
            return [], []
        target = target_of(result, partial(self._new_slot, is_own=True, is_known=is_known))
        return range(first, len(self._keys)), target

    def _lifted(self, tensor: Tensor) -> Tensor:
        """List a tensor that `torch.tensor` has just made of numbers, with a copy for each run of the list."""
        result: Tensor = aten.lift_fresh.default(tensor)
        with self._paused():
            value = tensor.clone()
        slot = self._new_slot(result, is_own=True, is_known=True)
        self._lists[-1].append(ListedCall(aten.clone.default, [value], {}, [slot], [f"v{slot}"]))
        return result

    def _other_view(self, func: AtenOperation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """List the view of an operation that gives a tensor another shape, as ``squeeze_`` does."""
        size, old = _dispatch.storage_size(args[0]), _dispatch.storage_key(args[0])
        functional = _dispatch.out_of_place(func)
        given = self._given(args, kwargs)
        if functional is None or func is aten.resize_.default:
            raise self._refusal(func, "changes the memory of a tensor")
        result = func(*args, **kwargs)
        if (_dispatch.storage_size(result), _dispatch.storage_key(result)) != (size, old):
            raise self._refusal(func, "changes the memory of a tensor")
        made = self._numbered(func, result, self._memory(result).is_known)
        if made[0]:
            self._lists[-1].append(ListedCall(functional, *given, *made))
        return result

    def _refuse_unsafe(self, func: AtenOperation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not isinstance(func, AtenOperation) or _dispatch.is_custom(func):
            raise self._refusal(func, "is no operation of torch")
        if _dispatch.is_random(func):
            raise self._refusal(func, "draws random numbers")
        if asks_for_values(func, args, self._is_known) or func in _UNTAGGED:
            raise self._refusal(func, "reads the value of a tensor")
        if func is aten.as_strided.default and not self._memory(args[0]).is_own:
            raise self._refusal(func, "reads the memory of an operand, whose offset may be another in a later call")

    def _refuse_write(self, func: AtenOperation, tensor: Tensor) -> None:
        memory = self._memory(tensor)
        if not memory.is_own:
            raise self._refusal(func, "writes to an operand or to a result of a branch")
        if memory.level != len(self._lists):
            raise self._refusal(func, "writes in a branch to a tensor from outside")

    def _refusal(self, func: AtenOperation, why: str) -> NotRecordableError:
        return NotRecordableError(f"the operation {func} {why}{line_of_user()}")

    @contextmanager
    def _paused(self) -> Iterator[None]:
        with _dispatch.outside_dispatch(), no_modes(), torch.no_grad():
            yield

    # --- branches and loops -------------------------------------------------------------------------------------------

    def if_any(self, flag: Tensor, then: Callable[[BranchT], BranchT], carry: BranchT) -> BranchT:
        """List `then` as a branch, see `implicitdiff._torch.control.if_any`."""
        leaves, structure = pytree.flatten(carry)
        # The flag is computed before the branch, in the outer list.
        asked = self._slot(flag)
        with self._opened() as items:
            values = structure.tensors_of(then(structure.unflatten(leaves)))
            # `_like` may add a copy, part of the branch, so the scope is still open.
            values = [_like(a, b) for a, b in zip(values, leaves, strict=True)]
            taken = [self._slot(t) for t in values]
        # The copies for the way around the branch run before the branch, in the outer list.
        passed = [self._slot(_like(b, a)) for a, b in zip(values, leaves, strict=True)]
        results = [
            # A leaf that the branch returns as it was needs no new slot.
            old if self._slot(old) == new else self._stand_in(value)
            for old, new, value in zip(leaves, taken, values, strict=True)
        ]
        block = Block(items, taken).needed()
        self._lists[-1].append(Branch(asked, block, taken, passed, [self._slot(t) for t in results]))
        made: BranchT = structure.unflatten(results)
        return made

    def repeat(
        self, body: Callable[[BranchT], BranchT], carry: BranchT, flag: Callable[[BranchT], Tensor], at_most: int
    ) -> BranchT:
        """List `body` as a loop, see `implicitdiff._torch.control.repeat`."""
        leaves, structure = pytree.flatten(carry)
        # Every pass finds the same strides.
        leaves = [_without_traits(t).contiguous() for t in leaves]
        first, variables = [self._slot(t) for t in leaves], [self._stand_in(t) for t in leaves]
        with self._opened() as questions:
            asked = self._slot(flag(structure.unflatten(variables)))
        with self._opened() as items:
            values = structure.tensors_of(body(structure.unflatten(variables)))
            values = [_like(a, b).contiguous() for a, b in zip(values, variables, strict=True)]
            news = [self._slot(t) for t in values]
        results = [self._slot(t) for t in variables]
        blocks = Block(questions, [asked]).needed(), Block(items, news).needed()
        self._lists[-1].append(Loop(blocks[0], asked, blocks[1], first, news, results, at_most))
        made: BranchT = structure.unflatten(variables)
        return made

    def take_linear_solver(self) -> None:
        """Refuse: the loops of a recorded linear solver are slower than those of an eager one."""
        raise NotRecordableError("the step solves a linear system by iterations")

    def leave_to_python(self, flag: Tensor) -> None:
        """Refuse, see `implicitdiff._torch.control.leave_to_python`."""
        raise NotRecordableError("a linear solver of the step may fail")

    @contextmanager
    def _opened(self) -> Iterator[list[ListItem]]:
        before = self._slots
        # A tensor that is seen first in the list is not known after it.
        self._slots = dict(before)
        self._lists.append([])
        try:
            yield self._lists[-1]
        finally:
            self._slots = before
            self._lists.pop()

    def _stand_in(self, tensor: Tensor) -> Tensor:
        """Return a new tensor for a result of a branch or a loop."""
        with self._paused():
            new = separate(tensor)
        # No operation may write here: the branch or the loop assigns the value.
        self._new_slot(new, is_own=False, is_known=False)
        return new


def separate(tensor: Tensor) -> Tensor:
    """Return a copy with memory of its own, and with the same strides."""
    if tensor.is_conj():
        return separate(tensor.conj()).conj()
    return torch.as_strided(window(tensor).clone(), tensor.shape, tensor.stride(), 0)


def window(tensor: Tensor) -> Tensor:
    """Return the memory from the first entry of a tensor to the last, as a vector."""
    span = 1 + sum([(n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)]) if tensor.numel() else 0
    return torch.as_strided(tensor.detach(), (span,), (1,))


def _like(value: Tensor, other: Tensor) -> Tensor:
    """Return a result of a branch, in order if its strides are not those of the other result."""
    if (value.shape, value.dtype, value.device) != (other.shape, other.dtype, other.device):
        raise change("a branch changes", other, value)
    value = _without_traits(value)
    return value if value.stride() == other.stride() else value.contiguous()


def _without_traits(tensor: Tensor) -> Tensor:
    """Return a tensor without derivatives, and without a conjugation or a sign to be applied later."""
    return tensor.detach().resolve_conj().resolve_neg()


def _spot(tensor: Tensor) -> Hashable:
    return (
        # Dtype, conjugation and sign as well: `view(dtype)` and `conj` give another meaning to memory at one place.
        _dispatch.storage_key(tensor),
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
        tensor.is_conj(),
        tensor.is_neg(),
    )
