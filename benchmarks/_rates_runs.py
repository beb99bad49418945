"""What `rates.py` runs: sets of problems, and solvers of this library, SciPy, Optimistix and JAXopt on one of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import _report
import numpy as np
import scipy.optimize as so
import torch
from torch.func import grad_and_value, jacfwd

from implicitdiff import solvers

# Last, so that `implicitdiff` is the one that is installed.
sys.path += [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1])]

Array = np.ndarray
Function = Callable[[Any], Any]
Of = Callable[[Any], Function]
"""The function of a problem that a solver is given."""
Given = Callable[[Any, str], dict[str, Any]]
"""``given(problem, dtype)``: the arguments of a solver that differ from problem to problem."""
DTYPES = ("float64", "float32")
jax, jaxopt, optimistix = map(_report.library, ("jax", "jaxopt", "optimistix"))


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


def finite(fn: Function, starts: dict[str, Any], dtype: str) -> dict[str, Array]:
    """Those at which the sum of squares of the function is finite in the dtype."""
    arrays = {label: np.asarray(start, dtype=dtype) for label, start in starts.items()}
    with np.errstate(all="ignore"):
        return {k: v for k, v in arrays.items() if np.isfinite(np.square(fn(v)).sum())}


class Counted:
    """A function that counts its calls."""

    def __init__(self, fn: Function) -> None:
        self.fn, self.calls = fn, 0

    def __call__(self, x: Any) -> Any:
        self.calls += 1
        return self.fn(x)


def residual(problem: Any) -> Function:
    return problem.residual


def objective(problem: Any) -> Function:
    return problem.objective


def tensor(x: Any, dtype: str) -> torch.Tensor:
    return torch.tensor(np.asarray(x, dtype=dtype))


def cast(fn: Function, dtype: str, x: Array) -> Array:
    """The value of a torch function that is evaluated in the dtype."""
    return fn(tensor(x, dtype)).double().numpy()


def slope(fn: Function, dtype: str, x: Array) -> Array:
    return cast(jacfwd(fn), dtype, x)


def nothing(problem: Any, dtype: str) -> dict[str, Any]:
    return {}


def ours(
    factory: Callable[..., Any], of: Of, problem: Any, start: Array, dtype: str, given: Given = nothing
) -> Outcome:
    fn, options = Counted(of(problem)), {"on_failure": "ignore", **given(problem, dtype)}
    x, state = factory(fn, **options).run(tensor(start, dtype))
    status = int(state.status)
    still = status == solvers.Status.BUDGET_SPENT
    # A compiled loop does not call the function, so an eager search counts its evaluations.
    fn.calls = 0
    factory(fn, compile="off", **options).run(tensor(start, dtype))
    return Outcome(x.numpy(), status == solvers.Status.CONVERGED, fn.calls, still)


def scipy_squares(method: str, problem: Any, start: Array, dtype: str) -> Outcome:
    fn = Counted(problem.residual)
    values, slopes = partial(cast, fn, dtype), partial(slope, fn, dtype)
    found = so.least_squares(values, start.astype(np.float64), slopes, method=method)
    return Outcome(found.x.astype(dtype), bool(found.success), fn.calls)


def scipy_root(method: str, of: Of, problem: Any, start: Array, dtype: str) -> Outcome:
    fn = Counted(of(problem))
    values, slopes = partial(cast, fn, dtype), partial(slope, fn, dtype)
    found = so.root(values, start.astype(np.float64), jac=slopes, method=method)
    return Outcome(found.x.astype(dtype), bool(found.success), fn.calls)


def scipy_min(method: str, of: Of, problem: Any, start: Array, dtype: str, given: Given = nothing) -> Outcome:
    fn = Counted(of(problem))

    def both(x: Array) -> tuple[float, Array]:
        gradient, f = grad_and_value(fn)(tensor(x, dtype))
        return float(f), gradient.double().numpy()

    found = so.minimize(both, start.astype(np.float64), method=method, jac=True, **given(problem, dtype))
    return Outcome(found.x.astype(dtype), bool(found.success), fn.calls)


def in_jax(solve: Callable[..., Any], *which: Any) -> Run:
    """Of ``solve(*which, problem, dtype)``, a function of the initial guess."""

    def run(problem: Any, start: Array, dtype: str) -> Outcome:
        # With float64 enabled Optimistix's trust regions mix the dtypes, and raise in float32.
        jax.config.update("jax_enable_x64", dtype == "float64")
        x, steps, good = compiled(solve, *which, problem, dtype)(jax.numpy.asarray(start))
        return Outcome(np.asarray(x), bool(good), int(steps))

    return run


@lru_cache(maxsize=1)
def compiled(solve: Callable[..., Any], *which: Any) -> Callable[[Any], Any]:
    """The initial guesses of a problem share what was compiled."""
    return jax.jit(solve(*which))


def tolerance(dtype: str) -> float:
    return float(np.finfo(dtype).eps) ** 0.5


def optimistix_solve(
    entry: str, name: str, limit: int, of: Of, given: Given, problem: Any, dtype: str
) -> Callable[[Any], Any]:
    tol, fn = tolerance(dtype), of(problem)

    def solve(x: Any) -> tuple[Any, Any, Any]:
        solver, options = getattr(optimistix, name)(tol, tol), given(problem, dtype)
        found = getattr(optimistix, entry)(lambda y, _: fn(y), solver, x, options=options, max_steps=limit, throw=False)
        return found.value, found.stats["num_steps"], found.result == optimistix.RESULTS.successful

    return solve


def optimistix_run(entry: str, name: str, limit: int, of: Of, given: Given = nothing) -> Run:
    """`given` are the options of the run."""
    return in_jax(optimistix_solve, entry, name, limit, of, given)


def jaxopt_solve(name: str, of: Of, given: Given, hyper: Given, problem: Any, dtype: str) -> Callable[[Any], Any]:
    tol = tolerance(dtype)

    def solve(x: Any) -> tuple[Any, Any, Any]:
        solver = getattr(jaxopt, name)(of(problem), maxiter=10_000, tol=tol, **given(problem, dtype))
        x, state = solver.run(x, **hyper(problem, dtype))
        return x, state.iter_num, state.error <= tol

    return solve


def jaxopt_run(name: str, of: Of, given: Given = nothing, hyper: Given = nothing) -> Run:
    """`given` are the options of the solver, `hyper` the arguments of its run."""
    return in_jax(jaxopt_solve, name, of, given, hyper)
