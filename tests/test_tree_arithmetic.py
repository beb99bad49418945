"""Arithmetic of trees, beside that of the vectors which their entries make."""

from __future__ import annotations

import collections
from typing import NamedTuple

import pytest
import torch
from torch.func import grad, hessian, jvp, vmap
from torch.utils._pytree import tree_leaves, tree_map_only

from implicitdiff.pytree import (
    tree_add,
    tree_add_scalar_mul,
    tree_div,
    tree_l2_norm,
    tree_map,
    tree_mul,
    tree_neg,
    tree_scalar_mul,
    tree_sub,
    tree_vdot,
    tree_zeros_like,
)

F64, C128 = torch.float64, torch.complex128


class Pair(NamedTuple):
    left: object
    right: object


def tree(seed, dtype=F64, batch=()):
    generator = torch.Generator().manual_seed(seed)
    a, b, c, d = (
        torch.randn((*batch, *shape), dtype=dtype, generator=generator) for shape in [(2, 3), (), (4,), (0, 2)]
    )
    return Pair({"w": a, "b": [b, None, "text"]}, collections.OrderedDict(c=c, empty=(d, 3)))


def flat(x):
    return torch.cat([leaf.reshape(-1) for leaf in tree_leaves(x) if isinstance(leaf, torch.Tensor)])


def assert_is(result, vector, like):
    assert type(result) is type(like)
    assert result.left["b"][1:] == [None, "text"] and result.right["empty"][1] == 3
    assert [t.shape for t in tree_leaves(result) if isinstance(t, torch.Tensor)] == [
        t.shape for t in tree_leaves(like) if isinstance(t, torch.Tensor)
    ]
    # The arithmetic of vectors may round complex products otherwise than that of single numbers.
    torch.testing.assert_close(flat(result), vector, rtol=1e-15 if vector.is_complex() else 0, atol=0)


@pytest.mark.parametrize("dtype", [F64, C128])
def test_each_operation_is_that_of_the_flat_vectors(dtype):
    x, y = tree(0, dtype), tree(1, dtype)
    v, w = flat(x), flat(y)
    assert_is(tree_add(x, y), v + w, x)
    assert_is(tree_sub(x, y), v - w, x)
    assert_is(tree_mul(x, y), v * w, x)
    assert_is(tree_div(x, y), v / w, x)
    assert_is(tree_neg(x), -v, x)
    assert_is(tree_zeros_like(x), torch.zeros_like(v), x)
    assert_is(tree_scalar_mul(-2.5, x), -2.5 * v, x)
    assert_is(tree_add_scalar_mul(x, 0.3, y), v + 0.3 * w, x)
    assert_is(tree_map(torch.sin, x), v.sin(), x)
    assert_is(tree_map(lambda a, b, c: a * b - c, x, y, x), v * w - v, x)


@pytest.mark.parametrize("dtype", [F64, C128])
def test_the_inner_product_and_the_norm_are_those_of_the_flat_vectors(dtype):
    x, y = tree(0, dtype), tree(1, dtype)
    torch.testing.assert_close(tree_vdot(x, y), torch.vdot(flat(x), flat(y)), rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(tree_l2_norm(x), flat(x).norm(), rtol=1e-15, atol=0)
    assert tree_vdot(x, y).shape == tree_l2_norm(x).shape == ()
    assert not tree_l2_norm(x).is_complex()


def test_the_inner_product_is_conjugate_linear_in_the_first_tree():
    x, y = tree(0, C128), tree(1, C128)
    expected = (0.5 - 2j) * tree_vdot(x, y)
    torch.testing.assert_close(tree_vdot(tree_scalar_mul(0.5 + 2j, x), y), expected, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(tree_vdot(x, tree_scalar_mul(0.5 - 2j, y)), expected, rtol=1e-15, atol=1e-15)


def test_a_scalar_may_be_a_tensor_and_complex():
    x, y, s = tree(0), tree(1), torch.tensor(0.7, dtype=F64)
    assert torch.equal(flat(tree_scalar_mul(s, x)), s * flat(x))
    assert torch.equal(flat(tree_add_scalar_mul(x, s, y)), flat(x) + s * flat(y))
    assert torch.equal(flat(tree_scalar_mul(2j, x)), 2j * flat(x))


def test_one_tensor_is_a_tree():
    a, b = torch.randn(3, dtype=F64), torch.randn(3, dtype=F64)
    assert torch.equal(tree_sub(a, b), a - b)
    assert torch.equal(tree_vdot(a, b), (a * b).sum())


def test_dictionaries_are_matched_by_key():
    a, b = torch.tensor([1.0]), torch.tensor([10.0, 20.0])
    assert torch.equal(tree_sub({"a": a, "b": b}, {"b": b, "a": 3 * a})["a"], -2 * a)


def test_nothing_is_overwritten_or_shared():
    x = tree(0)
    before = flat(x).clone()
    zeros = tree_zeros_like(x)
    for leaf in tree_leaves(zeros):
        if isinstance(leaf, torch.Tensor):
            leaf.add_(1)
    tree_add(x, x)
    assert torch.equal(flat(x), before)


# --- under the transforms of torch.func -------------------------------------------------------------------------------


def test_vmap_goes_lane_by_lane():
    x, y = tree(0, batch=(5,)), tree(1, batch=(5,))
    tensors = Pair(x.left["w"], [x.left["b"][0], x.right["c"]]), Pair(y.left["w"], [y.left["b"][0], y.right["c"]])

    def several(x, y):
        return tree_vdot(x, y), tree_l2_norm(x), tree_add_scalar_mul(x, tree_l2_norm(y), tree_div(y, x))

    batched = vmap(several)(*tensors)
    for lane in range(5):
        alone = several(*tree_map_only(torch.Tensor, lambda t, lane=lane: t[lane], tensors))
        for whole, part in zip(tree_leaves(batched), tree_leaves(alone), strict=True):
            torch.testing.assert_close(whole[lane], part, rtol=1e-14, atol=1e-14)


def test_derivatives_are_those_of_the_flat_vectors():
    x, y = tree(0), tree(1)
    x, y, t = ([z.left["w"], {"c": z.right["c"]}] for z in (x, y, tree(2)))
    v, w = flat(x), flat(y)
    assert torch.equal(flat(grad(tree_vdot)(x, y)), w)
    torch.testing.assert_close(flat(grad(tree_l2_norm)(x)), v / v.norm(), rtol=1e-15, atol=1e-15)
    value, tangent = jvp(tree_l2_norm, (x,), (t,))
    torch.testing.assert_close(tangent, v @ flat(t) / v.norm(), rtol=1e-14, atol=0)
    assert torch.equal(value, tree_l2_norm(x))
    quotient = grad(lambda y: tree_vdot(tree_div(x, y), t))(y)
    torch.testing.assert_close(flat(quotient), -v * flat(t) / w**2, rtol=1e-14, atol=0)
    second = hessian(lambda s: tree_l2_norm(tree_add_scalar_mul(x, s, y)))(torch.tensor(0.0, dtype=F64))
    n = v.norm()
    torch.testing.assert_close(second, w @ w / n - (v @ w) ** 2 / n**3, rtol=1e-14, atol=0)


def test_the_derivative_of_the_norm_at_zero_is_zero():
    zero = {"a": torch.zeros(3, dtype=F64), "b": torch.zeros((), dtype=F64)}
    one = tree_map(torch.ones_like, zero)
    assert torch.equal(flat(grad(tree_l2_norm)(zero)), torch.zeros(4, dtype=F64))
    assert jvp(tree_l2_norm, (zero,), (one,))[1] == 0
    # A leaf of zeros beside another one.
    half = {"a": torch.zeros(3, dtype=F64), "b": torch.tensor(-2.0, dtype=F64)}
    assert torch.equal(flat(grad(tree_l2_norm)(half)), torch.tensor([0.0, 0.0, 0.0, -1.0], dtype=F64))
    assert jvp(tree_l2_norm, (half,), (one,))[1] == -1


# --- what does not fit is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", [tree_add, tree_sub, tree_mul, tree_div, tree_vdot])
@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.ones(2)},
        {"a": torch.ones(2), "c": torch.ones(1)},
        {"a": torch.ones(2), "b": None},
        {"a": torch.ones(2), "b": [torch.ones(1)]},
        [torch.ones(2), torch.ones(1)],
        torch.ones(2),
        None,
    ],
)
def test_trees_that_are_nested_differently_are_refused(operation, other):
    x = {"a": torch.ones(2), "b": torch.ones(1)}
    with pytest.raises(ValueError, match="nested alike"):
        operation(x, other)
    with pytest.raises(ValueError, match="nested alike"):
        operation(other, x)


def test_leaves_of_different_shapes_have_no_inner_product():
    with pytest.raises(ValueError, match=r"got \[3\] and \[3, 1\]"):
        tree_vdot([torch.ones(3)], [torch.ones(3, 1)])


def test_a_tree_without_tensors_has_no_inner_product_and_no_norm():
    for empty in ([], None, {"a": 1}):
        with pytest.raises(ValueError, match="tree_vdot: x must be a tree with tensors"):
            tree_vdot(empty, empty)
        with pytest.raises(ValueError, match="tree_l2_norm: x must be a tree with tensors"):
            tree_l2_norm(empty)
        assert tree_add(empty, empty) == empty


@pytest.mark.parametrize("others", [[3.0], [[3.0]]])
def test_nestings_without_a_tensor_are_told_apart(others):
    """They are cached under a key, which an empty list and a list of other leaves must not share."""
    x = torch.ones(2, dtype=F64)
    assert tree_neg([[], x])[0] == []
    assert tree_neg([others, x])[0] == others
