"""The alternating direction method of multipliers for quadratic programs, as OSQP has it."""

from __future__ import annotations

import torch
from torch import Tensor

from implicitdiff.solvers._loop.problem import vecmat
from implicitdiff.solvers._qp.program import PrimalDual, QuadraticProgram, cholesky_solve, factor

_ALPHA = 1.6
"""Over-relaxation."""
_SIGMA = 1e-6
"""The proximal term."""
_EQUALITIES = 1e3
"""How much more weight an equality has than an inequality."""
RHO = 0.125
"""The weight of an inequality, at first; powers of two throughout."""


def admm_factor(of: QuadraticProgram, rho: Tensor) -> Tensor:
    """What an iteration solves with."""
    return factor(of, _penalties(of, rho), _SIGMA, plain=False)[0]


def _penalties(of: QuadraticProgram, rho: Tensor) -> Tensor:
    return rho[:, None] * torch.where(of.equal, _EQUALITIES * of.rows, of.rows)


def admm_iteration(
    of: QuadraticProgram, at: PrimalDual, z: Tensor, rho: Tensor, lower: Tensor
) -> tuple[PrimalDual, Tensor]:
    """One iteration; `z` are values in the place of ``C x`` that satisfy the constraints.

    Algorithm 1, written with the step of x, so that the residuals of the last iteration are its right-hand side.
    """
    weights = _penalties(of, rho)
    x = at.x - _ALPHA * cholesky_solve(lower, at.slope + vecmat(weights * (at.image - z), of.C))
    image = vecmat(x, of.C.mT)
    relaxed = image + (1.0 - _ALPHA) * (z - at.image)
    pressed = at.y + weights * (relaxed - of.u)
    touches = of.equal | (of.above & (pressed > 0))
    y = torch.where(touches, pressed, 0.0)
    z = torch.where(touches, of.u, relaxed + at.y / weights)
    if of.two_sided:
        pressed = at.y + weights * (relaxed - of.l)
        touches = of.below & ~touches & (pressed < 0)
        y, z = torch.where(touches, pressed, y), torch.where(touches, of.l, z)
    return PrimalDual(x, y, image, vecmat(x, of.Q) + of.c + vecmat(y, of.C)), z


def balanced_rho(of: QuadraticProgram, at: PrimalDual, z: Tensor, rho: Tensor) -> Tensor:
    """The ``rho`` that would make the relative residuals equal, if it is another by far; section 5.2."""
    row, column = of.rows.sqrt(), of.columns.rsqrt()
    pull = vecmat(at.y, of.C)
    primal = _relative(row, at.image - z, at.image, z)
    dual = _relative(column, at.slope, pull, at.slope - of.c - pull, of.c)
    wanted = rho * (primal / dual).sqrt().clamp(1 / 8, 8)
    wanted = torch.exp2(torch.round(torch.log2(wanted))).clamp(2.0**-20, 2.0**20)
    far = (wanted >= 4 * rho) | (wanted <= rho / 4)
    return torch.where(far, wanted, rho)


def _relative(scale: Tensor, difference: Tensor, *terms: Tensor) -> Tensor:
    sizes = [(scale * t.detach()).abs().amax(dim=-1) for t in (difference, *terms)]
    return sizes[0] / torch.stack(sizes[1:]).amax(dim=0)
