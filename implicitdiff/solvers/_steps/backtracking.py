"""Backtracking: halve a step, lane by lane, until it is good enough."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from implicitdiff.solvers._loop.problem import BatchedProblem, any_lane, row_dot, select

TrialPoint = tuple[Tensor, ...]
"""Where a step leads, and what is known there; all with the lanes in front."""

GROWTH = 1.25
"""What the last size of a step is multiplied by before the next."""
HALVINGS = 60


def backtrack(
    at: Callable[[Tensor], TrialPoint],
    enough: Callable[[TrialPoint, Tensor], Tensor],
    size: Tensor,
    active: Tensor,
    halvings: int = HALVINGS,
) -> tuple[TrialPoint, Tensor, Tensor]:
    """The first of the steps ``size, size / 2, ...`` that is good enough.

    Args:
        at: the point of a size.
        enough: whether a point, and the size that led to it, will do.
        size: the first size, ``(lanes,)``.
        active: the lanes that count; the others keep their first point.
        halvings: how many there may be.

    Returns:
        The points, the sizes, and the active lanes in which no size will do.
    """
    new = at(size)
    refused = active & ~enough(new, size)
    for _ in range(halvings):
        if not any_lane(refused):
            break
        size = torch.where(refused, size / 2, size)
        new = tuple(select(refused, a, b) for a, b in zip(at(size), new, strict=True))
        refused = refused & ~enough(new, size)
    return new, size, refused


def lies_below(problem: BatchedProblem, old: TrialPoint, new: TrialPoint, bound: Tensor) -> Tensor:
    """Whether the objective at a new point lies below its linearisation at the old one plus `bound`; the points are
    ``(x, value, grad)``."""
    d = new[0] - old[0]
    below = new[1] <= old[1] + row_dot(old[2], d) + bound
    # Where rounding drowns the values, the gradients tell.
    unresolved = bound <= 100.0 * problem.eps * torch.maximum(old[1].abs(), new[1].abs())
    return torch.where(unresolved, row_dot(d, new[2] - old[2]) <= 2.0 * bound, below)
