"""What is printed at a prompt: `repr`, `help`, `dir`."""

from __future__ import annotations

import importlib
import inspect
import pydoc
import types

import pytest
import torch
from tables.solvers import SEARCHES

import implicitdiff
from implicitdiff import linear_solve, optim, schedule, solvers
from implicitdiff.solvers import SolverOptions, Status

MODULES = ("", "errors", "implicit", "linear_solve", "nn", "objects", "optim", "projections", "prox", "pytree")
FACTORIES = [
    factory
    for name in solvers.__all__
    if isinstance(factory := getattr(solvers, name), types.FunctionType)
    and factory.__annotations__.get("return", "").startswith("Solver")
]


def ridge(x, penalty):
    return ((x - 1) ** 2).sum() + penalty * (x**2).sum()


SHOWN = {
    "lbfgs(ridge, history=5, rtol=1e-08)": lambda: solvers.lbfgs(ridge, history=5, rtol=1e-8),
    "newton(<lambda>, solve=solve_gmres(rtol=1e-06))": lambda: solvers.newton(
        lambda x: x, solve=linear_solve.solve_gmres(rtol=1e-6)
    ),
    "lbfgs_b(ridge, (tensor(0.), None))": lambda: solvers.lbfgs_b(ridge, (torch.tensor(0.0), None)),
    "lbfgs_b(ridge, bounds=(Tensor(shape=(9,), dtype=torch.float32), 1.0))": lambda: solvers.lbfgs_b(
        ridge, bounds=(torch.zeros(9), 1.0)
    ),
    "from_optimizer(ridge, adam(0.1))": lambda: solvers.from_optimizer(ridge, implicitdiff.adam(0.1)),
    "qp()": solvers.qp,
    "solve_cg(rtol=1e-06)": lambda: linear_solve.solve_cg(rtol=1e-6),
    "solve_lu()": linear_solve.solve_lu,
    "adam(lr=cosine(0.1, 100))": lambda: implicitdiff.adam(lr=schedule.cosine(0.1, 100)),
    "adamw()": implicitdiff.adamw,
    "chain(clip_grad_norm(1.0), masked(sgd(lr=0.1), {'w': True}))": lambda: implicitdiff.chain(
        implicitdiff.clip_grad_norm(1.0), optim.masked(implicitdiff.sgd(lr=0.1), {"w": True})
    ),
    "unroll(ridge, 3, checkpoint_every=2)": lambda: implicitdiff.unroll(ridge, 3, checkpoint_every=2),
    "FuncOptimizer(adam(0.1))": lambda: implicitdiff.FuncOptimizer(implicitdiff.adam(0.1)),
    "MetaOptimizer(Linear(...), sgd(0.1))": lambda: implicitdiff.MetaOptimizer(
        torch.nn.Linear(1, 1), implicitdiff.sgd(0.1)
    ),
    "MetaSGD(Linear(...), lr=0.1)": lambda: implicitdiff.MetaSGD(torch.nn.Linear(1, 1), lr=0.1),
    "linear(1.0, 0.0, 4)": lambda: schedule.linear(1.0, 0.0, 4),
    "GradientTransformation(<lambda>, ridge)": lambda: implicitdiff.GradientTransformation(lambda p: (), ridge),
}


@pytest.mark.parametrize("shown", SHOWN)
def test_a_result_of_a_factory_shows_its_call(shown):
    assert repr(SHOWN[shown]()) == shown


def test_no_argument_makes_the_text_long():
    text = repr(solvers.newton(lambda x: x, solve=linear_solve.solve_cg(preconditioner=torch.nn.Linear(2, 2))))
    assert text == "newton(<lambda>, solve=solve_cg(preconditioner=Linear(...)))"
    assert len(repr(implicitdiff.sgd(lr={f"layer {i}": 0.1 for i in range(100)}))) < 100


@pytest.mark.parametrize("row", SEARCHES, ids=lambda row: row.name)
def test_every_solver_shows_its_call(row):
    solver, name = row.solver(), row.name.split(",")[0]
    assert repr(solver).startswith(f"{name}(") and repr(solver).endswith(")") and "\n" not in repr(solver)
    assert repr(solver.run) == f"{solver!r}.run"


def test_a_state_tells_the_outcome():
    solver = solvers.newton(lambda x, c: x**2 - c, on_failure="ignore")
    one = torch.ones((), dtype=torch.float64)
    state = solver.run(one, 2 * one)[1]
    assert repr(state) == f"CONVERGED after {int(state.iter_num)} iterations, error {float(state.error):.1e}"
    assert repr(solver.init(one, 2 * one)).startswith("RUNNING after 0 iterations")


def test_a_state_of_a_batch_counts_lanes_inside_of_vmap_and_outside():
    seen = []

    def run(c):
        x, state = solvers.newton(lambda x, c: x**2 - c, on_failure="ignore").run(torch.ones_like(c), c)
        seen.append(repr(state))
        return x, state

    _, state = torch.func.vmap(run)(torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64))
    converged = int(state.converged.sum())
    assert converged == 2 and repr(state).startswith(f"3 lanes: 2 CONVERGED, 1 {Status(int(state.status[2])).name}; ")
    assert seen == [repr(state)]


def test_a_mapped_state_prints_its_fields():
    state = solvers.newton(lambda x: x).run(torch.ones(2))[1]
    shapes = torch.utils._pytree.tree_map(lambda t: tuple(t.shape), state)
    assert repr(shapes).startswith("State((), ")
    meta = torch.utils._pytree.tree_map(lambda t: t.to("meta"), state)
    assert "device='meta'" in repr(meta)


@pytest.mark.parametrize("factory", FACTORIES, ids=lambda factory: factory.__name__)
def test_help_of_a_factory_lists_every_option(factory):
    text = pydoc.plain(pydoc.render_doc(factory))
    for option in SolverOptions.__annotations__:
        assert f"        {option}: " in text
        assert option in inspect.signature(factory).parameters
    assert "**options" not in text.splitlines()[2]


@pytest.mark.parametrize("name", [name for name in linear_solve.__all__ if name.startswith("solve_")])
def test_help_of_a_linear_solver_lists_every_option(name):
    factory = getattr(linear_solve, name)
    for option in inspect.signature(factory).parameters:
        assert f"        {option}: " in pydoc.plain(pydoc.render_doc(factory))


def test_help_of_run_says_what_it_takes_and_returns():
    text = pydoc.plain(pydoc.render_doc(solvers.lbfgs(ridge).run))
    assert "run(params, *args, implicit_diff=True" in text
    for word in ("Args:", "keep_history: ", "Returns:", "Raises:"):
        assert word in text


@pytest.mark.parametrize("name", MODULES)
def test_dir_lists_public_names(name):
    module = importlib.import_module(f"implicitdiff.{name}".rstrip("."))
    assert set(module.__all__) <= set(dir(module))
    assert [shown for shown in dir(module) if shown.startswith("_")] in ([], ["__version__"])
    for shown in dir(module):
        getattr(module, shown)
