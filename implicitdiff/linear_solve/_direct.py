"""The frame round every solver that materialises the matrix."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from implicitdiff._implicit.linear import LinearSolver
from implicitdiff._implicit.system import System
from implicitdiff.linear_solve._outcome import OnFailure, Outcome, check_on_failure, check_ridge, report_failed_solves

Factorise = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""``factorise(A, B, eps) -> (X, broken)`` for ``A`` of shape ``(lanes, n, n)`` and ``B`` of shape ``(lanes, n, k)``;
``broken`` is ``(lanes,)``."""


Factors = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]
"""``B -> A^-1 B``, ``B -> A^-T B`` and ``broken``."""
Factor = Callable[[Tensor], Factors]


def direct(name: str, factorise: Factorise, broken: str, *, ridge: float = 0.0, on_failure: OnFailure) -> LinearSolver:
    """A linear solver from a factorisation; `broken` says what its breakdown means."""
    check_on_failure(name, on_failure)
    check_ridge(name, ridge)

    return LinearSolver(
        name, partial(_solve, name=name, factorise=factorise, broken=broken, ridge=ridge, on_failure=on_failure)
    )


def _solve(
    system: System, *, name: str, factorise: Factorise, broken: str, ridge: float, on_failure: OnFailure
) -> Tensor:
    system = system.shifted(ridge)
    return report_failed_solves(name, materialised(system, factorise, broken), system, on_failure)


def materialised(system: System, factorise: Factorise, broken: str) -> Outcome:
    """Solve with the matrix of every lane."""
    a = system.materialise()
    lanes, m, n = a.shape
    b = system.b.reshape(lanes, -1, m).mT
    x, singular = factorise(a, b, system.eps)
    failed = (singular[:, None] | ~torch.isfinite(x).all(dim=-2)).reshape(-1)

    def figures() -> tuple[Tensor, Tensor]:
        residual = torch.linalg.vector_norm(b - a @ x, dim=-2).reshape(-1)
        return residual, torch.finfo(a.dtype).eps * torch.linalg.vector_norm(system.b, dim=-1)

    return Outcome(x.mT.reshape(-1, n), failed, broken, figures, 0)


def factorised(factor: Factor) -> Factorise:
    """A `Factorise` for any non-singular matrix that calls a lane broken if it is singular to working precision.

    Rows and columns are scaled to largest entry 1 where the matrix as it is does not pass: what is badly scaled is not
    singular.
    """
    return partial(_solve_scaled_if_need_be, factor)


def _solve_scaled_if_need_be(factor: Factor, a: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, broken = probed(factor, a, b)
    if not bool(broken.any()):
        return x, broken
    row = inverse_or_one(a.abs().amax(dim=-1, keepdim=True))
    col = inverse_or_one((row * a).abs().amax(dim=-2, keepdim=True))
    x, broken = probed(factor, row * a * col, row * b)
    return col.mT * x, broken


# Up to so many numbers an inverse takes less time than the operations that estimate its norm.
_SMALL = 1024


def probed(factor: Factor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Solve, and find or estimate the condition number.

    For few numbers the norm of the inverse is that of the solutions with the unit vectors, as more right-hand sides.
    Else a vector with a share in every direction, as one more right-hand side, grows by about that norm. A small pivot
    alone would not tell, and the given right-hand side may have no share in the bad direction. The vector's own share
    there may be small too: where it does not clear the matrix by far, inverse iteration turns it there.
    """
    lanes, n, k = a.shape[0], a.shape[-1], b.shape[-1]
    solve, solve_transposed, broken = factor(a)
    size = torch.linalg.vector_norm(a, dim=(-2, -1), keepdim=True)
    limit = 0.1 / torch.finfo(a.dtype).eps
    if a.numel() <= _SMALL:
        unit = torch.eye(n, dtype=a.dtype, device=a.device).expand(lanes, n, n)
        x = solve(torch.cat([b, unit], dim=-1))
        growth = torch.linalg.vector_norm(x[..., k:], dim=(-2, -1), keepdim=True)
        return x[..., :k], broken | ~(growth * size < limit)[:, 0, 0]
    v = torch.cos(7.0 * torch.arange(1, n + 1, dtype=a.dtype, device=a.device) ** 2).reshape(1, n, 1)
    v = (v / torch.linalg.vector_norm(v)).expand(lanes, n, 1)
    x = solve(torch.cat([b, v], dim=-1))
    x, v = x[..., :k], x[..., k:]
    growth = torch.linalg.vector_norm(v, dim=-2, keepdim=True)
    if not bool((growth * size < 1e-5 * limit).all()):
        for step in (solve_transposed, solve):
            v = step(v / torch.linalg.vector_norm(v, dim=-2, keepdim=True))
            # A size that left the range of the dtype, or is no number, stays.
            growth = torch.maximum(growth, torch.linalg.vector_norm(v, dim=-2, keepdim=True))
    return x, broken | ~(growth * size < limit)[:, 0, 0]


def inverse_or_one(size: Tensor) -> Tensor:
    return torch.where(size > 0, 1.0 / size, 1.0)
