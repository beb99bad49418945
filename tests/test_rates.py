"""A number for each leaf, or for each element, in the place of a hyper-parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks.compiled import needs_cpu
from tables.optimizers import ROWS, Row

import implicitdiff as idf
import implicitdiff.optim as optim

F64, F32 = torch.float64, torch.float32
SHAPES = {"a": (2, 3), "b": (3,), "c": ()}

Hyper = dict[str, Any]

# Two values of each hyper-parameter that is a number.
NUMBERS: dict[str, tuple[float, float]] = {
    "lr": (0.05, 0.2),
    "momentum": (0.9, 0.5),
    "dampening": (0.1, 0.3),
    "weight_decay": (0.1, 0.02),
    "eps": (0.1, 0.01),
    "alpha": (0.9, 0.6),
    "rho": (0.9, 0.6),
    "lr_decay": (0.1, 0.3),
    "initial_accumulator_value": (0.1, 0.4),
}
BETAS = ((0.9, 0.95), (0.5, 0.8))
_TAKEN: dict[Any, list[str]] = {
    idf.sgd: ["lr", "momentum", "dampening", "weight_decay"],
    idf.adam: ["lr", "betas", "eps", "weight_decay"],
    idf.adamw: ["lr", "betas", "eps", "weight_decay"],
    idf.rmsprop: ["lr", "alpha", "eps", "weight_decay", "momentum"],
    idf.adagrad: ["lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"],
    idf.adadelta: ["lr", "rho", "eps", "weight_decay"],
    idf.adamax: ["lr", "betas", "eps", "weight_decay"],
    idf.radam: ["lr", "betas", "eps", "weight_decay"],
}
CASES = [(row, key) for row in ROWS if not row.options for key in _TAKEN[row.factory]]
each_case = pytest.mark.parametrize(("row", "key"), CASES, ids=[f"{row.name}{key}" for row, key in CASES])


def drawn(seed: int, dtype: torch.dtype = F64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(shape, dtype=F64, generator=generator).to(dtype) for k, shape in SHAPES.items()}


def others(row: Row, key: str) -> Hyper:
    """What makes the hyper-parameter matter."""
    return {"momentum": 0.9} if key == "dampening" else {}


def values(key: str) -> tuple[Any, Any]:
    return BETAS if key == "betas" else NUMBERS[key]


def given(key: str, spread: Callable[[float, float], Any]) -> Hyper:
    """The hyper-parameter, made of its two values."""
    one, other = values(key)
    if key == "betas":
        return {key: tuple(spread(x, y) for x, y in zip(one, other, strict=True))}
    return {key: spread(one, other)}


def run(pair: idf.GradientTransformation, params: Any, grads_of: Callable[[int], Any], steps: int = 4) -> Any:
    state = pair.init(params)
    for k in range(steps):
        params, state = pair.step(grads_of(k), state, params)
    return params


@pytest.mark.parametrize("dtype", [F64, F32])
@each_case
def test_a_number_for_each_leaf_is_an_optimizer_of_torch_for_each(row, key, dtype):
    start = drawn(0, dtype)
    one, other = values(key)
    groups = {k: torch.nn.Parameter(p.clone()) for k, p in start.items()}
    # One optimizer each: torch's Adagrad has one initial value for all groups.
    references = [
        row.reference([p], **others(row, key), **{key: one if k == "a" else other}) for k, p in groups.items()
    ]
    for step in range(4):
        for k, g in drawn(step + 1, dtype).items():
            groups[k].grad = g
        for reference in references:
            reference.step()
    for accelerated in (None, False):
        hyper = given(key, lambda x, y: {"a": x, "b": y, "c": y})
        hyper = {"lr": references[0].defaults["lr"], **others(row, key), **hyper}
        pair = row.factory(**hyper, use_accelerated_op=accelerated)
        ended = run(pair, start, lambda step: drawn(step + 1, dtype))
        torch.testing.assert_close(ended, {k: p.detach() for k, p in groups.items()})


@pytest.mark.parametrize("complex_", [False, True])
@each_case
def test_a_number_for_each_element_is_a_run_for_each(row, key, complex_):
    def leaf(seed: int) -> torch.Tensor:
        values = drawn(seed)["a"]
        return torch.complex(values, values.flip(0)) if complex_ else values

    choice = torch.tensor([[True, False, True], [False, True, False]])
    made = [row.factory(**others(row, key), **given(key, lambda x, y, n=n: (x, y)[n])) for n in range(2)]
    ends = [run(pair, leaf(0), lambda step: leaf(step + 1)) for pair in made]
    elementwise = given(key, lambda x, y: torch.where(choice, torch.tensor(x, dtype=F64), torch.tensor(y, dtype=F64)))
    pair = row.factory(**others(row, key), **elementwise)
    expected = torch.where(choice, *ends)
    torch.testing.assert_close(run(pair, leaf(0), lambda step: leaf(step + 1)), expected)
    # In place, and beside leaves of other kinds.
    tree, state = {"a": leaf(0), "n": torch.tensor(1)}, pair.init({"a": leaf(0), "n": torch.tensor(1)})
    for step in range(4):
        tree, state = pair.step({"a": leaf(step + 1), "n": None}, state, tree, inplace=True)
    torch.testing.assert_close(tree["a"], expected)


@each_case
def test_numbers_for_leaves_and_elements_are_learned(row, key):
    start, weight = drawn(0), drawn(9)
    leaves = given(key, lambda x, y: {"a": torch.full((2, 3), x, dtype=F64), "b": torch.tensor(y, dtype=F64), "c": x})

    def end(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        def put(tree: Any) -> Any:
            return tree | {"a": tree["a"] + a, "b": tree["b"] + b}

        hyper = {k: tuple(map(put, v)) if key == "betas" else put(v) for k, v in leaves.items()}
        ended = run(row.factory(**others(row, key), **hyper), start, lambda step: drawn(step + 1))
        return sum((ended[k] * weight[k]).sum() for k in SHAPES)

    zeros = torch.zeros(2, 3, dtype=F64), torch.zeros((), dtype=F64)
    got = torch.func.grad(end, argnums=(0, 1))(*zeros)
    step = 1e-5
    for which, zero in enumerate(zeros):
        expected = torch.zeros_like(zero)
        for at in range(zero.numel()):
            shift = torch.zeros_like(zero)
            shift.view(-1)[at] = step
            ahead, behind = ([s * shift if n == which else z for n, z in enumerate(zeros)] for s in (1, -1))
            expected.view(-1)[at] = (end(*ahead) - end(*behind)) / (2 * step)
        torch.testing.assert_close(got[which], expected, rtol=1e-6, atol=1e-8)


def test_prefixes_lists_and_broadcast_tensors():
    params = {"net": [torch.ones(2, 3), torch.ones(3)], "head": (torch.ones(()),)}
    rows = torch.tensor([[0.1], [0.2]])
    pair = idf.sgd({"net": [rows, 0.3], "head": 0.4})
    ended = run(pair, params, lambda k: params, steps=1)
    torch.testing.assert_close(ended["net"][0], 1 - rows.expand(2, 3))
    torch.testing.assert_close([ended["net"][1], ended["head"][0]], [torch.full((3,), 0.7), torch.tensor(0.6)])
    ended = run(idf.sgd({"net": rows.new_tensor([0.1, 0.2, 0.3]), "head": 0.0}), params, lambda k: params, steps=1)
    torch.testing.assert_close(ended["net"][1], torch.tensor([0.9, 0.8, 0.7]))


@needs_cpu
def test_the_compiled_step_takes_numbers_for_leaves_and_refuses_elements():
    params = {"a": torch.ones(2), "b": torch.ones(2)}
    insists = idf.adam({"a": 0.1, "b": 0.2}, use_accelerated_op=True)
    assert run(insists, params, lambda k: params, steps=1)["b"][0] == pytest.approx(0.8)
    with pytest.raises(ValueError, match="lr is a tensor of several numbers"):
        run(idf.adam(torch.tensor([0.1, 0.2]), use_accelerated_op=True), params, lambda k: params)


def test_schedules_for_leaves_and_values_that_live_in_the_state():
    params, half = {"a": torch.ones(2), "b": torch.ones(2)}, idf.schedule.exponential(0.4, 0.5)
    ended = run(idf.sgd({"a": half, "b": 0.1}), params, lambda k: params, steps=2)
    torch.testing.assert_close(ended, {"a": torch.full((2,), 0.4), "b": torch.full((2,), 0.8)})
    init, update = optim.inject_hyperparams(idf.sgd)(lr={"a": 0.5, "b": torch.tensor([0.1, 0.2])})
    state = init(params)
    assert state.hyperparams["lr"]["b"].dtype == F64
    state = state._replace(hyperparams={"lr": {**state.hyperparams["lr"], "a": torch.tensor(1.0)}})
    torch.testing.assert_close(update(params, state)[0], {"a": -torch.ones(2), "b": -torch.tensor([0.1, 0.2])})


def test_scale_and_decay_take_trees():
    params = {"a": torch.ones(2), "b": torch.ones(2)}
    rates = {"a": 0.1, "b": torch.tensor([0.2, 0.3])}
    pair = idf.chain(optim.add_decayed_weights(rates), optim.scale({"a": -1.0, "b": -2.0}))
    updates = pair.update(params, pair.init(params), params)[0]
    torch.testing.assert_close(updates, {"a": torch.full((2,), -1.1), "b": torch.tensor([-2.4, -2.6])})


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_vmapped_and_meta_rates(dtype):
    params, rates = torch.ones(2, dtype=dtype), torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    ended = torch.vmap(lambda lr: run(idf.sgd(lr), params, lambda k: params, steps=1))(rates)
    torch.testing.assert_close(ended, (1 - rates).to(dtype), rtol=1e-2, atol=0)


def test_a_module_learns_a_rate_for_each_element():  # Meta-SGD, Li et al. 2017: w - alpha * g
    net, x = torch.nn.Linear(2, 1).double(), torch.tensor([[1.0, 2.0]], dtype=F64)
    rates = {"weight": torch.tensor([[0.1, 0.2]], dtype=F64, requires_grad=True), "bias": 0.3}
    inner = idf.MetaSGD(net, lr=rates)
    start = idf.extract_state_dict(net)
    residual = net(x).detach()
    inner.step((net(x) ** 2).sum() / 2)
    ended = net(x)
    torch.testing.assert_close(ended, residual * (1 - (0.1 + 0.2 * 4 + 0.3)))
    ended.sum().backward()
    torch.testing.assert_close(rates["weight"].grad, -residual * x**2)
    idf.recover_state_dict(net, start)


BAD: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], type[Exception], str]] = {
    "out of range": (lambda p: idf.sgd({"a": 0.1, "b": -0.2}), ValueError, r"sgd: lr\['b'\] must be a finite number"),
    "no number": (
        lambda p: idf.adam(betas=([0.9, "x"], 0.9)),
        TypeError,
        r"adam: betas\[0\]\[1\] must be a number.*got 'x'",
    ),
    "integers": (lambda p: idf.adam([torch.tensor(1)]), ValueError, r"adam: lr\[0\] must be of floating point"),
    "nested otherwise": (
        lambda p: run(idf.adam({"a": 0.1, "z": 0.2}), p, lambda k: p),
        ValueError,
        "adam: lr must be one for all leaves, or nested like the parameters.*'a'|lr must be one.*a: 0.1, z: 0.2",
    ),
    "of another shape": (
        lambda p: run(idf.adam(betas=(torch.full((3,), 0.9), 0.9)), p, lambda k: p),
        ValueError,
        r"adam: betas\[0\] must be a scalar or broadcast .*, got shape \[3\] for the leaf\['a'\] of shape \[2\]",
    ),
    "larger than the leaf": (
        lambda p: run(idf.sgd(torch.ones(4, 2)), p, lambda k: p),
        ValueError,
        r"lr must be a scalar or broadcast .*, got shape \[4, 2\]",
    ),
    "none for a leaf": (
        lambda p: run(idf.sgd({"a": 0.1, "b": None}), p, lambda k: p),
        ValueError,
        r"sgd: lr\['b'\] must not be None where grads\['b'\] is a tensor",
    ),
}


@pytest.mark.parametrize(("call", "error", "match"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_named(call, error, match):
    with pytest.raises(error, match=match):
        call({"a": torch.ones(2), "b": torch.ones(2)})


def test_none_stands_for_what_is_not_optimized():
    params = {"a": torch.ones(2), "b": torch.ones(2)}
    pair = idf.adam({"a": 0.1, "b": None})
    after, _ = pair.step({"a": torch.ones(2), "b": None}, pair.init(params), params)
    assert after["b"] is params["b"]


def test_rates_are_traced_by_torch_compile():
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    pair = idf.adam({"a": torch.tensor([0.1, 0.2]), "b": 0.3})

    def step(grads: Any, state: Any, params: Any) -> Any:
        return pair.step(grads, state, params)[0]

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(params, pair.init(params), params), step(params, pair.init(params), params))
