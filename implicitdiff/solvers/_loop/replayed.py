"""The replayed loop of a search: torch's own operations of one step of all lanes, recorded once.

It stands in where the compiled machine does not apply: large matrices, other dtypes and devices. It computes what the
eager loop computes, bit by bit, since it applies the same operations to the same tensors; what it saves is the Python
code of the step, autograd, and torch.func.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import implicitdiff._torch.control as _control
import implicitdiff._torch.dispatch as _dispatch
import implicitdiff._torch.trees as pytree
from implicitdiff._recorded.graph import StepGraph
from implicitdiff._recorded.listing import Lister, separate
from implicitdiff._recorded.record import Guard
from implicitdiff._recorded.replay import Replay
from implicitdiff._recorded.tape import NotRecordableError
from implicitdiff._torch.trees import Leaves, Structure
from implicitdiff.solvers._loop.problem import BatchedProblem, SearchOperands, select, select_tree
from implicitdiff.solvers._loop.state import State

StepFn = Callable[[BatchedProblem, Tensor, State[Any]], tuple[Tensor, State[Any]]]
"""``step(problem, x, state) -> (x, state)``, one iteration in all lanes."""


@dataclass(eq=False)
class ReplayedStep:
    """The step of one search as a list of operations.

    Attributes:
        replay: the list.
        structure: the structure of the state.
        prepared: the operands of the user's functions, the captured tensors, and what depends on them alone.
        step: the eager step, with stopped lanes masked.
        is_over: True after an error; the steps after it are eager.
    """

    replay: Replay
    structure: Structure
    prepared: Leaves
    step: StepFn
    is_over: bool = False
    _last: tuple[State[Any] | None, Leaves] = (None, [])

    def __call__(self, problem: BatchedProblem, x: Tensor, state: State[Any]) -> tuple[Tensor, State[Any]]:
        """Make one iteration; stopped lanes do not change."""
        if not self.is_over:
            try:
                # Most often `state` is the result of the last step, whose leaves are known.
                known, leaves = self._last
                leaves = leaves if state is known else self.structure.tensors_of(state)
                new_x, *leaves = self.replay([x, *leaves], self.prepared)
                new = self.structure.unflatten(leaves)
                self._last = new, leaves
                return new_x, new
            except Exception:
                # Nothing has changed: the eager step fails as well, with an error in the words of the library.
                self.is_over = True
        return self.step(problem, x, state)


@dataclass(eq=False)
class GraphedLoop:
    """The loop of one search as launches of a CUDA graph of a few steps.

    Attributes:
        graph: the graph.
        structure: the structure of the state.
        operands: the operands of the user's functions, and the captured tensors.
    """

    graph: StepGraph
    structure: Structure
    operands: Leaves

    def __call__(self, x: Tensor, state: State[Any]) -> tuple[Tensor, State[Any]]:
        """Make the steps of one launch; a lane that has stopped, or asks to be looked at, does not change."""
        x, *leaves = self.graph([x, *self.structure.tensors_of(state)], self.operands)
        return x, self.structure.unflatten(leaves)


def of_running_lanes(step: StepFn, pauses: Callable[[State[Any]], Tensor] | None = None) -> StepFn:
    """Return a step that changes only running lanes that `pauses` does not flag."""

    def masked_step(problem: BatchedProblem, x: Tensor, state: State[Any]) -> tuple[Tensor, State[Any]]:
        new_x, new = step(problem, x, state)
        active = state.status == 0
        # The state before the step decides: a lane that asks waits for the host first.
        if pauses is not None:
            active = active & ~pauses(state)
        return select(active, new_x, x), select_tree(active, new, state)

    return masked_step


def record_replay(step: StepFn, operands: SearchOperands, x: Tensor, state: State[Any]) -> Replay:
    """List the operations of a step.

    Args:
        step: makes the step, with stopped lanes masked.
        operands: the operands of the user's functions.
        x: the unknowns.
        state: the state; like that of `x`, its strides are those of the later steps.

    Raises:
        NotRecordableError: Python decides on values, or an operation cannot be repeated.
    """
    leaves, structure = pytree.flatten(state)
    # Each with memory of its own: parts of a state may share memory here and not in a later step.
    carried = [separate(t) for t in (x, *leaves)]
    theta, constants = operands.theta, [t for t, _ in operands.lifted.constants]
    lister = Lister(carried, [*(given := _apart(theta, constants)), *constants])
    problem = operands.together(given)
    with Guard():
        try:
            with _control.recorded_by(lister), lister:
                new_x, new = step(problem, carried[0], structure.unflatten(carried[1:]))
        except NotRecordableError:
            raise
        except Exception as error:
            # The step runs eagerly, and so fails under a recorder alone.
            raise NotRecordableError(f"the recording raised {type(error).__name__}: {error}") from error
    return lister.replay([new_x, *structure.tensors_of(new)])


def _apart(theta: Leaves, constants: Leaves) -> Leaves:
    """Return operands of which no two share memory; in a later call they may be different tensors."""
    seen, apart = {_dispatch.storage_key(t) for t in constants}, []
    for tensor in theta:
        key = _dispatch.storage_key(tensor)
        apart.append(separate(tensor) if key in seen else tensor)
        seen.add(key)
    return apart


def layouts(tensors: Sequence[Tensor]) -> Hashable:
    """Return how tensors lie in memory, as a part of a key: torch chooses operations by it."""
    return tuple([(t.dtype, t.shape, t.stride(), t.device, t.is_conj(), t.is_neg()) for t in tensors])
