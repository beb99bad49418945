"""SciPy's solvers of systems of equations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Concatenate, NamedTuple

import numpy as np
from typing_extensions import Unpack

import implicitdiff.solvers._loop.equations as _equations
from implicitdiff._torch.trees import P, X
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

RootTolerances = Callable[[float, float], dict[str, object]]


class _RootMethod(NamedTuple):
    """Properties of a method of SciPy, from its documentation.

    Attributes:
        jac: True if the method takes the Jacobian.
        budget: the option that limits the search.
        counts: the field of the result that the budget limits.
        tolerances: ``tolerances(aim, eps)``, options with which the method runs until ``|F| <= aim``.
    """

    jac: bool
    budget: str
    counts: str
    tolerances: RootTolerances


def _by_residual(aim: float, eps: float) -> dict[str, object]:
    # SciPy's default is the largest entry; `aim` is a Euclidean norm.
    return {"fatol": aim, "tol_norm": np.linalg.norm}


def _krylov(aim: float, eps: float) -> dict[str, object]:
    # Products with the Jacobian are differences of values; this length balances truncation and rounding.
    return {**_by_residual(aim, eps), "jac_options": {"rdiff": eps**0.5}}


_QUASI_NEWTON = _RootMethod(False, "maxiter", "nit", _by_residual)
_ROOT_METHODS = {
    # MINPACK's hybrd and hybrj test the length of the step, not ``|F|``, so ask for full precision.
    "hybr": _RootMethod(True, "maxfev", "nfev", lambda aim, eps: {"xtol": eps}),
    "lm": _RootMethod(True, "maxiter", "nfev", lambda aim, eps: {"xtol": eps, "ftol": eps, "gtol": eps}),
    "broyden1": _QUASI_NEWTON,
    "broyden2": _QUASI_NEWTON,
    "anderson": _QUASI_NEWTON,
    "linearmixing": _QUASI_NEWTON,
    "diagbroyden": _QUASI_NEWTON,
    "excitingmixing": _QUASI_NEWTON,
    "krylov": _QUASI_NEWTON._replace(tolerances=_krylov),
    "df-sane": _RootMethod(False, "maxfev", "nfev", lambda aim, eps: {"fatol": aim, "ftol": 0.0}),
}


@solver_factory
def scipy_root(
    residual_fn: Callable[Concatenate[X, P], X],
    method: str = "hybr",
    scipy_options: Mapping[str, object] | None = None,
    **options: Unpack[SolverOptions],
) -> Solver[X, P, ScipyMemory]:
    r"""Make a solver of ``F(x, *args) = 0``, as many equations as unknowns, by `scipy.optimize.root`.

    SciPy's solver runs on the host, below every transform, with the Jacobian of `torch` for ``hybr`` and ``lm``. The
    solution has the implicit derivatives of ``F``. Under vmap SciPy solves lane after lane; this library's own solvers
    solve all lanes together. SciPy computes in float64 for any dtype and device of ``x``.

    An `update` is the whole search, and its result has the implicit derivatives too. `iter_num` and ``maxiter`` count
    iterations, or evaluations of ``F`` for ``hybr``, ``lm`` and ``df-sane``. SciPy's steps cannot be unrolled:
    ``run(..., implicit_diff=False)`` is refused.

    The error ``|F|`` decides about convergence, not SciPy's report. A search that stopped early has the status
    ``LINE_SEARCH_FAILED``.

    Args:
        residual_fn: ``F(x, *args)``, a tree like ``x``.
        method: a method of `scipy.optimize.root`.
        scipy_options: the method's own options, with priority over tolerances from ``rtol`` and ``atol``.
        options: see `SolverOptions`; ``maxiter=None`` allows 200 for each unknown, at least 1000.

    Raises:
        ValueError: SciPy has no such method, or the budget is among ``scipy_options``.

    Reference:
        Virtanen et al., "SciPy 1.0", Nature Methods 17 (2020); `scipy.optimize.root`.

    Example:
        >>> import torch
        >>> from implicitdiff.solvers import scipy_root
        >>> solver = scipy_root(lambda z, shift: torch.tanh(z + shift) - z)
        >>> z, state = solver.run(torch.tensor(0.5), torch.tensor(1.0))
        >>> z
        tensor(0.9612)
        >>> torch.func.grad(lambda shift: solver.run(torch.tensor(0.5), shift)[0])(torch.tensor(1.0))
        tensor(0.0824)
    """
    row = lookup("scipy_root", method, _ROOT_METHODS)
    own = check_scipy_options("scipy_root", scipy_options, {row.budget: "give maxiter= to the solver"})
    engine = ScipyEngine(partial(_run_root, method=method, own=own), row.counts)
    return make_scipy_solver("scipy_root", _equations.root_equation, residual_fn, engine, options)


def _run_root(lane: LaneFunctions, aim: float, limit: int, *, method: str, own: Mapping[str, object]) -> Any:
    # The import takes half a second.
    from scipy.optimize import root

    row = lookup("scipy_root", method, _ROOT_METHODS)
    return root(
        lane.residual,
        lane.x0,
        method=method,
        jac=lane.jacobian if row.jac else None,
        options={**row.tolerances(aim, lane.eps), row.budget: limit, **own},
    )
