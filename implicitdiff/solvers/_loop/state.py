"""The state of a solver: one header for all methods, and the memory of one."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
from torch import Tensor
from typing_extensions import NamedTuple  # on Python 3.10, generic ones; torch depends on it

from implicitdiff.solvers._loop.problem import largest_entry, row_norm, safe_divide
from implicitdiff.solvers._loop.status import Status

MemoryT = TypeVar("MemoryT")


class Progress(NamedTuple):
    """What the stopping rule remembers of a search, see `implicitdiff.solvers`.

    Attributes:
        best: the least error so far, but for what is less by a tenth or less.
        idle: the number of iterations since that, or since a step that lowered the value by more than its rounding.
        still: the number of steps of length zero since the last other one.
        step: the length of the last step that a method of Newton's kind would make, relative to the unknowns,
            ``|d| / max(|x|, eps^(1/6) |reach|)``; for least squares that of the unknown with the largest,
            ``c |d| / max(c |x|, eps^(1/3) |c reach|)``, ``c`` the norm of its column of the Jacobian; 0 before the
            first step, and for other methods.
        reach: the largest absolute values that the unknowns have had, ``(n,)``, less by a tenth after each step, for
            methods of Newton's kind: where the solution is zero, steps are small against these. Empty for others.
        patience: ``idle`` at which the rounding floor is measured next.
        floor: the rounding floor of ``error`` where it was last measured; 0 if never.
    """

    best: Tensor
    idle: Tensor
    still: Tensor
    step: Tensor
    reach: Tensor
    patience: Tensor
    floor: Tensor

    def stepped(self, d: Tensor, x: Tensor, units: Tensor | None = None) -> Progress:
        """The same after a step ``d`` of Newton's kind to ``x``, whether the whole of it was made or not; with the
        norms of the columns of a Jacobian as `units`, each unknown is looked at by itself."""
        # A search may begin far away.
        reach, eps = torch.maximum(0.9 * self.reach, x.detach().abs()), torch.finfo(x.dtype).eps
        if units is None:
            step = safe_divide(row_norm(d), torch.maximum(row_norm(x), eps ** (1 / 6) * row_norm(reach)))
        else:
            d, x, far = units * d.detach().abs(), units * x.detach().abs(), units * reach
            least = eps ** (1 / 3) * row_norm(far)[:, None]
            step = largest_entry(safe_divide(d, torch.maximum(x, least)))
        return self._replace(step=step, reach=reach)

    def fallen(self, where: Tensor) -> Progress:
        """The same after a step that lowered the value by more than its rounding, in some lanes."""
        # The step itself is counted later.
        return self._replace(idle=torch.where(where, -1, self.idle))


class State(NamedTuple, Generic[MemoryT]):
    """The state of every solver; each tensor has one value for each lane of a vmap.

    Attributes:
        iter_num: iterations so far.
        error: the Euclidean norm of the optimality condition at the current unknowns.
        target: the error at which the search ends.
        status: a `Status`.
        history: the errors of a run with ``keep_history=True``, ``(iterations + 1,)``, else empty.
        progress: what the stopping rule remembers, a `Progress`.
        memory: what the method remembers, such as an `LbfgsMemory`.
    """

    iter_num: Tensor
    error: Tensor
    target: Tensor
    status: Tensor
    history: Tensor
    progress: Progress
    memory: MemoryT

    @property
    def converged(self) -> Tensor:
        """Whether ``status`` is ``CONVERGED``, a boolean tensor."""
        return self.status == Status.CONVERGED
