"""Powell's dogleg: a step within a trust region, on the path from the steepest-descent minimum to the Gauss-Newton
step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from implicitdiff._torch.control import if_any
from implicitdiff.solvers._loop.problem import BatchedProblem, row_dot, safe_divide, select, vecmat
from implicitdiff.solvers._loop.state import State
from implicitdiff.solvers._loop.status import Status
from implicitdiff.solvers._steps.backtracking import TrialPoint, backtrack
from implicitdiff.solvers._steps.least_squares import damped, normal_gradient, rounding_of_cost, units_of
from implicitdiff.solvers._steps.trust_region import MAX_REFUSALS, MIN_GAIN_RATIO, first_radius, length, scaling_of

_UNRESOLVED_GAIN = 4.0
"""Predicted gain, in units of the rounding of the cost, below which the gradient judges a step."""
_SCALE_DECAY = 0.95
"""Factor of the norm of a column after a step, because the norms at an initial guess may be far from the norms at the
solution."""

WholeStep = Callable[[Tensor, Tensor], Tensor]
"""``whole(A, r)``: the minimiser ``s`` of ``|r + A s|``, for any rank of ``A``."""


class DoglegMemory(NamedTuple):
    """The memory of `dogleg` and `dogleg_root`.

    Attributes:
        residual: ``r(x)``, as one vector of length ``m``.
        jacobian: ``J = dr/dx``, ``(m, n)``.
        scale: ``D^2``, the squared norms of the columns of ``J``, at least 0.95 of the last ``D``, ``(n,)``.
        radius: the radius of the trust region, a bound on ``|D d|`` for steps ``d``.
        refusals: the number of consecutive steps that were refused although they seemed good: rounding hides the gain,
            or the Jacobian is not finite.
        slow: the number of consecutive steps that lowered ``|r|`` by less than a thousandth.
    """

    residual: Tensor
    jacobian: Tensor
    scale: Tensor
    radius: Tensor
    refusals: Tensor
    slow: Tensor


class Trial(NamedTuple):
    """A trial step from ``x``.

    Attributes:
        x: the end of the step.
        residual: the residual at the end; the old residual in lanes with a residual that is not finite.
        length: ``|D d|``.
        predicted: the gain predicted by the model ``|r + J d|^2 / 2``.
        gain: the actual gain; minus infinity in lanes with a residual that is not finite.
        unresolved: True if rounding of ``|r|^2 / 2`` hides the predicted gain.
        loses: True if the cost increases by more than rounding.
        whole: the step without a trust region.
        promised: the gain predicted for the whole step, relative to ``|r|^2 / 2``.
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
        """True if the residual is finite."""
        return self.gain > -torch.inf

    @property
    def by_gradient(self) -> Tensor:
        """True if rounding hides the gain, so that the gradient must judge the step."""
        # A step that loses more than rounding is refused: otherwise a step that the gradient accepts and a step back
        # that the cost accepts could alternate.
        return self.known & self.unresolved & ~self.loses

    @property
    def good(self) -> Tensor:
        """True if the gain is a sufficient part of the prediction."""
        return self.gain > MIN_GAIN_RATIO * self.predicted


def initial_memory(problem: BatchedProblem, x: Tensor, radius: float) -> DoglegMemory:
    """Return the memory at an initial guess."""
    residual, jacobian = problem.fn.jacobian(x)
    scale = jacobian.square().sum(dim=1)
    zeros = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    # ``D`` begins as the norms of the columns, so the first radius has the units of ``r``.
    first = radius * first_radius(x, residual, scale)
    return DoglegMemory(residual, jacobian, scale, first, refusals=zeros, slow=zeros)


def try_dogleg(
    problem: BatchedProblem, x: Tensor, state: State[DoglegMemory], whole: WholeStep
) -> tuple[Trial, Tensor]:
    """Return an acceptable dogleg step from ``x``, or a step whose gain rounding hides, and its radius. The radius is
    halved until the step is acceptable, at the cost of one evaluation each."""
    r, J, scale, radius, *_ = state.memory
    D, noise = scaling_of(scale), rounding_of_cost(problem, x, r, J, 0.5 * r.square())
    # In the variable ``s = D d`` the region is a ball, and columns of ``J D^-1`` have norms of at most 1.
    path = _dogleg_path(J / D[:, None], r, whole)

    def at(radius: Tensor) -> Trial:
        s, predicted = path.step(radius)
        new_x = x + s / D
        new_r = problem.fn(new_x)
        known = torch.isfinite(new_r).all(dim=-1)

        def inside(new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            # Evaluate again without the points outside of the domain: ``0 * inf`` in the backward of a masked value is
            # nan.
            new_x = select(known, new[0], x)
            return new_x, select(known, new[1], r) if problem.plain else problem.fn(new_x)

        new_x, new_r = if_any(~known, inside, (new_x, new_r))
        # ``(|r|^2 - |new_r|^2) / 2`` as a product, without cancellation.
        gain = torch.where(known, 0.5 * row_dot(r - new_r, r + new_r), -torch.inf)
        promised = safe_divide(path.gain(path.full), 0.5 * row_dot(r, r))
        # The gain is a difference of two costs, each with the rounding `noise`.
        unresolved = predicted <= _UNRESOLVED_GAIN * noise
        return Trial(new_x, new_r, length(s), predicted, gain, unresolved, gain < -noise, path.full / D, promised)

    def enough(new: TrialPoint, radius: Tensor) -> Tensor:
        trial = Trial(*new)
        return trial.good | trial.by_gradient

    # A radius beyond the full step would repeat the same trial at each halving.
    farthest = torch.minimum(radius, length(path.full))
    new, halved, _ = backtrack(at, enough, farthest, state.status == Status.RUNNING)
    # The search starts inside of the region; unless halved, the region stays as large as before.
    return Trial(*new), torch.where(halved < farthest, halved, radius)


def finish_step(
    x: Tensor,
    state: State[DoglegMemory],
    trial: Trial,
    radius: Tensor,
    accepted: Tensor,
    at_trial: Sequence[Tensor],
) -> tuple[Tensor, State[DoglegMemory]]:
    """Return the next point and state, without the error; lanes without further acceptable steps get the status
    LINE_SEARCH_FAILED.

    Args:
        x: the start of the step.
        state: the state at `x`.
        trial: the step of `try_dogleg`.
        radius: its radius.
        accepted: True in lanes that shall go to the end of the step.
        at_trial: the residual and the Jacobian at the end, in lanes that may go there.
    """
    old = state.memory
    r, J = at_trial
    # A step that rounds to zero cannot help.
    promising = (trial.good | trial.by_gradient) & (trial.x != x).any(dim=-1)
    # The function may be finite at a point without a finite Jacobian.
    accepted = accepted & promising & torch.isfinite(J).flatten(1).all(dim=-1)
    # Stuck: no promising step at any radius, or several promising steps refused in a row.
    refusals = torch.where(accepted, 0, old.refusals + 1)
    stuck = ~accepted & (~promising | (refusals >= MAX_REFUSALS))
    r, J = select(accepted, r, old.residual), select(accepted, J, old.jacobian)
    # ``(|r|^2 - |r_new|^2) / 2 < |r|^2 / 1000``: ``|r|`` decreases by less than a thousandth.
    slow = trial.gain < 1e-3 * row_dot(old.residual, old.residual)
    memory = DoglegMemory(
        residual=r,
        jacobian=J,
        # ``D`` may shrink, unlike in MINPACK, but slowly: a jump of ``D`` would change the meaning of the radius.
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
    # Ignore a long step along the null space of a Jacobian, which predicts no gain.
    progress = progress._replace(step=torch.where(trial.promised <= eps ** (2 / 3), 0.0, progress.step))
    return x, state._replace(status=status, progress=progress, memory=memory)


class _Path(NamedTuple):
    """The dogleg path: from 0 along ``-g`` to the minimum of ``|r + A s|`` on that line, the Cauchy step, then straight
    to the minimum over all ``s``, the full step. Along the path ``|s|`` increases and ``|r + A s|`` decreases (Nocedal
    and Wright, 2nd ed., lemma 4.2)."""

    A: Tensor
    g: Tensor
    cauchy: Tensor
    full: Tensor

    def step(self, radius: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last ``s`` of the path with ``|s| <= radius``, and its `gain`."""
        way = self.full - self.cauchy
        # Three cases: the full step is inside, the Cauchy step is outside, or the boundary lies between the two.
        reaches, beyond = length(self.full) <= radius, length(self.cauchy) >= radius
        # Solve ``|cauchy + share way| = radius``, ``a share^2 + 2 b share = c``, by the root that does not cancel.
        a, b = row_dot(way, way), row_dot(self.cauchy, way)
        c = torch.where(reaches | beyond, 0.0, radius.square() - row_dot(self.cauchy, self.cauchy))
        square = b.square() + a * c
        # ``(-b + sqrt(b^2 + a c)) / a = c / (b + sqrt(b^2 + a c))``; ``b >= 0``, because ``|s|`` grows along the path.
        share = safe_divide(c, b + torch.sqrt(torch.where(square > 0, square, 1.0)))
        # On the first leg the boundary is met along ``-g``, at the distance `radius`.
        down = -safe_divide(radius, length(self.g))[:, None] * self.g
        s = select(reaches, self.full, select(beyond, down, self.cauchy + share[:, None] * way))
        return s, self.gain(s)

    def gain(self, s: Tensor) -> Tensor:
        """Return ``(|r|^2 - |r + A s|^2) / 2``."""
        change = vecmat(s, self.A.mT)
        # ``|r + A s|^2 = |r|^2 + 2 g's + |A s|^2`` with ``g = A'r``, so no difference of squares remains.
        return -row_dot(self.g, s) - 0.5 * row_dot(change, change)


def _dogleg_path(A: Tensor, r: Tensor, whole: WholeStep) -> _Path:
    """Make the path of ``|r + A s|``."""
    g = normal_gradient(A, r)
    # The minimum of ``|r - t A g|`` is at ``t = |g|^2 / |A g|^2``. The quotient of the lengths is squared, because
    # ``|g|^2`` may overflow.
    ratio = safe_divide(length(g), length(vecmat(g, A.mT)))
    return _Path(A, g, cauchy=-ratio.square()[:, None] * g, full=whole(A, r))


def _dogleg_radius(radius: Tensor, trial: Trial) -> Tensor:
    """Return the next radius by the ratio of actual and predicted gain; a ratio hidden by rounding keeps the radius."""
    # 0.3 lies between the two thresholds.
    ratio = torch.where(trial.unresolved, 0.3, safe_divide(trial.gain, trial.predicted))
    # Thresholds and factors as in MINPACK's hybrj.
    longer = torch.where(ratio > 0.5, torch.maximum(radius, 2.0 * trial.length), radius)
    return torch.where(ratio < 0.1, 0.5 * trial.length, longer)


def regularised_step(A: Tensor, r: Tensor, *, eps: float) -> Tensor:
    """Return ``argmin |r + A s|^2 + mu^2 |C s|^2``, unique for any rank of ``A``; ``C`` holds the norms of the columns
    of ``A``.

    ``mu = eps^(2/3)`` treats singular values below ``mu``, of ``A`` with columns of norm 1, as zero. Along a null space
    of ``A`` rounding moves the step by about ``eps |r| / mu``.
    """
    squares = A.square().sum(dim=1)
    return damped(A, r, eps ** (4 / 3) * torch.where(squares > 0, squares, 1.0))
