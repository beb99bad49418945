"""The normal equations of least squares, ``J' r = 0``, from a residual and its Jacobian."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from implicitdiff.solvers._rows import Rows, dot, norm, times


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


def rounding_of_cost(rows: Rows, x: Tensor, r: Tensor, J: Tensor, losses: Tensor) -> Tensor:
    """The rounding of the cost: a residual is a difference of terms as large as ``|J| |x|``."""
    r, J = r.detach().abs(), J.detach().abs()
    terms = times(x.detach().abs(), J.mT)
    return rows.eps * (2 * losses.detach().sum(dim=-1) + dot(r, terms) + rows.eps * (r + terms).square().sum(dim=-1))
