"""Linear operators as pure functions of explicit operands.

An operator ``A(operands)`` maps a list of leaves to a list of leaves of the same shapes and dtypes; a rectangular one
is embedded in a square one (`Rectangular`). Its products are linearised once and reused, in one of two ways: `Pullback`
by torch.func, which every transform can differentiate and batch; `PlainPullback` by ordinary autograd, faster, for
plain tensors outside of every transform.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import torch

import implicitdiff._torch.levels as functorch
import implicitdiff._torch.trees as pytree
from implicitdiff._torch.lanes import vmap
from implicitdiff._torch.trees import Leaves

Product = Callable[[Leaves], Leaves]
Residual = Callable[[Leaves, Leaves], Leaves]
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


class Pullback:
    """Makes ``u -> (d fn(x, theta) / dx)^H u``, and its transpose ``v -> (d fn / dx) v``.

    In terms of real and imaginary parts the adjoint is the transpose, also where ``fn`` is differentiable over the
    reals only.
    """

    def __init__(self, fn: Residual, x: Leaves, theta: Leaves) -> None:
        self.fn, self.x, self.theta = fn, x, theta

    def pull(self) -> Product:
        pull = self._pull
        return lambda u: list(pull(*u))

    def push(self, like: Leaves) -> Product:
        """The transpose; `like` shows what ``fn`` returns."""
        # The pullback is linear in its cotangent; pulled back in turn, it gives the product with the Jacobian. Forward
        # mode, the other way to it, does not nest everywhere.
        push: Callable[..., tuple[torch.Tensor, ...]] = torch.func.vjp(self._pull, *map(torch.zeros_like, like))[1]
        return lambda v: list(push(tuple(v)))

    @cached_property
    def _pull(self) -> Callable[..., tuple[torch.Tensor, ...]]:
        pull: Any = torch.func.vjp(lambda *x: tuple(self.fn(list(x), self.theta)), *self.x)[1]
        return lambda *u: pull(u)


class PlainPullback(Pullback):
    """The same by one autograd graph, kept for as long as the object lives; ``x`` and ``theta`` are plain tensors."""

    def push(self, like: Leaves) -> Product:
        with functorch.recording():
            u = tuple(torch.zeros_like(t).requires_grad_() for t in self._graph[1])
            g = _vjp(self._graph[1], self._graph[0], u, create_graph=True)
        return lambda v: list(_vjp(g, u, tuple(v)))

    @cached_property
    def _pull(self) -> Callable[..., tuple[torch.Tensor, ...]]:
        x, y = self._graph
        return lambda *u: _vjp(y, x, u)

    @cached_property
    def _graph(self) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        with functorch.recording():
            x = tuple(t.requires_grad_() for t in functorch.recordable(self.x))
            y = tuple(self.fn(list(x), functorch.recordable(self.theta)))
        _refuse_strangers(x, y)
        return x, y


class SharedPullback(PlainPullback):
    """The same graph for products with ``d fn / dx`` and, by `pull_theta`, with the derivative in some of ``theta``."""

    def __init__(self, fn: Residual, x: Leaves, theta: Leaves, wanted: Sequence[int]) -> None:
        super().__init__(fn, x, functorch.recordable(theta))
        self.wanted = tuple(self.theta[i] for i in wanted)

    def pull_theta(self, u: Leaves) -> Leaves:
        _, y = self._graph
        return list(_vjp(y, self.wanted, tuple(u)))

    @cached_property
    def _graph(self) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        with functorch.recording():
            x = tuple(t.requires_grad_() for t in functorch.recordable(self.x))
            for t in self.wanted:
                t.requires_grad_()
            y = tuple(self.fn(list(x), self.theta))
        self._look_for_strangers(x, y)
        return x, y

    def _look_for_strangers(self, x: tuple[torch.Tensor, ...], y: tuple[torch.Tensor, ...]) -> None:
        _refuse_strangers((*x, *self.wanted), y)


class Retained(SharedPullback):
    """The same graph, made at the call and kept for a first derivative in reverse mode.

    Its results are handed to autograd to save (`release`) and come back with a derivative (`resume`): autograd frees
    them as it frees all that it saves.

    Attributes:
        positions: the indices in ``theta`` of the tensors that are differentiated.
        adopted: parameters that ``fn`` reaches without a substitute, as in a custom autograd.Function that runs with no
            transform on the stack. They are appended to ``theta``.
    """

    def __init__(
        self, fn: Residual, x: Leaves, theta: Leaves, positions: Sequence[int], *, adopts: bool = False
    ) -> None:
        super().__init__(fn, x, theta, positions)
        self.adopts = adopts
        self.adopted: Leaves = []
        self._begin, self.end = self._graph
        self.wanted = (*self.wanted, *self.adopted)
        self.positions = [*positions, *range(len(theta), len(theta) + len(self.adopted))]
        del self._graph, self.fn, self.x, self.theta

    def release(self) -> Leaves:
        end, self.end = self.end, ()
        return list(end)

    def resume(self, end: Leaves) -> SharedPullback:
        pullback = object.__new__(SharedPullback)
        pullback.__dict__.update(wanted=self.wanted, _graph=(self._begin, tuple(end)))
        return pullback

    def _look_for_strangers(self, x: tuple[torch.Tensor, ...], y: tuple[torch.Tensor, ...]) -> None:
        if not self.adopts:
            return super()._look_for_strangers(x, y)
        found = [leaf for t in y for leaf in functorch.leaves_beside(t, (*x, *self.wanted))]
        self.adopted = list({id(leaf): leaf for leaf in found}.values())
        return None


def _vjp(
    y: tuple[torch.Tensor, ...], x: tuple[torch.Tensor, ...], u: tuple[torch.Tensor, ...], *, create_graph: bool = False
) -> tuple[torch.Tensor, ...]:
    pairs = [(a, b) for a, b in zip(y, u, strict=True) if a.requires_grad]
    if not pairs:
        return tuple(map(torch.zeros_like, x))
    ys, us = zip(*pairs, strict=True)
    grads = functorch.gradients(ys, x, us, create_graph=create_graph)
    return tuple(torch.zeros_like(t) if g is None else g for t, g in zip(x, grads, strict=True))


class StrangerError(RuntimeError):
    """A result depends on a tensor that is no operand."""


def _refuse_strangers(x: tuple[torch.Tensor, ...], y: tuple[torch.Tensor, ...]) -> None:
    """Raise if a result hangs on a tensor that is no operand, since its derivative would be lost, silently."""
    if not all(map(functorch.is_plain, y)) or any(functorch.leaves_beside(t, x) for t in y):
        raise StrangerError(
            "the function to be differentiated depends on a tensor that it did not depend on when the solver was "
            "called: a parameter was replaced since then, or given its gradient flag; take the derivative first"
        )


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
    def products(self, operands: Leaves, like: Leaves, pullback: type[Pullback] = Pullback) -> Products:
        """The products for these operands; `like` shows what ``A`` acts on."""

    @property
    def blocks(self) -> Blocks:
        """Outside of which ``A`` is zero."""
        return _ALL

    def block_products(self, operands: Leaves, like: Leaves, pullback: type[Pullback] = Pullback) -> Products:
        """The products with that block of ``A``; `like` is the same as of `products`."""
        return self.products(operands, like, pullback)

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

    def products(self, operands: Leaves, like: Leaves, pullback: type[Pullback] = Pullback) -> Products:
        at = pullback(self.fn, list(map(torch.zeros_like, like)), operands)
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

    def products(self, operands: Leaves, like: Leaves, pullback: type[Pullback] = Pullback) -> Products:
        block, k = self.block_products(operands, like, pullback), self.unknowns

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

    def block_products(self, operands: Leaves, like: Leaves, pullback: type[Pullback] = Pullback) -> Products:
        return Matvec(self.fn, self.one_by_one).products(operands, like[: self.unknowns], pullback)

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

    def products(self, operands: Leaves, like: Leaves, pullback: type[Pullback] = Pullback) -> Products:
        at = pullback(self.residual, operands[: self.unknowns], operands[self.unknowns :])
        return Products(lambda: at.push(like), at.pull)

    def batched(self, dims: Dims) -> Jacobian:
        return Jacobian(vmap(self.residual, (0, list(dims[self.unknowns :]))), self.unknowns)

    @property
    def point(self) -> int:
        # With x shared by the lanes, a derivative with respect to x would sum over them.
        return self.unknowns


class Linearisation(Protocol):
    """What makes the products with a Jacobian, as a `Pullback` does."""

    def pull(self) -> Product: ...

    def push(self, like: Leaves) -> Product: ...


@dataclass(frozen=True)
class Linearised(Operator):
    """A Jacobian whose graph is there already; without operands, it is never batched."""

    at: Linearisation
    one_by_one: bool = False
    lane: Lane | None = None

    def products(self, operands: Leaves, like: Leaves, pullback: type[Pullback] = Pullback) -> Products:
        return Products(lambda: self.at.push(like), self.at.pull)

    def batched(self, dims: Dims) -> Operator:
        raise AssertionError("nothing that varies over lanes is an operand")

    @property
    def rows_first(self) -> bool:
        return True


@dataclass(frozen=True)
class Adjoint(Operator):
    """``A^H``."""

    of: Operator

    def products(self, operands: Leaves, like: Leaves, pullback: type[Pullback] = Pullback) -> Products:
        matvec, rmatvec = self.of.products(operands, like, pullback)
        return Products(rmatvec, matvec)

    @property
    def lane(self) -> Lane | None:
        return None if self.of.lane is None else self.of.lane.adjoint

    @property
    def blocks(self) -> Blocks:
        domain, range_, smaller = self.of.blocks
        return Blocks(range_, domain, smaller)

    def block_products(self, operands: Leaves, like: Leaves, pullback: type[Pullback] = Pullback) -> Products:
        matvec, rmatvec = self.of.block_products(operands, like, pullback)
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
