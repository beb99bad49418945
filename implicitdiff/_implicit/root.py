"""Roots as differentiable problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch

import implicitdiff._closures.modes as _modes
import implicitdiff._torch.levels as functorch
import implicitdiff._torch.trees as pytree
from implicitdiff._closures.below import Derived
from implicitdiff._closures.lift import Lifted, confirm, confirm_at, lift, unseen
from implicitdiff._implicit.checks import check_like, check_unknowns, pattern, size
from implicitdiff._implicit.linear import LinearSolver
from implicitdiff._implicit.linear_problem import LinearProblem, Solve, solve_linear, solve_linear_quietly
from implicitdiff._implicit.linearisation import Residual, Retained, StrangerError, WithOperands
from implicitdiff._implicit.operators import (
    Dims,
    Jacobian,
    Lane,
    Linearised,
    Products,
)
from implicitdiff._implicit.primitive import Problem, attach
from implicitdiff._torch.lanes import over_levels
from implicitdiff._torch.trees import Leaves, Structure
from implicitdiff.errors import TransformError

Kind = Callable[[Leaves, Leaves], Leaves]
"""``kind(x, fn(x))`` is zero at a solution."""


@dataclass(frozen=True)
class RootProblem(Problem):
    """``residual(x, theta) = 0`` at a solution that is already known.

    Attributes:
        residual_fn: the residual of one lane.
        solver: solves the linear systems of the derivatives.
        structure: the tree of one lane's solution.
        alone: why torch.func cannot transform the residual, so that autograd alone evaluates it; None if it can.
        kept: an evaluation at the call, for a first derivative in reverse mode, if there is one.
        levels: for each vmap, where theta is batched (0, else None).
        lanes: the sizes of the vmaps, outermost first.
    """

    residual_fn: Residual
    solver: Solve
    structure: Structure
    alone: str | None = None
    kept: Kept | None = None
    levels: tuple[Dims, ...] = ()
    lanes: tuple[int, ...] = ()

    def residual(self, x: Leaves, theta: Leaves) -> Leaves:
        return over_levels(self.residual_fn, [(0, list(dims)) for dims in self.levels])(x, theta)  # type: ignore[no-any-return]

    def primal(self, theta: Leaves) -> Leaves:
        raise AssertionError("the solution is always known")

    def solve(self, x: Leaves, theta: Leaves, b: Leaves, *, adjoint: bool) -> Leaves:
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
        """Where the solution and theta are batched, for each vmap."""
        return tuple((0,) * unknowns + dims for dims in self.levels)

    def vjp(self, x: Leaves, theta: Leaves, x_bar: Leaves, wanted: Sequence[int]) -> dict[int, torch.Tensor]:
        if functorch.nothing_records() and not functorch.have_legacy_batch(x_bar):
            x, theta = [t.detach() for t in x], [t.detach() for t in theta]
        if functorch.is_quiet([*x, *theta], x_bar) and not _modes.is_inside():
            return self.quiet_vjp(x, theta, x_bar, wanted, [])
        if self.alone is not None:
            raise TransformError(self.alone)
        return super().vjp(x, theta, x_bar, wanted)

    @property
    def is_lazy(self) -> bool:
        return isinstance(self.solver, LinearSolver) and self.alone is None

    def release(self) -> Leaves:
        return [] if self.kept is None else self.kept.graph.release()

    def quiet_vjp(
        self, x: Leaves, theta: Leaves, x_bar: Leaves, wanted: Sequence[int], released: Leaves
    ) -> dict[int, torch.Tensor]:
        # Nothing differentiates this any further: one graph serves the solve and the pullback.
        if not isinstance(solver := self.solver, LinearSolver):
            return super().vjp(x, theta, x_bar, wanted)
        if released and self.kept is not None:
            self.kept.of.refuse_overwritten()
            at, positions = self.kept.graph.resume(released), self.kept.graph.positions
        else:
            at, positions = WithOperands(self.residual, x, theta, wanted), list(wanted)
        lane = Lane(Jacobian(self.residual_fn, len(x)), [*x, *theta], self._levels(len(x)))
        operator = Linearised(Products(at.push, at.pull), one_by_one=self.alone is not None, lane=lane).adjoint
        problem = LinearProblem(operator, solver, self.structure, count=0, lanes=self.lanes)
        u = solve_linear_quietly(problem, solver, x_bar)
        pulled = dict(zip(positions, at.pull_theta([-t for t in u]), strict=True))
        return {i: pulled[i] for i in wanted}

    def batched(self, dims: Dims, size: int) -> tuple[RootProblem, Dims, int]:
        front = tuple(None if d is None else 0 for d in dims)
        batched = replace(self, levels=(*self.levels, front), lanes=(size, *self.lanes), kept=None)
        return batched, front, 0


class Kept(NamedTuple):
    """The graph of an evaluation at the call, and the function that was evaluated."""

    graph: Retained
    of: Lifted


@dataclass(frozen=True)
class Posed:
    """A root problem at a known solution.

    Attributes:
        lifted: the user's function; its operands are the leaves of the solution, the tensors of the arguments, and
            those that it captures.
        kind: which equation it is.
        solver: for the linear systems of the derivatives.
        x: the leaves of the solution.
        structure: its tree.
        is_lifted_here: whether the function was lifted at the solution, not at an initial guess.
    """

    lifted: Lifted
    kind: Kind
    solver: Solve
    x: Leaves
    structure: Structure
    is_lifted_here: bool = True

    @property
    def theta(self) -> Leaves:
        return self.lifted.operands[len(self.x) :]

    @property
    def residual(self) -> Leaves:
        """The residual at the solution, detached."""
        return self.kind(self.x, self.structure.tensors_of(self.lifted.value))

    def refuse_kept(self, derived: Derived) -> None:
        """Raise if a constant of the function is one of the tensors that the solver computed, with gradients off, from
        what is differentiated: a cache that it has filled, whose derivative would be lost."""
        for constant, _ in self.lifted.constants:
            is_smooth = constant.is_floating_point() or constant.is_complex()
            if is_smooth and id(constant) in derived and derived[id(constant)]() is constant:
                raise ValueError(
                    f"{self.lifted.name} uses a tensor of shape {list(constant.shape)} that the solver has computed "
                    "from what is differentiated and has kept, in a cache or an attribute; gradients are off in the "
                    "solver, so the derivative of that tensor would be lost: compute it in the function itself, or "
                    "before the call"
                )

    def problem(self) -> RootProblem:
        """The problem, for derivatives; all that it depends on is known."""
        smooth = [i for i, t in enumerate(self.theta) if t.is_floating_point() or t.is_complex()]
        problem: RootProblem = self._either_way(lambda posed: posed._confirmed(smooth))
        return problem

    def attached(self) -> Any:
        """The solution with its derivatives."""
        return self._either_way(Posed._attached)

    def _either_way(self, make: Callable[[Posed], Any]) -> Any:
        """What `make` makes of this, or of the function as autograd alone evaluates it if torch.func cannot transform
        it; that may show only now, where tensors need gradients."""
        try:
            return make(self)
        except TransformError as error:
            if self.lifted.alone or not functorch.only_autograd():
                raise
            why = str(error)
        return make(replace(self, lifted=self.lifted.by_autograd(why)))

    def _attached(self) -> Any:
        wanted = [i for i, t in enumerate(self.theta) if t.requires_grad]
        if (wanted or self.lifted.alone) and self._is_ordinary():
            graph = self._graph(wanted)
            problem, theta = self._problem(Kept(graph, self.lifted)), [*self.theta, *graph.adopted]
        else:
            problem, theta = self._confirmed(wanted), self.theta
        return self.structure.unflatten(attach(problem, self.x, theta))

    def _confirmed(self, wanted: Sequence[int]) -> RootProblem:
        if self.is_lifted_here:
            confirm(self.lifted)
        else:
            confirm_at(self.lifted, [*self.x, *self.theta])
        if self.lifted.alone and self.lifted.takes_gradients:
            # Only for the checks: this graph is not kept.
            self._graph(wanted)
        return self._problem(None)

    def _problem(self, kept: Kept | None) -> RootProblem:
        residual = partial(self._evaluated, self.lifted)
        return RootProblem(residual, self.solver, self.structure, self.lifted.alone, kept)

    def _evaluated(self, fn: Callable[[Leaves], Any], x: Leaves, theta: Leaves) -> Leaves:
        return self.kind(x, self.structure.tensors_of(fn([*x, *theta])))

    def _is_ordinary(self) -> bool:
        """Whether autograd alone records, so that its first derivative needs nothing but a graph of plain tensors."""
        plain = functorch.only_autograd() and torch.is_grad_enabled() and not functorch.in_saved_tensor_hooks()
        return plain and isinstance(self.solver, LinearSolver) and not _modes.is_inside()

    def _graph(self, wanted: Sequence[int]) -> Retained:
        try:
            evaluate = partial(self._evaluated, self.lifted.again)
            graph = Retained(evaluate, self.x, self.theta, wanted, adopts=self.lifted.alone is not None)
        except StrangerError:
            raise unseen(self.lifted.name) from None
        self.lifted.refuse_another()
        if self.lifted.alone and self.lifted.takes_gradients and graph.positions:
            self._check_second(graph)
        return graph

    def _check_second(self, graph: Retained) -> None:
        """Raise if the derivative of a gradient is not that of its values, along one direction.

        To differentiate a gradient is to differentiate the backward pass of each custom autograd.Function in it. One
        that has saved what it computed in its forward pass counts that as a constant.
        """
        # Captured tensors move only where all of them are replaced.
        movable = len(self.theta) - (len(self.lifted.captured) if graph.adopted else 0)
        moved = [i for i in graph.positions if i < movable]
        at = [*self.x, *(self.theta[i].detach() for i in moved)]
        direction = [size(t) * p for t, p in zip(at, pattern(at), strict=True)]
        eps = max(torch.finfo(t.dtype).eps for t in at)

        def residual(h: float) -> Leaves:
            there = [t + h * d for t, d in zip(at, direction, strict=True)]
            theta = [t.detach() for t in self.theta]
            for i, value in zip(moved, there[len(self.x) :], strict=True):
                theta[i] = value
            with torch.no_grad():
                return self._evaluated(self.lifted.within_call, there[: len(self.x)], theta)

        h = eps ** (1 / 3)
        ahead, behind = residual(h), residual(-h)
        u = pattern(ahead)
        shared = graph.resume([*graph.end])
        pulled_theta = dict(zip(graph.positions, shared.pull_theta(u), strict=True))
        pulled = [*shared.pull()(u), *(pulled_theta[i] for i in moved)]
        found = inner(pulled, direction)
        wanted = inner(u, [(a - b) / (2 * h) for a, b in zip(ahead, behind, strict=True)])
        scale = inner([t.abs() for t in pulled], [t.abs() for t in direction])
        if not (found - wanted).abs() <= eps**0.25 * torch.maximum(scale, wanted.abs()):
            raise ValueError(
                f"{self.lifted.name} takes a gradient whose own derivative, along one direction, is {found:.6g} by "
                f"autograd and {wanted:.6g} by differences: a custom autograd.Function or operator in it cannot be "
                "differentiated twice, as its backward pass uses what its forward pass has computed; write it in "
                "operations of torch"
            )


def pose(
    name: str,
    fn: Callable[..., Any],
    kind: Kind,
    solve: Solve,
    sol: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Posed:
    """The problem that `sol` solves."""
    x, structure = pytree.flatten(sol)
    check_unknowns(f"{name}: the solution", x, structure)
    flags = _differentiated(x, pytree.tensors((args, kwargs)))
    lifted = lift(name, lambda x, args, kwargs: fn(x, *args, **kwargs), sol, args, kwargs, differentiated=flags)
    check_like(f"{name}'s result", lifted.value, sol, x, structure, "the solution")
    return Posed(lifted, kind, solve, x, structure)


def _differentiated(x: Leaves, theta: Leaves) -> list[bool]:
    """Which tensors need gradients in an ordinary backward pass: what is differentiated, and the solution with it."""
    if not (functorch.only_autograd() and torch.is_grad_enabled() and any(t.requires_grad for t in theta)):
        return []
    return [True] * len(x) + [t.requires_grad for t in theta]


def root(x: Leaves, out: Leaves) -> Leaves:
    """The `Kind` of ``fn(x) = 0``."""
    return out


def fixed_point(x: Leaves, out: Leaves) -> Leaves:
    """The `Kind` of ``fn(x) = x``."""
    # With this sign A = I - J, positive definite for a symmetric contraction, and the Neumann series of its inverse
    # converges.
    return [a - b for a, b in zip(x, out, strict=True)]


def inner(a: Leaves, b: Leaves) -> torch.Tensor:
    """The real inner product."""
    return torch.stack([(p.conj() * q).real.sum() for p, q in zip(a, b, strict=True)]).sum()
