"""The state of a solver: the same fields for every method, and one field for the memory of the method."""

from __future__ import annotations

from typing import Any, Generic, Protocol

import torch
from torch import Tensor
from typing_extensions import (  # typing's own cannot be generic on Python 3.10; torch requires this package
    NamedTuple,
    TypeVar,
)

import implicitdiff._torch.levels as _levels
from implicitdiff.solvers._loop.problem import largest_entry, row_norm, safe_divide
from implicitdiff.solvers._loop.status import Status

MemoryT = TypeVar("MemoryT", default=Any)

PATIENCE = 4
"""Number of iterations without a smaller error before the first measurement of the rounding floor."""


class ObjectiveMemory(Protocol):
    """The fields of a minimiser's memory that a line search reads.

    Attributes:
        value: the objective.
        grad: its gradient.
        magnitude: the largest absolute value of the objective so far.
    """

    @property
    def value(self) -> Tensor: ...
    @property
    def grad(self) -> Tensor: ...
    @property
    def magnitude(self) -> Tensor: ...


class ResidualMemory(Protocol):
    """A memory with the residual of a system of equations."""

    @property
    def residual(self) -> Tensor: ...


class GrowthMemory(Protocol):
    """A memory with the growth of the residual, see `newton`."""

    @property
    def growth(self) -> Tensor: ...


class JacobianMemory(ResidualMemory, Protocol):
    """A memory with a residual and a Jacobian."""

    @property
    def jacobian(self) -> Tensor: ...


ObjectiveMemoryT = TypeVar("ObjectiveMemoryT", bound=ObjectiveMemory)
ResidualMemoryT = TypeVar("ResidualMemoryT", bound=ResidualMemory)
GrowthMemoryT = TypeVar("GrowthMemoryT", bound=GrowthMemory)


class Progress(NamedTuple):
    """Progress of a search as the stopping rule of `implicitdiff.solvers` tracks it.

    Attributes:
        best: the smallest error so far; decreases of less than a tenth are ignored.
        idle: the number of iterations since the last update of ``best``, or since a step that lowered the objective by
            more than rounding.
        still: the number of steps of length zero in a row.
        step: the length of the last Newton-type step relative to the unknowns, ``|d| / max(|x|, eps^(1/6) |reach|)``.
            For least squares the largest over the unknowns of ``c |d| / max(c |x|, eps^(1/3) |c reach|)``, ``c`` being
            the norm of the unknown's column of the Jacobian. 0 before the first step, and for methods without
            Newton-type steps.
        reach: the largest absolute values of the unknowns so far, ``(n,)``, multiplied by 0.9 after each step: the
            scale of a step if the solution is zero. Empty for methods without Newton-type steps.
        patience: the value of ``idle`` at which the rounding floor is measured next.
        floor: the rounding floor of ``error`` at its last measurement; 0 before the first.
        enough: an error that is accepted if the search makes no further progress; 0 if there is none.
    """

    best: Tensor
    idle: Tensor
    still: Tensor
    step: Tensor
    reach: Tensor
    patience: Tensor
    floor: Tensor
    enough: Tensor

    def stepped(self, d: Tensor, x: Tensor, units: Tensor | None = None) -> Progress:
        """Return the progress after a Newton-type step `d` at `x`; the search may have made a part of the step only.

        `units` are norms of the columns of a Jacobian; with `units` the step is measured unknown by unknown.
        """
        # The decay forgets an initial guess far from the solution.
        # By 0.9 a step, a factor of 10 is forgotten in 22 steps.
        reach, eps = torch.maximum(0.9 * self.reach, x.detach().abs()), torch.finfo(x.dtype).eps
        if units is None:
            step = safe_divide(row_norm(d), self._replace(reach=reach).scale(x))
        else:
            d, x, far = units * d.detach().abs(), units * x.detach().abs(), units * reach
            least = eps ** (1 / 3) * row_norm(far)[:, None]
            step = largest_entry(safe_divide(d, torch.maximum(x, least)))
        return self._replace(step=step, reach=reach)

    def scale(self, x: Tensor) -> Tensor:
        """Return the length that a step at `x` is compared with: ``eps^(1/6)`` of the largest values so far if the
        solution is zero."""
        return torch.maximum(row_norm(x), torch.finfo(x.dtype).eps ** (1 / 6) * row_norm(self.reach))

    def fallen(self, where: Tensor) -> Progress:
        """Return the progress after a step that lowered the objective by more than rounding in the flagged lanes."""
        # `idle` becomes 0 when the stopping rule counts this iteration.
        return self._replace(idle=torch.where(where, -1, self.idle))


class State(NamedTuple, Generic[MemoryT]):
    """The state of every solver; each tensor has one value for each lane of a vmap.

    Attributes:
        iter_num: the number of iterations so far.
        error: Euclidean norm of the optimality condition at the current unknowns.
        target: the error at which the search ends.
        status: a `Status`.
        history: the errors of a run with ``keep_history=True``, ``(iterations + 1,)``, else empty.
        progress: the stopping rule's `Progress`.
        memory: the memory of the method, such as an `LbfgsMemory`.
    """

    iter_num: Tensor
    error: Tensor
    target: Tensor
    status: Tensor
    history: Tensor
    progress: Progress
    memory: MemoryT

    def __repr__(self) -> str:
        try:
            statuses, iterations, errors = (
                _levels.base(t).reshape(-1).tolist() for t in (self.status, self.iter_num, self.error)
            )
            return _summary(statuses, iterations, errors)
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
            # After `tree_map` the fields may be anything; tensors on the meta device have no values.
            return f"State{tuple(self)!r}"

    @property
    def converged(self) -> Tensor:
        """True where ``status`` is ``CONVERGED``, a boolean tensor."""
        return self.status == Status.CONVERGED


class Verdict(NamedTuple):
    """Lane by lane, the measurements at the last decision to continue a search beyond its target.

    Attributes:
        error: the error at that time; infinite before the first decision, 0 in lanes whose target is final.
        part: ``|F(x)| / |J x*|`` at that time, ``x*`` being the solution; 0 before the first decision.
        since: the error at an earlier decision, since which the error has not decreased to a thousandth; 0 before the
            first decision.
        ratio: ``|F(x)| / |J x|`` at that decision.
        length: ``|x|`` at that decision.
    """

    error: Tensor
    part: Tensor
    since: Tensor
    ratio: Tensor
    length: Tensor

    @classmethod
    def initial(cls, state: State[MemoryT]) -> Verdict:
        """Return the verdict before the first decision."""
        zeros = torch.zeros_like(state.error)
        return cls(torch.full_like(zeros, torch.inf), zeros, zeros, zeros, zeros)


def _summary(statuses: list[int], iterations: list[int], errors: list[float]) -> str:
    """Return the outcome of a search in one line; of several lanes as numbers of lanes and ranges."""
    if len(statuses) == 1:
        return f"{Status(statuses[0]).name} after {iterations[0]} iterations, error {errors[0]:.1e}"
    counted = ", ".join(f"{n} {status.name}" for status in Status if (n := statuses.count(status)))
    if not statuses:
        return "0 lanes"
    return (
        f"{len(statuses)} lanes: {counted}; after {min(iterations)} to {max(iterations)} iterations, "
        f"error {min(errors):.1e} to {max(errors):.1e}"
    )
