"""Proximal operators: the point that trades a penalty ``g`` for the distance from ``v``.

That is::

    prox(v, s) = argmin over x of  s g(x) + |x - v|^2 / 2

Each takes ``v`` first, a floating-point tensor or a tree of them, and then the number ``s`` that multiplies the
penalty; a solver passes its step size there. The strengths of the penalty go by keyword, so that
``functools.partial(prox.lasso, strength=0.1)`` and ``lambda v, s: prox.lasso(v, 0.1 * s)`` are the same operator.
All of these numbers are at least 0; each may be a number, a tensor, or a tree of them that is nested like ``v`` or cut
off above. The result is a tree like ``v``, with its dtypes.

They compose with all transforms of torch.func, to any order, and are differentiated in their numbers as well. Where a
derivative jumps, it is that of the side on which the entry, or the group, is not zero; at a threshold of zero that is
the identity, with derivative 1.

Reference:
    Parikh and Boyd, "Proximal Algorithms", 2014, section 6.5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from implicitdiff.projections._balls import l2_ball
from implicitdiff.projections._point import Point

__all__ = ["elastic_net", "group_lasso", "lasso", "non_negative_lasso", "non_negative_ridge", "ridge"]


def lasso(v: Any, threshold: Any = 1.0, *, strength: Any = 1.0) -> Any:
    """Soft thresholding, of the penalty ``g(x) = strength |x|_1``.

    That is ``sign(v) max(|v| - threshold strength, 0)``, entry by entry.

    Args:
        v: a tensor or a tree.
        threshold: multiplies the penalty. A tensor broadcasts to the leaf.
        strength: of the penalty, likewise.

    Raises:
        ValueError: a number is negative, or does not fit ``v``.

    Example:
        >>> from implicitdiff import prox
        >>> prox.lasso(torch.tensor([-2.0, 0.5, 1.5]), 1.0)
        tensor([-1.0000,  0.0000,  0.5000])
    """
    return _leaf_by_leaf("lasso", _shrink, v, threshold=threshold, strength=strength)


def ridge(v: Any, stepsize: Any = 1.0, *, strength: Any = 1.0) -> Any:
    """Shrinkage towards zero, of the penalty ``g(x) = strength |x|^2 / 2``.

    That is ``v / (1 + stepsize strength)``, entry by entry.

    Args:
        v: a tensor or a tree.
        stepsize: multiplies the penalty. A tensor broadcasts to the leaf.
        strength: of the penalty, likewise.

    Raises:
        ValueError: a number is negative, or does not fit ``v``.

    Example:
        >>> from implicitdiff import prox
        >>> prox.ridge(torch.tensor([-2.0, 1.0]), 0.5, strength=2.0)
        tensor([-1.0000,  0.5000])
    """
    return _leaf_by_leaf("ridge", lambda v, s, c: v / (1 + s * c), v, stepsize=stepsize, strength=strength)


def non_negative_lasso(v: Any, threshold: Any = 1.0, *, strength: Any = 1.0) -> Any:
    """One-sided soft thresholding, of the penalty ``g(x) = strength sum(x)`` on ``x >= 0``.

    That is ``max(v - threshold strength, 0)``, entry by entry.

    Args:
        v: a tensor or a tree.
        threshold: multiplies the penalty. A tensor broadcasts to the leaf.
        strength: of the penalty, likewise.

    Raises:
        ValueError: a number is negative, or does not fit ``v``.

    Example:
        >>> from implicitdiff import prox
        >>> prox.non_negative_lasso(torch.tensor([-2.0, 0.5, 1.5]), 1.0)
        tensor([0.0000, 0.0000, 0.5000])
    """

    def shrink(v: Tensor, threshold: Tensor, strength: Tensor) -> Tensor:
        threshold = threshold * strength
        return torch.where(v < threshold, 0.0, v - threshold)

    return _leaf_by_leaf("non_negative_lasso", shrink, v, threshold=threshold, strength=strength)


def non_negative_ridge(v: Any, stepsize: Any = 1.0, *, strength: Any = 1.0) -> Any:
    """Shrinkage of what is positive, of the penalty ``g(x) = strength |x|^2 / 2`` on ``x >= 0``.

    That is ``max(v, 0) / (1 + stepsize strength)``, entry by entry.

    Args:
        v: a tensor or a tree.
        stepsize: multiplies the penalty. A tensor broadcasts to the leaf.
        strength: of the penalty, likewise.

    Raises:
        ValueError: a number is negative, or does not fit ``v``.

    Example:
        >>> from implicitdiff import prox
        >>> prox.non_negative_ridge(torch.tensor([-2.0, 1.0]), 0.5, strength=2.0)
        tensor([0.0000, 0.5000])
    """

    def shrink(v: Tensor, stepsize: Tensor, strength: Tensor) -> Tensor:
        return torch.where(v < 0, 0.0, v) / (1 + stepsize * strength)

    return _leaf_by_leaf("non_negative_ridge", shrink, v, stepsize=stepsize, strength=strength)


def elastic_net(v: Any, stepsize: Any = 1.0, *, l1: Any = 1.0, l2: Any = 1.0) -> Any:
    """Soft thresholding and then shrinkage, of the penalty ``g(x) = l1 |x|_1 + l2 |x|^2 / 2``.

    That is ``sign(v) max(|v| - stepsize l1, 0) / (1 + stepsize l2)``, entry by entry.

    Args:
        v: a tensor or a tree.
        stepsize: multiplies the whole penalty. A tensor broadcasts to the leaf.
        l1: the strength of the first part, likewise.
        l2: the strength of the second, likewise.

    Raises:
        ValueError: a number is negative, or does not fit ``v``.

    Reference:
        Zou and Hastie, "Regularization and Variable Selection via the Elastic Net", 2005.

    Example:
        >>> from implicitdiff import prox
        >>> prox.elastic_net(torch.tensor([-2.0, 0.5, 1.5]), 1.0, l1=1.0, l2=1.0)
        tensor([-0.5000,  0.0000,  0.2500])
    """

    def shrink(v: Tensor, stepsize: Tensor, l1: Tensor, l2: Tensor) -> Tensor:
        return _shrink(v, stepsize, l1) / (1 + stepsize * l2)

    return _leaf_by_leaf("elastic_net", shrink, v, stepsize=stepsize, l1=l1, l2=l2)


def group_lasso(v: Any, threshold: Any = 1.0, *, strength: Any = 1.0) -> Any:
    """Block soft thresholding, of the penalty ``g(x) = strength |x|_2``, each tensor being one group.

    That is ``v max(1 - threshold strength / |v|, 0)``, which is zero, with its derivative, at ``v = 0``. For groups
    that are the rows of one tensor, take ``torch.func.vmap``.

    Args:
        v: a tensor or a tree, of one group a leaf.
        threshold: multiplies the penalty. A tensor is a scalar.
        strength: of the penalty, likewise.

    Raises:
        ValueError: a number is negative, or does not fit ``v``.

    Reference:
        Yuan and Lin, "Model Selection and Estimation in Regression with Grouped Variables", 2006.

    Example:
        >>> from implicitdiff import prox
        >>> prox.group_lasso([torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4])], 1.0)
        [tensor([2.4000, 3.2000]), tensor([0., 0.])]
    """

    def shrink(v: Tensor, threshold: Tensor, strength: Tensor) -> Tensor:
        # Moreau's decomposition: the ball is that of the dual norm.
        return v - cast(Tensor, l2_ball(v, (threshold * strength).reshape(())))

    return _leaf_by_leaf("group_lasso", shrink, v, scalar=True, threshold=threshold, strength=strength)


def _shrink(v: Tensor, threshold: Tensor, strength: Tensor) -> Tensor:
    threshold = threshold * strength
    return torch.where(v.abs() < threshold, 0.0, v - threshold * v.sign())


def _leaf_by_leaf(function: str, fn: Callable[..., Tensor], v: Any, *, scalar: bool = False, **numbers: Any) -> Any:
    point = Point.of(function, v)
    return point.map(fn, *(point.operands(name, x, scalar=scalar, least=0.0) for name, x in numbers.items()))
