# Signatures of src/cuda/module.cpp and src/bindings.h. tests/test_kernels.py compares them with the built module.
from collections.abc import Sequence
from typing import TypedDict

class _Info(TypedDict):
    archs: list[int]
    cuda: int
    devices: int

# As on the CPU; addresses and counts are device memory, and a launch that fails is a RuntimeError.
def step(
    formula: str,
    numbers: Sequence[float],
    dtype: str,
    sizes: Sequence[int],
    which: Sequence[int],
    count: int,
    addresses: Sequence[int],
    stream: int,
) -> None: ...
def pull(
    formula: str,
    numbers: Sequence[float],
    dtype: str,
    sizes: Sequence[int],
    which: Sequence[int],
    count: int,
    addresses: Sequence[int],
    stream: int,
) -> None: ...
def info() -> _Info: ...
