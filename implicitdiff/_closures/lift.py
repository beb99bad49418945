"""Closure conversion: turn a user's function into a pure function of explicit operands.

An autograd.Function only differentiates its operands: a tensor that reaches it through a closure, a
`functools.partial`, a bound method or a module is lost, silently. So the function runs once, watched, and every
tensor that it uses without having been given or having made it is noted; from then on it runs with those tensors
substituted by operands.

It runs again when the derivative is taken, and has to be the same function then. Its variables are put back for that
time (`snapshot`), torch's settings too (`_torch.settings`), and its operations are compared (`program`).

Some functions torch.func cannot transform: they call `torch.autograd.grad`, or a custom autograd.Function of the old
kind. These run with no transform on the stack. They have a first derivative in reverse mode, by autograd alone.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

import implicitdiff._closures.modes as _modes
import implicitdiff._torch.levels as functorch
import implicitdiff._torch.trees as pytree
from implicitdiff._closures.evaluation import as_evaluated, by_autograd_alone, exchanged, named_in_errors
from implicitdiff._closures.modes import Substitute, Watch
from implicitdiff._closures.program import Program, checksum, version
from implicitdiff._closures.snapshot import Snapshot
from implicitdiff._torch.settings import applied, autocast, settings
from implicitdiff._torch.trees import Leaves, Structure
from implicitdiff.errors import TransformError


class Lifted:
    """A user's function as a pure function of leaves, to be evaluated later as it was at the call.

    The operands are the tensors of the arguments, in order, then the captured ones.

    Attributes:
        name: how error messages call the function.
        arguments: the structure of the arguments.
        value: the result at the call, detached.
        given: how many operands are tensors of the arguments.
        operands: those of the call.
        captured: the captured tensors that a derivative or a batch dimension can hang on; plain constants stay where
            they are.
        is_unsure: whether it has to be evaluated a second time to know. It has used a tensor to be differentiated that
            came from nowhere: what an inner transform returns, or a captured tensor that passes through one untouched.
        alone: why torch.func cannot transform the function, so that it runs with no transform on the stack and autograd
            alone differentiates it; None if torch.func can.
    """

    def __init__(
        self,
        name: str,
        fn: Callable[..., Any],
        given: Leaves,
        arguments: Structure,
        watch: Watch,
        value: Any,
        snapshot: Snapshot,
        *,
        alone: str | None,
    ) -> None:
        self.name, self.fn, self.arguments, self.snapshot = name, fn, arguments, snapshot
        self.alone = alone
        self.program, self.exchanges = watch.program, (watch.exchanges, watch.is_sparse)
        self.captured, self.constants, self.is_unsure = _divided(watch.program)
        self.value = value
        self.given, self.operands = len(given), [*given, *self.captured]
        for i, tensor in enumerate(self.captured, start=self.given):
            self.program.aliases["constant", id(tensor)] = ("operand", i)
        # functorch refuses a tensor of a level that is not running. And at least one level has to run, or a mode does
        # not see what a custom autograd.Function is applied to.
        self.levels = 0 if alone else max(1, max(map(functorch.level, self.captured), default=0))
        self.settings = settings()
        self._judged = {id(t) for t, _ in self.constants}
        self._is_during_call = False
        self._difference: str | None = None

    # --- evaluations ------------------------------------------------------------------------------------------------

    def __call__(self, operands: Sequence[torch.Tensor], *more: Any) -> Any:
        """The result with these operands, as it was at the call."""
        if self._is_during_call:
            return self.within_call(operands, *more)
        compared: Counter[int] | None = getattr(_derivative, "compared", None)
        if compared is not None and compared[id(self)] == _COMPARED:
            with applied(self.settings), self.snapshot.put_back(), as_evaluated():
                return self.within_call(operands, *more)
        self.refuse_overwritten()
        with applied(self.settings), self.snapshot.put_back():
            result, watch = self._watched(operands)
        if (difference := watch.program.difference(self.program, self._judged)) is not None:
            raise RuntimeError(
                f"{self.name} has become another function since the call: {difference}; what it depends on must be the "
                "same when its derivative is taken: take the derivative first, or pass what changes as an argument"
            )
        if compared is not None:
            compared[id(self)] += 1
        return result

    def again(self, operands: Sequence[torch.Tensor]) -> Any:
        """The result with these operands, evaluated a second time at the call; `refuse_another` is to follow."""
        result, watch = self._watched(operands)
        self._difference = watch.program.difference(self.program, self._judged)
        return result

    @property
    def takes_gradients(self) -> bool:
        """Whether it calls `torch.autograd.grad`."""
        return any(operation[0] is torch.autograd.grad for operation in self.program.operations)

    def refuse_another(self) -> None:
        """Raise if the second evaluation at the call was that of another function."""
        if self._difference is not None:
            raise AnotherFunctionError(
                f"{self.name} has become another function when it was evaluated a second time: {self._difference}; it "
                "is evaluated more than once and must do the same each time: draw random numbers outside and pass them "
                "as arguments, and keep counters, iterators and caches out of it"
            )

    def within_call(self, operands: Sequence[torch.Tensor], *more: Any) -> Any:
        """The result with these operands, at any point, for as long as the call lasts."""
        is_direct = not self.captured or self._are_captured(operands[self.given :])
        levels = 0 if is_direct else self.levels
        with functorch.levels_up_to(levels) as inert, exchanged(*self.exchanges), autocast(self.settings[0]):
            if self.alone:
                return self._run_alone(operands, *more)
            with named_in_errors(self.name):
                if is_direct:
                    result = self.fn(*self.arguments.unflatten(operands[: self.given]), *more)
                    return pytree.map_tensors(_unless_it_records, result) if self.captured else result
                return self._run(inert, operands, *more)

    @contextmanager
    def during_call(self) -> Iterator[None]:
        """Let every evaluation in the body be one within the call."""
        self._is_during_call = True
        try:
            yield
        finally:
            self._is_during_call = False

    def refuse_overwritten(self) -> None:
        """Raise if a constant has been written to since the call."""
        changed = [t.shape for t, before in self.constants if version(t) != before]
        changed += [array.shape for array, before in self.program.borrowed.values() if checksum(array) != before]
        if changed:
            raise RuntimeError(
                f"{self.name} captures a tensor or an array of shape {list(changed[0])} that has been changed in place "
                "since the call, so its derivative can no longer be taken; give the call a clone, or update out of "
                "place"
            )

    def _watched(self, operands: Sequence[torch.Tensor]) -> tuple[Any, Watch]:
        with functorch.levels_up_to(self.levels) as inert, as_evaluated(), exchanged(*self.exchanges):
            watch = Watch([*operands], inert)
            with watch, named_in_errors(self.name):
                result = self._run_alone(operands) if self.alone else self._run(-1, operands)
        watch.program.finish()
        return result, watch

    def by_autograd(self, why: str) -> Lifted:
        """The same function, lifted where no transform runs."""
        return _lifted(self.name, self.fn, self.operands[: self.given], self.arguments, why)

    def _run(self, inert: int, operands: Sequence[torch.Tensor], *more: Any) -> Any:
        args = self.arguments.unflatten(operands[: self.given])
        if not self.captured:
            return self.fn(*args, *more)
        with Substitute(self.captured, operands[self.given :], inert) as substitute:
            return pytree.map_tensors(substitute.resolve, self.fn(*args, *more))

    def _are_captured(self, values: Sequence[torch.Tensor]) -> bool:
        """Whether these are the captured tensors themselves, where nothing is recorded."""
        if not functorch.nothing_records():
            return False
        return all([functorch.is_same_memory(value, t) for value, t in zip(values, self.captured, strict=True)])

    def _run_alone(self, operands: Sequence[torch.Tensor], *more: Any) -> Any:
        """Run the function with no transform on the stack. It may call `torch.autograd.grad`, so its operands need
        gradients even if the caller has switched them off."""
        try:
            with by_autograd_alone(True):
                if torch.is_grad_enabled():
                    return self._run(-1, operands, *more)
                with torch.enable_grad():
                    result = self._run(-1, _differentiable([t.detach() for t in operands]), *more)
        except RuntimeError as error:
            if functorch.untransformable(error) is None:
                raise
            raise TransformError(self.alone) from error
        return pytree.map_tensors(torch.Tensor.detach, result)


def _unless_it_records(tensor: torch.Tensor) -> torch.Tensor:
    """A result where nothing is recorded: it may be a captured tensor itself."""
    return tensor.detach() if tensor.requires_grad else tensor


_derivative = threading.local()
# What changes from one evaluation to the next shows in the second.
_COMPARED = 2


class one_derivative:
    """Compare a function that is evaluated many times in the body, for products, only a few times."""

    def __enter__(self) -> None:
        self.before = getattr(_derivative, "compared", None)
        if self.before is None:
            _derivative.compared = Counter()

    def __exit__(self, *error: object) -> None:
        _derivative.compared = self.before


def lift(name: str, fn: Callable[..., Any], *args: Any, differentiated: Sequence[bool] = ()) -> Lifted:
    """Run ``fn(*args)`` once and make it a pure function of its operands.

    Args:
        name: how an error message calls the function.
        fn: a deterministic function free of side effects.
        args: pytrees; the tensors among them are replaced by detached aliases, so that the same tensor, captured as
            well, counts as captured.
        differentiated: for each of these tensors, whether it is to need a gradient, as in the evaluations that follow:
            a function may look. None by default.

    Raises:
        ValueError: the function drew random numbers, or changed a tensor in place that it was given or had captured.
        TransformError: a transform is running, and torch.func cannot transform the function.
    """
    given, arguments = pytree.flatten(args)
    try:
        return _lifted(name, fn, given, arguments, None, differentiated)
    except TransformError as error:
        if not functorch.only_autograd():
            raise
        why = str(error)
    return _lifted(name, fn, given, arguments, why)


def _lifted(
    name: str,
    fn: Callable[..., Any],
    given: Leaves,
    arguments: Structure,
    alone: str | None,
    differentiated: Sequence[bool] = (),
) -> Lifted:
    snapshot = Snapshot(fn, arguments.others)
    value, watch = _watched(name, fn, given, arguments, alone, differentiated)
    used = watch.program.outside.keys()
    if any(id(t) in used for t in snapshot.replaced()):
        raise _replaced(name)
    snapshot.keep_used(lambda t: id(t) in used or not functorch.may_be_differentiated(t))
    used_again: list[weakref.ref[torch.Tensor]] = []
    if left := watch.program.left():
        # Such as a constant, made at its first use and kept. From now on it will not be made.
        value, watch = _watched(name, fn, given, arguments, alone, differentiated)
        used_again = [ref for ref in left if id(ref()) in watch.program.outside]
    for outer in _modes.watches():
        outer.program.nest(watch.program)
    watch.program.note_memory(given)
    lifted = Lifted(name, fn, given, arguments, watch, value, snapshot, alone=alone)
    if any(ref() is None for ref in used_again):
        # A tensor of the first evaluation that the second has used is gone, so it was no constant.
        raise _replaced(name)
    return lifted


def _replaced(name: str) -> ValueError:
    """What is said of a function that goes on from a tensor of its last evaluation."""
    return ValueError(
        f"{name} puts another tensor into the place of one that it uses, but it is evaluated more than once and must "
        "do the same each time: keep what changes out of it, or pass it as an argument"
    )


def _watched(
    name: str,
    fn: Callable[..., Any],
    given: Leaves,
    arguments: Structure,
    alone: str | None,
    differentiated: Sequence[bool],
) -> tuple[Any, Watch]:
    """The result, detached, and what was seen."""
    random_state = functorch.random_state()
    with functorch.levels_up_to(0 if alone else 1) as inert, as_evaluated(), torch.enable_grad():
        aliases = [t.detach() for t in given]
        if alone:
            # The function may differentiate with respect to its arguments.
            aliases = _differentiable(aliases)
        elif differentiated:
            with functorch.requires_grad_allowed():
                aliases = [t.requires_grad_(flag) for t, flag in zip(aliases, differentiated, strict=True)]
        with (
            Watch(aliases, inert, exchanges=True) as watch,
            named_in_errors(name),
            by_autograd_alone(alone is not None),
        ):
            result = fn(*arguments.unflatten(aliases))
    for tensor in pytree.tensors(result):
        watch.program.see(tensor)
    if functorch.random_state() != random_state:
        raise ValueError(
            f"{name} draws random numbers, but it is evaluated more than once and must give the same values each time; "
            "draw them outside and pass them as arguments (dropout: use eval mode)"
        )
    if changed := watch.changed():
        raise ValueError(
            f"{name} changes a tensor of shape {list(changed[0].shape)} in place that it did not make, but it is "
            "evaluated more than once and must be free of side effects (batch normalisation: use eval mode)"
        )
    watch.program.finish()
    # Not with the graph, which holds what the function made.
    return pytree.map_tensors(torch.Tensor.detach, result), watch


def _differentiable(tensors: Leaves) -> Leaves:
    return [t.requires_grad_() if t.is_floating_point() or t.is_complex() else t for t in tensors]


def confirm(lifted: Lifted) -> None:
    """Raise if a captured tensor was missed, whose gradient would silently be zero; evaluates the function a second
    time, if there is anything to confirm."""
    if lifted.captured or lifted.is_unsure:
        confirm_at(lifted, lifted.operands)


def confirm_at(lifted: Lifted, operands: Leaves) -> None:
    """Evaluate the function a second time, with these operands. Raise if its result has autograd history though all
    operands are detached, or if it has become another function."""
    if functorch.nothing_records():
        return
    operands = [t.detach() for t in operands]
    with torch.enable_grad():
        if lifted.alone:
            operands = _differentiable(operands)
            result = lifted.again(operands)
            is_lost = any(functorch.leaves_beside(t, operands) for t in pytree.tensors(result))
        else:
            is_lost = any(map(functorch.is_tracked, pytree.tensors(lifted.again(operands))))
    if is_lost:
        raise unseen(lifted.name)
    lifted.refuse_another()


class AnotherFunctionError(ValueError):
    """A second evaluation has applied other operations, or used other tensors, than the first."""


def unseen(name: str) -> AnotherFunctionError:
    """The error for a captured tensor that no mode has seen."""
    return AnotherFunctionError(
        f"{name} depends on a tensor that it captures where this cannot be seen, as in TorchScript, in an "
        "autograd.Function that torch.func cannot transform, or where a captured tensor passes through an inner vmap "
        "untouched: pass the tensor as an argument"
    )


def _divided(program: Program) -> tuple[Leaves, list[tuple[torch.Tensor, int]], bool]:
    """The tensors from outside that are differentiated or batched; the constants, with their versions; and whether some
    of the former are gone."""
    seen = [(weakref.ref(t), v, functorch.may_be_differentiated(t)) for t, v in program.outside.values()]
    program.outside.clear()
    # What nobody holds any more was made inside, out of sight: no later evaluation meets it.
    alive = [(t, v, smooth) for ref, v, smooth in seen if (t := ref()) is not None]
    captured = [t for t, _, smooth in alive if smooth]
    is_unsure = len(captured) < sum(smooth for *_, smooth in seen)
    return captured, [(t, v) for t, v, smooth in alive if not smooth], is_unsure
