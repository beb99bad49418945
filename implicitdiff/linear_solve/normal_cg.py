"""Conjugate gradients on the normal equations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from implicitdiff._calls import shows_call
from implicitdiff._implicit.linear import LinearSolver
from implicitdiff._implicit.system import System
from implicitdiff._torch.trees import Tree
from implicitdiff.linear_solve._arithmetic import Arithmetic, Iterations, RowScalar, norm
from implicitdiff.linear_solve._krylov import Cycle, iterate, iterative
from implicitdiff.linear_solve._outcome import OnFailure, report_failed_solves
from implicitdiff.linear_solve._pseudoinverse import PseudoinverseProblem

Algorithm = Callable[[System], Tensor]
NOT_FINITE_OR_INDEFINITE = (
    "the operator or the right-hand side is not finite, or the preconditioner is not positive definite: remove the "
    "preconditioner, and look for nan in the operator"
)
DEFICIENT = (
    "the rows of the operator are dependent and the right-hand side is not in its range, or the preconditioner is "
    "not positive definite: remove the preconditioner, or use solve_lstsq"
)


@shows_call
def solve_normal_cg(
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    maxiter: int | None = None,
    ridge: float = 0.0,
    preconditioner: Callable[[Tree], Tree] | None = None,
    init: Tree = None,
    on_failure: OnFailure = "raise",
) -> LinearSolver:
    r"""Make a solver ``solve(matvec, b) -> x`` for ``A x = b``, ``A`` any operator of full rank, square or not, by
    conjugate gradients on ``A^H A x = A^H b``.

    Minimises ``|b - A x|`` over the Krylov space of ``A^H A``, at the rate of `solve_cg` for the squared condition
    number of ``A``.

    For a square ``A`` the stopping test is that of `solve_cg`, on ``|b - A x|``. A preconditioner approximates the
    inverse of ``A^H A``. ``ridge`` is added to ``A``, as in every solver here, and not to ``A^H A`` as in JAXopt: the
    result then solves a linear system, which the derivative belongs to.

    For an ``A`` of ``m`` rows and ``n`` columns, with different trees ``x`` and ``b``:

    - ``x`` is the least-squares solution, and for ``m < n`` the solution of least norm. `init` is a tree like ``x``,
      and the initial guess if ``m >= n``; see `implicitdiff.linear_solve` for a missing `init`.
    - ``b`` may be outside of the range, so the iteration stops at
      ``|A^H (b - A x)| <= max(rtol |A^H b|, atol)``, or at rounding.
    - The preconditioner approximates the inverse of the smaller of ``A^H A``, over trees like ``x``, and ``A A^H``,
      over trees like ``b``. In the second case, and in derivatives of the first, the test is on ``|b - A x|``.
    - ``ridge`` raises. For damped least squares, ``(A^H A + ridge I) x = A^H b``, use a tall operator: ``matvec``
      returns ``(A v, ridge**0.5 * v)``, with the right-hand side ``(b, 0)``.
    - Derivatives are those of the pseudoinverse at constant rank, see `solve_lstsq`, without a check: full rank is
      constant.

    Args:
        rtol: relative tolerance; see above for the test. None: ``eps^(2/3)`` of the dtype.
        atol: absolute tolerance, in the units of ``b``.
        maxiter: budget of iterations. None: ``max(100, 10 n)``; reaching this limit is a failure.
        ridge: solve ``(A + ridge I) x = b``; a number >= 0.
        preconditioner: see above; changes the speed, not the solution.
        init: initial guess, a tree like ``x``; see above.
        on_failure: ``"raise"`` a `LinearSolveError`, ``"warn"`` with a `LinearSolveWarning`, or ``"ignore"``.

    Raises (when solving):
        ValueError: ``matvec`` fails on a tree like ``b``, and no other argument was found: pass `init`.
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
        "the operator is singular and the right-hand side is not in its range, or the operator is not finite: use "
        "solve_lstsq, or add a ridge",
        rtol=rtol,
        atol=atol,
        maxiter=maxiter,
        ridge=ridge,
        preconditioner=preconditioner,
        init=init,
        on_failure=on_failure,
    )
    rectangular = partial(_solve_least_squares, rtol=rtol, atol=atol, maxiter=maxiter, on_failure=on_failure)
    return replace(
        solver,
        algorithm=partial(_solve_any_shape, square=solver.algorithm, rectangular=rectangular),
        # No direction changes a full rank, so the check is off.
        rectangular=partial(PseudoinverseProblem, on_failure="ignore"),
    )


def _solve_any_shape(system: System, *, square: Algorithm, rectangular: Algorithm) -> Tensor:
    return square(system) if system.is_square else rectangular(system)


def _solve_least_squares(
    system: System, *, rtol: float | None, atol: float, maxiter: int | None, on_failure: OnFailure
) -> Tensor:
    """Solve a rectangular system.

    ``b`` may be outside of the range, so the test is on ``|A^T (b - A x)|``. With a preconditioner for ``A A^T`` the
    rows are independent, ``b`` is in the range, and the method of Craig tests ``|b - A x|``.
    """
    if system.precondition is not None and system.of_range:
        outcome = iterate(system, craig, DEFICIENT, rtol, atol, maxiter)
        return report_failed_solves("solve_normal_cg", outcome, system, on_failure)

    def size(ops: Arithmetic, r: Tensor) -> RowScalar:
        return ops.norm(ops.rmatvec(r))

    rounding = _rounding_of_normal(system)
    least = rounding(torch.zeros_like(system.b[:, :1]))
    outcome = iterate(system, normal_conjugate_gradients, NOT_FINITE_OR_INDEFINITE, rtol, atol, maxiter, size, least)
    if bool(outcome.failed.any()):
        # The rounding of A x grows with |x|, which is known only now.
        coarse = outcome.figures()[0] <= rounding(outcome.x)[:, 0]
        outcome = outcome._replace(failed=outcome.failed & ~coarse)
    return report_failed_solves("solve_normal_cg", outcome, system, on_failure)


def _rounding_of_normal(system: System) -> Callable[[Tensor], Tensor]:
    """Return the rounding error of ``|A^T (b - A x)|``, as a function of ``x``.

    If ``b`` is nearly orthogonal to the range, a target relative to ``|A^T b|`` is below this error. The Frobenius norm
    of ``A`` is estimated from the product with one vector: ``E |A^T w|^2 = |A|_F^2`` for random w with ``|w|^2 = m``.
    """
    m = system.b.shape[-1]
    w = torch.cos(7.0 * torch.arange(1, m + 1, dtype=system.b.dtype, device=system.b.device) ** 2)
    w = w.expand(system.b.shape)
    a = math.sqrt(m) * norm(system.rmatvec(w)) / norm(w)
    return lambda x: 4 * system.eps * a * (norm(system.b) + a * norm(x))


def normal_conjugate_gradients(ops: Arithmetic, r: Tensor, target: RowScalar, limit: Iterations) -> Cycle:
    """A `Method` for any operator, by conjugate gradients on the normal equations (Saad, algorithm 8.4, CGNR).

    The test is on ``|r|`` for a square operator, and on ``|A^T r|`` for a rectangular one.
    """
    s = ops.rmatvec(r)
    # Gradients s are divided by the length of the first, so that their squares neither overflow nor underflow.
    unit = ops.norm(s)
    s = ops.divide(s, unit)
    z = ops.precondition(s)

    def is_unfinished(carry: _NormalIterate) -> RowScalar:
        _, r, s, _, _, broken = carry
        size = ops.norm(r) if ops.is_square else unit * ops.norm(s)
        return ops.negate((size <= target) | broken)

    def advance(carry: _NormalIterate, active: RowScalar, left: Iterations) -> tuple[_NormalIterate, Iterations]:
        x, r, s, p, sz, broken = carry
        # alpha = (s, z) / |A p|^2, in two quotients: |A p|^2 may overflow or underflow. x is in original units.
        Ap = ops.matvec(p)
        length = ops.norm(Ap)
        go = active & (length > 0) & (sz > 0)
        broken = broken | (active ^ go)
        # The direction of the unscaled method is ``unit p``, so ``x`` moves by ``((s, z) / |A p|^2) unit p``.
        alpha = ops.ratio(go, sz, length) * ops.ratio(go, unit, length)
        x, r = ops.add(x, alpha, p), ops.add(r, -alpha, Ap)
        # From ``r``, not by a recurrence of its own: ``s`` then stays the gradient of ``x`` up to rounding.
        s = ops.divide(ops.rmatvec(r), unit)
        z = ops.precondition(s)
        sz, before = ops.dot(s, z), sz
        p = ops.add(z, ops.ratio(go, sz, before), p)
        return (x, r, s, p, sz, broken), 1

    start = torch.zeros_like(s), r, s, z, ops.dot(s, z), ops.none
    (x, *_, broken), used = ops.repeat(advance, start, is_unfinished, limit)
    return Cycle(x, used, broken)


_NormalIterate = tuple[Tensor, Tensor, Tensor, Tensor, RowScalar, RowScalar]
"""``x``, ``r``, ``s``, ``p``, ``(s, z)``, and the rows in which the method has broken down."""


def craig(ops: Arithmetic, r: Tensor, target: RowScalar, limit: Iterations) -> Cycle:
    """A `Method` for operators of full row rank, by conjugate gradients on ``A A^T z = r``, ``d = A^T z``.

    The preconditioner approximates the inverse of ``A A^T``.

    Reference: Saad, "Iterative Methods for Sparse Linear Systems", 2nd ed., algorithm 8.5 (CGNE).
    """
    z = ops.precondition(r)
    p = ops.rmatvec(z)
    # Directions p are divided by the length of the first, so that their squares neither overflow nor underflow.
    unit = ops.norm(p)
    p = ops.divide(p, unit)

    def is_unfinished(carry: _Craig) -> RowScalar:
        _, r, _, _, broken = carry
        return ops.negate((ops.norm(r) <= target) | broken)

    def advance(carry: _Craig, active: RowScalar, left: Iterations) -> tuple[_Craig, Iterations]:
        x, r, p, rz, broken = carry
        # alpha = (r, z) / |A^T z|^2 for the iterate in z; x moves along p = A^T z.
        pp = ops.dot(p, p)
        go = active & (pp > 0) & (rz > 0) & (unit > 0)
        broken = broken | (active ^ go)
        # The direction ``A^T q`` of the unscaled method is ``unit p``, so ``x`` moves by
        # ``((r, z) / (unit^2 pp)) unit p``.
        alpha = ops.ratio(go, ops.ratio(go, rz, pp), unit)
        x, r = ops.add(x, alpha, p), ops.add(r, -alpha, ops.matvec(p))
        z = ops.precondition(r)
        rz, before = ops.dot(r, z), rz
        p = ops.add(ops.divide(ops.rmatvec(z), unit), ops.ratio(go, rz, before), p)
        return (x, r, p, rz, broken), 1

    start = torch.zeros_like(p), r, p, ops.dot(r, z), ops.none
    (x, *_, broken), used = ops.repeat(advance, start, is_unfinished, limit)
    return Cycle(x, used, broken)


_Craig = tuple[Tensor, Tensor, Tensor, RowScalar, RowScalar]
"""``x``, ``r``, ``p``, ``(r, z)``, and the rows in which the method has broken down."""
