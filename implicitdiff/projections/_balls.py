"""Projections onto balls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from implicitdiff.projections._point import Number, Point, holds, size_of, sum_of
from implicitdiff.projections._simplices import nonempty, onto_simplex


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


def l1_sphere(v: Any, radius: Number = 1.0) -> Any:
    """Project onto ``{x: sum(|x|) = radius}``, ``v`` being one vector.

    That is the sign of ``v`` times the projection of ``|v|`` onto the simplex of total ``radius``. The set is not
    convex: inside of it, the result jumps where an entry of ``v`` changes its sign. An entry that is 0 counts as
    positive there, with the derivative of that side.

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


def l2_sphere(v: Any, radius: Number = 1.0) -> Any:
    """Project onto ``{x: |x| = radius}`` in the Euclidean norm, ``v`` being one vector.

    That is ``v radius / |v|``. The set is not convex. To ``v = 0`` all of its points are equally near, and no choice of
    one would have a derivative: unless ``radius`` is 0, that is an error, and ``nan`` inside of ``torch.compile``.

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
    # For a v on the sphere, rounding must not bring zeros into the support.
    magnitude = torch.where(v == 0, -v.detach().abs().amax(0, keepdim=True), v.abs())
    return torch.where(inside, v, v.sign() * onto_simplex(magnitude, torch.where(inside, 0.0, radius)))


def _onto_l2_ball(v: Tensor, radius: Tensor) -> Tensor:
    size = size_of(v)
    square, radius = sum_of((v / size).square()), radius / size
    inside = square.detach().sqrt() < radius
    # Inside it is v * 1 / 1: no branch that is not taken has a derivative, which could be nan.
    norm = torch.where(inside | (square == 0), 1.0, square).sqrt()
    return v * (torch.where(inside, 1.0, radius) / norm)


def _onto_l1_sphere(v: Tensor, radius: Tensor) -> Tensor:
    sign = torch.where(v.detach() < 0, -1.0, 1.0)
    return sign * onto_simplex(sign * v, radius)


def _onto_l2_sphere(v: Tensor, radius: Tensor) -> Tensor:
    if not holds((v != 0).any(0, keepdim=True) | (radius == 0)):
        raise ValueError(
            "l2_sphere: v has to be other than zero, to which all points of the sphere are equally near, but it is zero"
        )
    size = size_of(v)
    square = sum_of((v / size).square())
    # For a sphere that is a point.
    norm = torch.where((radius == 0) & (square == 0), 1.0, square).sqrt()
    return v * (radius / size / norm)
