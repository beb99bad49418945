"""Projections and proximal operators against closed forms, SciPy and what characterises a nearest point; their
derivatives under every transform, at kinks as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.optimize
import torch
from checks.tensors import draw, tensor
from checks.transforms import TRANSFORMS, under_each
from tables.projection_inputs import ALONG, EYE, F32, F64, INF, OPERATORS, UP_TO_THREE, Smooth, each_operator
from torch import Tensor
from torch.func import jacfwd, jacrev, vmap

from implicitdiff import projections, prox

# --- the operators as functions of one vector, of v and of all numbers, where they are smooth ------------------------


def on_support(signs: list[float]) -> Callable[[Tensor], Tensor]:
    """Projection onto the plane of the simplex, or of a facet of the l1 ball, in which the signs are these."""
    s = tensor(signs)
    return lambda t: s.abs() * t[:4] - s * ((s * t[:4]).sum() - t[4]) / s.abs().sum()


def soft(signs: list[float]) -> Callable[[Tensor, Tensor], Tensor]:
    s = tensor(signs)
    return lambda v, threshold: s.abs() * v - s * threshold


def onto_plane(t: Tensor) -> Tensor:
    v, a, b = t[:3], t[3:6], t[6]
    return v - a * ((a * v).sum() - b) / (a * a).sum()


def onto_affine_set(t: Tensor) -> Tensor:
    v, A, b = t[:3], t[3:9].reshape(2, 3), t[9:]
    return v - A.T @ (torch.linalg.inv(A @ A.T) @ (A @ v - b))


def onto_section(t: Tensor) -> Tensor:
    """With the second entry at its upper bound, and the last at its lower."""
    v, lower, upper, w = t[:4], t[4], t[5], t[6:10]
    free, fixed = tensor([1.0, 0.0, 1.0, 0.0]), upper * tensor([0.0, 1.0, 0.0, 0.0]) + lower * tensor([0.0, 0, 0, 1])
    tau = (level_of(t) - (w * fixed).sum() - (w * free * v).sum()) / (w * w * free).sum()
    return fixed + free * (v + tau * w)


def level_of(t: Tensor) -> Tensor:
    """What ``w.x`` is at a point of the box."""
    return (t[6:10] * (t[4] + (t[5] - t[4]) * t[10].sigmoid())).sum()


def shrunk(v: Tensor, threshold: Tensor) -> Tensor:
    return v - threshold * v / (v * v).sum().sqrt()


PLANE = tensor([0.7, 1.2, -0.4, 0.5, 0.9, -1.1, 0.8])
SIGNED = [1.0, -1.0, -1.0, 0.0]

SMOOTH = {
    "box": Smooth(
        lambda t: projections.box(t[:3], t[3], t[4]),
        lambda t: torch.stack([t[3], t[1], t[4]]),
        tensor([-0.9, 0.3, 1.7, -0.5, 1.1]),
    ),
    "non_negative": Smooth(projections.non_negative, lambda t: t * tensor([1.0, 0.0, 1.0]), tensor([0.4, -0.7, 1.3])),
    "simplex": Smooth(
        lambda t: projections.simplex(t[:4], t[4]),
        on_support([1.0, 0.0, 1.0, 0.0]),
        tensor([0.9, -0.4, 0.7, 0.1, 1.0]),
    ),
    "simplex of all entries": Smooth(
        lambda t: projections.simplex(t[:4], t[4]), on_support([1.0] * 4), tensor([0.9, -0.4, 0.7, 0.1, 5.0])
    ),
    "l1_ball": Smooth(
        lambda t: projections.l1_ball(t[:4], t[4]), on_support(SIGNED), tensor([0.9, -0.4, -0.7, 0.1, 1.0])
    ),
    "l1_ball, inside": Smooth(
        lambda t: projections.l1_ball(t[:4], t[4]), lambda t: t[:4], tensor([0.9, -0.4, -0.7, 0.0, 3.0])
    ),
    "l2_ball": Smooth(
        lambda t: projections.l2_ball(t[:4], t[4]),
        lambda t: t[:4] * t[4] / (t[:4] * t[:4]).sum().sqrt(),
        tensor([0.9, -0.4, -0.7, 0.0, 1.0]),
    ),
    "l2_ball, inside": Smooth(
        lambda t: projections.l2_ball(t[:4], t[4]), lambda t: t[:4], tensor([0.9, -0.4, -0.7, 0.0, 2.0])
    ),
    "hyperplane": Smooth(lambda t: projections.hyperplane(t[:3], t[3:6], t[6]), onto_plane, PLANE),
    "halfspace": Smooth(lambda t: projections.halfspace(t[:3], t[3:6], t[6]), onto_plane, PLANE),
    "halfspace, inside": Smooth(lambda t: projections.halfspace(t[:3], -t[3:6], t[6]), lambda t: t[:3], PLANE),
    "affine_set": Smooth(
        lambda t: projections.affine_set(t[:3], t[3:9].reshape(2, 3), t[9:]),
        onto_affine_set,
        tensor([0.7, 1.2, -0.4, 0.5, 0.9, -1.1, 0.8, -0.6, 0.3, 1.4, -0.2]),
    ),
    "linf_ball": Smooth(
        lambda t: projections.linf_ball(t[:3], t[3]),
        lambda t: torch.stack([t[0], t[3], -t[3]]),
        tensor([0.7, 1.7, -1.2, 0.9]),
    ),
    "box_section": Smooth(
        lambda t: projections.box_section(t[:4], t[4], t[5], t[6:10], level_of(t)),
        onto_section,
        tensor([0.4, 1.9, 0.3, -0.8, -0.4, 0.7, 1.1, 0.3, -0.6, 0.8, -0.2]),
    ),
    "sparse_simplex": Smooth(
        lambda t: projections.sparse_simplex(t[:4], 2, t[4]),
        on_support([1.0, 0.0, 1.0, 0.0]),
        tensor([0.9, 0.4, 0.7, 0.1, 1.0]),
    ),
    "l1_sphere": Smooth(
        lambda t: projections.l1_sphere(t[:4], t[4]), on_support(SIGNED), tensor([0.9, -0.4, -0.7, 0.1, 1.0])
    ),
    "l1_sphere, inside": Smooth(
        lambda t: projections.l1_sphere(t[:4], t[4]),
        on_support([1.0, -1.0, -1.0, 1.0]),
        tensor([0.9, -0.4, -0.7, 0.1, 3.0]),
    ),
    "l2_sphere, inside": Smooth(
        lambda t: projections.l2_sphere(t[:4], t[4]),
        lambda t: t[:4] * t[4] / (t[:4] * t[:4]).sum().sqrt(),
        tensor([0.9, -0.4, -0.7, 0.0, 2.0]),
    ),
    "isotonic": Smooth(
        lambda t: projections.isotonic(t),
        lambda t: torch.stack([t[0], t[1:4].mean(), t[1:4].mean(), t[1:4].mean(), t[4]]),
        tensor([0.2, 1.0, 0.9, 0.3, 1.2]),
    ),
    "non_negative_lasso": Smooth(
        lambda t: prox.non_negative_lasso(t[:4], t[4], strength=t[5]),
        lambda t: tensor([1.0, 0.0, 0.0, 0.0]) * (t[:4] - t[4] * t[5]),
        tensor([0.9, -0.4, -0.7, 0.1, 0.4, 0.5]),
    ),
    "non_negative_ridge": Smooth(
        lambda t: prox.non_negative_ridge(t[:3], t[3], strength=t[4]),
        lambda t: tensor([1.0, 0.0, 1.0]) * t[:3] / (1 + t[3] * t[4]),
        tensor([0.9, -0.4, 0.2, 0.3, 0.6]),
    ),
    "lasso": Smooth(
        lambda t: prox.lasso(t[:4], t[4], strength=t[5]),
        lambda t: soft(SIGNED)(t[:4], t[4] * t[5]),
        tensor([0.9, -0.4, -0.7, 0.1, 0.4, 0.5]),
    ),
    "lasso with weights": Smooth(
        lambda t: prox.lasso(t[:4], t[4:]),
        lambda t: soft(SIGNED)(t[:4], t[4:]),
        tensor([0.9, -0.4, -0.7, 0.1, 0.1, 0.2, 0.3, 0.4]),
    ),
    "ridge": Smooth(
        lambda t: prox.ridge(t[:3], t[3], strength=t[4]),
        lambda t: t[:3] / (1 + t[3] * t[4]),
        tensor([0.9, -0.4, 0.0, 0.3, 0.6]),
    ),
    "elastic_net": Smooth(
        lambda t: prox.elastic_net(t[:4], t[4], l1=t[5], l2=t[6]),
        lambda t: soft(SIGNED)(t[:4], t[4] * t[5]) / (1 + t[4] * t[6]),
        tensor([0.9, -0.4, -0.7, 0.1, 0.4, 0.5, 0.3]),
    ),
    "group_lasso": Smooth(
        lambda t: prox.group_lasso(t[:3], t[3], strength=t[4]),
        lambda t: shrunk(t[:3], t[3] * t[4]),
        tensor([0.9, -0.4, 0.0, 0.5, 0.7]),
    ),
    "group_lasso of a small group": Smooth(
        lambda t: prox.group_lasso(t[:3], t[3]), lambda t: 0 * t[:3], tensor([0.1, 0.0, 0.2, 0.5])
    ),
}

each_smooth = pytest.mark.parametrize("row", SMOOTH.values(), ids=SMOOTH)


@under_each(SMOOTH, UP_TO_THREE)
def test_operator_is_right_under(row: Smooth, transform: str) -> None:
    # Most operators are linear there: without the sine, all that is of second order would be zero.
    result, expected = (
        TRANSFORMS[transform](lambda t, f=f: f(t).sin(), row.theta) for f in (row.solution, row.reference)
    )
    # Formulas of a few operations, on numbers of size 1.
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


@each_smooth
def test_derivatives_are_those_of_central_differences(row: Smooth) -> None:
    theta = row.theta.clone().requires_grad_()
    assert torch.autograd.gradcheck(row.solution, theta, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(row.solution, theta, check_fwd_over_rev=True)


@each_smooth
def test_lanes_of_vmap_are_the_calls_of_a_loop(row: Smooth) -> None:
    """Whatever constraint is active in each."""
    thetas = torch.stack([row.theta, *(row.theta * scale for scale in draw(1, 30, len(row.theta)).exp())])
    for f in (row.solution, jacfwd(row.solution), jacrev(row.solution)):
        torch.testing.assert_close(vmap(f)(thetas), torch.stack([f(t) for t in thetas]), rtol=1e-12, atol=1e-13)


def test_v_alone_or_a_number_alone_may_be_batched() -> None:
    v, totals = draw(2, 3, 4), tensor([0.5, 1.0, 2.0])
    torch.testing.assert_close(vmap(projections.simplex)(v), torch.stack([projections.simplex(x) for x in v]))
    by_total = vmap(projections.simplex, (None, 0))(v[0], totals)
    torch.testing.assert_close(by_total, torch.stack([projections.simplex(v[0], t) for t in totals]))


# --- random problems ------------------------------------------------------------------------------------------------


class Convex(NamedTuple):
    """A projection onto a fixed set, and what SciPy has to know of the set.

    Attributes:
        project: the projection.
        constraints: those of the set, for SLSQP, in the variables x = lift @ y.
        bounds: of each y.
        lift: the identity, except for sets with many facets.
    """

    project: Callable[[Tensor], Tensor]
    constraints: tuple[dict[str, Any], ...] = ()
    bounds: tuple[float, float] = (-INF, INF)
    lift: np.ndarray = np.eye(5)


def equal(f: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    return {"type": "eq", "fun": f}


def at_least_zero(f: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    return {"type": "ineq", "fun": f}


NORMAL, MATRIX, RIGHT = draw(3, 5), draw(4, 2, 5), draw(5, 2)
a_, A_, b_ = NORMAL.numpy(), MATRIX.numpy(), RIGHT.numpy()

CONVEX = {
    "box": Convex(lambda v: projections.box(v, -0.4, 0.7), bounds=(-0.4, 0.7)),
    "non_negative": Convex(projections.non_negative, bounds=(0.0, INF)),
    "simplex": Convex(lambda v: projections.simplex(v, 1.5), (equal(lambda x: x.sum() - 1.5),), bounds=(0.0, INF)),
    "l1_ball": Convex(
        lambda v: projections.l1_ball(v, 1.5),
        (at_least_zero(lambda y: 1.5 - y.sum()),),
        bounds=(0.0, INF),
        lift=np.hstack([np.eye(5), -np.eye(5)]),
    ),
    "l2_ball": Convex(lambda v: projections.l2_ball(v, 1.5), (at_least_zero(lambda x: 1.5**2 - x @ x),)),
    "hyperplane": Convex(lambda v: projections.hyperplane(v, NORMAL, 0.6), (equal(lambda x: a_ @ x - 0.6),)),
    "halfspace": Convex(lambda v: projections.halfspace(v, NORMAL, 0.6), (at_least_zero(lambda x: 0.6 - a_ @ x),)),
    "linf_ball": Convex(lambda v: projections.linf_ball(v, 0.6), bounds=(-0.6, 0.6)),
    "box_section": Convex(
        lambda v: projections.box_section(v, -0.4, 0.7, NORMAL, 0.3),
        (equal(lambda x: a_ @ x - 0.3),),
        bounds=(-0.4, 0.7),
    ),
    "isotonic": Convex(projections.isotonic, (at_least_zero(np.diff),)),
    "affine_set": Convex(lambda v: projections.affine_set(v, MATRIX, RIGHT), (equal(lambda x: A_ @ x - b_),)),
}

each_set = pytest.mark.parametrize("row", CONVEX.values(), ids=CONVEX)
# Some inside of the sets that have an inside, most outside.
POINTS = [scale * draw(seed, 5) for seed in range(4) for scale in (0.2, 1.0, 5.0)]


def nearest_by_scipy(row: Convex, v: Tensor) -> Tensor:
    start = np.full(row.lift.shape[1], 0.1)
    gap = lambda y: row.lift @ y - v.numpy()  # noqa: E731
    found = scipy.optimize.minimize(
        lambda y: gap(y) @ gap(y) / 2,
        start,
        jac=lambda y: row.lift.T @ gap(y),
        method="SLSQP",
        bounds=[row.bounds] * len(start),
        constraints=row.constraints,
        options={"ftol": 1e-15, "maxiter": 500},
    )
    return torch.from_numpy(row.lift @ found.x)


@each_set
def test_projections_are_the_nearest_points_that_scipy_finds(row: Convex) -> None:
    for v in POINTS:
        # SLSQP stops at a relative change of 1e-15 in the squared distance.
        torch.testing.assert_close(row.project(v), nearest_by_scipy(row, v), rtol=1e-5, atol=1e-6)


@each_set
def test_projections_form_an_obtuse_angle_with_the_set(row: Convex) -> None:
    inside = torch.stack([row.project(3 * draw(seed, 5)) for seed in range(100, 160)])
    for v in POINTS:
        p = row.project(v)
        assert ((inside - p) @ (v - p) <= 1e-12).all()


@each_set
def test_projecting_twice_is_projecting_once(row: Convex) -> None:
    for v in POINTS:
        p = row.project(v)
        torch.testing.assert_close(row.project(p), p, rtol=1e-14, atol=1e-14)


@each_set
def test_jacobians_of_projections_are_symmetric_and_contract(row: Convex) -> None:
    # At projected points too, which lie on a kink, to rounding.
    for v in [*POINTS, *map(row.project, POINTS)]:
        J = jacrev(row.project)(v)
        torch.testing.assert_close(J, J.T, rtol=1e-12, atol=1e-12)
        values = torch.linalg.eigvalsh(J)
        assert values.min() > -1e-12 and values.max() < 1 + 1e-12


def test_the_jacobian_on_a_facet_of_the_l1_ball_is_one_of_its_sides() -> None:
    for v in POINTS:
        p = projections.l1_ball(v)
        J, s = jacrev(projections.l1_ball)(p), p.sign()
        sides = torch.stack([torch.eye(5, dtype=F64), torch.diag(s.abs()) - torch.outer(s, s) / s.abs().sum()])
        assert (J - sides).abs().amax((1, 2)).min() < 1e-12


def times(s: float, penalty: Tensor) -> Tensor:
    """With ``0 inf = inf``, as a constraint has it."""
    return torch.where(penalty == INF, INF, s * penalty)


def outside(x: Tensor) -> Tensor:
    """Infinite where an entry is negative."""
    return torch.where((x < 0).any(-1), INF, 0.0)


PENALTIES = {
    "lasso": (functools.partial(prox.lasso, strength=0.8), lambda x: 0.8 * x.abs().sum(-1)),
    "ridge": (functools.partial(prox.ridge, strength=0.8), lambda x: 0.4 * x.square().sum(-1)),
    "elastic_net": (
        functools.partial(prox.elastic_net, l1=0.8, l2=0.5),
        lambda x: 0.8 * x.abs().sum(-1) + 0.25 * x.square().sum(-1),
    ),
    "non_negative_lasso": (
        functools.partial(prox.non_negative_lasso, strength=0.8),
        lambda x: 0.8 * x.sum(-1) + outside(x),
    ),
    "non_negative_ridge": (
        functools.partial(prox.non_negative_ridge, strength=0.8),
        lambda x: 0.4 * x.square().sum(-1) + outside(x),
    ),
    "group_lasso": (functools.partial(prox.group_lasso, strength=0.8), lambda x: 0.8 * x.norm(dim=-1)),
}


@pytest.mark.parametrize(("operator", "penalty"), PENALTIES.values(), ids=PENALTIES)
def test_proximal_operators_find_the_least_value(operator: Any, penalty: Any) -> None:
    for v in POINTS:
        for stepsize in (0.0, 0.3, 2.0):
            value = lambda x, s=stepsize, v=v: times(s, penalty(x)) + (x - v).square().sum(-1) / 2  # noqa: E731
            x = operator(v, stepsize)
            others = torch.cat([x + scale * draw(6, 50, 5) for scale in (1e-3, 0.1, 3.0)] + [torch.zeros(1, 5)])
            others = torch.cat([others, others.abs()])
            # What is minimised is 1-strongly convex.
            assert (value(others) >= value(x) + (others - x).square().sum(-1) / 2 - 1e-13).all()


def test_lasso_is_the_soft_thresholding_of_torch() -> None:
    v = draw(7, 50)
    torch.testing.assert_close(prox.lasso(v, 0.3), torch.nn.functional.softshrink(v, 0.3), rtol=0, atol=0)


def test_the_strength_and_the_last_number_multiply() -> None:
    v = draw(8, 6)
    for operator in (prox.lasso, prox.ridge, prox.group_lasso):
        torch.testing.assert_close(functools.partial(operator, strength=0.3)(v, 0.5), operator(v, 0.5 * 0.3))
    both = prox.elastic_net(v, 0.5, l1=0.3, l2=0.7)
    torch.testing.assert_close(both, prox.ridge(prox.lasso(v, 0.5 * 0.3), 0.5 * 0.7))
    torch.testing.assert_close(prox.elastic_net(v, 0.5, l1=0.3, l2=0.0), prox.lasso(v, 0.5, strength=0.3))


# --- kinks and degenerate inputs ------------------------------------------------------------------------------------

BY_GROUP = ["group_lasso"]


# --- shapes, trees and dtypes -----------------------------------------------------------------------------------------


class Pair(NamedTuple):
    w: Any
    b: Any


@each_operator
def test_a_tensor_keeps_its_shape_and_is_one_vector(f: Callable[[Any], Any]) -> None:
    v = draw(9, 6)
    for shape in [(2, 3), (3, 1, 2), (6,)]:
        result = f(v.reshape(shape))
        assert result.shape == shape
        torch.testing.assert_close(result.reshape(-1), f(v), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", OPERATORS)
def test_trees_are_one_vector_or_many(name: str) -> None:
    f, v = OPERATORS[name], draw(10, 6)
    tree = Pair(v[:4].reshape(2, 2), {"b": [v[4:5].reshape(()), None], "a": v[5:]})
    result = f(tree)
    assert isinstance(result, Pair) and result.b["b"][1] is None
    leaves = [result.w, result.b["b"][0], result.b["a"]]
    assert [leaf.shape for leaf in leaves] == [(2, 2), (), (1,)]
    parts = [v[:4], v[4:5], v[5:]]
    expected = torch.cat([f(part) for part in parts]) if name in BY_GROUP else f(v)
    torch.testing.assert_close(torch.cat([leaf.reshape(-1) for leaf in leaves]), expected)


# torch has no QR factorisation in bfloat16.
DTYPES = [(n, d) for n in OPERATORS for d in (F32, F64, torch.bfloat16) if d != torch.bfloat16 or n != "affine_set"]


@pytest.mark.parametrize(("name", "dtype"), DTYPES)
def test_the_dtype_is_that_of_v(name: str, dtype: torch.dtype) -> None:
    f, v = OPERATORS[name], draw(11, 6).to(dtype)
    result = f(v)
    assert result.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), f(v.double()), rtol=20 * eps, atol=20 * eps)


@each_operator
def test_leaves_of_different_dtypes_keep_theirs(f: Callable[[Any], Any]) -> None:
    result = f([draw(12, 3), draw(13, 3).float()])
    assert [leaf.dtype for leaf in result] == [F64, F32]


def test_numbers_may_be_trees_too() -> None:
    v = {"a": draw(14, 2, 3), "b": draw(15, 3)}
    lower, upper = {"b": tensor([-0.1, -0.2, -0.3]), "a": -0.5}, tensor([0.1, 0.2, 0.3])
    result = projections.box(v, lower, upper)
    torch.testing.assert_close(result["a"], v["a"].clamp(min=-0.5).minimum(upper))
    torch.testing.assert_close(result["b"], v["b"].clamp(lower["b"], upper))
    thresholds = {"a": 0.3, "b": lower["b"].abs()}
    assert torch.equal(prox.lasso(v, thresholds)["b"], prox.lasso(v["b"], thresholds["b"]))
    assert torch.equal(prox.group_lasso(v, {"a": tensor(0.3), "b": 0.4})["b"], prox.group_lasso(v["b"], 0.4))


def test_a_normal_is_a_tree_like_v_or_broadcasts_to_it() -> None:
    v, a = draw(16, 6), draw(17, 3)
    split = lambda x: [x[:3], {"rest": x[3:]}]  # noqa: E731
    joined = projections.hyperplane(v, torch.cat([a, a]), 0.4)
    for normal in (split(torch.cat([a, a])), a):
        first, rest = projections.hyperplane(split(v), normal, 0.4)
        torch.testing.assert_close(torch.cat([first, rest["rest"]]), joined)


def test_what_has_no_entries_is_returned() -> None:
    for f in (projections.l1_ball, projections.l2_ball, projections.non_negative, prox.lasso, prox.group_lasso):
        assert f(torch.zeros(0, 3)).shape == (0, 3)
    v = draw(18, 3)
    assert torch.equal(projections.affine_set(v, torch.zeros(0, 3), 0.0), v)


# --- rounding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e6, -1e6])
@pytest.mark.parametrize("n", [3, 1000, 100_000])
def test_the_simplex_keeps_its_digits_in_float32(n: int, offset: float) -> None:
    v = draw(19, n).float() + offset
    p = projections.simplex(v)
    exact = projections.simplex(v.double())
    assert (p >= 0).all()
    torch.testing.assert_close(p.double(), exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(p.double().sum(), tensor(1.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_that_leave_the_range_do_no_harm(scale: float) -> None:
    v, a = scale * torch.tensor([3.0, 4.0]), scale * torch.tensor([0.6, 0.8])
    torch.testing.assert_close(projections.l2_ball(v, scale) / scale, torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(prox.group_lasso(v, scale) / scale, torch.tensor([2.4, 3.2]))
    torch.testing.assert_close(projections.hyperplane(v / scale, a, 0.0), torch.zeros(2), rtol=0, atol=1e-6)
    J = jacrev(projections.l2_ball)(v, scale)
    torch.testing.assert_close(J, (EYE - ALONG).float() / 5)


def test_the_affine_set_does_not_square_the_condition_of_its_matrix() -> None:
    U, V = torch.linalg.qr(draw(20, 4, 4))[0], torch.linalg.qr(draw(21, 9, 4))[0]
    A, v = U @ torch.diag(torch.logspace(0, -7, 4, dtype=F64)) @ V.T, draw(22, 9)
    x = projections.affine_set(v, A, A @ draw(23, 9))
    torch.testing.assert_close(x - V @ (V.T @ x), v - V @ (V.T @ v), rtol=0, atol=1e-8)
    torch.testing.assert_close(A @ x, A @ draw(23, 9), rtol=0, atol=1e-14)


@pytest.mark.parametrize("number", [np.float32, np.float64, np.int64, bool])
def test_offsets_may_be_numbers_of_any_kind(number) -> None:
    ones, v, one = torch.ones(1, 3, dtype=F64), draw(24, 3), number(1)
    onto_plane = v + (1 - v.sum()) / 3
    torch.testing.assert_close(projections.affine_set(v, ones, one), onto_plane)
    torch.testing.assert_close(projections.hyperplane(v, 1.0, one), onto_plane)
    torch.testing.assert_close(projections.polyhedron(v, ones, one), onto_plane)
    torch.testing.assert_close(projections.transport(v[None], one, onto_plane.softmax(0)).sum(), tensor(1.0))
