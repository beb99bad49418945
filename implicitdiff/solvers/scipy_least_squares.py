"""SciPy's solvers of nonlinear least-squares problems."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Concatenate

import numpy as np
from typing_extensions import Unpack

import implicitdiff.solvers._loop.equations as _equations
from implicitdiff._torch.trees import P, Tree, X
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

_FLOAT64_EPS = float(np.finfo(np.float64).eps)


def _of_trust_region(aim: float, eps: float, bounded: bool) -> dict[str, object]:
    # `ftol` is off, because a small change of ``|r|^2`` does not bound ``J' r``. In a box SciPy scales ``J' r`` by the
    # distances from the bounds, so `gtol` has other units; and SciPy refuses a `gtol` below eps.
    return {"ftol": None, "xtol": eps, "gtol": None if bounded or aim < _FLOAT64_EPS else aim}


def _of_minpack(aim: float, eps: float, bounded: bool) -> dict[str, object]:
    # MINPACK's `gtol` bounds the cosines between ``r`` and the columns of ``J``, not ``J' r``, so ask for full
    # precision.
    return {"ftol": eps, "xtol": eps, "gtol": _FLOAT64_EPS}


_LEAST_SQUARES_METHODS = {"trf": _of_trust_region, "dogbox": _of_trust_region, "lm": _of_minpack}

_REFUSED = {
    "max_nfev": "give maxiter= to the solver",
    "bounds": "give bounds= to the solver",
    "jac": "the Jacobian is that of torch",
    "loss": "the condition that is differentiated is J' r = 0; use levenberg_marquardt(loss=...)",
    "f_scale": "it belongs to a loss; use levenberg_marquardt(loss=..., loss_scale=...)",
}


@solver_factory
def scipy_least_squares(
    residual_fn: Callable[Concatenate[X, P], Tree],
    method: str = "trf",
    bounds: tuple[Bound, Bound] | None = None,
    scipy_options: Mapping[str, object] | None = None,
    **options: Unpack[SolverOptions],
) -> Solver[X, P, ScipyMemory]:
    r"""Make a solver of ``min |r(x, *args)|^2 / 2``, optionally in a box, by `scipy.optimize.least_squares`.

    SciPy's solver runs on the host with the Jacobian of `torch`, below every transform. The solution has the implicit
    derivatives of the condition ``J' r = 0``, with bounds of ``x = clip(x - J' r, lower, upper)``: an unknown at a
    bound moves with the bound only. Under vmap SciPy solves lane after lane; this library's own solvers solve all lanes
    together. SciPy computes in float64 for any dtype and device of ``x``.

    An `update` is the whole search, and its result has the implicit derivatives too. `iter_num` and ``maxiter`` count
    evaluations of ``r``. SciPy's steps cannot be unrolled: ``run(..., implicit_diff=False)`` is refused.

    The error of the condition decides about convergence, not SciPy's report. A search that stopped early has the status
    ``LINE_SEARCH_FAILED``. SciPy compares sums of squares, and rounding of a sum hides a ``J' r`` of about the square
    root of the precision. So the defaults ask SciPy for the usual target, but after an early stop accept the target
    with ``eps^(2/5)``, 5e-7 in float64, instead of ``eps^(2/3)``.

    Args:
        residual_fn: ``r(x, *args)``, a tree of any shapes.
        method: ``"trf"``, ``"dogbox"`` or ``"lm"``, the last without bounds.
        bounds: a pair ``(lower, upper)``, each a number, a tensor that broadcasts to every leaf of ``x``, a tree of
            these like ``x``, or None. They are differentiated and batched like what ``residual_fn`` captures. The
            initial guess is moved into the box.
        scipy_options: other arguments of `scipy.optimize.least_squares`, with priority over tolerances from ``rtol``
            and ``atol``.
        options: see `SolverOptions`; ``maxiter=None`` allows 200 for each unknown, at least 1000.

    Raises:
        ValueError: SciPy has no such method, the method takes no bounds, or the bounds are not a pair;
            ``scipy_options`` has a ``loss`` (see `levenberg_marquardt`), or an option with an argument of its own here.
            When solving: a lower bound is not below the upper bound.

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
    lane: LaneFunctions, aim: float, limit: int, *, method: str, bounded: bool, own: Mapping[str, object]
) -> Any:
    # The import takes half a second.
    from scipy.optimize import least_squares

    lower, upper = lane.bounds() if bounded else (-np.inf, np.inf)
    return least_squares(
        lane.residual,
        np.clip(lane.x0, lower, upper),
        jac=lane.jacobian,
        bounds=(lower, upper),
        method=method,
        max_nfev=limit,
        # `gtol` bounds the largest entry, and ``|g|_inf <= aim / n^(1/2)`` implies ``|g| <= aim``.
        **{**_LEAST_SQUARES_METHODS[method](aim / lane.x0.size**0.5, lane.eps, bounded), **own},
    )
