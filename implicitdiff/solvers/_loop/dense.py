"""Linear systems with a matrix at hand, differentiable under every transform.

torch's own solves are wrong under nested forward mode (pytorch #196695, #192540), and under vmap of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitdiff._implicit.operators import Dims
from implicitdiff._implicit.primitive import Problem, solve_problem
from implicitdiff._torch.settings import full_precision
from implicitdiff._torch.trees import Leaves


def solve_dense(a: Tensor, b: Tensor) -> Tensor:
    """``A^-1 b`` for rows ``b`` of shape ``(lanes, n)``; not finite in the lanes where ``A`` is singular."""
    return solve_problem(_Square(), [a, b[..., None]])[0][..., 0]


def invert_dense(a: Tensor) -> Tensor:
    """``A^-1``, as `solve_dense` would give it."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return solve_problem(_Square(), [a, eye.expand_as(a)])[0]


def lstsq_dense(a: Tensor, b: Tensor) -> Tensor:
    """The least-squares solutions of ``A x = b``, ``A`` of full column rank and at least as many rows."""
    return solve_problem(_LeastSquares(), [a, b[..., None]])[0][..., 0]


@dataclass(frozen=True)
class _Square(Problem):
    """``A X - B = 0``."""

    def residual(self, x: Leaves, theta: Leaves) -> Leaves:
        a, b = theta
        return [a @ x[0] - b]

    def primal(self, theta: Leaves) -> Leaves:
        a, b = theta
        x, info = torch.linalg.solve_ex(a, b)
        return [torch.where((info != 0)[..., None, None], torch.nan, x)]

    def solve(self, x: Leaves, theta: Leaves, b: Leaves, *, adjoint: bool) -> Leaves:
        a = theta[0]
        return solve_problem(self, [a.mT if adjoint else a, b[0]])

    def batched(self, dims: Dims, size: int) -> tuple[Problem, Dims, int]:
        return self, (-1,) * len(dims), 0

    def pullback(self, x: Leaves, theta: Leaves, u: Leaves, wanted: Sequence[int]) -> dict[int, Tensor]:
        grads = {0: lambda: u[0] @ x[0].mT, 1: lambda: -u[0]}
        return {i: grads[i]() for i in wanted}


@dataclass(frozen=True)
class _LeastSquares(_Square):
    """``A'(A X - B) = 0``."""

    def residual(self, x: Leaves, theta: Leaves) -> Leaves:
        a, b = theta
        return [a.mT @ (a @ x[0] - b)]

    def primal(self, theta: Leaves) -> Leaves:
        a, b = theta
        # The orthogonal factor is applied and never formed.
        factors, tau = torch.geqrf(a)
        n = a.shape[-1]
        rhs = torch.ormqr(factors, tau, b, transpose=True)[..., :n, :]
        return [torch.linalg.solve_triangular(factors[..., :n, :].triu(), rhs, upper=True)]

    def solve(self, x: Leaves, theta: Leaves, b: Leaves, *, adjoint: bool) -> Leaves:
        a = theta[0]
        with full_precision():
            return solve_problem(_Square(), [a.mT @ a, b[0]])

    def pullback(self, x: Leaves, theta: Leaves, u: Leaves, wanted: Sequence[int]) -> dict[int, Tensor]:
        return Problem.pullback(self, x, theta, u, wanted)
