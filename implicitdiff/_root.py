"""Roots as differentiable problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

import implicitdiff._closure as _closure
import implicitdiff._functorch as functorch
import implicitdiff._modes as _modes
import implicitdiff._pytree as pytree
from implicitdiff._freeze import freeze
from implicitdiff._linear import LinearProblem, LinearSolver, Solve, check_leaves, check_like, solve_linear
from implicitdiff._operator import Dims, Jacobian, Linearised, Residual, SharedPullback
from implicitdiff._primitive import Problem
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
        levels: for each vmap, where theta is batched (0, else None).
        lanes: the sizes of the vmaps, outermost first.
    """

    residual_fn: Residual
    solver: Solve
    structure: Structure
    levels: tuple[Dims, ...] = ()
    lanes: tuple[int, ...] = ()

    def residual(self, x: Leaves, theta: Leaves) -> Leaves:
        fn = self.residual_fn
        for dims in self.levels:
            fn = torch.func.vmap(fn, in_dims=(0, list(dims)))
        return fn(x, theta)

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
        quiet = functorch.is_quiet([*x, *theta], x_bar) and not _modes.is_inside()
        if not (quiet and isinstance(self.solver, LinearSolver)):
            return super().vjp(x, theta, x_bar, wanted)
        # Nothing differentiates this any further: one graph serves the solve and the pullback.
        at = SharedPullback(self.residual, x, theta, wanted)
        problem = LinearProblem(Linearised(at).adjoint, self.solver, self.structure, count=0, lanes=self.lanes)
        u = solve_linear(problem, x_bar, [])
        return dict(zip(wanted, at.pull_theta([-t for t in u]), strict=True))

    def batched(self, dims: Dims, size: int) -> tuple[RootProblem, Dims, int]:
        front = tuple(None if d is None else 0 for d in dims)
        return replace(self, levels=(*self.levels, front), lanes=(size, *self.lanes)), front, 0


@dataclass(frozen=True)
class Posed:
    """A root problem at a known solution, with its operands and the residual there."""

    problem: RootProblem
    x: Leaves
    theta: Leaves
    residual: Leaves
    arguments: Structure


def pose(
    name: str,
    fn: Callable[..., Any],
    kind: Kind,
    solve: Solve | None,
    sol: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Posed:
    """The problem that `sol` solves: its operands are the solution, the tensors of the arguments, those that `fn`
    captures."""
    x, structure = pytree.flatten(sol)
    check_leaves(f"{name}: the solution", x)
    given, arguments = pytree.flatten((args, kwargs))
    fn = freeze(fn)
    result, closure = _closure.close_over(name, lambda x, args, kwargs: fn(x, *args, **kwargs), sol, args, kwargs)
    check_like(f"{name}'s result", result, sol, x, structure, "the solution")

    def residual(x: Leaves, theta: Leaves) -> Leaves:
        args, kwargs = arguments.unflatten(theta[: len(given)])
        return kind(x, structure.tensors_of(closure(theta[len(given) :], structure.unflatten(x), args, kwargs)))

    problem = RootProblem(residual, solve or solve_auto(), structure)
    return Posed(problem, x, [*given, *closure.captured], kind(x, structure.tensors_of(result)), arguments)


def root(x: Leaves, out: Leaves) -> Leaves:
    """The `Kind` of ``fn(x) = 0``."""
    return out


def fixed_point(x: Leaves, out: Leaves) -> Leaves:
    """The `Kind` of ``fn(x) = x``."""
    # With this sign A = I - J, positive definite for a symmetric contraction, and the Neumann series of its inverse
    # converges.
    return [a - b for a, b in zip(x, out, strict=True)]
