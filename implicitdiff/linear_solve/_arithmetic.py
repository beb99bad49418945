"""The arithmetic in which the iterative methods are written: vectors, and one scalar for each row of a system.

`OfRows` keeps vectors as ``(rows, n)`` and scalars as columns ``(rows, 1)``. `OfOneRow` keeps vectors as ``(n,)`` and
scalars as Python numbers: on a CPU an operation on a tensor of one element takes more than a microsecond, on a number
a twentieth of that. Both kinds of scalar have ``+ - * /``, comparisons, ``& | ^``; what they do not share is a function
here. Vectors are never changed in place, since a product may return its argument.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from implicitdiff._implicit.system import Rows, System

Scalar = Any
"""A column ``(rows, 1)``, or a Python number; of floats or of booleans."""


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row, kept as a column."""
    return (a * b).sum(dim=-1, keepdim=True)


def norm(a: Tensor) -> Tensor:
    """Euclidean, row by row, kept as a column; no square leaves the range of the dtype."""
    info = torch.finfo(a.dtype)
    largest = a.abs().amax(dim=-1, keepdim=True).clamp(min=info.tiny, max=info.max)
    size: Tensor = largest * torch.linalg.vector_norm(a / largest, dim=-1, keepdim=True)
    return size


class Arithmetic(ABC):
    """Operations on the vectors and scalars of a system.

    Attributes:
        matvec, rmatvec: products with ``A`` and its transpose.
        precondition: the preconditioner, the identity if there is none.
        is_square: whether ``A`` is square.
        none: the scalar False.
    """

    matvec: Rows
    rmatvec: Rows
    precondition: Rows
    none: Scalar

    def __init__(self, system: System) -> None:
        self.is_square = system.is_square

    @abstractmethod
    def vector(self, rows: Tensor) -> Tensor:
        """From rows ``(rows, n)``."""

    @abstractmethod
    def scalar(self, column: Tensor) -> Scalar:
        """From a column ``(rows, 1)``."""

    @abstractmethod
    def to_rows(self, vector: Tensor) -> Tensor:
        """To rows ``(rows, n)``."""

    @abstractmethod
    def per_row(self, scalar: Scalar) -> Tensor:
        """To a tensor ``(rows,)``."""

    @abstractmethod
    def dot(self, a: Tensor, b: Tensor) -> Scalar: ...

    @abstractmethod
    def norm(self, a: Tensor) -> Scalar:
        """The Euclidean norm, without overflow or underflow of the squares."""

    @abstractmethod
    def add(self, a: Tensor, s: Scalar, b: Tensor) -> Tensor:
        """``a + s b``."""

    @abstractmethod
    def divide(self, a: Tensor, s: Scalar) -> Tensor:
        """``a / s``, and ``a`` where ``s`` is 0."""

    @abstractmethod
    def ratio(self, where: Scalar, a: Scalar, b: Scalar) -> Scalar:
        """``a / b`` in the rows `where`, in which ``b`` is not 0; 0 in others."""

    @abstractmethod
    def select(self, where: Scalar, a: Any, b: Any) -> Any:
        """``a`` in the rows `where`, ``b`` in others; vectors or scalars."""

    @abstractmethod
    def larger(self, a: Scalar, b: Scalar) -> Scalar:
        """The maximum of two scalars."""

    @abstractmethod
    def finite(self, s: Scalar) -> Scalar: ...

    @abstractmethod
    def negate(self, s: Scalar) -> Scalar:
        """Not ``s``. A negated comparison is true where a number is nan."""

    @abstractmethod
    def any(self, s: Scalar) -> bool:
        """Whether ``s`` holds in some row; waits for the device."""


class OfRows(Arithmetic):
    """With tensors for scalars."""

    def __init__(self, system: System) -> None:
        super().__init__(system)
        self.matvec, self.rmatvec = system.matvec, system.rmatvec
        self.precondition = system.precondition or _identity
        self.none = torch.zeros_like(system.scale, dtype=torch.bool)

    def vector(self, rows: Tensor) -> Tensor:
        return rows

    def scalar(self, column: Tensor) -> Scalar:
        return column

    def to_rows(self, vector: Tensor) -> Tensor:
        return vector

    def per_row(self, scalar: Scalar) -> Tensor:
        out: Tensor = scalar[:, 0]
        return out

    def dot(self, a: Tensor, b: Tensor) -> Scalar:
        return dot(a, b)

    def norm(self, a: Tensor) -> Scalar:
        return norm(a)

    def add(self, a: Tensor, s: Scalar, b: Tensor) -> Tensor:
        return torch.addcmul(a, s, b)

    def divide(self, a: Tensor, s: Scalar) -> Tensor:
        return a / torch.where(s == 0, 1.0, s)

    def ratio(self, where: Scalar, a: Scalar, b: Scalar) -> Scalar:
        return torch.where(where, a / b, 0.0)

    def select(self, where: Scalar, a: Any, b: Any) -> Any:
        return torch.where(where, a, b)

    def larger(self, a: Scalar, b: Scalar) -> Scalar:
        return torch.maximum(a, b)

    def finite(self, s: Scalar) -> Scalar:
        return torch.isfinite(s)

    def negate(self, s: Scalar) -> Scalar:
        return ~s

    def any(self, s: Scalar) -> bool:
        return bool(s.any())


class OfOneRow(Arithmetic):
    """With Python numbers for scalars, which are no device's to wait for on a CPU."""

    none = False

    def __init__(self, system: System) -> None:
        super().__init__(system)
        self.matvec, self.rmatvec = _on_vectors(system.matvec), _on_vectors(system.rmatvec)
        self.precondition = _identity if system.precondition is None else _on_vectors(system.precondition)
        # A sum of squares above this has lost nothing to underflow.
        self._safe = torch.finfo(system.b.dtype).tiny ** (2 / 3)

    def vector(self, rows: Tensor) -> Tensor:
        return rows[0]

    def scalar(self, column: Tensor) -> Scalar:
        return column.item()

    def to_rows(self, vector: Tensor) -> Tensor:
        return vector[None]

    def per_row(self, scalar: Scalar) -> Tensor:
        return torch.tensor([scalar], dtype=torch.bool if isinstance(scalar, bool) else torch.float64)

    def dot(self, a: Tensor, b: Tensor) -> Scalar:
        return torch.dot(a, b).item()

    def norm(self, a: Tensor) -> Scalar:
        square = torch.dot(a, a).item()
        return math.sqrt(square) if self._safe < square < math.inf else norm(a).item()

    def add(self, a: Tensor, s: Scalar, b: Tensor) -> Tensor:
        return torch.add(a, b, alpha=s)

    def divide(self, a: Tensor, s: Scalar) -> Tensor:
        return a / s if s else a

    def ratio(self, where: Scalar, a: Scalar, b: Scalar) -> Scalar:
        return a / b if where else 0.0

    def select(self, where: Scalar, a: Any, b: Any) -> Any:
        return a if where else b

    def larger(self, a: Scalar, b: Scalar) -> Scalar:
        # Of nan and a number, `max` returns the first.
        return max(a, b)

    def finite(self, s: Scalar) -> Scalar:
        return math.isfinite(s)

    def negate(self, s: Scalar) -> Scalar:
        return not s

    def any(self, s: Scalar) -> bool:
        return bool(s)


def arithmetic(system: System) -> Arithmetic:
    """The one that suits the rows of a system."""
    return OfOneRow(system) if system.b.device.type == "cpu" and system.b.shape[0] == 1 else OfRows(system)


def _on_vectors(product: Rows) -> Rows:
    return lambda v: product(v[None])[0]


def _identity(v: Tensor) -> Tensor:
    return v
