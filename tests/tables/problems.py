"""The rows of the table of problems: a differentiable solution, and the same function by other means.

Every row is a function ``solution(theta)`` of one vector, and a `reference` that is a closed form or an unrolled
iteration.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import tables.solvers as searches
from implicitdiff import custom_fixed_point, custom_root, root_vjp
from implicitdiff.linear_solve import LinearSolver, solve_gmres, solve_lstsq, solve_lu
from implicitdiff.solvers import qp
from tables.linear_solvers import SOLVERS, Row
from tables.solvers import SEARCHES

F64 = torch.float64
# Derivatives through an exact factorisation are right to rounding; a Krylov solve leaves the residual that it was
# asked for.
EXACT = 1e-8
KRYLOV = 1e-6


class Problem(NamedTuple):
    name: str
    solution: Callable[[Tensor], Tensor]
    reference: Callable[[Tensor], Tensor]
    theta: Tensor
    tolerance: float = EXACT


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# --- a coupled cubic: x^3 + sum(x) / 10 = theta ---------------------------------------------------------------------

CUBIC_THETA = torch.tensor([1.0, 2.0, 5.0], dtype=F64)


def cubic(x: Tensor, theta: Tensor) -> Tensor:
    return x**3 + 0.1 * x.sum() - theta


def newton_for_cubic(init: Tensor, theta: Tensor) -> Tensor:
    x = init
    for _ in range(12):
        jacobian = torch.diag_embed(3 * x**2) + 0.1
        x = x - torch.linalg.inv(jacobian) @ cubic(x, theta)
    return x


def cubic_unrolled(theta: Tensor) -> Tensor:
    return newton_for_cubic(torch.ones_like(theta), theta)


def cubic_root(theta: Tensor, **options) -> Tensor:
    return custom_root(cubic, **options)(newton_for_cubic)(torch.ones_like(theta), theta)


def cubic_captured(theta: Tensor) -> Tensor:
    @custom_root(lambda x: cubic(x, theta))
    def solver(init):
        return newton_for_cubic(init, theta)

    return solver(torch.ones_like(theta))


def cubic_by_keyword(theta: Tensor) -> Tensor:
    return custom_root(cubic)(newton_for_cubic)(torch.ones_like(theta), theta=theta)


def cubic_half_captured(theta: Tensor) -> Tensor:
    """The same tensor passed and captured: both ways count."""

    @custom_root(lambda x, shift: x**3 + 0.1 * x.sum() - (theta + shift) / 2)
    def solver(init, shift):
        return newton_for_cubic(init, (theta + shift) / 2)

    return solver(torch.ones_like(theta), theta)


# --- ridge regression, one penalty a feature, as a stationary point -------------------------------------------------

RIDGE_X = torch.randn(12, 3, dtype=F64, generator=_generator())
RIDGE_Y = torch.randn(12, dtype=F64, generator=_generator()) + RIDGE_X.sum(dim=1)
RIDGE_THETA = torch.tensor([0.5, 1.0, 2.0], dtype=F64)


def ridge_objective(w: Tensor, theta: Tensor) -> Tensor:
    return 0.5 * ((RIDGE_X @ w - RIDGE_Y) ** 2).sum() + 0.5 * (theta * w**2).sum()


def ridge_closed_form(theta: Tensor) -> Tensor:
    return torch.linalg.inv(RIDGE_X.T @ RIDGE_X + torch.diag_embed(theta)) @ (RIDGE_X.T @ RIDGE_Y)


def ridge(theta: Tensor, **options) -> Tensor:
    @custom_root(torch.func.grad(ridge_objective), **options)
    def solver(init, theta):
        return ridge_closed_form(theta)

    return solver(None, theta)


def ridge_as_dict(theta: Tensor) -> Tensor:
    """Parameters and penalties in dictionaries, of different shapes, in different orders of keys."""

    def objective(params, penalty):
        return ridge_objective(
            torch.cat([params["w"], params["v"][None]]), torch.cat([penalty["w"], penalty["v"][None]])
        )

    @custom_root(torch.func.grad(objective))
    def solver(init, penalty):
        w = ridge_closed_form(torch.cat([penalty["w"], penalty["v"][None]]))
        return {"v": w[2], "w": w[:2]}

    out = solver(None, {"w": theta[:2], "v": theta[2]})
    return torch.cat([out["w"], out["v"][None]])


def ridge_by_root_vjp(theta: Tensor) -> Tensor:
    (grad,) = root_vjp(torch.func.grad(ridge_objective), ridge_closed_form(theta), (theta,), RIDGE_THETA)
    return grad


def ridge_vjp_closed_form(theta: Tensor) -> Tensor:
    inverse = torch.linalg.inv(RIDGE_X.T @ RIDGE_X + torch.diag_embed(theta))
    return -(inverse @ RIDGE_THETA) * ridge_closed_form(theta)


# --- the fixed point z = tanh(W z + theta) --------------------------------------------------------------------------

TANH_W = 0.25 * torch.randn(3, 3, dtype=F64, generator=_generator())
TANH_THETA = torch.tensor([0.3, -0.2, 0.5], dtype=F64)


def tanh_step(z: Tensor, theta: Tensor) -> Tensor:
    return torch.tanh(TANH_W @ z + theta)


def iterate_tanh(z: Tensor, theta: Tensor) -> Tensor:
    for _ in range(45):
        z = tanh_step(z, theta)
    return z


def tanh_unrolled(theta: Tensor) -> Tensor:
    return iterate_tanh(torch.zeros_like(theta), theta)


def tanh_fixed_point(theta: Tensor, **options) -> Tensor:
    return custom_fixed_point(tanh_step, **options)(iterate_tanh)(torch.zeros_like(theta), theta)


def tanh_several_leaves(theta: Tensor) -> Tensor:
    """One unknown as a tuple of a 2 x 1 matrix and a scalar, coupled through W; theta captured."""

    def join(z):
        return torch.cat([z[0].reshape(2), z[1][None]])

    def split(z):
        return z[:2].reshape(2, 1), z[2]

    @custom_fixed_point(lambda z: split(tanh_step(join(z), theta)))
    def solver(init):
        return split(iterate_tanh(join(init), theta))

    return join(solver(split(torch.zeros_like(theta))))


# --- linear systems, the solver itself being differentiated ---------------------------------------------------------

LINEAR_THETA = torch.tensor([0.4, -0.3, 0.6], dtype=F64)
LINEAR_B = torch.randn(3, 3, dtype=F64, generator=_generator())


def definite(theta: Tensor) -> Tensor:
    """Symmetric, eigenvalues between 1/2 and 5/2."""
    return torch.outer(theta, theta) + torch.diag_embed(1 + theta / 2) + 0.1


def general(theta: Tensor) -> Tensor:
    return definite(theta) + 0.3 * (LINEAR_B - LINEAR_B.T) * theta[0]


LOW_RANK = torch.randn(4, 3, 2, dtype=F64, generator=_generator())


def low_rank_factors(theta: Tensor) -> tuple[Tensor, Tensor]:
    return LOW_RANK[0] + theta[0] * LOW_RANK[1], (LOW_RANK[2] + torch.sin(theta[1:]) * LOW_RANK[3]).T


def low_rank(theta: Tensor) -> Tensor:
    """Of rank two for every theta."""
    left, right = low_rank_factors(theta)
    return left @ right


def least_squares(theta: Tensor) -> Tensor:
    def matvec(v: Tensor) -> Tensor:
        left, right = low_rank_factors(theta)
        return left @ (right @ v)

    return solve_lstsq()(matvec, torch.sin(theta))


def least_squares_by_pinv(theta: Tensor) -> Tensor:
    return torch.linalg.pinv(low_rank(theta), rtol=1e-8) @ torch.sin(theta)


def solve_with(solve, matrix: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def solution(theta: Tensor) -> Tensor:
        a = matrix(theta)
        return solve(lambda v: a @ v, torch.sin(theta))

    return solution


def solved_by_inverse(matrix: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda theta: torch.linalg.inv(matrix(theta)) @ torch.sin(theta)


def complex_matrix(theta: Tensor) -> Tensor:
    return torch.complex(general(theta), 0.5 * torch.outer(theta, theta.flip(0)))


def complex_system(theta: Tensor) -> Tensor:
    a = complex_matrix(theta)
    x = solve_lu()(lambda v: a @ v, torch.complex(torch.sin(theta), theta**2))
    return torch.cat([x.real, x.imag])


def complex_reference(theta: Tensor) -> Tensor:
    # As real blocks: torch's complex inverse is right too, but this shares nothing with a complex solve.
    a, b = general(theta), 0.5 * torch.outer(theta, theta.flip(0))
    blocks = torch.cat([torch.cat([a, -b], dim=1), torch.cat([b, a], dim=1)])
    return torch.linalg.inv(blocks) @ torch.cat([torch.sin(theta), theta**2])


# --- complex roots: z^2 + conj(z) theta / 4 = theta (not holomorphic) -----------------------------------------------


def complex_condition(z: Tensor, theta: Tensor) -> Tensor:
    return z**2 + z.conj() * theta / 4 - torch.complex(theta, theta**2)


def complex_condition_real(z: Tensor, theta: Tensor) -> Tensor:
    x, y = z
    return torch.stack([x**2 - y**2 + x * theta / 4 - theta, 2 * x * y - y * theta / 4 - theta**2])


def complex_newton(theta: Tensor) -> Tensor:
    z = torch.stack([torch.ones_like(theta), torch.ones_like(theta)])
    for _ in range(12):
        x, y = z
        a, b, c, d = 2 * x + theta / 4, -2 * y, 2 * y, 2 * x - theta / 4
        p, q = complex_condition_real(z, theta)
        z = z - torch.stack([d * p - b * q, a * q - c * p]) / (a * d - b * c)
    return z


def complex_root(theta: Tensor) -> Tensor:
    @custom_root(complex_condition)
    def solver(init, theta):
        return torch.complex(*complex_newton(theta))

    z = solver(None, theta)
    return torch.cat([z.real, z.imag])


def complex_unrolled(theta: Tensor) -> Tensor:
    return complex_newton(theta).flatten()


# --- a solver inside the condition of another: x = tanh(W x + z) / 2, z = tanh(W z + theta) --------------------------


def nested(theta: Tensor) -> Tensor:
    def outer_step(x: Tensor, theta: Tensor) -> Tensor:
        return 0.5 * torch.tanh(TANH_W @ x + tanh_fixed_point(theta + 0.1 * x))

    @custom_fixed_point(outer_step)
    def solver(init, theta):
        x = init
        for _ in range(45):
            x = outer_step(x, theta)
        return x

    return solver(torch.zeros_like(theta), theta)


def nested_captured(theta: Tensor) -> Tensor:
    def inner(x: Tensor) -> Tensor:
        @custom_fixed_point(lambda z: torch.tanh(TANH_W @ z + theta + 0.1 * x))
        def solver(init):
            return iterate_tanh(init, theta + 0.1 * x)

        return solver(torch.zeros_like(theta))

    @custom_fixed_point(lambda x: 0.5 * torch.tanh(TANH_W @ x + inner(x)))
    def solver(init):
        return nested_unrolled(theta)

    return solver(torch.zeros_like(theta))


def nested_unrolled(theta: Tensor) -> Tensor:
    x = z = torch.zeros_like(theta)
    for _ in range(60):
        z = torch.tanh(TANH_W @ z + theta + 0.1 * x)
        x = 0.5 * torch.tanh(TANH_W @ x + z)
    return x


# --- quadratic programs, all of whose data depend on theta ------------------------------------------------------------


def program(theta: Tensor) -> tuple[Tensor, ...]:
    """``Q, c, A, b, G, h``; of the two inequalities the first is active at the solution."""
    G = torch.stack([torch.cos(theta), torch.sin(theta)])
    h = torch.stack([theta[0] - 1.0, theta[0] + 40.0])
    return definite(theta), torch.sin(theta), torch.exp(theta)[None], theta[:1] + 1.0, G, h


def qp_equalities(theta: Tensor) -> Tensor:
    return torch.cat(qp(rtol=1e-13).run(None, *program(theta)[:4])[0][:2])


def qp_solution(theta: Tensor) -> Tensor:
    primal, dual_eq, dual_ineq = qp(rtol=1e-13).run(None, *program(theta))[0]
    return torch.cat([primal, dual_eq, dual_ineq[:1]])


def kkt_equalities(theta: Tensor, Q: Tensor, c: Tensor, A: Tensor, b: Tensor) -> Tensor:
    none = torch.zeros(len(A), len(A), dtype=F64) * theta[0]
    matrix = torch.cat([torch.cat([Q, A.T], dim=1), torch.cat([A, none], dim=1)])
    return torch.linalg.inv(matrix) @ torch.cat([-c, b])


def qp_equalities_reference(theta: Tensor) -> Tensor:
    return kkt_equalities(theta, *program(theta)[:4])


def qp_reference(theta: Tensor) -> Tensor:
    Q, c, A, b, G, h = program(theta)
    return kkt_equalities(theta, Q, c, torch.cat([A, G[:1]]), torch.cat([b, h[:1]]))


def users_solve(matvec, b):
    """A user's own linear solver: Richardson iteration, which knows nothing of the library."""
    x = b
    for _ in range(150):
        x = x + 0.5 * (b - matvec(x))
    return x


def wrapping_solve(matvec, b):
    """A user's own linear solver that calls one of the library on a matvec of its own."""
    return solve_gmres(rtol=1e-13)(lambda v: 2.0 * matvec(v), 2.0 * b)


def solver_of(row: Row) -> LinearSolver:
    return row.factory(rtol=1e-13) if row.iterative else row.factory()


MATRICES = {"definite": definite, "contraction": lambda theta: definite(theta) / 3}


PROBLEMS = [
    Problem("cubic", cubic_root, cubic_unrolled, CUBIC_THETA),
    Problem("cubic, captured", cubic_captured, cubic_unrolled, CUBIC_THETA),
    Problem("cubic, by keyword", cubic_by_keyword, cubic_unrolled, CUBIC_THETA),
    Problem("cubic, passed and captured", cubic_half_captured, cubic_unrolled, CUBIC_THETA),
    Problem("ridge", ridge, ridge_closed_form, RIDGE_THETA),
    Problem("ridge, dictionaries", ridge_as_dict, ridge_closed_form, RIDGE_THETA),
    Problem("ridge, root_vjp", ridge_by_root_vjp, ridge_vjp_closed_form, RIDGE_THETA),
    Problem("tanh", tanh_fixed_point, tanh_unrolled, TANH_THETA),
    Problem("tanh, several leaves, captured", tanh_several_leaves, tanh_unrolled, TANH_THETA),
    Problem("tanh, user's solve", lambda t: tanh_fixed_point(t, solve=users_solve), tanh_unrolled, TANH_THETA),
    Problem(
        "tanh, user's solve, wrapping", lambda t: tanh_fixed_point(t, solve=wrapping_solve), tanh_unrolled, TANH_THETA
    ),
    Problem("complex root", complex_root, complex_unrolled, CUBIC_THETA),
    Problem("complex system", complex_system, complex_reference, LINEAR_THETA),
    Problem("nested", nested, nested_unrolled, TANH_THETA),
    Problem("nested, captured", nested_captured, nested_unrolled, TANH_THETA),
    *(
        Problem(
            f"solve, {row}",
            solve_with(solver_of(row), MATRICES.get(row.families[-1], general)),
            solved_by_inverse(MATRICES.get(row.families[-1], general)),
            LINEAR_THETA,
            KRYLOV if row.iterative else EXACT,
        )
        for row in SOLVERS
    ),
    Problem("lstsq, low rank", solve_with(solve_lstsq(), low_rank), least_squares_by_pinv, LINEAR_THETA),
    Problem("lstsq, low rank, made in matvec", least_squares, least_squares_by_pinv, LINEAR_THETA),
    *(
        Problem(
            f"ridge by {row}",
            functools.partial(ridge, solve=solver_of(row)),
            ridge_closed_form,
            RIDGE_THETA,
            KRYLOV if row.iterative else EXACT,
        )
        for row in SOLVERS
        if "definite" in row.families
    ),
    *(
        Problem(f"solvers.{row}", row.solution, row.family.closed_form, searches.THETA, row.tolerance)
        for row in SEARCHES
    ),
    Problem("solvers.qp, equalities", qp_equalities, qp_equalities_reference, LINEAR_THETA),
    Problem("solvers.qp", qp_solution, qp_reference, LINEAR_THETA),
]
