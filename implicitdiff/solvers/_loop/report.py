"""What is seen of a search while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import implicitdiff._torch.trees as pytree
from implicitdiff.solvers._loop.status import Status

Callback = Callable[[int, Any, Any], Any]
"""``callback(iter_num, params, state)``."""


class Report:
    """A history of errors, a progress bar and a callback, as far as they are asked for.

    Args:
        name: of the solver.
        limit: how many iterations there may be.
        keeps: whether to keep the errors.
        verbose: whether to show a bar.
        callback: what to call.
    """

    def __init__(self, name: str, limit: int, keeps: bool, verbose: bool, callback: Callback | None) -> None:
        if callback is not None and not callable(callback):
            raise TypeError(f"{name}: callback must be a function of (iter_num, params, state), got {callback!r}")
        self.keeps, self.callback = keeps, callback
        self.lanes: tuple[int, ...] | None = None
        self.errors: list[Tensor] = []
        self.bar = _bar(name, limit) if verbose else None

    def over(self, lanes: tuple[int, ...]) -> Report:
        """The report of a search whose state has one row for each of these lanes."""
        self.lanes = lanes
        return self

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()

    def see(self, state: Any, params: Callable[[], Any], error: Tensor) -> int:
        """Take note of a state with plain tensors, and of its error as the caller's frame has it; returns how many
        lanes are still running."""
        running = int((state.status == Status.RUNNING).sum())
        if self.keeps:
            self.errors.append(error)
        if self.bar is not None or self.callback is not None:
            self._show(state, params)
        return running

    def _show(self, state: Any, params: Callable[[], Any]) -> None:
        at = int(state.iter_num.max())
        if self.bar is not None:
            self.bar.set_postfix(error=f"{float(state.error.max()):.1e}", refresh=False)
            self.bar.update(at - self.bar.n)
        if self.callback is not None:
            lanes = self.lanes
            if lanes is not None:
                state = pytree.map_tensors(lambda t: t.reshape((*lanes, *t.shape[1:])), state)
            self.callback(at, params(), state)

    def into(self, state: Any) -> Any:
        """The state with the errors that were kept, ``(..., iterations + 1)``."""
        return state._replace(history=torch.stack(self.errors, dim=-1)) if self.keeps else state


def _bar(name: str, limit: int) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(f"{name}: verbose=True shows its progress with tqdm: pip install tqdm") from error
    # Short runs show none.
    return tqdm(desc=name, total=limit, delay=1.0, unit="it")
