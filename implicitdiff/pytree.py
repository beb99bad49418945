"""Vector arithmetic on pytrees, nested containers of tensors.

All functions act leaf by leaf, are differentiable, and work under every transform of torch.func.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

import implicitdiff._torch.trees as _pytree
from implicitdiff._torch.trees import Tree

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


def __dir__() -> list[str]:
    return __all__


Scalar = torch.Tensor | float | complex


def tree_map(fn: Callable[..., torch.Tensor], tree: Tree, *others: Tree) -> Tree:
    """Apply ``fn(leaf, *leaves of others)`` to the tensors of trees of equal nesting, and return the tree of results.

    Leaves of the first tree that are not tensors are kept.

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
        # `tensors_of` accepts a tensor where the first tree has another leaf, which would be dropped silently.
        if len(_pytree.tensors(other)) != len(leaves):
            raise _unlike(tree, other)
    return structure.unflatten([fn(*row) for row in zip(*columns, strict=True)])


def tree_add(x: Tree, y: Tree) -> Tree:
    """Return ``x + y``."""
    return tree_map(torch.add, x, y)


def tree_sub(x: Tree, y: Tree) -> Tree:
    """Return ``x - y``."""
    return tree_map(torch.sub, x, y)


def tree_mul(x: Tree, y: Tree) -> Tree:
    """Return ``x * y``, entry by entry."""
    return tree_map(torch.mul, x, y)


def tree_div(x: Tree, y: Tree) -> Tree:
    """Return ``x / y``, entry by entry."""
    return tree_map(torch.div, x, y)


def tree_neg(x: Tree) -> Tree:
    """Return ``-x``."""
    return tree_map(torch.neg, x)


def tree_scalar_mul(scalar: Scalar, x: Tree) -> Tree:
    """Return ``scalar * x``."""
    return tree_map(lambda leaf: scalar * leaf, x)


def tree_add_scalar_mul(x: Tree, scalar: Scalar, y: Tree) -> Tree:
    """Return ``x + scalar * y``."""
    return tree_map(lambda a, b: a + scalar * b, x, y)


def tree_zeros_like(x: Tree) -> Tree:
    """Return zeros like the tensors of ``x``."""
    return tree_map(torch.zeros_like, x)


def tree_vdot(x: Tree, y: Tree) -> torch.Tensor:
    """Return the inner product ``sum(conj(x) * y)`` over all entries of all leaves, a scalar tensor.

    Raises:
        ValueError: the trees are nested differently, have leaves of different shapes, or hold no tensor.

    Example:
        >>> import torch
        >>> from implicitdiff.pytree import tree_vdot
        >>> tree_vdot([torch.tensor([1.0, 2.0]), torch.tensor(3.0)], [torch.ones(2), torch.tensor(2.0)])
        tensor(9.)
    """
    products = _pytree.tensors(tree_map(_leaf_vdot, x, y))
    if not products:
        raise ValueError(f"tree_vdot: x must be a tree with tensors, got {_pytree.describe(x)}")
    return functools.reduce(torch.add, products)


def tree_l2_norm(x: Tree) -> torch.Tensor:
    """Return the Euclidean norm over all entries of all leaves, a scalar tensor with derivative zero at zero.

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
        raise ValueError(f"tree_l2_norm: x must be a tree with tensors, got {_pytree.describe(x)}")
    # `vector_norm` has the derivative 0 at 0; the square root of a sum of squares would have nan.
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(leaf) for leaf in leaves]))
    return norm


def _leaf_vdot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # The product may broadcast, and count entries of the smaller leaf several times.
    if a.shape != b.shape:
        raise ValueError(f"tree_vdot: leaves must be of the same shapes, got {list(a.shape)} and {list(b.shape)}")
    return (a.conj() * b).sum()


def _unlike(tree: Tree, other: Tree) -> ValueError:
    return ValueError(
        f"trees must be nested alike, with tensors in the same places: got {_pytree.describe(tree)} and "
        f"{_pytree.describe(other)}"
    )
