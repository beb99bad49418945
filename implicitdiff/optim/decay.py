"""Weight decay, and transformations of some of the leaves."""

from __future__ import annotations

import dataclasses
import functools

import torch

import implicitdiff.optim._check as _check
import implicitdiff.optim._donation as _donation
from implicitdiff._calls import Remembers, shows_call
from implicitdiff._torch.trees import Leaves, Number, Tree
from implicitdiff.optim._base import GradientTransformation
from implicitdiff.optim._columns import Columns
from implicitdiff.optim._stateless import convert_factor, factor_of_each_row, in_accumulator_dtype, stateless


@shows_call
def add_decayed_weights(weight_decay: Number | Tree = 0.0, mask: Tree = None) -> GradientTransformation:
    """Add a multiple of the parameters: ``update = g + weight_decay * p``; needs ``params`` in ``update``.

    Args:
        weight_decay: a number, or a tensor or a tree as in `adam`, which may be learned.
        mask: the parameters that decay: a tree of bools nested like the parameters, a prefix of such a tree, or a
            function of the parameters that returns either. None: all.

    Example:
        >>> import torch
        >>> from implicitdiff.optim import add_decayed_weights
        >>> init, update = add_decayed_weights(0.1)
        >>> params = torch.tensor([1.0, 2.0])
        >>> update(torch.zeros(2), init(params), params)[0]
        tensor([0.1000, 0.2000])
    """
    _check.require_non_negative("add_decayed_weights", weight_decay=weight_decay)

    wanted = True if mask is None else mask
    return stateless("add_decayed_weights", functools.partial(_all_decayed, weight_decay, wanted))


def _all_decayed(weight_decay: Number | Tree, mask: Tree, columns: Columns, params: Tree) -> Leaves:
    if params is None:
        raise ValueError("add_decayed_weights needs the parameters; call update(grads, state, params)")
    column = columns.masked(columns.column("params", columns.match("params", params)), mask, params)
    rows = zip(columns.first, column, factor_of_each_row("weight_decay", weight_decay, columns), strict=True)
    return [g if p is None else _decayed(g, p, each) for g, p, each in rows]


def _decayed(g: torch.Tensor, p: torch.Tensor, weight_decay: Number) -> torch.Tensor:
    # Inside of the lambda `g` has the accumulator's dtype, so the sum is rounded once.
    return in_accumulator_dtype(g, lambda g: g + convert_factor(weight_decay, g) * p.to(g.dtype))


@shows_call
def masked(inner: GradientTransformation, mask: Tree) -> GradientTransformation:
    """Transform the leaves of a mask and leave the others unchanged.

    Args:
        inner: a pair. Leaves outside of the mask are None for it and have no state.
        mask: the leaves to transform: a tree of bools nested like the parameters, a prefix of such a tree, or a
            function that returns either, called with the parameters in ``init`` and the gradients in ``update``.

    Example:
        >>> import torch
        >>> from implicitdiff.optim import masked, scale
        >>> init, update = masked(scale(-0.1), {"head": True, "body": False})
        >>> grads = {"head": torch.tensor([1.0]), "body": torch.tensor([1.0])}
        >>> update(grads, init(grads))[0]
        {'head': tensor([-0.1000]), 'body': tensor([1.])}
    """
    update = _Masked(inner, mask)
    return GradientTransformation(update.init, update)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Masked(Remembers):
    """``init`` and ``update`` of a masked transformation."""

    inner: GradientTransformation
    mask: Tree

    def init(self, params: Tree) -> Tree:
        columns = Columns("masked", "params", params)
        return self.inner[0](columns.tree_of(columns.leaves, columns.masked(columns.first, self.mask, params)))

    def __call__(self, grads: Tree, state: Tree, params: Tree = None, *, inplace: bool = False) -> tuple[Tree, Tree]:
        columns = Columns("masked", "grads", grads).checked()
        column = columns.first
        if inplace:
            # One tensor may be the gradient of two leaves, of which the mask leaves one unchanged.
            shared = _donation.shared(column)
            column = [g.clone() if i in shared else g for i, g in enumerate(column)]
        kept = columns.masked(column, self.mask, grads)
        updates, state = self.inner[1](columns.tree_of(columns.leaves, kept), state, params=params, inplace=inplace)
        transformed = columns.pick(columns.match("updates", updates))
        mixed = [g if k is None else u for u, g, k in zip(transformed, columns.first, kept, strict=True)]
        return columns.tree_of(columns.leaves, mixed), state
