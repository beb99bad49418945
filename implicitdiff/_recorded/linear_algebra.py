"""The instructions of torch's operations: linear systems and factorizations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product as tuples
from typing import Any

import torch
from torch import Tensor

from implicitdiff._recorded.operations import column
from implicitdiff._recorded.record import Recorder
from implicitdiff._recorded.registry import Emitters, registers
from implicitdiff._recorded.tape import NotRecordableError, Reference, View
from implicitdiff._torch.dispatch import aten

LINEAR_ALGEBRA: Emitters = {}
_MAX_EIGENVALUES = 32
"""Bound on the size of a symmetric matrix: Jacobi's rotations are slow for a large one."""


def _matrices(
    recorder: Recorder, name: str, sizes: Sequence[int], outputs: Sequence[View], inputs: Sequence[View]
) -> None:
    """Emit an instruction for each matrix of a batch; the last dimensions of a view are those of the matrix."""
    batch = outputs[0].shape[: -len(sizes)]
    for index in tuples(*map(range, batch)):
        written, read = ([_matrix(v, batch, index, len(sizes)) for v in group] for group in (outputs, inputs))
        recorder.tape.add(name, sizes, written, read, rounds=outputs[0].dtype == torch.float32)


def _matrix(view: View, batch: Sequence[int], index: Sequence[int], rank: int) -> Reference:
    view = view.broadcast((*batch, *view.shape[-rank:]))
    offset = view.offset + sum(i * s for i, s in zip(index, view.strides, strict=False))
    return Reference(view.buffer, offset, view.strides[-rank:])


def _solve_triangular(
    recorder: Recorder, out: View, a: View, b: View, *, upper: bool, left: bool = True, unit: bool = False
) -> None:
    if not left:
        # ``X A = B`` is ``A' X' = B'``.
        out, a, b, upper = transposed(out), transposed(a), transposed(b), not upper
    name = f"SOLVE_{'UNIT_' if unit else ''}{'UPPER' if upper else 'LOWER'}"
    _matrices(recorder, name, out.shape[-2:], [out], [a, b])


def transposed(view: View) -> View:
    """Return the view with the last two dimensions exchanged."""
    return view.moved([*range(len(view.shape) - 2), len(view.shape) - 1, len(view.shape) - 2])


@registers(LINEAR_ALGEBRA, aten.linalg_solve_triangular.default)
def _linalg_solve_triangular(
    recorder: Recorder,
    out: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    upper: bool,
    left: bool = True,
    unitriangular: bool = False,
) -> None:
    views = recorder.result(out), recorder.view(a), recorder.view(b)
    _solve_triangular(recorder, *views, upper=upper, left=left, unit=unitriangular)


@registers(LINEAR_ALGEBRA, aten.linalg_cholesky_ex.default)
def _record_cholesky(
    recorder: Recorder, out: Any, a: Tensor, *, upper: bool = False, check_errors: bool = False
) -> None:
    factor, info, matrix = recorder.result(out[0]), _everywhere_in_matrix(recorder.result(out[1])), recorder.view(a)
    if upper:
        # ``A = U'U``: the machine makes the lower factor ``U'``, and writes the factor transposed.
        factor, matrix = transposed(factor), transposed(matrix)
    _matrices(recorder, "CHOLESKY", a.shape[-2:], [factor, info], [matrix])


@registers(LINEAR_ALGEBRA, aten.cholesky_solve.default)
def _record_cholesky_solve(recorder: Recorder, out: Tensor, b: Tensor, factor: Tensor, upper: bool = False) -> None:
    matrix = recorder.view(factor)
    lower = transposed(matrix) if upper else matrix
    # L y = b, then L' x = y.
    middle = recorder.temporary(out.shape, out.dtype)
    _solve_triangular(recorder, middle, lower, recorder.view(b), upper=False)
    _solve_triangular(recorder, recorder.result(out), transposed(lower), middle, upper=True)


def _everywhere_in_matrix(view: View) -> View:
    """Return a number for each matrix, as a matrix that has it everywhere."""
    return view._replace(shape=(*view.shape, 1, 1), strides=(*view.strides, 0, 0))


def _factorise(recorder: Recorder, factors: View, pivots: View, info: View, a: View) -> View:
    """Emit an LU factorisation; return the pivots counted from 0."""
    # LAPACK counts pivots from 1, and the machine from 0.
    from_zero = recorder.temporary(pivots.shape, torch.int32)
    _matrices(recorder, "LU", a.shape[-2:], [factors, column(from_zero), _everywhere_in_matrix(info)], [a])
    recorder.tape.emit("ADD", [pivots], [from_zero, recorder.constant(1, torch.int32)], pivots.shape)
    return from_zero


def _record_lu_solve(recorder: Recorder, out: View, factors: View, from_zero: View, b: View) -> None:
    _matrices(recorder, "LU_SOLVE", out.shape[-2:], [out], [factors, column(from_zero), b])


@registers(LINEAR_ALGEBRA, aten.linalg_lu_factor_ex.default)
def _lu_factor(recorder: Recorder, out: Any, a: Tensor, *, pivot: bool = True, check_errors: bool = False) -> None:
    if not pivot:
        raise NotRecordableError("an LU factorisation has no pivots")
    factors, pivots, info = map(recorder.result, out)
    _factorise(recorder, factors, pivots, info, recorder.view(a))


@registers(LINEAR_ALGEBRA, aten.linalg_lu_solve.default)
def _linalg_lu_solve(
    recorder: Recorder,
    out: Tensor,
    factors: Tensor,
    pivots: Tensor,
    b: Tensor,
    *,
    left: bool = True,
    adjoint: bool = False,
) -> None:
    if adjoint or not left:
        raise NotRecordableError("a factorised system is solved from the right")
    counted = recorder.view(pivots)
    from_zero = recorder.temporary(pivots.shape, torch.int32)
    recorder.tape.emit("SUB", [from_zero], [counted, recorder.constant(1, torch.int32)], pivots.shape)
    _record_lu_solve(recorder, recorder.result(out), recorder.view(factors), from_zero, recorder.view(b))


@registers(LINEAR_ALGEBRA, aten._linalg_solve_ex.default)
def _solve(
    recorder: Recorder, out: Any, a: Tensor, b: Tensor, *, left: bool = True, check_errors: bool = False
) -> None:
    result, factors, pivots, info = map(recorder.result, out)
    rhs = recorder.view(b)
    # Also of a batch of vectors, torch's rule that precedes matrices.
    if b.shape == a.shape[:-1]:
        result, rhs = column(result), column(rhs)
    if not left:
        raise NotRecordableError("a system is solved from the right")
    _record_lu_solve(recorder, result, factors, _factorise(recorder, factors, pivots, info, recorder.view(a)), rhs)


@registers(LINEAR_ALGEBRA, aten.linalg_inv_ex.default)
def _record_inverse(recorder: Recorder, out: Any, a: Tensor, *, check_errors: bool = False) -> None:
    result, info = map(recorder.result, out)
    factors, pivots = recorder.temporary(a.shape, a.dtype), recorder.temporary(a.shape[:-1], torch.int32)
    with recorder.paused():
        eye = torch.eye(a.shape[-1], dtype=a.dtype).expand(a.shape)
    from_zero = _factorise(recorder, factors, pivots, info, recorder.view(a))
    _record_lu_solve(recorder, result, factors, from_zero, recorder.known(eye))


# --- QR ---------------------------------------------------------------------------------------------------------------


def _record_qr(recorder: Recorder, factors: View, tau: View, a: View) -> None:
    _matrices(recorder, "QR", a.shape[-2:], [factors, column(tau)], [a])


def _apply_reflectors(
    recorder: Recorder, out: View, factors: View, tau: View, b: View, transpose: bool = False
) -> None:
    """Emit ``Q b``, or ``Q' b``, of the orthogonal ``Q`` of a QR factorization."""
    # The dimensions are row, column and reflector. A stride of 0 marks a dimension on which an operand does not depend.
    n, m, k = sizes = (*out.shape[-2:], tau.shape[-1])
    out, b = (v._replace(shape=(*v.shape, k), strides=(*v.strides, 0)) for v in (out, b))
    *batch, row, step = factors.strides
    factors = factors._replace(shape=(*factors.shape[:-2], n, m, k), strides=(*batch, row, 0, step))
    tau = tau._replace(shape=(*tau.shape[:-1], n, m, k), strides=(*tau.strides[:-1], 0, 0, tau.strides[-1]))
    _matrices(recorder, "APPLY_Q_TRANSPOSED" if transpose else "APPLY_Q", sizes, [out], [factors, tau, b])


@registers(LINEAR_ALGEBRA, aten.geqrf.default)
def _geqrf(recorder: Recorder, out: Any, a: Tensor) -> None:
    factors, tau = map(recorder.result, out)
    _record_qr(recorder, factors, tau, recorder.view(a))


@registers(LINEAR_ALGEBRA, aten.ormqr.default)
def _ormqr(
    recorder: Recorder, out: Tensor, a: Tensor, tau: Tensor, other: Tensor, left: bool = True, transpose: bool = False
) -> None:
    result, b = recorder.result(out), recorder.view(other)
    if not left:
        # ``X = B Q`` is ``X' = Q' B'``.
        result, b, transpose = transposed(result), transposed(b), not transpose
    _apply_reflectors(recorder, result, recorder.view(a), recorder.view(tau), b, transpose)


def _columns_of_q(recorder: Recorder, out: View, factors: View, tau: View) -> None:
    with recorder.paused():
        eye = torch.eye(*out.shape[-2:], dtype=out.dtype).expand(out.shape)
    _apply_reflectors(recorder, out, factors, tau, recorder.known(eye))


@registers(LINEAR_ALGEBRA, aten.linalg_householder_product.default)
def _householder_product(recorder: Recorder, out: Tensor, a: Tensor, tau: Tensor) -> None:
    _columns_of_q(recorder, recorder.result(out), recorder.view(a), recorder.view(tau))


@registers(LINEAR_ALGEBRA, aten.linalg_qr.default)
def _linalg_qr(recorder: Recorder, out: Any, a: Tensor, mode: str = "reduced") -> None:
    q, r = map(recorder.result, out)
    factors = recorder.temporary(a.shape, a.dtype)
    tau = recorder.temporary((*a.shape[:-2], min(a.shape[-2:])), a.dtype)
    _record_qr(recorder, factors, tau, recorder.view(a))
    with recorder.paused():
        upper = torch.ones(r.shape[-2:], dtype=torch.bool).triu()
    # The factor R is the upper triangle in the first rows of `factors`.
    inputs = [recorder.known(upper), factors._replace(shape=r.shape), recorder.constant(0, a.dtype)]
    recorder.tape.emit("WHERE", [r], inputs, r.shape)
    if mode != "r":
        _columns_of_q(recorder, q, factors, tau)


# --- eigenvalues and singular values ----------------------------------------------------------------------------------


@registers(LINEAR_ALGEBRA, aten._linalg_eigh.default)
def _linalg_eigh(recorder: Recorder, out: Any, a: Tensor, UPLO: str = "L", compute_v: bool = True) -> None:
    if a.shape[-1] > _MAX_EIGENVALUES:
        raise NotRecordableError(f"a symmetric matrix has {a.shape[-1]} eigenvalues")
    values, vectors = map(recorder.result, out)
    matrix, work = recorder.view(a), recorder.temporary(a.shape, a.dtype)
    if not compute_v:
        vectors = recorder.temporary(a.shape, a.dtype)
    # The machine reads the lower triangle.
    if UPLO.upper() == "U":
        matrix = transposed(matrix)
    # The vectors come first: results of this shape are rounded.
    _matrices(recorder, "EIGH", a.shape[-2:], [vectors, column(values), work], [matrix])


@registers(LINEAR_ALGEBRA, aten._linalg_svd.default)
def _linalg_svd(
    recorder: Recorder,
    out: Any,
    a: Tensor,
    full_matrices: bool = False,
    compute_uv: bool = True,
    *,
    driver: str | None = None,
) -> None:
    *batch, m, n = a.shape
    if min(m, n) > _MAX_EIGENVALUES:
        raise NotRecordableError(f"a matrix has {min(m, n)} singular values")
    if compute_uv and full_matrices and m != n:
        raise NotRecordableError("all singular vectors of a matrix that is not square are asked for")
    u, values, v = map(recorder.result, out)
    if not compute_uv:
        u, v = (recorder.temporary((*batch, *s), a.dtype) for s in ((m, min(m, n)), (min(m, n), n)))
    matrix, right = recorder.view(a), transposed(v)
    # The machine takes matrices with at least as many rows as columns.
    if m < n:
        # ``A' = V S U'``
        matrix, u, right = transposed(matrix), right, u
    _matrices(recorder, "SVD", matrix.shape[-2:], [u, column(values), right], [matrix])
