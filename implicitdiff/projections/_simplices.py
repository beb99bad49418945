"""Projections onto simplices."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import implicitdiff._torch.trees as pytree
from implicitdiff.projections._point import Number, Point, sum_of


def simplex(v: Any, total: Number = 1.0) -> Any:
    """Project onto ``{x: x >= 0, sum(x) = total}``, ``v`` being one vector.

    That is::

        x = max(v - tau, 0),    tau = (sum of v over s - total) / |s|,    s = {i: x_i > 0}

    and the Jacobian is ``diag(s) - s s' / |s|``. Entries that are ``-inf`` come out as 0.

    Args:
        v: a tensor or a tree.
        total: what the entries sum to, at least 0.

    Raises:
        ValueError: ``total`` is negative, or ``v`` has no entry.

    Reference:
        Duchi et al., "Efficient Projections onto the l1-Ball for Learning in High Dimensions", 2008, figure 1; Martins
        and Astudillo, "From Softmax to Sparsemax", 2016, section 2.3, for the Jacobian.

    Example:
        >>> from implicitdiff.projections import simplex
        >>> simplex(torch.tensor([0.5, 1.0, -1.0]))
        tensor([0.2500, 0.7500, 0.0000])
    """
    point = nonempty("simplex", v)
    return point.map_flat(onto_simplex, point.scalar("total", total, least=0.0))


def sparse_simplex(v: Any, k: int, total: Number = 1.0) -> Any:
    """Project onto ``{x: x >= 0, sum(x) = total, x has at most k entries other than 0}``, ``v`` being one vector.

    That is the projection of the ``k`` largest entries onto the `simplex`, with 0 for the others. The set is not
    convex: where the smallest of these entries jump from place to place, so does the result. Of equal entries the first
    are taken, with their derivative.

    Args:
        v: a tensor or a tree.
        k: an integer, at least 1.
        total: what the entries sum to, at least 0.

    Raises:
        ValueError: ``total`` is negative, ``k`` is less than 1, or ``v`` has no entry.
        TypeError: ``k`` is no integer.

    Reference:
        Kyrillidis, Becker, Cevher and Koch, "Sparse projections onto the simplex", ICML 2013, section 3.

    Example:
        >>> from implicitdiff.projections import sparse_simplex
        >>> sparse_simplex(torch.tensor([0.5, 0.75, 0.25, 0.0]), 2)
        tensor([0.3750, 0.6250, 0.0000, 0.0000])
    """
    point = nonempty("sparse_simplex", v)
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"sparse_simplex: k has to be an integer, but it is {pytree.describe(k)}")
    if k < 1:
        raise ValueError(f"sparse_simplex: k has to be at least 1, but it is {k}")

    def project(v: Tensor, total: Tensor) -> Tensor:
        order = v.detach().sort(descending=True, stable=True).indices
        return onto_simplex(torch.where(order.argsort() < k, v, -math.inf), total)

    return point.map_flat(project, point.scalar("total", total, least=0.0))


def nonempty(function: str, v: Any) -> Point:
    """The point, refused if there is no entry whose sum could be anything."""
    point = Point.of(function, v)
    if not point.size:
        raise ValueError(f"{function}: v has to have an entry, but it is {pytree.describe(v)}")
    return point


def onto_simplex(v: Tensor, total: Tensor) -> Tensor:
    # Neither the shift, which saves digits, nor the search for the support has a derivative. Negated comparisons let
    # nan through.
    v = v - v.detach().amax(0, keepdim=True)
    values = v.detach()
    ranks = torch.arange(1, v.numel() + 1, dtype=v.dtype, device=v.device)
    # With the rank, this rises as long as entries lie above it, and then falls: its maximum is tau.
    tau = ((values.sort(descending=True).values.cumsum(0) - total.detach()) / ranks).amax(0, keepdim=True)
    # The largest entry is in the support even if the total is 0. Then the set is a point, which v does not move.
    support = ~((values <= tau) & (values < 0))
    moving = torch.where(support & (total != 0), v, 0.0)
    x = torch.where(support, moving - (sum_of(moving) - total) / sum_of(support), 0.0)
    # Rounding may put the least entry of the support below zero. Its derivative remains that of the support.
    return torch.where(x < 0, x - x.detach(), x)
