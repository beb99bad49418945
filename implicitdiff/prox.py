"""Proximal operators: minimisers of a penalty plus half of a squared distance.

For a penalty ``g``::

    prox(v, s) = argmin over x of  s g(x) + |x - v|^2 / 2

The first argument ``v`` is a floating-point tensor or a tree of such tensors. The second, ``s``, multiplies the
penalty; a solver passes its step size. Strengths of the penalty are keyword arguments, so that
``functools.partial(prox.lasso, strength=0.1)`` and ``lambda v, s: prox.lasso(v, 0.1 * s)`` are one operator. Each is at
least 0: a number, a tensor, or a tree of these, nested like ``v`` or a prefix of ``v``. The result is a tree like
``v``, with its dtypes.

Proximal operators compose with all transforms of torch.func, to any order, and have derivatives in ``s`` and the
strengths. Where a derivative jumps, the result is the derivative of the side on which the entry, or the group, is not
zero; with a threshold of zero this is the identity, of derivative 1.

Reference:
    Parikh and Boyd, "Proximal Algorithms", 2014, section 6.5.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from implicitdiff._torch.trees import Tree, X
from implicitdiff.projections._balls import l2_ball
from implicitdiff.projections._point import Point

__all__ = ["elastic_net", "group_lasso", "lasso", "non_negative_lasso", "non_negative_ridge", "ridge"]


def __dir__() -> list[str]:
    return __all__


def lasso(v: X, threshold: Tree = 1.0, *, strength: Tree = 1.0) -> X:
    """Soft thresholding, for the penalty ``g(x) = strength |x|_1``.

    The result is ``sign(v) max(|v| - threshold strength, 0)``, entry by entry.

    Args:
        v: a tensor or a tree.
        threshold: multiplies the penalty. A tensor broadcasts to the leaf.
        strength: strength of the penalty, likewise.

    Raises:
        ValueError: an argument is negative, or does not fit ``v``.

    Example:
        >>> from implicitdiff import prox
        >>> prox.lasso(torch.tensor([-2.0, 0.5, 1.5]), 1.0)
        tensor([-1.0000,  0.0000,  0.5000])
    """
    return _leaf_by_leaf("lasso", _shrink, v, threshold=threshold, strength=strength)


def ridge(v: X, stepsize: Tree = 1.0, *, strength: Tree = 1.0) -> X:
    """Shrinkage towards zero, for the penalty ``g(x) = strength |x|^2 / 2``.

    The result is ``v / (1 + stepsize strength)``, entry by entry.

    Args:
        v: a tensor or a tree.
        stepsize: multiplies the penalty. A tensor broadcasts to the leaf.
        strength: strength of the penalty, likewise.

    Raises:
        ValueError: an argument is negative, or does not fit ``v``.

    Example:
        >>> from implicitdiff import prox
        >>> prox.ridge(torch.tensor([-2.0, 1.0]), 0.5, strength=2.0)
        tensor([-1.0000,  0.5000])
    """
    # ``s c x + x - v = 0``.
    return _leaf_by_leaf("ridge", lambda v, s, c: v / (1 + s * c), v, stepsize=stepsize, strength=strength)


def non_negative_lasso(v: X, threshold: Tree = 1.0, *, strength: Tree = 1.0) -> X:
    """One-sided soft thresholding, for the penalty ``g(x) = strength sum(x)`` on ``x >= 0``.

    The result is ``max(v - threshold strength, 0)``, entry by entry.

    Args:
        v: a tensor or a tree.
        threshold: multiplies the penalty. A tensor broadcasts to the leaf.
        strength: strength of the penalty, likewise.

    Raises:
        ValueError: an argument is negative, or does not fit ``v``.

    Example:
        >>> from implicitdiff import prox
        >>> prox.non_negative_lasso(torch.tensor([-2.0, 0.5, 1.5]), 1.0)
        tensor([0.0000, 0.0000, 0.5000])
    """

    def shrink(v: Tensor, threshold: Tensor, strength: Tensor) -> Tensor:
        # Stationarity on ``x >= 0``: ``x - v + t >= 0``, with equality for ``x > 0``.
        threshold = threshold * strength
        return torch.where(v < threshold, 0.0, v - threshold)

    return _leaf_by_leaf("non_negative_lasso", shrink, v, threshold=threshold, strength=strength)


def non_negative_ridge(v: X, stepsize: Tree = 1.0, *, strength: Tree = 1.0) -> X:
    """Shrinkage of positive entries, for the penalty ``g(x) = strength |x|^2 / 2`` on ``x >= 0``.

    The result is ``max(v, 0) / (1 + stepsize strength)``, entry by entry.

    Args:
        v: a tensor or a tree.
        stepsize: multiplies the penalty. A tensor broadcasts to the leaf.
        strength: strength of the penalty, likewise.

    Raises:
        ValueError: an argument is negative, or does not fit ``v``.

    Example:
        >>> from implicitdiff import prox
        >>> prox.non_negative_ridge(torch.tensor([-2.0, 1.0]), 0.5, strength=2.0)
        tensor([0.0000, 0.5000])
    """

    def shrink(v: Tensor, stepsize: Tensor, strength: Tensor) -> Tensor:
        # Stationarity on ``x >= 0``: ``(1 + s c) x - v >= 0``, with equality for ``x > 0``.
        # At ``v = 0`` the branch with derivative 1 is taken; `relu` would have the derivative 0.
        return torch.where(v < 0, 0.0, v) / (1 + stepsize * strength)

    return _leaf_by_leaf("non_negative_ridge", shrink, v, stepsize=stepsize, strength=strength)


def elastic_net(v: X, stepsize: Tree = 1.0, *, l1: Tree = 1.0, l2: Tree = 1.0) -> X:
    """Soft thresholding, then shrinkage, for the penalty ``g(x) = l1 |x|_1 + l2 |x|^2 / 2``.

    The result is ``sign(v) max(|v| - stepsize l1, 0) / (1 + stepsize l2)``, entry by entry.

    Args:
        v: a tensor or a tree.
        stepsize: multiplies the whole penalty. A tensor broadcasts to the leaf.
        l1: strength of the 1-norm, likewise.
        l2: strength of the squared 2-norm, likewise.

    Raises:
        ValueError: an argument is negative, or does not fit ``v``.

    Reference:
        Zou and Hastie, "Regularization and Variable Selection via the Elastic Net", 2005.

    Example:
        >>> from implicitdiff import prox
        >>> prox.elastic_net(torch.tensor([-2.0, 0.5, 1.5]), 1.0, l1=1.0, l2=1.0)
        tensor([-0.5000,  0.0000,  0.2500])
    """

    def shrink(v: Tensor, stepsize: Tensor, l1: Tensor, l2: Tensor) -> Tensor:
        # ``s l1 sign(x) + (1 + s l2) x = v``: the threshold first, then the division.
        return _shrink(v, stepsize, l1) / (1 + stepsize * l2)

    return _leaf_by_leaf("elastic_net", shrink, v, stepsize=stepsize, l1=l1, l2=l2)


def group_lasso(v: X, threshold: Tree = 1.0, *, strength: Tree = 1.0) -> X:
    """Block soft thresholding, for the penalty ``g(x) = strength |x|_2``, with one group a tensor.

    The result is ``v max(1 - threshold strength / |v|, 0)``, zero at ``v = 0``, with derivative zero. For groups that
    are rows of one tensor, use ``torch.func.vmap``.

    Args:
        v: a tensor or a tree, with one group a leaf.
        threshold: multiplies the penalty. A tensor has to be a scalar.
        strength: strength of the penalty, likewise.

    Raises:
        ValueError: an argument is negative, or does not fit ``v``.

    Reference:
        Yuan and Lin, "Model Selection and Estimation in Regression with Grouped Variables", 2006.

    Example:
        >>> from implicitdiff import prox
        >>> prox.group_lasso([torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4])], 1.0)
        [tensor([2.4000, 3.2000]), tensor([0., 0.])]
    """

    def shrink(v: Tensor, threshold: Tensor, strength: Tensor) -> Tensor:
        # Moreau's decomposition: v - prox(v) projects onto the ball of the dual norm, here the 2-norm too. The dual
        # norm's ball has the radius ``threshold * strength``.
        return v - l2_ball(v, (threshold * strength).reshape(()))

    return _leaf_by_leaf("group_lasso", shrink, v, scalar=True, threshold=threshold, strength=strength)


def _shrink(v: Tensor, threshold: Tensor, strength: Tensor) -> Tensor:
    # At |v| = threshold the branch with derivative 1 is taken, the side on which x is not zero. 0 lies in the
    # subdifferential ``x - v + t sign(x)``, in which ``sign(0)`` is ``[-1, 1]``: ``x = v - t sign(v)`` for ``|v| > t``,
    # else 0.
    threshold = threshold * strength
    return torch.where(v.abs() < threshold, 0.0, v - threshold * v.sign())


def _leaf_by_leaf(function: str, fn: Callable[..., Tensor], v: Tree, *, scalar: bool = False, **numbers: Tree) -> Tree:
    point = Point.of(function, v)
    # A negative factor makes the penalty concave, and the minimiser may be missing or ambiguous.
    return point.map(fn, *(point.operands(name, x, scalar=scalar, least=0.0) for name, x in numbers.items()))
