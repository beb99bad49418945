"""Hooks of a parameter, inherited by the result of a step.

A hook of ``p.register_hook`` modifies the gradient of ``p``. The gradient of the next step, at the new parameter, has
to be modified likewise. Registering the hook on the new parameter would be wrong: autograd would run it in the outer
backward pass too, once for each step. The new parameter therefore carries the tables of hooks as an attribute, which
`loss_gradients` applies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

import implicitdiff._torch.functions as _functions

_NAME = "_inherited_hooks"


class _Inherited:
    """Hook tables of all earlier versions of a parameter.

    The tables are autograd's own, so that removal by a handle takes effect here too. A copy or a pickle has no tables,
    like a copy of a tensor.
    """

    def __init__(self, tables: tuple[Mapping[int, Callable[[torch.Tensor], torch.Tensor | None]], ...] = ()) -> None:
        self.tables = tables

    def __reduce__(self) -> tuple[type[_Inherited], tuple[()]]:
        return _Inherited, ()


def _inherited(tensor: torch.Tensor) -> _Inherited:
    return getattr(tensor, _NAME, None) or _Inherited()


def inherit(new: torch.Tensor, old: torch.Tensor) -> None:
    """Pass the hooks of a parameter on to its replacement."""
    # Autograd keeps hooks by tensor, and a step replaces the tensor.
    own = _functions.hooks_of(old)
    tables = (*_inherited(old).tables, *([own] if own else []))
    if tables and new is not old:
        setattr(new, _NAME, _Inherited(tables))


def apply_inherited(tensor: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Apply inherited hooks to the gradient of a tensor. Autograd has run the tensor's own hooks already."""
    for hook in [hook for table in _inherited(tensor).tables for hook in table.values()]:
        result = hook(grad)
        grad = grad if result is None else result
    return grad
