"""Local functions that run: those of `psum_of` and `vmap`, on each rank with its own values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import ProcessGroup

# Name and ranks of each, the innermost last; of the process, not of a thread.
_local: list[tuple[str, ProcessGroup]] = []


@contextmanager
def apart(name: str, group: ProcessGroup) -> Iterator[None]:
    """Run a local function of a group in the body."""
    _local.append((name, group))
    try:
        yield
    finally:
        _local.pop()


def is_local(group: ProcessGroup) -> bool:
    """Return whether a local function of a group runs: all of its values are varying."""
    return any(of == group for _, of in _local)


def refuse_inside(name: str, group: ProcessGroup) -> None:
    """Raise inside of a local function of the same ranks: `name` would take varying values for replicated ones."""
    for outer, of in _local:
        if of == group:
            raise RuntimeError(
                f"{name}: the ranks of this axis run {outer} each by itself, with other values; distribute one of both "
                "alone, or pass another axis, for example another dimension of a mesh"
            )
