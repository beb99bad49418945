"""Closure conversion: turn a user's function into a pure function of explicit operands.

An autograd.Function differentiates its operands only. The gradient of a tensor in a closure, a `functools.partial`, a
bound method or a module would silently be zero. So the user's function runs once under a mode, `Watch`, which records
every captured tensor: a tensor that the function uses, but neither received nor computed. Later evaluations substitute
operands for the captured tensors.

The function runs again when a derivative is taken, and must compute the same result. For the second run, its variables
(`snapshot`) and torch's settings (`_torch.settings`) are restored, and its operations are compared (`program`).

torch.func cannot transform a function that calls `torch.autograd.grad`, or an autograd.Function without
`setup_context`. Such a function runs with no transform on the stack. It has a first derivative in reverse mode, by
autograd alone.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import call, itemgetter, methodcaller
from typing import Any

import torch

import implicitdiff._closures.modes as _modes
import implicitdiff._torch.context as _context
import implicitdiff._torch.functions as _functions
import implicitdiff._torch.levels as _levels
import implicitdiff._torch.messages as _messages
import implicitdiff._torch.switches as _switches
import implicitdiff._torch.tracking as _tracking
import implicitdiff._torch.trees as pytree
from implicitdiff._closures.evaluation import (
    COMPARISONS,
    by_autograd_alone,
    compared_evaluations,
    named_in_errors,
    with_replacements,
)
from implicitdiff._closures.modes import Substitute, Watch
from implicitdiff._closures.program import Origin, Program, checksum, version
from implicitdiff._closures.snapshot import Snapshot
from implicitdiff._torch.settings import autocast, settings, with_settings
from implicitdiff._torch.trees import Leaves, Structure, Tree, UserFunction
from implicitdiff.errors import TransformError


class Lifted:
    """A user's function as a pure function of a list of tensors; later evaluations repeat the evaluation at the call.

    The operands are the tensors of the arguments, in order, followed by the captured tensors.

    Attributes:
        name: the function's name in error messages.
        arguments: the structure of the arguments.
        value: the result at the call, detached.
        given: the number of operands that are tensors of the arguments.
        operands: the operands at the call.
        captured: the captured tensors that may be differentiated or batched. Constants are not substituted.
        places: the positions among the constants by id.
        needs_confirmation: whether `confirm` must evaluate the function a second time. True if the function used a
            differentiable tensor of unknown origin: a result of an inner transform, or a captured tensor that passed
            through an inner transform unchanged.
        refusal: message of the error with which torch.func refuses the function; autograd alone then differentiates
            the function, with no transform on the stack. None if torch.func can transform the function.
    """

    def __init__(
        self,
        name: str,
        fn: UserFunction,
        given: Leaves,
        arguments: Structure,
        watch: Watch,
        value: Tree,
        snapshot: Snapshot,
        *,
        refusal: str | None,
    ) -> None:
        self.name, self.fn, self.arguments, self.snapshot = name, fn, arguments, snapshot
        self.refusal = refusal
        self.program, self.exchanges = watch.program, (watch.exchanges, watch.is_sparse)
        self.captured, self.constants, self.needs_confirmation = _split_outside(watch.program)
        self.value = value
        self.given, self.operands = len(given), [*given, *self.captured]
        # At the call a captured tensor has the origin "constant", in later evaluations the origin "operand". The alias
        # makes the two origins equal in a comparison.
        for i, tensor in enumerate(self.captured, start=self.given):
            self.program.aliases[Origin(("constant", id(tensor)))] = Origin(("operand", i))
        # functorch refuses a tensor whose level is not running. At least one level must run in any case: without a
        # level, a mode does not see the operands of a custom autograd.Function.
        self.levels = 0 if refusal else max(1, max(map(_levels.level, self.captured), default=0))
        self.settings = settings()
        # `constants` keeps these tensors alive, so no other tensor gets one of these ids.
        self.places = {id(t): i for i, (t, _) in enumerate(self.constants)}
        self._is_within_call = False
        self._difference: str | None = None

    # --- evaluations ------------------------------------------------------------------------------------------------

    def __call__(self, operands: Sequence[torch.Tensor], *more: Any) -> Tree:
        """Return the result with these operands.

        Raises:
            RuntimeError: the function has changed, or a constant of the function was written to, since the call.
        """
        if self._is_within_call:
            return self.within_call(operands, *more)
        # Within one derivative, compare only the first evaluations; see `one_derivative`.
        compared = compared_evaluations()
        if compared[id(self)] == COMPARISONS:
            with with_settings(self.settings), self.snapshot.put_back(), _switches.isolated_from_caller():
                return self.within_call(operands, *more)
        # Programs hold no values of tensors, so a constant that was written to would pass the comparison.
        self.refuse_overwritten()
        with with_settings(self.settings), self.snapshot.put_back():
            result, watch = self._run_again_watched(operands)
        if (difference := watch.program.difference(self.program, self.places.keys())) is not None:
            raise RuntimeError(
                f"{self.name} has changed since the call: {difference}; the derivative evaluates the function again "
                "and must find it unchanged: take the derivative before the change, or pass the changing value as an "
                "argument"
            )
        compared[id(self)] += 1
        return result

    def run_again(self, operands: Sequence[torch.Tensor]) -> Tree:
        """Return the result of a second evaluation at the call. Call `refuse_changed_function` afterwards."""
        result, watch = self._run_again_watched(operands)
        self._difference = watch.program.difference(self.program, self.places.keys())
        return result

    @property
    def takes_gradients(self) -> bool:
        """True if the function calls `torch.autograd.grad`."""
        return any(operation[0] is torch.autograd.grad for operation in self.program.operations)

    def refuse_changed_function(self) -> None:
        """Raise if the second evaluation at the call applied other operations than the first."""
        if self._difference is not None:
            raise FunctionChangedError(
                f"{self.name} has changed from one evaluation to the next: {self._difference}; the library evaluates "
                "it more than once, and each evaluation must apply the same operations: draw random numbers outside "
                "and pass them as arguments, and keep counters, iterators and caches outside of the function"
            )

    def within_call(self, operands: Sequence[torch.Tensor], *more: Any) -> Tree:
        """Return the result with these operands, without comparisons: during the call nothing can have changed."""
        # If the operands are the captured tensors themselves, the function runs as it is, without a substitution.
        is_direct = not self.captured or self._are_captured(operands[self.given :])
        levels = 0 if is_direct else self.levels
        with _levels.levels_up_to(levels) as inert, with_replacements(*self.exchanges), autocast(self.settings[0]):
            if self.refusal:
                return self._run_by_autograd(operands, *more)
            with named_in_errors(self.name):
                if is_direct:
                    result = self.fn(*self.arguments.unflatten(operands[: self.given]), *more)
                    return pytree.map_tensors(_detached_if_tracked, result) if self.captured else result
                return self._run(inert, operands, *more)

    @contextmanager
    def during_call(self) -> Iterator[None]:
        """Context in which every evaluation of the function is a `within_call`."""
        self._is_within_call = True
        try:
            yield
        finally:
            self._is_within_call = False

    def refuse_overwritten(self) -> None:
        """Raise if a constant of the function was written to since the call."""
        changed: list[tuple[int, ...]] = [t.shape for t, before in self.constants if version(t) != before]
        changed += [array.shape for array, before in self.program.borrowed.values() if checksum(array) != before]
        if changed:
            raise RuntimeError(
                f"{self.name} captures a tensor or an array of shape {list(changed[0])} that has been changed in "
                "place since the call, so the derivative cannot be computed: capture a clone, or update out of place"
            )

    def _run_again_watched(self, operands: Sequence[torch.Tensor]) -> tuple[Tree, Watch]:
        """Return the result with these operands, and the mode that recorded the evaluation."""
        with (
            _levels.levels_up_to(self.levels) as inert,
            _switches.isolated_from_caller(),
            with_replacements(*self.exchanges),
        ):
            watch = Watch([*operands], inert)
            with watch, named_in_errors(self.name):
                result = self._run_by_autograd(operands) if self.refusal else self._run(-1, operands)
        watch.program.release()
        return result, watch

    def by_autograd(self, why: str) -> Lifted:
        """Return the function lifted again, for autograd alone; `why` is the refusal of torch.func."""
        return _lift_for_autograd(self.name, self.fn, self.operands[: self.given], self.arguments, why)

    def _run(self, inert: int, operands: Sequence[torch.Tensor], *more: Any) -> Tree:
        args = self.arguments.unflatten(operands[: self.given])
        if not self.captured:
            return self.fn(*args, *more)
        # A result may be a captured tensor itself, hence `resolve`.
        with Substitute(self.captured, operands[self.given :], inert) as substitute:
            return pytree.map_tensors(substitute.resolve, self.fn(*args, *more))

    def _are_captured(self, values: Sequence[torch.Tensor]) -> bool:
        """True if the values are the captured tensors themselves and no derivative is recorded."""
        if not _context.now().is_silent:
            return False
        return all([_levels.is_same_memory(value, t) for value, t in zip(values, self.captured, strict=True)])

    def _run_by_autograd(self, operands: Sequence[torch.Tensor], *more: Any) -> Tree:
        """Run the function with no transform on the stack.

        The function may call `torch.autograd.grad`. So its operands require gradients, even under the caller's
        `torch.no_grad`; the results are then detached.
        """
        try:
            with by_autograd_alone(True):
                if torch.is_grad_enabled():
                    return self._run(-1, operands, *more)
                with torch.enable_grad():
                    result = self._run(-1, _requiring_grad([t.detach() for t in operands]), *more)
        except RuntimeError as error:
            if _messages.untransformable(error) is None:
                raise
            raise TransformError(self.refusal) from error
        return pytree.map_tensors(torch.Tensor.detach, result)


def _detached_if_tracked(tensor: torch.Tensor) -> torch.Tensor:
    """Detach a result that is a captured tensor itself: no derivative is recorded here."""
    return tensor.detach() if tensor.requires_grad else tensor


def lift(name: str, fn: UserFunction, *args: Any, differentiated: Sequence[bool] = ()) -> Lifted:
    """Run ``fn(*args)`` once, and return `fn` as a pure function of its operands.

    Args:
        name: the function's name in error messages.
        fn: a deterministic function free of side effects.
        args: pytrees. Detached aliases replace their tensors, so that a tensor that is both an argument and captured
            is recorded as captured.
        differentiated: the `requires_grad` flag of each alias, as in later evaluations: a function may read the flag.
            Empty: all False.

    Raises:
        ValueError: the function drew random numbers, or changed an argument or a captured tensor in place.
        TransformError: a transform is running, and torch.func cannot transform the function.
    """
    given, arguments = pytree.flatten(args)
    try:
        return _lift_once(name, fn, given, arguments, None, differentiated)
    except TransformError as error:
        if not _context.now().is_outside:
            raise
        why = str(error)
    return _lift_for_autograd(name, fn, given, arguments, why)


def _lift_for_autograd(name: str, fn: UserFunction, given: Leaves, arguments: Structure, refusal: str) -> Lifted:
    # The function may call `torch.autograd.grad` with respect to its arguments.
    return _lift_once(name, fn, given, arguments, refusal, [*map(_tracking.is_continuous, given)])


def _lift_once(
    name: str,
    fn: UserFunction,
    given: Leaves,
    arguments: Structure,
    refusal: str | None,
    differentiated: Sequence[bool],
) -> Lifted:
    """Run `fn` once, or twice if the first run stores tensors, and return the lifted function."""
    # Before the first run, which may assign to the variables.
    snapshot = Snapshot(fn, arguments.others)
    value, watch = _run_watched(name, fn, given, arguments, refusal, differentiated)
    used = watch.program.outside.keys()
    # The function used a tensor and then assigned another tensor to its variable, such as a running mean. A second
    # evaluation would start from the other tensor.
    changed = snapshot.changed()
    replaced = chain.from_iterable(map(methodcaller("replaced"), changed))
    if not used.isdisjoint(map(id, replaced)):
        raise _replaced_tensor_error(name)
    snapshot.keep_used(changed, used)
    used_again: list[weakref.ref[torch.Tensor]] = []
    if kept := _stored_results(watch.program):
        # The function computed tensors and stored them, for example a constant at its first use. The second run reads
        # the stored tensors, as all later runs will.
        value, watch = _run_watched(name, fn, given, arguments, refusal, differentiated)
        used_again = [ref for ref in kept if id(ref()) in watch.program.outside]
    # A watched function around this call records the call as one operation, together with the program of `fn`.
    for outer in _modes.watches():
        outer.program.nest(watch.program)
    watch.program.note_memory(given)
    lifted = Lifted(name, fn, given, arguments, watch, value, snapshot, refusal=refusal)
    if None in map(call, used_again):
        # The second run used a tensor of the first and replaced it: a changing state, not a constant.
        raise _replaced_tensor_error(name)
    return lifted


def _stored_results(program: Program) -> list[weakref.ref[torch.Tensor]]:
    """Return the tensors that the function computed and stored.

    Garbage in a cycle of references is alive too, until Python happens to collect it. How often a function runs must
    not depend on that: where it communicates, the other processes would wait for a run that is not repeated there.
    """
    # A collection of generation 2 visits all objects of the process, so only communication pays for one.
    generations = (1, 2) if program.communicates else (1,)
    stored = program.surviving_results()
    for generation in generations:
        if stored:
            gc.collect(generation)
            stored = program.surviving_results()
    return stored


def _replaced_tensor_error(name: str) -> ValueError:
    """Return the error for a function that updates a captured tensor from one evaluation to the next."""
    return ValueError(
        f"{name} replaces a tensor that it uses, but the library evaluates it more than once, and each evaluation "
        "must use the same tensors: keep the update outside of the function, or pass the changing tensor as an "
        "argument"
    )


def _run_watched(
    name: str,
    fn: UserFunction,
    given: Leaves,
    arguments: Structure,
    refusal: str | None,
    differentiated: Sequence[bool],
) -> tuple[Tree, Watch]:
    """Return the detached result of one evaluation, and the mode that recorded the evaluation."""
    random_state = _switches.random_state()
    with _levels.levels_up_to(0 if refusal else 1) as inert, _switches.isolated_from_caller(), torch.enable_grad():
        aliases = [t.detach() for t in given]
        if differentiated:
            with _switches.requires_grad_allowed():
                aliases = [t.requires_grad_(flag) for t, flag in zip(aliases, differentiated, strict=True)]
        before = [*map(version, aliases)]
        with (
            Watch(aliases, inert, at_call=True) as watch,
            named_in_errors(name),
            by_autograd_alone(refusal is not None),
        ):
            result = fn(*arguments.unflatten(aliases))
    # A result may be a captured tensor itself, which no operation has received.
    watch.program.results = [*map(watch.program.origin_of, pytree.tensors(result))]
    # The state of the generator shows all draws, including draws in compiled code that no mode sees.
    if _switches.random_state() != random_state:
        raise ValueError(
            f"{name} draws random numbers, but the library evaluates it more than once, and each evaluation must give "
            "the same values: draw them outside and pass them as arguments (dropout: use eval mode)"
        )
    used = [*zip(aliases, before, strict=True), *watch.program.outside.values()]
    if changed := [t.shape for t, before in used if version(t) != before]:
        raise ValueError(
            f"{name} changes a tensor of shape {list(changed[0])} in place that it did not create, but the "
            "library evaluates it more than once, so it must be free of side effects (batch normalisation: use eval "
            "mode)"
        )
    watch.program.finish()
    # Detached: a graph would keep the tensors alive that the function computed, see `Program.surviving_results`.
    return pytree.map_tensors(torch.Tensor.detach, result), watch


def _requiring_grad(tensors: Leaves) -> Leaves:
    return [t.requires_grad_(_tracking.is_continuous(t)) for t in tensors]


def confirm(lifted: Lifted) -> Tree:
    """Return the result at the call; raise if `Watch` missed a captured tensor: its gradient would silently be zero.

    Evaluates the function a second time where derivatives are wanted, unless it captures no differentiable tensor.
    """
    if (lifted.captured or lifted.needs_confirmation) and not _context.now().is_silent:
        return confirmed_value(lifted, lifted.operands)
    return lifted.value


def confirmed_value(lifted: Lifted, operands: Leaves) -> Tree:
    """Return the result of a second evaluation, with detached operands.

    Raise if the result has autograd history nevertheless (a captured tensor was missed), or if the function applied
    other operations than the first time.
    """
    # All operands are detached. Any autograd history of the result comes from a captured tensor without a substitute.
    operands = [t.detach() for t in operands]
    # The graphs are dropped: a checkpoint must not count their tensors.
    with _switches.without_saved_tensor_hooks(), torch.enable_grad():
        if lifted.refusal:
            operands = _requiring_grad(operands)
            result = lifted.run_again(operands)
            is_lost = bool(_functions.leaves_beside(pytree.tensors(result), operands))
        else:
            result = lifted.run_again(operands)
            is_lost = any(map(_tracking.is_tracked, pytree.tensors(result)))
    if is_lost:
        raise missed_capture_error(lifted.name)
    lifted.refuse_changed_function()
    return result


class FunctionChangedError(ValueError):
    """The second evaluation of a function applied other operations, or used other tensors, than the first."""


def missed_capture_error(name: str) -> FunctionChangedError:
    """Return the error for a captured tensor that the mode `Watch` did not see."""
    return FunctionChangedError(
        f"{name} depends on a captured tensor that the library cannot find, as in TorchScript, in an "
        "autograd.Function that torch.func cannot transform, or where a captured tensor passes through an inner vmap "
        "unchanged: pass the tensor as an argument"
    )


def _split_outside(program: Program) -> tuple[Leaves, list[tuple[torch.Tensor, int]], bool]:
    """Return the captured tensors that may be differentiated or batched, the constants with their versions, and whether
    captured tensors of the first sort have died."""
    seen = [(weakref.ref(t), v, _tracking.may_be_differentiated(t)) for t, v in program.outside.values()]
    program.outside.clear()
    # The program held the last references. A tensor that dies now was computed inside the function, unseen by the mode,
    # so later evaluations do not use the tensor.
    captured = [t for ref, _, is_smooth in seen if is_smooth and (t := ref()) is not None]
    constants = [(t, v) for ref, v, is_smooth in seen if not is_smooth and (t := ref()) is not None]
    return captured, constants, sum(map(itemgetter(2), seen)) > len(captured)
