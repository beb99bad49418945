"""The points that projections and proximal operators map: trees of tensors, with the numbers that go with them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

import implicitdiff._torch.levels as _functorch
import implicitdiff._torch.trees as pytree

Number = float | Tensor

_NUMERIC: tuple[Any, ...] = (Tensor, numbers.Real)


class Point(NamedTuple):
    """What a projection or proximal operator is called with.

    Attributes:
        function: its name, for error messages.
        leaves: the tensors of the tree, and None where it has None.
        spec: its nesting.
    """

    function: str
    leaves: list[Any]
    spec: pytree.TreeSpec

    @classmethod
    def of(cls, function: str, v: Any) -> Point:
        leaves, spec = pytree.leaves_of(v)
        tensors = [leaf for leaf in leaves if leaf is not None]
        if not tensors or not all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tensors):
            given = pytree.describe(v)
            raise TypeError(f"{function}: v has to be a floating-point tensor or a tree of them, but it is {given}")
        return cls(function, leaves, spec)

    @property
    def size(self) -> int:
        """How many entries there are."""
        return sum(leaf.numel() for leaf in self.leaves if leaf is not None)

    def operands(self, name: str, value: Any, *, scalar: bool = False, least: float = -math.inf) -> list[Any]:
        """What stands in `value` for each leaf: a number, or a tensor that broadcasts to the leaf or is a scalar."""
        try:
            values = pytree.broadcast(self.spec, value)
        except ValueError:
            self._refuse(name, "a number, a tensor or a tree of these nested like v", value)
        shapes = [None if leaf is None else torch.Size() if scalar else leaf.shape for leaf in self.leaves]
        pairs = zip(values, shapes, strict=True)
        return [None if shape is None else self._checked(name, x, shape, least) for x, shape in pairs]

    def scalar(self, name: str, value: Any, *, least: float = -math.inf) -> Any:
        """The value itself, if it is a number or a tensor of no dimension."""
        return self._checked(name, value, torch.Size(), least)

    def map(self, fn: Callable[..., Tensor], *operands: list[Any]) -> Any:
        """The tree with a function applied to every tensor and its operands."""
        rows = zip(self.leaves, *operands, strict=True)
        mapped = [None if leaf is None else fn(leaf, *(_tensor(x, leaf) for x in rest)) for leaf, *rest in rows]
        return pytree.unflatten(mapped, self.spec)

    def map_flat(self, fn: Callable[..., Tensor], *operands: Number) -> Any:
        """The tree with a function applied to the vector of all entries."""
        if not self.size:
            return pytree.unflatten(self.leaves, self.spec)
        v = self.flat(self.leaves)
        parts = iter(fn(v, *(_tensor(x, v) for x in operands)).split([t.numel() for t in self.leaves if t is not None]))
        return self.map(lambda leaf: next(parts).reshape(leaf.shape).to(leaf.dtype))

    def flat(self, values: list[Any]) -> Tensor:
        """One vector of what stands for every leaf."""
        pairs = [(leaf, x) for leaf, x in zip(self.leaves, values, strict=True) if leaf is not None]
        rows = [_tensor(x, leaf).expand(leaf.shape).flatten() for leaf, x in pairs]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _checked(self, name: str, operand: Any, shape: torch.Size, least: float) -> Any:
        if not isinstance(operand, _NUMERIC):
            self._refuse(name, "a number or a tensor", operand, TypeError)
        if isinstance(operand, Tensor) and not broadcasts(operand.shape, shape):
            wanted = f"broadcasts to the shape {list(shape)}" if shape else "is a scalar"
            self._refuse(name, f"a number or a tensor that {wanted}", operand)
        if least > -math.inf and not holds(operand >= least):
            lowest = float(_functorch.base(operand).min()) if isinstance(operand, Tensor) else operand
            self._refuse(name, f"at least {least:g}", lowest)
        return operand

    def _refuse(self, name: str, wanted: str, given: Any, error: type[Exception] = ValueError) -> NoReturn:
        raise error(f"{self.function}: {name} has to be {wanted}, but it is {pytree.describe(given)}") from None


def holds(condition: bool | Tensor) -> bool:
    """Whether a condition is true everywhere and in all lanes of a vmap, as far as there are values to be seen."""
    if not isinstance(condition, Tensor):
        return bool(condition)
    if torch.compiler.is_compiling() or _functorch.in_dispatch_mode() or condition.is_meta:
        return True
    return _functorch.is_all(condition)


def _tensor(value: Any, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        # One entry, not none: torch does not multiply a vector by a number of each lane where there is no lane.
        return (value.reshape(1) if like.dim() and not value.dim() else value).to(like.dtype)
    return torch.full((), value, dtype=like.dtype, device=like.device)


def broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    """Whether a tensor of one shape can be expanded to another."""
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(size in (1, full) for size, full in pairs)


def sum_of(v: Tensor) -> Tensor:
    """The sum of a vector, of one entry."""
    return v.sum(0, keepdim=True)


def size_of(v: Tensor) -> Tensor:
    """What to divide a vector by before it is squared, with no derivative."""
    largest = v.detach().abs().amax(0, keepdim=True)
    return torch.where(largest == 0, 1.0, largest)
