"""Updates as they are."""

from __future__ import annotations

from typing import Any

from implicitdiff._torch.trees import Leaves
from implicitdiff.optim._base import GradientTransformation
from implicitdiff.optim._columns import Columns
from implicitdiff.optim._stateless import stateless


def identity() -> GradientTransformation:
    """Leave gradients as they are: ``update = g``.

    Example:
        >>> import torch
        >>> from implicitdiff.optim import identity
        >>> init, update = identity()
        >>> update(torch.tensor([1.0, 2.0]), init(None))[0]
        tensor([1., 2.])
    """
    return stateless("identity", _unchanged)


def _unchanged(columns: Columns, params: Any) -> Leaves:
    return columns.first
