"""Backtracking: a step is halved, lane by lane, until the new point is acceptable."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from implicitdiff._torch.control import repeat
from implicitdiff.solvers._loop.problem import BatchedProblem, row_dot, select

TrialPoint = tuple[Tensor, ...]
"""A trial point with the values computed at the point, all with the lanes in front."""

GROWTH = 1.25
"""Factor from the last step size to the next first trial."""
HALVINGS = 60
"""Default bound on the number of halvings."""


def backtrack(
    at: Callable[[Tensor], TrialPoint],
    enough: Callable[[TrialPoint, Tensor], Tensor],
    size: Tensor,
    active: Tensor,
    halvings: int = HALVINGS,
) -> tuple[TrialPoint, Tensor, Tensor]:
    """Return the first acceptable of the steps ``size, size / 2, ...``.

    Args:
        at: returns the point for a step size.
        enough: True in lanes whose point, for the given size, is acceptable; False where the point has no value.
        size: the first size, ``(lanes,)``.
        active: the lanes to search; the others keep their first point, so give them size 0.
        halvings: bound on the number of halvings.

    Returns:
        The points, the sizes, and the active lanes without an acceptable size.
    """

    def halve(trial: _Halved) -> _Halved:
        # All lanes are evaluated again, but only refused lanes take the new point.
        new, size, refused = trial
        size = torch.where(refused, size / 2, size)
        new = tuple(select(refused, a, b) for a, b in zip(at(size), new, strict=True))
        # A lane once accepted keeps its point, because the flag never returns.
        return _Halved(new, size, refused & ~enough(new, size))

    # A plain tuple, as `halve` returns it.
    new = tuple(at(size))
    first = _Halved(new, size, active & ~enough(new, size))
    new, size, refused = repeat(halve, first, attrgetter("refused"), halvings)
    return new, size, refused


class _Halved(NamedTuple):
    """The points, the sizes, and the active lanes without an acceptable size."""

    new: TrialPoint
    size: Tensor
    refused: Tensor


def lies_below(problem: BatchedProblem, old: TrialPoint, new: TrialPoint, bound: Tensor) -> Tensor:
    """True in lanes whose objective at the new point is at most its linearisation at the old point plus `bound`; points
    are ``(x, value, grad)``."""
    d = new[0] - old[0]
    # The quadratic upper bound of the model, with `bound` for ``|d|^2 / (2 size)`` or its Bregman analogue.
    below = new[1] <= old[1] + row_dot(old[2], d) + bound
    # If rounding of the values exceeds the bound, compare gradients: for a quadratic ``f``, ``f(new) - f(old) - g'd``
    # is ``(g_new - g)'d / 2``.
    unresolved = bound <= 100.0 * problem.eps * torch.maximum(old[1].abs(), new[1].abs())
    return torch.where(unresolved, row_dot(d, new[2] - old[2]) <= 2.0 * bound, below)
