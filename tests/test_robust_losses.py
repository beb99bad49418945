"""Robust losses in `levenberg_marquardt`; the table of solvers has a row with Huber's."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from checks.differences import central
from checks.tensors import number, vector
from tables.losses import decay_at
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from implicitdiff.errors import ConvergenceError, LinearSolveError
from implicitdiff.solvers import Status, lbfgs, levenberg_marquardt, scipy_least_squares
from implicitdiff.solvers._loop.losses import loss_of

F64 = torch.float64
NAMED = ("linear", "soft_l1", "huber", "cauchy", "arctan", "tukey")
EACH = pytest.mark.parametrize("loss", NAMED)
IN_SCIPY = NAMED[:-1]


# --- the losses -------------------------------------------------------------------------------------------------------


@EACH
def test_derivatives_of_a_loss_are_those_of_its_formula(loss):
    rho, first, second = loss_of("test", loss)
    z = vector(0.0, 1e-12, 0.3, 0.999, 1.001, 2.0, 50.0, 1e8)
    torch.testing.assert_close(first(z), vmap(grad(rho))(z), rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(second(z), vmap(grad(grad(rho)))(z), rtol=1e-7, atol=1e-15)
    # Near zero all of them are z.
    assert rho(z)[0] == 0 and first(z)[0] == 1
    torch.testing.assert_close(rho(z)[1] / z[1], number(1.0), rtol=1e-10, atol=0)
    # Both sides meet at 1.
    one = vector(1 - 1e-9, 1 + 1e-9)
    for value in (rho(one), first(one)):
        torch.testing.assert_close(value[0], value[1], rtol=0, atol=1e-8)


@pytest.mark.parametrize("loss", IN_SCIPY)
def test_losses_are_those_of_scipy(loss):
    """SciPy gives the cost, ``f_scale^2 sum rho((r / f_scale)^2) / 2``, at a fixed point."""
    r = np.array([-3.0, 0.2, 0.5, 9.0])
    once = scipy.optimize.least_squares(lambda x: r + 0 * x, 0.0, loss=loss, f_scale=0.7, max_nfev=1)
    memory = levenberg_marquardt(lambda x: torch.from_numpy(r) + 0 * x, loss=loss, loss_scale=0.7).init(number(0.0))
    torch.testing.assert_close(memory.memory.losses.sum(), number(once.cost), rtol=1e-13, atol=0)


def test_tukey_is_the_biweight():
    """``c^2 / 6 (1 - (1 - (r / c)^2)^3)``, and constant beyond ``c``."""
    r, c = vector(-0.2, 0.5, 1.9, 2.1, -70.0), 2.0
    losses = levenberg_marquardt(lambda x: r + 0 * x, loss="tukey", loss_scale=c).init(number(0.0)).memory.losses
    inside = 1 - (1 - (r / c) ** 2) ** 3
    torch.testing.assert_close(losses, c**2 / 6 * torch.where(r.abs() < c, inside, 1.0))


# --- fits -------------------------------------------------------------------------------------------------------------

TIMES = torch.linspace(0.0, 4.0, 40, dtype=F64)
NOISE = 0.03 * torch.sin(37 * TIMES + TIMES**2)
OUTLIERS = torch.zeros(40, dtype=F64).index_fill(0, torch.tensor([3, 11, 12, 25, 33]), 1.0) * (1 + torch.cos(9 * TIMES))
Y = 2 * torch.exp(-TIMES) + 0.5 + NOISE + OUTLIERS


decay = decay_at(TIMES, Y)


GUESS = vector(1.0, 0.5, 0.3)


def cost(p: Tensor, loss: Any, scale: Any, y: Tensor = Y) -> Tensor:
    return (0.5 * scale**2 * loss_of("test", loss).rho((decay(p, y) / scale) ** 2)).sum()


def tukey_for_scipy(z: np.ndarray) -> np.ndarray:
    u = np.where(z <= 1, 1 - z, 0.0)
    return np.stack([(1 - u**3) / 3, u**2, -2 * u])


@pytest.mark.parametrize("scale", [0.1, 1.0])
@EACH
def test_fits_are_those_of_scipy(loss, scale):
    guess = GUESS
    if loss == "tukey":
        # Its cost has several minima, so both searches start near one of them.
        guess, _ = levenberg_marquardt(decay, loss="huber", loss_scale=scale).run(GUESS)
    tight = {"xtol": 1e-15, "ftol": 1e-15, "gtol": 1e-13}
    theirs = scipy.optimize.least_squares(
        lambda p: decay(torch.from_numpy(p)).numpy(),
        guess.numpy(),
        jac=lambda p: jacfwd(decay)(torch.from_numpy(p)).numpy(),
        loss=tukey_for_scipy if loss == "tukey" else loss,
        f_scale=scale,
        **tight,
    )
    p, state = levenberg_marquardt(decay, loss=loss, loss_scale=scale).run(guess)
    assert state.status == Status.CONVERGED
    torch.testing.assert_close(p, torch.from_numpy(theirs.x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(state.memory.losses.sum(), number(theirs.cost), rtol=1e-11, atol=0)
    assert state.iter_num <= 2 * theirs.nfev + 5


@EACH
def test_the_solution_is_a_minimum_of_the_true_cost(loss):
    p, state = levenberg_marquardt(decay, loss=loss, loss_scale=0.2).run(GUESS)
    gradient = grad(cost)(p, loss, 0.2)
    torch.testing.assert_close(gradient, torch.zeros_like(p), rtol=0, atol=2 * float(state.target))
    assert torch.linalg.eigvalsh(hessian(cost)(p, loss, 0.2)).min() > 0
    solver = levenberg_marquardt(decay, loss=loss, loss_scale=0.2)
    torch.testing.assert_close(solver.optimality_fn(GUESS), grad(cost)(GUESS, loss, 0.2), rtol=1e-12, atol=1e-12)


def test_the_robust_cost_decides_which_steps_are_made():
    solver = levenberg_marquardt(decay, loss="cauchy", loss_scale=0.1)
    p, state = GUESS, solver.init(GUESS)
    costs, squares = [cost(p, "cauchy", 0.1)], [decay(p).square().sum()]
    while state.status == Status.RUNNING:
        p, state = solver.update(p, state)
        costs.append(cost(p, "cauchy", 0.1))
        squares.append(decay(p).square().sum())
    assert state.status == Status.CONVERGED
    assert (torch.stack(costs).diff() <= 1e-14).all()
    assert torch.stack(squares).diff().max() > 0.1


@pytest.mark.parametrize("loss", NAMED[1:])
def test_a_loss_and_bounds(loss):
    bounds = ([0.0, 0.0, 0.0], [1.9, 5.0, 0.45])
    theirs = scipy.optimize.least_squares(
        lambda p: decay(torch.from_numpy(p)).numpy(),
        GUESS.numpy(),
        jac=lambda p: jacfwd(decay)(torch.from_numpy(p)).numpy(),
        loss=tukey_for_scipy if loss == "tukey" else loss,
        f_scale=0.3,
        bounds=bounds,
        xtol=1e-15,
        ftol=1e-15,
        gtol=1e-13,
    )

    def solution(upper: Tensor) -> Tensor:
        solver = levenberg_marquardt(decay, bounds=(0.0, upper), loss=loss, loss_scale=0.3, rtol=0.0, atol=1e-11)
        return solver.run(GUESS)[0]

    upper = vector(*bounds[1])
    torch.testing.assert_close(solution(upper), torch.from_numpy(theirs.x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(jacrev(solution)(upper), central(solution, upper), rtol=1e-6, atol=1e-6)


def test_single_precision():
    y = Y.float()
    p, state = levenberg_marquardt(
        lambda p: p[0] * torch.exp(-p[1] * TIMES.float()) + p[2] - y, loss="soft_l1", loss_scale=0.1
    ).run(GUESS.float())
    expected, _ = levenberg_marquardt(decay, loss="soft_l1", loss_scale=0.1).run(GUESS)
    assert state.status == Status.CONVERGED and p.dtype == torch.float32
    torch.testing.assert_close(p.double(), expected, rtol=1e-3, atol=1e-3)


# --- derivatives ------------------------------------------------------------------------------------------------------


def location(y: Tensor, scale: Any, loss: Any = "huber", **how: Any) -> Tensor:
    solver = levenberg_marquardt(lambda m: m - y, loss=loss, loss_scale=scale, rtol=0.0, atol=1e-12)
    return solver.run(number(2.0), **how)[0]


SAMPLE = vector(1.0, 2.0, 3.0, 2.5, 40.0, 50.0, -30.0)


def test_huber_of_a_sample_in_closed_form():
    """The inliers balance as many scales as there are more outliers above than below."""
    scale = number(1.7)
    m = location(SAMPLE, scale)
    torch.testing.assert_close(m, (8.5 + scale) / 4, rtol=1e-12, atol=0)
    by_y, by_scale = jacrev(location, argnums=(0, 1))(SAMPLE, scale)
    torch.testing.assert_close(by_y, vector(1, 1, 1, 1, 0, 0, 0) / 4)
    torch.testing.assert_close(by_scale, number(0.25))


def test_an_outlier_of_tukey_has_no_influence():
    by_y = jacfwd(partial(location, loss="tukey"))(SAMPLE, 3.0)
    assert (by_y[4:] == 0).all() and (by_y[:4] > 0).all()
    torch.testing.assert_close(by_y.sum(), number(1.0))


@pytest.mark.parametrize("loss", NAMED[1:])
def test_derivatives_in_data_and_scale_are_those_of_differences(loss):
    def solution(both: Tensor) -> Tensor:
        y, scale = both.split([40, 1])
        solver = levenberg_marquardt(decay, loss=loss, loss_scale=scale[0], rtol=0.0, atol=1e-12)
        return solver.run(GUESS, y)[0]

    def some(few: Tensor) -> Tensor:
        """As a function of three data and the scale."""
        return solution(torch.cat([few[:3], Y[3:], few[3:]]))

    at = torch.cat([Y[:3], vector(0.41)])
    expected = central(some, at)
    for jacobian in (jacrev, jacfwd):
        torch.testing.assert_close(jacobian(some)(at), expected, rtol=1e-7, atol=1e-8)

    def slope(few: Tensor) -> Tensor:
        return jacrev(lambda few: some(few)[1])(few)

    second = central(slope, at)
    for order in (hessian, lambda f: jacrev(jacrev(f))):
        torch.testing.assert_close(order(lambda few: some(few)[1])(at), second, rtol=1e-5, atol=1e-6)


def test_lanes_have_their_own_scales():
    scales = vector(0.2, 1.0, 30.0)

    def solution(scale: Tensor) -> Tensor:
        return location(SAMPLE, scale, "cauchy")

    torch.testing.assert_close(vmap(solution)(scales), torch.stack([solution(s) for s in scales]), rtol=1e-11, atol=0)
    expected = torch.cat([central(lambda s: solution(s[0])[None], s[None])[0] for s in scales])
    torch.testing.assert_close(vmap(grad(solution))(scales), expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(grad(lambda s: vmap(solution)(s).sum())(scales), expected, rtol=1e-6, atol=1e-8)


def test_unrolled_steps_have_the_derivative_of_the_condition():
    for loss in ("huber", "cauchy"):
        found = jacrev(partial(location, loss=loss, implicit_diff=False), argnums=(0, 1))(SAMPLE, number(1.7))
        expected = jacrev(partial(location, loss=loss), argnums=(0, 1))(SAMPLE, number(1.7))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_every_residual_may_have_a_scale_of_its_own():
    scales = torch.linspace(0.1, 0.6, 40, dtype=F64)
    p, _ = levenberg_marquardt(decay, loss="soft_l1", loss_scale=scales).run(GUESS)
    expected, _ = lbfgs(lambda p: cost(p, "soft_l1", scales)).run(GUESS)
    torch.testing.assert_close(p, expected, rtol=1e-6, atol=1e-6)


def test_residuals_may_be_a_tree():
    def parts(p: Tensor) -> dict[str, Tensor]:
        r = decay(p)
        return {"a": r[:24].reshape(4, 6), "b": [r[24], r[25:]]}

    p, _ = levenberg_marquardt(parts, loss="huber", loss_scale=0.2).run(GUESS)
    expected, _ = levenberg_marquardt(decay, loss="huber", loss_scale=0.2).run(GUESS)
    torch.testing.assert_close(p, expected, rtol=1e-9, atol=1e-9)


# --- a loss that is a function ----------------------------------------------------------------------------------------


def test_a_function_is_a_loss():
    same = location(SAMPLE, 1.3, lambda z: torch.log(1 + z))
    torch.testing.assert_close(same, location(SAMPLE, 1.3, "cauchy"), rtol=1e-11, atol=0)


def test_what_a_loss_captures_is_differentiated_and_batched():
    """``log(1 + a z) / a`` with scale 1 is Cauchy's with the scale ``a^(-1/2)``."""

    def solution(a: Tensor) -> Tensor:
        return location(SAMPLE, 1.0, lambda z: torch.log1p(a * z) / a)

    def reference(a: Tensor) -> Tensor:
        return location(SAMPLE, a**-0.5, "cauchy")

    a = vector(0.2, 0.7, 2.0)
    torch.testing.assert_close(vmap(solution)(a), vmap(reference)(a), rtol=1e-10, atol=0)
    torch.testing.assert_close(vmap(grad(solution))(a), vmap(grad(reference))(a), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(grad(grad(solution))(a[1]), grad(grad(reference))(a[1]), rtol=1e-6, atol=1e-8)


# --- failure ----------------------------------------------------------------------------------------------------------


def test_a_guess_from_which_tukey_sees_no_residual_fails():
    """The cost is flat there: the gradient is exactly zero, and no solution."""
    with pytest.raises(ConvergenceError, match="DIVERGED"):
        levenberg_marquardt(lambda m: m - SAMPLE, loss="tukey").run(number(500.0))
    solver = levenberg_marquardt(lambda m: m - SAMPLE, loss="tukey", loss_scale=3.0, on_failure="ignore")
    m, state = vmap(solver.run)(vector(2.0, 500.0, 41.0))
    assert [Status(int(s)) for s in state.status] == [Status.CONVERGED, Status.DIVERGED, Status.CONVERGED]
    torch.testing.assert_close(m[0], location(SAMPLE, 3.0, "tukey"), rtol=1e-8, atol=0)
    assert m[1] == 500.0


def test_tukey_finds_a_fit_of_the_few_where_the_guess_is_among_them():
    """It is not convex: from beside the outlier at -30, that is all it sees."""
    m, _ = levenberg_marquardt(lambda m: m - SAMPLE, loss="tukey", loss_scale=3.0).run(number(-29.0))
    torch.testing.assert_close(m, number(-30.0), rtol=1e-9, atol=0)


def test_a_minimum_that_is_not_strict_has_no_derivative():
    """One residual within the scale, and two unknowns."""
    t, y = torch.arange(4.0, dtype=F64), vector(0.0, 50.0, -70.0, 90.0)
    solver = levenberg_marquardt(lambda p, y: p[0] + p[1] * t - y, loss="tukey")
    x, state = solver.run(vector(0.1, 0.1), y)
    assert state.status == Status.CONVERGED and x[0].abs() < 1e-9
    with pytest.raises(LinearSolveError, match="singular"):
        jacrev(lambda y: solver.run(vector(0.1, 0.1), y)[0])(y)


@EACH
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_residual_that_is_no_number_is_no_outlier(loss, bad):
    y = torch.cat([SAMPLE, vector(bad)])
    with pytest.raises(ConvergenceError, match="DIVERGED"):
        levenberg_marquardt(lambda m: m - y, loss=loss, loss_scale=3.0).run(number(2.0))


def test_a_perfect_fit_is_a_solution():
    y = 2 * torch.exp(-TIMES) + 0.5
    for loss in NAMED:
        p, state = levenberg_marquardt(lambda p: decay(p, y), loss=loss, loss_scale=3.0).run(GUESS)
        assert state.status == Status.CONVERGED
        torch.testing.assert_close(p, vector(2.0, 1.0, 0.5), rtol=1e-8, atol=1e-8)


def test_arguments_that_make_no_sense_are_refused():
    for loss in ("tuckey", 3.0, None):
        with pytest.raises(ValueError, match="loss must be one of linear, soft_l1, huber, cauchy, arctan, tukey, or a"):
            levenberg_marquardt(decay, loss=loss)
    for scale in (0.0, -1.0, float("nan"), float("inf"), "1", True):
        with pytest.raises(ValueError, match="loss_scale must be a finite number > 0"):
            levenberg_marquardt(decay, loss="huber", loss_scale=scale)
    for scale, message in ((vector(1.0, 2.0), "broadcasts to the residuals"), (number(-1.0), "positive in every")):
        with pytest.raises(ValueError, match=message):
            levenberg_marquardt(decay, loss="huber", loss_scale=scale).run(GUESS)
    with pytest.raises(ValueError, match="real residuals"):
        levenberg_marquardt(lambda p: torch.complex(p, p), loss="huber").run(GUESS)
    with pytest.raises(ValueError, match="must return a floating-point tensor of the shape of its argument"):
        levenberg_marquardt(decay, loss=lambda z: z.sum()).run(GUESS)
    with pytest.raises(ValueError, match="levenberg_marquardt"):
        scipy_least_squares(decay, scipy_options={"loss": "huber"})
