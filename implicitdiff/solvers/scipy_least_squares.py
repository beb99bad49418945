"""SciPy's solvers of nonlinear least-squares problems."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

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

_FLOAT64_EPS = float(np.finfo(np.float64).eps)


def _of_trust_region(aim: float, eps: float, bounded: bool) -> dict[str, Any]:
    # A small change of |r|^2 tells little of J' r. In a box SciPy scales J' r with the distances from the bounds, and
    # it takes no number below the precision, whatever the units.
    return {"ftol": None, "xtol": eps, "gtol": None if bounded or aim < _FLOAT64_EPS else aim}


def _of_minpack(aim: float, eps: float, bounded: bool) -> dict[str, Any]:
    return {"ftol": eps, "xtol": eps, "gtol": _FLOAT64_EPS}


_LEAST_SQUARES_METHODS = {"trf": _of_trust_region, "dogbox": _of_trust_region, "lm": _of_minpack}

_REFUSED = {
    "max_nfev": "give maxiter= to the solver",
    "bounds": "give bounds= to the solver",
    "jac": "the Jacobian is that of torch",
    "loss": "the condition that is differentiated is J' r = 0; use levenberg_marquardt(loss=...)",
    "f_scale": "it belongs to a loss; use levenberg_marquardt(loss=..., loss_scale=...)",
}


def scipy_least_squares(
    residual_fn: Callable[..., Any],
    method: str = "trf",
    bounds: Any = None,
    scipy_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Solver:
    r"""Make a solver of ``min |r(x, *args)|^2 / 2``, in a box if need be, by `scipy.optimize.least_squares`.

    SciPy's solver runs on the host with the Jacobian of `torch`, below every transform, and the solution has the
    implicit derivatives of the condition ``J' r = 0``, or with bounds of ``x = clip(x - J' r, lower, upper)``: an
    unknown at a bound moves with the bound, and with nothing else. Under vmap it runs once for each lane, one after
    the other; the solvers written in this library solve all lanes together. Arrays are float64 on SciPy's side,
    whatever the dtype and device of ``x``.

    One `update` is the whole search, and its result has the implicit derivatives too. `iter_num` counts evaluations of
    ``r``, as ``maxiter`` does. SciPy's steps cannot be unrolled: ``run(..., implicit_diff=False)`` is refused.

    Whether a search has converged is decided by the condition's error, whatever SciPy reports; one that stopped by
    itself before has the status ``LINE_SEARCH_FAILED``. SciPy compares sums of squares, in which rounding hides a
    ``J' r`` of about the square root of the precision. So the defaults ask SciPy for as much as any solver, but where
    it stops before, accept what they would be with ``eps^(2/5)``, 5e-7 in float64, in the place of ``eps^(2/3)``.

    Args:
        residual_fn: ``r(x, *args)``, a tree of any shapes.
        method: ``"trf"``, ``"dogbox"`` or ``"lm"``, the last without bounds.
        bounds: a pair ``(lower, upper)``, each a number, a tensor that broadcasts to every leaf of ``x``, a tree of
            these like ``x``, or None. They are differentiated and batched like what ``residual_fn`` captures. The
            initial guess is moved into the box.
        scipy_options: other arguments of `scipy.optimize.least_squares`. They go before the tolerances that are
            otherwise made of ``rtol`` and ``atol``.
        options: see `implicitdiff.solvers`; ``maxiter=None`` allows 200 for each unknown, at least 1000.

    Raises:
        ValueError: SciPy has no such method, it takes no bounds, or these are no pair; ``scipy_options`` has a
            ``loss``, which `levenberg_marquardt` takes, or what has an argument of its own. Later: a lower bound is not
            below the upper one.

    Reference:
        Virtanen et al., "SciPy 1.0", Nature Methods 17 (2020); `scipy.optimize.least_squares`.

    Example:
        >>> import torch
        >>> from implicitdiff.solvers import scipy_least_squares
        >>> x = torch.tensor([0.038, 0.194, 0.425, 0.626, 1.253, 2.5, 3.74], dtype=torch.float64)
        >>> y = torch.tensor([0.05, 0.127, 0.094, 0.2122, 0.2729, 0.2665, 0.3317], dtype=torch.float64)
        >>> solver = scipy_least_squares(lambda c, y: y - c[0] * x / (c[1] + x))
        >>> c, state = solver.run(torch.tensor([0.9, 0.2], dtype=torch.float64), y)
        >>> c
        tensor([0.3618, 0.5563], dtype=torch.float64)
    """
    lookup("scipy_least_squares", method, _LEAST_SQUARES_METHODS)
    own = check_scipy_options("scipy_least_squares", scipy_options, _REFUSED)
    equation_of = _equations.least_squares_equation
    if bounds is not None:
        if method.lower() == "lm":
            raise ValueError('scipy_least_squares: method "lm" takes no bounds; use "trf" or "dogbox"')
        equation_of = partial(
            _equations.boxed_by,
            smooth_of=_equations.least_squares_equation,
            limits=limits_of("scipy_least_squares", bounds),
        )
    solve = partial(_run_least_squares, method=method.lower(), bounded=bounds is not None, own=own)
    engine = ScipyEngine(solve, "nfev", digits=2 / 5)
    return make_scipy_solver("scipy_least_squares", equation_of, residual_fn, engine, options)


def _run_least_squares(
    lane: LaneFunctions, aim: float, limit: int, *, method: str, bounded: bool, own: Mapping[str, Any]
) -> Any:
    # Takes half a second to import.
    from scipy.optimize import least_squares

    lower, upper = lane.bounds() if bounded else (-np.inf, np.inf)
    return least_squares(
        lane.residual,
        np.clip(lane.x0, lower, upper),
        jac=lane.jacobian,
        bounds=(lower, upper),
        method=method,
        max_nfev=limit,
        **{**_LEAST_SQUARES_METHODS[method](aim / lane.x0.size**0.5, lane.eps, bounded), **own},
    )
