"""Functions that give another value each time: `NOISES`."""

from __future__ import annotations

import itertools
import random
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from checks.tensors import number
from torch import nn

from tables.changes import Residual

F64 = torch.float64

NOISES: dict[str, Callable[[], Residual]] = {}


def noise(make: Callable[[], Callable[[], Any]]) -> None:
    """Of a function that makes a source of numbers."""

    def residual() -> Residual:
        draw = make()
        return lambda x, t: (1 + 0.1 * draw()) * x**2 - t

    NOISES[make.__name__] = residual


@noise
def global_numbers_of_torch():
    return lambda: torch.rand((), dtype=F64)


@noise
def numbers_of_a_generator_of_torch():
    generator = torch.Generator().manual_seed(0)
    return lambda: torch.rand((), dtype=F64, generator=generator)


@noise
def filled_numbers_of_a_generator_of_torch():
    generator = torch.Generator().manual_seed(0)
    return lambda: torch.empty((), dtype=F64).uniform_(generator=generator)


@noise
def numbers_of_python():
    return random.random


@noise
def numbers_of_a_generator_of_python():
    return random.Random(0).random


@noise
def global_numbers_of_numpy():
    return np.random.rand


@noise
def numbers_of_a_generator_of_numpy():
    generator = np.random.default_rng(0)
    return lambda: generator.random()


@noise
def tensors_of_a_generator_of_numpy():
    generator = np.random.default_rng(0)
    return lambda: torch.as_tensor(generator.random(3))[0]


@noise
def a_clock():
    return lambda: 1e3 * time.perf_counter() % 1


@noise
def a_counter():
    return itertools.count().__next__


@noise
def a_counter_of_its_own():
    calls = 0

    def draw():
        nonlocal calls
        calls += 1
        return calls

    return draw


@noise
def a_counter_in_an_attribute():
    owner = types.SimpleNamespace(calls=0)

    def draw():
        owner.calls += 1
        return owner.calls

    return draw


@noise
def a_counter_in_a_tensor():
    calls = [number(0.0)]

    def draw():
        calls[0] = calls[0] + 1
        return calls[0]

    return draw


@noise
def a_buffer_that_is_updated():
    norm = nn.BatchNorm1d(1, affine=False).double()

    def draw():
        norm(torch.arange(4.0, dtype=F64)[:, None])
        return norm.running_mean.detach()[0]

    return draw


@noise
def batches_of_an_iterator():
    batches = itertools.cycle([number(1.0), number(2.0), number(3.0)])
    return lambda: next(batches)


@noise
def a_list_that_is_used_up():
    numbers = [0.001 * i for i in range(10_000)]
    return numbers.pop


@noise
def a_selection_that_alternates():
    turns = itertools.count()

    def draw():
        one = torch.ones((), dtype=F64)
        return (one.sin(), one.cos())[next(turns) % 2]

    return draw


@noise
def dropout():
    layer = nn.Dropout(0.5)
    return lambda: layer(torch.ones(50, dtype=F64)).sum()
