"""Projections onto simplices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import implicitdiff._torch.trees as pytree
from implicitdiff._torch.trees import Number, Tree, X
from implicitdiff.projections._point import Point, sum_of


def simplex(v: X, total: Number = 1.0) -> X:
    """Project onto ``{x: x >= 0, sum(x) = total}``, ``v`` being one vector.

    With the threshold ``tau`` and the support ``s``::

        x = max(v - tau, 0),    tau = (sum of v over s - total) / |s|,    s = {i: x_i > 0}

    and the Jacobian ``diag(s) - s s' / |s|``. Entries ``-inf`` of ``v`` give 0.

    Args:
        v: a tensor or a tree.
        total: the sum of the entries, at least 0.

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


def sparse_simplex(v: X, k: int, total: Number = 1.0) -> X:
    """Project onto ``{x: x >= 0, sum(x) = total, x has at most k entries other than 0}``, ``v`` being one vector.

    The result is the projection of the ``k`` largest entries onto the `simplex`, and 0 elsewhere. The set is not
    convex: the result jumps where the positions of the ``k`` largest entries change. Of equal entries the first are
    taken, with their derivative.

    Args:
        v: a tensor or a tree.
        k: an integer, at least 1.
        total: the sum of the entries, at least 0.

    Raises:
        ValueError: ``total`` is negative, ``k`` is less than 1, or ``v`` has no entry.
        TypeError: ``k`` is not an integer.

    Reference:
        Kyrillidis, Becker, Cevher and Koch, "Sparse projections onto the simplex", ICML 2013, section 3.

    Example:
        >>> from implicitdiff.projections import sparse_simplex
        >>> sparse_simplex(torch.tensor([0.5, 0.75, 0.25, 0.0]), 2)
        tensor([0.3750, 0.6250, 0.0000, 0.0000])
    """
    point = nonempty("sparse_simplex", v)
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"sparse_simplex: k must be an integer, got {pytree.describe(k)}")
    if k < 1:
        raise ValueError(f"sparse_simplex: k must be at least 1, got {k}")

    def project(v: Tensor, total: Tensor) -> Tensor:
        # argsort of a permutation is its inverse, here the rank of each entry.
        order = v.detach().sort(descending=True, stable=True).indices
        # An entry ``-inf`` is never in the support.
        return onto_simplex(torch.where(order.argsort() < k, v, -math.inf), total)

    return point.map_flat(project, point.scalar("total", total, least=0.0))


def nonempty(function: str, v: Tree) -> Point:
    """Return the point of `v`, or raise if it has no entry."""
    point = Point.of(function, v)
    if not point.size:
        raise ValueError(f"{function}: v must have an entry, got {pytree.describe(v)}")
    return point


def onto_simplex(v: Tensor, total: Tensor) -> Tensor:
    """Project a vector onto the simplex."""
    # x does not depend on a common shift of v; this one saves digits. Shift and support have no derivative.
    v = v - v.detach().amax(0, keepdim=True)
    # The KKT conditions ``x = v - tau + mu``, ``mu >= 0``, ``mu x = 0`` give ``x = max(v - tau, 0)``;
    # ``sum(x) = total`` determines ``tau``.
    values = v.detach()
    ranks = torch.arange(1, v.numel() + 1, dtype=v.dtype, device=v.device)
    # (sum of the k largest - total) / k rises in k as long as entry k exceeds the value for k - 1, which is as long as
    # entry k is in the support, and then falls. The maximum over k is tau (Duchi et al., figure 1).
    tau = ((values.sort(descending=True).values.cumsum(0) - total.detach()) / ranks).amax(0, keepdim=True)
    # The largest entry is in the support even for total 0, where the set is a point and no derivative in v remains.
    # A negated comparison is true for nan, which has to reach the result.
    support = ~((values <= tau) & (values < 0))
    moving = torch.where(support & (total != 0), v, 0.0)
    # ``tau`` once more, as a mean over the support with a derivative: the Jacobian is ``diag(s) - s s' / |s|``.
    x = torch.where(support, moving - (sum_of(moving) - total) / sum_of(support), 0.0)
    # Rounding may put the least entry of the support below zero: set it to 0, and keep its derivative.
    return torch.where(x < 0, x - x.detach(), x)
