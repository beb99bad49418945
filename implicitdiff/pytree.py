"""Arithmetic of pytrees: nested containers of tensors as vectors.

Every function goes leaf by leaf, is differentiable, and works under every transform of torch.func.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

import implicitdiff._torch.trees as _pytree

__all__ = [
    "tree_add",
    "tree_add_scalar_mul",
    "tree_div",
    "tree_l2_norm",
    "tree_map",
    "tree_mul",
    "tree_neg",
    "tree_scalar_mul",
    "tree_sub",
    "tree_vdot",
    "tree_zeros_like",
]

Scalar = torch.Tensor | float | complex


def tree_map(fn: Callable[..., torch.Tensor], tree: Any, *others: Any) -> Any:
    """The tree of ``fn(leaf, *leaves of others)`` over the tensors of trees that are nested alike.

    What is no tensor stays as it is in the first tree.

    Raises:
        ValueError: the trees are nested differently.

    Example:
        >>> import torch
        >>> from implicitdiff.pytree import tree_map
        >>> tree_map(torch.maximum, {"a": torch.tensor([1.0, 5.0])}, {"a": torch.tensor([3.0, 2.0])})
        {'a': tensor([3., 5.])}
    """
    leaves, structure = _pytree.flatten(tree)
    columns = [leaves]
    for other in others:
        try:
            columns.append(structure.tensors_of(other))
        except ValueError:
            raise _unlike(tree, other) from None
        if len(_pytree.tensors(other)) != len(leaves):
            raise _unlike(tree, other)
    return structure.unflatten([fn(*row) for row in zip(*columns, strict=True)])


def tree_add(x: Any, y: Any) -> Any:
    """``x + y``."""
    return tree_map(torch.add, x, y)


def tree_sub(x: Any, y: Any) -> Any:
    """``x - y``."""
    return tree_map(torch.sub, x, y)


def tree_mul(x: Any, y: Any) -> Any:
    """``x * y``, entry by entry."""
    return tree_map(torch.mul, x, y)


def tree_div(x: Any, y: Any) -> Any:
    """``x / y``, entry by entry."""
    return tree_map(torch.div, x, y)


def tree_neg(x: Any) -> Any:
    """``-x``."""
    return tree_map(torch.neg, x)


def tree_scalar_mul(scalar: Scalar, x: Any) -> Any:
    """``scalar * x``."""
    return tree_map(lambda leaf: scalar * leaf, x)


def tree_add_scalar_mul(x: Any, scalar: Scalar, y: Any) -> Any:
    """``x + scalar * y``."""
    return tree_map(lambda a, b: a + scalar * b, x, y)


def tree_zeros_like(x: Any) -> Any:
    """Zeros like the tensors of ``x``."""
    return tree_map(torch.zeros_like, x)


def tree_vdot(x: Any, y: Any) -> torch.Tensor:
    """The inner product ``sum(conj(x) * y)`` over all entries of all leaves, a scalar tensor.

    Raises:
        ValueError: the trees are nested differently, have leaves of different shapes, or hold no tensor.

    Example:
        >>> import torch
        >>> from implicitdiff.pytree import tree_vdot
        >>> tree_vdot([torch.tensor([1.0, 2.0]), torch.tensor(3.0)], [torch.ones(2), torch.tensor(2.0)])
        tensor(9.)
    """
    products = _pytree.tensors(tree_map(_inner, x, y))
    if not products:
        raise ValueError(f"tree_vdot: a tree with tensors is needed, got {_pytree.describe(x)}")
    return functools.reduce(torch.add, products)


def tree_l2_norm(x: Any) -> torch.Tensor:
    """The Euclidean norm over all entries of all leaves, a scalar tensor; its derivative at zero is zero.

    Raises:
        ValueError: the tree holds no tensor.

    Example:
        >>> import torch
        >>> from implicitdiff.pytree import tree_l2_norm
        >>> tree_l2_norm({"a": torch.tensor([3.0, 0.0]), "b": torch.tensor(4.0)})
        tensor(5.)
    """
    leaves = _pytree.tensors(x)
    if not leaves:
        raise ValueError(f"tree_l2_norm: a tree with tensors is needed, got {_pytree.describe(x)}")
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(leaf) for leaf in leaves]))
    return norm


def _inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.shape != b.shape:
        raise ValueError(f"tree_vdot: leaves must be of the same shapes, got {list(a.shape)} and {list(b.shape)}")
    return (a.conj() * b).sum()


def _unlike(tree: Any, other: Any) -> ValueError:
    return ValueError(
        f"trees must be nested alike, with tensors in the same places: got {_pytree.describe(tree)} and "
        f"{_pytree.describe(other)}"
    )
