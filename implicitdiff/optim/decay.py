"""Weight decay, and transformations of some of the leaves."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

import implicitdiff.optim._check as _check
import implicitdiff.optim._donation as _donation
from implicitdiff._torch.trees import Leaves
from implicitdiff.optim._base import GradientTransformation
from implicitdiff.optim._columns import Columns
from implicitdiff.optim._rule import Number
from implicitdiff.optim._stateless import factor_like, factors, stateless, widely


def add_decayed_weights(weight_decay: Number | Any = 0.0, mask: Any = None) -> GradientTransformation:
    """Add a multiple of the parameters: ``update = g + weight_decay * p``; needs ``params`` in ``update``.

    Args:
        weight_decay: a number, or as `adam` takes it a tensor or a tree, which may be learned.
        mask: which parameters decay: a tree of bools nested like them, a prefix of one, or a function that makes one
            from them; None for all.

    Example:
        >>> import torch
        >>> from implicitdiff.optim import add_decayed_weights
        >>> init, update = add_decayed_weights(0.1)
        >>> params = torch.tensor([1.0, 2.0])
        >>> update(torch.zeros(2), init(params), params)[0]
        tensor([0.1000, 0.2000])
    """
    _check.non_negative("add_decayed_weights", weight_decay=weight_decay)

    return stateless("add_decayed_weights", functools.partial(_all_decayed, weight_decay, mask))


def _all_decayed(weight_decay: Any, mask: Any, columns: Columns, params: Any) -> Leaves:
    if params is None:
        raise ValueError("add_decayed_weights needs the parameters; call update(grads, state, params)")
    column = columns.column("params", columns.match("params", params))
    wanted = columns.chosen(True if mask is None else mask(params) if callable(mask) else mask)
    rows = zip(columns.first, column, wanted, factors("weight_decay", weight_decay, columns), strict=True)
    return [_decayed(g, p, each) if want else g for g, p, want, each in rows]


def _decayed(g: torch.Tensor, p: torch.Tensor, weight_decay: Number) -> torch.Tensor:
    return widely(g, lambda g: g + factor_like(weight_decay, g) * p.to(g.dtype))


def masked(inner: GradientTransformation, mask: Any) -> GradientTransformation:
    """Transform some of the leaves and pass the others on as they are.

    Args:
        inner: a pair, which sees None in the place of the others and keeps no state for them.
        mask: the leaves to transform: a tree of bools nested like the parameters, a prefix of one, or a function that
            makes one from a tree nested like them (it is called with the parameters, and with the gradients).

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


@dataclasses.dataclass(frozen=True, eq=False)
class _Masked:
    """The pair of some leaves."""

    inner: GradientTransformation
    mask: Any

    def init(self, params: Any) -> Any:
        columns = Columns("masked", "params", params)
        return self.inner[0](columns.tree_of(columns.leaves, self._kept(columns)[1]))

    def _kept(self, columns: Columns) -> tuple[list[Any], list[Any]]:
        """Which rows are transformed, and these rows with None for the others."""
        wanted = columns.chosen(self.mask(columns.tree) if callable(self.mask) else self.mask)
        return wanted, [leaf if want else None for leaf, want in zip(columns.first, wanted, strict=True)]

    def __call__(self, grads: Any, state: Any, params: Any = None, *, inplace: bool = False) -> tuple[Any, Any]:
        columns = Columns("masked", "grads", grads).checked()
        wanted, kept = self._kept(columns)
        if inplace:
            # One tensor may be the gradient of a leaf that is to stay as well.
            shared = _donation.shared(columns.first)
            kept = [g.clone() if g is not None and i in shared else g for i, g in enumerate(kept)]
        updates, state = self.inner[1](columns.tree_of(columns.leaves, kept), state, params=params, inplace=inplace)
        transformed = columns.pick(columns.match("updates", updates))
        mixed = [u if want else g for u, g, want in zip(transformed, columns.first, wanted, strict=True)]
        return columns.tree_of(columns.leaves, mixed), state
