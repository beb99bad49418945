"""The sets of systems, fixed points and brackets of `rates.py`."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import scipy.optimize as so
import torch
from _rates_runs import (
    Array,
    Counted,
    Function,
    Judge,
    Outcome,
    Run,
    Set,
    finite,
    jaxopt_run,
    optimistix_run,
    ours,
    residual,
    scipy_root,
    tensor,
)
from problem_sets import checks, fixed_points, minpack_roots, nonlinear_solve

from implicitdiff import solvers


def arrived(problem: Any, x: Array, dtype: str) -> bool:
    return checks.arrived(problem, x, getattr(torch, dtype))


def is_false(problem: Any, x: Array, dtype: str) -> bool:
    return not checks.true_claim(problem, x, getattr(torch, dtype))


CHECKED = Judge(arrived, is_false)


def function(problem: Any) -> Function:
    return problem.fn


def displacement(problem: Any) -> Function:
    """``x - f(x)``."""
    return lambda x: x - problem.fn(x)


def all_starts(problem: Any, dtype: str) -> dict[str, Array]:
    starts = (problem.start, *problem.starts)
    return finite(problem.residual, {f"{i + 1}": start for i, start in enumerate(starts)}, dtype)


def only_start(problem: Any, dtype: str) -> dict[str, Array]:
    return {"1": np.asarray(problem.start, dtype=dtype)}


def middle(problem: Any, dtype: str) -> dict[str, Array]:
    return {"1": np.asarray((problem.lower + problem.upper) / 2, dtype=dtype)}


def bracket(problem: Any, dtype: str) -> dict[str, Any]:
    return {"lower": tensor(problem.lower, dtype), "upper": tensor(problem.upper, dtype)}


def bracket_in_numpy(problem: Any, dtype: str) -> dict[str, Any]:
    return {name: end.numpy() for name, end in bracket(problem, dtype).items()}


def brent(problem: Any, start: Array, dtype: str) -> Outcome:
    fn = Counted(problem.fn)
    lower, upper = map(float, bracket(problem, dtype).values())
    x, found = so.brentq(lambda x: float(fn(tensor(x, dtype))), lower, upper, full_output=True, disp=False)
    return Outcome(np.asarray(x, dtype=dtype), bool(found.converged), fn.calls)


SYSTEMS: list[tuple[str, Run]] = [
    ("newton", partial(ours, solvers.newton, residual)),
    ("newton(backtracking=True)", partial(ours, partial(solvers.newton, backtracking=True), residual)),
    ("broyden_root", partial(ours, solvers.broyden_root, residual)),
    ("broyden_root(backtracking=True)", partial(ours, partial(solvers.broyden_root, backtracking=True), residual)),
    ("dogleg_root", partial(ours, solvers.dogleg_root, residual)),
    ("SciPy hybr", partial(scipy_root, "hybr", residual)),
    ("SciPy lm", partial(scipy_root, "lm", residual)),
    ("optimistix.Newton", optimistix_run("root_find", "Newton", 1000, residual)),
    ("optimistix.Dogleg", optimistix_run("root_find", "Dogleg", 1000, residual)),
]
FIXED_POINTS: list[tuple[str, Run]] = [
    ("fixed_point_iteration", partial(ours, solvers.fixed_point_iteration, function)),
    ("anderson", partial(ours, solvers.anderson, function)),
    ("broyden", partial(ours, solvers.broyden, function)),
    ("dogleg_root", partial(ours, solvers.dogleg_root, displacement)),
    ("SciPy hybr", partial(scipy_root, "hybr", displacement)),
    ("optimistix.FixedPointIteration", optimistix_run("fixed_point", "FixedPointIteration", 10_000, function)),
    ("jaxopt.AndersonAcceleration", jaxopt_run("AndersonAcceleration", function)),
]
BRACKETS: list[tuple[str, Run]] = [
    ("bisection", partial(ours, solvers.bisection, function, given=bracket)),
    ("SciPy brentq", brent),
    ("optimistix.Bisection", optimistix_run("root_find", "Bisection", 1000, function, bracket_in_numpy)),
]
SETS = [
    Set("minpack-roots", minpack_roots.PROBLEMS, SYSTEMS, all_starts, CHECKED),
    Set("nonlinear-solve", nonlinear_solve.PROBLEMS, SYSTEMS, all_starts, CHECKED),
    Set("roots", fixed_points.ROOTS, SYSTEMS, all_starts, CHECKED),
    Set("fixed-points", fixed_points.FIXED_POINTS, FIXED_POINTS, only_start, CHECKED),
    Set("brackets", fixed_points.BRACKETS, BRACKETS, middle, CHECKED),
]
