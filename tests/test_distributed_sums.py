"""One problem whose terms lie on several ranks: every search, linear solver and derivative, against closed forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as c10d
from checks.derivatives import backward_twice, by_backward
from checks.tensors import draw
from checks.traffic import counted
from checks.transforms import WEIGHTS
from tables.linear_solvers import SOLVERS
from tables.solvers import SEARCHES, THETA
from tables.spread import SPREADS
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import implicitdiff as idf
from implicitdiff import custom_fixed_point, custom_root, solvers
from implicitdiff.distributed import psum_of
from implicitdiff.linear_solve import solve_auto

Function = Callable[[Tensor], Tensor]
BATCH = torch.stack([THETA, 0.8 * THETA, 1.1 * THETA])


def scored(f: Function) -> Function:
    return lambda theta: (WEIGHTS[:3] * (x := f(theta))).sum() + (x**2).sum() / 2


DERIVATIVES: dict[str, Callable[[Function], Tensor]] = {
    "grad": lambda f: grad(scored(f))(THETA),
    "jacrev": lambda f: jacrev(f)(THETA),
    "jacfwd": lambda f: jacfwd(f)(THETA),
    "hessian": lambda f: hessian(scored(f))(THETA),
    "vmap of grad": lambda f: vmap(grad(scored(f)))(BATCH),
    "backward()": lambda f: by_backward(scored(f), THETA),
    "backward() twice": lambda f: backward_twice(scored(f), THETA),
}


def agreed(answers: list[Any]) -> tuple[Tensor, dict[str, int]]:
    """The result and the number of collectives, which are the same on all ranks, to the last bit."""
    (first, calls, sent), *others = answers
    for result, other_calls, other_sent in others:
        assert torch.equal(result, first)
        assert (other_calls, other_sent) == (calls, sent)
    return first, calls


def check(result: Tensor, expected: Tensor, tolerance: float) -> None:
    assert result.shape == expected.shape
    assert (result - expected).abs().max() / expected.abs().max().clamp(min=1e-3) < tolerance


# --- searches ---------------------------------------------------------------------------------------------------------

NAMED = {row.name: row for row in SEARCHES}


def searched(name: str, spread: str, derivative: str) -> Any:
    row = NAMED[name]
    solver = row.solver(SPREADS[spread](row.family.functions[0]))
    return counted(lambda: DERIVATIVES[derivative](lambda theta: solver.run(row.family.start(theta), theta)[0]))


@pytest.mark.one_in(8)
@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("name", NAMED)
def test_a_search_of_the_ranks_is_that_of_one_process(on_ranks, name: str, spread: str, derivative: str) -> None:
    result, _ = agreed(on_ranks(2, searched, name, spread, derivative))
    check(result, DERIVATIVES[derivative](NAMED[name].family.closed_form), NAMED[name].tolerance)


# --- linear solvers ---------------------------------------------------------------------------------------------------

TIGHT = {"rtol": 1e-13, "atol": 1e-13}
LINEAR = {
    **{row.name: row.factory for row in SOLVERS if row.name != "auto, matrix-free"},
    "auto, matrix-free": lambda **options: solve_auto(dense_up_to=0, **options),
}
ITERATIVE = {row.name for row in SOLVERS if row.iterative}


def linear_root(x: Tensor, theta: Tensor) -> Tensor:
    return x + x**3 / 9 - theta / 2


def solved(name: str, spread: str, derivative: str) -> Any:
    solve = LINEAR[name](**({"rtol": 1e-13} if name in ITERATIVE else {}))
    inner = {"linear_solve": solve} if name in ITERATIVE else {}
    solver = solvers.newton(SPREADS[spread](linear_root), solve=solve, **inner, **TIGHT)
    return counted(lambda: DERIVATIVES[derivative](lambda theta: solver.run(torch.zeros_like(theta), theta)[0]))


def linear_solution(theta: Tensor) -> Tensor:
    x = theta / 2
    for _ in range(60):
        x = theta / 2 - x**3 / 9
    return x


@pytest.mark.one_in(8)
@pytest.mark.parametrize("derivative", ["grad", "jacfwd", "hessian", "vmap of grad", "backward() twice"])
@pytest.mark.parametrize("spread", ["psum_of", "by hand"])
@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_solver_of_the_ranks_is_that_of_one_process(on_ranks, name: str, spread: str, derivative: str) -> None:
    result, _ = agreed(on_ranks(2, solved, name, spread, derivative))
    check(result, DERIVATIVES[derivative](linear_solution), 1e-9)


# --- other ways to a solution -----------------------------------------------------------------------------------------

ROWS, OUTPUTS = draw(1, 24, 3), draw(2, 24).sign()


def own(rows: Tensor) -> Tensor:
    return rows[c10d.get_rank() :: c10d.get_world_size()]


def likelihood(w: Tensor, rows: Tensor, outputs: Tensor) -> Tensor:
    return torch.nn.functional.softplus(-outputs * (rows @ w)).sum() / len(ROWS)


def penalised(w: Tensor, theta: Tensor) -> Tensor:
    """Logistic regression in one process."""
    return likelihood(w, ROWS, OUTPUTS) + (theta.exp() * w**2).sum() / 2


def penalised_by_ranks(w: Tensor, theta: Tensor) -> Tensor:
    """The same with some rows on each rank; the rows are arguments that nothing differentiates."""
    return psum_of(likelihood)(w, own(ROWS), own(OUTPUTS)) + (theta.exp() * w**2).sum() / 2


def by_custom_root(objective: Any, theta: Tensor) -> Tensor:
    @custom_root(grad(objective), check=1e-8)
    def solve(w: Tensor, theta: Tensor) -> Tensor:
        for _ in range(12):
            w = w - torch.linalg.solve(jacfwd(grad(objective))(w, theta), grad(objective)(w, theta))
        return w

    return solve(torch.zeros_like(theta), theta)


def by_custom_fixed_point(objective: Any, theta: Tensor) -> Tensor:
    @custom_fixed_point(lambda w, theta: w - grad(objective)(w, theta) / 2)
    def solve(w: Tensor, theta: Tensor) -> Tensor:
        return by_custom_root(objective, theta)

    return solve(torch.zeros_like(theta), theta)


def by_optimizer(objective: Any, theta: Tensor) -> Tensor:
    """Six steps, and the derivatives of the steps."""
    optimizer = idf.adam(lr=0.1, eps_root=1e-8)

    def step(carry: Any, theta: Tensor) -> Any:
        w, state = carry
        updates, state = optimizer.update(grad(objective)(w, theta), state)
        return idf.apply_updates(w, updates), state

    start = torch.ones_like(theta)
    return idf.unroll(step, 6, 2)((start, optimizer.init(start)), theta)[0][0]


def by_unrolled_search(objective: Any, theta: Tensor) -> Tensor:
    solver = solvers.lbfgs(objective, rtol=0.0, atol=0.0, maxiter=6)
    return solver.run(torch.zeros_like(theta), theta, implicit_diff=False)[0]


def by_several_captured(objective: Any, theta: Tensor) -> Tensor:
    """The hyperparameters are captured, and one of them depends on another search."""
    first = solvers.lbfgs(lambda w: objective(w, theta), **TIGHT).run(torch.zeros_like(theta))[0]
    return solvers.newton_cg(lambda w: objective(w - first / 9, theta * first), **TIGHT).run(first.detach())[0]


def by_quadratic_program(objective: Any, theta: Tensor) -> Tensor:
    """The model of the objective at one, in a box; the Hessian is a sum over ranks."""
    one = torch.ones_like(theta)
    hessian_at_one, slope = jacfwd(grad(objective))(one, theta), grad(objective)(one, theta)
    eye = torch.eye(3, dtype=one.dtype)
    return solvers.qp().run(None, hessian_at_one, slope, None, None, eye, one / 9, -one)[0].primal


WAYS = {
    "custom_root": by_custom_root,
    "custom_fixed_point": by_custom_fixed_point,
    "optimizer": by_optimizer,
    "unrolled search": by_unrolled_search,
    "several captured": by_several_captured,
    "quadratic program": by_quadratic_program,
    "minimize": lambda objective, theta: idf.minimize(objective, torch.zeros_like(theta), theta, **TIGHT)[0],
    "root": lambda objective, theta: idf.root(grad(objective), torch.zeros_like(theta), theta, **TIGHT)[0],
    "root_vjp": lambda objective, theta: idf.root_vjp(
        grad(objective), by_custom_root(objective, theta), (theta,), torch.ones_like(theta)
    )[0],
}


def found_by(name: str, derivative: str) -> Any:
    return counted(lambda: DERIVATIVES[derivative](lambda theta: WAYS[name](penalised_by_ranks, theta)))


@pytest.mark.parametrize("derivative", ["grad", "jacfwd", "hessian", "vmap of grad", "backward() twice"])
@pytest.mark.parametrize("name", WAYS)
def test_a_way_of_the_ranks_is_that_of_one_process(on_ranks, name: str, derivative: str) -> None:
    result, _ = agreed(on_ranks(2, found_by, name, derivative))
    check(result, DERIVATIVES[derivative](lambda theta: WAYS[name](penalised, theta)), 1e-9)
