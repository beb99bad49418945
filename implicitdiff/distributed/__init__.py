"""Collectives that torch.func differentiates, and searches over many ranks, on ``torch.distributed``.

Every tensor is *replicated*, the same on all ranks, or *varying*: each rank has its own. A function of replicated
values with replicated results means the same on every rank as in one process, and so do its derivatives.
"""

from implicitdiff.distributed._agreement import together
from implicitdiff.distributed._collectives import all_gather, pmean, psum, pvary, shard
from implicitdiff.distributed._groups import Axis
from implicitdiff.distributed._maps import pmean_of, psum_of, vmap
from implicitdiff.errors import RankError

__all__ = [
    "Axis",
    "RankError",
    "all_gather",
    "pmean",
    "pmean_of",
    "psum",
    "psum_of",
    "pvary",
    "shard",
    "together",
    "vmap",
]


def __dir__() -> list[str]:
    return __all__
