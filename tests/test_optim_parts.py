"""Masks, chains of parts, and the global norm."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from checks.copies import assert_same
from tables.optimizers import each_row
from tables.trees import BF16, F16, F32, F64, ONE, _update, assert_close, drawn, each_choice, trained
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import implicitdiff as idf
from implicitdiff import optim

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
    with pytest.raises(TypeError, match=r"chain: each argument must be a pair \(init, update\)"):
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
