"""Vector arithmetic of the iterative methods, with one scalar for each row of a system.

A row is one right-hand side of one lane. `OfRows` represents vectors as ``(rows, n)`` and scalars as columns
``(rows, 1)``. `OfOneRow` represents vectors as ``(n,)`` and scalars as Python numbers: on a CPU an operation on a
tensor of one element takes more than a microsecond, on a number a twentieth. Both kinds of scalar have ``+ - * /``,
comparisons and ``& | ^``; further operations are methods of `Arithmetic`. Vectors are never changed in place, since a
product may return its argument. `OfRecordedRows` hands its loops to the recorder of a compiled loop.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

import implicitdiff._torch.control as _control
import implicitdiff._torch.trees as pytree
from implicitdiff._implicit.system import RowMap, System
from implicitdiff._torch.control import CarryT

RowScalar = Any
"""A column ``(rows, 1)`` or a Python number, float or bool."""
Iterations = Any
"""A number of iterations: an integer for all rows, or a column of integers in a recording."""
Body = Callable[[CarryT, RowScalar, Iterations], tuple[CarryT, Iterations]]
"""``body(carry, active, left) -> (carry, iterations)``, a pass in the rows `active`, of at most `left` iterations."""


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of each row, as a column."""
    return (a * b).sum(dim=-1, keepdim=True)


def norm(a: Tensor) -> Tensor:
    """Return the Euclidean norm of each row, as a column, without overflow or underflow of squares."""
    info = torch.finfo(a.dtype)
    # Dividing by the largest entry keeps squares in range. The clamp avoids 0 / 0 for a zero row, and inf / inf.
    largest = a.abs().amax(dim=-1, keepdim=True).clamp(min=info.tiny, max=info.max)
    size: Tensor = largest * torch.linalg.vector_norm(a / largest, dim=-1, keepdim=True)
    return size


class Arithmetic(ABC):
    """Operations on vectors and scalars of a system.

    Attributes:
        matvec, rmatvec: products with ``A`` and with its transpose.
        precondition: product with the preconditioner, or the identity.
        is_square: True if ``A`` is square.
        none: the scalar False.
    """

    matvec: RowMap
    rmatvec: RowMap
    precondition: RowMap
    none: RowScalar

    def __init__(self, system: System) -> None:
        self.is_square = system.is_square

    @abstractmethod
    def vector(self, rows: Tensor) -> Tensor:
        """Convert rows ``(rows, n)`` to a vector."""

    @abstractmethod
    def scalar(self, column: Tensor) -> RowScalar:
        """Convert a column ``(rows, 1)`` to a scalar."""

    @abstractmethod
    def to_rows(self, vector: Tensor) -> Tensor:
        """Convert a vector to rows ``(rows, n)``."""

    @abstractmethod
    def per_row(self, scalar: RowScalar) -> Tensor:
        """Convert a scalar to a tensor ``(rows,)``."""

    @abstractmethod
    def dot(self, a: Tensor, b: Tensor) -> RowScalar: ...

    @abstractmethod
    def norm(self, a: Tensor) -> RowScalar:
        """Return the Euclidean norm, without overflow or underflow of squares."""

    @abstractmethod
    def add(self, a: Tensor, s: RowScalar, b: Tensor) -> Tensor:
        """Return ``a + s b``."""

    @abstractmethod
    def divide(self, a: Tensor, s: RowScalar) -> Tensor:
        """Return ``a / s``, and ``a`` in rows with ``s = 0``."""

    @abstractmethod
    def ratio(self, where: RowScalar, a: RowScalar, b: RowScalar) -> RowScalar:
        """Return ``a / b`` in the rows `where`, and 0 in others, whose ``b`` may be 0."""

    @abstractmethod
    def select(self, where: RowScalar, a: RowScalar, b: RowScalar) -> RowScalar:
        """Return ``a`` in the rows `where`, and ``b`` in others; vectors or scalars."""

    @abstractmethod
    def larger(self, a: RowScalar, b: RowScalar) -> RowScalar:
        """Return the maximum of two scalars, nan if the first is nan."""

    @abstractmethod
    def finite(self, s: RowScalar) -> RowScalar: ...

    @abstractmethod
    def negate(self, s: RowScalar) -> RowScalar:
        """Return not ``s``. The negation of a comparison is true for nan."""

    @abstractmethod
    def any(self, s: RowScalar) -> bool:
        """True if ``s`` holds in some row. Waits for the device."""

    def least(self, count: Iterations, bound: int) -> Iterations:
        """Return the minimum of two numbers of iterations."""
        return min(count, bound)

    def repeat(
        self, body: Body[CarryT], carry: CarryT, flag: Callable[[CarryT], RowScalar], limit: Iterations
    ) -> tuple[CarryT, Iterations]:
        """Apply the body as long as ``flag(carry)`` holds in some row, for at most `limit` iterations.

        Returns:
            The last carry, and the number of iterations.
        """
        used = 0
        # A single wait for the device in each iteration: the flags of all rows are read at once.
        while used < limit and self.any(active := flag(carry)):
            carry, iterations = body(carry, active, limit - used)
            used += iterations
        return carry, used


class OfRows(Arithmetic):
    """Arithmetic on any number of rows, with columns for scalars."""

    def __init__(self, system: System) -> None:
        super().__init__(system)
        self.matvec, self.rmatvec = system.matvec, system.rmatvec
        self.precondition = system.precondition or _no_preconditioner
        self.none = torch.zeros_like(system.scale, dtype=torch.bool)

    def vector(self, rows: Tensor) -> Tensor:
        return rows

    def scalar(self, column: Tensor) -> RowScalar:
        return column

    def to_rows(self, vector: Tensor) -> Tensor:
        return vector

    def per_row(self, scalar: RowScalar) -> Tensor:
        out: Tensor = scalar[:, 0]
        return out

    def dot(self, a: Tensor, b: Tensor) -> RowScalar:
        return dot(a, b)

    def norm(self, a: Tensor) -> RowScalar:
        return norm(a)

    def add(self, a: Tensor, s: RowScalar, b: Tensor) -> Tensor:
        return torch.addcmul(a, s, b)

    def divide(self, a: Tensor, s: RowScalar) -> Tensor:
        return a / torch.where(s == 0, 1.0, s)

    def ratio(self, where: RowScalar, a: RowScalar, b: RowScalar) -> RowScalar:
        # No safe divisor is needed: a linear solve is differentiated as a whole, so no derivative meets the masked
        # quotient.
        return torch.where(where, a / b, 0.0)

    def select(self, where: RowScalar, a: RowScalar, b: RowScalar) -> RowScalar:
        return torch.where(where, a, b)

    def larger(self, a: RowScalar, b: RowScalar) -> RowScalar:
        return torch.maximum(a, b)

    def finite(self, s: RowScalar) -> RowScalar:
        return torch.isfinite(s)

    def negate(self, s: RowScalar) -> RowScalar:
        return ~s

    def any(self, s: RowScalar) -> bool:
        return bool(s.any())


class OfRecordedRows(OfRows):
    """Arithmetic of a recorded step. Each row counts its own iterations, and a row that has stopped does not change."""

    def __init__(self, system: System) -> None:
        super().__init__(system)
        # Linearise before the first loop: what a loop computes cannot be used after it.
        self.matvec(system.b.new_zeros(system.b.shape[0], system.unknowns))
        self.rmatvec(torch.zeros_like(system.b))

    def any(self, s: RowScalar) -> bool:
        raise AssertionError("a recording has no values")

    def least(self, count: Iterations, bound: int) -> Iterations:
        return count.clamp(max=bound)

    def repeat(
        self, body: Body[CarryT], carry: CarryT, flag: Callable[[CarryT], RowScalar], limit: Iterations
    ) -> tuple[CarryT, Iterations]:
        def again(state: tuple[CarryT, Tensor, Tensor]) -> tuple[CarryT, Tensor, Tensor]:
            carry, used, active = state
            new, iterations = body(carry, active, limit - used)
            new, used = _chosen_rows(active, (new, used + iterations), (carry, used))
            return new, used, active & flag(new) & (used < limit)

        none = torch.zeros_like(self.none, dtype=torch.int64)
        start = carry, none, flag(carry) & (none < limit)
        carry, used, _ = _control.repeat(again, start, itemgetter(2), _NO_BOUND)
        return carry, used


_NO_BOUND = 2**31
"""A number of passes that the flag of a loop never lets it reach."""


def _chosen_rows(rows: Tensor, new: CarryT, old: CarryT) -> CarryT:
    """Return `new` in some rows, and `old` in the others."""
    leaves, structure = pytree.flatten(new)
    pairs = zip(leaves, structure.tensors_of(old), strict=True)
    chosen: CarryT = structure.unflatten([torch.where(rows.reshape(-1, *(1,) * (a.dim() - 1)), a, b) for a, b in pairs])
    return chosen


class OfOneRow(Arithmetic):
    """Arithmetic on one row on a CPU, with Python numbers for scalars."""

    none = False

    def __init__(self, system: System) -> None:
        super().__init__(system)
        self.matvec, self.rmatvec = _on_vectors(system.matvec), _on_vectors(system.rmatvec)
        self.precondition = _no_preconditioner if system.precondition is None else _on_vectors(system.precondition)
        # Squares that underflow are below `tiny` each, so a sum of squares above tiny**(2/3) has lost no digits.
        self._safe = torch.finfo(system.b.dtype).tiny ** (2 / 3)

    def vector(self, rows: Tensor) -> Tensor:
        return rows[0]

    def scalar(self, column: Tensor) -> RowScalar:
        return column.item()

    def to_rows(self, vector: Tensor) -> Tensor:
        return vector[None]

    def per_row(self, scalar: RowScalar) -> Tensor:
        return torch.tensor([scalar], dtype=torch.bool if isinstance(scalar, bool) else torch.float64)

    def dot(self, a: Tensor, b: Tensor) -> RowScalar:
        return torch.dot(a, b).item()

    def norm(self, a: Tensor) -> RowScalar:
        # One product, unless the sum of squares shows that squares may have left the range.
        square = torch.dot(a, a).item()
        return math.sqrt(square) if self._safe < square < math.inf else norm(a).item()

    def add(self, a: Tensor, s: RowScalar, b: Tensor) -> Tensor:
        return torch.add(a, b, alpha=s)

    def divide(self, a: Tensor, s: RowScalar) -> Tensor:
        return a / s if s else a

    def ratio(self, where: RowScalar, a: RowScalar, b: RowScalar) -> RowScalar:
        return a / b if where else 0.0

    def select(self, where: RowScalar, a: RowScalar, b: RowScalar) -> RowScalar:
        return a if where else b

    def larger(self, a: RowScalar, b: RowScalar) -> RowScalar:
        # Of nan and a number, Python's `max` returns the first argument.
        return max(a, b)

    def finite(self, s: RowScalar) -> RowScalar:
        return math.isfinite(s)

    def negate(self, s: RowScalar) -> RowScalar:
        return not s

    def any(self, s: RowScalar) -> bool:
        return bool(s)


def arithmetic(system: System) -> Arithmetic:
    """Return the arithmetic for the rows of a system."""
    if _control.takes_linear_solver():
        return OfRecordedRows(system)
    return OfOneRow(system) if system.b.device.type == "cpu" and system.b.shape[0] == 1 else OfRows(system)


def _on_vectors(product: RowMap) -> RowMap:
    return lambda v: product(v[None])[0]


def _no_preconditioner(v: Tensor) -> Tensor:
    return v
