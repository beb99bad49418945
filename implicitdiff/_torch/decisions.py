"""Decisions of the host where several processes run one search.

Processes on unlike machines round differently. Where each decided by its own numbers, one would go on while another
stops, and wait for it forever. So the first process leads: the others take the numbers that it reads.

A frame is the run of a search or of a linear solve. A collective inside of a frame names the leader of its processes;
from then on every number that the host reads in this frame comes from the leader. Where all machines round alike there
is no leader, and nothing is sent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from implicitdiff._torch.dispatch import TorchDispatchMode, aten
from implicitdiff._torch.switches import UNCHANGED, unobserved
from implicitdiff._torch.trees import Leaves

Leader = Callable[[Leaves], Leaves]
"""``leader(leaves)`` returns the tensors of the first process, a differentiable identity; equal leaders are one."""


class _OpenFrames(threading.local):
    def __init__(self) -> None:
        # None stands for a local function: code inside of it computes with values of this process alone.
        self.frames: list[LedFrame | None] = []


_open = _OpenFrames()
# Leaders of all collectives that this process has made.
_leaders: set[Leader] = set()


def add_leader(leader: Leader) -> None:
    """Name the leader of the processes that have run a collective: of this frame and of those around it."""
    _leaders.add(leader)
    for frame in filter(None, _open.frames):
        # A dictionary, since all processes must ask several leaders in the same order.
        frame.leaders.setdefault(leader)


def frame() -> AbstractContextManager[object]:
    """Run a search or a linear solve, in which a leader decides if a collective names one."""
    # Every function is lifted before its first frame opens, so its collectives have named their leaders by now. A
    # process without leaders pays for no mode.
    return LedFrame() if _leaders else UNCHANGED


@contextmanager
def each_alone() -> Iterator[None]:
    """Run the body with values that differ between processes: no leader of the frames around it decides."""
    _open.frames.append(None)
    try:
        yield
    finally:
        _open.frames.pop()


def of_leader(leaves: Leaves) -> Leaves:
    """Return tensors as the leaders of this frame have them; without a leader the tensors themselves."""
    # Of this frame alone: in a backward pass a linear solve of one process lies in the frame of a search of all.
    if _open.frames and (innermost := _open.frames[-1]) is not None:
        for leader in innermost.leaders:
            leaves = leader(leaves)
    return leaves


class LedFrame(TorchDispatchMode):
    """A frame, as the mode that sees each number that the host reads."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.leaders: dict[Leader, None] = {}

    def __enter__(self) -> LedFrame:
        _open.frames.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _open.frames.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Of nested frames the innermost asks.
        # `item`, `bool`, `int`, `float` and `if` read a number by this operation.
        if func is aten._local_scalar_dense.default and _open.frames[-1] is self:
            # The messages of a leader are no operations of the search, so neither modes nor transforms may see them.
            with unobserved():
                args = (of_leader([args[0]])[0],)
        return func(*args, **(kwargs or {}))
