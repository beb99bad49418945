"""The tables of calls of the library inside of functions that another call of it is given.

An `Inner` is a number that depends on ``(x, t)`` by way of the library, and the same number by a closed form. An
`Outer` solves a problem with such a number in it: ``x^3 + x - t = e(x, t) / 5``, or a minimum whose gradient has it.
What it returns is compared with Newton's method in plain torch on the closed form.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad

import implicitdiff as idf
import tables.solvers as searches
from implicitdiff import custom_fixed_point, custom_root, linear_solve, projections, prox, root_jvp, root_vjp, solvers
from implicitdiff.nn import ImplicitMetaGradientModule
from implicitdiff.solvers import KKTSolution, make_kkt_optimality_fn
from tables.linear_solvers import SOLVERS
from tables.solvers import SEARCHES

F64 = torch.float64
Scalar = Callable[[Tensor, Tensor], Tensor]
WEIGHTS = torch.tensor([0.5, -0.3, 0.4], dtype=F64)
EXACT = {"rtol": 1e-10, "atol": 1e-11}


class Inner(NamedTuple):
    name: str
    library: Scalar
    plain: Scalar

    def __str__(self) -> str:
        return self.name


class Outer(NamedTuple):
    """``solve(inner)`` is a function of t; ``reference(scalar)`` is the same in plain torch."""

    name: str
    solve: Callable[[Inner], Callable[[Tensor], Tensor]]
    reference: Callable[[Scalar], Callable[[Tensor], Tensor]]
    minimises: bool = False

    def __str__(self) -> str:
        return self.name


# --- inside -----------------------------------------------------------------------------------------------------------


def vector(x: Tensor, t: Tensor) -> Tensor:
    """Near THETA, where the closed forms of constrained problems hold."""
    return searches.THETA + 0.1 * torch.stack([x * t, x, torch.sin(t)])


def by_search(row: searches.Row) -> Inner:
    return Inner(
        row.name,
        lambda x, t: WEIGHTS @ row.solution(vector(x, t)),
        lambda x, t: WEIGHTS @ row.family.closed_form(vector(x, t)),
    )


def by_newtons_iterations(x: Tensor, t: Tensor) -> Tensor:
    theta = vector(x, t)
    guess = searches.rotated_cubic(theta).detach() + 0.01
    return WEIGHTS @ solvers.newton(searches.residual, **EXACT).run(guess, theta, implicit_diff=False)[0]


FOUR_STEPS = solvers.gradient_descent(
    searches.objective, stepsize=0.3, acceleration=False, maxiter=4, rtol=0.0, atol=0.0
)


def by_four_steps(x: Tensor, t: Tensor) -> Tensor:
    start, theta = vector(t, x), vector(x, t)
    return WEIGHTS @ FOUR_STEPS.run(start, theta, implicit_diff=False, checkpoint_every=2)[0]


def plain_four_steps(x: Tensor, t: Tensor) -> Tensor:
    u, theta = searches.ROTATION @ vector(t, x), vector(x, t)
    for _ in range(4):
        u = u - 0.3 * (u**3 + u - theta)
    return WEIGHTS @ (searches.ROTATION.T @ u)


def rotated(x: Tensor, t: Tensor) -> Tensor:
    return WEIGHTS @ searches.rotated_cubic(vector(x, t))


def matrix(x: Tensor, t: Tensor) -> Tensor:
    """Close to the identity, symmetric."""
    v = vector(x, t)
    return torch.eye(3, dtype=F64) + 0.3 * torch.outer(v, v)


def by_linear_solve(name: str, solve: Callable[..., Tensor]) -> Inner:
    def library(x: Tensor, t: Tensor) -> Tensor:
        a = matrix(x, t)
        return WEIGHTS @ solve(lambda v: a @ v, vector(t, x))

    return Inner(name, library, lambda x, t: WEIGHTS @ (torch.linalg.inv(matrix(x, t)) @ vector(t, x)))


def root_of_captured(x: Tensor, t: Tensor) -> Tensor:
    return custom_root(lambda u: u**3 + u - x - t)(lambda init: searches.cubic(x + t))(None)


@custom_root(lambda u, theta: u**3 + u - theta)
def root_of_argument(init, theta):
    return searches.cubic(theta)


@custom_fixed_point(lambda u, theta: theta / (1 + u**2))
def fixed_point(init, theta):
    return searches.cubic(theta)


def by_root_vjp(x: Tensor, t: Tensor) -> Tensor:
    u = searches.cubic(x + t)
    return root_vjp(lambda u, theta: u**3 + u - theta, u, (x + t,), t)[0]


def by_root_jvp(x: Tensor, t: Tensor) -> Tensor:
    u = searches.cubic(x + t)
    return root_jvp(lambda u, theta: u**3 + u - theta, u, (x + t,), (t,))


def slope_times_t(x: Tensor, t: Tensor) -> Tensor:
    return t / (1 + 3 * searches.cubic(x + t) ** 2)


def two_steps(transformation: idf.GradientTransformation) -> Scalar:
    def library(x: Tensor, t: Tensor) -> Tensor:
        w, state = x, transformation.init(x)
        for g in t * x, t + x:
            updates, state = transformation.update(g, state, w)
            w = idf.apply_updates(w, updates)
        return w

    return library


def plain_sgd(x: Tensor, t: Tensor) -> Tensor:
    m = t * x
    return x - 0.1 * m - 0.1 * (0.9 * m + t + x)


def plain_adam(x: Tensor, t: Tensor, decay: float = 0.0) -> Tensor:
    w, m, v = x, 0.0, 0.0
    for i, g in enumerate((t * x, t + x), start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = m / (1 - 0.9**i) / (torch.sqrt(v / (1 - 0.999**i) + 1e-2) + 1e-8)
        w = w - 0.1 * step - 0.1 * decay * w
    return w


def plain_rmsprop(x: Tensor, t: Tensor) -> Tensor:
    w, v = x, 0.0
    for g in t * x, t + x:
        v = 0.99 * v + 0.01 * g**2
        w = w - 0.1 * g / (torch.sqrt(v + 1e-2) + 1e-8)
    return w


def plain_clipped(x: Tensor, t: Tensor) -> Tensor:
    for g in t * x, t + x:
        x = x - 0.1 * g * torch.clamp(0.5 / (g.abs() + 1e-6), max=1.0)
    return x


def loop(every: int | None) -> Scalar:
    def library(x: Tensor, t: Tensor) -> Tensor:
        return idf.unroll(lambda u, rate: u - rate * torch.sin(u + t), 5, every)(x, t / 4)

    return library


def plain_loop(x: Tensor, t: Tensor) -> Tensor:
    u = x
    for _ in range(5):
        u = u - t / 4 * torch.sin(u + t)
    return u


class Lower(ImplicitMetaGradientModule):
    """v^3 + v = theta."""

    def __init__(self, theta):
        super().__init__()
        self.theta, self.v = theta, nn.Parameter(torch.zeros((), dtype=F64))

    def objective(self):
        return self.v**4 / 4 + self.v**2 / 2 - self.theta * self.v

    def solve(self):
        self.v = nn.Parameter(searches.cubic(self.theta))
        return self.v


def quadratic_program(x: Tensor, t: Tensor) -> Tensor:
    """The point nearest to a vector with entries that add up to t, all of them below 5."""
    eye, row = torch.eye(3, dtype=F64), torch.ones(1, 3, dtype=F64)
    bounds = torch.full((3,), 5.0, dtype=F64)
    return WEIGHTS @ solvers.qp(rtol=1e-12).run(None, eye, -vector(x, t), row, t[None], eye, bounds)[0].primal


def nearest(v: Tensor, total: Tensor) -> KKTSolution:
    excess = (v.sum() - total) / 3
    return KKTSolution(v - excess, excess[None])


def kkt(x: Tensor, t: Tensor) -> Tensor:
    condition = make_kkt_optimality_fn(lambda z, v: ((z - v) ** 2).sum() / 2, eq_fn=lambda z: z.sum()[None] - t)
    solver = custom_root(condition)(lambda init, params_obj: nearest(params_obj, t))
    return WEIGHTS @ solver(None, vector(x, t)).primal


def plain_program(x: Tensor, t: Tensor) -> Tensor:
    return WEIGHTS @ nearest(vector(x, t), t).primal


def onto_simplex(x: Tensor, t: Tensor) -> Tensor:
    return WEIGHTS @ projections.simplex(1 + vector(x, t), 3.0)


def plain_simplex(x: Tensor, t: Tensor) -> Tensor:
    return WEIGHTS @ nearest(1 + vector(x, t), 3.0 + 0 * t).primal


def sum_of_both(x: Tensor, t: Tensor) -> Tensor:
    return searches.cubic(x + t)


ADAM = {"lr": 0.1, "eps_root": 1e-2}
CLIPPED = idf.chain(idf.clip_grad_norm(0.5), idf.sgd(0.1))
INNER = [
    Inner("custom_root, captured", root_of_captured, sum_of_both),
    Inner("custom_root", lambda x, t: root_of_argument(None, x + t), sum_of_both),
    Inner("custom_fixed_point", lambda x, t: fixed_point(None, theta=x + t), sum_of_both),
    Inner("root_vjp", by_root_vjp, slope_times_t),
    Inner("root_jvp", by_root_jvp, slope_times_t),
    Inner("module", lambda x, t: Lower(x + t).solve(), sum_of_both),
    Inner("qp", quadratic_program, plain_program),
    Inner("make_kkt_optimality_fn", kkt, plain_program),
    Inner("projection", onto_simplex, plain_simplex),
    Inner("prox", lambda x, t: WEIGHTS @ prox.ridge(vector(x, t), t), lambda x, t: WEIGHTS @ vector(x, t) / (1 + t)),
    Inner("sgd", two_steps(idf.sgd(0.1, momentum=0.9)), plain_sgd),
    Inner("adam", two_steps(idf.adam(**ADAM)), plain_adam),
    Inner("adamw", two_steps(idf.adamw(**ADAM, weight_decay=0.2)), partial(plain_adam, decay=0.2)),
    Inner("rmsprop", two_steps(idf.rmsprop(0.1, eps_root=1e-2)), plain_rmsprop),
    Inner("chain", two_steps(CLIPPED), plain_clipped),
    Inner("unroll", loop(None), plain_loop),
    Inner("unroll, checkpoints", loop(2), plain_loop),
    Inner("newton, its iterations", by_newtons_iterations, rotated),
    Inner("gradient_descent, its iterations, checkpoints", by_four_steps, plain_four_steps),
]
LINEAR = [
    *(by_linear_solve(f"solve, {row}", row.factory(rtol=1e-13) if row.iterative else row.factory()) for row in SOLVERS),
    by_linear_solve(
        "solve, preconditioned", linear_solve.solve_cg(rtol=1e-13, preconditioner=lambda v: prox.ridge(v, 0.5))
    ),
]
SEARCHING = [by_search(row) for row in SEARCHES]

# --- outside ----------------------------------------------------------------------------------------------------------


def residual(e: Scalar) -> Scalar:
    return lambda x, t: x**3 + x - t - 0.2 * e(x, t)


def objective(e: Scalar) -> Scalar:
    return lambda x, t: x**4 / 4 + x**2 / 2 - t * x - 0.2 * e(x, t)


def newton(fn: Scalar) -> Callable[[Tensor], Tensor]:
    """In plain torch."""

    def solution(t: Tensor) -> Tensor:
        x = 0.7 * t
        for _ in range(7):
            x = x - fn(x, t) / grad(fn)(x, t)
        return x

    return solution


def root_of(e: Scalar) -> Callable[[Tensor], Tensor]:
    return newton(residual(e))


def minimum_of(e: Scalar) -> Callable[[Tensor], Tensor]:
    return newton(grad(objective(e)))


def decorated(decorate: Callable[..., Callable], sign: float) -> Callable[[Inner], Callable[[Tensor], Tensor]]:
    """The condition is captured by it, and takes t as an argument; what finds the solution knows the closed form."""

    def solve(inner: Inner) -> Callable[[Tensor], Tensor]:
        F = residual(inner.library)
        fn = F if sign == 0 else lambda x, t: x + sign * F(x, t)
        found = root_of(inner.plain)
        return lambda t: decorate(fn)(lambda init, t: found(t))(None, t)

    return solve


def captured(inner: Inner) -> Callable[[Tensor], Tensor]:
    F, found = residual(inner.library), root_of(inner.plain)
    return lambda t: custom_root(lambda x: F(x, t))(lambda init: found(t))(None)


def search(factory: Callable[..., solvers.Solver], pose: Callable[[Scalar], Scalar], **how) -> Callable:
    def solve(inner: Inner) -> Callable[[Tensor], Tensor]:
        solver = factory(pose(inner.library), **EXACT)
        return lambda t: solver.run(0.7 * t.detach(), t, **how)[0]

    return solve


def contraction(e: Scalar) -> Scalar:
    F = residual(e)
    return lambda x, t: x - F(x, t) / 4


def residuals(e: Scalar) -> Scalar:
    return lambda x, t: torch.stack([x - t, x**2 + t, 0.3 * e(x, t)])


def least_squares(e: Scalar) -> Callable[[Tensor], Tensor]:
    rows = residuals(e)
    return newton(grad(lambda x, t: (rows(x, t) ** 2).sum() / 2))


def linear(solve: Callable[..., Tensor]) -> Callable[[Inner], Callable[[Tensor], Tensor]]:
    def solution(inner: Inner) -> Callable[[Tensor], Tensor]:
        return lambda t: solve(lambda v: (3 + 0.2 * inner.library(t, t)) * v, torch.sin(t))

    return solution


def quotient(e: Scalar) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.sin(t) / (3 + 0.2 * e(t, t))


def preconditioned(inner: Inner) -> Callable[[Tensor], Tensor]:
    def solution(t: Tensor) -> Tensor:
        solve = linear_solve.solve_gmres(rtol=1e-13, preconditioner=lambda v: v / (3 + 0.2 * inner.library(t, t)))
        return solve(lambda v: (3 + t**2) * v, torch.sin(t))

    return solution


def steps(every: int | None) -> Callable[[Inner], Callable[[Tensor], Tensor]]:
    def solve(inner: Inner) -> Callable[[Tensor], Tensor]:
        return lambda t: idf.unroll(contraction(inner.library), 3, every)(t, t)

    return solve


def three_steps(e: Scalar) -> Callable[[Tensor], Tensor]:
    def solution(t: Tensor) -> Tensor:
        x = t
        for _ in range(3):
            x = contraction(e)(x, t)
        return x

    return solution


def by_module(inner: Inner) -> Callable[[Tensor], Tensor]:
    class Upper(ImplicitMetaGradientModule):
        def __init__(self, t):
            super().__init__()
            self.t, self.x = t, nn.Parameter(torch.zeros((), dtype=F64))

        def objective(self):
            return objective(inner.library)(self.x, self.t)

        def solve(self):
            self.x = nn.Parameter(minimum_of(inner.plain)(self.t))
            return self.x

    return lambda t: Upper(t).solve()


def with_constraint(inner: Inner) -> Callable[[Tensor], Tensor]:
    """Least ``z0 + z1^2`` subject to ``z0 = objective(z1)``, so at a zero of the sum of both slopes."""
    slope = newton(grad(lambda x, t: x**2 + objective(inner.plain)(x, t)))

    def height(z: Tensor, t: Tensor) -> Tensor:
        return (objective(inner.library)(z[1], t) - z[0])[None]

    def found(init, params_eq):
        x = slope(params_eq)
        return KKTSolution(torch.stack([objective(inner.plain)(x, params_eq), x]), torch.ones(1, dtype=F64))

    solver = custom_root(make_kkt_optimality_fn(lambda z: z[0] + z[1] ** 2, eq_fn=height))(found)
    return lambda t: solver(None, params_eq=t).primal[1]


def by_root_jvp_outside(inner: Inner) -> Callable[[Tensor], Tensor]:
    x, F = root_of(inner.plain), residual(inner.library)
    return lambda t: root_jvp(F, x(t), (t,), (torch.ones_like(t),))


def by_root_vjp_outside(inner: Inner) -> Callable[[Tensor], Tensor]:
    x, F = root_of(inner.plain), residual(inner.library)
    return lambda t: root_vjp(F, x(t), (t,), torch.ones_like(t))[0]


def slope_of_root(e: Scalar) -> Callable[[Tensor], Tensor]:
    x, F = root_of(e), residual(e)

    def solution(t: Tensor) -> Tensor:
        of_x, of_t = grad(F, argnums=(0, 1))(x(t), t)
        return -of_t / of_x

    return solution


projected = partial(solvers.projected_gradient, projection=projections.non_negative)
OUTER = [
    Outer("custom_root", decorated(custom_root, 0), root_of),
    Outer("custom_root, captured", captured, root_of),
    Outer("custom_fixed_point", decorated(custom_fixed_point, -0.5), root_of),
    Outer("root_vjp", by_root_vjp_outside, slope_of_root),
    Outer("root_jvp", by_root_jvp_outside, slope_of_root),
    Outer("newton", search(solvers.newton, residual), root_of),
    Outer("anderson", search(solvers.anderson, contraction), root_of),
    Outer("scipy_root", search(solvers.scipy_root, residual), root_of),
    Outer("solve_lu", linear(linear_solve.solve_lu()), quotient),
    Outer("solve_cg", linear(linear_solve.solve_cg(rtol=1e-13)), quotient),
    Outer("preconditioner", preconditioned, lambda e: lambda t: torch.sin(t) / (3 + t**2)),
    Outer("unroll, checkpoints", steps(2), three_steps),
    Outer("newton, iterations", search(solvers.newton, residual, implicit_diff=False, checkpoint_every=3), root_of),
    Outer("lbfgs", search(solvers.lbfgs, objective), minimum_of, minimises=True),
    Outer("projected_gradient", search(projected, objective), minimum_of, minimises=True),
    Outer("levenberg_marquardt", search(solvers.levenberg_marquardt, residuals), least_squares, minimises=True),
    Outer("module", by_module, minimum_of, minimises=True),
    Outer(
        "make_kkt_optimality_fn",
        with_constraint,
        lambda e: newton(grad(lambda x, t: x**2 + objective(e)(x, t))),
        minimises=True,
    ),
]

# --- which of the pairs are tested ------------------------------------------------------------------------------------

# Every pair would take minutes. Searches are dear inside of searches that evaluate their function often.
DEAR = ("newton, iterations", "projected_gradient", "levenberg_marquardt", "scipy_root")
OF_MANY = [outer for outer in OUTER if outer.name in DEAR]
OF_FEW = [outer for outer in OUTER if outer.name not in DEAR]
PAIRS = [
    *((outer, inner) for j, inner in enumerate(INNER) for outer in OF_FEW[j % 3 :: 3]),
    *((outer, inner) for j, inner in enumerate(INNER) for outer in OF_MANY[j % 4 :: 4]),
    *((outer, inner) for j, inner in enumerate(LINEAR) for outer in OF_FEW[j % 5 :: 5]),
    *((outer, inner) for j, inner in enumerate(SEARCHING) for outer in OF_FEW[j % 6 :: 6]),
]
