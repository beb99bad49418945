"""Counts of the collectives of a process and of the bytes that they send: `Traffic`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch.distributed as c10d
from torch import Tensor

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "broadcast")


class Traffic:
    """Count, in the body of a with statement, by the name of the collective.

    Attributes:
        calls: how many.
        sent: the bytes of this rank's tensors.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.originals = {name: getattr(c10d, name) for name in COLLECTIVES}

    def __enter__(self) -> Traffic:
        for name, original in self.originals.items():
            setattr(c10d, name, self._counted(name, original))
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self.originals.items():
            setattr(c10d, name, original)

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            own = args[1] if name == "all_gather" else args[0]
            if isinstance(own, Tensor):
                self.sent[name] += own.numel() * own.element_size()
            return original(*args, **kwargs)

        return run


def counted(fn: Callable[[], Any]) -> tuple[Any, dict[str, int], dict[str, int]]:
    """The function's result, the number of its collectives, and the bytes that they send."""
    with Traffic() as traffic:
        result = fn()
    return result, dict(traffic.calls), dict(traffic.sent)
