"""The type of a solver, and the loop round every method.

A method's code runs in one of two frames. `Solver.init` and `Solver.update` run it in the caller's frame, on one lane
as torch.func presents it, so that transforms see every operation. `Solver.run` takes the vmaps off and runs the same
code below all transforms, on plain tensors with one row for each lane. Then the solution gets the derivatives of the
equation that it satisfies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import Any, Generic, Protocol, overload

import torch
from torch import Tensor
from typing_extensions import NamedTuple, TypeVar

import implicitdiff._closures.modes as _modes
import implicitdiff._torch.context as _context
import implicitdiff._torch.levels as _levels
import implicitdiff._torch.settings as _settings
import implicitdiff._torch.switches as _switches
import implicitdiff._torch.trees as pytree
from implicitdiff._calls import FactoryCall, Remembers
from implicitdiff._closures.signature import name_of
from implicitdiff._implicit.checks import check_unknowns
from implicitdiff._implicit.linear import LinearSolver
from implicitdiff._implicit.system import Vectors
from implicitdiff._torch.lanes import VmapSize
from implicitdiff._torch.replacements import elementary
from implicitdiff._torch.trees import Leaves, P, Structure, Tree, X
from implicitdiff._torch.values import refuse_missing
from implicitdiff._unroll import unroll
from implicitdiff.linear_solve._outcome import OnFailure
from implicitdiff.linear_solve.auto import solve_auto
from implicitdiff.solvers._loop.compiled import Compiler, SearchParts
from implicitdiff.solvers._loop.equations import EquationOf
from implicitdiff.solvers._loop.function import LastByKeyword, SolverFunction
from implicitdiff.solvers._loop.lifted import LiftedProblem
from implicitdiff.solvers._loop.method import IterativeMethod
from implicitdiff.solvers._loop.options import Options, check_count, options_of
from implicitdiff.solvers._loop.problem import BatchedProblem, LeafFunction, row_norm, select, select_tree
from implicitdiff.solvers._loop.recordings import is_fixed, kind_of
from implicitdiff.solvers._loop.report import Callback, Report
from implicitdiff.solvers._loop.row_search import Frame, RowSearch, until_stopped
from implicitdiff.solvers._loop.state import MemoryT, State, Verdict
from implicitdiff.solvers._loop.status import Status, report_failures
from implicitdiff.solvers._loop.termination import Termination

X_contra = TypeVar("X_contra", bound=Any, contravariant=True, default=Any)


class InitFn(Protocol[X_contra, P, MemoryT]):
    """The type of ``solver.init``."""

    def __call__(self, params: X_contra, *args: P.args, **kwargs: P.kwargs) -> State[MemoryT]: ...


class UpdateFn(Protocol[X, P, MemoryT]):
    """The type of ``solver.update``."""

    def __call__(
        self, params: X, state: State[MemoryT], *args: P.args, **kwargs: P.kwargs
    ) -> tuple[X, State[MemoryT]]: ...


class RunFn(Protocol[X, P, MemoryT]):
    """The type of ``solver.run``.

    A type checker compares arguments with the user's function in a call without options. Python has no type for a
    function of the user's arguments and options, so with an option any arguments pass.
    """

    @overload
    def __call__(self, params: X, *args: P.args, **kwargs: P.kwargs) -> tuple[X, State[MemoryT]]: ...
    @overload
    def __call__(
        self,
        params: X,
        *args: Any,
        implicit_diff: bool,
        checkpoint_every: int | None = None,
        keep_history: bool = False,
        verbose: bool = False,
        callback: Callback | None = None,
        **kwargs: Any,
    ) -> tuple[X, State[MemoryT]]: ...
    @overload
    def __call__(
        self,
        params: X,
        *args: Any,
        keep_history: bool,
        verbose: bool = False,
        callback: Callback | None = None,
        **kwargs: Any,
    ) -> tuple[X, State[MemoryT]]: ...
    @overload
    def __call__(
        self, params: X, *args: Any, verbose: bool, callback: Callback | None = None, **kwargs: Any
    ) -> tuple[X, State[MemoryT]]: ...
    @overload
    def __call__(self, params: X, *args: Any, callback: Callback, **kwargs: Any) -> tuple[X, State[MemoryT]]: ...


class OptimalityFn(Protocol[X, P]):
    """The type of ``solver.optimality_fn``."""

    def __call__(self, params: X, *args: P.args, **kwargs: P.kwargs) -> X: ...


class Solver(NamedTuple, Generic[X, P, MemoryT]):
    """A solver as four pure functions, made by the factories of `implicitdiff.solvers`; see there.

    As a type ``Solver[X, P, M]`` has the unknowns ``X``, such as ``Tensor`` or ``dict[str, Tensor]``, the parameters
    ``P`` of the user's function after the first, and the memory ``M``, such as `LbfgsMemory`. A parameter that is
    omitted is any: ``Solver[Tensor]``, ``Solver``.

    Attributes:
        init: ``init(params, *args, **kwargs) -> state``.
        update: ``update(params, state, *args, **kwargs) -> (params, state)``, one iteration.
        run: ``run(params, *args, implicit_diff=True, checkpoint_every=None, keep_history=False, verbose=False,
            callback=None, **kwargs) -> (params, state)``, iterations until every lane has stopped.
        optimality_fn: ``optimality_fn(params, *args, **kwargs)``, a tree like ``params``, zero at a solution. The
            derivatives of ``run`` are those of this equation.
    """

    init: InitFn[X, P, MemoryT]
    update: UpdateFn[X, P, MemoryT]
    run: RunFn[X, P, MemoryT]
    optimality_fn: OptimalityFn[X, P]

    def __repr__(self) -> str:
        return repr(getattr(self.run, "maker", self.run))

    def remember(self, call: FactoryCall) -> None:
        """Set the call that `repr` shows."""
        self.run.maker.remember(call)  # type: ignore[attr-defined]


@dataclass(frozen=True, repr=False)
class SolverImpl(Remembers):
    """The implementation of a `Solver`: a method for each of the four functions, with the user's arguments as a tuple.

    Attributes:
        factory: the name of the factory.
        name: the name of the factory with the user's function, for messages.
        equation_of: makes the equation of the user's functions.
        functions: the user's functions.
        method: the iteration.
        options: the options that every solver has.
        guess: ``guess(params, *args, **kwargs)``, the unknowns for a user's `params`; None: `params` are the unknowns.
        is_named: True if the first function is the library's own, so that signatures show its parameters.
        termination: the stopping rule.
    """

    factory: str
    name: str
    equation_of: EquationOf
    functions: tuple[Callable[..., Any], ...]
    method: IterativeMethod
    options: Options
    guess: Callable[..., Any] | None = None
    is_named: bool = False
    termination: Termination = field(init=False)

    def __post_init__(self) -> None:
        rtol, atol, maxiter = self.options.rtol, self.options.atol, self.options.maxiter
        limit = self.method.default_maxiter if maxiter is None else maxiter
        object.__setattr__(self, "termination", Termination(rtol, atol, limit, is_budget=maxiter is not None))

    def with_last_by_keyword(self, names: tuple[str, ...]) -> SolverImpl:
        """Return a solver whose last arguments go to the user's first function by these keywords."""
        fn, *others = self.functions
        return replace(self, functions=(LastByKeyword(fn, names), *others))

    def optimality_fn(self, params: Tree, args: tuple[Tree, ...]) -> Any:
        """Return the residual of the optimality condition.

        Args:
            params: the unknowns.
            args: the arguments of the user's function after the first, by position or keyword.

        Returns:
            A tree like `params`, zero at a solution.
        """
        equation = self.equation_of(*self.functions)
        return equation.on_trees(equation.functions, params, args)

    @_modes.one_operation
    @_settings.outside_autocast
    def init(self, params: Tree, args: tuple[Tree, ...]) -> Any:
        """Return the state at an initial guess.

        Args:
            params: the initial guess, a tree of tensors.
            args: the arguments of the user's function after the first, by position or keyword.

        Returns:
            A `State`.
        """
        x, problem, _ = self._frame(params, args)
        with _settings.full_precision():
            state = _unbatched(self._start(problem, x))
        # Each with memory of its own: a checkpoint is loaded into the tensors of a first state.
        return pytree.map_tensors(torch.clone, state)

    @_modes.one_operation
    @_settings.outside_autocast
    def update(self, params: Tree, state: Any, args: tuple[Tree, ...]) -> tuple[Any, Any]:
        """Make one iteration.

        Args:
            params: the unknowns.
            state: the state that belongs to `params`, by ``init`` or the last ``update``.
            args: the arguments of the user's function after the first, by position or keyword.

        Returns:
            ``(params, state)``: the new unknowns, a tree like `params`, and a `State`.
        """
        x, problem, structure = self._frame(params, args)
        with _settings.full_precision():
            old = pytree.map_tensors(lambda t: t[None], state)
            x, state = self._step(problem, x, old, mask=True)
            state = self.termination.look(self.method, problem, x, state)
        return structure.unflatten(problem.inputs.unravel(x)), _unbatched(state)

    @_modes.one_operation
    @_settings.outside_autocast
    def run(
        self,
        params: Tree,
        args: tuple[Tree, ...],
        *,
        implicit_diff: bool = True,
        checkpoint_every: int | None = None,
        keep_history: bool = False,
        verbose: bool = False,
        callback: Callback | None = None,
    ) -> tuple[Any, Any]:
        """Iterate from an initial guess until every lane has stopped.

        Args:
            params: the initial guess, a tree of tensors.
            args: the arguments of the user's function after the first, by position or keyword.
            implicit_diff: False to differentiate the iterations instead of the equation.
            checkpoint_every: with ``implicit_diff=False``, keep only every so many iterates in memory.
            keep_history: True to record the errors of all iterations in ``state.history``.
            verbose: True to show a progress bar for a run of more than a second (needs tqdm).
            callback: ``callback(iter_num, params, state)``, called at every test of the status.

        Returns:
            ``(params, state)``: the solution, a tree like `params`, and a `State` with the number of iterations, the
            error, the status and the memory of the method.

        Raises:
            ConvergenceError: a lane failed, with ``on_failure="raise"``; see `Status`.
            TypeError: a tensor of `params` is not floating-point, or the arguments are not those of the function.
            ValueError: the function changes its arguments, or draws random numbers.
            TransformError: torch.func cannot transform the function.
        """
        report = Report(self.name, self.termination.limit, keep_history, verbose, callback)
        if not implicit_diff:
            if self.method.only_implicit is not None:
                raise ValueError(f"{self.name}: {self.method.only_implicit}; leave implicit_diff at True")
            return self._unrolled(params, args, checkpoint_every, report)
        if checkpoint_every is not None:
            raise ValueError(
                f"{self.name}: checkpoint_every needs implicit_diff=False, because the implicit derivative stores no "
                "iteration"
            )
        return self._implicit(params, args, report)

    # --- the iteration ----------------------------------------------------------------------------------------------

    def _start(self, problem: BatchedProblem, x: Tensor) -> State[Any]:
        return self.termination.begin(self.method, problem, x, self.method.start(problem, x))

    def _step(self, problem: BatchedProblem, x: Tensor, state: State[Any], *, mask: bool) -> tuple[Tensor, State[Any]]:
        """Make one iteration; with `mask`, stopped lanes do not change."""
        new_x, new = self.method.step(problem, x, state)
        new = self.termination.advance(self.method, problem, x, new_x, new)
        if not mask:
            return new_x, new
        active = state.status == Status.RUNNING
        return select(active, new_x, x), select_tree(active, new, state)

    # --- in the caller's frame --------------------------------------------------------------------------------------

    def _frame(self, params: Tree, args: tuple[Tree, ...]) -> tuple[Tensor, BatchedProblem, Structure]:
        leaves, structure = pytree.flatten(params)
        check_unknowns(f"{self.name}: the initial guess", leaves, structure)
        refuse_missing(self.name, [*leaves, *pytree.tensors(args)])
        equation = self.equation_of(*self.functions)
        # No batch: under a vmap of the caller each leaf is a wrapper with the shape of one lane.
        inputs = Vectors(leaves, ())

        def on_leaves(function: Callable[..., Any]) -> LeafFunction:
            def fn(x: Leaves, more: Leaves) -> Leaves:
                before = [_modes.version(t) for t in x]
                with _modes.as_user_code():
                    result = pytree.tensors(function(structure.unflatten(x), args, *more))
                if before != [_modes.version(t) for t in x]:
                    raise ValueError(f"{self.name} changes its first argument in place; change a clone instead")
                return result

            return fn

        on = {name: on_leaves(elementary()(function)) for name, function in equation.functions.items()}
        problem = BatchedProblem(on, inputs, structure, _context.now().is_silent, equation.on_rows)
        return inputs.ravel(leaves), problem, structure

    def _unrolled(
        self, params: Tree, args: tuple[Tree, ...], checkpoint_every: int | None, report: Report
    ) -> tuple[Any, Any]:
        def step(carry: tuple[Any, Any], *args: Any) -> tuple[Any, Any]:
            return self.update(*carry, args)

        if checkpoint_every is not None:
            check_count(self.name, "checkpoint_every", checkpoint_every)
        at_once = checkpoint_every or (1 if report.keeps else self.options.check_every)
        advance = unroll(step, at_once, checkpoint_every)
        # The first state evaluates the function, and a draw moves the state of a generator.
        random_state = _switches.random_state()
        state = self.init(params, args)
        if _switches.random_state() != random_state:
            raise ValueError(
                f"{self.name} draws random numbers, so the iterations cannot converge; draw them outside and pass "
                "them as arguments (dropout: use eval mode)"
            )
        first_x, _, _ = self._frame(params, args)

        def on_rows(rule: Callable[..., Any], params: Tree, *states: Any) -> Any:
            x, problem, _ = self._frame(params, args)
            with _settings.full_precision():
                one = pytree.map_tensors(lambda t: t[None], states)
                return _unbatched(rule(problem, x, *one))

        def judge(problem: BatchedProblem, x: Tensor, *states: Any) -> Any:
            return self.termination.judge(self.method, problem, first_x, x, *states)

        frame = Frame(
            see=lambda params, state: report.see(_plain(state), partial(_plain, params), state.error),
            advance=lambda params, state, _: advance((params, state), *args),
            judge=partial(on_rows, judge),
            settle=partial(on_rows, partial(self.termination.settle, self.method)),
        )
        with contextlib.closing(report):
            params, state = until_stopped(params, state, Verdict.initial(state), frame)
        state = pytree.map_tensors(Tensor.detach, state)
        layers = _levels.without_batch_layers(_levels.plain_values([state.status]))[1]
        self._report_failures(_plain(state), [VmapSize(layer.level, layer.size) for layer in reversed(layers)])
        return params, report.into(state)

    # --- below the transforms ---------------------------------------------------------------------------------------

    def _implicit(self, params: Tree, args: tuple[Tree, ...], report: Report) -> tuple[Any, Any]:
        options = self.options
        solve = options.solve or _default_solve(options.on_failure)
        lifted = LiftedProblem(self.name, self.equation_of(*self.functions), params, args, solve)
        x, state = lifted.search(partial(self._loop, structure=lifted.structure, report=report))
        if not lifted.needs_derivatives:
            return lifted.structure.unflatten(x), state
        return lifted.attached(x, None if self.is_named else self._accept), state

    def _accept(self, problem: BatchedProblem, x: Tensor, state: State[Any], residual: Tensor) -> None:
        """Raise if the residual that the derivative finds at the solution is of another function than the search."""
        other = self.termination.of_other_function(problem, x, state, residual)
        if other is not None:
            i = int(other.nonzero()[0])
            raise ValueError(
                f"{self.name}: the function has changed during the search: at the solution the error is "
                f"{row_norm(residual)[i]:.3g} for the derivative, and was {state.error[i]:.3g} in the search; the "
                "library evaluates it more than once, and each evaluation must give the same values: keep counters, "
                "iterators and caches outside of the function"
            )

    def _loop(self, problem: BatchedProblem, x: Tensor, structure: Structure, report: Report) -> tuple[Tensor, Any]:
        lanes, every = problem.inputs.batch, 1 if report.keeps else self.options.check_every
        parts = self._parts()

        def see(x: Tensor, state: State[Any]) -> int:
            return report.see(state, lambda: structure.unflatten(problem.inputs.unravel(x)), state.error)

        compiler = None
        if self.options.compile != "off" and not report.is_watching:
            # A report has to see every iteration, and a recorded loop shows only some.
            compiler = Compiler(self.name, self._kind, parts, problem, self.options.compile)
        report.lanes = lanes
        with contextlib.closing(report):
            x, state = RowSearch(parts, problem, compiler, every, see).run(x)
        vmaps = () if problem.operands is None else problem.operands.vmaps
        self._report_failures(state if lanes else state._replace(status=state.status[0]), vmaps)
        return x, report.into(state)

    def _kind(self) -> Hashable:
        """Return the solver without the user's functions as a part of the key of a recording."""
        return self._fixed_kind or kind_of(self._recorded_parts)

    @cached_property
    def _fixed_kind(self) -> Hashable | None:
        # Pickled with the solver: of numbers, names, classes and functions of modules alone.
        return kind_of(self._recorded_parts) if is_fixed(self._recorded_parts) else None

    @property
    def _recorded_parts(self) -> tuple[Any, ...]:
        return self.factory, self.method, tuple(vars(self.termination).values()), self.equation_of

    def _parts(self) -> SearchParts:
        rule = self.termination
        return SearchParts(
            start=self._start,
            step=partial(self._step, mask=False),
            asks=partial(rule.asks, self.method),
            measure=partial(rule.look, self.method),
            judge=partial(rule.judge, self.method),
            settle=partial(rule.settle, self.method),
        )

    def _report_failures(self, state: Any, vmaps: Sequence[VmapSize]) -> None:
        budget = self.options.maxiter is not None
        report_failures(self.name, state, self.options.on_failure, budget=budget, vmaps=vmaps)


def make_solver(
    name: str,
    equation_of: EquationOf,
    functions: tuple[Callable[..., Any], ...],
    method: IterativeMethod,
    options: Any,
    guess: Callable[..., Any] | None = None,
    is_named: bool = False,
    impl: type[SolverImpl] = SolverImpl,
) -> Solver[X, P, MemoryT]:
    """Make a solver from a method and the equation of its solutions.

    Every argument but the user's functions must pickle: bind options to functions of modules by functools.partial.

    Args:
        name: the name of the factory.
        equation_of: makes the equation of the user's functions.
        functions: the user's functions.
        method: the iteration.
        options: keyword arguments for `Options`.
        guess, is_named: see `SolverImpl`.
        impl: the class of the implementation.
    """
    for fn in functions:
        if not callable(fn):
            raise TypeError(f"{name}: fn must be a function, got {type(fn).__name__}")
    checked = options_of(name, options)
    called = name if is_named else f"{name}({', '.join(map(name_of, functions[:1]))})"
    made = impl(name, called, equation_of, functions, method, checked, guess, is_named)
    return Solver(*(SolverFunction(made, field) for field in Solver._fields))


@cache
def _default_solve(on_failure: OnFailure) -> LinearSolver:
    return solve_auto(on_failure=on_failure)


def _unbatched(state: Any) -> Any:
    return pytree.map_tensors(lambda t: t[0], state)


def _plain(tree: Any) -> Any:
    """Return the plain tensors of a tree, with the lanes of all vmaps in front."""
    return pytree.map_tensors(_plain_value, tree)


def _plain_value(tensor: Tensor) -> Tensor:
    return _levels.without_batch_layers(_levels.plain_values([tensor]))[0][0]
