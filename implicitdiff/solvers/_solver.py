"""What a solver is, and the loop round every method.

`Solver.init` and `Solver.update` run a method's own lines in the caller's frame, one lane at a time as torch.func has
it, so that transforms see every operation. `Solver.run` takes the vmaps off, runs the same lines once on plain tensors
with one row for each lane, and gives the solution the derivatives of the condition that it satisfies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import implicitdiff._functorch as functorch
import implicitdiff._modes as _modes
import implicitdiff._pytree as pytree
import implicitdiff._settings as _settings
from implicitdiff._elementary import elementary
from implicitdiff._linear import check_unknowns
from implicitdiff._pytree import Leaves, Structure
from implicitdiff._root import pose, root
from implicitdiff._signature import name_of
from implicitdiff._system import Vectors
from implicitdiff._unroll import unroll
from implicitdiff._values import refuse_missing
from implicitdiff.solvers._below import Closed
from implicitdiff.solvers._condition import Pose
from implicitdiff.solvers._function import LastByKeyword, SolverFunction
from implicitdiff.solvers._gap import Gap, rounding, scale
from implicitdiff.solvers._options import Options, check_count, options_of
from implicitdiff.solvers._report import Callback, Report
from implicitdiff.solvers._rows import Part, Rows, any_lane, select
from implicitdiff.solvers._status import Status, advance, settle


class Solver(NamedTuple):
    """A solver as pure functions; made by the factories of `implicitdiff.solvers`, where all is said.

    Attributes:
        init: ``init(params, *args, **kwargs) -> state``.
        update: ``update(params, state, *args, **kwargs) -> (params, state)``, one iteration.
        run: ``run(params, *args, implicit_diff=True, checkpoint_every=None, keep_history=False, verbose=False,
            callback=None, **kwargs) -> (params, state)``, iterations until every lane has stopped.
        optimality_fn: ``optimality_fn(params, *args, **kwargs)``, a tree like ``params``, zero at a solution; its
            derivatives are what ``run`` is differentiated by.
    """

    init: Callable[..., Any]
    update: Callable[..., tuple[Any, Any]]
    run: Callable[..., tuple[Any, Any]]
    optimality_fn: Callable[..., Any]


class Method(NamedTuple):
    """An iteration on rows.

    Attributes:
        start: ``start(rows, x) -> state``, built with `Rows.header`.
        step: ``step(rows, x, state) -> (x, state)``. Sets the new ``error``, that of the new ``x``, what it remembers,
            and ``status`` where it fails; the rest of the header is the loop's. What it does in lanes that have
            stopped is thrown away, but must be finite, since transforms differentiate it.
        state: the class of the states.
        net: how many iterations ``maxiter=None`` allows.
        gap: what ``error`` is the norm of; None where the method itself knows what rounding makes of it.
        only_implicit: why ``implicit_diff=False`` makes no sense, if it makes none.
    """

    start: Callable[[Rows, Tensor], Any]
    step: Callable[[Rows, Tensor, Any], tuple[Tensor, Any]]
    state: type[Any]
    net: int
    gap: Gap | None = None
    only_implicit: str | None = None


@dataclass(frozen=True)
class Maker:
    """What a factory has made: computes the four functions of a `Solver`, with the arguments of the user's as a tuple.

    Attributes:
        factory: the name of the factory.
        name: that with the user's function, as messages show it.
        pose: makes the condition of the user's functions.
        functions: those.
        method: the iteration.
        options: of every solver.
        guess: ``guess(params, *args, **kwargs)``, the unknowns that a user's `params` stand for; None: these.
        is_named: whether the first function is the library's own, so that its parameters are to be shown.
        limit: how many iterations there may be.
    """

    factory: str
    name: str
    pose: Pose
    functions: tuple[Callable[..., Any], ...]
    method: Method
    options: Options
    guess: Callable[..., Any] | None = None
    is_named: bool = False
    limit: int = field(init=False)

    def __post_init__(self) -> None:
        limit = self.method.net if self.options.maxiter is None else self.options.maxiter
        object.__setattr__(self, "limit", limit)

    def with_last_by_keyword(self, names: tuple[str, ...]) -> Maker:
        """The same, where the last arguments are those that the user's function takes by these keywords."""
        fn, *others = self.functions
        return replace(self, functions=(LastByKeyword(fn, names), *others))

    def optimality_fn(self, params: Any, args: tuple[Any, ...]) -> Any:
        """What is zero at a solution, a tree like `params`."""
        condition = self.pose(*self.functions)
        return condition.optimality(condition.parts, params, args)

    @_modes.one_operation
    @_settings.outside_autocast
    def init(self, params: Any, args: tuple[Any, ...]) -> Any:
        """The state at an initial guess."""
        x, rows, _ = self._frame(params, args)
        with _settings.full_precision():
            return _unbatched(self._start(rows, x))

    @_modes.one_operation
    @_settings.outside_autocast
    def update(self, params: Any, state: Any, args: tuple[Any, ...]) -> tuple[Any, Any]:
        """One iteration, ``(params, state)``."""
        x, rows, structure = self._frame(params, args)
        with _settings.full_precision():
            old = pytree.map_tensors(lambda t: t[None], state)
            x, state = self._step(rows, x, old, mask=True)
            asked = _is_milestone(state.iter_num) | (state.status != Status.RUNNING)
            state = self._spared(rows, x, state, asked & (old.status == Status.RUNNING))
        return structure.unflatten(rows.inputs.unravel(x)), _unbatched(state)

    @_modes.one_operation
    @_settings.outside_autocast
    def run(
        self,
        params: Any,
        args: tuple[Any, ...],
        *,
        implicit_diff: bool = True,
        checkpoint_every: int | None = None,
        keep_history: bool = False,
        verbose: bool = False,
        callback: Callback | None = None,
    ) -> tuple[Any, Any]:
        """Iterations from an initial guess until every lane has stopped, ``(params, state)``."""
        report = Report(self.name, self.limit, keep_history, verbose, callback)
        if not implicit_diff:
            if self.method.only_implicit is not None:
                raise ValueError(f"{self.name}: {self.method.only_implicit}; leave implicit_diff at True")
            return self._unrolled(params, args, checkpoint_every, report)
        if checkpoint_every is not None:
            raise ValueError(
                f"{self.name}: checkpoint_every is for implicit_diff=False: the implicit derivative keeps no iteration"
            )
        return self._implicit(params, args, report)

    # --- the iteration ----------------------------------------------------------------------------------------------

    def _start(self, rows: Rows, x: Tensor) -> Any:
        state = self.method.start(rows, x)
        return state._replace(status=advance(state.status, state.error, state.target, state.iter_num, self.limit))

    def _step(self, rows: Rows, x: Tensor, state: Any, *, mask: bool) -> tuple[Tensor, Any]:
        """One iteration; with `mask` it leaves the lanes alone that have stopped."""
        new_x, new = self.method.step(rows, x, state)
        error, iter_num = new.error.detach(), new.iter_num + 1
        status = advance(new.status.detach(), error, new.target, iter_num, self.limit)
        new = new._replace(iter_num=iter_num, error=error, status=status)
        if not mask:
            return new_x, new
        active = state.status == Status.RUNNING
        return select(active, new_x, x), _select_all(active, new, state)

    def _spared(self, rows: Rows, x: Tensor, state: Any, asked: Tensor) -> Any:
        """The state with targets that rounding leaves within reach, in the lanes that are asked for.

        A relative target may be out of reach where an error is a difference of large terms. As long as errors fall,
        that does not matter, so it is looked into after 8, 16, 32, ... iterations and where a search ends in failure.
        """
        gap, in_vain = self.method.gap, state.status == Status.RUNNING
        for end in (Status.BUDGET_SPENT, Status.LINE_SEARCH_FAILED):
            in_vain = in_vain | (state.status == end)
        asked = asked & in_vain & (state.error > state.target)
        if gap is None or rows.atol is not None or not any_lane(asked):
            return state
        floor = rounding(gap, rows, x, gap(rows, x).detach())
        # Not kept for later: at another point it may be nonsense.
        there = asked & (state.error <= floor)
        status = torch.where(there, int(Status.CONVERGED), state.status)
        return state._replace(target=torch.where(there, floor, state.target), status=status)

    def _confirmed(self, rows: Rows, start: Tensor, x: Tensor, state: Any, before: Tensor) -> tuple[Any, Tensor]:
        """The state with lanes that run on where a default target turns out to be too coarse, once it is reached.

        It was made of the error at the initial guess. A poor guess has a large one, and its target may be reached far
        from any solution, so the size of things is measured again there. A lane runs on as long as that helps: `before`
        is its error when it was last sent on, and what is returned with the state.
        """
        gap, there = self.method.gap, (state.status == Status.CONVERGED) & (state.iter_num > 0)
        if gap is None or rows.atol is not None or rows.rtol is not None or not any_lane(there):
            return state, before
        here = gap(rows, x).detach()
        fine = rows.eps ** (2 / 3) * scale(gap, rows, x, here, start, state.error)
        coarse = there & (state.error > fine) & (2 * state.error < before)
        if any_lane(coarse):
            coarse = coarse & (state.error > rounding(gap, rows, x, here))
        if not any_lane(coarse):
            return state, before
        on = torch.where(state.iter_num < self.limit, int(Status.RUNNING), int(Status.BUDGET_SPENT))
        status = torch.where(coarse, on, state.status)
        state = state._replace(target=torch.where(coarse, fine, state.target), status=status)
        return state, torch.where(coarse, state.error, before)

    # --- in the caller's frame --------------------------------------------------------------------------------------

    def _frame(self, params: Any, args: tuple[Any, ...]) -> tuple[Tensor, Rows, Structure]:
        leaves, structure = pytree.flatten(params)
        check_unknowns(f"{self.name}: the initial guess", leaves, structure)
        refuse_missing(self.name, [*leaves, *pytree.tensors(args)])
        parts = self.pose(*self.functions).parts
        inputs = Vectors(leaves, ())

        def on_leaves(part: Callable[..., Any]) -> Part:
            def fn(x: Leaves, more: Leaves) -> Leaves:
                before = [_modes.version(t) for t in x]
                with _modes.heard():
                    result = pytree.tensors(part(structure.unflatten(x), args, *more))
                if before != [_modes.version(t) for t in x]:
                    raise ValueError(f"{self.name} changes its first argument in place; work on a clone of it")
                return result

            return fn

        on = {name: on_leaves(elementary()(part)) for name, part in parts.items()}
        rows = Rows(on, inputs, structure, functorch.nothing_records(), self.options.rtol, self.options.atol)
        return inputs.ravel(leaves), rows, structure

    def _unrolled(
        self, params: Any, args: tuple[Any, ...], checkpoint_every: int | None, report: Report
    ) -> tuple[Any, Any]:
        def step(carry: tuple[Any, Any], *args: Any) -> tuple[Any, Any]:
            return self.update(*carry, args)

        if checkpoint_every is not None:
            check_count(self.name, "checkpoint_every", checkpoint_every)
        at_once = checkpoint_every or (1 if report.keeps else self.options.check_every)
        advance = unroll(step, at_once, checkpoint_every)
        random_state = functorch.random_state()
        state = self.init(params, args)
        if functorch.random_state() != random_state:
            raise ValueError(
                f"{self.name} draws random numbers, with which no iteration converges; draw them outside and pass them "
                "as arguments (dropout: use eval mode)"
            )
        start, _, _ = self._frame(params, args)
        before = torch.full_like(state.error, torch.inf)
        with contextlib.closing(report):
            while report.see(_plain(state), partial(_plain, params), state.error):
                params, state = advance((params, state), *args)
                if not any_lane(state.status == Status.RUNNING):
                    x, rows, _ = self._frame(params, args)
                    with _settings.full_precision():
                        one = pytree.map_tensors(lambda t: t[None], (state, before))
                        state, before = _unbatched(self._confirmed(rows, start, x, one[0], one[1]))
        state = pytree.map_tensors(Tensor.detach, state)
        self._settle(_plain(state))
        return params, report.into(state)

    # --- below the transforms ---------------------------------------------------------------------------------------

    def _implicit(self, params: Any, args: tuple[Any, ...], report: Report) -> tuple[Any, Any]:
        options = self.options
        closed = Closed(self.name, self.pose(*self.functions).parts, params, args)

        def search(rows: Rows, x: Tensor) -> tuple[Tensor, Any]:
            return self._loop(rows, x, closed.structure, report)

        x, state = closed.search(search, options.rtol, options.atol)
        solution = closed.structure.unflatten(x)
        if functorch.nothing_records():
            return solution, state
        return pose(self.name, self._residual, root, options.solve, solution, args, {}).attached(), state

    def _residual(self, params: Any, *args: Any) -> Any:
        return self.optimality_fn(params, args)

    def _loop(self, rows: Rows, x: Tensor, structure: Structure, report: Report) -> tuple[Tensor, Any]:
        lanes = rows.inputs.batch
        start, state = x, self._start(rows, x)
        before = torch.full_like(state.error, torch.inf)
        every = 1 if report.keeps else self.options.check_every

        def show(x: Tensor) -> Any:
            return structure.unflatten(rows.inputs.unravel(x))

        with contextlib.closing(report.over(lanes)):
            count = 0
            while running := report.see(state, partial(show, x), state.error):
                mask = every > 1 or running < state.status.numel()
                for _ in range(every):
                    x, state = self._step(rows, x, state, mask=mask)
                    count += 1
                    if _is_milestone(count):
                        state = self._spared(rows, x, state, state.status == Status.RUNNING)
                if not any_lane(state.status == Status.RUNNING):
                    state, before = self._confirmed(rows, start, x, state, before)
            state = self._spared(rows, x, state, state.iter_num > 0)
        self._settle(state if lanes else _unbatched(state))
        return x, report.into(state)

    def _settle(self, state: Any) -> None:
        settle(self.name, state, self.options.on_failure, budget=self.options.maxiter is not None)


def make(
    name: str,
    pose: Pose,
    functions: tuple[Callable[..., Any], ...],
    method: Method,
    options: Any,
    guess: Callable[..., Any] | None = None,
    is_named: bool = False,
    kind: type[Maker] = Maker,
) -> Solver:
    """A solver from a method and the condition that its solutions satisfy.

    All of it has to pickle, but for what the user gives: functions of modules, bound to options by functools.partial.

    Args:
        name: of the factory.
        pose: makes the condition of the user's functions.
        functions: those.
        method: the iteration.
        options: of `Options`.
        guess, is_named: see `Maker`.
        kind: the class of the maker.
    """
    for fn in functions:
        if not callable(fn):
            raise TypeError(f"{name}: a function was expected, got {type(fn).__name__}")
    checked = options_of(name, options)
    called = ", ".join(map(name_of, functions[:1]))
    maker = kind(name, f"{name}({called})", pose, functions, method, checked, guess, is_named)
    return Solver(*(SolverFunction(maker, field) for field in Solver._fields))


def _is_milestone(count: Any) -> Any:
    """Whether a number, or each of a tensor's, is 8, 16, 32, ..."""
    return (count >= 8) & (count & (count - 1) == 0)


def _unbatched(state: Any) -> Any:
    return pytree.map_tensors(lambda t: t[0], state)


def _select_all(active: Tensor, new: Any, old: Any) -> Any:
    """`select`, tensor by tensor; what no step changes is not copied."""
    leaves, structure = pytree.flatten(new)
    pairs = zip(leaves, structure.tensors_of(old), strict=True)
    return structure.unflatten([a if a is b else select(active, a, b) for a, b in pairs])


def _plain(tree: Any) -> Any:
    """The values of a tree in the caller's frame, the lanes of its vmaps in front."""
    return pytree.map_tensors(_value, tree)


def _value(tensor: Tensor) -> Tensor:
    return functorch.without_batch_layers([functorch.plain_under_vmap(functorch.alive(tensor))])[0][0]
