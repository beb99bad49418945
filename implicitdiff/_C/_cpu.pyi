# Signatures of src/cpu/module.cpp and src/bindings.h. tests/test_kernels.py compares them with the built module.
from collections.abc import Sequence
from typing import Literal, TypedDict

import torch

class _Info(TypedDict):
    compiler: str
    openmp: bool
    simd: Literal["baseline", "avx2", "avx512"]

# See src/call.h. Addresses are in the order of src/layout.h, those of an operand for all leaves together, 0 where it is
# absent; leaf i is at its step count[which[i]]. Wrong arguments raise ValueError before an operand is read.
def step(
    formula: str,
    numbers: Sequence[float],
    dtype: str,
    sizes: Sequence[int],
    which: Sequence[int],
    count: int,
    addresses: Sequence[int],
    threads: int,
) -> None: ...
def pull(
    formula: str,
    numbers: Sequence[float],
    dtype: str,
    sizes: Sequence[int],
    which: Sequence[int],
    count: int,
    addresses: Sequence[int],
    threads: int,
) -> None: ...

# See src/cpu/locate.h. `api` is torch.Tensor.__dlpack_c_exchange_api__, or None where torch has none.
def use(api: object, tensor: type[torch.Tensor], parameter: type[torch.nn.Parameter]) -> bool: ...
def locate(
    columns: Sequence[Sequence[torch.Tensor | None]],
    accumulated: int,
    written: Sequence[int],
    count: torch.Tensor | None,
) -> tuple[list[int], list[int], int, int, bool] | None: ...
def info() -> _Info: ...

# See src/cpu/machine.h. The opcode of an operation is its index in `operations()`. Wrong arguments raise ValueError.
def operations() -> list[str]: ...

class Machine:
    def __init__(
        self,
        width: int,
        code: Sequence[Sequence[int]],
        sections: Sequence[int],
        arena: int,
        carries: Sequence[tuple[int, int, int]],
        inputs: Sequence[tuple[int, int, int]],
        shared: Sequence[int],
        running: int,
        paused: int,
    ) -> None: ...
    def run(
        self,
        carries: Sequence[int],
        inputs: Sequence[int],
        shared: Sequence[int],
        lanes: int,
        at_most: int,
        threads: int,
        starts: bool = False,
        judges: bool = False,
    ) -> int: ...
