"""Optimizers and their states leave the process: by pickle, by torch.save, to workers that are spawned."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from typing import Any

import pytest
import torch
from checks.copies import assert_same

import implicitdiff as idf
import implicitdiff.optim as optim
import implicitdiff.schedule as schedule

PARAMS = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor(3.0)}
MASK = {"a": True, "b": False}
HALF = schedule.exponential(0.1, 0.5)

PAIRS: dict[str, idf.GradientTransformation] = {
    **{
        f.__name__: f()
        for f in (idf.sgd, idf.adam, idf.adamw, idf.rmsprop, idf.adagrad, idf.adadelta, idf.adamax, idf.radam)
    },
    "trace": optim.trace(),
    "scale_by_adam": optim.scale_by_adam(amsgrad=True),
    "scale_by_rmsprop": optim.scale_by_rmsprop(centered=True),
    "scale_by_adagrad": optim.scale_by_adagrad(0.1),
    "scale_by_adadelta": optim.scale_by_adadelta(),
    "scale_by_adamax": optim.scale_by_adamax(),
    "scale_by_radam": optim.scale_by_radam(),
    "identity": optim.identity(),
    "scale": optim.scale({"a": 0.1, "b": torch.tensor(0.2)}),
    "clip": optim.clip(0.5),
    "clip_grad_norm": idf.clip_grad_norm(1.0),
    "nan_to_num": optim.nan_to_num(1.0),
    "add_decayed_weights": optim.add_decayed_weights(0.1, MASK),
    "masked": optim.masked(idf.adam(0.1), MASK),
    "chain": idf.chain(idf.clip_grad_norm(1.0), optim.masked(optim.scale(2.0), MASK), idf.adamw(0.1, mask=MASK)),
    "inject_hyperparams": optim.inject_hyperparams(idf.adam)(lr=torch.tensor(0.1), betas=(0.5, 0.9)),
    "injected schedule": optim.inject_hyperparams(idf.sgd)(lr=HALF, momentum=0.9),
    "rates": idf.adam({"a": torch.tensor([0.1, 0.2]), "b": HALF}),
    "constant": idf.sgd(schedule.constant(0.1)),
    "linear": idf.sgd(schedule.linear(1.0, 0.0, 2)),
    "polynomial": idf.sgd(schedule.polynomial(1.0, 0.0, 2, 2)),
    "exponential": idf.sgd(HALF, momentum=HALF),
    "cosine": idf.adamw(schedule.cosine(1.0, 3), mask=MASK),
    "warmup": optim.scale_by_schedule(schedule.warmup(HALF, 2)),
    "piecewise": optim.scale_by_schedule(schedule.piecewise([0.1, HALF], [1])),
}
FRONTS = [idf.SGD, idf.Adam, idf.AdamW, idf.RMSprop, idf.Adagrad, idf.Adadelta, idf.Adamax, idf.RAdam]


def run(pair: idf.GradientTransformation, params: Any = PARAMS, state: Any = None, steps: int = 3) -> Any:
    state = pair.init(params) if state is None else state
    for k in range(steps):
        updates, state = pair.update({n: p * (k + 1) for n, p in params.items()}, state, params)
        params = idf.apply_updates(params, updates)
    return params, state


def saved_and_loaded(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_every_factory_is_here():
    made = {name for name in optim.__all__ + schedule.__all__ if name[0].islower()}
    assert made - set(PAIRS) == {"apply_updates", "accelerated_op_available", "scale_by_schedule"}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_are_pickled_and_copied_with_the_same_numbers(name):
    expected = run(PAIRS[name])
    for twin in (pickle.loads(pickle.dumps(PAIRS[name])), copy.deepcopy(PAIRS[name])):
        ended = run(twin)
        assert_same(ended[0], expected[0])
        assert type(ended[1]) is type(expected[1])


@pytest.mark.parametrize("name", PAIRS)
def test_states_are_loaded_without_trust(name):
    pair = PAIRS[name]
    params, state = run(pair)
    loaded = saved_and_loaded(state)
    assert type(loaded) is type(state)
    assert_same(run(pair, params, loaded)[0], run(pair, params, state)[0])


@pytest.mark.parametrize("lr", [0.1, HALF, [0.1, HALF]], ids=["number", "schedule", "list"])
@pytest.mark.parametrize("front", FRONTS, ids=lambda f: f.__name__)
def test_optimizer_objects_and_their_states(front, lr):
    def step(params: list[torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
        for p in params:
            p.grad = p.detach() + 1
        optimizer.step()

    params = [torch.ones(2, requires_grad=True), torch.ones((), requires_grad=True)]
    ours = front(params, lr=lr)
    step(params, ours)
    their_params, theirs = pickle.loads(pickle.dumps((params, ours)))
    new_params = [p.detach().clone().requires_grad_() for p in params]
    new = front(new_params, lr=lr)
    new.load_state_dict(saved_and_loaded(ours.state_dict()))
    for _ in range(2):
        for group in ((params, ours), (their_params, theirs), (new_params, new)):
            step(*group)
    assert_same(their_params, params)
    assert_same(new_params, params)


def test_meta_optimizers_and_module_states():
    net = torch.nn.Linear(2, 1)
    inner, x = idf.MetaAdam(net, lr=HALF), torch.ones(1, 2)
    inner.step(net(x).sum())
    twin = pickle.loads(pickle.dumps(inner))
    state = saved_and_loaded(idf.extract_state_dict(net))
    assert type(state) is idf.ModuleState
    idf.recover_state_dict(twin.module, state)
    twin.load_state_dict(saved_and_loaded(inner.state_dict()))
    for optimizer in (inner, twin):
        optimizer.step(optimizer.module(x).sum())
    assert_same(list(twin.module.parameters()), list(net.parameters()))
    func = pickle.loads(pickle.dumps(idf.FuncOptimizer(PAIRS["chain"])))
    assert_same(run(func.transformation)[0], run(PAIRS["chain"])[0])


def test_pairs_go_to_spawned_processes():
    names = ["chain", "cosine", "rates"]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        ended = pool.map(_end, [PAIRS[name] for name in names])
    for name, end in zip(names, ended, strict=True):
        assert_same({k: torch.tensor(v) for k, v in end.items()}, run(PAIRS[name])[0])


def _end(pair: idf.GradientTransformation) -> dict[str, Any]:
    # As numbers: tensors would be sent in shared memory.
    return {k: p.tolist() for k, p in run(pair)[0].items()}
