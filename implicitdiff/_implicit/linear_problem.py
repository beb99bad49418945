"""Linear systems as problems of the primitive."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

import implicitdiff._closures.modes as _modes
import implicitdiff._torch.context as _context
import implicitdiff._torch.decisions as _decisions
import implicitdiff._torch.levels as _levels
from implicitdiff._closures.below import DropGradientLayers, below_autodiff
from implicitdiff._closures.lift import Lifted, confirm, lift
from implicitdiff._implicit.checks import check_like
from implicitdiff._implicit.linearisation import ByFunctorch, Linearisation, OfOperands, Product
from implicitdiff._implicit.operators import Adjoint, Dims, Lane, Matvec, Operator
from implicitdiff._implicit.primitive import Problem, attach, solve_problem, solve_unrecorded
from implicitdiff._implicit.system import System, first_column, make_system, map_columns
from implicitdiff._torch.lanes import over_levels
from implicitdiff._torch.trees import Leaves, Structure, Tree
from implicitdiff._torch.values import refuse_valueless
from implicitdiff.errors import LinearSolveError

Solve = Callable[[Callable[[Tree], Tree], Tree], Tree]
"""A linear solver ``solve(matvec, b) -> x`` over pytrees."""
_Entry = TypeVar("_Entry")


@dataclass(frozen=True)
class LinearMethod:
    """The method of a linear solver.

    Attributes:
        name: the name of its factory.
        algorithm: returns the rows ``x`` of a `System`, and reports failure itself.
        preconditioner: ``r -> M^-1 r`` over trees like ``b``, or None.
        init: an initial guess, a tree like ``x``, or None for zero.
        problem_type: subclass of `LinearProblem` with its own derivative rules, or None for `LinearProblem`.
        rectangular: the subclass for operators whose domain differs from their range; None: refuse such operators.
        ridge: the number that the algorithm adds to the diagonal.
    """

    name: str
    algorithm: Callable[[System], Tensor]
    preconditioner: Callable[[Tree], Tree] | None = None
    init: Tree = None
    problem_type: Callable[..., LinearProblem] | None = None
    rectangular: Callable[..., LinearProblem] | None = None
    ridge: float = 0.0


def solve_linear(problem: LinearProblem, b: Leaves, operands: Leaves, aids: Leaves | None = None) -> Leaves:
    """Return the solution of ``A(operands) x = b``, differentiable in `b` and `operands`.

    Args:
        problem: the operator, the solver, and the batch dimensions.
        b: the right-hand sides, with the lanes and columns of the problem.
        operands: the operands of the operator.
        aids: the operands of the preconditioner, if `problem` already has a preconditioner.
    """
    refuse_valueless(_name_of(problem.solver), [*b, *operands])
    # A solver of the library runs inside of the primitive, on plain tensors.
    if isinstance(solver := problem.solver, LinearMethod):
        problem = _with_problem_type(problem, solver)
        if aids is None:
            return solve_problem(*_with_aids(problem, solver, b, operands))
        return solve_problem(problem, [*b, *operands, *aids])
    # The derivatives follow from the equation, so the user's solver sees no gradient layer.
    values = [_levels.plain_under_vmap(t) for t in [*b, *operands]]
    sides, operands_below = values[: len(b)], values[len(b) :]
    with below_autodiff(DropGradientLayers):
        # Without any number to solve for, such as under a vmap of size 0, the user's function is not called.
        if any(_levels.base(t).numel() for t in sides):
            x = problem.solve_by_user(sides, operands_below)
        else:
            x = [torch.zeros_like(t) for t in sides]
    # The solver may have recorded a graph under an `enable_grad` of its own.
    x = [t.detach() for t in x]
    if broken := sum(not bool(torch.isfinite(_levels.base(t)).all()) for t in x):
        raise LinearSolveError(
            f"{problem.solver!r} returned values that are not finite in {broken} of {len(x)} leaves; the operator may "
            "be singular, or of a kind that this solver cannot solve",
            solver=repr(problem.solver),
            residual=math.nan,
            target=math.nan,
            failed=broken,
            total=len(x),
            iterations=0,
        )
    return attach(problem, x, [*b, *operands])


def solve_linear_unrecorded(problem: LinearProblem, solver: LinearMethod, b: Leaves) -> Leaves:
    """`solve_linear` for an operator without operands, and a `b` that nothing differentiates."""
    return solve_unrecorded(*_with_aids(_with_problem_type(problem, solver), solver, b, []))


def _with_problem_type(problem: LinearProblem, solver: LinearMethod) -> LinearProblem:
    return problem if solver.problem_type is None else solver.problem_type(**vars(problem))


def _name_of(solve: Solve) -> str:
    return solve.name if isinstance(solve, LinearMethod) else repr(solve)


def _with_aids(
    problem: LinearProblem, solver: LinearMethod, b: Leaves, operands: Leaves
) -> tuple[LinearProblem, Leaves]:
    """Return the problem with the preconditioner and the initial guess of its solver, and all operands.

    The solution does not depend on the two. So their tensors are detached; as operands they can still be batched.
    """
    aids: Leaves = []
    precondition: Operator
    # Preconditioner and guess are given for one right-hand side in one lane.
    one = problem.one(b)
    if solver.preconditioner is not None:
        lifted = lift_linear(f"{solver.name}: preconditioner", solver.preconditioner, one, problem.structure)
        precondition, aids = lifted_operator(lifted, problem.structure), lifted.captured
        # For M close to A, the adjoint of M is close to the adjoint of A.
        if isinstance(problem.operator, Adjoint):
            precondition = precondition.adjoint
        # The lanes so far share the preconditioner. A later vmap may batch its operands.
        levels = tuple(d + (None,) * len(aids) for d in problem.levels)
        problem = replace(problem, precondition=precondition, aids=len(aids), levels=levels)
    if solver.init is not None:
        check_like(
            f"{solver.name}: init",
            solver.init,
            problem.structure.unflatten(one),
            one,
            problem.structure,
            "the right-hand side",
        )
        problem = replace(problem, has_start=True)
        # A view of zero strides: all lanes and columns share the guess.
        aids = aids + [t.expand_as(like) for t, like in zip(problem.structure.tensors_of(solver.init), b, strict=True)]
    return problem, [*b, *operands, *map(Tensor.detach, aids)]


@dataclass(frozen=True)
class LinearProblem(Problem):
    """``A(operands) x - b = 0``.

    ``theta`` consists of ``b``, the operands, the operands of the preconditioner, and the initial guess, in this order.

    A vmap adds one of two sorts of batch dimensions. If the matrix is batched, the vmap adds a dimension of lanes, in
    front of all dimensions. Otherwise the vmap adds a dimension of columns, behind the lanes: several right-hand sides
    of one matrix, which is then factorised once.

    Attributes:
        operator: the operator of one lane.
        solver: solves systems over trees of `structure`.
        structure: the tree of one right-hand side.
        count: the number of operands of the operator.
        precondition: the preconditioner of one lane, or None.
        aids: the number of operands of the preconditioner.
        has_start: whether ``theta`` contains an initial guess.
        levels: for each vmap that added lanes, the batch dimension (0, or None) of each operand of the operator and of
            the preconditioner.
        lanes: the sizes of the dimensions of lanes.
        columns: the sizes of the dimensions of columns.
    """

    operator: Operator
    solver: Solve
    structure: Structure
    count: int
    precondition: Operator | None = None
    aids: int = 0
    has_start: bool = False
    levels: tuple[Dims, ...] = ()
    lanes: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()

    @property
    def prefers_unrecorded(self) -> bool:
        return isinstance(self.solver, LinearMethod)

    def residual(self, x: Leaves, theta: Leaves) -> Leaves:
        b, operands, *_ = self._split(theta)
        return [y - t for y, t in zip(self.product(x, operands), b, strict=True)]

    def product(self, v: Leaves, operands: Leaves) -> Leaves:
        """Return ``A(operands) v``."""
        matvec = self._over_lanes(self.operator, slice(self.count)).products(operands, self._column(v)).matvec()
        return map_columns(matvec, len(self.lanes), len(self.columns))(v)

    def primal(self, theta: Leaves) -> Leaves:
        if not isinstance(self.solver, LinearMethod):
            raise AssertionError("a user's function solves in its caller's frame, never here")
        b, operands, aids, start = self._split(theta)
        operator = self._over_lanes(self.operator, slice(self.count))
        blocks = operator.blocks
        # The algorithms need entries on both sides; without entries the solution is empty or zero.
        if not (any(t.numel() for t in b[blocks.domain]) and any(t.numel() for t in b[blocks.range])):
            return [torch.zeros_like(t) for t in b]
        # The preconditioner acts on the smaller side of a rectangular operator.
        precondition = None
        if self.precondition is not None:
            like = self._column(b)[blocks.smaller]
            precondition = self._over_lanes(self.precondition, slice(self.count, None)).products(aids, like).matvec
        # The matrix is materialised lane by lane where possible, see `_materialise_each`.
        lane = operator.lane
        if lane is None and len(self.levels) == len(self.lanes):
            lane = Lane(self.operator, operands, tuple(dims[: self.count] for dims in self.levels))
        vectors, system = make_system(
            operator, operands, b, self.lanes, self.columns, precondition, start or None, lane
        )
        # A solver reads norms on the host, so the leader decides in the solve as well.
        with _decisions.frame():
            # The rows of b were divided by `scale`, and a solution is linear in b.
            (rows,) = _decisions.of_leader([self.solver.algorithm(system) * system.scale])
        x = vectors.unravel(rows)
        if system.is_square:
            return x
        # A rectangular problem has the leaves of both sides as unknowns; the leaves of the range are zero.
        whole = [torch.zeros_like(t) for t in b]
        whole[blocks.domain] = x
        return whole

    def solve(self, x: Leaves, theta: Leaves, b: Leaves, *, adjoint: bool) -> Leaves:
        _, operands, aids, _ = self._split(theta)
        # The initial guess is a guess of this solution, not of a derivative.
        problem = replace(self, has_start=False)
        if adjoint:
            problem = replace(
                problem,
                operator=self.operator.adjoint,
                precondition=None if self.precondition is None else self.precondition.adjoint,
            )
        return solve_linear(problem, b, operands, aids)

    def solve_by_user(self, b: Leaves, operands: Leaves) -> Leaves:
        """Return the solution by a user's own function.

        The function may use captured tensors of the running vmaps. So it runs under the caller's vmaps, and not inside
        of an autograd.Function.
        """

        def one_lane(b: Leaves, operands: Leaves) -> Leaves:
            tree = self.structure.unflatten(b)
            x = self.solver(BoundMatvec(self.operator, operands, self.structure), tree)
            check_like(f"the result of solve={self.solver!r}", x, tree, b, self.structure, "its right-hand side")
            return self.structure.tensors_of(x)

        # Innermost first: columns lie behind the lanes, and no operand of the operator has columns.
        levels = [(0, None) for _ in self.columns] + [(0, list(dims)) for dims in self.levels]
        return over_levels(one_lane, levels)(b, operands)  # type: ignore[no-any-return]

    def batched(self, dims: Dims, size: int) -> tuple[LinearProblem, Dims, int]:
        # -1 asks for a batched tensor, expanded if need be: right-hand sides always have all lanes and columns.
        b, operands, aids, start = self._split(dims)
        free = (-1,) * len(b), (-1,) * len(start)
        if all(d is None for d in (*operands, *aids)):
            wanted = (*free[0], *(None for _ in (*operands, *aids)), *free[1])
            # Vmaps come from the inside out, so the newest size is the outermost, in front.
            return replace(self, columns=(size, *self.columns)), wanted, len(self.lanes)
        point = self.operator.point
        # The point of a linearisation is always batched: with one point for all lanes, a derivative with respect to the
        # point would be summed over the lanes.
        level = (0,) * point + tuple(None if d is None else 0 for d in (*operands, *aids)[point:])
        wanted = (*free[0], *((-1,) * point + level[point:]), *free[1])
        return replace(self, levels=(*self.levels, level), lanes=(size, *self.lanes)), wanted, 0

    def one(self, b: Leaves) -> Leaves:
        """Return the right-hand side of the first lane and column."""
        return first_column(b, 0, len(self.lanes) + len(self.columns))

    def pullback(self, x: Leaves, theta: Leaves, u: Leaves, wanted: Sequence[int]) -> dict[int, Tensor]:
        # d residual / d b = -1. Most solves are differentiated in b alone, and then need no pullback through A.
        sides = len(self.structure.slots)
        grads = {i: -u[i] for i in wanted if i < sides}
        if rest := [i for i in wanted if i >= sides]:
            grads |= super().pullback(x, theta, u, rest)
        return grads

    def pushforward(self, x: Leaves, theta: Leaves, tangents: dict[int, Tensor]) -> Leaves:
        sides = len(self.structure.slots)
        rest = {i: t for i, t in tangents.items() if i >= sides}
        out = super().pushforward(x, theta, rest) if rest else [torch.zeros_like(t) for t in x]
        return [t - tangents[i] if i in tangents else t for i, t in enumerate(out)]

    def _over_lanes(self, operator: Operator, operands: slice) -> Operator:
        for dims in self.levels:
            operator = operator.batched(dims[operands])
        return operator

    def _column(self, leaves: Leaves) -> Leaves:
        return first_column(leaves, len(self.lanes), len(self.columns))

    def _split(self, theta: Sequence[_Entry]) -> tuple[list[_Entry], list[_Entry], list[_Entry], list[_Entry]]:
        """Split theta, or the batch dimensions of theta: b, operands, operands of the preconditioner, guess."""
        k = len(self.structure.slots)
        m, n = k + self.count, k + self.count + self.aids
        return list(theta[:k]), list(theta[k:m]), list(theta[m:n]), list(theta[n:])


class BoundMatvec:
    """The matvec for a user's own ``solve(matvec, b)``: an operator with its operands, over trees."""

    def __init__(self, operator: Operator, operands: Leaves, structure: Structure) -> None:
        self.operator, self.operands, self.structure = operator, operands, structure
        self.product: Product | None = None

    def __call__(self, v: Tree) -> Tree:
        leaves = self.structure.tensors_of(v)
        if _modes.is_traced():
            # The user's function wraps this matvec for a linear solver, whose modes must see the operands.
            product = self.operator.products(_modes.alias(self.operands), leaves).matvec()
            return self.structure.unflatten(product(leaves))
        if self.product is None:
            # The operands do not change during the user's solve, so one linearisation serves all products.
            by: type[Linearisation] = OfOperands if _context.depth() == 0 else ByFunctorch
            self.product = self.operator.products(self.operands, leaves, by).matvec()
        return self.structure.unflatten(self.product(leaves))


def lift_linear(name: str, linear: Callable[[Tree], Tree], leaves: Leaves, structure: Structure) -> Lifted:
    """Return a linear function over trees, lifted: its operands are the argument, then the captured tensors."""
    lifted = lift(name, linear, structure.unflatten(leaves))
    check_like(f"{name}'s result", lifted.value, structure.unflatten(leaves), leaves, structure, "its argument")
    confirm(lifted)
    return lifted


def lifted_operator(lifted: Lifted, structure: Structure) -> Matvec:
    """Return the operator of a lifted linear function."""
    return Matvec(lambda v, operands: structure.tensors_of(lifted([*v, *operands])), lifted.refusal is not None)
