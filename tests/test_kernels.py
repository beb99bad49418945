"""The compiled steps give what the plain formulas give, values and derivatives, and run where they may."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from checks.compiled import each_device, each_method, needs_cpu
from tables.kernels import (
    DTYPES,
    FEW,
    LARGE,
    THETA,
    TRANSFORMS,
    assert_all_near,
    assert_near,
    both,
    by_autograd,
    by_transform,
    call,
    floats,
    gradients,
    inputs_of,
    normal,
    same,
    smooth,
    some_rows,
    trained,
)
from tables.optimizers import ROWS, each_row
from torch.func import vmap
from torch.utils import _pytree as pytree

import implicitdiff as idf

pytestmark = pytest.mark.filterwarnings(
    # Of torch itself, when torch.compile first runs.
    "ignore::DeprecationWarning:torch.*",
    "ignore::FutureWarning:torch.*",
)
# Round one chunk of float32 on the CPU, and every remainder that a vector may leave.
SIZES = [0, 1, 3, 1023, 1024, 1025, 1027]
# Enough for results to be written past the caches.
STREAMED = (1 << 21) + 3
STEPS = 4
# Derivatives through several steps, by formulas that differ altogether.
THROUGH_STEPS = 1e-9
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

# All that a kernel reads and writes takes part in these: with L2 decay, decoupled, and three moments.
DECAYING = [r for r in ROWS if r.name in ("rmsprop-centered-weight_decay", "adamw-weight_decay-amsgrad")]
decaying_rows = pytest.mark.parametrize("row", DECAYING, ids=lambda row: row.name)
LARGE_EPS = [
    pytest.param(row, option, value, id=f"{row.name}-{option}-{value}")
    for row in ROWS
    for option, value in [("eps_root", 1e-2), ("eps", 1.0)]
    if option in inspect.signature(row.factory).parameters
]


# Values


@each_device
@each_dtype
@each_method
@each_row
def test_results_are_those_of_plain_torch(row, method, dtype, device):
    fast, plain = both(row)
    for sizes in [*([n] for n in SIZES), SIZES]:
        inputs = inputs_of(plain, sizes, dtype, device, 0)
        for step in range(STEPS):
            actual = call(fast, method, inputs)
            assert_all_near(actual, call(plain, method, inputs))
            values, state = actual
            inputs = gradients(sizes, dtype, device, step + 1), state, values if method == "step" else inputs[2]


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(["row", "option", "value"], LARGE_EPS)
def test_results_and_derivatives_with_a_large_eps_are_those_of_plain_torch(row, option, value, dtype, device):
    fast, plain = both(row, **{option: value})
    for steps in 0, STEPS:
        inputs = inputs_of(plain, [3, 1027], dtype, device, steps)
        for method in "update", "step":
            assert_all_near(call(fast, method, inputs), call(plain, method, inputs))
            assert_all_near(*(by_autograd(pair, method, inputs) for pair in (fast, plain)))


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(["name", "size"], [("sgd-momentum-nesterov", LARGE), ("adam-amsgrad", STREAMED)])
def test_results_and_derivatives_of_a_large_leaf_are_those_of_plain_torch(name, size, dtype, device):
    fast, plain = smooth(next(row for row in ROWS if row.name == name))
    inputs = inputs_of(plain, [3, size], dtype, device, 1)
    assert_all_near(fast.step(*inputs), plain.step(*inputs))
    assert_all_near(*(by_autograd(pair, "step", inputs) for pair in (fast, plain)))


@each_device
@each_method
@some_rows
def test_leaves_without_a_gradient_are_left_out(row, method, device):
    fast, plain = both(row)
    grads, state, params = inputs_of(plain, [3, 5, 1027], torch.float32, device, 2)
    inputs = [grads[0], None, grads[2]], state, params
    assert_all_near(call(fast, method, inputs), call(plain, method, inputs))
    inputs = [None] * 3, state, params
    assert_all_near(call(fast, method, inputs), call(plain, method, inputs))


@each_device
@pytest.mark.parametrize("which", ["gradients", "moments", "parameters"])
@each_row
def test_numbers_that_are_not_finite_spread_as_in_plain_torch(row, which, device):
    fast, plain = both(row)
    inputs = inputs_of(plain, [64], torch.float32, device, 2)
    for i, tensor in enumerate(floats(inputs[["gradients", "moments", "parameters"].index(which)])):
        tensor[3 * i : 3 * i + 3] = torch.tensor([math.nan, math.inf, -math.inf])
    for method in "update", "step":
        assert_all_near(call(fast, method, inputs), call(plain, method, inputs))


@each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("lr", [1.0, 1 / 3, 1e-3, 5e4])
def test_every_number_of_half_precision_is_read_and_rounded_as_by_torch(lr, dtype, device):
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
    init, update = idf.sgd(lr, use_accelerated_op=True)
    updates, _ = update(every, init(every))
    assert torch.equal(updates.nan_to_num(nan=7.0), (-lr * every.float()).to(dtype).nan_to_num(nan=7.0))
    assert torch.equal(updates.isnan(), every.isnan())


@each_device
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=["complex64", "complex128"])
@each_method
@each_row
def test_complex_parameters_are_pairs_of_reals_as_in_torch(row, method, dtype, device):
    fast, _ = both(row)
    param = torch.nn.Parameter(normal(7, dtype, device, 0))
    optimizer = row.reference([param], **row.options)
    params = param.detach().clone()
    state = fast.init(params)
    for step in range(STEPS):
        param.grad = normal(7, dtype, device, 1 + step) + 1j * normal(7, dtype, device, 9 + step)
        optimizer.step()
        # The same numbers, as a view that is not laid out as it reads.
        values, state = call(fast, method, (param.grad.conj().resolve_conj().conj(), state, params))
        params = values if method == "step" else idf.apply_updates(params, values)
        assert_near(params, param.detach())


@each_device
@each_method
@each_row
def test_derivatives_of_complex_steps_are_those_of_plain_torch(row, method, device):
    fast, plain = both(row)
    params = normal(7, torch.complex128, device, 0) * (1 + 2j)
    state = plain.init(params)
    for step in range(3):
        params, state = plain.step(normal(7, torch.complex128, device, 1 + step) * (2 - 1j), state, params)
    inputs = normal(7, torch.complex128, device, 8) * (1 + 1j), state, params
    for derivative in by_autograd, by_transform:
        assert_all_near(*(derivative(pair, method, inputs) for pair in (fast, plain)))


# First derivatives


@each_device
@each_dtype
@each_method
@each_row
def test_derivatives_are_those_of_plain_torch(row, method, dtype, device):
    fast, plain = both(row)
    inputs = inputs_of(plain, [0, 1, 1027], dtype, device, STEPS)
    results = len(floats(call(plain, method, inputs)))
    columns = [range(i, i + 3) for i in range(0, results, 3)]
    # All results, those of one column, and those of one leaf: the others have no cotangent.
    for used in [None, *columns, [results - 1]]:
        assert_all_near(*(by_autograd(pair, method, inputs, used) for pair in (fast, plain)))
    assert_all_near(*(by_transform(pair, method, inputs) for pair in (fast, plain)))


@each_device
@each_dtype
@each_row
def test_derivatives_at_the_first_step_are_those_of_plain_torch(row, dtype, device):
    fast, plain = smooth(row)
    inputs = inputs_of(plain, [1, 3, 1027], dtype, device, 0)
    for method in "update", "step":
        assert_all_near(*(by_autograd(pair, method, inputs) for pair in (fast, plain)))


@each_device
@each_row
def test_derivatives_where_all_gradients_were_zero_are_those_of_plain_torch(row, device):
    fast, plain = both(row)
    zeros = [torch.zeros(5, dtype=torch.float64, device=device)]
    for steps in 0, 2:
        state = plain.init(zeros)
        for _ in range(steps):
            _, state = plain.update(zeros, state, zeros)
        for derivative in by_autograd, by_transform:
            actual, expected = (derivative(pair, "step", (zeros, state, zeros)) for pair in (fast, plain))
            assert all(t.isfinite().all() for t in expected)
            assert_all_near(actual, expected)


@each_device
@each_row
def test_derivatives_are_those_of_finite_differences(row, device):
    fast, plain = smooth(row)
    inputs = inputs_of(plain, [4], torch.float64, device, 3)
    leaves, spec = pytree.tree_flatten(inputs)
    at = [i for i, x in enumerate(leaves) if x.dtype != torch.int64]

    def function(*tensors):
        filled = list(leaves)
        for i, t in zip(at, tensors, strict=True):
            filled[i] = t
        return tuple(floats(fast.step(*pytree.tree_unflatten(filled, spec))))

    # Off the kinks at a gradient of 0.
    tensors = [(leaves[i] + 0.1 * (leaves[i] == 0)).detach().requires_grad_() for i in at]
    assert torch.autograd.gradcheck(function, tensors)


def transposed(x):
    return x.t().contiguous().t()


def every_other(x):
    return torch.stack([x, x], -1)[..., 0]


def offset(x):
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].reshape(x.shape)


def negated(x):
    view = torch.imag(torch.complex(torch.zeros_like(x), -x).conj())
    assert view.is_neg()
    return view


def expanded(x):
    return x[:1].expand(x.shape)


LAYOUTS = {
    "transposed": ((5, 7), transposed),
    "channels last": ((2, 3, 4, 5), lambda x: x.contiguous(memory_format=torch.channels_last)),
    "every other": ((33,), every_other),
    "offset": ((1027,), offset),
    "offset and transposed": ((5, 7), lambda x: offset(x.t()).t()),
    "negated": ((33,), negated),
    "negated and transposed": ((5, 7), lambda x: transposed(negated(x))),
    "expanded": ((4, 9), expanded),
    "0-dim": ((), lambda x: torch.stack([x, x])[1]),
    "reversed dimensions": ((2, 3, 4), lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0)),
}


@each_device
@pytest.mark.parametrize("layout", LAYOUTS)
@decaying_rows
def test_any_layout_of_any_operand_gives_the_results_of_plain_torch(row, layout, device):
    fast, plain = both(row)
    shape, strange = LAYOUTS[layout]
    dtype = torch.float32
    params = normal(shape, dtype, device, 0)
    state = plain.init(params)
    for step in range(3):
        params, state = plain.step(normal(shape, dtype, device, 1 + step), state, params)
    inputs = normal(shape, dtype, device, 8), state, params
    for layouts in [[strange] * 3, [strange, same, same], [same, strange, same], [same, same, strange]]:
        laid = [
            pytree.tree_map(lambda t, lay=lay: t if t.dtype == torch.int64 else lay(t), tree)
            for lay, tree in zip(layouts, inputs, strict=True)
        ]
        for method in "update", "step":
            assert_all_near(call(fast, method, laid), call(plain, method, laid))
            for derivative in by_autograd, by_transform:
                assert_all_near(*(derivative(pair, method, inputs, layout=layouts) for pair in (fast, plain)))


# Derivatives of several steps, and what the kernels leave to the plain formula


# What goes beyond the first derivative is the plain formula's, whatever the options.
EVERYWHERE = ["grad of grad"]


@each_device
@pytest.mark.parametrize(
    ["row", "transform"],
    [
        pytest.param(row, transform, id=f"{row.name}-{transform}")
        for row in ROWS
        for transform in (TRANSFORMS if row in FEW else EVERYWHERE)
    ],
)
def test_transforms_of_several_steps_give_what_they_give_in_plain_torch(row, transform, device):
    fast, plain = smooth(row)
    theta = THETA.to(device)
    actual, expected = (TRANSFORMS[transform](lambda t, p=pair: trained(p, t), theta) for pair in (fast, plain))
    assert expected.isfinite().all() and expected.abs().max() > 0
    torch.testing.assert_close(actual, expected, rtol=THROUGH_STEPS, atol=THROUGH_STEPS)


@needs_cpu
def test_derivatives_of_kernels_pass_gradcheck_to_second_order():
    fast, _ = smooth(next(row for row in ROWS if row.name == "adamw-weight_decay-amsgrad"))
    theta = THETA.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: trained(fast, t), theta, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda t: trained(fast, t), theta)


@each_device
@pytest.mark.parametrize("batched", ["grads", "moments", "params", "count", "nothing"])
@decaying_rows
def test_under_vmap_some_operands_may_be_shared(row, batched, device):
    fast, plain = both(row)
    [g], state, [p] = inputs_of(plain, [5], torch.float64, device, 2)
    (count, *moments), rest = [state.count, *floats(state)], pytree.tree_structure(state)
    operands = {"grads": [g], "moments": moments, "params": [p], "count": [count], "nothing": [g[0]]}
    stacked = [torch.stack([t, t + 1, t + 2]) for t in operands[batched]]

    def stepped(pair, given):
        values = operands | {batched: given}
        state = pytree.tree_unflatten([*values["count"], *values["moments"]], rest)
        return pair.step(values["grads"], state, values["params"])

    actual = vmap(lambda given: stepped(fast, given))(stacked)
    for i in range(3):
        assert_all_near(pytree.tree_map(lambda t, i=i: t[i], actual), stepped(plain, [s[i] for s in stacked]))
