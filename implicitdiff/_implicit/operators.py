"""Linear operators as pure functions of explicit operands.

An operator ``A(operands)`` maps a list of leaves to a list of leaves of the same shapes and dtypes. A rectangular one
is embedded in a square one (`Rectangular`). Its products are linearised once and reused, by one of the two classes of
`linearisation`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch

import implicitdiff._torch.levels as functorch
import implicitdiff._torch.trees as pytree
from implicitdiff._implicit.linearisation import ByFunctorch, Linearisation, Product, Residual
from implicitdiff._torch.lanes import vmap
from implicitdiff._torch.trees import Leaves

Dims = tuple[int | None, ...]


def with_vectors(
    product: Callable[[Any], Any], one_by_one: bool, chunk_size: int | None = None
) -> Callable[[Any], Any]:
    """Apply a product to many vectors, which lie along a new first dimension: by vmap, or one after the other."""
    if not one_by_one:
        return torch.func.vmap(product, chunk_size=chunk_size) if chunk_size else partial(functorch.over_first, product)

    def products(vectors: Any) -> Any:
        leaves, structure = pytree.flatten(vectors)
        images = [product(structure.unflatten([t[i] for t in leaves])) for i in range(len(leaves[0]))]
        _, of_image = pytree.flatten(images[0])
        return of_image.unflatten([torch.stack(ts) for ts in zip(*map(pytree.tensors, images), strict=True)])

    return products


class Products(NamedTuple):
    """Make ``v -> A v`` and ``u -> A^H u`` for fixed operands; what is linearised is linearised then."""

    matvec: Callable[[], Product]
    rmatvec: Callable[[], Product]


class Blocks(NamedTuple):
    """Which of its leaves an operator reads, and which it writes; of both sides, the one with fewer numbers."""

    domain: slice
    range: slice
    smaller: slice


_ALL = Blocks(slice(None), slice(None), slice(None))


class Lane(NamedTuple):
    """An operator over lanes as the operator of one lane.

    Attributes:
        operator: that of one lane.
        operands: its operands, those of all lanes.
        levels: for each dimension of lanes, where the operands are batched (0, else None), the innermost first.
    """

    operator: Operator
    operands: Leaves
    levels: tuple[Dims, ...]

    @property
    def adjoint(self) -> Lane:
        return self._replace(operator=self.operator.adjoint)


class Operator(ABC):
    """``A(operands)``, square."""

    @abstractmethod
    def products(self, operands: Leaves, like: Leaves, by: type[Linearisation] = ByFunctorch) -> Products:
        """The products for these operands; `like` shows what ``A`` acts on."""

    @property
    def blocks(self) -> Blocks:
        """Outside of which ``A`` is zero."""
        return _ALL

    def block_products(self, operands: Leaves, like: Leaves, by: type[Linearisation] = ByFunctorch) -> Products:
        """The products with that block of ``A``; `like` is the same as of `products`."""
        return self.products(operands, like, by)

    @abstractmethod
    def batched(self, dims: Dims) -> Operator:
        """The operator over one more leading dimension of its operands, where `dims` is 0, and of what it acts on."""

    @property
    def rows_first(self) -> bool:
        """Whether products with the adjoint, which give rows of the matrix, are the cheaper ones."""
        return False

    @property
    def point(self) -> int:
        """How many of the first operands are the point of a linearisation, which every lane needs for itself."""
        return 0

    @property
    def one_by_one(self) -> bool:
        """Whether its products take one vector at a time, as no vmap may run."""
        return False

    @property
    def lane(self) -> Lane | None:
        """The operator of one lane, where this one holds the operands of all lanes; else None."""
        return None

    @property
    def adjoint(self) -> Operator:
        return Adjoint(self)


@dataclass(frozen=True)
class Matvec(Operator):
    """``A(operands) v = fn(v, operands)``."""

    fn: Residual
    one_by_one: bool = False

    def products(self, operands: Leaves, like: Leaves, by: type[Linearisation] = ByFunctorch) -> Products:
        at = by(self.fn, list(map(torch.zeros_like, like)), operands)
        return Products(lambda: lambda v: self.fn(v, operands), at.pull)

    def batched(self, dims: Dims) -> Matvec:
        return Matvec(vmap(self.fn, (0, list(dims))), self.one_by_one)


@dataclass(frozen=True)
class Rectangular(Operator):
    """``(x, y) -> (0, A(operands) x)`` with ``A(operands) v = fn(v, operands)``, whose range is not its domain.

    The leaves are those of the domain, then those of the range. The pseudoinverse is ``(x, y) -> (A^+ y, 0)``, so the
    rules for square operators hold as they are. What solves sees the block ``A`` alone.

    Attributes:
        unknowns: how many leaves the domain has.
        is_wide: whether the domain has more numbers than the range.
    """

    fn: Residual
    unknowns: int
    is_wide: bool
    one_by_one: bool = False

    def products(self, operands: Leaves, like: Leaves, by: type[Linearisation] = ByFunctorch) -> Products:
        block, k = self.block_products(operands, like, by), self.unknowns

        def matvec() -> Product:
            product = block.matvec()
            return lambda v: [*map(torch.zeros_like, v[:k]), *product(v[:k])]

        def rmatvec() -> Product:
            product = block.rmatvec()
            return lambda u: [*product(u[k:]), *map(torch.zeros_like, u[k:])]

        return Products(matvec, rmatvec)

    @property
    def blocks(self) -> Blocks:
        x, y = slice(self.unknowns), slice(self.unknowns, None)
        return Blocks(x, y, y if self.is_wide else x)

    def block_products(self, operands: Leaves, like: Leaves, by: type[Linearisation] = ByFunctorch) -> Products:
        return Matvec(self.fn, self.one_by_one).products(operands, like[: self.unknowns], by)

    def batched(self, dims: Dims) -> Rectangular:
        return replace(self, fn=vmap(self.fn, (0, list(dims))))

    @property
    def rows_first(self) -> bool:
        return self.is_wide


@dataclass(frozen=True)
class Jacobian(Operator):
    """``A(x, theta) = d residual(x, theta) / dx``; the operands are the leaves of ``x``, then those of ``theta``."""

    residual: Residual
    unknowns: int

    @property
    def rows_first(self) -> bool:
        return True

    def products(self, operands: Leaves, like: Leaves, by: type[Linearisation] = ByFunctorch) -> Products:
        at = by(self.residual, operands[: self.unknowns], operands[self.unknowns :])
        return Products(at.push, at.pull)

    def batched(self, dims: Dims) -> Jacobian:
        return Jacobian(vmap(self.residual, (0, list(dims[self.unknowns :]))), self.unknowns)

    @property
    def point(self) -> int:
        # With x shared by the lanes, a derivative with respect to x would sum over them.
        return self.unknowns


@dataclass(frozen=True)
class Linearised(Operator):
    """An operator whose products exist already. It has no operands, so nothing batches it."""

    made: Products
    one_by_one: bool = False
    lane: Lane | None = None

    def products(self, operands: Leaves, like: Leaves, by: type[Linearisation] = ByFunctorch) -> Products:
        return self.made

    def batched(self, dims: Dims) -> Operator:
        raise AssertionError("nothing that varies over lanes is an operand")

    @property
    def rows_first(self) -> bool:
        return True


@dataclass(frozen=True)
class Adjoint(Operator):
    """``A^H``."""

    of: Operator

    def products(self, operands: Leaves, like: Leaves, by: type[Linearisation] = ByFunctorch) -> Products:
        matvec, rmatvec = self.of.products(operands, like, by)
        return Products(rmatvec, matvec)

    @property
    def lane(self) -> Lane | None:
        return None if self.of.lane is None else self.of.lane.adjoint

    @property
    def blocks(self) -> Blocks:
        domain, range_, smaller = self.of.blocks
        return Blocks(range_, domain, smaller)

    def block_products(self, operands: Leaves, like: Leaves, by: type[Linearisation] = ByFunctorch) -> Products:
        matvec, rmatvec = self.of.block_products(operands, like, by)
        return Products(rmatvec, matvec)

    def batched(self, dims: Dims) -> Adjoint:
        return Adjoint(self.of.batched(dims))

    @property
    def rows_first(self) -> bool:
        return not self.of.rows_first

    @property
    def point(self) -> int:
        return self.of.point

    @property
    def one_by_one(self) -> bool:
        return self.of.one_by_one

    @property
    def adjoint(self) -> Operator:
        return self.of
