"""Linear algebra by factorisations.

On the CPU the kernel of `linalg.lu_solve` reads out of bounds if matrices are broadcast over right-hand sides, as in
``LU[:, None]`` with ``B`` of shape ``(lanes, k, n, 1)`` (no issue is known). A vmap over vectors inside of a vmap over
lanes does this, for example `jacfwd` or `hessian` within a vmap. The derivative formulas of `solve`, `det`, `slogdet`
and `logdet` call this kernel. Second derivatives in forward mode are wrong too (pytorch #196695, #196696, #192540).

Forward mode is wrong for `cholesky_solve` of a batch (pytorch #196694), `cholesky_inverse` (pytorch #196682) and the
old `triangular_solve` (pytorch #196707), and missing for the old `cholesky`. Similar: pytorch #198017.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import implicitdiff._torch.functions as _functions
import implicitdiff._torch.levels as _levels
import implicitdiff._torch.tracking as _tracking
from implicitdiff._torch.replacements._spelling import Operation, of_aten, only_if


class _LinearSolve(torch.autograd.Function):
    """``X = A^-1 B`` for matrices of equal batch shape.

    ``A dX = dB - dA X`` and ``B_bar = A^-H X_bar``, ``A_bar = -B_bar X^H``. A singular ``A`` raises with
    `check_errors`, and otherwise gives values that are not finite.
    """

    @staticmethod
    def forward(a: Tensor, b: Tensor, check_errors: bool) -> Tensor:
        x: Tensor = torch.linalg.solve(a, b) if check_errors else torch.linalg.solve_ex(a, b)[0]
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        # `backward` reads the tensors of the first call, `jvp` those of the second.
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, x_bar: Tensor) -> tuple[Tensor, Tensor, None]:
        a, x = ctx.saved_tensors
        # By the Function again, so that derivatives of all orders have these rules.
        b_bar = _apply_solve(a.mH, x_bar)
        return -b_bar @ x.mH, b_bar, None

    @staticmethod
    @_functions.nested_forward_mode
    def jvp(ctx: Any, saved: Sequence[Tensor], a_dot: Tensor, b_dot: Tensor, _: None) -> Any:
        a, x = saved
        return _apply_solve(a, b_dot - a_dot @ x)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], a: Tensor, b: Tensor, check_errors: bool) -> tuple[Tensor, int]:
        at_a, at_b, _ = in_dims
        # At least one of both has the lanes.
        if at_a is None:
            # Lanes share the matrix: stack their right-hand sides as columns, for one factorisation.
            columns = b.movedim(at_b, -1)
            x = _apply_solve(a, columns.flatten(-2), check_errors).unflatten(-1, columns.shape[-2:])
            return x, x.dim() - 1
        # The matrix has the lanes here, and B gets the lanes as an expanded view: batch shapes are equal, see the
        # class.
        b = b.expand(info.batch_size, *b.shape) if at_b is None else b.movedim(at_b, 0)
        return _apply_solve(a.movedim(at_a, 0), b, check_errors), 0


def _apply_solve(a: Tensor, b: Tensor, check_errors: bool = True) -> Tensor:
    x: Tensor = _LinearSolve.apply(a, b, check_errors)  # type: ignore[no-untyped-call]
    return x


def _linalg_solve(A: Tensor, B: Tensor, *, left: bool = True, check_errors: bool = True) -> Tensor:
    _only_if_square(A)
    only_if(B.dim() > 0, A.dtype == B.dtype)
    # torch's rule for a batch of vectors, which takes precedence over matrices.
    if B.dim() == 1 or B.shape == A.shape[:-1]:
        only_if(left)
        return _solve_columns(A, B.unsqueeze(-1), check_errors)[..., 0]
    if left:
        return _solve_columns(A, B, check_errors)
    # X A = B is equivalent to A' X' = B'.
    return _solve_columns(A.mT, B.mT, check_errors).mT


def _solve_columns(a: Tensor, b: Tensor, check_errors: bool) -> Tensor:
    only_if(a.shape[-1] == b.shape[-2])
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    # A TorchFunctionMode sees the operands of `expand`, but not those of `autograd.Function.apply`.
    return _apply_solve(a.expand(*batch, *a.shape[-2:]), b.expand(*batch, *b.shape[-2:]), check_errors)


def _solve_ex(A: Tensor, B: Tensor, *, left: bool = True, check_errors: bool = False) -> Any:
    # `info` is a tensor of integers without a derivative, so torch's own operation may compute `info`.
    with torch.no_grad():
        info = torch.linalg.solve_ex(A.detach(), B.detach(), left=left, check_errors=check_errors)[1]
    return torch.return_types.linalg_solve_ex(  # type: ignore[attr-defined]
        (_linalg_solve(A, B, left=left, check_errors=check_errors), info)
    )


def _tensorsolve(A: Tensor, B: Tensor, dims: Sequence[int] | None = None) -> Tensor:
    # A maps trailing dimensions to leading ones: reshaped, a square matrix.
    moved = A if dims is None else A.movedim(list(dims), list(range(-len(dims), 0)))
    shape = moved.shape[B.dim() :]
    only_if(shape.numel() == moved.shape[: B.dim()].numel() == B.numel())
    return _linalg_solve(moved.reshape(B.numel(), B.numel()), B.flatten()).reshape(shape)


def _lu_solve(LU: Tensor, pivots: Tensor, B: Tensor, *, left: bool = True, adjoint: bool = False) -> Tensor:
    _only_if_square(LU)
    only_if(pivots.dim() > 0, B.dim() >= 2)
    if not left:
        # X A = B is equivalent to A^H X^H = B^H, and X A^H = B to A X^H = B^H.
        return _lu_solve(LU, pivots, B.mH, adjoint=not adjoint).mH
    only_if(B.shape[-2] == LU.shape[-1])
    # A = P L U, so X = U^-1 L^-1 P' B, and for the adjoint X = P L^-H U^-H B.
    p, lower, upper = torch.lu_unpack(LU, pivots)
    if adjoint:
        y = torch.linalg.solve_triangular(upper.mH, B, upper=False)
        return p @ torch.linalg.solve_triangular(lower.mH, y, upper=True, unitriangular=True)  # type: ignore[no-any-return]
    y = torch.linalg.solve_triangular(lower, p.mT @ B, upper=False, unitriangular=True)
    return torch.linalg.solve_triangular(upper, y, upper=True)  # type: ignore[no-any-return]


def _old_lu_solve(b: Tensor, LU_data: Tensor, LU_pivots: Tensor) -> Tensor:
    return _lu_solve(LU_data, LU_pivots, b)


def _lu_diagonal_and_sign(A: Tensor) -> tuple[Tensor, Tensor]:
    """Return the diagonal of U in ``A = P L U``, and the determinant of the permutation P."""
    lu, pivots, _ = torch.linalg.lu_factor_ex(A)
    # Entry i of `pivots`, counted from 1, is the row exchanged with row i. Each true exchange changes the sign.
    swaps = (pivots != torch.arange(1, A.shape[-1] + 1, device=A.device)).sum(-1)
    return lu.diagonal(dim1=-2, dim2=-1), 1.0 - 2.0 * (swaps % 2).to(A.dtype)


def _det(A: Tensor) -> Tensor:
    _only_if_square(A)
    with torch.no_grad():
        singular = (torch.linalg.lu_factor_ex(A.detach())[0].diagonal(dim1=-2, dim2=-1) == 0).any(-1)
    if not _levels.is_any(singular):
        return _det_by_lu(A)
    # LU of a singular matrix has no derivative, but the determinant is a polynomial and has one.
    # `where` differentiates both branches, so the identity stands in for a singular matrix in the branch not taken.
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return torch.where(singular, _det_by_expansion(A), _det_by_lu(torch.where(singular[..., None, None], eye, A)))


def _det_by_lu(A: Tensor) -> Tensor:
    """Determinant of a regular matrix, from its LU factorisation."""
    diagonal, sign = _lu_diagonal_and_sign(A)
    return sign * diagonal.prod(-1)


def _det_by_expansion(A: Tensor) -> Tensor:
    """Determinant by n - 1 matrix products.

    Reference: Bird, "A simple division-free algorithm for computing determinants", 2011.
    """
    x = A
    for _ in range(A.shape[-1] - 1):
        # Bird's F(X): keep X above the diagonal, and replace diagonal entry i by minus the sum of entries i + 1 to n.
        tails = x.diagonal(dim1=-2, dim2=-1).flip(-1).cumsum(-1).flip(-1)
        x = (x.triu(1) - torch.diag_embed(torch.cat([tails[..., 1:], torch.zeros_like(tails[..., :1])], -1))) @ A
    first = x[..., 0, 0]
    return first if A.shape[-1] % 2 else -first


def _sign_and_log(A: Tensor) -> tuple[Tensor, Tensor]:
    _only_if_square(A)
    diagonal, sign = _lu_diagonal_and_sign(A)
    return sign * diagonal.sgn().prod(-1), diagonal.abs().log().sum(-1)


def _linalg_slogdet(A: Tensor) -> Any:
    return torch.return_types.linalg_slogdet(_sign_and_log(A))  # type: ignore[attr-defined]


def _slogdet(input: Tensor) -> Any:
    return torch.return_types.slogdet(_sign_and_log(input))


def _logdet(input: Tensor) -> Tensor:
    sign, size = _sign_and_log(input)
    # Of a negative determinant, the real logarithm is nan.
    return size + sign.log() if input.is_complex() else torch.where(sign < 0, torch.nan, size)


def _only_if_square(A: Tensor) -> None:
    only_if(A.dim() >= 2, _tracking.is_continuous(A))
    only_if(A.shape[-1] == A.shape[-2])


def _cholesky(input: Tensor, upper: bool = False) -> Tensor:
    return torch.linalg.cholesky(input, upper=upper)  # type: ignore[no-any-return]


def _cholesky_solve(input: Tensor, input2: Tensor, upper: bool = False) -> Tensor:
    _only_if_square(input2)
    only_if(input.dim() >= 2)
    # A = L L^H: solve L y = B, then L^H x = y.
    lower = input2.mH if upper else input2
    y = torch.linalg.solve_triangular(lower, input, upper=False)
    return torch.linalg.solve_triangular(lower.mH, y, upper=True)  # type: ignore[no-any-return]


def _cholesky_inverse(input: Tensor, upper: bool = False) -> Tensor:
    _only_if_square(input)
    identity = torch.eye(input.shape[-1], dtype=input.dtype, device=input.device)
    return _cholesky_solve(identity, input, upper)


def _triangular_solve(
    b: Tensor, A: Tensor, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> Any:
    own, is_upper = (A.mT, not upper) if transpose else (A, upper)
    x = torch.linalg.solve_triangular(own, b, upper=is_upper, unitriangular=unitriangular)
    # The second result of torch is a copy of A, expanded to the batch of the solution.
    return torch.return_types.triangular_solve((x, A.expand(*x.shape[:-2], *A.shape[-2:]).clone()))


REPLACEMENTS: dict[Operation, Operation] = {
    torch.linalg.solve: _linalg_solve,
    torch.linalg.solve_ex: _solve_ex,
    torch.linalg.tensorsolve: _tensorsolve,
    torch.linalg.lu_solve: _lu_solve,
    torch.lu_solve: _old_lu_solve,
    torch.Tensor.lu_solve: _old_lu_solve,
    torch.linalg.det: _det,
    torch.det: _det,
    torch.Tensor.det: _det,
    torch.linalg.slogdet: _linalg_slogdet,
    torch.slogdet: _slogdet,
    torch.Tensor.slogdet: _slogdet,
    torch.logdet: _logdet,
    torch.Tensor.logdet: _logdet,
    torch.cholesky: _cholesky,
    torch.Tensor.cholesky: _cholesky,
    torch.cholesky_solve: _cholesky_solve,
    torch.Tensor.cholesky_solve: _cholesky_solve,
    torch.cholesky_inverse: _cholesky_inverse,
    torch.Tensor.cholesky_inverse: _cholesky_inverse,
    torch.triangular_solve: _triangular_solve,
    torch.Tensor.triangular_solve: _triangular_solve,
    **of_aten(
        linalg_solve=_linalg_solve,
        linalg_solve_ex=_solve_ex,
        linalg_tensorsolve=_tensorsolve,
        linalg_lu_solve=_lu_solve,
        lu_solve=_old_lu_solve,
        linalg_det=_det,
        det=_det,
        linalg_slogdet=_linalg_slogdet,
        slogdet=_slogdet,
        logdet=_logdet,
        cholesky=_cholesky,
        cholesky_solve=_cholesky_solve,
        cholesky_inverse=_cholesky_inverse,
        triangular_solve=_triangular_solve,
    ),
}
