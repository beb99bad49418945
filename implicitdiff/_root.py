"""Roots as differentiable problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch

import implicitdiff._functorch as functorch
import implicitdiff._modes as _modes
import implicitdiff._pytree as pytree
from implicitdiff._lift import Lifted, confirm, lift, over_levels, unseen
from implicitdiff._linear import LinearProblem, LinearSolver, Solve, check_like, check_unknowns, solve_linear
from implicitdiff._modes import Derived
from implicitdiff._operator import Dims, Jacobian, Linearised, Residual, Retained, SharedPullback, StrangerError
from implicitdiff._primitive import Problem, attach
from implicitdiff._pytree import Leaves, Structure
from implicitdiff.linear_solve.auto import solve_auto

Kind = Callable[[Leaves, Leaves], Leaves]
"""``kind(x, fn(x))`` is zero at a solution."""


@dataclass(frozen=True)
class RootProblem(Problem):
    """``residual(x, theta) = 0`` at a solution that is already known.

    Attributes:
        residual_fn: the residual of one lane.
        solver: solves the linear systems of the derivatives.
        structure: the tree of one lane's solution.
        kept: an evaluation at the call, for a first derivative in reverse mode, if there is one.
        levels: for each vmap, where theta is batched (0, else None).
        lanes: the sizes of the vmaps, outermost first.
    """

    residual_fn: Residual
    solver: Solve
    structure: Structure
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
            levels=tuple((0,) * len(x) + dims for dims in self.levels),
            lanes=self.lanes,
        )
        return solve_linear(problem, b, [*x, *theta])

    def vjp(self, x: Leaves, theta: Leaves, x_bar: Leaves, wanted: Sequence[int]) -> dict[int, torch.Tensor]:
        if functorch.is_quiet([*x, *theta], x_bar) and not _modes.is_inside():
            return self.quiet_vjp(x, theta, x_bar, wanted, [])
        return super().vjp(x, theta, x_bar, wanted)

    def release(self) -> Leaves:
        return [] if self.kept is None else self.kept.graph.release()

    def quiet_vjp(
        self, x: Leaves, theta: Leaves, x_bar: Leaves, wanted: Sequence[int], released: Leaves
    ) -> dict[int, torch.Tensor]:
        # Nothing differentiates this any further: one graph serves the solve and the pullback.
        if not isinstance(self.solver, LinearSolver):
            return super().vjp(x, theta, x_bar, wanted)
        if released and self.kept is not None:
            self.kept.of.refuse_overwritten()
            at, positions = self.kept.graph.resume(released), self.kept.graph.positions
        else:
            at, positions = SharedPullback(self.residual, x, theta, wanted), list(wanted)
        problem = LinearProblem(Linearised(at).adjoint, self.solver, self.structure, count=0, lanes=self.lanes)
        u = solve_linear(problem, x_bar, [])
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
    """

    lifted: Lifted
    kind: Kind
    solver: Solve
    x: Leaves
    structure: Structure

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
        confirm(self.lifted)
        return self._problem(None)

    def attached(self) -> Any:
        """The solution with its derivatives."""
        wanted = [i for i, t in enumerate(self.theta) if t.requires_grad]
        if wanted and self._is_ordinary():
            problem = self._problem(Kept(self._graph(wanted), self.lifted))
        else:
            problem = self.problem()
        return self.structure.unflatten(attach(problem, self.x, self.theta))

    def _problem(self, kept: Kept | None) -> RootProblem:
        return RootProblem(partial(self._evaluated, self.lifted), self.solver, self.structure, kept)

    def _evaluated(self, fn: Callable[[Leaves], Any], x: Leaves, theta: Leaves) -> Leaves:
        return self.kind(x, self.structure.tensors_of(fn([*x, *theta])))

    def _is_ordinary(self) -> bool:
        """Whether autograd alone records, so that its first derivative needs nothing but a graph of plain tensors."""
        plain = functorch.only_autograd() and torch.is_grad_enabled() and not functorch.in_saved_tensor_hooks()
        return plain and isinstance(self.solver, LinearSolver) and not _modes.is_inside()

    def _graph(self, wanted: Sequence[int]) -> Retained:
        try:
            graph = Retained(partial(self._evaluated, self.lifted.again), self.x, self.theta, wanted)
        except StrangerError:
            raise unseen(self.lifted.name) from None
        self.lifted.refuse_another()
        return graph


def pose(
    name: str,
    fn: Callable[..., Any],
    kind: Kind,
    solve: Solve | None,
    sol: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Posed:
    """The problem that `sol` solves."""
    x, structure = pytree.flatten(sol)
    check_unknowns(f"{name}: the solution", x, structure)
    lifted = lift(name, lambda x, args, kwargs: fn(x, *args, **kwargs), sol, args, kwargs)
    check_like(f"{name}'s result", lifted.value, sol, x, structure, "the solution")
    return Posed(lifted, kind, solve or solve_auto(), x, structure)


def root(x: Leaves, out: Leaves) -> Leaves:
    """The `Kind` of ``fn(x) = 0``."""
    return out


def fixed_point(x: Leaves, out: Leaves) -> Leaves:
    """The `Kind` of ``fn(x) = x``."""
    # With this sign A = I - J, positive definite for a symmetric contraction, and the Neumann series of its inverse
    # converges.
    return [a - b for a, b in zip(x, out, strict=True)]
