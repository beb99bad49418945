"""From a rough solution of a quadratic program to the precision of the dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from implicitdiff.solvers._loop.problem import any_lane, row_dot, safe_divide, select, vecmat
from implicitdiff.solvers._qp.program import (
    PrimalDual,
    QuadraticProgram,
    cholesky_factor,
    cholesky_solve,
    factor,
    gram,
    point,
)

_MAX_SETS = 50
"""How many active sets to try in a step."""
_FIRST_DELTAS = [10.0**-k for k in range(1, 7)]
"""The inverse lengths of the steps that come before the last."""
_REFINEMENTS = 4
"""How many steps to make with the last of them."""


def regularisation(eps: float) -> tuple[float, float]:
    """The regularisation of the multipliers and of the unknowns: so little that a few steps make up for it, so much
    that its inverse does not drown in rounding what it multiplies."""
    return 10 * eps**0.5, eps**0.5


def polish(
    of: QuadraticProgram, x: Tensor, y: Tensor, side: Tensor, eps: float, plain: bool
) -> tuple[PrimalDual, Tensor, Tensor, Tensor]:
    """The point where the active constraints are equalities, the last steps of x and of y towards it, and where that
    fails. `side` is 1 for rows at their upper bound, -1 for rows at their lower bound, 0 for inactive rows.

    Iterative refinement with the regularised matrix of OSQP's polishing (section 4), its multipliers eliminated; in
    other words the method of multipliers with very long steps.
    """
    delta, shift = regularisation(eps)
    # The result does not depend on the metric: no derivative flows through the weights.
    of = of._replace(rows=of.rows.detach(), columns=of.columns.detach())
    active = side != 0
    weights = torch.where(active, of.rows / delta, 0.0)
    lower, broken = factor(of, weights, shift, plain)
    x, y, image, slope = point(of, x, torch.where(active, y, 0.0))
    excess, dx, dy = image - torch.where(side < 0, of.l, of.u), x, y
    for _ in range(_REFINEMENTS):
        dx = -cholesky_solve(lower, slope + vecmat(weights * excess, of.C))
        # In increments: weights this large would make noise of the rounding of a sum.
        excess = excess + vecmat(dx, of.C.mT)
        dy = weights * excess
        slope = slope + vecmat(dx, of.Q) + vecmat(dy, of.C)
        x, y = x + dx, y + dy
    return point(of, x, y), dx, dy, broken


def active_set(
    of: QuadraticProgram, x: Tensor, y: Tensor, eps: float, plain: bool, *, patient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Where steps of the proximal method of multipliers lead from a point, and which constraints are active there, as
    `polish` takes them.

    With weights ``w`` a step minimises

        x'Qx / 2 + c'x + shift |x - x0|^2 / 2 + sum w (v - clamp(v, l, u))^2 / 2,    v = C x + y0 / w,

    and has the multipliers ``w (v - clamp(v, l, u))``. Near a solution one long step will do, from the point where the
    constraints with multipliers are equalities; a `patient` search makes longer and longer steps from the point itself.
    `plain`: rows are plain tensors, so that lanes can be left out.

    Hermans, Themelis and Patrinos, "QPALM: a proximal augmented Lagrangian method for nonconvex quadratic programs",
    Math. Prog. Comp. 14 (2022).
    """
    of, x, y = of.detach(), x.detach(), y.detach()
    side = _side(of, y, y)
    rows = gram(of.C, of.rows * side.abs(), plain)
    last, shift = regularisation(eps)
    deltas = [d for d in _FIRST_DELTAS if d > 3 * last] if patient else []
    for delta in (*deltas, last):
        x, y, side, rows = _proximal_step(of, x, y, side, rows, delta, shift / last * delta, plain, jump=not patient)
    return x, y, side


def _side(of: QuadraticProgram, above: Tensor, below: Tensor) -> Tensor:
    """The sides of the rows whose bounds are exceeded by so much."""
    up = of.equal | (of.above & (above > 0))
    return up.to(above.dtype) - (of.below & ~up & (below < 0)).to(above.dtype)


def _proximal_step(
    of: QuadraticProgram,
    x0: Tensor,
    y0: Tensor,
    side: Tensor,
    rows: Tensor,
    delta: float,
    shift: float,
    plain: bool,
    *,
    jump: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step, by Newton's method with an exact line search, which converges from anywhere.

    It starts at x0, or with a `jump` to where the minimum is if the constraints of `side` are the right ones; `rows` is
    ``C' diag(rows) C`` of these.
    """
    weights = of.rows / delta
    ahead = y0 / weights
    x, v = x0, vecmat(x0, of.C.mT) + ahead
    open_lanes = torch.ones_like(x[:, 0], dtype=torch.bool)
    for link in range(_MAX_SETS // 2 if jump else _MAX_SETS):
        if not any_lane(open_lanes):
            break
        lanes = picked(open_lanes, plain)
        part, w, was, inner = of.of(lanes), weights[lanes], side[lanes], rows[lanes]
        matrix = part.Q + torch.diag_embed(shift * part.columns) + inner / delta
        slope = vecmat(x[lanes], part.Q) + part.c + shift * part.columns * (x[lanes] - x0[lanes])
        d = -cholesky_solve(cholesky_factor(matrix)[0], slope + vecmat(w * _excess(part, v[lanes], was), part.C))
        if link or not jump:
            bend = row_dot(d, vecmat(d, part.Q) + shift * part.columns * d)
            d = d * _exact_line_search(part, v[lanes], vecmat(d, part.C.mT), w, row_dot(d, slope), bend)[:, None]
        new_x = x[lanes] + d
        new_v = vecmat(new_x, part.C.mT) + ahead[lanes]
        new = _side(part, new_v - part.u, new_v - part.l)
        new_inner = inner + gram(part.C, part.rows * (new.abs() - was.abs()), plain)
        changes = (x, new_x), (v, new_v), (side, new), (rows, new_inner), (open_lanes, (new != was).any(dim=-1))
        x, v, side, rows, open_lanes = (put(old, open_lanes, lanes, value) for old, value in changes)
    return x, weights * _excess(of, v, side), side, rows


def _excess(of: QuadraticProgram, v: Tensor, side: Tensor) -> Tensor:
    """How far the rows of `side` are from their bounds."""
    return torch.where(side > 0, v - of.u, torch.where(side < 0, v - of.l, 0.0))


def picked(flag: Tensor, plain: bool) -> Tensor | slice:
    """The lanes in which a flag is up; all, where what they are cannot be looked at."""
    return flag.nonzero()[:, 0] if plain else slice(None)


def put(old: Tensor, flag: Tensor, lanes: Tensor | slice, new: Tensor) -> Tensor:
    """`old` with new values, which belong to the lanes that were picked, where the flag is up."""
    return select(flag, new, old) if isinstance(lanes, slice) else old.index_copy(0, lanes, new)


def _exact_line_search(of: QuadraticProgram, v: Tensor, push: Tensor, w: Tensor, slope: Tensor, bend: Tensor) -> Tensor:
    """The ``t`` where ``slope + bend t + sum w push (v + t push - clamp(v + t push, l, u))`` is zero, which increases
    and is linear between the points where a constraint comes or goes."""
    equal = of.equal
    bounds = [(v - of.u, push, torch.where(of.above, w, 0.0))]
    if of.two_sided:
        # A lower bound is an upper bound of the other sign.
        equal = torch.cat([equal, torch.zeros_like(equal)], dim=-1)
        bounds.append((of.l - v, -push, torch.where(of.below & ~of.equal, w, 0.0)))
    v, push, w = (torch.cat(both, dim=-1) for both in zip(*bounds, strict=True))
    at = -safe_divide(v, push)
    turns = ~equal & (push != 0) & (at > 0)
    on = equal | (v > 0) | ((v == 0) & (push > 0))
    # What every constraint adds to the two coefficients, at first and from its turn on.
    both = torch.stack([w * push * v, w * push * push])
    now = torch.stack([slope, bend]) + torch.where(on, both, 0.0).sum(dim=-1)
    at, order = torch.where(turns, at, torch.inf).sort(dim=-1)
    change = torch.where(turns, torch.where(on, -both, both), 0.0).gather(-1, order.expand_as(both))
    slopes, bends = torch.cat([now[..., None], now[..., None] + change.cumsum(dim=-1)], dim=-1)
    end = torch.cat([at, torch.full_like(at[:, :1], torch.inf)], dim=-1)
    reached = torch.isinf(end) | (slopes + bends * torch.where(torch.isinf(end), 0.0, end) >= 0)
    piece = reached.to(torch.uint8).argmax(dim=-1, keepdim=True)
    return -safe_divide(slopes.gather(-1, piece), bends.gather(-1, piece))[:, 0]
