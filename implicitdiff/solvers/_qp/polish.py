"""Steps from a rough solution of a quadratic program to the precision of the dtype."""

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
    make_point,
)

_MAX_SETS = 50
"""Bound on the number of active sets in a proximal step."""
_FIRST_DELTAS = [10.0**-k for k in range(1, 7)]
"""Inverse lengths of the proximal steps before the last."""
_REFINEMENTS = 4
"""Number of refinement steps."""


def regularisation(eps: float) -> tuple[float, float]:
    """Return the regularisation of the multipliers and of the unknowns: small enough for a few steps of refinement to
    correct, large enough for the inverse not to amplify rounding beyond the data."""
    return 10 * eps**0.5, eps**0.5


def polish(
    prog: QuadraticProgram, x: Tensor, y: Tensor, side: Tensor, eps: float, plain: bool
) -> tuple[PrimalDual, Tensor, Tensor, Tensor]:
    """Return the point at which the active constraints hold as equalities, the last steps of ``x`` and ``y``, and the
    flags of lanes without a factorisation.

    `side` is 1 for rows active at the upper bound, -1 for rows active at the lower bound, 0 for inactive rows. The
    method is iterative refinement with the regularised matrix of OSQP's polishing (section 4), with multipliers
    eliminated; equivalently the method of multipliers with very long steps.
    """
    delta, shift = regularisation(eps)
    # The solution does not depend on the metric, so the weights need no derivative.
    prog = prog._replace(rows=prog.rows.detach(), columns=prog.columns.detach())
    active = side != 0
    weights = torch.where(active, prog.rows / delta, 0.0)
    lower, broken = factor(prog, weights, shift, plain)
    # An inactive row has the multiplier 0 from the start, and its weight of 0 keeps the multiplier at 0.
    x, y, image, slope = make_point(prog, x, torch.where(active, y, 0.0))
    excess, dx, dy = image - torch.where(side < 0, prog.l, prog.u), x, y
    for _ in range(_REFINEMENTS):
        # The minimum over ``dx`` of ``slope'dx + dx'Q dx / 2 + |excess + C dx|_W^2 / 2 + shift |dx|^2 / 2``, the
        # augmented Lagrangian with a proximal term; then ``dy = W (excess + C dx)``.
        dx = -cholesky_solve(lower, slope + vecmat(weights * excess, prog.C))
        # Update by increments: the weights are large, and would amplify the rounding of a new sum ``C x - u``.
        excess = excess + vecmat(dx, prog.C.mT)
        dy = weights * excess
        slope = slope + vecmat(dx, prog.Q) + vecmat(dy, prog.C)
        x, y = x + dx, y + dy
    return make_point(prog, x, y), dx, dy, broken


def active_set(
    prog: QuadraticProgram, x: Tensor, y: Tensor, eps: float, plain: bool, *, patient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Guess the active constraints by steps of the proximal method of multipliers; return the last ``x``, ``y`` and
    `side` as in `polish`.

    With weights ``w`` a step minimises

        x'Qx / 2 + c'x + shift |x - x0|^2 / 2 + sum w (v - clamp(v, l, u))^2 / 2,    v = C x + y0 / w,

    and its multipliers are ``w (v - clamp(v, l, u))``. Near a solution a single long step suffices, from the point at
    which the constraints with multipliers are equalities. A `patient` search makes steps of increasing length from the
    given point. `plain` is True for plain tensors, whose inactive lanes can be skipped.

    Hermans, Themelis and Patrinos, "QPALM: a proximal augmented Lagrangian method for nonconvex quadratic programs",
    Math. Prog. Comp. 14 (2022).
    """
    prog, x, y = prog.detach(), x.detach(), y.detach()
    # The first guess: a row is active if its multiplier presses on a bound.
    side = _side(prog, y, y)
    rows = gram(prog.C, prog.rows * side.abs(), plain)
    last, shift = regularisation(eps)
    # Longer and longer steps: each proximal problem starts near its solution.
    deltas = [d for d in _FIRST_DELTAS if d > 3 * last] if patient else []
    for delta in (*deltas, last):
        # The proximal weight of ``x`` shrinks with `delta` in proportion, down to `shift`.
        x, y, side, rows = _proximal_step(prog, x, y, side, rows, delta, shift / last * delta, plain, jump=not patient)
    return x, y, side


def _side(prog: QuadraticProgram, above: Tensor, below: Tensor) -> Tensor:
    """Return the sides of the rows that exceed a bound; `above` and `below` are the excesses over the upper and lower
    bound."""
    # An equality is always active; the side is the upper by convention.
    up = prog.equal | (prog.above & (above > 0))
    return up.to(above.dtype) - (prog.below & ~up & (below < 0)).to(above.dtype)


def _proximal_step(
    prog: QuadraticProgram,
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
    """Make one proximal step, by Newton's method with exact line search, which converges from any point.

    The start is `x0`, or with `jump` the minimum for the active constraints of `side`. `rows` is ``C' diag(rows) C`` of
    these constraints.
    """
    weights = prog.rows / delta
    # With ``v = C x + y0 / w`` the product ``w (v - clamp(v, l, u))`` contains the old multiplier.
    ahead = y0 / weights
    x, v = x0, vecmat(x0, prog.C.mT) + ahead
    open_lanes = torch.ones_like(x[:, 0], dtype=torch.bool)
    # The problem is piecewise quadratic: a step is exact as soon as no row changes its side.
    for link in range(_MAX_SETS // 2 if jump else _MAX_SETS):
        if not any_lane(open_lanes):
            break
        lanes = picked(open_lanes, plain)
        part, w, was, inner = prog.pick(lanes), weights[lanes], side[lanes], rows[lanes]
        # Hessian and gradient of the proximal problem on the present piece.
        matrix = part.Q + torch.diag_embed(shift * part.columns) + inner / delta
        slope = vecmat(x[lanes], part.Q) + part.c + shift * part.columns * (x[lanes] - x0[lanes])
        d = -cholesky_solve(cholesky_factor(matrix)[0], slope + vecmat(w * _excess(part, v[lanes], was), part.C))
        # The first step of a jump goes to the minimum for the given active set, without line search.
        if link or not jump:
            bend = row_dot(d, vecmat(d, part.Q) + shift * part.columns * d)
            d = d * _exact_line_search(part, v[lanes], vecmat(d, part.C.mT), w, row_dot(d, slope), bend)[:, None]
        new_x = x[lanes] + d
        new_v = vecmat(new_x, part.C.mT) + ahead[lanes]
        new = _side(part, new_v - part.u, new_v - part.l)
        # Update ``C' diag(rows) C`` by the rows whose activity has changed; the factors ``|new| - |was|`` are 1, 0 or
        # -1.
        new_inner = inner + gram(part.C, part.rows * (new.abs() - was.abs()), plain)
        changes = (x, new_x), (v, new_v), (side, new), (rows, new_inner), (open_lanes, (new != was).any(dim=-1))
        x, v, side, rows, open_lanes = (put(old, open_lanes, lanes, value) for old, value in changes)
    return x, weights * _excess(prog, v, side), side, rows


def _excess(prog: QuadraticProgram, v: Tensor, side: Tensor) -> Tensor:
    """Return the distances of the rows from the bounds of `side`; 0 for inactive rows."""
    return torch.where(side > 0, v - prog.u, torch.where(side < 0, v - prog.l, 0.0))


def picked(flag: Tensor, plain: bool) -> Tensor | slice:
    """Return the indices of the flagged lanes; all lanes for tensors whose values cannot be read."""
    return flag.nonzero()[:, 0] if plain else slice(None)


def put(old: Tensor, flag: Tensor, lanes: Tensor | slice, new: Tensor) -> Tensor:
    """Return `old` with new values in the flagged lanes; `new` has the lanes of `picked`."""
    return select(flag, new, old) if isinstance(lanes, slice) else old.index_copy(0, lanes, new)


def _exact_line_search(
    prog: QuadraticProgram, v: Tensor, push: Tensor, w: Tensor, slope: Tensor, bend: Tensor
) -> Tensor:
    """Return the ``t`` with ``slope + bend t + sum w push (v + t push - clamp(v + t push, l, u)) = 0``.

    The left side is increasing and piecewise linear; a piece ends at a point at which a constraint becomes active or
    inactive.
    """
    equal = prog.equal
    bounds = [(v - prog.u, push, torch.where(prog.above, w, 0.0))]
    if prog.two_sided:
        # A lower bound of ``v`` is an upper bound of ``-v``.
        equal = torch.cat([equal, torch.zeros_like(equal)], dim=-1)
        bounds.append((prog.l - v, -push, torch.where(prog.below & ~prog.equal, w, 0.0)))
    v, push, w = (torch.cat(both, dim=-1) for both in zip(*bounds, strict=True))
    # A row changes its activity at ``t = -v / push``.
    at = -safe_divide(v, push)
    turns = ~equal & (push != 0) & (at > 0)
    # The activity just after ``t = 0``: a row exactly at its bound follows the sign of the motion.
    on = equal | (v > 0) | ((v == 0) & (push > 0))
    # Contributions of each constraint to the slope and the bend: now, and the change at its turning point.
    # ``(2, lanes, bounds)``.
    both = torch.stack([w * push * v, w * push * push])
    now = torch.stack([slope, bend]) + torch.where(on, both, 0.0).sum(dim=-1)
    at, order = torch.where(turns, at, torch.inf).sort(dim=-1)
    change = torch.where(turns, torch.where(on, -both, both), 0.0).gather(-1, order.expand_as(both))
    # The derivative on piece ``k`` is ``slopes_k + bends_k t``; piece 0 begins at ``t = 0``.
    slopes, bends = torch.cat([now[..., None], now[..., None] + change.cumsum(dim=-1)], dim=-1)
    end = torch.cat([at, torch.full_like(at[:, :1], torch.inf)], dim=-1)
    # The zero lies in the first piece with a nonnegative value at the end.
    reached = torch.isinf(end) | (slopes + bends * torch.where(torch.isinf(end), 0.0, end) >= 0)
    # `argmax` returns the first of equal maxima, and takes no bool.
    piece = reached.to(torch.uint8).argmax(dim=-1, keepdim=True)
    return -safe_divide(slopes.gather(-1, piece), bends.gather(-1, piece))[:, 0]
