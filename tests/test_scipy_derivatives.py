"""Derivatives and batches of searches by SciPy."""

from __future__ import annotations

import pytest
import torch
from checks.differences import central
from tables.scipy_methods import (
    ACCEPTED,
    EACH,
    F64,
    HESSIAN,
    LEAST_SQUARES,
    MIXED,
    SOLVERS,
    TANH,
    THETA,
    Y,
    cubic,
    enzyme,
    quadratic,
    tanh_derivative,
    tanh_residual,
    tensor,
)
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from implicitdiff.solvers.scipy_least_squares import scipy_least_squares
from implicitdiff.solvers.scipy_minimize import scipy_minimize
from implicitdiff.solvers.scipy_root import scipy_root

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
