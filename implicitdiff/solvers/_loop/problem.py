"""A user's problem in the form in which the solvers' iterations use it.

An iteration never handles a pytree, a transform or a batch. `BatchedProblem` gives the user's functions as functions of
rows of real numbers, shape ``(lanes, n)``: one row for each lane, and a lane is one problem of a vmapped batch. The
same code then serves a batch of plain tensors below every transform and a single lane in the caller's frame, whose
steps are differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

import implicitdiff._torch.levels as _levels
import implicitdiff._torch.trees as pytree
from implicitdiff._closures.lift import Lifted
from implicitdiff._implicit.linearisation import ByAutograd, ByFunctorch, Linearisation, Product
from implicitdiff._implicit.operators import Dims, with_vectors
from implicitdiff._implicit.system import Vectors
from implicitdiff._recorded.straight import StraightLines
from implicitdiff._torch.lanes import VmapSize
from implicitdiff._torch.trees import Leaves, Structure, Tree

ResultT = TypeVar("ResultT")
VectorMap = Callable[[Tensor], Tensor]
"""A map of rows, ``(lanes, n) -> (lanes, m)``."""
LeafFunction = Callable[[Leaves, Leaves], Leaves]
"""``function(x, more) -> leaves``, all leaves with the lanes in front; `more` holds one number for each lane."""


class RowFunction:
    """A function ``(lanes, n) -> (lanes, m)``, applied lane by lane, with its derivatives in the first argument.

    Args:
        function: the function on leaves.
        inputs: conversion between leaves and rows.
        plain: True if plain autograd is enough for the derivatives and nothing differentiates their results.
        jacobian_over_lanes: a faster way to the value and the Jacobian, as a function of leaves; None if there is no
            faster way.
        one_by_one: True if products must take one vector at a time, because no vmap may run.
    """

    def __init__(
        self,
        function: LeafFunction,
        inputs: Vectors,
        plain: bool,
        jacobian_over_lanes: Callable[[Leaves], tuple[Tensor, Tensor]] | None = None,
        one_by_one: bool = False,
    ) -> None:
        self.function, self.inputs, self.plain, self.one_by_one = function, inputs, plain, one_by_one
        self._jacobian_over_lanes = jacobian_over_lanes
        self._outputs: Vectors | None = None
        self._by: type[Linearisation] = ByAutograd if plain else ByFunctorch

    def __call__(self, x: Tensor, *more: Tensor) -> Tensor:
        """Return the values; `more` holds one number for each lane, shape ``(lanes,)``."""
        leaves = self.leaves(x, *more)
        # A function returns the same shapes in each call, so the conversion is made once.
        if self._outputs is None:
            self._outputs = Vectors(leaves, self.inputs.batch)
        return self._outputs.ravel(leaves).to(x.dtype)

    def leaves(self, x: Tensor, *more: Tensor) -> Leaves:
        """Return the leaves of the values, with the dimensions of the batch in front."""
        return self.function(self.inputs.unravel(x), [m.reshape(self.inputs.batch) for m in more])

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values ``(lanes,)`` and gradients ``(lanes, n)`` of a real-valued function."""
        value, pull = self.pull(x)
        return value[:, 0], pull(torch.ones_like(value))

    def pull(self, x: Tensor) -> tuple[Tensor, VectorMap]:
        """Return the value and the pullback ``u -> J' u``."""
        at = self._at(x)
        return at.values[0], _on_one(at.pull())

    def linearise(self, x: Tensor) -> tuple[Tensor, VectorMap, VectorMap]:
        """Return the value, the product ``v -> J v`` and the pullback ``u -> J' u``."""
        at = self._at(x)
        # The product takes a second graph, made only if a caller asks.
        push = cache(at.push)
        return at.values[0], lambda v: _on_one(push())(v), _on_one(at.pull())

    def hessian(self, x: Tensor) -> tuple[Tensor, Tensor, VectorMap]:
        """Return the value, the gradient and the product ``v -> H v`` of a real-valued function."""
        at = self._at(x)
        slope = at.of_gradient()
        return at.values[0][:, 0], slope.values[0], _on_one(slope.pull())

    def _at(self, x: Tensor) -> Linearisation:
        return self._by(lambda x, _: [self(x[0])], [x], [])

    def curvature(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient and the Hessian ``(lanes, n, n)`` of a real-valued function."""
        _, grad, product = self.hessian(x)
        # Image i is row i and column i, since ``H`` is symmetric.
        return grad, self._images(product, x).permute(1, 0, 2)

    def summed(self, terms: VectorMap) -> RowFunction:
        """Return the real-valued function ``x -> sum_i terms(self(x))_i``."""
        batch = self.inputs.batch

        def function(leaves: Leaves, more: Leaves) -> Leaves:
            return [terms(self(self.inputs.ravel(leaves))).sum(dim=-1).reshape(batch)]

        return RowFunction(function, self.inputs, self.plain, one_by_one=self.one_by_one)

    def jacobian(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value and ``J``, shape ``(lanes, m, n)``, from ``min(m, n)`` products with unit vectors."""
        lanes, n = x.shape
        if self._jacobian_over_lanes is not None:
            y, matrix = self._jacobian_over_lanes(self.inputs.unravel(x))
            m = y.shape[-1]
            return y.reshape(lanes, m).to(x.dtype), matrix.reshape(lanes, m, n).to(x.dtype)
        y, push, pull = self.linearise(x)
        if not y.numel() * n:
            return y, y[..., None] * x[:, None]  # an empty matrix that keeps the autograd history
        # A square matrix goes by rows, since the product with ``J`` needs a second graph.
        if y.shape[-1] <= n:
            # Image i is J' e_i, row i of J.
            return y, self._images(pull, y).permute(1, 0, 2)
        # Image i is J e_i, column i of J.
        return y, self._images(push, x).permute(1, 2, 0)

    def _images(self, product: VectorMap, like: Tensor) -> Tensor:
        """Return the products with all unit vectors, shape ``(n, lanes, m)``."""
        lanes, n = like.shape
        basis = torch.eye(n, dtype=like.dtype, device=like.device)[:, None, :].expand(n, lanes, n)
        if n == 1:
            return product(basis[0])[None]
        # Bound the memory of vmapped products: at most this many entries are held at once.
        # Vectors per chunk; None, no chunks, if all fit.
        at_once = max(1, _MAX_ENTRIES_AT_ONCE // (lanes * n))
        images: Tensor = with_vectors(product, self.one_by_one, at_once if at_once < n else None)(basis)
        return images


def _on_one(product: Product) -> VectorMap:
    def of_rows(v: Tensor) -> Tensor:
        # With gradients off, torch takes formulas of which some are wrong under vmap: that of `torch.linalg.eigvals`.
        with torch.enable_grad():
            return product([v])[0]

    return of_rows


# Entries of the unit vectors of a chunk: 32 MiB in float64.
_MAX_ENTRIES_AT_ONCE = 2**22


_SHAPE: Callable[[Tensor], torch.Size] = attrgetter("shape")


class SearchOperands(NamedTuple):
    """The operands of a problem below the transforms.

    Attributes:
        lifted: the user's functions.
        theta: the operands after the unknowns.
        dims: for each vmap, the innermost first, for each operand 0 or None.
        lanes: the sizes of the vmaps, the outermost first.
        alone: ``alone(theta)``, the problem of a single lane.
        together: ``together(theta)``, the problem of all lanes.
        vmaps: the vmaps, the outermost first.
        noted: ``noted(theta)``, the same problem with functions that are evaluated once, in one lane at the operands
            `theta`, and repeated from then on.
    """

    lifted: Lifted
    theta: Leaves
    dims: list[Dims]
    lanes: tuple[int, ...]
    alone: Callable[[Leaves], BatchedProblem]
    together: Callable[[Leaves], BatchedProblem]
    vmaps: tuple[VmapSize, ...]
    noted: Callable[[Leaves], Noted]

    @property
    def is_lane(self) -> list[bool]:
        """For each operand, whether a vmap batches the operand."""
        return [any([dims[i] is not None for dims in self.dims]) for i in range(len(self.theta))]

    @property
    def shapes_of_lane(self) -> list[torch.Size]:
        """The shape of each operand in one lane."""
        shapes = map(_SHAPE, self.theta)
        return [*shapes] if not self.dims else [s[self._batched_dims(i) :] for i, s in enumerate(shapes)]

    def of_first_lane(self) -> Leaves:
        """Return the operands of the first lane."""
        return [t[(0,) * self._batched_dims(i)] for i, t in enumerate(self.theta)]

    def _batched_dims(self, i: int) -> int:
        """Return the number of vmaps that batch an operand; their dimensions lie in front."""
        return sum([dims[i] is not None for dims in self.dims])

    @property
    def copied(self) -> int:
        """The number of elements that `flat` adds for operands that some vmaps batch, and not all."""
        if not self.dims:
            return 0
        sizes = [math.prod(self.lanes) * math.prod(shape) for shape in self.shapes_of_lane]
        varying = zip(sizes, self.theta, self.is_lane, strict=True)
        return sum(size - t.numel() for size, t, varies in varying if varies)

    def flat(self) -> Leaves:
        """Return the operands; those with a value for each lane have one dimension for all lanes in front."""
        if not self.dims:
            return self.theta
        return [self._flat(i) if varies else self.theta[i] for i, varies in enumerate(self.is_lane)]

    def _flat(self, i: int) -> Tensor:
        tensor = self.theta[i]
        # From the outermost vmap inwards, the order of the dimensions.
        for at, dims in enumerate(reversed(self.dims)):
            if dims[i] is None:
                tensor = tensor.unsqueeze(at)
        own = tensor.shape[len(self.lanes) :]
        return tensor.expand((*self.lanes, *own)).reshape(math.prod(self.lanes), *own).contiguous()


class Noted(NamedTuple):
    """A problem whose functions are evaluated once and then repeated, and these functions."""

    problem: BatchedProblem
    lines: StraightLines


class BatchedProblem:
    """A user's problem as functions of rows.

    Attributes:
        fn: the first of the user's functions.
        inputs: conversion between the leaves of the unknowns and rows.
        structure: the tree of these leaves.
        plain: True if rows are plain tensors below every transform, so that nothing differentiates the iteration.
        eps: machine epsilon of the least precise leaf.
        residual: the residual of the equation, ``residual(problem, x)``.
        operands: the operands of the user's functions, below the transforms; None in the caller's frame.
        last_residual: the same residual where the search ends, from the evaluation that the derivative needs; None if
            the derivative needs no such evaluation.
    """

    operands: SearchOperands | None = None
    last_residual: Callable[[BatchedProblem, Tensor], Tensor] | None = None

    def __init__(
        self,
        functions: dict[str, LeafFunction],
        inputs: Vectors,
        structure: Structure,
        plain: bool,
        residual: Callable[[BatchedProblem, Tensor], Tensor],
        lane: Callable[[int], BatchedProblem] | None = None,
        jacobians: dict[str, Callable[[Leaves], tuple[Tensor, Tensor]]] | None = None,
        one_by_one: bool = False,
    ) -> None:
        self._functions = {
            name: RowFunction(function, inputs, plain, (jacobians or {}).get(name), one_by_one)
            for name, function in functions.items()
        }
        self.fn = self._functions["fn"]
        self.inputs, self.structure, self.plain = inputs, structure, plain
        self.eps = inputs.eps
        self.residual = residual
        self._lane = lane
        self._once: dict[Callable[[BatchedProblem], Any], Any] = {}

    def function(self, name: str) -> RowFunction:
        """Return a user's function by name."""
        return self._functions[name]

    def lane(self, i: int) -> BatchedProblem:
        """Return the problem of a single lane; available below the transforms only."""
        return self if self._lane is None else self._lane(i)

    def once(self, make: Callable[[BatchedProblem], ResultT]) -> ResultT:
        """Return ``make(problem)``, computed at the first call and kept; the result must depend on the problem
        alone."""
        if make not in self._once:
            self._once[make] = make(self)
        result: ResultT = self._once[make]
        return result


def row_norm(x: Tensor) -> Tensor:
    """Return the Euclidean norms of rows, ``(lanes, n) -> (lanes,)``, detached from autograd."""
    x = x.detach()
    # In float64 no square of a float32 number overflows or underflows.
    size: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
    return size.to(x.dtype)


def scattered_signs(x: Tensor) -> Tensor:
    """Return a sign for each unknown, ``(n,)``, in an irregular pattern: along a regular pattern the terms of a
    function may cancel."""
    places = torch.arange(x.shape[-1], dtype=torch.float64, device=x.device)
    return torch.where(torch.cos(places**2) < 0, -1.0, 1.0).to(x.dtype)


def largest_entry(x: Tensor) -> Tensor:
    """Return ``max_i |x_i|`` of each row, ``(lanes,)``; 0 for rows of length zero."""
    return x.abs().amax(dim=-1) if x.shape[-1] else x.sum(dim=-1)


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner products of rows, ``(lanes,)``."""
    return (a * b).sum(dim=-1)


def vecmat(x: Tensor, matrix: Tensor) -> Tensor:
    """Return ``x' A`` for each lane, ``A`` of shape ``(lanes, n, m)``."""
    # Written with a row on the left: batched products with a column on the right take several times as long on a CPU.
    product: Tensor = x[:, None] @ matrix
    return product[:, 0]


def safe_divide(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a / b``; the result is 0, with derivative 0, at entries with ``b = 0``."""
    # Both branches of `torch.where` are differentiated, so the divisor must not be 0 in the branch that is not taken.
    zero = b == 0
    return torch.where(zero, 0.0, a / torch.where(zero, 1.0, b))


any_lane: Callable[[Tensor], bool] = _levels.is_any
"""True if a flag is set in any lane, of this frame or of a surrounding vmap."""


def select(where: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Return ``new`` in the lanes with a set flag ``(lanes,)`` and ``old`` in the others; lanes are the first dimension
    of both."""
    return torch.where(where.reshape(-1, *(1,) * (new.dim() - 1)), new, old)


def select_tree(where: Tensor, new: Tree, old: Tree) -> Tree:
    """Apply `select` to every tensor of two trees of one structure; a tensor that both trees share is not copied."""
    leaves, structure = pytree.flatten(new)
    pairs = zip(leaves, structure.tensors_of(old), strict=True)
    return structure.unflatten([a if a is b else select(where, a, b) for a, b in pairs])


def all_of(flags: Sequence[Tensor]) -> Tensor:
    """Return the lanes in which all flags are set."""
    return torch.stack(list(flags)).all(dim=0)
