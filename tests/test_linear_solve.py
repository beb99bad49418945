"""The linear solvers: as mathematics, against NumPy, SciPy, closed forms and the theory of each, and as an API."""

from __future__ import annotations

from collections import namedtuple

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from checks.tensors import draw
from tables.linear_solvers import C64, C128, CONDITION, F32, F64, FAMILIES, SOLVERS, general, with_eigenvalues
from tables.linear_systems import (
    LANES,
    TREE_SHAPES,
    TREE_SIZE,
    on_trees,
    relative_error,
    row_of,
    rows,
    solve_beside,
    times,
    tolerance,
    tree_of,
)
from torch import Tensor
from torch.func import jacfwd, jacrev, vmap
from torch.utils import _pytree as torch_pytree

from implicitdiff.linear_solve import solve_lu

# --- solutions ------------------------------------------------------------------------------------------------------


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


# --- scale ----------------------------------------------------------------------------------------------------------


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
