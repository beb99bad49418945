"""Projections and proximal operators against closed forms, SciPy and what characterises a nearest point; their
derivatives under every transform, at kinks as well."""

from __future__ import annotations

import functools
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
from torch.func import grad, jacfwd, jacrev, vmap

from implicitdiff import projections, prox

F32, F64 = torch.float32, torch.float64
INF, NAN = math.inf, math.nan
tensor = functools.partial(torch.tensor, dtype=F64)

# --- the operators as functions of one vector, of v and of all numbers, where they are smooth ------------------------


class Smooth(NamedTuple):
    """An operator near a point where it is smooth.

    Attributes:
        solution: the operator, of v and its numbers in one vector.
        reference: the formula that holds there, the active constraints being written out.
        theta: the point.
    """

    solution: Callable[[Tensor], Tensor]
    reference: Callable[[Tensor], Tensor]
    theta: Tensor


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


# Formulas, with no rule of our own, that are no different four deep.
UP_TO_THREE = {name: transform for name, transform in TRANSFORMS.items() if not name.startswith("four")}


@pytest.mark.parametrize("transform", UP_TO_THREE.values(), ids=UP_TO_THREE)
@each_smooth
def test_operator_is_right_under(row: Smooth, transform: Callable[..., Tensor]) -> None:
    # Most operators are linear there: without the sine, all that is of second order would be zero.
    result, expected = (transform(lambda t, f=f: f(t).sin(), row.theta) for f in (row.solution, row.reference))
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

EYE, ZERO = torch.eye(2, dtype=F64), torch.zeros(2, 2, dtype=F64)
ALONG = tensor([[0.36, 0.48], [0.48, 0.64]])  # u u' for u = (0.6, 0.8)
DIAGONAL = tensor([[1.0, 0.0], [0.0, 0.0]])
CENTRED = tensor([[0.5, -0.5], [-0.5, 0.5]])


def section(v: Tensor, c: Tensor) -> Tensor:
    return projections.box_section(v, 0.0, 1.0, 1.0, c)


# A function of two entries and one number, where it is taken, its value, and its derivatives by each.
KINKS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], list[float], float, Any, Any, Any]] = {
    "non_negative at zero": (lambda v, _: projections.non_negative(v), [0, 0], 0, [0, 0], ZERO, [0, 0]),
    "box on its lower side": (lambda v, c: projections.box(v, c, 2.0), [1, 1], 1, [1, 1], ZERO, [1, 1]),
    "box on its upper side": (lambda v, c: projections.box(v, 0.0, c), [1, 1], 1, [1, 1], ZERO, [1, 1]),
    "box of one point": (lambda v, c: projections.box(v, c, c), [1, 3], 1, [1, 1], ZERO, [1, 1]),
    "box without sides": (lambda v, c: projections.box(v, -INF, INF), [1, -3], 1, [1, -3], EYE, [0, 0]),
    "simplex of ties": (projections.simplex, [0, 0], 1, [0.5, 0.5], CENTRED, [0.5, 0.5]),
    "simplex of a feasible point": (projections.simplex, [0.25, 0.75], 1, [0.25, 0.75], CENTRED, [0.5, 0.5]),
    "simplex of a vertex": (projections.simplex, [0, 1], 1, [0, 1], ZERO, [0, 1]),
    "simplex of total 0": (projections.simplex, [1, 2], 0, [0, 0], ZERO, [0, 1]),
    "simplex of total 0 and ties": (projections.simplex, [2, 2], 0, [0, 0], ZERO, [0.5, 0.5]),
    "simplex with a masked entry": (projections.simplex, [2, -INF], 1, [1, 0], ZERO, [1, 0]),
    "l1_ball at zero": (projections.l1_ball, [0, 0], 1, [0, 0], EYE, [0, 0]),
    "l1_ball at zero, of radius 0": (projections.l1_ball, [0, 0], 0, [0, 0], ZERO, [0, 0]),
    "l1_ball of radius 0": (projections.l1_ball, [1, -1], 0, [0, 0], ZERO, [0.5, -0.5]),
    "l1_ball at a vertex": (projections.l1_ball, [0, -1], 1, [0, -1], ZERO, [0, -1]),
    "l1_ball on a facet": (projections.l1_ball, [0.25, 0.75], 1, [0.25, 0.75], CENTRED, [0.5, 0.5]),
    "l1_ball of radius inf": (projections.l1_ball, [0, 3], INF, [0, 3], EYE, [0, 0]),
    "l2_ball at zero": (projections.l2_ball, [0, 0], 1, [0, 0], EYE, [0, 0]),
    "l2_ball at zero, of radius 0": (projections.l2_ball, [0, 0], 0, [0, 0], ZERO, [0, 0]),
    "l2_ball of radius 0": (projections.l2_ball, [3, 4], 0, [0, 0], ZERO, [0.6, 0.8]),
    "l2_ball on its sphere": (projections.l2_ball, [3, 4], 5, [3, 4], EYE - ALONG, [0.6, 0.8]),
    "l2_ball of radius inf": (projections.l2_ball, [0, 3], INF, [0, 3], EYE, [0, 0]),
    "linf_ball on its sides": (projections.linf_ball, [1, -1], 1, [1, -1], ZERO, [1, -1]),
    "linf_ball at zero, of radius 0": (projections.linf_ball, [0, 0], 0, [0, 0], ZERO, [0, 0]),
    "linf_ball of radius inf": (projections.linf_ball, [0, 3], INF, [0, 3], EYE, [0, 0]),
    "l1_sphere at zero": (projections.l1_sphere, [0, 0], 1, [0.5, 0.5], CENTRED, [0.5, 0.5]),
    "l1_sphere of radius 0": (projections.l1_sphere, [1, -1], 0, [0, 0], ZERO, [0.5, -0.5]),
    "l1_sphere at a vertex": (projections.l1_sphere, [0, -1], 1, [0, -1], ZERO, [0, -1]),
    "l2_sphere of radius 0": (projections.l2_sphere, [3, 4], 0, [0, 0], ZERO, [0.6, 0.8]),
    "l2_sphere at zero, of radius 0": (projections.l2_sphere, [0, 0], 0, [0, 0], ZERO, [0, 0]),
    "sparse_simplex of ties": (lambda v, c: projections.sparse_simplex(v, 1, c), [1, 1], 2, [2, 0], ZERO, [1, 0]),
    "isotonic of ties": (lambda v, _: projections.isotonic(v), [1, 1], 0, [1, 1], 0.5 + ZERO, [0, 0]),
    "box_section of its least corner": (section, [1, 2], 0, [0, 0], ZERO, [0, 1]),
    "box_section of its largest corner": (section, [1, 2], 2, [1, 1], ZERO, [1, 0]),
    "box_section of a corner between": (section, [1, 3], 1, [0, 1], ZERO, [0, 1]),
    "box_section of a corner and ties": (section, [2, 2], 0, [0, 0], ZERO, [0.5, 0.5]),
    "box_section that is a box": (
        lambda v, c: projections.box_section(v, 0.0, 1.0, tensor([1.0, 0.0]), c),
        [0.3, 0.5],
        0.6,
        [0.6, 0.5],
        tensor([[0.0, 0.0], [0.0, 1.0]]),
        [1, 0],
    ),
    "box_section of a corner with an entry that is fixed": (
        lambda v, c: projections.box_section(v, 0.0, tensor([0.0, 1.0]), 1.0, c),
        [5, 1],
        0,
        [0, 0],
        ZERO,
        [0, 1],
    ),
    "box_section of one point": (
        lambda v, c: projections.box_section(v, c, c, 1.0, 2 * c),
        [1, 3],
        1,
        [1, 1],
        ZERO,
        [1, 1],
    ),
    "halfspace on its plane": (
        lambda v, b: projections.halfspace(v, tensor([3.0, 4.0]), b),
        [1, 2],
        11,
        [1, 2],
        EYE - ALONG,
        [0.12, 0.16],
    ),
    "halfspace of everything": (lambda v, b: projections.halfspace(v, 1.0, b), [1, 2], INF, [1, 2], EYE, [0, 0]),
    "lasso at zero": (prox.lasso, [0, 0], 1, [0, 0], ZERO, [0, 0]),
    "lasso with threshold 0": (prox.lasso, [0, 2], 0, [0, 2], EYE, [0, -1]),
    "lasso at the threshold": (prox.lasso, [1, -1], 1, [0, 0], EYE, [-1, 1]),
    "lasso with threshold inf": (prox.lasso, [0, 2], INF, [0, 0], ZERO, [0, 0]),
    "non_negative_lasso at the threshold": (prox.non_negative_lasso, [1, -1], 1, [0, 0], DIAGONAL, [-1, 0]),
    "non_negative_lasso at zero": (prox.non_negative_lasso, [0, -1], 0, [0, 0], DIAGONAL, [-1, 0]),
    "non_negative_lasso with threshold inf": (prox.non_negative_lasso, [0, 2], INF, [0, 0], ZERO, [0, 0]),
    "non_negative_ridge at zero": (prox.non_negative_ridge, [0, -1], 1, [0, 0], 0.5 * DIAGONAL, [0, 0]),
    "elastic_net with stepsize 0": (prox.elastic_net, [0, 2], 0, [0, 2], EYE, [0, -3]),
    "ridge with stepsize 0": (prox.ridge, [0, 2], 0, [0, 2], EYE, [0, -2]),
    "group_lasso at zero": (prox.group_lasso, [0, 0], 1, [0, 0], ZERO, [0, 0]),
    "group_lasso at zero, with threshold 0": (prox.group_lasso, [0, 0], 0, [0, 0], EYE, [0, 0]),
    "group_lasso with threshold 0": (prox.group_lasso, [3, 4], 0, [3, 4], EYE, [-0.6, -0.8]),
    "group_lasso at the threshold": (prox.group_lasso, [3, 4], 5, [0, 0], ALONG, [-0.6, -0.8]),
    "group_lasso with threshold inf": (prox.group_lasso, [3, 4], INF, [0, 0], ZERO, [0, 0]),
}

JACOBIANS = {
    "jacrev": lambda f, args: jacrev(f, (0, 1))(*args),
    "jacfwd": lambda f, args: jacfwd(f, (0, 1))(*args),
    "vmap of jacrev": lambda f, args: [J[0] for J in vmap(jacrev(f, (0, 1)))(*(x[None] for x in args))],
    "vmap of jacfwd": lambda f, args: [J[0] for J in vmap(jacfwd(f, (0, 1)))(*(x[None] for x in args))],
}


@pytest.mark.parametrize("jacobians", JACOBIANS.values(), ids=JACOBIANS)
@pytest.mark.parametrize(("f", "v", "number", "value", "by_v", "by_number"), KINKS.values(), ids=KINKS)
def test_derivatives_at_kinks(f, v, number, value, by_v, by_number, jacobians) -> None:
    args = tensor(v), tensor(number)
    torch.testing.assert_close(f(*args), tensor(value), rtol=1e-15, atol=1e-15)
    J, slope = jacobians(f, args)
    torch.testing.assert_close(J, by_v, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(slope, tensor(by_number), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("f", "v", "number"), [row[:3] for row in KINKS.values()], ids=KINKS)
def test_higher_derivatives_at_kinks_are_finite(f, v, number) -> None:
    args = tensor(v)[None], tensor(number)[None]
    for second in (jacfwd(jacfwd(f, (0, 1)), (0, 1)), jacrev(jacrev(f, (0, 1)), (0, 1)), jacfwd(jacrev(jacfwd(f)))):
        leaves = torch.utils._pytree.tree_leaves(vmap(second)(*args))
        assert all(leaf.isfinite().all() for leaf in leaves)


OPERATORS: dict[str, Callable[[Any], Any]] = {
    "box": lambda v: projections.box(v, -0.5, 0.5),
    "non_negative": projections.non_negative,
    "simplex": projections.simplex,
    "l1_ball": projections.l1_ball,
    "l2_ball": projections.l2_ball,
    "hyperplane": lambda v: projections.hyperplane(v, 1.0, 0.2),
    "halfspace": lambda v: projections.halfspace(v, 1.0, -2.0),
    "affine_set": lambda v: projections.affine_set(v, torch.eye(2, 6, dtype=F64) + 1, 0.3),
    "linf_ball": lambda v: projections.linf_ball(v, 0.5),
    "box_section": lambda v: projections.box_section(v, -0.5, 0.6, 1.0, 0.4),
    "sparse_simplex": lambda v: projections.sparse_simplex(v, 3),
    "l1_sphere": projections.l1_sphere,
    "l2_sphere": projections.l2_sphere,
    "isotonic": projections.isotonic,
    "non_negative_lasso": lambda v: prox.non_negative_lasso(v, 0.3),
    "non_negative_ridge": lambda v: prox.non_negative_ridge(v, 0.3),
    "lasso": lambda v: prox.lasso(v, 0.3),
    "ridge": lambda v: prox.ridge(v, 0.3),
    "elastic_net": lambda v: prox.elastic_net(v, 0.3),
    "group_lasso": lambda v: prox.group_lasso(v, 0.3),
}
SEPARABLE = ["box", "non_negative", "lasso", "ridge", "elastic_net"]
BY_GROUP = ["group_lasso"]

each_operator = pytest.mark.parametrize("f", OPERATORS.values(), ids=OPERATORS)


@each_operator
def test_nan_comes_out_as_nan(f: Callable[[Any], Any]) -> None:
    assert f(tensor([0.1, NAN, 0.3, -2.0, 0.5, 4.0]))[1].isnan()


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


# --- what is refused --------------------------------------------------------------------------------------------------

X = tensor([1.0, 2.0, 3.0])

ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "integers": (
        lambda: projections.simplex(torch.arange(3)),
        TypeError,
        "simplex: v has to be a floating-point tensor or a tree of them, but it is int64[3]",
    ),
    "complex": (lambda: prox.lasso(torch.ones(2) * 1j), TypeError, "lasso: v has to be a floating-point tensor"),
    "numbers": (lambda: projections.non_negative({"a": X, "b": 1.0}), TypeError, "but it is {a: float64[3], b: 1.0}"),
    "nothing": (lambda: projections.l2_ball([None]), TypeError, "but it is [None]"),
    "bounds crossed": (
        lambda: projections.box(X, 1.0, 0.0),
        ValueError,
        "box: lower has to be at most upper in every entry, but lower is 1.0 and upper is 0.0",
    ),
    "one bound crossed": (lambda: projections.box([X, X], [0.0, X], X.flip(0)), ValueError, "lower is [0.0, float64"),
    "bound of nan": (lambda: projections.box(X, tensor(NAN), 1.0), ValueError, "box: lower has to be at most upper"),
    "bound of another shape": (
        lambda: projections.box(X, torch.zeros(2), 1.0),
        ValueError,
        "box: lower has to be a number or a tensor that broadcasts to the shape [3], but it is float32[2]",
    ),
    "bound of more dimensions": (lambda: projections.box(X, 0.0, torch.ones(1, 3)), ValueError, "it is float32[1, 3]"),
    "bounds of another tree": (
        lambda: projections.box({"a": X}, {"b": X}, 9.0),
        ValueError,
        "box: lower has to be a number, a tensor or a tree of these nested like v, but it is {b: float64[3]}",
    ),
    "no bound": (lambda: projections.box(X, 0.0, None), TypeError, "upper has to be a number or a tensor"),
    "negative total": (lambda: projections.simplex(X, -1.0), ValueError, "total has to be at least 0, but it is -1.0"),
    "empty simplex": (lambda: projections.simplex(X[:0]), ValueError, "simplex: v has to have an entry"),
    "negative radius": (lambda: projections.l1_ball(X, tensor(-2.0)), ValueError, "radius has to be at least 0"),
    "radius of nan": (lambda: projections.l2_ball(X, NAN), ValueError, "radius has to be at least 0, but it is nan"),
    "many radii": (
        lambda: projections.l2_ball(X, X),
        ValueError,
        "l2_ball: radius has to be a number or a tensor that is a scalar, but it is float64[3]",
    ),
    "a lane's radius": (lambda: vmap(projections.l2_ball)(X[:, None], -X), ValueError, "at least 0, but it is -3.0"),
    "a radius in grad": (
        lambda: grad(lambda r: projections.l1_ball(X, r).sum())(tensor(-1.0)),
        ValueError,
        "l1_ball: radius has to be at least 0, but it is -1.0",
    ),
    "no normal": (lambda: projections.hyperplane(X, 0 * X, 1.0), ValueError, "hyperplane: a has to be other than zero"),
    "many right-hand sides": (lambda: projections.halfspace(X, X, X), ValueError, "halfspace: b has to be a number"),
    "wide matrix": (
        lambda: projections.affine_set(X, torch.ones(2, 4), 0.0),
        ValueError,
        "affine_set: A has to be a matrix with 3 columns, as v has entries, and no more rows, but it is float32[2, 4]",
    ),
    "tall matrix": (lambda: projections.affine_set(X, torch.ones(4, 3), 0.0), ValueError, "no more rows"),
    "dependent rows": (
        lambda: projections.affine_set(X, torch.stack([X, 2 * X]), 0.0),
        ValueError,
        "affine_set: the rows of A have to be finite and linearly independent",
    ),
    "wrong right-hand side": (
        lambda: projections.affine_set(X, torch.eye(2, 3), X),
        ValueError,
        "affine_set: b has to be of shape [2], but it is float64[3]",
    ),
    "radii of linf_ball": (
        lambda: projections.linf_ball(X, X),
        ValueError,
        "radius has to be a number or a tensor that",
    ),
    "empty sphere": (lambda: projections.l1_sphere(X[:0]), ValueError, "l1_sphere: v has to have an entry"),
    "zero on the sphere": (
        lambda: projections.l2_sphere(0 * X),
        ValueError,
        "l2_sphere: v has to be other than zero, since all points of the sphere are equally near to zero",
    ),
    "a lane of zero on the sphere": (
        lambda: vmap(projections.l2_sphere)(torch.stack([X, 0 * X])),
        ValueError,
        "l2_sphere: v has to be other than zero",
    ),
    "no entries of the sparse": (
        lambda: projections.sparse_simplex(X, 0),
        ValueError,
        "sparse_simplex: k has to be at least 1, but it is 0",
    ),
    "half an entry": (lambda: projections.sparse_simplex(X, 1.5), TypeError, "k has to be an integer, but it is 1.5"),
    "section of crossed bounds": (
        lambda: projections.box_section(X, 1.0, 0.0, 1.0, 0.0),
        ValueError,
        "box_section: lower has to be at most upper in every entry",
    ),
    "section of no plane": (
        lambda: projections.box_section(X, 0.0, 1.0, 0.0, 0.0),
        ValueError,
        "box_section: w has to be other than zero, but it is 0.0 of zeros",
    ),
    "section beside the box": (
        lambda: projections.box_section(X, 0.0, 1.0, -X, 0.1),
        ValueError,
        "box_section: c has to be w.x for some x within the bounds",
    ),
    "a lane's section beside the box": (
        lambda: vmap(lambda c: projections.box_section(X, 0.0, 1.0, X, c))(tensor([1.0, 7.0])),
        ValueError,
        "box_section: c has to be w.x for some x within the bounds",
    ),
    "empty section": (lambda: projections.box_section(X[:0], 0, 1, 1, 0), ValueError, "v has to have an entry"),
    "negative one-sided threshold": (
        lambda: prox.non_negative_lasso(X, -1),
        ValueError,
        "threshold has to be at least",
    ),
    "negative threshold": (lambda: prox.lasso(X, -0.1), ValueError, "lasso: threshold has to be at least 0"),
    "negative strength": (lambda: prox.ridge(X, strength=-X), ValueError, "ridge: strength has to be at least 0, but"),
    "negative l2": (
        lambda: prox.elastic_net(X, l2=-1),
        ValueError,
        "elastic_net: l2 has to be at least 0, but it is -1",
    ),
    "weights of a group": (lambda: prox.group_lasso(X, X), ValueError, "threshold has to be a number or a tensor that"),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_what_makes_no_operator_is_refused(call, error, message) -> None:
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


@pytest.mark.parametrize("name", ["box", "simplex", "box_section", "isotonic", "affine_set", "group_lasso"])
def test_compiled_operators_give_the_same(name: str) -> None:
    f, v = OPERATORS[name], draw(24, 6)
    compiled = torch.compile(f, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(v), f(v), rtol=1e-14, atol=1e-14)
