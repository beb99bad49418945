"""Searches that form Jacobians of conditions with linear algebra in them, in a vmap: as lane by lane."""

from __future__ import annotations

import pytest
import torch
from checks.differences import central
from checks.tensors import draw
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import implicitdiff.solvers as solvers
from implicitdiff import linear_solve

F64 = torch.float64


M = draw(0, 3, 3) + 4 * torch.eye(3, dtype=F64)
OPERATIONS = {
    "solve": torch.linalg.solve,
    "solve of a matrix": lambda A, b: torch.linalg.solve(A, torch.stack([b, b.sin()], 1)).sum(1),
    "inv": lambda A, b: torch.linalg.inv(A) @ b,
    "det": lambda A, b: torch.linalg.det(A) / 60 * b,
    "slogdet": lambda A, b: torch.linalg.slogdet(A)[1] * b,
    "lu_solve": lambda A, b: torch.linalg.lu_solve(*torch.linalg.lu_factor(A), b[:, None])[:, 0],
    "cholesky_solve": lambda A, b: torch.cholesky_solve(b[:, None], torch.linalg.cholesky(A @ A.mT))[:, 0],
    "solve_triangular": lambda A, b: torch.linalg.solve_triangular(A.tril(), b[:, None], upper=False)[:, 0],
    "lstsq": lambda A, b: torch.linalg.lstsq(A, b[:, None])[0][:, 0],
    "pinv": lambda A, b: torch.linalg.pinv(A) @ b,
    "eigvals": lambda A, b: torch.linalg.eigvals(A).abs().sort()[0] / 10 * b,
    "eigvalsh": lambda A, b: torch.linalg.eigvalsh(A @ A.mT) / 50 * b,
}
SOLVERS = ["newton", "chord", "broyden_root", "gauss_newton", "levenberg_marquardt"]
THETA = draw(1, 3, 3).sigmoid()


def condition(name):
    return lambda x, t: x + 0.3 * OPERATIONS[name](M + torch.diag(x), t + x) - t


def outcome(name, solver):
    run = getattr(solvers, solver)(condition(name)).run
    return lambda t: run(torch.zeros(3, dtype=F64), t)[0]


def steps(name, solver):
    init, update, *_ = getattr(solvers, solver)(condition(name))

    def after(t):
        x = torch.zeros(3, dtype=F64)
        state = init(x, t)
        for _ in range(2):
            x, state = update(x, state, t)
        return x

    return after


def overdetermined(name):
    residual = condition(name)
    run = solvers.levenberg_marquardt(lambda x, t: torch.cat([residual(x, t), 0.1 * x])).run
    return lambda t: run(torch.zeros(3, dtype=F64), t)[0]


@pytest.mark.parametrize("name", OPERATIONS)
def test_lanes_with_more_equations_than_unknowns_are_searched_as_alone(name):
    fn = overdetermined(name)
    torch.testing.assert_close(vmap(fn)(THETA), torch.stack([fn(t) for t in THETA]), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("search", [outcome, steps])
def test_lanes_are_searched_as_alone(search, name, solver):
    fn = search(name, solver)
    torch.testing.assert_close(vmap(fn)(THETA), torch.stack([fn(t) for t in THETA]), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["solve", "inv", "slogdet", "lu_solve", "cholesky_solve"])
@pytest.mark.parametrize("search", [outcome, steps])
def test_derivatives_over_lanes_are_right(search, name):
    fn = search(name, "newton")
    first = torch.stack([central(fn, t) for t in THETA])
    for transform in (jacrev, jacfwd):
        torch.testing.assert_close(vmap(transform(fn))(THETA), first, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(grad(lambda t: vmap(fn)(t).sum())(THETA), first.sum(1), rtol=1e-6, atol=1e-8)
    second = torch.stack([central(jacrev(fn), t) for t in THETA])
    torch.testing.assert_close(vmap(hessian(fn))(THETA), second, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["solve_lu", "solve_auto", "solve_lstsq", "solve_gmres"])
@pytest.mark.parametrize("solver", ["newton", "chord"])
def test_a_step_may_use_any_linear_solver_in_lanes(solver, name):
    run = getattr(solvers, solver)(condition("solve"), linear_solve=getattr(linear_solve, name)()).run

    def fn(t):
        return run(torch.zeros(3, dtype=F64), t)[0]

    torch.testing.assert_close(vmap(fn)(THETA), torch.stack([fn(t) for t in THETA]), rtol=1e-8, atol=1e-8)
    nested = vmap(vmap(fn))(THETA.expand(2, 3, 3))
    torch.testing.assert_close(nested[1], nested[0], rtol=1e-12, atol=1e-12)
