"""Projections that search: onto polyhedra and the transport polytope."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import scipy.optimize
import torch
from checks.tensors import draw, tensor
from checks.transforms import TRANSFORMS, under_each
from tables.projection_inputs import F32, F64, INF, NAN, UP_TO_THREE, Smooth
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from implicitdiff import ConvergenceError, custom_fixed_point, projections
from implicitdiff.linear_solve import solve_lstsq
from implicitdiff.projections import birkhoff, box_section, isotonic, polyhedron, transport
from implicitdiff.solvers import Status, projected_gradient

# --- the table of those that search, near a point where they are smooth -----------------------------------------------


def onto_affine_set(v: Tensor, A: Tensor, b: Tensor) -> Tensor:
    return v - A.T @ (torch.linalg.inv(A @ A.T) @ (A @ v - b))


def of_polyhedron(t: Tensor) -> Tensor:
    return polyhedron(t[:3], t[3:6][None], t[6:7], t[7:13].reshape(2, 3), t[13:15])


def on_a_side(t: Tensor) -> Tensor:
    """Of the polyhedron, with its first inequality active."""
    return onto_affine_set(t[:3], torch.stack([t[3:6], t[7:10]]), torch.stack([t[6], t[13]]))


def sums_of(t: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows and columns, with one total."""
    a, b = t[6:8], t[8:11]
    return a, b * (a.sum() / b.sum())


def of_transport(t: Tensor) -> Tensor:
    return transport(t[:6].reshape(2, 3), *sums_of(t)).flatten()


# The sum of the last column is that of the others.
EQUATIONS = tensor([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1, 0, 0, 1, 0, 0], [0, 1, 0, 0, 1, 0], [0, 0, 1, 0, 0, 1]])
SUPPORT = tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0])


def on_support(t: Tensor) -> Tensor:
    a, b = sums_of(t)
    return SUPPORT * onto_affine_set(SUPPORT * t[:6], (SUPPORT * EQUATIONS)[:4], torch.cat([a, b[:2]]))


SMOOTH = {
    "polyhedron": Smooth(
        of_polyhedron,
        on_a_side,
        tensor([0.7, 1.2, -0.4, 0.5, 0.9, -1.1, 0.8, -0.6, 0.3, 1.4, 1.0, 0.2, 0.1, -1.2, 9.0]),
    ),
    "transport": Smooth(of_transport, on_support, tensor([1.9, 0.9, -0.7, 0.1, 0.4, 0.8, 0.9, 1.2, 0.5, 0.7, 0.9])),
}
each_smooth = pytest.mark.parametrize("row", SMOOTH.values(), ids=SMOOTH)


@under_each(SMOOTH, UP_TO_THREE)
def test_projection_is_right_under(row: Smooth, transform: str) -> None:
    # They are linear in v there: without the sine, much of what is of second order would be zero.
    result, expected = (
        TRANSFORMS[transform](lambda t, f=f: f(t).sin(), row.theta) for f in (row.solution, row.reference)
    )
    # The polyhedron is exact up to the 4e-11 that `qp` stops at.
    torch.testing.assert_close(result, expected, rtol=1e-8, atol=1e-8)


@each_smooth
def test_derivatives_are_those_of_central_differences(row: Smooth) -> None:
    theta = row.theta.clone().requires_grad_()
    assert torch.autograd.gradcheck(row.solution, theta, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(row.solution, theta, check_fwd_over_rev=True, fast_mode=True)


@each_smooth
def test_lanes_of_vmap_are_the_calls_of_a_loop(row: Smooth) -> None:
    """Whatever constraint is active in each."""
    thetas = torch.stack([row.theta, *(row.theta * scale for scale in draw(1, 12, len(row.theta)).exp())])
    for f in (row.solution, jacfwd(row.solution), jacrev(row.solution)):
        torch.testing.assert_close(vmap(f)(thetas), torch.stack([f(t) for t in thetas]), rtol=1e-8, atol=1e-8)


# --- polyhedra --------------------------------------------------------------------------------------------------------


CUBE = torch.cat([torch.eye(4, dtype=F64), -torch.eye(4, dtype=F64)])


@pytest.mark.parametrize("seed", range(8))
def test_a_polyhedron_is_where_slsqp_puts_it(seed: int) -> None:
    v, A, G = 3 * draw(seed, 4), draw(seed + 10, 2, 4), draw(seed + 20, 5, 4)
    inside = draw(seed + 30, 4)
    b, h = A @ inside, G @ inside + draw(seed + 40, 5).abs()
    v_, A_, b_, G_, h_ = (t.numpy() for t in (v, A, b, G, h))
    expected = scipy.optimize.minimize(
        lambda x: (x - v_) @ (x - v_) / 2,
        inside.numpy(),
        jac=lambda x: x - v_,
        method="SLSQP",
        constraints=[
            {"type": "eq", "fun": lambda x: A_ @ x - b_},
            {"type": "ineq", "fun": lambda x: h_ - G_ @ x},
        ],
        options={"ftol": 1e-15, "maxiter": 500},
    )
    # SLSQP stops at a relative change of 1e-15 in the squared distance.
    x = polyhedron(v, A, b, G, h)
    torch.testing.assert_close(x, torch.from_numpy(expected.x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(polyhedron(x, A, b, G, h), x, rtol=1e-9, atol=1e-9)


def test_polyhedra_are_the_sets_that_have_projections_of_their_own() -> None:
    v, ones = 2 * draw(1, 4), torch.ones(1, 4, dtype=F64)
    pairs = [
        (polyhedron(v), v),
        (polyhedron(v, G=CUBE, h=0.5), projections.linf_ball(v, 0.5)),
        (polyhedron(v, ones, 1.0, CUBE[4:], 0.0), projections.simplex(v)),
        (polyhedron(v, ones, 1.0, CUBE, 0.4), box_section(v, -0.4, 0.4, 1.0, 1.0)),
        (polyhedron(v, G=ones, h=tensor([0.3])), projections.halfspace(v, 1.0, 0.3)),
        (polyhedron(v, draw(2, 2, 4), 0.3), projections.affine_set(v, draw(2, 2, 4), 0.3)),
        (polyhedron(v, G=CUBE[:3] - CUBE[1:4], h=0.0), isotonic(v)),
        (polyhedron(v, G=CUBE, h=torch.cat([v[:4].sign() * INF, v[4:]]).abs().repeat(2)), v),
    ]
    for result, expected in pairs:
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


def test_a_tree_of_other_dtypes_is_one_vector() -> None:
    v, G = 2 * draw(3, 4), CUBE
    expected = polyhedron(v, torch.ones(1, 4, dtype=F64), 1.0, G, 0.6)
    first, rest = polyhedron([v[:1], {"a": v[1:].reshape(3, 1).float()}], torch.ones(1, 4), 1.0, G, 0.6)
    assert first.shape == (1,) and rest["a"].shape == (3, 1) and rest["a"].dtype == F32
    torch.testing.assert_close(torch.cat([first, rest["a"][:, 0].double()]), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        polyhedron(v.float(), torch.ones(1, 4), 1.0, G.float(), 0.6).double(), expected, rtol=0, atol=1e-5
    )


def test_an_empty_polyhedron_is_reported() -> None:
    v = draw(4, 4)
    with pytest.raises(ConvergenceError, match="no point satisfies the constraints") as caught:
        polyhedron(v, G=CUBE, h=-0.1)
    assert caught.value.status == Status.INFEASIBLE
    with pytest.raises(ConvergenceError) as caught:
        vmap(lambda h: polyhedron(v, G=CUBE, h=h))(tensor([0.5, -0.1, 1.0]))
    assert caught.value.status == Status.INFEASIBLE and caught.value.lanes == (1,)


def test_dependent_constraints_have_the_derivative_of_independent_ones() -> None:
    v, A = tensor([1.5, 1.0, -0.5]), torch.ones(1, 3, dtype=F64)
    twice, G = torch.cat([A, 2 * A]), -torch.eye(3, dtype=F64)
    right = tensor([1.0, 2.0])
    torch.testing.assert_close(polyhedron(v, twice, right, G, 0.0), projections.simplex(v), rtol=1e-9, atol=1e-9)
    for jacobian, options in itertools.product((jacrev, jacfwd), ({}, {"solve": solve_lstsq()})):
        J = jacobian(lambda v, options=options: polyhedron(v, twice, right, G, 0.0, **options))(v)
        torch.testing.assert_close(J, jacrev(projections.simplex)(v), rtol=1e-9, atol=1e-9)


# --- transport --------------------------------------------------------------------------------------------------------


def equations(m: int, n: int) -> Tensor:
    """Of the sums of rows and columns, without the last."""
    rows, columns = torch.eye(m, dtype=F64), torch.eye(n, dtype=F64)
    return torch.cat([rows.repeat_interleave(n, dim=1), columns.repeat(1, m)])[:-1]


def drawn(seed: int, m: int, n: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    a, b = draw(seed + 1, m).abs(), draw(seed + 2, n).abs()
    return scale * draw(seed, m, n), a, b * (a.sum() / b.sum())


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 4), (3, 3), (5, 4)])
def test_transport_is_the_quadratic_program(m: int, n: int, scale: float) -> None:
    for seed in range(3):
        v, a, b = drawn(seed, m, n, scale)
        X = transport(v, a, b)
        right = torch.cat([a, b])[:-1]
        expected = polyhedron(v, equations(m, n), right, -torch.eye(m * n, dtype=F64), 0.0)
        torch.testing.assert_close(X, expected, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(X.sum(1), a, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(X.sum(0), b, rtol=1e-14, atol=1e-14)
        assert (X >= 0).all()


@pytest.mark.parametrize("n", [3, 10, 40])
def test_a_sharp_matrix_is_projected_onto_the_assignment_of_scipy(n: int) -> None:
    v = draw(n, n, n)
    rows, columns = scipy.optimize.linear_sum_assignment(v.numpy(), maximize=True)
    expected = torch.zeros(n, n, dtype=F64)
    expected[rows, columns] = 1.0
    torch.testing.assert_close(birkhoff(1e5 * v), expected, rtol=1e-12, atol=1e-12)
    assert jacrev(lambda v: birkhoff(v).sin().sum())(1e5 * v).abs().max() < 1e-12


def test_matrices_form_an_obtuse_angle_with_the_polytope() -> None:
    v, a, b = drawn(5, 4, 3)
    X = transport(v, a, b)
    others = torch.stack([transport(5 * draw(seed, 4, 3), a, b) for seed in range(10, 40)])
    assert (((others - X) * (v - X)).sum((1, 2)) <= 1e-12).all()
    torch.testing.assert_close(transport(X, a, b), X, rtol=1e-13, atol=1e-13)


def test_the_jacobian_of_transport_is_an_orthogonal_projector() -> None:
    for seed in range(4):
        v, a, b = drawn(seed, 3, 4)
        J = jacrev(lambda v, a=a, b=b: transport(v, a, b).flatten())(v).reshape(12, 12)
        torch.testing.assert_close(J, J.T, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(J @ J, J, rtol=1e-12, atol=1e-12)


def one_sided(v: Tensor, a: Tensor, b: Tensor, da: Tensor, db: Tensor) -> Tensor:
    h = 1e-6
    return (transport(v, a + h * da, b + h * db) - transport(v, a, b)) / h


BLOCKS = {"a permutation": ([], []), "empty rows and columns": ([0, 2], [1, 3])}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("rows", "columns"), BLOCKS.values(), ids=BLOCKS)
def test_the_derivative_in_the_sums_of_blocks_is_that_of_one_side(seed: int, rows: Any, columns: Any) -> None:
    v, a, b = 100 * torch.eye(5, dtype=F64) + 20 * draw(seed, 5, 5), torch.ones(5, dtype=F64), torch.ones(5, dtype=F64)
    a[rows], b[columns] = 0.0, 0.0
    # What is added to a row or a column makes no difference.
    v[rows] += 100 * draw(seed + 10, len(rows), 1)
    v[:, columns] += 100 * draw(seed + 20, 1, len(columns))
    zeros = transport(v, a, b) == 0
    compared = 0
    for i, j in itertools.product(range(5), repeat=2):
        da, db = torch.eye(5, dtype=F64)[i], torch.eye(5, dtype=F64)[j]
        slope = jvp(lambda a, b: transport(v, a, b), (a, b), (da, db))[1]
        torch.testing.assert_close(slope.sum(1), da, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(slope.sum(0), db, rtol=1e-12, atol=1e-12)
        # A change that may be made is the change that is made.
        if (slope[zeros] > -1e-12).all():
            compared += i != j
            torch.testing.assert_close(slope, one_sided(v, a, b, da, db), rtol=1e-8, atol=1e-8)
    assert compared >= 4


def test_rows_and_columns_of_sum_zero() -> None:
    v = draw(7, 3, 4)
    a, b = tensor([0.0, 1.0, 2.0]), tensor([1.0, 0.0, 1.5, 0.5])
    X = transport(v, a, b)
    inner = transport(v[1:][:, [0, 2, 3]], a[1:], b[[0, 2, 3]])
    assert (X[0] == 0).all() and (X[:, 1] == 0).all()
    torch.testing.assert_close(X[1:][:, [0, 2, 3]], inner)
    assert (jacrev(lambda v: transport(v, a, b))(v)[0].abs() < 1e-14).all()
    assert (transport(v, 0.0, 0.0) == 0).all()
    assert jacfwd(lambda a: transport(v, a, 0 * b))(0 * a).isfinite().all()


@pytest.mark.parametrize("seed", range(4))
def test_the_derivative_in_a_sum_of_zero_is_that_to_its_right(seed: int) -> None:
    v, a, b = draw(seed, 3, 4), tensor([0.0, 1.0, 2.0]), tensor([0.7, 0.3, 1.5, 0.5])
    for j in range(4):
        da, db = tensor([1.0, 0.0, 0.0]), torch.eye(4, dtype=F64)[j]
        slope = jvp(lambda a, b: transport(v, a, b), (a, b), (da, db))[1]
        torch.testing.assert_close(slope, one_sided(v, a, b, da, db), rtol=1e-8, atol=1e-8)
        slope = jvp(lambda a, b: transport(v.T, b, a), (a, b), (da, db))[1]
        torch.testing.assert_close(slope, one_sided(v.T, b, a, db, da), rtol=1e-8, atol=1e-8)


def test_entries_of_minus_inf_are_kept_out() -> None:
    v, a, b = tensor([[0.0, 3.0], [1.0, 2.0]]), tensor([1.0, 2.0]), tensor([2.0, 1.0])
    v[0, 1] = -INF
    torch.testing.assert_close(transport(v, a, b), tensor([[1.0, 0.0], [1.0, 1.0]]))
    for J in (*jacrev(transport, (0, 1, 2))(v, a, b), *jacfwd(transport, (0, 1, 2))(v, a, b)):
        assert J.isfinite().all()
    # As if nothing were there.
    w = draw(8, 3, 3)
    masked, low = w.clone(), w.clone()
    masked[0, 0], low[0, 0] = -INF, -1e3
    torch.testing.assert_close(birkhoff(masked), birkhoff(low), rtol=1e-10, atol=1e-10)


def test_what_no_matrix_satisfies_is_reported() -> None:
    blocked = draw(9, 3, 3)
    blocked[:2, :2] = -INF
    with pytest.raises(ConvergenceError, match="no point satisfies") as caught:
        birkhoff(blocked)
    assert caught.value.status == Status.INFEASIBLE
    wrong = torch.stack([draw(10, 3, 3), torch.full((3, 3), NAN, dtype=F64), blocked])
    with pytest.raises(ConvergenceError) as caught:
        vmap(birkhoff)(wrong)
    assert caught.value.lanes == (1, 2) and caught.value.total == 3


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_transport_keeps_its_digits_in_float32(scale: float) -> None:
    v, a, b = (t.float() for t in drawn(11, 20, 30, scale))
    X = transport(v, a, b)
    assert X.dtype == F32
    torch.testing.assert_close(X.double(), transport(v.double(), *balanced(a, b)), rtol=1e-6, atol=1e-6)
    J = jacrev(lambda v: (transport(v, a, b) ** 2).sum())(v)
    exact = jacrev(lambda v: (transport(v, *balanced(a, b)) ** 2).sum())(v.double())
    torch.testing.assert_close(J.double(), exact, rtol=1e-4, atol=1e-5)


def balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a.double(), b.double() * (a.double().sum() / b.double().sum())


def test_an_offset_of_rows_and_columns_does_not_matter() -> None:
    v, a, b = drawn(12, 4, 5)
    offset = 1e6 * draw(13, 4, 1) + 1e6 * draw(14, 1, 5)
    torch.testing.assert_close(transport(v + offset, a, b), transport(v, a, b), rtol=1e-8, atol=1e-8)


def test_transport_in_a_projected_gradient_and_in_a_condition() -> None:
    target = draw(15, 3, 3)

    def nearest_matrix(target: Tensor) -> Tensor:
        solver = projected_gradient(lambda X, t: ((X - t) ** 2).sum(), birkhoff)
        return solver.run(torch.full((3, 3), 1 / 3, dtype=F64), target)[0]

    torch.testing.assert_close(nearest_matrix(target), birkhoff(target), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(jacrev(nearest_matrix)(target), jacrev(birkhoff)(target), rtol=1e-8, atol=1e-8)

    @custom_fixed_point(lambda X, t: birkhoff(0.25 * X + t))
    def settled(init: Tensor, t: Tensor) -> Tensor:
        for _ in range(30):
            init = birkhoff(0.25 * init + t)
        return init

    def unrolled(t: Tensor) -> Tensor:
        X = torch.zeros(3, 3, dtype=F64)
        for _ in range(30):
            X = birkhoff(0.25 * X + t)
        return X

    start = torch.zeros(3, 3, dtype=F64)
    for transform in (jacrev, jacfwd, lambda f: hessian(lambda t: f(t).sin().sum())):
        result = transform(lambda t: settled(start, t))(target)
        torch.testing.assert_close(result, transform(unrolled)(target), rtol=1e-8, atol=1e-8)
    batch = draw(16, 2, 3, 3)
    gradient = vmap(grad(lambda t: settled(start, t).sin().sum()))(batch)
    torch.testing.assert_close(gradient, vmap(grad(lambda t: unrolled(t).sin().sum()))(batch), rtol=1e-8, atol=1e-8)


def test_the_searches_run_beside_what_is_compiled() -> None:
    v, a, b = drawn(17, 3, 3)
    for f in (lambda v: transport(v, a, b), lambda v: polyhedron(v, G=torch.eye(9, dtype=F64), h=0.2)):
        torch.testing.assert_close(torch.compile(f, backend="eager")(v), f(v), rtol=1e-12, atol=1e-12)
