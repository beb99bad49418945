"""Quadratic programs as rows, their optimality, and the proofs that they have no solution.

A program has its constraints stacked, ``C x = u`` in the first rows and ``C x <= u`` in the others, with one
multiplier ``y`` for each. Scaling it, ``x = D x'`` and ``C' = E C D``, would change nothing in the methods but the
metrics in which they measure, so the data stays as it is and ``D^-2`` and ``E^2`` are weights. They are powers of two:
what the iterates depend on then has no derivative but at jumps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from implicitdiff.solvers._rows import any_lane, dot, largest_entry, norm, select


class Program(NamedTuple):
    """``min x'Qx / 2 + c'x`` subject to ``C x = u`` in the first rows, ``C x <= u`` in the others; lanes in front.

    Attributes:
        Q: symmetric.
        c: the linear term.
        C: the matrix of the constraints.
        u: their right-hand sides.
        equal: which of them are equalities, ``(1, rows of C)``.
        columns: the weights ``D^-2`` of the unknowns, times `scale`.
        rows: the weights ``E^2`` of the constraints, times `scale`.
        scale: the size of the scaled objective, ``(lanes,)``.
    """

    Q: Tensor
    c: Tensor
    C: Tensor
    u: Tensor
    equal: Tensor
    columns: Tensor
    rows: Tensor
    scale: Tensor

    def of(self, lanes: Tensor | slice) -> Program:
        """The programs of some lanes."""
        return Program(*(t if t is self.equal else t[lanes] for t in self))

    def detach(self) -> Program:
        return Program(*(t.detach() for t in self))


class Point(NamedTuple):
    """A primal ``x`` and a dual ``y`` with ``image = C x`` and ``slope = Q x + c + C'y``."""

    x: Tensor
    y: Tensor
    image: Tensor
    slope: Tensor


def program(Q: Tensor, c: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> Program:
    """The program with these constraints, and its scaling."""
    C, u = torch.cat([A, G], dim=-2), torch.cat([b, h], dim=-1)
    # What is bounded by infinity is no constraint.
    none = torch.isposinf(u)
    C, u = torch.where(none[..., None], 0.0, C), torch.where(none, 1.0, u)
    equal = torch.arange(C.shape[-2], device=C.device)[None] < A.shape[-2]
    return Program(Q, c, C, u, equal, *_weights(*(t.detach().abs() for t in (Q, c, C))))


def _weights(Q: Tensor, c: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ruiz equilibration of ``[[Q, C'], [C, 0]]`` in the 1-norm, which takes nothing but products; then the size of the
    objective, as in section 5.1 of OSQP."""
    D, E = c.new_ones(c.shape), C.new_ones(C.shape[:-1])
    for _ in range(10):
        column, row = D * (times(D, Q) + times(E, C)), E * times(D, C.mT)
        D, E = (v / torch.where(s > 0, s, 1.0).sqrt() for v, s in ((D, column), (E, row)))
    size = torch.maximum((D * times(D, Q)).sum(dim=-1) / max(1, D.shape[-1]), largest_entry(D * c))
    D, E, size = (torch.exp2(torch.round(torch.log2(v))) for v in (D**2, E**2, torch.where(size > 0, size, 1.0)))
    return size[:, None] / D, size[:, None] * E, size


def times(v: Tensor, matrix: Tensor) -> Tensor:
    """``M'v``, row by row; in this form it is fast for many small matrices."""
    return (v[:, None] @ matrix)[:, 0]


def point(of: Program, x: Tensor, y: Tensor) -> Point:
    """The point of these coordinates."""
    return Point(x, y, times(x, of.C.mT), times(x, of.Q) + of.c + times(y, of.C))


def violation(of: Program, at: Point) -> Tensor:
    """The residual of the KKT conditions: ``Q x + c + C'y``, ``C x - u``, ``min(y, u - C x)``."""
    slack = of.u - at.image
    return torch.cat([at.slope, torch.where(of.equal | (slack < at.y), slack, at.y)], dim=-1)


def residual(of: Program, at: Point) -> Tensor:
    """Its norm."""
    return norm(violation(of, at))


def factor(of: Program, weights: Tensor, shift: float, plain: bool) -> tuple[Tensor, Tensor]:
    """The `cholesky` of ``Q + shift D^-2 + C' diag(weights) C``."""
    return cholesky(of.Q + torch.diag_embed(shift * of.columns) + gram(of.C, weights, plain))


def gram(C: Tensor, weights: Tensor, plain: bool) -> Tensor:
    """``C' diag(weights) C``; where the weights can be looked at, without the rows that have none."""
    if plain and weights.numel():
        there = weights != 0
        rows = there.to(torch.uint8).topk(int(there.sum(dim=-1).max()), dim=-1, sorted=False).indices
        if 2 * rows.shape[-1] < C.shape[-2]:
            C, weights = C.gather(-2, rows[..., None].expand(-1, -1, C.shape[-1])), weights.gather(-1, rows)
    return (C.mT * weights[:, None]) @ C


def cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The lower factor, and where there is none, so that it is another's."""
    lower, info = torch.linalg.cholesky_ex(matrix)
    broken = info != 0
    if any_lane(broken):
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        lower = torch.linalg.cholesky_ex(select(broken, eye.expand_as(matrix), matrix))[0]
    return lower, broken


def solve(lower: Tensor, b: Tensor) -> Tensor:
    """``(L L')^-1 b``."""
    half = torch.linalg.solve_triangular(lower, b[..., None], upper=False)
    whole: Tensor = torch.linalg.solve_triangular(lower.mT, half, upper=True)
    return whole[..., 0]


def error_parts(of: Program, at: Point) -> tuple[Tensor, Tensor]:
    """The norms of the gradient of the Lagrangian, and of what violates the constraints and complementarity; they have
    different units."""
    slack = of.u - at.image
    return norm(at.slope), norm(torch.where(of.equal | (slack < at.y), slack, at.y))


def rounding(of: Program, at: Point, eps: float) -> tuple[Tensor, Tensor]:
    """What rounding alone may make of the two."""
    x, y, C = at.x.detach().abs(), at.y.detach().abs(), of.C.detach().abs()
    slope = times(x, of.Q.detach().abs()) + of.c.detach().abs() + times(y, C)
    image = times(x, C.mT) + torch.where(torch.isfinite(of.u), of.u, 0.0).detach().abs()
    return 2.0 * eps * norm(slope), 2.0 * eps * norm(image)


def certificates(of: Program, dx: Tensor, dy: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Where a step of a method of multipliers proves a program infeasible, and where unbounded.

    If x is feasible, ``u'y >= x'C'y`` for all y that are not negative for inequalities; if x and y solve the program,
    ``c'd >= -x'Qd - y'Cd`` for all d with ``C d`` as it is for a feasible direction. Where a left side is negative, and
    what x and y are multiplied by is almost zero, no solution has a norm that can be told from infinity.

    Stellato et al., "OSQP", section 3.4: the steps converge to such directions where the program has no solution.
    """
    bound = eps**-0.6 * of.scale.sqrt()
    dx, dy, scale = dx.detach(), dy.detach(), of.columns.rsqrt()
    dy = torch.where(of.equal, dy, dy.clamp(min=0))
    climb = times(dx, of.C.mT)
    climb = torch.where(of.equal, climb, climb.clamp(min=0)) * of.rows.sqrt()
    bend = torch.cat([times(dx, of.Q) * scale, climb], dim=-1)
    infeasible = bound * norm(times(dy, of.C) * scale) < -_clear(of.u, dy, eps)
    return infeasible, bound * norm(bend) < -_clear(of.c, dx, eps)


def _clear(a: Tensor, b: Tensor, eps: float) -> Tensor:
    """``a'b``, and 0 where that may be rounding."""
    value = dot(a, b)
    return torch.where(value.abs() > 1e3 * eps * dot(a.abs(), b.abs()), value, 0.0)
