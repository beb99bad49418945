"""Memory that a caller gives away with ``inplace=True``: what may be overwritten, and overwriting it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

import implicitdiff._torch.levels as functorch
from implicitdiff._torch.trees import Leaves
from implicitdiff.optim._step import Buffers, Operands, Step


def refuse_tracked(caller: str, name: str, tensors: Leaves) -> None:
    """Raise if a derivative of what is computed from these tensors is recorded: overwriting would lose it."""
    if functorch.have_gradient_layer(tensors) or (torch.is_grad_enabled() and any([t.requires_grad for t in tensors])):
        raise ValueError(
            f"{caller}: inplace=True, but {name} are being differentiated, so their old values are needed; "
            "use inplace=False, detach them, or run the step under torch.no_grad()"
        )


def is_leaf(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a leaf that no transform differentiates: an optimizer reads it out of its graph."""
    return tensor.is_leaf and not functorch.have_gradient_layer([tensor])


def refuse_needed(caller: str, name: str, tensors: Leaves) -> None:
    """Raise if these tensors, which are to be overwritten, belong to a graph or a transform. Leaves of a graph do not:
    an optimizer's step is meant to change them."""
    if functorch.have_gradient_layer(tensors) or not all([t.is_leaf for t in tensors]):
        raise ValueError(
            f"{caller}: inplace=True would overwrite {name} that a graph or a transform needs; use inplace=False, or "
            "detach them"
        )


def refuse_unheld(caller: str, params: Operands, values: Leaves) -> None:
    """Raise if there are several values of a parameter, one for each lane of a vmap that does not batch it."""
    if not hold(params, values):
        raise ValueError(
            f"{caller}: inplace=True would write a value for each lane of a vmap into parameters that all lanes share; "
            "use inplace=False, or batch the parameters too"
        )


def own(caller: str, step: Step, buffers: Buffers) -> list[list[torch.Tensor | None]]:
    """The buffers that a step may be written into: None in the place of those that share memory, with another one, with
    what only is read, or with themselves.

    Raises:
        ValueError: parameters are to be overwritten, and cannot be.
    """
    given = [t for column in buffers for t in column if t is not None]
    taken = set(map(id, given))
    read = [t for t in (*step.grads, *step.decayed) if t is not None and id(t) not in taken]
    unfit = {id([*given, *read][i]) for i in shared([*given, *read])}
    kept = [[None if t is None or id(t) in unfit else t for t in column] for column in buffers]
    if any(base is not None for base in step.bases):
        refuse_shared(caller, kept[0])
        refuse_unheld(caller, kept[0], step.grads)
    return kept


def apart(caller: str, params: Leaves, tensors: Leaves) -> Leaves:
    """The tensors with copies of those that share memory with parameters, which are to be overwritten.

    Raises:
        ValueError: the parameters cannot be.
    """
    refuse_needed(caller, "params", params)
    meeting = shared([*params, *tensors])
    if not meeting:
        return tensors
    unfit = shared(params)
    refuse_shared(caller, [None if i in unfit else p for i, p in enumerate(params)])
    return [t.clone() if len(params) + i in meeting else t for i, t in enumerate(tensors)]


def refuse_shared(caller: str, params: Operands) -> None:
    """Raise if a parameter that is to be overwritten has no memory of its own, for which there is None."""
    if any(p is None for p in params):
        raise ValueError(
            f"{caller}: inplace=True, but a tensor in params shares memory with another one, or with itself, and would "
            "be changed twice; pass each tensor once, or use inplace=False"
        )


def shared(tensors: Leaves) -> set[int]:
    """The positions of plain tensors whose memory overlaps another's or, where it is not plain to see, their own."""
    simple = functorch.are_plain(tensors) and all([t.is_contiguous() for t in tensors])
    if simple and not overlap([t.data_ptr() for t in tensors], [t.nbytes for t in tensors]):
        return set()
    plain = [i for i, t in enumerate(tensors) if functorch.is_plain(t) and t.numel()]
    loose = {i for i in plain if not tensors[i].is_contiguous() and not _is_dense(tensors[i])}
    spans = [(tensors[i].data_ptr(), tensors[i].data_ptr() + _extent(tensors[i]), i) for i in plain]
    if not overlap([a for a, _, _ in spans], [b - a for a, b, _ in spans]):
        return loose
    return loose | {i for a, b, i in spans if any(i != j and c < b and a < d for c, d, j in spans)}


def overlap(addresses: list[int], lengths: list[int]) -> bool:
    """Whether two stretches of memory, in bytes, have an address in common; there is nothing at address 0."""
    stretches = sorted((a, a + n) for a, n in zip(addresses, lengths, strict=True) if a and n)
    # Where any two meet, the first of them meets the one that follows it.
    return any(start < end for (_, end), (start, _) in itertools.pairwise(stretches))


def _extent(tensor: torch.Tensor) -> int:
    """How many bytes lie from the first element to the last."""
    if tensor.is_contiguous():
        return tensor.numel() * tensor.itemsize
    return (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))) * tensor.itemsize


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether no two elements share an address, for sure."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < reach:
            return False
        reach += stride * (size - 1)
    return True


def fill(buffers: Sequence[Sequence[torch.Tensor | None]], values: list[Leaves]) -> list[Leaves]:
    """Write values into the buffers that can hold them, and return what holds each value afterwards."""
    # All is decided before the first one is written.
    held = [
        [v if b is None else b for b, v in zip(*columns, strict=True)]
        if hold(*columns)
        else [v if b is None or not holds(b, v) else b for b, v in zip(*columns, strict=True)]
        for columns in zip(buffers, values, strict=True)
    ]
    with torch.no_grad():
        for holders, column in zip(held, values, strict=True):
            for holder, value in zip(holders, column, strict=True):
                if holder is not value:
                    holder.copy_(value)
    return held


def hold(buffers: Operands, values: Leaves) -> bool:
    """Whether all buffers that are there hold their values."""
    if functorch.are_plain([*(b for b in buffers if b is not None), *values]):
        return True
    return all(b is None or holds(b, v) for b, v in zip(buffers, values, strict=True))


def holds(buffer: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a buffer has memory of its own for a value under the running vmaps."""
    if not functorch.is_plain(buffer) and not _is_dense(functorch.base(buffer)):
        return False
    return functorch.is_plain(value) or functorch.batch_levels(value) <= functorch.batch_levels(buffer)
