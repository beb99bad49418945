"""Arguments of projections and proximal operators: a tree of tensors, and numbers that broadcast to its leaves."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

import implicitdiff._torch.context as _context
import implicitdiff._torch.levels as _levels
import implicitdiff._torch.trees as pytree
from implicitdiff._torch.trees import Number, Tree

_NUMERIC: tuple[Any, ...] = (Tensor, numbers.Real)


class Point(NamedTuple):
    """The point ``v`` that a projection or proximal operator maps.

    Attributes:
        function: name of the public function, for error messages.
        leaves: the tensors of the tree; None stays None.
        spec: the nesting.
    """

    function: str
    leaves: list[Any]
    spec: pytree.TreeSpec

    @classmethod
    def of(cls, function: str, v: Tree) -> Point:
        leaves, spec = pytree.leaves_of(v)
        tensors = [leaf for leaf in leaves if leaf is not None]
        if not tensors or not all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tensors):
            given = pytree.describe(v)
            raise TypeError(f"{function}: v must be a floating-point tensor or a tree of them, got {given}")
        return cls(function, leaves, spec)

    @property
    def size(self) -> int:
        """Number of entries of all leaves."""
        return sum(leaf.numel() for leaf in self.leaves if leaf is not None)

    def operands(self, name: str, value: Tree, *, scalar: bool = False, least: float = -math.inf) -> list[Any]:
        """Return the number or tensor for each leaf from a number, a tensor, or a tree nested like v or a prefix of v.

        A tensor has to broadcast to its leaf or, with `scalar`, to have no dimension. Values below `least` raise.
        """
        try:
            values = pytree.broadcast(self.spec, value)
        except ValueError:
            self._refuse(name, "a number, a tensor or a tree of these nested like v", value)
        shapes = [None if leaf is None else torch.Size() if scalar else leaf.shape for leaf in self.leaves]
        pairs = zip(values, shapes, strict=True)
        return [None if shape is None else self._checked(name, x, shape, least) for x, shape in pairs]

    def scalar(self, name: str, value: Tree, *, least: float = -math.inf) -> Tree:
        """Return a number or a tensor without dimensions; raise for other values and for values below `least`."""
        return self._checked(name, value, torch.Size(), least)

    def map(self, fn: Callable[..., Tensor], *operands: list[Any]) -> Tree:
        """Apply a function to every tensor and its operands, and return the tree of results."""
        rows = zip(self.leaves, *operands, strict=True)
        mapped = [None if leaf is None else fn(leaf, *(_tensor_like(x, leaf) for x in rest)) for leaf, *rest in rows]
        return pytree.unflatten(mapped, self.spec)

    def map_flat(self, fn: Callable[..., Tensor], *operands: Number) -> Tree:
        """Apply a function to the vector of all entries, and return the tree of its parts, in the dtypes of v."""
        if not self.size:
            return pytree.unflatten(self.leaves, self.spec)
        v = self.flat(self.leaves)
        # Leaves of several dtypes concatenate to the widest; `map` converts each part back. `map` visits the leaves in
        # the order of `flat`, so the iterator hands each leaf its part.
        parts = iter(
            fn(v, *(_tensor_like(x, v) for x in operands)).split([t.numel() for t in self.leaves if t is not None])
        )
        return self.map(lambda leaf: next(parts).reshape(leaf.shape).to(leaf.dtype))

    def flat(self, values: list[Any]) -> Tensor:
        """Concatenate values, one for each leaf, into one vector of all entries."""
        pairs = [(leaf, x) for leaf, x in zip(self.leaves, values, strict=True) if leaf is not None]
        rows = [_tensor_like(x, leaf).expand(leaf.shape).flatten() for leaf, x in pairs]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _checked(self, name: str, operand: Tree, shape: torch.Size, least: float) -> Tree:
        if not isinstance(operand, _NUMERIC):
            self._refuse(name, "a number or a tensor", operand, TypeError)
        if isinstance(operand, Tensor) and not broadcasts(operand.shape, shape):
            wanted = f"broadcasts to the shape {list(shape)}" if shape else "is a scalar"
            self._refuse(name, f"a number or a tensor that {wanted}", operand)
        if least > -math.inf and not holds(operand >= least):
            lowest = float(_levels.base(operand).min()) if isinstance(operand, Tensor) else operand
            self._refuse(name, f"at least {least:g}", lowest)
        return operand

    def _refuse(self, name: str, wanted: str, given: Tree, error: type[Exception] = ValueError) -> NoReturn:
        raise error(f"{self.function}: {name} must be {wanted}, got {pytree.describe(given)}") from None


def holds(condition: bool | Tensor) -> bool:
    """True if a condition holds in all entries of all lanes, or if a tracer or meta tensor has no values."""
    if not isinstance(condition, Tensor):
        return bool(condition)
    if torch.compiler.is_compiling() or _context.dispatch_modes() or condition.is_meta:
        return True
    return _levels.is_all(condition)


def _tensor_like(value: Tree, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        # A vector of one entry: torch's batching rule for scalars fails in a vmap over no lanes, see `_torch.lanes`.
        return (value.reshape(1) if like.dim() and not value.dim() else value).to(like.dtype)
    return torch.full((), value, dtype=like.dtype, device=like.device)


def broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    """True if a tensor of one shape can be expanded to another."""
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(size in (1, full) for size, full in pairs)


def sum_of(v: Tensor) -> Tensor:
    """Return the sum of a vector, as a vector of one entry."""
    return v.sum(0, keepdim=True)


def scale_of(v: Tensor) -> Tensor:
    """Return the largest absolute entry, or 1 for zeros, without a derivative: a scale for safe squares."""
    largest = v.detach().abs().amax(0, keepdim=True)
    return torch.where(largest == 0, 1.0, largest)
