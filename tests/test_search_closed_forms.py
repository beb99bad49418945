"""Problems with known answers, each by every solver that can solve it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from checks.tensors import vector
from problem_sets.hock_schittkowski import rosenbrock
from tables.solvers import LINE_SEARCHES, MINIMISERS, factories, of_kind
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, vmap

import implicitdiff.projections as projections
import implicitdiff.prox as prox
import implicitdiff.solvers as solvers
from implicitdiff import sgd
from implicitdiff.solvers import Solver, Status

F64 = torch.float64
Factory = Callable[..., Solver]
TIGHT: dict[str, Any] = {"rtol": 1e-13, "atol": 1e-13}


FIXED_POINTS = factories(of_kind("fixed point"))
ROOTS = factories(of_kind("root"))
LEAST_SQUARES = factories(of_kind("least squares"))
SCIPY = pytest.param(solvers.scipy_minimize, id="scipy_minimize")
MINIMISING = [
    *factories(MINIMISERS),
    SCIPY,
    pytest.param(lambda fn, **o: solvers.from_optimizer(fn, sgd(0.5), **o), id="from_optimizer"),
]


# --- z = cos z + theta ------------------------------------------------------------------------------------------------

COSINE_START, COSINE_THETA = vector(0.3, math.pi / 4), vector(0.0, math.pi / 2)
DOTTIE = 0.7390851332151607
COSINE_SOLUTION, COSINE_DERIVATIVE = vector(DOTTIE, math.pi / 2), vector(0.5975100456753034, 0.5)


def assert_solves_the_cosine(solver: Solver) -> None:
    def solution(theta: Tensor) -> Tensor:
        return solver.run(COSINE_START, theta)[0]

    torch.testing.assert_close(solution(COSINE_THETA), COSINE_SOLUTION, rtol=1e-11, atol=0.0)
    for jacobian in (jacrev(solution)(COSINE_THETA), jacfwd(solution)(COSINE_THETA)):
        torch.testing.assert_close(jacobian, COSINE_DERIVATIVE.diag(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "factory",
    # The map's derivative at the second solution is -1.
    [pytest.param(partial(solvers.fixed_point_iteration, damping=0.5), id="damped"), *FIXED_POINTS[1:]],
)
def test_the_cosine_as_a_fixed_point(factory: Factory) -> None:
    assert_solves_the_cosine(factory(lambda z, theta: torch.cos(z) + theta, **TIGHT))


@pytest.mark.parametrize(
    "factory", [*ROOTS, pytest.param(partial(solvers.bisection, lower=-1.0, upper=4.0), id="bisection")]
)
def test_the_cosine_as_a_root(factory: Factory) -> None:
    assert_solves_the_cosine(factory(lambda z, theta: z - torch.cos(z) - theta, **TIGHT))


# --- z = tanh(z + 1) --------------------------------------------------------------------------------------------------

TANH = 0.9611797513715395
# dz/dtheta of z = tanh(z + theta)
TANH_DERIVATIVE = (1 - TANH**2) / TANH**2


def assert_solves_the_tanh(solver: Solver) -> None:
    def solution(theta: Tensor) -> Tensor:
        return solver.run(torch.tensor(0.9, dtype=F64), theta)[0]

    one = torch.tensor(1.0, dtype=F64)
    assert float(solution(one)) == pytest.approx(TANH, rel=1e-10)
    assert float(grad(solution)(one)) == pytest.approx(TANH_DERIVATIVE, rel=1e-8)


def tanh_residual(z: Tensor, theta: Tensor) -> Tensor:
    return z - torch.tanh(z + theta)


@pytest.mark.parametrize("factory", FIXED_POINTS)
def test_the_tanh_as_a_fixed_point(factory: Factory) -> None:
    assert_solves_the_tanh(factory(lambda z, theta: torch.tanh(z + theta), **TIGHT))


@pytest.mark.parametrize(
    "factory", [*ROOTS, pytest.param(partial(solvers.bisection, lower=0.0, upper=2.0), id="bisection")]
)
def test_the_tanh_as_a_root(factory: Factory) -> None:
    assert_solves_the_tanh(factory(tanh_residual, **TIGHT))


@pytest.mark.parametrize("factory", LEAST_SQUARES)
def test_the_tanh_as_least_squares(factory: Factory) -> None:
    assert_solves_the_tanh(factory(tanh_residual, **TIGHT))


@pytest.mark.parametrize("factory", MINIMISING)
def test_the_tanh_as_a_minimum(factory: Factory) -> None:
    """Of z^2/2 - log cosh(z + theta), whose gradient is the residual."""

    def objective(z: Tensor, theta: Tensor) -> Tensor:
        return z**2 / 2 - torch.log(torch.cosh(z + theta))

    assert_solves_the_tanh(factory(objective, rtol=1e-12, atol=1e-12))


# --- z = (0.9, 0.99, 0.999) z -----------------------------------------------------------------------------------------

SLOW_RATE, SLOW_START = vector(0.9, 0.99, 0.999), vector(1.0, 0.4, -0.2)


def test_a_small_step_is_not_convergence() -> None:
    """The step is a thousandth of the distance that is left."""
    solver = solvers.fixed_point_iteration(lambda z: SLOW_RATE * z, rtol=0.0, atol=1e-5, check_every=50)
    z, state = solver.run(SLOW_START)
    # 0.2 * 0.999^k / 1000 = 1e-5
    assert int(state.iter_num) == math.ceil(math.log(1e-5 / 2e-4) / math.log(0.999)) > 2900
    assert float(z.abs().max()) == pytest.approx(1e-2, rel=1e-2)


@pytest.mark.parametrize(
    ("factory", "most"), [(solvers.anderson, 36), (solvers.broyden, 10)], ids=["anderson", "broyden"]
)
def test_a_slow_linear_map_takes_the_accelerated_solvers_few_steps(factory: Factory, most: int) -> None:
    z, state = factory(lambda z: SLOW_RATE * z).run(SLOW_START)
    assert state.iter_num <= most
    assert float(z.abs().max()) < 1e-6


# --- one unknown ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("history", [1, 5])
def test_anderson_in_one_unknown_is_the_secant_method(history: int) -> None:
    """However long its history: one change determines the step, and older ones would only blur it."""
    x, found = [1.0, math.cos(1.0)], []
    for _ in range(2, 6):
        (a, b), (r_a, r_b) = x[-2:], (math.cos(z) - z for z in x[-2:])
        x.append(b - r_b * (b - a) / (r_b - r_a))
    for maxiter in range(1, 6):
        solver = solvers.anderson(torch.cos, history=history, maxiter=maxiter, rtol=0.0, atol=0.0, on_failure="ignore")
        found.append(float(solver.run(vector(1.0))[0]))
    # A residual errs by 1e-16. It changes by 1e-3 and more, so the change and the step err by 1e-13 of themselves.
    assert found == pytest.approx(x[1:], rel=0.0, abs=1e-12)


# --- seven rotations --------------------------------------------------------------------------------------------------

ANGLES = math.pi / vector(2, 3, 4, 5, 6, 1.27, 1.73)
CENTRES = torch.arange(1.0, 15.0, dtype=F64).reshape(7, 2)


def rotate(z: Tensor, centre: Tensor) -> Tensor:
    cos, sin = torch.cos(ANGLES), torch.sin(ANGLES)
    x, y = (z - centre).T
    return centre + torch.stack([cos * x - sin * y, sin * x + cos * y], dim=1)


def test_plain_iteration_of_rotations_never_converges_and_says_so() -> None:
    """Every point stays on its circle."""
    solver = solvers.fixed_point_iteration(rotate, maxiter=300)
    z, state = solver.run(torch.zeros(7, 2, dtype=F64), CENTRES, keep_history=True)
    assert state.status == Status.BUDGET_SPENT
    torch.testing.assert_close((z - CENTRES).norm(dim=1), CENTRES.norm(dim=1), rtol=1e-10, atol=0.0)
    torch.testing.assert_close(state.history, state.history[0].expand(301), rtol=1e-10, atol=0.0)


@pytest.mark.parametrize(
    "factory",
    [
        pytest.param(partial(solvers.anderson, history=15), id="anderson"),
        pytest.param(partial(solvers.broyden, history=30), id="broyden"),
    ],
)
def test_the_centres_of_rotations_are_found(factory: Factory) -> None:
    solver = factory(rotate)
    z, state = solver.run(torch.zeros(7, 2, dtype=F64), CENTRES)
    torch.testing.assert_close(z, CENTRES, rtol=1e-8, atol=1e-8)
    # Fourteen eigenvalues: GMRES would take fourteen steps, and Broyden's method takes at most twice as many.
    assert state.iter_num <= 30
    jacobian = jacrev(lambda c: solver.run(torch.zeros(7, 2, dtype=F64), c)[0])(CENTRES)
    torch.testing.assert_close(jacobian.reshape(14, 14), torch.eye(14, dtype=F64), rtol=1e-9, atol=1e-9)


# --- the enzyme fit ---------------------------------------------------------------------------------------------------

SUBSTRATE = vector(0.038, 0.194, 0.425, 0.626, 1.253, 2.5, 3.74)
RATE = vector(0.050, 0.127, 0.094, 0.2122, 0.2729, 0.2665, 0.3317)
ENZYME = vector(0.36183687, 0.55626646)


def enzyme(c: Tensor, y: Tensor) -> Tensor:
    return c[0] * SUBSTRATE / (c[1] + SUBSTRATE) - y


def enzyme_by_scipy(y: np.ndarray) -> np.ndarray:
    """The root of J'r."""
    t = SUBSTRATE.numpy()

    def gradient(c: np.ndarray) -> np.ndarray:
        model = c[0] * t / (c[1] + t)
        return np.stack([t / (c[1] + t), -model / (c[1] + t)]) @ (model - y)

    return scipy.optimize.root(gradient, ENZYME.numpy(), tol=1e-14).x


@pytest.mark.parametrize("factory", LEAST_SQUARES)
def test_the_enzyme_fit(factory: Factory) -> None:
    """Its residual is not zero, so the derivative needs the second derivatives of the model."""
    solver = factory(enzyme, rtol=1e-11, atol=1e-13)

    def solution(y: Tensor) -> Tensor:
        return solver.run(vector(0.9, 0.2), y)[0]

    torch.testing.assert_close(solution(RATE), ENZYME, rtol=0.0, atol=1e-8)
    h = 1e-4
    steps = h * torch.eye(7, dtype=F64)
    differences = [(enzyme_by_scipy((RATE + s).numpy()) - enzyme_by_scipy((RATE - s).numpy())) / (2 * h) for s in steps]
    expected = torch.tensor(np.stack(differences, axis=1))
    for jacobian in (jacrev(solution)(RATE), jacfwd(solution)(RATE)):
        torch.testing.assert_close(jacobian, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("factory", [*factories(LINE_SEARCHES), SCIPY])
def test_the_enzyme_fit_as_a_minimum(factory: Factory) -> None:
    solver = factory(lambda c, y: (enzyme(c, y) ** 2).sum() / 2, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(solver.run(vector(0.4, 0.5), RATE)[0], ENZYME, rtol=0.0, atol=1e-7)


# --- Rosenbrock in a box ----------------------------------------------------------------------------------------------

LOWER, UPPER = vector(1.5, -2.0), vector(3.0, 0.5)


def into(lower: Tensor, upper: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda v: projections.box(v, lower, upper)


@pytest.mark.parametrize("acceleration", [True, False])
def test_rosenbrock_in_a_box(acceleration: bool) -> None:
    def solution(bounds: Tensor) -> Tensor:
        solver = solvers.projected_gradient(rosenbrock, into(*bounds), acceleration=acceleration, rtol=1e-12)
        return solver.run(vector(2.0, 0.0))[0]

    bounds = torch.stack([LOWER, UPPER])
    torch.testing.assert_close(solution(bounds), vector(1.5, 0.5), rtol=1e-12, atol=0.0)
    # The solution is the corner, and moves with it.
    jacobian = jacrev(solution)(bounds)
    expected = torch.zeros(2, 2, 2, dtype=F64)
    expected[0, 0, 0] = expected[1, 1, 1] = 1.0
    torch.testing.assert_close(jacobian, expected, rtol=1e-12, atol=1e-12)


def test_rosenbrock_by_minimisers_and_least_squares() -> None:
    start, bottom = vector(-1.2, 1.0), vector(1.0, 1.0)
    for row in LINE_SEARCHES:
        x, state = row.factory(rosenbrock).run(start)
        torch.testing.assert_close(x, bottom, rtol=0.0, atol=1e-8)
        assert state.iter_num < 200
    for row in of_kind("least squares"):
        solver = row.factory(lambda x: torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]]), **TIGHT)
        x, _ = solver.run(start)
        torch.testing.assert_close(x, bottom, rtol=0.0, atol=1e-9)


# --- projections as solutions -----------------------------------------------------------------------------------------


def simplex_jacobian(x: Tensor) -> Tensor:
    s = (x > 0).to(F64)
    return s.diag() - torch.outer(s, s) / s.sum()


@pytest.mark.parametrize(
    "factory",
    [
        pytest.param(lambda fn, **o: solvers.projected_gradient(fn, projections.simplex, **o), id="projected_gradient"),
        pytest.param(
            lambda fn, **o: solvers.proximal_gradient(fn, lambda v, s: projections.simplex(v), **o),
            id="proximal_gradient",
        ),
    ],
)
def test_the_projection_onto_the_simplex_as_a_problem(factory: Factory) -> None:
    solver = factory(lambda x, v: ((x - v) ** 2).sum() / 2, rtol=1e-13, atol=1e-13)

    def solution(v: Tensor) -> Tensor:
        return solver.run(torch.full((4,), 0.25, dtype=F64), v)[0]

    v = vector(0.9, 0.5, -1.0, 0.2)
    expected = vector(0.9, 0.5, 0.0, 0.2) - vector(0.2, 0.2, 0.0, 0.2)
    torch.testing.assert_close(solution(v), expected, rtol=1e-11, atol=1e-12)
    for jacobian in (jacrev(solution)(v), jacfwd(solution)(v)):
        torch.testing.assert_close(jacobian, simplex_jacobian(expected), rtol=1e-10, atol=1e-11)


def test_the_lasso_of_orthogonal_features_shrinks_softly() -> None:
    q = torch.linalg.qr(torch.randn(6, 3, dtype=F64, generator=torch.Generator().manual_seed(1)))[0]
    b = q @ vector(1.0, -0.2, -0.7)
    solver = solvers.proximal_gradient(
        lambda x, b, strength: ((q @ x - b) ** 2).sum() / 2, lambda v, s: prox.lasso(v, 0.3 * s), **TIGHT
    )
    x = solver.run(torch.zeros(3, dtype=F64), b, None)[0]
    torch.testing.assert_close(x, vector(0.7, 0.0, -0.4), rtol=1e-10, atol=1e-12)


def test_the_strength_of_a_penalty_that_is_captured_is_differentiated() -> None:
    target = vector(1.0, -0.2, -0.7)

    def solution(strength: Tensor) -> Tensor:
        solver = solvers.proximal_gradient(
            lambda x: ((x - target) ** 2).sum() / 2, lambda v, s: prox.lasso(v, strength * s), **TIGHT
        )
        return solver.run(torch.zeros(3, dtype=F64))[0]

    strength = torch.tensor(0.3, dtype=F64)
    torch.testing.assert_close(jacrev(solution)(strength), vector(-1.0, 0.0, 1.0), rtol=1e-9, atol=1e-10)
    several = vector(0.1, 0.3, 0.8)
    expected = target.sign() * (target.abs() - several[:, None]).clamp(min=0)
    torch.testing.assert_close(vmap(solution)(several), expected, rtol=1e-9, atol=1e-10)


# --- a thousand problems at once --------------------------------------------------------------------------------------

MANY, SIZE = 1000, 20
MINIMISER = getattr(solvers, "lbfgs", solvers.gradient_descent)


def many(seed: int, *shape: int) -> Tensor:
    return torch.randn(MANY, *shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def test_a_thousand_ridge_problems_in_one_call_with_a_hypergradient_for_each() -> None:
    features, targets = many(0, 30, SIZE), many(1, 30)
    penalty = torch.linspace(0.5, 5.0, MANY, dtype=F64)

    def objective(w: Tensor, a: Tensor, y: Tensor, penalty: Tensor) -> Tensor:
        return ((a @ w - y) ** 2).sum() / 2 + penalty * (w**2).sum() / 2

    solver = MINIMISER(objective, rtol=1e-8)

    def loss(penalty: Tensor, a: Tensor, y: Tensor) -> Tensor:
        return (solver.run(torch.zeros(SIZE, dtype=F64), a, y, penalty)[0] ** 2).sum() / 2

    found = vmap(grad(loss))(penalty, features, targets)
    inverse = torch.linalg.inv(features.mT @ features + penalty[:, None, None] * torch.eye(SIZE, dtype=F64))
    w = inverse @ (features.mT @ targets[..., None])
    expected = -(w.mT @ inverse @ w).flatten()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_a_thousand_logistic_problems_in_one_call_with_a_hypergradient_for_each() -> None:
    features = many(2, 30, SIZE)
    labels = many(3, 30).sign()
    penalty = torch.linspace(1.0, 5.0, MANY, dtype=F64)

    def objective(w: Tensor, a: Tensor, y: Tensor, penalty: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-y * (a @ w)).sum() + penalty * (w**2).sum() / 2

    solver = MINIMISER(objective, rtol=1e-8)

    def loss(penalty: Tensor, a: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        w = solver.run(torch.zeros(SIZE, dtype=F64), a, y, penalty)[0]
        return (w**2).sum() / 2, w

    found, w = vmap(grad(loss, has_aux=True))(penalty, features, labels)
    # The implicit function theorem, by hand.
    p = torch.sigmoid((features @ w[..., None])[..., 0])
    hessian = features.mT @ ((p * (1 - p))[..., None] * features) + penalty[:, None, None] * torch.eye(SIZE, dtype=F64)
    expected = -(w[:, None] @ torch.linalg.inv(hessian) @ w[..., None]).flatten()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    for i in (0, 499, 999):
        a, y, mu = (t[i].numpy() for t in (features, labels, penalty))
        by_scipy = scipy.optimize.minimize(
            lambda w, a=a, y=y, mu=mu: np.logaddexp(0, -y * (a @ w)).sum() + mu * w @ w / 2, np.zeros(SIZE), tol=1e-10
        ).x
        np.testing.assert_allclose(w[i].numpy(), by_scipy, atol=1e-5)


def test_a_thousand_quadratic_programs_in_a_box_in_one_call_with_a_hypergradient_for_each() -> None:
    root, c = many(4, SIZE, SIZE), many(5, SIZE)
    q = root @ root.mT / SIZE + torch.eye(SIZE, dtype=F64)
    solver = solvers.projected_gradient(
        lambda x, q, c: x @ (q @ x) / 2 + c @ x, lambda v: projections.box(v, -0.3, 0.3), rtol=1e-10
    )

    def total(c: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        x = solver.run(torch.zeros(SIZE, dtype=F64), q, c)[0]
        return x.sum(), x

    found, x = vmap(grad(total, has_aux=True))(c, q)
    for i in range(0, MANY, 111):
        factor = np.linalg.cholesky(q[i].numpy())
        goal = -np.linalg.solve(factor, c[i].numpy())
        by_scipy = scipy.optimize.lsq_linear(factor.T, goal, bounds=(-0.3, 0.3), tol=1e-12).x
        np.testing.assert_allclose(x[i].numpy(), by_scipy, atol=1e-6)
        free = x[i].abs() < 0.3
        expected = torch.zeros(SIZE, dtype=F64)
        expected[free] = -torch.linalg.inv(q[i][free][:, free]) @ torch.ones(int(free.sum()), dtype=F64)
        torch.testing.assert_close(found[i], expected, rtol=1e-6, atol=1e-8)


# --- least squares whose residuals vanish -----------------------------------------------------------------------------


@pytest.mark.parametrize("factory", LEAST_SQUARES)
def test_residuals_that_are_zero_to_the_last_digit_have_their_derivatives(factory: Factory) -> None:
    """Those of the square of a residual at zero, which is not that of its absolute value there."""
    solver = factory(lambda x, theta: torch.stack([x[0] - theta[0], 2 * x[1] - x[0] - theta[1], x[0] * x[1] - 1.5]))

    def solution(theta: Tensor) -> Tensor:
        return solver.run(vector(1.0, 1.5), theta)[0]

    theta = vector(1.0, 2.0)
    assert not solver.optimality_fn(solution(theta), theta).any()
    # (J'J)^-1 times the first two columns of J', as all residuals are zero
    j = torch.tensor([[1.0, 0.0], [-1.0, 2.0], [1.5, 1.0]], dtype=F64)
    expected = (torch.linalg.inv(j.T @ j) @ j.T)[:, :2]
    for jacobian in (jacrev(solution)(theta), jacfwd(solution)(theta)):
        torch.testing.assert_close(jacobian, expected, rtol=1e-12, atol=1e-12)
