"""Meta-optimizers beside the pure functions, and meta-gradients beside central differences."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from typing import Any

import pytest
import torch
from optimizers import ROWS
from torch import Tensor, nn
from torch.func import functional_call

import implicitdiff as idf

F64 = torch.float64

FRONTS = {
    idf.sgd: idf.MetaSGD,
    idf.adam: idf.MetaAdam,
    idf.adamw: idf.MetaAdamW,
    idf.rmsprop: idf.MetaRMSProp,
    idf.adagrad: idf.MetaAdaGrad,
    idf.adadelta: idf.MetaAdaDelta,
    idf.adamax: idf.MetaAdaMax,
    idf.radam: idf.MetaRAdam,
}

each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
each_kin = pytest.mark.parametrize("row", [row for row in ROWS if not row.options], ids=lambda row: row.name)


def net_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def data(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 3, dtype=F64, generator=generator)
    return x, (x[:, :1] - x[:, 1:2] ** 2).tanh()


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


def inputs() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    start = {name: p.detach().clone().requires_grad_() for name, p in net_of().named_parameters()}
    weight = torch.linspace(0.5, 1.5, 6, dtype=F64)[:, None].requires_grad_()
    return start, torch.tensor(0.05, dtype=F64, requires_grad=True), weight


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


# --- modules of all kinds ---------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(3, 3, bias=False).double(), nn.Linear(3, 3, bias=False).double()
        self.decode.weight = self.encode.weight
        self.again = self.encode

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.decode(self.encode(x)).tanh())


def test_tied_weights_stay_tied_and_have_the_sum_of_their_gradients():
    torch.manual_seed(0)
    net, (x, _) = Tied(), data()
    w = net.encode.weight.detach().clone().requires_grad_()
    inner = idf.MetaAdam(net, lr=0.1)
    for _ in range(3):
        inner.step((net(x) ** 2).mean())
        assert net.encode.weight is net.decode.weight is net.again.weight
        assert len([*net.parameters()]) == 1
    reference = torch.optim.Adam([w], lr=0.1)
    for _ in range(3):
        reference.zero_grad()
        (((x @ w.T @ w.T).tanh() @ w.T) ** 2).mean().backward()
        reference.step()
    torch.testing.assert_close(net.encode.weight.detach(), w.detach(), rtol=1e-12, atol=1e-14)


def test_frozen_and_unused_parameters_are_the_same_objects_afterwards():
    net, (x, y) = net_of(), data()
    net[0].weight.requires_grad_(False)
    net.unused = nn.Parameter(torch.ones(3, dtype=F64))
    before = dict(net.named_parameters())
    inner = idf.MetaAdamW(net, lr=0.1, weight_decay=0.5)
    for _ in range(2):
        inner.step(((net[2](net[1](net[0](x))) - y) ** 2).mean())
    after = dict(net.named_parameters())
    assert [name for name in before if before[name] is after[name]] == ["unused", "0.weight"]
    assert after["unused"].is_leaf and not after["0.weight"].requires_grad
    # Its state is as at the beginning.
    assert torch.equal(inner.state.mu["unused"], torch.zeros(3, dtype=F64))
    assert inner.state.count.tolist() == [0, 0, 2, 2, 2]


def test_recurrent_nets_compute_with_the_new_parameters():
    torch.manual_seed(0)
    net, x = nn.LSTM(2, 3, num_layers=2, bidirectional=True).double(), torch.randn(4, 1, 2, dtype=F64)
    lr = torch.tensor(0.1, dtype=F64, requires_grad=True)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    fresh = nn.LSTM(2, 3, num_layers=2, bidirectional=True).double()
    inner = idf.MetaSGD(net, lr=lr)
    for _ in range(2):
        inner.step((net(x)[0] ** 2).sum())
    value = (net(x)[0] ** 2).sum()
    params = start
    for _ in range(2):
        grads = torch.func.grad(lambda p: (functional_call(fresh, p, (x,))[0] ** 2).sum())(params)
        params = {name: p - lr * grads[name] for name, p in params.items()}
    expected = (functional_call(fresh, params, (x,))[0] ** 2).sum()
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.autograd.grad(value, lr), torch.autograd.grad(expected, lr), rtol=1e-12, atol=0)


def test_batch_normalisation_keeps_its_statistics_as_in_torch():
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    x, y = data()
    inner, reference = idf.MetaSGD(nets[0], lr=0.1, momentum=0.9), torch.optim.SGD(nets[1].parameters(), 0.1, 0.9)
    for _ in range(4):
        inner.step(((nets[0](x) - y) ** 2).mean())
        reference.zero_grad()
        ((nets[1](x) - y) ** 2).mean().backward()
        reference.step()
    for net in nets:
        net.eval()
    torch.testing.assert_close(nets[0](x).detach(), nets[1](x).detach(), rtol=1e-12, atol=1e-13)
    assert torch.equal(nets[0][1].num_batches_tracked, torch.tensor(4))


def test_parametrised_weights_are_optimized_by_what_they_are_made_of():
    torch.manual_seed(0)
    net = nn.utils.parametrizations.weight_norm(nn.Linear(3, 1).double())
    x, y = data()
    inner = idf.MetaSGD(net, lr=0.1)
    before = net(x)
    inner.step(((before - y) ** 2).mean())
    assert not torch.equal(net(x), before)
    assert {name for name, p in net.named_parameters() if not p.is_leaf} == {
        "bias",
        "parametrizations.weight.original0",
        "parametrizations.weight.original1",
    }


class Inner(idf.nn.ImplicitMetaGradientModule):
    def __init__(self, prior: nn.Module, penalty: Tensor) -> None:
        super().__init__()
        self.prior, self.penalty = prior, penalty
        self.own = nn.Linear(3, 1).double()

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        return ((self(x) - y) ** 2).mean() + self.penalty * (self.own.weight - self.prior.weight).square().sum()

    def solve(self, x: Tensor, y: Tensor) -> Inner:
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.own(x)


def test_of_a_module_with_meta_parameters_the_inner_ones_are_optimized():
    torch.manual_seed(0)
    prior, penalty = nn.Linear(3, 1).double(), torch.tensor(0.3, dtype=F64, requires_grad=True)
    net, (x, y) = Inner(prior, penalty), data()
    weight, bias = net.own.weight.detach().clone(), net.own.bias.detach().clone()
    weights = [*prior.parameters()]
    inner = idf.MetaSGD(net, lr=0.1)
    assert inner.state.count.shape == (2,)
    for _ in range(2):
        inner.step(net.objective(x, y))
    assert [*prior.parameters()] == weights and net.penalty is penalty
    assert [name for name, _ in net.named_parameters()] == ["own.weight", "own.bias"]
    (found,) = torch.autograd.grad(net.own.weight.sum(), penalty)
    for _ in range(2):
        weight, bias = (
            p - 0.1 * g
            for p, g in zip(
                (weight, bias),
                torch.func.grad(
                    lambda p: ((x @ p[0].T + p[1] - y) ** 2).mean() + penalty * (p[0] - prior.weight).square().sum()
                )((weight, bias)),
                strict=True,
            )
        )
    torch.testing.assert_close(net.own.weight, weight, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(found, torch.autograd.grad(weight.sum(), penalty)[0], rtol=1e-12, atol=0)


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
    with pytest.raises(ValueError, match="make another one"):
        inner.step(((net[:3](x) - y) ** 2).mean())


def test_a_module_with_a_parameter_of_another_shape_is_refused():
    net = nn.Linear(2, 1).double()
    inner = idf.MetaAdam(net, lr=0.1)
    net.weight = nn.Parameter(torch.ones(1, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="make another one"):
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
    with pytest.raises(TypeError, match=r"MetaSGD: .*; it takes \(module, lr"):
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
    with pytest.raises(RuntimeError, match=f"third derivative of {kind} wrong; compute the loss under"):
        torch.autograd.grad(found, scale)


def test_a_derivative_through_steps_that_torch_gets_wrong_is_refused() -> None:
    scale = torch.tensor(1.0, dtype=F64, requires_grad=True)
    loss = weight_normalised(scale)
    with pytest.raises(
        RuntimeError, match=r"MetaSGD\.step: .* second derivative of weight_norm wrong; compute the loss"
    ):
        torch.autograd.grad(loss, scale)


# --- modules that change between steps --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by net.double()
@each_kin
def test_a_module_may_be_converted_before_and_between_steps(row):
    (x, y), ends = data(), []
    for convert in (0, 1, 3):  # never: in float64 from the start
        net = net_of() if convert == 3 else net_of().float().double().float()
        if convert == 3:
            net = net.float().double()
        inner = FRONTS[row.factory](net, lr=0.1)
        for k in range(3):
            if k == convert:
                net.double()
            dtype = next(net.parameters()).dtype
            inner.step(((net(x.to(dtype)) - y.to(dtype)) ** 2).mean())
        ends.append([p.detach() for p in net.parameters()])
        moments = [t for t in torch.utils._pytree.tree_leaves(inner.state) if t.is_floating_point()]
        assert {t.dtype for t in moments} <= {F64}
    torch.testing.assert_close(ends[0], ends[2], rtol=0, atol=0)
    torch.testing.assert_close(ends[1], ends[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [idf.MetaSGD, idf.MetaAdam])
def test_hooks_of_parameters_act_on_each_gradient_and_on_nothing_else(kind):
    x, y = data()
    scaled = torch.tensor([[0.5, 0.0, 2.0]], dtype=F64)

    def ended(lr: Tensor, hooked: bool) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        net = nn.Linear(3, 1, bias=False).double()
        start = net.weight
        handle = start.register_hook(lambda g: g * scaled)
        if hooked:
            inner = kind(net, lr=lr)
            for k in range(3):
                if k == 2:
                    handle.remove()
                inner.step(((net(x) - y) ** 2).mean())
            return ((net(x) - y) ** 2).mean(), start
        w, pair = start.detach().clone().requires_grad_(), inner_of(kind, lr)
        state, params = pair.init(w), w
        for k in range(3):
            g = torch.autograd.grad(((x @ params.T - y) ** 2).mean(), params, create_graph=True)[0]
            params, state = pair.step(g * scaled if k < 2 else g, state, params)
        return ((x @ params.T - y) ** 2).mean(), w

    results = []
    for hooked in (True, False):
        lr = torch.tensor(0.1, dtype=F64, requires_grad=True)
        loss, start = ended(lr, hooked)
        results.append([loss, *torch.autograd.grad(loss, [lr, start])])
    torch.testing.assert_close(*results, rtol=1e-12, atol=0)


def inner_of(kind: Any, lr: Tensor) -> idf.GradientTransformation:
    return {idf.MetaSGD: idf.sgd, idf.MetaAdam: idf.adam}[kind](lr)


def test_a_deep_copy_of_a_module_after_a_step_is_a_module_of_its_own():
    net, (x, y) = net_of(), data()
    net[0].weight.register_hook(lambda g: g)
    inner = idf.MetaSGD(net, lr=0.1)
    for _ in range(2):
        inner.step(((net(x) - y) ** 2).mean())
    twin = copy.deepcopy(net)
    assert all(isinstance(p, nn.Parameter) for p in net.parameters())
    assert all(p.is_leaf and p.requires_grad for p in twin.parameters())
    torch.testing.assert_close(twin(x), net(x), rtol=0, atol=0)
    before = [p.detach().clone() for p in twin.parameters()]
    inner.step(((net(x) - y) ** 2).mean())
    torch.testing.assert_close([*twin.parameters()], before, rtol=0, atol=0)
    assert idf.MetaSGD(twin, lr=0.1).step((twin(x) ** 2).sum()) is None


@each_row
def test_first_order_steps_take_gradients_for_constants(row):
    _, lr, weight = inputs()
    (x, y), net = data(), net_of()
    inner = FRONTS[row.factory](net, **{"lr": lr} | row.options)
    first = dict(net.named_parameters())
    pair = row.factory(**{"lr": lr} | row.options)
    params = {name: p.detach().clone().requires_grad_() for name, p in first.items()}
    leaves, state = params, pair.init(params)

    def loss_of(params: dict[str, Tensor]) -> Tensor:
        return (weight.detach() * (functional_call(net, params, (x,)) - y) ** 2).mean()

    for _ in range(3):
        loss = (weight.detach() * (net(x) - y) ** 2).mean()
        inner.step(loss, first_order=True)
        grads = {k: g.detach() for k, g in torch.func.grad(loss_of)(params).items()}
        params, state = pair.step(grads, state, params)
    assert torch.isfinite(loss)
    ends = ((net(x) - y) ** 2).mean(), loss_of(params) * 0 + ((functional_call(net, params, (x,)) - y) ** 2).mean()
    got = torch.autograd.grad(ends[0], [*first.values(), lr])
    expected = torch.autograd.grad(ends[1], [*leaves.values(), lr])
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_a_first_order_step_of_a_func_optimizer():
    lr, w = torch.tensor(0.1, dtype=F64, requires_grad=True), torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    stepped = idf.FuncOptimizer(idf.sgd(lr)).step((w**3).sum(), w, first_order=True)
    torch.testing.assert_close(torch.autograd.grad(stepped.sum(), [w, lr]), (torch.ones(2, dtype=F64), -15 * lr / lr))


def test_torchs_spellings_are_the_same_classes():
    for theirs in ("RMSprop", "Adagrad", "Adadelta", "Adamax"):
        mine = {"RMSprop": "RMSProp"}.get(theirs, theirs[:3] + theirs[3:].capitalize())
        assert hasattr(torch.optim, theirs) and getattr(idf, theirs) is getattr(idf, mine)
        assert getattr(idf, f"Meta{theirs}") is getattr(idf, f"Meta{mine}")


def test_a_functional_step_refuses_what_torch_gets_wrong() -> None:
    rate = torch.tensor(0.1, dtype=F64, requires_grad=True)
    v = torch.ones(3, dtype=F64, requires_grad=True)
    optimizer, params = idf.FuncOptimizer(idf.sgd(rate)), {"v": v}
    for _ in range(2):
        loss = torch._weight_norm(params["v"][None], torch.ones(1, 1, dtype=F64), 0).square().mul(v).sum()
        params = optimizer.step(loss, params)
    with pytest.raises(RuntimeError, match=r"FuncOptimizer\.step: .* second derivative of weight_norm wrong"):
        torch.autograd.grad(params["v"].sum(), rate)


def test_what_lies_below_no_parameter_of_the_step_is_no_obstacle() -> None:
    """A body that is learned outside, with a head that is learned inside."""
    torch.manual_seed(0)
    body = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)).double()
    x, y = data()

    def total() -> Tensor:
        torch.manual_seed(1)
        head = nn.Linear(4, 1).double()
        inner, features = idf.MetaSGD(head, lr=0.1), body(x)
        for _ in range(2):
            inner.step(((head(features) - y) ** 2).mean())
        return ((head(features) - y) ** 2).mean()

    weights = list(body.parameters())
    found = torch.autograd.grad(total(), weights)
    with idf.elementary():
        expected = torch.autograd.grad(total(), weights)
    torch.testing.assert_close(found, expected)
