"""Optimizers that steps can be differentiated through, by class and by pure function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import implicitdiff as idf
from tables.optimizers import ROWS

F64 = torch.float64

FRONTS = {
    idf.sgd: idf.MetaSGD,
    idf.adam: idf.MetaAdam,
    idf.adamw: idf.MetaAdamW,
    idf.rmsprop: idf.MetaRMSProp,
    idf.adagrad: idf.MetaAdaGrad,
    idf.adadelta: idf.MetaAdaDelta,
    idf.adamax: idf.MetaAdaMax,
    idf.radam: idf.MetaRAdam,
}

each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
each_kin = pytest.mark.parametrize("row", [row for row in ROWS if not row.options], ids=lambda row: row.name)


def net_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def data(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 3, dtype=F64, generator=generator)
    return x, (x[:, :1] - x[:, 1:2] ** 2).tanh()


def inputs() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    start = {name: p.detach().clone().requires_grad_() for name, p in net_of().named_parameters()}
    weight = torch.linspace(0.5, 1.5, 6, dtype=F64)[:, None].requires_grad_()
    return start, torch.tensor(0.05, dtype=F64, requires_grad=True), weight
