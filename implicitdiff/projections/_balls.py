"""Projections onto balls and spheres."""

from __future__ import annotations

import torch
from torch import Tensor

from implicitdiff._torch.trees import Number, X
from implicitdiff.projections._point import Point, holds, scale_of, sum_of
from implicitdiff.projections._simplices import nonempty, onto_simplex


def l1_ball(v: X, radius: Number = 1.0) -> X:
    """Project onto ``{x: sum(|x|) <= radius}``, ``v`` being one vector.

    For ``v`` outside, the result is ``sign(v)`` times the projection of ``|v|`` onto the simplex of total ``radius``.

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


def l2_ball(v: X, radius: Number = 1.0) -> X:
    """Project onto ``{x: |x| <= radius}`` in the Euclidean norm, ``v`` being one vector.

    The result is ``v min(1, radius / |v|)``.

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


def l1_sphere(v: X, radius: Number = 1.0) -> X:
    """Project onto ``{x: sum(|x|) = radius}``, ``v`` being one vector.

    The result is ``sign(v)`` times the projection of ``|v|`` onto the simplex of total ``radius``. The set is not
    convex: for ``v`` inside, the result jumps where an entry changes its sign. An entry 0 counts as positive, with the
    derivative of the positive side.

    Args:
        v: a tensor or a tree.
        radius: at least 0.

    Raises:
        ValueError: ``radius`` is negative, or ``v`` has no entry.

    Example:
        >>> from implicitdiff.projections import l1_sphere
        >>> l1_sphere(torch.tensor([0.25, -0.5, 0.0]))
        tensor([ 0.3333, -0.5833,  0.0833])
    """
    point = nonempty("l1_sphere", v)
    return point.map_flat(_onto_l1_sphere, point.scalar("radius", radius, least=0.0))


def l2_sphere(v: X, radius: Number = 1.0) -> X:
    """Project onto ``{x: |x| = radius}`` in the Euclidean norm, ``v`` being one vector.

    The result is ``v radius / |v|``. The set is not convex: all its points are equally near to ``v = 0``, and no choice
    has a derivative. Unless ``radius`` is 0, ``v = 0`` raises, and gives ``nan`` under ``torch.compile``.

    Args:
        v: a tensor or a tree, not zero.
        radius: at least 0.

    Raises:
        ValueError: ``radius`` is negative, or ``v`` is zero, or has no entry, and ``radius`` is not zero.

    Example:
        >>> from implicitdiff.projections import l2_sphere
        >>> l2_sphere(torch.tensor([0.3, -0.4]))
        tensor([ 0.6000, -0.8000])
    """
    point = nonempty("l2_sphere", v)
    return point.map_flat(_onto_l2_sphere, point.scalar("radius", radius, least=0.0))


def _onto_l1_ball(v: Tensor, radius: Tensor) -> Tensor:
    inside = sum_of(v.abs()) < radius
    # For v on the sphere the threshold is 0 up to rounding. Zeros of v are replaced by negative numbers, so that a
    # slightly negative threshold cannot take them into the support and change the derivative.
    magnitude = torch.where(v == 0, -v.detach().abs().amax(0, keepdim=True), v.abs())
    # For v inside, the radius may be infinite; the unused branch is computed for total 0, with finite derivatives.
    return torch.where(inside, v, v.sign() * onto_simplex(magnitude, torch.where(inside, 0.0, radius)))


def _onto_l2_ball(v: Tensor, radius: Tensor) -> Tensor:
    size = scale_of(v)
    # ``radius / |v| = (radius / size) / |v / size|``, without overflow or underflow of the squares.
    square, radius = sum_of((v / size).square()), radius / size
    inside = square.detach().sqrt() < radius
    # Inside, the result is v * 1 / 1: `torch.where` around v / |v| would multiply an infinite derivative by 0.
    norm = torch.where(inside | (square == 0), 1.0, square).sqrt()
    return v * (torch.where(inside, 1.0, radius) / norm)


def _onto_l1_sphere(v: Tensor, radius: Tensor) -> Tensor:
    # By symmetry the nearest point lies in the orthant of ``v``, and the sphere is a simplex in each orthant.
    sign = torch.where(v.detach() < 0, -1.0, 1.0)
    return sign * onto_simplex(sign * v, radius)


def _onto_l2_sphere(v: Tensor, radius: Tensor) -> Tensor:
    if not holds((v != 0).any(0, keepdim=True) | (radius == 0)):
        raise ValueError(
            "l2_sphere: v must be other than zero, because zero has the same distance to all points of the sphere"
        )
    size = scale_of(v)
    square = sum_of((v / size).square())
    # A sphere of radius 0 is a point, and the result 0 for every v.
    norm = torch.where((radius == 0) & (square == 0), 1.0, square).sqrt()
    return v * (radius / size / norm)
