"""Trees that are nested alike, as columns of one table whose rows are the leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch

import implicitdiff._torch.trees as pytree
from implicitdiff._torch.trees import Leaves, TreeSpec


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What is computed in, and kept in a state, for parameters of a dtype: float32 for those of half precision."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def spread(caller: str, key: str, value: Any, spec: TreeSpec) -> list[Any]:
    """What a hyper-parameter is for each leaf of a tree: the same, or what a tree nested alike, or a prefix of one, has
    there."""
    try:
        return pytree.broadcast(spec, value)
    except ValueError as error:
        params = pytree.describe(pytree.unflatten([_LEAF] * spec.num_leaves, spec))
        raise ValueError(
            f"{caller}: {key} has to be one for all leaves, or nested like the parameters, or a prefix of them, but it "
            f"is {pytree.describe(value)} and they are {params}"
        ) from error


class _Leaf:
    def __repr__(self) -> str:
        return "*"


_LEAF = _Leaf()


def refuse_others(caller: str, leaves: Sequence[Any]) -> None:
    """Raise unless all leaves of parameters are tensors or None."""
    for leaf in leaves:
        if leaf is not None and not isinstance(leaf, torch.Tensor):
            raise TypeError(f"{caller}: params have the leaf {leaf!r}; each has to be a tensor, or None")


def refuse_misfits(caller: str, key: str, values: Sequence[Any], leaves: Sequence[Any], spec: TreeSpec) -> None:
    """Raise unless what a hyper-parameter is for each leaf broadcasts to it."""
    for at, (value, leaf) in enumerate(zip(values, leaves, strict=True)):
        is_optimized = leaf is not None and (leaf.is_floating_point() or leaf.is_complex())
        if not is_optimized or not isinstance(value, torch.Tensor):
            continue
        aligned = zip(reversed(value.shape), reversed(leaf.shape), strict=False)
        if value.ndim > leaf.ndim or any(n not in (1, m) for n, m in aligned):
            raise ValueError(
                f"{caller}: {key} of shape {list(value.shape)} does not broadcast to the leaf"
                f"{pytree.names_of(spec)[at]} of shape {list(leaf.shape)}; it has to be a scalar, or to fit each leaf "
                "that it is for"
            )


class Columns:
    """A table that starts with one column: gradients or updates. A row takes part if that one is not None.

    Attributes:
        rows: which leaves take part.
        first: the first column, of those rows.
    """

    def __init__(self, caller: str, name: str, tree: Any, like: tuple[str, Any] | None = None) -> None:
        self.caller, self.name, self.tree = caller, name, tree
        self.leaves, self.spec = pytree.leaves_of(tree) if like is None else self._in_the_order_of(*like)
        self.rows = [i for i, leaf in enumerate(self.leaves) if leaf is not None]
        self.first = self.present(name, self.leaves)

    def checked(self, why_dense: str = "") -> Columns:
        """Itself, if all in the first column is dense and of floating point; `why_dense` is added to the error."""
        dtypes = {leaf.dtype for leaf in self.first}
        smooth = all(dtype.is_floating_point or dtype.is_complex for dtype in dtypes)
        if not smooth or {leaf.layout for leaf in self.first} - {torch.strided}:
            for row, leaf in enumerate(self.first):
                if leaf.layout is not torch.strided or not (leaf.is_floating_point() or leaf.is_complex()):
                    why = why_dense if leaf.layout is not torch.strided else ""
                    self._refuse(
                        TypeError, row, self.name, f"is {_kind(leaf)}; it has to be dense and of floating point{why}"
                    )
        return self

    def densify(self) -> None:
        """Exchange sparse tensors in the first column for dense ones."""
        self.first = [leaf.to_dense() if leaf.layout is torch.sparse_coo else leaf for leaf in self.first]

    def match(self, name: str, tree: Any) -> list[Any]:
        """The leaves of another tree, those of rows that do not take part among them."""
        try:
            return pytree.match(self.spec, tree)
        except ValueError as error:
            raise self._unlike(name, tree, error) from error

    def _in_the_order_of(self, name: str, like: Any) -> tuple[list[Any], TreeSpec]:
        """The leaves as another tree has them: equal dictionaries may differ in the order of their keys."""
        spec = pytree.leaves_of(like)[1]
        try:
            return pytree.match(spec, self.tree), spec
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

    def present(self, name: str, leaves: list[Any]) -> Leaves:
        """The rows of a matched list, which have to be tensors."""
        column: Leaves = self.pick(leaves)
        if not set(map(type, column)) <= _TENSORS:
            for row, leaf in enumerate(column):
                if not isinstance(leaf, torch.Tensor):
                    if name != self.name:
                        self.checked()  # a gradient of integers has no moments, and is to blame
                    what = "or None" if name == self.name else f"where {self.name} is not None"
                    self._refuse(TypeError, row, name, f"is {leaf!r}; it has to be a tensor {what}")
        return column

    def column(self, name: str, leaves: list[Any]) -> Leaves:
        """The rows of a matched list, which have to agree with the first column."""
        column = self.present(name, leaves)
        self.compare(name, column)
        return column

    def compare(self, name: str, column: Sequence[torch.Tensor | None], *, accumulated: bool = False) -> None:
        """Raise if a tensor differs from the first column's in shape or device, or in dtype: `accumulated`, it has that
        of the accumulator."""
        for row, (leaf, first) in enumerate(zip(column, self.first, strict=True)):
            dtype = accumulator(first.dtype) if accumulated else first.dtype
            if leaf is None or (leaf.shape, leaf.dtype, leaf.device) == (first.shape, dtype, first.device):
                continue
            at = "" if dtype is first.dtype else f", for which {str(dtype).removeprefix('torch.')} is kept"
            self._refuse(ValueError, row, name, f"is {_kind(leaf)}, but {self.name} is {_kind(first)}{at}")

    def refuse_misfits(self, key: str, values: list[Any]) -> None:
        """Raise unless what a hyper-parameter is for each leaf is there for all rows, and broadcasts to them."""
        for row in self.rows:
            if values[row] is None:
                way = pytree.names_of(self.spec)[row]
                raise ValueError(f"{self.caller}: {key}{way} is None, but {self.name}{way} is not")
        refuse_misfits(self.caller, key, values, self.leaves, self.spec)

    def chosen(self, mask: Any) -> list[Any]:
        """What a tree of bools nested alike, or a prefix of one, says of the rows."""
        try:
            return self.pick(pytree.broadcast(self.spec, mask))
        except ValueError as error:
            raise ValueError(
                f"{self.caller}: mask has to be nested like the parameters, or be a prefix of them, but it is {mask!r} "
                f"and {self.name} is {pytree.describe(self.tree)}"
            ) from error

    def tree_of(self, leaves: list[Any], rows: list[Any]) -> Any:
        """The tree of these leaves with those of the rows replaced."""
        if len(rows) < len(leaves):
            replaced = dict(zip(self.rows, rows, strict=True))
            rows = [replaced.get(i, leaf) for i, leaf in enumerate(leaves)]
        return pytree.unflatten(rows, self.spec)

    def _refuse(self, error: type[Exception], row: int, name: str, what: str) -> NoReturn:
        raise error(f"{self.caller}: {name}{pytree.names_of(self.spec)[self.rows[row]]} {what}")


_TENSORS = {torch.Tensor, torch.nn.Parameter}


def _kind(tensor: torch.Tensor) -> str:
    layout = "" if tensor.layout is torch.strided else f"{str(tensor.layout).removeprefix('torch.')} "
    return f"{layout}{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device}"
