"""Projections and proximal operators at kinks, of degenerate inputs, and of arguments that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks.tensors import draw, tensor
from tables.projection_inputs import ALONG, EYE, INF, NAN, OPERATORS, ZERO, X, each_operator
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, vmap

from implicitdiff import projections, prox

# --- kinks and degenerate inputs ------------------------------------------------------------------------------------

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


@each_operator
def test_nan_comes_out_as_nan(f: Callable[[Any], Any]) -> None:
    assert f(tensor([0.1, NAN, 0.3, -2.0, 0.5, 4.0]))[1].isnan()


# --- what is refused --------------------------------------------------------------------------------------------------


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "integers": (
        lambda: projections.simplex(torch.arange(3)),
        TypeError,
        "simplex: v must be a floating-point tensor or a tree of them, got int64[3]",
    ),
    "complex": (lambda: prox.lasso(torch.ones(2) * 1j), TypeError, "lasso: v must be a floating-point tensor"),
    "numbers": (lambda: projections.non_negative({"a": X, "b": 1.0}), TypeError, "got {a: float64[3], b: 1.0}"),
    "nothing": (lambda: projections.l2_ball([None]), TypeError, "got [None]"),
    "bounds crossed": (
        lambda: projections.box(X, 1.0, 0.0),
        ValueError,
        "box: lower must be at most upper in every entry, got lower 1.0 and upper 0.0",
    ),
    "one bound crossed": (lambda: projections.box([X, X], [0.0, X], X.flip(0)), ValueError, "got lower [0.0, float64"),
    "bound of nan": (lambda: projections.box(X, tensor(NAN), 1.0), ValueError, "box: lower must be at most upper"),
    "bound of another shape": (
        lambda: projections.box(X, torch.zeros(2), 1.0),
        ValueError,
        "box: lower must be a number or a tensor that broadcasts to the shape [3], got float32[2]",
    ),
    "bound of more dimensions": (lambda: projections.box(X, 0.0, torch.ones(1, 3)), ValueError, "got float32[1, 3]"),
    "bounds of another tree": (
        lambda: projections.box({"a": X}, {"b": X}, 9.0),
        ValueError,
        "box: lower must be a number, a tensor or a tree of these nested like v, got {b: float64[3]}",
    ),
    "no bound": (lambda: projections.box(X, 0.0, None), TypeError, "upper must be a number or a tensor"),
    "negative total": (lambda: projections.simplex(X, -1.0), ValueError, "total must be at least 0, got -1.0"),
    "empty simplex": (lambda: projections.simplex(X[:0]), ValueError, "simplex: v must have an entry"),
    "negative radius": (lambda: projections.l1_ball(X, tensor(-2.0)), ValueError, "radius must be at least 0"),
    "radius of nan": (lambda: projections.l2_ball(X, NAN), ValueError, "radius must be at least 0, got nan"),
    "many radii": (
        lambda: projections.l2_ball(X, X),
        ValueError,
        "l2_ball: radius must be a number or a tensor that is a scalar, got float64[3]",
    ),
    "a lane's radius": (lambda: vmap(projections.l2_ball)(X[:, None], -X), ValueError, "at least 0, got -3.0"),
    "a radius in grad": (
        lambda: grad(lambda r: projections.l1_ball(X, r).sum())(tensor(-1.0)),
        ValueError,
        "l1_ball: radius must be at least 0, got -1.0",
    ),
    "no normal": (lambda: projections.hyperplane(X, 0 * X, 1.0), ValueError, "hyperplane: a must be other than zero"),
    "many right-hand sides": (lambda: projections.halfspace(X, X, X), ValueError, "halfspace: b must be a number"),
    "wide matrix": (
        lambda: projections.affine_set(X, torch.ones(2, 4), 0.0),
        ValueError,
        "affine_set: A must be a matrix with 3 columns, as v has entries, and no more rows, got float32[2, 4]",
    ),
    "tall matrix": (lambda: projections.affine_set(X, torch.ones(4, 3), 0.0), ValueError, "no more rows"),
    "dependent rows": (
        lambda: projections.affine_set(X, torch.stack([X, 2 * X]), 0.0),
        ValueError,
        "affine_set: the rows of A must be finite and linearly independent",
    ),
    "wrong right-hand side": (
        lambda: projections.affine_set(X, torch.eye(2, 3), X),
        ValueError,
        "affine_set: b must be of shape [2], got float64[3]",
    ),
    "radii of linf_ball": (
        lambda: projections.linf_ball(X, X),
        ValueError,
        "radius must be a number or a tensor that",
    ),
    "empty sphere": (lambda: projections.l1_sphere(X[:0]), ValueError, "l1_sphere: v must have an entry"),
    "zero on the sphere": (
        lambda: projections.l2_sphere(0 * X),
        ValueError,
        "l2_sphere: v must be other than zero, because zero has the same distance to all points of the sphere",
    ),
    "a lane of zero on the sphere": (
        lambda: vmap(projections.l2_sphere)(torch.stack([X, 0 * X])),
        ValueError,
        "l2_sphere: v must be other than zero",
    ),
    "no entries of the sparse": (
        lambda: projections.sparse_simplex(X, 0),
        ValueError,
        "sparse_simplex: k must be at least 1, got 0",
    ),
    "half an entry": (lambda: projections.sparse_simplex(X, 1.5), TypeError, "k must be an integer, got 1.5"),
    "section of crossed bounds": (
        lambda: projections.box_section(X, 1.0, 0.0, 1.0, 0.0),
        ValueError,
        "box_section: lower must be at most upper in every entry",
    ),
    "section of no plane": (
        lambda: projections.box_section(X, 0.0, 1.0, 0.0, 0.0),
        ValueError,
        "box_section: w must be other than zero, got 0.0 of zeros",
    ),
    "section beside the box": (
        lambda: projections.box_section(X, 0.0, 1.0, -X, 0.1),
        ValueError,
        "box_section: c must be w.x for some x within the bounds",
    ),
    "a lane's section beside the box": (
        lambda: vmap(lambda c: projections.box_section(X, 0.0, 1.0, X, c))(tensor([1.0, 7.0])),
        ValueError,
        "box_section: c must be w.x for some x within the bounds",
    ),
    "empty section": (lambda: projections.box_section(X[:0], 0, 1, 1, 0), ValueError, "v must have an entry"),
    "negative one-sided threshold": (
        lambda: prox.non_negative_lasso(X, -1),
        ValueError,
        "threshold must be at least",
    ),
    "negative threshold": (lambda: prox.lasso(X, -0.1), ValueError, "lasso: threshold must be at least 0"),
    "negative strength": (lambda: prox.ridge(X, strength=-X), ValueError, "ridge: strength must be at least 0, got"),
    "negative l2": (
        lambda: prox.elastic_net(X, l2=-1),
        ValueError,
        "elastic_net: l2 must be at least 0, got -1",
    ),
    "weights of a group": (lambda: prox.group_lasso(X, X), ValueError, "threshold must be a number or a tensor that"),
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
