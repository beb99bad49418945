"""Our optimizers as torch's: beside those of torch.optim, and with what is written for these."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from typing import Any

import pytest
import torch
from optimizers import ROWS, Row, each_row
from torch import Tensor, nn

import implicitdiff as idf

F64, F32 = torch.float64, torch.float32

# Of runs of up to 40 steps from parameters of size 1: a few hundred roundings.
TOLERANCE = {F64: 1e-13, F32: 2e-6, torch.complex128: 1e-13}

FRONTS = {
    idf.sgd: idf.SGD,
    idf.adam: idf.Adam,
    idf.adamw: idf.AdamW,
    idf.rmsprop: idf.RMSProp,
    idf.adagrad: idf.AdaGrad,
    idf.adadelta: idf.AdaDelta,
    idf.adamax: idf.AdaMax,
    idf.radam: idf.RAdam,
}

_lr = torch.optim.lr_scheduler


def lr_of(row: Row) -> float:
    return 0.5 if row.factory is idf.adadelta else 0.05


def start(dtype: torch.dtype = F64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.complex128 if dtype.is_complex else F64
    shapes: list[Any] = [(3, 2), (), (5,), (2, 1, 2)]
    made = [torch.randn(shape, dtype=drawn, generator=generator).to(dtype) for shape in shapes]
    return [p.requires_grad_() for p in made]


def loss_of(params: list[Tensor], k: int) -> Tensor:
    """A smooth function, another one at each step."""
    terms = [(0.5 * (p - target(k, i)) ** 2 + 0.3 * (2 * p).cos()).sum() for i, p in enumerate(params)]
    return sum(terms[1:], terms[0])


def target(k: int, i: int) -> float:
    return 0.4 * math.sin(k + i)


def set_gradients(params: list[Tensor], k: int, missing: Any = ()) -> None:
    """Those of `loss_of`, for complex parameters as well."""
    for i, p in enumerate(params):
        q = p.detach()
        p.grad = None if (k, i) in missing else q - target(k, i) - 0.6 * (2 * q).sin()


def run(optimizer: Any, params: list[Tensor], steps: range, missing: Any = (), after: Any = None) -> list[Tensor]:
    for k in steps:
        set_gradients(params, k, missing)
        optimizer.step()
        if after is not None:
            after(k)
    return [p.detach().clone() for p in params]


def assert_close(params: Any, expected: Any) -> None:
    for p, q in zip(params, expected, strict=True):
        assert p.dtype == q.dtype
        torch.testing.assert_close(p, q, rtol=TOLERANCE[p.dtype], atol=TOLERANCE[p.dtype])


def assert_same(tree: Any, expected: Any) -> None:
    """Bit for bit."""
    leaves, spec = torch.utils._pytree.tree_flatten(tree)
    others, other = torch.utils._pytree.tree_flatten(expected)
    assert spec == other
    for a, b in zip(leaves, others, strict=True):
        if isinstance(a, Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b)
        else:
            assert a == b


def pair(row: Row, dtype: torch.dtype = F64, **options: Any) -> tuple[list[Tensor], Any, list[Tensor], Any]:
    """Ours and torch's, at the same parameters."""
    mine, theirs = start(dtype), start(dtype)
    given = {"lr": lr_of(row)} | row.options | options
    return mine, FRONTS[row.factory](mine, **given), theirs, row.reference(theirs, **given)


def saved(obj: Any) -> Any:
    file = io.BytesIO()
    torch.save(obj, file)
    file.seek(0)
    return torch.load(file)


PLAIN = [row for row in ROWS if row.name in ("sgd-momentum", "adam", "adamw", "rmsprop-momentum", "radam")]
STATEFUL = [row for row in ROWS if row.name != "sgd"]
each_kin = pytest.mark.parametrize("row", [row for row in ROWS if not row.options], ids=lambda row: row.name)
each_plain = pytest.mark.parametrize("row", PLAIN, ids=lambda row: row.name)
each_stateful = pytest.mark.parametrize("row", STATEFUL, ids=lambda row: row.name)


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
    with pytest.raises(ValueError, match="lr has to be"):
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
    with pytest.raises(ValueError, match="lr has to be one for all leaves"):
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
    for wrong, match in [({"lr": -1.0}, "lr has to be"), ({"betas": (0.9, 1.5)}, "betas"), ({"eps": math.nan}, "eps")]:
        with pytest.raises(ValueError, match=match):
            ours.add_param_group({"params": start()[1:], **wrong})
    with pytest.raises(ValueError, match="decoupled_weight_decay=True"):
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


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16])
@each_row
def test_a_run_goes_on_bit_for_bit_from_a_checkpoint(row, dtype):
    params = start(dtype)
    lr = lr_of(row)

    def make(p):
        return FRONTS[row.factory]([{"params": p[:2], "lr": 0.5 * lr}, {"params": p[2:]}], **{"lr": lr} | row.options)

    ours, missing = make(params), {(k, 3) for k in range(8)}
    half = run(ours, params, range(8), missing)
    checkpoint = saved({"params": half, "optimizer": ours.state_dict()})
    end = run(ours, params, range(8, 16))
    again = [p.clone().requires_grad_() for p in checkpoint["params"]]
    resumed = FRONTS[row.factory]([{"params": again[:2]}, {"params": again[2:]}])
    resumed.load_state_dict(checkpoint["optimizer"])
    assert_same(run(resumed, again, range(8, 16)), end)
    assert_same(resumed.state_dict(), ours.state_dict())


@pytest.mark.parametrize(
    "transformation",
    [
        idf.adam(0.1, amsgrad=True),
        idf.chain(idf.clip_grad_norm(0.5), idf.optim.scale_by_adam(), idf.optim.scale(-0.1)),
        idf.adam(idf.schedule.cosine(0.1, 20)),
        idf.optim.inject_hyperparams(idf.adamw)(lr=0.1, betas=(0.8, 0.9)),
        idf.optim.scale(-0.1),
    ],
    ids=["adam", "chain", "scheduled", "injected", "stateless"],
)
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
def test_a_run_of_any_transformation_goes_on_bit_for_bit_from_a_checkpoint(transformation, dtype):
    params = start(dtype)
    make = lambda p: idf.Optimizer([{"params": p[:2]}, {"params": p[2:]}], transformation)  # noqa: E731
    ours = make(params)
    half = run(ours, params, range(8), {(k, 1) for k in range(4)})
    checkpoint = saved({"params": half, "optimizer": ours.state_dict()})
    end = run(ours, params, range(8, 16))
    again = [p.clone().requires_grad_() for p in checkpoint["params"]]
    resumed = make(again)
    resumed.load_state_dict(checkpoint["optimizer"])
    assert_same(run(resumed, again, range(8, 16)), end)
    assert_same(resumed.state_dict(), ours.state_dict())


@each_row
def test_checkpoints_of_torch_go_on_here(row):
    mine, ours, theirs, reference = pair(row)
    half = run(reference, theirs, range(8))
    for p, q in zip(mine, half, strict=True):
        p.data.copy_(q)
    ours = FRONTS[row.factory](mine)
    ours.load_state_dict(saved(reference.state_dict()))
    assert_close(run(ours, mine, range(8, 16)), run(reference, theirs, range(8, 16)))


@each_row
def test_checkpoints_from_here_go_on_in_torch(row):
    mine, ours, theirs, _ = pair(row)
    half = run(ours, mine, range(8))
    for p, q in zip(theirs, half, strict=True):
        p.data.copy_(q)
    reference = row.reference(theirs)
    reference.load_state_dict(saved(ours.state_dict()))
    assert_close(run(reference, theirs, range(8, 16)), run(ours, mine, range(8, 16)))


def test_decoupled_decay_goes_through_a_checkpoint_to_torchs_adam():
    mine, theirs = start(), start()
    ours, reference = idf.AdamW(mine, 0.05, weight_decay=0.3), torch.optim.Adam(theirs)
    reference.load_state_dict(ours.state_dict())
    assert_close(run(ours, mine, range(5)), run(reference, theirs, range(5)))


@pytest.mark.parametrize("make", [idf.Adam, lambda p: idf.Optimizer(p, idf.adam())], ids=["Adam", "Optimizer"])
def test_two_optimizers_do_not_share_a_state_that_one_loaded_from_the_other(make):
    params, others = start(), start()
    ours, other = make(params), make(others)
    run(ours, params, range(3))
    other.load_state_dict(ours.state_dict())
    kept = copy.deepcopy(ours.state_dict())
    run(other, others, range(5))
    assert_same(ours.state_dict(), kept)


@pytest.mark.parametrize("make", [idf.Adam, lambda p: idf.Optimizer(p, idf.adam())], ids=["Adam", "Optimizer"])
def test_moments_of_half_precision_stay_in_float32_through_a_checkpoint(make):
    params = start(torch.bfloat16)
    ours = make(params)
    run(ours, params, range(3))
    again = make(params)
    again.load_state_dict(saved(ours.state_dict()))
    for optimizer in (ours, again):
        moments = [t for entry in optimizer.state_dict()["state"].values() for t in entry.values() if t.dim()]
        assert {t.dtype for t in moments} - {torch.int64} == {F32}
    assert_same(again.state_dict()["state"], ours.state_dict()["state"])


def test_moments_are_loaded_in_the_precision_of_the_parameters():
    params, others = start(F64), start(F32)
    for make in (idf.Adam, lambda p: idf.Optimizer(p, idf.adam())):
        ours, other = make(params), make(others)
        run(ours, params, range(3))
        other.load_state_dict(ours.state_dict())
        run(other, others, range(3))


def unfit() -> dict[str, Any]:
    params = start()
    adam = idf.Adam(params)
    run(adam, params, range(2))
    state = copy.deepcopy(adam.state_dict())

    def changed(**options: Any) -> Any:
        other = copy.deepcopy(state)
        other["param_groups"][0].update(options)
        return other

    def of(make: Any, count: int = 4) -> Any:
        params = start(seed=1)[:count]
        other = make(params)
        for p in params:
            p.grad = torch.ones_like(p)
        other.step()
        return other.state_dict()

    short, number = copy.deepcopy(state), copy.deepcopy(state)
    short["state"][0]["exp_avg"] = torch.zeros(7, dtype=F64)
    number["state"][0]["exp_avg"] = 3.0
    return {
        "sgd": of(lambda p: idf.SGD(p, momentum=0.9)),
        "rmsprop": of(idf.RMSProp),
        "adamw": of(idf.AdamW),
        "torch's adamw": of(torch.optim.AdamW),
        "torch's rmsprop": of(torch.optim.RMSprop),
        "a group's": of(lambda p: idf.Optimizer(p, idf.adam())),
        "fewer parameters": of(idf.Adam, 3),
        "amsgrad": changed(amsgrad=True),
        "a wrong rate": changed(lr=-1.0),
        "another shape": short,
        "a number": number,
        "two groups": of(lambda p: idf.Adam([{"params": p[:2]}, {"params": p[2:]}])),
    }


@pytest.mark.parametrize("name", unfit())
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(name):
    params, others = start(), start()
    ours, untouched = idf.Adam(params, 0.05), idf.Adam(others, 0.05)
    for optimizer, those in ((ours, params), (untouched, others)):
        run(optimizer, those, range(3))
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError):
        ours.load_state_dict(unfit()[name])
    assert_same(ours.state_dict(), before)
    assert_same(run(ours, params, range(3, 6)), run(untouched, others, range(3, 6)))


def test_a_state_that_does_not_fit_a_transformation_is_refused_and_changes_nothing():
    params = start()
    ours = idf.Optimizer(params, idf.adam())
    run(ours, params, range(3))
    before = copy.deepcopy(ours.state_dict())
    per_parameter, other = idf.Adam(params), idf.Optimizer(params, idf.adam(amsgrad=True))
    turned = idf.Optimizer(params[::-1], idf.adam())
    for optimizer in (per_parameter, other, turned):
        run(optimizer, params, range(1))
    unlike = "does not belong to this transformation"
    for wrong, match in [(per_parameter, "a state for each parameter"), (other, unlike), (turned, unlike)]:
        given = wrong.state_dict()
        with pytest.raises(ValueError, match=match):
            ours.load_state_dict(given)
        assert_same(ours.state_dict(), before)


def test_hooks_of_loading_and_saving_take_part():
    # In half precision, where torch's own loading would round the moments.
    params = start(torch.bfloat16)
    ours = idf.Adam(params)
    run(ours, params, range(2))
    other, seen = idf.Adam(start(torch.bfloat16)), []

    def doubled(optimizer, state_dict):
        state_dict = copy.deepcopy(state_dict)
        state_dict["state"][0]["exp_avg"].mul_(2)
        return state_dict

    other.register_load_state_dict_pre_hook(doubled)
    other.register_load_state_dict_post_hook(
        lambda optimizer: seen.append(optimizer.state_dict()["state"][0]["exp_avg"])
    )
    for _ in range(2):
        other.load_state_dict(ours.state_dict())
        expected = 2 * ours.state_dict()["state"][0]["exp_avg"]
        assert torch.equal(other.state_dict()["state"][0]["exp_avg"], expected)
        assert_same(seen, [expected])
        seen.clear()
    other.register_state_dict_post_hook(lambda optimizer, state_dict: {**state_dict, "more": 1})
    assert other.state_dict()["more"] == 1


# --- what is written for torch's --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [idf.Adam, lambda p, lr: idf.Optimizer(p, idf.adam(lr))], ids=["Adam", "Optimizer"])
def test_a_gradient_scaler_unscales_and_leaves_out_a_step_that_overflowed(make):
    results = []
    for construct in (make, torch.optim.Adam):
        params = start(F32)
        optimizer, scaler = construct(params, lr=0.05), torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for k in range(6):
            optimizer.zero_grad()
            scaler.scale(loss_of(params, k)).backward()
            if k == 2:
                params[1].grad.fill_(math.inf)
            if k % 2:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(params, 1.0)
            before = [p.detach().clone() for p in params]
            scaler.step(optimizer)
            scaler.update()
            assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True)) == (k == 2)
        assert scaler.get_scale() == 2.0**9
        results.append([p.detach() for p in params])
    assert_close(*results)


def test_hooks_of_a_step_run_before_and_after_it():
    params = start()
    ours, seen = idf.Adam(params), []
    ours.register_step_pre_hook(lambda o, args, kwargs: seen.append(("before", params[0].detach().clone())))
    ours.register_step_post_hook(lambda o, args, kwargs: seen.append(("after", params[0].detach().clone())))
    first = params[0].detach().clone()
    last = run(ours, params, range(1))[0]
    (before, p), (after, q) = seen
    assert (before, after) == ("before", "after")
    assert torch.equal(p, first) and torch.equal(q, last) and not torch.equal(p, q)


@each_plain
def test_a_deep_copy_goes_on_by_itself_with_the_same_numbers(row):
    mine, ours, *_ = pair(row)
    run(ours, mine, range(4))
    params, twin = copy.deepcopy((mine, ours))
    kept = copy.deepcopy(ours.state_dict())
    assert [id(p) for p in twin.param_groups[0]["params"]] == [id(p) for p in params]
    ends = run(twin, params, range(4, 9))
    assert_same(ours.state_dict(), kept)
    assert_same(run(ours, mine, range(4, 9)), ends)


@pytest.mark.parametrize("make", [idf.Adam, lambda p: idf.Optimizer(p, idf.adam())], ids=["Adam", "Optimizer"])
def test_optimizers_can_be_pickled(make):
    params = start()
    ours = make(params)
    run(ours, params, range(4))
    loaded, twin = pickle.loads(pickle.dumps((params, ours)))
    assert_same(run(twin, loaded, range(4, 9)), run(ours, params, range(4, 9)))


# --- pure functions out of an optimizer -------------------------------------------------------------------------------


def go_on(pures: Any, steps: range, order: list[int]) -> list[Tensor]:
    """The steps of the pairs, by pure functions."""
    trees, states = [[p.detach() for p in pure.params] for pure in pures], [pure.state for pure in pures]
    for k in steps:
        now = [p for tree in trees for p in tree]
        now = [now[i].clone().requires_grad_() for i in order]
        grads = iter(torch.autograd.grad(loss_of(now, k), now))
        grads = [next(grads) for _ in now]
        rest = iter([grads[order.index(i)] for i in range(len(now))])
        for i, pure in enumerate(pures):
            given = [next(rest) for _ in trees[i]]
            trees[i], states[i] = pure.transformation.step(given, states[i], trees[i])
    now = [p for tree in trees for p in tree]
    return [now[i] for i in order]


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
    with pytest.raises(TypeError, match=r"RMSProp: .*'nesterov'; it takes \(params, lr"):
        idf.RMSProp([torch.zeros(1)], nesterov=False)


def test_a_schedule_goes_on_where_its_parameter_has_no_gradient() -> None:
    params = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = idf.SGD(params, lr=[1.0, lambda count: 0.1 ** count.double()])
    for step in range(3):
        params[0].grad, params[1].grad = torch.ones(1), None if step == 1 else torch.ones(1)
        optimizer.step()
    torch.testing.assert_close(params[1].detach(), torch.tensor([-1.01]))
