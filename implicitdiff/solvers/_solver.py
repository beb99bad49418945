"""What a solver is, and the loop round every method.

`Solver.init` and `Solver.update` run a method's own lines in the caller's frame, one lane at a time as torch.func has
it, so that transforms see every operation. `Solver.run` takes the vmaps off, runs the same lines once on plain tensors
with one row for each lane, and gives the solution the derivatives of the condition that it satisfies.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import implicitdiff._closure as _closure
import implicitdiff._functorch as functorch
import implicitdiff._modes as _modes
import implicitdiff.pytree as pytree
from implicitdiff._freeze import freeze
from implicitdiff._linear import Solve, check_leaves
from implicitdiff._operator import Dims
from implicitdiff._primitive import attach
from implicitdiff._root import RootProblem
from implicitdiff._signature import name_of
from implicitdiff._system import Vectors
from implicitdiff._unroll import unroll
from implicitdiff.linear_solve.auto import solve_auto
from implicitdiff.pytree import Leaves, Structure
from implicitdiff.solvers._condition import Condition, Pose
from implicitdiff.solvers._report import Callback, Report
from implicitdiff.solvers._rows import Part, RowFunction, Rows, select
from implicitdiff.solvers._status import OnFailure, Status, advance, settle


class Solver(NamedTuple):
    """A solver as pure functions; made by the factories of `implicitdiff.solvers`, where all is said.

    Attributes:
        init: ``init(params, *args) -> state``.
        update: ``update(params, state, *args) -> (params, state)``, one iteration.
        run: ``run(params, *args, implicit_diff=True, checkpoint_every=None, keep_history=False, verbose=False,
            callback=None) -> (params, state)``, iterations until every lane has stopped.
        optimality_fn: ``optimality_fn(params, *args)``, a tree like ``params``, zero at a solution; its derivatives
            are what ``run`` is differentiated by.
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
        net: how many iterations ``maxiter=None`` allows.
        only_implicit: why ``implicit_diff=False`` makes no sense, if it makes none.
    """

    start: Callable[[Rows, Tensor], Any]
    step: Callable[[Rows, Tensor, Any], tuple[Tensor, Any]]
    net: int
    only_implicit: str | None = None


@dataclass(frozen=True)
class Options:
    """What every solver is made with; see `implicitdiff.solvers`."""

    rtol: float | None = None
    atol: float | None = None
    maxiter: int | None = None
    check_every: int = 1
    solve: Solve | None = None
    on_failure: OnFailure = "raise"

    def check(self, name: str) -> None:
        """Refuse what makes no sense."""
        for option, value in (("rtol", self.rtol), ("atol", self.atol)):
            if value is not None and not (_is_number(value) and value >= 0):
                raise ValueError(f"{name}: {option} must be a number >= 0 or None, got {value!r}")
        if self.maxiter is not None and not (_is_integer(self.maxiter) and self.maxiter >= 1):
            raise ValueError(f"{name}: maxiter must be an integer >= 1 or None, got {self.maxiter!r}")
        if not (_is_integer(self.check_every) and self.check_every >= 1):
            raise ValueError(f"{name}: check_every must be an integer >= 1, got {self.check_every!r}")
        if self.solve is not None and not _takes_two(self.solve):
            raise TypeError(
                f"{name}: solve must be a function solve(matvec, b), such as linear_solve.solve_gmres(), with its "
                f"parentheses, got {name_of(self.solve)}"
            )
        if self.on_failure not in ("raise", "warn", "ignore"):
            raise ValueError(f'{name}: on_failure must be "raise", "warn" or "ignore", got {self.on_failure!r}')


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _takes_two(fn: Any) -> bool:
    try:
        inspect.signature(fn).bind(None, None)
    except ValueError:  # some builtins have no signature
        return True
    except TypeError:
        return False
    return True


def check_count(name: str, option: str, value: Any) -> None:
    """Refuse what is no integer >= 1."""
    if not (_is_integer(value) and value >= 1):
        raise ValueError(f"{name}: {option} must be an integer >= 1, got {value!r}")


def check_number(name: str, option: str, value: Any, wanted: str, holds: Callable[[Any], bool]) -> None:
    """Refuse what is no number, or not one that is wanted."""
    if not (_is_number(value) and holds(value)):
        raise ValueError(f"{name}: {option} must be {wanted}, got {value!r}")


def make(name: str, pose: Pose, functions: tuple[Callable[..., Any], ...], method: Method, options: Any) -> Solver:
    """A solver from a method and the condition that its solutions satisfy.

    Args:
        name: of the factory.
        pose: makes the condition of the user's functions.
        functions: those.
        method: the iteration.
        options: of `Options`.
    """
    for fn in functions:
        if not callable(fn):
            raise TypeError(f"{name}: a function was expected, got {type(fn).__name__}")
    known = [option.name for option in fields(Options)]
    if unknown := [option for option in options if option not in known]:
        raise TypeError(f"{name}: there is no option {unknown[0]!r}; those of every solver are {', '.join(known)}")
    checked = Options(**options)
    checked.check(name)
    called = ", ".join(map(name_of, functions[:1]))
    maker = _Maker(f"{name}({called})", pose, functions, method, checked)
    return Solver(maker.init, maker.update, maker.run, maker.optimality)


@dataclass(frozen=True)
class _Maker:
    name: str
    pose: Pose
    functions: tuple[Callable[..., Any], ...]
    method: Method
    options: Options
    limit: int = field(init=False)

    def __post_init__(self) -> None:
        limit = self.method.net if self.options.maxiter is None else self.options.maxiter
        object.__setattr__(self, "limit", limit)

    def optimality(self, params: Any, *args: Any) -> Any:
        condition = self.pose(*self.functions)
        return condition.optimality(condition.parts, params, args)

    @functorch.outside_compile
    def init(self, params: Any, *args: Any) -> Any:
        x, rows, _ = self._frame(params, args)
        return _unbatched(self._start(rows, x))

    @functorch.outside_compile
    def update(self, params: Any, state: Any, *args: Any) -> tuple[Any, Any]:
        x, rows, structure = self._frame(params, args)
        x, state = self._step(rows, x, pytree.map_tensors(lambda t: t[None], state), mask=True)
        return structure.unflatten(rows.inputs.unravel(x)), _unbatched(state)

    @functorch.outside_compile
    def run(
        self,
        params: Any,
        *args: Any,
        implicit_diff: bool = True,
        checkpoint_every: int | None = None,
        keep_history: bool = False,
        verbose: bool = False,
        callback: Callback | None = None,
    ) -> tuple[Any, Any]:
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
        status = advance(new.status.detach(), error, state.target, iter_num, self.limit)
        new = new._replace(iter_num=iter_num, error=error, status=status)
        if not mask:
            return new_x, new
        active = state.status == Status.RUNNING
        return select(active, new_x, x), _select_all(active, new, state)

    # --- in the caller's frame --------------------------------------------------------------------------------------

    def _frame(self, params: Any, args: tuple[Any, ...]) -> tuple[Tensor, Rows, Structure]:
        leaves, structure = pytree.flatten(params)
        check_leaves(f"{self.name}: the initial guess", leaves)
        parts = self.pose(*self.functions).parts
        inputs = Vectors(leaves, ())

        def on_leaves(part: Callable[..., Any]) -> Part:
            def fn(x: Leaves, more: Leaves) -> Leaves:
                before = [_modes.version(t) for t in x]
                result = pytree.tensors(part(structure.unflatten(x), args, *more))
                if before != [_modes.version(t) for t in x]:
                    raise ValueError(f"{self.name} changes its first argument in place; work on a clone of it")
                return result

            return fn

        on = {name: on_leaves(part) for name, part in parts.items()}
        rows = Rows(on, inputs, structure, functorch.nothing_records(), self.options.rtol, self.options.atol)
        return inputs.ravel(leaves), rows, structure

    def _unrolled(
        self, params: Any, args: tuple[Any, ...], checkpoint_every: int | None, report: Report
    ) -> tuple[Any, Any]:
        def step(carry: tuple[Any, Any], *args: Any) -> tuple[Any, Any]:
            return self.update(*carry, *args)

        if checkpoint_every is not None:
            check_count(self.name, "checkpoint_every", checkpoint_every)
        at_once = checkpoint_every or (1 if report.keeps else self.options.check_every)
        advance = unroll(step, at_once, checkpoint_every)
        random_state = torch.get_rng_state()
        state = self.init(params, *args)
        if not torch.equal(random_state, torch.get_rng_state()):
            raise ValueError(
                f"{self.name} draws random numbers, with which no iteration converges; draw them outside and pass them "
                "as arguments (dropout: use eval mode)"
            )
        with report:
            while report.see(_plain(state), partial(_plain, params), state.error):
                params, state = advance((params, state), *args)
        state = pytree.map_tensors(Tensor.detach, state)
        plain = _plain(state)
        settle(self.name, plain, self.options.on_failure, budget=self.options.maxiter is not None)
        return params, report.into(state)

    # --- below the transforms ---------------------------------------------------------------------------------------

    def _implicit(self, params: Any, args: tuple[Any, ...], report: Report) -> tuple[Any, Any]:
        closed = _Closed(self, params, args)
        x, state = closed.search(report)
        problem = RootProblem(closed.residual, self.options.solve or solve_auto(), closed.structure)
        solution = attach(problem, x, closed.theta)
        return closed.structure.unflatten(solution), state

    def _loop(self, rows: Rows, x: Tensor, show: Callable[[Tensor], Any], report: Report) -> tuple[Tensor, Any]:
        state = self._start(rows, x)
        every = 1 if report.keeps else self.options.check_every
        with report:
            while running := report.see(state, partial(show, x), state.error):
                mask = every > 1 or running < state.status.numel()
                for _ in range(every):
                    x, state = self._step(rows, x, state, mask=mask)
        return x, report.into(state)


class _Closed:
    """The user's functions with all that they capture as operands, so that the vmaps can be taken off."""

    def __init__(self, maker: _Maker, params: Any, args: tuple[Any, ...]) -> None:
        self.maker = maker
        self.x0, self.structure = pytree.flatten(params)
        check_leaves(f"{maker.name}: the initial guess", self.x0)
        given, self.arguments = pytree.flatten(args)
        self.given = len(given)
        self.condition: Condition = maker.pose(*map(freeze, maker.functions))
        parts = self.condition.parts

        def dispatch(name: str | None, *operands: Any) -> Any:
            if name is None:
                return {name: part(*operands) for name, part in parts.items()}
            return parts[name](*operands)

        _, self.closure = _closure.close_over(maker.name, dispatch, None, params, args)
        self.theta = [*given, *self.closure.captured]

    def _parts(self, theta: Leaves) -> tuple[dict[str, Callable[..., Any]], tuple[Any, ...]]:
        captured = theta[self.given :]
        bound: dict[str, Callable[..., Any]] = {
            name: partial(self.closure, captured, name) for name in self.condition.parts
        }
        args: tuple[Any, ...] = self.arguments.unflatten(theta[: self.given])
        return bound, args

    def residual(self, x: Leaves, theta: Leaves) -> Leaves:
        parts, args = self._parts(theta)
        return self.structure.tensors_of(self.condition.optimality(parts, self.structure.unflatten(x), args))

    def search(self, report: Report) -> tuple[Leaves, Any]:
        """The solution and the state, which only the vmaps see."""
        operands = [functorch.plain_under_vmap(functorch.alive(t)) for t in _modes.alias([*self.x0, *self.theta])]
        operands, layers = functorch.without_batch_layers(operands)
        levels: list[Dims] = [tuple(None if d is None else 0 for d in layer.dims) for layer in layers]
        lanes = tuple(layer.size for layer in reversed(layers))
        n = len(self.x0)
        with _modes.unseen(), functorch.nothing_running(), _closure.full_precision():
            operands = functorch.out_of_inference(operands)
            x = [_everywhere(t, [dims[i] for dims in levels], lanes) for i, t in enumerate(operands[:n])]
            solution, state = self._solve(x, operands[n:], [dims[n:] for dims in levels], lanes, report)
        # The lanes of the outermost vmap lie in front.
        for layer in reversed(layers):
            solution = [functorch.add_layer(t, 0, layer) for t in solution]
            state = pytree.map_tensors(partial(functorch.add_layer, dim=0, of=layer), state)
        return solution, state

    def _solve(
        self, x: Leaves, theta: Leaves, levels: list[Dims], lanes: tuple[int, ...], report: Report
    ) -> tuple[Leaves, Any]:
        rows = self._rows(x, theta, levels, lanes)
        inputs, options = rows.inputs, self.maker.options

        def show(x: Tensor) -> Any:
            return self.structure.unflatten(inputs.unravel(x))

        rows_x, state = self.maker._loop(rows, inputs.ravel(x), show, report.over(lanes))
        settle(self.maker.name, state if lanes else _unbatched(state), options.on_failure, budget=self._has_budget)
        return inputs.unravel(rows_x), pytree.map_tensors(lambda t: t.reshape((*lanes, *t.shape[1:])), state)

    def _rows(self, x: Leaves, theta: Leaves, levels: list[Dims], lanes: tuple[int, ...]) -> Rows:
        def lane(i: int) -> Rows:
            at = tuple(int(k) for k in torch.unravel_index(torch.tensor(i), lanes))
            outermost_first = zip(theta, *levels[::-1], strict=True)
            own = [t[tuple(k for k, d in zip(at, dims, strict=True) if d is not None)] for t, *dims in outermost_first]
            return self._rows([t[at] for t in x], own, [], ())

        options, inputs = self.maker.options, Vectors(x, lanes)
        parts = {name: self._over_lanes(name, theta, levels) for name in self.condition.parts}
        if not lanes:
            return Rows(parts, inputs, self.structure, True, options.rtol, options.atol)
        jacobians = {name: self._jacobian_over_lanes(name, theta, levels) for name in parts}
        return Rows(parts, inputs, self.structure, True, options.rtol, options.atol, lane, jacobians)

    @property
    def _has_budget(self) -> bool:
        return self.maker.options.maxiter is not None

    def _over_lanes(self, name: str, theta: Leaves, levels: list[Dims]) -> Part:
        fn = self._one_lane(name)
        for dims in levels:
            fn = torch.func.vmap(fn, in_dims=(0, list(dims), 0))
        return lambda x, more: fn(x, theta, more)

    def _jacobian_over_lanes(
        self, name: str, theta: Leaves, levels: list[Dims]
    ) -> Callable[[Leaves], tuple[Tensor, Tensor]]:
        """The vmap over unit vectors inside of those over lanes: outside, it would copy what the lanes hold, once for
        each vector."""
        part = self._one_lane(name)

        def one_lane(x: Leaves, theta: Leaves) -> tuple[Tensor, Tensor]:
            inputs = Vectors(x, ())
            y, matrix = RowFunction(lambda x, more: part(x, theta, more), inputs, False).jacobian(inputs.ravel(x))
            return y[0], matrix[0]

        fn = one_lane
        for dims in levels:
            fn = torch.func.vmap(fn, in_dims=(0, list(dims)))
        return lambda x: fn(x, theta)

    def _one_lane(self, name: str) -> Callable[[Leaves, Leaves, Leaves], Leaves]:
        def fn(x: Leaves, theta: Leaves, more: Leaves) -> Leaves:
            parts, args = self._parts(theta)
            return pytree.tensors(parts[name](self.structure.unflatten(x), args, *more))

        return fn


def _everywhere(tensor: Tensor, dims: list[int | None], lanes: tuple[int, ...]) -> Tensor:
    """A tensor with a batch dimension in front for every lane; it has those where `dims`, from the innermost vmap
    outwards, is not None."""
    has = [d is not None for d in reversed(dims)]
    for at, there in enumerate(has):
        if not there:
            tensor = tensor.unsqueeze(at)
    return tensor.expand((*lanes, *tensor.shape[len(lanes) :]))


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
