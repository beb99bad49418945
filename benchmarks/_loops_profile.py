"""Where the time of a compiled search goes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

import implicitdiff.solvers._loop.lifted as lifted
from implicitdiff._implicit.root import RootAt
from implicitdiff._recorded.step import RecordedStep

PARTS: dict[str, tuple[Any, str]] = {
    "machine": (RecordedStep, "run"),
    "watch": (lifted, "lift"),
    "derivative": (RootAt, "attached"),
    "backward": (torch.autograd, "grad"),
}
"""The parts of a call: iterations and judgement in the machine, the call of the user's function that is watched, the
set-up of the derivative, and the derivative itself."""


def shares(call: Callable[[], Any], calls: int) -> dict[str, float]:
    """Return the share of each of PARTS in the process time of a call; the rest is Python of the library and checks."""
    spent = dict.fromkeys(PARTS, 0.0)
    originals = {part: getattr(owner, name) for part, (owner, name) in PARTS.items()}
    for part, (owner, name) in PARTS.items():
        setattr(owner, name, _timed(part, originals[part], spent))
    try:
        # A function of torch that is exchanged makes the recording of another function.
        call()
        spent.update(dict.fromkeys(PARTS, 0.0))
        began = time.process_time()
        for _ in range(calls):
            call()
        total = time.process_time() - began
    finally:
        for part, (owner, name) in PARTS.items():
            setattr(owner, name, originals[part])
    return {part: round(seconds / total, 3) for part, seconds in spent.items()}


def _timed(part: str, function: Callable[..., Any], spent: dict[str, float]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        began = time.process_time()
        result = function(*args, **kwargs)
        spent[part] += time.process_time() - began
        return result

    return run
