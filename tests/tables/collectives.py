"""Functions of a vector that ranks compute together, beside the same functions in one process: `FUNCTIONS`.

Each takes three numbers to three. The data are six rows for each rank, or lanes in a number that no count of ranks
divides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as c10d
from checks.tensors import draw, vector
from checks.transforms import TRANSFORMS
from torch import Tensor
from torch.func import vmap

import implicitdiff.distributed as dist

Function = Callable[[Tensor], Tensor]
THETA = vector(0.7, -0.4, 1.1)
ROWS = 3
ALL = draw(1, 4 * ROWS, 3)
LANES = draw(2, 7, 3)
MIX = draw(9, 3, 4 * ROWS)
COMPLEX = draw(8, 3, dtype=torch.complex128)


class Pair(NamedTuple):
    """A function of the ranks, and the same function in one process.

    Attributes:
        of_ranks: ``of_ranks(mine, theta)``, with the rows of this rank.
        alone: ``alone(rows, theta)``, with the rows of all.
    """

    of_ranks: Callable[[Tensor, Tensor], Tensor]
    alone: Callable[[Tensor, Tensor], Tensor]


def rows_of(size: int) -> Tensor:
    return ALL[: size * ROWS]


def own_rows() -> Tensor:
    return rows_of(c10d.get_world_size())[ROWS * c10d.get_rank() :][:ROWS]


def in_one_process(name: str, size: int) -> Function:
    return lambda theta: FUNCTIONS[name].alone(rows_of(size), theta)


def by_ranks(name: str) -> Function:
    return lambda theta: FUNCTIONS[name].of_ranks(own_rows(), theta)


def transformed(name: str, transform: str) -> Tensor:
    """On a rank: the transform of the function of the ranks."""
    return TRANSFORMS[transform](by_ranks(name), THETA)


# --- the functions ----------------------------------------------------------------------------------------------------


def local(w: Tensor, rows: Tensor) -> Tensor:
    """A sum over rows."""
    return (torch.tanh(rows * w) ** 3).sum(0) + torch.sin(2 * rows @ w).sum() * vector(0.3, -0.2, 0.5)


def outside(total: Tensor, w: Tensor) -> Tensor:
    """A function of the sum and of ``w`` itself, which takes no part in the communication."""
    return torch.exp(-total / 10) + w.roll(1) * total * w**2


def waves(w: Tensor, rows: Tensor) -> Tensor:
    """One number a row."""
    return torch.sin(rows @ w + 0.3)


def mixed(numbers: Tensor) -> Tensor:
    return MIX[:, : len(numbers)] @ numbers**2


def grown(w: Tensor, size: int) -> Tensor:
    """Two rows for each rank, which depend on ``w``."""
    return torch.outer(torch.arange(1, 2 * size + 1, dtype=w.dtype) / 3, w)


def of_part(rows: Tensor, w: Tensor) -> Tensor:
    return (torch.sin(rows) ** 2 * w.exp()).sum(0)


def several(w: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """A tree of tensors of other shapes and dtypes, one of them without dimensions, one not contiguous."""
    return {
        "vector": torch.cos(rows * w).sum(0),
        "number": (rows @ w).pow(3).sum(),
        "complex": torch.exp(1j * (rows @ w)).sum() * COMPLEX,
        "matrix": torch.outer(w, rows.sum(0)).T,
    }


def of_several(tree: dict[str, Tensor]) -> Tensor:
    z = tree["complex"]
    return tree["vector"] * tree["number"] + (z * z.conj().roll(1)).imag + torch.sin(tree["matrix"]).sum(0)


def of_conjugates(z: Tensor) -> Tensor:
    """A sum, and factors that tell a number from its conjugate."""
    return z.conj() * (1 + 2j) + z**2


def lane(w: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(x * w) * (x @ w)


def of_lane_and_theta(batch: Tensor, w: Tensor) -> Tensor:
    return (torch.sin(batch) * torch.arange(1.0, len(batch) + 1, dtype=w.dtype)[:, None]).sum(0) * w


FUNCTIONS = {
    "psum": Pair(
        lambda mine, w: outside(dist.psum(local(dist.pvary(w), mine)), w),
        lambda rows, w: outside(local(w, rows), w),
    ),
    "pmean": Pair(
        lambda mine, w: outside(dist.pmean(local(dist.pvary(w), mine)), w),
        lambda rows, w: outside(local(w, rows) * ROWS / len(rows), w),
    ),
    "psum of a psum": Pair(
        lambda mine, w: dist.psum(local(dist.pvary(outside(dist.psum(local(dist.pvary(w), mine)), w)), mine)),
        lambda rows, w: local(outside(local(w, rows), w), rows),
    ),
    "psum of a tree": Pair(
        lambda mine, w: of_several(dist.psum(several(dist.pvary(w), mine))),
        lambda rows, w: of_several(several(w, rows)),
    ),
    "pvary of a tree": Pair(
        lambda mine, w: (
            lambda t: dist.psum(local(t["a"], mine) * t["b"][0].abs() + (t["b"][1].conj() * 1j).real * mine.sum(0))
        )(dist.pvary({"a": w, "b": (COMPLEX * w, (w * COMPLEX).conj())})),
        lambda rows, w: local(w, rows) * (COMPLEX * w).abs() + ((w * COMPLEX) * 1j).real * rows.sum(0),
    ),
    "psum of conjugates": Pair(
        lambda mine, w: dist.psum(of_conjugates(torch.exp(1j * mine * dist.pvary(w)).sum(0)).conj() * 1j).real,
        lambda rows, w: sum(
            (of_conjugates(torch.exp(1j * part * w).sum(0)).conj() * 1j).real for part in rows.split(ROWS)
        ),
    ),
    "all_gather": Pair(
        lambda mine, w: mixed(dist.all_gather(waves(dist.pvary(w), mine))),
        lambda rows, w: mixed(waves(w, rows)),
    ),
    "all_gather, last dimension": Pair(
        lambda mine, w: mixed(dist.all_gather((torch.sin(dist.pvary(w)[:, None] * mine.T),), dim=-1)[0].T),
        lambda rows, w: mixed(torch.sin(w[:, None] * rows.T).T),
    ),
    "all_gather, trees": Pair(
        lambda mine, w: (lambda t: mixed(t["a"] * t["b"].sum(1)) + t["c"].abs().sum(0))(
            dist.all_gather(
                {
                    "a": waves(dist.pvary(w), mine),
                    "b": torch.cos(mine * dist.pvary(w)),
                    "c": COMPLEX * (mine @ dist.pvary(w))[:, None] + 1,
                }
            )
        ),
        lambda rows, w: (
            mixed(waves(w, rows) * torch.cos(rows * w).sum(1)) + (COMPLEX * (rows @ w)[:, None] + 1).abs().sum(0)
        ),
    ),
    "shard": Pair(
        lambda mine, w: dist.psum(of_part(dist.shard(grown(w, c10d.get_world_size())), dist.pvary(w))),
        lambda rows, w: of_part(grown(w, len(rows) // ROWS), w),
    ),
    "shard, last dimension": Pair(
        lambda mine, w: dist.psum(of_part(dist.shard([grown(w, c10d.get_world_size()).T], dim=-1)[0].T, dist.pvary(w))),
        lambda rows, w: of_part(grown(w, len(rows) // ROWS), w),
    ),
    "all_gather of shard": Pair(
        lambda mine, w: mixed(dist.all_gather(torch.sin(dist.shard(grown(w, c10d.get_world_size())))).sum(1)),
        lambda rows, w: mixed(torch.sin(grown(w, len(rows) // ROWS)).sum(1)),
    ),
    "psum_of": Pair(
        lambda mine, w: outside(dist.psum_of(local)(w, mine), w),
        lambda rows, w: outside(local(w, rows), w),
    ),
    "psum_of, captured": Pair(
        lambda mine, w: outside(dist.psum_of(lambda: local(w, mine))(), w),
        lambda rows, w: outside(local(w, rows), w),
    ),
    "psum_of, both": Pair(
        lambda mine, w: dist.psum_of(lambda v, scale: (local(v, mine) * w, scale * w.sin()))(w.exp(), {"a": 2.0}["a"])[
            0
        ],
        lambda rows, w: local(w.exp(), rows) * w,
    ),
    "pmean_of": Pair(
        lambda mine, w: outside(dist.pmean_of(local)(w, mine), w),
        lambda rows, w: outside(local(w, rows) * ROWS / len(rows), w),
    ),
    "vmap, captured": Pair(
        lambda mine, w: of_lane_and_theta(dist.vmap(lambda x: lane(w, x))(LANES), w),
        lambda rows, w: of_lane_and_theta(vmap(lambda x: lane(w, x))(LANES), w),
    ),
    "vmap, shared": Pair(
        lambda mine, w: of_lane_and_theta(dist.vmap(lane, (None, 0))(w, LANES), w),
        lambda rows, w: of_lane_and_theta(vmap(lane, (None, 0))(w, LANES), w),
    ),
    "vmap, mapped": Pair(
        lambda mine, w: of_lane_and_theta(dist.vmap(lane, (1, 0))(grown(w, 4)[:7].T, LANES), w),
        lambda rows, w: of_lane_and_theta(vmap(lane, (1, 0))(grown(w, 4)[:7].T, LANES), w),
    ),
    "vmap, one lane": Pair(
        lambda mine, w: dist.vmap(lane)(w[None], LANES[:1])[0],
        lambda rows, w: lane(w, LANES[0]),
    ),
}
