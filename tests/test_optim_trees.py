"""Optimizers on trees: any nesting, dtypes and gaps; the parts to chain; what is refused, and in which words."""

from __future__ import annotations

import math
import pickle
import re
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from optimizers import ROWS, Row, each_row
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_structure, tree_unflatten

import implicitdiff as idf
from implicitdiff import optim

F16, BF16, F32, F64, INT = torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64

# A few steps, each computed to a few units of roundoff, on values of size 1.
CLOSE = {F64: 1e-12, F32: 1e-5, F16: 2e-3, BF16: 2e-2}

# Trees are small as they are; shrinking them takes a minute a test.
PROPERTY = settings(
    max_examples=12,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def drawn(seed: int, shape: tuple[int, ...] = (3,), dtype: torch.dtype = F64) -> Tensor:
    if dtype == INT:
        return torch.full(shape, seed, dtype=INT)
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(tree: Any, expected: Any) -> None:
    assert tree_structure(tree) == tree_structure(expected)
    for a, b in zip(tree_leaves(tree), tree_leaves(expected), strict=True):
        assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b))


def assert_close(tree: Any, expected: Any) -> None:
    assert tree_structure(tree) == tree_structure(expected)
    for a, b in zip(tree_leaves(tree), tree_leaves(expected), strict=True):
        if a is None or b is None:
            assert a is b
        else:
            tolerance = CLOSE.get(a.dtype, 0.0)
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


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


def trained(pair: idf.GradientTransformation, params: Any, grads: list[Any]) -> tuple[Any, Any]:
    state = pair.init(params)
    for g in grads:
        params, state = pair.step(g, state, params)
    return params, state


_NAMES = ["sgd-momentum-weight_decay-maximize", "adam-amsgrad", "adamw", "rmsprop-centered-weight_decay", "radam"]
_NAMES += ["adagrad-lr_decay-initial_accumulator_value", "adadelta", "adamax"]
SOME = [row for row in ROWS if row.name in _NAMES]
some_rows = pytest.mark.parametrize("row", SOME, ids=lambda row: row.name)
each_choice = pytest.mark.parametrize("accelerated", [None, False])


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


# --- what is refused --------------------------------------------------------------------------------------------------

ONE = torch.ones(2)
PARAMS = {"net": [ONE, ONE], "b": torch.ones(())}


def _update(pair: idf.GradientTransformation, grads: Any, params: Any = None, like: Any = PARAMS) -> Any:
    return pair.update(grads, pair.init(like), params)


def _grads(**changed: Any) -> Any:
    return {"net": [ONE, ONE], "b": torch.ones(())} | changed


MISMATCHES = {
    "nested otherwise": (
        lambda: _update(idf.adam(), {"net": [ONE], "b": ONE}),
        ValueError,
        ["adam: grads and state.mu have to be nested alike", "{net: [float32[2]], b: float32[2]}"],
    ),
    "a tensor for a list": (
        lambda: _update(idf.adam(), {"net": ONE, "b": ONE}),
        ValueError,
        ["adam: grads and state.mu have to be nested alike", "net: float32[2]"],
    ),
    "another key": (
        lambda: _update(idf.adam(), {"net": [ONE, ONE], "c": torch.ones(())}),
        ValueError,
        ["adam: grads and state.mu have to be nested alike", "c: float32[]"],
    ),
    "params nested otherwise": (
        lambda: _update(idf.adamw(), _grads(), [ONE]),
        ValueError,
        ["adamw: grads and params have to be nested alike", "params is [float32[2]]"],
    ),
    "a shape": (
        lambda: _update(idf.sgd(momentum=0.9), _grads(net=[ONE, torch.ones(3)])),
        ValueError,
        ["sgd: state.trace['net'][1] is float32[2] on cpu, but grads is float32[3] on cpu"],
    ),
    "the shape of a parameter": (
        lambda: idf.sgd().step(_grads(net=[ONE, torch.ones(3)]), idf.sgd().init(PARAMS), PARAMS),
        ValueError,
        ["sgd: params['net'][1] is float32[2] on cpu, but grads is float32[3] on cpu"],
    ),
    "a dtype": (
        lambda: _update(idf.adam(), _grads(b=torch.ones((), dtype=F64))),
        ValueError,
        ["adam: state.mu['b'] is float32[] on cpu, but grads is float64[] on cpu"],
    ),
    "a dtype of half precision": (
        lambda: _update(idf.adam(), _grads(b=torch.ones((), dtype=BF16)), like=_grads(b=torch.ones((), dtype=F64))),
        ValueError,
        ["state.mu['b'] is float64[]", "grads is bfloat16[]", "float32"],
    ),
    "a shape of an update": (
        lambda: idf.apply_updates([ONE], [torch.ones(3)]),
        ValueError,
        ["apply_updates: params[0] is float32[2] on cpu, but updates is float32[3] on cpu"],
    ),
    "an update without its parameter": (
        lambda: idf.apply_updates([None], [ONE]),
        TypeError,
        ["apply_updates: params[0] is None; it has to be a tensor where updates is not None"],
    ),
    "no tensor": (
        lambda: _update(idf.adam(), _grads(b=1.0)),
        TypeError,
        ["adam: grads['b'] is 1.0; it has to be a tensor or None"],
    ),
    "sparse": (
        lambda: _update(idf.adam(), _grads(net=[ONE, ONE.to_sparse()])),
        TypeError,
        ["adam: grads['net'][1] is sparse_coo float32[2] on cpu", "dense"],
    ),
    "integers": (
        lambda: _update(idf.adam(), _grads(b=torch.tensor(1))),
        TypeError,
        ["adam: grads['b'] is int64[] on cpu", "floating point"],
    ),
    "a parameter that is no tensor": (
        lambda: idf.adam().init({"a": 1.0}),
        TypeError,
        ["adam: params have the leaf 1.0; each has to be a tensor, or None"],
    ),
    "decay without parameters": (
        lambda: _update(idf.adam(weight_decay=0.1), _grads()),
        ValueError,
        ["adam: weight_decay needs the parameters; call update(grads, state, params)"],
    ),
    "add_decayed_weights without parameters": (
        lambda: _update(optim.add_decayed_weights(0.1), _grads()),
        ValueError,
        ["add_decayed_weights needs the parameters"],
    ),
    "the state of another": (
        lambda: idf.adam().update(_grads(), idf.sgd().init(PARAMS)),
        TypeError,
        ["adam: state is a SGDState, not the AdamState of its init"],
    ),
    "no state": (lambda: idf.adam().update(_grads(), None), TypeError, ["adam: state is a NoneType"]),
    "a state for fewer leaves": (
        lambda: idf.sgd().update([ONE, ONE], idf.sgd().init([ONE])),
        ValueError,
        ["sgd: grads have 2 leaves, but state.count has the shape [1]"],
    ),
    "a chain of other length": (
        lambda: idf.chain(optim.clip(1.0), idf.sgd()).update(_grads(), (idf.sgd().init(PARAMS),)),
        ValueError,
        ["chain: 2 transformations, but a state of 1"],
    ),
    "a mask of other keys": (
        lambda: _update(idf.adamw(mask={"net": True, "c": False}), _grads(), PARAMS),
        ValueError,
        ["adamw: mask has to be nested like the parameters", "'c': False"],
    ),
    "a mask of other length": (
        lambda: _update(idf.adamw(mask={"net": [True], "b": False}), _grads(), PARAMS),
        ValueError,
        ["adamw: mask has to be nested like the parameters", "'net': [True]"],
    ),
    "a mask deeper than the parameters": (
        lambda: _update(optim.add_decayed_weights(0.1, {"net": True, "b": [True]}), _grads(), PARAMS),
        ValueError,
        ["add_decayed_weights: mask has to be nested like the parameters"],
    ),
    "a mask of a masked": (
        lambda: optim.masked(idf.sgd(), [True]).init(PARAMS),
        ValueError,
        ["masked: mask has to be nested like the parameters"],
    ),
}


@pytest.mark.parametrize(("call", "error", "fragments"), MISMATCHES.values(), ids=MISMATCHES)
def test_what_does_not_match_is_named(call, error, fragments):
    with pytest.raises(error) as raised:
        call()
    for fragment in fragments:
        assert fragment in str(raised.value)


_FACTORIES = [idf.sgd, idf.adam, idf.adamw, idf.rmsprop, idf.adagrad, idf.adadelta, idf.adamax, idf.radam]
_BETAS = [idf.adam, idf.adamw, idf.adamax, idf.radam]
_EPS_ROOT = [idf.adam, idf.adamw, idf.radam, idf.rmsprop, idf.adagrad]

OUT_OF_RANGE = (
    [(f, {"lr": -0.1}, "lr has to be a finite number, at least 0, but it is -0.1") for f in _FACTORIES]
    + [(f, {"lr": math.nan}, "lr has to be a finite number") for f in _FACTORIES]
    + [(f, {"lr": math.inf}, "lr has to be a finite number") for f in _FACTORIES]
    + [(f, {"weight_decay": -1.0}, "weight_decay has to be a finite number, at least 0") for f in _FACTORIES]
    + [(f, {"eps": -1e-8}, "eps has to be a finite number, at least 0") for f in _FACTORIES if f is not idf.sgd]
    + [(f, {"eps_root": -1e-8}, "eps_root has to be a finite number, at least 0") for f in _EPS_ROOT]
    + [(f, {"betas": (1.0, 0.9)}, "betas[0] has to be at least 0 and less than 1, but it is 1.0") for f in _BETAS]
    + [(f, {"betas": (0.9, -0.1)}, "betas[1] has to be at least 0 and less than 1, but it is -0.1") for f in _BETAS]
    + [(f, {"lr": torch.tensor(1)}, "lr is a torch.int64 tensor of shape []") for f in _FACTORIES]
    + [
        (idf.sgd, {"momentum": -0.1}, "momentum has to be a finite number, at least 0"),
        (idf.sgd, {"dampening": math.inf}, "dampening has to be a finite number"),
        (idf.sgd, {"nesterov": True}, "nesterov needs a momentum and no dampening, but they are 0.0 and 0.0"),
        (idf.sgd, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "they are 0.9 and 0.1"),
        (idf.rmsprop, {"alpha": -0.1}, "alpha has to be a finite number, at least 0"),
        (idf.rmsprop, {"momentum": -0.1}, "momentum has to be a finite number, at least 0"),
        (idf.adadelta, {"rho": 1.1}, "rho has to be from 0 to 1, but it is 1.1"),
        (idf.adagrad, {"lr_decay": -1.0}, "lr_decay has to be a finite number, at least 0"),
        (idf.adagrad, {"initial_accumulator_value": -1.0}, "initial_accumulator_value has to be a finite number"),
        (idf.clip_grad_norm, {"max_norm": -1.0}, "max_norm has to be a finite number, at least 0"),
        (idf.clip_grad_norm, {"max_norm": 1.0, "norm_type": 0.5}, "norm_type has to be at least 1, or infinity"),
        (idf.clip_grad_norm, {"max_norm": 1.0, "norm_type": math.nan}, "norm_type has to be at least 1, or infinity"),
        (idf.clip_grad_norm, {"max_norm": torch.ones(2)}, "max_norm is a torch.float32 tensor of shape [2]"),
        (optim.clip, {"max_delta": -1.0}, "max_delta has to be a finite number, at least 0"),
        (optim.scale, {"factor": math.nan}, "factor has to be a finite number"),
        (optim.add_decayed_weights, {"weight_decay": -1.0}, "weight_decay has to be a finite number, at least 0"),
        (optim.trace, {"nesterov": True, "dampening": 0.5}, "nesterov needs a momentum and no dampening"),
    ]
)


@pytest.mark.parametrize(("factory", "options", "message"), OUT_OF_RANGE, ids=lambda x: getattr(x, "__name__", None))
def test_numbers_out_of_range_are_refused(factory, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        factory(**options)
    assert str(error.value).startswith(f"{factory.__name__}: ")


@pytest.mark.parametrize("value", ["0.1", None, 1j], ids=repr)
@pytest.mark.parametrize("factory", _FACTORIES, ids=lambda f: f.__name__)
def test_what_is_no_number_is_refused(factory, value):
    with pytest.raises(TypeError) as error:
        factory(lr=value)
    assert f"{factory.__name__}: lr is {value!r}; it has to be a number" in str(error.value)


_SPARSE = [idf.sgd, idf.adagrad]
EMBEDDED = [(f, options) for f in _SPARSE for options in ({}, {"weight_decay": 0.1})] + [(idf.sgd, {"momentum": 0.9})]


@pytest.mark.parametrize(("factory", "options"), EMBEDDED, ids=lambda x: getattr(x, "__name__", str(x)))
@pytest.mark.parametrize("inplace", [False, True])
def test_sparse_gradients_are_what_they_are_dense(factory, options, inplace):
    pair, params = factory(0.1, **options), {"table": drawn(0, (4, 2), F64), "w": drawn(1, (3,), F64)}
    sparse, dense = params, params
    states = [pair.init(params), pair.init(params)]
    for k in range(3):
        grads = {"table": torch.zeros(4, 2, dtype=F64), "w": drawn(k + 2, (3,), F64)}
        grads["table"][k] = drawn(k + 5, (2,), F64)
        dense, states[0] = pair.step(grads, states[0], dense)
        grads = grads | {"table": grads["table"].to_sparse(1)}
        sparse, states[1] = pair.step(grads, states[1], tree_map(torch.clone, sparse), inplace=inplace)
    assert_close(sparse, dense)


@pytest.mark.parametrize("factory", [f for f in _FACTORIES if f not in _SPARSE], ids=lambda f: f.__name__)
def test_sparse_gradients_are_refused_with_the_reason(factory):
    with pytest.raises(TypeError, match=rf"{factory.__name__}: grads\['net'\]\[1\] is sparse_coo.*SparseAdam.*dense"):
        _update(factory(), _grads(net=[ONE, ONE.to_sparse()]), PARAMS)


INITS = {
    "sgd": idf.sgd(0.1),
    "adam": idf.adam(),
    "scheduled": idf.sgd(idf.schedule.constant(0.1)),
    "chain": idf.chain(optim.clip(1.0), idf.sgd()),
}


@pytest.mark.parametrize("name", INITS)
def test_init_of_no_tensors_is_refused_by_name(name):
    own = {"scheduled": "sgd", "chain": "clip"}.get(name, name)
    for params, leaf in (("x", "'x'"), ({"w": ONE, "rate": 0.1}, "0.1")):
        with pytest.raises(TypeError, match=rf"{own}: params have the leaf {leaf}; each has to be a tensor, or None"):
            INITS[name].init(params)


# --- masks ------------------------------------------------------------------------------------------------------------

BODY = {"net": [True, True], "b": False}
MASKS = {
    "a tree": BODY,
    "a prefix": {"net": True, "b": False},
    "in another order": {"b": False, "net": True},
    "a function": lambda tree: tree_map(lambda t: t.ndim > 0, tree),
    "a function of a prefix": lambda tree: {"net": True, "b": False},
}
each_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
P = {"net": [drawn(1), drawn(2)], "b": drawn(3, ())}
G = {"net": [drawn(4), drawn(5)], "b": drawn(6, ())}


@each_choice
@each_mask
def test_adamw_decays_what_is_chosen(mask, accelerated):
    with_mask = idf.adamw(0.1, weight_decay=0.3, mask=mask, use_accelerated_op=accelerated)
    every, none = idf.adamw(0.1, weight_decay=0.3), idf.adamw(0.1, weight_decay=0.0)
    after, (decayed, plain) = trained(with_mask, P, [G, G])[0], (trained(o, P, [G, G])[0] for o in (every, none))
    assert_close(after, {"net": decayed["net"], "b": plain["b"]})


@each_mask
def test_add_decayed_weights_adds_what_is_chosen(mask):
    updates, _ = _update(optim.add_decayed_weights(0.3, mask), G, P)
    assert_close(updates, {"net": [g + 0.3 * p for g, p in zip(G["net"], P["net"], strict=True)], "b": G["b"]})


@each_mask
def test_masked_transforms_what_is_chosen(mask):
    pair = optim.masked(idf.adam(0.1), mask)
    state = pair.init(P)
    assert state.mu["b"] is None
    updates, state = pair.update(G, state, P)
    expected, _ = _update(idf.adam(0.1), G["net"], like=P["net"])
    assert_close(updates, {"net": expected, "b": G["b"]})
    assert state.count.tolist() == [1, 1, 0]


@pytest.mark.parametrize("mask", [True, False])
def test_one_bool_is_a_mask_of_everything(mask):
    updates, _ = _update(optim.masked(optim.scale(2.0), mask), G, like=P)
    assert_close(updates, tree_map(lambda g: g * (2.0 if mask else 1.0), G))
    updates, _ = _update(optim.add_decayed_weights(0.3, mask), G, P)
    assert_close(updates, tree_map(lambda g, p: g + 0.3 * mask * p, G, P))


def test_masked_passes_gaps_and_integers_on():
    params = {"w": torch.ones(2), "b": torch.ones(2), "n": torch.tensor(3)}
    pair = optim.masked(idf.adam(0.1), {"w": True, "b": False, "n": False})
    state = pair.init(params)
    updates, _ = pair.update({"w": None, "b": torch.ones(2), "n": None}, state, params)
    assert updates["w"] is None and updates["n"] is None and updates["b"].tolist() == [1.0, 1.0]


def test_a_masked_step_in_place_changes_what_is_chosen_only():
    pair = optim.masked(optim.scale(2.0), MASKS["a prefix"])
    grads = tree_map(torch.clone, G)
    addresses = [g.data_ptr() for g in tree_leaves(grads)]
    updates, _ = pair.update(grads, pair.init(P), inplace=True)
    assert [u.data_ptr() for u in tree_leaves(updates)] == addresses
    assert_close(updates, {"net": [2 * g for g in G["net"]], "b": G["b"]})


# --- parts ------------------------------------------------------------------------------------------------------------


def composed(*parts: idf.GradientTransformation) -> Any:
    params, pair = P, idf.chain(*parts)
    state = pair.init(params)
    for k in range(4):
        updates, state = pair.update(tree_map(lambda g, k=k: g + 0.3 * k, G), state, params)
        params = idf.apply_updates(params, updates)
    return params


LR = optim.scale(-0.1)
EQUALS = {
    "sgd": (idf.sgd(0.1), [LR]),
    "sgd with momentum": (idf.sgd(0.1, 0.9, 0.3), [optim.trace(0.9, 0.3), LR]),
    "sgd with nesterov": (idf.sgd(0.1, 0.9, nesterov=True), [optim.trace(0.9, nesterov=True), LR]),
    "adam": (idf.adam(0.1), [optim.scale_by_adam(), LR]),
    "adam with amsgrad": (idf.adam(0.1, (0.5, 0.6), 0.1, 0.0, True), [optim.scale_by_adam((0.5, 0.6), 0.1, True), LR]),
    "adam with decay": (
        idf.adam(0.1, weight_decay=0.3),
        [optim.add_decayed_weights(0.3), optim.scale_by_adam(), LR],
    ),
    "adamw": (idf.adamw(0.1, weight_decay=0.3), [optim.scale_by_adam(), optim.add_decayed_weights(0.3), LR]),
    "adam climbing": (idf.adam(0.1, maximize=True), [optim.scale_by_adam(), optim.scale(0.1)]),
    "rmsprop": (idf.rmsprop(0.1, 0.8, centered=True), [optim.scale_by_rmsprop(0.8, centered=True), LR]),
    "rmsprop with momentum": (idf.rmsprop(0.1, momentum=0.5), [optim.scale_by_rmsprop(), optim.trace(0.5), LR]),
    "adagrad": (
        idf.adagrad(0.1, initial_accumulator_value=0.5, eps=0.1),
        [optim.scale_by_adagrad(0.5, 0.1), LR],
    ),
    "adadelta": (idf.adadelta(0.1, 0.8), [optim.scale_by_adadelta(0.8), LR]),
    "adamax": (idf.adamax(0.1, (0.5, 0.6)), [optim.scale_by_adamax((0.5, 0.6)), LR]),
    "radam": (idf.radam(0.1, (0.5, 0.8)), [optim.scale_by_radam((0.5, 0.8)), LR]),
    "a schedule": (
        idf.adam(lambda count: 0.1 * 0.5**count),
        [optim.scale_by_adam(), optim.scale_by_schedule(lambda count: -0.1 * 0.5**count)],
    ),
    "injected": (optim.inject_hyperparams(idf.adam)(lr=0.1, betas=(0.5, 0.6)), [optim.scale_by_adam((0.5, 0.6)), LR]),
    "a chain of chains": (idf.adam(0.1), [idf.chain(optim.scale_by_adam(), optim.scale(-0.2)), optim.scale(0.5)]),
}


@pytest.mark.parametrize(("whole", "parts"), EQUALS.values(), ids=EQUALS)
def test_a_chain_of_parts_is_the_optimizer(whole, parts):
    assert_close(composed(*parts), composed(whole))


def test_an_empty_chain_changes_nothing():
    assert_same(_update(idf.chain(), G, like=P)[0], G)


def test_a_chain_serves_plain_pairs():
    negated = (
        lambda params: (),
        lambda grads, state, params=None, *, inplace=False: (tree_map(torch.neg, grads), state),
    )
    pair = idf.chain(negated, optim.scale(2.0))
    assert_close(pair.update(G, pair.init(P))[0], tree_map(lambda g: -2 * g, G))


def by_keyword(grads, state, *, params=None, inplace=True):
    assert params is not None
    return tree_map(torch.neg, grads), state


@pytest.mark.parametrize(
    "around",
    [
        lambda pair: pair,
        idf.chain,
        lambda pair: optim.masked(pair, True),
        lambda pair: idf.chain(optim.masked(pair, True)),
    ],
    ids=["alone", "chain", "masked", "both"],
)
def test_a_pair_may_take_the_parameters_by_keyword_alone(around):
    pair = around(idf.GradientTransformation(lambda params: (), by_keyword))
    params, _ = pair.step(G, pair.init(P), P)
    assert_close(params, tree_map(lambda p, g: p - g, P, G))


@pytest.mark.parametrize("given", [[optim.scale(0.1)], optim.scale, (optim.scale(0.1),) * 2, None])
def test_a_chain_of_what_is_no_pair_is_refused(given):
    with pytest.raises(TypeError, match=r"chain: each argument has to be a pair \(init, update\)"):
        idf.chain(given)


def test_scale_takes_a_tensor_of_any_dtype():
    grads = [drawn(0, dtype=dtype) for dtype in (F16, BF16, F32, F64)]
    updates, _ = _update(optim.scale(torch.tensor(-0.5, dtype=F64)), grads, like=grads)
    assert_close(updates, [-0.5 * g for g in grads])


def test_clip_clamps_every_element():
    updates, _ = _update(optim.clip(0.5), G, like=P)
    assert_same(updates, tree_map(lambda g: g.clamp(-0.5, 0.5), G))


@pytest.mark.parametrize("options", [{}, {"nan": 1.0, "posinf": 2.0, "neginf": -3.0}])
def test_nan_to_num_replaces_as_torch_does(options):
    g = torch.tensor([math.nan, math.inf, -math.inf, 1.5])
    pair = optim.nan_to_num(**options)
    assert_same(pair.update(g, ())[0], torch.nan_to_num(g, **options))
    slope = torch.func.grad(lambda g: pair.update(g, ())[0].sum())(g)
    assert slope.tolist() == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("inplace", [False, True])
def test_parts_pass_gaps_on(inplace):
    parts = [optim.clip(0.1), optim.nan_to_num(), optim.scale(2.0), idf.clip_grad_norm(0.1), optim.trace(0.9)]
    parts += [optim.add_decayed_weights(0.1), optim.scale_by_schedule(lambda count: 1.0)]
    for pair in (*parts, idf.chain(*parts)):
        grads = [None, drawn(1)]
        updates, _ = pair.update(grads, pair.init(grads), [drawn(2), drawn(3)], inplace=inplace)
        assert updates[0] is None and updates[1].shape == (3,)


# --- the global norm --------------------------------------------------------------------------------------------------

NORM_TYPES = [1.0, 2.0, 3.0, math.inf]


def clipped_by_torch(grads: list[Tensor], max_norm: float, norm_type: float) -> list[Tensor]:
    params = [torch.zeros_like(g).requires_grad_() for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type, foreach=False)
    return [p.grad for p in params]


@pytest.mark.parametrize("dtype", [F64, F32, torch.complex128], ids=str)
@pytest.mark.parametrize("max_norm", [0.1, 100.0, 0.0])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_gradients_are_clipped_as_by_torch(norm_type, max_norm, dtype):
    grads = [drawn(1, (3, 2), dtype), drawn(2, (), dtype), drawn(4, (5,), dtype)]
    if norm_type != math.inf:  # torch has no norm for it
        grads.append(drawn(3, (0,), dtype))
    if dtype.is_complex:
        grads = [g * (1 - 2j) for g in grads]
    for bound in (max_norm, torch.tensor(max_norm)):
        updates, _ = _update(idf.clip_grad_norm(bound, norm_type), grads, like=grads)
        close = {"rtol": 1e-6, "atol": 1e-7} if dtype == F32 or bound is not max_norm else {"rtol": 1e-13, "atol": 0}
        torch.testing.assert_close(updates, clipped_by_torch(grads, max_norm, norm_type), **close)


@pytest.mark.parametrize("size", [1e30, 1e-30, 1e38])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_powers_of_gradients_neither_overflow_nor_underflow(norm_type, size):
    grads = [size * drawn(1, (4,)).clamp(-1, 1).float(), size * drawn(2, (3,)).clamp(-1, 1).float()]
    bound = 0.5 * size
    updates, _ = _update(idf.clip_grad_norm(bound, norm_type, eps=0.0), grads, like=grads)
    wide = [g.double() for g in grads]
    norm = torch.linalg.vector_norm(torch.cat(wide), norm_type)
    torch.testing.assert_close([u.double() for u in updates], [g * bound / norm for g in wide], rtol=1e-6, atol=0.0)


def test_half_precision_is_normed_in_float32():
    grads = [torch.full((300,), 300.0, dtype=F16)]
    updates, _ = _update(idf.clip_grad_norm(1.0), grads, like=grads)
    torch.testing.assert_close(updates[0], torch.full((300,), 300**-0.5, dtype=F16))


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_gradients_of_zero_stay_and_have_the_derivative_of_the_identity(norm_type):
    pair = idf.clip_grad_norm(1.0, norm_type)
    g = torch.zeros(3, dtype=F64)
    assert torch.equal(pair.update(g, ())[0], g)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(jacobian(lambda g: pair.update(g, ())[0])(g), torch.eye(3, dtype=F64))


def test_leaves_of_several_dtypes_have_one_norm():
    grads = [torch.tensor([3.0], dtype=F16), torch.tensor([4.0], dtype=F64), torch.tensor([12.0])]
    updates, _ = _update(idf.clip_grad_norm(1.0), grads, like=grads)
    assert [u.dtype for u in updates] == [F16, F64, F32]
    torch.testing.assert_close(
        torch.cat([u.double() for u in updates]), torch.tensor([3, 4, 12], dtype=F64) / 13, rtol=1e-3, atol=0
    )


def test_a_pair_can_be_pickled():
    init, update = pickle.loads(pickle.dumps(idf.adam(lr=0.1)))
    assert_close(update(ONE, init(ONE))[0], idf.adam(lr=0.1).update(ONE, idf.adam(lr=0.1).init(ONE))[0])


def test_a_learned_start_of_adagrad_is_differentiated():
    def first_update(start):
        pair = idf.adagrad(lr=0.1, initial_accumulator_value=start)
        return pair.update(ONE.double(), pair.init(ONE.double()))[0].sum()

    start, h = torch.tensor(0.5, dtype=torch.float64), 1e-6
    difference = (first_update(start + h) - first_update(start - h)) / (2 * h)
    torch.testing.assert_close(torch.func.grad(first_update)(start), difference, rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_that_are_tensors_keep_their_digits_beside_half_precision(dtype):
    g = torch.full((2,), 1000.0, dtype=dtype)
    for factor in (1e-8, 0.1234567):
        torch.testing.assert_close(
            optim.scale(torch.tensor(factor)).update(g, ())[0], optim.scale(factor).update(g, ())[0], rtol=0, atol=0
        )
    decayed = [optim.add_decayed_weights(d).update(g, (), g)[0] for d in (torch.tensor(1e-3), 1e-3)]
    torch.testing.assert_close(*decayed, rtol=0, atol=0)


@each_row
def test_a_state_is_loaded_without_trusting_its_file(row, tmp_path):
    params = {"w": ONE, "b": [torch.ones(())]}
    pair = row.factory(**row.options)
    _, state = pair.update(params, pair.init(params), params)
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt")
    assert type(loaded) is type(state)
    assert_close(loaded, state)
