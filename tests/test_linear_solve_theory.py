"""Linear solvers take the steps, and have the optimal iterates, that theory gives them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checks.tensors import draw
from tables.linear_solvers import (
    C128,
    CONDITION,
    F64,
    Row,
    contraction,
    definite,
    general,
    spread,
    tame,
    with_eigenvalues,
    with_singular_values,
)
from tables.linear_systems import (
    BY_NAME,
    CHECK,
    LANES,
    LOOK,
    Counted,
    distinct,
    relative_error,
    rows,
    solve_beside,
    times,
    tolerance,
)
from torch import Tensor
from torch.func import jacfwd, jacrev, jvp, vmap

from implicitdiff.linear_solve import (
    jacobi_preconditioner,
    solve_bicgstab,
    solve_cg,
    solve_gmres,
    solve_inv,
    solve_lstsq,
    solve_lu,
    solve_normal_cg,
)

# --- theory ---------------------------------------------------------------------------------------------------------


def krylov_space(a: Tensor, b: Tensor, k: int) -> np.ndarray:
    columns = [b.numpy()]
    for _ in range(k - 1):
        columns.append(a.numpy() @ columns[-1])
    return np.linalg.qr(np.stack(columns, axis=1))[0]


@LANES
@pytest.mark.parametrize("k", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("factory", "products"), [(solve_cg, 1), (solve_gmres, 1), (solve_bicgstab, 2)], ids=["cg", "gmres", "bicgstab"]
)
def test_as_many_iterations_as_there_are_distinct_eigenvalues(factory, products, k, lanes):
    matvec = Counted(times(with_eigenvalues(distinct(k, 24))))
    solve_beside(lanes, factory(), matvec, draw(5, 24))
    assert matvec.calls == LOOK + products * k + CHECK


@pytest.mark.parametrize("starts", [[0], [4], [0, 4], [0, 10, 4]], ids=str)
def test_gmres_takes_as_many_products_as_the_longest_cycle_of_a_permutation_is_long(starts):
    """Nothing reduces the residual in a cycle before the last product: Nachtigal, Reddy and Trefethen, "How fast are
    nonsymmetric matrix iterations?", SIAM J. Matrix Anal. Appl. 13 (1992), example B."""
    lengths = {0: 4, 4: 6, 10: 1}
    a = torch.block_diag(*(torch.eye(length, dtype=F64).roll(1, dims=0) for length in lengths.values()))
    b = torch.eye(11, dtype=F64)[starts]
    matvec = Counted(times(a))
    x = vmap(lambda b: solve_gmres()(matvec, b))(b)
    assert matvec.calls == LOOK + max(lengths[start] for start in starts) + CHECK
    assert relative_error(x, b @ a) <= 1e-15


@LANES
@pytest.mark.parametrize("k", [1, 2, 5])
def test_normal_cg_takes_as_many_iterations_as_there_are_distinct_singular_values(k, lanes):
    a, b = with_singular_values(distinct(k, 24)), draw(5, 24)
    with_budget = solve_beside(lanes, solve_normal_cg(maxiter=k), times(a), b)
    assert relative_error(with_budget, torch.linalg.inv(a) @ b) <= CONDITION * 1e-10
    short = solve_beside(lanes, solve_normal_cg(maxiter=k - 1), times(a), b) if k > 1 else torch.zeros_like(b)
    assert torch.linalg.vector_norm(a @ short - b) > 1e-3


@LANES
@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_cg_is_the_best_in_the_energy_norm_over_the_krylov_space(k, lanes):
    a, b = definite(20), draw(5, 20)
    space = krylov_space(a, b, k)
    reference = space @ np.linalg.solve(space.T @ a.numpy() @ space, space.T @ b.numpy())
    x = solve_beside(lanes, solve_cg(maxiter=k), times(a), b)
    assert relative_error(x, torch.from_numpy(reference)) <= 1e-10


@LANES
@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_gmres_has_the_smallest_residual_over_the_krylov_space(k, lanes):
    a, b = general(20), draw(5, 20)
    space = krylov_space(a, b, k)
    reference = space @ np.linalg.lstsq(a.numpy() @ space, b.numpy())[0]
    x = solve_beside(lanes, solve_gmres(maxiter=k), times(a), b)
    assert relative_error(x, torch.from_numpy(reference)) <= 1e-10


@LANES
@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_normal_cg_has_the_smallest_residual_over_the_krylov_space_of_the_normal_equations(k, lanes):
    a, b = general(20), draw(5, 20)
    space = krylov_space(a.T @ a, a.T @ b, k)
    reference = space @ np.linalg.lstsq(a.numpy() @ space, b.numpy())[0]
    x = solve_beside(lanes, solve_normal_cg(maxiter=k), times(a), b)
    assert relative_error(x, torch.from_numpy(reference)) <= 1e-9


@pytest.mark.parametrize(
    "a",
    [torch.eye(60, dtype=F64) + 1e-6 * general(60), with_singular_values(torch.logspace(0, -8, 60, dtype=F64))],
    ids=["near the identity", "ill-conditioned"],
)
def test_gmres_keeps_its_basis_orthogonal(a):
    """Little is left of these products once the basis is taken out, and all the rounding of what was taken out."""
    asked = []

    def matvec(v: Tensor) -> Tensor:
        asked.append(v.clone())
        return a @ v

    solve_gmres(rtol=0.0, restart=25, maxiter=25, on_failure="ignore")(matvec, draw(5, 60))
    # A function that keeps tensors is looked at once more.
    basis = torch.stack(asked[LOOK + 1 : -CHECK])
    assert len(basis) == 25
    assert torch.linalg.matrix_norm(basis @ basis.T - torch.eye(25), ord=2) <= 1e-13


@LANES
@pytest.mark.parametrize(("restart", "maxiter"), [(3, 6), (3, 7), (4, 12), (1, 3)])
def test_restarted_gmres_minimises_anew_over_each_space(restart, maxiter, lanes):
    a, b = tame(20), draw(5, 20)
    reference, left = np.zeros(20), maxiter
    while left:
        k = min(restart, left)
        residual = b - a @ torch.from_numpy(reference)
        space = krylov_space(a, residual, k)
        reference = reference + space @ np.linalg.lstsq(a.numpy() @ space, residual.numpy())[0]
        left -= k
    x = solve_beside(lanes, solve_gmres(restart=restart, maxiter=maxiter), times(a), b)
    assert relative_error(x, torch.from_numpy(reference)) <= 1e-10


@LANES
@pytest.mark.parametrize("restart", [1, 2, 5, 30, 1000])
def test_gmres_converges_with_restarts_on_a_definite_matrix(restart, lanes):
    a, b = definite(40), draw(5, 40)
    x = solve_beside(lanes, solve_gmres(restart=restart), times(a), b)
    assert relative_error(x, torch.linalg.inv(a) @ b) <= CONDITION * torch.finfo(F64).eps ** (2 / 3)


@pytest.mark.parametrize("alpha", [None, 0.5, 1.3])
@pytest.mark.parametrize("terms", [1, 2, 5, 9])
def test_a_neumann_budget_gives_the_partial_sum(terms, alpha):
    a, b = contraction(6), draw(5, 6)
    step = 1.0 if alpha is None else alpha
    powers = [np.linalg.matrix_power(np.eye(6) - step * a.numpy(), k) for k in range(terms)]
    reference = step * sum(powers) @ b.numpy()
    x = solve_inv(ns=True, maxiter=terms, alpha=alpha)(times(a), b)
    assert relative_error(x, torch.from_numpy(reference)) <= 1e-14


def test_a_neumann_partial_sum_starts_at_the_initial_guess():
    a, b, init = contraction(6), draw(5, 6), torch.linalg.inv(contraction(6)) @ draw(5, 6) + 0.1 * draw(6, 6)
    x = solve_inv(ns=True, maxiter=3, init=init)(times(a), b)
    reference = init
    for _ in range(3):
        reference = reference + b - a @ reference
    assert relative_error(x, reference) <= 1e-14


@pytest.mark.parametrize("dtype", [F64, C128], ids=str)
@pytest.mark.parametrize("rank", [0, 1, 4, 7])
def test_lstsq_is_the_product_with_the_pseudoinverse(rank, dtype):
    a, b = (
        with_singular_values(torch.cat([spread(7)[:rank], torch.zeros(7 - rank, dtype=F64)]), dtype),
        draw(5, 7, dtype=dtype),
    )
    reference = np.linalg.pinv(a.numpy(), rcond=1e-12) @ b.numpy()
    x = solve_lstsq()(times(a), b)
    assert np.linalg.norm(x.numpy() - reference) <= tolerance(BY_NAME["lstsq"]) * np.linalg.norm(b.numpy())


def test_lstsq_solves_a_consistent_singular_system_and_a_ridge_approaches_it():
    row = BY_NAME["lstsq"]
    a = with_eigenvalues(torch.tensor([0.0, 0.0, 1.0, 4.0, 9.0], dtype=F64))
    b = a @ draw(5, 5)
    x = solve_lstsq()(times(a), b)
    assert relative_error(a @ x, b) <= tolerance(row)
    null = np.linalg.svd(a.numpy())[2][-2:]
    assert np.abs(null @ x.numpy()).max() <= tolerance(row)
    assert relative_error(solve_lu(ridge=1e-6)(times(a), b), x) <= 1e-5


@pytest.mark.parametrize(("rtol", "kept"), [(None, 4), (1e-6, 3), (1e-3, 2), (0.5, 1), (2.0, 0)])
def test_lstsq_drops_the_singular_values_below_rtol(rtol, kept):
    values = torch.tensor([1.0, 1e-2, 1e-4, 1e-8], dtype=F64)
    a, b = with_singular_values(values), draw(5, 4)
    u, s, vh = np.linalg.svd(a.numpy())
    reference = vh[:kept].T @ ((u[:, :kept].T @ b.numpy()) / s[:kept])
    x = solve_lstsq(rtol=rtol)(times(a), b).numpy()
    assert np.linalg.norm(x - reference) <= 1e-6 * max(np.linalg.norm(reference), 1e-300)


def perfect_preconditioner(row: Row, a: Tensor) -> Tensor:
    return torch.linalg.inv(a.mH @ a if row.factory is solve_normal_cg else a)


@rows("preconditioner")
def test_a_perfect_preconditioner_converges_in_one_iteration(row):
    a, b = row.matrix(12), draw(5, 12)
    m = perfect_preconditioner(row, a)
    x = row.factory(preconditioner=times(m), maxiter=1)(times(a), b)
    assert relative_error(x, torch.linalg.inv(a) @ b) <= tolerance(row)


@rows("preconditioner")
def test_a_perfect_preconditioner_is_perfect_in_derivatives_too(row):
    a, b = row.matrix(12), draw(5, 12)
    m = perfect_preconditioner(row, a)
    solver = row.factory(preconditioner=times(m), maxiter=1)
    inverse = torch.linalg.inv(a)
    assert relative_error(jacfwd(lambda b: solver(times(a), b))(b), inverse) <= tolerance(row)
    # The adjoint of the normal equations is no adjoint of the system: for normal_cg the reverse has another inverse.
    if row.factory is not solve_normal_cg:
        assert relative_error(jacrev(lambda b: solver(times(a), b))(b), inverse) <= tolerance(row)


@rows("preconditioner")
def test_a_preconditioner_changes_no_solution_and_has_no_derivative(row):
    a, b = row.matrix(12), draw(5, 12)
    rough = perfect_preconditioner(row, a + 0.3 * torch.diag(torch.linspace(0.0, 1.0, 12, dtype=F64)))

    def solution(weight):
        return row.factory(preconditioner=lambda r: weight * (rough @ r))(times(a), b)

    one = torch.ones((), dtype=F64)
    assert relative_error(solution(one), torch.linalg.inv(a) @ b) <= tolerance(row)
    assert torch.equal(jacrev(solution)(one), torch.zeros_like(b))


@rows("init", iterative=True)
def test_starting_at_the_solution_takes_no_iteration(row):
    a, b = row.matrix(12), draw(5, 12)
    init = torch.linalg.inv(a) @ b
    matvec = Counted(times(a))
    x = row.factory(init=init)(matvec, b)
    assert matvec.calls == LOOK + CHECK
    assert relative_error(x, init) <= 1e-15


@rows("init", iterative=True)
def test_an_initial_guess_changes_no_solution_and_has_no_derivative(row):
    a, b = row.matrix(12), draw(5, 12)

    def solution(init):
        return row.factory(init=init)(times(a), b)

    init = draw(6, 12)
    assert relative_error(solution(init), torch.linalg.inv(a) @ b) <= 10 * tolerance(row)
    assert torch.equal(jacrev(solution)(init), torch.zeros(12, 12, dtype=F64))
    assert torch.equal(jvp(solution, (init,), (init,))[1], torch.zeros(12, dtype=F64))


def test_gmres_goes_on_with_restarts_that_help_a_little():
    """Two dimensions at a condition of 100 take a twelfth off the residual, by the Chebyshev bound."""
    d, b = torch.linspace(1.0, 100.0, 100, dtype=F64), draw(5, 100)
    x = solve_gmres(restart=2)(lambda v: d * v, b)
    assert relative_error(d * x, b) <= torch.finfo(F64).eps ** (2 / 3)


def badly_scaled(n: int) -> Tensor:
    d = torch.logspace(0, 3, n, dtype=F64)
    return d[:, None] * definite(n) * d


def test_the_jacobi_preconditioner_is_one_over_the_diagonal():
    a, r = badly_scaled(9), draw(6, 9)
    like = {"a": torch.zeros(2, 2, dtype=F64), "b": torch.zeros((), dtype=F64), "c": torch.zeros(4, dtype=F64)}

    def tree(v):
        return {"a": v[:4].reshape(2, 2), "b": v[4], "c": v[5:]}

    def row(v):
        return torch.cat([v["a"].reshape(-1), v["b"][None], v["c"]])

    result = jacobi_preconditioner(lambda v: tree(a @ row(v)), like)(tree(r))
    assert relative_error(row(result), r / a.diagonal()) <= 1e-15


def test_the_jacobi_preconditioner_of_a_complex_matrix_divides_by_its_complex_diagonal():
    a, r = general(5, C128), draw(6, 5, dtype=C128)
    assert relative_error(jacobi_preconditioner(times(a), r)(r), r / a.diagonal()) <= 1e-15


def test_the_jacobi_preconditioner_leaves_elements_with_a_zero_on_the_diagonal():
    a = torch.tensor([[0.0, 1.0], [1.0, 4.0]], dtype=F64)
    assert jacobi_preconditioner(times(a), torch.zeros(2, dtype=F64))(torch.ones(2, dtype=F64)).tolist() == [1.0, 0.25]


def test_the_jacobi_preconditioner_takes_a_leaf_without_elements():
    like = {"a": torch.zeros(0, dtype=F64), "b": torch.ones(3, dtype=F64)}
    result = jacobi_preconditioner(lambda v: {"a": v["a"], "b": 2 * v["b"]}, like)(like)
    assert result["a"].shape == (0,)
    assert result["b"].tolist() == [0.5, 0.5, 0.5]


def test_the_jacobi_preconditioner_helps_on_a_badly_scaled_matrix():
    a, b = badly_scaled(40), draw(5, 40)
    plain, scaled = Counted(times(a)), Counted(times(a))
    solve_cg(maxiter=4000)(plain, b)
    x = solve_cg(preconditioner=jacobi_preconditioner(times(a), b))(scaled, b)
    assert scaled.calls < plain.calls / 4
    assert relative_error(a @ x, b) <= torch.finfo(F64).eps ** (2 / 3)
