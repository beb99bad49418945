"""Quadratic programs in a form with stacked constraints, their optimality, and certificates of infeasibility.

A program has the constraints ``l <= C x <= u`` with one multiplier ``y`` for each row: ``y > 0`` for a row at ``u``,
``y < 0`` for a row at ``l``. A scaling ``x = D x'``, ``C' = E C D`` would change nothing in the methods but their
metrics, so the data stays unscaled and ``D^-2`` and ``E^2`` are weights. The weights change with the units of rows and
columns as the data does, so no method, and no error, depends on these units.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from implicitdiff.solvers._loop.problem import any_lane, largest_entry, row_dot, row_norm, safe_divide, select, vecmat


class QuadraticProgram(NamedTuple):
    """The program ``min x'Qx / 2 + c'x`` subject to ``l <= C x <= u``; lanes in front.

    Attributes:
        Q: the Hessian, symmetric.
        c: the linear term.
        C: the matrix of the constraints; zero in rows without a finite bound.
        l: the lower bounds; 0 in rows without a lower bound.
        u: the upper bounds; 1 in rows without an upper bound.
        below: flags of the rows with a lower bound.
        above: flags of the rows with an upper bound.
        equal: flags of the equalities, ``l = u``.
        columns: the weights ``D^-2`` of the unknowns, times `scale`.
        rows: the weights ``E^2`` of the constraints, times `scale`.
        scale: the size of the scaled objective, ``(lanes,)``.
        per_gradient: ``D / scale``, the factor of a gradient in the scaled program; without a derivative.
        per_row: ``E``, the factor of a row in the scaled program; without a derivative.
        two_sided: True if inequalities may have a lower bound.
    """

    Q: Tensor
    c: Tensor
    C: Tensor
    l: Tensor  # noqa: E741
    u: Tensor
    below: Tensor
    above: Tensor
    equal: Tensor
    columns: Tensor
    rows: Tensor
    scale: Tensor
    per_gradient: Tensor
    per_row: Tensor
    two_sided: bool

    def pick(self, lanes: Tensor | slice) -> QuadraticProgram:
        """Return the programs of some lanes."""
        return QuadraticProgram._make([*(t[lanes] for t in self[:-1]), self.two_sided])

    def detach(self) -> QuadraticProgram:
        return QuadraticProgram._make([*(t.detach() for t in self[:-1]), self.two_sided])


class PrimalDual(NamedTuple):
    """A primal point ``x`` and a dual point ``y``, with ``image = C x`` and ``slope = Q x + c + C'y``."""

    x: Tensor
    y: Tensor
    image: Tensor
    slope: Tensor


def make_program(
    Q: Tensor,
    c: Tensor,
    A: Tensor,
    b: Tensor,
    G: Tensor,
    h: Tensor,
    l: Tensor,  # noqa: E741
) -> QuadraticProgram:
    """Return the program with these constraints, with its scaling; `l` has as many entries as `h`, or no entries."""
    two_sided = l.shape[-1] > 0
    lower = l if two_sided else torch.full_like(h, -torch.inf)
    C, u, lower = torch.cat([A, G], dim=-2), torch.cat([b, h], dim=-1), torch.cat([b, lower], dim=-1)
    above, below = ~torch.isposinf(u), ~torch.isneginf(lower)
    # Neutral data in the place of infinite bounds, whose products would be nan: a zero row, bounds 0 and 1.
    C = torch.where((above | below)[..., None], C, 0.0)
    u, lower = torch.where(above, u, 1.0), torch.where(below, lower, 0.0)
    equal = above & below & (u == lower)
    # The first rows are those of ``A``, equalities for any ``b``, also nan or infinite.
    equal = equal | (torch.arange(C.shape[-2], device=C.device) < A.shape[-2])
    sizes = torch.maximum(torch.where(above, u.abs(), 0.0), lower.abs())
    columns, rows, scale = _equilibrate(Q.abs(), c.abs(), C.abs(), sizes)
    size = scale.detach()[:, None]
    # ``columns = scale / D^2``, so ``D / scale = (columns scale)^(-1/2)``; ``rows = scale E^2``.
    units = (columns.detach() * size).rsqrt(), (rows.detach() / size).sqrt()
    return QuadraticProgram(Q, c, C, lower, u, below, above, equal, columns, rows, scale, *units, two_sided)


def _equilibrate(Q: Tensor, c: Tensor, C: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights ``D^-2``, ``E^2`` and the size of the objective; all arguments are absolute values.

    Ruiz equilibration of ``[[Q, C'], [C, 0]]`` in the 1-norm, by products only; then the size of the objective as in
    section 5.1 of OSQP.
    """
    D, E = _units(Q, c, C, bounds)
    # Ten passes, as in OSQP's default.
    for _ in range(10):
        # The 1-norms of the columns of ``[[D Q D, D C'E], [E C D, 0]]``, whose entries are nonnegative here.
        column, row = D * (vecmat(D, Q) + vecmat(E, C)), E * vecmat(D, C.mT)
        # One pass: divide each row and column by the root of its norm.
        D, E = (v / torch.where(s > 0, s, 1.0).sqrt() for v, s in ((D, column), (E, row)))
    # The remaining freedom is a common factor of all unknowns. Choose the factor that gives the bounds size 1. If the
    # bounds are zero or far below the unconstrained minimum, choose the factor that balances the two terms of the
    # objective.
    unit = safe_divide((E * bounds).sum(dim=-1), (bounds > 0).sum(dim=-1).to(E.dtype))[:, None]
    # The minimum of ``t^2 1'D Q D 1 / 2 - t 1'D c`` is at the quotient of the two sums.
    bend, gain = D * vecmat(D, Q), D * c
    free = safe_divide(gain.sum(dim=-1), bend.sum(dim=-1))[:, None]
    unit = torch.where(unit > 0, torch.maximum(unit, 1e-3 * free), free)
    unit = torch.where(unit > 0, unit, 1.0)
    # The factor leaves ``E C D``, and multiplies ``D Q D`` by ``unit^2``.
    D, E = D * unit, E / unit
    # Cost scaling of OSQP, algorithm 2: the mean column norm of ``Q`` or the norm of ``c``.
    size = torch.maximum((D * vecmat(D, Q)).sum(dim=-1) / max(1, D.shape[-1]), largest_entry(D * c))
    size = torch.where(size > 0, size, 1.0)
    return size[:, None] / D**2, size[:, None] * E**2, size


def _units(Q: Tensor, c: Tensor, C: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Return initial values of ``D`` and ``E`` in the units of the columns and rows.

    Equilibration has many limits, and the limit depends on the initial values; initial values without units would make
    the result depend on units. The unit of an unknown with curvature comes from its curvature, the unit of a row from
    the unknowns in the row, the unit of any other unknown from its rows. The bounds give the unit of rows without such
    unknowns, and the gain of the others in the linear term gives the unit of the remaining unknowns.
    """
    curvature = Q.diagonal(dim1=-2, dim2=-1)
    D = torch.where(curvature > 0, _inverse(curvature).sqrt(), 0.0)
    # In this order: unknowns with curvature, then rows with bounds, then the linear term.
    D, E = _propagated(D, torch.zeros_like(bounds), C)
    D, E = _propagated(D, torch.where(E > 0, E, _inverse(bounds)), C)
    gain = largest_entry(D * c)[:, None]
    D, E = _propagated(torch.where(D > 0, D, torch.where(gain > 0, gain, 1.0) * _inverse(c)), E, C)
    return torch.where(D > 0, D, 1.0), torch.where(E > 0, E, 1.0)


def _propagated(D: Tensor, E: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Propagate units from rows to unknowns and back until no new unit appears."""
    for _ in range(C.shape[-2]):
        rows = torch.where(E > 0, E, _inverse(vecmat(D, C.mT)))
        columns = torch.where(D > 0, D, _inverse(vecmat(rows, C)))
        new = ((rows > 0) & (E <= 0)).any(dim=-1) | ((columns > 0) & (D <= 0)).any(dim=-1)
        if not any_lane(new):
            break
        D, E = columns, rows
    return D, E


def _inverse(a: Tensor) -> Tensor:
    return safe_divide(torch.ones_like(a), a)


def make_point(prog: QuadraticProgram, x: Tensor, y: Tensor) -> PrimalDual:
    """Return the point with the coordinates ``x`` and ``y``."""
    return PrimalDual(x, y, vecmat(x, prog.C.mT), vecmat(x, prog.Q) + prog.c + vecmat(y, prog.C))


def scaled(prog: QuadraticProgram) -> tuple[QuadraticProgram, Tensor, Tensor]:
    """Return the scaled program, and the factors from its primal and dual to those of the program."""
    per_gradient, per_row = prog.per_gradient, prog.per_row
    # From ``D / scale`` to ``D``.
    D = per_gradient * prog.scale[:, None]
    # ``Q`` becomes ``D Q D / scale``, ``c`` becomes ``D c / scale``, and ``C`` becomes ``E C D``.
    Q, C = per_gradient[..., None] * prog.Q * D[:, None], per_row[..., None] * prog.C * D[:, None]
    one = torch.ones_like
    bounds = prog.l * per_row, prog.u * per_row
    within = prog._replace(
        Q=Q, c=prog.c * per_gradient, C=C, l=bounds[0], u=bounds[1], columns=one(D), rows=one(per_row)
    )
    return (
        within._replace(scale=one(prog.scale), per_gradient=one(D), per_row=one(per_row)),
        D,
        per_row * prog.scale[:, None],
    )


def clamp_to_bounds(prog: QuadraticProgram, values: Tensor) -> Tensor:
    """Return the nearest values that satisfy the bounds."""
    low = torch.where(prog.below & (values < prog.l), prog.l, values)
    return torch.where(prog.above & (low > prog.u), prog.u, low)


def kkt_error(prog: QuadraticProgram, at: PrimalDual) -> Tensor:
    """Return the norm of the KKT violation in the scaled program."""
    return row_norm(torch.stack(error_parts(prog, at), dim=-1))


def factor(prog: QuadraticProgram, weights: Tensor, shift: float, plain: bool) -> tuple[Tensor, Tensor]:
    """Return the `cholesky_factor` of ``Q + shift D^-2 + C' diag(weights) C``."""
    return cholesky_factor(prog.Q + torch.diag_embed(shift * prog.columns) + gram(prog.C, weights, plain))


def gram(C: Tensor, weights: Tensor, plain: bool) -> Tensor:
    """Return ``C' diag(weights) C``; for plain tensors without the rows of weight zero."""
    if plain and weights.numel():
        weighted = weights != 0
        # Gather as many rows as the fullest lane has; `topk` puts rows with a weight first.
        rows = weighted.to(torch.uint8).topk(int(weighted.sum(dim=-1).max()), dim=-1, sorted=False).indices
        # The copy of the rows pays off if at least half of the rows are left out.
        if 2 * rows.shape[-1] < C.shape[-2]:
            C, weights = C.gather(-2, rows[..., None].expand(-1, -1, C.shape[-1])), weights.gather(-1, rows)
    return (C.mT * weights[:, None]) @ C


def cholesky_factor(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lower Cholesky factor and the flags of lanes without a factor; the identity replaces the factor in
    these lanes."""
    lower, info = torch.linalg.cholesky_ex(matrix)
    broken = info != 0
    if any_lane(broken):
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        # Factorise again: the derivative of a failed factorisation may be nan, also in a masked branch.
        lower = torch.linalg.cholesky_ex(select(broken, eye.expand_as(matrix), matrix))[0]
    return lower, broken


def cholesky_solve(lower: Tensor, b: Tensor) -> Tensor:
    """Return ``(L L')^-1 b``."""
    half = torch.linalg.solve_triangular(lower, b[..., None], upper=False)
    whole: Tensor = torch.linalg.solve_triangular(lower.mT, half, upper=True)
    return whole[..., 0]


def error_parts(prog: QuadraticProgram, at: PrimalDual) -> tuple[Tensor, Tensor]:
    """Return the norms of the two parts of `kkt_violation`."""
    slope, gap = kkt_violation(prog, at)
    return row_norm(slope), row_norm(gap)


def kkt_violation(prog: QuadraticProgram, at: PrimalDual) -> tuple[Tensor, Tensor]:
    """Return the gradient of the Lagrangian, and ``clamp(C x + y, l, u) - C x``, zero if the constraints and
    complementarity hold; both in the scaled program, in which entries are comparable."""
    per_gradient, per_row = prog.per_gradient, prog.per_row
    # The scaled objective is divided by `scale` and a row multiplied by ``E``, so the multiplier is ``y / (E scale)``.
    image, y = at.image.detach(), at.y.detach() / (per_row * prog.scale.detach()[:, None])
    # ``clamp(C x + y, l, u) - C x`` as the median of ``y`` and the two distances, without the rounding of ``C x``.
    up = torch.where(prog.above, per_row * (prog.u.detach() - image), torch.inf)
    down = torch.where(prog.below, per_row * (prog.l.detach() - image), -torch.inf)
    gap = torch.where(prog.equal, up, torch.minimum(torch.maximum(y, down), up))
    return per_gradient * at.slope, gap


def without_noise(prog: QuadraticProgram, at: PrimalDual, eps: float) -> Tensor:
    """Return the multipliers, with 0 for inequalities whose multiplier is below the slack or at the level of rounding:
    a weakly active constraint has multiplier zero."""
    y, slack = _pressure(prog, at)
    terms = vecmat(at.x.abs(), prog.Q.abs()) + prog.c.abs() + vecmat(at.y.abs(), prog.C.abs())
    # A multiplier is determined to about ``eps`` of the gradient's terms; ``eps^(3/4)`` leaves a margin.
    noise = eps**0.75 * largest_entry(prog.per_gradient * terms)
    return torch.where(prog.equal | (y > torch.maximum(slack, noise[:, None])), at.y, 0.0)


def of_active_rows(prog: QuadraticProgram, at: PrimalDual) -> Tensor:
    """Return the multipliers, with 0 for inequalities whose multiplier is below the slack. The difference is a part of
    the error, so at most the target at a solution."""
    y, slack = _pressure(prog, at)
    return torch.where(prog.equal | (y > slack), at.y, 0.0)


def _pressure(prog: QuadraticProgram, at: PrimalDual) -> tuple[Tensor, Tensor]:
    """Return the sizes of the multipliers, and of the slacks at the bounds on which the multipliers press, in the
    scaled program."""
    # A positive multiplier presses on the upper bound, a negative multiplier on the lower bound.
    slack = prog.per_row * (torch.where(at.y > 0, prog.u, prog.l) - at.image).abs()
    return at.y.abs() / (prog.per_row * prog.scale[:, None]), slack


def rounding_of_parts(prog: QuadraticProgram, at: PrimalDual, eps: float) -> tuple[Tensor, Tensor]:
    """Return bounds on the rounding of the two norms of `error_parts`."""
    per_gradient, per_row = prog.per_gradient, prog.per_row
    x, y, C = at.x.detach().abs(), at.y.detach().abs(), prog.C.detach().abs()
    # A sum rounds by about eps times the sum of its absolute terms.
    slope = vecmat(x, prog.Q.detach().abs()) + prog.c.detach().abs() + vecmat(y, C)
    image = vecmat(x, C.mT) + torch.maximum(torch.where(prog.above, prog.u, 0.0), prog.l.abs()).detach().abs()
    return 2.0 * eps * row_norm(per_gradient * slope), 2.0 * eps * row_norm(per_row * image)


def certificates(prog: QuadraticProgram, dx: Tensor, dy: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the lanes in which a step of a method of multipliers proves a program infeasible, and unbounded.

    For a feasible ``x``, ``u'max(y, 0) + l'min(y, 0) >= x'C'y`` for all ``y`` with no entry at an infinite bound. For a
    solution ``x, y``, ``c'd >= -x'Qd - y'Cd`` for all ``d`` along which every point stays feasible. If the left side is
    negative while the factors ``C'y`` of ``x``, or ``Qd`` and ``Cd`` of ``x`` and ``y``, almost vanish, a solution
    would have a norm beyond ``eps^-0.6``, not distinguishable from infinity.

    Stellato et al., "OSQP", section 3.4: the steps converge to such directions if the program has no solution.
    """
    # The norm above which a solution counts as infinite, in the scaled program.
    bound = eps**-0.6 * prog.scale.sqrt()
    dx, dy, scale = dx.detach(), dy.detach(), prog.columns.rsqrt()
    # An infinite bound cannot press: project the direction onto the recession cones.
    dy = torch.where(prog.below, dy, dy.clamp(min=0))
    dy = torch.where(prog.above, dy, dy.clamp(max=0))
    climb = vecmat(dx, prog.C.mT)
    climb = torch.where(prog.above, climb, climb.clamp(max=0))
    climb = torch.where(prog.below, climb, climb.clamp(min=0)) * prog.rows.sqrt()
    bend = torch.cat([vecmat(dx, prog.Q) * scale, climb], dim=-1)
    # Infeasible: ``u'max(dy, 0) + l'min(dy, 0) < 0`` although ``C'dy`` almost vanishes. Unbounded: ``c'dx < 0``
    # although ``Q dx`` and the forbidden part of ``C dx`` almost vanish.
    infeasible = bound * row_norm(vecmat(dy, prog.C) * scale) < -_clear(torch.where(dy < 0, prog.l, prog.u), dy, eps)
    return infeasible, bound * row_norm(bend) < -_clear(prog.c, dx, eps)


def _clear(a: Tensor, b: Tensor, eps: float) -> Tensor:
    """Return ``a'b``, or 0 if rounding could change the sign."""
    value = row_dot(a, b)
    return torch.where(value.abs() > 1e3 * eps * row_dot(a.abs(), b.abs()), value, 0.0)
