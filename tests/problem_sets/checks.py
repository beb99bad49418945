"""Whether a point solves a problem of the tables, and whether a solver that says so is right.

`arrived` asks for a small error, as one who compares solvers would: a residual of ``eps^(1/2)`` of that at the standard
initial guess (1.5e-8 in float64, 3.5e-4 in float32), or an objective as near to its least value. It depends on nothing
that the solver under test computed but the point. Where a point's own rounding is all that the error is, that is enough
too, however small the first error was.

`true_claim` asks whether the point solves some problem of its kind, be it at another root or at a local minimum, where
a small error alone may deceive: a residual that vanishes at infinity has no root there. SciPy continues in float64
from the point and has to stay where it is. All is computed here in float64, with derivatives by torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial, singledispatch
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, brentq, minimize, root
from torch.func import grad, jacfwd

from problem_sets.fixed_points import Bracketed, Composite, Constrained, Minimum
from problem_sets.problem import Bounded, FixedPoint, Function, Roots

Array = np.ndarray


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def tolerance(dtype: torch.dtype) -> float:
    return eps(dtype) ** 0.5


def as_float64(x: Any) -> Array:
    return np.array(x.detach().cpu().double().numpy() if isinstance(x, torch.Tensor) else x, dtype=np.float64)


def jacobian(fn: Function, x: Array) -> Array:
    return jacfwd(fn)(torch.tensor(x)).numpy()


def value_and_gradient(fn: Function, x: Array) -> tuple[float, Array]:
    slope, value = torch.func.grad_and_value(fn)(torch.tensor(x))
    return float(value), slope.numpy()


def rounding(fn: Function, x: Array, dtype: torch.dtype) -> float:
    """How much a vector function changes where every unknown moves by 8 units of its precision."""
    return 8 * eps(dtype) * float(np.linalg.norm(np.abs(jacobian(fn, x)) @ np.abs(x)))


def residual_of(problem: Roots | FixedPoint) -> Function:
    return problem.residual if isinstance(problem, Roots) else lambda x: problem.fn(x) - x


# Arrival


@singledispatch
def arrived(problem: Any, x: Any, dtype: torch.dtype) -> bool:
    """Whether `x`, which was computed in `dtype`, solves the problem well."""
    raise TypeError(f"no check for a {type(problem).__name__}")


@arrived.register(Roots)
@arrived.register(FixedPoint)
def _(problem: Roots | FixedPoint, x: Any, dtype: torch.dtype) -> bool:
    fn, x = residual_of(problem), as_float64(x)
    error, first = norm_at(fn, x), norm_at(fn, np.array(problem.start))
    return bool(np.isfinite(error)) and (error <= tolerance(dtype) * first or error <= rounding(fn, x, dtype))


@arrived.register(Bracketed)
def _(problem: Bracketed, x: Any, dtype: torch.dtype) -> bool:
    """The root is known, so that the distance from it is what is small."""
    root, width = problem.root, problem.upper - problem.lower
    return bool(np.abs(as_float64(x) - root).max() <= tolerance(dtype) * max(abs(root), width))


@arrived.register(Minimum)
@arrived.register(Bounded)
@arrived.register(Composite)
@arrived.register(Constrained)
def _(problem: Any, x: Any, dtype: torch.dtype) -> bool:
    x = as_float64(x)
    return feasible(problem, x, dtype) and value_of(problem, x) - problem.value <= allowed(problem, x, dtype)


def norm_at(fn: Function, x: Array) -> float:
    with quiet():
        return float(np.linalg.norm(fn(torch.tensor(x)).numpy()))


def quiet() -> Any:
    return np.errstate(all="ignore")


def value_of(problem: Any, x: Array) -> float:
    x = torch.tensor(x)
    value = problem.objective(x)
    return float(value + problem.penalty(x) if isinstance(problem, Composite) else value)


def start_of(problem: Any) -> Array:
    """The initial guess, moved into the bounds."""
    start = np.array(problem.start)
    return np.clip(start, problem.lower, problem.upper) if isinstance(problem, Bounded) else start


def allowed(problem: Any, x: Array, dtype: torch.dtype) -> float:
    """What an objective may exceed its least value by: `tolerance` of the way from the initial guess, or rounding.

    A gradient at the solution, of an active constraint, makes the objective change by rounding to first order.
    """
    way = value_of(problem, start_of(problem)) - problem.value
    _, slope = value_and_gradient(problem.objective, x)
    return tolerance(dtype) * max(way, 0.0) + 8 * eps(dtype) * (abs(problem.value) + float(np.abs(slope) @ np.abs(x)))


def feasible(problem: Any, x: Array, dtype: torch.dtype) -> bool:
    """Whether `x` lies in the set, up to rounding."""
    if not np.isfinite(x).all():
        return False
    slack = 8 * eps(dtype) * (1 + np.abs(x).max())
    return bool(np.abs(projection_of(problem)(x) - x).max() <= slack)


def projection_of(problem: Any) -> Callable[[Array], Array]:
    if isinstance(problem, Bounded):
        return partial(np.clip, a_min=problem.lower, a_max=problem.upper)
    return problem.projection if isinstance(problem, Constrained) else lambda x: x


# Claims


@singledispatch
def true_claim(problem: Any, x: Any, dtype: torch.dtype) -> bool:
    """Whether a solver is right that says in `dtype` to have found a solution at `x`."""
    raise TypeError(f"no check for a {type(problem).__name__}")


@true_claim.register(Roots)
@true_claim.register(FixedPoint)
def _(problem: Roots | FixedPoint, x: Any, dtype: torch.dtype) -> bool:
    """The residual is rounding, or a root lies near. It has to be nearer where it is a simple one: a root of
    multiplicity ``m`` is determined by the residual to the ``m``-th root of its precision, and three is the most here.
    """
    fn, x = residual_of(problem), as_float64(x)
    error = norm_at(fn, x)
    if not np.isfinite(error):
        return False
    if error <= rounding(fn, x, dtype):
        return True
    end = polished_root(fn, x)
    # The last of these, since terms that do not depend on the unknowns round as well.
    precise = max(rounding(fn, end, torch.float64), 1e-12 * norm_at(fn, np.array(problem.start)))
    if norm_at(fn, end) > max(1e-3 * error, precise):
        return False
    size = max(np.linalg.norm(end), np.linalg.norm(end - np.array(problem.start)))
    nearness = eps(dtype) ** (1 / 5 if is_multiple(fn, end, x) else 1 / 3)
    return bool(np.linalg.norm(end - x) <= nearness * size)


@true_claim.register(Bracketed)
def _(problem: Bracketed, x: Any, dtype: torch.dtype) -> bool:
    """Brent's method finds a root as near as `arrived` asks."""

    def fn(t: float) -> float:
        return float(problem.fn(np.array(t)))

    found = brentq(fn, problem.lower, problem.upper, xtol=1e-15, rtol=1e-15)
    return arrived(problem._replace(root=found), x, dtype)


@true_claim.register(Minimum)
@true_claim.register(Bounded)
@true_claim.register(Composite)
@true_claim.register(Constrained)
def _(problem: Any, x: Any, dtype: torch.dtype) -> bool:
    """The point is stationary up to rounding, or a further descent gains no more than `arrived` allows."""
    x = as_float64(x)
    if not feasible(problem, x, dtype):
        return False
    x = projection_of(problem)(x)
    if is_stationary(problem, x, dtype):
        return True
    best = value_of(problem, descended(problem, x))
    return value_of(problem, x) - best <= allowed(problem._replace(value=best), x, dtype)


def polished_root(fn: Function, x: Array) -> Array:
    """The best that SciPy's two methods of MINPACK reach from here."""

    def at(x: Array) -> Array:
        return np.nan_to_num(fn(torch.tensor(x)).numpy(), nan=1e300, posinf=1e300, neginf=-1e300)

    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ends = [x, *(root(at, x, jac=partial(_finite_jacobian, fn), method=m, tol=1e-15).x for m in ("hybr", "lm"))]
    return min(ends, key=lambda end: np.nan_to_num(norm_at(fn, end), nan=np.inf))


def _finite_jacobian(fn: Function, x: Array) -> Array:
    return np.nan_to_num(jacobian(fn, x), posinf=1e300, neginf=-1e300)


def is_multiple(fn: Function, end: Array, x: Array) -> bool:
    """Whether the Jacobian at a root does not tell the residual at `x`, as near a root of a higher multiplicity."""
    residual = fn(torch.tensor(x)).numpy()
    return bool(np.linalg.norm(residual - jacobian(fn, end) @ (x - end)) > 0.3 * np.linalg.norm(residual))


def step(problem: Any, x: Array, slope: Array, size: float = 1.0) -> Array:
    """The proximal or projected gradient step."""
    if isinstance(problem, Composite):
        return problem.prox(x - size * slope, size)
    return projection_of(problem)(x - size * slope)


def is_stationary(problem: Any, x: Array, dtype: torch.dtype) -> bool:
    """Whether the step of size 1 moves no further than with a gradient that differs by its rounding."""
    _, slope = value_and_gradient(problem.objective, x)
    noise = 8 * eps(dtype) * np.abs(jacobian(grad(problem.objective), x)) @ np.abs(x)
    return bool((np.abs(step(problem, x, slope) - x) <= 2 * noise + 8 * eps(dtype) * np.abs(x)).all())


def descended(problem: Any, x: Array) -> Array:
    """Where a descent ends that begins at `x`: L-BFGS-B between bounds, SciPy's trust region without, else FISTA."""
    fn = partial(value_and_gradient, problem.objective)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(problem, (Minimum, Bounded)):
            free = isinstance(problem, Minimum)
            bounds = Bounds(-np.inf, np.inf) if free else Bounds(problem.lower, problem.upper)
            found = minimize(
                fn, x, jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 0, "gtol": 0, "maxiter": 5_000}
            ).x
        else:
            found = accelerated(problem, x)
    return min((x, found), key=lambda end: np.nan_to_num(value_of(problem, end), nan=np.inf))


def accelerated(problem: Any, x: Array, iterations: int = 3_000) -> Array:
    """FISTA with restarts, and the step size of the largest curvature at `x`: the objectives are quadratic."""
    size = 1 / max(np.linalg.norm(jacobian(grad(problem.objective), x), 2), 1e-12)
    ahead, t = x, 1.0
    for _ in range(iterations):
        new = step(problem, ahead, value_and_gradient(problem.objective, ahead)[1], size)
        if np.abs(new - x).max() <= 1e-15 * np.abs(new).max():
            return new
        t = 1.0 if (ahead - new) @ (new - x) > 0 else t
        following = (1 + (1 + 4 * t**2) ** 0.5) / 2
        ahead, x, t = new + (t - 1) / following * (new - x), new, following
    return x
