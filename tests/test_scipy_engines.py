"""SciPy's solvers as engines: what they find is what SciPy finds, and its derivatives are the condition's."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from tables.scipy_methods import (
    ACCEPTED,
    EACH,
    F32,
    F64,
    HESSIAN,
    LEAST_SQUARES,
    MINIMIZE,
    MIXED,
    ROOT,
    SECOND_ORDER,
    SOLVERS,
    TANH,
    THETA,
    X,
    Y,
    cubic,
    enzyme,
    quadratic,
    rosenbrock,
    tanh_derivative,
    tanh_objective,
    tanh_residual,
    tensor,
)
from torch.func import grad, jacfwd, vmap

from implicitdiff.errors import ConvergenceError
from implicitdiff.solvers import Status
from implicitdiff.solvers.scipy_least_squares import scipy_least_squares
from implicitdiff.solvers.scipy_minimize import scipy_minimize
from implicitdiff.solvers.scipy_root import scipy_root

BOUNDED = ["Nelder-Mead", "Powell", "L-BFGS-B", "TNC", "COBYLA", "COBYQA", "SLSQP", "trust-constr"]
ENZYME = tensor(0.36183687, 0.55626646)


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
