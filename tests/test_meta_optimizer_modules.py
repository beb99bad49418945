"""Meta-optimizers on modules of all kinds, and on modules that change between steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tables.meta_fronts import F64, FRONTS, data, each_kin, each_row, inputs, net_of
from torch import Tensor, nn
from torch.func import functional_call

import implicitdiff as idf

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
    with pytest.raises(RuntimeError, match=r"FuncOptimizer\.step: .* second derivative of weight_norm wrongly"):
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
