"""Programs for the compiled machine: operands in an arena, one instruction or several, and what torch computes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from implicitdiff._C import cpu

NUMBER = {name: i for i, name in enumerate(cpu.operations() if cpu else ())}
DTYPES = {torch.float64: 0, torch.float32: 1, torch.int64: 2, torch.bool: 3, torch.int32: 4}
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -3.0, math.inf, -math.inf, math.nan, 5e-324, -2e-310, 1e300, -1e-300]


class Operand(NamedTuple):
    """One value for each lane: a contiguous tensor (lanes, numel), and how an instruction reads it."""

    storage: torch.Tensor
    strides: tuple[int, ...]
    offset: int = 0
    shared: bool = False

    def view(self, sizes):
        """What the instruction reads, as torch sees it."""
        base = self.storage.reshape(len(self.storage), -1)
        return base.as_strided((len(base), *sizes), (base.stride(0), *self.strides), self.offset)


def contiguous(sizes):
    """The strides of a contiguous value."""
    return tuple(math.prod(sizes[d + 1 :]) for d in range(len(sizes)))


def dense(x):
    return Operand(x.contiguous(), contiguous(x.shape[1:]))


def instruction(name, sizes, *references, rounded=False):
    """References: (space, offset, strides)."""
    flat = [number for space, offset, strides in references for number in (space, offset, *strides)]
    return [NUMBER[name], int(rounded), len(sizes), *sizes, len(references), *flat]


def evaluate(name, sizes, outputs, inputs, width=8, threads=1, rounded=False):
    """The storages of the outputs after one instruction."""
    lanes = len(outputs[0].storage)
    tensors = [operand.storage.clone() for operand in (*outputs, *inputs)]
    private, shared, references, offset = [], [], [], 2
    for operand, tensor in zip((*outputs, *inputs), tensors, strict=True):
        if operand.shared:
            shared.append(tensor[0])
            references.append((len(shared), operand.offset, operand.strides))
        else:
            numel = tensor[:1].numel() if lanes else 0
            private.append((offset, numel, DTYPES[tensor.dtype]))
            references.append((0, offset + operand.offset, operand.strides))
            offset += numel
    code = [instruction(name, sizes, *references, rounded=rounded)]
    running = torch.ones(lanes, dtype=torch.float64)
    own = [tensor for tensor, operand in zip(tensors, (*outputs, *inputs), strict=True) if not operand.shared]
    count = len(outputs)
    carries, given = [(0, 1, 0), *private[:count]], private[count:]
    machine = cpu.Machine(width, code, 0, 0, offset, carries, given, [x.numel() for x in shared], 0, 1)
    iterations = machine.run(
        addresses(running, *own[:count]), addresses(*own[count:]), addresses(*shared), lanes, 1, threads
    )
    assert iterations == -(-lanes // width)
    return tensors[:count]


def addresses(*tensors):
    return [x.data_ptr() for x in tensors]
