"""How many problems of the field's test sets a solver solves, how many it only claims to, and at what cost.

    python benchmarks/rates.py [set ...] [--dtype float32] [--solver lbfgs] [--missed]

prints a table for each set and dtype, ours beside SciPy's, Optimistix's and JAXopt's. All have their default options,
but for two: Optimistix has none for its tolerances, and JAXopt's are as large as 1e-3 after 50 or 500 steps. Both get
``sqrt(eps)``, which in float64 is about SciPy's, and JAXopt 10000 steps. What is not installed is named and left out.
What a solver misses goes to stderr as it happens.

Sets of least-squares problems
    ``mgh`` (More, Garbow and Hillstrom) and ``nist``, solved as ``min |r|^2`` by methods for least squares; ``...-gn``
    by Gauss-Newton from the first initial guess only; ``...-min`` by methods for a function ``f(x) = |r(x)|^2``. The
    initial guesses are those of MINPACK's ``initpt``: 1, 10 and 100 times the standard one, and where that is zero, a
    vector of tens or hundreds. NIST gives two for each problem. One at which ``|r|^2`` is not finite in the dtype is
    left out.

Other sets
    ``minpack-roots``, ``nonlinear-solve`` and ``roots`` are systems ``F(x) = 0``, the first with all initial guesses of
    MINPACK's test; SciPy's "hybr" and "lm" get the Jacobian. To claim a minimum of ``|F|`` that is no root is false,
    though "lm" is made to find one. ``fixed-points`` are ``f(x) = x``, which `dogleg_root` and "hybr" solve as
    ``x - f(x) = 0``.
    ``brackets`` are scalar roots between bounds. ``bounded`` are minima between bounds, ``minima`` those without.
    ``composites`` are minima of a smooth function and a penalty, ``sets`` of one over a convex set, ``simplices``
    those of them whose set is a product of simplices. ``programs`` are quadratic programs, with a table of their own:
    see `_programs`. All are in ``tests/problem_sets``, whose ``checks.py`` says what has arrived, and what is false.

Evaluations
    are calls of the user's function, so a Jacobian or a gradient counts as one, with the value that comes along; of
    Optimistix and JAXopt, steps, each of which evaluates once or more. Ours are counted in a second search with
    ``compile="off"``, since a compiled loop does not call the function. Their sum is over the cases at which every
    solver of the table arrives.

Dtypes
    In float32 functions and derivatives are evaluated in float32. SciPy iterates in float64 all the same: it is given
    their values cast to float64, and what it returns is rounded to float32.

Arrived, in a set of least-squares problems
    ``|r(x)|^2``, computed in float64, is within ``allowed(v)`` of a known minimum ``v``, the largest of

    - ``tol v``, ``tol`` 1e-5 in float64 and 1e-3 in float32;
    - ``(sqrt(v) + p |r_0|)^2 - v``, ``p = max(4 eps, 4e-11)``, ``r_0`` the residual at the best of the problem's
      initial guesses: what becomes of ``v`` if the residual moves by ``p`` of the terms that cancel in it, in float32
      a few roundings, in float64 the relative accuracy that our default tolerances ask for (SciPy's ask for 1e-8);
    - where ``v`` is zero, ``eps^(8/9) |r_0|^2``, but at most ``tol``. A gradient that has shrunk by ``eps^(2/3)`` is
      all that can be asked of a solver. Where the Jacobian is singular at the solution (both of Powell's functions),
      ``|r|`` goes as ``e^2`` with the distance ``e``, the gradient as ``e^3``, so that ``|r|^2`` is then
      ``eps^(8/9)`` of what it was. ``tol`` is for problems that begin at ``|r_0|^2 = 1e12``.

    Float32 can do that: NIST's certified solutions, rounded to it, use up less than a thousandth of what is allowed.

False claim, in a set of least-squares problems
    The solver says that it has converged, has not arrived, and SciPy's "lm" or "trf", going on from there in float64
    with all tolerances at eps and 2000 evaluations each, lowers ``|r|^2`` by more than ``allowed``. To claim another
    local minimum is not false, nor is any other point where they find no way down; a valley is, and a slope.

Stood still
    Ours with BUDGET_SPENT at its default limit.

A set is a `Set`; what has problems of another kind brings its own solvers, initial guesses and `Judge`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import _programs
import _rates_minima
import _rates_roots
import _report
import numpy as np
import scipy.optimize as so
from _rates_runs import (
    DTYPES,
    Array,
    Function,
    Judge,
    Outcome,
    Run,
    Set,
    finite,
    optimistix_run,
    ours,
    residual,
    scipy_min,
    scipy_squares,
    slope,
)
from problem_sets import more_garbow_hillstrom, nist
from problem_sets.problem import LeastSquares

from implicitdiff import solvers

# --- least squares ----------------------------------------------------------------------------------------------------

TOLERANCE = {"float64": 1e-5, "float32": 1e-3}


def value(problem: LeastSquares, x: Sequence[float] | Array) -> float:
    """``|r(x)|^2`` in float64."""
    with np.errstate(all="ignore"):
        return float(np.square(problem.residual(np.asarray(x, dtype=np.float64))).sum())


def standard(problem: LeastSquares, dtype: str) -> dict[str, Array]:
    return finite(
        problem.residual, {f"{i + 1}": start for i, start in enumerate((problem.start, *problem.starts))}, dtype
    )


def first(problem: LeastSquares, dtype: str) -> dict[str, Array]:
    return finite(problem.residual, {"1": problem.start}, dtype)


def multiples(problem: LeastSquares, dtype: str) -> dict[str, Array]:
    starts = {"x1": np.asarray(problem.start)}
    for factor in (10.0, 100.0):
        scaled = factor * starts["x1"]
        starts[f"x{factor:.0f}"] = scaled if scaled.any() else np.full_like(scaled, factor)
    return finite(problem.residual, starts, dtype)


def allowed(problem: LeastSquares, v: float, dtype: str) -> float:
    tol, eps = TOLERANCE[dtype], float(np.finfo(dtype).eps)
    initial = min(value(problem, start) for start in (problem.start, *problem.starts))
    moved = (v**0.5 + max(4 * eps, 4e-11) * initial**0.5) ** 2 - v
    zero = min(tol, eps ** (8 / 9) * initial)
    return max(tol * v, moved, zero if v <= zero and 0 in problem.values else 0.0)


def reached(problem: LeastSquares, x: Array, dtype: str) -> bool:
    found = value(problem, x)
    return any(abs(found - v) <= allowed(problem, v, dtype) for v in problem.values)


def can_fall(problem: LeastSquares, x: Array, dtype: str) -> bool:
    found = value(problem, x)
    if not np.isfinite(found):
        return True
    lowest = min(polished(problem, np.asarray(x, dtype=np.float64), method) for method in ("lm", "trf"))
    return found > lowest + allowed(problem, lowest, dtype)


def polished(problem: LeastSquares, x: Array, method: str) -> float:
    eps = float(np.finfo(np.float64).eps)
    tight = {"ftol": eps, "xtol": eps, "gtol": eps, "max_nfev": 2000}
    try:
        with np.errstate(all="ignore"):
            jacobian = partial(slope, problem.residual, "float64")
            found = so.least_squares(problem.residual, x, jacobian, method=method, **tight)
    except (ValueError, np.linalg.LinAlgError):
        return np.inf
    return float(np.nan_to_num(2 * found.cost, nan=np.inf))


LEAST_SQUARES = Judge(reached, can_fall)


def squares(problem: LeastSquares) -> Function:
    return lambda x: (problem.residual(x) ** 2).sum()


SQUARES: list[tuple[str, Run]] = [
    ("levenberg_marquardt", partial(ours, solvers.levenberg_marquardt, residual)),
    ("SciPy lm", partial(scipy_squares, "lm")),
    ("SciPy trf", partial(scipy_squares, "trf")),
    ("optimistix.LevenbergMarquardt", optimistix_run("least_squares", "LevenbergMarquardt", 1000, residual)),
    ("optimistix.Dogleg", optimistix_run("least_squares", "Dogleg", 1000, residual)),
]
GAUSS_NEWTON: list[tuple[str, Run]] = [
    ("gauss_newton", partial(ours, solvers.gauss_newton, residual)),
    ("optimistix.GaussNewton", optimistix_run("least_squares", "GaussNewton", 1000, residual)),
]
MINIMA: list[tuple[str, Run]] = [
    ("lbfgs", partial(ours, solvers.lbfgs, squares)),
    ("newton_cg", partial(ours, solvers.newton_cg, squares)),
    ("SciPy L-BFGS-B", partial(scipy_min, "L-BFGS-B", squares)),
    ("SciPy BFGS", partial(scipy_min, "BFGS", squares)),
    ("optimistix.BFGS", optimistix_run("minimise", "BFGS", 10_000, squares)),
]
SETS = [
    Set("mgh", more_garbow_hillstrom.PROBLEMS, SQUARES, multiples, LEAST_SQUARES),
    Set("mgh-gn", more_garbow_hillstrom.PROBLEMS, GAUSS_NEWTON, first, LEAST_SQUARES),
    Set("mgh-min", more_garbow_hillstrom.PROBLEMS, MINIMA, multiples, LEAST_SQUARES),
    Set("nist", nist.PROBLEMS, SQUARES, standard, LEAST_SQUARES),
    Set("nist-gn", nist.PROBLEMS, GAUSS_NEWTON, first, LEAST_SQUARES),
    Set("nist-min", nist.PROBLEMS, MINIMA, standard, LEAST_SQUARES),
    *_rates_roots.SETS,
    *_rates_minima.SETS,
]
PROGRAMS = "programs"

# --- running ----------------------------------------------------------------------------------------------------------

HEAD = "set | solver | dtype | problems | arrived | claimed | false claims | stood still | raised | evaluations"


class Case(NamedTuple):
    """What became of one run; `outcome` is None if it raised."""

    name: str
    outcome: Outcome | None
    arrived: bool
    false: bool


def judged(group: Set, problem: Any, label: str, start: Array, run: Run, dtype: str) -> Case:
    name = f"{problem.name} [{label}]"
    try:
        outcome = run(problem, start, dtype)
    except Exception as error:
        log(f"{name}: {type(error).__name__}: {error}")
        return Case(name, None, False, False)
    arrived = group.judge.arrived(problem, outcome.x, dtype)
    doubtful = outcome.claimed and not arrived
    return Case(name, outcome, arrived, doubtful and group.judge.improvable(problem, outcome.x, dtype))


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def cases(group: Set, name: str, run: Run, dtype: str) -> list[Case]:
    began, found = time.perf_counter(), []
    for problem in group.problems:
        for label, start in group.starts(problem, dtype).items():
            found.append(judged(group, problem, label, start, run, dtype))
            if not found[-1].arrived or found[-1].outcome.still:
                log(f"{name}, {dtype}: {told(found[-1])}")
    log(f"{row(group, name, dtype, found, [])} {time.perf_counter() - began:.0f} s")
    return found


def row(group: Set, name: str, dtype: str, found: list[Case], common: list[int]) -> str:
    outcomes = [case.outcome for case in found if case.outcome is not None]
    counts = [
        len(found),
        sum(case.arrived for case in found),
        sum(outcome.claimed for outcome in outcomes),
        sum(case.false for case in found),
        sum(outcome.still for outcome in outcomes),
        len(found) - len(outcomes),
        sum(found[i].outcome.evaluations for i in common),
    ]
    return f"| {group.name} | {name} | {dtype} | " + " | ".join(map(str, counts)) + " |"


def show(group: Set, dtype: str, chosen: list[str], missed: bool) -> None:
    there = [(name, run) for name, run in group.solvers if name.split(".")[0] not in _report.MISSING]
    there = [(name, run) for name, run in there if not chosen or name in chosen]
    if not there:
        return
    found = {name: cases(group, name, run, dtype) for name, run in there}
    together = list(zip(*found.values(), strict=True))
    common = [i for i, each in enumerate(together) if all(case.arrived for case in each)]
    print(f"\n| {HEAD} (over {len(common)}) |\n|{' --- |' * (HEAD.count('|') + 1)}")
    for name, _ in there:
        print(row(group, name, dtype, found[name], common), flush=True)
    if missed:
        print("\n" + "\n".join(f"- {name}: {', '.join(map(told, misses(found[name]))) or 'none'}" for name, _ in there))


def misses(found: list[Case]) -> list[Case]:
    return [case for case in found if not case.arrived]


def told(case: Case) -> str:
    outcome = case.outcome
    if outcome is None:
        return f"{case.name} raised"
    ending = "false claim" if case.false else "claimed" if outcome.claimed else "still" if outcome.still else "failed"
    return f"{case.name} {ending}"


def main() -> None:
    names = [*(group.name for group in SETS), PROGRAMS]
    parser = argparse.ArgumentParser(description="How many problems the solvers solve, and how many they claim to.")
    parser.add_argument("sets", nargs="*", metavar="set", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="one only")
    parser.add_argument("--solver", action="append", default=[], help="one only, by its name in the table")
    parser.add_argument("--missed", action="store_true", help="name the cases at which a solver does not arrive")
    options = parser.parse_args()
    if unknown := set(options.sets) - set(names):
        parser.error(f"no set {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    _report.keep_threads()
    for group in SETS:
        for dtype in options.dtype or DTYPES:
            if not options.sets or group.name in options.sets:
                show(group, dtype, options.solver, options.missed)
    # In float64, and of solvers of their own.
    if PROGRAMS in options.sets or not (options.sets or options.solver):
        print(f"\n{_programs.table()}")


if __name__ == "__main__":
    main()
