"""Projections onto hyperplanes, halfspaces and affine sets."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import implicitdiff._torch.trees as pytree
from implicitdiff._torch.trees import Number, Tree, X
from implicitdiff.projections._point import Point, check_vector, holds, scale_of, sum_of


def hyperplane(v: X, a: Tree, b: Number) -> X:
    """Project onto ``{x: a.x = b}``, ``v`` being one vector.

    The result is ``v - a (a.v - b) / (a.a)``.

    Args:
        v: a tensor or a tree.
        a: the normal: a tree like ``v``, or one that broadcasts to ``v`` as the bounds of a `box` do; not zero.
        b: a number or a scalar tensor.

    Raises:
        ValueError: ``a`` is zero or does not fit ``v``.

    Example:
        >>> from implicitdiff.projections import hyperplane
        >>> hyperplane(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]), 1.0)
        tensor([0., 1.])
    """
    return _along("hyperplane", v, a, b, lambda excess: excess)


def halfspace(v: X, a: Tree, b: Number) -> X:
    """Project onto ``{x: a.x <= b}``, ``v`` being one vector.

    The result is ``v - a max(a.v - b, 0) / (a.a)``.

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


def affine_set(v: X, A: Tensor, b: Number) -> X:
    """Project onto ``{x: A x = b}``, ``v`` being one vector.

    The result is ``v - A' (A A')^-1 (A v - b)``, computed from a QR factorisation of ``A'``, which does not square the
    condition number of ``A``.

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
    # More rows than columns are linearly dependent.
    if not isinstance(A, Tensor) or A.shape[1:] != (point.size,) or len(A) > point.size:
        raise ValueError(
            f"affine_set: A must be a matrix with {point.size} columns, as v has entries, and no more rows, "
            f"got {pytree.describe(A)}"
        )
    check_vector("affine_set", "b", b, len(A))
    return point.map_flat(_onto_affine_set, A, b)


def _along(function: str, v: Tree, a: Tree, b: Number, step: Callable[[Tensor], Tensor]) -> Tree:
    point = Point.of(function, v)
    offset, normal = point.scalar("b", b), point.normal("a", a)
    # Scaled so that a.a neither overflows nor underflows.
    size = scale_of(normal)
    normal = normal / size

    def project(v: Tensor, b: Tensor) -> Tensor:
        # A stationary point of ``|x - v|^2 / 2 + t (a.x - b)`` is ``v - t a``, and ``a.x = b`` gives
        # ``t = (a.v - b) / a.a``. A half space needs ``t >= 0``.
        return v - normal * (step(sum_of(normal * v) - b / size) / sum_of(normal * normal))

    return point.map_flat(project, offset)


def _onto_affine_set(v: Tensor, A: Tensor, b: Tensor) -> Tensor:
    Q, R = torch.linalg.qr(A.mT)
    # A' = Q R: R_kk is the distance of row k of A from the span of earlier rows, compared with the length of row k.
    rows = torch.linalg.vector_norm(R.detach(), dim=0)
    if not holds(R.detach().diagonal().abs() > rows * (v.numel() * torch.finfo(v.dtype).eps)):
        raise ValueError("affine_set: the rows of A must be finite and linearly independent, got rows that are not")
    # A' (A A')^-1 = Q R (R' R)^-1 = Q R'^-1. Stationarity gives ``x = v - A'y``, and ``A x = b`` gives
    # ``A A'y = A v - b``.
    step: Tensor = Q @ torch.linalg.solve_triangular(R.mT, (A @ v - b).unsqueeze(-1), upper=False)
    return v - step.squeeze(-1)
