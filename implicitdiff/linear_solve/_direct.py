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

    def algorithm(system: System) -> Tensor:
        system = system.shifted(ridge)
        return settle(name, materialised(system, factorise, broken), system, on_failure)

    return LinearSolver(name, algorithm)


def materialised(system: System, factorise: Factorise, broken: str) -> Outcome:
    """Solve with the matrix of every lane."""
    a = system.materialise()
    lanes, n, _ = a.shape
    b = system.b.reshape(lanes, -1, n).mT
    finite = torch.isfinite(a).all(dim=(-2, -1), keepdim=True)
    a = torch.where(finite, a, torch.eye(n, dtype=a.dtype, device=a.device))
    x, singular = factorise(a, b)
    bad = (singular | ~finite[:, 0, 0])[:, None] | ~torch.isfinite(x).all(dim=-2)
    x = torch.where(finite, x, torch.nan)
    residual = torch.linalg.vector_norm(b - a @ x, dim=-2)
    target = torch.finfo(a.dtype).eps * torch.linalg.vector_norm(b, dim=-2)
    return Outcome(x.mT.reshape(-1, n), bad.reshape(-1), broken, residual.reshape(-1), target.reshape(-1), 0)


def equilibrated(solve: Factorise, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Solve after scaling rows and columns to largest entry 1, and call a lane broken if it is singular to working
    precision.

    The condition of the scaled matrix is estimated from one more right-hand side: a vector with a share in every
    direction grows by about the norm of the inverse. A small pivot alone would not tell, and the given right-hand
    side may have no share in the bad direction.
    """
    n = a.shape[-1]
    row = _inverse_or_one(a.abs().amax(dim=-1, keepdim=True))
    col = _inverse_or_one((row * a).abs().amax(dim=-2, keepdim=True))
    scaled = row * a * col
    probe = (
        torch.cos(7.0 * torch.arange(1, n + 1, dtype=a.dtype, device=a.device) ** 2)
        .reshape(1, n, 1)
        .expand(a.shape[0], n, 1)
    )
    x, broken = solve(scaled, torch.cat([row * b, probe], dim=-1))
    growth = torch.linalg.vector_norm(x[..., -1], dim=-1) / torch.linalg.vector_norm(probe[..., 0], dim=-1)
    size = torch.linalg.matrix_norm(scaled)
    return col.mT * x[..., :-1], broken | ~(growth * size * 10 * torch.finfo(a.dtype).eps < 1)


def _inverse_or_one(size: Tensor) -> Tensor:
    return torch.where(size > 0, 1.0 / size, 1.0)


def factorised(solve: Factorise) -> Factorise:
    return partial(equilibrated, solve)
