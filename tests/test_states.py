"""Leaving a state and coming back to it: the same objects, the same numbers, the same graph or none."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any, get_args

import pytest
import torch
from checks.copies import assert_same
from torch import Tensor, nn

import implicitdiff as idf
from implicitdiff.objects.state import By

F64 = torch.float64

each_by = pytest.mark.parametrize("by", get_args(By))


class Net(nn.Module):
    """Tied weights, a frozen one, batch normalisation, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.last.weight = self.first.weight
        self.last.bias.requires_grad_(False)
        self.register_buffer("shift", torch.tensor(0.5), persistent=False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).tanh()) + self.shift


def data() -> Tensor:
    return torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(1))


def loss_of(net: nn.Module) -> Tensor:
    return (net(data()) ** 2).mean()


def steps(net: nn.Module, inner: idf.MetaOptimizer, count: int) -> list[Tensor]:
    """The losses of a few steps, and all that they lead to."""
    losses = []
    for _ in range(count):
        losses.append(loss_of(net))
        inner.step(losses[-1])
    return [t.detach().clone() for t in [*losses, *net.parameters(), *net.buffers(), *leaves(inner.state)]]


def leaves(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda net: idf.MetaAdam(net, lr=0.1),
        lambda net: idf.MetaSGD(net, lr=0.1, momentum=0.9),
        lambda net: idf.MetaOptimizer(net, idf.chain(idf.clip_grad_norm(0.1), idf.adam(idf.schedule.cosine(0.1, 9)))),
    ],
    ids=["adam", "momentum", "chain"],
)
@each_by
def test_two_steps_after_recovering_are_the_same_two_steps(by, make):
    net = Net()
    inner = make(net)
    steps(net, inner, 1)
    states = [idf.extract_state_dict(target, by=by) for target in (net, inner)]
    first = steps(net, inner, 2)
    for _ in range(2):
        for target, state in zip((net, inner), states, strict=True):
            idf.recover_state_dict(target, state)
        assert net.first.weight is net.last.weight
        assert_same(steps(net, inner, 2), first)


def test_by_reference_a_state_holds_the_tensors_themselves_but_clones_of_buffers():
    net = Net()
    inner = idf.MetaAdam(net, lr=0.1)
    steps(net, inner, 1)
    params, buffers = idf.extract_state_dict(net)
    named = dict(net.named_parameters())
    assert params.keys() == named.keys() == {"first.weight", "first.bias", "norm.weight", "norm.bias", "last.bias"}
    assert all(params[name] is named[name] for name in params)
    assert buffers.keys() == dict(net.named_buffers()).keys() and "shift" in buffers
    assert not any(buffers[name] is b for name, b in net.named_buffers())
    assert all(a is b for a, b in zip(leaves(idf.extract_state_dict(inner)), leaves(inner.state), strict=True))
    kept = {name: b.clone() for name, b in buffers.items()}
    net(data())
    assert all(torch.equal(buffers[name], b) for name, b in kept.items())


def test_by_copy_a_state_is_differentiable_in_the_originals():
    net = Net()
    params, _ = idf.extract_state_dict(net, by="copy")
    for name, p in net.named_parameters():
        assert params[name] is not p and params[name].data_ptr() != p.data_ptr()
        if p.requires_grad:
            (grad,) = torch.autograd.grad((3 * params[name]).sum(), p)
            assert torch.equal(grad, torch.full_like(p, 3))
    assert not params["last.bias"].requires_grad
    inner = idf.MetaAdam(net, lr=torch.tensor(0.1, dtype=F64, requires_grad=True))
    steps(net, inner, 2)
    state = idf.extract_state_dict(inner, by="copy")
    assert state.mu["first.weight"].grad_fn is not None
    (grad,) = torch.autograd.grad(state.mu["first.weight"].sum(), inner.state.mu["first.weight"])
    assert torch.equal(grad, torch.ones_like(grad))


def test_by_deepcopy_a_state_is_out_of_the_graph():
    net = Net()
    inner = idf.MetaAdam(net, lr=torch.tensor(0.1, dtype=F64, requires_grad=True))
    params, _ = idf.extract_state_dict(net, by="deepcopy")
    assert all(isinstance(p, nn.Parameter) for p in params.values())
    steps(net, inner, 2)
    params, buffers = idf.extract_state_dict(net, by="deepcopy")
    for name, p in net.named_parameters():
        assert params[name].is_leaf and params[name].requires_grad == p.requires_grad
        assert isinstance(params[name], nn.Parameter) == isinstance(p, nn.Parameter)
        assert torch.equal(params[name], p) and params[name].data_ptr() != p.data_ptr()
    moments = leaves(idf.extract_state_dict(inner, by="deepcopy"))
    assert all(t.is_leaf for t in [*moments, *buffers.values()])


@each_by
def test_buffers_are_cloned_within_the_graph_unless_they_shall_not_be(by):
    net, source = Net(), torch.tensor(2.0, dtype=F64, requires_grad=True)
    net.shift = source * 3
    attached = idf.extract_state_dict(net, by=by).buffers["shift"]
    assert (attached.grad_fn is not None) == (by != "deepcopy")
    if by != "deepcopy":
        assert torch.autograd.grad(attached, source)[0] == 3
    detached = idf.extract_state_dict(net, by=by, detach_buffers=True)
    assert detached.buffers["shift"].is_leaf
    if by == "reference":
        assert detached.params["first.bias"] is net.first.bias


def test_without_buffers_those_of_the_module_are_left_alone():
    net = Net()
    state = idf.extract_state_dict(net, with_buffers=False)
    assert state.buffers == {}
    net(data())
    held = dict(net.named_buffers())
    idf.recover_state_dict(net, state)
    assert all(b is held[name] for name, b in net.named_buffers())


def test_recovering_overwrites_nothing_and_gives_buffers_of_its_own():
    net = Net()
    inner = idf.MetaSGD(net, lr=0.1)
    start = idf.extract_state_dict(net)
    weight = net.first.weight
    value = weight.detach().clone()
    inner.step(loss_of(net))
    stepped, running = net.first.weight, net.norm.running_mean
    then, mean = stepped.detach().clone(), running.clone()
    loss = loss_of(net)
    mean = running.clone()
    idf.recover_state_dict(net, start)
    assert net.first.weight is weight and torch.equal(weight, value)
    assert torch.equal(stepped, then) and torch.equal(running, mean)
    # What was computed in between keeps its graph.
    assert torch.autograd.grad(loss, weight)[0].norm() > 0
    net(data())
    again = idf.extract_state_dict(Net())
    assert all(torch.equal(start.buffers[name], b) for name, b in again.buffers.items())


@each_by
def test_a_device_may_be_given(by):
    net = Net()
    inner = idf.MetaAdam(net, lr=0.1)
    for target in (net, inner, {"a": torch.ones(2)}):
        assert all(t.device.type == "cpu" for t in leaves(idf.extract_state_dict(target, by=by, device="cpu")))
        meta = idf.extract_state_dict(target, by=by, device="meta")
        assert all(t.device.type == "meta" for t in leaves(meta))
    if by == "reference":
        assert idf.extract_state_dict(net, device="cpu").params["first.bias"] is net.first.bias
    clone = idf.module_clone(net, by=by, device="meta")
    assert {t.device.type for t in (*clone.parameters(), *clone.buffers())} == {"meta"}
    assert net.first.weight.device.type == "cpu"


# --- trees ------------------------------------------------------------------------------------------------------------


@each_by
def test_a_tree_comes_back_in_its_dictionaries_and_lists(by):
    w = torch.ones(2, requires_grad=True)
    tree = ({"w": w, "more": [w * 2, {"k": 3}]}, [])
    state = idf.extract_state_dict(tree, by=by)
    values = [t.detach().clone() for t in leaves(tree)]
    assert (state[0]["w"] is w) == (by == "reference")
    assert state[0]["more"][0].requires_grad
    tree[0]["w"], tree[0]["more"][0] = torch.zeros(2), torch.zeros(2)
    idf.recover_state_dict(tree, state)
    assert_same(leaves(tree), values)
    assert tree[0]["w"] is state[0]["w"] and tree[0]["more"][0] is state[0]["more"][0]


def test_a_func_optimizer_comes_back_to_its_state():
    params = {"w": torch.tensor([1.0, -2.0], dtype=F64, requires_grad=True)}
    optimizer = idf.FuncOptimizer(idf.adam(0.1))

    def run(params):
        for _ in range(2):
            params = optimizer.step((params["w"] ** 4).sum(), params)
        return params["w"].detach()

    begun = optimizer.step((params["w"] ** 2).sum(), params)
    state = idf.extract_state_dict(optimizer)
    first = run(begun)
    idf.recover_state_dict(optimizer, state)
    assert torch.equal(run(begun), first)
    twin = idf.module_clone(optimizer, by="deepcopy")
    assert torch.equal(
        twin.step((begun["w"] ** 4).sum(), begun)["w"], optimizer.step((begun["w"] ** 4).sum(), begun)["w"]
    )
    moments = leaves(optimizer.state)
    idf.stop_gradient(optimizer)
    assert all(t.is_leaf and not t.requires_grad for t in moments)


# --- what does not fit is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [idf.extract_state_dict, idf.module_clone, idf.stop_gradient])
@pytest.mark.parametrize(
    "target",
    [
        idf.Adam([torch.ones(1, requires_grad=True)]),
        torch.optim.Adam([torch.ones(1, requires_grad=True)]),
        [Net()],
        (Net(), torch.ones(1)),
        {"optimizer": idf.MetaSGD(Net(), lr=0.1)},
    ],
    ids=["Adam", "torch's Adam", "list", "tuple", "dict"],
)
def test_an_object_with_a_state_of_its_own_is_no_tensor_of_a_tree(call, target):
    with pytest.raises(TypeError, match="a tree must hold tensors"):
        call(target)
    with pytest.raises(TypeError, match="a tree must hold tensors"):
        idf.recover_state_dict(target, target)


@pytest.mark.parametrize("call", [idf.extract_state_dict, idf.module_clone])
@pytest.mark.parametrize("target", [Net(), {"a": torch.ones(1)}, idf.MetaSGD(Net(), lr=0.1)])
def test_an_unknown_way_is_refused(call, target):
    with pytest.raises(ValueError, match="by must be one of 'reference', 'copy', 'deepcopy', got 'clone'"):
        call(target, by="clone")


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    net = Net()
    held = [*net.parameters(), *net.buffers()]
    good = idf.extract_state_dict(net, by="deepcopy")
    params, buffers = good
    wrong = [
        good._replace(params={k: v for k, v in params.items() if k != "first.bias"}),
        good._replace(params={**params, "more": torch.ones(1)}),
        good._replace(params={**params, "first.bias": torch.ones(4)}),
        good._replace(buffers={**buffers, "shift": torch.ones(2)}),
        good._replace(buffers={"shift": buffers["shift"]}),
        idf.extract_state_dict(nn.Linear(3, 3)),
        net.state_dict(),
    ]
    for state in wrong:
        with pytest.raises(ValueError, match="recover_state_dict: "):
            idf.recover_state_dict(net, state)
        assert all(a is b for a, b in zip([*net.parameters(), *net.buffers()], held, strict=True))
    tree = {"a": torch.ones(2), "b": [torch.ones(1)]}
    kept = leaves(tree)
    for other in ({"a": torch.ones(2)}, {"a": torch.ones(2), "b": [torch.ones(3)]}, [torch.ones(2)], None):
        with pytest.raises(ValueError, match="does not fit this target"):
            idf.recover_state_dict(tree, other)
        assert all(a is b for a, b in zip(leaves(tree), kept, strict=True))
    inner = idf.MetaAdam(net, lr=0.1)
    before = inner.state
    with pytest.raises(ValueError, match="does not belong to this optimizer"):
        idf.recover_state_dict(inner, idf.extract_state_dict(idf.MetaSGD(net, lr=0.1)))
    assert inner.state is before


def test_tensors_in_tuples_cannot_be_exchanged():
    for tree in ((torch.ones(1),), {"a": torch.ones(1), "b": (torch.zeros(1), [])}, torch.ones(1)):
        kept = leaves(tree)
        with pytest.raises(TypeError, match="cannot be replaced"):
            idf.recover_state_dict(tree, idf.extract_state_dict(tree, by="deepcopy"))
        assert all(a is b for a, b in zip(leaves(tree), kept, strict=True))


# --- stop_gradient ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accelerated", [None, False])
def test_a_module_and_its_optimizer_are_cut_off_in_place(accelerated):
    net, lr = Net(), torch.tensor(0.1, dtype=F64, requires_grad=True)
    start = net.first.weight
    inner = idf.MetaAdam(net, lr=lr if accelerated is False else 0.1, use_accelerated_op=accelerated)
    steps(net, inner, 2)
    held, moments, loss, total = [*net.parameters()], leaves(inner.state), loss_of(net), net.first.weight.sum()
    by_reference, values = idf.extract_state_dict(net), [p.detach().clone() for p in net.parameters()]
    idf.stop_gradient(net)
    assert any(not t.is_leaf for t in moments)
    idf.stop_gradient(inner)
    assert all(p is q for p, q in zip(net.parameters(), held, strict=True))
    assert_same(held, values)
    assert all(p.is_leaf for p in held) and [p.requires_grad for p in held] == [True] * 4 + [False]
    assert all(a is b and a.is_leaf and not a.requires_grad for a, b in zip(leaves(inner.state), moments, strict=True))
    assert by_reference.params["first.weight"].is_leaf
    # What was computed from them keeps its graph, down to where they began, but not their values.
    with pytest.raises(RuntimeError, match="detached in-place"):
        torch.autograd.grad(loss, start)
    assert torch.autograd.grad(total, net.first.weight, allow_unused=True) == (None,)
    # Meta-gradients begin anew.
    inner.step(loss_of(net))
    assert torch.autograd.grad(loss_of(net), held[0])[0].norm() > 0
    assert torch.autograd.grad(loss_of(net), start, allow_unused=True) == (None,)


def test_a_state_or_a_tree_is_cut_off_in_place():
    net = Net()
    inner = idf.MetaSGD(net, lr=0.1)
    steps(net, inner, 1)
    state = idf.extract_state_dict(net, by="copy")
    w = torch.ones(2, requires_grad=True)
    tree = {"a": [w * 2, w, torch.ones(2)], "b": 3}
    for target in (state, tree):
        flags = [t.requires_grad for t in leaves(target)]
        idf.stop_gradient(target)
        assert all(t.is_leaf for t in leaves(target))
        assert [t.requires_grad for t in leaves(target)] == flags
    assert tree["a"][1] is w
    assert not net.first.weight.is_leaf
    idf.stop_gradient([])


def test_a_view_is_refused_and_nothing_is_changed():
    w = torch.ones(4, requires_grad=True) * 2
    tree = [w * 3, w[:2], w * 4]
    with pytest.raises(ValueError, match=r"a tensor of shape \[2\] is a view"):
        idf.stop_gradient(tree)
    assert not any(t.is_leaf for t in tree)
    idf.stop_gradient([torch.ones(4)[:2]])


# --- module_clone -----------------------------------------------------------------------------------------------------


@each_by
def test_a_module_in_the_middle_of_a_graph_can_be_cloned(by):
    net, lr = Net(), torch.tensor(0.1, dtype=F64, requires_grad=True)
    inner = idf.MetaSGD(net, lr=lr)
    steps(net, inner, 2)
    twin = copy.deepcopy(net)
    assert_same(list(twin.parameters()), [p.detach() for p in net.parameters()])
    needs = [(p.is_leaf, p.requires_grad) for p in twin.parameters()]
    assert needs == [(True, p.requires_grad) for p in net.parameters()]
    clone = idf.module_clone(net, by=by)
    assert type(clone) is Net and clone is not net and clone.norm is not net.norm
    assert clone.first.weight is clone.last.weight
    mine, theirs = dict(net.named_parameters()), dict(clone.named_parameters())
    assert all((mine[name] is theirs[name]) == (by == "reference") for name in mine)
    assert [p.requires_grad for p in theirs.values()] == [p.requires_grad for p in mine.values()]
    assert all(b is not c for b, c in zip(net.buffers(), clone.buffers(), strict=True))
    (found,) = torch.autograd.grad(loss_of(clone), lr, allow_unused=True, retain_graph=True)
    (expected,) = torch.autograd.grad(loss_of(net), lr)
    assert found is None if by == "deepcopy" else torch.equal(found, expected)
    means = net.norm.running_mean.clone()
    for module in (net, clone):
        assert torch.equal(module.norm.running_mean, means)
    clone(data())
    assert torch.equal(net.norm.running_mean, means) and not torch.equal(clone.norm.running_mean, means)


@each_by
def test_a_clone_of_a_recurrent_net_computes_with_its_own_tensors(by):
    torch.manual_seed(0)
    net, x = nn.LSTM(2, 3), torch.randn(4, 1, 2)
    inner = idf.MetaSGD(net, lr=0.1)
    inner.step(net(x)[0].sum())
    clone = idf.module_clone(net, by=by)
    assert torch.equal(clone(x)[0], net(x)[0])
    with torch.no_grad():
        for p in clone.parameters():
            p.zero_()
    assert torch.equal(clone(x)[0], torch.zeros(4, 1, 3))
    assert torch.equal(net(x)[0], torch.zeros(4, 1, 3)) == (by == "reference")


@each_by
def test_a_clone_of_a_meta_optimizer_steps_a_clone_of_its_module(by):
    net = Net()
    inner = idf.MetaAdam(net, lr=0.1)
    steps(net, inner, 2)
    twin = idf.module_clone(inner, by=by)
    assert type(twin) is idf.MetaAdam and twin.module is not net
    kept = [t.detach().clone() for t in (*net.parameters(), *net.buffers(), *leaves(inner.state))]
    ahead = steps(twin.module, twin, 2)
    assert_same([*net.parameters(), *net.buffers(), *leaves(inner.state)], kept)
    assert_same(steps(net, inner, 2), ahead)


@each_by
def test_a_clone_of_a_tree_is_its_state(by):
    w = torch.ones(2, requires_grad=True)
    tree = {"a": w * 2, "b": (w, 3)}
    clone = idf.module_clone(tree, by=by)
    assert clone["b"][1] == 3 and type(clone["b"]) is tuple
    assert (clone["a"] is tree["a"]) == (clone["b"][0] is w) == (by == "reference")
    assert (clone["a"].grad_fn is None) == (by == "deepcopy")
    assert_same(leaves(clone), leaves(tree))


@each_by
def test_what_is_tied_in_a_tree_stays_tied(by):
    w = torch.ones(2, requires_grad=True)
    clone = idf.module_clone({"a": w, "b": [w, torch.ones(2)]}, by=by)
    assert clone["a"] is clone["b"][0] is not clone["b"][1]
    (grad,) = torch.autograd.grad((clone["a"] * clone["b"][0]).sum(), clone["a"])
    assert torch.equal(grad, torch.full((2,), 2.0))


class Inner(idf.nn.ImplicitMetaGradientModule):
    def __init__(self, prior: nn.Module, penalty: Tensor) -> None:
        super().__init__()
        self.prior, self.penalty, self.own = prior, penalty, nn.Linear(3, 1).double()

    def objective(self, x: Tensor) -> Tensor:
        return ((self.own(x) - 1) ** 2).mean() + self.penalty * (self.own.weight - self.prior.weight).square().sum()

    def solve(self, x: Tensor) -> Inner:
        with torch.enable_grad():
            for _ in range(300):
                grads = torch.autograd.grad(self.objective(x), [*self.parameters()])
                with torch.no_grad():
                    for p, g in zip(self.parameters(), grads, strict=True):
                        p.sub_(0.3 * g)
        return self


@each_by
def test_a_module_with_meta_parameters_and_its_clone_keep_them_apart(by):
    torch.manual_seed(0)
    net = Inner(nn.Linear(3, 1).double(), torch.tensor(0.3, dtype=F64, requires_grad=True))
    state, x = idf.extract_state_dict(net), data()
    weight = net.solve(x).own.weight
    (slope,) = torch.autograd.grad(weight.sum(), net.penalty, retain_graph=True)
    clone = idf.module_clone(net, by=by)
    assert [name for name, _ in clone.named_parameters()] == ["own.weight", "own.bias"]
    metas = [name for name, _ in net.named_meta_parameters()]
    assert [name for name, _ in clone.named_meta_parameters()] == metas
    (again,) = torch.autograd.grad(clone.solve(x).own.weight.sum(), clone.penalty)
    torch.testing.assert_close(again, slope, rtol=1e-10, atol=0)
    assert torch.equal(net.own.weight, weight)
    idf.recover_state_dict(net, state)
    assert net.own.weight is state.params["own.weight"]
    torch.testing.assert_close(
        torch.autograd.grad(net.solve(x).own.weight.sum(), net.penalty)[0], slope, rtol=1e-10, atol=0
    )


def test_a_clone_keeps_nothing_of_what_it_was_cloned_from():
    net = Net()
    clone = idf.module_clone(net, by="deepcopy")
    gone = [weakref.ref(p) for p in net.parameters()]
    del net
    gc.collect()
    assert [r() for r in gone] == [None] * len(gone)
    assert loss_of(clone).isfinite()


class Tuned(idf.nn.MetaGradientModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.head = nn.Linear(2, 1)


@each_by
def test_the_state_of_a_module_with_meta_parameters_leaves_these_alone(by: By) -> None:
    net = nn.Linear(3, 2)
    tuned = Tuned(net)
    state = idf.extract_state_dict(tuned, by=by)
    assert list(state.params) == ["head.weight", "head.bias"]
    idf.recover_state_dict(tuned, state)
    clone = idf.module_clone(tuned, by=by)
    for module in tuned, clone:
        assert [p is q for p, q in zip(module.meta_parameters(), net.parameters(), strict=True)] == [True, True]
    assert (clone.head.weight is tuned.head.weight) == (by == "reference")
