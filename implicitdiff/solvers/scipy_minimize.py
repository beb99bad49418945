"""SciPy's minimisers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Concatenate, NamedTuple

import numpy as np
from torch import Tensor
from typing_extensions import Unpack

import implicitdiff.solvers._loop.equations as _equations
from implicitdiff._torch.trees import P, X
from implicitdiff.solvers._loop.bounds import Bound, limits_of
from implicitdiff.solvers._loop.options import SolverOptions, solver_factory
from implicitdiff.solvers._loop.solver import Solver
from implicitdiff.solvers._scipy import (
    LaneFunctions,
    ScipyEngine,
    ScipyMemory,
    check_scipy_options,
    lookup,
    make_scipy_solver,
)

MinimizeTolerances = Callable[[float, float, bool], dict[str, object]]


class _MinimizeMethod(NamedTuple):
    """Properties of a method of SciPy, from its documentation.

    Attributes:
        tolerances: ``tolerances(aim, eps, bounded)``, options with which the method runs until every entry of
            ``grad f`` is at most `aim`.
        jac: True if the method takes the gradient.
        hessp: True if the method takes products with the Hessian.
        hess: True if the method needs the Hessian as a matrix.
        bounds: True if the method takes bounds.
        budget: the option that limits the search.
        counts: the field of the result that the budget limits.
    """

    tolerances: MinimizeTolerances
    jac: bool = True
    hessp: bool = False
    hess: bool = False
    bounds: bool = False
    budget: str = "maxiter"
    counts: str = "nit"


def _by_gradient(aim: float, eps: float, bounded: bool) -> dict[str, object]:
    return {"gtol": aim}


def _by_euclidean_gradient(aim: float, eps: float, bounded: bool) -> dict[str, object]:
    return {"gtol": aim, "norm": 2}


def _by_interior_point(aim: float, eps: float, bounded: bool) -> dict[str, object]:
    # The tested gradient includes the barrier term, which stays large near a bound: with bounds test the barrier
    # parameter instead.
    return {"gtol": 0.0 if bounded else aim, "xtol": eps, "barrier_tol": aim}


def _by_distance(*options: str) -> MinimizeTolerances:
    """Return tolerances for methods without gradients: bounds on the distance between trial points."""
    return lambda aim, eps, bounded: dict.fromkeys(options, min(aim, eps ** (2 / 3)))


_MINIMIZE_METHODS = {
    "nelder-mead": _MinimizeMethod(_by_distance("xatol", "fatol"), jac=False, bounds=True),
    "powell": _MinimizeMethod(lambda aim, eps, bounded: {"xtol": eps ** (2 / 3), "ftol": eps}, jac=False, bounds=True),
    "cg": _MinimizeMethod(_by_euclidean_gradient),
    "bfgs": _MinimizeMethod(_by_euclidean_gradient),
    "newton-cg": _MinimizeMethod(lambda aim, eps, bounded: {"xtol": eps}, hessp=True),
    # A small change of ``f`` does not bound the gradient, so `ftol` is off; `maxiter` is the budget, so `maxfun` is
    # off.
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
    # An inexact step may predict no decrease, and end the search far from the solution.
    "trust-krylov": _MinimizeMethod(lambda aim, eps, bounded: {"gtol": aim, "inexact": False}, hessp=True),
    "trust-exact": _MinimizeMethod(_by_gradient, hess=True),
}


@solver_factory
def scipy_minimize(
    objective_fn: Callable[Concatenate[X, P], Tensor],
    method: str | None = None,
    bounds: tuple[Bound, Bound] | None = None,
    scipy_options: Mapping[str, object] | None = None,
    **options: Unpack[SolverOptions],
) -> Solver[X, P, ScipyMemory]:
    r"""Make a solver of ``min f(x, *args)``, optionally in a box, by `scipy.optimize.minimize`.

    SciPy's solver runs on the host, below every transform, with the gradient of `torch`, with products with the Hessian
    (Newton-CG, trust-ncg, trust-krylov, trust-constr) or with the Hessian (dogleg, trust-exact). The solution has the
    implicit derivatives of the condition ``grad f = 0``, with bounds of ``x = clip(x - grad f, lower, upper)``: an
    unknown at a bound moves with the bound only. Under vmap SciPy solves lane after lane; this library's own solvers
    solve all lanes together. SciPy computes in float64 for any dtype and device of ``x``.

    An `update` is the whole search, and its result has the implicit derivatives too. `iter_num` and ``maxiter`` count
    iterations, or evaluations of ``f`` for TNC, COBYLA and COBYQA. SciPy's steps cannot be unrolled:
    ``run(..., implicit_diff=False)`` is refused.

    The error of the condition decides about convergence, not SciPy's report. A search that stopped early has the status
    ``LINE_SEARCH_FAILED``. SciPy compares values of ``f``, and rounding of a value hides a gradient of about the square
    root of the precision. So the defaults ask SciPy for the usual target, but after an early stop accept the target
    with ``eps^(2/5)``, 5e-7 in float64, instead of ``eps^(2/3)``. Methods without gradients may need a coarser
    tolerance. Some of SciPy's methods have constants with units and fail for a very small or large ``f``: multiply
    ``f`` by a number.

    Args:
        objective_fn: ``f(x, *args)``, one number.
        method: a method of `scipy.optimize.minimize`; None for BFGS, with bounds for L-BFGS-B.
        bounds: a pair ``(lower, upper)``, each a number, a tensor that broadcasts to every leaf of ``x``, a tree of
            these like ``x``, or None. They are differentiated and batched like what ``objective_fn`` captures. The
            initial guess is moved into the box.
        scipy_options: the method's own options, with priority over tolerances from ``rtol`` and ``atol``.
        options: see `SolverOptions`; ``maxiter=None`` allows 200 for each unknown, at least 1000.

    Raises:
        ValueError: SciPy has no such method, the method takes no bounds, or the bounds are not a pair; the budget is
            among ``scipy_options``. When solving: a lower bound exceeds the upper bound.

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
    lane: LaneFunctions, aim: float, limit: int, *, method: str, bounded: bool, own: Mapping[str, object]
) -> Any:
    # The import takes half a second.
    from scipy.optimize import Bounds, minimize

    row = lookup("scipy_minimize", method, _MINIMIZE_METHODS)
    lower, upper = lane.bounds() if bounded else (-np.inf, np.inf)
    return minimize(
        lane.objective_and_gradient if row.jac else lane.objective,
        np.clip(lane.x0, lower, upper),
        method=method,
        jac=row.jac or None,
        hessp=lane.hessian_product if row.hessp else None,
        hess=lane.hessian if row.hess else None,
        bounds=Bounds(lower, upper) if bounded else None,
        # Most methods bound the largest entry, and ``|g|_inf <= aim / n^(1/2)`` implies ``|g| <= aim``.
        options={**row.tolerances(aim / lane.x0.size**0.5, lane.eps, bounded), row.budget: limit, **own},
    )
