"""Projection onto polyhedra."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import implicitdiff._torch.trees as pytree
from implicitdiff._implicit.linear_problem import Solve
from implicitdiff._torch.trees import Number, X
from implicitdiff.projections._point import Point, check_vector
from implicitdiff.solvers.qp import qp


def polyhedron(
    v: X,
    A: Tensor | None = None,
    b: Number | None = None,
    G: Tensor | None = None,
    h: Number | None = None,
    *,
    solve: Solve | None = None,
) -> X:
    """Project onto ``{x: A x = b, G x <= h}``, ``v`` being one vector.

    `implicitdiff.solvers.qp` solves the quadratic program ``min |x - v|^2 / 2``. Derivatives in ``v`` and in all four
    arguments are those of its KKT conditions. For a constraint that is active with multiplier 0, the derivative is that
    of the inactive side. Active constraints may be linearly dependent.

    Args:
        v: a tensor or a tree, of n entries.
        A: a matrix of shape (p, n), or None.
        b: a vector of shape (p,), or a number; None without ``A``.
        G: a matrix of shape (m, n), or None.
        h: a vector of shape (m,), or a number; None without ``G``. ``inf`` drops a constraint.
        solve: the linear solver of the derivative, as of `implicitdiff.solvers.qp`.

    Raises:
        TypeError: ``A`` or ``G`` is not a floating-point tensor, or ``b`` or ``h`` not numeric.
        ValueError: the shapes do not fit, or a matrix is given without its right-hand side.
        ConvergenceError: the set is empty, or the solver fails.

    Example:
        >>> from implicitdiff.projections import polyhedron
        >>> A, G = torch.tensor([[1.0, 1.0, 1.0]]), -torch.eye(3)
        >>> polyhedron(torch.tensor([0.5, 1.0, -1.0]), A, 1.0, G, -0.1)
        tensor([0.2000, 0.7000, 0.1000])
    """
    point = Point.of("polyhedron", v)
    given = _checked_rows(point, "A", A, "b", b) | _checked_rows(point, "G", G, "h", h)

    def project(v: Tensor, *operands: Tensor) -> Tensor:
        rows = dict(zip(given, operands, strict=True))
        names = ("A", "b"), ("G", "h")
        pairs = [(rows[m], rows[r].expand(len(rows[m]))) if m in rows else (None, None) for m, r in names]
        # |x - v|^2 / 2 = x' I x / 2 - v.x + constant.
        eye = torch.eye(len(v), dtype=v.dtype, device=v.device)
        solution, _ = qp(solve=solve).run(None, eye, -v, *pairs[0], *pairs[1])
        # The solution of the program carries the derivatives in all operands, by the KKT conditions.
        x: Tensor = solution.primal
        return x

    return point.map_flat(project, *given.values())


def _checked_rows(point: Point, name: str, matrix: object, other: str, right: Any) -> dict[str, Any]:
    """Check a matrix and its right-hand side, and return both by name; nothing for None."""
    if (matrix is None) != (right is None):
        raise ValueError(f"polyhedron: {name} and {other} go together: give both, or None for both")
    if matrix is None:
        return {}
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        raise TypeError(f"polyhedron: {name} must be a floating-point tensor or None, got {pytree.describe(matrix)}")
    if matrix.shape[1:] != (point.size,):
        raise ValueError(
            f"polyhedron: {name} must be a matrix with {point.size} columns, as v has entries, got "
            f"{pytree.describe(matrix)}"
        )
    check_vector("polyhedron", other, right, len(matrix))
    return {name: matrix, other: right}
