"""Projections that search, and those onto sets that are not convex: against brute force, SciPy and each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.optimize
import torch
from solvers import draw
from test_transforms import TRANSFORMS
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from implicitdiff import ConvergenceError, custom_fixed_point, projections
from implicitdiff.linear_solve import solve_lstsq
from implicitdiff.projections import (
    birkhoff,
    box_section,
    isotonic,
    l1_sphere,
    l2_sphere,
    polyhedron,
    sparse_simplex,
    transport,
)
from implicitdiff.solvers import Status, projected_gradient

F32, F64 = torch.float32, torch.float64
INF, NAN = math.inf, math.nan


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=F64)


# --- sets that are not convex, and what is nearest by enumeration -----------------------------------------------------


def nearest(v: Tensor, candidates: list[Tensor]) -> Tensor:
    return min(candidates, key=lambda x: float((x - v).square().sum()))


@pytest.mark.parametrize("k", [1, 2, 3, 5, 9])
def test_the_sparse_simplex_is_the_best_of_all_supports(k: int) -> None:
    for seed in range(10):
        v = draw(seed, 5)
        candidates = []
        for support in itertools.combinations(range(5), min(k, 5)):
            x = torch.zeros(5, dtype=F64)
            x[list(support)] = projections.simplex(v[list(support)], 1.5)
            candidates.append(x)
        torch.testing.assert_close(sparse_simplex(v, k, 1.5), nearest(v, candidates), rtol=1e-14, atol=1e-14)


def test_the_sparse_simplex_takes_the_first_of_equal_entries() -> None:
    v = tensor([0.3, 0.7, 0.7, 0.7])
    torch.testing.assert_close(sparse_simplex(v, 2), tensor([0.0, 0.5, 0.5, 0.0]))
    J = jacrev(lambda v: sparse_simplex(v, 2))(v)
    assert (J[3] == 0).all() and (J[:, 3] == 0).all()


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_the_l1_sphere_is_the_best_of_all_its_facets(scale: float) -> None:
    for seed in range(10):
        v = scale * draw(seed, 4)
        signs = [tensor(s) for s in itertools.product([-1.0, 1.0], repeat=4)]
        expected = nearest(v, [s * projections.simplex(s * v, 1.3) for s in signs])
        x = l1_sphere(v, 1.3)
        torch.testing.assert_close(x, expected, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(x.abs().sum(), tensor(1.3))


def test_an_entry_of_zero_is_moved_to_the_l1_sphere_too() -> None:
    x = l1_sphere(tensor([0.2, 0.0, -0.0, -0.3]), 2.0)
    torch.testing.assert_close(x, tensor([0.575, 0.375, 0.375, -0.675]))


def test_the_l2_sphere_keeps_the_direction() -> None:
    for scale in (1e-200, 1.0, 1e200):
        v = scale * draw(1, 4)
        x = l2_sphere(v, 3.0)
        torch.testing.assert_close(x.norm(), tensor(3.0))
        torch.testing.assert_close(x / 3, (v / scale) / (v / scale).norm())


def test_the_l2_sphere_of_zero_is_nan_where_nothing_is_checked() -> None:
    compiled = torch.compile(l2_sphere, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(3)).isnan().all()


# --- sections of boxes ------------------------------------------------------------------------------------------------


def section_by_root(v: Tensor, lower: Tensor, upper: Tensor, w: Tensor, c: float) -> Tensor:
    v, lower, upper, w = (t.numpy() for t in (v, lower, upper, w))

    def x(tau: float) -> Any:
        return np.clip(v + tau * w, lower, upper)

    tau = scipy.optimize.brentq(lambda tau: w @ x(tau) - c, -1e4, 1e4, xtol=1e-15, rtol=1e-15)
    return torch.from_numpy(x(tau))


@pytest.mark.parametrize("seed", range(40))
def test_a_section_is_where_a_scalar_root_finder_puts_it(seed: int) -> None:
    n = 1 + seed % 7
    v, w, inner = 3 * draw(seed, n), draw(seed + 100, n), draw(seed + 200, n).sigmoid()
    lower, upper = -draw(seed + 300, n).abs(), draw(seed + 400, n).abs()
    w[1::3] = 0.0
    c = (w * (lower + (upper - lower) * inner)).sum()
    if seed % 2:
        lower[::2], upper[1::2] = -INF, INF
    x = box_section(v, lower, upper, w, c)
    torch.testing.assert_close(x, section_by_root(v, lower, upper, w, float(c)), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(w @ x, c, rtol=1e-14, atol=1e-14)
    assert (x >= lower).all() and (x <= upper).all()


def test_sections_are_simplices_planes_and_knapsacks() -> None:
    v, a = draw(1, 6), draw(2, 6)
    torch.testing.assert_close(box_section(v, 0.0, INF, 1.0, 1.5), projections.simplex(v, 1.5))
    torch.testing.assert_close(box_section(v, -INF, INF, a, 0.4), projections.hyperplane(v, a, 0.4))


@pytest.mark.parametrize("offset", [0.0, 1e6, -1e8])
def test_a_section_keeps_its_digits_in_float32(offset: float) -> None:
    v = draw(3, 1000).float() + offset
    x = box_section(v, 0.0, 0.01, 1.0, 1.0)
    exact = box_section(v.double(), 0.0, 0.01, 1.0, 1.0)
    torch.testing.assert_close(x.double(), exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(x.double().sum(), tensor(1.0), rtol=0, atol=1e-5)
    assert (x >= 0).all() and (x <= torch.tensor(0.01)).all()


def test_an_entry_that_rounding_puts_outside_is_not() -> None:
    lower, upper = torch.tensor(-0.3), torch.tensor(0.5)
    v, w = (0.1 * torch.tensor(t) for t in ([-6.0, -7.0, 7.0, 8.0, 7.0, 7.0], [2.0, 7.0, 4.0, 6.0, 8.0, 4.0]))
    for c in 0.83 + 1e-7 * torch.arange(-20, 20):
        x = box_section(v, lower, upper, w, c)
        assert (x >= lower).all() and (x <= upper).all()


def test_the_derivative_in_a_normal_entry_of_zero() -> None:
    v, w = tensor([0.4, 0.2, -0.3, 2.0]), tensor([1.0, 0.0, -0.5, 0.0])

    def of_normal(w: Tensor) -> Tensor:
        return box_section(v, -1.0, 1.0, w, 0.9)

    h = 1e-6 * torch.eye(4, dtype=F64)
    expected = torch.stack([(of_normal(w + e) - of_normal(w - e)) / 2e-6 for e in h], dim=1)
    assert expected[1, 1].abs() > 0.1
    for jacobian in (jacrev, jacfwd):
        torch.testing.assert_close(jacobian(of_normal)(w), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_a_section_does_not_square_its_normal(scale: float) -> None:
    v, w = draw(4, 5).float(), draw(5, 5).float()
    x = box_section(v, -1.0, 1.0, scale * w, scale * 0.1)
    torch.testing.assert_close(x, box_section(v, -1.0, 1.0, w, 0.1), rtol=1e-5, atol=1e-6)


def test_a_section_that_rounding_puts_beside_the_box_is_its_corner() -> None:
    for seed in range(20):
        upper, w = draw(seed, 50).abs(), 0.5 + draw(seed + 50, 50).abs()
        c = sum((w * upper).flip(0).tolist())
        v = draw(seed + 100, 50)
        # Half an ulp for each of the sums, over the least entry of w.
        torch.testing.assert_close(box_section(v, 0.0, upper, w, c), upper, rtol=0, atol=1e-12)
        assert jacfwd(lambda c, v=v, u=upper, w=w: box_section(v, 0.0, u, w, c))(tensor(c)).isfinite().all()


def test_the_numbers_of_a_section_are_batched_alone() -> None:
    v, c, w = draw(6, 4), tensor([0.1, 0.5, 1.2]), draw(7, 3, 4).abs()
    by_c = vmap(lambda c: box_section(v, 0.0, 1.0, 1.0, c))(c)
    torch.testing.assert_close(by_c, torch.stack([box_section(v, 0.0, 1.0, 1.0, t) for t in c]))
    by_w = vmap(lambda w: box_section(v, -1.0, 1.0, w, 0.1))(w)
    torch.testing.assert_close(by_w, torch.stack([box_section(v, -1.0, 1.0, t, 0.1) for t in w]))


# --- isotonic ---------------------------------------------------------------------------------------------------------


def by_min_and_max(v: Tensor) -> Tensor:
    """The largest, over blocks that begin up to here, of the least mean of those that end from here on."""
    n, y = len(v), v.numpy()
    means = np.array([[y[j : k + 1].mean() if k >= j else np.nan for k in range(n)] for j in range(n)])
    return torch.tensor([max(means[j, i:].min() for j in range(i + 1)) for i in range(n)], dtype=F64)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13, 40])
@pytest.mark.parametrize("trend", [-1.0, 0.0, 0.3])
def test_isotonic_is_the_formula_of_minima_and_maxima(n: int, trend: float) -> None:
    for seed in range(4):
        v = draw(seed, n) + trend * torch.arange(n)
        for x in (v, v.round()):
            torch.testing.assert_close(isotonic(x), by_min_and_max(x), rtol=1e-13, atol=1e-13)


def test_isotonic_of_one_low_entry_after_many_that_rise_pools_them_one_by_one() -> None:
    v = torch.cat([torch.arange(300.0, dtype=F64), tensor([-2000.0])])
    x = isotonic(v)
    torch.testing.assert_close(x, by_min_and_max(v), rtol=1e-13, atol=1e-13)
    first = int((x == x[-1]).int().argmax())
    assert 0 < first < 300 and torch.equal(x[:first], v[:first])


def test_what_comes_out_equal_is_one_block() -> None:
    J = jacrev(isotonic)(tensor([3.0, 1.0, 2.0, 2.0, 5.0]))
    expected = torch.zeros(5, 5, dtype=F64)
    expected[:4, :4], expected[4, 4] = 0.25, 1.0
    torch.testing.assert_close(J, expected)
    torch.testing.assert_close(jacfwd(isotonic)(torch.full((7,), 0.1, dtype=F64)), torch.full((7, 7), 1 / 7, dtype=F64))


def test_small_differences_beside_large_entries_are_not_pooled() -> None:
    v = tensor([1e-20, 2e-20, 3e-20, 1e6, 1e6 + 1])
    assert torch.equal(isotonic(v), v)
    torch.testing.assert_close(jacrev(isotonic)(v), torch.eye(5, dtype=F64))


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_isotonic_keeps_its_digits_in_float32(offset: float) -> None:
    v = draw(8, 20_000).float() + offset
    x = isotonic(v)
    assert (x.diff() >= 0).all()
    # A unit of the last place: levels are rounded while they are pooled, and means at the end.
    atol = 1.01 * (torch.nextafter(torch.tensor(offset), torch.tensor(INF)) - offset).item() if offset else 1e-6
    torch.testing.assert_close(x.double(), isotonic(v.double()), rtol=0, atol=atol)


def test_means_that_rounding_puts_out_of_order_are_not() -> None:
    v = 0.1 * torch.tensor([4.0, 6.0, 3.0, 3.0, 0.0, 5.0, 2.0, 4.0, 3.0, 2.0, 5.0, 3.0])
    assert (isotonic(v).diff() >= 0).all()


def test_many_entries_in_bfloat16_are_counted_in_float32() -> None:
    v = (draw(9, 2000) - torch.linspace(0, 1, 2000)).to(torch.bfloat16)
    x = isotonic(v)
    assert x.dtype == torch.bfloat16
    torch.testing.assert_close(x.double(), isotonic(v.double()), rtol=0.004, atol=1e-3)
    # One in the size of the block, which is not a number of the dtype.
    slopes = grad(lambda v: isotonic(v)[1000].float())(v).double()
    assert slopes.count_nonzero() > 1000
    torch.testing.assert_close(slopes.sum(), tensor(1.0), rtol=0.004, atol=0)


# --- the table of those that search, near a point where they are smooth -----------------------------------------------


class Smooth(NamedTuple):
    """A projection of all its numbers in one vector, and the formula that holds near a point."""

    solution: Callable[[Tensor], Tensor]
    reference: Callable[[Tensor], Tensor]
    theta: Tensor


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
UP_TO_THREE = {name: transform for name, transform in TRANSFORMS.items() if not name.startswith("four")}


@pytest.mark.parametrize("transform", UP_TO_THREE.values(), ids=UP_TO_THREE)
@each_smooth
def test_projection_is_right_under(row: Smooth, transform: Callable[..., Tensor]) -> None:
    # They are linear in v there: without the sine, much of what is of second order would be zero.
    result, expected = (transform(lambda t, f=f: f(t).sin(), row.theta) for f in (row.solution, row.reference))
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


# --- what is refused --------------------------------------------------------------------------------------------------

X = tensor([1.0, 2.0, 3.0])
M = torch.ones(2, 3, dtype=F64)

ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no right-hand side": (
        lambda: polyhedron(X, M),
        ValueError,
        "polyhedron: A and b go together: give both, or None for both",
    ),
    "no matrix": (lambda: polyhedron(X, h=1.0), ValueError, "polyhedron: G and h go together"),
    "numbers for a matrix": (
        lambda: polyhedron(X, [[1.0]], 0.0),
        TypeError,
        "polyhedron: A has to be a floating-point tensor or None, but it is [[1.0]]",
    ),
    "a matrix for another vector": (
        lambda: polyhedron(X, G=M.T, h=0.0),
        ValueError,
        "polyhedron: G has to be a matrix with 3 columns, as v has entries, but it is float64[3, 2]",
    ),
    "a list for a vector": (
        lambda: polyhedron(X, M, [1.0, 1.0]),
        TypeError,
        "b has to be a number or a tensor, but it",
    ),
    "a vector for another matrix": (
        lambda: polyhedron(X, M, X),
        ValueError,
        "polyhedron: b has to be of shape [2], but it is float64[3]",
    ),
    "a vector for a matrix": (
        lambda: transport(X, 1.0, 1.0),
        ValueError,
        "transport: v has to be a matrix, but it is float64[3]",
    ),
    "a tree": (
        lambda: transport([M], 1.0, 1.0),
        ValueError,
        "transport: v has to be a matrix, but it is [float64[2, 3]]",
    ),
    "integers": (lambda: birkhoff(torch.ones(2, 2).int()), TypeError, "birkhoff: v has to be a floating-point tensor"),
    "not square": (lambda: birkhoff(M), ValueError, "birkhoff: v has to be a square matrix, but it is float64[2, 3]"),
    "sums of another shape": (
        lambda: transport(M, X, X),
        ValueError,
        "transport: row_sums has to be of shape [2], but it is float64[3]",
    ),
    "no sums": (lambda: transport(M, None, X), TypeError, "transport: row_sums has to be a number or a tensor, but it"),
    "negative sums": (lambda: transport(M, 1.0, X - 2), ValueError, "column_sums has to be at least 0 and finite"),
    "sums of another total": (
        lambda: transport(M, 1.0, 1.0),
        ValueError,
        "transport: row_sums and column_sums have to have equal totals",
    ),
    "a lane of another total": (
        lambda: vmap(lambda a: transport(M, a, 1.0))(tensor([1.5, 1.4])),
        ValueError,
        "transport: row_sums and column_sums have to have equal totals",
    ),
    "no values": (lambda: birkhoff(torch.ones(2, 2, device="meta")), NotImplementedError, "birkhoff: what it does"),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_what_makes_no_set_is_refused(call, error, message) -> None:
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)
