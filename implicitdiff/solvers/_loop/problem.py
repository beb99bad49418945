"""What a solver's method sees of a problem.

A method never meets a pytree, a transform or a batch: it gets the user's functions as functions of rows of real
numbers, ``(lanes, n)``, one row for each lane of vmap, and returns rows. The same lines then serve a batch of plain
tensors below every transform, and one lane in the caller's frame whose steps are differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

import implicitdiff._torch.levels as functorch
import implicitdiff._torch.trees as pytree
from implicitdiff._implicit.operators import with_vectors
from implicitdiff._implicit.system import Vectors
from implicitdiff._torch.trees import Leaves, Structure, Tree

VectorMap = Callable[[Tensor], Tensor]
UserFunction = Callable[[Leaves, Leaves], Leaves]
"""``part(x, more) -> leaves`` on leaves with the lanes in front; `more` holds numbers, one for each lane."""


class RowFunction:
    """A function ``(lanes, n) -> (lanes, m)``, lane by lane, and its derivatives in the first argument.

    Args:
        part: the function on leaves.
        inputs: the leaves as rows.
        plain: whether nothing but plain autograd is needed for its derivatives, and nothing differentiates them.
        one_by_one: whether its products take one vector at a time, as no vmap may run.
        jacobian_over_lanes: the value and the Jacobian of leaves, if there is a better way to them.
    """

    def __init__(
        self,
        part: UserFunction,
        inputs: Vectors,
        plain: bool,
        jacobian_over_lanes: Callable[[Leaves], tuple[Tensor, Tensor]] | None = None,
        one_by_one: bool = False,
    ) -> None:
        self.part, self.inputs, self.plain, self.one_by_one = part, inputs, plain, one_by_one
        self._jacobian_over_lanes = jacobian_over_lanes
        self._outputs: Vectors | None = None

    def __call__(self, x: Tensor, *more: Tensor) -> Tensor:
        """Its value; `more` are numbers of shape ``(lanes,)``."""
        batch = self.inputs.batch
        leaves = self.part(self.inputs.unravel(x), [m.reshape(batch) for m in more])
        if self._outputs is None:
            self._outputs = Vectors(leaves, batch)
        return self._outputs.ravel(leaves).to(x.dtype)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(lanes,)`` and ``(lanes, n)``, of a function to the reals."""
        value, pull = self.pull(x)
        return value[:, 0], pull(torch.ones_like(value))

    def pull(self, x: Tensor) -> tuple[Tensor, VectorMap]:
        """The value, and ``u -> J' u``."""
        if not self.plain:
            return _value_and_pullback(self, x)
        with functorch.recording():
            (x,) = functorch.recordable([x])
            y = self(x.requires_grad_())
        return y.detach(), lambda u: _detached_product(y, x, u)

    def linearise(self, x: Tensor) -> tuple[Tensor, VectorMap, VectorMap]:
        """The value, ``v -> J v`` and ``u -> J' u``."""
        if not self.plain:
            y, pull = _value_and_pullback(self, x)
            # The pullback is linear; pulled back in turn, it gives the product with the Jacobian.
            return y, _value_and_pullback(pull, torch.zeros_like(y))[1], pull
        with functorch.recording():
            (x,) = functorch.recordable([x])
            y = self(x.requires_grad_())

        @cache
        def transposed() -> tuple[Tensor, Tensor]:
            with functorch.recording():
                u = torch.zeros_like(y).requires_grad_()
                return _autograd_product(y, x, u, create_graph=True), u

        def push(v: Tensor) -> Tensor:
            g, u = transposed()
            return _detached_product(g, u, v)

        return y.detach(), push, lambda u: _detached_product(y, x, u)

    def hessian(self, x: Tensor) -> tuple[Tensor, Tensor, VectorMap]:
        """The value, the gradient, and ``v -> H v``, of a function to the reals."""
        if not self.plain:
            grad, product = _value_and_pullback(lambda x: self.value_and_grad(x)[1], x)
            return self(x)[:, 0], grad, product
        with functorch.recording():
            (x,) = functorch.recordable([x])
            y = self(x.requires_grad_())
            g = _autograd_product(y, x, torch.ones_like(y), create_graph=True)
        return y.detach()[:, 0], g.detach(), lambda v: _detached_product(g, x, v)

    def curvature(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient and the Hessian, ``(lanes, n, n)``, of a function to the reals."""
        _, grad, product = self.hessian(x)
        return grad, self._images(product, x).permute(1, 0, 2)

    def summed(self, terms: VectorMap) -> RowFunction:
        """The function to the reals that adds the terms that are made of the values."""
        batch = self.inputs.batch

        def part(leaves: Leaves, more: Leaves) -> Leaves:
            return [terms(self(self.inputs.ravel(leaves))).sum(dim=-1).reshape(batch)]

        return RowFunction(part, self.inputs, self.plain, one_by_one=self.one_by_one)

    def jacobian(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The value and ``J`` as ``(lanes, m, n)``, from products with as few vectors as rows or columns."""
        lanes, n = x.shape
        if self._jacobian_over_lanes is not None:
            y, matrix = self._jacobian_over_lanes(self.inputs.unravel(x))
            m = y.shape[-1]
            return y.reshape(lanes, m).to(x.dtype), matrix.reshape(lanes, m, n).to(x.dtype)
        y, push, pull = self.linearise(x)
        if not y.numel() * n:
            return y, y[..., None] * x[:, None]  # no entries, and what they hang on
        if y.shape[-1] <= n:
            return y, self._images(pull, y).permute(1, 0, 2)
        return y, self._images(push, x).permute(1, 2, 0)

    def _images(self, product: VectorMap, like: Tensor) -> Tensor:
        """The products with the unit vectors, in front of the lanes."""
        lanes, n = like.shape
        basis = torch.eye(n, dtype=like.dtype, device=like.device)[:, None, :].expand(n, lanes, n)
        if n == 1:
            return product(basis[0])[None]
        # What is held at once is bounded.
        at_once = max(1, _MAX_ENTRIES_AT_ONCE // (lanes * n))
        images: Tensor = with_vectors(product, self.one_by_one, at_once if at_once < n else None)(basis)
        return images


def _value_and_pullback(fn: VectorMap, x: Tensor) -> tuple[Tensor, VectorMap]:
    pair: Any = torch.func.vjp(fn, x)
    value, pull = pair

    def product(u: Tensor) -> Tensor:
        # As where derivatives are formed: with gradients off, torch takes formulas some of which are wrong in a vmap
        # (that of `eigvals`).
        with torch.enable_grad():
            result: Tensor = pull(u)[0]
        return result

    return value, product


def _detached_product(y: Tensor, x: Tensor, u: Tensor) -> Tensor:
    return _autograd_product(y, x, u, create_graph=functorch.depth() > 0).detach()


def _autograd_product(y: Tensor, x: Tensor, u: Tensor, *, create_graph: bool = False) -> Tensor:
    if not y.requires_grad:
        return torch.zeros_like(x)
    (grad,) = functorch.gradients((y,), (x,), (u,), create_graph=create_graph)
    return torch.zeros_like(x) if grad is None else grad


_MAX_ENTRIES_AT_ONCE = 2**22


class BatchedProblem:
    """A problem as a method sees it.

    Attributes:
        fn: the first of the user's functions.
        inputs: turns the leaves of the unknowns into rows and back.
        structure: the tree of these leaves.
        plain: whether the rows are plain tensors below every transform, where nothing is differentiated.
        eps: the precision of the least precise leaf.
        residual: the residual of the equation, ``residual(problem, x)``.
    """

    def __init__(
        self,
        functions: dict[str, UserFunction],
        inputs: Vectors,
        structure: Structure,
        plain: bool,
        residual: Callable[[BatchedProblem, Tensor], Tensor],
        lane: Callable[[int], BatchedProblem] | None = None,
        jacobians: dict[str, Callable[[Leaves], tuple[Tensor, Tensor]]] | None = None,
        one_by_one: bool = False,
    ) -> None:
        self._functions = {
            name: RowFunction(part, inputs, plain, (jacobians or {}).get(name), one_by_one)
            for name, part in functions.items()
        }
        self.fn = self._functions["fn"]
        self.inputs, self.structure, self.plain = inputs, structure, plain
        self.eps = inputs.eps
        self.residual = residual
        self._lane = lane
        self._once: dict[Any, Any] = {}

    def function(self, name: str) -> RowFunction:
        """Another of the user's functions."""
        return self._functions[name]

    def lane(self, i: int) -> BatchedProblem:
        """The problem of one lane, alone; below the transforms only."""
        return self if self._lane is None else self._lane(i)

    def once(self, make: Callable[[BatchedProblem], Any]) -> Any:
        """``make(problem)``, which depends on the problem alone and is computed when it is first asked for."""
        if make not in self._once:
            self._once[make] = make(self)
        return self._once[make]


def row_norm(x: Tensor) -> Tensor:
    """The Euclidean norms of rows, ``(lanes, n) -> (lanes,)``, as numbers without a derivative."""
    x = x.detach()
    # In float64, in which the square of no float32 is out of range.
    size: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
    return size.to(x.dtype)


def scattered_signs(x: Tensor) -> Tensor:
    """A sign for each unknown, ``(n,)``, without a pattern: along a common one, the terms of a function may cancel."""
    places = torch.arange(x.shape[-1], dtype=torch.float64, device=x.device)
    return torch.where(torch.cos(places**2) < 0, -1.0, 1.0).to(x.dtype)


def largest_entry(x: Tensor) -> Tensor:
    """``max |x_i|``, row by row, ``(lanes,)``; 0 where there is none."""
    return x.abs().amax(dim=-1) if x.shape[-1] else x.sum(dim=-1)


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row, ``(lanes,)``."""
    return (a * b).sum(dim=-1)


def vecmat(x: Tensor, matrix: Tensor) -> Tensor:
    """``x' A``, row by row, for ``A`` of shape ``(lanes, n, m)``; so written, as batched products with a column on the
    right take several times as long on a CPU."""
    product: Tensor = x[:, None] @ matrix
    return product[:, 0]


def safe_divide(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, and 0, with no derivative, where ``b`` is 0."""
    zero = b == 0
    return torch.where(zero, 0.0, a / torch.where(zero, 1.0, b))


def any_lane(flag: Tensor) -> bool:
    """Whether a flag is up in any lane, of this frame or of a vmap round it."""
    return functorch.is_any(flag)


def select(where: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``new`` in the lanes where a ``(lanes,)`` flag is up, else ``old``; both have the lanes in front."""
    return torch.where(where.reshape(-1, *(1,) * (new.dim() - 1)), new, old)


def select_tree(where: Tensor, new: Tree, old: Tree) -> Tree:
    """Apply `select` to every tensor of two trees of one structure; a tensor that both trees share is not copied."""
    leaves, structure = pytree.flatten(new)
    pairs = zip(leaves, structure.tensors_of(old), strict=True)
    return structure.unflatten([a if a is b else select(where, a, b) for a, b in pairs])


def all_of(flags: Sequence[Tensor]) -> Tensor:
    """The lanes in which all flags are up."""
    return torch.stack(list(flags)).all(dim=0)
