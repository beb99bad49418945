"""Every optimizer with every option, beside torch's: a new optimizer is a new row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

import implicitdiff as idf


class Row(NamedTuple):
    """A factory, the class of torch.optim that it agrees with, and options of both."""

    name: str
    factory: Callable[..., idf.GradientTransformation]
    reference: type[torch.optim.Optimizer]
    options: dict[str, Any]


_OPTIONS: list[tuple[Callable[..., Any], type[torch.optim.Optimizer], list[dict[str, Any]]]] = [
    (
        idf.sgd,
        torch.optim.SGD,
        [
            {},
            {"momentum": 0.9},
            {"momentum": 0.9, "dampening": 0.3},
            {"momentum": 0.9, "nesterov": True},
            {"momentum": 0.5, "weight_decay": 0.1, "maximize": True},
        ],
    ),
    (
        idf.adam,
        torch.optim.Adam,
        [
            {},
            {"betas": (0.5, 0.9)},
            {"amsgrad": True},
            {"weight_decay": 0.1},
            {"eps": 0.3, "amsgrad": True, "maximize": True, "weight_decay": 0.1},
        ],
    ),
    (
        idf.adamw,
        torch.optim.AdamW,
        [{}, {"weight_decay": 0.2, "amsgrad": True}, {"betas": (0.0, 0.9), "maximize": True}],
    ),
    (
        idf.rmsprop,
        torch.optim.RMSprop,
        [
            {},
            {"momentum": 0.9},
            {"centered": True, "weight_decay": 0.1},
            {"alpha": 0.5, "momentum": 0.5, "centered": True, "maximize": True},
        ],
    ),
    (
        idf.adagrad,
        torch.optim.Adagrad,
        [{}, {"lr_decay": 0.1, "initial_accumulator_value": 0.5}, {"weight_decay": 0.1, "eps": 0.2, "maximize": True}],
    ),
    (
        idf.adadelta,
        torch.optim.Adadelta,
        [{}, {"rho": 0.5, "eps": 1e-2}, {"weight_decay": 0.1, "maximize": True}],
    ),
    (
        idf.adamax,
        torch.optim.Adamax,
        [{}, {"betas": (0.5, 0.9), "eps": 0.2}, {"weight_decay": 0.1, "maximize": True}],
    ),
    (
        idf.radam,
        torch.optim.RAdam,
        [
            {},
            {"betas": (0.5, 0.9), "weight_decay": 0.1},
            {"decoupled_weight_decay": True, "weight_decay": 0.1, "maximize": True},
        ],
    ),
]

ROWS = [
    Row("-".join([factory.__name__, *options]), factory, reference, options)
    for factory, reference, several in _OPTIONS
    for options in several
]

each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
