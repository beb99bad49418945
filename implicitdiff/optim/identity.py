"""The identity transformation."""

from __future__ import annotations

from implicitdiff._calls import shows_call
from implicitdiff._torch.trees import Leaves, Tree
from implicitdiff.optim._base import GradientTransformation
from implicitdiff.optim._columns import Columns
from implicitdiff.optim._stateless import stateless


@shows_call
def identity() -> GradientTransformation:
    """Return gradients unchanged: ``update = g``.

    Example:
        >>> import torch
        >>> from implicitdiff.optim import identity
        >>> init, update = identity()
        >>> update(torch.tensor([1.0, 2.0]), init(None))[0]
        tensor([1., 2.])
    """
    return stateless("identity", _unchanged)


def _unchanged(columns: Columns, params: Tree) -> Leaves:
    return columns.first
