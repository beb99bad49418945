"""Roots as problems of the primitive: ``residual(x, theta) = 0`` at a solution that is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, TypeVar

import torch

import implicitdiff._closures.modes as _modes
import implicitdiff._torch.context as _context
import implicitdiff._torch.tracking as _tracking
import implicitdiff._torch.trees as pytree
from implicitdiff._closures.below import Derived
from implicitdiff._closures.lift import Lifted, confirm, confirmed_value, lift, missed_capture_error
from implicitdiff._implicit.checks import check_like, check_unknowns, max_abs_or_one, probe_vector
from implicitdiff._implicit.linear import LinearSolver
from implicitdiff._implicit.linear_problem import LinearProblem, Solve, solve_linear, solve_linear_unrecorded
from implicitdiff._implicit.linearisation import JointLinearisation, Residual, RetainedGraph, UnknownLeafError
from implicitdiff._implicit.operators import (
    Dims,
    Jacobian,
    Lane,
    Linearised,
    Products,
)
from implicitdiff._implicit.primitive import Problem, attach
from implicitdiff._torch.lanes import over_levels
from implicitdiff._torch.tracking import is_continuous
from implicitdiff._torch.trees import Leaves, Structure, Tree, UserFunction
from implicitdiff.errors import TransformError

ResidualForm = Callable[[Leaves, Leaves], Leaves]
"""The residual of an equation: ``form(x, fn(x))`` is zero at a solution."""
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class RootProblem(Problem):
    """``residual(x, theta) = 0`` at a known solution.

    Attributes:
        residual_fn: the residual of one lane.
        solver: solves the linear systems of the derivatives.
        structure: the tree of one lane's solution.
        refusal: see `Lifted.refusal`.
        kept: the graph of an evaluation at the call, for a first derivative in reverse mode, or None.
        levels: for each vmap, the batch dimension (0, or None) of each tensor in theta.
        lanes: the sizes of the vmaps, the outermost first.
    """

    residual_fn: Residual
    solver: Solve
    structure: Structure
    refusal: str | None = None
    kept: KeptGraph | None = None
    levels: tuple[Dims, ...] = ()
    lanes: tuple[int, ...] = ()

    def residual(self, x: Leaves, theta: Leaves) -> Leaves:
        return over_levels(self.residual_fn, [(0, list(dims)) for dims in self.levels])(x, theta)  # type: ignore[no-any-return]

    def primal(self, theta: Leaves) -> Leaves:
        raise AssertionError("the solution is always known")

    def solve(self, x: Leaves, theta: Leaves, b: Leaves, *, adjoint: bool) -> Leaves:
        # x and theta are operands of the linear system, so the solve can be differentiated again in both.
        operator = Jacobian(self.residual_fn, len(x))
        problem = LinearProblem(
            operator=operator.adjoint if adjoint else operator,
            solver=self.solver,
            structure=self.structure,
            count=len(x) + len(theta),
            levels=self._levels(len(x)),
            lanes=self.lanes,
        )
        return solve_linear(problem, b, [*x, *theta])

    def _levels(self, unknowns: int) -> tuple[Dims, ...]:
        """Return the batch dimensions of the solution and of theta, for each vmap."""
        return tuple((0,) * unknowns + dims for dims in self.levels)

    def vjp(self, x: Leaves, theta: Leaves, x_bar: Leaves, wanted: Sequence[int]) -> dict[int, torch.Tensor]:
        # A plain backward pass does not need the history of the operands, and is unrecorded without the history.
        if _context.now().is_silent and not _tracking.have_legacy_batch(x_bar):
            x, theta = [t.detach() for t in x], [t.detach() for t in theta]
        if _tracking.is_quiet([*x, *theta], x_bar) and not _modes.is_inside():
            return self.unrecorded_vjp(x, theta, x_bar, wanted, [])
        if self.refusal is not None:
            raise TransformError(self.refusal)
        return super().vjp(x, theta, x_bar, wanted)

    @property
    def prefers_unrecorded(self) -> bool:
        return isinstance(self.solver, LinearSolver) and self.refusal is None

    def release(self) -> Leaves:
        return [] if self.kept is None else self.kept.graph.release()

    def unrecorded_vjp(
        self, x: Leaves, theta: Leaves, x_bar: Leaves, wanted: Sequence[int], released: Leaves
    ) -> dict[int, torch.Tensor]:
        # No further derivative is recorded, so one autograd graph serves the linear solve and the pullback.
        if not isinstance(solver := self.solver, LinearSolver):
            return super().vjp(x, theta, x_bar, wanted)
        if released and self.kept is not None:
            # Nothing is evaluated again, so constants alone may be stale. Saved tensors are checked by autograd.
            self.kept.of.refuse_overwritten()
            at, positions = self.kept.graph.resume(released), self.kept.graph.positions
        else:
            at, positions = JointLinearisation(self.residual, x, theta, wanted), list(wanted)
        # The matrix is formed from the operator of one lane, and products use the shared graph.
        lane = Lane(Jacobian(self.residual_fn, len(x)), [*x, *theta], self._levels(len(x)))
        operator = Linearised(Products(at.push, at.pull), one_by_one=self.refusal is not None, lane=lane).adjoint
        problem = LinearProblem(operator, solver, self.structure, count=0, lanes=self.lanes)
        # A^H u = x_bar, then theta_bar = -(dr/dtheta)^H u.
        # Unrecorded: all lanes are solved here on plain tensors, whatever transforms run around.
        u = solve_linear_unrecorded(problem, solver, x_bar)
        pulled = dict(zip(positions, at.pull_theta([-t for t in u]), strict=True))
        return {i: pulled[i] for i in wanted}

    def batched(self, dims: Dims, size: int) -> tuple[RootProblem, Dims, int]:
        front = tuple(None if d is None else 0 for d in dims)
        # The kept graph is the graph of one lane.
        batched = replace(self, levels=(*self.levels, front), lanes=(size, *self.lanes), kept=None)
        return batched, front, 0


class Evaluation(NamedTuple):
    """A second evaluation at the call: the residual, and its graph if the graph is kept for the derivative."""

    residual: Leaves
    graph: RetainedGraph | None


class KeptGraph(NamedTuple):
    """The graph of an evaluation at the call, and the evaluated function."""

    graph: RetainedGraph
    of: Lifted


@dataclass(frozen=True)
class RootAt:
    """A root problem at a known solution.

    Attributes:
        lifted: the user's function; its operands are the leaves of the solution, the tensors of the arguments, and
            the captured tensors.
        form: the residual of the equation.
        solver: solves the linear systems of the derivatives.
        x: the leaves of the solution.
        structure: the tree of the solution.
        is_lifted_here: whether the function was lifted at the solution, not at an initial guess.
        evaluation: a second evaluation, in plain autograd; None before.
        accept: ``accept(residual)`` raises if the residual at the solution, as the derivative finds it, shows another
            function than the search has solved; None if nothing is known of the search.
    """

    lifted: Lifted
    form: ResidualForm
    solver: Solve
    x: Leaves
    structure: Structure
    is_lifted_here: bool = True
    evaluation: Evaluation | None = None
    accept: Callable[[Leaves], None] | None = None

    @property
    def theta(self) -> Leaves:
        return self.lifted.operands[len(self.x) :]

    @property
    def residual(self) -> Leaves:
        """The residual at the solution, detached."""
        return self._residual_of(self.lifted.value)

    def _residual_of(self, value: Tree) -> Leaves:
        return self.form(self.x, self.structure.tensors_of(value))

    def refuse_solver_caches(self, derived: Derived) -> None:
        """Raise if a constant of the function is a tensor that the solver computed from differentiated tensors.

        For example, the solver fills a cache that the function reads. Gradients are off in the solver, so the
        derivative of such a tensor would silently be zero.
        """
        # The id alone may belong to a later tensor, so the weak reference decides.
        constants = [t for t, _ in self.lifted.constants if is_continuous(t)]
        if stored := [t for t in constants if id(t) in derived and derived[id(t)]() is t]:
            raise ValueError(
                f"{self.lifted.name} uses a tensor of shape {list(stored[0].shape)} that the solver has computed "
                "from a differentiated tensor and has stored, in a cache or an attribute; gradients are off in "
                "the solver, so the derivative of the stored tensor would be lost: compute the tensor in the "
                "function itself, or before the call"
            )

    def problem(self) -> RootProblem:
        """Return the problem, after a check that no captured tensor was missed."""
        smooth = [i for i, t in enumerate(self.theta) if is_continuous(t)]
        return self._with_autograd_fallback(partial(RootAt._confirmed_problem, smooth=smooth))

    def _confirmed_problem(self, smooth: Sequence[int]) -> RootProblem:
        self._confirmed_residual(smooth)
        return self._problem(None)

    def attached(self) -> Tree:
        """Return the solution with its derivatives."""
        return self._with_autograd_fallback(RootAt._attached)

    def _with_autograd_fallback(self, make: Callable[[RootAt], _Result]) -> _Result:
        """Return ``make(self)``; if torch.func refuses the function, lift the function for autograd alone, and repeat.

        `lift` may have succeeded: some functions fail under torch.func only when tensors require gradients.
        """
        try:
            return make(self)
        except TransformError as error:
            if self.lifted.refusal or not _context.now().is_outside:
                raise
            why = str(error)
        return make(replace(self, lifted=self.lifted.by_autograd(why)))

    @property
    def second_evaluation(self) -> Callable[[RootAt], RootAt] | None:
        """The evaluation that confirms the captures, in plain autograd; None elsewhere.

        `with_graph` if its graph serves a first derivative, and no hook has to see its tensors; else `confirmed`.
        """
        is_plain = _context.now() == _PLAIN_AUTOGRAD and not _modes.is_inside()
        if not is_plain or not (self._wanted or self.lifted.refusal):
            return None
        keeps_graph = isinstance(self.solver, LinearSolver) and not _context.saved_tensor_hooks()
        return RootAt.with_graph if keeps_graph else RootAt.confirmed

    @property
    def _wanted(self) -> list[int]:
        return [i for i, t in enumerate(self.theta) if t.requires_grad]

    def with_graph(self) -> RootAt:
        """Return the root with a second evaluation and its graph, for `attached`."""
        graph = self._recorded_graph(self._wanted)
        return replace(self, evaluation=Evaluation(graph.end, graph))

    def confirmed(self) -> RootAt:
        """Return the root with a second evaluation that confirms the captures, for `attached`."""
        value = confirmed_value(self.lifted, [*self.x, *self.theta])
        return replace(self, evaluation=Evaluation(self._residual_of(value), None))

    def _attached(self) -> Tree:
        """Return the solution with its derivatives; raise `TransformError` if torch.func refuses the function."""
        if self.evaluation is None and self.second_evaluation is RootAt.with_graph:
            return self.with_graph()._attached()
        # The problem outlives the derivative, which frees the graph: only `KeptGraph` may hold the graph.
        root, theta = replace(self, evaluation=None, accept=None), self.theta
        residual, graph = self.evaluation or Evaluation(root._confirmed_residual(self._wanted), None)
        if self.accept is not None:
            self.accept(residual)
        if graph is None:
            problem = root._problem(None)
        else:
            problem, theta = root._problem(KeptGraph(graph, self.lifted)), [*theta, *graph.adopted]
        return self.structure.unflatten(attach(problem, self.x, theta))

    def _confirmed_residual(self, wanted: Sequence[int]) -> Leaves:
        """Return the residual at the solution, from an evaluation that confirms the captures."""
        there = [*self.x, *self.theta]
        value = confirm(self.lifted) if self.is_lifted_here else confirmed_value(self.lifted, there)
        if self.lifted.refusal and self.lifted.takes_gradients:
            # For the checks alone; the graph is dropped.
            self._recorded_graph(wanted)
        return self._residual_of(value)

    def _problem(self, kept: KeptGraph | None) -> RootProblem:
        residual = partial(self._evaluated, self.lifted)
        return RootProblem(residual, self.solver, self.structure, self.lifted.refusal, kept)

    def _evaluated(self, fn: Callable[[Leaves], Tree], x: Leaves, theta: Leaves) -> Leaves:
        return self.form(x, self.structure.tensors_of(fn([*x, *theta])))

    def _recorded_graph(self, wanted: Sequence[int]) -> RetainedGraph:
        """Return the graph of a second evaluation; raise if the function has changed, or if a capture was missed."""
        try:
            evaluate = partial(self._evaluated, self.lifted.run_again)
            graph = RetainedGraph(evaluate, self.x, self.theta, wanted, adopts=self.lifted.refusal is not None)
        except UnknownLeafError:
            raise missed_capture_error(self.lifted.name) from None
        self.lifted.refuse_changed_function()
        if self.lifted.refusal and self.lifted.takes_gradients and graph.positions:
            self._check_second_derivative(graph)
        return graph

    def _check_second_derivative(self, graph: RetainedGraph) -> None:
        """Raise if autograd's derivative of a gradient differs from central differences, along one direction.

        The derivative of a gradient differentiates the backward pass of each custom autograd.Function. If the Function
        saved an intermediate result of its forward pass, autograd treats this result as a constant, and the derivative
        is silently wrong.
        """
        # Captured tensors can be moved only if the function uses substitutes for all of them: none may be adopted.
        movable = len(self.theta) - (len(self.lifted.captured) if graph.adopted else 0)
        moved = [i for i in graph.positions if i < movable]
        at = [*self.x, *(self.theta[i].detach() for i in moved)]
        direction = [max_abs_or_one(t) * p for t, p in zip(at, probe_vector(at), strict=True)]
        eps = max(torch.finfo(t.dtype).eps for t in at)

        def residual(h: float) -> Leaves:
            there = [t + h * d for t, d in zip(at, direction, strict=True)]
            theta = [t.detach() for t in self.theta]
            for i, value in zip(moved, there[len(self.x) :], strict=True):
                theta[i] = value
            with torch.no_grad():
                return self._evaluated(self.lifted.within_call, there[: len(self.x)], theta)

        # The step that balances truncation, O(h^2), and rounding, O(eps / h), of a central difference.
        h = eps ** (1 / 3)
        ahead, behind = residual(h), residual(-h)
        u = probe_vector(ahead)
        # Compute u' J d in two ways, for the Jacobian J of the residual r and the direction d: (J' u)' d by autograd,
        # and u' (r(at + h d) - r(at - h d)) / 2h by differences. `scale` bounds the terms that cancel in (J' u)' d.
        # A copy of the list: `release` still has to hand the results to autograd.
        shared = graph.resume([*graph.end])
        pulled_theta = dict(zip(graph.positions, shared.pull_theta(u), strict=True))
        pulled = [*shared.pull()(u), *(pulled_theta[i] for i in moved)]
        found = real_inner_product(pulled, direction)
        wanted = real_inner_product(u, [(a - b) / (2 * h) for a, b in zip(ahead, behind, strict=True)])
        scale = real_inner_product([t.abs() for t in pulled], [t.abs() for t in direction])
        if not (found - wanted).abs() <= eps**0.25 * torch.maximum(scale, wanted.abs()):
            raise ValueError(
                f"{self.lifted.name} takes a gradient whose own derivative, along one direction, is {found:.6g} by "
                f"autograd and {wanted:.6g} by differences: a custom autograd.Function or operator in it cannot be "
                "differentiated twice, because its backward pass uses results of its forward pass as constants; "
                "write it in operations of torch"
            )


def root_at(
    name: str,
    fn: UserFunction,
    form: ResidualForm,
    solve: Solve,
    sol: Tree,
    args: tuple[Tree, ...],
    kwargs: dict[str, Tree],
) -> RootAt:
    """Return the root problem with the known solution `sol` of ``form(x, fn(x, *args, **kwargs)) = 0``."""
    x, structure = pytree.flatten(sol)
    check_unknowns(f"{name}: the solution", x, structure)
    flags = _gradient_flags(x, pytree.tensors((args, kwargs)))
    lifted = lift(name, lambda x, args, kwargs: fn(x, *args, **kwargs), sol, args, kwargs, differentiated=flags)
    check_like(f"{name}'s result", lifted.value, sol, x, structure, "the solution")
    return RootAt(lifted, form, solve, x, structure)


# Autograd records, and nothing else runs.
_PLAIN_AUTOGRAD = _context.Context((), records=True, forward=False)


def _gradient_flags(x: Leaves, theta: Leaves) -> list[bool]:
    """Return the `requires_grad` flags of x and theta in an ordinary backward pass; empty if none is to follow."""
    if not (_context.now() == _PLAIN_AUTOGRAD and any(t.requires_grad for t in theta)):
        return []
    return [True] * len(x) + [t.requires_grad for t in theta]


def root_form(x: Leaves, out: Leaves) -> Leaves:
    """The `ResidualForm` of the equation ``fn(x) = 0``."""
    return out


def fixed_point_form(x: Leaves, out: Leaves) -> Leaves:
    """The `ResidualForm` of the equation ``fn(x) = x``."""
    # With this sign, A = I - J. For a symmetric contraction A is positive definite, so conjugate gradients apply. For
    # every contraction the Neumann series of A^-1 converges.
    return [a - b for a, b in zip(x, out, strict=True)]


def real_inner_product(a: Leaves, b: Leaves) -> torch.Tensor:
    """Return the real inner product of two lists of leaves."""
    return torch.stack([(p.conj() * q).real.sum() for p, q in zip(a, b, strict=True)]).sum()
