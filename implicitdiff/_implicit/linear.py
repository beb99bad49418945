"""Linear solves as differentiable problems, and the type of a linear solver."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

import implicitdiff._closures.modes as _modes
import implicitdiff._torch.levels as _functorch
import implicitdiff._torch.settings as _settings
import implicitdiff._torch.trees as pytree
from implicitdiff._closures.lift import Lifted, confirm, lift
from implicitdiff._implicit.domain import SHAPE_ERRORS, domain_of, refuse_other_errors
from implicitdiff._implicit.operators import (
    Adjoint,
    Dims,
    Lane,
    Matvec,
    Operator,
    PlainPullback,
    Product,
    Pullback,
    Rectangular,
)
from implicitdiff._implicit.primitive import Problem, attach, solve_problem, solve_quietly
from implicitdiff._implicit.system import System, first_column, make_system, map_columns
from implicitdiff._torch.lanes import over_levels
from implicitdiff._torch.trees import Leaves, Structure
from implicitdiff._torch.values import refuse_valueless
from implicitdiff.errors import LinearSolveError

_NOT_SQUARE = " (solve_lstsq and solve_normal_cg take operators that are not square)"
_HINT = " (where the unknowns are another tree than b, pass init=, a tree like them)"

Solve = Callable[[Callable[[Any], Any], Any], Any]
"""``solve(matvec, b) -> x`` over pytrees."""


@dataclass(frozen=True)
class LinearSolver:
    """``solve(matvec, b) -> x`` with ``A x = b`` over pytrees; made by the factories of `implicitdiff.linear_solve`.

    Attributes:
        name: the name of its factory.
        algorithm: gives the rows ``x`` of a `System`, and reports failure itself.
        preconditioner: ``r -> M^-1 r`` over trees like ``b``, or None.
        init: an initial guess, a tree like ``x``, or None for zero.
        kind: makes a `LinearProblem` whose derivatives follow rules of their own from the fields of one, or None.
        rectangular: the same where a tree like ``x`` is none like ``b``; None: such operators are refused.
        ridge: what the algorithm adds to the diagonal.
    """

    name: str
    algorithm: Callable[[System], Tensor]
    preconditioner: Callable[[Any], Any] | None = None
    init: Any = None
    kind: Callable[..., LinearProblem] | None = None
    rectangular: Callable[..., LinearProblem] | None = None
    ridge: float = 0.0

    @_functorch.outside_compile
    @_modes.one_operation
    def __call__(self, matvec: Callable[[Any], Any], b: Any) -> Any:
        leaves, structure = pytree.flatten(b)
        check_unknowns(f"{self.name}: the right-hand side b", leaves, structure)
        refuse_valueless(self.name, leaves)
        if isinstance(matvec, BoundMatvec):
            problem = LinearProblem(matvec.operator, self, structure, len(matvec.operands))
            return structure.unflatten(solve_linear(problem, leaves, matvec.operands))
        if not callable(matvec):
            raise TypeError(f"{self.name}: matvec must be a function v -> A v, got {type(matvec).__name__}")
        lifted, x = self._lift(matvec, leaves, structure)
        image = structure.tensors_of(lifted.value)
        of = leaves if x is None else x.leaves
        if _hold_numbers(of) and _hold_numbers(image):
            _check_linear(self.name, lifted, of, structure, image)
        with lifted.during_call():
            if x is not None:
                return _solve_rectangular(self, lifted, x, leaves, structure)
            problem = LinearProblem(lifted_operator(lifted, structure), self, structure, len(lifted.captured))
            return structure.unflatten(solve_linear(problem, leaves, lifted.captured))

    def _lift(self, matvec: Callable[[Any], Any], leaves: Leaves, structure: Structure) -> tuple[Lifted, Domain | None]:
        """The matvec, and what it acts on: a tree like `b`, which is None here, or like `init`, or what is found."""
        name, b = f"{self.name}: matvec", structure.unflatten(leaves)
        if self.rectangular is not None and self.init is not None and not is_like(self.init, leaves, structure):
            like_init = self._domain_of_init(leaves, structure)
            try:
                return _capture_between(name, matvec, like_init, leaves, structure)
            except SHAPE_ERRORS as error:
                refuse_other_errors(error)
                raise ValueError(
                    f"{self.name}: init must be a tree like the unknowns, but matvec fails on one like "
                    f"{pytree.describe(self.init)}, where b is {pytree.describe(b)}: {error}"
                ) from error
        try:
            lifted = lift(name, matvec, b)
        except SHAPE_ERRORS as error:
            refuse_other_errors(error)
            if (x := self._find_domain(matvec, b)) is None:
                if self.rectangular is None:
                    raise
                raise ValueError(f"{name} fails on a tree like b, {pytree.describe(b)}: {error}{_HINT}") from error
        else:
            if is_like(lifted.value, leaves, structure):
                confirm(lifted)
                return lifted, None
            if (x := self._find_domain(matvec, b)) is None:
                hint = _NOT_SQUARE if self.rectangular is None else _HINT
                check_like(f"{name}'s result", lifted.value, b, leaves, structure, f"its argument{hint}")
                raise AssertionError("it is not like its argument")
        return _capture_between(name, matvec, x, leaves, structure)

    def _domain_of_init(self, leaves: Leaves, structure: Structure) -> Domain:
        """What the guess says that the operator acts on."""
        if not pytree.tensors(self.init):
            check_like(f"{self.name}: init", self.init, structure.unflatten(leaves), leaves, structure, "b, or of x")
        return Domain.like(f"{self.name}: init", self.init)

    def _find_domain(self, matvec: Callable[[Any], Any], b: Any) -> Domain | None:
        """What the operator acts on if it fails on a tree like `b`, where it can be found."""
        if self.init is not None or (v := domain_of(f"{self.name}: matvec", matvec, b)) is None:
            return None
        if self.rectangular is None:
            raise ValueError(
                f"{self.name}: matvec takes {pytree.describe(v)} to a tensor like b, {pytree.describe(b)}, but this "
                "solver takes square operators alone: take solve_lstsq or solve_normal_cg"
            )
        return Domain.like(f"{self.name}: matvec", v)

    def __repr__(self) -> str:
        return f"<implicitdiff.linear_solve.{self.name}>"


@dataclass(frozen=True)
class Domain:
    """What a rectangular operator acts on: tensors of ones like the unknowns, and their tree."""

    leaves: Leaves
    structure: Structure
    start: Leaves

    @classmethod
    def like(cls, name: str, tree: Any) -> Domain:
        start, structure = pytree.flatten(tree)
        check_unknowns(name, start, structure)
        return cls([torch.ones(t.shape, dtype=t.dtype, device=t.device) for t in start], structure, start)


def _hold_numbers(leaves: Leaves) -> bool:
    """Whether there are any, in every lane of which there is one."""
    return any(t.numel() for t in leaves) and all(_functorch.base(t).numel() for t in leaves if t.numel())


def capture(name: str, linear: Callable[[Any], Any], leaves: Leaves, structure: Structure) -> Lifted:
    """A linear function over trees, with the tensors that it captures as operands after its argument."""
    lifted = lift(name, linear, structure.unflatten(leaves))
    check_like(f"{name}'s result", lifted.value, structure.unflatten(leaves), leaves, structure, "its argument")
    confirm(lifted)
    return lifted


def _capture_between(
    name: str, linear: Callable[[Any], Any], x: Domain, leaves: Leaves, structure: Structure
) -> tuple[Lifted, Domain]:
    """The same for a function from one tree to another one, like `leaves`."""
    lifted = lift(name, linear, x.structure.unflatten(x.leaves))
    check_like(f"{name}'s result", lifted.value, structure.unflatten(leaves), leaves, structure, "b")
    confirm(lifted)
    return lifted, x


def lifted_operator(lifted: Lifted, structure: Structure) -> Matvec:
    """The operator that such a function is."""
    return Matvec(lambda v, operands: structure.tensors_of(lifted([*v, *operands])), lifted.alone is not None)


def _check_linear(name: str, lifted: Lifted, leaves: Leaves, structure: Structure, image: Leaves) -> None:
    """Refuse a function that is not linear, which would give the solution of another system without an error.

    Looked at are ``A 0 = 0``, exactly, and ``A (b - 3 p) = A b - 3 A p`` with the given `image` ``A b`` and a pattern
    ``p`` of both signs and of the size of ``b``: 3 leaves no power and no absolute value as it was, and is real, as
    maps that are linear over the reals alone are linear.
    """

    def product(v: Leaves) -> Leaves:
        with torch.no_grad():
            return [t.detach() for t in structure.tensors_of(lifted.within_call([*v, *lifted.captured]))]

    b = [t.detach() for t in leaves]
    values = [_functorch.base(t) for t in product([torch.zeros_like(t) for t in b])]
    if any(bool(((v != 0) & torch.isfinite(v)).any()) for v in values):
        raise ValueError(f"{name}: matvec is not linear: it does not take zero to zero; leave out its constant term")
    p = [size(t) * w for t, w in zip(b, pattern(b), strict=True)]
    images = image, product(p), product([t - 3 * w for t, w in zip(b, p, strict=True)])
    if (gap := _largest_gap([t for t in zip(*images, strict=True) if t[0].numel()])) > 0:
        raise ValueError(
            f"{name}: matvec is not linear: A (b - 3 p) and A b - 3 A p, for a vector p of the size of b, differ by "
            f"{gap:.1e} of their size; leave out absolute values, products of the argument with itself and the like"
        )


def size(tensor: Tensor) -> Tensor:
    """Of the largest number, or 1 if there is none but zero; with the dimensions of the tensor."""
    everything = tuple(range(tensor.dim()))
    entries = tensor.abs()
    largest = entries.amax(everything, keepdim=True) if tensor.numel() else entries.sum(everything, keepdim=True)
    return torch.where(largest > 0, largest, 1.0)


def pattern(like: Leaves) -> Leaves:
    """Numbers without a pattern, of both signs and up to 1 in size, in the places of those of `like`."""
    return [_wave(t.numel(), t).reshape(t.shape) for t in like]


def _wave(count: int, like: Tensor) -> Tensor:
    angles = 7.0 * torch.arange(1, count + 1, dtype=torch.float32, device=like.device) ** 2
    return (torch.polar(torch.ones_like(angles), angles) if like.is_complex() else angles.cos()).to(like.dtype)


def _largest_gap(images: Sequence[tuple[Tensor, Tensor, Tensor]]) -> float:
    """How much ``A (b - 3 p)`` differs from ``A b - 3 A p`` in any leaf and lane, relative to the largest of the three,
    where that is more than rounding explains; what is not finite is left to other errors.

    Rounding may be that of a difference quotient, or of large terms that cancel in one leaf to much less than the
    other leaves have.
    """
    wide = [[t.to(torch.promote_types(t.dtype, torch.float32)) for t in leaf] for leaf in images]
    gaps = [(c - (a - 3 * b)).abs().amax() for a, b, c in wide]
    sizes = [torch.stack([a.abs().amax(), 3 * b.abs().amax(), c.abs().amax()]).amax(dim=0) for a, b, c in wide]
    dtypes = [leaf[0].dtype for leaf in images] + [dtype for _, enabled, dtype in _settings.autocast_state() if enabled]
    eps = max(torch.finfo(d).eps for d in dtypes)
    # Below this, rounding is not relative to the numbers.
    least = max(torch.finfo(d).tiny / torch.finfo(d).eps for d in dtypes)
    whole = reduce(torch.maximum, sizes)
    found = [
        torch.where(gap > eps**0.25 * (size + eps**0.5 * whole + least), gap / size, 0.0)
        for gap, size in zip(gaps, sizes, strict=True)
    ]
    return max(float(_functorch.base(t).max()) for t in found)


def check_leaves(name: str, leaves: Leaves) -> None:
    """Unknowns and right-hand sides are floating or complex tensors on one device."""
    if not leaves:
        raise TypeError(f"{name} holds no tensor")
    if wrong := [t.dtype for t in leaves if not (t.is_floating_point() or t.is_complex())]:
        raise TypeError(
            f"{name} has a leaf of dtype {wrong[0]}; every tensor in it must be floating point or complex: convert it, "
            "by .to(torch.get_default_dtype()) for one"
        )
    if len(devices := {t.device for t in leaves}) > 1:
        raise ValueError(f"{name} has leaves on several devices, {sorted(map(str, devices))}; put them on one")


def check_unknowns(name: str, leaves: Leaves, structure: Structure) -> None:
    """A tree to be solved for holds such tensors alone; None and strings may stand beside them."""
    check_leaves(name, leaves)
    for leaf in structure.others:
        if leaf is not None and not isinstance(leaf, str):
            raise TypeError(
                f"{name} holds {repr(leaf)[:100]}, of type {type(leaf).__name__}, where a tensor was expected; only "
                "tensors are solved for: make it a tensor, or pass it as another argument"
            )


def is_like(tree: Any, leaves: Leaves, structure: Structure) -> bool:
    """Whether it has this structure, and the shapes and dtypes of these leaves."""
    try:
        return [(r.shape, r.dtype) for r in structure.tensors_of(tree)] == [(t.shape, t.dtype) for t in leaves]
    except ValueError:
        return False


def check_like(name: str, result: Any, like: Any, leaves: Leaves, structure: Structure, of: str) -> None:
    """A tree that a user gave or returned is one like `like`, whose leaves and structure these are."""
    if not is_like(result, leaves, structure):
        raise ValueError(
            f"{name} must have the structure, shapes and dtypes of {of}: expected {pytree.describe(like)}, "
            f"got {pytree.describe(result)}"
        )


class BoundMatvec:
    """The matvec that a user's own ``solve(matvec, b)`` receives: an operator bound to its operands, over trees."""

    def __init__(self, operator: Operator, operands: Leaves, structure: Structure) -> None:
        self.operator, self.operands, self.structure = operator, operands, structure
        self.product: Product | None = None

    def __call__(self, v: Any) -> Any:
        leaves = self.structure.tensors_of(v)
        if _modes.is_traced():
            # A wrapped matvec meets a linear solver again, which must see the operands.
            product = self.operator.products(_modes.alias(self.operands), leaves).matvec()
            return self.structure.unflatten(product(leaves))
        if self.product is None:
            pullback = PlainPullback if _functorch.depth() == 0 else Pullback
            self.product = self.operator.products(self.operands, leaves, pullback).matvec()
        return self.structure.unflatten(self.product(leaves))


def solve_linear(problem: LinearProblem, b: Leaves, operands: Leaves, aids: Leaves | None = None) -> Leaves:
    """The solution of ``A(operands) x = b``, differentiable in both; `b` has the lanes and columns of the problem.

    `aids` are the operands of the preconditioner, if the problem knows it already.
    """
    refuse_valueless(_name_of(problem.solver), [*b, *operands])
    if isinstance(solver := problem.solver, LinearSolver):
        problem = _of_its_kind(problem, solver)
        if aids is None:
            return solve_problem(*_with_aids(problem, solver, b, operands))
        return solve_problem(problem, [*b, *operands, *aids])
    values = [_functorch.plain_under_vmap(t) for t in [*b, *operands]]
    sides, operands_below = values[: len(b)], values[len(b) :]
    with _modes.below_gradients():
        if any(_functorch.base(t).numel() for t in sides):
            x = problem.solve_by_user(sides, operands_below)
        else:
            x = [torch.zeros_like(t) for t in sides]
    x = [t.detach() for t in x]
    if broken := sum(not bool(torch.isfinite(_functorch.base(t)).all()) for t in x):
        raise LinearSolveError(
            f"{problem.solver!r} returned values that are not finite in {broken} of {len(x)} leaves; the operator may "
            "be singular, or not of the kind that this solver is for",
            solver=repr(problem.solver),
            residual=math.nan,
            target=math.nan,
            failed=broken,
            total=len(x),
            iterations=0,
        )
    return attach(problem, x, [*b, *operands])


def solve_linear_quietly(problem: LinearProblem, solver: LinearSolver, b: Leaves) -> Leaves:
    """The same by a linear solver, for an operator without operands, where nothing can be differentiated in `b`."""
    return solve_quietly(*_with_aids(_of_its_kind(problem, solver), solver, b, []))


def _of_its_kind(problem: LinearProblem, solver: LinearSolver) -> LinearProblem:
    return problem if solver.kind is None else solver.kind(**vars(problem))


def _solve_rectangular(solver: LinearSolver, lifted: Lifted, x: Domain, b: Leaves, structure: Structure) -> Any:
    """The solution, a tree like `x`, from the square problem on the leaves of both sides."""
    if solver.rectangular is None or solver.ridge:
        raise ValueError(
            f"{solver.name}: ridge is added to A, which must be square for that; for damped least squares let matvec "
            "return (A v, ridge**0.5 * v) and pass (b, zeros like the unknowns)"
        )
    matvec, is_wide = lifted_operator(lifted, structure), _numbers(x.leaves) > _numbers(b)
    operator = Rectangular(matvec.fn, len(x.leaves), is_wide, matvec.one_by_one)
    _, both = pytree.flatten((x.structure.unflatten(x.leaves), structure.unflatten(b)))
    problem = solver.rectangular(operator=operator, solver=solver, structure=both, count=len(lifted.captured))
    aids: Leaves = []
    if solver.preconditioner is not None:
        like, side = (b, structure) if is_wide else (x.leaves, x.structure)
        precondition = capture(f"{solver.name}: preconditioner", solver.preconditioner, like, side)
        aids = precondition.captured
        problem = replace(problem, precondition=lifted_operator(precondition, side), aids=len(aids))
    if solver.init is not None and not is_wide:
        # From another start than zero, the solution of a wide system keeps a share in the null space.
        problem = replace(problem, has_start=True)
        aids = [*aids, *x.start, *map(torch.zeros_like, b)]
    refuse_valueless(solver.name, lifted.captured)
    sides = [*map(torch.zeros_like, x.leaves), *b]
    solution = solve_problem(problem, [*sides, *lifted.captured, *(t.detach() for t in aids)])
    return x.structure.unflatten(solution[: len(x.leaves)])


def _numbers(leaves: Leaves) -> int:
    """How many real numbers they hold."""
    return sum(t.numel() * (2 if t.is_complex() else 1) for t in leaves)


def _name_of(solve: Solve) -> str:
    return solve.name if isinstance(solve, LinearSolver) else repr(solve)


def _with_aids(
    problem: LinearProblem, solver: LinearSolver, b: Leaves, operands: Leaves
) -> tuple[LinearProblem, Leaves]:
    """The problem with the preconditioner and the initial guess of its solver, and all its operands.

    Neither moves the solution, so their tensors are operands only to be batched, and are detached.
    """
    if solver.preconditioner is None and solver.init is None:
        return problem, [*b, *operands]
    aids: Leaves = []
    precondition: Operator
    one = problem.one(b)
    if solver.preconditioner is not None:
        lifted = capture(f"{solver.name}: preconditioner", solver.preconditioner, one, problem.structure)
        precondition, aids = lifted_operator(lifted, problem.structure), lifted.captured
        if isinstance(problem.operator, Adjoint):
            precondition = precondition.adjoint
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
        aids = aids + [t.expand_as(like) for t, like in zip(problem.structure.tensors_of(solver.init), b, strict=True)]
    return problem, [*b, *operands, *(t.detach() for t in aids)]


@dataclass(frozen=True)
class LinearProblem(Problem):
    """``A(operands) x - b = 0``; ``theta`` is ``b``, the operands, those of the preconditioner, the initial guess.

    Batch dimensions come in two kinds. A vmap that batches the matrix adds a lane, in front of all others. One that
    leaves the matrix alone adds a column, behind the lanes: one more right-hand side of the same matrix, which is
    factorised once.

    Attributes:
        operator: the operator of one lane.
        solver: what solves, over trees of `structure`.
        structure: the tree of one right-hand side.
        count: how many operands the operator has.
        precondition: the preconditioner of one lane, with as many operands as `aids` says.
        has_start: whether there is an initial guess.
        levels: for each vmap that added a lane, where the operands and those of the preconditioner are batched (0,
            else None).
        lanes: the sizes of the lanes.
        columns: the sizes of the columns.
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
    def is_lazy(self) -> bool:
        return isinstance(self.solver, LinearSolver)

    def residual(self, x: Leaves, theta: Leaves) -> Leaves:
        b, operands, *_ = self._split(theta)
        return [y - t for y, t in zip(self.product(x, operands), b, strict=True)]

    def product(self, v: Leaves, operands: Leaves) -> Leaves:
        """``A(operands) v``."""
        matvec = self._over_lanes(self.operator, 0).products(operands, self._column(v)).matvec()
        return map_columns(matvec, len(self.lanes), len(self.columns))(v)

    def primal(self, theta: Leaves) -> Leaves:
        if not isinstance(self.solver, LinearSolver):
            raise AssertionError("a user's function solves in its caller's frame, never here")
        b, operands, aids, start = self._split(theta)
        operator = self._over_lanes(self.operator, 0)
        blocks = operator.blocks
        if not (any(t.numel() for t in b[blocks.domain]) and any(t.numel() for t in b[blocks.range])):
            return [torch.zeros_like(t) for t in b]
        precondition = None
        if self.precondition is not None:
            like = self._column(b)[blocks.smaller]
            precondition = self._over_lanes(self.precondition, self.count).products(aids, like).matvec
        lane = operator.lane or Lane(self.operator, operands, tuple(dims[: self.count] for dims in self.levels))
        vectors, system = make_system(
            operator, operands, b, self.lanes, self.columns, precondition, start or None, lane
        )
        x = vectors.unravel(self.solver.algorithm(system) * system.scale)
        if system.is_square:
            return x
        whole = [torch.zeros_like(t) for t in b]
        whole[blocks.domain] = x
        return whole

    def solve(self, x: Leaves, theta: Leaves, b: Leaves, *, adjoint: bool) -> Leaves:
        _, operands, aids, _ = self._split(theta)
        problem = replace(self, has_start=False)
        if adjoint:
            problem = replace(
                problem,
                operator=self.operator.adjoint,
                precondition=None if self.precondition is None else self.precondition.adjoint,
            )
        return solve_linear(problem, b, operands, aids)

    def solve_by_user(self, b: Leaves, operands: Leaves) -> Leaves:
        """The solution by a user's function, which runs in the caller's frame since it may hold tensors of the
        running vmaps."""

        def one_lane(b: Leaves, operands: Leaves) -> Leaves:
            tree = self.structure.unflatten(b)
            x = self.solver(BoundMatvec(self.operator, operands, self.structure), tree)
            check_like(f"the result of solve={self.solver!r}", x, tree, b, self.structure, "its right-hand side")
            return self.structure.tensors_of(x)

        levels = [(0, None) for _ in self.columns] + [(0, list(dims)) for dims in self.levels]
        return over_levels(one_lane, levels)(b, operands)  # type: ignore[no-any-return]

    def batched(self, dims: Dims, size: int) -> tuple[LinearProblem, Dims, int]:
        b, operands, aids, start = self._split(dims)
        free = (-1,) * len(b), (-1,) * len(start)
        if all(d is None for d in (*operands, *aids)):
            wanted = (*free[0], *(None for _ in (*operands, *aids)), *free[1])
            return replace(self, columns=(size, *self.columns)), wanted, len(self.lanes)
        point = self.operator.point
        level = (0,) * point + tuple(None if d is None else 0 for d in (*operands, *aids)[point:])
        wanted = (*free[0], *((-1,) * point + level[point:]), *free[1])
        return replace(self, levels=(*self.levels, level), lanes=(size, *self.lanes)), wanted, 0

    def one(self, b: Leaves) -> Leaves:
        """The right-hand side of the first lane and column."""
        return first_column(b, 0, len(self.lanes) + len(self.columns))

    def pullback(self, x: Leaves, theta: Leaves, u: Leaves, wanted: Sequence[int]) -> dict[int, Tensor]:
        # d residual / d b = -1, and most solves are differentiated in b alone.
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

    def _over_lanes(self, operator: Operator, first: int) -> Operator:
        count = self.count if first == 0 else self.aids
        for dims in self.levels:
            operator = operator.batched(dims[first : first + count])
        return operator

    def _column(self, leaves: Leaves) -> Leaves:
        return first_column(leaves, len(self.lanes), len(self.columns))

    def _split(self, theta: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
        ends = [len(self.structure.slots), self.count, self.aids]
        parts, at = [], 0
        for n in ends:
            parts.append(list(theta[at : at + n]))
            at += n
        return parts[0], parts[1], parts[2], list(theta[at:])
