"""Small programs of several processes, each of which raises. Here they run in one, and what others say is made up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch import distributed as c10d

from implicitdiff import distributed
from tables.troubles import V, named


@contextmanager
def a_world() -> Iterator[None]:
    """Run the body in a process group of this process alone."""
    c10d.init_process_group("gloo", store=c10d.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        c10d.destroy_process_group()


def in_a_world(run: Callable[[], Any]) -> Callable[[], None]:
    def inside() -> None:
        with a_world():
            run()

    return inside


def over_lanes(*args: Tensor, **options: Any) -> Callable[[], None]:
    """Return a program that maps the sum of its arguments over lanes."""
    return in_a_world(lambda: distributed.vmap(lambda *each: sum(t.sum() for t in each), **options)(*args))


def own(dim: int) -> Any:
    from torch.distributed.tensor import Shard

    return Shard(dim)


def as_the_first_of_two(name: str, tensor: Tensor) -> Callable[[], None]:
    def run() -> None:
        with mock.patch.object(c10d, "get_world_size", lambda group=None: 2):
            getattr(distributed, name)(tensor)

    return in_a_world(run)


def beside_another(said: str, call: Callable[[], Any]) -> Callable[[], None]:
    """Return a program in which a second rank comes to another point than this one."""

    def differs(header: Tensor, **options: Any) -> None:
        header[1:] += 1

    def exchanged(told: list[Any], own: tuple[None, str], **options: Any) -> None:
        told[:] = [own, (None, said.format(own[1].partition("; ")[0]))]

    def run() -> None:
        distributed.psum(V)  # the first collective also compares machines
        with mock.patch.multiple(c10d, all_reduce=differs, all_gather_object=exchanged), distributed.together():
            call()

    return in_a_world(run)


def beside_a_dead_one() -> None:
    with mock.patch.object(c10d, "all_reduce", side_effect=RuntimeError("Connection closed by peer")):
        distributed.psum(V)


def over_a_grid() -> None:
    distributed.psum(V, axis=c10d.init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "model")))


def over_lanes_of_lanes() -> None:
    with a_world():
        distributed.vmap(lambda x: distributed.vmap(lambda y: x * y)(V))(V)


def batched_by_autograd() -> None:
    total = distributed.psum_of(torch.sin)
    torch.autograd.functional.jacobian(total, V, vectorize=True)


def after_the_end() -> None:
    w = V.clone().requires_grad_()
    with a_world():
        total = distributed.psum_of(torch.sum)(w)
    total.backward()


RANKS = {
    "no group": lambda: distributed.psum(V),
    "not a rank": in_a_world(lambda: distributed.psum(V, axis=c10d.GroupMember.NON_GROUP_MEMBER)),
    "a grid": in_a_world(over_a_grid),
    "no axis": in_a_world(lambda: distributed.psum(V, axis="data")),
    "in_dims": over_lanes(V, V, in_dims=(0,)),
    "in_dims of a number": over_lanes(V, torch.ones(()), in_dims=(0, 0)),
    "lanes": over_lanes(V, V[:2]),
    "own lanes": over_lanes(V, V[:2], in_dims=(0, own(0)) if c10d.is_available() else 0),
    "no own lanes": over_lanes(V[:0], in_dims=own(0) if c10d.is_available() else 0),
    "out_dims": over_lanes(V, out_dims=(0, 0)),
    "out_dims None": over_lanes(V, out_dims=None),
    "parts": as_the_first_of_two("shard", V),
    "no dimension": in_a_world(lambda: distributed.all_gather(V, dim=1)),
    "layout": in_a_world(lambda: distributed.psum(torch.eye(3).to_sparse())),
    "dtype": in_a_world(lambda: distributed.psum(V > 0)),
    "other points": beside_another("psum of (4,) torch.float64", lambda: distributed.psum(V)),
    "other values": beside_another("{}; the data of another rank", lambda: distributed.vmap(torch.sin)(V)),
    "inside of another": over_lanes_of_lanes,
    "recorded": in_a_world(lambda: torch.func.linearize(distributed.psum_of(torch.sin), V)),
    "batched by autograd": in_a_world(batched_by_autograd),
    "a group that has ended": after_the_end,
    "a dead rank": in_a_world(beside_a_dead_one),
}

TROUBLES = named({"ranks": RANKS})
