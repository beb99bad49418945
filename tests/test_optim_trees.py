"""Optimizers on trees: any nesting, dtypes and gaps; the parts to chain; what is refused, and in which words."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from checks.copies import assert_same
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from tables.optimizers import ROWS, Row
from tables.trees import BF16, F16, F32, F64, INT, assert_close, drawn, each_choice, trained
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_structure, tree_unflatten

import implicitdiff as idf

# Trees are small as they are; shrinking them takes a minute a test.
PROPERTY = settings(
    max_examples=12,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


# --- random trees -----------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    first: Any
    second: Any


SHAPES = [(), (1,), (3,), (2, 2), (0,), (2, 0), (17,)]


def trees(*dtypes: torch.dtype, gaps: bool = False) -> st.SearchStrategy[Any]:
    leaves = st.builds(drawn, st.integers(0, 99), st.sampled_from(SHAPES), st.sampled_from(dtypes))
    if gaps:
        leaves |= st.none() | st.builds(drawn, st.integers(0, 99), st.sampled_from(SHAPES), st.just(INT))
    keys = st.sampled_from(["w", "b", "c", 0])
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(keys, inner, max_size=3)
            | st.builds(Pair, inner, inner)
        ),
        max_leaves=6,
    )


def has_gradient(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


@st.composite
def runs(draw: Any, *dtypes: torch.dtype, gaps: bool = True, steps: int = 3) -> tuple[Any, list[Any]]:
    """Parameters, and gradients for some steps, None here and there."""
    # None in the place of all parameters means that there are none.
    params = draw(trees(*dtypes, gaps=gaps).filter(lambda tree: tree is not None))
    leaves, spec = tree_flatten(params)

    def gradient() -> Any:
        return tree_unflatten(
            [
                drawn(draw(st.integers(100, 199)), tuple(p.shape), p.dtype)
                if has_gradient(p) and not (gaps and draw(st.integers(0, 3)) == 0)
                else None
                for p in leaves
            ],
            spec,
        )

    return params, [gradient() for _ in range(steps)]


_NAMES = ["sgd-momentum-weight_decay-maximize", "adam-amsgrad", "adamw", "rmsprop-centered-weight_decay", "radam"]
_NAMES += ["adagrad-lr_decay-initial_accumulator_value", "adadelta", "adamax"]
SOME = [row for row in ROWS if row.name in _NAMES]
some_rows = pytest.mark.parametrize("row", SOME, ids=lambda row: row.name)


def made(row: Row, accelerated: bool | None = None) -> idf.GradientTransformation:
    return row.factory(**{"lr": 0.1} | row.options, use_accelerated_op=accelerated)


def kept(state: Any) -> list[list[Any]]:
    """The moments of every leaf: columns of a state. Fields that are not used are empty."""
    return [tree_leaves(field) for field in state[1:] if field != ()]


@each_choice
@some_rows
def test_updates_are_like_the_parameters_and_gaps_leave_all_alone(row, accelerated):
    pair = made(row, accelerated)

    @PROPERTY
    @given(runs(F16, BF16, F32, F64))
    def holds(run):
        params, grads = run
        state = pair.init(params)
        leaves = tree_leaves(params)
        assert state.count.tolist() == [0] * len(leaves)
        for g in grads:
            updates, new = pair.update(g, state, params)
            assert tree_structure(updates) == tree_structure(params)
            after = idf.apply_updates(params, updates)
            assert tree_structure(after) == tree_structure(params)
            given_ = [leaf is not None for leaf in tree_leaves(g)]
            for p, u, q, there in zip(leaves, tree_leaves(updates), tree_leaves(after), given_, strict=True):
                if there:
                    assert (u.shape, u.dtype) == (p.shape, p.dtype) == (q.shape, q.dtype)
                else:
                    assert u is None and q is p
            assert (new.count - state.count).tolist() == list(map(int, given_))
            for old_column, column in zip(kept(state), kept(new), strict=True):
                for p, old, moment, there in zip(leaves, old_column, column, given_, strict=True):
                    if not there:
                        assert moment is old
                    else:
                        wide = F32 if p.dtype in (F16, BF16) else p.dtype
                        assert (moment.shape, moment.dtype) == (p.shape, wide)
            params, state, leaves = after, new, tree_leaves(after)

    holds()


@each_choice
@some_rows
def test_a_tree_is_trained_leaf_by_leaf(row, accelerated):
    pair = made(row, accelerated)

    @PROPERTY
    @given(runs(F16, BF16, F32, F64))
    def holds(run):
        params, grads = run
        after, state = trained(pair, params, grads)
        for i, p in enumerate(tree_leaves(params)):
            alone, alone_state = trained(pair, [p], [[tree_leaves(g)[i]] for g in grads])
            assert_same([tree_leaves(after)[i]], alone)
            assert state.count[i] == alone_state.count[0]
            assert_same([column[i] for column in kept(state)], [column[0] for column in kept(alone_state)])

    holds()


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@each_choice
@some_rows
def test_half_precision_is_computed_in_float32_and_rounded_once(row, accelerated, dtype):
    pair = made(row, accelerated)
    p = drawn(1, (50,), dtype)
    state, wide_state = pair.init(p), pair.init(p.float())
    for seed in (2, 3):
        g = drawn(seed, (50,), dtype)
        after, new = pair.step(g, state, p)
        updates, _ = pair.update(g, state, p)
        wide, wide_new = pair.step(g.float(), wide_state, p.float())
        wide_updates, _ = pair.update(g.float(), wide_state, p.float())
        assert_same([after, updates], [wide.to(dtype), wide_updates.to(dtype)])
        assert_same(new, wide_new)
        state, wide_state = new, wide_new


@some_rows
def test_every_leaf_is_trained_as_by_torch(row):
    pair = made(row)

    @PROPERTY
    @given(runs(F64))
    def holds(run):
        params, grads = run
        after, _ = trained(pair, params, grads)
        leaves = [p.clone().requires_grad_() if has_gradient(p) else None for p in tree_leaves(params)]
        learned = [p for p in leaves if p is not None]
        assume(learned)
        optimizer = row.reference(learned, **{"lr": 0.1, "foreach": False} | row.options)
        for g in grads:
            for p, slope in zip(leaves, tree_leaves(g), strict=True):
                if p is not None:
                    p.grad = slope
            optimizer.step()
        for p, q in zip(leaves, tree_leaves(after), strict=True):
            if p is not None:
                assert_close(q, p.detach())

    holds()


@some_rows
def test_every_lane_is_trained_alone(row):
    pair = made(row)

    def lane(i: int, tree: Any) -> Any:
        return tree_map(lambda t: t[i], tree)

    def stacked(tree: Any) -> Any:
        return tree_map(lambda t: torch.stack([t, t + 1, -t]), tree)

    @PROPERTY
    @given(runs(F16, BF16, F32, F64, gaps=False))
    def holds(run):
        params, grads = stacked(run[0]), [stacked(g) for g in run[1]]
        assume(tree_leaves(params))
        batched, state = params, vmap(pair.init)(params)
        assert_same(state, tree_map(lambda t: torch.stack([t] * 3), pair.init(lane(0, params))))
        for g in grads:
            updates, state = vmap(pair.update)(g, state, batched)
            batched = idf.apply_updates(batched, updates)
        for i in range(3):
            one, one_state = lane(i, params), pair.init(lane(i, params))
            for g in grads:
                updates, one_state = pair.update(lane(i, g), one_state, one)
                one = idf.apply_updates(one, updates)
            assert_close(lane(i, batched), one)
            assert_close(lane(i, state), one_state)

    holds()


def turned(tree: Any) -> Any:
    """The same tree with its dictionaries written down in the other order."""
    if isinstance(tree, dict):
        return {key: turned(tree[key]) for key in reversed(tree)}
    if isinstance(tree, Pair):
        return Pair(*map(turned, tree))
    return type(tree)(map(turned, tree)) if isinstance(tree, (list, tuple)) else tree


@some_rows
def test_the_order_of_keys_does_not_matter(row):
    pair = made(row)

    @PROPERTY
    @given(runs(F64))
    def holds(run):
        params, grads = run
        after, _ = trained(pair, params, grads)
        # The parameters that a step returns are nested like its gradients.
        mixed = [turned(g) if k % 2 else g for k, g in enumerate(grads)]
        assert_same(trained(pair, params, mixed)[0], after)

    holds()


@each_choice
def test_the_count_of_a_leaf_goes_with_its_key(accelerated):
    init, update = idf.adam(0.1, use_accelerated_op=accelerated)
    one = torch.ones(1)
    params = {"a": one, "b": one}
    _, state = update({"a": one, "b": None}, init(params))
    expected, _ = update({"a": one, "b": -2 * one}, state)
    updates, _ = update({"b": -2 * one, "a": one}, state)
    assert_same({"a": updates["a"], "b": updates["b"]}, expected)


def test_integers_and_none_pass_through():
    params = {"w": torch.ones(2), "steps": torch.tensor(3), "absent": None}
    pair = idf.adamw(0.1)
    state = pair.init(params)
    grads = {"w": torch.ones(2), "steps": None, "absent": None}
    after, state = pair.step(grads, state, params)
    assert after["steps"] is params["steps"] and after["absent"] is None
    assert state.mu["steps"] is None and state.count.tolist() == [1, 0, 0]


@pytest.mark.parametrize("tree", [{}, [], (), {"a": [], "b": ({},)}, [None, None]], ids=repr)
@some_rows
def test_trees_without_tensors_are_trees(row, tree):
    pair = made(row)
    state = pair.init(tree)
    for inplace in (False, True):
        updates, new = pair.update(tree, state, tree, inplace=inplace)
        assert updates == tree
        assert_same(new, state)
        assert pair.step(tree, state, tree, inplace=inplace)[0] == tree
    assert idf.apply_updates(tree, updates) == tree
