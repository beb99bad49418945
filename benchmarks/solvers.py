"""What a solver costs against those of JAXopt, Optimistix and SciPy, and OSQP: the time to the same residual.

Each solves one problem of 1000 unknowns, and 1000 problems of 20 in one vmapped call, in float64, on one thread. The
residual is computed here, the same for all, and whoever does not reach it is not timed. JAX compiles beforehand. All
take turns; times are medians of process time, and what counts are the ratios.

    python benchmarks/solvers.py [--save] [row ...]

With ``--save`` the results go to ``benchmarks/solvers.json``. Libraries that are missing are left out, and named.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import _report
import numpy as np
import scipy.optimize as so
import torch
from measure import quartiles
from scipy import sparse as matrices
from scipy.special import softmax
from torch.func import grad, vmap

from implicitdiff import prox, sgd, solvers

jax, jaxopt, optimistix, lineax, osqp = map(_report.library, ("jax", "jaxopt", "optimistix", "lineax", "osqp"))

Array = np.ndarray
Data = tuple[Array, ...]
Solve = Callable[..., tuple[Any, Any]]
"""``solve(problem, tol, x0, *data) -> (solution, iterations)``"""
RESULTS = Path(__file__).with_name("solvers.json")
UNKNOWNS, LANES, LANE_UNKNOWNS, TURNS = 1000, 1000, 20, 5
STRENGTH = 0.1
GRADIENT_TARGET = 1e-5
"""The relative error of a gradient; the solution's target is that of its problem."""
LONG = 8.0
"""What takes more seconds than this is not measured again."""
DIRECT = ("SciPy", "OSQP")
HEAD = (
    "| solver | iterations, median/max | residual | ms | peer | its ms | ours/peer | before | SciPy or OSQP, ms |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


class Problem(NamedTuple):
    """``fn(x, *data)`` takes arrays of any library; ``residual(x, *data)`` those of NumPy, with lanes in front.

    Its norm has to be below `target`. `slope` is what SciPy needs. Alone it has `unknowns`, unless these are 0.
    """

    make: Callable[[np.random.Generator, int], Data]
    fn: Callable[..., Any]
    residual: Callable[..., Array]
    target: float = 1e-8
    start: Callable[[int], Array] = np.zeros
    slope: Callable[..., Array] | None = None
    unknowns: int = UNKNOWNS


class Row(NamedTuple):
    """``ours(fn, **options)`` is our solver; ``gradient`` the position among the data and the derivative there.

    The peers are compiled and batched by JAX; what is called as it is, with one problem, is in ``direct``.
    """

    name: str
    problem: Problem
    ours: Callable[..., Any]
    peers: list[tuple[str, Solve]]
    direct: tuple[str, Solve] | None = None
    gradient: tuple[int, Callable[..., Array]] | None = None
    batched: bool = True


# --- problems ---------------------------------------------------------------------------------------------------------


def times(a: Array, x: Array) -> Array:
    return (a @ x[..., None])[..., 0]


def library(x: Any) -> Any:
    # It does not name JAX: what our functions name is looked through, and JAX is large.
    return torch if isinstance(x, torch.Tensor) else x.__array_namespace__()


def contraction(rng: np.random.Generator, n: int) -> Data:
    w = rng.standard_normal((n, n))
    return 0.9 * (w + w.T) / np.linalg.norm(w + w.T, 2), 0.1 * rng.standard_normal(n)


def contraction_gradient(x: Array, w: Array, b: Array) -> Array:
    slope = 1 - np.tanh(times(w, x) + b) ** 2
    system = np.eye(x.shape[-1]) - (slope[..., None] * w).mT
    return slope * np.linalg.solve(system, np.ones_like(x)[..., None])[..., 0]


def equations(scale: float, rng: np.random.Generator, n: int) -> Data:
    w = rng.standard_normal((n, n))
    return w / np.linalg.norm(w, 2), scale * rng.standard_normal(n)


def logistic(penalty: float, rng: np.random.Generator, n: int, rows: int = 0) -> Data:
    x = rng.standard_normal((rows or 2 * n, n))
    noisy = x @ rng.standard_normal(n) / np.sqrt(n) + 0.5 * rng.standard_normal(len(x))
    return x, np.where(noisy > 0, 1.0, -1.0), np.full(n, penalty)


def logistic_loss(w: Any, x: Any, y: Any, penalty: Any) -> Any:
    z = y * (x @ w)
    loss = -torch.nn.functional.logsigmoid(z) if library(w) is torch else library(w).logaddexp(-z, 0.0)
    return loss.mean() + 0.5 * (penalty * w * w).sum()


def logistic_slope(w: Array, x: Array, y: Array, penalty: Array) -> Array:
    return times(x.mT, -y / (1 + np.exp(y * times(x, w)))) / y.shape[-1] + penalty * w


def logistic_gradient(w: Array, x: Array, y: Array, penalty: Array) -> Array:
    half = 1 / (1 + np.exp(y * times(x, w)))
    curvature = half * (1 - half) / y.shape[-1]
    hessian = x.mT @ (curvature[..., None] * x) + penalty[..., None] * np.eye(w.shape[-1])
    return -w * np.linalg.solve(hessian, np.ones_like(w)[..., None])[..., 0]


def exponentials(rng: np.random.Generator, n: int) -> Data:
    a = rng.standard_normal((2 * n, n)) / np.sqrt(n)
    return a, np.exp(0.3 * a @ rng.standard_normal(n)) + 0.01 * rng.standard_normal(2 * n)


def exponentials_slope(x: Array, a: Array, y: Array) -> Array:
    e = np.exp(0.3 * times(a, x))
    return 0.3 * times(a.mT, e * (e - y))


def quadratic(linear: float, rng: np.random.Generator, n: int) -> Data:
    m = rng.standard_normal((n, n))
    return m @ m.T / n + 0.1 * np.eye(n), linear * rng.standard_normal(n)


def sparse(rng: np.random.Generator, n: int) -> Data:
    x = rng.standard_normal((2 * n, n))
    w = rng.standard_normal(n) * (rng.random(n) < 0.1)
    return x, x @ w + 0.1 * rng.standard_normal(2 * n)


def lasso_residual(w: Array, x: Array, y: Array) -> Array:
    v = w - times(x.mT, times(x, w) - y) / y.shape[-1]
    return w - np.sign(v) * np.maximum(np.abs(v) - STRENGTH, 0)


def program(rng: np.random.Generator, n: int) -> Data:
    q, c = quadratic(1.0, rng, n)
    x = rng.standard_normal(n)
    a = rng.standard_normal((n // 4, n)) / np.sqrt(n)
    g = rng.standard_normal((3 * n // 4, n)) / np.sqrt(n)
    return q, c, a, a @ x, g, g @ x + rng.random(len(g)) * (rng.random(len(g)) < 0.7)


def program_residual(solution: Data, q: Array, c: Array, a: Array, b: Array, g: Array, h: Array) -> Array:
    x, nu, mu = solution
    slope = times(q, x) + c + times(a.mT, nu) + times(g.mT, mu)
    return np.concatenate([slope, times(a, x) - b, np.minimum(mu, h - times(g, x))], axis=-1)


def program_gradient(solution: Data, *data: Array) -> Array:
    if data[0].ndim == 3:
        return np.stack([program_gradient(lane[:3], *lane[3:]) for lane in zip(*solution, *data, strict=True)])
    (x, _, mu), (q, _, a, _, g, h) = solution, data
    active = np.concatenate([a, g[mu > h - g @ x]])
    system = np.block([[q, active.T], [active, np.zeros((len(active), len(active)))]])
    return -np.linalg.solve(system, np.arange(len(system)) < len(x))[: len(x)]


CONTRACTION = Problem(
    contraction, lambda x, w, b: library(x).tanh(w @ x + b), lambda x, w, b: np.tanh(times(w, x) + b) - x
)
EQUATIONS = Problem(
    partial(equations, 0.5),
    lambda x, w, b: x + 0.1 * x**3 + 0.5 * (w @ x) - b,
    lambda x, w, b: x + 0.1 * x**3 + 0.5 * times(w, x) - b,
    slope=lambda x, w, b: np.diag(1 + 0.3 * x**2) + 0.5 * w,
)
# With one Jacobian for all iterations some lanes of the above diverge, whoever iterates.
MILDER = EQUATIONS._replace(make=partial(equations, 0.2))
SCALARS = Problem(
    lambda rng, n: (rng.uniform(-100.0, 100.0),),
    lambda x, theta: x**3 + x - theta,
    lambda x, theta: (x**3 + x - theta)[..., None],
    start=lambda n: np.ones(()),
    unknowns=0,
)
LOGISTIC = Problem(partial(logistic, 1e-3), logistic_loss, logistic_slope, slope=logistic_slope)
STRONGER = LOGISTIC._replace(make=partial(logistic, 1e-2), target=1e-6)
EXPONENTIALS = Problem(
    exponentials,
    lambda x, a, y: library(x).exp(0.3 * (a @ x)) - y,
    exponentials_slope,
    slope=lambda x, a, y: 0.3 * np.exp(0.3 * (a @ x))[:, None] * a,
    unknowns=400,
)
BOX = Problem(
    partial(quadratic, 1.0),
    lambda x, q, c: 0.5 * (x @ (q @ x)) + c @ x,
    lambda x, q, c: x - np.clip(x - times(q, x) - c, 0.0, 1.0),
    target=1e-6,
    slope=lambda x, q, c: q @ x + c,
)
SIMPLEX = BOX._replace(
    make=partial(quadratic, 0.1),
    residual=lambda x, q, c: x - softmax(np.log(x) - times(q, x) - c, axis=-1),
    start=lambda n: np.full(n, 1.0 / n),
)
LASSO = Problem(sparse, lambda w, x, y: 0.5 * ((x @ w - y) ** 2).mean(), lasso_residual, target=1e-6)
PROGRAM = Problem(program, lambda x: x, program_residual, target=1e-6, unknowns=200)

# --- peers ------------------------------------------------------------------------------------------------------------


def linear() -> dict[str, Any]:
    """Of the gradient: the default's tolerance is too loose for the target."""
    return {"implicit_diff_solve": partial(jaxopt.linear_solve.solve_normal_cg, tol=1e-10)}


def from_jaxopt(name: str, hyper: Any = (), maxiter: int = 2000, **options: Any) -> tuple[str, Solve]:
    """`hyper` is what projections and proximal operators take, in a tuple."""

    def solve(problem: Problem, tol: Any, x0: Any, *data: Any) -> tuple[Any, Any]:
        solver = getattr(jaxopt, name)(problem.fn, maxiter=maxiter, tol=tol, **linear() | options)
        params, state = solver.run(x0, *hyper, *data)
        return params, state.iter_num

    return f"jaxopt.{name}", solve


def from_optimistix(entry: str, name: str, max_steps: int = 1000, **options: Any) -> tuple[str, Solve]:
    def solve(problem: Problem, tol: Any, x0: Any, *data: Any) -> tuple[Any, Any]:
        solver = getattr(optimistix, name)(tol, tol, **({} if options else {"norm": optimistix.two_norm}))
        return optimistic(entry, solver, problem.fn, x0, data, max_steps, options=options)

    return f"optimistix.{name}", solve


def optimistic(
    entry: str, solver: Any, fn: Callable[..., Any], x0: Any, data: Any, max_steps: int = 1000, **options: Any
) -> tuple[Any, Any]:
    run = getattr(optimistix, entry)
    found = run(lambda y, data: fn(y, *data), solver, x0, data, max_steps=max_steps, throw=False, **options)
    return found.value, found.stats["num_steps"]


def newton_on_slope(problem: Problem, tol: Any, x0: Any, *data: Any) -> tuple[Any, Any]:
    """Neither library has Newton-CG; this is the nearest."""
    solver = optimistix.Newton(tol, tol, norm=optimistix.two_norm, linear_solver=lineax.CG(1e-6, 1e-6))
    tags = frozenset([lineax.positive_semidefinite_tag])
    return optimistic("root_find", solver, jax.grad(problem.fn), x0, data, tags=tags)


def broyden_on_step(problem: Problem, tol: Any, x0: Any, *data: Any) -> tuple[Any, Any]:
    _, solve = from_jaxopt("Broyden", maxiter=200)
    return solve(problem._replace(fn=lambda x, *data: x - problem.fn(x, *data)), tol, x0, *data)


def lbfgsb(problem: Problem, tol: Any, x0: Any, *data: Any) -> tuple[Any, Any]:
    solver = jaxopt.LBFGSB(problem.fn, maxiter=2000, tol=tol, **linear())
    bounds = jax.numpy.zeros_like(x0), jax.numpy.ones_like(x0)
    found, state = solver.run(x0, bounds, *data)
    return found, state.iter_num


def jaxopt_osqp(problem: Problem, tol: Any, x0: Any, q: Any, c: Any, a: Any, b: Any, g: Any, h: Any) -> tuple[Any, Any]:
    solver = jaxopt.OSQP(tol=tol, maxiter=10_000, eq_qp_solve="lu", **linear())
    found, state = solver.run(params_obj=(q, c), params_eq=(a, b), params_ineq=(g, h))
    return (found.primal, found.dual_eq, found.dual_ineq), state.iter_num


def mirror_step(x: Any, slope: Any, stepsize: Any, _: Any) -> Any:
    return jax.nn.softmax(jax.numpy.log(x) - stepsize * slope)


def minimised(method: str, bounds: Any = None, **options: Any) -> tuple[str, Solve]:
    def solve(problem: Problem, tol: float, x0: Array, *data: Array) -> tuple[Array, int]:
        how = {"gtol": tol, **options}
        found = so.minimize(problem.fn, x0, data, method, problem.slope, bounds=bounds, options=how)
        return found.x, found.nit

    return "SciPy", solve


def rooted(method: Callable[..., Array]) -> tuple[str, Solve]:
    def solve(problem: Problem, tol: float, x0: Array, *data: Array) -> tuple[Array, int]:
        return method(lambda x: problem.residual(x, *data), x0, f_tol=tol, maxiter=10**4), 0

    return "SciPy", solve


def iterated(problem: Problem, tol: float, x0: Array, *data: Array) -> tuple[Array, int]:
    return so.fixed_point(problem.fn, x0, data, tol, 10**4, "iteration"), 0


def hybrid(problem: Problem, tol: float, x0: Array, *data: Array) -> tuple[Array, int]:
    found = so.root(problem.fn, x0, data, "hybr", problem.slope, tol)
    return found.x, found.nfev


def squared(method: str) -> tuple[str, Solve]:
    def solve(problem: Problem, tol: float, x0: Array, *data: Array) -> tuple[Array, int]:
        how = {"ftol": None, "xtol": np.finfo(float).eps, "gtol": tol}
        found = so.least_squares(problem.fn, x0, problem.slope, method=method, args=data, **how)
        return found.x, found.nfev

    return "SciPy", solve


def osqp_itself(
    problem: Problem, tol: float, x0: Array, q: Array, c: Array, a: Array, b: Array, g: Array, h: Array
) -> tuple[Data, int]:
    """From dense arrays, as the others."""
    solver, rows = osqp.OSQP(), matrices.csc_matrix(np.concatenate([a, g]))
    lower, upper = np.concatenate([b, np.full_like(h, -np.inf)]), np.concatenate([b, h])
    how = {"eps_abs": tol, "eps_rel": 0.0, "max_iter": 100_000, "polishing": True, "verbose": False}
    solver.setup(matrices.csc_matrix(np.triu(q)), c, rows, lower, upper, **how)
    found = solver.solve(raise_error=False)
    return (found.x, found.y[: len(b)], found.y[len(b) :]), found.info.iter


class OurQP(NamedTuple):
    """`qp` as a solver with an initial guess that is ignored."""

    run: Callable[..., Any]


def our_qp(_: Any, **options: Any) -> OurQP:
    return OurQP(lambda x0, *data: solvers.qp(**options).run(None, *data))


# --- rows -------------------------------------------------------------------------------------------------------------

BRACKET = {"lower": -10.0, "upper": 10.0}
NO_FTOL = {"ftol": 0.0, "maxfun": 10**6, "maxiter": 10**5}
# fmt: off
ROWS = [
    Row("fixed_point_iteration", CONTRACTION, solvers.fixed_point_iteration,
        [from_jaxopt("FixedPointIteration"), from_optimistix("fixed_point", "FixedPointIteration")],
        ("SciPy", iterated)),
    Row("anderson", CONTRACTION, solvers.anderson, [from_jaxopt("AndersonAcceleration", ridge=1e-12)],
        rooted(so.anderson), (1, contraction_gradient)),
    Row("broyden", CONTRACTION, solvers.broyden, [("jaxopt.Broyden", broyden_on_step)], rooted(so.broyden1)),
    Row("newton", EQUATIONS, solvers.newton, [from_optimistix("root_find", "Newton")], ("SciPy", hybrid)),
    Row("chord", MILDER, solvers.chord, [from_optimistix("root_find", "Chord")]),
    Row("broyden_root", EQUATIONS, solvers.broyden_root, [from_jaxopt("Broyden", maxiter=200)], rooted(so.broyden1)),
    Row("dogleg_root", EQUATIONS, solvers.dogleg_root, [from_optimistix("root_find", "Dogleg")], ("SciPy", hybrid)),
    Row("scipy_root", EQUATIONS, solvers.scipy_root, [], ("SciPy", hybrid), batched=False),
    Row("bisection", SCALARS, partial(solvers.bisection, **BRACKET),
        [from_jaxopt("Bisection", check_bracket=False, **BRACKET),
         from_optimistix("root_find", "Bisection", **BRACKET)]),
    Row("gradient_descent", STRONGER, solvers.gradient_descent, [from_jaxopt("GradientDescent")]),
    Row("lbfgs", LOGISTIC, solvers.lbfgs,
        [from_jaxopt("LBFGS", linesearch="zoom"), from_optimistix("minimise", "LBFGS")],
        minimised("L-BFGS-B", **NO_FTOL), (2, logistic_gradient)),
    Row("nonlinear_cg", LOGISTIC, solvers.nonlinear_cg, [from_jaxopt("NonlinearCG", max_stepsize=100.0)],
        minimised("CG")),
    Row("newton_cg", LOGISTIC, solvers.newton_cg, [("optimistix.Newton, CG", newton_on_slope)]),
    Row("from_optimizer", STRONGER, partial(solvers.from_optimizer, transformation=sgd(1.0, momentum=0.9)), []),
    Row("gauss_newton", EXPONENTIALS, solvers.gauss_newton,
        [from_jaxopt("GaussNewton", maxiter=50), from_optimistix("least_squares", "GaussNewton")]),
    Row("levenberg_marquardt", EXPONENTIALS, solvers.levenberg_marquardt,
        [from_jaxopt("LevenbergMarquardt", maxiter=50, solver="cholesky", materialize_jac=True),
         from_optimistix("least_squares", "LevenbergMarquardt")]),
    # In a few lanes Optimistix refuses every step from the solution, up to its limit.
    Row("dogleg", EXPONENTIALS, solvers.dogleg, [from_optimistix("least_squares", "Dogleg", max_steps=20)],
        squared("dogbox")),
    Row("scipy_least_squares", EXPONENTIALS, solvers.scipy_least_squares, [], squared("trf"), batched=False),
    Row("projected_gradient", BOX, partial(solvers.projected_gradient, projection=lambda v: v.clamp(0.0, 1.0)),
        [from_jaxopt("ProjectedGradient", (None,), projection=lambda v, _: jax.numpy.clip(v, 0.0, 1.0))],
        minimised("L-BFGS-B", so.Bounds(0.0, 1.0), **NO_FTOL)),
    Row("lbfgs_b", BOX, partial(solvers.lbfgs_b, bounds=(0.0, 1.0)), [("jaxopt.LBFGSB", lbfgsb)],
        minimised("L-BFGS-B", so.Bounds(0.0, 1.0), **NO_FTOL)),
    Row("proximal_gradient", LASSO, partial(solvers.proximal_gradient, prox=lambda v, s: prox.lasso(v, STRENGTH * s)),
        [from_jaxopt("ProximalGradient", (STRENGTH,), prox=lambda *v: jaxopt.prox.prox_lasso(*v))]),
    Row("mirror_descent", SIMPLEX, solvers.mirror_descent,
        [from_jaxopt("MirrorDescent", (None,), 10_000, projection_grad=mirror_step, stepsize=1.0)]),
    Row("scipy_minimize", LOGISTIC, partial(solvers.scipy_minimize, method="L-BFGS-B", scipy_options={"ftol": 0.0}), [],
        minimised("L-BFGS-B", **NO_FTOL), batched=False),
    Row("qp", PROGRAM, our_qp, [("jaxopt.OSQP", jaxopt_osqp)], direct=("OSQP", osqp_itself),
        gradient=(1, program_gradient)),
]
# fmt: on

# --- measuring --------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """Something to time: the largest residual of all lanes, and the seconds of the call that led to it."""

    call: Callable[[], Any]
    tol: float
    solution: Any
    iterations: Array
    residual: float
    seconds: float


def entry(run: Callable[[float], Any], tol: float, residual: Callable[[Any], Array]) -> Entry:
    began = time.process_time()
    solution, iterations = run(tol)
    seconds = time.process_time() - began
    solution = tuple(map(np.asarray, solution)) if isinstance(solution, tuple) else np.asarray(solution)
    norms = np.linalg.norm(residual(solution), axis=-1)
    worst = float(np.nan_to_num(norms, nan=np.inf).max())
    return Entry(partial(run, tol), tol, solution, np.asarray(iterations), worst, seconds)


def stricter(run: Callable[[float], Any], tol: float, target: float, residual: Callable[[Any], Array]) -> Entry:
    """With a stricter tolerance where the target is not reached: a peer's own test may measure another thing."""
    for factor in (1.0, 0.1, 0.01):
        found = entry(run, factor * tol, residual)
        if found.residual <= target or found.seconds > LONG:
            break
    return found


def compiled(
    solve: Callable[..., Any], operands: Data, batch: bool, shared: Collection[int] = ()
) -> Callable[[float], Any]:
    """``run(tol)``; the operands at the positions `shared` are the same for all lanes."""
    axes = (None, *(None if i in shared else 0 for i in range(len(operands))))
    fn = jax.vmap(solve, axes) if batch else solve
    values = [jax.numpy.asarray(v) for v in operands]
    run = jax.jit(fn).lower(jax.numpy.float64(1.0), *values).compile()
    return lambda tol: jax.block_until_ready(run(jax.numpy.float64(tol), *values))


def ours(row: Row) -> Callable[..., Any]:
    def run(tol: float, *operands: Any) -> tuple[Any, Any]:
        solution, state = row.ours(row.problem.fn, rtol=0.0, atol=tol, on_failure="ignore").run(*operands)
        return solution, state.iter_num

    return run


def batched(run: Callable[..., Any], operands: Data, batch: bool) -> Callable[[float], Any]:
    tensors = [torch.as_tensor(v) for v in operands]
    return lambda tol: (vmap(partial(run, tol)) if batch else partial(run, tol))(*tensors)


def differentiated(grad: Callable[..., Any], run: Callable[..., Any], at: int) -> Callable[..., Any]:
    """The gradient of the sum of the solution, and the iterations."""

    def value(theta: Any, tol: Any, *operands: Any) -> tuple[Any, Any]:
        solution, iterations = run(tol, *operands[:at], theta, *operands[at + 1 :])
        return (solution[0] if isinstance(solution, tuple) else solution).sum(), iterations

    return lambda tol, *operands: grad(value, has_aux=True)(operands[at], tol, *operands)


def in_turns(entries: dict[str, Entry], target: float) -> dict[str, list[float]]:
    """The quartiles of the milliseconds of those that reached the target."""
    # Rounding differs a little between the residual here and the one that a solver looked at.
    reached = {name: found for name, found in entries.items() if found.residual <= 1.01 * target}
    short = {name: found for name, found in reached.items() if found.seconds <= LONG}
    calls = {name: max(1, min(20, int(0.02 / found.seconds))) for name, found in short.items()}
    times = quartiles({name: found.call for name, found in short.items()}, calls, TURNS)
    return _report.rounded({name: times.get(name, [1e3 * found.seconds] * 3) for name, found in reached.items()})


def show(name: str, found: dict[str, Entry], target: float, before: dict[str, list[float]]) -> dict[str, Any]:
    """Time the entries, print ours beside the peer, one more row for each further peer, and return the results."""
    ms, first = in_turns(found, target), found["implicitdiff"]
    middle, most = float(np.median(first.iterations)), int(first.iterations.max())
    left = f"{name} | {middle:.0f}/{most} | {first.residual:.0e} | {cell('implicitdiff', found, ms)}"
    right = next((f"{cell(direct, found, ms)} {direct}" for direct in DIRECT if direct in found), "")
    for peer in [peer for peer in found if peer not in ("implicitdiff", *DIRECT)] or [""]:
        print(f"| {left} | {peer} | {cell(peer, found, ms)} | {ratio(peer, ms)} | {ratio(peer, before)} | {right} |")
        left, right = " | | | ", ""
    missed = {peer: float(f"{e.residual:.1e}") for peer, e in found.items() if peer not in ms}
    return {"iterations": [middle, most], "residual": float(f"{first.residual:.1e}"), "ms": ms, "missed": missed}


def cell(name: str, found: dict[str, Entry], ms: dict[str, list[float]]) -> str:
    return f"{ms[name][1]:.3g}" if name in ms else f"missed: {found[name].residual:.1e}" if name in found else ""


def ratio(name: str, ms: dict[str, list[float]]) -> str:
    return f"{ms['implicitdiff'][1] / ms[name][1]:.2f}" if {name, "implicitdiff"} <= ms.keys() else ""


def instance(problem: Problem, n: int, lanes: int = 0) -> Data:
    """The initial guess and the data, of one problem if there are no lanes."""
    rng = np.random.default_rng(0)
    problems = [(problem.start(n), *problem.make(rng, n)) for _ in range(lanes or 1)]
    return tuple(map(np.stack, zip(*problems, strict=True))) if lanes else problems[0]


def measure(row: Row, batch: bool, before: _report.Rows) -> _report.Rows:
    """Of the row, and of its gradient if it has one."""
    problem, target = row.problem, row.problem.target
    size = LANE_UNKNOWNS if batch else problem.unknowns
    operands = instance(problem, size, LANES if batch else 0)

    def residual(solution: Any) -> Array:
        return problem.residual(solution, *operands[1:])

    found = {"implicitdiff": stricter(batched(ours(row), operands, batch), target, target, residual)}
    there = {name: partial(solve, problem) for name, solve in row.peers if is_there(name)}
    for name, solve in there.items():
        found[name] = stricter(compiled(solve, operands, batch), target, target, residual)
    if row.direct and not batch and is_there(row.direct[0]):
        name, solve = row.direct
        found[name] = stricter(lambda tol: solve(problem, tol, *operands), target, target, residual)
    title = row.name if batch or size == UNKNOWNS else f"{row.name}, {size} unknowns"
    key = f"{row.name}, batch" if batch else row.name
    results = {key: show(title, found, target, before.get(key, {}).get("ms", {}))}
    if row.gradient is not None:
        reached = {name: (there[name], found[name].tol) for name in there if found[name].residual <= target}
        entries = gradients(row, operands, batch, found["implicitdiff"].solution, reached)
        key, title = f"{row.name}, gradient{', batch' * batch}", f"{title}, gradient"
        results[key] = show(title, entries, GRADIENT_TARGET, before.get(key, {}).get("ms", {}))
    return {key: {"batch": batch, "unknowns": size} | result for key, result in results.items()}


def is_there(name: str) -> bool:
    return name.lower().split(".")[0] not in _report.MISSING


def gradients(row: Row, operands: Data, batch: bool, solution: Any, peers: dict[str, Any]) -> dict[str, Entry]:
    """The residual is the relative error of the gradient; a peer solves to the tolerance that it needed before."""
    at, exact = 1 + row.gradient[0], row.gradient[1](solution, *operands[1:])

    def error(gradient: Array) -> Array:
        return (gradient - exact) / np.linalg.norm(exact, axis=-1, keepdims=True)

    run = batched(differentiated(grad, ours(row), at), operands, batch)
    found = {"implicitdiff": entry(run, row.problem.target, error)}
    for name, (solve, tol) in peers.items():
        run = compiled(differentiated(jax.grad, solve, at), operands, batch)
        found[name] = stricter(run, tol, GRADIENT_TARGET, error)
    return found


def main() -> None:
    names = [row.name for row in ROWS]
    parser = _report.arguments(__doc__, names, RESULTS)
    options = parser.parse_args()
    chosen = _report.chosen(parser, options.rows, names)
    _report.keep_threads()
    before, results = _report.kept(RESULTS), {}
    for batch in (False, True):
        size = f"{LANES} problems of {LANE_UNKNOWNS} unknowns" if batch else f"One problem of {UNKNOWNS} unknowns"
        print(f"\n{size}\n\n{HEAD}")
        for row in ROWS:
            if row.name in chosen and (row.batched if batch else row.problem.unknowns):
                results |= measure(row, batch, before)
    if options.save:
        _report.save(RESULTS, results, names)


if __name__ == "__main__":
    main()
