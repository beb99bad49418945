"""Linear solvers: calls of ``solve(matvec, b)``, their checks, and operators that are not square."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

import implicitdiff._closures.modes as _modes
import implicitdiff._torch.compile as _compile
import implicitdiff._torch.levels as _levels
import implicitdiff._torch.settings as _settings
import implicitdiff._torch.trees as pytree
from implicitdiff._calls import Remembers
from implicitdiff._closures.lift import Lifted, confirm, lift
from implicitdiff._implicit.checks import check_like, check_unknowns, is_like, max_abs_or_one, probe_vector
from implicitdiff._implicit.domain import SHAPE_ERRORS, domain_of, refuse_other_errors
from implicitdiff._implicit.linear_problem import (
    BoundMatvec,
    LinearMethod,
    LinearProblem,
    lift_linear,
    lifted_operator,
    solve_linear,
)
from implicitdiff._implicit.operators import Rectangular
from implicitdiff._implicit.primitive import solve_problem
from implicitdiff._torch.trees import Leaves, Structure, Tree
from implicitdiff._torch.values import refuse_valueless

_NOT_SQUARE = " (solve_lstsq and solve_normal_cg accept operators that are not square)"
_HINT = " (if the unknowns are another tree than b, pass init=, a tree like the unknowns)"


@dataclass(frozen=True, repr=False)
class LinearSolver(Remembers, LinearMethod):
    """``solve(matvec, b) -> x`` with ``A x = b`` over pytrees; made by the factories of `implicitdiff.linear_solve`."""

    @_compile.outside_compile
    @_modes.one_operation
    def __call__(self, matvec: Callable[[Tree], Tree], b: Tree) -> Tree:
        leaves, structure = pytree.flatten(b)
        check_unknowns(f"{self.name}: the right-hand side b", leaves, structure)
        refuse_valueless(self.name, leaves)
        if isinstance(matvec, BoundMatvec):
            # A library solver inside of a user's `solve(matvec, b)`: the operator is lifted already.
            problem = LinearProblem(matvec.operator, self, structure, len(matvec.operands))
            return structure.unflatten(solve_linear(problem, leaves, matvec.operands))
        if not callable(matvec):
            raise TypeError(f"{self.name}: matvec must be a function v -> A v, got {type(matvec).__name__}")
        lifted, x = self._lift(matvec, leaves, structure)
        image = structure.tensors_of(lifted.value)
        # The check of linearity needs entries on both sides.
        if _have_entries(x.leaves) and _have_entries(image):
            _check_linear(self.name, lifted, x.leaves, structure, image)
        with lifted.during_call():
            if x.leaves is not leaves:
                return _solve_embedded(self, lifted, x, leaves, structure)
            # Of a square operator the captured tensors are the only operands.
            problem = LinearProblem(lifted_operator(lifted, structure), self, structure, len(lifted.captured))
            return structure.unflatten(solve_linear(problem, leaves, lifted.captured))

    def _lift(self, matvec: Callable[[Tree], Tree], leaves: Leaves, structure: Structure) -> tuple[Lifted, Domain]:
        """Return the lifted matvec and its domain: trees like `b`, those like `init`, or what a search finds."""
        # `init` decides, if its tree differs from `b`. Otherwise try `b`, as for a square operator; if the matvec
        # refuses `b`, or maps `b` to another tree, search for a domain.
        name, b = f"{self.name}: matvec", structure.unflatten(leaves)
        if self.rectangular is not None and self.init is not None and not is_like(self.init, leaves, structure):
            like_init = self._domain_of_init(leaves, structure)
            try:
                return _lift_between(name, matvec, like_init, leaves, structure)
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
                return lifted, Domain(leaves, structure, leaves)
            if (x := self._find_domain(matvec, b)) is None:
                hint = _NOT_SQUARE if self.rectangular is None else _HINT
                check_like(f"{name}'s result", lifted.value, b, leaves, structure, f"its argument{hint}")
                raise AssertionError("check_like raises for a result unlike b")
        return _lift_between(name, matvec, x, leaves, structure)

    def _domain_of_init(self, leaves: Leaves, structure: Structure) -> Domain:
        """Return the domain of trees like `init`."""
        if not pytree.tensors(self.init):
            check_like(f"{self.name}: init", self.init, structure.unflatten(leaves), leaves, structure, "b, or of x")
        return Domain.like(f"{self.name}: init", self.init)

    def _find_domain(self, matvec: Callable[[Tree], Tree], b: Tree) -> Domain | None:
        """Return the domain of an operator that fails on a tree like `b`, or None if the search finds no domain."""
        if self.init is not None or (v := domain_of(f"{self.name}: matvec", matvec, b)) is None:
            return None
        if self.rectangular is None:
            raise ValueError(
                f"{self.name}: matvec maps {pytree.describe(v)} to a tensor like b, {pytree.describe(b)}, but this "
                "solver needs a square operator: use solve_lstsq or solve_normal_cg"
            )
        return Domain.like(f"{self.name}: matvec", v)


@dataclass(frozen=True)
class Domain:
    """Domain of a rectangular operator: tensors of ones like the unknowns, their structure, and the initial guess."""

    leaves: Leaves
    structure: Structure
    start: Leaves

    @classmethod
    def like(cls, name: str, tree: Tree) -> Domain:
        start, structure = pytree.flatten(tree)
        check_unknowns(name, start, structure)
        return cls([torch.ones(t.shape, dtype=t.dtype, device=t.device) for t in start], structure, start)


def _have_entries(leaves: Leaves) -> bool:
    """True if the leaves have entries, in at least one lane: not for a vmap of size 0."""
    return any(t.numel() for t in leaves) and all(_levels.base(t).numel() for t in leaves if t.numel())


def _lift_between(
    name: str, linear: Callable[[Tree], Tree], x: Domain, leaves: Leaves, structure: Structure
) -> tuple[Lifted, Domain]:
    """Lift and check a linear function from the domain `x` to trees like `leaves`."""
    lifted = lift(name, linear, x.structure.unflatten(x.leaves))
    check_like(f"{name}'s result", lifted.value, structure.unflatten(leaves), leaves, structure, "b")
    confirm(lifted)
    return lifted, x


def _check_linear(name: str, lifted: Lifted, leaves: Leaves, structure: Structure, image: Leaves) -> None:
    """Raise if a function is not linear: a solver would silently return the solution of another system.

    The checks are ``A 0 = 0``, exactly, and ``A (b - 3 p) = A b - 3 A p``, with the given `image` ``A b`` and a probe
    ``p`` of both signs and of the size of ``b``. With the factor 3, absolute values and powers fail. The factor
    is real, so maps that are linear over the reals alone pass.
    """

    def product(v: Leaves) -> Leaves:
        with torch.no_grad():
            return [t.detach() for t in structure.tensors_of(lifted.within_call([*v, *lifted.captured]))]

    b = [t.detach() for t in leaves]
    values = [_levels.base(t) for t in product([torch.zeros_like(t) for t in b])]
    # Entries that are not finite are left to the solver, whose report says more.
    if any(bool(((v != 0) & torch.isfinite(v)).any()) for v in values):
        raise ValueError(f"{name}: matvec is not linear: it does not map zero to zero; remove the constant term")
    p = [max_abs_or_one(t) * w for t, w in zip(b, probe_vector(b), strict=True)]
    images = image, product(p), product([t - 3 * w for t, w in zip(b, p, strict=True)])
    if (gap := _largest_gap([t for t in zip(*images, strict=True) if t[0].numel()])) > 0:
        raise ValueError(
            f"{name}: matvec is not linear: A (b - 3 p) and A b - 3 A p, for a vector p of the size of b, differ by "
            f"{gap:.1e} of their size; remove absolute values, products of the argument with itself and other "
            "nonlinear operations"
        )


def _largest_gap(images: Sequence[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Return the largest difference of ``A (b - 3 p)`` from ``A b - 3 A p`` in any leaf and lane, relative to the
    largest of the three terms; 0 for differences that rounding explains, and for values that are not finite.

    The tolerance allows for a matvec by difference quotients (``eps**0.25``), and for large terms that cancel in one
    leaf (``eps**0.5`` times the largest leaf).
    """
    wide = [[t.to(torch.promote_types(t.dtype, torch.float32)) for t in leaf] for leaf in images]
    gaps = [(c - (a - 3 * b)).abs().amax() for a, b, c in wide]
    sizes = [torch.stack([a.abs().amax(), 3 * b.abs().amax(), c.abs().amax()]).amax(dim=0) for a, b, c in wide]
    # Under autocast a product is as exact as the dtype of autocast.
    dtypes = [leaf[0].dtype for leaf in images] + [dtype for _, enabled, dtype in _settings.autocast_state() if enabled]
    eps = max(torch.finfo(d).eps for d in dtypes)
    # Numbers below this have an absolute rounding error, because intermediate results are subnormal.
    least = max(torch.finfo(d).tiny / torch.finfo(d).eps for d in dtypes)
    whole = reduce(torch.maximum, sizes)
    found = [
        torch.where(gap > eps**0.25 * (size + eps**0.5 * whole + least), gap / size, 0.0)
        for gap, size in zip(gaps, sizes, strict=True)
    ]
    return max(float(_levels.base(t).max()) for t in found)


def _solve_embedded(solver: LinearSolver, lifted: Lifted, x: Domain, b: Leaves, structure: Structure) -> Tree:
    """Return the solution, a tree like `x`, from the square problem on the leaves of both sides; see `Rectangular`."""
    if solver.rectangular is None or solver.ridge:
        raise ValueError(
            f"{solver.name}: ridge needs a square A; for damped least squares let matvec return (A v, ridge**0.5 * v) "
            "and pass (b, zeros like the unknowns)"
        )
    matvec, is_wide = lifted_operator(lifted, structure), _count_real_numbers(x.leaves) > _count_real_numbers(b)
    operator = Rectangular(matvec.fn, len(x.leaves), is_wide, matvec.one_by_one)
    _, both = pytree.flatten((x.structure.unflatten(x.leaves), structure.unflatten(b)))
    problem = solver.rectangular(operator=operator, solver=solver, structure=both, count=len(lifted.captured))
    aids: Leaves = []
    if solver.preconditioner is not None:
        like, side = (b, structure) if is_wide else (x.leaves, x.structure)
        precondition = lift_linear(f"{solver.name}: preconditioner", solver.preconditioner, like, side)
        aids = precondition.captured
        problem = replace(problem, precondition=lifted_operator(precondition, side), aids=len(aids))
    if solver.init is not None and not is_wide:
        # A wide system starts from zero: the solution keeps the part of a start in the null space.
        problem = replace(problem, has_start=True)
        aids = [*aids, *x.start, *map(torch.zeros_like, b)]
    refuse_valueless(solver.name, lifted.captured)
    # The square problem on (x, y) has the right-hand side (0, b) and the solution (A^+ b, 0).
    sides = [*map(torch.zeros_like, x.leaves), *b]
    solution = solve_problem(problem, [*sides, *lifted.captured, *(t.detach() for t in aids)])
    return x.structure.unflatten(solution[: len(x.leaves)])


def _count_real_numbers(leaves: Leaves) -> int:
    """Return the number of real numbers in the leaves; a complex number counts twice."""
    return sum(t.numel() * (2 if t.is_complex() else 1) for t in leaves)
