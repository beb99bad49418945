"""Conjugate gradients on the normal equations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from implicitdiff._implicit.linear import LinearSolver
from implicitdiff._implicit.system import System
from implicitdiff.linear_solve._arithmetic import Arithmetic, Scalar, norm
from implicitdiff.linear_solve._krylov import Cycle, iterate, iterative
from implicitdiff.linear_solve._outcome import OnFailure, report_failed_solves
from implicitdiff.linear_solve._pseudoinverse import PseudoinverseProblem

Algorithm = Callable[[System], Tensor]
NOT_FINITE = "the operator, or the right-hand side, is not finite, or the preconditioner is not positive definite"
DEFICIENT = (
    "the rows of the operator are dependent and the right-hand side is not in its range, or the preconditioner is not "
    "positive definite: leave it out, or take solve_lstsq"
)


def solve_normal_cg(
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    maxiter: int | None = None,
    ridge: float = 0.0,
    preconditioner: Callable[[Any], Any] | None = None,
    init: Any = None,
    on_failure: OnFailure = "raise",
) -> LinearSolver:
    r"""Make a solver ``solve(matvec, b) -> x`` for ``A x = b``, ``A`` any operator of full rank, square or not, by
    conjugate gradients on ``A^H A x = A^H b``.

    Minimises ``|b - A x|`` over the Krylov space of ``A^H A``, as slowly as `solve_cg` on a matrix of squared condition
    number.

    A square ``A``: stops as `solve_cg` does, on ``|b - A x|``. A preconditioner approximates the inverse of ``A^H A``.
    ``ridge`` is added to ``A``, as in every solver here, not to ``A^H A`` as in JAXopt: the result then solves a linear
    system, whose derivative is the one computed.

    An ``A`` of ``m`` rows and ``n`` columns, where a tree like ``x`` is none like ``b``:

    - ``x`` is the least-squares solution, if ``m < n`` the solution of least norm. `init` is a tree like ``x``, from
      which the iteration starts if ``m >= n``; see `implicitdiff.linear_solve` for what is done without it.
    - ``b`` may be outside of the range, so the iteration stops at
      ``|A^H (b - A x)| <= max(rtol |A^H b|, atol)``, or where that is rounding.
    - The preconditioner approximates the inverse of the smaller one of ``A^H A``, over trees like ``x``, and ``A A^H``,
      over trees like ``b``. In the second case, and in derivatives of the first, ``|b - A x|`` is judged.
    - ``ridge`` is refused. Damped least squares, ``(A^H A + ridge I) x = A^H b``, is a tall operator: let ``matvec``
      return ``(A v, ridge**0.5 * v)``, and pass ``(b, 0)``.
    - Derivatives are those of the pseudoinverse at constant rank, see `solve_lstsq`. That the rank is constant is not
      looked at: at full rank it is.

    The other options: `implicitdiff.linear_solve`.

    Raises (when solving):
        ValueError: ``matvec`` does not take a tree like ``b``, and what it takes cannot be found: pass `init`.
        LinearSolveError: a square ``A`` is singular and ``b`` not in its range, or ``maxiter=None`` did not suffice.

    Reference:
        Saad, "Iterative Methods for Sparse Linear Systems", 2nd ed., algorithm 8.4 (CGNR).

    Example:
        >>> import torch
        >>> from implicitdiff.linear_solve import solve_normal_cg
        >>> A = torch.tensor([[0.0, 2.0], [-1.0, 0.0]])
        >>> solve_normal_cg()(lambda v: A @ v, torch.tensor([2.0, 3.0])).round(decimals=4)
        tensor([-3.,  1.])

        A line through three points:

        >>> X = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
        >>> solve_normal_cg()(lambda v: X @ v, torch.tensor([1.0, 2.0, 4.0])).round(decimals=4)
        tensor([0.8333, 1.5000])
    """
    solver = iterative(
        "solve_normal_cg",
        normal_conjugate_gradients,
        "the operator is singular and the right-hand side not in its range, or it is not finite: take solve_lstsq, "
        "or add a ridge",
        rtol=rtol,
        atol=atol,
        maxiter=maxiter,
        ridge=ridge,
        preconditioner=preconditioner,
        init=init,
        on_failure=on_failure,
    )
    rectangular = partial(_solve_rectangular, rtol=rtol, atol=atol, maxiter=maxiter, on_failure=on_failure)
    return replace(
        solver,
        algorithm=partial(_solve, square=solver.algorithm, rectangular=rectangular),
        # At full rank no direction changes the rank.
        rectangular=partial(PseudoinverseProblem, on_failure="ignore"),
    )


def _solve(system: System, *, square: Algorithm, rectangular: Algorithm) -> Tensor:
    return square(system) if system.is_square else rectangular(system)


def _solve_rectangular(
    system: System, *, rtol: float | None, atol: float, maxiter: int | None, on_failure: OnFailure
) -> Tensor:
    """Solve by a `Method` that judges ``|A^T (b - A x)|``, since ``b`` may be outside of the range; with a
    preconditioner for ``A A^T``, whose rank is that of the rows, by one that judges ``|b - A x|``."""
    if system.precondition is not None and system.of_range:
        outcome = iterate(system, craig, DEFICIENT, rtol, atol, maxiter)
        return report_failed_solves("solve_normal_cg", outcome, system, on_failure)

    def size(ops: Arithmetic, r: Tensor) -> Scalar:
        return ops.norm(ops.rmatvec(r))

    rounding = _rounding(system)
    least = rounding(torch.zeros_like(system.b[:, :1]))
    outcome = iterate(system, normal_conjugate_gradients, NOT_FINITE, rtol, atol, maxiter, size, least)
    if bool(outcome.failed.any()):
        # A product with a large solution is rounded coarsely too.
        coarse = outcome.figures()[0] <= rounding(outcome.x)[:, 0]
        outcome = outcome._replace(failed=outcome.failed & ~coarse)
    return report_failed_solves("solve_normal_cg", outcome, system, on_failure)


def _rounding(system: System) -> Callable[[Tensor], Tensor]:
    """What rounding makes of ``|A^T (b - A x)|``, as a function of ``x``.

    Where ``b`` is nearly orthogonal to the range, nothing relative to ``A^T b`` is reached. The Frobenius norm of ``A``
    is estimated by the product with one vector.
    """
    m = system.b.shape[-1]
    w = torch.cos(7.0 * torch.arange(1, m + 1, dtype=system.b.dtype, device=system.b.device) ** 2)
    w = w.expand(system.b.shape)
    a = math.sqrt(m) * norm(system.rmatvec(w)) / norm(w)
    return lambda x: 4 * system.eps * a * (norm(system.b) + a * norm(x))


def normal_conjugate_gradients(ops: Arithmetic, r: Tensor, target: Scalar, limit: int) -> Cycle:
    """A `Method` for any operator, by conjugate gradients on the normal equations.

    What reaches the target is ``|A^T r|`` if the operator is rectangular.
    """
    s = ops.rmatvec(r)
    x = torch.zeros_like(s)
    # In units in which the first gradient has length one, no square leaves the range of the dtype.
    unit = ops.norm(s)
    s = ops.divide(s, unit)
    z = p = ops.precondition(s)
    sz, broken = ops.dot(s, z), ops.none
    used = 0

    def size() -> Scalar:
        return ops.norm(r) if ops.is_square else unit * ops.norm(s)

    while used < limit and ops.any(active := ops.negate((size() <= target) | broken)):
        Ap = ops.matvec(p)
        length = ops.norm(Ap)
        go = active & (length > 0) & (sz > 0)
        broken = broken | (active ^ go)
        alpha = ops.ratio(go, sz, length) * ops.ratio(go, unit, length)
        x, r = ops.add(x, alpha, p), ops.add(r, -alpha, Ap)
        s = ops.divide(ops.rmatvec(r), unit)
        z = ops.precondition(s)
        sz, before = ops.dot(s, z), sz
        p = ops.add(z, ops.ratio(go, sz, before), p)
        used += 1
    return Cycle(x, used, broken)


def craig(ops: Arithmetic, r: Tensor, target: Scalar, limit: int) -> Cycle:
    """A `Method` for operators of full row rank, by conjugate gradients on ``A A^T z = r``, ``d = A^T z``; the
    preconditioner is one for that.

    Reference: Saad, "Iterative Methods for Sparse Linear Systems", 2nd ed., algorithm 8.5 (CGNE).
    """
    z = ops.precondition(r)
    p = ops.rmatvec(z)
    # In units in which the first direction has length one, no square leaves the range of the dtype.
    unit = ops.norm(p)
    p = ops.divide(p, unit)
    x = torch.zeros_like(p)
    rz, broken = ops.dot(r, z), ops.none
    used = 0
    while used < limit and ops.any(active := ops.negate((ops.norm(r) <= target) | broken)):
        pp = ops.dot(p, p)
        go = active & (pp > 0) & (rz > 0) & (unit > 0)
        broken = broken | (active ^ go)
        alpha = ops.ratio(go, ops.ratio(go, rz, pp), unit)
        x, r = ops.add(x, alpha, p), ops.add(r, -alpha, ops.matvec(p))
        z = ops.precondition(r)
        rz, before = ops.dot(r, z), rz
        p = ops.add(ops.divide(ops.rmatvec(z), unit), ops.ratio(go, rz, before), p)
        used += 1
    return Cycle(x, used, broken)
