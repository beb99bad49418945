"""Trees that are nested alike, as columns of one table whose rows are the leaves."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

import implicitdiff.pytree as pytree
from implicitdiff.pytree import Leaves


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What is computed in, and kept in a state, for parameters of a dtype: float32 for those of half precision."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def chosen(caller: str, tree: Any, spec: pytree.TreeSpec, mask: Any) -> list[Any]:
    """What a mask says of each leaf: a tree of bools nested alike, or a prefix of one, or a function that makes one."""
    bools = mask(tree) if callable(mask) else mask
    try:
        return pytree.broadcast(spec, bools)
    except ValueError as error:
        raise ValueError(
            f"{caller}: mask has to be nested like the parameters, or be a prefix of them, but it is {bools!r} and "
            f"they are {pytree.describe(tree)}"
        ) from error


class Columns:
    """A table that starts with one column: gradients or updates. A row takes part if that one is not None.

    Attributes:
        rows: which leaves take part.
        first: the first column, of those rows.
    """

    def __init__(self, caller: str, name: str, tree: Any, like: tuple[str, Any] | None = None) -> None:
        self.caller, self.name, self.tree = caller, name, tree
        self.leaves, self.spec = pytree.leaves_of(tree)
        if like is not None:
            self.leaves = self._in_the_order_of(*like)
        self.rows = [i for i, leaf in enumerate(self.leaves) if leaf is not None]
        self.first: Leaves = self.pick(self.leaves)
        self._refuse_others(name, self.first, "it has to be a tensor or None")
        self.shapes = [leaf.shape for leaf in self.first]
        self.devices = [leaf.device for leaf in self.first]
        self.dtypes = [leaf.dtype for leaf in self.first]
        kinds = set(self.dtypes)
        narrow = any(accumulator(dtype) is not dtype for dtype in kinds)
        self.accumulators = [accumulator(dtype) for dtype in self.dtypes] if narrow else self.dtypes
        smooth = all(dtype.is_floating_point or dtype.is_complex for dtype in kinds)
        if not smooth or {leaf.layout for leaf in self.first} - {torch.strided}:
            self._refuse_rough()

    def match(self, name: str, tree: Any) -> list[Any]:
        """The leaves of another tree, those of rows that do not take part among them."""
        try:
            return pytree.match(self.spec, tree)
        except ValueError as error:
            raise self._unlike(name, tree, error) from error

    def _in_the_order_of(self, name: str, like: Any) -> list[Any]:
        """The leaves as another tree has them: equal dictionaries may differ in the order of their keys."""
        self.spec = pytree.leaves_of(like)[1]
        try:
            return pytree.match(self.spec, self.tree)
        except ValueError as error:
            raise self._unlike(name, like, error) from error

    def _unlike(self, name: str, tree: Any, error: ValueError) -> ValueError:
        return ValueError(
            f"{self.caller}: {self.name} and {name} have to be nested alike, but {self.name} is "
            f"{pytree.describe(self.tree)} and {name} is {pytree.describe(tree)}: {error}"
        )

    def pick(self, leaves: list[Any]) -> list[Any]:
        """What a list over all leaves has for the rows."""
        return leaves if len(self.rows) == len(leaves) else [leaves[i] for i in self.rows]

    def column(self, name: str, leaves: list[Any], *, accumulated: bool = False) -> Leaves:
        """The rows of a matched list, checked against the first column."""
        column: Leaves = self.pick(leaves)
        dtypes = self.accumulators if accumulated else self.dtypes
        self._refuse_others(name, column, f"where {self.name} is not None, it has to be a tensor")
        if (
            [leaf.shape for leaf in column] != self.shapes
            or [leaf.dtype for leaf in column] != dtypes
            or [leaf.device for leaf in column] != self.devices
        ):
            self._refuse_unequal(name, column, dtypes)
        return column

    def chosen(self, mask: Any, tree: Any) -> list[Any]:
        """What a mask says of the rows, as `chosen` takes it."""
        return self.pick(chosen(self.caller, tree, self.spec, mask))

    def tree_of(self, leaves: list[Any], rows: list[Any]) -> Any:
        """The tree of these leaves with those of the rows replaced."""
        if len(rows) < len(leaves):
            replaced = dict(zip(self.rows, rows, strict=True))
            rows = [replaced.get(i, leaf) for i, leaf in enumerate(leaves)]
        return pytree.unflatten(rows, self.spec)

    def _refuse_others(self, name: str, column: list[Any], what: str) -> None:
        if not set(map(type, column)) <= _TENSORS:
            for row, leaf in enumerate(column):
                if not isinstance(leaf, torch.Tensor):
                    self._refuse(TypeError, row, name, f"is {leaf!r}; {what}")

    def _refuse_rough(self) -> None:
        for row, leaf in enumerate(self.first):
            if leaf.layout is not torch.strided or not (leaf.is_floating_point() or leaf.is_complex()):
                self._refuse(TypeError, row, self.name, f"is {_kind(leaf)}; it has to be dense and of floating point")

    def _refuse_unequal(self, name: str, column: Leaves, dtypes: list[torch.dtype]) -> None:
        for row, (leaf, dtype) in enumerate(zip(column, dtypes, strict=True)):
            if (leaf.shape, leaf.device, leaf.dtype) != (self.shapes[row], self.devices[row], dtype):
                first = self.first[row]
                at = "" if dtype is first.dtype else f", for which {str(dtype).removeprefix('torch.')} is kept"
                self._refuse(ValueError, row, name, f"is {_kind(leaf)}, but {self.name} is {_kind(first)}{at}")

    def _refuse(self, error: type[Exception], row: int, name: str, what: str) -> NoReturn:
        raise error(f"{self.caller}: {name}{pytree.names_of(self.spec)[self.rows[row]]} {what}")


_TENSORS = {torch.Tensor, torch.nn.Parameter}


def _kind(tensor: torch.Tensor) -> str:
    layout = "" if tensor.layout is torch.strided else f"{str(tensor.layout).removeprefix('torch.')} "
    return f"{layout}{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device}"
