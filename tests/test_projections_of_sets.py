"""Projections that search, and those onto sets that are not convex: against brute force, SciPy and each other."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from checks.tensors import draw, tensor
from tables.projection_inputs import F64, INF, X
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, vmap

from implicitdiff import projections
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


# --- what is refused --------------------------------------------------------------------------------------------------

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
        "polyhedron: A must be a floating-point tensor or None, got [[1.0]]",
    ),
    "a matrix for another vector": (
        lambda: polyhedron(X, G=M.T, h=0.0),
        ValueError,
        "polyhedron: G must be a matrix with 3 columns, as v has entries, got float64[3, 2]",
    ),
    "a list for a vector": (
        lambda: polyhedron(X, M, [1.0, 1.0]),
        TypeError,
        "b must be a number or a tensor, got",
    ),
    "a vector for another matrix": (
        lambda: polyhedron(X, M, X),
        ValueError,
        "polyhedron: b must be of shape [2], got float64[3]",
    ),
    "a vector for a matrix": (
        lambda: transport(X, 1.0, 1.0),
        ValueError,
        "transport: v must be a matrix, got float64[3]",
    ),
    "a tree": (
        lambda: transport([M], 1.0, 1.0),
        ValueError,
        "transport: v must be a matrix, got [float64[2, 3]]",
    ),
    "integers": (lambda: birkhoff(torch.ones(2, 2).int()), TypeError, "birkhoff: v must be a floating-point tensor"),
    "not square": (lambda: birkhoff(M), ValueError, "birkhoff: v must be a square matrix, got float64[2, 3]"),
    "sums of another shape": (
        lambda: transport(M, X, X),
        ValueError,
        "transport: row_sums must be of shape [2], got float64[3]",
    ),
    "no sums": (lambda: transport(M, None, X), TypeError, "transport: row_sums must be a number or a tensor, got"),
    "negative sums": (lambda: transport(M, 1.0, X - 2), ValueError, "column_sums must be at least 0 and finite"),
    "sums of another total": (
        lambda: transport(M, 1.0, 1.0),
        ValueError,
        "transport: row_sums and column_sums must have equal totals",
    ),
    "a lane of another total": (
        lambda: vmap(lambda a: transport(M, a, 1.0))(tensor([1.5, 1.4])),
        ValueError,
        "transport: row_sums and column_sums must have equal totals",
    ),
    "no values": (lambda: birkhoff(torch.ones(2, 2, device="meta")), NotImplementedError, "birkhoff: the control flow"),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_what_makes_no_set_is_refused(call, error, message) -> None:
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)
