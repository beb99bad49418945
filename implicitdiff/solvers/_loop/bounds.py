"""Bounds on the unknowns: what a user gives, and what a method sees of them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

import implicitdiff._torch.trees as pytree
from implicitdiff.solvers._loop.problem import BatchedProblem


class Limits(NamedTuple):
    """The least and the greatest values of the unknowns on rows, ``(lanes, n)``; infinite where there is none."""

    lower: Tensor
    upper: Tensor

    def clip(self, x: Tensor) -> Tensor:
        """The nearest point of the box."""
        return torch.where(x >= self.upper, self.upper, torch.where(x <= self.lower, self.lower, x))

    def residual(self, x: Tensor, gradient: Tensor) -> Tensor:
        """``x - clip(x - gradient)``, without the rounding of ``x`` where that is the gradient."""
        ahead = x - gradient
        inside = torch.where(ahead <= self.lower, x - self.lower, gradient)
        return torch.where(ahead >= self.upper, x - self.upper, inside)

    def held(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The unknowns that a step along the negative gradient would take out of the box at once."""
        return ((x <= self.lower) & (gradient > 0)) | ((x >= self.upper) & (gradient < 0))

    def free_gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The gradient, with 0 for the unknowns that are `held`."""
        return torch.where(self.held(x, gradient), 0.0, gradient)

    def ahead(self, direction: Tensor) -> tuple[Tensor, Tensor]:
        """The bound that each unknown has in front of it, 0 where that is infinite or it does not move, and the flags
        of those that have one."""
        bound = torch.where(direction > 0, self.upper, self.lower)
        known = torch.isfinite(bound) & (direction != 0)
        return torch.where(known, bound, 0.0), known


def limits_of(name: str, bounds: Any) -> tuple[Any, Any]:
    """The lower and upper bounds of a user, infinite in the place of None."""
    if not (isinstance(bounds, (tuple, list)) and len(bounds) == 2):
        raise ValueError(
            f"{name}: bounds must be a pair (lower, upper) of numbers, tensors or trees like params, got "
            f"{pytree.describe(bounds)}"
        )
    lower, upper = bounds
    return _filled(lower, -math.inf), _filled(upper, math.inf)


def _filled(bound: Any, absent: float) -> Any:
    return pytree.map_leaves(lambda leaf: absent if leaf is None else leaf, bound)


def limits_on(problem: BatchedProblem) -> Limits:
    """The bounds of a problem whose equation is `_equations.boxed_equation`."""
    return problem.once(_limits)  # type: ignore[no-any-return]


def _limits(problem: BatchedProblem) -> Limits:
    """By projecting from beyond."""
    inputs, clip = problem.inputs, problem.function("box")
    far = torch.full((math.prod(inputs.batch), inputs.dimension), math.inf, dtype=inputs.dtype, device=inputs.device)
    return Limits(clip(-far), clip(far))
