"""The table of linear solvers: a new one is one row."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from checks.tensors import draw
from torch import Tensor

from implicitdiff.linear_solve import (
    LinearSolver,
    solve_auto,
    solve_bicgstab,
    solve_cg,
    solve_cholesky,
    solve_gmres,
    solve_inv,
    solve_lstsq,
    solve_lu,
    solve_normal_cg,
)

F32, F64, C64, C128 = torch.float32, torch.float64, torch.complex64, torch.complex128

# --- the table of solvers, and the matrices they are for ------------------------------------------------------------

CONDITION = 10.0
"""Of every matrix of a family."""


def unitary(seed: int, n: int, dtype: torch.dtype) -> Tensor:
    return torch.linalg.qr(draw(seed, n, n, dtype=dtype))[0]


def with_singular_values(values: Tensor, dtype: torch.dtype = F64, seed: int = 1) -> Tensor:
    n = len(values)
    return unitary(seed, n, dtype) @ (values.to(dtype)[:, None] * unitary(seed + 1, n, dtype))


def with_eigenvalues(values: Tensor, dtype: torch.dtype = F64, seed: int = 1) -> Tensor:
    """Hermitian."""
    q = unitary(seed, len(values), dtype)
    return q @ (values.to(dtype)[:, None] * q.mH)


def spread(n: int) -> Tensor:
    return torch.linspace(1.0, CONDITION, n, dtype=F64) if n > 1 else torch.tensor([3.0], dtype=F64)


def definite(n: int, dtype: torch.dtype = F64) -> Tensor:
    return with_eigenvalues(spread(n), dtype)


def indefinite(n: int, dtype: torch.dtype = F64) -> Tensor:
    return with_eigenvalues(spread(n) * (-1) ** torch.arange(n), dtype)


def tame(n: int, dtype: torch.dtype = F64) -> Tensor:
    """Not symmetric, with its field of values in the right half plane."""
    return 2 * torch.eye(n, dtype=dtype) + unitary(1, n, dtype)


def general(n: int, dtype: torch.dtype = F64) -> Tensor:
    """Not symmetric, with eigenvalues all around zero."""
    return with_singular_values(spread(n), dtype)


def contraction(n: int, dtype: torch.dtype = F64) -> Tensor:
    """``I - A`` has norm 1/2."""
    return torch.eye(n, dtype=dtype) - 0.5 * with_singular_values(spread(n) / spread(n).max(), dtype)


FAMILIES = {
    "definite": definite,
    "indefinite": indefinite,
    "tame": tame,
    "general": general,
    "contraction": contraction,
}


class Row(NamedTuple):
    name: str
    factory: Callable[..., LinearSolver]
    families: tuple[str, ...]
    iterative: bool

    def __str__(self) -> str:
        return self.name

    def matrix(self, n: int, dtype: torch.dtype = F64) -> Tensor:
        """Of the widest family that the solver is for."""
        return FAMILIES[self.families[-1]](n, dtype)


ALL = ("definite", "indefinite", "tame", "general")
SOLVERS = [
    Row("cg", solve_cg, ("definite",), iterative=True),
    Row("gmres", solve_gmres, ALL, iterative=True),
    Row("bicgstab", solve_bicgstab, ALL[:3], iterative=True),
    Row("normal_cg", solve_normal_cg, ALL, iterative=True),
    Row("neumann", functools.partial(solve_inv, ns=True), ("contraction",), iterative=True),
    Row("inv", solve_inv, ALL, iterative=False),
    Row("lu", solve_lu, ALL, iterative=False),
    Row("cholesky", solve_cholesky, ("definite",), iterative=False),
    Row("lstsq", solve_lstsq, ALL, iterative=False),
    Row("auto", solve_auto, ALL, iterative=False),
    Row("auto, matrix-free", functools.partial(solve_auto, dense_up_to=0), ALL, iterative=True),
]


def accepts(row: Row, *options: str) -> bool:
    return all(option in inspect.signature(row.factory).parameters for option in options)
