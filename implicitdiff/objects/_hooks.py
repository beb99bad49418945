"""Hooks of parameters, for the tensors that a step puts in their places.

A hook of ``p.register_hook`` is a part of how the gradient of ``p`` is computed. A step's result needs the same for the
gradient of the next step, and for that alone: a hook on the result itself would also change what flows back through it
from a later loss, once for each step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

import implicitdiff._torch.levels as _functorch

_NAME = "_inherited_hooks"


class _Inherited:
    """The tables of hooks of all tensors before; those that are removed are gone from their table. A copy has none, as
    the copy of a tensor has none."""

    def __init__(self, tables: tuple[Mapping[Any, Callable[[torch.Tensor], torch.Tensor | None]], ...] = ()) -> None:
        self.tables = tables

    def __reduce__(self) -> tuple[Any, ...]:
        return _Inherited, ()


def _inherited(tensor: torch.Tensor) -> _Inherited:
    return getattr(tensor, _NAME, None) or _Inherited()


def inherit(new: torch.Tensor, old: torch.Tensor) -> None:
    """Give a tensor the hooks of the one whose place it takes."""
    own = _functorch.hooks_of(old)
    tables = (*_inherited(old).tables, *([own] if own else []))
    if tables and new is not old:
        setattr(new, _NAME, _Inherited(tables))


def applied(tensor: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient of a tensor after the hooks that it inherited; autograd runs its own."""
    for table in _inherited(tensor).tables:
        for hook in list(table.values()):
            result = hook(grad)
            grad = grad if result is None else result
    return grad
