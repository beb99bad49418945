"""LU factorisation."""

from __future__ import annotations

import torch
from torch import Tensor

from implicitdiff._calls import shows_call
from implicitdiff._implicit.linear import LinearSolver
from implicitdiff.linear_solve._direct import Factors, direct, factorised
from implicitdiff.linear_solve._outcome import OnFailure

SINGULAR = (
    "the matrix is singular to working precision, or not finite: use solve_lstsq for the solution of least norm, or "
    "add a ridge"
)


@shows_call
def solve_lu(*, ridge: float = 0.0, on_failure: OnFailure = "raise") -> LinearSolver:
    r"""Make a solver ``solve(matvec, b) -> x`` that materialises ``A`` and factorises it, ``A`` any non-singular
    operator.

    Exact to rounding, and the fastest solver for few unknowns. For ``n`` scalars of ``b`` over all leaves, each lane
    takes ``n`` products with ``A`` (batched), ``n^2`` numbers of memory and ``2 n^3 / 3`` operations. Right-hand sides
    of one matrix share its factors.

    Args:
        ridge: solve ``(A + ridge I) x = b``; a number >= 0.
        on_failure: ``"raise"`` a `LinearSolveError`, ``"warn"`` with a `LinearSolveWarning`, or ``"ignore"``.

    Raises (when solving):
        LinearSolveError: ``A`` is singular to working precision, or not finite.

    Reference:
        Golub and Van Loan, "Matrix Computations", 4th ed., section 3.4.

    Example:
        >>> import torch
        >>> from implicitdiff.linear_solve import solve_lu
        >>> A = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
        >>> solve_lu()(lambda v: A @ v, torch.tensor([1.0, 5.0]))
        tensor([2., 1.])
    """
    return direct("solve_lu", factorised(lu), SINGULAR, ridge=ridge, on_failure=on_failure)


def lu(a: Tensor) -> Factors:
    """Factors ``A = P L U``."""
    # The variant `_ex` reports a zero pivot in `info`; `lu_factor` raises for the whole batch.
    factors, pivots, info = torch.linalg.lu_factor_ex(a)
    return (
        lambda b: torch.linalg.lu_solve(factors, pivots, b),
        lambda b: torch.linalg.lu_solve(factors, pivots, b, adjoint=True),
        info != 0,
    )
