"""Cholesky factorisation."""

from __future__ import annotations

import torch
from torch import Tensor

from implicitdiff._calls import shows_call
from implicitdiff._implicit.linear import LinearSolver
from implicitdiff.linear_solve._direct import Factors, direct, probed
from implicitdiff.linear_solve._outcome import OnFailure


@shows_call
def solve_cholesky(*, ridge: float = 0.0, on_failure: OnFailure = "raise") -> LinearSolver:
    r"""Make a solver ``solve(matvec, b) -> x`` that materialises ``A`` and factorises it, ``A`` Hermitian positive
    definite.

    Half the work of `solve_lu`. The solve fails if ``A`` is not Hermitian (to the square root of the precision) or not
    positive definite.

    Args:
        ridge: solve ``(A + ridge I) x = b``; a number >= 0.
        on_failure: ``"raise"`` a `LinearSolveError`, ``"warn"`` with a `LinearSolveWarning`, or ``"ignore"``.

    Raises (when solving):
        LinearSolveError: ``A`` is not Hermitian, not positive definite to working precision, or not finite.

    Reference:
        Golub and Van Loan, "Matrix Computations", 4th ed., section 4.2.

    Example:
        >>> import torch
        >>> from implicitdiff.linear_solve import solve_cholesky
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> solve_cholesky()(lambda v: A @ v, torch.tensor([3.0, 3.0])).round(decimals=4)
        tensor([1., 1.])
    """
    broken = (
        "the matrix is not Hermitian positive definite to working precision, or not finite: add a ridge, or use "
        "solve_lu or solve_lstsq"
    )
    return direct("solve_cholesky", cholesky, broken, ridge=ridge, on_failure=on_failure)


def cholesky(a: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """A `Factorise` for symmetric positive definite matrices; a lane of any other matrix is broken."""
    diagonal = a.diagonal(dim1=-2, dim2=-1)
    # The largest entry of a positive definite matrix is on its diagonal. A - A' is antisymmetric, so its maximum is its
    # largest absolute entry.
    asymmetric = (a - a.mT).amax(dim=(-2, -1)) > eps**0.5 * diagonal.amax(dim=-1)
    x, broken = probed(_triangular, a, b)
    if bool(broken.any()):
        # The scaling to unit diagonal has a condition number within a factor n of the best diagonal scaling (van der
        # Sluis, 1969).
        scale = diagonal.clamp(min=0).sqrt()
        scale = torch.where(scale > 0, 1.0 / scale, 1.0)[..., None]
        x, broken = probed(_triangular, scale * a * scale.mT, scale * b)
        x = scale * x
    return x, asymmetric | broken


def _triangular(a: Tensor) -> Factors:
    # The variant `_ex` reports a failure in `info`; `cholesky` raises for the whole batch.
    factor, info = torch.linalg.cholesky_ex(a)

    def solve(b: Tensor) -> Tensor:
        return torch.cholesky_solve(b, factor)

    return solve, solve, info != 0
