"""Pure functions out of an optimizer of torch, and FuncOptimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from checks.copies import assert_same
from tables.fronts import F64, FRONTS, _lr, assert_close, each_plain, go_on, loss_of, lr_of, run, start
from tables.optimizers import each_row
from torch import nn

import implicitdiff as idf

# --- pure functions out of an optimizer -------------------------------------------------------------------------------


@each_row
def test_what_is_converted_from_torch_goes_on_as_torch_does(row):
    params = start()
    groups = [{"params": params[:1], "lr": 0.5 * lr_of(row)}, {"params": params[1:]}]
    reference = row.reference(groups, **{"lr": lr_of(row)} | row.options)
    run(reference, params, range(7), {(k, 3) for k in range(3)})
    kept, values = copy.deepcopy(reference.state_dict()), [p.detach().clone() for p in params]
    ours = idf.from_torch(reference)
    assert isinstance(ours, FRONTS[row.factory])
    assert [p for group in ours.param_groups for p in group["params"]] == params
    pures = ours.pure()
    functional = go_on(pures, range(7, 14), [0, 1, 2, 3])
    assert_same([p.detach() for p in params], values)
    assert_same(reference.state_dict(), kept)
    by_object = run(ours, params, range(7, 14), ())
    assert_same(reference.state_dict(), kept)
    for p, q in zip(params, values, strict=True):
        p.data.copy_(q)
    expected = run(reference, params, range(7, 14))
    assert_close(functional, expected)
    assert_close(by_object, expected)


def test_adam_with_decoupled_decay_becomes_adamw():
    params = start()
    reference = torch.optim.Adam(params, 0.05, weight_decay=0.3, decoupled_weight_decay=True)
    run(reference, params, range(3))
    ours = idf.from_torch(reference)
    assert isinstance(ours, idf.AdamW)
    functional = go_on(ours.pure(), range(3, 8), [0, 1, 2, 3])
    assert_close(functional, run(reference, params, range(3, 8)))
    mixed = torch.optim.Adam([{"params": params[:2], "decoupled_weight_decay": True}, {"params": params[2:]}])
    with pytest.raises(ValueError, match="decoupled_weight_decay"):
        idf.from_torch(mixed)


def test_what_has_begun_with_a_scheduler_goes_on_with_it():
    params = start()
    reference = torch.optim.SGD(params, 0.05, momentum=0.9)
    scheduler = _lr.StepLR(reference, 2, 0.5)
    run(reference, params, range(3), after=lambda k: scheduler.step())
    ours = idf.from_torch(reference)
    assert ours.param_groups[0]["lr"] == 0.025 and ours.param_groups[0]["initial_lr"] == 0.05


def test_optimizers_of_torch_without_a_counterpart_are_refused():
    class Mine(torch.optim.Adam):
        pass

    for other in (torch.optim.Rprop(start()), torch.optim.LBFGS(start()), Mine(start())):
        with pytest.raises(TypeError, match=f"{type(other).__name__} has no counterpart here"):
            idf.from_torch(other)


@each_plain
def test_the_pure_state_is_begun_where_there_has_been_no_step(row):
    params = start()
    (pure,) = FRONTS[row.factory](params, **row.options).pure()
    expected = row.factory(**row.options).init(params)
    assert_same(pure.state, expected)
    assert all(p is q for p, q in zip(pure.params, params, strict=True))


# --- FuncOptimizer ----------------------------------------------------------------------------------------------------


TREES = {
    "dict": lambda p: {"a": p[0], "b": {"c": p[2]}},
    "tuple": lambda p: (p[0], [p[2]]),
    "tensor": lambda p: p[0],
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shape", TREES)
@each_plain
def test_a_func_optimizer_takes_the_steps_of_torch(row, shape, inplace):
    mine, theirs = TREES[shape](start()), TREES[shape](start())
    leaves = torch.utils._pytree.tree_leaves
    optimizer = idf.FuncOptimizer(row.factory(**{"lr": lr_of(row)} | row.options), inplace=inplace)
    reference = row.reference(leaves(theirs), **{"lr": lr_of(row)} | row.options)
    begun = mine
    for k in range(6):
        mine = optimizer.step(loss_of(leaves(mine), k), mine)
    assert all((p is q) == inplace for p, q in zip(leaves(mine), leaves(begun), strict=True))
    assert type(mine) is type(begun)
    assert_close([p.detach() for p in leaves(mine)], run(reference, leaves(theirs), range(6)))


def test_steps_of_a_func_optimizer_are_differentiable_unless_in_place():
    lr = torch.tensor(0.1, dtype=F64, requires_grad=True)
    w = torch.tensor([1.0, -2.0], dtype=F64, requires_grad=True)

    def end(lr, w):
        optimizer, p = idf.FuncOptimizer(idf.adam(lr)), w * 1
        for _ in range(3):
            p = optimizer.step((p**4).sum(), p)
        return (p * p).sum()

    assert torch.autograd.gradcheck(end, (lr, w), rtol=1e-6, atol=1e-8)
    assert torch.autograd.gradgradcheck(end, (lr, w), rtol=1e-5, atol=1e-7)
    constant = idf.FuncOptimizer(idf.sgd(0.1), inplace=True)
    stepped = constant.step((w**2).sum(), w)
    assert stepped is w and w.is_leaf
    assert constant.step((w**2).sum(), w, inplace=False).grad_fn is not None


def test_a_func_optimizer_leaves_alone_what_has_no_gradient():
    params = [torch.ones(2, requires_grad=True), torch.ones(2), torch.ones(2, requires_grad=True)]
    stepped = idf.FuncOptimizer(idf.sgd(0.5)).step(params[0].sum(), params)
    assert stepped[1] is params[1] and stepped[2] is params[2]
    assert torch.equal(stepped[0].detach(), torch.full((2,), 0.5))
    with pytest.raises(ValueError, match="depends on none of the parameters"):
        idf.FuncOptimizer(idf.sgd(0.5)).step(torch.ones(()), params)
    with pytest.raises(ValueError, match="depends on none of the parameters"):
        idf.FuncOptimizer(idf.sgd(0.5)).step(stepped[0].detach().requires_grad_().sum(), params)
    with pytest.raises(TypeError, match="must be a GradientTransformation"):
        idf.FuncOptimizer(idf.sgd)


def test_a_func_optimizer_goes_on_from_its_state():
    p, optimizer = torch.ones(2, dtype=F64, requires_grad=True), idf.FuncOptimizer(idf.adam(0.1))
    assert optimizer.state_dict() is None
    q = optimizer.step((p**2).sum(), p)
    other = idf.FuncOptimizer(idf.adam(0.1))
    other.load_state_dict(optimizer.state_dict())
    loss = (q**3).sum()
    assert torch.equal(optimizer.step(loss, q), other.step((q**3).sum(), q))
    with pytest.raises(ValueError, match="does not belong to this optimizer"):
        optimizer.load_state_dict(idf.sgd(0.1).init(p))
    with pytest.raises(ValueError, match="does not belong to this optimizer"):
        optimizer.load_state_dict(idf.adam(0.1).init(torch.ones(3, dtype=F64)))


def test_wrong_arguments_are_told_with_those_that_it_takes():
    with pytest.raises(TypeError, match=r"RMSProp: .*'nesterov'; the signature is \(params, lr"):
        idf.RMSProp([torch.zeros(1)], nesterov=False)


def test_a_schedule_goes_on_where_its_parameter_has_no_gradient() -> None:
    params = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = idf.SGD(params, lr=[1.0, lambda count: 0.1 ** count.double()])
    for step in range(3):
        params[0].grad, params[1].grad = torch.ones(1), None if step == 1 else torch.ones(1)
        optimizer.step()
    torch.testing.assert_close(params[1].detach(), torch.tensor([-1.01]))
