"""Donated memory: checks before a step with ``inplace=True`` overwrites it, and the writes.

Three conditions make an overwrite wrong: a derivative needs the old value, two tensors share memory, or a vmap computes
several values for one unbatched buffer. Parameters then raise. Gradients and moments fall back to new memory where only
the memory is in the way.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

import implicitdiff._torch.levels as _levels
import implicitdiff._torch.tracking as _tracking
from implicitdiff._torch.trees import Leaves
from implicitdiff.optim._step import Buffers, Operands, Step


def refuse_tracked(caller: str, name: str, tensors: Leaves) -> None:
    """Raise if autograd or a transform differentiates these tensors: an overwrite would lose the derivative."""
    if _tracking.have_gradient_layer(tensors) or (torch.is_grad_enabled() and any([t.requires_grad for t in tensors])):
        raise ValueError(
            f"{caller}: inplace=True would overwrite values that a derivative needs, because {name} are being "
            "differentiated; use inplace=False, detach them, or run the step under torch.no_grad()"
        )


def is_leaf(tensor: torch.Tensor) -> bool:
    """True for a leaf of the graph outside of all transforms. A step reads the value without history."""
    return tensor.is_leaf and not _tracking.have_gradient_layer([tensor])


def refuse_needed(caller: str, name: str, tensors: Leaves) -> None:
    """Raise if tensors to be overwritten have autograd history, or if a transform differentiates them.

    Leaves of a graph are allowed: an optimizer's step is meant to change them.
    """
    if _tracking.have_gradient_layer(tensors) or not all([t.is_leaf for t in tensors]):
        raise ValueError(
            f"{caller}: inplace=True would overwrite {name} that a graph or a transform needs; use inplace=False, or "
            "detach them"
        )


def refuse_unheld(caller: str, params: Operands, values: Leaves) -> None:
    """Raise if a vmap computes a value for each lane of a parameter that is not batched."""
    if not can_hold_all(params, values):
        raise ValueError(
            f"{caller}: inplace=True would write a value for each lane of a vmap into parameters that all lanes share; "
            "use inplace=False, or batch the parameters too"
        )


def unshared_buffers(caller: str, step: Step, buffers: Buffers) -> list[list[torch.Tensor | None]]:
    """Return the buffers without overlap, which a step may overwrite, and None in place of others.

    Excluded are buffers that share memory with another buffer, with an operand of the step, or between two elements.

    Raises:
        ValueError: a parameter would have to be excluded.
    """
    # An operand is its own buffer by design. Any other operand that overlaps a buffer would be read after some of its
    # elements were overwritten.
    given = [t for column in buffers for t in column if t is not None]
    taken = set(map(id, given))
    read = [t for t in (*step.grads, *step.decayed) if t is not None and id(t) not in taken]
    unfit = {id([*given, *read][i]) for i in shared([*given, *read])}
    kept = [[None if t is None or id(t) in unfit else t for t in column] for column in buffers]
    if any(base is not None for base in step.bases):
        refuse_shared(caller, kept[0])
        refuse_unheld(caller, kept[0], step.grads)
    return kept


def copied_if_shared(caller: str, params: Leaves, tensors: Leaves) -> Leaves:
    """Return `tensors`, with copies of tensors that share memory with `params`, before a step overwrites the latter.

    Raises:
        ValueError: the parameters cannot be overwritten.
    """
    refuse_needed(caller, "params", params)
    meeting = shared([*params, *tensors])
    if not meeting:
        return tensors
    # Overlap of parameters with each other cannot be resolved by a copy.
    unfit = shared(params)
    refuse_shared(caller, [None if i in unfit else p for i, p in enumerate(params)])
    return [t.clone() if len(params) + i in meeting else t for i, t in enumerate(tensors)]


def refuse_shared(caller: str, params: Operands) -> None:
    """Raise if a parameter is None, the mark of shared memory."""
    if any(p is None for p in params):
        raise ValueError(
            f"{caller}: inplace=True would change memory twice, because a tensor in params shares memory with another "
            "one, or with itself; pass each tensor once, or use inplace=False"
        )


def shared(tensors: Leaves) -> set[int]:
    """Return the positions of plain tensors that overlap another tensor in memory, or possibly themselves.

    Tensors of a transform are left out: their addresses cannot be read.
    """
    # Fast path: contiguous plain tensors with disjoint byte ranges share nothing.
    simple = _levels.are_plain(tensors) and all([t.is_contiguous() for t in tensors])
    if simple and not overlap([t.data_ptr() for t in tensors], [t.nbytes for t in tensors]):
        return set()
    plain = [i for i, t in enumerate(tensors) if _levels.is_plain(t) and t.numel()]
    # Not contiguous and not provably dense: several elements may have one address.
    loose = {i for i in plain if not tensors[i].is_contiguous() and not _is_dense(tensors[i])}
    spans = [(tensors[i].data_ptr(), tensors[i].data_ptr() + _extent(tensors[i]), i) for i in plain]
    if not overlap([a for a, _, _ in spans], [b - a for a, b, _ in spans]):
        return loose
    # Quadratic, but reached only after the sorted test has found an overlap.
    return loose | {i for a, b, i in spans if any(i != j and c < b and a < d for c, d, j in spans)}


def overlap(addresses: list[int], lengths: list[int]) -> bool:
    """True if two byte ranges intersect. Ranges at address 0 (no storage) and empty ranges are ignored."""
    stretches = sorted((a, a + n) for a, n in zip(addresses, lengths, strict=True) if a and n)
    # In sorted order, if any two ranges intersect then two neighbours do.
    return any(start < end for (_, end), (start, _) in itertools.pairwise(stretches))


def _extent(tensor: torch.Tensor) -> int:
    """Number of bytes from the first element to the end of the last."""
    if tensor.is_contiguous():
        return tensor.numel() * tensor.itemsize
    # Strides of torch are never negative, so the last element lies furthest.
    return (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))) * tensor.itemsize


def _is_dense(tensor: torch.Tensor) -> bool:
    """True if no two elements share an address, by a sufficient test.

    In order of rising stride, each stride has to exceed the largest offset that the smaller strides reach. The test
    rejects some tensors without overlap, such as interleaved views.
    """
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < reach:
            return False
        reach += stride * (size - 1)
    return True


def fill(buffers: Sequence[Sequence[torch.Tensor | None]], values: list[Leaves]) -> list[Leaves]:
    """Write values into suitable buffers. Return for each value the buffer, or the value without a suitable buffer."""
    # A value may be a view of another buffer, so all decisions precede the first write.
    # A buffer that is None, or cannot hold its value, is replaced by the value: new memory is returned.
    held = [
        [v if b is None else b for b, v in zip(*columns, strict=True)]
        if can_hold_all(*columns)
        else [v if b is None or not can_hold(b, v) else b for b, v in zip(*columns, strict=True)]
        for columns in zip(buffers, values, strict=True)
    ]
    # Buffers may be leaves of a graph, such as parameters.
    with torch.no_grad():
        for holders, column in zip(held, values, strict=True):
            for holder, value in zip(holders, column, strict=True):
                if holder is not value:
                    holder.copy_(value)
    return held


def can_hold_all(buffers: Operands, values: Leaves) -> bool:
    """True if every buffer is None or can hold its value."""
    if _levels.are_plain([*(b for b in buffers if b is not None), *values]):
        return True
    return all(b is None or can_hold(b, v) for b, v in zip(buffers, values, strict=True))


def can_hold(buffer: torch.Tensor, value: torch.Tensor) -> bool:
    """True if a buffer has an address for each element of a value in each lane.

    A base with overlapping elements, such as an expanded tensor, has too few addresses. So has a buffer that is batched
    at fewer levels than the value.
    """
    if not _levels.is_plain(buffer) and not _is_dense(_levels.base(buffer)):
        return False
    return _levels.is_plain(value) or _levels.batch_levels(value) <= _levels.batch_levels(buffer)
