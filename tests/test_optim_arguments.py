"""Optimizers refuse what does not match, numbers out of range, and sparse gradients."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from tables.trees import BF16, F64, ONE, PARAMS, _update, assert_close, drawn
from torch.utils._pytree import tree_map

import implicitdiff as idf
from implicitdiff import optim

# --- what is refused --------------------------------------------------------------------------------------------------


def _grads(**changed: Any) -> Any:
    return {"net": [ONE, ONE], "b": torch.ones(())} | changed


MISMATCHES = {
    "nested otherwise": (
        lambda: _update(idf.adam(), {"net": [ONE], "b": ONE}),
        ValueError,
        ["adam: grads and state.mu must be nested alike", "{net: [float32[2]], b: float32[2]}"],
    ),
    "a tensor for a list": (
        lambda: _update(idf.adam(), {"net": ONE, "b": ONE}),
        ValueError,
        ["adam: grads and state.mu must be nested alike", "net: float32[2]"],
    ),
    "another key": (
        lambda: _update(idf.adam(), {"net": [ONE, ONE], "c": torch.ones(())}),
        ValueError,
        ["adam: grads and state.mu must be nested alike", "c: float32[]"],
    ),
    "params nested otherwise": (
        lambda: _update(idf.adamw(), _grads(), [ONE]),
        ValueError,
        ["adamw: grads and params must be nested alike", "and [float32[2]]"],
    ),
    "a shape": (
        lambda: _update(idf.sgd(momentum=0.9), _grads(net=[ONE, torch.ones(3)])),
        ValueError,
        ["sgd: state.trace['net'][1] is float32[2] on cpu, but grads is float32[3] on cpu"],
    ),
    "the shape of a parameter": (
        lambda: idf.sgd().step(_grads(net=[ONE, torch.ones(3)]), idf.sgd().init(PARAMS), PARAMS),
        ValueError,
        ["sgd: params['net'][1] is float32[2] on cpu, but grads is float32[3] on cpu"],
    ),
    "a dtype": (
        lambda: _update(idf.adam(), _grads(b=torch.ones((), dtype=F64))),
        ValueError,
        ["adam: state.mu['b'] is float32[] on cpu, but grads is float64[] on cpu"],
    ),
    "a dtype of half precision": (
        lambda: _update(idf.adam(), _grads(b=torch.ones((), dtype=BF16)), like=_grads(b=torch.ones((), dtype=F64))),
        ValueError,
        ["state.mu['b'] is float64[]", "grads is bfloat16[]", "float32"],
    ),
    "a shape of an update": (
        lambda: idf.apply_updates([ONE], [torch.ones(3)]),
        ValueError,
        ["apply_updates: params[0] is float32[2] on cpu, but updates is float32[3] on cpu"],
    ),
    "an update without its parameter": (
        lambda: idf.apply_updates([None], [ONE]),
        TypeError,
        ["apply_updates: params[0] must be a tensor where updates is not None, got None"],
    ),
    "no tensor": (
        lambda: _update(idf.adam(), _grads(b=1.0)),
        TypeError,
        ["adam: grads['b'] must be a tensor or None, got 1.0"],
    ),
    "sparse": (
        lambda: _update(idf.adam(), _grads(net=[ONE, ONE.to_sparse()])),
        TypeError,
        ["adam: grads['net'][1] must be dense", "got sparse_coo float32[2] on cpu"],
    ),
    "integers": (
        lambda: _update(idf.adam(), _grads(b=torch.tensor(1))),
        TypeError,
        ["adam: grads['b'] must be dense and of floating point", "got int64[] on cpu"],
    ),
    "a parameter that is no tensor": (
        lambda: idf.adam().init({"a": 1.0}),
        TypeError,
        ["adam: every leaf of params must be a tensor or None, got 1.0"],
    ),
    "decay without parameters": (
        lambda: _update(idf.adam(weight_decay=0.1), _grads()),
        ValueError,
        ["adam: weight_decay needs the parameters; call update(grads, state, params)"],
    ),
    "add_decayed_weights without parameters": (
        lambda: _update(optim.add_decayed_weights(0.1), _grads()),
        ValueError,
        ["add_decayed_weights needs the parameters"],
    ),
    "the state of another": (
        lambda: idf.adam().update(_grads(), idf.sgd().init(PARAMS)),
        TypeError,
        ["adam: state must be the AdamState of its init, got SGDState"],
    ),
    "no state": (
        lambda: idf.adam().update(_grads(), None),
        TypeError,
        ["adam: state must be the AdamState of its init, got NoneType"],
    ),
    "a state for fewer leaves": (
        lambda: idf.sgd().update([ONE, ONE], idf.sgd().init([ONE])),
        ValueError,
        ["sgd: state.count must have one entry for each of the 2 leaves of grads, got the shape [1]"],
    ),
    "a chain of other length": (
        lambda: idf.chain(optim.clip(1.0), idf.sgd()).update(_grads(), (idf.sgd().init(PARAMS),)),
        ValueError,
        ["chain: the state must be of these 2 transformations, got a state of 1"],
    ),
    "a mask of other keys": (
        lambda: _update(idf.adamw(mask={"net": True, "c": False}), _grads(), PARAMS),
        ValueError,
        ["adamw: mask must be nested like the parameters", "'c': False"],
    ),
    "a mask of other length": (
        lambda: _update(idf.adamw(mask={"net": [True], "b": False}), _grads(), PARAMS),
        ValueError,
        ["adamw: mask must be nested like the parameters", "'net': [True]"],
    ),
    "a mask deeper than the parameters": (
        lambda: _update(optim.add_decayed_weights(0.1, {"net": True, "b": [True]}), _grads(), PARAMS),
        ValueError,
        ["add_decayed_weights: mask must be nested like the parameters"],
    ),
    "a mask of a masked": (
        lambda: optim.masked(idf.sgd(), [True]).init(PARAMS),
        ValueError,
        ["masked: mask must be nested like the parameters"],
    ),
}


@pytest.mark.parametrize(("call", "error", "fragments"), MISMATCHES.values(), ids=MISMATCHES)
def test_what_does_not_match_is_named(call, error, fragments):
    with pytest.raises(error) as raised:
        call()
    for fragment in fragments:
        assert fragment in str(raised.value)


_FACTORIES = [idf.sgd, idf.adam, idf.adamw, idf.rmsprop, idf.adagrad, idf.adadelta, idf.adamax, idf.radam]
_BETAS = [idf.adam, idf.adamw, idf.adamax, idf.radam]
_EPS_ROOT = [idf.adam, idf.adamw, idf.radam, idf.rmsprop, idf.adagrad]

OUT_OF_RANGE = (
    [(f, {"lr": -0.1}, "lr must be a finite number, at least 0, got -0.1") for f in _FACTORIES]
    + [(f, {"lr": math.nan}, "lr must be a finite number") for f in _FACTORIES]
    + [(f, {"lr": math.inf}, "lr must be a finite number") for f in _FACTORIES]
    + [(f, {"weight_decay": -1.0}, "weight_decay must be a finite number, at least 0") for f in _FACTORIES]
    + [(f, {"eps": -1e-8}, "eps must be a finite number, at least 0") for f in _FACTORIES if f is not idf.sgd]
    + [(f, {"eps_root": -1e-8}, "eps_root must be a finite number, at least 0") for f in _EPS_ROOT]
    + [(f, {"betas": (1.0, 0.9)}, "betas[0] must be at least 0 and less than 1, got 1.0") for f in _BETAS]
    + [(f, {"betas": (0.9, -0.1)}, "betas[1] must be at least 0 and less than 1, got -0.1") for f in _BETAS]
    + [
        (f, {"lr": torch.tensor(1)}, "lr must be of floating point if it is a tensor, got torch.int64 of shape []")
        for f in _FACTORIES
    ]
    + [
        (idf.sgd, {"momentum": -0.1}, "momentum must be a finite number, at least 0"),
        (idf.sgd, {"dampening": math.inf}, "dampening must be a finite number"),
        (idf.sgd, {"nesterov": True}, "nesterov needs a momentum and no dampening, got 0.0 and 0.0"),
        (idf.sgd, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "got 0.9 and 0.1"),
        (idf.rmsprop, {"alpha": -0.1}, "alpha must be a finite number, at least 0"),
        (idf.rmsprop, {"momentum": -0.1}, "momentum must be a finite number, at least 0"),
        (idf.adadelta, {"rho": 1.1}, "rho must be from 0 to 1, got 1.1"),
        (idf.adagrad, {"lr_decay": -1.0}, "lr_decay must be a finite number, at least 0"),
        (idf.adagrad, {"initial_accumulator_value": -1.0}, "initial_accumulator_value must be a finite number"),
        (idf.clip_grad_norm, {"max_norm": -1.0}, "max_norm must be a finite number, at least 0"),
        (idf.clip_grad_norm, {"max_norm": 1.0, "norm_type": 0.5}, "norm_type must be at least 1, or infinity"),
        (idf.clip_grad_norm, {"max_norm": 1.0, "norm_type": math.nan}, "norm_type must be at least 1, or infinity"),
        (idf.clip_grad_norm, {"max_norm": torch.ones(2)}, "max_norm must be a number or a scalar tensor"),
        (optim.clip, {"max_delta": -1.0}, "max_delta must be a finite number, at least 0"),
        (optim.scale, {"factor": math.nan}, "factor must be a finite number"),
        (optim.add_decayed_weights, {"weight_decay": -1.0}, "weight_decay must be a finite number, at least 0"),
        (optim.trace, {"nesterov": True, "dampening": 0.5}, "nesterov needs a momentum and no dampening"),
    ]
)


@pytest.mark.parametrize(("factory", "options", "message"), OUT_OF_RANGE, ids=lambda x: getattr(x, "__name__", None))
def test_numbers_out_of_range_are_refused(factory, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        factory(**options)
    assert str(error.value).startswith(f"{factory.__name__}: ")


@pytest.mark.parametrize("value", ["0.1", None, 1j], ids=repr)
@pytest.mark.parametrize("factory", _FACTORIES, ids=lambda f: f.__name__)
def test_what_is_no_number_is_refused(factory, value):
    with pytest.raises(TypeError) as error:
        factory(lr=value)
    assert f"{factory.__name__}: lr must be a number" in str(error.value)


_SPARSE = [idf.sgd, idf.adagrad]
EMBEDDED = [(f, options) for f in _SPARSE for options in ({}, {"weight_decay": 0.1})] + [(idf.sgd, {"momentum": 0.9})]


@pytest.mark.parametrize(("factory", "options"), EMBEDDED, ids=lambda x: getattr(x, "__name__", str(x)))
@pytest.mark.parametrize("inplace", [False, True])
def test_sparse_gradients_are_what_they_are_dense(factory, options, inplace):
    pair, params = factory(0.1, **options), {"table": drawn(0, (4, 2), F64), "w": drawn(1, (3,), F64)}
    sparse, dense = params, params
    states = [pair.init(params), pair.init(params)]
    for k in range(3):
        grads = {"table": torch.zeros(4, 2, dtype=F64), "w": drawn(k + 2, (3,), F64)}
        grads["table"][k] = drawn(k + 5, (2,), F64)
        dense, states[0] = pair.step(grads, states[0], dense)
        grads = grads | {"table": grads["table"].to_sparse(1)}
        sparse, states[1] = pair.step(grads, states[1], tree_map(torch.clone, sparse), inplace=inplace)
    assert_close(sparse, dense)


@pytest.mark.parametrize("factory", [f for f in _FACTORIES if f not in _SPARSE], ids=lambda f: f.__name__)
def test_sparse_gradients_are_refused_with_the_reason(factory):
    with pytest.raises(
        TypeError, match=rf"{factory.__name__}: grads\['net'\]\[1\] must .* got sparse_coo.*SparseAdam.*dense"
    ):
        _update(factory(), _grads(net=[ONE, ONE.to_sparse()]), PARAMS)


INITS = {
    "sgd": idf.sgd(0.1),
    "adam": idf.adam(),
    "scheduled": idf.sgd(idf.schedule.constant(0.1)),
    "chain": idf.chain(optim.clip(1.0), idf.sgd()),
}


@pytest.mark.parametrize("name", INITS)
def test_init_of_no_tensors_is_refused_by_name(name):
    own = {"scheduled": "sgd", "chain": "clip"}.get(name, name)
    for params, leaf in (("x", "'x'"), ({"w": ONE, "rate": 0.1}, "0.1")):
        with pytest.raises(TypeError, match=rf"{own}: every leaf of params must be a tensor or None, got {leaf}"):
            INITS[name].init(params)
