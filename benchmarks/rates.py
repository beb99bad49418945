"""How many problems of the field's test sets a solver solves, how many it only claims to, and at what cost.

    python benchmarks/rates.py [set ...] [--dtype float32] [--solver lbfgs] [--missed]

prints a table for each set and dtype, ours beside SciPy's and Optimistix's. All have their default options; Optimistix
has none for its tolerances and gets ``sqrt(eps)``, which in float64 is about SciPy's. What is not installed is named
and left out. What a solver misses goes to stderr as it happens.

Sets of least-squares problems
    ``mgh`` (More, Garbow and Hillstrom) and ``nist``, solved as ``min |r|^2`` by methods for least squares; ``...-gn``
    by Gauss-Newton from the first initial guess only; ``...-min`` by methods for a function ``f(x) = |r(x)|^2``. The
    initial guesses are those of MINPACK's ``initpt``: 1, 10 and 100 times the standard one, and where that is zero, a
    vector of tens or hundreds. NIST gives two for each problem. One at which ``|r|^2`` is not finite in the dtype is
    left out.

Evaluations
    are calls of the user's function, so a Jacobian or a gradient counts as one, with the value that comes along; of
    Optimistix, steps, each of which evaluates once. Their sum is over the cases at which every solver of the table
    arrives.

Dtypes
    In float32 functions and derivatives are evaluated in float32. SciPy iterates in float64 all the same: it is given
    their values cast to float64, and what it returns is rounded to float32.

Arrived
    ``|r(x)|^2``, computed in float64, is within ``allowed(v)`` of a known minimum ``v``, the largest of

    - ``tol v``, ``tol`` 1e-5 in float64 and 1e-3 in float32;
    - ``(sqrt(v) + 4 eps |r_0|)^2 - v``, ``r_0`` the residual at the best of the problem's initial guesses: what
      becomes of ``v`` if rounding moves the residual by a few eps of the terms that cancel in it;
    - where ``v`` is zero, ``eps^(8/9) |r_0|^2``, but at most ``tol``. A gradient that has shrunk by ``eps^(2/3)`` is
      all that can be asked of a solver. Where the Jacobian is singular at the solution (both of Powell's functions),
      ``|r|`` goes as ``e^2`` with the distance ``e``, the gradient as ``e^3``, so that ``|r|^2`` is then
      ``eps^(8/9)`` of what it was. ``tol`` is for problems that begin at ``|r_0|^2 = 1e12``.

    Float32 can do that: NIST's certified solutions, rounded to it, use up less than a thousandth of what is allowed.

False claim
    The solver says that it has converged, has not arrived, and SciPy's "lm" or "trf", going on from there in float64
    with all tolerances at eps and 2000 evaluations each, lowers ``|r|^2`` by more than ``allowed``. To claim another
    local minimum is not false, nor is any other point where they find no way down; a valley is, and a slope.

Stood still
    Ours with BUDGET_SPENT at its default limit.

A set is a `Set`; what has problems of another kind brings its own solvers, initial guesses and `Judge`.
"""

from __future__ import annotations

import os

# Before the libraries read them.
os.environ |= {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}

import argparse
import importlib
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize as so
import torch
from torch.func import grad_and_value, jacfwd

from implicitdiff import solvers

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from problem_sets import more_garbow_hillstrom, nist
from problem_sets.problem import LeastSquares

Array = np.ndarray
DTYPES = ("float64", "float32")
MISSING = []


def peer(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        MISSING.append(name)
        return None


jax, optimistix = map(peer, ("jax", "optimistix"))


class Outcome(NamedTuple):
    """Of one run: what was returned, whether as a solution, evaluations, and whether the default limit ended it."""

    x: Array
    claimed: bool
    evaluations: int
    still: bool = False


Run = Callable[[Any, Array, str], Outcome]
"""``run(problem, start, dtype)``; an exception counts as neither arrived nor claimed."""


class Judge(NamedTuple):
    """Of a point, ``(problem, x, dtype)``: whether it is a solution, and if not, whether to claim it is false."""

    arrived: Callable[[Any, Array, str], bool]
    improvable: Callable[[Any, Array, str], bool]


class Set(NamedTuple):
    """Problems (with a name), solvers by name, and the initial guesses of a problem by label.

    A solver of a library that may be missing is called "library.name".
    """

    name: str
    problems: Sequence[Any]
    solvers: Sequence[tuple[str, Run]]
    starts: Callable[[Any, str], dict[str, Array]]
    judge: Judge


# --- least squares ----------------------------------------------------------------------------------------------------

TOLERANCE = {"float64": 1e-5, "float32": 1e-3}


def value(problem: LeastSquares, x: Sequence[float] | Array) -> float:
    """``|r(x)|^2`` in float64."""
    with np.errstate(all="ignore"):
        return float(np.square(problem.residual(np.asarray(x, dtype=np.float64))).sum())


def standard(problem: LeastSquares, dtype: str) -> dict[str, Array]:
    return finite(problem, {f"{i + 1}": start for i, start in enumerate((problem.start, *problem.starts))}, dtype)


def first(problem: LeastSquares, dtype: str) -> dict[str, Array]:
    return finite(problem, {"1": problem.start}, dtype)


def multiples(problem: LeastSquares, dtype: str) -> dict[str, Array]:
    starts = {"x1": np.asarray(problem.start)}
    for factor in (10.0, 100.0):
        scaled = factor * starts["x1"]
        starts[f"x{factor:.0f}"] = scaled if scaled.any() else np.full_like(scaled, factor)
    return finite(problem, starts, dtype)


def finite(problem: LeastSquares, starts: dict[str, Any], dtype: str) -> dict[str, Array]:
    arrays = {label: np.asarray(start, dtype=dtype) for label, start in starts.items()}
    with np.errstate(all="ignore"):
        return {k: v for k, v in arrays.items() if np.isfinite(np.square(problem.residual(v)).sum())}


def allowed(problem: LeastSquares, v: float, dtype: str) -> float:
    tol, eps = TOLERANCE[dtype], float(np.finfo(dtype).eps)
    initial = min(value(problem, start) for start in (problem.start, *problem.starts))
    rounding = (v**0.5 + 4 * eps * initial**0.5) ** 2 - v
    zero = min(tol, eps ** (8 / 9) * initial)
    return max(tol * v, rounding, zero if v <= zero and 0 in problem.values else 0.0)


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


class Counted:
    """A function that counts its calls."""

    def __init__(self, fn: Callable[[Any], Any]) -> None:
        self.fn, self.calls = fn, 0

    def __call__(self, x: Any) -> Any:
        self.calls += 1
        return self.fn(x)


def squares(residual: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda x: (residual(x) ** 2).sum()


def tensor(x: Array, dtype: str) -> torch.Tensor:
    return torch.tensor(np.asarray(x, dtype=dtype))


def slope(fn: Callable[[Any], Any], dtype: str, x: Array) -> Array:
    return jacfwd(fn)(tensor(x, dtype)).double().numpy()


def ours(factory: Callable[..., Any], problem: LeastSquares, start: Array, dtype: str) -> Outcome:
    """Of ``factory(residual)``."""
    return searched(factory, Counted(problem.residual), start, dtype)


def ours_min(factory: Callable[..., Any], problem: LeastSquares, start: Array, dtype: str) -> Outcome:
    """Of ``factory(objective)``."""
    return searched(factory, Counted(squares(problem.residual)), start, dtype)


def searched(factory: Callable[..., Any], fn: Counted, start: Array, dtype: str) -> Outcome:
    x, state = factory(fn, on_failure="ignore").run(tensor(start, dtype))
    status = int(state.status)
    still = status == solvers.Status.BUDGET_SPENT
    return Outcome(x.numpy(), status == solvers.Status.CONVERGED, fn.calls, still)


def scipy_squares(method: str, problem: LeastSquares, start: Array, dtype: str) -> Outcome:
    fn = Counted(problem.residual)

    def residual(x: Array) -> Array:
        return fn(tensor(x, dtype)).double().numpy()

    found = so.least_squares(residual, start.astype(np.float64), partial(slope, fn, dtype), method=method)
    return Outcome(found.x.astype(dtype), bool(found.success), fn.calls)


def scipy_min(method: str, problem: LeastSquares, start: Array, dtype: str) -> Outcome:
    fn = Counted(squares(problem.residual))

    def both(x: Array) -> tuple[float, Array]:
        gradient, f = grad_and_value(fn)(tensor(x, dtype))
        return float(f), gradient.double().numpy()

    found = so.minimize(both, start.astype(np.float64), method=method, jac=True)
    return Outcome(found.x.astype(dtype), bool(found.success), fn.calls)


def optimistix_run(entry: str, name: str, limit: int, problem: LeastSquares, start: Array, dtype: str) -> Outcome:
    # With float64 enabled its trust regions mix the dtypes, and raise in float32.
    jax.config.update("jax_enable_x64", dtype == "float64")
    x, steps, good = compiled(entry, name, limit, problem.residual, dtype)(jax.numpy.asarray(start))
    return Outcome(np.asarray(x), bool(good), int(steps))


@lru_cache(maxsize=1)
def compiled(entry: str, name: str, limit: int, residual: Callable[[Any], Any], dtype: str) -> Callable[[Any], Any]:
    """The initial guesses of a problem share what was compiled."""
    tol = float(np.finfo(dtype).eps) ** 0.5
    fn = squares(residual) if entry == "minimise" else residual

    def run(x: Any) -> tuple[Any, Any, Any]:
        solver = getattr(optimistix, name)(tol, tol)
        found = getattr(optimistix, entry)(lambda y, _: fn(y), solver, x, max_steps=limit, throw=False)
        return found.value, found.stats["num_steps"], found.result == optimistix.RESULTS.successful

    return jax.jit(run)


SQUARES: list[tuple[str, Run]] = [
    ("levenberg_marquardt", partial(ours, solvers.levenberg_marquardt)),
    ("SciPy lm", partial(scipy_squares, "lm")),
    ("SciPy trf", partial(scipy_squares, "trf")),
    ("optimistix.LevenbergMarquardt", partial(optimistix_run, "least_squares", "LevenbergMarquardt", 1000)),
    ("optimistix.Dogleg", partial(optimistix_run, "least_squares", "Dogleg", 1000)),
]
GAUSS_NEWTON: list[tuple[str, Run]] = [
    ("gauss_newton", partial(ours, solvers.gauss_newton)),
    ("optimistix.GaussNewton", partial(optimistix_run, "least_squares", "GaussNewton", 1000)),
]
MINIMA: list[tuple[str, Run]] = [
    ("lbfgs", partial(ours_min, solvers.lbfgs)),
    ("newton_cg", partial(ours_min, solvers.newton_cg)),
    ("SciPy L-BFGS-B", partial(scipy_min, "L-BFGS-B")),
    ("SciPy BFGS", partial(scipy_min, "BFGS")),
    ("optimistix.BFGS", partial(optimistix_run, "minimise", "BFGS", 10_000)),
]
SETS = [
    Set("mgh", more_garbow_hillstrom.PROBLEMS, SQUARES, multiples, LEAST_SQUARES),
    Set("mgh-gn", more_garbow_hillstrom.PROBLEMS, GAUSS_NEWTON, first, LEAST_SQUARES),
    Set("mgh-min", more_garbow_hillstrom.PROBLEMS, MINIMA, multiples, LEAST_SQUARES),
    Set("nist", nist.PROBLEMS, SQUARES, standard, LEAST_SQUARES),
    Set("nist-gn", nist.PROBLEMS, GAUSS_NEWTON, first, LEAST_SQUARES),
    Set("nist-min", nist.PROBLEMS, MINIMA, standard, LEAST_SQUARES),
]

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
    there = [(name, run) for name, run in group.solvers if name.split(".")[0] not in MISSING]
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
    names = [group.name for group in SETS]
    parser = argparse.ArgumentParser(description="How many problems the solvers solve, and how many they claim to.")
    parser.add_argument("sets", nargs="*", metavar="set", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="one only")
    parser.add_argument("--solver", action="append", default=[], help="one only, by its name in the table")
    parser.add_argument("--missed", action="store_true", help="name the cases at which a solver does not arrive")
    options = parser.parse_args()
    if unknown := set(options.sets) - set(names):
        parser.error(f"no set {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if MISSING:
        print(f"not installed, and left out: {', '.join(MISSING)}")
    for group in SETS:
        for dtype in options.dtype or DTYPES:
            if not options.sets or group.name in options.sets:
                show(group, dtype, options.solver, options.missed)


if __name__ == "__main__":
    main()
