"""Linearisations: a function at a point, with the products of its Jacobian.

`ByFunctorch` composes `torch.func.vjp`: every transform can differentiate and batch its products.
`ByAutograd` keeps one autograd graph: faster, but for plain tensors outside of every transform. The caller knows the
running transforms, and chooses the class once.

Over real and imaginary parts, the adjoint of a complex matrix is the transpose, also for functions that are
differentiable over the reals only. So the code below says transpose for both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch

import implicitdiff._torch.context as _context
import implicitdiff._torch.functions as _functions
import implicitdiff._torch.levels as _levels
import implicitdiff._torch.switches as _switches
from implicitdiff._torch.trees import Leaves

Product = Callable[[Leaves], Leaves]
Residual = Callable[[Leaves, Leaves], Leaves]
"""A function ``fn(x, theta)`` of two lists of leaves."""


class Linearisation(ABC):
    """``J = d fn(x, theta) / dx`` at one point.

    `pull` and `push` linearise when called, and return a product that does not linearise again. So call `pull` and
    `push` outside of a vmap over vectors, and the product inside.
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

        The pullback ``u -> J^T u`` is linear in ``u``, so its own pullback is ``v -> J v``. Forward mode would compute
        the product directly, but forward mode cannot be nested under every transform.
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
        return lambda u: list(pull(*u))

    def push(self) -> Product:
        # The pullback is linear, so its derivative is the same at every cotangent; take zero. See J. Townsend, "A new
        # trick for calculating Jacobian vector products", 2017.
        values, pull = self._pair
        push: Any = torch.func.vjp(pull, *map(torch.zeros_like, values))[1]
        return lambda v: list(push(tuple(v)))

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


class ByAutograd(Linearisation):
    """The linearisation by one autograd graph, on plain tensors, without a derivative of its own. The object keeps the
    graph."""

    @property
    def values(self) -> Leaves:
        return [t.detach() for t in self._graph[1]]

    def pull(self) -> Product:
        x, y = self._graph
        return lambda u: vector_jacobian_product(y, x, u)

    def push(self) -> Product:
        x, y = self._graph
        # As in `ByFunctorch`, record J^T u as a function of u, at zero, and pull back through the record.
        with _switches.recording():
            u = [torch.zeros_like(t).requires_grad_() for t in y]
            pulled = vector_jacobian_product(y, x, u, create_graph=True)
        return lambda v: vector_jacobian_product(pulled, u, v)

    def of_gradient(self) -> ByAutograd:
        x, y = self._graph
        with _switches.recording():
            gradient = vector_jacobian_product(y, x, [torch.ones_like(t) for t in y], create_graph=True)
        # Without `__init__`: the graph is given, and the function is not called again.
        at = object.__new__(ByAutograd)
        at.__dict__["_graph"] = x, gradient
        return at

    @cached_property
    def _graph(self) -> tuple[Leaves, Leaves]:
        return self._record()

    def _record(self) -> tuple[Leaves, Leaves]:
        """Return the leaves ``x`` of a new graph, and its results."""
        with _switches.recording():
            # `recordable` inside of `recording`: a copy made in inference mode would be an inference tensor again.
            x = [t.requires_grad_() for t in _functions.recordable(self.x)]
            return x, self.fn(x, _functions.recordable(self.theta))


class OfOperands(ByAutograd):
    """The linearisation of a function that must depend on its operands alone.

    Raises (when it linearises):
        UnknownLeafError: the function depends on another tensor that is differentiated.
    """

    def _record(self) -> tuple[Leaves, Leaves]:
        x, y = super()._record()
        refuse_unknown_leaves(x, y)
        return x, y


class JointLinearisation(OfOperands):
    """One autograd graph for both ``J`` and ``d fn / d theta``.

    Attributes:
        wanted: the tensors of ``theta`` to differentiate.
    """

    def __init__(self, fn: Residual, x: Leaves, theta: Leaves, positions: Sequence[int]) -> None:
        super().__init__(fn, x, _functions.recordable(theta))
        self.wanted = [*map(self.theta.__getitem__, positions)]

    def pull_theta(self, u: Leaves) -> Leaves:
        """Return ``(d fn / d theta)^T u`` for the tensors in `wanted`."""
        _, y = self._graph
        return vector_jacobian_product(y, self.wanted, u)

    def _record(self) -> tuple[Leaves, Leaves]:
        with _switches.recording():
            x = [*map(torch.Tensor.requires_grad_, _functions.recordable(self.x))]
            # `recordable` has detached these tensors, so no flag of a caller's tensor is set.
            for t in self.wanted:
                t.requires_grad_()
            y = self.fn(x, self.theta)
        self._check_unknown_leaves([*x, *self.wanted], y)
        return x, y

    def _check_unknown_leaves(self, known: Leaves, y: Leaves) -> None:
        refuse_unknown_leaves(known, y)


class RetainedGraph(JointLinearisation):
    """A graph that is recorded at the call, for a first derivative in reverse mode.

    The results of the graph are handed to autograd as saved tensors (`release`), and come back in the derivative
    (`resume`). So autograd frees the graph together with its other saved tensors.

    Attributes:
        positions: the indices in ``theta`` of the differentiated tensors.
        adopted: parameters that ``fn`` uses without a substitute, for example inside a custom autograd.Function that
            runs with no transform on the stack. The caller appends these to ``theta``.
    """

    def __init__(
        self, fn: Residual, x: Leaves, theta: Leaves, positions: Sequence[int], *, adopts: bool = False
    ) -> None:
        super().__init__(fn, x, theta, positions)
        self.adopts = adopts
        self.adopted: Leaves = []
        # The property records the graph here.
        self._begin, self.end = self._graph
        self.wanted = [*self.wanted, *self.adopted]
        self.positions = [*positions, *range(len(theta), len(theta) + len(self.adopted))]
        # The cached pair would keep the results, and with them the graph, alive after `release`.
        del self._graph, self.fn, self.x, self.theta

    def release(self) -> Leaves:
        """Return the results of the graph, and drop the references to them."""
        end, self.end = self.end, []
        return end

    def resume(self, end: Leaves) -> JointLinearisation:
        """Return the linearisation with the results that autograd saved."""
        # Without `__init__`, which would need the function. The graph is given, so nothing is evaluated again.
        at = object.__new__(JointLinearisation)
        at.__dict__.update(wanted=self.wanted, _graph=(self._begin, end))
        return at

    def _check_unknown_leaves(self, known: Leaves, y: Leaves) -> None:
        if not self.adopts:
            return super()._check_unknown_leaves(known, y)
        self.adopted = _functions.leaves_beside(y, known)
        return None


def vector_jacobian_product(y: Leaves, x: Leaves, u: Leaves, *, create_graph: bool = False) -> Leaves:
    """Return ``(dy/dx)^T u`` from the graph of `y`, and keep the graph; zero if `y` does not depend on `x`."""
    # The engine raises for an output without a graph; the derivative of such an output is zero.
    pairs = [(a, b) for a, b in zip(y, u, strict=True) if a.requires_grad]
    if not pairs:
        return [torch.zeros_like(t) for t in x]
    ys, us = zip(*pairs, strict=True)
    # Without a graph, torch takes formulas of which some are wrong under vmap: that of `torch.linalg.eigvals`.
    is_batched = not create_graph and _context.depth() > 0
    grads = _functions.gradients(ys, x, us, create_graph=create_graph or is_batched)
    # The engine returns None for an input that no output uses.
    pulled = [torch.zeros_like(t) if g is None else g for t, g in zip(x, grads, strict=True)]
    return [t.detach() for t in pulled] if is_batched else pulled


class UnknownLeafError(RuntimeError):
    """A result depends on a leaf of autograd that is not an operand."""


def refuse_unknown_leaves(x: Leaves, y: Leaves) -> None:
    """Raise `UnknownLeafError` if a result depends on a leaf of autograd that is not an operand.

    The derivative with respect to the leaf would silently be zero.
    """
    # Plain operands give plain results. A wrapper among the results comes from a captured tensor.
    if not _levels.are_plain(y) or _functions.leaves_beside(y, x):
        raise UnknownLeafError(
            "the function to be differentiated depends on a tensor on which it did not depend at the call of the "
            "solver: a parameter was replaced since the call, or its requires_grad flag was set; take the derivative "
            "before the change"
        )
