"""The linear solvers: as mathematics, against NumPy, SciPy, closed forms and the theory of each, and as an API."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import warnings
from collections import namedtuple
from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from solvers import (
    ALL,
    C64,
    C128,
    CONDITION,
    F32,
    F64,
    FAMILIES,
    SOLVERS,
    Row,
    accepts,
    contraction,
    definite,
    draw,
    general,
    indefinite,
    spread,
    tame,
    with_eigenvalues,
    with_singular_values,
)
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils import _pytree as torch_pytree

from implicitdiff import custom_root
from implicitdiff.errors import LinearSolveError, LinearSolveWarning
from implicitdiff.linear_solve import (
    LinearSolver,
    jacobi_preconditioner,
    solve_auto,
    solve_bicgstab,
    solve_cg,
    solve_cholesky,
    solve_gmres,
    solve_inv,
    solve_lstsq,
    solve_lu,
    solve_normal_cg,
)

BY_NAME = {row.name: row for row in SOLVERS}


def rows(*options: str, iterative: bool | None = None) -> pytest.MarkDecorator:
    chosen = [r for r in SOLVERS if iterative in (None, r.iterative) and accepts(r, *options)]
    return pytest.mark.parametrize("row", chosen, ids=str)


def tolerance(row: Row, dtype: torch.dtype = F64, condition: float = CONDITION) -> float:
    """Of the relative error, which is at most the condition times the relative residual."""
    eps = torch.finfo(dtype).eps
    return condition * (eps ** (2 / 3) if row.iterative else 100 * eps)


def relative_error(x: Tensor, reference: Tensor) -> float:
    return float(torch.linalg.vector_norm(x - reference) / torch.linalg.vector_norm(reference))


def times(a: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda v: a @ v


class Counted:
    """A function that counts its calls."""

    def __init__(self, fn: Callable) -> None:
        self.fn, self.calls = fn, 0

    def __call__(self, v):
        self.calls += 1
        return self.fn(v)


LOOK = 4
"""A solver runs a function that it is given once to see what it captures, and three times to see that it is linear."""
CHECK = 1
"""It computes the true residual in the end."""

LANES = pytest.mark.parametrize("lanes", [1, 3])


def solve_beside(lanes: int, solver: LinearSolver, matvec: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
    """The solution alone, or that of the first of several lanes, for which an iteration has another arithmetic."""
    if lanes == 1:
        return solver(matvec, b)
    return vmap(lambda b: solver(matvec, b))(torch.stack([b.roll(i) for i in range(lanes)]))[0]


# --- 1. solutions ---------------------------------------------------------------------------------------------------

PAIRS = [pytest.param(r, f, id=f"{r}-{f}") for r in SOLVERS for f in r.families]


@pytest.mark.parametrize("dtype", [F32, F64, C64, C128], ids=str)
@pytest.mark.parametrize(("row", "family"), PAIRS)
def test_every_solver_solves_every_family_that_it_is_for(row, family, dtype):
    for n in (1, 2, 15):
        a, b = FAMILIES[family](n, dtype), draw(5, n, dtype=dtype)
        x = row.factory()(times(a), b)
        assert x.dtype == dtype
        reference = np.linalg.solve(a.to(C128).numpy(), b.to(C128).numpy())
        assert relative_error(x.to(C128), torch.from_numpy(reference)) <= tolerance(row, dtype)


TREE_SHAPES = {"scalar": (), "matrix": (2, 3), "vector": (4,), "nothing": (0, 2), "one": (1,)}
TREE_SIZE = 12


def tree_of(row: Tensor, dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
    parts = row.split([int(np.prod(s)) for s in TREE_SHAPES.values()])
    return {k: p.reshape(s).to(dtypes[k]) for (k, s), p in zip(TREE_SHAPES.items(), parts, strict=True)}


def row_of(tree: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([tree[k].reshape(-1).to(dtype) for k in TREE_SHAPES])


def on_trees(a: Tensor, dtypes: dict[str, torch.dtype]) -> Callable:
    return lambda v: tree_of(a @ row_of(v, a.dtype), dtypes)


MIXTURES = {
    "float64": ({}, F64),
    "float32": (dict.fromkeys(TREE_SHAPES, F32), F32),
    "float32 and float64": ({"matrix": F32, "one": F32}, F32),
    "float64 and complex": ({"matrix": C128}, F64),
}


@pytest.mark.parametrize("mixture", MIXTURES)
@rows()
def test_unknowns_are_coupled_across_the_leaves_of_a_tree(row, mixture):
    given, precision = MIXTURES[mixture]
    dtypes = dict.fromkeys(TREE_SHAPES, F64) | given
    a = row.matrix(TREE_SIZE)
    complex_leaves = any(d.is_complex for d in dtypes.values())

    def matvec(v):
        if not complex_leaves:
            return on_trees(a, dtypes)(v)
        # Real and imaginary parts each have the same matrix, where there are imaginary parts.
        flat = a.to(C128) @ torch.cat([v[k].reshape(-1).to(C128) for k in TREE_SHAPES])
        return {k: (t if dtypes[k].is_complex else t.real) for k, t in tree_of(flat, dict.fromkeys(v, C128)).items()}

    b = tree_of(draw(5, TREE_SIZE), dtypes)
    x = row.factory()(matvec, b)
    assert {k: (t.shape, t.dtype) for k, t in x.items()} == {k: (t.shape, t.dtype) for k, t in b.items()}
    if not complex_leaves:
        reference = np.linalg.solve(a.numpy(), row_of(b, F64).numpy())
        error = relative_error(row_of(x, F64), torch.from_numpy(reference))
    else:
        residual = [matvec(x)[k] - b[k] for k in b]
        error = sum(float(r.abs().square().sum()) for r in residual) ** 0.5 / float(row_of(b, C128).norm())
    assert error <= tolerance(row, precision)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@rows()
def test_half_precision_is_solved_to_half_precision(row, dtype):
    a = row.matrix(6).to(dtype)
    b = draw(5, 6).to(dtype)
    x = row.factory()(times(a), b)
    assert x.dtype == dtype
    reference = np.linalg.solve(a.double().numpy(), b.double().numpy())
    assert relative_error(x.double(), torch.from_numpy(reference)) <= 3 * CONDITION * torch.finfo(dtype).eps


@rows()
def test_a_system_without_unknowns_has_the_empty_solution(row):
    b = {"a": torch.zeros(0, 3, dtype=F64), "b": torch.zeros(2, 0, dtype=F32)}
    x = row.factory()(lambda v: {k: 2 * t for k, t in v.items()}, b)
    assert {k: (t.shape, t.dtype) for k, t in x.items()} == {k: (t.shape, t.dtype) for k, t in b.items()}


Pair = namedtuple("Pair", ["left", "right"])


@pytest.mark.parametrize(
    "tree",
    [
        pytest.param(lambda t: t, id="tensor"),
        pytest.param(lambda t: (t, [t]), id="tuple and list"),
        pytest.param(lambda t: Pair(t, {"a": t}), id="named tuple"),
        pytest.param(lambda t: {"t": t, "name": "a label", "nothing": None}, id="with leaves that are no tensors"),
    ],
)
@rows()
def test_the_solution_is_a_tree_like_the_right_hand_side(row, tree):
    b = tree(torch.tensor([3.0, -6.0], dtype=F64))
    x = row.factory()(lambda v: torch_pytree.tree_map_only(Tensor, lambda t: 1.5 * t, v), b)
    assert torch_pytree.tree_structure(x) == torch_pytree.tree_structure(b)
    for value, given in zip(torch_pytree.tree_leaves(x), torch_pytree.tree_leaves(b), strict=True):
        if isinstance(given, Tensor):
            assert relative_error(value, given / 1.5) <= tolerance(row, condition=1.5)
        else:
            assert value == given


def test_a_dictionary_in_another_order_is_the_same_tree():
    b = {"a": torch.tensor([2.0], dtype=F64), "b": torch.tensor([3.0], dtype=F64)}
    x = solve_lu()(lambda v: {"b": 3 * v["b"], "a": 2 * v["a"]}, b)
    assert {k: v.item() for k, v in x.items()} == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda b: b.expand(3, 7), id="expanded"),
        pytest.param(lambda b: torch.stack([b, b]).T[:, 0], id="strided"),
        pytest.param(lambda b: b.flip(0), id="flipped"),
        pytest.param(lambda b: torch.complex(b, b).conj(), id="conjugate view"),
        pytest.param(lambda b: torch.complex(b, b).conj().imag, id="negated view"),
    ],
)
@rows()
def test_the_layout_of_the_right_hand_side_does_not_matter(row, view):
    b = view(draw(5, 7))
    a = row.matrix(7).to(b.dtype)
    x = row.factory()(lambda v: v @ a.mT, b)
    reference = np.linalg.solve(a.numpy(), b.resolve_conj().resolve_neg().numpy().T).T
    assert relative_error(x, torch.from_numpy(reference.copy())) <= tolerance(row)


@pytest.mark.parametrize("row", [r for r in SOLVERS if r.iterative and "general" in r.families], ids=str)
def test_krylov_solutions_agree_with_scipy(row):
    a, b = general(30), draw(5, 30)
    reference, info = scipy.sparse.linalg.gmres(a.numpy(), b.numpy(), rtol=1e-13, atol=0.0, restart=30)
    assert info == 0
    assert relative_error(row.factory()(times(a), b), torch.from_numpy(reference)) <= tolerance(row)


@rows("ridge")
@pytest.mark.parametrize("dtype", [F64, C128], ids=str)
def test_a_ridge_is_added_to_the_matrix(row, dtype):
    a, b = row.matrix(7, dtype), draw(5, 7, dtype=dtype)
    reference = np.linalg.solve((a + 0.25 * torch.eye(7)).numpy(), b.numpy())
    x = row.factory(ridge=0.25)(times(a), b)
    assert relative_error(x, torch.from_numpy(reference)) <= tolerance(row)


@pytest.mark.parametrize("row", [r for r in SOLVERS if r.families == ("definite",)], ids=str)
def test_a_ridge_makes_a_semidefinite_matrix_solvable(row):
    a, b = with_eigenvalues(torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=F64)), draw(5, 4)
    reference = np.linalg.solve((a + 0.5 * torch.eye(4)).numpy(), b.numpy())
    assert relative_error(row.factory(ridge=0.5)(times(a), b), torch.from_numpy(reference)) <= tolerance(row)


# --- 2. theory ------------------------------------------------------------------------------------------------------


def krylov_space(a: Tensor, b: Tensor, k: int) -> np.ndarray:
    columns = [b.numpy()]
    for _ in range(k - 1):
        columns.append(a.numpy() @ columns[-1])
    return np.linalg.qr(np.stack(columns, axis=1))[0]


def distinct(k: int, n: int) -> Tensor:
    return torch.linspace(1.0, CONDITION, k, dtype=F64).repeat(n // k + 1)[:n]


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


# --- 3. scale -------------------------------------------------------------------------------------------------------


@LANES
@pytest.mark.parametrize("size", [1e-25, 1e25])
@rows()
def test_the_size_of_the_right_hand_side_does_not_matter(row, size, lanes):
    a, b = row.matrix(8, F32), draw(5, 8, dtype=F32)
    x = solve_beside(lanes, row.factory(), times(a), size * b).double() / size
    reference = np.linalg.solve(a.double().numpy(), b.double().numpy())
    assert relative_error(x, torch.from_numpy(reference)) <= tolerance(row, F32)


@LANES
@pytest.mark.parametrize("size", [1e-22, 1e-20, 1e20])
@rows()
def test_the_size_of_the_matrix_does_not_matter(row, size, lanes):
    options = {"alpha": 1 / size} if row.name == "neumann" else {}
    a, b = row.matrix(8, F32), draw(5, 8, dtype=F32)
    x = solve_beside(lanes, row.factory(**options), times(size * a), b).double() * size
    reference = np.linalg.solve(a.double().numpy(), b.double().numpy())
    assert relative_error(x, torch.from_numpy(reference)) <= tolerance(row, F32)


@rows()
def test_each_lane_has_a_scale_of_its_own(row):
    sizes = torch.tensor([1e-30, 1.0, 0.0, 1e30], dtype=F32)
    a = torch.stack([row.matrix(8, F32)] * 4)
    b = draw(5, 4, 8, dtype=F32) * sizes[:, None]
    for x in (
        vmap(lambda a, b: row.factory()(times(a), b))(a, b),
        vmap(lambda b: row.factory()(times(a[0]), b))(b),
    ):
        for lane in (0, 1, 3):
            reference = np.linalg.solve(a[lane].double().numpy(), b[lane].double().numpy())
            assert relative_error(x[lane].double(), torch.from_numpy(reference)) <= tolerance(row, F32)
        assert torch.equal(x[2], torch.zeros(8, dtype=F32))


@rows()
def test_at_a_zero_right_hand_side_the_solution_is_zero_and_its_derivatives_are_right(row):
    a, zero = row.matrix(6), torch.zeros(6, dtype=F64)
    inverse = torch.linalg.inv(a)
    solver = row.factory()
    assert torch.equal(solver(times(a), zero), zero)
    for jacobian in (jacrev, jacfwd):
        assert relative_error(jacobian(lambda b: solver(times(a), b))(zero), inverse) <= tolerance(row)
    # dx = - A^-1 dA x vanishes with x, its derivative in b does not.
    by_matrix = jacrev(lambda a, b: solver(times(a), b), argnums=0)
    assert torch.equal(by_matrix(a, zero), torch.zeros(6, 6, 6, dtype=F64))
    mixed = jacrev(by_matrix, argnums=1)(a, zero)
    reference = -torch.einsum("ij,kl->ijkl", inverse, inverse)
    assert relative_error(mixed, reference) <= 10 * tolerance(row)


@rows("init", iterative=True)
def test_at_a_zero_right_hand_side_the_solution_is_zero_from_any_initial_guess(row):
    a, init = row.matrix(6), torch.ones(6, dtype=F64)
    solver = row.factory(init=init)
    assert torch.linalg.vector_norm(solver(times(a), torch.zeros(6, dtype=F64))) <= tolerance(row)
    b = torch.stack([draw(5, 6), torch.zeros(6, dtype=F64)])
    x = vmap(lambda b: solver(times(a), b))(b)
    assert relative_error(x, b @ torch.linalg.inv(a).T) <= 10 * tolerance(row)


@rows("init", iterative=True)
def test_a_cotangent_that_is_zero_does_no_harm_to_a_solve_with_an_initial_guess(row):
    a, b = row.matrix(6), draw(5, 6)
    solver = row.factory(init=torch.ones(6, dtype=F64))
    jacobian = jacrev(lambda b: torch.cat([b, solver(times(a), b)]))(b)
    reference = torch.cat([torch.eye(6, dtype=F64), torch.linalg.inv(a)])
    assert relative_error(jacobian, reference) <= 10 * tolerance(row)


@rows("init", iterative=True)
def test_an_initial_guess_far_off_does_no_harm_to_a_small_right_hand_side(row):
    a, b = row.matrix(6, F32), draw(5, 6, dtype=F32)
    x = row.factory(init=torch.ones(6, dtype=F32))(times(a), 1e-25 * b).double() / 1e-25
    reference = np.linalg.solve(a.double().numpy(), b.double().numpy())
    assert relative_error(x, torch.from_numpy(reference)) <= tolerance(row, F32)


@rows("atol", iterative=True)
def test_atol_is_in_the_units_of_the_right_hand_side(row):
    a, b = row.matrix(12), draw(5, 12)
    size = float(torch.linalg.vector_norm(b))
    assert torch.equal(row.factory(atol=1.01 * size)(times(a), b), torch.zeros_like(b))
    for scale in (1.0, 1e-6):
        x = row.factory(rtol=0.0, atol=1e-3 * size * scale)(times(a), scale * b)
        residual = float(torch.linalg.vector_norm(scale * b - a @ x))
        assert 0 < residual <= 1e-3 * size * scale


@pytest.mark.parametrize("rtol", [1e-2, 1e-5, 1e-8])
@rows("rtol", iterative=True)
def test_the_true_residual_meets_rtol(row, rtol):
    a, b = row.matrix(30), draw(5, 30)
    x = row.factory(rtol=rtol)(times(a), b)
    assert torch.linalg.vector_norm(b - a @ x) <= rtol * torch.linalg.vector_norm(b)


# --- 4. derivatives -------------------------------------------------------------------------------------------------


def parametrised(row: Row, dtype: torch.dtype = F64) -> Callable[[Tensor], Tensor]:
    """A matrix that depends on a matrix of parameters, in the row's family near zero parameters."""
    base = row.matrix(3, dtype)
    eye = torch.eye(3, dtype=dtype)
    if row.families == ("definite",):
        return lambda theta: base + theta @ theta.mH + 0.1 * (theta + theta.mH)
    if row.families == ("contraction",):
        return lambda theta: eye - 0.5 * (eye - base) - 0.1 * theta
    return lambda theta: base + 0.3 * theta


def both(row: Row) -> tuple[Callable, Callable, Tensor, Tensor]:
    """A solution as a function of parameters and right-hand side, its closed form, and a point."""
    matrix, solver = parametrised(row), row.factory()
    return (
        lambda theta, b: solver(times(matrix(theta)), b),
        lambda theta, b: torch.linalg.inv(matrix(theta)) @ b,
        draw(7, 3, 3) / 2,
        draw(8, 3),
    )


def cubed(f: Callable) -> Callable:
    return lambda theta, b: (f(theta, b) ** 3).sum()


def along(f: Callable) -> Callable:
    """On a curve through the parameters."""
    return lambda s, theta, b: cubed(f)(theta + s * theta.sin(), b + s * b.cos())


def lanes(t: Tensor, count: int = 2) -> Tensor:
    return torch.stack([t * (1 - 0.3 * i) for i in range(count)])


ARGS = (0, 1)
TRANSFORMS = {
    "value": lambda f, th, b: f(th, b),
    "grad": lambda f, th, b: grad(cubed(f), ARGS)(th, b),
    "jacrev": lambda f, th, b: jacrev(f, ARGS)(th, b),
    "jacfwd": lambda f, th, b: jacfwd(f, ARGS)(th, b),
    "jvp": lambda f, th, b: jvp(f, (th, b), (th.sin(), b.cos())),
    "hessian": lambda f, th, b: hessian(cubed(f), ARGS)(th, b),
    "jacrev of jacrev": lambda f, th, b: jacrev(jacrev(f, ARGS), ARGS)(th, b),
    "jacfwd of jacrev": lambda f, th, b: jacfwd(jacrev(f, ARGS), ARGS)(th, b),
    "jacrev of jacfwd": lambda f, th, b: jacrev(jacfwd(f, ARGS), ARGS)(th, b),
    "jacfwd of jacfwd": lambda f, th, b: jacfwd(jacfwd(f, ARGS), ARGS)(th, b),
    "three times reverse": lambda f, th, b: grad(grad(grad(along(f))))(th[0, 0] / 9, th, b),
    "three times forward": lambda f, th, b: jacfwd(jacfwd(jacfwd(along(f))))(th[0, 0] / 9, th, b),
    "grad of jvp": lambda f, th, b: grad(lambda th: jvp(f, (th, b), (th.sin(), b))[1].sum())(th),
    "vmap": lambda f, th, b: vmap(f)(lanes(th), lanes(b)),
    "vmap over b": lambda f, th, b: vmap(f, (None, 0))(th, lanes(b)),
    "vmap over the matrix": lambda f, th, b: vmap(f, (0, None))(lanes(th), b),
    "vmap of vmap": lambda f, th, b: vmap(vmap(f, (None, 0)), (0, None))(lanes(th), lanes(b, 3)),
    "vmap of vmap, the other way": lambda f, th, b: vmap(vmap(f, (0, None)), (None, 0))(lanes(th), lanes(b, 3)),
    "vmap along other dimensions": lambda f, th, b: vmap(f, (2, 1), 1)(lanes(th).movedim(0, 2), lanes(b).T),
    "vmap of grad": lambda f, th, b: vmap(grad(cubed(f), ARGS))(lanes(th), lanes(b)),
    "vmap of hessian": lambda f, th, b: vmap(hessian(cubed(f), ARGS))(lanes(th), lanes(b)),
    "vmap of jvp": lambda f, th, b: vmap(lambda t: jvp(f, (th, b), (t, b)))(lanes(th)),
    "jvp of vmap": lambda f, th, b: jvp(vmap(f, (None, 0)), (th, lanes(b)), (th.sin(), lanes(b).cos())),
    "grad of vmap": lambda f, th, b: grad(lambda *p: (vmap(f)(*p) ** 3).sum(), ARGS)(lanes(th), lanes(b)),
    "hessian of vmap of vmap": lambda f, th, b: hessian(
        lambda *p: (vmap(vmap(f, (None, 0)), (0, None))(*p) ** 3).sum(), ARGS
    )(lanes(th), lanes(b)),
}


def assert_same(result, reference, allowed: float) -> None:
    """Two trees are equal to `allowed`, relative to the size of each leaf."""
    for x, y in zip(torch_pytree.tree_leaves(result), torch_pytree.tree_leaves(reference), strict=True):
        assert x.shape == y.shape
        assert float((x - y).abs().max()) <= allowed * (float(y.abs().max()) + 1e-12)


DERIVATIVE = 1e-8
"""Three differentiations, each a solve with a residual of 4e-11, of matrices whose condition is 10."""


@pytest.mark.parametrize("transform", TRANSFORMS)
@rows()
def test_a_solution_has_the_derivatives_of_the_inverse(row, transform):
    solution, reference, theta, b = both(row)
    apply = TRANSFORMS[transform]
    assert_same(apply(solution, theta, b), apply(reference, theta, b), DERIVATIVE)


@rows()
def test_gradcheck_in_both_modes_to_second_order(row):
    solution, _, theta, b = both(row)
    inputs = (theta.requires_grad_(), b.requires_grad_())
    assert torch.autograd.gradcheck(solution, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(solution, inputs, check_fwd_over_rev=True, fast_mode=True)


BASE = general(3)


class Model:
    def __init__(self, theta: Tensor) -> None:
        self.theta = theta

    def apply(self, v: Tensor) -> Tensor:
        return BASE @ v + 0.3 * (self.theta @ v)


def product(v: Tensor, theta: Tensor, *, scale: float) -> Tensor:
    return BASE @ v + scale * (theta @ v)


LAYER = torch.nn.Linear(3, 3, bias=False, dtype=F64, device="meta")


def shifted_layer(theta: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda v: torch.func.functional_call(LAYER, {"weight": BASE + 0.3 * theta}, (v,))


CAPTURES = {
    "closure": lambda theta: lambda v: BASE @ v + 0.3 * (theta @ v),
    "functools.partial": lambda theta: functools.partial(product, theta=theta, scale=0.3),
    "bound method": lambda theta: Model(theta).apply,
    "default argument": lambda theta: lambda v, theta=theta: product(v, theta, scale=0.3),
    "list": lambda theta: (lambda held: lambda v: product(v, held[0]["theta"], scale=0.3))([{"theta": theta}]),
    "functional_call": shifted_layer,
    "computed outside": lambda theta: times(BASE + 0.3 * theta),
    "einsum of a view": lambda theta: lambda v: BASE @ v + 0.3 * torch.einsum("ji,i->j", theta[:, :], v),
}


@pytest.mark.parametrize("transform", ["grad", "jacfwd", "hessian", "vmap of grad", "grad of vmap"])
@pytest.mark.parametrize("capture", CAPTURES)
def test_tensors_are_captured_in_every_way(capture, transform):
    make, apply, theta, b = CAPTURES[capture], TRANSFORMS[transform], draw(7, 3, 3), draw(8, 3)
    for solver in (solve_lu(), solve_gmres()):
        result = apply(lambda theta, b, solver=solver: solver(make(theta), b), theta, b)
        reference = apply(lambda theta, b: torch.linalg.inv(BASE + 0.3 * theta) @ b, theta, b)
        assert_same(result, reference, DERIVATIVE)


def test_the_weight_of_a_module_gets_its_gradient():
    layer = torch.nn.Linear(4, 4, bias=False, dtype=F64)
    with torch.no_grad():
        layer.weight.copy_(general(4))
    b = draw(5, 4).requires_grad_()
    solve_gmres()(layer, b).sum().backward()
    inverse = torch.linalg.inv(general(4))
    u = inverse.T.sum(dim=1)
    assert relative_error(b.grad, u) <= tolerance(BY_NAME["gmres"])
    assert relative_error(layer.weight.grad, -torch.outer(u, inverse @ b.detach())) <= 10 * tolerance(BY_NAME["gmres"])


def test_the_same_tensor_may_be_captured_and_be_the_right_hand_side():
    b = torch.tensor([1.0, 2.0, 4.0], dtype=F64)

    def ones(b):
        return solve_lu()(lambda v: b * v, b)

    assert torch.equal(ones(b), torch.ones(3, dtype=F64))
    assert jacrev(ones)(b).abs().max() <= 1e-15
    assert jacfwd(ones)(b).abs().max() <= 1e-15


def potential(x: Tensor) -> Tensor:
    return (x**4).sum() + 2 * (x**2).sum() + x[0] * x[1] * x[2].sin()


HESSIAN_PRODUCTS = {
    "forward over reverse": lambda x: lambda v: jvp(grad(potential), (x,), (v,))[1],
    "reverse over reverse": lambda x: lambda v: vjp(grad(potential), x)[1](v)[0],
    "gradient of a directional derivative": lambda x: lambda v: grad(lambda x: (grad(potential)(x) * v).sum())(x),
}


@pytest.mark.parametrize("transform", ["value", "grad", "jacfwd", "hessian", "vmap of grad", "grad of vmap"])
@pytest.mark.parametrize("hvp", HESSIAN_PRODUCTS)
@pytest.mark.parametrize("factory", [solve_lu, solve_cg, solve_normal_cg])
def test_matvec_may_be_a_hessian_vector_product(factory, hvp, transform):
    apply, x, b = TRANSFORMS[transform], torch.tensor([0.5, -0.7, 1.1], dtype=F64), draw(8, 3)
    result = apply(lambda x, b: factory()(HESSIAN_PRODUCTS[hvp](x), b), x, b)
    reference = apply(lambda x, b: torch.linalg.inv(hessian(potential)(x)) @ b, x, b)
    assert_same(result, reference, DERIVATIVE)


@pytest.mark.parametrize("transform", ["value", "grad", "jacfwd", "hessian", "vmap of grad", "grad of vmap"])
@pytest.mark.parametrize("outer", [solve_lu, solve_cg], ids=["lu", "cg"])
@pytest.mark.parametrize("inner", [solve_lu, solve_cg], ids=["lu", "cg"])
def test_matvec_may_itself_solve_a_linear_system(inner, outer, transform):
    base = definite(6)

    def matrix(theta):
        return base + theta @ theta.mT

    def by_schur_complement(theta, b):
        m = matrix(theta)
        p, q, r = m[:3, :3], m[:3, 3:], m[3:, 3:]
        return outer()(lambda v: r @ v - q.mT @ inner()(times(p), q @ v), b)

    apply, theta, b = TRANSFORMS[transform], draw(7, 6, 6) / 4, draw(8, 3)
    reference = apply(lambda theta, b: torch.linalg.inv(matrix(theta))[3:, 3:] @ b, theta, b)
    assert_same(apply(by_schur_complement, theta, b), reference, DERIVATIVE)


@rows()
def test_a_tree_has_the_derivatives_of_its_flat_system(row):
    dtypes = dict.fromkeys(TREE_SHAPES, F64)
    a, b = row.matrix(TREE_SIZE), draw(5, TREE_SIZE)

    def by_tree(a, b):
        return row_of(row.factory()(on_trees(a, dtypes), tree_of(b, dtypes)), F64)

    inverse = torch.linalg.inv(a)
    assert_same(jacrev(by_tree, 1)(a, b), inverse, DERIVATIVE)
    assert_same(jacfwd(by_tree, 1)(a, b), inverse, DERIVATIVE)
    u = inverse.T @ torch.ones(TREE_SIZE, dtype=F64)
    # For a Hermitian solver the derivative is along matrices of any kind, at a Hermitian one.
    assert_same(grad(lambda a: by_tree(a, b).sum())(a), -torch.outer(u, inverse @ b), DERIVATIVE)


def test_lstsq_has_the_pseudoinverse_as_its_derivative_in_the_right_hand_side():
    a = with_singular_values(torch.tensor([3.0, 2.0, 0.0, 0.0], dtype=F64))
    reference = torch.from_numpy(np.linalg.pinv(a.numpy(), rcond=1e-12))
    for jacobian in (jacrev, jacfwd):
        assert relative_error(jacobian(lambda b: solve_lstsq()(times(a), b))(draw(5, 4)), reference) <= 1e-13


@rows()
def test_without_gradients_there_is_no_graph(row):
    a, b = row.matrix(4), draw(5, 4).requires_grad_()
    with torch.no_grad():
        assert not row.factory()(times(a), b).requires_grad
    assert not row.factory()(times(a), b.detach()).requires_grad
    assert row.factory()(times(a), b).requires_grad
    assert row.factory()(times(a.requires_grad_()), b.detach()).requires_grad


def test_a_sparse_matrix_serves_the_iterations():
    a = torch.diag(torch.tensor([2.0, 3.0, 4.0], dtype=F64))
    a[0, 2] = a[2, 0] = 1.0
    sparse, b = a.to_sparse(), draw(5, 3)
    inverse = torch.linalg.inv(a)
    solver = solve_cg()
    assert relative_error(solver(lambda v: torch.mv(sparse, v), b), inverse @ b) <= tolerance(BY_NAME["cg"])
    result = grad(lambda b: solver(lambda v: torch.mv(sparse, v), b).sum())(b)
    assert relative_error(result, inverse.sum(dim=0)) <= tolerance(BY_NAME["cg"])


# --- 5. vmap --------------------------------------------------------------------------------------------------------


@rows(iterative=True)
def test_lanes_stop_by_themselves(row):
    """At a loose tolerance a lane that went on with the others would come to another result."""
    d = torch.stack([torch.linspace(1.0, c, 40, dtype=F64) for c in (1.0, 2.0, 10.0, 30.0, 100.0)])
    if row.families == ("contraction",):
        d = 1 - 0.7 * (1 - d / d.amax(dim=1, keepdim=True))
    if row.name == "normal_cg":
        # The squares are what it iterates with. At a condition of a thousand, rounding alone moves the result by 1e-3.
        d = d.sqrt()
    b = draw(5, *d.shape)
    b[1] = 0.0
    solver = row.factory(rtol=1e-2)
    together = vmap(lambda d, b: solver(lambda v: d * v, b))(d, b)
    alone = torch.stack([solver(lambda v, d=d_i: d * v, b_i) for d_i, b_i in zip(d, b, strict=True)])
    for x, y in zip(together, alone, strict=True):
        assert torch.linalg.vector_norm(x - y) <= 1e-10 * torch.linalg.vector_norm(y)


@pytest.mark.parametrize(
    "row", [r for r in SOLVERS if r.name in ("cg", "gmres", "lu", "cholesky", "inv", "auto")], ids=str
)
def test_lanes_of_condition_one_to_a_million_are_each_as_good_as_alone(row):
    conditions = [1.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6]
    a = torch.stack([with_eigenvalues(torch.logspace(0, -float(np.log10(c)), 12, dtype=F64)) for c in conditions])
    b = draw(5, 7, 12)
    b[3] = 0.0
    together = vmap(lambda a, b: row.factory()(times(a), b))(a, b)
    alone = torch.stack([row.factory()(times(a_i), b_i) for a_i, b_i in zip(a, b, strict=True)])
    for condition, a_i, b_i, x, y in zip(conditions, a, b, together, alone, strict=True):
        size = torch.linalg.vector_norm(y)
        assert torch.linalg.vector_norm(x - y) <= 2 * tolerance(row, condition=condition) * size
        exact = torch.from_numpy(np.linalg.solve(a_i.numpy(), b_i.numpy()))
        assert torch.linalg.vector_norm(x - exact) <= tolerance(row, condition=condition) * size


@rows()
def test_matrix_or_right_hand_side_or_both_are_batched(row):
    a = torch.stack([row.matrix(5), row.matrix(5).mT, row.matrix(5)])
    b = draw(5, 3, 5)
    inverses = torch.linalg.inv(a)
    solver = row.factory()
    both_ = vmap(lambda a, b: solver(times(a), b))(a, b)
    assert relative_error(both_, torch.einsum("lij,lj->li", inverses, b)) <= tolerance(row)
    matrix = vmap(lambda a: solver(times(a), b[0]))(a)
    assert relative_error(matrix, inverses @ b[0]) <= tolerance(row)
    side = vmap(lambda b: solver(times(a[0]), b))(b)
    assert relative_error(side, b @ inverses[0].T) <= tolerance(row)
    mixed = vmap(vmap(lambda a, b: solver(times(a), b), in_dims=(None, 0)), in_dims=(0, None))(a, b)
    assert relative_error(mixed, torch.einsum("lij,mj->lmi", inverses, b)) <= tolerance(row)


@rows(iterative=False)
def test_a_matrix_that_the_lanes_share_is_materialised_once(row):
    a, b = row.matrix(6), draw(5, 2, 3, 6)
    alone, together = Counted(times(a)), Counted(times(a))
    row.factory()(alone, b[0, 0])
    x = vmap(vmap(lambda b: row.factory()(together, b)))(b)
    assert together.calls == alone.calls
    assert relative_error(x, b @ torch.linalg.inv(a).T) <= tolerance(row)


@rows(iterative=False)
def test_a_shared_matrix_is_materialised_once_for_a_whole_jacobian(row):
    a, b = row.matrix(6), draw(5, 6)
    alone, together = Counted(times(a)), Counted(times(a))
    grad(lambda b: row.factory()(alone, b).sum())(b)
    jacobian = jacrev(lambda b: row.factory()(together, b))(b)
    assert together.calls == alone.calls
    assert relative_error(jacobian, torch.linalg.inv(a)) <= tolerance(row)


@rows()
def test_some_leaves_may_be_batched_and_others_not(row):
    a = row.matrix(5)
    b = {"a": draw(5, 3, 2), "b": draw(6, 3)}

    def matvec(v):
        y = a @ torch.cat([v["a"], v["b"]])
        return {"a": y[:2], "b": y[2:]}

    x = vmap(lambda b: row.factory()(matvec, b), in_dims=({"a": 0, "b": None},))(b)
    flat = torch.cat([b["a"], b["b"].expand(3, 3)], dim=1)
    assert relative_error(torch.cat([x["a"], x["b"]], dim=1), flat @ torch.linalg.inv(a).T) <= tolerance(row)


AID_TRANSFORMS = [
    "value",
    "grad",
    "jacfwd",
    "hessian",
    "vmap",
    "vmap over b",
    "vmap over the matrix",
    "vmap of vmap",
    "vmap of grad",
    "vmap of hessian",
    "grad of vmap",
    "hessian of vmap of vmap",
]


@pytest.mark.parametrize("transform", AID_TRANSFORMS)
@rows("preconditioner", "init")
def test_preconditioner_and_initial_guess_may_capture_what_is_transformed(row, transform):
    _, reference, theta, b = both(row)
    matrix = parametrised(row)

    def solution(theta, b):
        a = matrix(theta)
        diagonal = (a * a).sum(dim=0) if row.factory is solve_normal_cg else a.diagonal()
        return row.factory(preconditioner=lambda r: r / diagonal.abs(), init=0.1 * b)(times(a), b)

    apply = TRANSFORMS[transform]
    assert_same(apply(solution, theta, b), apply(reference, theta, b), DERIVATIVE)


@pytest.mark.parametrize("transform", AID_TRANSFORMS)
def test_the_jacobi_preconditioner_may_be_made_inside_transforms(transform):
    row = BY_NAME["cg"]
    _, reference, theta, b = both(row)
    matrix = parametrised(row)

    def solution(theta, b):
        matvec = times(matrix(theta))
        return solve_cg(preconditioner=jacobi_preconditioner(matvec, b))(matvec, b)

    apply = TRANSFORMS[transform]
    assert_same(apply(solution, theta, b), apply(reference, theta, b), DERIVATIVE)


def test_a_batch_that_went_through_vmap_takes_a_backward_pass():
    a, b = torch.stack([definite(4), 2 * definite(4)]).requires_grad_(), draw(5, 2, 4).requires_grad_()

    def solution(a, b):
        return solve_cg(preconditioner=lambda r: r / a.diagonal(), init=b)(times(a), b)

    vmap(solution)(a, b).sum().backward()
    inverse = torch.linalg.inv(a.detach())
    u = inverse.mT.sum(dim=-1)
    assert relative_error(b.grad, u) <= tolerance(BY_NAME["cg"])
    x = (inverse @ b.detach()[..., None])[..., 0]
    assert relative_error(a.grad, -u[:, :, None] * x[:, None, :]) <= 10 * tolerance(BY_NAME["cg"])


# --- 6. failure -----------------------------------------------------------------------------------------------------

NAN = float("nan")


def hard(n: int) -> Tensor:
    """A diagonal so ill-conditioned that an iteration gets nowhere."""
    return torch.logspace(0, -14, n, dtype=F64)


INDEFINITE = torch.diag(torch.tensor([1.0, -2.0, 3.0], dtype=F64))
SINGULAR = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [1.0, 0.0, 1.0]], dtype=F64)
HALF_NAN = torch.diag(torch.tensor([1.0, NAN, 3.0], dtype=F64))
HALF_INF = torch.diag(torch.tensor([1.0, float("inf"), 3.0], dtype=F64))
LOPSIDED = torch.tensor([[3.0, 1.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 3.0]], dtype=F64)
ONES = torch.ones(3, dtype=F64)

FAILURES = [
    pytest.param(solve_cg, INDEFINITE, "not positive definite", id="cg, indefinite"),
    pytest.param(solve_cg, -definite(3), "not positive definite", id="cg, negative definite"),
    pytest.param(functools.partial(solve_cg, maxiter=20), INDEFINITE, "not positive definite", id="cg, with a budget"),
    pytest.param(solve_lu, SINGULAR, "singular", id="lu, singular"),
    pytest.param(solve_inv, SINGULAR, "singular", id="inv, singular"),
    pytest.param(solve_auto, SINGULAR, "singular", id="auto, singular"),
    pytest.param(solve_gmres, SINGULAR, "no convergence", id="gmres, singular"),
    pytest.param(solve_bicgstab, torch.zeros(3, 3, dtype=F64), "no convergence", id="bicgstab, zero"),
    pytest.param(solve_normal_cg, SINGULAR, "", id="normal_cg, singular"),
    pytest.param(solve_lu, torch.zeros(3, 3, dtype=F64), "singular", id="lu, zero"),
    pytest.param(solve_cholesky, SINGULAR @ SINGULAR.T, "not Hermitian positive definite", id="cholesky, singular"),
    pytest.param(solve_cholesky, INDEFINITE, "not Hermitian positive definite", id="cholesky, indefinite"),
    pytest.param(solve_cholesky, LOPSIDED, "not Hermitian positive definite", id="cholesky, not symmetric"),
    pytest.param(functools.partial(solve_inv, ns=True), 3 * definite(3), "diverges", id="neumann, divergent"),
    pytest.param(
        functools.partial(solve_inv, ns=True, maxiter=10), 3 * definite(3), "diverges", id="neumann, with a budget"
    ),
    *[pytest.param(r.factory, HALF_NAN, "finite", id=f"{r}, nan") for r in SOLVERS if r.name != "neumann"],
    *[pytest.param(r.factory, HALF_INF, "", id=f"{r}, inf") for r in SOLVERS],
]


def failure_of(call: Callable) -> LinearSolveError:
    with pytest.raises(LinearSolveError) as caught:
        call()
    return caught.value


def name_of(factory: Callable) -> str:
    return factory.func.__name__ if isinstance(factory, functools.partial) else factory.__name__


@pytest.mark.parametrize(("factory", "a", "reason"), FAILURES)
def test_failure_is_raised_and_says_of_what(factory, a, reason):
    error = failure_of(lambda: factory()(times(a), ONES))
    assert error.solver.startswith(name_of(factory))
    assert str(error).startswith(name_of(factory))
    assert reason in str(error)
    assert (error.failed, error.total) == (1, 1)
    assert error.iterations >= 0
    assert not error.residual <= error.target


@pytest.mark.parametrize("factory", [solve_cg, solve_gmres, solve_lu], ids=["cg", "gmres", "lu"])
@pytest.mark.parametrize("derivative", ["reverse", "forward", "reverse over reverse"])
def test_failure_in_a_derivative_is_raised_too(factory, derivative):
    @custom_root(lambda x, theta: x**2 - theta, solve=factory())
    def square_root(init, theta):
        return theta.sqrt()

    def f(theta):
        return square_root(None, theta).sum()

    # The residual's derivative 2 x is singular at the second element.
    theta = torch.tensor([4.0, 0.0, 9.0], dtype=F64)
    calls = {
        "reverse": lambda: grad(f)(theta),
        "forward": lambda: jvp(f, (theta,), (ONES,)),
        "reverse over reverse": lambda: grad(lambda theta: grad(f)(theta).sum())(theta),
    }
    error = failure_of(calls[derivative])
    assert error.solver == factory.__name__
    assert (error.failed, error.total) == (1, 1)


def test_one_bad_lane_of_a_derivative_is_one_of_many():
    @custom_root(lambda x, theta: x**2 - theta, solve=solve_lu())
    def square_root(init, theta):
        return theta.sqrt()

    batch = torch.tensor([[4.0, 1.0], [1.0, 0.0], [9.0, 1.0]], dtype=F64)
    error = failure_of(lambda: vmap(grad(lambda theta: square_root(None, theta).sum()))(batch))
    assert (error.failed, error.total) == (1, 3)


def test_failure_in_the_derivative_of_a_solve_is_raised():
    """Zero is solved at once, the adjoint system is not solved at all."""
    d, zero = hard(40), torch.zeros(40, dtype=F64)

    def f(b):
        return solve_cg()(lambda v: d * v, b)

    assert torch.equal(f(zero), zero)
    for derivative in (lambda: grad(lambda b: f(b).sum())(zero), lambda: jvp(f, (zero,), (zero + 1,))):
        error = failure_of(derivative)
        assert (error.solver, error.failed, error.total) == ("solve_cg", 1, 1)


@pytest.mark.parametrize(("factory", "a", "reason"), FAILURES)
def test_on_failure_warn_warns_and_ignore_is_silent(factory, a, reason):
    with pytest.warns(LinearSolveWarning, match=name_of(factory)) as caught:
        warned = factory(on_failure="warn")(times(a), ONES)
    assert reason in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ignored = factory(on_failure="ignore")(times(a), ONES)
    assert torch.equal(warned.nan_to_num(), ignored.nan_to_num())


def test_on_failure_holds_in_derivatives_too():
    def square_root(on_failure):
        return custom_root(lambda x, theta: x**2 - theta, solve=solve_lu(on_failure=on_failure))(
            lambda init, theta: theta.sqrt()
        )

    def f(on_failure):
        return grad(lambda theta: square_root(on_failure)(None, theta).sum())(torch.zeros(2, dtype=F64))

    with pytest.warns(LinearSolveWarning, match="solve_lu"):
        f("warn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f("ignore")


@rows()
def test_a_right_hand_side_that_is_not_finite_fails(row):
    a = row.matrix(3)
    for value in (NAN, float("inf"), -float("inf")):
        b = torch.tensor([1.0, value, 1.0], dtype=F64)
        error = failure_of(lambda b=b: row.factory()(times(a), b))
        assert error.failed == 1


@rows()
def test_one_bad_lane_among_good_ones_is_counted_and_spoils_no_other(row):
    a, b = row.matrix(5), draw(5, 4, 5)
    b[2, 3] = NAN
    error = failure_of(lambda: vmap(lambda b: row.factory()(times(a), b))(b))
    assert (error.failed, error.total) == (1, 4)
    x = vmap(lambda b: row.factory(on_failure="ignore")(times(a), b))(b)
    good = [0, 1, 3]
    assert relative_error(x[good], b[good] @ torch.linalg.inv(a).T) <= tolerance(row)


@rows()
def test_one_bad_matrix_among_good_ones_is_counted_and_spoils_no_other(row):
    a, b = torch.stack([row.matrix(5)] * 4), draw(5, 4, 5)
    a[1, 2, 2] = NAN
    error = failure_of(lambda: vmap(lambda a, b: row.factory()(times(a), b))(a, b))
    assert (error.failed, error.total) == (1, 4)
    x = vmap(lambda a, b: row.factory(on_failure="ignore")(times(a), b))(a, b)
    good = [0, 2, 3]
    assert relative_error(x[good], b[good] @ torch.linalg.inv(a[0]).T) <= tolerance(row)


def test_a_lane_that_does_not_converge_is_counted_beside_one_that_breaks_down():
    d, b = torch.stack([hard(40), -hard(40), hard(40) + 1]), torch.ones(40, dtype=F64)
    error = failure_of(lambda: vmap(lambda d: solve_cg()(lambda v: d * v, b))(d))
    assert (error.failed, error.total) == (2, 3)


@pytest.mark.parametrize("factory", [solve_cg, solve_bicgstab, solve_normal_cg], ids=["cg", "bicgstab", "normal_cg"])
def test_meeting_the_safety_net_is_a_failure(factory):
    d, b = hard(40), torch.ones(40, dtype=F64)
    error = failure_of(lambda: factory()(lambda v: d * v, b))
    assert "no convergence" in str(error)
    assert 0 < error.iterations <= 400
    x = factory(on_failure="ignore")(lambda v: d * v, b)
    assert error.residual == pytest.approx(float(torch.linalg.vector_norm(b - d * x)), rel=1e-6)
    assert error.target == pytest.approx(torch.finfo(F64).eps ** (2 / 3) * 40**0.5)
    assert f"after {error.iterations} iterations" in str(error)


def test_the_attributes_of_an_error_are_in_the_units_of_the_right_hand_side():
    d, b = hard(40), torch.ones(40, dtype=F64)
    plain = failure_of(lambda: solve_cg(rtol=1e-6)(lambda v: d * v, b))
    scaled = failure_of(lambda: solve_cg(rtol=1e-6)(lambda v: d * v, 1e9 * b))
    assert scaled.residual == pytest.approx(1e9 * plain.residual)
    assert scaled.target == pytest.approx(1e9 * plain.target)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_the_error_tells_of_the_worst_lane(order):
    """The first lane meets a direction of negative curvature after a step of 1/3, the last one at once."""
    d = torch.tensor([[4.0, -1.0], [1.0, 1.0], [-1.0, -1.0]], dtype=F64)[list(order)]
    b = torch.tensor([[1.0, 0.5], [1.0, 0.5], [1e-3, 0.5e-3]], dtype=F64)[list(order)]

    def solve(d: Tensor, b: Tensor, **options) -> Tensor:
        return solve_cg(rtol=1e-6, **options)(lambda v: d * v, b)

    error = failure_of(lambda: vmap(solve)(d, b))
    assert (error.failed, error.total) == (2, 3)
    # Of the size of the right-hand side the first lane's residual is 2/3, the last one's all.
    assert error.residual == pytest.approx(1e-3 * 1.25**0.5, rel=1e-12)
    assert error.target == pytest.approx(1e-9 * 1.25**0.5, rel=1e-12)
    x = vmap(functools.partial(solve, on_failure="ignore"))(d, b)
    reached = torch.tensor([[1.0 / 3, 0.5 / 3], [1.0, 0.5], [0.0, 0.0]], dtype=F64)[list(order)]
    torch.testing.assert_close(x, reached, rtol=1e-12, atol=0.0)


@rows("maxiter", iterative=True)
def test_an_integer_maxiter_is_a_budget_and_no_failure(row):
    a, b = row.matrix(30), draw(5, 30)
    for budget in (1, 2, 3):
        x = row.factory(maxiter=budget)(times(a), b)
        residual = torch.linalg.vector_norm(b - a @ x)
        assert torch.isfinite(residual)
        assert residual > 1e-6
    matvec = Counted(times(a))
    row.factory(maxiter=3)(matvec, b)
    assert matvec.calls <= LOOK + 3 * (2 if row.name == "bicgstab" else 1) + 2 * CHECK


@LANES
@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("row", [r for r in SOLVERS if r.iterative], ids=str)
def test_values_that_are_not_finite_end_the_iteration(row, value, lanes):
    """The safety net is ten thousand iterations here."""
    d = torch.ones(1000, dtype=F64)
    d[7] = value
    matvec = Counted(lambda v: d * v)
    failure_of(lambda: solve_beside(lanes, row.factory(), matvec, torch.ones(1000, dtype=F64)))
    assert matvec.calls <= 200


SIZES = [2, 3, 4, 5, 7, 10, 14, 20, 33, 50, 100, 300]


def low_rank(seed: int, count: int, n: int, dtype: torch.dtype) -> Tensor:
    return draw(seed, count, n, n - 1, dtype=dtype) @ draw(seed + 1, count, n - 1, n, dtype=dtype)


def semidefinite(seed: int, count: int, n: int, dtype: torch.dtype) -> Tensor:
    factor = draw(seed, count, n, n - 1, dtype=dtype)
    return factor @ factor.mT


def laplacian(seed: int, count: int, n: int, dtype: torch.dtype) -> Tensor:
    """Of a complete graph with random weights: constants are in both null spaces."""
    w = draw(seed, count, n, n, dtype=dtype).abs()
    w = w + w.mT
    return torch.diag_embed(w.sum(dim=-1)) - w


def dependent_rows(seed: int, count: int, n: int, dtype: torch.dtype) -> Tensor:
    a = draw(seed, count, n, n, dtype=dtype)
    a[:, n // 2] = 3.3 * a[:, 0] if n > 2 else a[:, 0]
    return a


def scaled_low_rank(seed: int, count: int, n: int, dtype: torch.dtype) -> Tensor:
    exponents = torch.linspace(-8, 8, n, dtype=dtype)
    return 10 ** exponents[:, None] * low_rank(seed, count, n, dtype) * 10 ** -exponents.flip(0)


SINGULAR_FAMILIES = [low_rank, semidefinite, laplacian, dependent_rows, scaled_low_rank]


def failures(solver: LinearSolver, a: Tensor, b: Tensor) -> int:
    try:
        vmap(lambda a, b: solver(times(a), b))(a, b)
    except LinearSolveError as error:
        return error.failed
    return 0


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(
    ("factory", "family"),
    [
        *[(s, f) for s in (solve_lu, solve_inv) for f in SINGULAR_FAMILIES],
        *[(solve_auto, f) for f in SINGULAR_FAMILIES[:2]],
        *[(solve_cholesky, f) for f in (semidefinite, laplacian)],
    ],
    ids=lambda f: f.__name__,
)
def test_a_singular_matrix_always_fails(factory, family, dtype):
    missed = {}
    for n in SIZES:
        count = 15 if n <= 50 else 1
        a = family(n, count, n, dtype)
        b = draw(n + 5, count, n, dtype=dtype)
        b[::2] = (a @ draw(n + 6, count, n, 1, dtype=dtype))[::2, :, 0]
        # Together and alone: how one lane is scaled may depend on the others.
        together, few = failures(factory(), a, b), min(count, 5)
        alone = sum(failures(factory(), a[i : i + 1], b[i : i + 1]) for i in range(few))
        if found := count - together + few - alone:
            missed[n] = found
    assert not missed


def well_conditioned(seed: int, count: int, n: int, dtype: torch.dtype) -> Tensor:
    q = torch.linalg.qr(draw(seed, count, n, n))[0]
    return (q * spread(n) @ torch.linalg.qr(draw(seed + 1, count, n, n))[0]).to(dtype)


def well_conditioned_definite(seed: int, count: int, n: int, dtype: torch.dtype) -> Tensor:
    q = torch.linalg.qr(draw(seed, count, n, n))[0]
    return ((q * spread(n)) @ q.mT).to(dtype)


def badly_scaled_rows(seed: int, count: int, n: int, dtype: torch.dtype) -> Tensor:
    exponents = torch.linspace(-18, 18, n, dtype=F64)[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
    return (10 ** exponents[:, None] * well_conditioned(seed, count, n, F64)).to(dtype)


def badly_scaled_columns(seed: int, count: int, n: int, dtype: torch.dtype) -> Tensor:
    return badly_scaled_rows(seed, count, n, dtype).mT


def badly_scaled_diagonal(seed: int, count: int, n: int, dtype: torch.dtype) -> Tensor:
    return torch.diag_embed(10 ** torch.linspace(-20, 20, n, dtype=F64)).expand(count, n, n).to(dtype)


def badly_scaled_definite(seed: int, count: int, n: int, dtype: torch.dtype) -> Tensor:
    scale = 10 ** torch.linspace(-9, 9, n, dtype=F64)
    return (scale[:, None] * well_conditioned_definite(seed, count, n, F64) * scale).to(dtype)


REGULAR_FAMILIES = [well_conditioned, badly_scaled_rows, badly_scaled_columns, badly_scaled_diagonal]
DEFINITE_FAMILIES = [well_conditioned_definite, badly_scaled_definite, badly_scaled_diagonal]


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(
    ("factory", "family"),
    [
        *[(s, f) for s in (solve_lu, solve_inv) for f in (*REGULAR_FAMILIES, *DEFINITE_FAMILIES[:2])],
        *[(solve_auto, f) for f in REGULAR_FAMILIES[:2]],
        *[(solve_cholesky, f) for f in DEFINITE_FAMILIES],
    ],
    ids=lambda f: f.__name__,
)
def test_a_regular_matrix_never_fails_however_it_is_scaled(factory, family, dtype):
    solver = factory()
    for n in [1, *SIZES]:
        count = 10 if n <= 50 else 1
        a = family(n, count, n, dtype)
        b = (a.double() @ draw(n + 5, count, n, 1))[..., 0].to(dtype)
        assert failures(solver, a, b) == 0, n


def test_the_errors_survive_pickling_and_copying():
    error = failure_of(lambda: solve_cg()(times(INDEFINITE), ONES))
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert str(other) == str(error)
        assert vars(other) == vars(error)


# --- 7. bad input ---------------------------------------------------------------------------------------------------

BAD_OPTIONS = {
    "rtol": [-1.0, NAN, "a"],
    "atol": [-1.0, NAN, "a", None],
    "maxiter": [0, -1, 2.5, "3"],
    "ridge": [-1.0, NAN, float("inf"), None, "a"],
    "restart": [0, -1, 2.5, None],
    "alpha": [0.0, -1.0, NAN, float("inf"), "a"],
    "on_failure": ["Raise", None, True],
    "preconditioner": [3, torch.eye(2)],
    "dense_up_to": [-1, 2.5, None, "a"],
}


@pytest.mark.parametrize(
    ("row", "option"),
    [
        pytest.param(row, option, id=f"{row}, {option}")
        for row in SOLVERS
        for option in BAD_OPTIONS
        if accepts(row, option)
        if not (row.name == "inv" and option in ("maxiter", "alpha", "rtol", "atol"))
        if not (row.name == "auto, matrix-free" and option == "dense_up_to")
    ],
)
def test_a_bad_option_is_refused_by_the_factory(row, option):
    for value in BAD_OPTIONS[option]:
        with pytest.raises((ValueError, TypeError), match=f"{name_of(row.factory)}.*{option}"):
            row.factory(**{option: value})


@pytest.mark.parametrize(
    "options", [{"maxiter": 3}, {"alpha": 0.5}, {"rtol": 1e-3}, {"atol": 1e-3}, {"init": torch.ones(2)}], ids=str
)
def test_options_of_the_series_need_the_series(options):
    with pytest.raises(ValueError, match="ns=True"):
        solve_inv(**options)


@rows()
def test_unknown_and_positional_options_are_refused(row):
    with pytest.raises(TypeError):
        row.factory(tolerance=1e-3)
    with pytest.raises(TypeError):
        row.factory(1e-3)


@pytest.mark.parametrize(
    ("b", "words"),
    [
        pytest.param(torch.arange(3), "floating point or complex", id="integer"),
        pytest.param(torch.ones(3) > 0, "floating point or complex", id="bool"),
        pytest.param({"a": torch.ones(2), "i": torch.arange(2)}, "floating point or complex", id="one integer leaf"),
        pytest.param(1.0, "no tensor", id="number"),
        pytest.param(np.ones(3), "no tensor", id="array"),
        pytest.param({}, "no tensor", id="empty tree"),
        pytest.param(None, "no tensor", id="None"),
    ],
)
@rows()
def test_a_right_hand_side_that_is_no_tree_of_numbers_is_refused(row, b, words):
    with pytest.raises(TypeError, match=f"{name_of(row.factory)}.*right-hand side.*{words}"):
        row.factory()(lambda v: v, b)


WRONG_RESULTS = {
    "shape": lambda v: v[:2],
    "dtype": lambda v: v.float(),
    "structure": lambda v: (v,),
    "None": lambda v: None,
    "number": lambda v: 1.0,
}


@pytest.mark.parametrize("wrong", WRONG_RESULTS)
@rows()
def test_a_matvec_whose_result_is_not_like_its_argument_is_refused(row, wrong):
    with pytest.raises(ValueError, match=f"{name_of(row.factory)}: matvec.*float64\\[3\\]"):
        row.factory()(WRONG_RESULTS[wrong], ONES)


@pytest.mark.parametrize("wrong", WRONG_RESULTS)
@rows("preconditioner")
def test_a_preconditioner_whose_result_is_not_like_its_argument_is_refused(row, wrong):
    with pytest.raises(ValueError, match=f"{name_of(row.factory)}: preconditioner.*float64\\[3\\]"):
        row.factory(preconditioner=WRONG_RESULTS[wrong])(times(row.matrix(3)), ONES)


@pytest.mark.parametrize(
    "init", [torch.zeros(2, dtype=F64), torch.zeros(3), (ONES,), 0.0], ids=["shape", "dtype", "structure", "number"]
)
@rows("init", iterative=True)
def test_an_initial_guess_that_is_not_like_the_right_hand_side_is_refused(row, init):
    with pytest.raises(ValueError, match=f"{name_of(row.factory)}: init.*float64\\[3\\]"):
        row.factory(init=init)(times(row.matrix(3)), ONES)


@rows()
def test_a_matvec_that_is_random_or_has_side_effects_is_refused(row):
    with pytest.raises(ValueError, match=f"{name_of(row.factory)}: matvec draws random numbers"):
        row.factory()(lambda v: v * torch.rand(3, dtype=F64), ONES)
    with pytest.raises(ValueError, match=f"{name_of(row.factory)}: matvec changes a tensor"):
        row.factory()(lambda v: v.mul_(2), ONES)


@rows()
def test_a_matrix_in_the_place_of_matvec_is_refused(row):
    with pytest.raises(TypeError, match=f"{name_of(row.factory)}.*matvec"):
        row.factory()(row.matrix(3), ONES)


@rows()
def test_an_error_inside_matvec_comes_through(row):
    def matvec(v):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        row.factory()(matvec, ONES)


@rows()
def test_a_solver_shows_its_name_and_can_be_copied(row):
    solver = row.factory()
    assert name_of(row.factory) in repr(solver)
    assert isinstance(solver, LinearSolver)
    a = row.matrix(3)
    assert torch.equal(copy.deepcopy(solver)(times(a), ONES), solver(times(a), ONES))
    assert torch.equal(solver(matvec=times(a), b=ONES), solver(times(a), ONES))


# --- 8. a user's own function ---------------------------------------------------------------------------------------


def richardson(matvec, b):
    x = torch.zeros_like(b)
    for _ in range(80):
        x = x + 0.15 * (b - matvec(x))
    return x


def through_scipy(matvec, b):
    def array_matvec(v):
        return matvec(torch.from_numpy(np.array(v, dtype=np.float64))).numpy()

    operator = scipy.sparse.linalg.LinearOperator((3, 3), matvec=array_matvec, dtype=np.float64)
    x, info = scipy.sparse.linalg.gmres(operator, b.numpy(), rtol=1e-13, atol=0.0)
    assert info == 0
    return torch.from_numpy(x)


def wrapped(solver: LinearSolver) -> Callable:
    return lambda matvec, b: solver(lambda v: matvec(v) + 0.0 * v, b)


def materialising(matvec, b):
    return torch.linalg.inv(vmap(matvec, out_dims=1)(torch.eye(3, dtype=b.dtype))) @ b


USERS = {
    "loop": richardson,
    "lu, passed on": lambda matvec, b: solve_lu()(matvec, b),
    "lu, wrapped": wrapped(solve_lu()),
    "cg, wrapped": wrapped(solve_cg()),
    "gmres, wrapped": wrapped(solve_gmres()),
    "cholesky, wrapped": wrapped(solve_cholesky()),
    "auto, wrapped": wrapped(solve_auto()),
    "vmap of matvec": materialising,
    "scipy": through_scipy,
}


def user_matrix(theta: Tensor) -> Tensor:
    return 2 * torch.eye(3, dtype=theta.dtype) + theta @ theta.mT


def condition(x: Tensor, theta: Tensor, b: Tensor) -> Tensor:
    return user_matrix(theta) @ x + 0.1 * x**3 - b


def newton(init: Tensor, theta: Tensor, b: Tensor) -> Tensor:
    x = init
    for _ in range(12):
        jacobian = user_matrix(theta) + torch.diag_embed(0.3 * x**2)
        x = x - (torch.linalg.inv(jacobian) @ condition(x, theta, b)[..., None])[..., 0]
    return x


USER_TRANSFORMS = [
    "grad",
    "jacfwd",
    "hessian",
    "jacrev of jacrev",
    "jacfwd of jacfwd",
    "three times reverse",
    "grad of jvp",
    "vmap of vmap",
    "vmap of grad",
    "vmap of hessian",
    "grad of vmap",
    "hessian of vmap of vmap",
]


@pytest.mark.parametrize(
    ("user", "transform"),
    [
        (user, transform)
        for user in USERS
        for transform in USER_TRANSFORMS
        # NumPy sees no batched tensors; jacobians and hessians batch too.
        if not (user == "scipy" and any(word in transform for word in ("vmap", "jac", "hessian", "forward")))
    ],
)
def test_a_users_own_function_solves_the_systems_of_derivatives(user, transform):
    solution = custom_root(condition, solve=USERS[user])(newton)
    theta, b = draw(7, 3, 3) / 2, draw(8, 3)
    init = torch.zeros(3, dtype=F64)
    apply = TRANSFORMS[transform]
    result = apply(lambda theta, b: solution(init, theta, b), theta, b)
    assert_same(result, apply(lambda theta, b: newton(init, theta, b), theta, b), DERIVATIVE)


@pytest.mark.parametrize("user", USERS)
def test_a_users_own_function_serves_backward_passes_of_first_and_second_order(user):
    solution = custom_root(condition, solve=USERS[user])(newton)
    init, results = torch.zeros(3, dtype=F64), []
    for f in (solution, newton):
        theta, b = (draw(7, 3, 3) / 2).requires_grad_(), draw(8, 3).requires_grad_()
        first = torch.autograd.grad((f(init, theta, b) ** 3).sum(), (theta, b), create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), (theta, b))
        results.append([g.detach() for g in (*first, *second)])
    assert_same(results[0], results[1], DERIVATIVE)


@pytest.mark.parametrize("user", ["loop", "lu, wrapped", "cg, wrapped", "gmres, wrapped", "vmap of matvec"])
def test_a_users_own_function_meets_trees(user):
    """The tree is made flat and back by the function itself."""

    def flat(v):
        return torch.cat([v["x"], v["y"][None]])

    def tree(v):
        return {"x": v[:2], "y": v[2]}

    def solve(matvec, b):
        return tree(USERS[user](lambda v: flat(matvec(tree(v))), flat(b)))

    def tree_condition(x, theta, b):
        return tree(condition(flat(x), theta, b))

    solution = custom_root(tree_condition, solve=solve)(lambda init, theta, b: tree(newton(init, theta, b)))
    theta, b, init = draw(7, 3, 3) / 2, draw(8, 3), torch.zeros(3, dtype=F64)
    for name in ("grad", "jacfwd", "hessian", "vmap of grad", "grad of vmap"):
        apply = TRANSFORMS[name]
        result = apply(lambda theta, b: flat(solution(init, theta, b)), theta, b)
        assert_same(result, apply(lambda theta, b: newton(init, theta, b), theta, b), DERIVATIVE)


def test_a_users_own_function_may_solve_some_systems_with_the_one_and_some_with_another_solver():
    seen = []

    def solve(matvec, b):
        seen.append(b.shape)
        return (solve_lu() if len(seen) % 2 else solve_cg())(matvec, b)

    solution = custom_root(condition, solve=solve)(newton)
    theta, b, init = draw(7, 3, 3) / 2, draw(8, 3), torch.zeros(3, dtype=F64)
    result = jacrev(lambda theta: solution(init, theta, b))(theta)
    assert_same(result, jacrev(lambda theta: newton(init, theta, b))(theta), DERIVATIVE)
    assert seen == [torch.Size([3])]


@pytest.mark.parametrize("wrong", WRONG_RESULTS)
def test_a_users_own_function_whose_result_is_not_like_the_right_hand_side_is_refused(wrong):
    def solve(matvec, b):
        return WRONG_RESULTS[wrong](b)

    solution = custom_root(lambda x, theta: x - theta, solve=solve)(lambda init, theta: theta.clone())
    with pytest.raises(ValueError, match=r"solve=.*right-hand side.*float64\[3\]"):
        grad(lambda theta: solution(None, theta).sum())(ONES)


def test_a_users_own_function_whose_result_is_not_finite_is_a_failure():
    solution = custom_root(lambda x, theta: x - theta, solve=lambda matvec, b: b / 0)(lambda i, theta: theta.clone())
    error = failure_of(lambda: grad(lambda theta: solution(None, theta).sum())(ONES))
    assert error.failed == 1


# --- 8b. the adjoint of an operator that is nearly Hermitian ----------------------------------------------------------


def nearly_hermitian(skew: Tensor) -> Callable[[Tensor], Tensor]:
    """``A + skew S``, with ``S`` skew-symmetric, so small that conjugate gradients converge."""
    a = with_singular_values(torch.linspace(1, 2, 12, dtype=F64))
    a, s = a @ a.mT, general(12)
    return lambda v: a @ v + skew * ((s - s.mT) @ v)


@pytest.mark.parametrize("skew", [0.0, 1e-6])
def test_conjugate_gradients_take_the_adjoint_where_it_is_another(skew):
    matvec, b, u = nearly_hermitian(torch.tensor(skew, dtype=F64)), draw(1, 12), draw(2, 12)
    matrix = torch.stack([matvec(e) for e in torch.eye(12, dtype=F64)], dim=-1)
    _, pull = torch.func.vjp(lambda b: solve_cg(rtol=1e-13)(matvec, b), b)
    torch.testing.assert_close(pull(u)[0], torch.linalg.solve(matrix.mT, u), rtol=1e-10, atol=0)


def test_a_derivative_sees_that_an_operator_is_hermitian_for_these_operands_alone():
    """The second derivative in ``skew`` at 0, where the operator is its own adjoint."""
    b, u = draw(1, 12), draw(2, 12)

    def by_cg(skew: Tensor) -> Tensor:
        return u @ solve_cg(rtol=1e-13)(nearly_hermitian(skew), b)

    def exactly(skew: Tensor) -> Tensor:
        matrix = vmap(nearly_hermitian(skew), out_dims=1)(torch.eye(12, dtype=F64))
        return u @ torch.linalg.solve(matrix, b)

    skew = torch.tensor(0.0, dtype=F64)
    for order in (grad, lambda f: grad(grad(f))):
        torch.testing.assert_close(order(by_cg)(skew), order(exactly)(skew), rtol=1e-8, atol=1e-8)


# --- 9. solve_auto --------------------------------------------------------------------------------------------------


def large(n: int, kind: str) -> Tensor:
    values = spread(n) if kind == "definite" else spread(n).sqrt() * (-1) ** torch.arange(n)
    if kind == "general":
        return torch.eye(n, dtype=F64) + 0.5 * draw(1, n, n) / n**0.5
    q = torch.eye(n, dtype=F64)
    for seed in (2, 3):
        u = draw(seed, n)
        q = q - torch.outer(q @ u, u) * (2 / (u @ u))
    return (q * values) @ q.T


@pytest.mark.parametrize("kind", ["definite", "indefinite", "general"])
def test_auto_solves_a_large_system_without_its_matrix(kind):
    n = 1500
    a = large(n, kind)
    matvec = Counted(times(a))
    b = draw(5, n)
    x = solve_auto()(matvec, b)
    assert matvec.calls < n / 2
    assert relative_error(a @ x, b) <= torch.finfo(F64).eps ** (2 / 3)
    reference = torch.from_numpy(np.linalg.solve(a.numpy(), b.numpy()))
    assert relative_error(x, reference) <= tolerance(BY_NAME["auto, matrix-free"])


def test_auto_differentiates_a_large_system_without_its_matrix():
    n = 1500
    d, b = spread(n), draw(5, n)

    def f(d, b):
        return solve_auto()(lambda v: d * v + 0.1 * torch.roll(v, 1), b)

    x, u = f(d, b), solve_auto()(lambda v: d * v + 0.1 * torch.roll(v, -1), torch.ones(n, dtype=F64))
    by_d, by_b = grad(lambda d, b: f(d, b).sum(), (0, 1))(d, b)
    assert relative_error(by_b, u) <= tolerance(BY_NAME["auto, matrix-free"])
    assert relative_error(by_d, -u * x) <= tolerance(BY_NAME["auto, matrix-free"])


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("dtype", [F32, F64, C128], ids=str)
def test_auto_gives_the_same_with_and_without_the_matrix(family, dtype):
    a, b = FAMILIES[family](9, dtype), draw(5, 9, dtype=dtype)
    exact = solve_lu()(times(a), b)
    assert torch.equal(solve_auto()(times(a), b), exact)
    assert relative_error(solve_auto(dense_up_to=0)(times(a), b), exact) <= tolerance(
        BY_NAME["auto, matrix-free"], dtype
    )


def test_auto_materialises_up_to_the_bound():
    a, b = definite(8), draw(5, 8)
    for bound, error in ((8, "LU"), (7, "GMRES")):
        bad = failure_of(lambda bound=bound: solve_auto(dense_up_to=bound)(times(0 * a), b))
        assert error in bad.solver


def test_auto_turns_to_gmres_where_cg_breaks_down():
    a, b = indefinite(12), draw(5, 12)
    x = solve_auto(dense_up_to=0)(times(a), b)
    assert relative_error(x, torch.linalg.inv(a) @ b) <= tolerance(BY_NAME["auto, matrix-free"])


def test_auto_solves_lanes_of_different_kinds_together():
    a, b = torch.stack([definite(8), indefinite(8), general(8)]), draw(5, 3, 8)
    x = vmap(lambda a, b: solve_auto(dense_up_to=0)(times(a), b))(a, b)
    assert relative_error(x, torch.einsum("lij,lj->li", torch.linalg.inv(a), b)) <= tolerance(
        BY_NAME["auto, matrix-free"]
    )


# --- 10. complex ----------------------------------------------------------------------------------------------------


def central_differences(f: Callable[[Tensor], Tensor], z: Tensor, step: float = 1e-5) -> Tensor:
    """Of a real function of complex numbers: df/dRe + i df/dIm, as torch has it."""
    out = torch.zeros_like(z)
    for index in np.ndindex(*z.shape):
        for unit in (1.0, 1.0j):
            h = torch.zeros_like(z)
            h[index] = step * unit
            out[index] += unit * float(f(z + h) - f(z - h)) / (2 * step)
    return out


DIFFERENCES = 1e-8
"""Central differences with a step of 1e-5 leave 1e-10 times a third derivative, and rounding 1e-11."""


def real_loss(x: Tensor) -> Tensor:
    weights = torch.tensor([1.0 + 2.0j, -0.5 + 1.0j, 0.3 - 0.7j], dtype=C128)
    return (weights * x).sum().real + (x * x.conj() * torch.tensor([1.0, 2.0, 3.0], dtype=F64)).sum().real


@rows()
def test_derivatives_in_complex_parameters_match_central_differences(row):
    matrix, solver = parametrised(row, C128), row.factory()
    theta, b = draw(7, 3, 3, dtype=C128) / 2, draw(8, 3, dtype=C128)

    def loss(theta, b):
        return real_loss(solver(times(matrix(theta)), b))

    by_theta, by_b = grad(loss, argnums=(0, 1))(theta, b)
    assert_same(by_theta, central_differences(lambda theta: loss(theta, b), theta), DIFFERENCES)
    assert_same(by_b, central_differences(lambda b: loss(theta, b), b), DIFFERENCES)


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap of grad", "grad of vmap", "vmap of vmap"])
@rows()
def test_complex_transforms_match_the_inverse(row, transform):
    matrix, solver = parametrised(row, C128), row.factory()
    theta, b = draw(7, 3, 3, dtype=C128) / 2, draw(8, 3, dtype=C128)

    def parts(f):
        return lambda theta, b: torch.view_as_real(f(theta, b).resolve_conj())

    apply = TRANSFORMS[transform]
    result = apply(parts(lambda theta, b: solver(times(matrix(theta)), b)), theta, b)
    reference = apply(parts(lambda theta, b: torch.linalg.inv(matrix(theta)) @ b), theta, b)
    assert_same(result, reference, DERIVATIVE)


def test_complex_second_derivatives_match_those_of_the_inverse():
    base, theta, b = general(3, C128), draw(7, 3, 3, dtype=F64), draw(8, 3, dtype=C128)

    def f(solve):
        return lambda theta: real_loss(solve(base + (0.2 + 0.3j) * theta))

    reference = hessian(f(lambda a: torch.linalg.inv(a) @ b))(theta)
    for solver in (solve_lu(), solve_gmres(), solve_normal_cg()):
        assert_same(hessian(f(lambda a, solver=solver: solver(times(a), b)))(theta), reference, DERIVATIVE)


@pytest.mark.parametrize("row", [r for r in SOLVERS if "general" in r.families], ids=str)
def test_an_operator_that_is_linear_over_the_reals_alone_is_solved_and_differentiated(row):
    a, c = 2 + 0.3 * draw(7, 3, dtype=C128), 0.4 * draw(8, 3, dtype=C128)
    b = draw(9, 3, dtype=C128)
    solver = row.factory(**({"rtol": 1e-13} if row.iterative else {}))

    def solution(a, c, b):
        return solver(lambda v: a * v + c * v.conj(), b)

    def closed_form(a, c, b):
        return (a.conj() * b - c * b.conj()) / (a * a.conj() - c * c.conj())

    assert relative_error(solution(a, c, b), closed_form(a, c, b)) <= 1e-12
    result = grad(lambda *p: real_loss(solution(*p)), argnums=(0, 1, 2))(a, c, b)
    for i in range(3):

        def varied(z, i=i):
            point = [a, c, b]
            point[i] = z
            return real_loss(closed_form(*point))

        assert_same(result[i], central_differences(varied, (a, c, b)[i]), DIFFERENCES)


def test_complex_cg_takes_as_many_products_as_there_are_distinct_eigenvalues():
    matvec = Counted(times(with_eigenvalues(distinct(4, 12), C128)))
    solve_cg()(matvec, draw(5, 12, dtype=C128))
    assert matvec.calls == LOOK + 4 + CHECK


@pytest.mark.parametrize("row", SOLVERS, ids=lambda row: row.name)
def test_an_affine_matvec_is_refused(row):
    with pytest.raises(ValueError, match="does not take zero to zero"):
        row.factory()(lambda v: 2 * v + 1, torch.ones(3, dtype=torch.float64))


# --- 11. what is not linear -----------------------------------------------------------------------------------------

NOT_LINEAR = {
    "square": lambda v: v * v,
    "absolute value": torch.abs,
    "one side": torch.relu,
    "direction": lambda v: v / torch.linalg.vector_norm(v),
    "cubic term": lambda v: v + v**3,
    "bounds": lambda v: v.clamp(-0.5, 0.5),
    "order": lambda v: v.sort().values,
    "rescaled square": lambda v: v * v.abs() / v.abs().max(),
}
SIDES = {
    "ones": torch.ones(3, dtype=F64),
    "one": torch.ones(1, dtype=F64),
    "minus one": -torch.ones(1, dtype=F64),
    "mixed": torch.tensor([0.3, -2.0, 1.0, 0.0], dtype=F64),
    "many": draw(3, 40),
}


def is_linear_anyway(kind: str, b: Tensor) -> bool:
    return len(b) == 1 and kind in ("order", "rescaled square")


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", NOT_LINEAR)
def test_a_matvec_that_is_not_linear_is_refused(kind, side, dtype):
    b = SIDES[side].to(dtype)
    if is_linear_anyway(kind, b):
        pytest.skip("of one number it is linear")
    with pytest.raises(ValueError, match="solve_lu: matvec is not linear: A \\(b - 3 p\\)"):
        solve_lu()(NOT_LINEAR[kind], b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["square", "absolute value", "one side", "direction"])
def test_in_half_precision_too(kind, dtype):
    for b in SIDES.values():
        with pytest.raises(ValueError, match="matvec is not linear"):
            solve_lu()(NOT_LINEAR[kind], b.to(dtype))


@pytest.mark.parametrize("kind", ["square", "absolute value", "one side", "cubic term", "bounds"])
def test_also_where_the_right_hand_side_is_zero(kind):
    with pytest.raises(ValueError, match="matvec is not linear"):
        solve_lu()(NOT_LINEAR[kind], torch.zeros(3, dtype=F64))


@rows()
def test_every_solver_refuses_what_is_not_linear(row):
    with pytest.raises(ValueError, match=f"{name_of(row.factory)}: matvec is not linear"):
        row.factory()(lambda v: v * v, torch.tensor([4.0, 9.0], dtype=F64))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_what_is_not_linear_is_refused_under_every_transform(transform):
    def solution(theta, b):
        return solve_lu()(lambda v: theta @ v + 4 * v + v * v.abs(), b)

    with pytest.raises(ValueError, match="matvec is not linear"):
        TRANSFORMS[transform](solution, draw(7, 3, 3) / 2, draw(8, 3))


def test_one_lane_that_is_not_linear_is_refused():
    bend = torch.tensor([0.0, 0.0, 1e-2], dtype=F64)
    with pytest.raises(ValueError, match="matvec is not linear"):
        vmap(lambda c: solve_lu()(lambda v: v + c * v * v, torch.ones(3, dtype=F64)))(bend)


@pytest.mark.parametrize("bent", ["large", "small"])
def test_a_leaf_that_is_not_linear_is_refused_whatever_the_size_of_the_others(bent):
    b = {"large": 1e5 * draw(5, 3), "small": 1e-5 * draw(6, 3), "nothing": draw(7, 0)}

    def matvec(v):
        return v | {bent: v[bent].abs()}

    with pytest.raises(ValueError, match="matvec is not linear"):
        solve_lu()(matvec, b)


@pytest.mark.parametrize("fn", [lambda v: v * v, lambda v: v * v.abs(), lambda v: v / v.abs()])
def test_a_complex_function_that_is_not_linear_is_refused(fn):
    with pytest.raises(ValueError, match="matvec is not linear"):
        solve_lu()(fn, torch.tensor([1.0 + 2.0j, -0.5j], dtype=C128))


def difference_quotient(v: Tensor) -> Tensor:
    step = torch.finfo(v.dtype).eps ** 0.5
    x = torch.linspace(0.5, 1.5, v.numel(), dtype=v.dtype)
    return ((x + step * v).sin() - x.sin()) / step + 3 * v


def cancelling(v: Tensor) -> Tensor:
    """The last element is rounding alone."""
    return torch.cat([v[:-1] + v[-1:], (1e4 * v[-1:] + v[:1]) - 1e4 * v[-1:] - v[:1]])


ROUNDED = {
    "a difference quotient": difference_quotient,
    "cancellation": lambda v: (v + 1e2 * v.flip(0)) - 1e2 * v.flip(0),
    "half precision inside": lambda v: (v.to(torch.float16) * 3).to(v.dtype),
    "nothing": lambda v: 0.0 * v,
    "a part of rounding alone": cancelling,
}


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("n", [2, 7, 100])
@pytest.mark.parametrize("kind", ROUNDED)
def test_rounding_in_a_matvec_is_not_taken_for_a_bend(kind, n, dtype):
    if kind == "half precision inside" and dtype == F64:
        pytest.skip("no rounding of this dtype")
    solver = solve_lstsq(on_failure="ignore")
    for seed in range(20):
        assert torch.isfinite(solver(ROUNDED[kind], draw(seed, n, dtype=dtype))).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F32, F64, C64, C128], ids=str)
@pytest.mark.parametrize("size", [1e-38, 1e-25, 1e-4, 1.0, 1e4])
def test_a_linear_matvec_of_any_size_is_let_pass(size, dtype):
    for n in (1, 3, 30):
        a = draw(n, n, n, dtype=C128 if dtype.is_complex else F64).to(dtype)
        b = (size * draw(n + 1, n, dtype=C128 if dtype.is_complex else F64)).to(dtype)
        solve_lstsq(on_failure="ignore")(times(a), b)


def test_a_leaf_of_rounding_alone_is_let_pass_beside_others():
    def matvec(v):
        return {"a": 2 * v["a"], "b": (1e3 * v["b"] + v["a"]) - v["a"] - 1e3 * v["b"]}

    for seed in range(20):
        solve_lstsq()(matvec, {"a": draw(seed, 3), "b": draw(seed + 50, 3)})


def test_autocast_is_no_bend():
    a = general(20, F64).to(F32)
    for seed in range(20):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            solve_lstsq()(lambda v: (a @ v).to(F32), draw(seed, 20, dtype=F32))
