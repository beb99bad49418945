"""Linear solvers: factories that return ``solve(matvec, b) -> x`` with ``A x = b``, over pytrees.

``matvec`` is a linear function ``v -> A v`` over trees like ``b``; ``b`` is a pytree of floating-point or complex
tensors, and ``x`` a tree like ``b``. Unknowns are coupled across all leaves. Leaves may differ in shape and dtype; the
arithmetic uses the widest dtype, at least float32. Complex systems use the adjoint where the transpose would be wrong.
Every solver is differentiable, in ``b`` and in every tensor that ``matvec`` captures, to any order, in both modes, by
the implicit rule::

    dx = A^-1 (db - dA x),      b_bar = A^-H x_bar,    A_bar = - b_bar x^H,

and batches under `torch.func.vmap`, where every lane stops separately. The solver itself solves the adjoint systems of
derivatives.

`solve_lstsq` and `solve_normal_cg` accept operators that are not square, for which ``x`` and ``b`` are different trees.
Pass a tree like ``x`` as the option ``init``. Without ``init``, ``matvec`` is tried on a tree like ``b``. If this fails
and ``b`` is one tensor, tensors of shape ``(n, *b.shape[1:])`` are tried, for each size ``n`` of a tensor in
``matvec``. If exactly one ``n`` gives a result like ``b``, and ``n + 1`` does not, it is taken. Otherwise an error asks
for ``init``.

Common options:
    rtol, atol: stop at ``|b - A x| <= max(rtol |b|, atol)``, Euclidean norms over all leaves. ``atol`` has the units
        of ``b``. ``rtol=None`` is ``eps^(2/3)`` of the dtype: 4e-11 in float64, 2e-5 in float32. The final test is on
        the true residual.
    maxiter: an integer is a budget; reaching it is not a failure. None sets a limit of ``max(100, 10 n)`` iterations
        for ``n`` scalars over all leaves; reaching it is a failure.
    ridge: a number >= 0: solve ``(A + ridge I) x = b``.
    preconditioner: a function ``r -> M^-1 r`` over trees like ``b``, with ``M`` close to ``A``. Changes the speed,
        not the solution.
    init: an initial guess, a tree like ``b``. Changes the speed, not the solution.
    on_failure: on breakdown or no convergence ``"raise"`` a `LinearSolveError`, ``"warn"`` with a `LinearSolveWarning`,
        or ``"ignore"``; in the forward pass and in derivatives.

A function ``solve(matvec, b)`` of the user is accepted wherever a solver is.
"""

from implicitdiff._implicit.linear import LinearSolver
from implicitdiff.linear_solve.auto import solve_auto
from implicitdiff.linear_solve.bicgstab import solve_bicgstab
from implicitdiff.linear_solve.cg import solve_cg
from implicitdiff.linear_solve.cholesky import solve_cholesky
from implicitdiff.linear_solve.gmres import solve_gmres
from implicitdiff.linear_solve.inv import solve_inv
from implicitdiff.linear_solve.jacobi import jacobi_preconditioner
from implicitdiff.linear_solve.lstsq import solve_lstsq
from implicitdiff.linear_solve.lu import solve_lu
from implicitdiff.linear_solve.normal_cg import solve_normal_cg

__all__ = [
    "LinearSolver",
    "jacobi_preconditioner",
    "solve_auto",
    "solve_bicgstab",
    "solve_cg",
    "solve_cholesky",
    "solve_gmres",
    "solve_inv",
    "solve_lstsq",
    "solve_lu",
    "solve_normal_cg",
]


def __dir__() -> list[str]:
    return __all__
