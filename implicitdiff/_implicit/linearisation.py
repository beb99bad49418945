"""Linearisations: a function at a point, with the products of its Jacobian.

There are two ways. `ByFunctorch` composes `torch.func.vjp`: every transform can differentiate and batch its products.
`ByAutograd` keeps one graph of autograd: faster, for plain tensors outside of every transform. A caller that knows
which transforms run chooses the class once.

In terms of real and imaginary parts the adjoint is the transpose, also where the function is differentiable over the
reals only. So the code below says transpose for both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch

import implicitdiff._torch.levels as functorch
from implicitdiff._torch.trees import Leaves

Product = Callable[[Leaves], Leaves]
Residual = Callable[[Leaves, Leaves], Leaves]
"""``fn(x, theta)`` on lists of leaves."""


class Linearisation(ABC):
    """``J = d fn(x, theta) / dx`` at one point.

    `pull` and `push` linearise when they are called, and return a product that does not linearise again. So call them
    outside of a vmap over vectors, and the product inside.
    """

    def __init__(self, fn: Residual, x: Leaves, theta: Leaves) -> None:
        self.fn, self.x, self.theta = fn, x, theta

    @property
    @abstractmethod
    def values(self) -> Leaves:
        """``fn(x, theta)``, as the context of the caller sees it."""

    @abstractmethod
    def pull(self) -> Product:
        """Return ``u -> J^T u``."""

    @abstractmethod
    def push(self) -> Product:
        """Return ``v -> J v``.

        The pullback is linear in its cotangent. Pulled back in turn, it gives the product with the Jacobian. Forward
        mode is the other way to it, but does not nest everywhere.
        """

    @abstractmethod
    def of_gradient(self) -> Linearisation:
        """Return the linearisation of the gradient of the sum of the values. Its `values` are the gradient, and its
        Jacobian is the Hessian, which is symmetric: `pull` gives the product."""


class ByFunctorch(Linearisation):
    """The linearisation by `torch.func.vjp`, under any transform."""

    @property
    def values(self) -> Leaves:
        return list(self._pair[0])

    def pull(self) -> Product:
        _, pull = self._pair
        return lambda u: _with_gradients_on(lambda: pull(*u))

    def push(self) -> Product:
        values, pull = self._pair
        push: Any = torch.func.vjp(pull, *map(torch.zeros_like, values))[1]
        return lambda v: _with_gradients_on(lambda: push(tuple(v)))

    def of_gradient(self) -> ByFunctorch:
        def gradient(x: Leaves, theta: Leaves) -> Leaves:
            at = ByFunctorch(self.fn, x, theta)
            return at.pull()([torch.ones_like(t) for t in at.values])

        return ByFunctorch(gradient, self.x, self.theta)

    @cached_property
    def _pair(self) -> tuple[tuple[torch.Tensor, ...], Callable[..., tuple[torch.Tensor, ...]]]:
        pair: Any = torch.func.vjp(lambda *x: tuple(self.fn(list(x), self.theta)), *self.x)
        values, pull = pair
        return values, lambda *u: pull(u)


def _with_gradients_on(product: Callable[[], Sequence[torch.Tensor]]) -> Leaves:
    # With gradients off, torch takes formulas of which some are wrong under vmap: that of `torch.linalg.eigvals`.
    if torch.is_grad_enabled():
        return list(product())
    with torch.enable_grad():
        return [t.detach() for t in product()]


class ByAutograd(Linearisation):
    """The linearisation by one graph of autograd, which lives as long as the object; on plain tensors, without a
    derivative of its own."""

    @property
    def values(self) -> Leaves:
        return [t.detach() for t in self._graph[1]]

    def pull(self) -> Product:
        x, y = self._graph
        return lambda u: vector_jacobian_product(y, x, u)

    def push(self) -> Product:
        x, y = self._graph
        with functorch.recording():
            u = [torch.zeros_like(t).requires_grad_() for t in y]
            pulled = vector_jacobian_product(y, x, u, create_graph=True)
        return lambda v: vector_jacobian_product(pulled, u, v)

    def of_gradient(self) -> ByAutograd:
        x, y = self._graph
        with functorch.recording():
            gradient = vector_jacobian_product(y, x, [torch.ones_like(t) for t in y], create_graph=True)
        at = object.__new__(ByAutograd)
        at.__dict__["_graph"] = x, gradient
        return at

    @cached_property
    def _graph(self) -> tuple[Leaves, Leaves]:
        return self._record()

    def _record(self) -> tuple[Leaves, Leaves]:
        """Return the leaves ``x`` of a new graph, and its results."""
        with functorch.recording():
            x = [t.requires_grad_() for t in functorch.recordable(self.x)]
            return x, self.fn(x, functorch.recordable(self.theta))


class OfOperands(ByAutograd):
    """The linearisation of a function that must depend on its operands alone.

    Raises (when it linearises):
        StrangerError: the function depends on another tensor that is differentiated.
    """

    def _record(self) -> tuple[Leaves, Leaves]:
        x, y = super()._record()
        refuse_strangers(x, y)
        return x, y


class WithOperands(OfOperands):
    """The same graph for ``J`` and for ``d fn / d theta``.

    Attributes:
        wanted: the tensors of ``theta`` that are differentiated.
    """

    def __init__(self, fn: Residual, x: Leaves, theta: Leaves, positions: Sequence[int]) -> None:
        super().__init__(fn, x, functorch.recordable(theta))
        self.wanted = [self.theta[i] for i in positions]

    def pull_theta(self, u: Leaves) -> Leaves:
        """Return ``(d fn / d theta)^T u`` for the tensors that are wanted."""
        _, y = self._graph
        return vector_jacobian_product(y, self.wanted, u)

    def _record(self) -> tuple[Leaves, Leaves]:
        with functorch.recording():
            x = [t.requires_grad_() for t in functorch.recordable(self.x)]
            for t in self.wanted:
                t.requires_grad_()
            y = self.fn(x, self.theta)
        self._judge_strangers([*x, *self.wanted], y)
        return x, y

    def _judge_strangers(self, known: Leaves, y: Leaves) -> None:
        refuse_strangers(known, y)


class Retained(WithOperands):
    """A graph that is recorded at the call and kept for a first derivative in reverse mode.

    autograd saves its results (`release`) and hands them back to the derivative (`resume`), so that autograd frees the
    graph as it frees all that it saves.

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
        self.wanted = [*self.wanted, *self.adopted]
        self.positions = [*positions, *range(len(theta), len(theta) + len(self.adopted))]
        del self._graph, self.fn, self.x, self.theta

    def release(self) -> Leaves:
        """Return the results of the graph, and forget them."""
        end, self.end = self.end, []
        return end

    def resume(self, end: Leaves) -> WithOperands:
        """Return the linearisation whose results have come back."""
        at = object.__new__(WithOperands)
        at.__dict__.update(wanted=self.wanted, _graph=(self._begin, end))
        return at

    def _judge_strangers(self, known: Leaves, y: Leaves) -> None:
        if not self.adopts:
            return super()._judge_strangers(known, y)
        found = [leaf for t in y for leaf in functorch.leaves_beside(t, known)]
        self.adopted = list({id(leaf): leaf for leaf in found}.values())
        return None


def vector_jacobian_product(y: Leaves, x: Leaves, u: Leaves, *, create_graph: bool = False) -> Leaves:
    """Return ``(dy/dx)^T u`` from the graph of `y`, which is kept; zero where `y` does not depend on `x`."""
    pairs = [(a, b) for a, b in zip(y, u, strict=True) if a.requires_grad]
    if not pairs:
        return [torch.zeros_like(t) for t in x]
    ys, us = zip(*pairs, strict=True)
    # Under vmap with gradients on, for the reason given in `_with_gradients_on`.
    is_batched = not create_graph and functorch.depth() > 0
    grads = functorch.gradients(ys, x, us, create_graph=create_graph or is_batched)
    pulled = [torch.zeros_like(t) if g is None else g for t, g in zip(x, grads, strict=True)]
    return [t.detach() for t in pulled] if is_batched else pulled


class StrangerError(RuntimeError):
    """A result depends on a tensor that is no operand."""


def refuse_strangers(x: Leaves, y: Leaves) -> None:
    """Raise `StrangerError` if a result depends on a leaf of autograd that is no operand: its derivative would silently
    be zero."""
    if not all(map(functorch.is_plain, y)) or any(functorch.leaves_beside(t, x) for t in y):
        raise StrangerError(
            "the function to be differentiated depends on a tensor that it did not depend on when the solver was "
            "called: a parameter was replaced since then, or given its gradient flag; take the derivative first"
        )
