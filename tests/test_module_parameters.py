"""Which parameters of an ImplicitMetaGradientModule are meta, and which are inner."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch
from checks.differences import slope as slope_of
from tables.meta_modules import (
    F64,
    SLOPE,
    Net,
    Ridge,
    X,
    Y,
    close,
    expected_grad,
    grad,
    leaf,
    meta_net,
    names,
    newton,
    ridge,
    zeros,
)
from torch import nn
from torch.func import functional_call

import implicitdiff
from implicitdiff.nn import ImplicitMetaGradientModule, MetaGradientModule

# Who is inner and who is meta


def test_what_is_given_is_meta_and_what_is_made_is_inner():
    module = Net(leaf(), meta_net())
    inner = [f"net.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]
    assert names(module) == (inner, ["penalty", *(f"meta_{name}" for name in inner)])
    assert [id(p) for p in module.parameters()] == [id(p) for p in module.net.parameters()]
    assert [id(p) for p in module.meta_parameters()][1:] == [id(p) for p in module.meta_net.parameters()]
    assert list(module.meta_modules()) == list(module.meta_net.modules())


def test_names_of_meta_parameters_take_a_prefix():
    assert [name for name, _ in Ridge(leaf()).named_meta_parameters("lower")] == ["lower.penalty"]


def test_own_meta_parameters_are_listed_without_those_of_meta_modules():
    assert [name for name, _ in Net(leaf(), meta_net()).named_meta_parameters(recurse=False)] == ["penalty"]


def test_a_frozen_and_evaluated_meta_module_is_meta():
    net = meta_net().eval().requires_grad_(False)
    module = Net(leaf(), net)
    assert len(list(module.meta_parameters())) == 5 and list(module.meta_modules()) == list(net.modules())
    before = copy.deepcopy(net.state_dict())
    module.solve(X, Y)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert not any(m.training for m in net.modules()) and not any(p.requires_grad for p in net.parameters())


def test_an_evaluated_meta_module_has_its_gradient():
    net, same = meta_net(), meta_net().eval()
    found = [grad((Net(leaf(), n).solve(X, Y).net(X) ** 3).sum(), *n.parameters()) for n in (net, same)]
    for mine, other in zip(*found, strict=True):
        close(mine, other)
        assert mine.abs().max() > 0


class Plain:
    def __init__(self, penalty):
        self.penalty, self.name = penalty, "plain"


class Slots:
    __slots__ = ("penalty", "unset")

    def __init__(self, penalty):
        self.penalty = penalty


@dataclasses.dataclass(frozen=True)
class Config:
    penalty: torch.Tensor
    rate: float = 0.1


CONTAINERS = {
    "dict": (lambda p: {"penalty": p, "rate": 0.1}, lambda c: c["penalty"], "config_penalty"),
    "list": (lambda p: ["a", p], lambda c: c[1], "config_1"),
    "tuple": (lambda p: (p,), lambda c: c[0], "config_0"),
    "dataclass": (Config, lambda c: c.penalty, "config_penalty"),
    "object": (Plain, lambda c: c.penalty, "config_penalty"),
    "slots": (Slots, lambda c: c.penalty, "config_penalty"),
    "partial": (lambda p: functools.partial(torch.mul, p), lambda c: c(1.0), "config_0"),
    "keyword of a partial": (lambda p: functools.partial(torch.add, 0.0, other=p), lambda c: c(), "config_other"),
    "nested": (lambda p: {"a": [Plain({"b": p})]}, lambda c: c["a"][0].penalty["b"], "config_a_0_penalty_b"),
}


class Contained(Ridge):
    def __init__(self, config, read):
        super().__init__(None)
        self.config, self.read = config, read

    def objective(self, x, y):
        return ((x @ self.w - y) ** 2).sum() + self.read(self.config) * (self.w**2).sum()


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("wrap", [lambda t: t, nn.Parameter, lambda t: nn.Parameter(t, requires_grad=False)])
def test_meta_parameters_are_found_in_containers_named_and_saved(kind, wrap):
    make, read, name = CONTAINERS[kind]
    penalty = wrap(leaf())
    module = Contained(make(penalty), read)
    assert names(module) == (["w"], [name])
    assert next(module.meta_parameters()) is penalty and torch.equal(module.state_dict()[name], penalty)
    w = module.solve(X, Y).w
    assert w.is_leaf != penalty.requires_grad
    if penalty.requires_grad:
        close(grad(w.sum(), penalty), SLOPE)


def test_a_meta_parameter_that_is_read_in_a_container_cannot_be_exchanged():
    module = Contained({"penalty": leaf()}, lambda c: c["penalty"])
    module.forward = lambda: module.solve(X, Y).w.sum()
    with pytest.raises(ValueError, match="replaced the meta-parameter 'config_penalty'"):
        torch.func.grad(lambda p: functional_call(module, {"config_penalty": p}, ()))(torch.tensor(0.3, dtype=F64))


def test_meta_modules_are_found_in_containers_of_any_arguments():
    class Inner(MetaGradientModule):
        def __init__(self, *args, **kwargs):
            super().__init__()
            self.w = zeros(2)

    net, other, penalty = nn.Linear(1, 1), nn.Linear(1, 1), leaf()
    module = Inner({"net": net}, penalty, more=[other], name="inner")
    assert names(module) == (
        ["w"],
        ["args_1", "args_0_net.weight", "args_0_net.bias", "kwargs_more_0.weight", "kwargs_more_0.bias"],
    )
    assert set(module.meta_modules()) == {net, other}


def test_what_a_closure_hides_takes_part_in_derivatives_but_is_not_listed_unless_registered():
    penalty = leaf()
    module = Contained(lambda: penalty, lambda f: f())
    assert names(module) == (["w"], [])
    close(grad(module.solve(X, Y).w.sum(), penalty), SLOPE)
    module.register_meta_parameter("hidden", penalty)
    assert names(module) == (["w"], ["hidden"])
    close(grad(module.solve(X, Y).w.sum(), penalty), SLOPE)


def test_tensors_that_need_no_gradient_and_optimizers_are_not_meta():
    net = nn.Linear(1, 1)

    class Inner(MetaGradientModule):
        def __init__(self, x, optimizer):
            super().__init__()
            self.x, self.optimizer = x, optimizer

    module = Inner(X, torch.optim.SGD(net.parameters(), lr=0.1))
    assert names(module) == ([], []) and module.x is X


def test_a_constructor_may_be_called_with_wrong_arguments_and_says_so():
    with pytest.raises(TypeError, match=r"__init__\(\) missing 1 required positional argument: 'penalty'"):
        Ridge()


def test_a_meta_parameter_may_be_registered_frozen_or_as_none():
    module = Ridge(leaf())
    module.register_meta_parameter("frozen", torch.ones(2))
    module.register_meta_parameter("none", None)
    assert names(module) == (["w"], ["penalty", "frozen"]) and module.none is None
    module.register_meta_parameter("none", torch.ones(1))
    assert names(module)[1] == ["penalty", "frozen", "none"]


def test_a_meta_module_may_be_registered_or_none():
    module, net = Ridge(leaf()), nn.Linear(1, 1)
    module.register_meta_module("net", net)
    module.register_meta_module("none", None)
    assert names(module) == (["w"], ["penalty", "net.weight", "net.bias"])
    assert list(module.meta_modules()) == [net]


def test_registering_says_what_is_wrong():
    penalty = leaf()
    module = Ridge(penalty)
    with pytest.raises(ValueError, match="'again' is a meta-parameter; use register_meta_parameter"):
        module.register_parameter("again", penalty)
    with pytest.raises(TypeError, match=r"'mask' must be a floating-point or complex tensor or None, got torch\.int64"):
        module.register_meta_parameter("mask", torch.ones(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="'rate' must be a floating-point or complex tensor or None, got float"):
        module.register_meta_parameter("rate", 0.1)
    with pytest.raises(KeyError, match="attribute 'solve' already exists"):
        module.register_meta_parameter("solve", leaf())
    with pytest.raises(KeyError, match="attribute 'solve' already exists"):
        module.register_meta_module("solve", nn.Linear(1, 1))
    with pytest.raises(TypeError, match="not a Module subclass"):
        module.register_meta_module("net", 3)
    with pytest.raises(TypeError, match="cannot assign"):
        module.register_parameter("data", X)
    assert names(module) == (["w"], ["penalty"])


def test_a_tensor_that_needs_a_gradient_is_refused_before_the_constructor_of_the_base():
    class Inner(MetaGradientModule):
        def __init__(self, penalty):
            self.penalty = penalty
            super().__init__()

    with pytest.raises(AttributeError, match=r"the parameter 'penalty' before Module.__init__\(\) call"):
        Inner(leaf())


def test_plain_leaf_tensors_may_be_inner_parameters():
    class Inner(Ridge):
        def __init__(self, penalty):
            super().__init__(penalty)
            del self.w
            self.register_parameter("w", torch.zeros(2, dtype=F64, requires_grad=True))
            self.offset = leaf(0.0)

        def objective(self, x, y):
            return super().objective(x, y - self.offset) + self.penalty * self.offset**2

    penalty = leaf()
    module = Inner(penalty)
    assert names(module) == (["w", "offset"], ["penalty"])
    module.solve(X, Y)
    columns = torch.cat([X, torch.ones(3, 1, dtype=F64)], 1)

    def closed(p):
        return torch.linalg.solve(columns.T @ columns + p * torch.eye(3, dtype=F64), columns.T @ Y)

    close(torch.cat([module.w, module.offset[None]]).detach(), closed(0.7))
    close(grad(module.w.sum() + module.offset, penalty), expected_grad(lambda p: closed(p).sum()))


def test_a_tensor_that_depends_on_others_is_no_inner_parameter_but_an_attribute():
    module = Ridge(leaf())
    module.kept = module.penalty * 2
    assert names(module) == (["w"], ["penalty"]) and "kept" not in module.state_dict()


def test_an_output_of_another_network_may_be_a_meta_parameter():
    source = leaf()
    module = Ridge(source.exp())
    assert names(module) == (["w"], ["penalty"])
    close(grad(module.solve(X, Y).w.sum(), source), expected_grad(lambda s: ridge(s.exp()).sum()))


def test_weights_tied_in_the_inner_network_stay_tied():
    class Inner(ImplicitMetaGradientModule):
        def __init__(self, penalty):
            super().__init__()
            self.penalty = penalty
            self.a, self.b = nn.Linear(2, 1, bias=False).to(F64), nn.Linear(2, 1, bias=False).to(F64)
            self.b.weight = self.a.weight

        def objective(self):
            loss = ((self.a(X)[:, 0] - Y) ** 2).sum() + ((self.b(X)[:, 0] - 2 * Y) ** 2).sum()
            return loss + self.penalty * (self.a.weight**2).sum()

        def solve(self):
            newton(self, steps=1)
            return self

    penalty = leaf()
    module = Inner(penalty).solve()
    assert names(module) == (["a.weight"], ["penalty"])
    assert module.a.weight is module.b.weight
    close(
        grad(module.a.weight.sum() + module.b.weight.sum(), penalty),
        expected_grad(lambda p: 2 * ridge(p / 2, X, 1.5 * Y).sum()),
    )


class TiedToMeta(ImplicitMetaGradientModule):
    """An inner network whose first layer is the meta-network's."""

    def __init__(self, features):
        super().__init__()
        self.features = features
        self.net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).to(F64)
        self.net[0].weight = features.weight

    def objective(self):
        return ((self.net(X)[:, 0] - Y) ** 2).sum() + (self.net[1].weight ** 2).sum()

    def solve(self):
        newton(self, steps=1)
        return self

    def forward(self):
        return self.solve().net(X).prod()


def tied_to_meta(weight):
    x = X @ weight.T
    return (x @ ridge(1.0, x)).prod()


def test_an_inner_layer_tied_to_a_meta_parameter_is_meta():
    torch.manual_seed(0)
    features = nn.Linear(2, 2, bias=False).to(F64)
    module = TiedToMeta(features)
    assert names(module) == (["net.1.weight"], ["features.weight"])
    close(grad(module(), features.weight), grad(tied_to_meta(features.weight), features.weight))


def test_functional_call_replaces_tied_meta_parameters_together():
    torch.manual_seed(0)
    features = nn.Linear(2, 2, bias=False).to(F64)
    module, at = TiedToMeta(features), torch.randn(2, 2, dtype=F64)
    found = torch.func.grad(lambda w: functional_call(module, {"features.weight": w}, ()))(at)
    weight = at.clone().requires_grad_()
    close(found, grad(tied_to_meta(weight), weight))


def test_functional_call_is_strict_about_both_kinds():
    module = Ridge(leaf())
    tensors = {"penalty": torch.ones((), dtype=F64), "w": torch.zeros(2, dtype=F64, requires_grad=True)}
    functional_call(module, tensors, (), strict=True)
    with pytest.raises(RuntimeError, match="penalty"):
        functional_call(module, {"w": tensors["w"]}, (), strict=True)


def test_frozen_inner_layers_are_constants():
    net = meta_net()
    penalty = leaf(1.0)

    def outer(penalty):
        module = Net(penalty, net)
        module.net[0].requires_grad_(False)
        frozen = copy.deepcopy(module.net[0].state_dict())
        module.solve(X, Y)
        assert all(torch.equal(frozen[k], v) for k, v in module.net[0].state_dict().items())
        assert isinstance(module.net[0].weight, nn.Parameter) and not module.net[0].weight.requires_grad
        return (module.net(X) ** 3).sum()

    close(grad(outer(penalty), penalty), slope_of(lambda p: outer(torch.tensor(p, dtype=F64)).item(), 1.0), 1e-9)


def test_a_meta_network_may_be_a_layer_of_the_inner_network():
    class Inner(ImplicitMetaGradientModule):
        def __init__(self, features):
            super().__init__()
            self.net = nn.Sequential(features, nn.Linear(2, 1, bias=False).to(F64))

        def objective(self):
            return ((self.net(X)[:, 0] - Y) ** 2).sum() + (self.net[1].weight ** 2).sum()

        def solve(self):
            newton(self, steps=1)
            return self

    torch.manual_seed(0)
    features = nn.Linear(2, 2, bias=False).to(F64)
    module = Inner(features)
    assert names(module) == (["net.1.weight"], ["net.0.weight"])
    close(grad(module.solve().net(X).prod(), features.weight), grad(tied_to_meta(features.weight), features.weight))


def test_the_inner_parameters_are_what_a_meta_optimizer_steps():
    class Inner(MetaGradientModule):
        def __init__(self, penalty):
            super().__init__()
            self.penalty, self.w = penalty, nn.Parameter(torch.ones(2, dtype=F64))

    penalty = leaf()
    module = Inner(penalty)
    implicitdiff.MetaSGD(module, lr=0.1).step(module.penalty * (module.w**2).sum())
    assert module.penalty is penalty
    close(grad(module.w.sum(), penalty), -0.4)  # of 2 (1 - 2 lr p)
