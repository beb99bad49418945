"""The normal equations of least squares, ``J' r = 0``, from a residual and its Jacobian."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import implicitdiff.solvers._dense as _dense
from implicitdiff.solvers._newton_step import NewtonStep, conjugate_gradients
from implicitdiff.solvers._rows import RowFunction, Rows, dot, norm, times


def normal_residual(memory: Any) -> Tensor:
    """``J' r``, from a memory with a residual and a Jacobian."""
    return gradient(memory.jacobian, memory.residual)


def normal_size(rows: Rows, x: Tensor, memory: Any) -> Tensor:
    """``|J'J x|``: how much ``J' r`` changes from zero to here, if the residual is linear."""
    return norm(gradient(memory.jacobian, times(x, memory.jacobian.mT)))


def gradient(jacobian: Tensor, residual: Tensor) -> Tensor:
    """``J' r``."""
    product: Tensor = torch.einsum("lmn,lm->ln", jacobian, residual)
    return product


def damped(J: Tensor, r: Tensor, weights: Tensor, below: Tensor | None = None) -> Tensor:
    """``argmin |J d + r|^2 + |W^(1/2) d + below|^2``, ``W`` diagonal, by QR, which does not square the condition
    number."""
    roots = torch.diag_embed(weights.sqrt())
    below = torch.zeros_like(weights) if below is None else below
    return -_dense.lstsq(torch.cat([J, roots], dim=-2), torch.cat([r, below], dim=-1))


def newton_step(
    rows: Rows,
    x: Tensor,
    residual: Tensor,
    jacobian: Tensor,
    losses: Tensor,
    cost: RowFunction,
    free: Tensor | None = None,
) -> NewtonStep:
    """A step with the whole Hessian of the cost, where that of Gauss and Newton tells nothing, as the curvature comes
    from ``r`` itself; of the unknowns that are `free` alone."""
    _, grad, product = cost.hessian(x)
    mask = torch.ones_like(x) if free is None else free.to(x.dtype)
    J = mask[:, None] * jacobian.detach()
    squares = J.square().sum(dim=1)
    least = torch.diag_embed((rows.eps * torch.where(squares > 0, squares, 1.0)).sqrt())
    factor = torch.linalg.qr(torch.cat([J, least], dim=-2), mode="r")[1]

    def precondition(v: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(factor.mT, v[..., None], upper=False)
        whole: Tensor = torch.linalg.solve_triangular(factor, half, upper=True)
        return mask * whole[..., 0]

    products = min(2 * x.shape[-1], _PRODUCTS)
    step, gain = conjugate_gradients(x, mask * grad, lambda v: mask * product(v), precondition, products, eps=rows.eps)
    noise = rounding_of_cost(rows, x, residual, jacobian, losses)
    least = rows.eps ** (2 / 3) * losses.detach().sum(dim=-1)
    counts = gain > least + rows.eps ** (1 / 6) * noise
    return step._replace(promises=gain > least, counts=counts, units=units_of(J))


_PRODUCTS = 60
"""The most products with the Hessian that are made to see how far the solution is."""


def half_squares(r: Tensor) -> Tensor:
    """The terms of the cost without a loss."""
    return 0.5 * r.square()


def rounding_of_cost(rows: Rows, x: Tensor, r: Tensor, J: Tensor, losses: Tensor) -> Tensor:
    """The rounding of the cost: a residual is a difference of terms as large as ``|J| |x|``."""
    r, J = r.detach().abs(), J.detach().abs()
    terms = times(x.detach().abs(), J.mT)
    return rows.eps * (2 * losses.detach().sum(dim=-1) + dot(r, terms) + rows.eps * (r + terms).square().sum(dim=-1))


def units_of(jacobian: Tensor) -> Tensor:
    """The norms of the columns, in which steps are measured: a change of an unknown counts by what it does to ``r``."""
    squares: Tensor = jacobian.detach().square().sum(dim=1)
    return squares.sqrt()
