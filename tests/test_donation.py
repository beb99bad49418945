"""``inplace=True``: the same numbers in the memory given away, or a refusal that changes nothing."""

from __future__ import annotations

import pytest
import torch
from checks.compiled import each_method, needs_cpu
from checks.copies import copied
from tables.donation import DTYPES, LONG, assert_equal, call, each_pair, inputs_of, normal, tensors
from tables.optimizers import each_row
from torch.func import grad, jacfwd, vmap
from torch.utils import _pytree as pytree

import implicitdiff as idf
from implicitdiff import optim

each_flag = pytest.mark.parametrize("flag", [pytest.param(True, marks=needs_cpu), False], ids=["kernel", "plain"])
LARGE = 10**6
# Enough for results that are not in place to be written past the caches.
STREAMED = (1 << 21) + 3


def assert_in(actual, donated):
    """The very tensors that were given away."""
    assert [id(t) for t in tensors(actual)] == [id(t) for t in tensors(donated)]


# Numbers and memory


@each_flag
@each_method
@each_row
def test_a_step_in_place_gives_the_same_numbers_in_the_memory_given_away(row, method, flag):
    pair = row.factory(**row.options, use_accelerated_op=flag)
    for dtype in DTYPES:
        inputs = inputs_of(pair, dtype=dtype)
        expected = call(pair, method, copied(inputs), False)
        grads, state, params = inputs
        written = grads if method == "update" else params
        kept = params if method == "update" else grads
        before, addresses = copied(kept), [t.data_ptr() for t in tensors([written, state])]
        actual = call(pair, method, inputs, True)
        assert_equal(actual, expected)
        assert_in(actual, [written, state])
        assert [t.data_ptr() for t in tensors(actual)] == addresses
        assert_equal(kept, before)


@each_row
def test_kernels_and_plain_torch_agree_in_place(row):
    if not idf.accelerated_op_available("cpu"):
        pytest.skip("_C is not built")
    pairs = [row.factory(**row.options, use_accelerated_op=flag) for flag in (True, False)]
    inputs = inputs_of(pairs[1], [(LONG,), (3,)], torch.float64)
    results = [pair.step(*copied(inputs), inplace=True) for pair in pairs]
    for a, b in zip(*map(tensors, results), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@each_flag
@pytest.mark.parametrize("shape", [(0,), (), (1,), (LONG,), (STREAMED,)], ids=str)
@each_method
def test_a_leaf_of_any_size_is_overwritten(method, shape, flag):
    pair = idf.adamw(amsgrad=True, use_accelerated_op=flag)
    inputs = inputs_of(pair, [shape])
    expected = call(pair, method, copied(inputs), False)
    actual = call(pair, method, inputs, True)
    assert_equal(actual, expected)
    assert_in(actual, [inputs[0] if method == "update" else inputs[2], inputs[1]])


@each_flag
@each_method
@each_pair
def test_every_transformation_gives_the_same_numbers_in_the_memory_given_away(make, method, flag):
    pair = make(flag)
    inputs = inputs_of(pair)
    expected = call(pair, method, copied(inputs), False)
    actual, _ = results = call(pair, method, inputs, True)
    # A chain adds to parameters what is rounded already, in place as out of place.
    assert_equal(results, expected)
    assert_in(actual, inputs[0] if method == "update" else inputs[2])


def test_updates_are_applied_in_place():
    params, updates = [normal(3), None, normal((2, 4))], [normal(3, 1), None, None]
    expected, before = idf.apply_updates(params, updates), copied(updates)
    actual = idf.apply_updates(params, updates, inplace=True)
    assert_equal(actual, expected)
    assert_in(actual, params)
    assert_equal(updates, before)


def allocated(f):
    """The bytes that torch allocates while f runs."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        f()
    return sum(max(0, event.self_cpu_memory_usage) for event in profile.function_events)


@needs_cpu
@each_method
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_kernel_in_place_allocates_next_to_nothing(dtype, method):
    pair = idf.adamw(amsgrad=True, use_accelerated_op=True)
    inputs = inputs_of(pair, [(LARGE,)], dtype)
    assert allocated(lambda: call(pair, method, inputs, False)) >= LARGE * dtype.itemsize
    assert allocated(lambda: call(pair, method, inputs, True)) < LARGE / 1000


def test_leaves_without_a_gradient_are_left_alone():
    for flag in [True, False] if idf.accelerated_op_available("cpu") else [False]:
        pair = idf.adamw(use_accelerated_op=flag)
        for method in "update", "step":
            grads, state, params = inputs_of(pair)
            grads["0"] = None
            before, versions = copied([state, params]), [t._version for t in tensors([state.mu["0"], params["0"]])]
            expected = call(pair, method, copied((grads, state, params)), False)
            values, new = actual = call(pair, method, (grads, state, params), True)
            assert_equal(actual, expected)
            assert values["0"] is (None if method == "update" else params["0"])
            assert_equal([s.mu["0"] for s in (new, state)], [before[0].mu["0"]] * 2)
            assert_equal([s.nu["0"] for s in (new, state)], [before[0].nu["0"]] * 2)
            assert_equal(params["0"], before[1]["0"])
            assert [t._version for t in tensors([state.mu["0"], params["0"]])] == versions
            assert (new.count - before[0].count).tolist() == [0, 1]


# What is allowed


@each_flag
@each_row
def test_parameters_of_modules_are_overwritten_as_by_an_optimizer(row, flag):
    pair = row.factory(**row.options, use_accelerated_op=flag)
    grads, state, params = inputs_of(pair)
    expected = pair.step(grads, copied(state), copied(params))
    params = {k: torch.nn.Parameter(p) for k, p in params.items()}
    actual = pair.step(grads, state, params, inplace=True)
    assert_equal(actual[0], expected[0])
    assert_equal(actual[1], expected[1])
    assert_in(actual[0], params)
    assert all(p.is_leaf and p.requires_grad for p in params.values())


def test_updates_are_applied_to_parameters_of_modules():
    params, updates = torch.nn.Parameter(normal(3)), normal(3, 1)
    expected = params.detach() + updates
    assert idf.apply_updates(params, updates, inplace=True) is params
    assert_equal(params, expected)
    assert params.is_leaf and params.requires_grad


def test_a_model_is_trained_by_steps_in_place(pair):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    x = normal((16, 3))
    twin = {k: p.detach().clone() for k, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    named = {k: torch.nn.Parameter(p) for k, p in twin.items()}
    state = pair.init(named)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
        for p in named.values():
            p.grad = None
        torch.func.functional_call(model, named, x).sum().backward()
        result, state = pair.step({k: p.grad for k, p in named.items()}, state, named, inplace=True)
        assert_in(result, named)
    for k, p in model.named_parameters():
        torch.testing.assert_close(named[k], p, rtol=1e-5, atol=1e-5)


def expanded():
    x = torch.ones(LONG, requires_grad=True)
    x.sum().backward()
    gradient = x.grad if x.grad.stride() == (0,) else torch.ones(1).expand(LONG)
    return [gradient, gradient]


def overlapping():
    memory = normal(2 * LONG)
    return [memory[:LONG], memory[LONG // 2 : LONG // 2 + LONG]]


def twice():
    gradient = normal(LONG)
    return [gradient, gradient]


def strided():
    memory = normal((LONG, 2))
    return [memory[:, 0], memory[:, 1]]


def reordered():
    return [normal((50, 100)).t(), normal((10, 5, 100)).permute(2, 0, 1)]


def misaligned():
    memory = normal(2 * LONG + 1)
    return [memory[1 : 1 + LONG], memory[1 + LONG :]]


GRADIENTS = {f.__name__: f for f in (expanded, overlapping, twice, strided, reordered, misaligned)}


@each_method
@pytest.mark.parametrize("make", GRADIENTS.values(), ids=GRADIENTS)
def test_gradients_of_any_layout_give_the_same_numbers(pair, make, method):
    grads = make()
    params = [normal(g.shape, i) for i, g in enumerate(grads)]
    _, state = pair.update(params, pair.init(params), params)
    expected = call(pair, method, copied((grads, state, params)), False)
    before = copied(grads)
    actual = call(pair, method, (grads, state, params), True)
    assert_equal(actual, expected)
    assert_in(actual[1], state)
    if method == "step":
        assert_equal(grads, before)
        assert_in(actual[0], params)


@each_method
def test_parameters_of_any_dense_layout_are_overwritten(pair, method):
    params, grads = reordered(), [normal((100, 50), 1), normal((100, 10, 5), 2)]
    state = pair.init(params)
    expected = call(pair, method, copied((grads, state, params)), False)
    actual = call(pair, method, (grads, state, params), True)
    assert_equal(actual, expected)
    assert_in(actual, [grads if method == "update" else params, state])


def assert_right_or_refused(pair, method, inputs):
    expected, before = call(pair, method, copied(inputs), False), copied(inputs)
    try:
        actual = call(pair, method, inputs, True)
    except ValueError as error:
        assert "inplace=True" in str(error)
        assert_equal(inputs, before)
    else:
        assert_equal(actual, expected)


@each_method
def test_conjugate_and_negative_views_are_overwritten_or_replaced(pair, method):
    z = normal(LONG, dtype=torch.complex64)
    for view in z.conj(), torch.imag(z.conj()):
        params = [view]
        grads, state = [normal(LONG, 1, view.dtype)], pair.init([view.resolve_conj().resolve_neg()])
        assert_right_or_refused(pair, method, (grads, state, params))
        grads, state = [view], pair.init([view.resolve_conj().resolve_neg()])
        params = [normal(LONG, 1, view.dtype)]
        expected = call(pair, method, copied((grads, state, params)), False)
        assert_equal(call(pair, method, (grads, state, params), True), expected)


@each_method
def test_gradients_may_be_the_parameters_themselves(pair, method):
    params = [normal(LONG)]
    state = pair.init(params)
    expected = call(pair, method, copied((params, state, params)), False)
    assert_equal(call(pair, method, (params, state, params), True), expected)


def test_gradients_that_overlap_what_is_only_read_are_replaced(pair):
    memory = normal(LONG + 1)
    grads, params = [memory[1:]], [memory[:-1]]
    state = pair.init(params)
    expected = pair.update(*copied((grads, state, params)))
    before = copied(params)
    assert_equal(pair.update(grads, state, params, inplace=True), expected)
    assert_equal(params, before)


def test_parameters_that_overlap_gradients_are_right_or_refused(pair):
    memory = normal(LONG + 1)
    for grads, params in ([memory[1:]], [memory[:-1]]), ([memory[:-1]], [memory[1:]]):
        assert_right_or_refused(pair, "step", (grads, pair.init(params), params))


@each_method
def test_moments_that_share_memory_are_right(pair, method):
    params, grads = [normal(LONG)], [normal(LONG, 1).abs()]
    memory = normal(LONG + 1, 2).abs()
    for mu, nu in ([memory[1:]], [memory[:-1]]), ([memory[1:]], [memory[1:]]), ([memory[1:]], grads):
        state = pair.init(params)._replace(mu=mu, nu=nu)
        inputs = copied(grads) if nu is not grads else grads, state, copied(params)
        expected = call(pair, method, copied(inputs), False)
        assert_equal(call(pair, method, inputs, True), expected)


@each_method
def test_under_vmap_every_lane_is_overwritten(pair, method):
    many = [torch.stack([normal(3, 10 * lane + i) for lane in range(4)]) for i in range(2)]
    states = vmap(pair.init)(many[1])
    expected = vmap(lambda g, s, p: call(pair, method, (g, s, p), False))(*copied((many[0], states, many[1])))
    actual = vmap(lambda g, s, p: call(pair, method, (g, s, p), True))(many[0], states, many[1])
    assert_equal(actual, expected)
    assert_equal(many[0] if method == "update" else many[1], expected[0])
    assert_equal([states.mu, states.nu], [expected[1].mu, expected[1].nu])


def test_under_vmap_gradients_that_lanes_share_are_replaced(pair):
    g, many = normal(3), normal((4, 3), 1)
    state, before = vmap(pair.init)(many), g.clone()
    expected = vmap(lambda s, p: pair.update(g, s, p))(copied(state), many)
    assert_equal(vmap(lambda s, p: pair.update(g, s, p, inplace=True))(state, many), expected)
    assert torch.equal(g, before)


@pytest.mark.parametrize("transform", [grad, jacfwd])
def test_a_solver_below_the_transforms_may_step_in_place(pair, transform, calls):
    sgd = idf.sgd(0.5, use_accelerated_op=pair.update.use_accelerated_op)

    @idf.custom_root(lambda x, theta: x - theta**2)
    def solve(init, theta):
        x, state = init.clone(), sgd.init(init)
        for _ in range(60):
            x, state = sgd.step(x - theta**2, state, x, inplace=True)
        return x

    theta = torch.tensor([0.3, 0.7], dtype=torch.float64)
    actual = transform(lambda theta: solve(torch.zeros_like(theta), theta).sum())(theta)
    torch.testing.assert_close(actual, 2 * theta)
    assert calls["step"] == (60 if pair.update.use_accelerated_op else 0)


@each_method
def test_tensors_made_in_inference_mode_are_overwritten(pair, method):
    expected = call(pair, method, inputs_of(pair), False)
    with torch.inference_mode():
        inputs = inputs_of(pair)
        assert_equal(call(pair, method, inputs, True), expected)
        # Some that were made in it, and some that were not.
        grads, state, params = inputs_of(pair)
    mixed = copied(grads), state, copied(params)
    with torch.inference_mode():
        assert_equal(call(pair, method, mixed, True), expected)


@pytest.mark.parametrize("flag", [None, False])
def test_a_graph_keeps_its_own_count_when_the_state_is_overwritten_later(flag):
    pair = idf.adam(lr=0.1, eps=0.5, use_accelerated_op=flag)

    def first_gradient(then):
        grads = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
        updates, state = pair.update(grads, pair.init(grads))
        then(pytree.tree_map(torch.Tensor.detach, state))
        return torch.autograd.grad(updates.sum(), grads)[0]

    def overwrite(state):
        pair.update(torch.ones(2, dtype=torch.float64), state, inplace=True)

    torch.testing.assert_close(first_gradient(overwrite), first_gradient(lambda state: None), rtol=0, atol=0)


def test_a_mask_keeps_what_it_leaves_out_when_two_leaves_have_one_gradient():
    shared = torch.tensor([1.0, 2.0])
    pair = optim.masked(optim.scale(-0.1), {"a": True, "b": False})
    grads = {"a": shared, "b": shared}
    updates, _ = pair.update(grads, pair.init(grads), inplace=True)
    torch.testing.assert_close(updates["a"], torch.tensor([-0.1, -0.2]))
    torch.testing.assert_close(updates["b"], torch.tensor([1.0, 2.0]))


def test_updates_may_lie_in_the_memory_of_parameters():
    p = torch.tensor([1.0, 2.0])
    pair = idf.chain(optim.scale(-0.1))
    torch.testing.assert_close(pair.step(p, pair.init(p), p, inplace=True)[0], torch.tensor([0.9, 1.8]))
    a, b = torch.tensor([1.0]), torch.tensor([10.0])
    assert [t.item() for t in idf.apply_updates([a, b], [b, a], inplace=True)] == [11.0, 11.0]
    x = torch.arange(4.0)
    assert idf.apply_updates(x[:3], x[1:], inplace=True).tolist() == [1.0, 3.0, 5.0]


def test_injected_numbers_belong_to_the_state_alone():
    lr = torch.tensor(0.1, dtype=torch.float64)
    pair = optim.inject_hyperparams(idf.sgd)(lr=lr)
    pair.init(torch.ones(1)).hyperparams["lr"].mul_(2)
    assert lr.item() == 0.1 and pair.init(torch.ones(1)).hyperparams["lr"].item() == 0.1
