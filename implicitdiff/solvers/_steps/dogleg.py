"""Powell's dogleg: a step within a trust region, between that down the gradient and that of Gauss and Newton."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from implicitdiff.solvers._loop.problem import BatchedProblem, any_lane, row_dot, safe_divide, select, vecmat
from implicitdiff.solvers._loop.state import State
from implicitdiff.solvers._loop.status import Status
from implicitdiff.solvers._steps.backtracking import TrialPoint, backtrack
from implicitdiff.solvers._steps.least_squares import damped, normal_gradient, rounding_of_cost, units_of
from implicitdiff.solvers._steps.trust_region import MAX_REFUSALS, MIN_GAIN_RATIO, first_radius, length, scaling_of

_UNRESOLVED_GAIN = 4.0
"""The foretold gain, in units of the rounding of the cost, below which the gradient judges a step.

One that loses more than a unit is refused all the same: else a step that the gradient likes and one back that the cost
likes would alternate.
"""
_SCALE_DECAY = 0.95
"""What is left of a norm of a column after a step: a search may begin where it is far from that at the solution."""

WholeStep = Callable[[Tensor, Tensor], Tensor]
"""``whole(A, r)``: the ``s`` that makes ``|r + A s|`` least, whatever the rank of ``A``."""


class DoglegMemory(NamedTuple):
    """The memory of `dogleg` and `dogleg_root`.

    Attributes:
        residual: ``r(x)``, as one vector of length ``m``.
        jacobian: ``J = dr/dx``, ``(m, n)``.
        scale: ``D^2``, the squared norms of the columns of ``J``, at least 0.95 of the last ``D``, ``(n,)``.
        radius: of the trust region, the largest ``|D d|`` of a step ``d``.
        refusals: the number of steps in a row that were refused though they seemed good, as rounding hides the gain or
            the Jacobian is not finite.
        slow: the number of steps in a row that made ``|r|`` smaller by less than a thousandth.
    """

    residual: Tensor
    jacobian: Tensor
    scale: Tensor
    radius: Tensor
    refusals: Tensor
    slow: Tensor


class Trial(NamedTuple):
    """A step from ``x``.

    Attributes:
        x: where it leads.
        residual: there; that at the old ``x`` where it is not finite.
        length: ``|D d|``.
        foretold: what ``|r + J d|^2 / 2`` says that the step gains.
        gain: what it does gain; minus infinity where the residual is not finite.
        drowned: whether rounding of ``|r|^2 / 2`` hides what is foretold.
        loses: whether the step makes that larger by more than rounding.
        whole: the step without a trust region.
        promised: what it gains by the model, relative to ``|r|^2 / 2``.
    """

    x: Tensor
    residual: Tensor
    length: Tensor
    predicted: Tensor
    gain: Tensor
    unresolved: Tensor
    loses: Tensor
    whole: Tensor
    promised: Tensor

    @property
    def known(self) -> Tensor:
        """Whether the residual is finite."""
        return self.gain > -torch.inf

    @property
    def by_gradient(self) -> Tensor:
        """Whether rounding hides the gain, so that the gradient judges."""
        return self.known & self.unresolved & ~self.loses

    @property
    def good(self) -> Tensor:
        """Whether the gain is a part of what was foretold."""
        return self.gain > MIN_GAIN_RATIO * self.predicted


def initial_memory(problem: BatchedProblem, x: Tensor, radius: float) -> DoglegMemory:
    """The memory at an initial guess."""
    residual, jacobian = problem.fn.jacobian(x)
    scale = jacobian.square().sum(dim=1)
    none = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    first = radius * first_radius(x, residual, scale)
    return DoglegMemory(residual, jacobian, scale, first, refusals=none, slow=none)


def try_dogleg(
    problem: BatchedProblem, x: Tensor, state: State[DoglegMemory], whole: WholeStep
) -> tuple[Trial, Tensor]:
    """A dogleg step from ``x`` that gains enough, or so little that rounding hides it, and its radius, which is halved
    until there is one. Each radius takes an evaluation."""
    r, J, scale, radius, *_ = state.memory
    D, noise = scaling_of(scale), rounding_of_cost(problem, x, r, J, 0.5 * r.square())
    path = _dogleg_path(J / D[:, None], r, whole)

    def at(radius: Tensor) -> Trial:
        s, predicted = path.step(radius)
        new_x = x + s / D
        new_r = problem.fn(new_x)
        known = torch.isfinite(new_r).all(dim=-1)
        if any_lane(~known):
            # No derivative may pass through what is not finite, not even one that is multiplied by zero.
            new_x = select(known, new_x, x)
            new_r = select(known, new_r, r) if problem.plain else problem.fn(new_x)
        gain = torch.where(known, 0.5 * row_dot(r - new_r, r + new_r), -torch.inf)
        promised = safe_divide(path.gain(path.full), 0.5 * row_dot(r, r))
        unresolved = predicted <= _UNRESOLVED_GAIN * noise
        return Trial(new_x, new_r, length(s), predicted, gain, unresolved, gain < -noise, path.full / D, promised)

    def enough(new: TrialPoint, radius: Tensor) -> Tensor:
        trial = Trial(*new)
        return trial.good | trial.by_gradient

    farthest = torch.minimum(radius, length(path.full))
    new, halved, _ = backtrack(at, enough, farthest, state.status == Status.RUNNING)
    return Trial(*new), torch.where(halved < farthest, halved, radius)


def finish_step(
    x: Tensor,
    state: State[DoglegMemory],
    trial: Trial,
    radius: Tensor,
    accepted: Tensor,
    at_trial: tuple[Tensor, ...],
) -> tuple[Tensor, State[DoglegMemory]]:
    """The next point and its memory, with the status where no step will be accepted any more; the error is left.

    Args:
        x, state: the step's.
        trial, radius: what `try_dogleg` made of them.
        accepted: whether to go there.
        at_trial: the residual and the Jacobian there, in the lanes where that may be.
    """
    old = state.memory
    r, J = at_trial
    promising = (trial.good | trial.by_gradient) & (trial.x != x).any(dim=-1)
    accepted = accepted & promising & torch.isfinite(J).flatten(1).all(dim=-1)
    refusals = torch.where(accepted, 0, old.refusals + 1)
    stuck = ~accepted & (~promising | (refusals >= MAX_REFUSALS))
    r, J = select(accepted, r, old.residual), select(accepted, J, old.jacobian)
    slow = trial.gain < 1e-3 * row_dot(old.residual, old.residual)
    memory = DoglegMemory(
        residual=r,
        jacobian=J,
        scale=torch.maximum(_SCALE_DECAY**2 * old.scale, J.square().sum(dim=1)),
        radius=torch.where(accepted, _dogleg_radius(radius, trial), 0.25 * trial.length),
        refusals=refusals,
        slow=torch.where(slow, old.slow + 1, 0),
    )
    status = torch.where(stuck, int(Status.LINE_SEARCH_FAILED), state.status)
    x = select(accepted, trial.x, x)
    eps = torch.finfo(x.dtype).eps
    progress = state.progress.fallen(accepted & ~trial.unresolved)
    progress = progress.stepped(trial.whole, x, units_of(memory.jacobian))
    # A step that promises nothing is long where the Jacobian has not full rank.
    progress = progress._replace(step=torch.where(trial.promised <= eps ** (2 / 3), 0.0, progress.step))
    return x, state._replace(status=status, progress=progress, memory=memory)


class _Path(NamedTuple):
    """The dogleg: from 0 down the gradient ``g`` to the minimum of ``|r + A s|``, the Cauchy step, and on to that over
    all ``s``, the full step. Along it ``|s|`` grows and ``|r + A s|`` falls."""

    A: Tensor
    g: Tensor
    cauchy: Tensor
    full: Tensor

    def step(self, radius: Tensor) -> tuple[Tensor, Tensor]:
        """The last ``s`` with ``|s| <= radius``, and ``(|r|^2 - |r + A s|^2) / 2``."""
        way = self.full - self.cauchy
        reaches, beyond = length(self.full) <= radius, length(self.cauchy) >= radius
        # |cauchy + share way| = radius, in a form that does not cancel.
        a, b = row_dot(way, way), row_dot(self.cauchy, way)
        c = torch.where(reaches | beyond, 0.0, radius.square() - row_dot(self.cauchy, self.cauchy))
        square = b.square() + a * c
        share = safe_divide(c, b + torch.sqrt(torch.where(square > 0, square, 1.0)))
        down = -safe_divide(radius, length(self.g))[:, None] * self.g
        s = select(reaches, self.full, select(beyond, down, self.cauchy + share[:, None] * way))
        return s, self.gain(s)

    def gain(self, s: Tensor) -> Tensor:
        """``(|r|^2 - |r + A s|^2) / 2``."""
        change = vecmat(s, self.A.mT)
        return -row_dot(self.g, s) - 0.5 * row_dot(change, change)


def _dogleg_path(A: Tensor, r: Tensor, whole: WholeStep) -> _Path:
    g = normal_gradient(A, r)
    ratio = safe_divide(length(g), length(vecmat(g, A.mT)))
    return _Path(A, g, cauchy=-ratio.square()[:, None] * g, full=whole(A, r))


def _dogleg_radius(radius: Tensor, trial: Trial) -> Tensor:
    """By the ratio of the gain and what was foretold; where rounding hides them, the radius stays."""
    ratio = torch.where(trial.unresolved, 0.3, safe_divide(trial.gain, trial.predicted))
    longer = torch.where(ratio > 0.5, torch.maximum(radius, 2.0 * trial.length), radius)
    return torch.where(ratio < 0.1, 0.5 * trial.length, longer)


def regularised_step(A: Tensor, r: Tensor, *, eps: float) -> Tensor:
    """``argmin |r + A s|^2 + mu^2 |C s|^2``, which is unique whatever the rank of ``A``; ``C`` are the norms of its
    columns.

    A singular value of less than ``mu = eps^(2/3)`` counts as none, if the columns have norm 1. Where ``A`` determines
    nothing, rounding moves the step by about ``eps |r| / mu``.
    """
    squares = A.square().sum(dim=1)
    return damped(A, r, eps ** (4 / 3) * torch.where(squares > 0, squares, 1.0))
