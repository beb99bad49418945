"""A step in place overwrites nothing that a graph, a transform or another lane needs."""

from __future__ import annotations

import pytest
import torch
from checks.compiled import each_method, needs_cpu
from checks.copies import copied
from tables.donation import DTYPES, LONG, PAIRS, assert_equal, call, each_pair, inputs_of, normal, tensors
from tables.optimizers import ROWS
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.utils import _pytree as pytree

import implicitdiff as idf
from implicitdiff import optim

# Numbers and memory


def refused(f, *trees, match="inplace=True"):
    before = copied(trees)
    with pytest.raises(ValueError, match=match):
        f()
    assert_equal(trees, before)


def graphed(tree):
    """The same numbers as results of a graph."""
    return pytree.tree_map(lambda t: t.clone().requires_grad_() * 1, tree)


def required(tree):
    return pytree.tree_map(lambda t: t.clone().requires_grad_(), tree)


@each_method
@pytest.mark.parametrize("tracked", [graphed, required])
@pytest.mark.parametrize("place", ["grads", "mu", "nu"])
def test_what_a_graph_needs_is_not_overwritten(pair, method, place, tracked):
    grads, state, params = inputs_of(pair)
    if place == "grads":
        grads = tracked(grads)
    else:
        state = state._replace(**{place: tracked(getattr(state, place))})
    refused(
        lambda: call(pair, method, (grads, state, params), True), grads, state, params, match="being differentiated"
    )


def test_an_update_does_not_overwrite_what_a_derivative_for_decayed_parameters_needs(pair):
    grads, state, params = inputs_of(pair)
    params = graphed(params)
    refused(lambda: pair.update(grads, state, params, inplace=True), grads, state, params, match="being differentiated")


@pytest.mark.parametrize("row", [row for row in ROWS if "weight_decay" in row.options], ids=lambda row: row.name)
@pytest.mark.parametrize("chained", [False, True])
def test_decayed_leaves_of_a_graph_are_read_out_of_it(row, chained):
    pair = row.factory(0.1, **row.options)
    if chained:
        pair = idf.chain(optim.add_decayed_weights(0.1), pair, optim.scale(1.0))
    grads, state, params = inputs_of(pair)
    expected = pair.update(copied(grads), copied(state), params)
    leaves = pytree.tree_map(torch.nn.Parameter, params)
    got = pair.update(grads, state, leaves, inplace=True)
    assert_equal(got, expected)
    assert not any(t.requires_grad for t in tensors(got))


def test_an_update_does_not_ask_about_parameters_that_it_does_not_read():
    pair = idf.adam()
    grads, state, params = inputs_of(pair)
    expected = pair.update(copied(grads), copied(state), params)
    assert_equal(pair.update(grads, state, required(params), inplace=True), expected)


@each_method
def test_a_learned_number_needs_what_would_be_overwritten(method):
    pair = idf.adam(torch.tensor(0.1, requires_grad=True))
    inputs = inputs_of(idf.adam())
    refused(lambda: call(pair, method, inputs, True), *inputs, match="being differentiated")
    expected = call(idf.adam(0.1), method, copied(inputs), False)
    with torch.no_grad():
        actual = call(pair, method, inputs, True)
    for a, b in zip(tensors(actual), tensors(expected), strict=True):
        torch.testing.assert_close(a, b)


def test_parameters_of_a_graph_are_not_overwritten(pair):
    grads, state, params = inputs_of(pair)
    params = graphed(params)
    refused(lambda: pair.step(grads, state, params, inplace=True), grads, state, params, match="overwrite params")
    with torch.no_grad():
        refused(lambda: pair.step(grads, state, params, inplace=True), grads, state, params, match="overwrite params")
    refused(lambda: idf.apply_updates(params, grads, inplace=True), grads, params, match="overwrite params")


@pytest.mark.parametrize("which", [0, 1, 2], ids=["grads", "state", "params"])
def test_dual_numbers_are_not_overwritten(pair, which):
    inputs = list(inputs_of(pair))
    before = copied(inputs)
    with forward_ad.dual_level():
        given = inputs[1].mu if which == 1 else inputs[which]
        dual = pytree.tree_map(lambda t: forward_ad.make_dual(t, torch.ones_like(t)), given)
        dual = inputs[1]._replace(mu=dual) if which == 1 else dual
        with pytest.raises(ValueError, match="inplace=True"):
            pair.step(*inputs[:which], dual, *inputs[which + 1 :], inplace=True)
    assert_equal(inputs, before)


@needs_cpu
@each_method
def test_where_the_count_cannot_be_overwritten_nothing_is(method):
    pair = idf.adam(use_accelerated_op=True)
    grads, state, params = inputs_of(pair)
    with torch.inference_mode():
        state = state._replace(count=state.count.clone())
    before = copied([grads, state, params])
    with pytest.raises(RuntimeError, match="made in inference mode"):
        call(pair, method, [grads, state, params], True)
    assert_equal([grads, state, params], before)
    with torch.inference_mode():
        assert call(pair, method, [grads, state, params], True)[1].count is state.count


@needs_cpu
@each_method
def test_a_count_is_read_where_its_numbers_are(method):
    pair = idf.adam(use_accelerated_op=True)
    grads, state, params = inputs_of(pair)
    expected = call(pair, method, copied([grads, state, params]), True)
    wide = torch.tensor([[2, 7], [2, 7]])
    actual = call(pair, method, [grads, state._replace(count=wide[:, 0]), params], True)
    assert_equal(actual, expected)
    assert wide.tolist() == [[3, 7], [3, 7]]


def test_updates_of_a_graph_are_not_applied_in_place():
    params, updates = normal(3), graphed(normal(3, 1))
    refused(lambda: idf.apply_updates(params, updates, inplace=True), params, updates, match="being differentiated")


@pytest.mark.parametrize("which", [0, 1, 2], ids=["grads", "state", "params"])
@pytest.mark.parametrize("transform", ["grad", "jvp", "grad of an outer one"])
def test_what_a_transform_differentiates_is_not_overwritten(pair, which, transform):
    inputs = list(inputs_of(pair))
    count = inputs[1].count
    before = copied(inputs)

    def total(tree):
        given = [*inputs[:which], tree, *inputs[which + 1 :]]
        if which == 1:
            given[1] = given[1]._replace(count=count)
        values, _ = pair.step(*given, inplace=True)
        return sum(t.sum() for t in tensors(values))

    tree = inputs[which]._replace(count=normal(2)) if which == 1 else inputs[which]
    with pytest.raises(ValueError, match="inplace=True"):
        if transform == "grad":
            grad(total)(tree)
        elif transform == "jvp":
            jvp(total, (tree,), (tree,))
        else:
            grad(lambda tree: grad(lambda x: x * total(tree))(torch.ones(())))(tree)
    assert_equal(inputs, before)


@pytest.mark.parametrize("shared", ["twice", "views", "itself", "in another order"])
def test_parameters_that_share_memory_are_not_overwritten(pair, shared):
    memory = normal(2 * LONG)
    first, second = {
        "twice": (memory[:LONG], memory[:LONG]),
        "views": (memory[:LONG], memory[LONG - 1 : -1]),
        "itself": (memory[:1].expand(LONG), memory[LONG:]),
        "in another order": (memory[LONG:], memory[1 : 1 + LONG]),
    }[shared]
    params = [first, second]
    grads = [normal(LONG, 1), normal(LONG, 2)]
    state = pair.init(params)
    refused(lambda: pair.step(grads, state, params, inplace=True), grads, state, params, match="shares memory")
    refused(lambda: idf.apply_updates(params, grads, inplace=True), grads, params, match="shares memory")


def test_one_tensor_in_two_places_of_params_is_not_overwritten(pair):
    p, grads = normal(3), [normal(3, 1), normal(3, 2)]
    state = pair.init([p, p])
    refused(lambda: pair.step(grads, state, [p, p], inplace=True), grads, state, p, match="shares memory")
    refused(lambda: idf.apply_updates([p, p], grads, inplace=True), grads, p, match="shares memory")


def test_parameters_that_lanes_share_are_not_overwritten(pair):
    params, many = normal(3), normal((4, 3), 1)
    state = pair.init(params)
    refused(lambda: vmap(lambda g: pair.step(g, state, params, inplace=True)[0])(many), many, state, params)
    refused(lambda: vmap(lambda u: idf.apply_updates(params, u, inplace=True))(many), many, params)


def test_nothing_is_overwritten_where_one_of_several_kinds_is_refused():
    if not idf.accelerated_op_available("cpu"):
        pytest.skip("_C is not built")
    # In whichever order the kinds are taken.
    for odd in torch.float8_e5m2, torch.float8_e4m3fn:
        pair = idf.adam(use_accelerated_op=True)
        params = [normal(3), torch.ones(3).to(odd), *(normal(3, dtype=dtype) for dtype in DTYPES[:1] + DTYPES[2:])]
        state = pair.init(params)
        grads = copied(params)
        before = copied([params, state, grads])
        for method in "update", "step":
            with pytest.raises(ValueError, match="no compiled step"):
                call(pair, method, (grads, state, params), True)
        for a, b in zip(tensors([params, state, grads]), tensors(before), strict=True):
            assert torch.equal(a.to(torch.complex128), b.to(torch.complex128))


@pytest.mark.parametrize("make", [PAIRS["chain"], PAIRS["chain of chains"]], ids=["adam", "sgd"])
def test_a_chain_that_is_refused_changes_nothing(make):
    pair = make(False)
    grads, state, params = inputs_of(pair)
    params = graphed(params)
    refused(lambda: pair.step(grads, state, params, inplace=True), grads, state, params)


@each_pair
def test_every_transformation_leaves_gradients_of_a_graph_alone(make):
    pair = make(None)
    grads, state, params = inputs_of(pair)
    grads = graphed(grads)
    refused(lambda: pair.update(grads, state, params, inplace=True), grads, state, params, match="being differentiated")


# What is allowed


@pytest.mark.parametrize(["which", "method"], [("grads", "update"), ("mu", "step"), ("nu", "step"), ("params", "step")])
def test_autograd_notices_what_was_overwritten(pair, which, method):
    params, grads = normal(3), normal(3, 1)
    state = pair.init(params)
    overwritten = {"grads": grads, "mu": state.mu, "nu": state.nu, "params": params}[which]
    x = torch.ones(3, requires_grad=True)
    product = (x * overwritten).sum()
    call(pair, method, (grads, state, params), True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_autograd_notices_parameters_that_updates_were_applied_to():
    params, x = normal(3), torch.ones(3, requires_grad=True)
    product = (x * params).sum()
    idf.apply_updates(params, normal(3, 1), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
