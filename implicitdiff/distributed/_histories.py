"""Histories of errors, which are as long as the searches of a rank took."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

import implicitdiff._torch.trees as pytree
from implicitdiff._torch.trees import Tree
from implicitdiff.distributed._agreement import agree
from implicitdiff.distributed._groups import numbers_of_ranks
from implicitdiff.solvers._loop.state import State


def with_equal_histories(result: Tree, group: ProcessGroup) -> Tree:
    """Return a result with the histories of its states as long as those of the rank whose searches took longest.

    A lane that has finished keeps its error, as in one process.
    """
    lengths = [state.history.shape[-1] for state in pytree.nodes(result, _is_state)]
    if not any(lengths):
        return result
    agree(group, "the lengths of histories")
    longest = iter([max(each) for each in zip(*numbers_of_ranks(lengths, group), strict=True)])
    return pytree.map_nodes(lambda state: _lengthened(state, next(longest)), result, _is_state)


def _is_state(node: object) -> bool:
    return isinstance(node, State)


def _lengthened(state: Any, length: int) -> Any:
    history: Tensor = state.history
    missing = length - history.shape[-1]
    if not missing:
        return state
    last = history[..., -1:].expand(*history.shape[:-1], missing)
    return state._replace(history=torch.cat([history, last], dim=-1))
