"""Trees of equal nesting as the columns of a table with one row a leaf.

A step reads gradients, parameters and moments leaf by leaf. `Columns` matches their nesting once and reports a mismatch
by the name of the leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, NoReturn, TypeGuard, TypeVar

import torch

import implicitdiff._torch.trees as pytree
from implicitdiff._torch.tracking import is_continuous
from implicitdiff._torch.trees import Leaves, Tree, TreeSpec

Entry = TypeVar("Entry")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of moments and arithmetic for parameters of a dtype: float32 for half precision."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _stored(dtype: torch.dtype) -> torch.dtype:
    return dtype


def value_of_each_leaf(caller: str, key: str, value: Tree, spec: TreeSpec) -> list[Any]:
    """Return the value of a hyper-parameter for each leaf of a nesting.

    `value` is a number for all leaves, a tree of equal nesting, or a prefix of the nesting.
    """
    try:
        return pytree.broadcast(spec, value)
    except ValueError as error:
        # The nesting of the parameters, whose values are not at hand, with * for a leaf.
        params = pytree.describe(pytree.unflatten([_LEAF] * spec.num_leaves, spec))
        raise ValueError(
            f"{caller}: {key} must be one for all leaves, or nested like the parameters, or a prefix of them, got "
            f"{pytree.describe(value)} for the parameters {params}"
        ) from error


class _Leaf:
    """Stands for a leaf in the printed nesting of an error message."""

    def __repr__(self) -> str:
        return "*"


_LEAF = _Leaf()


def refuse_others(caller: str, leaves: Sequence[object]) -> None:
    """Raise unless every leaf of the parameters is a tensor or None."""
    if others := [leaf for leaf in leaves if not isinstance(leaf, (torch.Tensor, NoneType))]:
        raise TypeError(f"{caller}: every leaf of params must be a tensor or None, got {others[0]!r}")


def refuse_misfits(caller: str, key: str, values: Sequence[Any], leaves: Sequence[Any], spec: TreeSpec) -> None:
    """Raise unless each tensor among the values of a hyper-parameter broadcasts to its leaf."""
    by_elements = [at for at, value in enumerate(values) if isinstance(value, torch.Tensor) and value.ndim]
    if misfits := [at for at in by_elements if is_optimized(leaves[at]) and not _broadcasts(values[at], leaves[at])]:
        at = misfits[0]
        raise ValueError(
            f"{caller}: {key} must be a scalar or broadcast to each leaf that it is for, got shape "
            f"{list(values[at].shape)} for the leaf{pytree.names_of(spec)[at]} of shape {list(leaves[at].shape)}"
        )


def is_optimized(leaf: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    """True for the leaves of the parameters that have moments."""
    return leaf is not None and is_continuous(leaf)


def _broadcasts(value: torch.Tensor, leaf: torch.Tensor) -> bool:
    """True if a product with `value` keeps the shape of the leaf."""
    # Broadcasting rule of torch, from the last dimension. The leaf itself is not expanded.
    aligned = zip(reversed(value.shape), reversed(leaf.shape), strict=False)
    return value.ndim <= leaf.ndim and all(n in (1, m) for n, m in aligned)


class Columns:
    """A table whose first column holds the gradients or updates of a tree.

    Leaves with a tensor in the first column are rows; leaves with None are not.

    Attributes:
        leaves: all leaves of the tree, None included.
        spec: the nesting.
        rows: indices of the leaves that are rows.
        first: the first column: the leaves at `rows`.
    """

    def __init__(self, caller: str, name: str, tree: Tree, like: tuple[str, Tree] | None = None) -> None:
        self.caller, self.name, self.tree = caller, name, tree
        self.leaves, self.spec = pytree.leaves_of(tree) if like is None else self._in_the_order_of(*like)
        self.rows = [i for i, leaf in enumerate(self.leaves) if leaf is not None]
        self.first: Leaves = self.pick(self.leaves)
        if not set(map(type, self.first)) <= _TENSORS:
            for row, leaf in _others(self.first):
                self._refuse(TypeError, row, name, f"must be a tensor or None, got {leaf!r}")

    def checked(self, why_dense: str = "") -> Columns:
        """Return `self`, or raise if a tensor of the first column is sparse or has no floating-point dtype.

        `why_dense` is appended to the message about a sparse tensor.
        """
        is_sparse = [leaf.layout is not torch.strided for leaf in self.first]
        if odd := [row for row, leaf in enumerate(self.first) if is_sparse[row] or not is_continuous(leaf)]:
            row = odd[0]
            why = why_dense if is_sparse[row] else ""
            self._refuse(
                TypeError, row, self.name, f"must be dense and of floating point, got {_kind(self.first[row])}{why}"
            )
        return self

    def densify(self) -> None:
        """Convert sparse COO tensors of the first column to dense ones."""
        self.first = [leaf.to_dense() if leaf.layout is torch.sparse_coo else leaf for leaf in self.first]

    def match(self, name: str, tree: Tree) -> list[Any]:
        """Return all leaves of another tree of equal nesting, rows or not."""
        return self._matched(self.spec, tree, name, tree)

    def _in_the_order_of(self, name: str, like: Tree) -> tuple[list[Any], TreeSpec]:
        """Return the leaves in the order of another tree: equal dictionaries may differ in the order of their keys."""
        spec = pytree.leaves_of(like)[1]
        return self._matched(spec, self.tree, name, like), spec

    def _matched(self, spec: TreeSpec, tree: Tree, name: str, other: Tree) -> list[Any]:
        try:
            return pytree.match(spec, tree)
        except ValueError as error:
            raise ValueError(
                f"{self.caller}: {self.name} and {name} must be nested alike, got {pytree.describe(self.tree)} and "
                f"{pytree.describe(other)}: {error}"
            ) from error

    def pick(self, leaves: list[Entry]) -> list[Entry]:
        """Return the entries of the rows from a list over all leaves."""
        # Usually every leaf has a gradient.
        return leaves if len(self.rows) == len(leaves) else [leaves[i] for i in self.rows]

    def present(self, name: str, leaves: list[Any]) -> Leaves:
        """Return the rows of a matched list, or raise if one is not a tensor."""
        column: Leaves = self.pick(leaves)
        if not set(map(type, column)) <= _TENSORS:
            for row, leaf in _others(column):
                self.checked()  # an integer gradient has no moments: name the gradient as the cause
                self._refuse(TypeError, row, name, f"must be a tensor where {self.name} is not None, got {leaf!r}")
        return column

    def column(self, name: str, leaves: list[Any]) -> Leaves:
        """Return the rows of a matched list, or raise if one differs from `first` in shape, dtype or device."""
        column = self.present(name, leaves)
        self.compare(name, column)
        return column

    def compare(
        self, name: str, column: Sequence[torch.Tensor | None], kept: Callable[[torch.dtype], torch.dtype] = _stored
    ) -> None:
        """Raise if a tensor of a column differs from the first column in shape, device or dtype.

        `kept` is the expected dtype as a function of the first column's.
        """
        for row, (leaf, first) in enumerate(zip(column, self.first, strict=True)):
            dtype = kept(first.dtype)
            if leaf is None or (leaf.shape, leaf.dtype, leaf.device) == (first.shape, dtype, first.device):
                continue
            at = "" if dtype is first.dtype else f", for which {str(dtype).removeprefix('torch.')} is kept"
            self._refuse(ValueError, row, name, f"is {_kind(leaf)}, but {self.name} is {_kind(first)}{at}")

    def refuse_misfits(self, key: str, values: Sequence[Any]) -> None:
        """Raise unless the values of a hyper-parameter are given for all rows and broadcast to them."""
        if lacking := [row for row in self.rows if values[row] is None]:
            way = pytree.names_of(self.spec)[lacking[0]]
            raise ValueError(f"{self.caller}: {key}{way} must not be None where {self.name}{way} is a tensor")
        refuse_misfits(self.caller, key, values, self.leaves, self.spec)

    def masked(self, column: Leaves, mask: Tree, tree: Tree) -> list[torch.Tensor | None]:
        """Return a column with None in the rows outside of a mask.

        `mask` is a tree of bools of equal nesting, a prefix of one, or a function that returns either for `tree`.
        """
        mask = mask(tree) if callable(mask) else mask
        try:
            wanted = self.pick(pytree.broadcast(self.spec, mask))
        except ValueError as error:
            raise ValueError(
                f"{self.caller}: mask must be nested like the parameters, or be a prefix of them, got {mask!r} for "
                f"{self.name} {pytree.describe(self.tree)}"
            ) from error
        return [leaf if want else None for leaf, want in zip(column, wanted, strict=True)]

    def tree_of(self, leaves: list[Any], rows: list[Any]) -> Tree:
        """Return the tree of `leaves`, with the rows replaced by `rows`."""
        if len(rows) < len(leaves):
            # Leaves that are no rows keep their place in the tree.
            replaced = dict(zip(self.rows, rows, strict=True))
            rows = [replaced.get(i, leaf) for i, leaf in enumerate(leaves)]
        return pytree.unflatten(rows, self.spec)

    def _refuse(self, error: type[Exception], row: int, name: str, what: str) -> NoReturn:
        raise error(f"{self.caller}: {name}{pytree.names_of(self.spec)[self.rows[row]]} {what}")


# The usual types. Entries of other types, such as tensor subclasses, are looked at one by one.
_TENSORS = {torch.Tensor, torch.nn.Parameter}


def _others(column: Sequence[object]) -> list[tuple[int, object]]:
    """Return the entries of a column that are not tensors, with their rows."""
    return [(row, leaf) for row, leaf in enumerate(column) if not isinstance(leaf, torch.Tensor)]


def _kind(tensor: torch.Tensor) -> str:
    layout = "" if tensor.layout is torch.strided else f"{str(tensor.layout).removeprefix('torch.')} "
    return f"{layout}{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device}"
