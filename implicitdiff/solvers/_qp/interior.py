"""A primal-dual interior-point method that brings a quadratic program near its solution from any point."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from implicitdiff.solvers._loop.problem import any_lane, largest_entry, row_dot, vecmat
from implicitdiff.solvers._qp.program import QuadraticProgram, cholesky_solve, clamp_to_bounds, factor, scaled

_MAX_STEPS = 60
"""Bound on the number of steps."""
_STEP_FRACTION = 0.99
"""Largest fraction of the distance to the boundary for a step."""


class _Iterate(NamedTuple):
    """The iterate: ``x``, the multipliers ``y`` of the equalities, and the slacks ``s`` and multipliers ``z`` of the
    inequalities' upper and lower bounds, ``(2, lanes, rows)``."""

    x: Tensor
    y: Tensor
    s: Tensor
    z: Tensor


class _InteriorProblem(NamedTuple):
    """The scaled program with its bounds.

    Attributes:
        prog: the scaled program.
        bounds: 1 for each bound of an inequality, else 0, ``(2, lanes, rows)``; upper bounds first.
        total: the number of bounds, ``(lanes,)``.
        delta: the weight of the proximal terms.
    """

    prog: QuadraticProgram
    bounds: Tensor
    total: Tensor
    delta: float


def interior_point(prog: QuadraticProgram, eps: float) -> tuple[Tensor, Tensor]:
    """Return a point near a solution, detached; multipliers smaller than their slacks are set to zero.

    Mehrotra's predictor-corrector method with a slack for each bound. Equalities and unknowns have proximal terms, as
    in PIQP, so that redundant rows do no harm. A step costs one Cholesky factorisation.

    Mehrotra, "On the implementation of a primal-dual interior point method", SIAM J. Optim. 2 (1992); Schwan et al.,
    "PIQP: a proximal interior-point quadratic programming solver", CDC 2023.
    """
    prog = prog.detach()
    # The method runs in the scaled program, whose entries are comparable.
    within, per_column, per_row = scaled(prog)
    bounds = torch.stack([prog.above & ~prog.equal, prog.below & ~prog.equal]).to(prog.c.dtype)
    # ``eps^(5/8)``, 1.6e-10 in float64, for both the proximal terms and the accuracy.
    problem = _InteriorProblem(within, bounds, bounds.sum(dim=(0, -1)).clamp(min=1), eps**0.625)
    at = _first_iterate(problem)
    best, least = at, torch.full_like(problem.total, torch.inf)
    running = torch.ones_like(problem.total, dtype=torch.bool)
    for _ in range(_MAX_STEPS):
        error, residuals = _relative_error(problem, at)
        better = error < least
        best = _Iterate(*(_select(better, new, old) for new, old in zip(at, best, strict=True)))
        least = torch.where(better, error, least)
        # Stop at the accuracy that the later polishing needs, or after divergence from the best iterate.
        running = running & (error > eps**0.625) & (error < 1e6 * least)
        if not any_lane(running):
            break
        new = _predictor_corrector(problem, at, residuals)
        at = _Iterate(*(_select(running, t, old) for t, old in zip(new, at, strict=True)))
    # Strict complementarity: of a slack and its multiplier the larger is taken as nonzero.
    pressed = torch.where(best.z > best.s, best.z, 0.0)
    # A row has the multiplier of its upper bound minus the multiplier of its lower bound.
    return per_column * best.x, per_row * (best.y + pressed[0] - pressed[1])


def _select(lanes: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(lanes[:, None], new, old)


def _first_iterate(problem: _InteriorProblem) -> _Iterate:
    """Return Mehrotra's starting point: the minimum of the objective plus the squared violation of all bounds as
    equalities, with slacks and multipliers shifted to positive values."""
    prog, bounds = problem.prog, problem.bounds
    bounded = (prog.above | prog.below).to(prog.c.dtype)
    # Minimise ``x'Q x / 2 + c'x + |C x - nearest|^2 / 2``; ``C x - nearest`` estimates the multipliers.
    lower, _ = factor(prog, bounded, 1e-6, plain=False)
    nearest = clamp_to_bounds(prog, torch.zeros_like(prog.u))
    x = cholesky_solve(lower, vecmat(bounded * nearest, prog.C) - prog.c)
    image = vecmat(x, prog.C.mT)
    y = bounded * (image - nearest)
    s, z = torch.stack([prog.u - image, image - prog.l]), torch.stack([y, -y])
    s, z = (_shifted(t, bounds) for t in (s, z))
    product = (bounds * s * z).sum(dim=(0, -1))
    # Mehrotra's second shift: half of the complementarity products, relative to the other factor.
    more_s, more_z = (0.5 * product / (bounds * t).sum(dim=(0, -1)).clamp(min=1e-30) for t in (z, s))
    s, z = s + (more_s + 1e-8)[:, None], z + (more_z + 1e-8)[:, None]
    # Absent bounds have ``s = 1`` and ``z = 0``. Their steps are 0, so they add nothing to any sum.
    return _Iterate(x, torch.where(prog.equal, y, 0.0), torch.where(bounds > 0, s, 1.0), bounds * z)


def _shifted(t: Tensor, bounds: Tensor) -> Tensor:
    """Shift the entries of each bound by a common amount until all are positive."""
    # Mehrotra's first shift ``max(-1.5 min t, 0)`` (Nocedal and Wright, section 14.2).
    least = torch.where(bounds > 0, t, torch.inf).amin(dim=(0, -1))
    return t + torch.where(torch.isinf(least), 0.0, (-1.5 * least).clamp(min=0))[:, None]


def _relative_error(problem: _InteriorProblem, at: _Iterate) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return the largest relative violation of the optimality conditions, and the residuals of the gradient, the
    equalities and the slacks."""
    prog, bounds = problem.prog, problem.bounds
    image, bend = vecmat(at.x, prog.C.mT), vecmat(at.x, prog.Q)
    pull = vecmat(at.y + at.z[0] - at.z[1], prog.C)
    slope = bend + prog.c + pull
    equality = torch.where(prog.equal, image - prog.u, 0.0)
    # The residuals of ``C x + s_0 = u`` and of ``s_1 - C x = -l``.
    slack = bounds * torch.stack([image + at.s[0] - prog.u, at.s[1] - image + prog.l])
    # The duality gap, relative to the objective. At a feasible point the sum of the products is the duality gap.
    gap = (at.s * at.z).sum(dim=(0, -1))
    dual = largest_entry(slope) / _sizes(bend, prog.c, pull)
    primal = largest_entry(torch.cat([equality, slack[0], slack[1]], dim=-1)) / _sizes(image)
    objective = (0.5 * row_dot(at.x, bend)).abs() + row_dot(at.x, prog.c).abs()
    return torch.stack([dual, primal, gap / (1.0 + objective)]).amax(dim=0), (slope, equality, slack)


def _sizes(*terms: Tensor) -> Tensor:
    """Return 1 plus the largest entry of all terms: the scale of a relative residual."""
    return 1.0 + torch.stack([largest_entry(t) for t in terms]).amax(dim=0)


def _predictor_corrector(problem: _InteriorProblem, at: _Iterate, residuals: tuple[Tensor, Tensor, Tensor]) -> _Iterate:
    """Return the iterate after one step."""
    prog, bounds, total, delta = problem
    slope, equality, slack = residuals
    # Eliminate ``s`` and ``z`` from the Newton system: with ``s dz + z ds = -products`` and the proximal term, each
    # bound adds ``z / (s + delta z)`` to the weight of its row. The proximal term ``delta`` of the multipliers keeps
    # ``reach`` positive, and the weights bounded, for ``s`` near 0.
    reach = at.s + delta * at.z
    ratio = at.z / reach
    weights = ratio.sum(dim=0) + torch.where(prog.equal, 1.0 / delta, 0.0)
    # The normal matrix ``Q + delta + C' diag(weights) C``; an equality has the weight ``1 / delta``.
    lower, _ = factor(prog, weights, delta, plain=False)

    def direction(products: Tensor) -> _Iterate:
        """Return the step that reduces the products of slacks and multipliers by `products`, to first order."""
        # ``ds = delta dz - (slack +- C d)`` in ``z ds + s dz = -products`` gives
        # ``dz = ratio (slack +- C d) - products / reach``.
        push = ratio * slack - bounds * products / reach
        d = -cholesky_solve(lower, slope + vecmat(push[0] - push[1] + equality / delta, prog.C))
        move = vecmat(d, prog.C.mT)
        # The changes of ``C x`` as the upper and the lower slacks see them, ``(2, lanes, rows)``.
        both = torch.stack([move, -move])
        # ``C d - delta dy = -equality``: the proximal term fills the zero block of the KKT matrix.
        dy = torch.where(prog.equal, (equality + move) / delta, 0.0)
        dz = push + ratio * both
        return _Iterate(d, dy, delta * dz - bounds * (slack + both), dz)

    products = at.s * at.z
    mean = products.sum(dim=(0, -1)) / total
    # Predictor: the step towards products of zero (affine scaling).
    ahead = direction(products)
    length = _length(at, ahead)
    # The products after the predictor, whose mean is Mehrotra's ``mu_aff``.
    reached = (at.s + length[:, None] * ahead.s) * (at.z + length[:, None] * ahead.z)
    # Corrector: centre by Mehrotra's ``sigma = (mu_aff / mu)^3``, with the second-order term ``ds dz`` of the
    # predictor.
    centre = (reached.sum(dim=(0, -1)) / total / mean.clamp(min=torch.finfo(mean.dtype).tiny)) ** 3 * mean
    step = direction(products + ahead.s * ahead.z - centre[:, None])
    # Stay inside of the boundary; a full Newton step is kept whole.
    length = torch.where(_length(at, step) < 1.0, _STEP_FRACTION * _length(at, step), 1.0)[:, None]
    return _Iterate(*(old + length * d for old, d in zip(at, step, strict=True)))


def _length(at: _Iterate, step: _Iterate) -> Tensor:
    """Return the largest step of at most 1 that keeps slacks and multipliers nonnegative."""
    # The ratio test: the first decreasing entry that reaches 0 bounds the step.
    parts = [
        torch.where(d < 0, -t / d, 1.0).clamp(max=1.0).amin(dim=(0, -1)) for t, d in ((at.s, step.s), (at.z, step.z))
    ]
    return torch.minimum(*parts)
