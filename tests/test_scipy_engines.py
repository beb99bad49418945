"""SciPy's solvers as engines: what they find is what SciPy finds, and its derivatives are the condition's."""

from __future__ import annotations

import traceback
import warnings

import numpy as np
import pytest
import scipy.optimize
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from implicitdiff.errors import ConvergenceError, ConvergenceWarning
from implicitdiff.solvers import Status
from implicitdiff.solvers.scipy_least_squares import scipy_least_squares
from implicitdiff.solvers.scipy_minimize import scipy_minimize
from implicitdiff.solvers.scipy_root import scipy_root

F32, F64 = torch.float32, torch.float64

ROOT = ["hybr", "lm", "broyden1", "broyden2", "anderson", "linearmixing", "diagbroyden", "excitingmixing", "krylov"]
ROOT = [*ROOT, "df-sane"]
FIRST_ORDER = ["CG", "BFGS", "L-BFGS-B", "TNC", "SLSQP"]
SECOND_ORDER = ["Newton-CG", "trust-constr", "dogleg", "trust-ncg", "trust-krylov", "trust-exact"]
VALUES_ONLY = ["Nelder-Mead", "Powell", "COBYLA", "COBYQA"]
MINIMIZE = [*FIRST_ORDER, *SECOND_ORDER, *VALUES_ONLY]
BOUNDED = ["Nelder-Mead", "Powell", "L-BFGS-B", "TNC", "COBYLA", "COBYQA", "SLSQP", "trust-constr"]
LEAST_SQUARES = ["trf", "dogbox", "lm"]

TANH = 0.9611797513715395
"""z = tanh(z + 1)."""


def tensor(*values, dtype=F64):
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=dtype)


def tanh_residual(z, shift):
    return torch.tanh(z + shift) - z


def tanh_objective(z, shift):
    """Stationary, and least, where z = tanh(z + shift)."""
    return (z**2 / 2 - torch.log(torch.cosh(z + shift))).sum()


def tanh_derivative(z):
    slope = 1 - z**2
    return slope / (1 - slope)


def rosenbrock(x, a=1.0):
    return (a - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


X = tensor(0.038, 0.194, 0.425, 0.626, 1.253, 2.5, 3.74)
Y = tensor(0.050, 0.127, 0.094, 0.2122, 0.2729, 0.2665, 0.3317)
ENZYME = tensor(0.36183687, 0.55626646)


def enzyme(c, y=Y):
    return y - c[0] * X / (c[1] + X)


MIXED = tensor([[1.0, 0.3, -0.2], [0.1, 1.5, 0.4], [0.0, -0.3, 2.0]])


def cubic(x, theta):
    """One root for each theta."""
    return MIXED @ x + 0.1 * x**3 - theta


def quadratic(x, theta):
    """With the Hessian A = MIXED' MIXED + I; least at A^-1 theta."""
    return ((MIXED @ x) ** 2).sum() / 2 + (x**2).sum() / 2 - theta @ x


HESSIAN = MIXED.T @ MIXED + torch.eye(3, dtype=F64)
THETA = tensor(1.0, -2.0, 0.5)


def central(f, x, h=1e-5):
    """The Jacobian of a function of a vector by central differences."""
    return torch.stack([(f(x + h * e) - f(x - h * e)) / (2 * h) for e in torch.eye(len(x), dtype=x.dtype)], dim=-1)


# --- what is found --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ROOT)
def test_the_root_of_tanh_is_the_known_one(method):
    z, state = scipy_root(tanh_residual, method).run(tensor([0.5, 0.3]), tensor(1.0))
    assert state.status == Status.CONVERGED
    assert (z - TANH).abs().max() < 1e-10
    assert state.error == torch.linalg.vector_norm(tanh_residual(z, 1.0)) <= state.target


@pytest.mark.parametrize("method", MINIMIZE)
def test_the_minimum_of_which_tanh_is_the_gradient_is_the_known_one(method):
    z, state = scipy_minimize(tanh_objective, method).run(tensor([1.5, 0.7]), tensor(1.0))
    assert state.status == Status.CONVERGED
    # The second derivative there is 0.92.
    assert (z - TANH).abs().max() < state.error / 0.9 + 1e-12
    assert state.error <= state.target < 1e-6


@pytest.mark.parametrize("method", LEAST_SQUARES)
def test_least_squares_of_tanh_is_the_known_root(method):
    z, state = scipy_least_squares(tanh_residual, method).run(tensor([0.5, 0.3]), tensor(1.0))
    assert state.status == Status.CONVERGED
    assert (z - TANH).abs().max() < 1e-8


@pytest.mark.parametrize("method", LEAST_SQUARES)
def test_the_enzyme_fit_is_the_known_one(method):
    c, state = scipy_least_squares(enzyme, method).run(tensor(0.9, 0.2))
    assert state.status == Status.CONVERGED
    assert (c - ENZYME).abs().max() < 1e-8


@pytest.mark.parametrize("method", BOUNDED)
def test_rosenbrock_in_a_box_ends_in_its_corner(method):
    box = (tensor(1.5, -2.0), tensor(3.0, 0.5))
    x, state = scipy_minimize(rosenbrock, method, bounds=box).run(tensor(2.0, 0.0))
    assert state.status == Status.CONVERGED
    assert (x - tensor(1.5, 0.5)).abs().max() < 1e-7


@pytest.mark.parametrize("method", ["trf", "dogbox"])
def test_rosenbrock_as_least_squares_in_a_box_ends_in_its_corner(method):
    def residuals(x):
        return torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])

    solver = scipy_least_squares(residuals, method, bounds=(tensor(1.5, -2.0), tensor(3.0, 0.5)))
    x, state = solver.run(tensor(2.0, 0.0))
    assert state.status == Status.CONVERGED
    assert (x - tensor(1.5, 0.5)).abs().max() < 1e-8


# --- SciPy itself ---------------------------------------------------------------------------------------------------


def test_a_root_and_its_counts_are_those_of_scipy():
    def fun(x):
        return MIXED.numpy() @ x + 0.1 * x**3 - THETA.numpy()

    def jac(x):
        return MIXED.numpy() + 0.3 * np.diag(x**2)

    expected = scipy.optimize.root(fun, np.zeros(3), jac=jac, options={"xtol": 1e-12})
    x, state = scipy_root(cubic, scipy_options={"xtol": 1e-12}).run(torch.zeros(3, dtype=F64), THETA)
    np.testing.assert_allclose(x, expected.x, rtol=1e-14)
    assert state.iter_num == state.memory.nfev == expected.nfev


@pytest.mark.parametrize("method", ["CG", "BFGS", "L-BFGS-B", "SLSQP", "Newton-CG", "trust-ncg", "Nelder-Mead"])
def test_a_minimum_and_its_counts_are_those_of_scipy(method):
    options = {"xatol": 1e-6, "fatol": 1e-6} if method == "Nelder-Mead" else {}
    options |= {"ftol": 1e-12} if method == "SLSQP" else {}
    derivatives = {"jac": scipy.optimize.rosen_der} if method != "Nelder-Mead" else {}
    if method in SECOND_ORDER:
        derivatives["hessp"] = scipy.optimize.rosen_hess_prod
    start = tensor(-1.2, 1.0)
    solver = scipy_minimize(rosenbrock, method, atol=1e-4, rtol=0.0, scipy_options=options)
    x, state = solver.run(start)
    own = {"gtol": 1e-4 / 2**0.5} if method == "L-BFGS-B" else {"gtol": 1e-4}
    own |= {"norm": 2} if method in ("CG", "BFGS") else {}
    own = {"xtol": np.finfo(float).eps} if method == "Newton-CG" else own
    own = {"ftol": 0.0, **own} if method == "L-BFGS-B" else own
    expected = scipy.optimize.minimize(
        scipy.optimize.rosen, start.numpy(), method=method, **derivatives, options=options or own
    )
    np.testing.assert_allclose(x, expected.x, rtol=1e-5)
    assert abs(int(state.iter_num) - expected.nit) <= 1
    assert abs(int(state.memory.nfev) - expected.nfev) <= 2


def test_a_fit_is_that_of_scipy():
    def fun(c):
        return Y.numpy() - c[0] * X.numpy() / (c[1] + X.numpy())

    box = ([0.0, 0.0], [0.3, 1.0])
    expected = scipy.optimize.least_squares(fun, [0.2, 0.2], bounds=box, xtol=1e-15, ftol=1e-15, gtol=1e-15)
    c, _ = scipy_least_squares(enzyme, bounds=(0.0, tensor(0.3, 1.0))).run(tensor(0.2, 0.2))
    np.testing.assert_allclose(c, expected.x, atol=1e-7)


def test_options_of_scipy_reach_it():
    solver = scipy_minimize(rosenbrock, "trust-ncg", scipy_options={"initial_trust_radius": 1e-3}, maxiter=1)
    x, _ = solver.run(tensor(2.0, 0.0))
    assert (x - tensor(2.0, 0.0)).norm() < 1.001e-3
    loose = scipy_root(cubic, scipy_options={"xtol": 0.5}, on_failure="ignore")
    _, state = loose.run(torch.zeros(3, dtype=F64), THETA)
    assert state.status == Status.LINE_SEARCH_FAILED


# --- what decides ---------------------------------------------------------------------------------------------------


def test_a_search_that_scipy_calls_failed_has_converged_where_the_condition_holds():
    def fun(x):
        return 1 + (x**2).sum() / 2 + np.exp(x).sum()

    def objective(x):
        return 1 + (x**2).sum() / 2 + torch.exp(x).sum()

    direct = scipy.optimize.minimize(fun, [-1.0, 0.5, 2.0], jac=lambda x: x + np.exp(x), options={"gtol": 0.0})
    assert not direct.success
    x, state = scipy_minimize(objective, scipy_options={"gtol": 0.0}).run(tensor(-1.0, 0.5, 2.0))
    assert state.status == Status.CONVERGED
    assert (x + torch.exp(x)).norm() < 1e-7


def test_a_search_that_scipy_calls_successful_has_failed_where_the_condition_does_not_hold():
    solver = scipy_minimize(rosenbrock, "Nelder-Mead", scipy_options={"xatol": 1.0, "fatol": 1e3})
    with pytest.raises(ConvergenceError, match="LINE_SEARCH_FAILED") as caught:
        solver.run(tensor(2.0, 0.0))
    assert caught.value.status == Status.LINE_SEARCH_FAILED
    assert caught.value.error > caught.value.target


def test_the_tolerances_are_those_of_the_condition():
    for atol in (1e-2, 1e-5, 1e-9):
        _, state = scipy_minimize(rosenbrock, atol=atol, rtol=0.0).run(tensor(-1.2, 1.0))
        assert state.target == atol
        assert state.error <= atol
        assert state.iter_num <= scipy_minimize(rosenbrock, atol=1e-10, rtol=0.0).run(tensor(-1.2, 1.0))[1].iter_num


@pytest.mark.parametrize("solver", [scipy_minimize, scipy_least_squares])
def test_an_initial_guess_outside_of_the_box_is_moved_into_it(solver):
    def fn(x):
        return ((x - 2) ** 2).sum() if solver is scipy_minimize else x - 2

    x, _ = solver(fn, bounds=(0.0, tensor(1.0, 5.0))).run(tensor(-3.0, 9.0))
    assert (x - tensor(1.0, 2.0)).abs().max() < 1e-7


@pytest.mark.parametrize("method", ["L-BFGS-B", "TNC", "SLSQP"])
def test_a_box_may_be_a_point(method):
    x, state = scipy_minimize(rosenbrock, method, bounds=(2.0, 2.0)).run(tensor(0.0, 0.0))
    assert x.tolist() == [2.0, 2.0]
    assert state.status == Status.CONVERGED


def test_bounds_may_be_absent_on_a_side_and_given_as_trees():
    def fn(p):
        return ((p["a"] - 2) ** 2).sum() + (p["b"] + 3) ** 2

    start = {"a": torch.zeros(2, dtype=F64), "b": tensor(0.0)}
    x, _ = scipy_minimize(fn, bounds=({"a": None, "b": -1.0}, {"a": tensor(1.0, 9.0), "b": None})).run(start)
    assert (x["a"] - tensor(1.0, 2.0)).abs().max() < 1e-7
    assert x["b"] == -1
    x, _ = scipy_minimize(fn, bounds=(None, 0.0)).run(start)
    assert x["a"].tolist() == [0.0, 0.0]
    assert (x["b"] + 3).abs() < 1e-7


# --- derivatives ----------------------------------------------------------------------------------------------------

MODES = pytest.mark.parametrize("jacobian", [jacrev, jacfwd])


@MODES
@pytest.mark.parametrize("method", ["hybr", "lm", "krylov"])
def test_the_derivative_of_a_root_is_implicit(jacobian, method):
    solver = scipy_root(cubic, method)

    def solution(theta):
        return solver.run(torch.zeros(3, dtype=F64), theta)[0]

    found = jacobian(solution)(THETA)
    x = solution(THETA)
    torch.testing.assert_close(found, torch.linalg.inv(MIXED + 0.3 * torch.diag(x**2)), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found, central(solution, THETA), rtol=1e-5, atol=1e-6)


@MODES
@pytest.mark.parametrize("method", ["BFGS", "trust-constr", "Nelder-Mead"])
def test_the_derivative_of_a_minimum_is_implicit(jacobian, method):
    def solution(theta):
        return scipy_minimize(quadratic, method, atol=1e-5).run(torch.zeros(3, dtype=F64), theta)[0]

    torch.testing.assert_close(jacobian(solution)(THETA), torch.linalg.inv(HESSIAN), rtol=1e-9, atol=1e-9)


@MODES
@pytest.mark.parametrize("method", LEAST_SQUARES)
def test_the_derivative_of_a_fit_is_implicit(jacobian, method):
    solver = scipy_least_squares(enzyme, method)

    def solution(y):
        return solver.run(tensor(0.9, 0.2), y)[0]

    found = jacobian(solution)(Y)
    torch.testing.assert_close(found, central(solution, Y, 1e-4), rtol=1e-4, atol=1e-4)
    c = solution(Y)
    j = jacrev(enzyme)(c, Y)
    second = jacrev(jacrev(enzyme))(c, Y)
    exact = -torch.linalg.inv(j.T @ j + torch.einsum("i,ijk->jk", enzyme(c), second))
    exact = exact @ (j.T + jacrev(lambda y: jacrev(enzyme)(c, y).T @ enzyme(c).detach())(Y))
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


def test_an_unknown_at_a_bound_moves_with_the_bound_alone():
    """min |x|^2 / 2 - theta x in a box: x = clip(theta, lower, upper)."""

    def solution(theta, lower, upper, method="L-BFGS-B"):
        solver = scipy_minimize(lambda x: (x**2).sum() / 2 - theta @ x, method, bounds=(lower, upper))
        return solver.run(torch.zeros(3, dtype=F64))[0]

    operands = (tensor(-3.0, 0.3, 5.0), tensor(-1.0, -1.0, -1.0), tensor(1.0, 2.0, 3.0))
    for method in ("L-BFGS-B", "SLSQP", "trust-constr", "TNC"):
        for jacobian in (jacrev, jacfwd):
            at = jacobian(lambda *o, m=method: solution(*o, m), argnums=(0, 1, 2))(*operands)
            for found, diagonal in zip(at, ([0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]), strict=True):
                torch.testing.assert_close(found, torch.diag(tensor(diagonal)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["trf", "dogbox"])
def test_a_fit_at_a_bound_moves_with_the_bound_and_what_is_free_follows(method):
    def fit(upper, y):
        solver = scipy_least_squares(enzyme, method, bounds=(0.0, torch.stack([upper, 10 * upper])))
        return solver.run(tensor(0.2, 0.2), y)[0]

    upper = tensor(0.3)
    by_bound, by_data = jacrev(fit, argnums=(0, 1))(upper, Y)
    step = 1e-4
    difference = (fit(upper + step, Y) - fit(upper - step, Y)) / (2 * step)
    torch.testing.assert_close(by_bound, difference, rtol=1e-4, atol=1e-4)
    assert by_bound[0] == 1
    assert by_data[0].abs().max() < 1e-12
    torch.testing.assert_close(by_data, central(lambda y: fit(upper, y), Y, 1e-4), rtol=1e-4, atol=1e-4)


SOLVERS = {
    "root": lambda: scipy_root(tanh_residual),
    "minimize": lambda: scipy_minimize(tanh_objective),
    "bounded": lambda: scipy_minimize(tanh_objective, bounds=(0.0, 2.0)),
    "least squares": lambda: scipy_least_squares(tanh_residual),
    "bounded least squares": lambda: scipy_least_squares(tanh_residual, bounds=(0.0, 2.0)),
}
EACH = pytest.mark.parametrize("name", SOLVERS)
# SciPy's minimisers stop at a gradient of about the square root of the precision, and |z''| < 2.
ACCEPTED = {"root": 1e-10, "minimize": 1e-7, "bounded": 1e-7, "least squares": 1e-10, "bounded least squares": 1e-10}


@EACH
def test_gradients_hessians_and_batches_of_them(name):
    def solution(shift):
        return SOLVERS[name]().run(torch.full_like(shift, 0.9), shift)[0]

    shifts = tensor(0.8, 1.0, 1.3, 2.0)
    z = vmap(solution)(shifts)
    assert (z[1] - TANH).abs() < ACCEPTED[name]
    torch.testing.assert_close(z, torch.stack([solution(s) for s in shifts]), rtol=1e-13, atol=0)
    first = vmap(grad(solution))(shifts)
    torch.testing.assert_close(first, tanh_derivative(z), rtol=0, atol=ACCEPTED[name])
    torch.testing.assert_close(first, torch.stack([grad(solution)(s) for s in shifts]), rtol=1e-12, atol=0)
    # With p = 1 - z^2, z' = p / z^2 = 1 / z^2 - 1 and z'' = -2 z' / z^3.
    torch.testing.assert_close(vmap(hessian(solution))(shifts), -2 * first / z**3, rtol=0, atol=10 * ACCEPTED[name])
    torch.testing.assert_close(
        vmap(jacfwd(jacfwd(solution)))(shifts), -2 * first / z**3, rtol=0, atol=10 * ACCEPTED[name]
    )


@EACH
def test_plain_autograd_sees_the_implicit_derivative(name):
    shift = tensor(1.0).requires_grad_()
    z, state = SOLVERS[name]().run(tensor(0.5), shift)
    z.backward()
    torch.testing.assert_close(shift.grad, tanh_derivative(tensor(TANH)), rtol=0, atol=ACCEPTED[name])
    assert not state.error.requires_grad


# --- batches --------------------------------------------------------------------------------------------------------


def test_lanes_have_their_own_captured_tensors_and_stop_by_themselves():
    """Two vmaps, each of which batches one captured tensor, and an initial guess that neither batches."""
    matrices = torch.stack([MIXED, MIXED.T + torch.eye(3, dtype=F64)])
    thetas = torch.stack([THETA, 10 * THETA, torch.zeros(3, dtype=F64)])

    def one(matrix, theta):
        return scipy_root(lambda x: matrix @ x + 0.1 * x**3 - theta).run(torch.zeros(3, dtype=F64))

    x, state = vmap(vmap(one, in_dims=(None, 0)), in_dims=(0, None))(matrices, thetas)
    looped = [[one(m, t) for t in thetas] for m in matrices]
    torch.testing.assert_close(x, torch.stack([torch.stack([y for y, _ in row]) for row in looped]), rtol=1e-13, atol=0)
    assert state.memory.nfev.tolist() == [[int(s.memory.nfev) for _, s in row] for row in looped]
    assert state.iter_num[:, 2].tolist() == [0, 0]
    assert len(set(state.iter_num.reshape(-1).tolist())) > 2


def test_lanes_have_their_own_bounds():
    uppers = tensor([[1.0, 2.0, 0.1], [3.0, 0.1, 0.2]])

    def one(upper):
        x, _ = scipy_minimize(quadratic, bounds=(-1.0, upper)).run(torch.zeros(3, dtype=F64), 3 * THETA)
        return x

    x = vmap(one)(uppers)
    torch.testing.assert_close(x, torch.stack([one(u) for u in uppers]), rtol=1e-13, atol=0)
    found = vmap(jacrev(one))(uppers)
    torch.testing.assert_close(found, torch.stack([central(one, u) for u in uppers]), rtol=1e-6, atol=1e-6)


def test_one_lane_is_evaluated_at_a_time():
    """What SciPy asks for in one lane costs nothing in the others."""
    sizes = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(x):
            sizes.append(x.numel())
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, g):
            return g

        @staticmethod
        def vmap(info, in_dims, x):
            return Spy.apply(x), in_dims[0]

    _, state = vmap(scipy_root(lambda z, s: tanh_residual(Spy.apply(z), s), "df-sane").run)(
        torch.zeros(5, 2, dtype=F64), torch.linspace(0.5, 1.5, 5, dtype=F64)
    )
    assert sizes.count(2) >= state.memory.nfev.sum()
    # The result's shape, the initial guess, a point near it and the solution; and six more to confirm the target there.
    assert sizes.count(10) <= 10


# --- the pure pair --------------------------------------------------------------------------------------------------


@EACH
def test_an_update_is_the_whole_search(name):
    solver, start, shift = SOLVERS[name](), tensor([0.5, 0.2]), tensor(1.0)
    state = solver.init(start, shift)
    assert state.status == Status.RUNNING and state.memory.nfev == 0
    z, end = solver.update(start, state, shift)
    expected, at = solver.run(start, shift)
    assert end.status == Status.CONVERGED
    torch.testing.assert_close(z, expected, rtol=0, atol=0)
    assert [int(t) for t in (end.iter_num, end.memory.nfev)] == [int(t) for t in (at.iter_num, at.memory.nfev)]
    again, still = solver.update(z + 1, end, shift)
    torch.testing.assert_close(again, z + 1, rtol=0, atol=0)
    assert still.memory.nfev == end.memory.nfev


@EACH
def test_an_update_is_differentiated_implicitly_under_every_transform(name):
    def updated(start, shift):
        solver = SOLVERS[name]()
        return solver.update(start, solver.init(start, shift), shift)[0]

    shifts = tensor(0.8, 1.0, 1.3)
    starts = torch.full_like(shifts, 0.5)
    z = vmap(updated)(starts, shifts)
    for derivative in (grad, jacfwd):
        by_start, by_shift = vmap(derivative(updated, argnums=(0, 1)))(starts, shifts)
        assert by_start.tolist() == [0.0, 0.0, 0.0]
        torch.testing.assert_close(by_shift, tanh_derivative(z), rtol=0, atol=ACCEPTED[name])


def test_an_update_leaves_the_lanes_alone_that_have_stopped():
    solver = scipy_root(tanh_residual)
    starts, shifts = tensor(0.5, TANH, 0.3), torch.ones(3, dtype=F64)
    state = vmap(solver.init)(starts, shifts)
    assert state.status.tolist() == [0, 1, 0]
    z, state = vmap(solver.update)(starts, state, shifts)
    assert state.status.tolist() == [1, 1, 1]
    assert z[1] == TANH
    assert (z - TANH).abs().max() < 1e-10
    assert state.iter_num[1] == 0
    assert state.iter_num[0] > 0


@EACH
def test_unrolling_is_refused(name):
    with pytest.raises(NotImplementedError, match="implicit_diff=False"):
        SOLVERS[name]().run(tensor(0.5), tensor(1.0), implicit_diff=False)


def test_history_and_callback_see_both_ends():
    seen = []
    _, state = scipy_root(tanh_residual).run(
        tensor(0.5), tensor(1.0), keep_history=True, callback=lambda n, z, s: seen.append((n, float(z)))
    )
    assert state.history.shape == (2,)
    assert state.history[-1] == state.error
    assert [n for n, _ in seen] == [0, int(state.iter_num)]
    assert seen[0][1] == 0.5 and abs(seen[1][1] - TANH) < 1e-10


def test_the_condition_is_told():
    box = (0.0, tensor(1.0, 2.0, 3.0))
    x = tensor(1.0, 0.5, 0.0)
    g = HESSIAN @ x - THETA
    torch.testing.assert_close(scipy_minimize(quadratic).optimality_fn(x, THETA), g)
    expected = x - (x - g).clip(torch.zeros(3, dtype=F64), box[1])
    torch.testing.assert_close(scipy_minimize(quadratic, bounds=box).optimality_fn(x, THETA), expected)


# --- trees and dtypes -----------------------------------------------------------------------------------------------


def test_unknowns_may_be_a_tree_of_several_dtypes():
    def residual(p, s):
        return {"w": torch.tanh(p["w"] + s) - p["w"], "v": p["v"] ** 3 - s.to(F32)}

    start = {"w": torch.full((2, 2), 0.5, dtype=F64), "v": torch.ones(1, dtype=F32)}
    for method in ("hybr", "krylov"):
        found, _ = scipy_root(residual, method).run(start, tensor(1.0))
        assert found["w"].dtype == F64 and found["v"].dtype == F32
        assert (found["w"] - TANH).abs().max() < 1e-4
        assert (found["v"] - 1).abs() < 1e-4
    slope = grad(lambda s: scipy_root(residual).run(start, s)[0]["v"].sum())(tensor(8.0))
    assert slope.item() == pytest.approx(1 / 12, rel=1e-5)


def test_complex_unknowns_are_pairs():
    z, _ = scipy_root(lambda z, c: z**2 - c).run(torch.tensor(1.0 + 0.1j, dtype=torch.complex128), tensor(-4.0))
    assert abs(z.item() - 2j) < 1e-10


@pytest.mark.parametrize("method", ROOT)
def test_roots_in_single_precision(method):
    z, state = scipy_root(tanh_residual, method).run(tensor([0.5, 0.3], dtype=F32), tensor(1.0, dtype=F32))
    assert z.dtype == state.error.dtype == F32
    assert (z - TANH).abs().max() < 1e-4


@pytest.mark.parametrize("method", MINIMIZE)
def test_minima_in_single_precision(method):
    z, state = scipy_minimize(tanh_objective, method).run(tensor([1.5, 0.7], dtype=F32), tensor(1.0, dtype=F32))
    assert z.dtype == F32
    assert (z - TANH).abs().max() < 5e-3
    assert state.error <= state.target


@pytest.mark.parametrize("method", LEAST_SQUARES)
def test_fits_in_single_precision(method):
    x, y = X.to(F32), Y.to(F32)
    c, _ = scipy_least_squares(lambda c: y - c[0] * x / (c[1] + x), method).run(tensor([0.9, 0.2], dtype=F32))
    assert c.dtype == F32
    assert (c - ENZYME.to(F32)).abs().max() < 1e-2


# --- failures -------------------------------------------------------------------------------------------------------


def no_root(x, shift=1.0):
    return x**2 + shift


@pytest.mark.parametrize("method", ["hybr", "lm"])
def test_a_search_that_cannot_go_on_says_so(method):
    with pytest.raises(ConvergenceError, match="LINE_SEARCH_FAILED") as caught:
        scipy_root(no_root, method).run(tensor([0.5, 0.3]))
    assert caught.value.status == Status.LINE_SEARCH_FAILED
    assert caught.value.iterations > 0


def test_a_net_that_is_met_is_a_failure_and_a_budget_is_not():
    with pytest.raises(ConvergenceError, match="BUDGET_SPENT"):
        scipy_root(no_root, "df-sane").run(tensor([0.5, 0.3]))
    x, state = scipy_minimize(rosenbrock, maxiter=3).run(tensor(-1.2, 1.0))
    assert state.status == Status.BUDGET_SPENT
    assert state.iter_num == 3
    assert rosenbrock(x) < rosenbrock(tensor(-1.2, 1.0))


@pytest.mark.parametrize("method", [*ROOT, *MINIMIZE, *LEAST_SQUARES])
def test_every_method_keeps_to_its_budget(method):
    def residuals(x):
        return torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])

    factory = scipy_root if method in ROOT else scipy_minimize if method in MINIMIZE else scipy_least_squares
    fn = rosenbrock if factory is scipy_minimize else residuals
    _, state = factory(fn, method, maxiter=5).run(tensor(-1.2, 1.0))
    assert state.status == Status.BUDGET_SPENT
    # SciPy may count the evaluations with which it checks its arguments.
    assert 5 <= state.iter_num <= 8


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_divergence(value):
    for solver, start in (
        (scipy_root(lambda x: torch.where(x > 0, value, x - 1)), tensor([-0.5])),
        (scipy_minimize(lambda x: torch.where(x > 0, value, (x - 1) ** 2).sum(), "trust-exact"), tensor([0.5])),
        (scipy_least_squares(lambda x: torch.where(x > 0, value, x - 1)), tensor([0.5])),
    ):
        with pytest.raises(ConvergenceError) as caught:
            solver.run(start)
        assert caught.value.status in (Status.DIVERGED, Status.LINE_SEARCH_FAILED)


def test_a_constant_infinite_value_is_no_minimum_though_its_gradient_is_zero():
    _, state = scipy_minimize(lambda x: torch.where(x[0] > 0.5, torch.inf, x[0] ** 2), on_failure="ignore").run(
        tensor([1.0])
    )
    assert state.status == Status.DIVERGED


def test_an_objective_without_a_lower_bound_diverges():
    with pytest.raises(ConvergenceError, match="DIVERGED"):
        scipy_minimize(lambda x: -torch.exp(x).sum()).run(tensor(1.0, 1.0))


@pytest.mark.parametrize(
    ("solver", "start"),
    [
        (scipy_root(lambda x: 0 * x + 1, "krylov", on_failure="ignore"), tensor(1.0, 1.0)),
        (scipy_minimize(lambda x: x.sum(), "trust-constr", on_failure="ignore"), tensor(1.0, 1.0)),
    ],
)
def test_a_search_that_scipy_breaks_off_with_an_exception_diverges(solver, start):
    _, state = solver.run(start)
    assert state.status == Status.DIVERGED


def test_in_a_batch_lanes_fail_alone():
    shifts = tensor(-4.0, 1.0, -9.0, 2.0)
    solver = scipy_root(no_root, on_failure="ignore")
    x, state = vmap(solver.run)(torch.full((4, 1), 1.5, dtype=F64), shifts)
    failed = int(Status.LINE_SEARCH_FAILED)
    assert state.status.tolist() == [1, failed, 1, failed]
    assert (x[[0, 2], 0] - tensor(2.0, 3.0)).abs().max() < 1e-10
    with pytest.raises(ConvergenceError, match="lanes 1, 3: 2 of 4") as caught:
        vmap(scipy_root(no_root).run)(torch.full((4, 1), 1.5, dtype=F64), shifts)
    assert caught.value.lanes == (1, 3) and caught.value.total == 4


def test_in_a_batch_each_lane_has_its_own_status():
    def objective(x, kind):
        unbounded = torch.where(kind == 1, -torch.exp(x).sum(), rosenbrock(x))
        return torch.where(kind == 0, (x**2).sum(), unbounded)

    def one(kind):
        return scipy_minimize(objective, on_failure="ignore", maxiter=5).run(tensor(2.0, 1.0), kind)[1].status

    statuses = vmap(one)(torch.arange(3))
    assert statuses.tolist() == [Status.CONVERGED, Status.DIVERGED, Status.BUDGET_SPENT]
    assert statuses.tolist() == [int(one(k)) for k in torch.arange(3)]


def test_a_failure_may_be_a_warning():
    with pytest.warns(ConvergenceWarning, match="scipy_root"):
        scipy_root(no_root, on_failure="warn").run(tensor([0.5]))


def test_a_failure_in_an_update_is_a_status():
    solver = scipy_root(no_root)
    start = tensor([0.5])
    _, state = solver.update(start, solver.init(start))
    assert state.status == Status.LINE_SEARCH_FAILED


class Oops(Exception):
    pass


@pytest.mark.parametrize("method", [*ROOT, *MINIMIZE, *LEAST_SQUARES])
def test_an_exception_of_the_users_function_comes_through_with_its_traceback(method):
    calls = []

    def breaks(x):
        calls.append(None)
        if len(calls) > 4:
            raise Oops("of the user")
        return rosenbrock(x) if method in MINIMIZE else torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])

    factory = scipy_root if method in ROOT else scipy_minimize if method in MINIMIZE else scipy_least_squares
    with pytest.raises(Oops, match="of the user") as caught:
        factory(breaks, method).run(tensor(-1.2, 1.0))
    assert "breaks" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]


def test_a_warning_of_the_users_function_comes_through():
    def warns(x):
        warnings.warn("of the user", RuntimeWarning, stacklevel=1)
        return rosenbrock(x)

    with pytest.warns(RuntimeWarning, match="of the user"):
        scipy_minimize(warns).run(tensor(2.0, 0.0))


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scipy_root(no_root, "newton"), "scipy_root: method must be one of hybr, .*, got 'newton'"),
        (lambda: scipy_minimize(rosenbrock, "sgd"), "scipy_minimize: method must be one of .*, got 'sgd'"),
        (lambda: scipy_least_squares(enzyme, "gn"), "scipy_least_squares: method must be one of trf, dogbox, lm"),
        (lambda: scipy_root(no_root, None), "method must be one of"),
        (lambda: scipy_minimize(rosenbrock, "BFGS", bounds=(0.0, 1.0)), "'BFGS' takes no bounds; use one of nelder"),
        (lambda: scipy_least_squares(enzyme, "lm", bounds=(0.0, 1.0)), 'method "lm" takes no bounds; use "trf"'),
        (lambda: scipy_minimize(rosenbrock, bounds=3.0), "bounds must be a pair"),
        (lambda: scipy_minimize(rosenbrock, bounds=(0.0, 1.0, 2.0)), "bounds must be a pair"),
        (lambda: scipy_minimize(rosenbrock, scipy_options={"maxiter": 3}), "'maxiter', got 3; give maxiter="),
        (lambda: scipy_root(no_root, scipy_options={"maxfev": 3}), "'maxfev', got 3; give maxiter="),
        (lambda: scipy_least_squares(enzyme, scipy_options={"loss": "huber"}), "'loss', got 'huber'"),
        (lambda: scipy_root(no_root, maxiter=0), "maxiter must be an integer >= 1"),
        (lambda: scipy_root(no_root, rtol=-1.0), "rtol must be a finite number >= 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_where_the_solver_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bounds_that_cross_or_do_not_fit_are_refused():
    for factory, fn in ((scipy_minimize, rosenbrock), (scipy_least_squares, enzyme)):
        with pytest.raises(ValueError, match="lower has to be at most upper"):
            factory(fn, bounds=(tensor(0.0, 2.0), 1.0)).run(tensor(0.5, 0.5))
        with pytest.raises(ValueError, match="upper has to be"):
            factory(fn, bounds=(0.0, torch.ones(3, dtype=F64))).run(tensor(0.5, 0.5))


def test_an_option_that_scipy_does_not_know_is_told():
    with pytest.warns(scipy.optimize.OptimizeWarning, match="Unknown solver options: nonsense"):
        scipy_minimize(rosenbrock, scipy_options={"nonsense": 1}).run(tensor(2.0, 0.0))
    with pytest.raises(TypeError, match="nonsense"):
        scipy_least_squares(enzyme, scipy_options={"nonsense": 1}).run(tensor(0.9, 0.2))


def test_what_is_no_function_is_refused():
    with pytest.raises(TypeError, match="scipy_root: a function was expected, got int"):
        scipy_root(3)
