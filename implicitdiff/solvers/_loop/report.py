"""Reports of a running search: history of errors, progress bar and callback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import implicitdiff._torch.trees as pytree
from implicitdiff._torch.trees import Tree
from implicitdiff.solvers._loop.state import MemoryT, State
from implicitdiff.solvers._loop.status import Status

Callback = Callable[[int, Tree, State[Any]], object]
"""``callback(iter_num, params, state)``."""


class Report:
    """A history of errors, a progress bar and a callback, each if requested.

    Args:
        name: the solver's name.
        limit: bound on the number of iterations.
        keeps: True to keep the errors.
        verbose: True to show a bar.
        callback: the user's function, or None.

    Attributes:
        lanes: the batch shape of the lanes that a state holds as rows; None in the caller's frame.
    """

    def __init__(self, name: str, limit: int, keeps: bool, verbose: bool, callback: Callback | None) -> None:
        if callback is not None and not callable(callback):
            raise TypeError(f"{name}: callback must be a function of (iter_num, params, state), got {callback!r}")
        self.keeps, self.callback = keeps, callback
        self.lanes: tuple[int, ...] | None = None
        self.errors: list[Tensor] = []
        self.bar = _bar(name, limit) if verbose else None

    @property
    def is_watching(self) -> bool:
        """True if the report needs to see every iteration."""
        return self.keeps or self.bar is not None or self.callback is not None

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()

    def see(self, state: State[MemoryT], params: Callable[[], Tree], error: Tensor) -> int:
        """Record a state of plain tensors and return the number of lanes still running.

        Args:
            state: the state, lanes in front.
            params: makes the unknowns for the callback.
            error: the state's error in the caller's frame, with autograd history, for the history of errors.
        """
        # The host waits here: the loop needs the number.
        running = int((state.status == Status.RUNNING).sum())
        if self.keeps:
            self.errors.append(error)
        if self.bar is not None or self.callback is not None:
            self._show(state, params)
        return running

    def _show(self, state: State[MemoryT], params: Callable[[], Tree]) -> None:
        at = int(state.iter_num.max())
        if self.bar is not None:
            self.bar.set_postfix(error=f"{float(state.error.max()):.1e}", refresh=False)
            self.bar.update(at - self.bar.n)
        if self.callback is not None:
            lanes = self.lanes
            # Below the transforms the lanes are a single dimension: give the callback the shape of the vmaps.
            if lanes is not None:
                state = pytree.map_tensors(lambda t: t.reshape((*lanes, *t.shape[1:])), state)
            self.callback(at, params(), state)

    def into(self, state: State[MemoryT]) -> State[MemoryT]:
        """Return the state with the recorded errors as ``history``, shape ``(..., iterations + 1)``."""
        return state._replace(history=torch.stack(self.errors, dim=-1)) if self.keeps else state


def _bar(name: str, limit: int) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(f"{name}: verbose=True needs tqdm for the progress bar: pip install tqdm") from error
    # A delay of one second keeps short runs without a bar.
    return tqdm(desc=name, total=limit, delay=1.0, unit="it")
