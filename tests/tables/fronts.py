"""Optimizers as objects, each beside torch's own on the same parameters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import implicitdiff as idf
from tables.optimizers import ROWS, Row

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


def pair(row: Row, dtype: torch.dtype = F64, **options: Any) -> tuple[list[Tensor], Any, list[Tensor], Any]:
    """Ours and torch's, at the same parameters."""
    mine, theirs = start(dtype), start(dtype)
    given = {"lr": lr_of(row)} | row.options | options
    return mine, FRONTS[row.factory](mine, **given), theirs, row.reference(theirs, **given)


PLAIN = [row for row in ROWS if row.name in ("sgd-momentum", "adam", "adamw", "rmsprop-momentum", "radam")]
each_plain = pytest.mark.parametrize("row", PLAIN, ids=lambda row: row.name)


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
