"""The instructions of torch's operations: movement of entries, sorting, running sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import implicitdiff._torch.trees as pytree
from implicitdiff._recorded.operations import Operand, flattened
from implicitdiff._recorded.record import Emitter, Recorder
from implicitdiff._recorded.registry import Emitters, registers
from implicitdiff._recorded.tape import Kind, NotRecordableError, View
from implicitdiff._torch.dispatch import AtenOperation, aten

MOVEMENT: Emitters = {}
_MAX_SEGMENTS = 1024
"""Bound on the number of copies for a movement of entries."""


@registers(MOVEMENT, aten.cat.default)
def _cat(recorder: Recorder, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> None:
    target, at = recorder.result(out), 0
    # torch skips an empty vector among tensors of more dimensions.
    for tensor in [t for t in tensors if t.dim() == out.dim()]:
        place = out.narrow(dim, at, tensor.shape[dim])
        view = target._replace(offset=int(place.storage_offset()), shape=tuple(place.shape), strides=place.stride())
        recorder.convert(view, recorder.view(tensor))
        at += tensor.shape[dim]


@registers(MOVEMENT, aten.constant_pad_nd.default)
def _pad(recorder: Recorder, out: Tensor, x: Tensor, pad: Sequence[int], value: float = 0) -> None:
    target, view, place = recorder.result(out), recorder.view(x), out
    recorder.convert(target, recorder.constant(value, out.dtype).broadcast(out.shape))
    # torch lists the pairs from the last dimension to the first.
    for k in range(len(pad) // 2):
        before, after = pad[2 * k : 2 * k + 2]
        dim = x.dim() - 1 - k
        # A negative pad crops, and the place in the result has no border there.
        place = place.narrow(dim, max(before, 0), x.shape[dim] + min(before, 0) + min(after, 0))
        view = _narrowed(view, dim, max(-before, 0), place.shape[dim])
    recorder.convert(target.like(place), view)


def _narrowed(view: View, dim: int, start: int, length: int) -> View:
    shape = (*view.shape[:dim], length, *view.shape[dim + 1 :])
    return view._replace(offset=view.offset + start * view.strides[dim], shape=shape)


_MOVES = (
    aten.flip.default,
    aten.roll.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
    aten.repeat.default,
    aten.take.default,
)


def _record_move(
    operation: AtenOperation, recorder: Recorder, out: Tensor, x: Tensor, *args: Any, **kwargs: Any
) -> None:
    """Emit copies of the entries that an operation moves; indices that are computed have an instruction.

    The operation applied to the positions of the entries in memory gives the origin of each entry of the result.
    """
    others = pytree.tensors((args, kwargs))
    if any([recorder.view(t).buffer.kind is not Kind.CONSTANT for t in others]):
        _COMPUTED[operation](recorder, out, x, *args)
        return
    view = recorder.view(x)
    with recorder.paused():
        # Position k stands for element k of the buffer.
        positions = torch.arange(view.buffer.size).as_strided(view.shape, view.strides, view.offset)
        origins = operation(positions, *args, **kwargs).reshape(-1).tolist()
    # The copies write the entries in the order of the shape; the memory of the result may have another order.
    target = recorder.result(out) if out.is_contiguous() else recorder.temporary(out.shape, out.dtype)
    copies = _segments(origins)
    if len(copies) > _MAX_SEGMENTS:
        raise NotRecordableError(f"the operation {operation} moves {len(origins)} entries one by one")
    for at, start, step, count in copies:
        recorder.convert(
            target._replace(offset=at, shape=(count,), strides=(1,)),
            view._replace(offset=start, shape=(count,), strides=(step,)),
        )
    if not out.is_contiguous():
        recorder.convert(recorder.result(out), target)


def _segments(origins: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """Return evenly spaced stretches of origins: ``(position in the result, first origin, step, number)``."""
    found, i = [], 0
    while i < len(origins):
        # A stretch ends where the step changes.
        step, j = (origins[i + 1] - origins[i] if i + 1 < len(origins) else 0), i + 1
        while j < len(origins) and origins[j] - origins[j - 1] == step:
            j += 1
        found.append((i, origins[i], step, j - i))
        i = j
    return found


# --- computed indices -------------------------------------------------------------------------------------------------


def _pick(recorder: Recorder, out: View, view: View, dim: int, index: View) -> None:
    """Emit ``out = view.gather(dim, index)``; `index` has the shape of `out`."""
    if math.prod(out.shape):
        # Stride 0: neither the result nor the index depends on the candidate entry.
        operands = (_with_last(out, 0), _dimension_last(view, dim), _with_last(index, 0))
        _emit_along(recorder, "GATHER", view.shape[dim], out.shape, *operands)


def _place(recorder: Recorder, name: str, out: View, dim: int, index: View, values: View) -> None:
    """Emit ``out.scatter_(dim, index, values)``, or with ``SCATTER_ADD`` a sum; `values` has the shape of `index`."""
    operands = (_dimension_last(out, dim), _with_last(values, 0), _with_last(index, 0))
    _emit_along(recorder, name, out.shape[dim], index.shape, *operands)


def _emit_along(recorder: Recorder, name: str, n: int, shape: Sequence[int], *operands: View) -> None:
    sizes = (*shape, n)
    # The last dimension of the instruction runs over the n entries among which an index chooses.
    out, *inputs = (v._replace(shape=sizes) for v in operands)
    recorder.tape.emit(name, [out], inputs, sizes)


def _with_last(view: View, stride: int) -> View:
    return view._replace(strides=(*view.strides, stride))


def _dimension_last(view: View, dim: int) -> View:
    """Return the view with the stride of a dimension as that of a new last one."""
    strides = view.strides
    return view._replace(strides=(*strides[:dim], 0, *strides[dim + 1 :], strides[dim]))


def _vector(view: View) -> View:
    """Return a number as a vector; other views as they are."""
    return view if view.shape else view._replace(shape=(1,), strides=(0,))


def _gather(recorder: Recorder, out: Tensor, x: Tensor, dim: int, index: Tensor) -> None:
    target, view, place = map(_vector, (recorder.result(out), recorder.view(x), recorder.view(index)))
    _pick(recorder, target, view, dim % len(view.shape), place)


def _index_select(recorder: Recorder, out: Tensor, x: Tensor, dim: int, index: Tensor) -> None:
    target, view, place = map(_vector, (recorder.result(out), recorder.view(x), recorder.view(index)))
    dim = dim % len(view.shape)
    _pick(recorder, target, view, dim, _at_dim(place, target, dim))


def _at_dim(index: View, like: View, dim: int) -> View:
    """Return a vector of indices, for each entry of the other dimensions."""
    strides = tuple(index.strides[0] if d == dim else 0 for d in range(len(like.shape)))
    return index._replace(shape=like.shape, strides=strides)


def _take(recorder: Recorder, out: Tensor, x: Tensor, index: Tensor) -> None:
    source = flattened(recorder, recorder.view(x), 0)
    target, place = map(_vector, (recorder.result(out), recorder.view(index)))
    place = _from_front(recorder, place, x.numel())
    _pick(recorder, target, source.broadcast((*(1 for _ in target.shape[1:]), x.numel())), len(target.shape) - 1, place)


def _from_front(recorder: Recorder, index: View, n: int) -> View:
    """Return indices of which negative ones counted from the end."""
    tape, zero, count = recorder.tape, recorder.constant(0, torch.int64), recorder.constant(n, torch.int64)
    is_negative, shifted, result = (recorder.temporary(index.shape, t) for t in (torch.bool, torch.int64, torch.int64))
    tape.emit("LT", [is_negative], [index, zero], index.shape)
    tape.emit("ADD", [shifted], [index, count], index.shape)
    tape.emit("WHERE", [result], [is_negative, shifted, index], index.shape)
    return result


class _Selection(NamedTuple):
    """The entries ``x[indices]``.

    Attributes:
        dims: the indexed dimensions.
        rest: the other dimensions.
        at: where the dimensions of the indices are in the result, in front of so many of the others.
        places: the position of each entry in the indexed dimensions as one.
    """

    dims: list[int]
    rest: list[int]
    at: int
    places: View

    def order(self) -> list[int]:
        """Return the dimensions of the result in which those of the others come first and then those of the indices."""
        count = len(self.places.shape)
        total = count + len(self.rest)
        own = range(self.at, self.at + count)
        return [*(d for d in range(total) if d not in own), *own]


def _selection(recorder: Recorder, x: Tensor, indices: Sequence[Tensor | None]) -> _Selection:
    dims = [d for d, i in enumerate(indices) if i is not None]
    given = [i for i in indices if i is not None]
    if any(i.dtype in (torch.bool, torch.uint8) for i in given):
        raise NotRecordableError("a mask that is computed selects entries")
    shape = torch.broadcast_shapes(*(i.shape for i in given))
    rest = [d for d in range(x.dim()) if d not in dims]
    # torch puts the dimensions of separated indices in front of the result.
    is_adjacent = dims == [*range(dims[0], dims[-1] + 1)]
    sizes = [x.shape[d] for d in dims]
    # A generator: each index is emitted right before its combination with the others.
    places = (_from_front(recorder, recorder.view(i).broadcast(shape), n) for i, n in zip(given, sizes, strict=True))
    index = next(places)
    for own, n in zip(places, sizes[1:], strict=True):
        index = _combined(recorder, index, own, n)
    return _Selection(dims, rest, dims[0] if is_adjacent else 0, index)


def _combined(recorder: Recorder, outer: View, inner: View, n: int) -> View:
    # Row-major: entry ``(i, j)`` has the position ``i n + j``.
    rows, result = (recorder.temporary(outer.shape, torch.int64) for _ in range(2))
    recorder.tape.emit("MUL", [rows], [outer, recorder.constant(n, torch.int64)], outer.shape)
    recorder.tape.emit("ADD", [result], [rows, inner], outer.shape)
    return result


def _index(recorder: Recorder, out: Tensor, x: Tensor, indices: Sequence[Tensor | None]) -> None:
    chosen = _selection(recorder, x, indices)
    target = recorder.result(out).moved(chosen.order())
    kept = len(chosen.rest)
    source = flattened(recorder, recorder.view(x).moved([*chosen.rest, *chosen.dims]), kept)
    # The indexed dimension comes first, then the dimensions of the indices, if any.
    shape = (*target.shape[:kept], 1, *target.shape[kept:])
    target, index = (_with_one(v, shape, kept) for v in (target, chosen.places.broadcast(target.shape)))
    ones = len(shape) - kept - 1
    source = source._replace(shape=(*source.shape, *(1,) * ones), strides=(*source.strides, *(0,) * ones))
    _pick(recorder, target, source, kept, index)


def _with_one(view: View, shape: tuple[int, ...], at: int) -> View:
    return view._replace(shape=shape, strides=(*view.strides[:at], 0, *view.strides[at:]))


@registers(MOVEMENT, aten.index_put.default)
def _index_put(
    recorder: Recorder,
    out: Tensor,
    x: Tensor,
    indices: Sequence[Tensor | None],
    values: Tensor,
    accumulate: bool = False,
) -> None:
    chosen = _selection(recorder, x, indices)
    # The indexed dimensions go last and become one, so the instruction scatters along one dimension.
    kept, order = len(chosen.rest), [*chosen.rest, *chosen.dims]
    whole = recorder.copy(recorder.view(x).moved(order))
    own, others = chosen.places.shape, tuple(x.shape[d] for d in chosen.rest)
    shape = (*others[: chosen.at], *own, *others[chosen.at :])
    placed = recorder.as_dtype(values, out.dtype).broadcast(shape).moved(chosen.order())
    ones = len(own)
    goal = flattened(recorder, whole, kept)
    goal = goal._replace(shape=(*goal.shape, *(1,) * ones), strides=(*goal.strides, *(0,) * ones))
    spread = (*placed.shape[:kept], 1, *placed.shape[kept:])
    placed, index = (_with_one(v, spread, kept) for v in (placed, chosen.places.broadcast(placed.shape)))
    _place(recorder, "SCATTER_ADD" if accumulate else "SCATTER", goal, kept, index, placed)
    recorder.convert(recorder.result(out).moved(order), whole)


def _scatter(name: str, recorder: Recorder, out: Tensor, x: Tensor, dim: int, index: Tensor, src: Operand) -> None:
    target, place = map(_vector, (recorder.result(out), recorder.view(index)))
    recorder.convert(target, _vector(recorder.view(x)))
    values = _vector(recorder.as_dtype(src, out.dtype))
    # Of a source that is larger than the index, the beginning is used.
    values = values._replace(shape=place.shape) if isinstance(src, Tensor) else values.broadcast(place.shape)
    _place(recorder, name, target, dim % len(target.shape), place, values)


registers(MOVEMENT, aten.scatter.src, aten.scatter.value)(partial(_scatter, "SCATTER"))
registers(MOVEMENT, aten.scatter_add.default)(partial(_scatter, "SCATTER_ADD"))


def _place_slices(
    name: str, recorder: Recorder, out: Tensor, x: Tensor, dim: int, index: Tensor, source: Tensor, alpha: float = 1
) -> None:
    if alpha != 1:
        raise NotRecordableError("an addition at indices has a factor")
    target, values = map(_vector, (recorder.result(out), recorder.as_dtype(source, out.dtype)))
    recorder.convert(target, _vector(recorder.view(x)))
    dim = dim % len(target.shape)
    _place(recorder, name, target, dim, _at_dim(_vector(recorder.view(index)), values, dim), values)


registers(MOVEMENT, aten.index_copy.default)(partial(_place_slices, "SCATTER"))
registers(MOVEMENT, aten.index_add.default)(partial(_place_slices, "SCATTER_ADD"))

_COMPUTED: dict[AtenOperation, Emitter] = {
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
    aten.gather.default: _gather,
    aten.take.default: _take,
}

for _move in _MOVES:
    registers(MOVEMENT, _move)(partial(_record_move, _move))


# --- orders and running sums ------------------------------------------------------------------------------------------


def _sort_along(recorder: Recorder, values: View, places: View, view: View, dim: int, descending: bool) -> None:
    values, places, view = (_to_end(_vector(v), dim) for v in (values, places, view))
    recorder.tape.emit("SORT_DESCENDING" if descending else "SORT", [values, places], [view], view.shape)


def _to_end(view: View, dim: int) -> View:
    dim = dim % len(view.shape)
    return view.moved([*(d for d in range(len(view.shape)) if d != dim), dim])


@registers(MOVEMENT, aten.sort.default)
def _sort(recorder: Recorder, out: Any, x: Tensor, dim: int = -1, descending: bool = False) -> None:
    values, places = map(recorder.result, out)
    _sort_along(recorder, values, places, recorder.view(x), dim, descending)


@registers(MOVEMENT, aten.sort.stable)
def _stable_sort(
    recorder: Recorder, out: Any, x: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False
) -> None:
    _sort(recorder, out, x, dim, descending)


@registers(MOVEMENT, aten.topk.default)
def _topk(
    recorder: Recorder, out: Any, x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> None:
    # The wanted entries are the front of a full sort.
    whole = recorder.temporary(x.shape, x.dtype), recorder.temporary(x.shape, torch.int64)
    _sort_along(recorder, *whole, recorder.view(x), dim, descending=largest)
    for each, result in zip(whole, map(recorder.result, out), strict=True):
        recorder.convert(result, each._replace(shape=result.shape))


def _running(
    name: str, recorder: Recorder, out: Tensor, x: Tensor, dim: int, *, dtype: torch.dtype | None = None
) -> None:
    target, view = (_to_end(_vector(v), dim) for v in (recorder.result(out), recorder.as_dtype(x, out.dtype)))
    recorder.tape.emit(name, [target], [view], view.shape)


registers(MOVEMENT, aten.cumsum.default)(partial(_running, "CUMSUM"))
registers(MOVEMENT, aten.cumprod.default)(partial(_running, "CUMPROD"))
