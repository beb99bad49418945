"""Programs for the compiled machine: operands in an arena, one instruction or several, and what torch computes."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from typing import NamedTuple

import torch

from implicitdiff._C import cpu

F64, F32, I64 = torch.float64, torch.float32, torch.int64
# Any number does where the module is not built, and nothing runs.
NUMBER = {name: i for i, name in enumerate(cpu.operations())} if cpu else defaultdict(int)
DTYPES = {F64: 0, F32: 1, I64: 2, torch.bool: 3, torch.int32: 4}
# With the largest and the smallest numbers, normal and subnormal, of double and of single precision.
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -3.0, 2.5, 7.25, math.inf, -math.inf, math.nan]
SPECIAL += [5e-324, -2e-310, 1e-300, 1e300, -1e308, 1e-40, -3e-45, 3e38, -745.2, 709.7, -37.5, 25.0]

# What gives the same bits in torch.
EXACT_UNARY = {
    "COPY": torch.clone,
    "NEG": torch.neg,
    "ABS": torch.abs,
    "RECIPROCAL": torch.reciprocal,
    "SIGN": torch.sign,
    "FLOOR": torch.floor,
    "CEIL": torch.ceil,
    "ROUND": torch.round,
    "TRUNC": torch.trunc,
    "NOT": torch.logical_not,
    "ISNAN": torch.isnan,
    "ISINF": torch.isinf,
    "ISFINITE": torch.isfinite,
    "TO_BOOL": lambda x: x != 0,
}
NAMES = "sqrt rsqrt exp expm1 log log1p log2 log10 sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh"
ROUNDED_UNARY = {name.upper(): getattr(torch, name) for name in [*NAMES.split(), "sigmoid", "erf", "erfc", "lgamma"]}
EXACT_BINARY = {
    "ADD": torch.add,
    "SUB": torch.sub,
    "MUL": torch.mul,
    "DIV": torch.div,
    "MAXIMUM": torch.maximum,
    "MINIMUM": torch.minimum,
    "FMAX": torch.fmax,
    "FMIN": torch.fmin,
    "REMAINDER": torch.remainder,
    "FMOD": torch.fmod,
    "FLOOR_DIVIDE": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "COPYSIGN": torch.copysign,
    "EQ": torch.eq,
    "NE": torch.ne,
    "LT": torch.lt,
    "LE": torch.le,
    "GT": torch.gt,
    "GE": torch.ge,
    "AND": torch.logical_and,
    "OR": torch.logical_or,
    "XOR": torch.logical_xor,
}
ROUNDED_BINARY = {"POW": torch.pow, "ATAN2": torch.atan2, "HYPOT": torch.hypot}
UNARY, BINARY = EXACT_UNARY | ROUNDED_UNARY, EXACT_BINARY | ROUNDED_BINARY
OTHER_ELEMENTWISE = {"WHERE": lambda c, x, y: torch.where(c != 0, x, y)}
ELEMENTWISE = UNARY | BINARY | OTHER_ELEMENTWISE
REDUCTIONS = {
    "SUM": lambda x: x.sum(-1),
    "PROD": lambda x: x.prod(-1),
    "AMAX": lambda x: x.amax(-1),
    "AMIN": lambda x: x.amin(-1),
    "ANY": lambda x: x.bool().any(-1),
    "ALL": lambda x: x.bool().all(-1),
    "ARGMAX": lambda x: x.argmax(-1),
    "ARGMIN": lambda x: x.argmin(-1),
    "NORM": lambda x: torch.linalg.vector_norm(x, dim=-1),
}
# Of them, those that have no result of no elements.
OF_ONE_OR_MORE = ("AMAX", "AMIN", "ARGMAX", "ARGMIN")
# (upper, unitriangular)
TRIANGULAR = {
    "SOLVE_LOWER": (False, False),
    "SOLVE_UPPER": (True, False),
    "SOLVE_UNIT_LOWER": (False, True),
    "SOLVE_UNIT_UPPER": (True, True),
}
OTHERS = ("JUMP", "JUMP_UNLESS_ANY", "COMMIT", "MATMUL", "LU", "LU_SOLVE", "CHOLESKY")
ORTHOGONAL = ("QR", "APPLY_Q", "APPLY_Q_TRANSPOSED", "EIGH", "SVD")
ALONG = ("SORT", "SORT_DESCENDING", "GATHER", "SCATTER", "SCATTER_ADD", "CUMSUM", "CUMPROD")


class Operand(NamedTuple):
    """One value for each lane: a contiguous tensor (lanes, numel), and how an instruction reads it."""

    storage: torch.Tensor
    strides: tuple[int, ...]
    offset: int = 0
    shared: bool = False

    def index(self, sizes):
        """Where each element of the value lies in its lane."""
        index = torch.full(sizes, self.offset)
        for d, (size, stride) in enumerate(zip(sizes, self.strides, strict=True)):
            index += (torch.arange(size) * stride).reshape([-1 if e == d else 1 for e in range(len(sizes))])
        return index

    def read(self, sizes):
        """The value that an instruction reads."""
        return self.storage[:, self.index(sizes)]

    def written(self, values):
        """The storage after an instruction has written the values."""
        storage = self.storage.clone()
        storage[:, self.index(values.shape[1:])] = values.to(storage.dtype)
        return storage


def contiguous(sizes):
    """The strides of a contiguous value."""
    return tuple(math.prod(sizes[d + 1 :]) for d in range(len(sizes)))


def dense(x):
    return Operand(x.reshape(len(x), -1).contiguous(), contiguous(x.shape[1:]))


def unwritten(lanes, sizes, dtype=F64):
    """A contiguous value of numbers that no instruction gives."""
    return dense(torch.full((lanes, *sizes), True if dtype == torch.bool else 77, dtype=dtype))


def strided(strides, sizes, lanes, seed, shared=False):
    """A value of random numbers with these strides, around which there is more memory."""
    reach = [(size - 1) * stride for size, stride in zip(sizes, strides, strict=True) if size > 0]
    least, most = sum(min(r, 0) for r in reach), sum(max(r, 0) for r in reach)
    generator = torch.Generator().manual_seed(seed)
    storage = torch.randn(1 if shared else lanes, most - least + 4, generator=generator, dtype=F64)
    return Operand(storage, tuple(strides), 2 - least, shared)


def instruction(name, sizes, *references, rounded=False):
    """References: (space, offset, strides)."""
    flat = [number for space, offset, strides in references for number in (space, offset, *strides)]
    return [NUMBER[name], int(rounded), len(sizes), *sizes, len(references), *flat]


def sections(code, block=0, step=0):
    """Where the sections of a program without a first state and a judgement begin."""
    return [block, step, step, step, len(code)]


def addresses(*tensors):
    return [x.data_ptr() for x in tensors]


def evaluate(name, sizes, outputs, inputs, width=8, threads=1, rounded=False, aliases=()):
    """The storages of the outputs after one instruction.

    An alias (i, j) lets output i and input j be one value.
    """
    lanes = len(outputs[0].storage)
    operands = [*outputs, *(x for j, x in enumerate(inputs) if j not in [alias for _, alias in aliases])]
    places, private, shared, offset = {}, [], [], 2
    for operand in operands:
        tensor = operand.storage.clone()
        if operand.shared:
            shared.append(tensor)
            places[id(operand)] = len(shared), operand.offset, operand.strides
        else:
            private.append(((offset, tensor.shape[1], DTYPES[tensor.dtype]), tensor))
            places[id(operand)] = 0, offset + operand.offset, operand.strides
            offset += tensor.shape[1]
    for i, j in aliases:
        places[id(inputs[j])] = places[id(outputs[i])]
    code = [instruction(name, sizes, *(places[id(x)] for x in (*outputs, *inputs)), rounded=rounded)]
    carries = [((0, 1, 0), torch.ones(lanes, dtype=F64)), *private[: len(outputs)]]
    given = private[len(outputs) :]
    kinds = [place for place, _ in carries], [place for place, _ in given], [x.numel() for x in shared]
    machine = cpu.Machine(width, code, sections(code), offset, *kinds, 0, 1)
    tensors = (addresses(*(x for _, x in carries)), addresses(*(x for _, x in given)), addresses(*shared))
    assert machine.run(*tensors, lanes, 1, threads) == -(-lanes // width)
    return [x for _, x in carries[1:]]


def pairs_of_special(dtype):
    """All pairs of special numbers, as two values of one lane."""
    return torch.tensor(list(itertools.product(SPECIAL, SPECIAL)), dtype=F64).to(dtype).T[:, None]
