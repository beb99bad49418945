"""Inputs of steps in place, and copies to compare with."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

import implicitdiff as idf
from implicitdiff.optim import (
    add_decayed_weights,
    clip,
    inject_hyperparams,
    masked,
    nan_to_num,
    scale,
    scale_by_adam,
    scale_by_schedule,
)

# More than a kernel reads before it writes.
LONG = 5000
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]


def normal(shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.complex128 if dtype.is_complex else torch.float64).to(
        dtype
    )


def inputs_of(pair, shapes=((3,), (2, 4)), dtype=torch.float32):
    """Gradients, a state after two steps, and parameters."""
    params = {str(i): normal(shape, i, dtype) for i, shape in enumerate(shapes)}
    state = pair.init(params)
    for step in range(2):
        _, state = pair.update({k: normal(p.shape, 10 + step, dtype) for k, p in params.items()}, state, params)
    return {k: normal(p.shape, 20, dtype) for k, p in params.items()}, state, params


def tensors(tree):
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def call(pair, method, inputs, inplace):
    grads, state, params = inputs
    return getattr(pair, method)(grads, state, params, inplace=inplace)


def assert_equal(actual, expected):
    actual, expected = pytree.tree_flatten(actual), pytree.tree_flatten(expected)
    assert actual[1] == expected[1]
    for a, b in zip(actual[0], expected[0], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=0)


PAIRS = {
    "chain": lambda flag: idf.chain(idf.clip_grad_norm(0.5), scale_by_adam(use_accelerated_op=flag), scale(-0.1)),
    "chain of chains": lambda flag: idf.chain(idf.chain(clip(0.5), scale(0.5)), idf.sgd(use_accelerated_op=flag)),
    "clip": lambda flag: clip(0.5),
    "clip_grad_norm": lambda flag: idf.clip_grad_norm(0.5),
    "nan_to_num": lambda flag: nan_to_num(),
    "scale": lambda flag: scale(0.5),
    "scale by a tensor": lambda flag: scale(torch.tensor(0.5)),
    "scale_by_schedule": lambda flag: scale_by_schedule(lambda count: 0.5 / (1 + count)),
    "add_decayed_weights": lambda flag: add_decayed_weights(0.1, mask={"0": True, "1": False}),
    "masked": lambda flag: masked(idf.adam(use_accelerated_op=flag), {"0": True, "1": False}),
    "masked decay": lambda flag: idf.adamw(mask={"0": False, "1": True}, use_accelerated_op=flag),
    "schedule": lambda flag: idf.adam(lambda count: 0.1 / (1 + count), use_accelerated_op=flag),
    "inject_hyperparams": lambda flag: inject_hyperparams(idf.adam)(lr=0.1, use_accelerated_op=flag),
}
each_pair = pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)
