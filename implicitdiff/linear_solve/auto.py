"""The default linear solver."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from implicitdiff._calls import shows_call
from implicitdiff._implicit.linear import LinearSolver
from implicitdiff._implicit.system import System
from implicitdiff.linear_solve._arithmetic import dot
from implicitdiff.linear_solve._direct import factorised, materialised
from implicitdiff.linear_solve._krylov import check_tolerances, iterate
from implicitdiff.linear_solve._outcome import OnFailure, check_integer, check_on_failure, report_failed_solves
from implicitdiff.linear_solve.cg import INDEFINITE, conjugate_gradients
from implicitdiff.linear_solve.gmres import NOT_FINITE, gmres
from implicitdiff.linear_solve.lu import SINGULAR, lu


@shows_call
def solve_auto(
    *, dense_up_to: int = 1000, rtol: float | None = None, atol: float = 0.0, on_failure: OnFailure = "raise"
) -> LinearSolver:
    r"""Make the default solver: direct for few unknowns, a Krylov method for more.

    Up to ``dense_up_to`` scalars, and up to 1 GiB in float64 for the matrices of all lanes: `solve_lu`. Otherwise
    `solve_cg`, if a random pair of vectors indicates that ``A`` is symmetric; and `solve_gmres` with 50 vectors, if CG
    fails or ``A`` is not symmetric. Failure of both is reported.

    Args:
        dense_up_to: the most unknowns (scalars, over all leaves) for which the matrix is materialised.
        rtol: relative tolerance; stops at ``|b - A x| <= max(rtol |b|, atol)``. None: ``eps^(2/3)`` of the dtype.
        atol: absolute tolerance, in the units of ``b``.
        on_failure: ``"raise"`` a `LinearSolveError`, ``"warn"`` with a `LinearSolveWarning`, or ``"ignore"``.

    Raises (when solving):
        LinearSolveError: the matrix is singular to working precision, or the iteration does not converge.

    Example:
        >>> import torch
        >>> from implicitdiff.linear_solve import solve_auto
        >>> A = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
        >>> solve_auto()(lambda v: A @ v, torch.tensor([1.0, 5.0]))
        tensor([2., 1.])
    """
    check_on_failure("solve_auto", on_failure)
    check_tolerances("solve_auto", rtol, atol, None)
    check_integer("solve_auto", "dense_up_to", dense_up_to, 0)

    algorithm = partial(_solve_by_size, dense_up_to=dense_up_to, rtol=rtol, atol=atol, on_failure=on_failure)
    return LinearSolver("solve_auto", algorithm)


def _solve_by_size(
    system: System, *, dense_up_to: int, rtol: float | None, atol: float, on_failure: OnFailure
) -> Tensor:
    n = system.b.shape[-1]
    # 2**27 numbers are 1 GiB in float64.
    if n <= dense_up_to and system.lanes * n * n <= 2**27:
        return report_failed_solves(
            "solve_auto (LU)", materialised(system, factorised(lu), SINGULAR), system, on_failure
        )
    # Symmetry does not show definiteness, so a failure of CG is no failure of the solve: GMRES follows.
    if _looks_symmetric(system):
        outcome = iterate(system, conjugate_gradients, INDEFINITE, rtol, atol, None)
        if not bool(outcome.failed.any()):
            return outcome.x
    outcome = iterate(system, partial(gmres, restart=50), NOT_FINITE, rtol, atol, None)
    return report_failed_solves("solve_auto (GMRES)", outcome, system, on_failure)


def _looks_symmetric(system: System) -> bool:
    """True if ``u.Av = v.Au`` up to rounding for one pair of random vectors in each row."""
    # Seeded, so that equal systems get equal solvers.
    generator = torch.Generator(device=system.b.device).manual_seed(0)
    u, v = torch.randn(2, *system.b.shape, dtype=system.b.dtype, device=system.b.device, generator=generator)
    Au, Av = system.matvec(u), system.matvec(v)
    # Both products round by about ``eps |u| |A v|``; ``eps^(3/4)`` leaves a margin.
    size = torch.linalg.vector_norm(u, dim=-1) * torch.linalg.vector_norm(Av, dim=-1)
    difference = (dot(u, Av) - dot(Au, v))[:, 0].abs()
    return bool((difference <= torch.finfo(u.dtype).eps ** 0.75 * size).all())
