"""The problem of a search, below the transforms and with the derivatives of its solution."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

import implicitdiff._closures.modes as _modes
import implicitdiff._torch.context as _context
import implicitdiff._torch.decisions as _decisions
import implicitdiff._torch.functions as _functions
import implicitdiff._torch.levels as _levels
import implicitdiff._torch.settings as _settings
import implicitdiff._torch.switches as _switches
import implicitdiff._torch.trees as pytree
from implicitdiff._closures.evaluation import transform_error
from implicitdiff._closures.lift import FunctionChangedError, lift
from implicitdiff._implicit.checks import check_unknowns
from implicitdiff._implicit.linear_problem import Solve
from implicitdiff._implicit.operators import Dims
from implicitdiff._implicit.root import RootAt, root_at, root_form
from implicitdiff._implicit.system import Vectors
from implicitdiff._recorded.straight import StraightLines
from implicitdiff._torch.lanes import VmapSize, over_levels
from implicitdiff._torch.trees import Leaves, Structure, Tree
from implicitdiff._torch.values import refuse_valueless
from implicitdiff.solvers._loop.equations import Composite, Equation
from implicitdiff.solvers._loop.problem import BatchedProblem, LeafFunction, Noted, RowFunction, SearchOperands

Search = Callable[[BatchedProblem, Tensor], tuple[Tensor, Any]]
"""``search(problem, x) -> (x, state)``."""
Accept = Callable[[BatchedProblem, Tensor, Any, Tensor], None]
"""``accept(problem, x, state, residual)`` raises if `residual` is of another function than the search has solved."""


class End(NamedTuple):
    """The end of a search, below the transforms, in the frame of the search; the state as its leaves."""

    problem: BatchedProblem
    x: Tensor
    state: Leaves
    nesting: Structure
    frame: AbstractContextManager[object]


_SIZE: Callable[[VmapSize], int] = attrgetter("size")


class LiftedProblem:
    """The equation of a search, and the user's functions in it, as pure functions of explicit operands.

    The functions are lifted once, at the initial guess: the search takes the vmaps off their operands, and the
    derivative of the solution uses the residual of the equation. Where the residual applies other operations at the
    solution than at the initial guess, as after a branch on values, it is lifted there once more.

    Attributes:
        needs_derivatives: whether a derivative of the solution may be taken.
    """

    _lines: StraightLines | None = None
    _last: tuple[Tensor, RootAt] | None = None
    _end: End | None = None

    def __init__(self, name: str, equation: Equation, params: Tree, args: tuple[Tree, ...], solve: Solve) -> None:
        self.x0, self.structure = pytree.flatten(params)
        check_unknowns(f"{name}: the initial guess", self.x0, self.structure)
        refuse_valueless(name, [*self.x0, *pytree.tensors(args)])
        self.needs_derivatives = needs_derivatives = not _context.now().is_silent

        functions, on_trees = dict(equation.functions), equation.on_trees

        def dispatch(params: Tree, args: tuple[Tree, ...], name: str | None = None, *more: Tensor) -> Tree:
            if name is not None:
                return functions[name](params, args, *more)
            if needs_derivatives:
                return on_trees(functions, params, args)
            # Without derivatives the values of the functions show all captured tensors, and the gradient is spared.
            return [function(params, args) for function in functions.values()]

        self.name, self.equation, self.args, self.solve, self._functions = name, equation, args, solve, functions
        # The lifted function outlives the call. It must keep neither the graph of the guess, as of a warm start from
        # an earlier solution, nor its memory, which the caller may overwrite.
        guess = self.structure.unflatten([*map(torch.clone, map(Tensor.detach, self.x0))])
        self.lifted = lift(name, dispatch, guess, args)

    def attached(self, x: Leaves, accept: Accept | None) -> Tree:
        """Return the solution with its derivatives; `accept` is None if the function is the library's own."""
        # `End` refers to this object. The attribute would make a cycle, which only the collector frees.
        end, self._end = self._end, None
        assert end is not None
        judge = None if accept is None else partial(self._judge, accept, end, x)
        # The search has judged `_last` already.
        root, self._last = replace(self._root(x), accept=judge) if self._last is None else self._last[1], None
        # From here on the function is evaluated at the solution; the copy of the guess is free.
        self.lifted.operands[: len(x)] = root.x
        try:
            return root.attached()
        except FunctionChangedError:
            return replace(self._root_anew(x), accept=judge).attached()

    def _judge(self, accept: Accept, end: End, x: Leaves, residual: Leaves) -> None:
        """Call `accept` with the end of the search and a residual at its solution, below the transforms."""
        with _modes.without_own_modes():
            values = _levels.plain_values([*x, *residual])
        plain, layers = _levels.without_batch_layers(values)
        lanes = tuple([layer.size for layer in reversed(layers)])
        # A residual may lack the lanes of a vmap, the solution has all.
        rows = _everywhere(plain, [layer.dims for layer in layers], lanes)[len(x) :]
        state = end.nesting.unflatten(end.state)
        with self._below(), end.frame:
            accept(end.problem, end.x, state, end.problem.inputs.ravel(_decisions.of_leader(rows)))

    @contextmanager
    def _below(self) -> Iterator[None]:
        """Context of operations that no transform and no mode may see."""
        # A checkpoint counts saved tensors, and would count others in a search that is recorded.
        isolated, own = _switches.isolated_from_caller(), _modes.without_own_modes()
        with isolated, own, _switches.nothing_running(), _settings.full_precision():
            yield

    def _root(self, x: Leaves) -> RootAt:
        return RootAt(self.lifted, root_form, self.solve, x, self.structure, is_lifted_here=False)

    def _shared_evaluation(self) -> Callable[[RootAt], RootAt] | None:
        """Return the second evaluation that `attached` needs, if the last judge of a search can share it.

        Decide before the search puts hooks aside.
        """
        if self.lifted.refusal or isinstance(self.equation.on_rows, Composite):
            return None
        return self._root(self.x0).second_evaluation

    def _last_residual(self, shared: Callable[[RootAt], RootAt], problem: BatchedProblem, x: Tensor) -> Tensor:
        """Return the residual from the evaluation that confirms the function at the solution; keep the evaluation."""
        values: Leaves = []
        fn = self._functions["fn"]

        def noting(*args: Any) -> Tree:
            result = fn(*args)
            values.extend(pytree.tensors(result))
            return result

        self._functions["fn"] = noting
        try:
            root = shared(self._root(problem.inputs.unravel(x)))
        except Exception:  # `attached` says what is wrong
            return problem.residual(problem, x)
        finally:
            self._functions["fn"] = fn
        self._last = x, root
        assert root.evaluation is not None
        residual = problem.inputs.ravel([t.detach() for t in root.evaluation.residual])
        # As on rows, a value that is not finite makes the residual nan.
        return residual if _levels.are_finite(values) else residual * torch.nan

    def _root_anew(self, x: Leaves) -> RootAt:
        equation = self.equation

        def residual(params: Tree, *args: Tree) -> Tree:
            return equation.on_trees(equation.functions, params, args)

        return root_at(self.name, residual, root_form, self.solve, self.structure.unflatten(x), self.args, {})

    def search(self, solve: Search) -> tuple[Leaves, Any]:
        """Run a search below all transforms; return the solution and the state with batch layers alone."""
        try:
            return self._search(solve)
        except RuntimeError as error:
            # The lift evaluates the residual. A value or a derivative of one function may fail where the residual does
            # not.
            if (refusal := transform_error(self.name, error)) is None:
                raise
            # Autograd alone serves outside of transforms only.
            if self.lifted.refusal or not _context.now().is_outside:
                raise refusal from (None if refusal is error else error)
            why = str(refusal)
        self.lifted = self.lifted.by_autograd(why)
        return self._search(solve)

    def _search(self, solve: Search) -> tuple[Leaves, Any]:
        theta = self.lifted.operands[len(self.x0) :]
        # In this order: aliases for the modes, then dead wrappers, gradient layers, batch layers.
        operands, layers = _levels.without_batch_layers(_levels.plain_values(_modes.alias([*self.x0, *theta])))
        levels: list[Dims] = []
        vmaps: list[VmapSize] = []
        for layer in layers:
            levels.append(tuple([None if d is None else 0 for d in layer.dims]))
            vmaps.insert(0, VmapSize(layer.level, layer.size))
        lanes, n = tuple(map(_SIZE, vmaps)), len(self.x0)
        shared = self._shared_evaluation()
        with self._below():
            operands = _functions.out_of_inference(operands)
            # A search has unknowns in every lane, also from a guess that the lanes share.
            x = _everywhere(operands[:n], levels, lanes)
            own_levels = [dims[n:] for dims in levels]
            problem = self._with_operands(x, operands[n:], own_levels, tuple(vmaps))
            problem.last_residual = None if shared is None else partial(self._last_residual, shared)
            frame = _decisions.frame()
            with frame:
                found, state = solve(problem, problem.inputs.ravel(x))
                leaves, nesting = pytree.flatten(state)
                # The results are the leader's too, so all processes return the same bits.
                found, *leaves = _decisions.of_leader([found, *leaves])
            self._end = End(problem, found, leaves, nesting, frame) if self.needs_derivatives else None
            solution = problem.inputs.unravel(found)
            # An evaluation of `_last_residual` holds at a single tensor `x`; another solution drops the evaluation.
            if self._last is not None and self._last[0] is not found:
                self._last = None
            state = nesting.unflatten([t.reshape((*lanes, *t.shape[1:])) for t in leaves])
        # The lanes of the outermost vmap lie in front.
        for layer in reversed(layers):
            solution = [_levels.add_layer(t, 0, layer) for t in solution]
            state = pytree.map_tensors(partial(_levels.add_layer, dim=0, of=layer), state)
        return solution, state

    def _with_operands(
        self, x: Leaves, theta: Leaves, levels: list[Dims], vmaps: tuple[VmapSize, ...]
    ) -> BatchedProblem:
        """Return the problem of all lanes, with the operands that a recording needs."""
        lanes = tuple(map(_SIZE, vmaps))
        problem = self._problem(x, theta, levels, lanes)
        # Not in `alone`, which runs while a recorder looks on.
        first = [t[(0,) * len(lanes)] for t in x] if 0 not in lanes else x

        def alone(theta: Leaves) -> BatchedProblem:
            return self._problem(first, theta, [], ())

        def together(theta: Leaves) -> BatchedProblem:
            return self._problem(x, theta, levels, lanes)

        def noted(own: Leaves) -> Noted:
            near, at = [*map(_aside, first), *own], [*first, *own]
            constants = [t for t, _ in self.lifted.constants]
            # Several functions of an equation may evaluate one function of the user.
            compares = len(self.equation.functions) == 1
            # A shallow copy with lines of its own: this object still evaluates the functions themselves.
            twin = copy.copy(self)
            twin._lines = StraightLines(self.lifted.within_call, near, at, constants, compares=compares)
            return Noted(twin._with_operands(x, theta, levels, vmaps), twin._lines)

        problem.operands = SearchOperands(self.lifted, theta, levels, lanes, alone, together, vmaps, noted)
        return problem

    def _problem(self, x: Leaves, theta: Leaves, levels: list[Dims], lanes: tuple[int, ...]) -> BatchedProblem:
        def lane(i: int) -> BatchedProblem:
            # An operand lacks the dimensions of vmaps that do not batch the operand, so `own` skips the indices.
            at = tuple(int(k) for k in torch.unravel_index(torch.tensor(i), lanes))
            outermost_first = zip(theta, *levels[::-1], strict=True)
            own = [t[tuple(k for k, d in zip(at, dims, strict=True) if d is not None)] for t, *dims in outermost_first]
            return self._problem([t[at] for t in x], own, [], ())

        inputs = Vectors(x, lanes)
        functions = {name: self._over_lanes(name, theta, levels) for name in self.equation.functions}
        if not lanes:
            one_by_one = self.lifted.refusal is not None
            return BatchedProblem(functions, inputs, self.structure, True, self.equation.on_rows, one_by_one=one_by_one)
        jacobians = {name: self._jacobian_over_lanes(name, theta, levels) for name in functions}
        return BatchedProblem(functions, inputs, self.structure, True, self.equation.on_rows, lane, jacobians)

    def _over_lanes(self, name: str, theta: Leaves, levels: list[Dims]) -> LeafFunction:
        # `x` and `more` have every vmap in front; `theta` has the vmaps of each operand.
        fn = over_levels(self._one_lane(name), [(0, list(dims), 0) for dims in levels])
        return lambda x, more: fn(_decisions.of_leader(x), theta, more)

    def _jacobian_over_lanes(
        self, name: str, theta: Leaves, levels: list[Dims]
    ) -> Callable[[Leaves], tuple[Tensor, Tensor]]:
        """Return a function for the value and the Jacobian of all lanes.

        The vmap over unit vectors lies inside the vmaps over lanes. Outside, it would copy the data of the lanes once
        for each vector.
        """
        part = self._one_lane(name)

        def one_lane(x: Leaves, theta: Leaves) -> tuple[Tensor, Tensor]:
            inputs = Vectors(x, ())
            y, matrix = RowFunction(lambda x, more: part(x, theta, more), inputs, False).jacobian(inputs.ravel(x))
            return y[0], matrix[0]

        fn = over_levels(one_lane, [(0, list(dims)) for dims in levels])
        return lambda x: fn(_decisions.of_leader(x), theta)

    def _one_lane(self, name: str) -> Callable[[Leaves, Leaves, Leaves], Leaves]:
        evaluate = self._lines or self.lifted.within_call

        def fn(x: Leaves, theta: Leaves, more: Leaves) -> Leaves:
            return pytree.tensors(evaluate([*x, *theta], name, *more))

        return fn


def _aside(x: Tensor) -> Tensor:
    """Return another point close by: at a guess of zeros the derivatives of most functions are zero."""
    waves = torch.cos(torch.arange(x.numel(), dtype=torch.float64, device=x.device)).reshape(x.shape).to(x.dtype)
    # A guess of zeros moves by the second term alone.
    return x + 1e-2 * (x.abs().amax() if x.numel() else 1.0) * waves + 1e-4 * waves


def _everywhere(tensors: Leaves, levels: Sequence[Dims], lanes: tuple[int, ...]) -> Leaves:
    """Expand tensors to a batch dimension in front for each vmap.

    Args:
        tensors: each has the batch dimensions of some vmaps in front, the dimension of the outermost first.
        levels: for each vmap, from the innermost outwards, for each tensor None if the tensor lacks its dimension.
        lanes: the sizes of the vmaps, the outermost first.
    """
    if not lanes:
        return tensors
    return [_expanded(t, [dims[i] for dims in reversed(levels)], lanes) for i, t in enumerate(tensors)]


def _expanded(tensor: Tensor, dims: list[int | None], lanes: tuple[int, ...]) -> Tensor:
    for at, dim in enumerate(dims):
        if dim is None:
            tensor = tensor.unsqueeze(at)
    return tensor.expand((*lanes, *tensor.shape[len(lanes) :]))
