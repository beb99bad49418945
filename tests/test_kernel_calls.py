"""Where compiled steps run, where they may not, and what they refuse."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from textwrap import indent

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
    inputs_of,
    smooth,
    some_rows,
    trained,
)
from tables.optimizers import ROWS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import grad
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
    with pytest.raises(ValueError, match=f"use_accelerated_op=True, but .* {name} is a tensor"):
        stepped(number, True)
    with pytest.raises(ValueError, match=f"use_accelerated_op=True, but .* {name} is a tensor"):
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
    with pytest.raises(TypeError, match=r"adam: grads\[1\] must be .* got int64\[2\] on cpu"):
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
    stub = Path(_C.__file__).with_name(module.__name__.rpartition(".")[2] + ".pyi").read_text()
    assert parameters(signatures(module)) == parameters(stub)


def signatures(scope):
    """The definitions of the functions and the classes of a module, or of the methods of a class."""
    names = [name for name in vars(scope) if not name.startswith("_") or name == "__init__"]
    return "".join(definition(name, getattr(scope, name)) for name in names)


def definition(name, item):
    if inspect.isclass(item):
        return f"class {name}:\n" + indent(signatures(item), "    ")
    # pybind11 begins a docstring with the signature.
    return f"def {inspect.getdoc(item).splitlines()[0]}: ...\n"


def parameters(source):
    """The names of the parameters of each function, in their order."""
    body = ast.parse(source).body if isinstance(source, str) else source
    functions = {f.name: [a.arg for a in f.args.args] for f in body if isinstance(f, ast.FunctionDef)}
    methods = {c.name: parameters(c.body) for c in body if isinstance(c, ast.ClassDef) and not c.name.startswith("_")}
    return functions | methods


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
    with pytest.raises(TypeError, match=r"adam: state.count must stay int64"):
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
