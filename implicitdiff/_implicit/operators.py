"""Linear operators as pure functions of explicit operands.

An operator ``A(operands)`` maps a list of leaves to a list of leaves of the same shapes and dtypes. A rectangular
operator is embedded in a square operator, see `Rectangular`. The products of an operator are linearised once and
reused, by one of the two classes of `linearisation`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

import implicitdiff._torch.functions as _functions
import implicitdiff._torch.trees as pytree
from implicitdiff._implicit.linearisation import ByFunctorch, Linearisation, Product, Residual
from implicitdiff._torch.lanes import vmap
from implicitdiff._torch.trees import Leaves, Tree

Dims = tuple[int | None, ...]


def with_vectors(
    product: Callable[[Tree], Tree], one_by_one: bool, chunk_size: int | None = None
) -> Callable[[Tree], Tree]:
    """Return a product with many vectors, stacked in a new first dimension: by vmap, or by a loop if `one_by_one`."""
    if not one_by_one:
        return (
            torch.func.vmap(product, chunk_size=chunk_size) if chunk_size else partial(_functions.over_first, product)
        )

    def products(vectors: Tree) -> Tree:
        leaves, structure = pytree.flatten(vectors)
        images = [product(structure.unflatten([t[i] for t in leaves])) for i in range(len(leaves[0]))]
        _, of_image = pytree.flatten(images[0])
        return of_image.unflatten([torch.stack(ts) for ts in zip(*map(pytree.tensors, images), strict=True)])

    return products


class Products(NamedTuple):
    """Factories of ``v -> A v`` and ``u -> A^H u`` for fixed operands. A factory linearises; its product does not."""

    matvec: Callable[[], Product]
    rmatvec: Callable[[], Product]


class Blocks(NamedTuple):
    """Slices of the leaves that an operator reads and writes, and the slice with fewer numbers."""

    domain: slice
    range: slice
    smaller: slice


_ALL = Blocks(slice(None), slice(None), slice(None))


class Lane(NamedTuple):
    """An operator over lanes, given by the operator of one lane.

    Attributes:
        operator: the operator of one lane.
        operands: the operands of all lanes.
        levels: for each dimension of lanes, the innermost first, the batch dimension (0, or None) of each operand.
    """

    operator: Operator
    operands: Leaves
    levels: tuple[Dims, ...]

    @property
    def adjoint(self) -> Lane:
        return self._replace(operator=self.operator.adjoint)


class Operator(ABC):
    """A square linear operator ``A(operands)``."""

    @abstractmethod
    def products(self, operands: Leaves, like: Leaves, by: type[Linearisation] = ByFunctorch) -> Products:
        """Return the products for these operands; `like` has the shapes and dtypes of the domain."""

    @property
    def blocks(self) -> Blocks:
        """The block of leaves outside of which ``A`` is zero."""
        return _ALL

    def block_products(self, operands: Leaves, like: Leaves, by: type[Linearisation] = ByFunctorch) -> Products:
        """Return the products with the block of ``A`` in `blocks`; `like` as for `products`."""
        return self.products(operands, like, by)

    @abstractmethod
    def batched(self, dims: Dims) -> Operator:
        """Return the operator with one more leading dimension of the vectors, and of the operands whose `dims` is 0."""

    @property
    def rows_first(self) -> bool:
        """True if products with the adjoint, which give the rows of the matrix, are cheaper."""
        return False

    @property
    def point(self) -> int:
        """The number of leading operands that are the point of a linearisation. Each lane needs its own point."""
        return 0

    @property
    def one_by_one(self) -> bool:
        """True if the products take one vector at a time, because vmap cannot run the function."""
        return False

    @property
    def lane(self) -> Lane | None:
        """The operator of one lane, if known; else None."""
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
        # `fn` is linear in v, so `fn` is its own derivative, and the adjoint can be taken at zero.
        at = by(self.fn, list(map(torch.zeros_like, like)), operands)
        return Products(lambda: lambda v: self.fn(v, operands), at.pull)

    def batched(self, dims: Dims) -> Matvec:
        # An operand with None stays shared by the lanes, without a copy.
        return Matvec(vmap(self.fn, (0, list(dims))), self.one_by_one)


@dataclass(frozen=True)
class Rectangular(Operator):
    """A rectangular ``A(operands) v = fn(v, operands)`` as the square operator ``(x, y) -> (0, A(operands) x)``.

    The leaves of the domain come first, then the leaves of the range. The pseudoinverse is ``(x, y) -> (A^+ y, 0)``, so
    the rules for square operators apply without a change. An algorithm receives the block ``A`` only.

    Attributes:
        fn: the product of one lane.
        unknowns: the number of leaves of the domain.
        is_wide: whether the domain has more numbers than the range.
        one_by_one: see `Operator.one_by_one`.
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
        # A row takes one backward pass; a column takes the derivative of a pullback, a longer graph.
        return True

    def products(self, operands: Leaves, like: Leaves, by: type[Linearisation] = ByFunctorch) -> Products:
        at = by(self.residual, operands[: self.unknowns], operands[self.unknowns :])
        return Products(at.push, at.pull)

    def batched(self, dims: Dims) -> Jacobian:
        # The point x is batched in every vmap, see `point`.
        return Jacobian(vmap(self.residual, (0, list(dims[self.unknowns :]))), self.unknowns)

    @property
    def point(self) -> int:
        # With one x for all lanes, a derivative with respect to x would be summed over the lanes.
        return self.unknowns


@dataclass(frozen=True)
class Linearised(Operator):
    """An operator with given products. Without operands, no vmap can batch the operator."""

    made: Products
    one_by_one: bool = False
    lane: Lane | None = None

    def products(self, operands: Leaves, like: Leaves, by: type[Linearisation] = ByFunctorch) -> Products:
        return self.made

    def batched(self, dims: Dims) -> Operator:
        raise AssertionError("an operator without operands is never batched")

    @property
    def rows_first(self) -> bool:
        return True


@dataclass(frozen=True)
class Adjoint(Operator):
    """The adjoint ``A^H`` of an operator."""

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
