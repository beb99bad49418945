"""Checkpoints of the optimizers, in both directions between torch's and these, and hooks."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from checks.copies import assert_same, saved
from tables.fronts import F32, F64, FRONTS, assert_close, each_plain, loss_of, lr_of, pair, run, start
from tables.optimizers import each_row
from torch import nn

import implicitdiff as idf

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
    checkpoint = saved({"params": half, "optimizer": ours.state_dict()}, weights_only=True)
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
    checkpoint = saved({"params": half, "optimizer": ours.state_dict()}, weights_only=True)
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
    ours.load_state_dict(saved(reference.state_dict(), weights_only=True))
    assert_close(run(ours, mine, range(8, 16)), run(reference, theirs, range(8, 16)))


@each_row
def test_checkpoints_from_here_go_on_in_torch(row):
    mine, ours, theirs, _ = pair(row)
    half = run(ours, mine, range(8))
    for p, q in zip(theirs, half, strict=True):
        p.data.copy_(q)
    reference = row.reference(theirs)
    reference.load_state_dict(saved(ours.state_dict(), weights_only=True))
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
    again.load_state_dict(saved(ours.state_dict(), weights_only=True))
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
