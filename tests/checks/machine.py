"""A twin of the compiled machine in NumPy: slow, short, and independent of the C++ code."""

from __future__ import annotations

import ctypes
from itertools import product

import numpy as np
import torch

CONTROL = ("JUMP", "JUMP_UNLESS_ANY")
OF_TORCH = (
    "neg abs sqrt rsqrt reciprocal exp expm1 log log1p log2 log10 sin cos tan asin acos atan sinh cosh tanh asinh "
    "acosh atanh sigmoid erf erfc lgamma sign floor ceil round trunc isnan isinf isfinite"
)
UNARY = {
    "COPY": lambda x: x,
    "NOT": lambda x: x == 0,
    "TO_BOOL": lambda x: x != 0,
    **{name.upper(): getattr(torch, name) for name in OF_TORCH.split()},
}
PAIRS_OF_TORCH = "add sub mul div pow atan2 hypot maximum minimum fmax fmin remainder fmod copysign eq ne lt le gt ge"
BINARY = {
    **{name.upper(): getattr(torch, name) for name in PAIRS_OF_TORCH.split()},
    "FLOOR_DIVIDE": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "AND": torch.logical_and,
    "OR": torch.logical_or,
    "XOR": torch.logical_xor,
}
REDUCTIONS = {
    "SUM": lambda x: x.sum(0),
    "PROD": lambda x: x.prod(0),
    "AMAX": lambda x: x.amax(0),
    "AMIN": lambda x: x.amin(0),
    "ANY": lambda x: (x != 0).any(0),
    "ALL": lambda x: (x != 0).all(0),
    "ARGMAX": lambda x: x.argmax(0),
    "ARGMIN": lambda x: x.argmin(0),
    "NORM": lambda x: torch.linalg.vector_norm(x, dim=0),
}
OTHERS = ("WHERE", "COMMIT", "MATMUL", "LU", "LU_SOLVE", "CHOLESKY")
SOLVES = ("SOLVE_LOWER", "SOLVE_UPPER", "SOLVE_UNIT_LOWER", "SOLVE_UNIT_UPPER")
ORTHOGONAL = ("QR", "APPLY_Q", "APPLY_Q_TRANSPOSED", "EIGH", "SVD")
ALONG = ("SORT", "SORT_DESCENDING", "GATHER", "SCATTER", "SCATTER_ADD", "CUMSUM", "CUMPROD")
NAMES = [*CONTROL, *UNARY, *BINARY, *REDUCTIONS, *OTHERS, *SOLVES, *ORTHOGONAL, *ALONG]
DTYPES = (np.float64, np.float32, np.int64, np.bool_, np.int32)


def operations() -> list[str]:
    return NAMES


def _array(address: int, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if not size:
        return np.empty(shape, dtype)
    memory = (ctypes.c_char * size).from_address(address)
    return np.frombuffer(memory, dtype).reshape(shape)


class Machine:
    """All lanes at once; ``width`` does not matter."""

    def __init__(self, width, code, entry, step, arena, carries, inputs, shared, running, paused):
        self.width, self.code, self.entry, self.step, self.arena = width, code, entry, step, arena
        self.carries, self.inputs, self.sizes, self.running, self.paused = carries, inputs, shared, running, paused

    def run(self, carries, inputs, shared, lanes, at_most, threads):
        spaces = [_array(a, (n,), np.float64) for a, n in zip(shared, self.sizes, strict=True)]
        total = 0
        for start in range(0, lanes, self.width):
            block = slice(start, min(start + self.width, lanes))
            total += self._block(carries, inputs, spaces, lanes, block, at_most)
        return total

    def _block(self, carries, inputs, spaces, lanes, block, at_most):
        arena = torch.full((self.arena, block.stop - block.start), 1e300, dtype=torch.float64)
        self.memory = [arena, *(torch.from_numpy(s.copy())[:, None].expand(-1, arena.shape[1]) for s in spaces)]
        places = [*zip(self.carries, carries, strict=True), *zip(self.inputs, inputs, strict=True)]
        for (offset, n, dtype), address in places:
            values = _array(address, (lanes, n), DTYPES[dtype])[block]
            arena[offset : offset + n] = torch.from_numpy(values.astype(np.float64).T.copy())
        self._execute(0, self.step)
        count = 0
        while arena[self.running].any():
            self._execute(self.step, len(self.code))
            count += 1
            if arena[self.paused].any() or count == at_most:
                break
        for (offset, n, dtype), address in zip(self.carries, carries, strict=True):
            values = _array(address, (lanes, n), DTYPES[dtype])
            values[block] = arena[offset : offset + n].numpy().T.astype(DTYPES[dtype])
        return count

    def _execute(self, at, end):
        while at < end:
            op, *rest = self.code[at]
            name = NAMES[op]
            at += 1
            if name == "JUMP":
                at = rest[0]
            elif name == "JUMP_UNLESS_ANY":
                target, offset, count = rest
                if not self.memory[0][offset : offset + count].any():
                    at = target
            else:
                self._instruction(name, rest)

    def _instruction(self, name, words):
        rounds, d, *words = words
        sizes, (r, *words) = words[:d], words[d:]
        refs = [words[k * (d + 2) : (k + 1) * (d + 2)] for k in range(r)]
        if name in ("LU", "LU_SOLVE", "CHOLESKY", *SOLVES):
            results = self._matrices(name, sizes, refs)
        elif name in ORTHOGONAL:
            results = self._orthogonal(name, sizes, refs)
        elif name in ALONG:
            results = self._along(name, sizes, refs)
        else:
            values = [self._get(ref, sizes) for ref in refs]
            results = [(refs[0], sizes, self._computed(name, values, d))]
        for ref, shape, value in results:
            value = value.to(torch.float64)
            value = value.float().double() if rounds else value
            self._put(ref, shape, value)

    def _computed(self, name, values, d):
        if name in UNARY:
            return UNARY[name](values[1])
        if name in BINARY:
            return BINARY[name](*values[1:])
        if name == "WHERE":
            return torch.where(values[1] != 0, *values[2:])
        if name == "COMMIT":
            return torch.where(values[2] != 0, values[1], values[0])
        x = (values[1] * values[2] if name == "MATMUL" else values[1]).movedim(d - 1, 0)
        reduced = x.sum(0) if name == "MATMUL" else REDUCTIONS[name](x)
        return reduced.unsqueeze(d - 1)

    def _matrices(self, name, sizes, refs):
        n, m = sizes
        if name == "LU":
            lu, pivots, info = torch.linalg.lu_factor_ex(self._get(refs[3], (n, n)).movedim(-1, 0))
            shapes = ((n, n), (n, 1), (1, 1))
            values = lu.movedim(0, -1), (pivots - 1).mT[:, None], info[None, None]
            return list(zip(refs, shapes, values, strict=False))
        if name == "CHOLESKY":
            factor, info = torch.linalg.cholesky_ex(self._get(refs[2], (n, n)).movedim(-1, 0))
            return [(refs[0], (n, n), factor.movedim(0, -1)), (refs[1], (1, 1), info[None, None])]
        a, b = self._get(refs[1], (n, n)).movedim(-1, 0), self._get(refs[-1], (n, m)).movedim(-1, 0)
        if name == "LU_SOLVE":
            x = torch.linalg.lu_solve(a, (self._get(refs[2], (n, 1))[:, 0].mT + 1).int(), b)
        else:
            x = torch.linalg.solve_triangular(a, b, upper="UPPER" in name, unitriangular="UNIT" in name)
        return [(refs[0], (n, m), x.movedim(0, -1))]

    def _orthogonal(self, name, sizes, refs):
        if name == "QR":
            factors, tau = torch.geqrf(self._get(refs[2], sizes).movedim(-1, 0))
            return [(refs[0], sizes, factors.movedim(0, -1)), (refs[1], (min(sizes), 1), tau.mT[:, None])]
        if name == "EIGH":
            values, vectors = torch.linalg.eigh(self._get(refs[3], sizes).movedim(-1, 0))
            return [(refs[0], sizes, vectors.movedim(0, -1)), (refs[1], (sizes[0], 1), values.mT[:, None])]
        if name == "SVD":
            n = sizes[1]
            u, values, v = torch.linalg.svd(self._get(refs[3], sizes).movedim(-1, 0), full_matrices=False)
            shapes = sizes, (n, 1), (n, n)
            return list(zip(refs, shapes, (u.movedim(0, -1), values.mT[:, None], v.mT.movedim(0, -1)), strict=False))
        n, m, k = sizes
        factors, tau = (self._get(r, s).movedim(-1, 0) for r, s in ((refs[1], (n, 1, k)), (refs[2], (1, 1, k))))
        given = self._get(refs[3], (n, m, 1)).movedim(-1, 0)[..., 0]
        x = torch.ormqr(factors[:, :, 0].contiguous(), tau[:, 0, 0].contiguous(), given, transpose="TRANS" in name)
        return [(refs[0], (n, m, 1), x.movedim(0, -1)[:, :, None])]

    def _along(self, name, sizes, refs):
        one, last = (*sizes[:-1], 1), len(sizes) - 1
        if name.startswith("CUM"):
            return [(refs[0], sizes, getattr(self._get(refs[1], sizes), name.lower())(last))]
        if "SORT" in name:
            found = self._get(refs[2], sizes).sort(dim=last, descending=name != "SORT", stable=True)
            return [(r, sizes, x) for r, x in zip(refs, found, strict=False)]
        index = self._get(refs[2], one).long()
        if name == "GATHER":
            return [(refs[0], one, self._get(refs[1], sizes).gather(last, index))]
        return self._scattered(name, sizes, refs, index)

    def _scattered(self, name, sizes, refs, index):
        # Several entries of the space may be one element of the output, so that they are written one by one.
        places, values = self._index(refs[0], sizes), self._get(refs[1], (*sizes[:-1], 1))
        memory = self.memory[0].clone()
        for at in product(*map(range, sizes[:-1])):
            for lane in range(memory.shape[1]):
                place = places[(*at, int(index[(*at, 0, lane)]))]
                value = values[(*at, 0, lane)]
                memory[place, lane] = value + (memory[place, lane] if name == "SCATTER_ADD" else 0)
        return [(refs[0], sizes, memory[places])]

    def _index(self, ref, sizes):
        _, offset, *strides = ref
        index = np.full(sizes, offset, dtype=np.int64)
        for at in product(*map(range, sizes)):
            index[at] += sum(i * s for i, s in zip(at, strides, strict=True))
        return torch.from_numpy(index)

    def _get(self, ref, sizes):
        return self.memory[ref[0]][self._index(ref, sizes)]

    def _put(self, ref, sizes, value):
        shape = (*sizes, self.memory[0].shape[1])
        if value.numel() != np.prod(shape):
            sizes = [1 if s == 0 else n for n, s in zip(sizes, ref[2:], strict=True)]
            shape = (*sizes, shape[-1])
        self.memory[0][self._index(ref, sizes)] = value.reshape(shape)
