"""The normal equations ``J' r = 0`` of least squares, from a residual and its Jacobian."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import implicitdiff.solvers._loop.dense as _dense
from implicitdiff.solvers._loop.newton_step import RESOLVED, NewtonStep, conjugate_directions
from implicitdiff.solvers._loop.problem import BatchedProblem, RowFunction, row_dot, row_norm, select, vecmat
from implicitdiff.solvers._loop.state import JacobianMemory


def normal_residual(memory: JacobianMemory) -> Tensor:
    """Return ``J' r`` from a memory with a residual and a Jacobian."""
    return normal_gradient(memory.jacobian, memory.residual)


def normal_size(problem: BatchedProblem, x: Tensor, memory: JacobianMemory) -> Tensor:
    """Return ``|J'J x|``: the change of ``J' r`` from 0 to ``x`` if the residual is linear."""
    # For ``r = J x - b`` the gradient is ``J'J x - J'b``; both terms are of this size at a solution.
    return row_norm(normal_gradient(memory.jacobian, vecmat(x, memory.jacobian.mT)))


def normal_gradient(jacobian: Tensor, residual: Tensor) -> Tensor:
    """Return ``J' r``."""
    product: Tensor = torch.einsum("lmn,lm->ln", jacobian, residual)
    return product


def damped(J: Tensor, r: Tensor, weights: Tensor, below: Tensor | None = None) -> Tensor:
    """Return ``argmin |J d + r|^2 + |W^(1/2) d + below|^2``, ``W`` diagonal; QR of the stacked matrix does not square
    the condition number."""
    # Both squares together are ``|[J; W^(1/2)] d + [r; below]|^2``.
    roots = torch.diag_embed(weights.sqrt())
    below = torch.zeros_like(weights) if below is None else below
    return -_dense.lstsq_dense(torch.cat([J, roots], dim=-2), torch.cat([r, below], dim=-1))


class Curvature(NamedTuple):
    """The cost to second order in the free unknowns.

    Attributes:
        gradient: the gradient; 0 for the fixed unknowns.
        hessian: the Hessian; rows and columns of the identity for the fixed unknowns.
        free: flags of the free unknowns, ``(n,)``.
    """

    gradient: Tensor
    hessian: Tensor
    free: Tensor

    @property
    def convex(self) -> Tensor:
        """True in lanes with a positive definite Hessian."""
        # A test only: a Cholesky factorisation that fails would give derivatives of nan.
        H = self.hessian.detach()
        known = torch.isfinite(H).flatten(1).all(dim=-1)
        positive: Tensor = torch.linalg.cholesky_ex(select(known, H, torch.zeros_like(H)))[1] == 0
        return known & positive

    def step(self, where: Tensor) -> Tensor:
        """Return ``-H^-1 g`` in the flagged lanes, elsewhere 0."""
        eye = torch.eye(self.free.shape[-1], dtype=self.hessian.dtype, device=self.hessian.device)
        H, g = self.hessian, self.gradient
        # Regular systems in the other lanes, so that no nan reaches the derivative.
        return -_dense.solve_dense(select(where, H, eye.expand_as(H)), select(where, g, torch.zeros_like(g)))


def curvature(x: Tensor, cost: RowFunction, free: Tensor | None = None) -> Curvature:
    """Return the cost to second order at ``x`` in the `free` unknowns, by default all."""
    grad, H = cost.curvature(x)
    if free is None:
        return Curvature(grad, H, torch.ones_like(x, dtype=torch.bool))
    # Fixed unknowns: zero gradient, and the identity in the Hessian, so that their step is 0.
    mask = free.to(x.dtype)
    return Curvature(mask * grad, mask[:, None] * H * mask[..., None] + torch.diag_embed(1.0 - mask), free)


def least_squares_newton_step(
    problem: BatchedProblem, x: Tensor, residual: Tensor, jacobian: Tensor, losses: Tensor, at: Curvature
) -> NewtonStep:
    """Return a step with the full Hessian of the cost, for points at which the curvature comes from ``r`` itself and
    the Gauss-Newton step measures no distance."""
    x, grad, H = x.detach(), at.gradient.detach(), at.hessian.detach()
    J = torch.where(at.free[:, None], jacobian.detach(), 0.0)
    # Orthonormal vectors of the Gauss-Newton Hessian ``J'J = R'R``, the columns of ``R^-1``, with ``R`` from QR of
    # ``J``: ``R`` has twice the digits of ``J'J``. The additional rows keep ``R`` regular.
    squares = J.square().sum(dim=1)
    least = torch.diag_embed((problem.eps * torch.where(squares > 0, squares, 1.0)).sqrt())
    factor = torch.linalg.qr(torch.cat([J, least], dim=-2), mode="r")[1]
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand_as(factor)
    basis = torch.linalg.solve_triangular(factor.mT, eye, upper=False)
    # ``H v`` as ``v'H``: the Hessian is symmetric.
    step, gain = conjugate_directions(
        x, grad, lambda v: vecmat(v, H), x.shape[-1], eps=problem.eps, basis=torch.where(at.free[:, None], basis, 0.0)
    )
    # The entries of ``H`` are rounded, so a curvature has an error of ``eps |p|'|H| |p|``.
    way = step.down.abs()
    bends_down = step.bends_down | (step.curvature < -RESOLVED * problem.eps * row_dot(way, vecmat(way, H.abs())))
    value, noise = losses.detach().sum(dim=-1), rounding_of_cost(problem, x, residual, jacobian, losses)
    counts = gain > problem.eps ** (2 / 3) * value + problem.eps ** (1 / 6) * noise
    return step._replace(
        promises=gain > 8.0 * problem.eps * value, counts=counts, units=units_of(J), bends_down=bends_down
    )


def half_squares(r: Tensor) -> Tensor:
    """Return the terms ``r_i^2 / 2`` of the cost without a loss."""
    return 0.5 * r.square()


def rounding_of_cost(problem: BatchedProblem, x: Tensor, r: Tensor, J: Tensor, losses: Tensor) -> Tensor:
    """Return the rounding of the cost; a residual counts as a difference of terms as large as ``|J| |x|``."""
    r, J = r.detach().abs(), J.detach().abs()
    terms = vecmat(x.detach().abs(), J.mT)
    # First-order error of ``sum r_i^2 / 2``: eps for each square and ``eps |J| |x|`` for each residual; then the second
    # order.
    return problem.eps * (
        2 * losses.detach().sum(dim=-1) + row_dot(r, terms) + problem.eps * (r + terms).square().sum(dim=-1)
    )


def units_of(jacobian: Tensor) -> Tensor:
    """Return the norms of the columns of ``J``: in these units a step of an unknown counts by its effect on ``r``."""
    squares: Tensor = jacobian.detach().square().sum(dim=1)
    return squares.sqrt()
