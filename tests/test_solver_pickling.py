"""Everything that is made of functions that pickle pickles, and states load with `weights_only=True`."""

from __future__ import annotations

import copy
import pickle
import re
from functools import partial
from typing import Any

import pytest
import tables.linear_solvers as linear
import tables.solvers as searches
import torch
from checks.copies import pickled, saved
from tables.solvers import SEARCHES, THETA, Row
from torch import Tensor, multiprocessing
from torch.func import grad, jacrev
from torch.utils.data import DataLoader, Dataset

import implicitdiff.solvers as solvers
from implicitdiff import custom_root, unroll
from implicitdiff.linear_solve import jacobi_preconditioner, solve_cg
from implicitdiff.solvers import KKTSolution, Solver, make_kkt_optimality_fn

F64 = torch.float64
every_solver = pytest.mark.parametrize("row", SEARCHES, ids=str)


# --- solvers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", [pickled, saved, copy.deepcopy])
@every_solver
def test_a_solver_that_was_pickled_solves_and_differentiates_as_before(row: Row, through: Any) -> None:
    solver, start = row.solver(), row.family.start
    again = through(solver)
    assert isinstance(again, Solver) and again.run.maker is again.init.maker
    assert torch.equal(again.run(start(THETA), THETA)[0], solver.run(start(THETA), THETA)[0])
    gradients = [grad(lambda theta, s=s: s.run(start(theta), theta)[0].square().sum())(THETA) for s in (again, solver)]
    assert torch.equal(*gradients)


@every_solver
def test_each_function_of_a_solver_pickles_by_itself(row: Row) -> None:
    solver, x = row.solver(), row.family.start(THETA)
    init, update, run, optimality_fn = (pickled(fn) for fn in solver)
    state = solver.init(x, THETA)
    results = init(x, THETA), update(x, state, THETA), run(x, THETA), optimality_fn(x, THETA)
    expected = state, solver.update(x, state, THETA), solver.run(x, THETA), solver.optimality_fn(x, THETA)
    leaves, others = (torch.utils._pytree.tree_leaves(t) for t in (results, expected))
    assert all(torch.equal(a, b) for a, b in zip(leaves, others, strict=True))


@every_solver
def test_a_state_loads_with_weights_only_and_the_search_goes_on_from_it(row: Row) -> None:
    solver, x = row.solver(), row.family.start(THETA)
    state = solver.init(x, THETA)
    loaded = saved(state, weights_only=True)
    assert type(loaded) is type(state)
    (x_there, there), (x_here, here) = solver.update(x, loaded, THETA), solver.update(x, state, THETA)
    assert torch.equal(x_there, x_here) and torch.equal(there.error, here.error)


PROGRAM = (2 * torch.eye(3, dtype=F64), -THETA, torch.ones(1, 3, dtype=F64), torch.zeros(1, dtype=F64))


def test_a_quadratic_program_pickles_with_its_state_and_its_solution() -> None:
    solution, state = solvers.qp().run(None, *PROGRAM)
    again, _ = pickled(solvers.qp()).run(None, *PROGRAM)
    loaded, loaded_state = saved((solution, state), weights_only=True)
    assert isinstance(loaded, KKTSolution) and isinstance(loaded_state.memory, solvers.QPMemory)
    for t in (again.primal, loaded.primal):
        torch.testing.assert_close(t, (THETA - THETA.mean()) / 2)


def squares(x: Tensor, c: Tensor) -> Tensor:
    return ((x - c) ** 2).sum()


def excess(x: Tensor) -> Tensor:
    return x.sum()


def test_conditions_of_karush_kuhn_and_tucker_pickle() -> None:
    at = KKTSolution(THETA, THETA.new_ones(()))
    conditions = pickled(make_kkt_optimality_fn(squares, excess))(at, torch.zeros(3, dtype=F64))
    assert torch.equal(conditions.primal, 2 * THETA + 1) and torch.equal(conditions.dual_eq, THETA.sum())


# --- linear solvers, loops, decorated functions -----------------------------------------------------------------------

MATRIX = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=F64)


def times_matrix(v: Tensor) -> Tensor:
    return MATRIX @ v


@pytest.mark.parametrize("row", linear.SOLVERS, ids=str)
def test_a_linear_solver_that_was_pickled_solves_as_before(row: linear.Row) -> None:
    matrix, b = row.matrix(3), torch.ones(3, dtype=F64)
    for through in (pickled, saved):
        assert torch.equal(through(row.factory())(lambda v: matrix @ v, b), row.factory()(lambda v: matrix @ v, b))


def test_a_preconditioner_pickles_within_its_linear_solver() -> None:
    solve = pickled(solve_cg(preconditioner=jacobi_preconditioner(times_matrix, torch.zeros(2, dtype=F64))))
    b = torch.ones(2, dtype=F64)
    torch.testing.assert_close(solve(times_matrix, b), torch.linalg.solve(MATRIX, b))


def descend(w: Tensor, rate: Tensor) -> Tensor:
    return w - rate * 2 * w


@pytest.mark.parametrize("checkpoint_every", [None, 2])
def test_an_unrolled_loop_pickles(checkpoint_every: int | None) -> None:
    loop = unroll(descend, 5, checkpoint_every)
    assert "descend" in repr(loop)
    w, rate = torch.tensor(1.0, dtype=F64), torch.tensor(0.1, dtype=F64)
    torch.testing.assert_close(grad(pickled(loop), argnums=1)(w, rate), -10 * (1 - 2 * rate) ** 4)


def cube(x: Tensor, theta: Tensor) -> Tensor:
    return x**3 - theta


@custom_root(cube)
def cube_root(init: Any, theta: Tensor) -> Tensor:
    return theta.pow(1 / 3)


def test_a_decorated_function_pickles_by_its_name() -> None:
    assert pickled(cube_root) is cube_root
    at = torch.tensor([1.0, 8.0], dtype=F64)
    pulled = jacrev(partial(pickled(partial(cube_root, None))))(at)
    torch.testing.assert_close(pulled, torch.diag(at.pow(-2 / 3) / 3))


# --- in other processes -----------------------------------------------------------------------------------------------


class Solutions(Dataset[Tensor]):
    def __init__(self, solver: Solver) -> None:
        self.solver = solver

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> Tensor:
        theta = (i + 1) * THETA
        return self.solver.run(searches.zeros(theta), theta)[0].detach()


def test_the_spawned_worker_of_a_data_loader_solves() -> None:
    solver = solvers.lbfgs(searches.objective, rtol=1e-12, atol=1e-12)
    context = multiprocessing.get_context("spawn")
    loader = DataLoader(Solutions(solver), batch_size=None, num_workers=1, multiprocessing_context=context)
    for i, x in enumerate(loader):
        torch.testing.assert_close(x, searches.rotated_cubic((i + 1) * THETA))


@every_solver
def test_a_saved_state_names_no_private_module(row: Row) -> None:
    state = row.solver().init(row.family.start(THETA), THETA)
    named = set(re.findall(rb"implicitdiff[.\w]*", pickle.dumps(state)))
    assert named
    assert not [name for name in named if b"._" in name]
