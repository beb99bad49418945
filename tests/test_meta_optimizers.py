"""Meta-optimizers beside the pure functions, and meta-gradients beside central differences."""

from __future__ import annotations

import gc
import inspect
import weakref
from typing import Any

import pytest
import torch
from tables.meta_fronts import F64, FRONTS, data, each_kin, each_row, inputs, net_of
from torch import Tensor, nn
from torch.func import functional_call

import implicitdiff as idf


def by_front(row: Any, start: dict[str, Tensor], lr: Any, weight: Tensor, steps: int = 3, **options: Any) -> Tensor:
    """The loss after a few steps by an object."""
    net = net_of()
    for name, tensor in start.items():
        module, _, key = name.rpartition(".")
        del net.get_submodule(module)._parameters[key]
        net.get_submodule(module)._parameters[key] = tensor
    inner, (x, y) = FRONTS[row.factory](net, **{"lr": lr} | row.options | options), data()
    for _ in range(steps):
        inner.step((weight * (net(x) - y) ** 2).mean())
    return ((net(x) - y) ** 2).mean()


def by_functions(row: Any, start: dict[str, Tensor], lr: Any, weight: Tensor, steps: int = 3) -> Tensor:
    """The same by pure functions under torch.func.grad, with the plain formula."""
    net, (x, y) = net_of(), data()
    pair = row.factory(**{"lr": lr, "use_accelerated_op": False} | row.options)

    def loss(params):
        return (weight * (functional_call(net, params, (x,)) - y) ** 2).mean()

    params = dict(start)
    state = pair.init(params)
    for _ in range(steps):
        updates, state = pair.update(torch.func.grad(loss)(params), state, params)
        params = idf.apply_updates(params, updates)
    return ((functional_call(net, params, (x,)) - y) ** 2).mean()


# --- meta-gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accelerated", [None, False])
@each_row
def test_meta_gradients_are_those_of_the_pure_functions(row, accelerated):
    start, lr, weight = inputs()
    wanted = [*start.values(), lr, weight]
    value = by_front(row, start, lr, weight, use_accelerated_op=accelerated)
    expected = by_functions(row, start, lr, weight)
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
    for found, right in zip(torch.autograd.grad(value, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)


@each_kin
def test_compiled_steps_have_the_meta_gradients_of_plain_ones(row):
    start, _, weight = inputs()
    wanted = [*start.values(), weight]
    # A number as learning rate, so that compiled steps can serve.
    values = [by_front(row, start, 0.05, weight, use_accelerated_op=accelerated) for accelerated in (None, False)]
    torch.testing.assert_close(*values, rtol=1e-14, atol=0)
    for found, right in zip(*[torch.autograd.grad(value, wanted) for value in values], strict=True):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)


@each_kin
def test_meta_gradients_are_central_differences(row):
    start, lr, weight = inputs()
    generator = torch.Generator().manual_seed(3)
    tangents = [torch.randn(t.shape, dtype=F64, generator=generator) for t in [*start.values(), lr, weight]]

    def along(h: float) -> Tensor:
        moved = [t + h * d for t, d in zip([*start.values(), lr, weight], tangents, strict=True)]
        *params, rate, weights = moved
        return by_front(row, dict(zip(start, params, strict=True)), rate, weights)

    h = 1e-4
    # Of fourth order in h: what is left are its rounding, about 1e-12, and the error of a smooth function, h^4.
    difference = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
    grads = torch.autograd.grad(along(0.0), [*start.values(), lr, weight])
    derivative = sum((g * d).sum() for g, d in zip(grads, tangents, strict=True))
    torch.testing.assert_close(derivative, difference.detach(), rtol=1e-7, atol=1e-9)


@each_kin
def test_second_derivatives_of_a_run_are_central_differences_of_first_ones(row):
    start, lr, weight = inputs()

    def slope(lr: Tensor) -> Tensor:
        value = by_front(row, start, lr, weight, steps=2)
        return torch.autograd.grad(value, lr, create_graph=True)[0]

    (second,) = torch.autograd.grad(slope(lr), lr)
    h = 1e-4

    def at(k: int) -> Tensor:
        return slope((lr + k * h).detach().requires_grad_()).detach()

    difference = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * h)
    torch.testing.assert_close(second, difference, rtol=1e-6, atol=1e-8)


def test_a_chain_can_be_learned_through():
    start, lr, _ = inputs()
    net, (x, y) = net_of(), data()
    inner = idf.MetaOptimizer(net, idf.chain(idf.clip_grad_norm(0.3), idf.adam(lr)))
    for _ in range(3):
        inner.step(((net(x) - y) ** 2).mean())
    (found,) = torch.autograd.grad(((net(x) - y) ** 2).mean(), lr)
    pair = idf.chain(idf.clip_grad_norm(0.3), idf.adam(lr))
    params, state, fresh = dict(start), pair.init(start), net_of()
    for _ in range(3):
        grads = torch.func.grad(lambda p: ((functional_call(fresh, p, (x,)) - y) ** 2).mean())(params)
        updates, state = pair.update(grads, state, params)
        params = idf.apply_updates(params, updates)
    (right,) = torch.autograd.grad(((functional_call(fresh, params, (x,)) - y) ** 2).mean(), lr)
    torch.testing.assert_close(found, right, rtol=1e-12, atol=0)


@each_kin
def test_each_kin_takes_the_arguments_of_its_transformation(row):
    front = FRONTS[row.factory]
    assert [*inspect.signature(front).parameters] == ["module", *inspect.signature(row.factory).parameters]
    with pytest.raises(TypeError, match="learning_rate"):
        front(net_of(), learning_rate=0.1)


# --- what does not fit is refused -------------------------------------------------------------------------------------


def test_a_loss_that_depends_on_no_parameter_is_refused():
    net, (x, y) = net_of(), data()
    inner = idf.MetaSGD(net, lr=0.1)
    stale = ((net(x) - y) ** 2).mean()
    inner.step(stale)
    held = [*net.parameters()]
    with torch.no_grad():
        constant = ((net(x) - y) ** 2).mean()
    for loss in (constant, torch.ones((), requires_grad=True), stale):
        with pytest.raises(ValueError, match=r"MetaSGD\.step: the loss depends on none of the parameters"):
            inner.step(loss)
        assert all(p is q for p, q in zip(net.parameters(), held, strict=True))
    for p in net.parameters():
        p.detach_()
    with pytest.raises(ValueError, match="depends on none of the parameters"):
        inner.step(((net(x) - y) ** 2).mean())


def test_what_is_no_module_or_no_transformation_is_refused():
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        idf.MetaSGD([torch.ones(1, requires_grad=True)], lr=0.1)
    with pytest.raises(ValueError, match="has no parameters"):
        idf.MetaSGD(nn.Tanh(), lr=0.1)
    with pytest.raises(TypeError, match="must be a GradientTransformation"):
        idf.MetaOptimizer(net_of(), torch.optim.SGD(net_of().parameters()))


def test_a_module_that_has_got_other_parameters_is_refused():
    net, (x, y) = net_of(), data()
    inner = idf.MetaSGD(net, lr=0.1)
    net.more = nn.Linear(1, 1).double()
    with pytest.raises(ValueError, match="make another optimizer"):
        inner.step(((net[:3](x) - y) ** 2).mean())


def test_a_module_with_a_parameter_of_another_shape_is_refused():
    net = nn.Linear(2, 1).double()
    inner = idf.MetaAdam(net, lr=0.1)
    net.weight = nn.Parameter(torch.ones(1, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="make another optimizer"):
        inner.step(net(torch.ones(1, 3, dtype=torch.float64)).sum())


def test_a_state_of_another_optimizer_is_refused():
    net = net_of()
    inner = idf.MetaAdam(net, lr=0.1)
    before = inner.state_dict()
    for other in (idf.MetaSGD(net, lr=0.1, momentum=0.9), idf.MetaAdam(net[0], lr=0.1)):
        with pytest.raises(ValueError, match="does not belong to this optimizer"):
            inner.load_state_dict(other.state_dict())
    assert inner.state_dict() is before


@pytest.mark.parametrize("kwargs", [{"lr": 0.1}, {"module": nn.Linear(2, 1), "rate": 0.1}])
def test_wrong_arguments_are_told_with_those_that_it_takes(kwargs):
    with pytest.raises(TypeError, match=r"MetaSGD: .*; the signature is \(module, lr"):
        idf.MetaSGD(**kwargs)


def test_a_subclass_is_made_alike():
    class Mine(idf.MetaSGD):
        pass

    net = net_of()
    before = net[0].weight.detach().clone()
    Mine(net, lr=0.5).step(net[0].weight.sum())
    torch.testing.assert_close(net[0].weight.detach(), before - 0.5)


# --- memory -----------------------------------------------------------------------------------------------------------


def live() -> int:
    gc.collect()
    return sum(isinstance(obj, Tensor) for obj in gc.get_objects())


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("way", ["recover", "stop"])
def test_memory_is_flat_over_a_thousand_outer_steps(way):
    torch.manual_seed(0)
    net, x = nn.Linear(2, 1, bias=False), torch.ones(3, 2)
    lr = torch.tensor(0.01, requires_grad=True)
    inner, outer = idf.MetaSGD(net, lr=lr, momentum=0.9), torch.optim.SGD([lr], 1e-5, foreach=False)
    start = [idf.extract_state_dict(target) for target in (net, inner)]
    counts = []
    for k in range(1000):
        old = weakref.ref(net.weight)
        inner.step((net(x) ** 2).sum())
        outer.zero_grad()
        (net(x) ** 2).sum().backward()
        outer.step()
        middle = weakref.ref(net.weight)
        for i, target in enumerate((net, inner)):
            if way == "recover":
                idf.recover_state_dict(target, start[i])
            else:
                idf.stop_gradient(target)
        assert (old() is net.weight and middle() is None) if way == "recover" else middle() is net.weight
        # The first one is part of the extracted state.
        assert way == "recover" or k == 0 or old() is None
        if k in (10, 999):
            counts.append(live())
    # Fewer, where something that an earlier test has left goes meanwhile.
    assert counts[1] <= counts[0]


def test_nothing_keeps_a_finished_run_alive_without_the_garbage_collector():
    net, (x, y) = net_of(), data()
    inner = idf.MetaAdam(net, lr=torch.tensor(0.1, requires_grad=True))
    start = [idf.extract_state_dict(target) for target in (net, inner)]
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            inner.step(((net(x) - y) ** 2).mean())
        reached = [weakref.ref(p) for p in net.parameters()] + [weakref.ref(t) for t in inner.state.mu.values()]
        for target, state in zip((net, inner), start, strict=True):
            idf.recover_state_dict(target, state)
        assert [t() for t in reached] == [None] * len(reached)
    finally:
        gc.enable()


NORMALISATIONS = {
    "layer_norm": lambda: nn.LayerNorm(4),
    "batch_norm": lambda: nn.BatchNorm1d(4),
    "group_norm": lambda: nn.GroupNorm(1, 4),
}


def after_steps(scale: Tensor, *layers: nn.Module) -> Tensor:
    torch.manual_seed(0)
    net = nn.Sequential(*layers, nn.Tanh(), nn.Linear(4, 1)).double()
    inner, (x, y) = idf.MetaSGD(net, lr=0.3), data()
    for _ in range(3):
        inner.step(((net(x * scale) - y) ** 2).mean())
    return ((net(x * scale) - y) ** 2).mean()


def slopes(fn: Any) -> tuple[Tensor, Tensor]:
    """The derivative, and the derivative of that."""
    scale = torch.tensor(1.2, dtype=F64, requires_grad=True)
    (first,) = torch.autograd.grad(fn(scale), scale, create_graph=True)
    return first, torch.autograd.grad(first, scale)[0]


def central_slopes(fn: Any, h: float = 1e-3) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        behind, here, ahead = (fn(torch.tensor(1.2 + s, dtype=F64)).detach() for s in (-h, 0.0, h))
    return (ahead - behind) / (2 * h), (ahead - 2 * here + behind) / h**2


def normalised(kind: str) -> Any:
    def fn(scale: Tensor) -> Tensor:
        torch.manual_seed(1)
        return after_steps(scale, nn.Linear(3, 4), NORMALISATIONS[kind]())

    return fn


def weight_normalised(scale: Tensor) -> Tensor:
    torch.manual_seed(1)
    return after_steps(scale, nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)))


FUSED = {**{kind: normalised(kind) for kind in NORMALISATIONS}, "weight_norm": weight_normalised}


@pytest.mark.parametrize("kind", FUSED)
def test_derivatives_of_steps_on_elementary_losses_are_right(kind: str) -> None:
    fn = idf.elementary()(FUSED[kind])
    for found, expected in zip(slopes(fn), central_slopes(fn), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=0)


@pytest.mark.parametrize("kind", NORMALISATIONS)
def test_derivatives_of_steps_are_right_or_raise(kind: str) -> None:
    fn = FUSED[kind]
    scale = torch.tensor(1.2, dtype=F64, requires_grad=True)
    first, second = central_slopes(fn)
    (found,) = torch.autograd.grad(fn(scale), scale, create_graph=True)
    torch.testing.assert_close(found, first, rtol=1e-4, atol=0)
    if kind == "group_norm":
        torch.testing.assert_close(torch.autograd.grad(found, scale)[0], second, rtol=2e-4, atol=0)
        return
    with pytest.raises(RuntimeError, match=f"third derivative of {kind} wrongly; compute the loss under"):
        torch.autograd.grad(found, scale)


def test_a_derivative_through_steps_that_torch_gets_wrong_is_refused() -> None:
    scale = torch.tensor(1.0, dtype=F64, requires_grad=True)
    loss = weight_normalised(scale)
    with pytest.raises(
        RuntimeError, match=r"MetaSGD\.step: .* second derivative of weight_norm wrongly; compute the loss"
    ):
        torch.autograd.grad(loss, scale)
