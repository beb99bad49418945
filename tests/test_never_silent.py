"""What implicit differentiation elsewhere gets wrong without an error, one test each."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from implicitdiff import LinearSolveError, LinearSolveWarning, custom_root
from implicitdiff.linear_solve import solve_auto, solve_cg, solve_lstsq, solve_lu, solve_normal_cg

F64 = torch.float64


def quadratic(matrix, **options):
    """The minimiser of x'Ax/2 - theta'x, whose derivative in theta is the inverse of A."""

    @custom_root(lambda x, theta: matrix @ x - theta, **options)
    def solver(init, theta):
        return torch.linalg.pinv(matrix) @ theta

    return lambda theta: solver(None, theta)


def matrix_of_condition(condition, n=20, dtype=F64):
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=generator))[0]
    return (q * torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), n, dtype=F64)) @ q.T


@pytest.mark.parametrize("condition", [1e3, 1e5, 1e8])
@pytest.mark.parametrize("dense_up_to", [1000, 0], ids=["exact", "Krylov"])
def test_the_default_is_accurate_on_ill_conditioned_problems_or_says_that_it_is_not(condition, dense_up_to):
    a = matrix_of_condition(condition)
    theta = torch.ones(20, dtype=F64)
    inverse = torch.linalg.inv(a)
    try:
        found = jacrev(quadratic(a, solve=solve_auto(dense_up_to=dense_up_to)))(theta)
    except LinearSolveError:
        assert dense_up_to == 0 and condition > 1e5
        return
    # The bound of a residual of eps^(2/3), and of backward stability.
    rounding = torch.finfo(F64).eps ** (2 / 3) if dense_up_to == 0 else 20 * torch.finfo(F64).eps
    assert (found - inverse).norm() / inverse.norm() < rounding * condition


def test_the_safety_net_counts_every_scalar_of_every_leaf():
    """One row of 150 unknowns, and a scalar, need some 151 iterations: far more than the first dimension."""
    a = matrix_of_condition(1e4, n=151)

    def matvec(v):
        flat = a @ torch.cat([v["row"][0], v["scalar"][None]])
        return {"row": flat[None, :150], "scalar": flat[150]}

    b = {"row": torch.ones(1, 150, dtype=F64), "scalar": torch.tensor(1.0, dtype=F64)}
    x = solve_cg()(matvec, b)
    expected = torch.linalg.inv(a) @ torch.ones(151, dtype=F64)
    found = torch.cat([x["row"][0], x["scalar"][None]])
    assert (found - expected).norm() / expected.norm() < 1e-6


SINGULAR = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=F64)
WEIGHTS = torch.tensor([1.0, -3.0], dtype=F64)
PASSES = {
    "backward": lambda f, t: torch.autograd.grad(f(t.requires_grad_()) @ WEIGHTS, t),
    "grad": lambda f, t: grad(lambda t: f(t) @ WEIGHTS)(t),
    "jvp": lambda f, t: jvp(f, (t,), (WEIGHTS,)),
    "jacfwd": lambda f, t: jacfwd(f)(t),
}


@pytest.mark.parametrize("run", PASSES)
@pytest.mark.parametrize("solve", [None, solve_lu(), solve_auto(dense_up_to=0)], ids=["default", "lu", "Krylov"])
def test_a_singular_jacobian_raises_in_every_pass(run, solve):
    with pytest.raises(LinearSolveError, match="systems failed"):
        PASSES[run](quadratic(SINGULAR, solve=solve), torch.tensor([1.0, 2.0], dtype=F64))


def test_a_singular_jacobian_has_a_derivative_of_least_norm_on_request():
    theta = torch.tensor([1.0, 1.0], dtype=F64)
    torch.testing.assert_close(jacrev(quadratic(SINGULAR, solve=solve_lstsq()))(theta), torch.linalg.pinv(SINGULAR))


@pytest.mark.parametrize("run", PASSES)
def test_failure_may_be_a_warning_or_be_ignored_in_every_pass(run):
    theta = torch.tensor([1.0, 2.0], dtype=F64)
    with pytest.warns(LinearSolveWarning, match="singular"):
        PASSES[run](quadratic(SINGULAR, solve=solve_lu(on_failure="warn")), theta.clone())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PASSES[run](quadratic(SINGULAR, solve=solve_lu(on_failure="ignore")), theta.clone())


def test_one_bad_lane_is_counted_and_the_others_are_right_if_it_is_let_pass():
    scales = torch.tensor([1.0, 0.0, 4.0], dtype=F64)

    def derivative(scale, on_failure):
        solver = custom_root(lambda x, t: scale * x - t, solve=solve_lu(on_failure=on_failure))
        return grad(lambda t: solver(lambda init, t: t)(None, t))(torch.tensor(1.0, dtype=F64))

    with pytest.raises(LinearSolveError, match="1 of 3 systems failed") as caught:
        vmap(lambda s: derivative(s, "raise"))(scales)
    assert (caught.value.failed, caught.value.total) == (1, 3)
    found = vmap(lambda s: derivative(s, "ignore"))(scales)
    assert found[0] == 1.0 and found[2] == 0.25 and not torch.isfinite(found[1])


def test_an_objective_that_curves_downwards_is_no_minimum_for_cg():
    a = torch.diag(torch.tensor([1.0, -1.0], dtype=F64))
    with pytest.raises(LinearSolveError, match="solve_cg: the operator is not positive definite"):
        jacrev(quadratic(a, solve=solve_cg()))(torch.ones(2, dtype=F64))
    torch.testing.assert_close(jacrev(quadratic(a))(torch.ones(2, dtype=F64)), a)


def test_a_budget_of_iterations_is_no_failure():
    a = matrix_of_condition(1e4)
    quadratic_with_budget = quadratic(a, solve=solve_normal_cg(maxiter=2, atol=0))
    assert torch.isfinite(jacrev(quadratic_with_budget)(torch.ones(20, dtype=F64))).all()


@pytest.mark.parametrize("size", [1e-25, 1e-38, 1e25])
@pytest.mark.parametrize("solve", [None, solve_cg(), solve_normal_cg()], ids=["default", "cg", "normal_cg"])
def test_cotangents_of_every_size_are_pulled_back(solve, size):
    a = matrix_of_condition(10.0).to(torch.float32)
    theta = torch.ones(20, requires_grad=True)
    cotangent = torch.linspace(0.5, 1, 20) * size
    (found,) = torch.autograd.grad(quadratic(a, solve=solve)(theta), theta, cotangent)
    expected = torch.linalg.inv(a.to(F64)) @ cotangent.to(F64)
    assert ((found.to(F64) - expected).norm() / expected.norm()) < 1e-4


def test_values_that_are_not_finite_raise_and_do_not_become_zero():
    bad = torch.tensor([[1.0, float("nan")], [0.0, 1.0]], dtype=F64)
    theta = torch.ones(2, dtype=F64, requires_grad=True)
    solver = custom_root(lambda x, theta: bad @ x - theta)(lambda init, theta: theta)
    for solve in None, solve_auto(dense_up_to=0), solve_lstsq(), solve_cg():
        solver = custom_root(lambda x, theta: bad @ x - theta, solve=solve)(lambda init, theta: theta.detach())
        with pytest.raises(LinearSolveError):
            solver(None, theta).sum().backward()
    good = quadratic(torch.eye(2, dtype=F64))
    with pytest.raises(LinearSolveError):
        torch.autograd.grad(good(theta), theta, torch.tensor([1.0, float("inf")], dtype=F64))


def test_a_condition_that_does_not_depend_on_the_solution_raises():
    theta = torch.ones(2, dtype=F64, requires_grad=True)
    with pytest.raises(LinearSolveError):
        custom_root(lambda x, theta: 0 * x.detach() - theta)(lambda init, theta: theta)(None, theta).sum().backward()


def test_a_users_solver_that_fails_is_reported():
    theta = torch.ones(2, dtype=F64, requires_grad=True)

    def diverges(matvec, b):
        return b / 0.0

    with pytest.raises(LinearSolveError, match="diverges"):
        quadratic(torch.eye(2, dtype=F64), solve=diverges)(theta).sum().backward()
    with pytest.raises(ValueError, match="right-hand side"):
        quadratic(torch.eye(2, dtype=F64), solve=lambda matvec, b: b[:1])(theta).sum().backward()
