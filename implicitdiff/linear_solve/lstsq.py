"""Least squares by the singular value decomposition."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from implicitdiff._calls import shows_call
from implicitdiff._implicit.linear import LinearSolver
from implicitdiff._torch.trees import Tree
from implicitdiff.linear_solve._direct import direct
from implicitdiff.linear_solve._outcome import OnFailure, check_not_negative
from implicitdiff.linear_solve._pseudoinverse import PseudoinverseProblem


@shows_call
def solve_lstsq(*, rtol: float | None = None, init: Tree = None, on_failure: OnFailure = "raise") -> LinearSolver:
    r"""Make a solver ``solve(matvec, b) -> x`` for the ``x`` of least ``|x|`` among those of least ``|b - A x|``,
    ``A`` any operator, square or not.

    Materialises ``A``, of ``m`` rows and ``n`` columns, by ``min(m, n)`` products, and computes its singular value
    decomposition. For a square matrix this takes about ten times the work of `solve_lu`, and works for singular ``A``.

    If ``A`` is not square, ``matvec`` maps trees like ``x``, given by `init`, to trees like ``b``; see
    `implicitdiff.linear_solve` for a missing `init`.

    Derivatives of any order are those of ``x = A^+ b`` at constant rank, with the motion of range and null space::

        dx = A^+ (db - dA x) + A^+ A^{+H} dA^H r + (I - A^+ A) dA^H A^{+H} x,      r = b - A x.

    At a change of rank the derivative does not exist. The rank is constant to first order if ``dA`` maps the null space
    of ``A`` into its range. This condition is checked for one vector of the null space, up to rounding, in forward
    mode, and in reverse mode if ``A`` depends on one real number. A cotangent of several numbers, as of a matrix, is
    not checked: it is right for directions that keep the rank, and has no meaning for others.

    Args:
        rtol: singular values up to ``rtol`` times the largest count as zero; None: ``max(m, n)`` times the
            precision of the dtype. A neglected singular value causes an error of its relative size in derivatives.
        init: a tree like ``x``, of any values. None: a tree like ``b``, or the one found.
        on_failure: ``"raise"``, ``"warn"`` or ``"ignore"``, which omits the check of the rank too.

    Raises (when solving):
        ValueError: ``matvec`` fails on a tree like ``b``, and no other argument was found: pass `init`.
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
    check_not_negative("solve_lstsq", "rtol", rtol, or_none=True)
    broken = "the matrix or the right-hand side is not finite: look for nan in them"
    solver = direct("solve_lstsq", partial(least_squares_rows, rtol=rtol), broken, on_failure=on_failure)
    problem_type = partial(PseudoinverseProblem, rtol=rtol, on_failure=on_failure)
    return replace(solver, init=init, problem_type=problem_type, rectangular=problem_type)


def least_squares_rows(a: Tensor, b: Tensor, eps: float, *, rtol: float | None) -> tuple[Tensor, Tensor]:
    """A `Factorise` for any matrix, by its pseudoinverse."""
    # The decomposition of a batch raises if one lane is not finite: replace such lanes by zeros, and report them.
    finite = torch.isfinite(a).all(dim=(-2, -1))
    u, s, vh = torch.linalg.svd(torch.where(finite[:, None, None], a, 0.0), full_matrices=False)
    # The default of numpy.linalg.matrix_rank, relative to the largest singular value.
    cut = (max(a.shape[-2:]) * eps if rtol is None else rtol) * s[:, :1]
    # The masked ``1 / 0`` meets no derivative: `PseudoinverseProblem` differentiates the solve as a whole.
    inverse = torch.where(s > cut, 1.0 / s, 0.0)[..., None]
    # ``A^+ = V S^+ U'`` for ``A = U S V'``.
    return vh.mT @ (inverse * (u.mT @ b)), ~finite
