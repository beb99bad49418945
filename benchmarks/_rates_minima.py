"""The sets of minima, with bounds, penalties and constraints and without, of `rates.py`."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import scipy.optimize as so
from _rates_roots import CHECKED, only_start
from _rates_runs import Array, Run, Set, jaxopt_run, objective, optimistix_run, ours, scipy_min, tensor
from problem_sets import fixed_points, hock_schittkowski

from implicitdiff import projections, solvers


def clipped(problem: Any, dtype: str) -> dict[str, Array]:
    return {"1": np.clip(problem.start, problem.lower, problem.upper).astype(dtype)}


def ends(problem: Any, dtype: str) -> tuple[Array, Array]:
    return np.asarray(problem.lower, dtype=dtype), np.asarray(problem.upper, dtype=dtype)


def tensors(problem: Any, dtype: str) -> dict[str, Any]:
    return {"bounds": tuple(tensor(end, dtype) for end in ends(problem, dtype))}


def arrays(problem: Any, dtype: str) -> dict[str, Any]:
    return {"bounds": ends(problem, dtype)}


def limits(problem: Any, dtype: str) -> dict[str, Any]:
    return {"bounds": so.Bounds(*(end.astype(np.float64) for end in ends(problem, dtype)))}


def boxed(problem: Any, dtype: str) -> dict[str, Any]:
    lower, upper = tensors(problem, dtype)["bounds"]
    return {"projection": partial(projections.box, lower=lower, upper=upper)}


def projected(problem: Any, dtype: str) -> dict[str, Any]:
    return {"projection": problem.projection}


def projected_in_jax(problem: Any, dtype: str) -> dict[str, Any]:
    return {"projection": lambda v, _: problem.projection(v)}


def proximal(problem: Any, dtype: str) -> dict[str, Any]:
    return {"prox": problem.prox}


def proximal_in_jax(problem: Any, dtype: str) -> dict[str, Any]:
    return {"prox": lambda v, _, stepsize: problem.prox(v, stepsize)}


def no_strength(problem: Any, dtype: str) -> dict[str, Any]:
    return {"hyperparams_prox": None}


def mirrored(problem: Any, dtype: str) -> dict[str, Any]:
    return {"projection": problem.softmax}


BOUNDED: list[tuple[str, Run]] = [
    ("lbfgs_b", partial(ours, solvers.lbfgs_b, objective, given=tensors)),
    ("projected_gradient", partial(ours, solvers.projected_gradient, objective, given=boxed)),
    ("SciPy L-BFGS-B", partial(scipy_min, "L-BFGS-B", objective, given=limits)),
    ("jaxopt.LBFGSB", jaxopt_run("LBFGSB", objective, hyper=arrays)),
]
MINIMA: list[tuple[str, Run]] = [
    ("nonlinear_cg", partial(ours, solvers.nonlinear_cg, objective)),
    ("gradient_descent", partial(ours, solvers.gradient_descent, objective)),
    ("lbfgs", partial(ours, solvers.lbfgs, objective)),
    ("newton_cg", partial(ours, solvers.newton_cg, objective)),
    ("SciPy CG", partial(scipy_min, "CG", objective)),
    ("SciPy L-BFGS-B", partial(scipy_min, "L-BFGS-B", objective)),
    ("optimistix.BFGS", optimistix_run("minimise", "BFGS", 10_000, objective)),
]
COMPOSITES: list[tuple[str, Run]] = [
    ("proximal_gradient", partial(ours, solvers.proximal_gradient, objective, given=proximal)),
    ("jaxopt.ProximalGradient", jaxopt_run("ProximalGradient", objective, proximal_in_jax, no_strength)),
]
CONSTRAINED: list[tuple[str, Run]] = [
    ("projected_gradient", partial(ours, solvers.projected_gradient, objective, given=projected)),
    ("jaxopt.ProjectedGradient", jaxopt_run("ProjectedGradient", objective, projected_in_jax)),
]
# JAXopt's MirrorDescent has no default for the step size.
SIMPLICES: list[tuple[str, Run]] = [
    ("mirror_descent", partial(ours, solvers.mirror_descent, objective, given=mirrored)),
]
SETS = [
    Set("bounded", (*hock_schittkowski.PROBLEMS, *fixed_points.BOUNDED), BOUNDED, clipped, CHECKED),
    Set("minima", fixed_points.MINIMA, MINIMA, only_start, CHECKED),
    Set("composites", fixed_points.COMPOSITES, COMPOSITES, only_start, CHECKED),
    Set("sets", fixed_points.CONSTRAINED, CONSTRAINED, only_start, CHECKED),
    Set("simplices", fixed_points.SIMPLICES, SIMPLICES, only_start, CHECKED),
]
