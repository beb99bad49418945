"""Several steps of a replay as one CUDA graph.

The host launches a graph by one call, where a step by itself is a call for each operation.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitdiff._recorded.listing import separate, window
from implicitdiff._recorded.replay import Replay
from implicitdiff._torch.trees import Leaves

# As many as `torch.cuda.make_graphed_callables` makes.
_WARM_UP = 3
"""The number of runs before a capture, in which libraries allocate their workspaces."""


def several(step: Replay, count: int, carried: Leaves, prepared: Leaves) -> Leaves:
    """Return the carried tensors after so many steps."""
    for _ in range(count):
        carried = step(carried, prepared)
    return carried


def _copy(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


@dataclass(eq=False)
class StepGraph:
    """A captured graph. Its operands are copied to fixed memory before each launch.

    Args:
        step: the step, see `Replay.straight`.
        count: the number of steps in a graph.
        carried: the carried tensors of some call, with the strides of the step.
        operands: the operands of this call.

    Raises:
        RuntimeError: CUDA cannot capture an operation.
    """

    def __init__(self, step: Replay, count: int, carried: Leaves, operands: Leaves) -> None:
        if {t.device for t in (*carried, *operands)} != {carried[0].device}:
            # A capture reads numbers on the host once, and keeps them.
            raise RuntimeError("an operand is on another device")
        self._lock = threading.Lock()
        # A graph reads and writes fixed addresses: this memory belongs to the graph.
        self._carried, self._operands = ([separate(t) for t in ts] for ts in (carried, operands))
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(carried[0].device):
            # As torch prescribes: on another stream than the current one.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    self._steps(step, 1)
            torch.cuda.current_stream().wait_stream(stream)
            # By default an unsafe call of CUDA in another thread would break the capture.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                # All results are there before the first is stored.
                _copy(self._carried, self._steps(step, count))

    def _steps(self, step: Replay, count: int) -> Leaves:
        # A step may return a carried tensor itself, whose memory the copies overwrite.
        return [t.clone() for t in several(step, count, self._carried, step.prepared(self._operands))]

    def __call__(self, carried: Leaves, operands: Leaves) -> Leaves:
        """Return the carried tensors after the steps of one graph. No argument is changed."""
        # One search at a time, since the graph has one memory.
        with self._lock:
            _copy(self._carried, carried)
            # Several entries of an expanded tensor are one number in memory.
            _copy(map(window, self._operands), map(window, operands))
            self._graph.replay()
            # The next launch overwrites the memory of the graph.
            return [t.clone() for t in self._carried]
