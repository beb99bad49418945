"""The frame round every solver that materialises the matrix."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from implicitdiff._linear import LinearSolver
from implicitdiff._system import System
from implicitdiff.linear_solve._outcome import OnFailure, Outcome, check_on_failure, check_ridge, settle

Factorise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``factorise(A, B) -> (X, broken)`` for ``A`` of shape ``(lanes, n, n)`` and ``B`` of shape ``(lanes, n, k)``;
``broken`` is ``(lanes,)``."""


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
    return settle(name, materialised(system, factorise, broken), system, on_failure)


def materialised(system: System, factorise: Factorise, broken: str) -> Outcome:
    """Solve with the matrix of every lane."""
    a = system.materialise()
    lanes, n, _ = a.shape
    b = system.b.reshape(lanes, -1, n).mT
    x, singular = factorise(a, b)
    failed = (singular[:, None] | ~torch.isfinite(x).all(dim=-2)).reshape(-1)
    rows = x.mT.reshape(-1, n)
    residual = target = torch.zeros_like(failed, dtype=x.dtype)
    if bool(failed.any()):
        residual = torch.linalg.vector_norm(b - a @ x, dim=-2).reshape(-1)
        target = torch.finfo(a.dtype).eps * torch.linalg.vector_norm(system.b, dim=-1)
    return Outcome(rows, failed, broken, residual, target, 0)


def factorised(solve: Factorise) -> Factorise:
    """A `Factorise` for any non-singular matrix that calls a lane broken if it is singular to working precision.

    Rows and columns are scaled to largest entry 1 where the matrix as it is does not pass: what is badly scaled is not
    singular.
    """
    return partial(_solve_scaled_if_need_be, solve)


def _solve_scaled_if_need_be(solve: Factorise, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    x, broken = _probed(solve, a, b)
    if not bool(broken.any()):
        return x, broken
    row = _inverse_or_one(a.abs().amax(dim=-1, keepdim=True))
    col = _inverse_or_one((row * a).abs().amax(dim=-2, keepdim=True))
    x, broken = _probed(solve, row * a * col, row * b)
    return col.mT * x, broken


def _probed(solve: Factorise, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Solve, and estimate the condition number.

    A vector with a share in every direction, as one more right-hand side, grows by about the norm of the inverse. A
    small pivot alone would not tell, and the given right-hand side may have no share in the bad direction.
    """
    n = a.shape[-1]
    probe = torch.cos(7.0 * torch.arange(1, n + 1, dtype=a.dtype, device=a.device) ** 2)
    x, broken = solve(a, torch.cat([b, probe.reshape(1, n, 1).expand(a.shape[0], n, 1)], dim=-1))
    growth = torch.linalg.vector_norm(x[..., -1], dim=-1) / torch.linalg.vector_norm(probe)
    condition = growth * torch.linalg.matrix_norm(a)
    return x[..., :-1], broken | ~(condition * 10 * torch.finfo(a.dtype).eps < 1)


def _inverse_or_one(size: Tensor) -> Tensor:
    return torch.where(size > 0, 1.0 / size, 1.0)
