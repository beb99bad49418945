"""Linear systems with a dense matrix, differentiable under every transform.

torch's own solves have wrong derivatives under nested forward mode (pytorch #196695, #192540), and under vmap of
forward mode. So the solution is an implicit primitive with a derivative of its own.
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
    """Return ``A^-1 b`` for rows ``b``, shape ``(lanes, n)``; entries are nan in lanes with a singular ``A``."""
    return solve_problem(_Square(), [a, b[..., None]])[0][..., 0]


def invert_dense(a: Tensor) -> Tensor:
    """Return ``A^-1``; entries are nan in lanes with a singular ``A``."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return solve_problem(_Square(), [a, eye.expand_as(a)])[0]


def lstsq_dense(a: Tensor, b: Tensor) -> Tensor:
    """Return the least-squares solutions of ``A x = b``; ``A`` has full column rank and at least as many rows as
    columns."""
    return solve_problem(_LeastSquares(), [a, b[..., None]])[0][..., 0]


def sorted_rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of ``A`` and ``b`` by size, the largest first, in units with columns of equal size.

    In another order QR loses the digits of rows that are far smaller than others (Higham, "Accuracy and Stability of
    Numerical Algorithms", 2nd ed., section 20.4).
    """
    sizes = a.detach().abs()
    units = sizes.amax(dim=-2, keepdim=True)
    order = (sizes / torch.where(units > 0, units, 1.0)).amax(dim=-1).argsort(dim=-1, descending=True)
    return torch.take_along_dim(a, order[..., None], dim=-2), torch.take_along_dim(b, order, dim=-1)


@dataclass(frozen=True)
class _Square(Problem):
    """The linear system ``A X - B = 0`` with a square matrix."""

    def residual(self, x: Leaves, theta: Leaves) -> Leaves:
        a, b = theta
        return [a @ x[0] - b]

    def primal(self, theta: Leaves) -> Leaves:
        a, b = theta
        # `torch.linalg.solve` would raise for all lanes because of a single singular matrix.
        x, info = torch.linalg.solve_ex(a, b)
        return [torch.where((info != 0)[..., None, None], torch.nan, x)]

    def solve(self, x: Leaves, theta: Leaves, b: Leaves, *, adjoint: bool) -> Leaves:
        a = theta[0]
        # Solve by the primitive again, so that derivatives of any order exist.
        return solve_problem(self, [a.mT if adjoint else a, b[0]])

    def batched(self, dims: Dims, size: int) -> tuple[Problem, Dims, int]:
        # A vmap is one more dimension in front, and torch.linalg takes any number of these.
        return self, (-1,) * len(dims), 0

    def pullback(self, x: Leaves, theta: Leaves, u: Leaves, wanted: Sequence[int]) -> dict[int, Tensor]:
        # Cotangents of ``A`` and ``B`` in ``u'(A X - B)``.
        grads = {0: lambda: u[0] @ x[0].mT, 1: lambda: -u[0]}
        return {i: grads[i]() for i in wanted}


@dataclass(frozen=True)
class _LeastSquares(_Square):
    """The normal equations ``A'(A X - B) = 0`` of a least-squares problem."""

    def residual(self, x: Leaves, theta: Leaves) -> Leaves:
        a, b = theta
        return [a.mT @ (a @ x[0] - b)]

    def primal(self, theta: Leaves) -> Leaves:
        a, b = theta
        # QR with the orthogonal factor applied as reflections, never formed as a matrix.
        factors, tau = torch.geqrf(a)
        n = a.shape[-1]
        # ``R x`` is the first n rows of ``Q' b``; no ``x`` changes the other rows, the residual.
        rhs = torch.ormqr(factors, tau, b, transpose=True)[..., :n, :]
        return [torch.linalg.solve_triangular(factors[..., :n, :].triu(), rhs, upper=True)]

    def solve(self, x: Leaves, theta: Leaves, b: Leaves, *, adjoint: bool) -> Leaves:
        a = theta[0]
        with full_precision():
            # Derivative of the residual in ``X``: ``A'A``, outside of autocast, whose half precision is too coarse for
            # the product.
            # ``A'A`` is symmetric, so `adjoint` makes no difference. The squared condition number concerns
            # derivatives alone, since the solution comes from QR.
            return solve_problem(_Square(), [a.mT @ a, b[0]])

    def pullback(self, x: Leaves, theta: Leaves, u: Leaves, wanted: Sequence[int]) -> dict[int, Tensor]:
        return Problem.pullback(self, x, theta, u, wanted)
