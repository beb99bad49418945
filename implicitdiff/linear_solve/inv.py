"""The explicit inverse, and its Neumann series."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from implicitdiff._calls import shows_call
from implicitdiff._implicit.linear import LinearSolver
from implicitdiff._torch.trees import Tree
from implicitdiff.linear_solve._arithmetic import Arithmetic, RowScalar
from implicitdiff.linear_solve._direct import Factors, direct, factorised
from implicitdiff.linear_solve._krylov import Cycle, iterative
from implicitdiff.linear_solve._outcome import OnFailure
from implicitdiff.linear_solve.lu import SINGULAR


@shows_call
def solve_inv(
    *,
    ns: bool = False,
    maxiter: int | None = None,
    alpha: float | None = None,
    rtol: float | None = None,
    atol: float = 0.0,
    ridge: float = 0.0,
    init: Tree = None,
    on_failure: OnFailure = "raise",
) -> LinearSolver:
    r"""Make a solver ``solve(matvec, b) -> x`` that multiplies by the inverse of ``A``, or by its Neumann series.

    ``ns=False`` materialises ``A`` over all leaves and inverts it; `solve_lu` needs less work and rounds less.
    ``ns=True`` sums ``x = alpha sum_k (I - alpha A)^k b``, with one product a term. The series converges if the
    spectral radius of ``I - alpha A`` is below one. Stopping test as in `solve_cg`.

    Args:
        ns: sum the Neumann series.
        ridge: solve ``(A + ridge I) x = b``; a number >= 0.
        maxiter: budget of terms. None: ``max(100, 10 n)``, and reaching it is a failure. An error with ``ns=False``.
        rtol: relative tolerance of the series, as in `solve_cg`. An error with ``ns=False``.
        atol: absolute tolerance of the series, in the units of ``b``. An error with ``ns=False``.
        init: initial guess of the series, a tree like ``b``. An error with ``ns=False``.
        alpha: step of the series, a number > 0; 1 by default. An error with ``ns=False``.
        on_failure: ``"raise"`` a `LinearSolveError`, ``"warn"`` with a `LinearSolveWarning`, or ``"ignore"``.

    Raises (when solving):
        LinearSolveError: ``A`` is singular to working precision, or the series diverges, or does not converge with
            ``maxiter=None``.

    Reference:
        Lorraine et al., "Optimizing Millions of Hyperparameters by Implicit Differentiation", 2020, section 4.

    Example:
        >>> import torch
        >>> from implicitdiff.linear_solve import solve_inv
        >>> A = torch.tensor([[1.0, 0.5], [0.0, 1.0]])
        >>> solve_inv()(lambda v: A @ v, torch.tensor([2.0, 2.0]))
        tensor([1., 2.])
        >>> solve_inv(ns=True, maxiter=100)(lambda v: A @ v, torch.tensor([2.0, 2.0]))
        tensor([1., 2.])
    """
    if ns:
        alpha = 1.0 if alpha is None else alpha
        if not (isinstance(alpha, (int, float)) and 0 < alpha < math.inf):
            raise ValueError(f"solve_inv: alpha must be a finite number > 0, got {alpha!r}")
        broken = (
            "the Neumann series diverges, because I - alpha A has a spectral radius above 1: use a smaller alpha, or "
            "another solver"
        )
        method = partial(neumann, alpha=alpha)
        return iterative(
            "solve_inv",
            method,
            broken,
            rtol=rtol,
            atol=atol,
            maxiter=maxiter,
            ridge=ridge,
            init=init,
            on_failure=on_failure,
        )
    # Options without an effect are errors, not ignored.
    if (maxiter, alpha, rtol, init, atol) != (None, None, None, None, 0.0):
        raise ValueError(
            "solve_inv: maxiter, alpha, rtol, atol and init are options of the Neumann series, which needs ns=True"
        )
    return direct("solve_inv", factorised(inverse), SINGULAR, ridge=ridge, on_failure=on_failure)


def inverse(a: Tensor) -> Factors:
    """Factors from an explicit inverse."""
    inv, info = torch.linalg.inv_ex(a)
    # Rows are real, so the transpose is the adjoint.
    return lambda b: inv @ b, lambda b: inv.mT @ b, info != 0


def neumann(ops: Arithmetic, r: Tensor, target: RowScalar, limit: int, *, alpha: float) -> Cycle:
    """A `Method` that sums the Neumann series."""
    first = size = ops.norm(r)
    x = torch.zeros_like(r)
    used = 0
    # Term k is alpha r_k: the residual of the partial sum satisfies r_{k+1} = (I - alpha A) r_k. The limit of
    # ``alpha sum_k (I - alpha A)^k r`` is ``A^-1 r`` for a spectral radius below 1.
    while used < limit and ops.any(active := ops.negate(size <= target) & ops.finite(size)):
        # A select instead of a zero step: the r of a diverged row may be infinite, and 0 * inf is nan.
        x = ops.select(active, x + alpha * r, x)
        r = ops.select(active, r - alpha * ops.matvec(r), r)
        size = ops.norm(r)
        used += 1
    # A sum that has enlarged the residual diverges; negated, so that nan counts too.
    return Cycle(x, used, ops.negate(size <= first))
