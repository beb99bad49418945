"""The compiled steps give what the plain formulas give, values and derivatives, and run where they may."""

from __future__ import annotations

import ast
import inspect
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from optimizers import ROWS, each_row
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import implicitdiff as idf
from implicitdiff import _C

pytestmark = pytest.mark.filterwarnings(
    # Of torch itself, when torch.compile first runs.
    "ignore::DeprecationWarning:torch.*",
    "ignore::FutureWarning:torch.*",
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Round one chunk of float32 on the CPU, and every remainder that a vector may leave.
SIZES = [0, 1, 3, 1023, 1024, 1025, 1027]
LARGE = 10**6 + 3
# Enough for results to be written past the caches.
STREAMED = (1 << 21) + 3
STEPS = 4

# The formulas of a kernel and of torch differ in the order of a few operations: by so many units in the last place of
# what is computed in.
ULPS = 32
# Where two such results of full precision are stored in half, rarely one is rounded up and the other one down.
UNEQUALLY_ROUNDED = 0.01
# Derivatives through several steps, by formulas that differ altogether.
THROUGH_STEPS = 1e-9


def _device(name):
    reason = "_C is not built" if name == "cpu" or torch.cuda.is_available() else "no CUDA device"
    return pytest.param(name, marks=pytest.mark.skipif(not idf.accelerated_op_available(name), reason=reason))


each_device = pytest.mark.parametrize("device", [_device("cpu"), _device("cuda")])
each_method = pytest.mark.parametrize("method", ["update", "step"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
needs_cpu = pytest.mark.skipif(not idf.accelerated_op_available("cpu"), reason="_C is not built")

# All that a kernel reads and writes takes part in these: with L2 decay, decoupled, and three moments.
DECAYING = [r for r in ROWS if r.name in ("rmsprop-centered-weight_decay", "adamw-weight_decay-amsgrad")]
# One of every formula, with all of its branches but those of the others.
FEW = [next(row for row in reversed(ROWS) if row.factory is factory) for factory in {row.factory: 0 for row in ROWS}]
some_rows = pytest.mark.parametrize("row", FEW, ids=lambda row: row.name)
decaying_rows = pytest.mark.parametrize("row", DECAYING, ids=lambda row: row.name)


def both(row, **options):
    """The pair that insists on kernels, and the plain one."""
    return [row.factory(**{**row.options, **options}, use_accelerated_op=flag) for flag in (True, False)]


def smooth(row):
    """The same with a large eps. Without, the step of some hardly changes with a gradient: its derivative is noise."""
    return both(row, **({"eps": 0.5} if "eps" in inspect.signature(row.factory).parameters else {}))


def call(pair, method, inputs):
    grads, state, params = inputs
    return getattr(pair, method)(grads, state, params)


def floats(tree):
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor) and x.dtype != torch.int64]


def normal(shape, dtype, device, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def normals(sizes, dtype, device, seed):
    return [normal(n, dtype, device, 100 * seed + i) for i, n in enumerate(sizes)]


def gradients(sizes, dtype, device, step):
    """Gradients with elements that are 0 always, at odd steps, and at even ones; at the first step, one leaf is 0."""
    grads = normals(sizes, dtype, device, 1 + step)
    for g in grads:
        g[2::5] = 0
        g[3 + step % 2 :: 5] = 0
    if step == 0:
        grads[-1].zero_()
    return grads


def inputs_of(pair, sizes, dtype, device, steps):
    """What comes after some steps, at a different number of each leaf."""
    params = normals(sizes, dtype, device, 0)
    state = pair.init(params)
    state = state._replace(count=state.count + 2 * torch.arange(len(sizes), device=device))
    for step in range(steps):
        params, state = pair.step(gradients(sizes, dtype, device, step), state, params)
    return gradients(sizes, dtype, device, steps), state, params


def assert_near(actual, expected, ulps=ULPS):
    """Equal within some units in the last place, of each element or of a typical one: sums may cancel."""
    assert (actual.shape, actual.dtype, actual.device) == (expected.shape, expected.dtype, expected.device)
    if not actual.dtype.is_floating_point and not actual.dtype.is_complex:
        assert torch.equal(actual, expected)
        return
    computed = torch.float32 if actual.dtype in (torch.float16, torch.bfloat16) else actual.dtype.to_real()
    near = ulps * torch.finfo(computed).eps
    sizes = expected.detach()[(expected != 0) & expected.isfinite()].abs().to(computed)
    atol = near * float(sizes.median()) if len(sizes) else 0.0
    if computed is actual.dtype.to_real():
        torch.testing.assert_close(actual, expected, rtol=near, atol=atol, equal_nan=True)
        return
    info = torch.finfo(actual.dtype)
    torch.testing.assert_close(
        actual, expected, rtol=info.eps, atol=atol + info.smallest_normal * info.eps, equal_nan=True
    )
    unequal = (actual != expected) & ~(actual.isnan() & expected.isnan())
    assert unequal.sum() <= UNEQUALLY_ROUNDED * actual.numel()


def assert_all_near(actual, expected, ulps=ULPS):
    actual, spec = pytree.tree_flatten(actual)
    expected, other = pytree.tree_flatten(expected)
    assert spec == other
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_near(a, b, ulps)


@pytest.fixture
def calls(monkeypatch):
    """Counts calls of the compiled functions by name."""
    counts = Counter()

    def counted(module, name):
        def run(*operands):
            counts[name] += 1
            return getattr(module, name)(*operands)

        return run

    for device in "cpu", "cuda":
        module = getattr(_C, device)
        if module is not None:
            monkeypatch.setattr(
                _C,
                device,
                SimpleNamespace(**{**vars(module), "step": counted(module, "step"), "pull": counted(module, "pull")}),
            )
    return counts


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
@pytest.mark.parametrize(["option", "value"], [("eps_root", 1e-2), ("eps", 1.0)])
@each_row
def test_results_and_derivatives_with_a_large_eps_are_those_of_plain_torch(row, option, value, dtype, device):
    if option not in inspect.signature(row.factory).parameters:
        pytest.skip(f"{row.factory.__name__} has no {option}")
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


def same(tensor):
    return tensor


def weighted(pair, method, inputs, used=None, layout=None):
    """A weighted sum of the used results as a function of all gradients, moments and parameters, and these."""
    leaves, spec = pytree.tree_flatten(inputs)
    at = [i for i, x in enumerate(leaves) if x.dtype != torch.int64]
    layouts = layout or [same] * 3
    # Gradients come first and parameters last.
    kinds = [*[0] * len(pytree.tree_leaves(inputs[0])), *[1] * len(floats(inputs[1])), *[2] * len(floats(inputs[2]))]

    def function(*tensors):
        filled = list(leaves)
        for i, kind, tensor in zip(at, kinds, tensors, strict=True):
            filled[i] = layouts[kind](tensor)
        results = floats(call(pair, method, pytree.tree_unflatten(filled, spec)))
        total = 0.0
        for i in range(len(results)) if used is None else used:
            weights = torch.cos(torch.arange(results[i].numel(), device=results[i].device) + i)
            # The sum itself gives its operand a cotangent of stride 0.
            part = results[i] * weights.to(results[i].dtype).reshape(results[i].shape) if i % 2 == 0 else results[i]
            part = torch.view_as_real(part).sum(-1) if part.is_complex() else part
            total = total + part.sum(dtype=torch.float64)
        return total

    return function, [leaves[i] for i in at]


def by_autograd(pair, method, inputs, used=None, layout=None):
    function, tensors = weighted(pair, method, inputs, used, layout)
    tensors = [t.detach().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*tensors), tensors, allow_unused=True, materialize_grads=True)


def by_transform(pair, method, inputs, used=None, layout=None):
    function, tensors = weighted(pair, method, inputs, used, layout)
    return grad(function, argnums=tuple(range(len(tensors))))(*tensors)


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


def trained(pair, theta):
    """What two steps make of parameters when all that enters them depends on theta."""
    params = {"a": theta[:2].sin(), "b": (2 * theta[2:]).cos()}
    state = pair.init(params)
    nothing, *moments = state
    moments = pytree.tree_map(lambda m: m + 0.3 + 0.1 * theta.sum().exp(), moments)
    state = type(state)(nothing + 1, *moments)
    for _ in range(2):
        grads = {"a": params["a"] ** 3 - theta[2], "b": params["b"] * theta[0] + 0.5}
        updates, state = pair.update(grads, state, params)
        params = idf.apply_updates(params, updates)
        params, state = pair.step(grads, state, params)
    return torch.cat([*params.values()])


THETA = torch.tensor([0.3, -0.5, 0.7, 0.2], dtype=torch.float64)
WEIGHTS = torch.tensor([0.7, -1.1, 0.4, 0.9], dtype=torch.float64)


def loss(f):
    return lambda theta: (WEIGHTS.to(theta.device) * f(theta)).sum() + (f(theta) ** 2).sum()


def lanes(theta):
    return torch.stack([theta, 1.1 * theta, theta - 0.05])


def backward_twice(f, theta):
    theta = theta.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(f)(theta), theta, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), theta, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), theta)
    return torch.stack([first.detach(), second.detach(), third])


def cotangents_in_a_batch(f, theta):
    theta = theta.clone().requires_grad_()
    out = f(theta)
    eye = torch.eye(len(out), dtype=out.dtype, device=out.device)
    return torch.autograd.grad(out, theta, eye, is_grads_batched=True)[0]


def dual_numbers(f, theta):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(theta, theta.cos()))).tangent


TRANSFORMS = {
    "value": lambda f, t: f(t),
    "grad": lambda f, t: grad(loss(f))(t),
    "grad of grad": lambda f, t: grad(lambda t: (grad(loss(f))(t) ** 2).sum())(t),
    "backward twice": backward_twice,
    "cotangents in a batch": cotangents_in_a_batch,
    "jacrev": lambda f, t: jacrev(f)(t),
    "jacfwd": lambda f, t: jacfwd(f)(t),
    "jvp": lambda f, t: jvp(f, (t,), (t.cos(),))[1],
    "forward_ad": dual_numbers,
    "vmap": lambda f, t: vmap(f)(lanes(t)),
    "vmap of grad": lambda f, t: vmap(grad(loss(f)))(lanes(t)),
    "grad of vmap": lambda f, t: grad(lambda b: (vmap(f)(b) ** 2).sum())(lanes(t)),
    "hessian": lambda f, t: hessian(loss(f))(t),
}


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


# When kernels run


@each_device
@each_method
@some_rows
def test_a_step_is_one_call_for_all_leaves_and_so_is_its_derivative(row, method, device, calls):
    fast, plain = both(row)
    inputs = inputs_of(plain, [3] * 100, torch.float32, device, 1)
    call(fast, method, inputs)
    assert calls == {"step": 1}
    for derivative in by_autograd, by_transform:
        calls.clear()
        derivative(fast, method, inputs)
        assert calls == {"step": 1, "pull": 1}


@each_device
def test_leaves_of_two_dtypes_are_two_calls(device, calls):
    fast, plain = both(FEW[0])
    inputs = [
        pytree.tree_map(lambda *pair: torch.cat(pair) if pair[0].dtype == torch.int64 else [*pair], *trees)
        for trees in zip(
            *(inputs_of(plain, [3], dtype, device, 1) for dtype in (torch.float32, torch.float64)), strict=True
        )
    ]
    assert_all_near(fast.step(*inputs), plain.step(*inputs))
    assert calls == {"step": 2}


@each_device
def test_kernels_run_by_default_and_can_be_forbidden(device, calls):
    params = torch.ones(3, device=device)
    for flag, count in [(None, 1), (True, 1), (False, 0)]:
        calls.clear()
        pair = idf.adam(use_accelerated_op=flag)
        pair.update(params, pair.init(params), params)
        assert calls["step"] == count


@each_device
def test_derivatives_of_derivatives_take_one_pull_and_then_the_plain_formula(device, calls):
    fast, _ = both(FEW[0])
    x = torch.ones(3, device=device, dtype=torch.float64, requires_grad=True)
    updates, _ = fast.update(x**2, fast.init(x), x)
    (first,) = torch.autograd.grad(updates.sum(), x, create_graph=True)
    assert calls == {"step": 1, "pull": 1}
    first.sum().backward()
    assert calls == {"step": 1, "pull": 1}


@each_device
@pytest.mark.parametrize("transform", ["vmap", "vmap of grad", "jvp", "jacfwd", "forward_ad"])
def test_no_kernel_runs_under(transform, device, calls):
    fast, _ = smooth(FEW[0])
    TRANSFORMS[transform](lambda t: trained(fast, t), THETA.to(device))
    assert not calls


@each_device
@each_method
@some_rows
def test_tracing_takes_no_address(row, method, device, calls):
    fast, plain = both(row)
    inputs = inputs_of(plain, [3, 5], torch.float64, device, 1)
    traced = make_fx(lambda *inputs: call(fast, method, inputs))(*inputs)
    assert not calls
    others = inputs_of(plain, [3, 5], torch.float64, device, 3)
    assert_all_near(traced(*others), call(plain, method, others))


@each_device
@each_method
@some_rows
def test_fake_tensors_have_no_address_that_is_taken(row, method, device, calls):
    fast, plain = both(row)
    inputs = inputs_of(plain, [3, 5], torch.float32, device, 1)
    calls.clear()
    mode = FakeTensorMode()
    fakes = pytree.tree_map_only(torch.Tensor, mode.from_tensor, inputs)
    with mode:
        results = call(fast, method, fakes)
    assert not calls
    assert [(type(t), t.shape, t.dtype) for t in pytree.tree_leaves(results)] == [
        (FakeTensor, t.shape, t.dtype) for t in pytree.tree_leaves(call(plain, method, inputs))
    ]


@each_device
@pytest.mark.filterwarnings("ignore")
def test_compiled_callers_get_the_plain_formula(device, calls):
    torch._dynamo.reset()
    fast, plain = both(FEW[1])
    inputs = inputs_of(plain, [3, 5], torch.float64, device, 1)
    actual = torch.compile(lambda *inputs: fast.update(*inputs), backend="eager")(*inputs)
    assert not calls
    assert_all_near(actual, plain.update(*inputs))


class Meddling(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Recording(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@each_device
@pytest.mark.parametrize("mode", [Meddling, Recording])
def test_a_mode_sees_every_operation_of_a_step(mode, device, calls):
    fast, plain = both(FEW[1])
    inputs = inputs_of(plain, [3], torch.float64, device, 1)
    with mode():
        actual = fast.step(*inputs)
    assert not calls
    assert_all_near(actual, plain.step(*inputs))


class Wrapped(torch.Tensor):
    pass


@each_device
def test_subclasses_of_tensors_are_not_read_at_their_address(device, calls):
    fast, plain = both(FEW[1])
    [g], state, params = inputs_of(plain, [3], torch.float64, device, 1)
    updates, _ = fast.update([g.as_subclass(Wrapped)], state, params)
    assert not calls
    assert type(updates[0]) is Wrapped
    assert_near(updates[0].as_subclass(torch.Tensor), plain.update([g], state, params)[0][0])


@each_device
def test_kernels_run_in_inference_mode(device, calls):
    fast, plain = both(FEW[1])
    inputs = inputs_of(plain, [3], torch.float32, device, 1)
    with torch.inference_mode():
        assert_all_near(fast.step(*inputs), plain.step(*inputs))
    assert calls == {"step": 1}


# Hyper-parameters


@each_device
@pytest.mark.parametrize("name", ["lr", "weight_decay", "eps"])
def test_a_learnable_number_is_refused_only_if_kernels_are_insisted_on(name, device):
    params, g = (
        torch.ones(3, dtype=torch.float64, device=device),
        torch.full((3,), 0.5, dtype=torch.float64, device=device),
    )

    def stepped(number, flag):
        pair = idf.adamw(**{name: number}, use_accelerated_op=flag)
        return pair.step(g, pair.init(params), params)[0].sum()

    number = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=f"use_accelerated_op=True, but {name} is a tensor"):
        stepped(number, True)
    with pytest.raises(ValueError, match=f"use_accelerated_op=True, but {name} is a tensor"):
        grad(lambda x: stepped(x, True))(number.detach())
    for flag in None, False:
        assert torch.autograd.gradcheck(lambda x, flag=flag: stepped(x, flag), number)
    torch.testing.assert_close(grad(lambda x: stepped(x, None))(number), grad(lambda x: stepped(x, False))(number))


@each_device
def test_a_tensor_that_is_only_a_number_is_given_to_kernels(device, calls):
    params = torch.ones(3, device=device)
    fast, plain = (idf.adamw(torch.tensor(0.1), use_accelerated_op=flag) for flag in (True, False))
    inputs = params, fast.init(params), params
    assert_all_near(fast.step(*inputs), plain.step(*inputs))
    assert calls == {"step": 1}


@each_device
def test_schedules_are_given_to_kernels(device, calls):
    params = torch.ones(3, device=device)
    fast, plain = (idf.adam(lambda count: 0.1 / (1 + count), use_accelerated_op=flag) for flag in (True, False))
    state = fast.init(params)
    for _ in range(3):
        actual, expected = (pair.update(params, state, params) for pair in (fast, plain))
        assert_all_near(actual, expected)
        state = actual[1]
    assert calls == {"step": 3}


# What is refused


@pytest.mark.parametrize("flag", [True, None, False])
@pytest.mark.parametrize(
    "wrong",
    [lambda t: t.double(), lambda t: t.half(), lambda t: t.to("meta"), lambda t: t[:1], lambda t: t.reshape(1, -1)],
    ids=["double", "half", "device", "size", "shape"],
)
@pytest.mark.parametrize("place", ["mu", "nu", "params"])
@each_method
def test_leaves_that_do_not_match_the_gradients_are_refused_by_name(method, place, wrong, flag):
    if flag and not idf.accelerated_op_available("cpu"):
        pytest.skip("_C is not built")
    pair = idf.adam(weight_decay=0.1, use_accelerated_op=flag)
    params = {"x": torch.ones(2), "y": torch.ones(3)}
    grads, state = {"x": torch.ones(2), "y": torch.ones(3)}, pair.init(params)
    if place == "params":
        params = params | {"y": wrong(params["y"])}
    else:
        tree = getattr(state, place)
        state = state._replace(**{place: tree | {"y": wrong(tree["y"])}})
    name = place if place == "params" else f"state.{place}"
    with pytest.raises(ValueError, match=rf"^adam: {name}\['y'\] is .* but grads is float32\[3\] on cpu"):
        getattr(pair, method)(grads, state, params)


def test_gradients_of_integers_are_refused_by_name():
    pair = idf.adam()
    params = [torch.ones(2), torch.ones(2, dtype=torch.int64)]
    with pytest.raises(TypeError, match=r"adam: grads\[1\] is int64\[2\] on cpu"):
        pair.update(params, pair.init(params), params)


@needs_cpu
def test_devices_without_kernels_are_refused_only_if_kernels_are_insisted_on():
    params = torch.ones(3, device="meta")
    for flag in None, False:
        pair = idf.adam(use_accelerated_op=flag)
        assert pair.step(params, pair.init(params), params)[0].device.type == "meta"
    pair = idf.adam(use_accelerated_op=True)
    with pytest.raises(ValueError, match="use_accelerated_op=True, but there is no compiled step for meta"):
        pair.step(params, pair.init(params), params)


def test_without_the_extension_kernels_cannot_be_insisted_on(monkeypatch):
    monkeypatch.setattr(_C, "cpu", None)
    monkeypatch.setattr(_C, "cuda", None)
    for row in FEW:
        with pytest.raises(RuntimeError, match=rf"{row.factory.__name__}: .*_C was not built"):
            row.factory(use_accelerated_op=True)
        pair = row.factory()
        params = torch.ones(3)
        pair.step(params, pair.init(params), params)
    assert not idf.accelerated_op_available("cpu")


@each_device
def test_available_kernels_are_those_of_four_dtypes(device):
    assert all(idf.accelerated_op_available(device, dtype) for dtype in DTYPES)
    assert idf.accelerated_op_available(torch.device(device))
    for dtype in torch.complex64, torch.int64, torch.bool, torch.float8_e5m2:
        assert not idf.accelerated_op_available(device, dtype)


@needs_cpu
def test_available_kernels_are_those_of_the_default_device_if_none_is_named():
    assert idf.accelerated_op_available()
    with torch.device("meta"):
        assert not idf.accelerated_op_available()
    assert not idf.accelerated_op_available("meta")
    assert not idf.accelerated_op_available("cuda") or torch.cuda.is_available()


# Threads


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [[LARGE], [1027] * 100, [0, 70000, 1, 33000, 0, 50001]], ids=["one", "many", "mixed"])
def test_numbers_do_not_depend_on_the_threads(sizes, dtype, threads):
    row = next(row for row in ROWS if row.name == "adamw-weight_decay-amsgrad")
    fast, plain = both(row)
    inputs = inputs_of(plain, sizes, dtype, "cpu", 1)
    results = []
    for count in 1, 2, 3:
        threads(count)
        results.append(pytree.tree_leaves([fast.step(*inputs), by_autograd(fast, "step", inputs)]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# The compiled modules themselves


MODULES = [
    pytest.param(module, id=name, marks=pytest.mark.skipif(module is None, reason=f"_C is not built for {name}"))
    for name, module in [("cpu", _C.cpu), ("cuda", _C.cuda)]
]
# Adam reads g, p, base and 2 moments, and writes 3 tensors; its pullback reads 2 + 2 + 3 and writes 4. None of these
# addresses can be read.
NOWHERE = 8
RIGHT = {"name": "adam", "numbers": [0.1] * 8, "dtype": "float32", "sizes": [3, 3], "which": [0, 1], "count": NOWHERE}
WRONG = {
    "name": {"name": "adam_"},
    "no name": {"name": ""},
    "dtype": {"dtype": "float"},
    "unsupported dtype": {"dtype": "int64"},
    "too few numbers": {"numbers": [0.1] * 7},
    "too many numbers": {"numbers": [0.1] * 9},
    "a negative size": {"sizes": [3, -3]},
    "a negative index": {"which": [0, -1]},
    "too few indices": {"which": [0]},
    "too many sizes": {"sizes": [3, 3, 3]},
    "no counts": {"count": 0},
    "too few addresses": {"addresses": -1},
    "too many addresses": {"addresses": 1},
    "no addresses": {"addresses": -100},
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(["function", "operands"], [("step", 8), ("pull", 11)])
@pytest.mark.parametrize("module", MODULES)
def test_the_module_refuses_before_it_touches_memory(module, function, operands, wrong):
    given = RIGHT | WRONG[wrong]
    addresses = [NOWHERE] * max(0, 2 * operands + given.pop("addresses", 0))
    with pytest.raises(ValueError):
        getattr(module, function)(*given.values(), addresses, 1)


@pytest.mark.parametrize(["function", "operands"], [("step", 8), ("pull", 11)])
@pytest.mark.parametrize("module", MODULES)
def test_the_module_touches_nothing_where_there_is_nothing(module, function, operands):
    right = RIGHT | {"sizes": [], "which": []}
    assert getattr(module, function)(*right.values(), [], 1) is None
    # Without elements no address is read either.
    right = RIGHT | {"sizes": [0, 0]}
    assert getattr(module, function)(*right.values(), [NOWHERE] * (2 * operands), 1) is None


@pytest.mark.parametrize("module", MODULES)
def test_the_module_refuses_arguments_of_other_types(module):
    with pytest.raises(TypeError):
        module.step("adam", [0.1] * 8, "float32", [3])
    with pytest.raises(TypeError):
        module.step("adam", "numbers", "float32", [3], [0], NOWHERE, [NOWHERE] * 8, 1)


@pytest.mark.parametrize("module", MODULES)
def test_the_stub_has_the_signatures_of_the_module(module):
    # pybind11 begins a docstring with the signature.
    built = [inspect.getdoc(f).splitlines()[0] for name, f in vars(module).items() if not name.startswith("_")]
    stub = Path(_C.__file__).with_name(module.__name__.rpartition(".")[2] + ".pyi").read_text()
    assert parameters("".join(f"def {line}: ...\n" for line in built)) == parameters(stub)


def parameters(source):
    """The names of the parameters of each function, in their order."""
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return {f.name: [a.arg for a in f.args.args] for f in functions}


@pytest.mark.parametrize("flag", [None, False])
def test_accumulated_gradients_of_parameters_that_are_stepped_do_not_share_memory(flag):
    pair = idf.sgd(lr=0.1, use_accelerated_op=flag)
    params = {k: torch.ones(3, requires_grad=True) for k in "ab"}

    def loss():
        new, _ = pair.step({k: torch.ones(3) for k in params}, pair.init(params), params)
        return ((new["a"] + new["b"]).exp() * torch.arange(3.0)).sum()

    (expected,) = torch.autograd.grad(loss(), [params["a"]])
    for _ in range(2):
        loss().backward()
    for p in params.values():
        torch.testing.assert_close(p.grad, 2 * expected)


@pytest.mark.parametrize("flag", [None, False])
def test_a_graph_keeps_the_numbers_of_its_step(flag):
    lr = torch.tensor(0.1)
    pair = idf.sgd(lr=lr, use_accelerated_op=flag)
    g = torch.ones(2, requires_grad=True)
    updates, _ = pair.update(g, pair.init(g))
    if flag is None:  # autograd refuses this where it saved the number itself
        lr.fill_(7.0)
    torch.testing.assert_close(torch.autograd.grad(updates.sum(), g)[0], torch.full((2,), -0.1))


def test_a_converted_count_is_refused():
    pair = idf.adam()
    params = torch.ones(3, dtype=torch.float64)
    state = pair.init(params)
    with pytest.raises(TypeError, match=r"adam: state.count is torch.float64; it has to stay int64"):
        pair.update(params, state._replace(count=state.count.double()))


@pytest.mark.parametrize("flag", [None, False])
def test_checkpointing_by_torch_recomputes_a_step(flag):
    pair = idf.adam(lr=0.1, eps=0.3, use_accelerated_op=flag)
    w = torch.tensor([1.0, 2.0], requires_grad=True)

    def stepped(w):
        return pair.update(w**3, pair.init(w))[0].sum()

    expected = torch.autograd.grad(stepped(w), w)
    actual = torch.autograd.grad(checkpoint(stepped, w, use_reentrant=False), w)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("flag", [None, False])
def test_a_parameter_may_be_changed_after_its_step(flag):
    pair = idf.sgd(lr=0.1, use_accelerated_op=flag)
    g, p = torch.ones(2, requires_grad=True), torch.ones(2)
    new, _ = pair.step(g, pair.init(p), p)
    p.add_(1)
    torch.testing.assert_close(torch.autograd.grad(new.sum(), g)[0], torch.full((2,), -0.1))
