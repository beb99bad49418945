"""SciPy's minimisers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import implicitdiff.solvers._loop.equations as _equations
from implicitdiff.solvers._loop.bounds import limits_of
from implicitdiff.solvers._loop.solver import Solver
from implicitdiff.solvers._scipy import (
    LaneFunctions,
    ScipyEngine,
    check_scipy_options,
    lookup,
    make_scipy_solver,
)

MinimizeTolerances = Callable[[float, float, bool], dict[str, Any]]


class _MinimizeMethod(NamedTuple):
    """What SciPy's documentation says of a method.

    Attributes:
        tolerances: ``tolerances(aim, eps, bounded)``, the options with which it does not stop before all of ``grad f``
            is less than `aim`.
        jac: whether it takes the gradient.
        hessp: whether it takes products with the Hessian.
        hess: whether it needs the Hessian as a matrix.
        bounds: whether it takes bounds.
        budget: the option that limits it.
        counts: what in the result this counts.
    """

    tolerances: MinimizeTolerances
    jac: bool = True
    hessp: bool = False
    hess: bool = False
    bounds: bool = False
    budget: str = "maxiter"
    counts: str = "nit"


def _by_gradient(aim: float, eps: float, bounded: bool) -> dict[str, Any]:
    return {"gtol": aim}


def _by_euclidean_gradient(aim: float, eps: float, bounded: bool) -> dict[str, Any]:
    return {"gtol": aim, "norm": 2}


def _by_interior_point(aim: float, eps: float, bounded: bool) -> dict[str, Any]:
    # The gradient that it tests is that of the objective with the barrier, which may be far from gone.
    return {"gtol": 0.0 if bounded else aim, "xtol": eps, "barrier_tol": aim}


def _by_distance(*options: str) -> MinimizeTolerances:
    """Of methods that know no gradient: the distance of the points where they look."""
    return lambda aim, eps, bounded: dict.fromkeys(options, min(aim, eps ** (2 / 3)))


_MINIMIZE_METHODS = {
    "nelder-mead": _MinimizeMethod(_by_distance("xatol", "fatol"), jac=False, bounds=True),
    "powell": _MinimizeMethod(lambda aim, eps, bounded: {"xtol": eps ** (2 / 3), "ftol": eps}, jac=False, bounds=True),
    "cg": _MinimizeMethod(_by_euclidean_gradient),
    "bfgs": _MinimizeMethod(_by_euclidean_gradient),
    "newton-cg": _MinimizeMethod(lambda aim, eps, bounded: {"xtol": eps}, hessp=True),
    "l-bfgs-b": _MinimizeMethod(lambda aim, eps, bounded: {"gtol": aim, "ftol": 0.0, "maxfun": 10**9}, bounds=True),
    "tnc": _MinimizeMethod(
        lambda aim, eps, bounded: {"gtol": aim, "ftol": 0.0, "xtol": 0.0}, bounds=True, budget="maxfun", counts="nfev"
    ),
    "cobyla": _MinimizeMethod(_by_distance("tol"), jac=False, bounds=True, counts="nfev"),
    "cobyqa": _MinimizeMethod(_by_distance("final_tr_radius"), jac=False, bounds=True, budget="maxfev", counts="nfev"),
    "slsqp": _MinimizeMethod(lambda aim, eps, bounded: {"ftol": eps**2}, bounds=True),
    "trust-constr": _MinimizeMethod(_by_interior_point, hessp=True, bounds=True),
    "dogleg": _MinimizeMethod(_by_gradient, hess=True),
    "trust-ncg": _MinimizeMethod(_by_gradient, hessp=True),
    # An inexact step may predict no improvement, which ends the search far from the solution.
    "trust-krylov": _MinimizeMethod(lambda aim, eps, bounded: {"gtol": aim, "inexact": False}, hessp=True),
    "trust-exact": _MinimizeMethod(_by_gradient, hess=True),
}


def scipy_minimize(
    objective_fn: Callable[..., Any],
    method: str | None = None,
    bounds: Any = None,
    scipy_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Solver:
    r"""Make a solver of ``min f(x, *args)``, in a box if need be, by `scipy.optimize.minimize`.

    SciPy's solver runs on the host with the gradient of `torch`, with products with the Hessian where the method takes
    them (Newton-CG, trust-ncg, trust-krylov, trust-constr) or the Hessian where it needs that (dogleg, trust-exact),
    below every transform. The solution has the implicit derivatives of the condition ``grad f = 0``, or with bounds of
    ``x = clip(x - grad f, lower, upper)``: an unknown at a bound moves with the bound, and with nothing else. Under
    vmap it runs once for each lane, one after the other; the solvers written in this library solve all lanes together.
    Arrays are float64 on SciPy's side, whatever the dtype and device of ``x``.

    One `update` is the whole search, and its result has the implicit derivatives too. `iter_num` counts what
    ``maxiter`` limits: iterations, or evaluations of ``f`` for TNC, COBYLA and COBYQA. SciPy's steps cannot be
    unrolled: ``run(..., implicit_diff=False)`` is refused.

    Whether a search has converged is decided by the condition's error, whatever SciPy reports; one that stopped by
    itself before has the status ``LINE_SEARCH_FAILED``. SciPy compares values of ``f``, in which rounding hides a
    gradient of about the square root of the precision. So the defaults ask SciPy for as much as any solver, but where
    it stops before, accept what they would be with ``eps^(2/5)``, 5e-7 in float64, in the place of ``eps^(2/3)``.
    Methods that know no gradient may need more than that. Some of SciPy's methods have constants of their own, and fail
    where ``f`` is very small or large: multiply it by a number.

    Args:
        objective_fn: ``f(x, *args)``, one number.
        method: any of `scipy.optimize.minimize`'s; None is BFGS, or with bounds L-BFGS-B.
        bounds: a pair ``(lower, upper)``, each a number, a tensor that broadcasts to every leaf of ``x``, a tree of
            these like ``x``, or None. They are differentiated and batched like what ``objective_fn`` captures. The
            initial guess is moved into the box.
        scipy_options: the method's own options. They go before the tolerances that are otherwise made of ``rtol`` and
            ``atol``.
        options: see `implicitdiff.solvers`; ``maxiter=None`` allows 200 for each unknown, at least 1000.

    Raises:
        ValueError: SciPy has no such method, it takes no bounds, or these are no pair; the budget is among
            ``scipy_options``. Later: a lower bound exceeds the upper one.

    Reference:
        Virtanen et al., "SciPy 1.0", Nature Methods 17 (2020); `scipy.optimize.minimize`.

    Example:
        >>> import torch
        >>> from implicitdiff.solvers import scipy_minimize
        >>> def rosenbrock(x, a):
        ...     return (a - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
        >>> box = (torch.tensor([1.5, -2.0]), torch.tensor([3.0, 0.5]))
        >>> x, state = scipy_minimize(rosenbrock, bounds=box).run(torch.tensor([2.0, 0.0]), torch.tensor(1.0))
        >>> x
        tensor([1.5000, 0.5000])
    """
    chosen = method or ("BFGS" if bounds is None else "L-BFGS-B")
    row = lookup("scipy_minimize", chosen, _MINIMIZE_METHODS)
    own = check_scipy_options("scipy_minimize", scipy_options, {row.budget: "give maxiter= to the solver"})
    equation_of = _equations.stationary_equation
    if bounds is not None:
        if not row.bounds:
            takers = ", ".join(name for name, row in _MINIMIZE_METHODS.items() if row.bounds)
            raise ValueError(f"scipy_minimize: method {chosen!r} takes no bounds; use one of {takers}")
        equation_of = partial(
            _equations.boxed_by, smooth_of=_equations.stationary_equation, limits=limits_of("scipy_minimize", bounds)
        )
    solve = partial(_run_minimize, method=chosen, bounded=bounds is not None, own=own)
    engine = ScipyEngine(solve, row.counts, digits=2 / 5)
    return make_scipy_solver("scipy_minimize", equation_of, objective_fn, engine, options)


def _run_minimize(
    lane: LaneFunctions, aim: float, limit: int, *, method: str, bounded: bool, own: Mapping[str, Any]
) -> Any:
    # Takes half a second to import.
    from scipy.optimize import Bounds, minimize

    row = lookup("scipy_minimize", method, _MINIMIZE_METHODS)
    limits = lane.bounds() if bounded else None
    return minimize(
        lane.objective_and_gradient if row.jac else lane.objective,
        lane.x0 if limits is None else np.clip(lane.x0, *limits),
        method=method,
        jac=row.jac or None,
        hessp=lane.hessian_product if row.hessp else None,
        hess=lane.hessian if row.hess else None,
        bounds=None if limits is None else Bounds(*limits),
        options={**row.tolerances(aim / lane.x0.size**0.5, lane.eps, bounded), row.budget: limit, **own},
    )
