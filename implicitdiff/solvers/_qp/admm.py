"""The alternating direction method of multipliers for quadratic programs, as in OSQP."""

from __future__ import annotations

import torch
from torch import Tensor

from implicitdiff.solvers._loop.problem import vecmat
from implicitdiff.solvers._qp.program import PrimalDual, QuadraticProgram, cholesky_solve, factor

# The defaults of OSQP (Stellato et al., 2020); `RHO` is a power of two near OSQP's 0.1.
_ALPHA = 1.6
"""Over-relaxation parameter."""
_SIGMA = 1e-6
"""Weight of the proximal term."""
_EQUALITIES = 1e3
"""Ratio of the weight of an equality to the weight of an inequality."""
RHO = 0.125
"""Initial weight of an inequality; ``rho`` stays a power of two."""


def admm_factor(prog: QuadraticProgram, rho: Tensor) -> Tensor:
    """Return the Cholesky factor of the linear system of every iteration."""
    return factor(prog, _penalties(prog, rho), _SIGMA, plain=False)[0]


def _penalties(prog: QuadraticProgram, rho: Tensor) -> Tensor:
    # The metric ``E^2`` makes ``rho`` the weight in the scaled program, whose rows have size 1.
    return rho[:, None] * torch.where(prog.equal, _EQUALITIES * prog.rows, prog.rows)


def admm_iteration(
    prog: QuadraticProgram, at: PrimalDual, z: Tensor, rho: Tensor, lower: Tensor
) -> tuple[PrimalDual, Tensor]:
    """Return the point after one iteration, and the new `z`; `z` is the copy of ``C x`` that satisfies the bounds.

    Algorithm 1 of OSQP, written for the step of ``x``: the residuals of the last iteration are then the right-hand
    side.
    """
    weights = _penalties(prog, rho)
    # Eliminate ``nu`` and ``z~``: ``K x~ = sigma x - c + C'(W z - y)`` with ``K = Q + sigma + C'W C``. Subtract
    # ``K x``: ``K (x~ - x) = -(slope + C'W (C x - z))``.
    x = at.x - _ALPHA * cholesky_solve(lower, at.slope + vecmat(weights * (at.image - z), prog.C))
    image = vecmat(x, prog.C.mT)
    # ``alpha C x~ + (1 - alpha) z``, in which ``x~ = at.x + (x - at.x) / alpha``.
    relaxed = image + (1.0 - _ALPHA) * (z - at.image)
    # The projection ``z = clamp(relaxed + y / w, l, u)`` and ``y + w (relaxed - z)``, written bound by bound so that
    # the multiplier of an inactive row is exactly 0.
    pressed = at.y + weights * (relaxed - prog.u)
    touches = prog.equal | (prog.above & (pressed > 0))
    y = torch.where(touches, pressed, 0.0)
    z = torch.where(touches, prog.u, relaxed + at.y / weights)
    if prog.two_sided:
        pressed = at.y + weights * (relaxed - prog.l)
        touches = prog.below & ~touches & (pressed < 0)
        y, z = torch.where(touches, pressed, y), torch.where(touches, prog.l, z)
    return PrimalDual(x, y, image, vecmat(x, prog.Q) + prog.c + vecmat(y, prog.C)), z


def balanced_rho(prog: QuadraticProgram, at: PrimalDual, z: Tensor, rho: Tensor) -> Tensor:
    """Return the ``rho`` that would balance the relative residuals if far from the present ``rho``, else the latter;
    OSQP, section 5.2."""
    # The factors of rows and gradients in the scaled program; the powers of `scale` cancel in the quotients.
    row, column = prog.rows.sqrt(), prog.columns.rsqrt()
    pull = vecmat(at.y, prog.C)
    primal = _relative(row, at.image - z, at.image, z)
    # ``at.slope - c - pull`` is ``Q x``, without another product.
    dual = _relative(column, at.slope, pull, at.slope - prog.c - pull, prog.c)
    wanted = rho * (primal / dual).sqrt().clamp(1 / 8, 8)
    # A power of two within a factor of 8 of the present value; ignore changes by less than a factor of 4, which cost a
    # factorisation.
    wanted = torch.exp2(torch.round(torch.log2(wanted))).clamp(2.0**-20, 2.0**20)
    # A quotient 0 / 0 is nan, both comparisons are false, and ``rho`` stays.
    far = (wanted >= 4 * rho) | (wanted <= rho / 4)
    return torch.where(far, wanted, rho)


def _relative(scale: Tensor, difference: Tensor, *terms: Tensor) -> Tensor:
    sizes = [(scale * t.detach()).abs().amax(dim=-1) for t in (difference, *terms)]
    return sizes[0] / torch.stack(sizes[1:]).amax(dim=0)
