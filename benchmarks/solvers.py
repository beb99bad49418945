"""What a solver costs against those of JAXopt, Optimistix and SciPy: the time to the same residual.

Each solves one problem of 1000 unknowns, and 1000 problems of 20 in one vmapped call, in float64, on one thread. The
residual is computed here, the same for all, and whoever does not reach it is not timed. JAX compiles beforehand. All
take turns; times are medians, and what counts are the ratios.

    python benchmarks/solvers.py [name ...]

Without JAX, JAXopt and Optimistix it measures what is there, and says what is missing.
"""

from __future__ import annotations

import os

# Before the libraries read them.
os.environ |= {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import importlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize as so
import torch
from scipy.special import softmax
from torch.func import grad, vmap

from implicitdiff import prox, sgd, solvers

MISSING = []


def peer(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        MISSING.append(name)
        return None


jax, jaxopt, optimistix, lineax = map(peer, ("jax", "jaxopt", "optimistix", "lineax"))

Array = np.ndarray
Data = tuple[Array, ...]
Solve = Callable[..., tuple[Any, Any]]
"""``solve(problem, tol, x0, *data) -> (solution, iterations)``"""
UNKNOWNS, LANES, LANE_UNKNOWNS, TURNS = 1000, 1000, 20, 3
STRENGTH = 0.1
GRADIENT_TARGET = 1e-5
"""The relative error of a gradient; the solution's target is that of its problem."""
LONG = 8.0
"""What takes more seconds than this is not measured again."""
HEAD = (
    "| solver | iterations, median/max | residual | ms | peer | its ms | ours/peer | SciPy ms |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
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
    """``ours(fn, **options)`` is our solver; ``gradient`` the position among the data and the derivative there."""

    name: str
    problem: Problem
    ours: Callable[..., Any]
    peers: list[tuple[str, Solve]]
    scipy: Solve | None = None
    gradient: tuple[int, Callable[..., Array]] | None = None
    batched: bool = True


# --- problems ---------------------------------------------------------------------------------------------------------


def times(a: Array, x: Array) -> Array:
    return (a @ x[..., None])[..., 0]


def library(x: Any) -> Any:
    return torch if isinstance(x, torch.Tensor) else np if isinstance(x, Array) else jax.numpy


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


def logistic(penalty: float, rng: np.random.Generator, n: int) -> Data:
    x = rng.standard_normal((2 * n, n))
    noisy = x @ rng.standard_normal(n) / np.sqrt(n) + 0.5 * rng.standard_normal(2 * n)
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
    exponentials, lambda x, a, y: library(x).exp(0.3 * (a @ x)) - y, exponentials_slope, unknowns=400
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
        solver = getattr(jaxopt, name)(problem.fn, maxiter=maxiter, tol=tol, **linear(), **options)
        params, state = solver.run(x0, *hyper, *data)
        return params, state.iter_num

    return f"jaxopt.{name}", solve


def from_optimistix(entry: str, name: str, **options: Any) -> tuple[str, Solve]:
    def solve(problem: Problem, tol: Any, x0: Any, *data: Any) -> tuple[Any, Any]:
        norm = {} if options else {"norm": optimistix.two_norm}
        return optimistic(entry, getattr(optimistix, name)(tol, tol, **norm), problem.fn, x0, data, options=options)

    return f"optimistix.{name}", solve


def optimistic(entry: str, solver: Any, fn: Callable[..., Any], x0: Any, data: Any, **options: Any) -> tuple[Any, Any]:
    run = getattr(optimistix, entry)
    found = run(lambda y, data: fn(y, *data), solver, x0, data, max_steps=1000, throw=False, **options)
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


def osqp(problem: Problem, tol: Any, x0: Any, q: Any, c: Any, a: Any, b: Any, g: Any, h: Any) -> tuple[Any, Any]:
    solver = jaxopt.OSQP(tol=tol, maxiter=10_000, eq_qp_solve="lu", **linear())
    found, state = solver.run(params_obj=(q, c), params_eq=(a, b), params_ineq=(g, h))
    return (found.primal, found.dual_eq, found.dual_ineq), state.iter_num


def mirror_step(x: Any, slope: Any, stepsize: Any, _: Any) -> Any:
    return jax.nn.softmax(jax.numpy.log(x) - stepsize * slope)


def minimised(method: str, bounds: Any = None, **options: Any) -> Solve:
    def solve(problem: Problem, tol: float, x0: Array, *data: Array) -> tuple[Array, int]:
        how = {"gtol": tol, **options}
        found = so.minimize(problem.fn, x0, data, method, problem.slope, bounds=bounds, options=how)
        return found.x, found.nit

    return solve


def rooted(method: Callable[..., Array]) -> Solve:
    def solve(problem: Problem, tol: float, x0: Array, *data: Array) -> tuple[Array, int]:
        return method(lambda x: problem.residual(x, *data), x0, f_tol=tol, maxiter=10**4), 0

    return solve


def hybrid(problem: Problem, tol: float, x0: Array, *data: Array) -> tuple[Array, int]:
    found = so.root(problem.fn, x0, data, "hybr", problem.slope, tol)
    return found.x, found.nfev


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
        lambda problem, tol, x0, *data: (so.fixed_point(problem.fn, x0, data, tol, 10**4, "iteration"), 0)),
    Row("anderson", CONTRACTION, solvers.anderson, [from_jaxopt("AndersonAcceleration", ridge=1e-12)],
        rooted(so.anderson), (1, contraction_gradient)),
    Row("broyden", CONTRACTION, solvers.broyden, [("jaxopt.Broyden", broyden_on_step)], rooted(so.broyden1)),
    Row("newton", EQUATIONS, solvers.newton, [from_optimistix("root_find", "Newton")], hybrid),
    Row("chord", MILDER, solvers.chord, [from_optimistix("root_find", "Chord")]),
    Row("broyden_root", EQUATIONS, solvers.broyden_root, [from_jaxopt("Broyden", maxiter=200)], rooted(so.broyden1)),
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
    Row("qp", PROGRAM, our_qp, [("jaxopt.OSQP", osqp)], gradient=(1, program_gradient)),
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
    began = time.perf_counter()
    solution, iterations = run(tol)
    seconds = time.perf_counter() - began
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


def compiled(solve: Callable[..., Any], operands: Data, batch: bool) -> Callable[[float], Any]:
    fn = jax.vmap(solve, in_axes=(None, *(0 for _ in operands))) if batch else solve
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


def in_turns(entries: list[Entry | None], target: float) -> list[float | None]:
    """Milliseconds. What ran before leaves the caches cold, so before a turn of a short call one is not counted."""
    times: list[list[float]] = [[found.seconds] if found and found.seconds > LONG else [] for found in entries]
    for _ in range(TURNS):
        for found, measured in zip(entries, times, strict=True):
            # Rounding differs a little between the residual here and the one that a solver looked at.
            if found and found.seconds <= LONG and found.residual <= 1.01 * target:
                measured.append(turn(found))
    return [1e3 * statistics.median(measured) if measured else None for measured in times]


def turn(found: Entry) -> float:
    calls = max(1, min(20, int(0.02 / found.seconds)))
    if found.seconds < 0.1:
        found.call()
    began = time.perf_counter()
    for _ in range(calls):
        found.call()
    return (time.perf_counter() - began) / calls


def show(name: str, first: Entry, peers: dict[str, Entry], scipy: Entry | None, target: float) -> None:
    """Print our row, and one more for each further peer."""
    own, direct, *theirs = in_turns([first, scipy, *peers.values()], target)
    counts = f"{np.median(first.iterations):.0f}/{first.iterations.max()}"
    left = f"{name} | {counts} | {first.residual:.0e} | {cell(own, first)}"
    for (peer, found), ms in zip(peers.items(), theirs, strict=True):
        ratio = f"{own / ms:.2f}" if own and ms else ""
        print(f"| {left} | {peer} | {cell(ms, found)} | {ratio} | {cell(direct, scipy)} |", flush=True)
        left, scipy = " | | | ", None
    if not peers:
        print(f"| {left} | | | | {cell(direct, scipy)} |", flush=True)


def cell(ms: float | None, found: Entry | None) -> str:
    return "" if found is None else f"missed: {found.residual:.0e}" if ms is None else f"{ms:.3g}"


def instance(problem: Problem, batch: bool) -> Data:
    """The initial guess and the data."""
    rng = np.random.default_rng(0)
    n = LANE_UNKNOWNS if batch else problem.unknowns
    lanes = [(problem.start(n), *problem.make(rng, n)) for _ in range(LANES if batch else 1)]
    return tuple(map(np.stack, zip(*lanes, strict=True))) if batch else lanes[0]


def measure(row: Row, batch: bool) -> None:
    problem, operands = row.problem, instance(row.problem, batch)
    target = problem.target

    def residual(solution: Any) -> Array:
        return problem.residual(solution, *operands[1:])

    first = stricter(batched(ours(row), operands, batch), target, target, residual)
    there = {name: partial(solve, problem) for name, solve in row.peers if name.split(".")[0] not in MISSING}
    peers = {
        name: stricter(compiled(solve, operands, batch), target, target, residual) for name, solve in there.items()
    }
    alone = row.scipy and not batch
    scipy = stricter(lambda tol: row.scipy(problem, tol, *operands), target, target, residual) if alone else None
    small = not batch and problem.unknowns < UNKNOWNS
    show(row.name + (f", {problem.unknowns} unknowns" if small else ""), first, peers, scipy, target)
    if row.gradient is not None:
        reached = {name: (there[name], found.tol) for name, found in peers.items() if found.residual <= target}
        measure_gradient(row, operands, batch, first.solution, reached)


def measure_gradient(row: Row, operands: Data, batch: bool, solution: Any, peers: dict[str, Any]) -> None:
    """The residual is the relative error of the gradient; a peer solves to the tolerance that it needed before."""
    at, exact = 1 + row.gradient[0], row.gradient[1](solution, *operands[1:])

    def error(gradient: Array) -> Array:
        return (gradient - exact) / np.linalg.norm(exact, axis=-1, keepdims=True)

    first = entry(batched(differentiated(grad, ours(row), at), operands, batch), row.problem.target, error)
    theirs = {}
    for name, (solve, tol) in peers.items():
        run = compiled(differentiated(jax.grad, solve, at), operands, batch)
        theirs[name] = stricter(run, tol, GRADIENT_TARGET, error)
    show(f"{row.name}, gradient", first, theirs, None, GRADIENT_TARGET)


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if jax is not None:
        jax.config.update("jax_enable_x64", True)
    if MISSING:
        print(f"not installed, and left out: {', '.join(MISSING)}")
    for batch in (False, True):
        size = f"{LANES} problems of {LANE_UNKNOWNS} unknowns" if batch else f"One problem of {UNKNOWNS} unknowns"
        print(f"\n{size}\n\n{HEAD}")
        for row in ROWS:
            if (not names or row.name in names) and (row.batched if batch else row.problem.unknowns):
                measure(row, batch)


if __name__ == "__main__":
    main(sys.argv[1:])
