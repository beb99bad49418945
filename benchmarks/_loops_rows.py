"""What `loops.py` measures: its rows and its curves, and solutions to compare with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize as so
import solvers as families
import torch
from solvers import Array, Data, Problem, from_jaxopt, from_optimistix, jaxopt

from implicitdiff.linear_solve import solve_cg
from implicitdiff.solvers import newton

DECADES = tuple(10**k for k in range(6))


def hybrid(problem: Problem, x0: Array, *data: Array) -> Array:
    return so.root(problem.residual, x0, data, tol=1e-13).x


def by_slsqp(problem: Problem, x0: Array, *data: Array) -> Array:
    """The minimum on the probability simplex."""
    whole = {"type": "eq", "fun": lambda x: x.sum() - 1}
    how = {"ftol": 1e-16, "maxiter": 1000}
    bounds = so.Bounds(0.0, np.inf)
    return so.minimize(problem.fn, x0, data, "SLSQP", problem.slope, bounds=bounds, constraints=whole, options=how).x


def cubic_root(_: Problem, x0: Array, theta: Array) -> Array:
    """The real root of ``x^3 + x = theta``."""
    return 2 / 3**0.5 * np.sinh(np.arcsinh(1.5 * 3**0.5 * theta) / 3)


class Row(NamedTuple):
    """A row.

    Attributes:
        title: what is computed.
        family: the problem, our solver, the peers, and the derivative.
        lanes: the number of problems; 0 for one that is not vmapped.
        unknowns: of each problem.
        near: how near to the exact solution every lane has to come, at most. By default, and unless a row says
            otherwise, ten times the residual, as the maps contract by 0.9.
        exact: ``exact(problem, x0, *data)``, the solution of one problem.
        gradient: whether the gradient of the sum of the solution is computed as well.
        shared: the positions of operands that all problems have in common.
    """

    title: str
    family: families.Row
    lanes: int
    unknowns: int
    near: float = 1e-7
    exact: Callable[..., Array] = hybrid
    gradient: bool = False
    shared: tuple[int, ...] = ()


class Curve(NamedTuple):
    """What grows: the sizes are those of a field of the row, and `axis` says what they count."""

    axis: str
    field: str
    row: Row
    sizes: tuple[int, ...]


# --- rows -------------------------------------------------------------------------------------------------------------


def unequal(rng: np.random.Generator, n: int) -> Data:
    """Columns of scales 1 to 10^u, u uniform in [0, 1]: condition numbers from some tens to some thousands."""
    x, y, penalty = families.logistic(1e-3, rng, n)
    return x * np.geomspace(1.0, 10 ** rng.uniform(), n), y, penalty


def adjoint(name: str) -> Callable[..., Any]:
    """A linear solver of JAXopt's gradients."""
    return lambda *args, **options: getattr(jaxopt.linear_solve, name)(*args, **options, tol=1e-8)


def newton_by_cg(fn: Callable[..., Any], compile: Any = "auto", **options: Any) -> Any:
    """Newton's method for the gradient of an objective, with the linear solver of its peer."""
    return newton(torch.func.grad(fn), solve_cg(rtol=1e-6), compile=compile, **options)


FAMILY = {row.name: row for row in families.ROWS}
PLAIN, ANDERSON, NEWTON, LBFGS = (FAMILY[name] for name in ("fixed_point_iteration", "anderson", "newton", "lbfgs"))
UNEQUAL = LBFGS._replace(
    problem=LBFGS.problem._replace(make=unequal, target=1e-6),
    peers=[*LBFGS.peers, from_optimistix("minimise", "BFGS")],
)
TALL = LBFGS._replace(
    problem=LBFGS.problem._replace(make=partial(families.logistic, 1e-2, rows=2000)),
    peers=[
        from_jaxopt("LBFGS", linesearch="zoom", implicit_diff_solve=adjoint("solve_cg")),
        from_optimistix("minimise", "LBFGS"),
    ],
)
TINY = PLAIN._replace(
    peers=[
        from_jaxopt("FixedPointIteration", implicit_diff_solve=adjoint("solve_bicgstab")),
        from_optimistix("fixed_point", "FixedPointIteration"),
    ],
    gradient=ANDERSON.gradient,
)
BY_CG = FAMILY["newton_cg"]._replace(ours=newton_by_cg)
# How near a solution is follows from the residual's target and the least slope of the residual: 1e-8 and 0.5 for
# newton, 1e-8 and the penalty 1e-3 for lbfgs, 1e-8 and 1 for bisection. In mirror_descent a component whose limit is 0
# falls like the reciprocal of the iterations, and at a residual of 1e-6 whoever iterates is still 1.5e-3 away.
ROWS = {
    "plain": Row("fixed_point_iteration, 1000 x 20", PLAIN, 1000, 20),
    "anderson": Row("anderson, 1000 x 20", ANDERSON, 1000, 20),
    "newton": Row("newton, 1000 x 20", NEWTON, 1000, 20, near=2e-8),
    "newton_by_cg": Row("newton with solve_cg, logistic regression, 1000 x 20", BY_CG, 1000, 20, near=1e-5),
    "lbfgs": Row("lbfgs, logistic regression, 1000 x 20", LBFGS, 1000, 20, near=1e-5),
    "lbfgs_unequal": Row("lbfgs, 64 x 20 of unequal difficulty", UNEQUAL, 64, 20, near=1e-3),
    "bisection": Row("bisection, 1000 scalars", FAMILY["bisection"], 1000, 1, 1e-8, cubic_root),
    "mirror_descent": Row("mirror_descent, 1000 x 20", FAMILY["mirror_descent"], 1000, 20, 2e-3, by_slsqp),
    "logistic_gradient": Row("lbfgs, logistic regression 2000 x 100, and gradient", TALL, 0, 100, 1e-6, gradient=True),
    "plain_1000": Row("fixed_point_iteration, n = 1000", PLAIN, 0, 1000),
    "anderson_1000": Row("anderson, n = 1000", ANDERSON, 0, 1000),
    "lbfgs_1000": Row("lbfgs, logistic regression, n = 1000", LBFGS, 0, 1000, near=1e-5),
    "tiny": Row("fixed_point_iteration, n = 10", TINY, 0, 10),
    "tiny_gradient": Row("fixed_point_iteration, n = 10, and gradient", TINY, 0, 10, gradient=True),
}

# --- curves -----------------------------------------------------------------------------------------------------------


def beside_jaxopt(name: str) -> families.Row:
    """Without the other peers."""
    family = FAMILY[name]
    return family._replace(peers=[peer for peer in family.peers if peer[0].startswith("jaxopt")])


PLAIN_LANES = Row("fixed_point_iteration, n = 20", beside_jaxopt("fixed_point_iteration"), 0, 20, shared=(0, 1))
LBFGS_LANES = Row("lbfgs, n = 20", beside_jaxopt("lbfgs"), 0, 20, near=1e-5, shared=(0, 1, 3))
# The problems have the matrix or the design in common, so that each one's own data is small.
CURVES = {
    "lanes_plain": Curve("problems in a call", "lanes", PLAIN_LANES, DECADES),
    "lanes_lbfgs": Curve("problems in a call", "lanes", LBFGS_LANES, DECADES),
    "unknowns_plain": Curve(
        "unknowns",
        "unknowns",
        PLAIN_LANES._replace(title="fixed_point_iteration, one problem", shared=()),
        (10, 30, 100, 300, 1000, 2000),
    ),
}

# --- problems ---------------------------------------------------------------------------------------------------------


def instance(row: Row) -> Data:
    """The operands; more than 1000 problems are repetitions of these."""
    found = list(families.instance(row.family.problem, row.unknowns, min(row.lanes, 1000)))
    for i, v in enumerate(found):
        found[i] = v[0] if i in row.shared else np.resize(v, (row.lanes, *v.shape[1:])) if row.lanes else v
    return tuple(found)


def exact(row: Row, operands: Data) -> Array:
    """The solution, in the order of the lanes."""
    find = partial(row.exact, row.family.problem)
    if not row.lanes:
        return find(*operands)
    distinct = min(row.lanes, 1000)
    shared = [[v] * distinct if i in row.shared else v for i, v in enumerate(operands)]
    found = np.stack([find(*lane) for lane in zip(*shared, strict=False)][:distinct])
    return np.resize(found, (row.lanes, *found.shape[1:]))
