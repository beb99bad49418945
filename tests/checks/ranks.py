"""Processes that form a process group, kept alive from test to test: `Worlds`.

A world of ``n`` ranks starts once. It then calls the functions of tests on all ranks, one after another. If one test
breaks the group, the next one starts another world.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import pickle
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as c10d

LONGEST = 120.0
"""How many seconds a rank has for one call."""


class Broken(NamedTuple):
    """The traceback of a rank whose function raised, or why there is none."""

    report: str


class Raised(NamedTuple):
    """An error as a value."""

    type: type[Exception]
    text: str
    notes: tuple[str, ...]
    seconds: float = 0.0


def outcome(fn: Callable[[], Any]) -> Any:
    """The function's result, or the error that it raises as a `Raised`."""
    start = datetime.datetime.now()
    try:
        return fn()
    except Exception as error:
        took = (datetime.datetime.now() - start).total_seconds()
        return Raised(type(error), str(error), tuple(getattr(error, "__notes__", ())), took)


def serve(rank: int, size: int, place: str, timeout: float, connection: Connection) -> None:
    """Join the group, and call functions until the connection ends."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated")
    c10d.init_process_group(
        "gloo",
        init_method=f"file://{place}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    while True:
        fn, args = pickle.loads(connection.recv_bytes())
        try:
            answer = pickle.dumps(fn(*args))
        except Exception:
            answer = pickle.dumps(Broken(traceback.format_exc()))
        connection.send_bytes(answer)


def served(*args: Any) -> None:
    # The parent closes the connection at the end.
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        serve(*args)


def context() -> Any:
    """Processes that are copies of one which has imported torch: each starts in little time."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["torch", "torch.distributed.tensor", "implicitdiff", "pytest"])
    return found


class World:
    """Processes that form a process group.

    Args:
        size: the number of ranks.
        timeout: of the group, in seconds.
        machines: environment variables of each rank, as of unlike machines; they have to be there before torch.
    """

    def __init__(self, size: int, timeout: float = 60.0, machines: Sequence[dict[str, str]] = ()) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.processes, self.connections = [], []
        place = str(Path(self.folder.name) / "store")
        for rank in range(size):
            ours, theirs = multiprocessing.Pipe()
            started = multiprocessing.get_context("spawn") if machines else context()
            process = started.Process(target=served, args=(rank, size, place, timeout, theirs), daemon=True)
            with mock.patch.dict(os.environ, machines[rank] if machines else {}):
                process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)

    def call(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``fn(*args)`` returns on each rank; a `Broken` of a rank that raised, ended, or took too long."""
        self.send(fn, *args)
        return [self.answer(rank) for rank in range(len(self.connections))]

    def send(self, fn: Callable[..., Any], *args: Any) -> None:
        call = pickle.dumps((fn, args))
        for connection in self.connections:
            connection.send_bytes(call)

    def answer(self, rank: int) -> Any:
        connection = self.connections[rank]
        try:
            if not connection.poll(LONGEST):
                return Broken(f"no answer within {LONGEST} s")
            return pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionError):
            return Broken("the process has ended")

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(0.2)
            process.kill()
            process.join()
        self.folder.cleanup()


class Worlds:
    """A world of each size, started at its first use."""

    def __init__(self) -> None:
        self.worlds: dict[int, World] = {}

    def __call__(self, size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``fn(*args)`` returns on each rank of `size`; an error on a rank fails the test."""
        if size not in self.worlds:
            self.worlds[size] = World(size)
        answers = self.worlds[size].call(fn, *args)
        broken = {rank: answer.report for rank, answer in enumerate(answers) if isinstance(answer, Broken)}
        if broken:
            # The ranks may wait for each other.
            self.worlds.pop(size).__exit__(None, None, None)
            raise AssertionError("\n".join(f"rank {rank}: {report}" for rank, report in broken.items()))
        return answers

    def close(self) -> None:
        for world in self.worlds.values():
            world.__exit__(None, None, None)


def rank() -> int:
    return c10d.get_rank()


def is_usable() -> bool:
    """True if the group still sums."""
    one = torch.ones(())
    c10d.all_reduce(one)
    return int(one) == c10d.get_world_size()
