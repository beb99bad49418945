"""The table of the solvers of `implicitdiff.solvers`: a new one is one row.

Every family poses problems in ``theta`` whose solution is known in closed form. Where nothing constrains it, that is
``x = Q'u`` with ``u^3 + u = theta``, entry by entry, and a rotation ``Q``: the same function for all solvers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import implicitdiff.projections as projections
import implicitdiff.prox as prox
import implicitdiff.solvers as solvers
from implicitdiff import sgd
from implicitdiff.linear_solve import solve_gmres
from implicitdiff.solvers import Solver

F64 = torch.float64
Function = Callable[..., Any]

THETA = torch.tensor([0.5, 0.3, -0.4], dtype=F64)
ROTATION = torch.linalg.qr(torch.randn(3, 3, dtype=F64, generator=torch.Generator().manual_seed(3)))[0]
# Not symmetric, so that a Jacobian and its transpose are told apart.
SKEW = torch.tensor([[0.0, 0.3, -0.2], [-0.3, 0.0, 0.1], [0.2, -0.1, 0.0]], dtype=F64)


class Family(NamedTuple):
    """A kind of problem.

    Attributes:
        name: of the kind.
        functions: what its solvers are made with; the first takes ``(x, theta)``.
        closed_form: the solution for ``theta``.
        start: an initial guess.
        hopeless: another first function, of ``x``, with which no solver gets anywhere; None where there is none, and
            ``theta`` is not a number instead.
        far: what multiplies `THETA` in a problem that takes long.
    """

    name: str
    functions: tuple[Function, ...]
    closed_form: Callable[[Tensor], Tensor]
    start: Callable[[Tensor], Tensor]
    hopeless: Function | None
    far: float = 2.0


class Row(NamedTuple):
    """A solver.

    Attributes:
        name: of the factory, and what is special about it.
        factory: takes the family's functions and options.
        family: what it solves.
        options: those of every test, unless it gives others.
        unrolls: whether its steps can be differentiated.
        tolerance: of implicit derivatives.
        of_one_leaf: whether the family's functions take one tensor alone.
        in_units: the factory for an objective that is so many times as large, where that matters to its step size.
        line_search: whether a minimiser takes steps that satisfy the strong Wolfe conditions, and fails without one.
    """

    name: str
    factory: Callable[..., Solver]
    family: Family
    options: Mapping[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
    unrolls: bool = True
    tolerance: float = 1e-8
    of_one_leaf: bool = False
    in_units: Callable[[float], Callable[..., Solver]] | None = None
    line_search: bool = True

    def __str__(self) -> str:
        return self.name

    def solver(self, *functions: Function, **options: Any) -> Solver:
        """The solver with its family's functions, the first of which may be replaced."""
        given = (*functions, *self.family.functions[len(functions) :])
        return self.factory(*given, **{**self.options, **options})

    def solution_and_state(self, theta: Tensor) -> tuple[Tensor, Any]:
        return self.solver().run(self.family.start(theta), theta)

    def solution(self, theta: Tensor) -> Tensor:
        return self.solution_and_state(theta)[0]


# --- u^3 + u = theta --------------------------------------------------------------------------------------------------


def cubic(theta: Tensor) -> Tensor:
    """The real root, by the hyperbolic form of Cardano's formula."""
    return 2 / 3**0.5 * torch.sinh(torch.asinh(1.5 * 3**0.5 * theta) / 3)


def rotated_cubic(theta: Tensor) -> Tensor:
    return ROTATION.T @ cubic(theta)


def image(x: Tensor, theta: Tensor) -> Tensor:
    """``u = theta / (1 + u^2)``, a contraction."""
    u = ROTATION @ x
    return ROTATION.T @ (theta / (1 + u**2))


def residual(x: Tensor, theta: Tensor) -> Tensor:
    u = ROTATION @ x
    r = ROTATION.T @ (u**3 + u - theta)
    return r + SKEW @ r


def residual_of_each(x: Tensor, theta: Tensor) -> Tensor:
    return x**3 + x - theta


def objective(x: Tensor, theta: Tensor) -> Tensor:
    u = ROTATION @ x
    return (u**4 / 4 + u**2 / 2 - theta * u).sum()


LOWER = -0.3


def objective_of_each(x: Tensor, theta: Tensor) -> Tensor:
    return (x**4 / 4 + x**2 / 2 - theta * x).sum()


def cubic_in_box(theta: Tensor) -> Tensor:
    """The last entry is at its lower bound."""
    return cubic(theta).clamp(min=LOWER)


def residuals(x: Tensor, theta: Tensor) -> Tensor:
    """Six that do not vanish at the solution, so the Hessian is not that of the Gauss-Newton model."""
    u = ROTATION @ x
    return torch.cat([u - theta, u**2 / 2**0.5])


def with_outliers(x: Tensor, theta: Tensor) -> Tensor:
    """The same and two far ones for each unknown, which cancel in Huber's loss alone."""
    u = ROTATION @ x
    return torch.cat([residuals(x, theta), u + 100, u - 100])


# --- constraints and penalties, some of them active -------------------------------------------------------------------

HESSIAN = torch.tensor([[1.0, 0.2, 0.3], [0.2, 1.5, -0.1], [0.3, -0.1, 1.2]], dtype=F64)
WEIGHTS = torch.tensor([1.0, 2.0, 1.5], dtype=F64)
UPPER = torch.tensor([0.1, 5.0, 5.0], dtype=F64)
PENALTY = 0.25


def slope(theta: Tensor) -> Tensor:
    return torch.sin(theta) * torch.tensor([1.0, 0.3, 1.0], dtype=F64)


def quadratic(x: Tensor, theta: Tensor) -> Tensor:
    return 0.5 * x @ (HESSIAN @ x) - slope(theta) @ x


FACTOR = torch.linalg.cholesky(HESSIAN).mH


def linear_residuals(x: Tensor, theta: Tensor) -> Tensor:
    """Half the square of their norm is `quadratic`, but for a constant."""
    return FACTOR @ x - torch.linalg.solve_triangular(FACTOR.mH, slope(theta)[:, None], upper=False)[:, 0]


def into_box(v: Tensor) -> Tensor:
    return projections.box(v, -5.0, UPPER)


def box_solution(theta: Tensor) -> Tensor:
    """The first entry is at its upper bound, the others solve what is left."""
    free = torch.linalg.inv(HESSIAN[1:, 1:]) @ (slope(theta)[1:] - HESSIAN[1:, 0] * UPPER[0])
    return torch.cat([torch.zeros_like(theta[:1]) + UPPER[0], free])


def shrink(v: Tensor, stepsize: Tensor) -> Tensor:
    return prox.lasso(v, PENALTY * stepsize)


def lasso_solution(theta: Tensor) -> Tensor:
    """The second entry is zero; the others have the signs of theta."""
    kept = HESSIAN[::2][:, ::2]
    signs = torch.tensor([1.0, -1.0], dtype=F64)
    first, third = torch.linalg.inv(kept) @ (slope(theta)[::2] - PENALTY * signs)
    return torch.stack([first, torch.zeros_like(first), third])


def goal(theta: Tensor) -> Tensor:
    return (2 + torch.sin(theta)) / 4


def weighted(x: Tensor, theta: Tensor) -> Tensor:
    return 0.5 * (WEIGHTS * (x - goal(theta)) ** 2).sum()


def simplex_solution(theta: Tensor) -> Tensor:
    """All entries are positive, so their sum is the only constraint."""
    excess = (goal(theta).sum() - 1) / (1 / WEIGHTS).sum()
    return goal(theta) - excess / WEIGHTS


def zeros(theta: Tensor) -> Tensor:
    return torch.zeros_like(theta)


def inside_simplex(theta: Tensor) -> Tensor:
    return torch.zeros_like(theta) + torch.tensor([0.5, 0.3, 0.2], dtype=theta.dtype)


def in_units(family: Family, unit: float) -> tuple[Function, ...]:
    """The functions of the same problem in which the first is so many times as large, and x for fixed points."""
    fn, *others = family.functions
    if family.name == "fixed point":
        return (lambda x, theta: unit * fn(x / unit, theta),)
    if family.name == "lasso":
        others = [lambda v, stepsize: shrink(v, unit * stepsize)]
    return lambda x, theta: unit * fn(x, theta), *others


def in_single_precision(functions: Iterable[Function]) -> list[Function]:
    """Functions of single precision, though the problems' constants are in double precision."""

    def single(fn: Function) -> Function:
        return lambda v, *more: fn(v.double(), *(torch.as_tensor(m).double() for m in more)).float()

    return [single(fn) for fn in functions]


FIXED_POINT = Family("fixed point", (image,), rotated_cubic, zeros, lambda x: x + 1)
ROOT = Family("root", (residual,), rotated_cubic, zeros, lambda x: x**2 + 1, far=20.0)
EACH = Family("root of each entry", (residual_of_each,), cubic, zeros, lambda x: 1 / x, far=20.0)
MINIMUM = Family("minimum", (objective,), rotated_cubic, zeros, lambda x: x.sum(), far=5.0)
LEAST_SQUARES = Family("least squares", (residuals,), rotated_cubic, zeros, None, far=5.0)
BOX = Family("box", (quadratic, into_box), box_solution, zeros, None, far=1.5)
BOX_BY_BOUNDS = Family("box by bounds", (objective_of_each,), cubic_in_box, zeros, None, far=5.0)
# A number as a bound fits a tree of leaves of any shapes.
LEAST_SQUARES_IN_BOX = BOX._replace(name="least squares in a box", functions=(linear_residuals,))
OUTLIERS = LEAST_SQUARES._replace(name="least squares with outliers", functions=(with_outliers,))
LASSO = Family("lasso", (quadratic, shrink), lasso_solution, zeros, None, far=1.5)
SIMPLEX = Family("simplex", (weighted, projections.simplex), simplex_solution, inside_simplex, None, far=1.5)
SIMPLEX_BY_MIRROR = SIMPLEX._replace(functions=(weighted,))


def bisection_on_wide_brackets(fn: Function, **options: Any) -> Solver:
    return solvers.bisection(fn, -100.0, 101.0, **options)


# SciPy compares values of the objective, in which rounding hides small gradients.
SCIPY = {"rtol": 0.0, "atol": 1e-7}

SEARCHES = [
    Row("fixed_point_iteration", solvers.fixed_point_iteration, FIXED_POINT),
    Row("fixed_point_iteration, damped", partial(solvers.fixed_point_iteration, damping=0.2), FIXED_POINT),
    Row("anderson", solvers.anderson, FIXED_POINT),
    # Without its safeguard it may go so far that x + 1 = x.
    Row(
        "anderson, mixing",
        partial(solvers.anderson, history=2, mixing=0.7, safeguard=None),
        FIXED_POINT._replace(hopeless=None),
    ),
    Row("broyden", solvers.broyden, FIXED_POINT),
    Row("newton", solvers.newton, ROOT),
    Row("newton, backtracking", partial(solvers.newton, backtracking=True), ROOT),
    # A system that has no solution is the search's business.
    Row("newton, Krylov", partial(solvers.newton, linear_solve=solve_gmres(rtol=1e-13, on_failure="ignore")), ROOT),
    Row("dogleg_root", solvers.dogleg_root, ROOT),
    Row("chord", solvers.chord, ROOT._replace(far=1.0)),
    Row("broyden_root", solvers.broyden_root, ROOT._replace(far=5.0)),
    Row("bisection", bisection_on_wide_brackets, EACH, unrolls=False),
    # Its steps decrease the objective, and satisfy no condition on the slope at their ends.
    Row("gradient_descent", solvers.gradient_descent, MINIMUM, line_search=False),
    Row(
        "gradient_descent, fixed step",
        partial(solvers.gradient_descent, stepsize=0.3),
        MINIMUM._replace(far=2.0),
        in_units=lambda unit: partial(solvers.gradient_descent, stepsize=0.3 / unit),
    ),
    Row(
        "from_optimizer",
        partial(solvers.from_optimizer, transformation=sgd(0.2, momentum=0.3)),
        MINIMUM._replace(far=2.0),
        in_units=lambda unit: partial(solvers.from_optimizer, transformation=sgd(0.2 / unit, momentum=0.3)),
    ),
    Row("lbfgs", solvers.lbfgs, MINIMUM),
    Row("nonlinear_cg", solvers.nonlinear_cg, MINIMUM),
    Row("newton_cg", solvers.newton_cg, MINIMUM),
    Row("gauss_newton", solvers.gauss_newton, LEAST_SQUARES),
    Row("levenberg_marquardt", solvers.levenberg_marquardt, LEAST_SQUARES),
    Row("dogleg", solvers.dogleg, LEAST_SQUARES),
    # Linear, so that a search without a small region takes one step.
    Row(
        "levenberg_marquardt, box",
        partial(solvers.levenberg_marquardt, radius=0.3, bounds=(-5.0, 0.1)),
        LEAST_SQUARES_IN_BOX,
    ),
    Row(
        "levenberg_marquardt, Huber",
        partial(solvers.levenberg_marquardt, loss="huber", loss_scale=3.0),
        OUTLIERS,
        in_units=lambda unit: partial(solvers.levenberg_marquardt, loss="huber", loss_scale=3.0 * unit),
    ),
    Row("lbfgs_b", partial(solvers.lbfgs_b, bounds=(LOWER, None)), BOX_BY_BOUNDS),
    Row("projected_gradient, box", solvers.projected_gradient, BOX),
    Row("projected_gradient, simplex", solvers.projected_gradient, SIMPLEX),
    Row("proximal_gradient", solvers.proximal_gradient, LASSO),
    Row("mirror_descent", solvers.mirror_descent, SIMPLEX_BY_MIRROR, of_one_leaf=True),
    Row("scipy_root", solvers.scipy_root, ROOT, unrolls=False),
    Row(
        "scipy_minimize",
        partial(solvers.scipy_minimize, method="trust-exact"),
        MINIMUM,
        SCIPY,
        unrolls=False,
        tolerance=1e-6,
    ),
    Row("scipy_least_squares", solvers.scipy_least_squares, LEAST_SQUARES, SCIPY, unrolls=False, tolerance=1e-6),
]


def of_kind(kind: str) -> list[Row]:
    """The rows of a family, but for those whose step size is given for its problem alone."""
    return [row for row in SEARCHES if row.family.name == kind and row.in_units is None]


def factories(rows: Iterable[Row]) -> list[Any]:
    """Parameters of a test that has problems of its own."""
    return [pytest.param(row.factory, id=row.name) for row in rows]


# Those of smooth functions without constraints; what SciPy does is tested by its methods.
MINIMISERS = [row for row in of_kind("minimum") if "scipy" not in row.name]
LINE_SEARCHES = [row for row in MINIMISERS if row.line_search]
