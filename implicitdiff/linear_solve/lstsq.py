"""Least squares by the singular value decomposition."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from implicitdiff._implicit.linear import LinearSolver
from implicitdiff.linear_solve._direct import direct
from implicitdiff.linear_solve._outcome import OnFailure
from implicitdiff.linear_solve._pseudoinverse import PseudoinverseProblem


def solve_lstsq(*, rtol: float | None = None, init: Any = None, on_failure: OnFailure = "raise") -> LinearSolver:
    r"""Make a solver ``solve(matvec, b) -> x`` for the ``x`` of least ``|x|`` among those of least ``|b - A x|``,
    ``A`` any operator, square or not.

    Materialises ``A``, of ``m`` rows and ``n`` columns, by ``min(m, n)`` products, and takes its singular value
    decomposition: for a square one some ten times the work of `solve_lu`, and defined for singular ``A`` too.

    If ``A`` is not square, ``matvec`` takes trees like ``x``, which `init` shows, to trees like ``b``; see
    `implicitdiff.linear_solve` for what is done without it.

    Derivatives are those of ``x = A^+ b`` at constant rank, of any order: range and null space turn with ``A``::

        dx = A^+ (db - dA x) + A^+ A^{+H} dA^H r + (I - A^+ A) dA^H A^{+H} x,      r = b - A x.

    Where the rank changes there is no derivative. The rank stays, to first order, if ``dA`` takes the null space of
    ``A`` into its range, and this is looked at, by one vector of that space and up to rounding, in forward mode and,
    in reverse mode, where ``A`` depends on one real number. A cotangent of several numbers, as of a matrix, cannot
    tell: it is right for the directions that keep the rank, which may be all that it is pulled back to, and has no
    meaning for the others.

    Args:
        rtol: singular values up to ``rtol`` times the largest count as zero; None: ``max(m, n)`` times the
            precision of the dtype. What counts as zero but is not leaves its relative size as an error in derivatives.
        init: a tree like ``x``; its numbers do not matter. None: one like ``b``, or what is found.
        on_failure: see `implicitdiff.linear_solve`; ``"ignore"`` also leaves out the look at the rank.

    Raises (when solving):
        ValueError: ``matvec`` does not take a tree like ``b``, and what it takes cannot be found: pass `init`.
        LinearSolveError: ``A`` is not finite; in a derivative, its rank changes.

    References:
        Golub and Van Loan, "Matrix Computations", 4th ed., section 5.5.
        Golub and Pereyra, "The Differentiation of Pseudo-Inverses and Nonlinear Least Squares Problems Whose Variables
        Separate", SIAM J. Numer. Anal. 10, 1973.

    Example:
        >>> import torch
        >>> from implicitdiff.linear_solve import solve_lstsq
        >>> A = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
        >>> solve_lstsq()(lambda v: A @ v, torch.tensor([2.0, 2.0]))
        tensor([1.0000, 1.0000])

        A line through three points:

        >>> times = torch.tensor([0.0, 1.0, 2.0])
        >>> X = torch.stack([torch.ones(3), times], dim=1)
        >>> solve_lstsq()(lambda v: X @ v, torch.tensor([1.0, 2.0, 4.0])).round(decimals=4)
        tensor([0.8333, 1.5000])

        Unknowns by name:

        >>> init = {"offset": torch.zeros(()), "slope": torch.zeros(())}
        >>> line = solve_lstsq(init=init)(lambda v: v["offset"] + v["slope"] * times, torch.tensor([1.0, 2.0, 4.0]))
        >>> line["slope"].round(decimals=4)
        tensor(1.5000)
    """
    if rtol is not None and not (isinstance(rtol, (int, float)) and 0 <= rtol < math.inf):
        raise ValueError(f"solve_lstsq: rtol must be a finite number >= 0 or None, got {rtol!r}")
    broken = "the matrix, or the right-hand side, is not finite"
    solver = direct("solve_lstsq", partial(least_squares, rtol=rtol), broken, on_failure=on_failure)
    kind = partial(PseudoinverseProblem, rtol=rtol, on_failure=on_failure)
    return replace(solver, init=init, kind=kind, rectangular=kind)


def least_squares(a: Tensor, b: Tensor, eps: float, *, rtol: float | None) -> tuple[Tensor, Tensor]:
    """A `Factorise` for any matrix: the product with its pseudoinverse."""
    # The decomposition raises on what is not finite; the lanes that are go on.
    finite = torch.isfinite(a).all(dim=(-2, -1))
    u, s, vh = torch.linalg.svd(torch.where(finite[:, None, None], a, 0.0), full_matrices=False)
    cut = (max(a.shape[-2:]) * eps if rtol is None else rtol) * s[:, :1]
    inverse = torch.where(s > cut, 1.0 / s, 0.0)[..., None]
    return vh.mT @ (inverse * (u.mT @ b)), ~finite
