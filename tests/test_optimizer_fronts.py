"""Our optimizers as torch's: beside those of torch.optim, and with what is written for these."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from checks.copies import assert_same
from tables.fronts import (
    F32,
    F64,
    FRONTS,
    _lr,
    assert_close,
    each_plain,
    go_on,
    loss_of,
    lr_of,
    pair,
    run,
    set_gradients,
    start,
)
from tables.optimizers import ROWS, Row, each_row
from torch import nn

import implicitdiff as idf

each_kin = pytest.mark.parametrize("row", [row for row in ROWS if not row.options], ids=lambda row: row.name)


def adam_row() -> Row:
    return next(row for row in ROWS if row.name == "adam")


# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32, torch.complex128])
@each_row
def test_steps_are_those_of_torch(row, dtype):
    mine, ours, theirs, reference = pair(row, dtype)
    assert isinstance(ours, torch.optim.Optimizer)
    assert_close(run(ours, mine, range(12)), run(reference, theirs, range(12)))


@each_row
def test_parameters_without_a_gradient_are_left_alone_as_in_torch(row):
    missing = {(k, i) for k in range(12) for i in range(4) if (7 * k + 3 * i) % 5 < 2 or i == 2}
    mine, ours, theirs, reference = pair(row)
    frozen = mine[2].detach().clone()
    assert_close(run(ours, mine, range(12), missing), run(reference, theirs, range(12), missing))
    assert torch.equal(mine[2], frozen)
    assert mine[2] not in ours.state, "a frozen parameter needs no state"


@each_row
def test_plain_steps_are_the_compiled_ones(row):
    runs = []
    for accelerated in (None, False):
        params = start()
        ours = FRONTS[row.factory](params, **{"lr": lr_of(row)} | row.options, use_accelerated_op=accelerated)
        runs.append(run(ours, params, range(6)))
    assert_close(*runs)


@each_kin
def test_each_kin_takes_the_arguments_of_its_transformation(row):
    front = FRONTS[row.factory]
    parameters = [*inspect.signature(front).parameters]
    assert parameters == ["params", *inspect.signature(row.factory).parameters]
    one, other = start(), start()
    given = (0.03, 0.5) if row.factory is idf.sgd else (0.03,)
    assert_same(
        run(front(one, *given), one, range(3)),
        run(front(other, lr=0.03, **{"momentum": 0.5} if given[1:] else {}), other, range(3)),
    )
    with pytest.raises(TypeError, match="learning_rate"):
        front(one, learning_rate=0.1)
    with pytest.raises(ValueError, match="lr must be"):
        front(one, lr=-1.0)


def test_a_step_returns_what_the_closure_does_and_runs_it_with_gradients_on():
    mine, ours, theirs, reference = pair(adam_row())

    def closure_for(optimizer, params):
        def closure():
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = loss_of(params, 0)
            loss.backward()
            return loss

        return closure

    for _ in range(3):
        a, b = ours.step(closure_for(ours, mine)), reference.step(closure_for(reference, theirs))
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)
    assert ours.step() is None
    reference.step()
    assert_close(mine, theirs)


def test_zero_grad_resets_gradients():
    params = start()
    ours = idf.Adam(params)
    set_gradients(params, 0)
    ours.zero_grad(set_to_none=False)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in params)
    ours.zero_grad()
    assert all(p.grad is None for p in params)


def test_a_step_without_any_gradient_changes_nothing():
    for ours in (idf.Adam(params := start()), idf.Optimizer(params := start(), idf.adam())):
        before = [p.detach().clone() for p in params]
        ours.step()
        assert_same([p.detach() for p in params], before)
        assert not ours.state_dict()["state"]


def test_parameters_are_overwritten_and_have_no_graph():
    params = start()
    memory = [p.data_ptr() for p in params]
    run(idf.Adam(params, lr=torch.tensor(0.1, dtype=F64)), params, range(2))
    assert [p.data_ptr() for p in params] == memory
    assert all(p.is_leaf and p.requires_grad for p in params)


@pytest.mark.parametrize(
    "transformation",
    [
        idf.adam(0.1),
        idf.chain(idf.clip_grad_norm(0.5), idf.sgd(0.1)),
        idf.chain(idf.optim.scale(3.0), idf.adam(0.1, weight_decay=0.3, maximize=True)),
    ],
    ids=["adam", "clipped", "chained"],
)
def test_a_step_leaves_gradients_as_they_are(transformation):
    params = start()
    set_gradients(params, 0)
    grads = [p.grad for p in params]
    values = [g.clone() for g in grads]
    idf.Optimizer(params, transformation).step()
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    assert_same(grads, values)


# --- any transformation -----------------------------------------------------------------------------------------------


def test_a_chain_is_what_torch_does_in_several_calls():
    mine, theirs = start(), start()
    chained = idf.chain(idf.clip_grad_norm(0.7), idf.adamw(0.05, weight_decay=0.2))
    ours, reference = idf.Optimizer(mine, chained), torch.optim.AdamW(theirs, 0.05, weight_decay=0.2)
    missing = {(k, k % 4) for k in range(1, 15)}
    run(ours, mine, range(15), missing)
    for k in range(15):
        set_gradients(theirs, k, missing)
        nn.utils.clip_grad_norm_(theirs, 0.7)
        reference.step()
    assert_close(mine, theirs)


def test_a_global_norm_is_that_of_a_group():
    params = [torch.zeros(2, dtype=F64, requires_grad=True) for _ in range(3)]
    for p, g in zip(params, ([3.0, 0.0], [0.0, 4.0], [30.0, 40.0]), strict=True):
        p.grad = torch.tensor(g, dtype=F64)
    clipped = idf.chain(idf.clip_grad_norm(1.0), idf.sgd(1.0))
    idf.Optimizer([{"params": params[:2]}, {"params": params[2:]}], clipped).step()
    # To the norms, 5 and 50, torch and we add 1e-6.
    expected = -torch.tensor([[3.0, 0.0], [0.0, 4.0], [30.0, 40.0]], dtype=F64)
    expected /= torch.tensor([[5.0], [5.0], [50.0]], dtype=F64) + 1e-6
    torch.testing.assert_close(torch.stack(params).detach(), expected, rtol=1e-15, atol=1e-15)


def test_a_group_that_is_added_later_has_a_state_of_its_own():
    params, others = start(), start()
    ours = idf.Optimizer(params[:2], idf.adam(0.1))
    run(ours, params, range(3))
    ours.add_param_group({"params": params[2:]})
    first, second = idf.Optimizer(others[:2], idf.adam(0.1)), idf.Optimizer(others[2:], idf.adam(0.1))
    run(first, others, range(3))
    for k in range(3, 6):
        set_gradients(others, k)
        second.step()
        first.step()
    assert_same(run(ours, params, range(3, 6)), [p.detach() for p in others])


def test_injected_hyperparameters_and_schedules_are_counted_in_the_state():
    mine, theirs = start(), start()
    scheduled = idf.adam(idf.schedule.exponential(0.1, 0.9))
    ours, reference = idf.Optimizer(mine, scheduled), torch.optim.Adam(theirs, 0.1)
    after = _lr.ExponentialLR(reference, 0.9)
    assert_close(run(ours, mine, range(10)), run(reference, theirs, range(10), after=lambda k: after.step()))
    ((_, _, state),) = ours.pure()
    assert state.count == 10
    params = start()
    injected = idf.Optimizer(params, idf.optim.inject_hyperparams(idf.sgd)(lr=0.25))
    again = start()
    assert_close(run(injected, params, range(5)), run(torch.optim.SGD(again, 0.25), again, range(5)))


def test_the_hyperparameters_of_a_transformation_are_not_a_groups():
    with pytest.raises(ValueError, match="got 'lr'; pass hyper-parameters"):
        idf.Optimizer([{"params": start(), "lr": 0.1}], idf.sgd(0.5))
    with pytest.raises(TypeError, match="must be a GradientTransformation"):
        idf.Optimizer(start(), 0.1)
    with pytest.raises(TypeError, match="must be a GradientTransformation"):
        idf.Optimizer(start(), idf.sgd)


def test_a_mask_is_refused_in_groups():
    with pytest.raises(ValueError, match="mask"):
        idf.AdamW(start(), mask=[True] * 4)


# --- schedules, and a number for each parameter -----------------------------------------------------------------------


@each_kin
def test_schedules_do_what_schedulers_of_torch_do(row):
    mine, theirs = start(), start()
    lr = lr_of(row)
    ours = FRONTS[row.factory](mine, lr=idf.schedule.exponential(lr, 0.8))
    reference = row.reference(theirs, lr=lr)
    scheduler = _lr.ExponentialLR(reference, 0.8)
    missing = {(1, i) for i in range(4)}  # a step without gradients is none
    run(ours, mine, range(8), missing=missing)
    run(reference, theirs, range(8), missing=missing, after=lambda k: None if k == 1 else scheduler.step())
    assert_close(mine, theirs)
    saved_now = ours.state_dict()["param_groups"][0]
    assert saved_now["count"] == 7 and saved_now["lr"] == pytest.approx(reference.param_groups[0]["lr"])
    pures = ours.pure()
    assert_close(go_on(pures, range(8, 10), [0, 1, 2, 3]), run(ours, mine, range(8, 10)))


def test_a_checkpoint_of_torch_goes_on_with_a_schedule():
    *_, theirs, reference = pair(adam_row(), lr=0.1)
    run(reference, theirs, range(3))
    scheduled = idf.Adam(theirs, lr=idf.schedule.piecewise([0.1, 0.01], [3]))
    scheduled.load_state_dict(reference.state_dict())
    assert scheduled.param_groups[0]["count"] == 3
    plain = idf.Adam(theirs, lr=0.5)
    plain.load_state_dict(scheduled.state_dict())
    assert plain.param_groups[0]["lr"] == pytest.approx(0.01) and "count" not in plain.param_groups[0]


@each_kin
def test_a_number_for_each_parameter_is_a_group_for_each(row):
    rates, missing = [0.1, 0.2, 0.05, 0.3], {(1, 0), (2, 2), (2, 3)}
    mine, theirs = start(), start()
    ours = FRONTS[row.factory](mine, lr=rates)
    reference = row.reference([{"params": [p], "lr": lr} for p, lr in zip(theirs, rates, strict=True)])
    assert_close(run(ours, mine, range(5), missing=missing), run(reference, theirs, range(5), missing=missing))
    with pytest.raises(ValueError, match="lr must be one for all leaves"):
        ours.add_param_group({"params": start()[:2], "lr": [0.1]})
    assert len(ours.param_groups) == 1


@pytest.mark.parametrize("make", [idf.Adam, idf.SGD, lambda p: idf.Optimizer(p, idf.adam())])
def test_state_is_converted_with_its_parameters(make):
    net = nn.Linear(2, 1)
    ours = make(net.parameters())
    for dtype in (torch.float32, F64, torch.float32, torch.bfloat16):
        net.to(dtype)
        net.zero_grad()
        net(torch.ones(1, 2, dtype=dtype)).sum().backward()
        ours.step()
        wide = F64 if dtype is F64 else torch.float32
        kept = [t for entry in ours.state.values() for key, t in entry.items() if key not in ("step", "0")]
        assert {t.dtype for t in kept} <= {wide}
        assert net.weight.dtype is dtype


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # by torch's Adagrad
@pytest.mark.parametrize("front", [idf.SGD, idf.Adagrad])
def test_sparse_gradients_step_as_in_torch(front):
    results = []
    for make in (front, getattr(torch.optim, front.__name__.replace("AdaGrad", "Adagrad"))):
        torch.manual_seed(0)
        table = nn.Embedding(5, 2, sparse=True, dtype=F64)
        optimizer = make(table.parameters(), lr=0.1)
        for k in range(3):
            optimizer.zero_grad()
            (table(torch.tensor([k, 4])) ** 2).sum().backward()
            optimizer.step()
        results.append([table.weight.detach()])
    assert_close(*results)
    with pytest.raises(TypeError, match=r"adam: .*sparse_coo.*SparseAdam"):
        idf.Adam(table.parameters()).step()


# --- groups -----------------------------------------------------------------------------------------------------------


@each_kin
def test_groups_have_hyperparameters_of_their_own_and_can_be_added_later(row):
    own = {idf.sgd: {"momentum": 0.9}, idf.rmsprop: {"centered": True}, idf.adadelta: {"rho": 0.5}}.get(row.factory)
    own = own or {"eps": 0.1}
    results = []
    for make in (FRONTS[row.factory], row.reference):
        params = start()
        groups = [{"params": params[:1], "lr": 0.2, **own}, {"params": params[1:3], "weight_decay": 0.1}]
        optimizer = make(groups, lr=lr_of(row))
        run(optimizer, params, range(5))
        optimizer.add_param_group({"params": params[3], "lr": 0.01})
        assert optimizer.param_groups[2]["weight_decay"] == optimizer.defaults["weight_decay"]
        results.append(run(optimizer, params, range(5, 12)))
    assert_close(*results)


def test_changes_of_a_groups_hyperparameters_take_part_in_the_next_step():
    mine, ours, theirs, reference = pair(adam_row())

    def change(optimizer):
        def after(k):
            group = optimizer.param_groups[0]
            group.update(
                {3: {"lr": 0.2}, 5: {"betas": (0.5, 0.6)}, 7: {"weight_decay": 0.3}, 9: {"eps": 0.1}}.get(k, {})
            )
            if k == 11:
                group["maximize"] = True

        return after

    assert_close(
        run(ours, mine, range(15), after=change(ours)), run(reference, theirs, range(15), after=change(reference))
    )


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_a_momentum_that_begins_later_begins_as_in_torch(dampening):
    results = []
    for make in (idf.SGD, torch.optim.SGD):
        params = start()
        optimizer = make(params, 0.05, momentum=0.0, dampening=dampening)
        run(optimizer, params, range(3))
        optimizer.param_groups[0]["momentum"] = 0.9
        results.append(run(optimizer, params, range(3, 8)))
    assert_close(*results)


def test_a_wrong_group_is_refused_and_not_added():
    ours = idf.Adam(start()[:1])
    for wrong, match in [({"lr": -1.0}, "lr must be"), ({"betas": (0.9, 1.5)}, "betas"), ({"eps": math.nan}, "eps")]:
        with pytest.raises(ValueError, match=match):
            ours.add_param_group({"params": start()[1:], **wrong})
    with pytest.raises(ValueError, match=r"decoupled_weight_decay must be False .* got True"):
        ours.add_param_group({"params": start()[1:], "decoupled_weight_decay": True})
    assert len(ours.param_groups) == 1


def test_parameters_may_have_names():
    net = nn.Linear(2, 1)
    ours = idf.Adam(net.named_parameters())
    assert ours.param_groups[0]["param_names"] == ["weight", "bias"]
    net(torch.ones(1, 2)).sum().backward()
    ours.step()
    assert ours.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    idf.Optimizer(net.named_parameters(), idf.sgd(0.1)).step()


# --- torch's learning-rate schedulers ---------------------------------------------------------------------------------


SCHEDULERS = {
    "StepLR": lambda o: _lr.StepLR(o, 7, 0.5),
    "LambdaLR": lambda o: _lr.LambdaLR(o, lambda k: 1 / (1 + k)),
    # Which changes the momentum, or the first beta, as well.
    "OneCycleLR": lambda o: _lr.OneCycleLR(o, 0.1, total_steps=31),
    "CyclicLR": lambda o: _lr.CyclicLR(o, 0.01, 0.1, step_size_up=4, cycle_momentum="momentum" in o.defaults),
    "CosineAnnealingWarmRestarts": lambda o: _lr.CosineAnnealingWarmRestarts(o, 6, 2),
    "MultiplicativeLR": lambda o: _lr.MultiplicativeLR(o, lambda k: 0.9),
    "ReduceLROnPlateau": lambda o: _lr.ReduceLROnPlateau(o, factor=0.5, patience=1),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@each_plain
def test_schedulers_of_torch_do_what_they_do_to_torchs(row, name):
    results, rates = [], []
    for params, optimizer in zip(*[iter(pair(row))] * 2, strict=True):
        if name == "OneCycleLR" and row.name == "rmsprop-momentum":
            optimizer.defaults["momentum"] = 0.9
        scheduler = SCHEDULERS[name](optimizer)

        def after(k, scheduler=scheduler):
            scheduler.step(*[float(k)] * (name == "ReduceLROnPlateau"))

        results.append(run(optimizer, params, range(30), after=after))
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert_close(*results)
    assert rates[0] == rates[1] != [lr_of(row)]


@pytest.mark.parametrize("accelerated", [None, False])
@pytest.mark.parametrize("name", ["StepLR", "CosineAnnealingWarmRestarts"])
def test_a_tensor_as_learning_rate_is_changed_in_place_and_read_in_each_step(name, accelerated):
    mine, theirs = start(), start()
    # A learning rate in float64 for both: torch keeps what it is given.
    ours = idf.Adam(mine, lr=torch.tensor(0.05, dtype=F64), use_accelerated_op=accelerated)
    reference = torch.optim.Adam(theirs, lr=0.05)
    one, other = SCHEDULERS[name](ours), SCHEDULERS[name](reference)
    rate = ours.param_groups[0]["lr"]
    assert_close(
        run(ours, mine, range(20), after=lambda k: one.step()),
        run(reference, theirs, range(20), after=lambda k: other.step()),
    )
    assert ours.param_groups[0]["lr"] is rate and rate != 0.05
