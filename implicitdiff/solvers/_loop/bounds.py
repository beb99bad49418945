"""Bounds on the unknowns: the user's argument, and the form in which an iteration uses the bounds."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

import implicitdiff._torch.trees as pytree
from implicitdiff.solvers._loop.problem import BatchedProblem

Bound: TypeAlias = Any  # a number, a tensor that broadcasts to every leaf, a tree of these like the unknowns, or None


class Limits(NamedTuple):
    """Lower and upper bounds of the unknowns as rows, ``(lanes, n)``; infinite for unknowns without a bound."""

    lower: Tensor
    upper: Tensor

    def clip(self, x: Tensor) -> Tensor:
        """Return the nearest point of the box."""
        # Not `torch.clamp`: at a bound the derivative must be that of the bound alone.
        return torch.where(x >= self.upper, self.upper, torch.where(x <= self.lower, self.lower, x))

    def residual(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Return ``x - clip(x - gradient)``, equal to `gradient` without rounding of ``x`` for unknowns inside the
        box."""
        ahead = x - gradient
        # ``x - clip(x - g)`` inside of the box is ``g`` up to rounding of ``x``: return ``g`` itself.
        inside = torch.where(ahead <= self.lower, x - self.lower, gradient)
        return torch.where(ahead >= self.upper, x - self.upper, inside)

    def held(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Return the unknowns at a bound that a step along the negative gradient would violate."""
        return ((x <= self.lower) & (gradient > 0)) | ((x >= self.upper) & (gradient < 0))

    def free_gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient, with 0 for the unknowns that are `held`."""
        return torch.where(self.held(x, gradient), 0.0, gradient)

    def ahead(self, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Return each unknown's bound in the direction of motion, and the flags of unknowns with such a finite bound;
        the bound is 0 for the other unknowns."""
        bound = torch.where(direction > 0, self.upper, self.lower)
        known = torch.isfinite(bound) & (direction != 0)
        return torch.where(known, bound, 0.0), known


def limits_of(name: str, bounds: tuple[Bound, Bound]) -> tuple[Bound, Bound]:
    """Return a user's lower and upper bounds, with infinite bounds in the place of None."""
    if not (isinstance(bounds, (tuple, list)) and len(bounds) == 2):
        raise ValueError(
            f"{name}: bounds must be a pair (lower, upper) of numbers, tensors or trees like params, got "
            f"{pytree.describe(bounds)}"
        )
    lower, upper = bounds
    return _filled(lower, -math.inf), _filled(upper, math.inf)


def _filled(bound: Bound, absent: float) -> Bound:
    return pytree.map_leaves(lambda leaf: absent if leaf is None else leaf, bound)


def limits_on(problem: BatchedProblem) -> Limits:
    """Return the bounds of a problem whose equation is a `boxed_equation`."""
    return problem.once(_limits)


def _limits(problem: BatchedProblem) -> Limits:
    """Return the bounds as projections of infinite points: the user's bounds reach an iteration only through the
    function "box"."""
    inputs, clip = problem.inputs, problem.function("box")
    # Infinite points project onto the bounds themselves.
    far = torch.full((math.prod(inputs.batch), inputs.dimension), math.inf, dtype=inputs.dtype, device=inputs.device)
    return Limits(clip(-far), clip(far))
