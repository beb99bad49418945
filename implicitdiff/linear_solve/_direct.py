"""Common part of the solvers that materialise the matrix: singularity test, scaling, report."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from implicitdiff._implicit.linear import LinearSolver
from implicitdiff._implicit.system import System
from implicitdiff.linear_solve._outcome import (
    OnFailure,
    Outcome,
    check_not_negative,
    check_on_failure,
    report_failed_solves,
)

Factorise = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""Solve ``A X = B``: ``factorise(A, B, eps) -> (X, broken)`` for ``A`` of shape ``(lanes, n, n)``, ``B`` of shape
``(lanes, n, k)`` and ``broken`` of shape ``(lanes,)``."""


Factors = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]
"""The functions ``B -> A^-1 B`` and ``B -> A^-T B``, and ``broken`` of shape ``(lanes,)``."""
Factor = Callable[[Tensor], Factors]


def direct(name: str, factorise: Factorise, broken: str, *, ridge: float = 0.0, on_failure: OnFailure) -> LinearSolver:
    """Return a linear solver from a factorisation. `broken` is the message for a lane in which it fails."""
    check_on_failure(name, on_failure)
    check_not_negative(name, "ridge", ridge)

    return LinearSolver(
        name,
        partial(_solve_by_factors, name=name, factorise=factorise, broken=broken, ridge=ridge, on_failure=on_failure),
    )


def _solve_by_factors(
    system: System, *, name: str, factorise: Factorise, broken: str, ridge: float, on_failure: OnFailure
) -> Tensor:
    system = system.shifted(ridge)
    return report_failed_solves(name, materialised(system, factorise, broken), system, on_failure)


def materialised(system: System, factorise: Factorise, broken: str) -> Outcome:
    """Solve a system with the materialised matrix of every lane; rows that fail are nan."""
    a = system.materialise()
    lanes, m, n = a.shape
    # Rows of one lane share the matrix, and are the columns of B.
    b = system.b.reshape(lanes, -1, m).mT
    x, singular = factorise(a, b, system.eps)
    failed = singular[:, None] | ~torch.isfinite(x).all(dim=-2)
    has_failed = bool(failed.any())
    # Also nan for ``b = 0``: the root of x^2 = c at c = 0 has an infinite derivative, and a loss x^2 the cotangent 0
    # there, but the loss has the derivative 1.
    solution = torch.where(failed[:, None], torch.nan, x) if has_failed else x

    def figures() -> tuple[Tensor, Tensor]:
        residual = torch.linalg.vector_norm(b - a @ x, dim=-2).reshape(-1)
        return residual, torch.finfo(a.dtype).eps * torch.linalg.vector_norm(system.b, dim=-1)

    return Outcome(solution.mT.reshape(-1, n), failed.reshape(-1), lambda: broken, figures, 0, has_failed)


def factorised(factor: Factor) -> Factorise:
    """Return a `Factorise` for non-singular matrices. A lane is broken if it is singular to working precision.

    If a lane fails the test, rows and columns are scaled to largest entry 1 and the test is repeated: bad scaling alone
    is not singularity.
    """
    return partial(_solve_scaled_if_need_be, factor)


def _solve_scaled_if_need_be(factor: Factor, a: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, broken = probed(factor, a, b)
    if not bool(broken.any()):
        return x, broken
    # Solve (R A C) (C^-1 X) = R B with diagonal R and C: rows first, then columns of the scaled rows.
    row = inverse_or_one(a.abs().amax(dim=-1, keepdim=True))
    col = inverse_or_one((row * a).abs().amax(dim=-2, keepdim=True))
    x, broken = probed(factor, row * a * col, row * b)
    return col.mT * x, broken


# Number of entries up to which an explicit inverse takes less time than the estimate of its norm.
_SMALL = 1024


def probed(factor: Factor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Solve, and compute or estimate the condition number ``|A| |A^-1|`` in the Frobenius norm.

    A small matrix is inverted, with the unit vectors as further right-hand sides. For a large one, a fixed vector v is
    a further right-hand side, and ``|A^-1 v| / |v|`` estimates ``|A^-1|``. Pivots alone do not reveal a small singular
    value, and the given right-hand sides may be orthogonal to its singular vector. v may be nearly orthogonal too, so
    unless the estimate is far below the limit, two steps of inverse iteration with ``A^-1 A^-T`` improve it (Golub and
    Van Loan, "Matrix Computations", 4th ed., section 3.5).
    """
    lanes, n, k = a.shape[0], a.shape[-1], b.shape[-1]
    solve, solve_transposed, broken = factor(a)
    size = torch.linalg.vector_norm(a, dim=(-2, -1), keepdim=True)
    # Singular to working precision: |A| |A^-1| above 0.1 / eps, where a solution may have no correct digit.
    # ``|A| |A^-1|`` bounds the relative error of ``x`` per relative error of ``A`` (Golub and Van Loan, section 2.6).
    limit = 0.1 / torch.finfo(a.dtype).eps
    if a.numel() <= _SMALL:
        unit = torch.eye(n, dtype=a.dtype, device=a.device).expand(lanes, n, n)
        x = solve(torch.cat([b, unit], dim=-1))
        # The further columns of the solution are ``A^-1``, so the norm is exact.
        growth = torch.linalg.vector_norm(x[..., k:], dim=(-2, -1), keepdim=True)
        return x[..., :k], broken | ~(growth * size < limit)[:, 0, 0]
    # Entries without a pattern, but equal in every run.
    v = torch.cos(7.0 * torch.arange(1, n + 1, dtype=a.dtype, device=a.device) ** 2).reshape(1, n, 1)
    v = (v / torch.linalg.vector_norm(v)).expand(lanes, n, 1)
    x = solve(torch.cat([b, v], dim=-1))
    x, v = x[..., :k], x[..., k:]
    growth = torch.linalg.vector_norm(v, dim=-2, keepdim=True)
    # An estimate from one vector may be small by a factor of n^(1/2) and more: five digits of margin.
    if not bool((growth * size < 1e-5 * limit).all()):
        # ``|A^-T v|``, then ``|A^-1 A^-T v|`` for the normalised vector: further lower bounds of ``|A^-1|``.
        for step in (solve_transposed, solve):
            v = step(v / torch.linalg.vector_norm(v, dim=-2, keepdim=True))
            # The maximum keeps an infinite or nan estimate.
            growth = torch.maximum(growth, torch.linalg.vector_norm(v, dim=-2, keepdim=True))
    return x, broken | ~(growth * size < limit)[:, 0, 0]


def inverse_or_one(size: Tensor) -> Tensor:
    # A zero row or column keeps the factor 1, and the factorisation reports the singular matrix.
    return torch.where(size > 0, 1.0 / size, 1.0)
