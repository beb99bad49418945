"""Linear solvers: factories that return ``solve(matvec, b) -> x`` with ``A x = b``, over pytrees.

``matvec`` is a linear function ``v -> A v`` over trees like ``b``; ``b`` is a pytree of floating-point or complex
tensors, and ``x`` is a tree like it. Unknowns are coupled across all leaves; leaves may differ in shape and dtype
(the arithmetic is done in the widest, and in no less than float32). Complex systems are solved with the adjoint where
the transpose would be wrong. Every solver is itself differentiable, in ``b`` and in every tensor that ``matvec``
captures, to any order, in both modes, by the implicit rule::

    dx = A^-1 (db - dA x),      b_bar = A^-H x_bar,    A_bar = - b_bar x^H,

and batches under `torch.func.vmap`, where every lane stops by itself. Adjoint systems in the derivatives are solved
by the same solver.

`solve_lstsq` and `solve_normal_cg` also take operators that are not square, where a tree like ``x`` is none like ``b``.
Their option ``init``, a tree like ``x``, says what ``matvec`` acts on. Without it a tree like ``b`` is tried. If
``matvec`` fails on that, and ``b`` is one tensor, a tensor of the shape ``(n, *b.shape[1:])`` is looked for, with ``n``
among the sizes of the tensors that ``matvec`` computes with: the only ``n`` that gives a result like ``b`` is taken, if
``n + 1`` does not as well. In every other case an error asks for ``init``.

Common options:
    rtol, atol: stop at ``|b - A x| <= max(rtol |b|, atol)``, Euclidean norms over all leaves. ``atol`` has the units
        of ``b``. ``rtol=None`` is ``eps^(2/3)`` of the dtype: 4e-11 in float64, 2e-5 in float32. The residual that is
        tested in the end is the true one.
    maxiter: an integer is a budget, and using it up is no failure. None is a safety net of ``max(100, 10 n)``
        iterations for ``n`` scalars over all leaves, and meeting it is a failure.
    ridge: a number >= 0; ``(A + ridge I) x = b`` is solved in the place of ``A x = b``.
    preconditioner: a function ``r -> M^-1 r`` over trees like ``b``, with ``M`` close to ``A``; changes the speed,
        not the solution.
    init: an initial guess, a tree like ``b``; changes the speed, not the solution.
    on_failure: ``"raise"`` a `LinearSolveError` on breakdown or no convergence, ``"warn"`` with a
        `LinearSolveWarning`, or ``"ignore"``; in the forward pass and in derivatives alike.

A user's own function ``solve(matvec, b)`` does in the place of any of these wherever one is taken.
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
