"""A user's own function as the linear solver of derivatives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from checks.tensors import draw
from tables.linear_solvers import F64, general, with_singular_values
from tables.linear_systems import (
    DERIVATIVE,
    ONES,
    TRANSFORMS,
    WRONG_RESULTS,
    assert_same,
    condition,
    failure_of,
    user_matrix,
)
from torch import Tensor
from torch.func import grad, jacrev, vmap

from implicitdiff import custom_root
from implicitdiff.linear_solve import LinearSolver, solve_auto, solve_cg, solve_cholesky, solve_gmres, solve_lu

# --- a user's own function ------------------------------------------------------------------------------------------


def richardson(matvec, b):
    x = torch.zeros_like(b)
    for _ in range(80):
        x = x + 0.15 * (b - matvec(x))
    return x


def through_scipy(matvec, b):
    def array_matvec(v):
        return matvec(torch.from_numpy(np.array(v, dtype=np.float64))).numpy()

    operator = scipy.sparse.linalg.LinearOperator((3, 3), matvec=array_matvec, dtype=np.float64)
    x, info = scipy.sparse.linalg.gmres(operator, b.numpy(), rtol=1e-13, atol=0.0)
    assert info == 0
    return torch.from_numpy(x)


def wrapped(solver: LinearSolver) -> Callable:
    return lambda matvec, b: solver(lambda v: matvec(v) + 0.0 * v, b)


def materialising(matvec, b):
    return torch.linalg.inv(vmap(matvec, out_dims=1)(torch.eye(3, dtype=b.dtype))) @ b


USERS = {
    "loop": richardson,
    "lu, passed on": lambda matvec, b: solve_lu()(matvec, b),
    "lu, wrapped": wrapped(solve_lu()),
    "cg, wrapped": wrapped(solve_cg()),
    "gmres, wrapped": wrapped(solve_gmres()),
    "cholesky, wrapped": wrapped(solve_cholesky()),
    "auto, wrapped": wrapped(solve_auto()),
    "vmap of matvec": materialising,
    "scipy": through_scipy,
}


def newton(init: Tensor, theta: Tensor, b: Tensor) -> Tensor:
    x = init
    for _ in range(12):
        jacobian = user_matrix(theta) + torch.diag_embed(0.3 * x**2)
        x = x - (torch.linalg.inv(jacobian) @ condition(x, theta, b)[..., None])[..., 0]
    return x


USER_TRANSFORMS = [
    "grad",
    "jacfwd",
    "hessian",
    "jacrev of jacrev",
    "jacfwd of jacfwd",
    "three times reverse",
    "grad of jvp",
    "vmap of vmap",
    "vmap of grad",
    "vmap of hessian",
    "grad of vmap",
    "hessian of vmap of vmap",
]


@pytest.mark.parametrize(
    ("user", "transform"),
    [
        (user, transform)
        for user in USERS
        for transform in USER_TRANSFORMS
        # NumPy sees no batched tensors; jacobians and hessians batch too.
        if not (user == "scipy" and any(word in transform for word in ("vmap", "jac", "hessian", "forward")))
    ],
)
def test_a_users_own_function_solves_the_systems_of_derivatives(user, transform):
    solution = custom_root(condition, solve=USERS[user])(newton)
    theta, b = draw(7, 3, 3) / 2, draw(8, 3)
    init = torch.zeros(3, dtype=F64)
    apply = TRANSFORMS[transform]
    result = apply(lambda theta, b: solution(init, theta, b), theta, b)
    assert_same(result, apply(lambda theta, b: newton(init, theta, b), theta, b), DERIVATIVE)


@pytest.mark.parametrize("user", USERS)
def test_a_users_own_function_serves_backward_passes_of_first_and_second_order(user):
    solution = custom_root(condition, solve=USERS[user])(newton)
    init, results = torch.zeros(3, dtype=F64), []
    for f in (solution, newton):
        theta, b = (draw(7, 3, 3) / 2).requires_grad_(), draw(8, 3).requires_grad_()
        first = torch.autograd.grad((f(init, theta, b) ** 3).sum(), (theta, b), create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), (theta, b))
        results.append([g.detach() for g in (*first, *second)])
    assert_same(results[0], results[1], DERIVATIVE)


@pytest.mark.parametrize("user", ["loop", "lu, wrapped", "cg, wrapped", "gmres, wrapped", "vmap of matvec"])
def test_a_users_own_function_meets_trees(user):
    """The tree is made flat and back by the function itself."""

    def flat(v):
        return torch.cat([v["x"], v["y"][None]])

    def tree(v):
        return {"x": v[:2], "y": v[2]}

    def solve(matvec, b):
        return tree(USERS[user](lambda v: flat(matvec(tree(v))), flat(b)))

    def tree_condition(x, theta, b):
        return tree(condition(flat(x), theta, b))

    solution = custom_root(tree_condition, solve=solve)(lambda init, theta, b: tree(newton(init, theta, b)))
    theta, b, init = draw(7, 3, 3) / 2, draw(8, 3), torch.zeros(3, dtype=F64)
    for name in ("grad", "jacfwd", "hessian", "vmap of grad", "grad of vmap"):
        apply = TRANSFORMS[name]
        result = apply(lambda theta, b: flat(solution(init, theta, b)), theta, b)
        assert_same(result, apply(lambda theta, b: newton(init, theta, b), theta, b), DERIVATIVE)


def test_a_users_own_function_may_solve_some_systems_with_the_one_and_some_with_another_solver():
    seen = []

    def solve(matvec, b):
        seen.append(b.shape)
        return (solve_lu() if len(seen) % 2 else solve_cg())(matvec, b)

    solution = custom_root(condition, solve=solve)(newton)
    theta, b, init = draw(7, 3, 3) / 2, draw(8, 3), torch.zeros(3, dtype=F64)
    result = jacrev(lambda theta: solution(init, theta, b))(theta)
    assert_same(result, jacrev(lambda theta: newton(init, theta, b))(theta), DERIVATIVE)
    assert seen == [torch.Size([3])]


@pytest.mark.parametrize("wrong", WRONG_RESULTS)
def test_a_users_own_function_whose_result_is_not_like_the_right_hand_side_is_refused(wrong):
    def solve(matvec, b):
        return WRONG_RESULTS[wrong](b)

    solution = custom_root(lambda x, theta: x - theta, solve=solve)(lambda init, theta: theta.clone())
    with pytest.raises(ValueError, match=r"solve=.*right-hand side.*float64\[3\]"):
        grad(lambda theta: solution(None, theta).sum())(ONES)


def test_a_users_own_function_whose_result_is_not_finite_is_a_failure():
    solution = custom_root(lambda x, theta: x - theta, solve=lambda matvec, b: b / 0)(lambda i, theta: theta.clone())
    error = failure_of(lambda: grad(lambda theta: solution(None, theta).sum())(ONES))
    assert error.failed == 1


# --- the adjoint of an operator that is nearly Hermitian --------------------------------------------------------------


def nearly_hermitian(skew: Tensor) -> Callable[[Tensor], Tensor]:
    """``A + skew S``, with ``S`` skew-symmetric, so small that conjugate gradients converge."""
    a = with_singular_values(torch.linspace(1, 2, 12, dtype=F64))
    a, s = a @ a.mT, general(12)
    return lambda v: a @ v + skew * ((s - s.mT) @ v)


@pytest.mark.parametrize("skew", [0.0, 1e-6])
def test_conjugate_gradients_take_the_adjoint_where_it_is_another(skew):
    matvec, b, u = nearly_hermitian(torch.tensor(skew, dtype=F64)), draw(1, 12), draw(2, 12)
    matrix = torch.stack([matvec(e) for e in torch.eye(12, dtype=F64)], dim=-1)
    _, pull = torch.func.vjp(lambda b: solve_cg(rtol=1e-13)(matvec, b), b)
    torch.testing.assert_close(pull(u)[0], torch.linalg.solve(matrix.mT, u), rtol=1e-10, atol=0)


def test_a_derivative_sees_that_an_operator_is_hermitian_for_these_operands_alone():
    """The second derivative in ``skew`` at 0, where the operator is its own adjoint."""
    b, u = draw(1, 12), draw(2, 12)

    def by_cg(skew: Tensor) -> Tensor:
        return u @ solve_cg(rtol=1e-13)(nearly_hermitian(skew), b)

    def exactly(skew: Tensor) -> Tensor:
        matrix = vmap(nearly_hermitian(skew), out_dims=1)(torch.eye(12, dtype=F64))
        return u @ torch.linalg.solve(matrix, b)

    skew = torch.tensor(0.0, dtype=F64)
    for order in (grad, lambda f: grad(grad(f))):
        torch.testing.assert_close(order(by_cg)(skew), order(exactly)(skew), rtol=1e-8, atol=1e-8)
