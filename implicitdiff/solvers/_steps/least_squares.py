"""The normal equations of least squares, ``J' r = 0``, from a residual and its Jacobian."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import implicitdiff.solvers._loop.dense as _dense
from implicitdiff.solvers._loop.newton_step import MAX_PRODUCTS, NewtonStep, truncated_cg
from implicitdiff.solvers._loop.problem import BatchedProblem, RowFunction, row_dot, row_norm, select, vecmat


def normal_residual(memory: Any) -> Tensor:
    """``J' r``, from a memory with a residual and a Jacobian."""
    return normal_gradient(memory.jacobian, memory.residual)


def normal_size(problem: BatchedProblem, x: Tensor, memory: Any) -> Tensor:
    """``|J'J x|``: how much ``J' r`` changes from zero to here, if the residual is linear."""
    return row_norm(normal_gradient(memory.jacobian, vecmat(x, memory.jacobian.mT)))


def normal_gradient(jacobian: Tensor, residual: Tensor) -> Tensor:
    """``J' r``."""
    product: Tensor = torch.einsum("lmn,lm->ln", jacobian, residual)
    return product


def damped(J: Tensor, r: Tensor, weights: Tensor, below: Tensor | None = None) -> Tensor:
    """``argmin |J d + r|^2 + |W^(1/2) d + below|^2``, ``W`` diagonal, by QR, which does not square the condition
    number."""
    roots = torch.diag_embed(weights.sqrt())
    below = torch.zeros_like(weights) if below is None else below
    return -_dense.lstsq_dense(torch.cat([J, roots], dim=-2), torch.cat([r, below], dim=-1))


class Curvature(NamedTuple):
    """The cost to second order, for some unknowns.

    Attributes:
        gradient: 0 for the other unknowns.
        hessian: its derivative, the identity for the other unknowns.
        free: those unknowns, ``(n,)``.
    """

    gradient: Tensor
    hessian: Tensor
    free: Tensor

    @property
    def convex(self) -> Tensor:
        """Whether the Hessian is positive definite."""
        H = self.hessian.detach()
        known = torch.isfinite(H).flatten(1).all(dim=-1)
        positive: Tensor = torch.linalg.cholesky_ex(select(known, H, torch.zeros_like(H)))[1] == 0
        return known & positive

    def step(self, where: Tensor) -> Tensor:
        """``-H^-1 g`` in the lanes `where` the Hessian is positive definite, elsewhere 0."""
        eye = torch.eye(self.free.shape[-1], dtype=self.hessian.dtype, device=self.hessian.device)
        H, g = self.hessian, self.gradient
        return -_dense.solve_dense(select(where, H, eye.expand_as(H)), select(where, g, torch.zeros_like(g)))


def curvature(x: Tensor, cost: RowFunction, free: Tensor | None = None) -> Curvature:
    """The cost to second order at ``x`` for the unknowns that are `free`, all by default."""
    grad, H = cost.curvature(x)
    if free is None:
        return Curvature(grad, H, torch.ones_like(x, dtype=torch.bool))
    mask = free.to(x.dtype)
    return Curvature(mask * grad, mask[:, None] * H * mask[..., None] + torch.diag_embed(1.0 - mask), free)


def least_squares_newton_step(
    problem: BatchedProblem, x: Tensor, residual: Tensor, jacobian: Tensor, losses: Tensor, at: Curvature
) -> NewtonStep:
    """A step with the whole Hessian of the cost, where that of Gauss and Newton tells nothing, as the curvature comes
    from ``r`` itself."""
    x, grad, H = x.detach(), at.gradient.detach(), at.hessian.detach()
    J = torch.where(at.free[:, None], jacobian.detach(), 0.0)
    # That of Gauss and Newton has more digits in its factor than in itself.
    squares = J.square().sum(dim=1)
    least = torch.diag_embed((problem.eps * torch.where(squares > 0, squares, 1.0)).sqrt())
    factor = torch.linalg.qr(torch.cat([J, least], dim=-2), mode="r")[1]

    def precondition(v: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(factor.mT, v[..., None], upper=False)
        whole: Tensor = torch.linalg.solve_triangular(factor, half, upper=True)
        return torch.where(at.free, whole[..., 0], 0.0)

    products = min(2 * x.shape[-1], MAX_PRODUCTS)
    step, gain = truncated_cg(x, grad, lambda v: vecmat(v, H), precondition, products, eps=problem.eps)
    value, noise = losses.detach().sum(dim=-1), rounding_of_cost(problem, x, residual, jacobian, losses)
    counts = gain > problem.eps ** (2 / 3) * value + problem.eps ** (1 / 6) * noise
    return step._replace(promises=gain > 8.0 * problem.eps * value, counts=counts, units=units_of(J))


def half_squares(r: Tensor) -> Tensor:
    """The terms of the cost without a loss."""
    return 0.5 * r.square()


def rounding_of_cost(problem: BatchedProblem, x: Tensor, r: Tensor, J: Tensor, losses: Tensor) -> Tensor:
    """The rounding of the cost: a residual is a difference of terms as large as ``|J| |x|``."""
    r, J = r.detach().abs(), J.detach().abs()
    terms = vecmat(x.detach().abs(), J.mT)
    return problem.eps * (
        2 * losses.detach().sum(dim=-1) + row_dot(r, terms) + problem.eps * (r + terms).square().sum(dim=-1)
    )


def units_of(jacobian: Tensor) -> Tensor:
    """The norms of the columns, in which steps are measured: a change of an unknown counts by what it does to ``r``."""
    squares: Tensor = jacobian.detach().square().sum(dim=1)
    return squares.sqrt()
