"""Conversion, state_dict, copies and functional_call of an ImplicitMetaGradientModule."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from checks.copies import pickled, saved
from tables.meta_modules import F64, SLOPE, Net, Ridge, X, Y, close, expected_grad, grad, leaf, meta_net, names, ridge
from torch import nn
from torch.func import functional_call

# What an nn.Module does


def test_conversion_before_solve_is_about_both_kinds():
    penalty = torch.tensor(0.7, requires_grad=True)
    module = Ridge(penalty).to(torch.float32).to(F64)
    assert module.penalty is penalty and penalty.dtype == module.w.dtype == F64
    slope = grad(module.solve(X, Y).w.sum(), penalty)
    close(slope, expected_grad(lambda p: ridge(p).sum(), penalty.item()))


def test_conversion_after_solve_keeps_the_derivative():
    penalty = leaf()
    module = Ridge(penalty).solve(X, Y)
    w = module.w
    module.to(torch.float32)
    assert module.w.dtype == torch.float32 and module.penalty is penalty
    torch.testing.assert_close(module.w.detach(), w.detach().float())
    begun = []

    class Watched(Ridge):
        def solve(self, x, y):
            begun.append(self.w.dtype)
            return super().solve(x, y)

    module.__class__ = Watched
    module.solve(X.float(), Y.float())
    assert begun == [torch.float32]


def test_conversion_after_solve_goes_through_the_graph():
    source = leaf()
    module = Ridge(source.exp())
    module.solve(X, Y)
    module.to(torch.float32)
    slope = expected_grad(lambda s: ridge(s.exp()).sum())
    torch.testing.assert_close(grad(module.w.sum(), source, retain_graph=True).float(), slope.float())
    assert module.penalty.dtype == torch.float32
    slope = grad(module.solve(X.float(), Y.float()).w.sum(), source)
    torch.testing.assert_close(slope.float(), expected_grad(lambda s: ridge(s.exp()).sum()).float())


def test_single_precision_gives_single_precision():
    penalty = torch.tensor(0.7, requires_grad=True)
    module = Ridge(penalty).to(torch.float32)
    slope = grad(module.solve(X.float(), Y.float()).w.sum(), penalty)
    assert slope.dtype == torch.float32
    torch.testing.assert_close(slope, SLOPE.float())


@pytest.mark.parametrize("solved", [False, True])
def test_a_state_goes_round_by_state_dict(solved):
    module = Net(leaf(1.0), meta_net())
    if solved:
        module.solve(X, Y)
    state = module.state_dict()
    assert list(state) == ["penalty", *(f"{n}.{k}" for n in ("meta_net", "net") for k in meta_net().state_dict())]
    assert not any(v.requires_grad for v in state.values())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    penalty = leaf(2.0)
    other = Net(penalty, nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).to(F64))
    if solved:
        other.solve(X, -Y)
    other.load_state_dict(torch.load(file))
    assert other.penalty is penalty and penalty.item() == 1.0
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())
    assert all(isinstance(p, nn.Parameter) for p in other.parameters())
    found = [grad((m.solve(X, Y).net(X) ** 3).sum(), m.penalty) for m in (module, other)]
    close(*found, 1e-11)


def test_loading_a_state_leaves_the_derivative_of_the_solution_before():
    penalty = leaf()
    module = Ridge(penalty)
    w = module.solve(X, Y).w
    module.load_state_dict({"penalty": penalty.detach(), "w": torch.ones(2)}, strict=True)
    close(w.detach(), ridge(0.7))
    assert torch.equal(module.w, torch.ones(2, dtype=F64)) and module.w.is_leaf
    with pytest.raises(RuntimeError, match="inplace"):  # the penalty was loaded in place
        grad(w.sum(), penalty)


def test_zero_grad_is_about_both_kinds():
    penalty = leaf()
    module = Ridge(penalty)
    module.objective(X, Y).backward()
    assert penalty.grad is not None and module.w.grad is not None
    module.zero_grad(set_to_none=False)
    assert penalty.grad is not None and not penalty.grad.any() and not module.w.grad.any()
    module.zero_grad()
    assert penalty.grad is None and module.w.grad is None
    module.solve(X, Y).w.sum().backward()
    module.zero_grad()
    assert penalty.grad is None


def test_training_and_evaluation_mode_are_about_both_kinds():
    module = Net(leaf(), meta_net())
    module.eval()
    assert not module.meta_net.training and not module.net.training
    module.train()
    assert module.meta_net.training and module.net.training
    assert len(list(module.meta_parameters())) == 5


def copied(module):
    return copy.deepcopy(module)


@pytest.mark.parametrize("again", [copied, pickled, saved])
def test_a_copy_knows_its_kinds_and_is_independent(again):
    module = Net(leaf(1.0), meta_net())
    other = again(module)
    assert names(other) == names(module)
    assert not {*map(id, module.parameters())} & {*map(id, other.parameters())}
    found = [grad((m.solve(X, Y).net(X) ** 3).sum(), *m.meta_parameters()) for m in (module, other)]
    for mine, its in zip(*found, strict=True):
        close(mine, its)


def test_functional_call_exchanges_meta_parameters():
    module, at = Ridge(leaf()), torch.tensor(1.3, dtype=F64)

    def outer(penalty):
        return (functional_call(module, {"penalty": penalty}, (X, Y)) ** 3).sum()

    def closed(penalty):
        return (ridge(penalty) ** 3).sum()

    for _ in range(2):
        for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
            close(transform(outer)(at), transform(closed)(at), 1e-11)
    close(grad(module.solve(X, Y).w.sum(), module.penalty), SLOPE)
    assert names(module) == (["w"], ["penalty"]) and module.penalty.item() == 0.7


def test_functional_call_exchanges_the_parameters_of_meta_modules():
    net = meta_net()

    class Inner(Net):
        def forward(self):
            return (self.solve(X, Y).net(X) ** 3).sum()

    module = Inner(leaf(1.0), net)
    metas = {name: p.detach() for name, p in module.named_meta_parameters()}
    found = torch.func.grad(lambda metas: functional_call(module, metas, ()))(metas)
    wanted = grad(module(), *module.meta_parameters())
    for mine, other in zip(found.values(), wanted, strict=True):
        close(mine, other, 1e-10)
