"""Euclidean projections: the point of a convex set that is nearest to ``v``.

Each takes ``v`` first, a floating-point tensor or a tree of them, and returns a tree like it, so that a solver can call
``projection(v)`` on a `functools.partial`. `box` and `non_negative` act on every entry alone. All others take ``v`` as
one vector of all its entries, whatever its shape and nesting; for one projection per row, take ``torch.func.vmap``.
The result has the dtypes of ``v``.

They compose with all transforms of torch.func, to any order, and are differentiated in the numbers that make the set
as well. Where a derivative jumps, it is that of the side on which the constraint is active: zero for a ``v`` on a side
of the box, and for a set that is a single point zero everywhere.

Numbers that make no set (a negative radius) raise a ValueError; inside of ``torch.compile``, tensors go unchecked.

Reference:
    Parikh and Boyd, "Proximal Algorithms", 2014, sections 6.2 and 6.5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import implicitdiff._pytree as pytree
from implicitdiff._point import Number, Point, broadcasts, holds

__all__ = ["affine_set", "box", "halfspace", "hyperplane", "l1_ball", "l2_ball", "non_negative", "simplex"]


def box(v: Any, lower: Any, upper: Any) -> Any:
    """Project onto ``{x: lower <= x <= upper}``, entry by entry.

    Args:
        v: a tensor or a tree.
        lower: the least values: a number, a tensor that broadcasts to every leaf, or a tree of these, nested like ``v``
            or cut off above. May be ``-inf``.
        upper: the greatest, likewise.

    Raises:
        ValueError: ``lower`` exceeds ``upper``, or one of them does not fit ``v``.

    Example:
        >>> from implicitdiff.projections import box
        >>> box(torch.tensor([-2.0, 0.5, 2.0]), 0.0, torch.tensor([1.0, 1.0, 3.0]))
        tensor([0.0000, 0.5000, 2.0000])
    """
    point = Point.of("box", v)
    lowers, uppers = point.operands("lower", lower), point.operands("upper", upper)
    if not all(low is None or holds(low <= high) for low, high in zip(lowers, uppers, strict=True)):
        raise ValueError(
            "box: lower has to be at most upper in every entry, but lower is "
            f"{pytree.describe(lower)} and upper is {pytree.describe(upper)}"
        )
    return point.map(_clamp, lowers, uppers)


def non_negative(v: Any) -> Any:
    """Project onto ``{x: x >= 0}``, entry by entry.

    Example:
        >>> from implicitdiff.projections import non_negative
        >>> non_negative({"a": torch.tensor([-1.0, 2.0]), "b": torch.tensor(-0.5)})
        {'a': tensor([0., 2.]), 'b': tensor(0.)}
    """
    return Point.of("non_negative", v).map(torch.relu)


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
    point = Point.of("simplex", v)
    if not point.size:
        raise ValueError(f"simplex: v has to have an entry, but it is {pytree.describe(v)}")
    return point.map_flat(_onto_simplex, point.scalar("total", total, least=0.0))


def l1_ball(v: Any, radius: Number = 1.0) -> Any:
    """Project onto ``{x: sum(|x|) <= radius}``, ``v`` being one vector.

    From outside, that is ``sign(v)`` times the projection of ``|v|`` onto the simplex of total ``radius``.

    Args:
        v: a tensor or a tree.
        radius: at least 0; may be ``inf``.

    Raises:
        ValueError: ``radius`` is negative.

    Reference:
        Duchi et al., "Efficient Projections onto the l1-Ball for Learning in High Dimensions", 2008, section 4.

    Example:
        >>> from implicitdiff.projections import l1_ball
        >>> l1_ball(torch.tensor([1.0, -0.5, 0.1]))
        tensor([ 0.7500, -0.2500,  0.0000])
    """
    point = Point.of("l1_ball", v)
    return point.map_flat(_onto_l1_ball, point.scalar("radius", radius, least=0.0))


def l2_ball(v: Any, radius: Number = 1.0) -> Any:
    """Project onto ``{x: |x| <= radius}`` in the Euclidean norm, ``v`` being one vector.

    That is ``v min(1, radius / |v|)``.

    Args:
        v: a tensor or a tree.
        radius: at least 0; may be ``inf``.

    Raises:
        ValueError: ``radius`` is negative.

    Example:
        >>> from implicitdiff.projections import l2_ball
        >>> l2_ball(torch.tensor([3.0, -4.0]))
        tensor([ 0.6000, -0.8000])
    """
    point = Point.of("l2_ball", v)
    return point.map_flat(_onto_l2_ball, point.scalar("radius", radius, least=0.0))


def hyperplane(v: Any, a: Any, b: Number) -> Any:
    """Project onto ``{x: a.x = b}``, ``v`` being one vector.

    That is ``v - a (a.v - b) / (a.a)``.

    Args:
        v: a tensor or a tree.
        a: the normal: a tree like ``v``, or what broadcasts to it as the bounds of a `box` do; not zero.
        b: a number or a scalar tensor.

    Raises:
        ValueError: ``a`` is zero or does not fit ``v``.

    Example:
        >>> from implicitdiff.projections import hyperplane
        >>> hyperplane(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]), 1.0)
        tensor([0., 1.])
    """
    return _along("hyperplane", v, a, b, lambda excess: excess)


def halfspace(v: Any, a: Any, b: Number) -> Any:
    """Project onto ``{x: a.x <= b}``, ``v`` being one vector.

    That is ``v - a max(a.v - b, 0) / (a.a)``.

    Args:
        v: a tensor or a tree.
        a: the normal, as of a `hyperplane`.
        b: a number or a scalar tensor; may be ``inf``.

    Raises:
        ValueError: ``a`` is zero or does not fit ``v``.

    Example:
        >>> from implicitdiff.projections import halfspace
        >>> halfspace(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]), 5.0)
        tensor([1., 2.])
    """
    return _along("halfspace", v, a, b, lambda excess: torch.where(excess < 0, 0.0, excess))


def affine_set(v: Any, A: Tensor, b: Number) -> Any:
    """Project onto ``{x: A x = b}``, ``v`` being one vector.

    That is ``v - A' (A A')^-1 (A v - b)``, by a QR factorisation of ``A'``, so that the condition number of ``A`` is
    not squared.

    Args:
        v: a tensor or a tree, of n entries.
        A: a matrix of shape (m, n) and rank m.
        b: a vector of shape (m,), or a number.

    Raises:
        ValueError: the shapes do not fit, or the rows of ``A`` are linearly dependent.

    Example:
        >>> from implicitdiff.projections import affine_set
        >>> A = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
        >>> affine_set(torch.tensor([1.0, 2.0, 3.0]), A, torch.tensor([1.0, 2.0]))
        tensor([0., 1., 1.])
    """
    point = Point.of("affine_set", v)
    if not isinstance(A, Tensor) or A.ndim != 2 or A.shape[0] > A.shape[1] or A.shape[1] != point.size:
        raise ValueError(
            f"affine_set: A has to be a matrix with {point.size} columns, as v has entries, and no more rows, "
            f"but it is {pytree.describe(A)}"
        )
    if isinstance(b, Tensor) and not broadcasts(b.shape, A.shape[:1]):
        raise ValueError(f"affine_set: b has to be of shape {list(A.shape[:1])}, but it is {pytree.describe(b)}")
    return point.map_flat(_onto_affine_set, A, b)


def _clamp(v: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    return torch.where(v >= upper, upper, torch.where(v <= lower, lower, v))


def _onto_simplex(v: Tensor, total: Tensor) -> Tensor:
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
    x = torch.where(support, moving - (_sum(moving) - total) / _sum(support), 0.0)
    # Rounding may put the least entry of the support below zero. Its derivative remains that of the support.
    return torch.where(x < 0, x - x.detach(), x)


def _onto_l1_ball(v: Tensor, radius: Tensor) -> Tensor:
    inside = _sum(v.abs()) < radius
    # For a v on the sphere, rounding must not bring zeros into the support.
    magnitude = torch.where(v == 0, -v.detach().abs().amax(0, keepdim=True), v.abs())
    return torch.where(inside, v, v.sign() * _onto_simplex(magnitude, torch.where(inside, 0.0, radius)))


def _onto_l2_ball(v: Tensor, radius: Tensor) -> Tensor:
    size = _size(v)
    square, radius = _sum((v / size).square()), radius / size
    inside = square.detach().sqrt() < radius
    # Inside it is v * 1 / 1: no branch that is not taken has a derivative, which could be nan.
    norm = torch.where(inside | (square == 0), 1.0, square).sqrt()
    return v * (torch.where(inside, 1.0, radius) / norm)


def _along(function: str, v: Any, a: Any, b: Number, step: Callable[[Tensor], Tensor]) -> Any:
    point = Point.of(function, v)
    normal, offset = point.flat(point.operands("a", a)), point.scalar("b", b)
    if not holds((normal != 0).any()):
        raise ValueError(f"{function}: a has to be other than zero, but it is {pytree.describe(a)} of zeros")
    size = _size(normal)
    normal = normal / size

    def project(v: Tensor, b: Tensor) -> Tensor:
        return v - normal * (step(_sum(normal * v) - b / size) / _sum(normal * normal))

    return point.map_flat(project, offset)


def _onto_affine_set(v: Tensor, A: Tensor, b: Tensor) -> Tensor:
    Q, R = torch.linalg.qr(A.mT)
    # A diagonal entry is what a row adds to the span of those before it.
    rows = torch.linalg.vector_norm(R.detach(), dim=0)
    if not holds(R.detach().diagonal().abs() > rows * (v.numel() * torch.finfo(v.dtype).eps)):
        raise ValueError("affine_set: the rows of A have to be finite and linearly independent, but they are not")
    step: Tensor = Q @ torch.linalg.solve_triangular(R.mT, (A @ v - b).unsqueeze(-1), upper=False)
    return v - step.squeeze(-1)


def _sum(v: Tensor) -> Tensor:
    return v.sum(0, keepdim=True)


def _size(v: Tensor) -> Tensor:
    """What to divide a vector by before it is squared, with no derivative."""
    largest = v.detach().abs().amax(0, keepdim=True)
    return torch.where(largest == 0, 1.0, largest)
