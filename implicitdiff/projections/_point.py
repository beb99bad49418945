"""Arguments of projections and proximal operators: a tree of tensors, and numbers that broadcast to its leaves."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

import implicitdiff._torch.context as _context
import implicitdiff._torch.levels as _levels
import implicitdiff._torch.trees as pytree
from implicitdiff._torch.trees import Leaves, Number, Tree

_NUMERIC: tuple[Any, ...] = (Tensor, numbers.Real)


class Point(NamedTuple):
    """The point ``v`` that a projection or proximal operator maps.

    Attributes:
        function: name of the public function, for error messages.
        leaves: the tensors of the tree.
        given: all leaves of the tree: tensors, and None, which stays None.
        spec: the nesting.
    """

    function: str
    leaves: Leaves
    given: list[Any]
    spec: pytree.TreeSpec

    @classmethod
    def of(cls, function: str, v: Tree) -> Point:
        given, spec = pytree.leaves_of(v)
        tensors = [leaf for leaf in given if leaf is not None]
        if not tensors or not all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tensors):
            found = pytree.describe(v)
            raise TypeError(f"{function}: v must be a floating-point tensor or a tree of them, got {found}")
        return cls(function, tensors, given, spec)

    @property
    def size(self) -> int:
        """Number of entries of all leaves."""
        return sum(leaf.numel() for leaf in self.leaves)

    def operands(self, name: str, value: Tree, *, scalar: bool = False, least: float = -math.inf) -> list[Any]:
        """Return the number or tensor for each leaf from a number, a tensor, or a tree nested like v or a prefix of v.

        A tensor has to broadcast to its leaf or, with `scalar`, to have no dimension. Values below `least` raise.
        """
        try:
            values = pytree.broadcast(self.spec, value)
        except ValueError:
            self._refuse(name, "a number, a tensor or a tree of these nested like v", value)
        rows = [(x, leaf.shape) for x, leaf in zip(values, self.given, strict=True) if leaf is not None]
        return [self._checked(name, x, torch.Size() if scalar else shape, least) for x, shape in rows]

    def scalar(self, name: str, value: Tree, *, least: float = -math.inf) -> Tree:
        """Return a number or a tensor without dimensions; raise for other values and for values below `least`."""
        return self._checked(name, value, torch.Size(), least)

    def normal(self, name: str, value: Tree) -> Tensor:
        """Return the normal of a plane as one vector; raise if the normal is zero."""
        normal = self.flat(self.operands(name, value))
        if not holds((normal != 0).any()):
            raise ValueError(f"{self.function}: {name} must be other than zero, got {pytree.describe(value)} of zeros")
        return normal

    def map(self, fn: Callable[..., Tensor], *operands: list[Any]) -> Tree:
        """Apply a function to every tensor and its operands, and return the tree of results."""
        rows = zip(self.leaves, *operands, strict=True)
        return self._tree(fn(leaf, *(_tensor_like(x, leaf) for x in rest)) for leaf, *rest in rows)

    def map_flat(self, fn: Callable[..., Tensor], *operands: Number) -> Tree:
        """Apply a function to the vector of all entries, and return the tree of its parts, in the dtypes of v."""
        if not self.size:
            return self._tree(self.leaves)
        v = self.flat(self.leaves)
        # Leaves of several dtypes concatenate to the widest, so each part is converted back.
        parts = fn(v, *(_tensor_like(x, v) for x in operands)).split([leaf.numel() for leaf in self.leaves])
        pairs = zip(parts, self.leaves, strict=True)
        return self._tree(part.reshape(leaf.shape).to(leaf.dtype) for part, leaf in pairs)

    def _tree(self, leaves: Iterable[Tensor]) -> Tree:
        """Return the tree of these tensors, in the place of those of v."""
        rest = iter(leaves)
        return pytree.unflatten([None if leaf is None else next(rest) for leaf in self.given], self.spec)

    def flat(self, values: list[Any]) -> Tensor:
        """Concatenate values, one for each tensor, into one vector of all entries."""
        pairs = zip(self.leaves, values, strict=True)
        return torch.cat([_tensor_like(x, leaf).expand(leaf.shape).flatten() for leaf, x in pairs])

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


def check_vector(function: str, name: str, value: Number, length: int) -> None:
    """Raise unless a value is a number, or a tensor that can be expanded to a vector."""
    if not isinstance(value, _NUMERIC):
        raise TypeError(f"{function}: {name} must be a number or a tensor, got {pytree.describe(value)}")
    if isinstance(value, Tensor) and not broadcasts(value.shape, torch.Size([length])):
        raise ValueError(f"{function}: {name} must be of shape {[length]}, got {pytree.describe(value)}")


def sum_of(v: Tensor) -> Tensor:
    """Return the sum of a vector, as a vector of one entry."""
    return v.sum(0, keepdim=True)


def scale_of(v: Tensor) -> Tensor:
    """Return the largest absolute entry, or 1 for zeros, without a derivative: a scale for safe squares."""
    largest = v.detach().abs().amax(0, keepdim=True)
    return torch.where(largest == 0, 1.0, largest)
