"""Linear systems of the derivatives of quadratic programs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from implicitdiff._implicit.linear import LinearSolver
from implicitdiff._implicit.linear_problem import LinearProblem
from implicitdiff._implicit.system import System
from implicitdiff._torch.trees import Leaves
from implicitdiff.linear_solve._direct import factorised, inverse_or_one, materialised
from implicitdiff.linear_solve._outcome import OnFailure, report_failed_solves
from implicitdiff.linear_solve.auto import solve_auto
from implicitdiff.linear_solve.lu import lu

_MAX_DENSE = 4000
"""Largest number of unknowns with a dense matrix."""
_NO_DERIVATIVE = (
    "the active constraints and the curvature do not determine the derivative: the minimiser is not unique, or a "
    "cotangent asks for multipliers that are not unique, or the constraints contradict each other along a tangent; "
    "for a derivative of least norm use qp(solve=solve_lstsq())"
)


def solve_kkt(on_failure: OnFailure) -> LinearSolver:
    """Make the default ``solve`` of `qp`: `solve_auto`, dense up to 4000 rows, extended to singular systems with a
    determined solution.

    Linearly dependent constraints make the matrix ``M`` of the KKT conditions singular: its null space holds
    multipliers that cancel. A system ``M v = r`` is solved if ``r`` is in the range of ``M`` and the null space of
    ``M`` has no primal part. Then the primal part of ``v`` is unique, and the multipliers are those of least norm. The
    range of the adjoint holds the cotangents of all unique quantities, so reverse mode refuses a cotangent of any other
    quantity.
    """
    solve = partial(_solve_kkt_system, unknowns=0, on_failure=on_failure)
    return LinearSolver("solve_auto", solve, problem_type=KKTProblem)


@dataclass(frozen=True)
class KKTProblem(LinearProblem):
    """A linear system whose first leaf is the primal."""

    def primal(self, theta: Leaves) -> Leaves:
        """Solve, with the number of primal unknowns passed to the algorithm."""
        assert isinstance(self.solver, LinearSolver)
        # The first leaf holds the primal of every lane and column: divide by their number.
        batch = math.prod(theta[0].shape[: len(self.lanes) + len(self.columns)])
        algorithm: Any = partial(self.solver.algorithm, unknowns=theta[0].numel() // max(1, batch))  # type: ignore[call-arg]
        return LinearProblem.primal(replace(self, solver=replace(self.solver, algorithm=algorithm)), theta)


def _solve_kkt_system(system: System, *, unknowns: int, on_failure: OnFailure) -> Tensor:
    """Solve by LU or least norm; by GMRES beyond the size for dense matrices."""
    n = system.b.shape[-1]
    # ``2^27`` numbers are 1 GiB in float64.
    if n > _MAX_DENSE or system.lanes * n * n > 2**27:
        return solve_auto(dense_up_to=0, on_failure=on_failure).algorithm(system)
    outcome = materialised(system, partial(_lu_or_least_norm, unknowns), _NO_DERIVATIVE)
    if system.is_adjoint and on_failure == "ignore" and outcome.has_failed:
        # A lane that is infeasible, or has several minimisers, can be masked: a cotangent of 0 leads to 0, not nan.
        outcome = outcome._replace(x=torch.where((system.b == 0).all(dim=-1, keepdim=True), 0.0, outcome.x))
    return report_failed_solves("solve_auto (LU)", outcome, system, on_failure)


def _lu_or_least_norm(unknowns: int, a: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Solve by LU, and lanes with a singular matrix by least norm."""
    x, broken = factorised(lu)(a, b, eps)
    # The decomposition raises for a matrix that is not finite.
    lanes = (broken & torch.isfinite(a).all(dim=(-2, -1))).nonzero()[:, 0]
    if not lanes.numel():
        return x, broken
    # Only the broken lanes: a singular value decomposition costs many times an LU factorisation.
    least, undetermined = _least_norm(unknowns, a[lanes], b[lanes], eps)
    return x.index_copy(0, lanes, least), broken.index_copy(0, lanes, undetermined)


def _least_norm(unknowns: int, a: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the solutions of least norm, and flags of systems without a solution or with an undetermined primal.

    The first `unknowns` entries are the primal. Rows and columns are scaled to largest entry 1, so that the rank does
    not depend on units.
    """
    # ``a`` is ``(lanes, n, n)`` and ``b`` is ``(lanes, n, columns)``.
    row = inverse_or_one(a.abs().amax(dim=-1, keepdim=True))
    column = inverse_or_one((row * a).abs().amax(dim=-2, keepdim=True))
    left, s, right = torch.linalg.svd(row * a * column)
    null = s <= eps**0.75 * s[:, :1]
    # With diagonal ``R`` and ``K``: ``R A K = U S V'``, so ``x = K V S^+ U'R b``.
    inside = left.mT @ (row * b)
    x = right.mT @ (torch.where(null, 0.0, 1.0 / torch.where(null, 1.0, s))[..., None] * inside)
    outside = torch.where(null[..., None], inside, 0.0)
    sizes = torch.linalg.vector_norm(torch.stack([outside, inside]), dim=-2)
    # The rows of `right` with a singular value 0 span the null space; their first entries are the primal part.
    free = torch.where(null[..., None], right, 0.0)[..., :unknowns].abs().amax(dim=(-2, -1))
    # No solution: ``b`` has a part outside of the range. Undetermined: the null space has a primal part.
    undetermined = (sizes[0] > eps**0.5 * sizes[1]).any(dim=-1) | (free > eps**0.5)
    # Null space in the original units; other columns are zero. The least norm must refer to these units, not to the
    # scaled ones, so project the null space out.
    basis = column.mT * torch.where(null[:, None], right.mT, 0.0)
    return column.mT * x - _projected(basis, column.mT * x), undetermined


def _projected(basis: Tensor, x: Tensor) -> Tensor:
    """Project vectors onto the span of the nonzero columns of `basis`."""
    nearest: Tensor = basis @ (torch.linalg.pinv(basis) @ x)
    return nearest
