"""Host decisions inside of a step: a branch and a loop that ask whether a flag is set in any lane.

A step runs for many lanes at once, so a branch that one lane needs is computed for all lanes, and a recorded step may
run it for a lane on behalf of its neighbours. Hence one rule for every function given to `if_any` and `repeat`: in a
lane without the flag the results that are used must not depend on whether the function ran. `select` keeps the old
values of such a lane.

A carry is a pytree of tensors: named tuples, tuples, lists and dictionaries. The functions return a carry of the same
structure, shapes and dtypes, and may read other tensors from outside.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from torch import Tensor

import implicitdiff._torch.levels as _levels

CarryT = TypeVar("CarryT")


class BranchRecorder(Protocol):
    """The record of a step, which takes branches and loops in the place of their execution."""

    def if_any(self, flag: Tensor, then: Callable[[CarryT], CarryT], carry: CarryT) -> CarryT: ...

    def repeat(
        self, body: Callable[[CarryT], CarryT], carry: CarryT, flag: Callable[[CarryT], Tensor], at_most: int
    ) -> CarryT: ...

    def take_linear_solver(self) -> None: ...

    def leave_to_python(self, flag: Tensor) -> None: ...


class _Slot(threading.local):
    # State of the thread: another thread may execute a step while this thread records one.
    recorder: BranchRecorder | None = None


_slot = _Slot()


@contextmanager
def recorded_by(recorder: BranchRecorder | None) -> Iterator[None]:
    """Hand the branches and loops of this thread to a recorder; None: execute them."""
    before, _slot.recorder = _slot.recorder, recorder
    try:
        yield
    finally:
        _slot.recorder = before


def is_recorded() -> bool:
    """Return whether a recorder takes the branches and loops of this thread."""
    return _slot.recorder is not None


def takes_linear_solver() -> bool:
    """Return whether a recorder takes the loops of a linear solver of this thread; a recorder may refuse them."""
    if _slot.recorder is None:
        return False
    _slot.recorder.take_linear_solver()
    return True


def leave_to_python(flag: Tensor) -> None:
    """Let Python repeat a recorded step or first state for lanes with a set flag, and report what is wrong.

    Args:
        flag: the flags, shape ``(lanes,)``.
    """
    if _slot.recorder is None:
        raise AssertionError("nothing is recorded")
    _slot.recorder.leave_to_python(flag)


def if_any(flag: Tensor, then: Callable[[CarryT], CarryT], carry: CarryT) -> CarryT:
    """Return ``then(carry)`` if a flag is set in any lane, else the carry itself.

    Args:
        flag: the flags, with the lanes in front; of any shape.
        then: in lanes without a flag its results must be as good as the carry, see above.
        carry: a pytree of tensors.
    """
    if _slot.recorder is not None:
        return _slot.recorder.if_any(flag, then, carry)
    # The host waits here for the value of the flag.
    return then(carry) if _levels.is_any(flag) else carry


def repeat(body: Callable[[CarryT], CarryT], carry: CarryT, flag: Callable[[CarryT], Tensor], at_most: int) -> CarryT:
    """Apply the body as long as ``flag(carry)`` is set in any lane, at most so many times.

    Args:
        body: one pass; in lanes without a flag its results must be as good as the carry, see above.
        carry: a pytree of tensors.
        flag: returns the flags of a carry, with the lanes in front; not asked after the last pass.
        at_most: bound on the number of passes; none for numbers below 1.
    """
    if _slot.recorder is not None:
        return _slot.recorder.repeat(body, carry, flag, at_most)
    for _ in range(at_most):
        if not _levels.is_any(flag(carry)):
            break
        carry = body(carry)
    return carry
