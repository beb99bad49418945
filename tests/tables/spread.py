"""One problem whose terms lie on several ranks: each rank holds a share of a function, and the shares sum to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as c10d
from checks.tensors import draw
from torch import Tensor

import implicitdiff.distributed as dist

F64 = torch.float64
Function = Callable[..., Tensor]
MATRIX = draw(5, 18, 18) / 5


def shared_out(value: Tensor, rank: int, size: int) -> Tensor:
    """A rank's share of a value: parts of other signs and sizes, entries mixed, which sum to the value."""
    if not value.dim():
        return value * ((1 + 3 * (size - 1)) / size if rank == 0 else (1 - 3) / size)
    n = value.shape[0]
    mixed = MATRIX[:n, :n] @ value
    return value / size + (mixed * (size - 1) if rank == 0 else -mixed)


def own_share(fn: Function) -> Function:
    """The share of a function that this rank holds."""

    def local(*args: Any) -> Tensor:
        return shared_out(fn(*args), c10d.get_rank(), c10d.get_world_size())

    return local


def by_psum_of(fn: Function) -> Function:
    return dist.psum_of(own_share(fn))


def by_pmean_of(fn: Function) -> Function:
    return dist.pmean_of(lambda *args: own_share(fn)(*args) * c10d.get_world_size())


def by_hand(fn: Function) -> Function:
    """``psum(local(pvary(args)))``."""
    return lambda *args: dist.psum(own_share(fn)(*dist.pvary(args)))


def as_captured(fn: Function) -> Function:
    """The unknowns are an argument of the local function, and what follows is captured."""
    return lambda x, *rest: dist.psum_of(lambda x: own_share(fn)(x, *rest))(x)


SPREADS = {"psum_of": by_psum_of, "pmean_of": by_pmean_of, "by hand": by_hand, "captured": as_captured}
