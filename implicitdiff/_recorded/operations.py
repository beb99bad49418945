"""The instructions of torch's operations: arithmetic, reductions, products of matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from implicitdiff._recorded.record import INTEGERS, Emitter, Recorder
from implicitdiff._recorded.registry import Emitters, overloads, registers
from implicitdiff._recorded.tape import NotRecordableError, View
from implicitdiff._torch.dispatch import aten

Operand = Tensor | float

ARITHMETIC: Emitters = {}


# --- entry by entry ---------------------------------------------------------------------------------------------------


def _unary(name: str, recorder: Recorder, out: Tensor, x: Operand) -> None:
    recorder.tape.emit(name, [recorder.result(out)], [recorder.as_dtype(x, out.dtype)], out.shape)


def _predicate(name: str, recorder: Recorder, out: Tensor, x: Tensor) -> None:
    recorder.tape.emit(name, [recorder.result(out)], [recorder.view(x)], out.shape)


def _binary(name: str, recorder: Recorder, out: Tensor, a: Operand, b: Operand, **kwargs: Any) -> None:
    # The machine holds all numbers as doubles, so integers are exact up to 2^53 only.
    if out.dtype in INTEGERS:
        _refuse_inexact(name, b)
    recorder.tape.emit(name, [recorder.result(out)], [recorder.as_dtype(v, out.dtype) for v in (a, b)], out.shape)


def _refuse_inexact(name: str, b: Operand) -> None:
    """Raise for operations on integers that doubles do not represent: products wrap around, a division by 0 raises."""
    by_tensor = name in ("REMAINDER", "FMOD", "FLOOR_DIVIDE") and (isinstance(b, Tensor) or b == 0)
    if by_tensor or name in ("MUL", "POW"):
        raise NotRecordableError(f"integers are combined by {name.lower()}, which may overflow or divide by zero")


def _comparison(name: str, recorder: Recorder, out: Tensor, a: Operand, b: Operand) -> None:
    # In the promoted dtype: 0.1 in float32 is another number than 0.1 in float64.
    dtype = torch.result_type(a, b)
    recorder.tape.emit(name, [recorder.result(out)], [recorder.as_dtype(v, dtype) for v in (a, b)], out.shape)


def _logical(name: str, recorder: Recorder, out: Tensor, *operands: Operand) -> None:
    if out.dtype != torch.bool:
        raise NotRecordableError("integers are combined bit by bit")
    recorder.tape.emit(name, [recorder.result(out)], [recorder.as_dtype(v, torch.bool) for v in operands], out.shape)


_UNARY = (
    "neg abs sqrt rsqrt reciprocal exp expm1 log log1p log2 log10 sin cos tan asin acos atan sinh cosh tanh asinh "
    "acosh atanh sigmoid erf erfc lgamma sign floor ceil trunc"
)
_BINARY = {
    "mul": "MUL",
    "atan2": "ATAN2",
    "hypot": "HYPOT",
    "maximum": "MAXIMUM",
    "minimum": "MINIMUM",
    "fmax": "FMAX",
    "fmin": "FMIN",
    "remainder": "REMAINDER",
    "fmod": "FMOD",
    "copysign": "COPYSIGN",
    "floor_divide": "FLOOR_DIVIDE",
}
_LOGICAL = {"logical_and": "AND", "logical_or": "OR", "logical_xor": "XOR", "logical_not": "NOT"}
_LOGICAL |= {"bitwise_and": "AND", "bitwise_or": "OR", "bitwise_xor": "XOR", "bitwise_not": "NOT"}

for _name in _UNARY.split():
    registers(ARITHMETIC, *overloads(_name))(partial(_unary, _name.upper()))
for _name in ("isnan", "isinf", "isfinite"):
    registers(ARITHMETIC, *overloads(_name))(partial(_predicate, _name.upper()))
for _name, _operation in _BINARY.items():
    registers(ARITHMETIC, *overloads(_name))(partial(_binary, _operation))
for _name in ["eq", "ne", "lt", "le", "gt", "ge"]:
    registers(ARITHMETIC, *overloads(_name))(partial(_comparison, _name.upper()))
for _name, _operation in _LOGICAL.items():
    registers(ARITHMETIC, *overloads(_name))(partial(_logical, _operation))
registers(ARITHMETIC, aten.round.default)(partial(_unary, "ROUND"))


def _is_infinite(number: float, recorder: Recorder, out: Tensor, x: Tensor) -> None:
    _comparison("EQ", recorder, out, x, number)


registers(ARITHMETIC, aten.isposinf.default)(partial(_is_infinite, torch.inf))
registers(ARITHMETIC, aten.isneginf.default)(partial(_is_infinite, -torch.inf))


@registers(ARITHMETIC, aten.nan_to_num.default)
def _nan_to_num(
    recorder: Recorder,
    out: Tensor,
    x: Tensor,
    nan: float | None = None,
    posinf: float | None = None,
    neginf: float | None = None,
) -> None:
    if not out.dtype.is_floating_point:
        return recorder.convert(recorder.result(out), recorder.view(x))
    value, limits = recorder.view(x), torch.finfo(out.dtype)
    number, flag = recorder.temporary(out.shape, out.dtype), recorder.temporary(out.shape, torch.bool)
    recorder.tape.emit("ISNAN", [flag], [value], out.shape)
    recorder.tape.emit("WHERE", [number], [flag, recorder.constant(nan or 0.0, out.dtype), value], out.shape)
    # Both tests ask the original value: an infinity in the place of nan must stay.
    for end, limit, target in (
        (torch.inf, limits.max if posinf is None else posinf, recorder.temporary(out.shape, out.dtype)),
        (-torch.inf, limits.min if neginf is None else neginf, recorder.result(out)),
    ):
        flag = recorder.temporary(out.shape, torch.bool)
        recorder.tape.emit("EQ", [flag], [value, recorder.constant(end, out.dtype)], out.shape)
        recorder.tape.emit("WHERE", [target], [flag, recorder.constant(limit, out.dtype), number], out.shape)
        number = target
    return None


def _multiple(recorder: Recorder, view: View, factor: float, dtype: torch.dtype) -> View:
    """Return a multiple of a view; the view itself for the factor 1."""
    if factor == 1:
        return view
    scaled = recorder.temporary(view.shape, dtype)
    recorder.tape.emit("MUL", [scaled], [view, recorder.constant(factor, dtype)], view.shape)
    return scaled


def _sum_of(name: str, recorder: Recorder, out: Tensor, a: Operand, b: Operand, alpha: float = 1) -> None:
    first, second = recorder.as_dtype(a, out.dtype), recorder.as_dtype(b, out.dtype)
    second = _multiple(recorder, second, alpha, out.dtype)
    recorder.tape.emit(name, [recorder.result(out)], [first, second], out.shape)


def _add(recorder: Recorder, out: Tensor, a: Operand, b: Operand, alpha: float = 1) -> None:
    _sum_of("OR" if out.dtype == torch.bool else "ADD", recorder, out, a, b, alpha)


registers(ARITHMETIC, *overloads("add"))(_add)
registers(ARITHMETIC, *overloads("sub"))(partial(_sum_of, "SUB"))


@registers(ARITHMETIC, *overloads("rsub"))
def _rsub(recorder: Recorder, out: Tensor, a: Operand, b: Operand, alpha: float = 1) -> None:
    _sum_of("SUB", recorder, out, b, a, alpha)


@registers(ARITHMETIC, *overloads("div"))
def _div(recorder: Recorder, out: Tensor, a: Operand, b: Operand, rounding_mode: str | None = None) -> None:
    if rounding_mode != "trunc":
        return _binary("DIV" if rounding_mode is None else "FLOOR_DIVIDE", recorder, out, a, b)
    if out.dtype in INTEGERS:
        raise NotRecordableError("integers are divided, perhaps by zero")
    quotient = recorder.temporary(out.shape, out.dtype)
    recorder.tape.emit("DIV", [quotient], [recorder.as_dtype(v, out.dtype) for v in (a, b)], out.shape)
    return recorder.tape.emit("TRUNC", [recorder.result(out)], [quotient], out.shape)


def _cube(recorder: Recorder, out: Tensor, x: Operand) -> None:
    square, view = recorder.temporary(out.shape, out.dtype), recorder.as_dtype(x, out.dtype)
    recorder.tape.emit("MUL", [square], [view, view], out.shape)
    recorder.tape.emit("MUL", [recorder.result(out)], [square, view], out.shape)


@registers(ARITHMETIC, *overloads("pow"))
def _pow(recorder: Recorder, out: Tensor, base: Operand, exponent: Operand) -> None:
    # Keys are numbers: a tensor as exponent has no entry.
    special = _POWERS.get((exponent, out.dtype.is_floating_point))
    if special is None:
        return _binary("POW", recorder, out, base, exponent)
    return special(recorder, out, base)


@registers(ARITHMETIC, aten.square.default)
def _square(recorder: Recorder, out: Tensor, x: Tensor) -> None:
    _binary("MUL", recorder, out, x, x)


# By exponent, and whether the result is floating point.
_POWERS: dict[tuple[Operand, bool], Emitter] = {
    (2, True): _square,
    (2, False): _square,
    (3, True): _cube,
    (0.5, True): partial(_unary, "SQRT"),
    (-0.5, True): partial(_unary, "RSQRT"),
}
"""The powers that torch's kernel computes without `pow`."""


@registers(ARITHMETIC, *overloads("where"))
def _where(recorder: Recorder, out: Tensor, condition: Tensor, a: Operand, b: Operand) -> None:
    inputs = [recorder.as_dtype(condition, torch.bool), *(recorder.as_dtype(v, out.dtype) for v in (a, b))]
    recorder.tape.emit("WHERE", [recorder.result(out)], inputs, out.shape)


@registers(ARITHMETIC, *overloads("clamp"), *overloads("clamp_min"))
def _clamp(recorder: Recorder, out: Tensor, x: Tensor, min: Operand | None = None, max: Operand | None = None) -> None:
    # The lower bound first: for min > max torch returns max.
    bounds = [(name, v) for name, v in (("MAXIMUM", min), ("MINIMUM", max)) if v is not None]
    view = recorder.as_dtype(x, out.dtype)
    for name, bound in bounds[:-1]:
        inside = recorder.temporary(out.shape, out.dtype)
        recorder.tape.emit(name, [inside], [view, recorder.as_dtype(bound, out.dtype)], out.shape)
        view = inside
    name, bound = bounds[-1]
    recorder.tape.emit(name, [recorder.result(out)], [view, recorder.as_dtype(bound, out.dtype)], out.shape)


@registers(ARITHMETIC, *overloads("clamp_max"))
def _clamp_max(recorder: Recorder, out: Tensor, x: Tensor, max: Operand) -> None:
    _clamp(recorder, out, x, None, max)


@registers(ARITHMETIC, aten._to_copy.default, aten.clone.default, torch.ops.prims.convert_element_type.default)
def _record_copy(recorder: Recorder, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:
    recorder.convert(recorder.result(out), recorder.view(x))


# --- reductions -------------------------------------------------------------------------------------------------------


def reduce(recorder: Recorder, name: str, out: View, view: View, dims: Sequence[int]) -> None:
    """Reduce some dimensions; `out` has the shape of the others."""
    rank = len(view.shape)
    reduced = {d % max(rank, 1) for d in dims}
    kept = [d for d in range(rank) if d not in reduced]
    # Reduced dimensions lie last, merged into one, as `REDUCTIONS` need.
    last = flattened(recorder, view.moved([*kept, *(d for d in range(rank) if d in reduced)]), len(kept))
    target = out._replace(shape=last.shape, strides=(*out.strides, 0))
    recorder.tape.emit(name, [target], [last], last.shape)


def flattened(recorder: Recorder, view: View, kept: int) -> View:
    """Return the view with all dimensions behind the first ones as one."""
    step = _merged(view.shape[kept:], view.strides[kept:])
    if step is None:
        view, step = recorder.copy(view), 1
    return view._replace(shape=(*view.shape[:kept], math.prod(view.shape[kept:])), strides=(*view.strides[:kept], step))


def _merged(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """Return the stride of several dimensions merged into one; None if their elements are not evenly spaced."""
    pairs = [(n, s) for n, s in zip(shape, strides, strict=True) if n != 1] or [(1, 1)]
    is_even = all([outer == n * inner for (_, outer), (n, inner) in pairwise(pairs)])
    return pairs[-1][1] if is_even else None


def _dims(x: Tensor, dim: int | Sequence[int] | None) -> Sequence[int]:
    """Return the dimensions that an operation reduces: all by default."""
    return [dim] if isinstance(dim, int) else dim or range(x.dim())


def _without(view: View, dims: Sequence[int], rank: int) -> View:
    """Return the view of a result without the dimensions of length 1 that ``keepdim`` keeps."""
    if len(view.shape) < rank:
        return view
    reduced = {d % max(rank, 1) for d in dims}
    return view.moved([d for d in range(rank) if d not in reduced])


def _reduction(
    name: str,
    recorder: Recorder,
    out: Tensor,
    x: Tensor,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    dims = _dims(x, dim)
    if dtype == torch.bool or (name == "PROD" and not out.dtype.is_floating_point):
        raise NotRecordableError(f"the operation {name.lower()} has results of dtype {out.dtype}")
    target, view = recorder.result(out), recorder.as_dtype(x, dtype or x.dtype)
    reduce(recorder, name, _without(target, dims, x.dim()), view, dims)


for _name in ("sum", "prod", "amax", "amin", "argmax", "argmin", "any", "all"):
    registers(ARITHMETIC, *overloads(_name))(partial(_reduction, _name.upper()))
registers(ARITHMETIC, aten.max.default)(partial(_reduction, "AMAX"))
registers(ARITHMETIC, aten.min.default)(partial(_reduction, "AMIN"))


@registers(ARITHMETIC, aten.mean.default, aten.mean.dim)
def _mean(
    recorder: Recorder, out: Tensor, x: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, **kwargs: Any
) -> None:
    dims = _dims(x, dim)
    target = recorder.result(out)
    # The sum stays a double, so that the mean alone is rounded to float32.
    total = recorder.temporary(out.shape, torch.float64)
    reduce(recorder, "SUM", _without(total, dims, x.dim()), recorder.view(x), dims)
    count = math.prod(x.shape[d] for d in dims)
    recorder.tape.emit("DIV", [target], [total, recorder.constant(count, torch.float64)], out.shape)


def _extremum(value: str, place: str, recorder: Recorder, out: Any, x: Tensor, dim: int, keepdim: bool = False) -> None:
    for name, each in ((value, out[0]), (place, out[1])):
        _reduction(name, recorder, each, x, dim, keepdim)


registers(ARITHMETIC, aten.max.dim)(partial(_extremum, "AMAX", "ARGMAX"))
registers(ARITHMETIC, aten.min.dim)(partial(_extremum, "AMIN", "ARGMIN"))


@registers(ARITHMETIC, aten.linalg_vector_norm.default)
def _vector_norm(
    recorder: Recorder,
    out: Tensor,
    x: Tensor,
    ord: float = 2,
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    dims = _dims(x, dim)
    names = {2: "NORM", 1: "SUM", math.inf: "AMAX", -math.inf: "AMIN"}
    if ord not in names:
        raise NotRecordableError(f"a vector norm has the order {ord}")
    view = recorder.as_dtype(x, dtype or x.dtype)
    if ord != 2:
        sizes = recorder.temporary(view.shape, view.dtype)
        recorder.tape.emit("ABS", [sizes], [view], view.shape)
        view = sizes
    reduce(recorder, names[ord], _without(recorder.result(out), dims, x.dim()), view, dims)


# --- products of matrices ---------------------------------------------------------------------------------------------


def multiply(recorder: Recorder, out: View, a: View, b: View) -> None:
    """Multiply matrices, the last two dimensions; the dimensions in front are those of `out`."""
    *batch, rows, columns = out.shape
    inner = a.shape[-1]
    shape = (*batch, rows, columns, inner)
    a = a.broadcast((*batch, rows, inner))
    b = b.broadcast((*batch, inner, columns))
    # The dimensions are batch, row, column and inner. A stride of 0 marks a dimension that an operand lacks.
    views = (
        (out, (*out.strides, 0)),
        (a, (*a.strides[:-1], 0, a.strides[-1])),
        (b, (*b.strides[:-2], 0, b.strides[-1], b.strides[-2])),
    )
    out, a, b = (view._replace(shape=shape, strides=strides) for view, strides in views)
    recorder.tape.emit("MATMUL", [out], [a, b], shape)


def column(view: View) -> View:
    """Return a vector as a matrix of one column."""
    return view._replace(shape=(*view.shape, 1), strides=(*view.strides, 0))


def row(view: View) -> View:
    """Return a vector as a matrix of one row."""
    return view._replace(shape=(1, *view.shape), strides=(0, *view.strides))


@registers(ARITHMETIC, aten.mm.default, aten.bmm.default)
def _mm(recorder: Recorder, out: Tensor, a: Tensor, b: Tensor) -> None:
    multiply(recorder, recorder.result(out), recorder.view(a), recorder.view(b))


@registers(ARITHMETIC, aten.mv.default)
def _mv(recorder: Recorder, out: Tensor, a: Tensor, b: Tensor) -> None:
    multiply(recorder, column(recorder.result(out)), recorder.view(a), column(recorder.view(b)))


@registers(ARITHMETIC, aten.dot.default, aten.vdot.default)
def _dot(recorder: Recorder, out: Tensor, a: Tensor, b: Tensor) -> None:
    multiply(recorder, row(column(recorder.result(out))), row(recorder.view(a)), column(recorder.view(b)))


def _added(recorder: Recorder, out: Tensor, start: Tensor, product: View, beta: float, alpha: float) -> None:
    """Emit ``beta start + alpha product``."""
    given = ((recorder.view(start), beta), (product, alpha))
    first, second = [_multiple(recorder, view, factor, out.dtype) for view, factor in given]
    target = recorder.result(out)
    # With ``beta = 0`` torch ignores nan in the first term.
    if beta == 0:
        recorder.convert(target, second.broadcast(out.shape))
    else:
        recorder.tape.emit("ADD", [target], [first, second], out.shape)


@registers(ARITHMETIC, aten.addmm.default, aten.baddbmm.default)
def _addmm(
    recorder: Recorder, out: Tensor, start: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1
) -> None:
    product = recorder.temporary(out.shape, out.dtype)
    multiply(recorder, product, recorder.view(a), recorder.view(b))
    _added(recorder, out, start, product, beta, alpha)


@registers(ARITHMETIC, aten.addmv.default)
def _addmv(
    recorder: Recorder, out: Tensor, start: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1
) -> None:
    product = recorder.temporary(out.shape, out.dtype)
    multiply(recorder, column(product), recorder.view(a), column(recorder.view(b)))
    _added(recorder, out, start, product, beta, alpha)
