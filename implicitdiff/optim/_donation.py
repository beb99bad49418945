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
from implicitdiff.optim._step import Buffers, Operands, Step, flat


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
    if not all(p is None or can_hold(p, v) for p, v in zip(params, values, strict=True)):
        raise ValueError(
            f"{caller}: inplace=True would write a value for each lane of a vmap into parameters that all lanes share; "
            "use inplace=False, or batch the parameters too"
        )


def unshared_buffers(caller: str, step: Step) -> Buffers:
    """Return the target and the moments of a step as buffers for its results, with None in place of unfit ones.

    Excluded are buffers that share memory with another buffer, with an operand of the step, or between two elements.

    Raises:
        ValueError: a parameter would have to be excluded.
    """
    # An operand is its own buffer by design. Any other operand that overlaps a buffer would be read after some of its
    # elements were overwritten.
    buffers = [step.target, *step.moments]
    given = [t for column in buffers for t in column if t is not None]
    taken = set(map(id, given))
    read = [t for t in (*step.grads, *step.decayed) if t is not None and id(t) not in taken]
    unfit = {id([*given, *read][i]) for i in shared([*given, *read])}
    kept = [[None if id(t) in unfit else t for t in column] for column in buffers]
    if step.is_fused:
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
    return [t.clone() if i in meeting else t for i, t in enumerate(tensors, len(params))]


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
    # Not provably dense: several elements may have one address.
    loose = {i for i in plain if not _is_dense(tensors[i])}
    addresses = {i: tensors[i].data_ptr() for i in plain}
    # Address 0: no storage.
    spans = sorted((start, start + _extent(tensors[i]), i) for i, start in addresses.items() if start)
    # In order of their starts, a range meets a later one if it meets the next, and an earlier one if it begins before
    # the largest end so far.
    ends = itertools.accumulate((end for _, end, _ in spans), max, initial=0)
    meet_later = {i for (_, end, i), (start, _, _) in itertools.pairwise(spans) if start < end}
    meet_earlier = {i for (start, _, i), end in zip(spans, ends, strict=False) if start < end}
    return loose | meet_later | meet_earlier


def overlap(addresses: list[int], lengths: list[int]) -> bool:
    """True if two byte ranges intersect. Ranges at address 0 (no storage) and empty ranges are ignored."""
    stretches = sorted((a, a + n) for a, n in zip(addresses, lengths, strict=True) if a and n)
    # In sorted order, if any two ranges intersect then two neighbours do.
    return any(start < end for (_, end), (start, _) in itertools.pairwise(stretches))


def _extent(tensor: torch.Tensor) -> int:
    """Number of bytes from the first element to the end of the last."""
    # Strides of torch are never negative, so the last element lies furthest.
    return (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))) * tensor.itemsize


def _is_dense(tensor: torch.Tensor) -> bool:
    """True if no two elements share an address, by a sufficient test.

    In order of rising stride, each stride has to exceed the largest offset that the smaller strides reach. The test
    rejects some tensors without overlap, such as interleaved views.
    """
    steps = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    reaches = itertools.accumulate((stride * (size - 1) for stride, size in steps), initial=1)
    return all(stride >= reach for (stride, _), reach in zip(steps, reaches, strict=False))


def fill(buffers: Sequence[Sequence[torch.Tensor | None]], values: list[Leaves]) -> list[Leaves]:
    """Write values into suitable buffers. Return for each value the buffer, or the value without a suitable buffer."""
    # A value may be a view of another buffer, so all decisions precede the first write.
    # A buffer that is None, or cannot hold its value, is replaced by the value: new memory is returned.
    held = [
        [b if b is not None and can_hold(b, v) else v for b, v in zip(*columns, strict=True)]
        for columns in zip(buffers, values, strict=True)
    ]
    pairs = [(holder, v) for holder, v in zip(flat(held), flat(values), strict=True) if holder is not v]
    if pairs:
        # Buffers may be leaves of a graph, such as parameters.
        with torch.no_grad():
            for holder, value in pairs:
                holder.copy_(value)
    return held


def can_hold(buffer: torch.Tensor, value: torch.Tensor) -> bool:
    """True if a buffer has an address for each element of a value in each lane.

    A base with overlapping elements, such as an expanded tensor, has too few addresses. So has a buffer that is batched
    at fewer levels than the value. Plain buffers with overlapping elements are left out before, see `shared`.
    """
    has_addresses = _levels.is_plain(buffer) or _is_dense(_levels.base(buffer))
    has_lanes = _levels.is_plain(value) or _levels.batch_levels(value) <= _levels.batch_levels(buffer)
    return has_addresses and has_lanes
