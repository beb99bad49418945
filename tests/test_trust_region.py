"""Searches that come from far away, from where a Jacobian is singular, or past a saddle; and those that get nowhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checks.tensors import vector
from problem_sets import more_garbow_hillstrom, nist
from problem_sets.hock_schittkowski import wood
from problem_sets.minpack_roots import brown_almost_linear, chebyquad, powell_singular
from problem_sets.more_garbow_hillstrom import helical_valley, rosenbrock
from problem_sets.problem import LeastSquares
from scipy import optimize
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from implicitdiff.solvers import (
    State,
    Status,
    dogleg,
    dogleg_root,
    gauss_newton,
    levenberg_marquardt,
    newton,
    newton_cg,
)
from implicitdiff.solvers._steps.region_step import step_in_region
from implicitdiff.solvers._steps.trust_region import multiplier

F64 = torch.float64


ROOTS = [
    (rosenbrock, vector(-120, 100), torch.ones(2)),
    (helical_valley, vector(-100, 0, 0), vector(1, 0, 0)),
    (brown_almost_linear, torch.full((40,), 0.5, dtype=F64), None),
    (powell_singular, vector(300, -100, 0, 100), torch.zeros(4)),
]
named = pytest.mark.parametrize(("residual", "start", "root"), ROOTS, ids=lambda v: getattr(v, "__name__", ""))


# --- the dogleg -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", [dogleg_root, dogleg])
@named
def test_roots_are_found_from_far_away(factory, residual, start: Tensor, root: Tensor | None) -> None:
    x, state = factory(residual).run(start)
    assert state.status == Status.CONVERGED and state.iter_num < 60
    assert residual(x).norm() < 1e-8
    if root is not None:
        torch.testing.assert_close(x, root.to(F64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("factory", [dogleg_root, dogleg])
def test_units_of_the_unknowns_do_not_matter(factory) -> None:
    units = vector(2.0**20, 2.0**-30)
    x, state = factory(rosenbrock).run(vector(-1.2, 1))
    scaled, other = factory(lambda x: rosenbrock(x / units)).run(vector(-1.2, 1) * units)
    assert state.iter_num == other.iter_num and state.iter_num > 3
    torch.testing.assert_close(scaled / units, x, rtol=1e-12, atol=0)


def test_a_jacobian_without_full_rank_is_no_obstacle() -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(8, 2, dtype=F64, generator=generator) @ torch.randn(2, 4, dtype=F64, generator=generator)
    A[:, 3] = 0
    b = torch.randn(8, dtype=F64, generator=generator)
    x, state = dogleg(lambda x: A @ x - b).run(torch.ones(4, dtype=F64))
    assert state.status == Status.CONVERGED
    _, least, _, _ = np.linalg.lstsq(A[:, :2].numpy(), b.numpy(), rcond=None)
    torch.testing.assert_close((A @ x - b).square().sum(), torch.tensor(least[0]), rtol=1e-10, atol=0)

    wide = torch.randn(3, 5, dtype=F64, generator=generator)
    goal = wide @ torch.linspace(0.5, 2, 5, dtype=F64)
    x, state = dogleg(lambda x: wide @ x.exp() - goal).run(torch.zeros(5, dtype=F64))
    assert state.status == Status.CONVERGED and (wide @ x.exp() - goal).norm() < 1e-9

    square = A[:4]
    x, state = dogleg_root(lambda x: square @ x - square.sum(dim=1)).run(
        torch.zeros(4, dtype=F64),
    )
    assert (square @ x - square.sum(dim=1)).norm() < 1e-9


def test_a_singular_jacobian_at_the_guess_is_no_obstacle() -> None:
    x, state = dogleg_root(lambda x: torch.stack([x[0] ** 2 - x[1] - 3, x[1] ** 2 - 1])).run(vector(1, 0))
    assert state.status == Status.CONVERGED
    torch.testing.assert_close(x[1].abs(), torch.ones((), dtype=F64))
    assert (x[0] ** 2 - x[1] - 3).abs() < 1e-9


def test_a_minimum_that_is_no_root_ends_the_search_soon_in_its_lane() -> None:
    def residual(x: Tensor, c: Tensor) -> Tensor:
        return torch.stack([x[0] ** 2 + c + 0.1 * x[1], x[1] + x[0] * x[1] ** 2])

    c = vector(1, -4)
    x, state = vmap(dogleg_root(residual, on_failure="ignore").run, in_dims=(None, 0))(vector(3, 1), c)
    assert state.status.tolist() == [Status.LINE_SEARCH_FAILED, Status.CONVERGED]
    assert state.iter_num[0] < 60
    reference = optimize.least_squares(lambda x: residual(torch.tensor(x), c[0]).numpy(), [3.0, 1.0])
    assert state.error[0] < 1.01 * (2 * reference.cost) ** 0.5
    assert residual(x[1], c[1]).norm() < 1e-9
    nodes = torch.arange(1, 9, dtype=F64) / 9
    assert dogleg_root(chebyquad, on_failure="ignore").run(nodes)[1].iter_num < 60
    stuck = dogleg_root(lambda x: x**2 + 1, on_failure="ignore").run(torch.zeros(1))[1]
    assert stuck.status == Status.LINE_SEARCH_FAILED and stuck.iter_num == 1


@pytest.mark.parametrize("factory", [dogleg_root, dogleg])
def test_steps_out_of_the_domain_are_shortened(factory) -> None:
    solver = factory(lambda x, c: torch.log(x) - c)
    x, state = vmap(solver.run)(vector(50, 20, 1e-3)[:, None], vector(-3, 3, 1)[:, None])
    torch.testing.assert_close(x, vector(-3, 3, 1).exp()[:, None])
    assert (state.status == Status.CONVERGED).all()

    def steps(c: Tensor) -> Tensor:
        short = factory(lambda x: torch.log(x) - c, radius=10.0, maxiter=2, on_failure="ignore")
        return short.run(vector(50), implicit_diff=False)[0].sum()

    c, h = torch.tensor(-3.0, dtype=F64), 1e-5
    torch.testing.assert_close(grad(steps)(c), (steps(c + h) - steps(c - h)) / (2 * h), rtol=1e-6, atol=0)


@pytest.mark.parametrize("factory", [dogleg_root, dogleg, levenberg_marquardt])
@pytest.mark.parametrize("radius", [0.02, 0.3, 3.0])
def test_derivatives_of_steps_that_the_radius_limits(factory, radius: float) -> None:
    """On the gradient's part of the dogleg, on the second, and beyond."""
    solver = factory(lambda x, c: rosenbrock(x - c), radius=radius, maxiter=3, on_failure="ignore")

    def steps(c: Tensor) -> Tensor:
        return solver.run(vector(-1.2, 1), c, implicit_diff=False)[0]

    c, v, h = vector(0.1, -0.2), vector(0.3, 0.7), 1e-6
    expected = (steps(c + h * v) - steps(c - h * v)) / (2 * h)
    torch.testing.assert_close(jvp(steps, (c,), (v,))[1], expected, rtol=1e-5, atol=1e-7)
    w = vector(1, -0.4)
    slope = grad(lambda c: w @ steps(c))
    torch.testing.assert_close(slope(c) @ v, w @ expected, rtol=1e-5, atol=1e-7)
    second = (slope(c + h * v) - slope(c - h * v)) / (2 * h)
    torch.testing.assert_close(jvp(slope, (c,), (v,))[1], second, rtol=1e-4, atol=1e-6 * float(second.abs().max()))


def test_the_solution_of_a_fit_has_its_derivative() -> None:
    t = torch.linspace(0, 3, 12, dtype=F64)
    y = 2 * torch.exp(-1.3 * t) + 0.05 * torch.cos(9 * t)
    by = {
        factory: jacfwd(lambda y, f=factory: f(lambda x, y: x[0] * torch.exp(-x[1] * t) - y).run(vector(1, 1), y)[0])
        for factory in (dogleg, levenberg_marquardt)
    }
    torch.testing.assert_close(by[dogleg](y), by[levenberg_marquardt](y), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("factory", [dogleg_root, dogleg, levenberg_marquardt])
@pytest.mark.parametrize("radius", [0.0, -1.0, float("nan"), float("inf")])
def test_a_radius_is_positive(factory, radius: float) -> None:
    with pytest.raises(ValueError, match="radius"):
        factory(rosenbrock, radius=radius)


# --- Levenberg and Marquardt ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 4), (4, 4), (3, 5)])
@pytest.mark.parametrize("share", [0.9, 0.1, 1e-6])
def test_the_multiplier_makes_a_step_of_the_radius(shape: tuple[int, int], share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(2, *shape, dtype=F64, generator=generator) * torch.logspace(0, -5, shape[1], dtype=F64)
    r = torch.randn(2, shape[0], dtype=F64, generator=generator)
    longest = torch.stack([torch.linalg.pinv(a) @ b for a, b in zip(A, r, strict=True)]).norm(dim=-1)
    found = multiplier(A, r, share * longest)
    for a, b, most, damping in zip(A.numpy(), r.numpy(), (share * longest).tolist(), found.tolist(), strict=True):
        U, S, _ = np.linalg.svd(a, full_matrices=False)

        def excess(log: float, S=S, c=U.T @ b, most=most) -> float:
            return float(np.log(np.linalg.norm(S * c / (S**2 + np.exp(log))) / most))

        expected = np.exp(optimize.brentq(excess, -60, 60, xtol=1e-13))
        assert damping == pytest.approx(expected, rel=1e-8)


def test_the_multiplier_of_a_column_below_the_rounding_of_another() -> None:
    """On the way to an infimum at infinity a column of ``J`` shrinks far below its norm at the start."""
    Q = torch.linalg.qr(torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(0)))[0]
    tiny, radius = 1e-20, 1e15
    # ``A'A = diag(1, tiny^2)`` and ``A'r = (1, tiny)``: ``|s| = tiny / (tiny^2 + lambda)``, as ``1 << radius``.
    found = multiplier((Q * vector(1, tiny))[None], Q.sum(dim=1)[None], vector(radius))
    torch.testing.assert_close(found, vector(tiny / radius - tiny**2), rtol=1e-8, atol=0.0)


def test_derivatives_of_the_multiplier() -> None:
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(2, 5, 3, dtype=F64, generator=generator, requires_grad=True)
    r = torch.randn(2, 5, dtype=F64, generator=generator, requires_grad=True)
    radius = vector(0.2, 0.01).requires_grad_()
    assert torch.autograd.gradcheck(multiplier, (A, r, radius), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(multiplier, (A, r, radius))


@pytest.mark.parametrize(
    ("name", "factor", "most"),
    [
        ("1 Rosenbrock", 100, 10),
        ("16 Brown and Dennis", 100, 100),
        ("6 Jennrich and Sampson", 1, 80),
        ("10 Meyer", 10, 400),
        ("26 trigonometric, n = 10", 1, 110),
        ("27 Brown almost linear, n = 30", 10, 60),
    ],
)
def test_levenberg_marquardt_arrives_from_where_minpack_does(name: str, factor: float, most: int) -> None:
    problem = next(p for p in more_garbow_hillstrom.PROBLEMS if p.name == name)
    x, state = levenberg_marquardt(problem.residual).run(factor * torch.tensor(problem.start, dtype=F64))
    value = float((problem.residual(x) ** 2).sum())
    assert state.iter_num < most and min(abs(value - v) for v in problem.values) < 1e-6 * max(value, 1e-3)


@pytest.mark.parametrize(
    ("name", "factor"),
    [("10 Meyer", 1), ("10 Meyer, scaled", 10), ("14 Wood", 1), ("15 Kowalik and Osborne", 100)],
)
def test_narrow_valleys_have_an_end_in_float32(name: str, factor: float) -> None:
    """Steps whose gains a bound of the rounding hides lower the cost, although the gradient rises."""
    x, problem, _ = searched(name, factor)
    value = float((problem.residual(x.double()) ** 2).sum())
    assert min(abs(value - v) for v in problem.values) < 4e-3 * max(value, 1e-3)


def test_few_searches_of_a_narrow_valley_stall_in_float32() -> None:
    """Where all gradients are rounding, a search goes on as long as its steps are long."""
    generator = torch.Generator().manual_seed(0)
    stalled = torch.zeros(())
    for name in ("10 Meyer", "10 Meyer, scaled"):
        problem = next(p for p in more_garbow_hillstrom.PROBLEMS if p.name == name)
        starts = 10 * torch.tensor(problem.start) * (1 + 1e-3 * torch.randn(256, 3, generator=generator))
        _, state = vmap(levenberg_marquardt(problem.residual, on_failure="ignore").run)(starts.float())
        stalled += (~state.converged).sum()
    assert stalled <= 50


def test_no_refused_step_of_known_gain_lengthens_the_next() -> None:
    """Rounding of a Hessian made a step that promised a loss; the loss it had was as promised."""
    problem = next(p for p in nist.PROBLEMS if p.name == "Bennett5")
    solver = levenberg_marquardt(problem.residual, on_failure="ignore")
    x = torch.tensor(problem.start, dtype=torch.float32)
    state = solver.init(x)
    while state.status == Status.RUNNING:
        new_x, new = solver.update(x, state)
        if (new_x == x).all() and new.memory.refusals == state.memory.refusals:
            assert new.memory.radius <= state.memory.radius
        x, state = new_x, new


def searched(name: str, factor: float) -> tuple[Tensor, LeastSquares, State]:
    problem = next(p for p in more_garbow_hillstrom.PROBLEMS + nist.PROBLEMS if p.name == name)
    start = factor * torch.tensor(problem.start, dtype=torch.float32)
    x, state = levenberg_marquardt(problem.residual, on_failure="ignore").run(start)
    return x, problem, state


@pytest.mark.parametrize("factor", [1, 10, 100])
def test_small_singular_values_of_float32_count(factor: float) -> None:
    x, problem, _ = searched("20 Watson, n = 12", factor)
    assert float((problem.residual(x.double()) ** 2).sum()) < 1e-9


def test_a_step_in_float32_has_the_digits_of_its_jacobian() -> None:
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 4, dtype=F64, generator=generator))[0] for n in (8, 4))
    J = ((U * vector(1, 0.1, 1e-3, 1e-5)) @ V.mT).float()[None]
    r = -(J @ torch.ones(4))
    for step in step_in_region(J, r, torch.ones(1, 4), torch.tensor([1e3]), torch.finfo(torch.float32).eps)[::2]:
        torch.testing.assert_close(step, torch.ones(1, 4), rtol=0, atol=2e-2)


def test_after_a_refused_step_the_next_is_shorter() -> None:
    """Newton steps with gains hidden by rounding are cut too, once one has been refused."""
    problem = next(p for p in more_garbow_hillstrom.PROBLEMS if p.name == "5 Beale")
    solver = levenberg_marquardt(problem.residual, on_failure="ignore")
    x = 10 * torch.tensor(problem.start, dtype=torch.float32)
    state, refused = solver.init(x), 0
    while state.status == Status.RUNNING:
        before = state.memory
        x, state = solver.update(x, state)
        if state.memory.refusals > before.refusals > 0:
            refused += 1
            assert state.memory.radius < 0.5 * before.radius
    assert refused


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("factory", [dogleg, levenberg_marquardt])
def test_a_singular_jacobian_does_not_hide_a_minimum(factory, dtype: torch.dtype) -> None:
    """At the local minimum of Freudenstein and Roth, where the residual alone makes the Hessian regular."""

    def residual(x: Tensor) -> Tensor:
        a, b = x
        return torch.stack([-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b])

    x, state = factory(residual).run(torch.tensor([0.5, -2.0], dtype=dtype))
    assert state.status == Status.CONVERGED
    b = (2 - 22**0.5) / 3  # where both residuals have the same slope in b
    torch.testing.assert_close(x[1].double(), vector(b)[0], rtol=0, atol=1e-3 if dtype == torch.float32 else 1e-7)


def test_the_last_steps_take_the_whole_hessian_and_its_derivatives() -> None:
    """Where the residual is large, Gauss-Newton steps halve the error; below rounding, only the gradient can tell."""
    t = torch.linspace(0.2, 4, 20, dtype=F64)

    def brown_dennis(x: Tensor, c: Tensor) -> Tensor:
        a, b = (x[0] + t * x[1] - torch.exp(t)), (x[2] + x[3] * torch.sin(t) - torch.cos(t))
        return a**2 + c * b**2

    solver = levenberg_marquardt(brown_dennis)
    start, c = vector(-11, 13, -0.4, 0.2), torch.tensor(1.0, dtype=F64)
    x, state = solver.run(start, c)
    assert state.iter_num < 200
    torch.testing.assert_close(x, vector(-11.594440, 13.203630, -0.403439, 0.236779), rtol=0, atol=2e-6)
    implicit = jacfwd(lambda c: solver.run(start, c)[0])(c)
    forward, reverse = (by(lambda c: solver.run(start, c, implicit_diff=False)[0])(c) for by in (jacfwd, jacrev))
    torch.testing.assert_close(forward, implicit, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(reverse, implicit, rtol=1e-6, atol=1e-8)


class Once(torch.autograd.Function):
    """``x^2``, differentiable once only."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0]


def test_residuals_without_a_second_derivative_have_slow_last_steps() -> None:
    with torch.no_grad():
        x, _ = levenberg_marquardt(lambda x: Once.apply(x) + 1).run(torch.full((1,), 2.0, dtype=F64))
    assert x.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("name", "factor"),
    [("14 Wood", 1), ("5 Beale", 100), ("15 Kowalik and Osborne", 100), ("10 Meyer", 100), ("Bennett5", 1)],
)
def test_a_valley_is_no_minimum_in_float32(name: str, factor: float) -> None:
    x, problem, state = searched(name, factor)
    # Where all exponentials vanish the function is flat, and SciPy finds no way down either.
    with np.errstate(all="ignore"):
        below = optimize.least_squares(problem.residual, x.double().numpy(), method="lm", max_nfev=2000)
    value = float((problem.residual(x.double()) ** 2).sum())
    assert not state.converged or value <= 1.01 * 2 * below.cost + 1e-6


# --- saddles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 10.0, 100.0])
def test_newton_cg_leaves_the_saddle_of_woods_function(factor: float) -> None:
    """It lies where f is 7.88, with curvatures from -0.12 to 950. SciPy's trust-ncg takes about 100 iterations."""
    x, state = newton_cg(wood).run(factor * vector(-3, -1, -3, -1))
    assert state.status == Status.CONVERGED and state.iter_num < 60
    torch.testing.assert_close(x, torch.ones(4, dtype=F64), rtol=0, atol=1e-6)


def test_newton_cg_leaves_a_saddle_from_nearby() -> None:
    def objective(x: Tensor) -> Tensor:
        return 50 * x[0] ** 2 + x[1] ** 4 / 4 - x[1] ** 2 / 2

    x, state = newton_cg(objective).run(vector(1, 1e-6))
    assert state.status == Status.CONVERGED and state.iter_num < 15
    torch.testing.assert_close(x, vector(0, 1), rtol=0, atol=1e-8)


# --- iterates that run off --------------------------------------------------------------------------------------------


def cube_root(x: Tensor) -> Tensor:
    """With this, ``x`` becomes ``-2 x``."""
    return x.sign() * x.abs() ** (1 / 3)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("factory", [newton, gauss_newton])
def test_iterates_that_run_off_have_diverged(factory, dtype: torch.dtype) -> None:
    x, state = factory(cube_root, on_failure="ignore").run(torch.ones(1, dtype=dtype))
    assert state.status == Status.DIVERGED and state.iter_num < 200
    assert torch.isfinite(x).all()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_infinity_is_no_root(dtype: torch.dtype) -> None:
    """Newton's method doubles ``x``."""
    state = newton(lambda x: 1 / x, on_failure="ignore").run(torch.ones(1, dtype=dtype))[1]
    assert state.status == Status.DIVERGED


@pytest.mark.parametrize("factory", [newton, gauss_newton])
def test_iterates_that_come_back_have_not(factory) -> None:
    """From 1e-10 it jumps to 3e19, and from -5 to 143."""
    x, state = factory(lambda x: x**3 - 1).run(vector(1e-10))
    assert state.status == Status.CONVERGED and state.iter_num > 100
    torch.testing.assert_close(x, vector(1))
    x, state = factory(lambda x: x.exp() - 1, atol=1e-12).run(vector(-5))
    assert state.iter_num > 100 and x.abs().max() < 1e-11


@pytest.mark.parametrize("factor", [10, 100])
def test_an_infimum_at_infinity_costs_no_more_than_twice_the_evaluations_of_minpack(factor: int) -> None:
    """Bard's residuals, as ``x_2`` and ``x_3`` go to infinity, with the same relative accuracy of the cost."""
    problem = next(p for p in more_garbow_hillstrom.PROBLEMS if p.name == "8 Bard")
    start, calls = factor * vector(*problem.start), []

    def counted(x: Tensor) -> Tensor:
        calls.append(x)
        return problem.residual(x)

    x, state = levenberg_marquardt(counted, compile="off", on_failure="ignore").run(start)
    assert state.status == Status.UNBOUNDED
    assert problem.residual(x).square().sum().item() == pytest.approx(problem.values[-1], rel=1e-9)
    found = optimize.least_squares(
        lambda x: problem.residual(torch.tensor(x)).numpy(),
        start.numpy(),
        lambda x: jacfwd(problem.residual)(torch.tensor(x)).numpy(),
        method="lm",
        ftol=4e-11,
    )
    assert len(calls) <= 2 * (found.nfev + found.njev)
    # A user's tolerance accepts such a point.
    assert levenberg_marquardt(problem.residual, rtol=1e-12).run(start)[1].status == Status.CONVERGED


def test_gauss_newton_comes_back_from_where_one_residual_exceeds_all_others() -> None:
    """The first step multiplies the product of the unknowns by 1e28, and its gradient makes up the Jacobian."""
    x, state = gauss_newton(brown_almost_linear).run(torch.full((10,), 0.5, dtype=F64))
    assert state.status == Status.CONVERGED
    assert brown_almost_linear(x).norm() < 1e-12
    # The first equations make all unknowns ``a`` but the last, ``11 - 10 a``, and the last is ``a^9 (11 - 10 a) = 1``.
    solutions = np.roots([-10.0, 11.0, *[0.0] * 8, -1.0])
    assert np.abs(solutions - x[0].item()).min() < 1e-7
    torch.testing.assert_close(x, torch.cat([x[:1].expand(9), 11 - 10 * x[:1]]))


def test_gauss_newton_refuses_a_jacobian_without_full_rank() -> None:
    """More, Garbow and Hillstrom's problem 33."""
    A = torch.outer(torch.arange(1, 21, dtype=F64), torch.arange(1, 11, dtype=F64))
    for factor in 1.0, 10.0:
        start = factor * torch.ones(10, dtype=F64)
        x, state = gauss_newton(lambda x: A @ x - 1, on_failure="ignore").run(start)
        assert state.status == Status.DIVERGED and x.abs().max() < 1e3


def test_a_step_to_an_infinite_jacobian_is_refused() -> None:
    """On the way the Jacobian overflows in float32 where the residual does not."""
    rat43 = next(problem for problem in nist.PROBLEMS if problem.name == "Rat43")
    x, _ = levenberg_marquardt(rat43.residual).run(torch.tensor(rat43.start, dtype=torch.float32))
    certified = optimize.least_squares(rat43.residual, rat43.start, method="trf", x_scale="jac").x
    torch.testing.assert_close(x, torch.tensor(certified, dtype=torch.float32), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_first_step_of_the_size_of_the_unknowns_finds_a_decay(dtype: torch.dtype) -> None:
    """One whole Gauss-Newton step makes the decay so fast that no residual depends on its rate."""
    problem = next(problem for problem in nist.PROBLEMS if problem.name == "BoxBOD")
    x, _ = levenberg_marquardt(problem.residual).run(torch.tensor(problem.start, dtype=dtype))
    value = float((problem.residual(x.double()) ** 2).sum())
    assert value == pytest.approx(problem.values[0], rel=1e-3)


@pytest.mark.parametrize("tiny", [1e-6, 1e-12, 1e-37])
def test_an_unknown_may_begin_near_zero(tiny: float) -> None:
    t = torch.linspace(0, 3, 20)
    y = 2 * torch.exp(-0.7 * t) + 0.5
    x, state = levenberg_marquardt(lambda x: x[0] * torch.exp(-x[1] * t) + x[2] - y).run(torch.tensor([1, 1, tiny]))
    assert state.iter_num < 10
    torch.testing.assert_close(x, torch.tensor([2.0, 0.7, 0.5]), rtol=1e-4, atol=0)
