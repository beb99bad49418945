"""The branch and the loop of a step, executed and handed to a recorder."""

from __future__ import annotations

import threading
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from tables.solvers import LINE_SEARCHES, SEARCHES, THETA
from torch.func import grad, vmap
from torch.utils import _pytree as torch_pytree

from implicitdiff import linear_solve, solvers
from implicitdiff._implicit.system import Vectors
from implicitdiff._torch.control import if_any, recorded_by, repeat
from implicitdiff._torch.trees import flatten
from implicitdiff.solvers._loop.problem import BatchedProblem, any_lane
from implicitdiff.solvers._loop.status import Status
from implicitdiff.solvers._steps.line_search import Segment, search

F64 = torch.float64


class Countdown(NamedTuple):
    left: torch.Tensor
    passes: torch.Tensor


def lower(c):
    going = c.left > 0
    return Countdown(torch.where(going, c.left - 1, c.left), torch.where(going, c.passes + 1, c.passes))


def going(c):
    return c.left > 0


def start(*left):
    return Countdown(torch.tensor(left), torch.zeros(len(left), dtype=torch.int64))


class Log:
    """A recorder that notes what it is asked, and executes it."""

    def __init__(self):
        self.asked = []

    def if_any(self, flag, then, carry):
        self.asked.append(("if_any", flag, then, carry))
        return then(carry)

    def repeat(self, body, carry, flag, at_most):
        self.asked.append(("repeat", body, carry, flag, at_most))
        return body(carry)


@pytest.mark.parametrize("flag, runs", [([False, False], 0), ([False, True], 1), ([[True, False], [False, False]], 1)])
def test_a_branch_runs_once_if_any_lane_asks(flag, runs):
    calls = []
    carry = {"x": torch.ones(2), "y": [torch.zeros(2)]}
    result = if_any(torch.tensor(flag), lambda c: calls.append(c) or {"x": c["x"] + 1, "y": c["y"]}, carry)
    assert len(calls) == runs
    assert (result is carry) == (not runs)
    assert torch.equal(result["x"], torch.full((2,), 1.0 + runs))


def test_a_loop_runs_until_no_lane_asks():
    result = repeat(lower, start(2, 0, 5), going, 100)
    assert result.left.tolist() == [0, 0, 0] and result.passes.tolist() == [2, 0, 5]


@pytest.mark.parametrize("at_most, passes", [(3, [2, 3]), (1, [1, 1]), (0, [0, 0]), (-1, [0, 0])])
def test_a_loop_ends_after_so_many_passes(at_most, passes):
    assert repeat(lower, start(2, 9), going, at_most).passes.tolist() == passes


def test_a_loop_asks_before_each_pass_and_not_after_the_last():
    asked = []
    repeat(lower, start(9), lambda c: asked.append(int(c.left)) or c.left > 0, 3)
    assert asked == [9, 8, 7]
    carry = start(0, 0)
    assert repeat(lower, carry, going, 3) is carry


def test_any_lane_of_a_vmap_asks():
    def doubled(x):
        twice = if_any(x > 1, lambda y: torch.where(x > 1, 2 * y, y), x)
        return repeat(lambda y: torch.where(y < 8, 2 * y, y), twice, lambda y: y < 8, 2)

    x = torch.tensor([1.0, 3.0])
    assert vmap(doubled)(x).tolist() == [4.0, 12.0]
    assert vmap(grad(doubled))(x).tolist() == [4.0, 4.0]


def test_a_recorder_gets_the_branch_and_the_loop():
    log, flag, carry = Log(), torch.tensor([False]), start(2)
    with recorded_by(log):
        assert if_any(flag, lower, carry).passes.tolist() == [1]
        assert repeat(lower, carry, going, 7).passes.tolist() == [1]
    assert log.asked == [("if_any", flag, lower, carry), ("repeat", lower, carry, going, 7)]
    assert repeat(lower, carry, going, 7).passes.tolist() == [2]


def test_a_recorder_inside_of_another_gives_way_at_its_end():
    outer, inner, carry = Log(), Log(), start(2)
    with recorded_by(outer):
        with pytest.raises(KeyError), recorded_by(inner):
            if_any(going(carry), lower, carry)
            raise KeyError
        with recorded_by(None):
            assert if_any(torch.tensor([False]), lower, carry) is carry
        assert not outer.asked
        if_any(going(carry), lower, carry)
    assert len(inner.asked) == len(outer.asked) == 1


def test_a_recorder_belongs_to_its_thread():
    results = []
    with recorded_by(Log()):
        thread = threading.Thread(target=lambda: results.append(repeat(lower, start(2), going, 7)))
        thread.start()
        thread.join()
    assert results[0].passes.tolist() == [2]


# --- a lane does not notice that a branch runs for its neighbour ------------------------------------------------------


class Neighbour:
    """A recorder that executes as if another lane asked each time, and each time for one pass more."""

    def __init__(self):
        self.runs = 0

    def if_any(self, flag, then, carry):
        self.runs += 1
        return alike(then(carry), carry)

    def repeat(self, body, carry, flag, at_most):
        for _ in range(at_most):
            asked = any_lane(flag(carry))
            self.runs += 1
            carry = alike(body(carry), carry)
            if not asked:
                break
        return carry

    def take_linear_solver(self):
        pass

    def leave_to_python(self, flag):
        pass


class Alone(Neighbour):
    """A recorder that executes what lanes ask for."""

    def if_any(self, flag, then, carry):
        return super().if_any(flag, then, carry) if any_lane(flag) else carry

    def repeat(self, body, carry, flag, at_most):
        while any_lane(flag(carry)):
            carry = alike(body(carry), carry)
        return carry


def alike(new, old):
    pairs = [torch_pytree.tree_flatten(tree) for tree in (new, old)]
    assert pairs[0][1] == pairs[1][1]
    kinds = [[(type(t), t.shape, t.dtype) for t in leaves] for leaves, _ in pairs]
    assert kinds[0] == kinds[1]
    return new


def rosenbrock(x, a):
    return (a - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def with_logarithms(x, a):
    return (a * x - x.log()).sum() + (x.sum() - 2) ** 2


def roots(x, a):
    return torch.stack([10 * (x[1] - x[0] ** 2), (a - x[0]) * x[1].exp()])


def misfit(x, a):
    t = torch.linspace(0, 3, 7, dtype=x.dtype)
    return x[0] * torch.exp(-x[1] * t) - a * torch.cos(t)


def on_its_problem(row):
    thetas = torch.stack([THETA, -2 * THETA, 0.3 * THETA])
    return row.solver, torch.stack([row.family.start(theta) for theta in thetas]), thetas


STARTS = torch.tensor([[0.3, 0.2], [1.7, 0.5], [0.05, 2.5]], dtype=F64)
A = torch.tensor([0.5, 1.0, 1.5], dtype=F64)
# Problems in which steps are refused and shortened.
HARDER = {
    "anderson": lambda **options: solvers.anderson(
        lambda x, a: torch.cos(a * x) + 0.3 * x.flip(0), safeguard=1.0, **options
    ),
    "broyden_root": lambda **options: solvers.broyden_root(roots, backtracking=True, **options),
    "dogleg": lambda **options: solvers.dogleg(misfit, **options),
    "dogleg_root": lambda **options: solvers.dogleg_root(roots, **options),
    "gradient_descent": lambda **options: solvers.gradient_descent(with_logarithms, acceleration=True, **options),
    "lbfgs_b": lambda **options: solvers.lbfgs_b(rosenbrock, (-0.5, 0.8), **options),
    "levenberg_marquardt": lambda **options: solvers.levenberg_marquardt(misfit, radius=0.5, **options),
    "levenberg_marquardt, box": lambda **options: solvers.levenberg_marquardt(
        misfit, radius=0.5, bounds=(0.1, 0.9), **options
    ),
    "newton": lambda **options: solvers.newton(roots, backtracking=True, **options),
    **{f"{row.name}, valley": partial(row.factory, rosenbrock) for row in LINE_SEARCHES},
    **{f"{row.name}, logarithms": partial(row.factory, with_logarithms) for row in LINE_SEARCHES},
}
METHODS = {
    **{f"{row.name}, table": on_its_problem(row) for row in SEARCHES if row.unrolls},
    **{name: (make, STARTS, A) for name, make in HARDER.items()},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_lane_does_not_notice_its_neighbours(method):
    make, starts, a = METHODS[method]
    solver = make(maxiter=30, on_failure="ignore")

    def results():
        stepped = solver.update(starts[0], solver.init(starts[0], a[0]), a[0])
        return torch_pytree.tree_leaves((vmap(solver.run)(starts, a), stepped, solver.run(starts[1], a[1])))

    # GMRES rounds otherwise under a recorder, whatever the recorder does.
    with recorded_by(Alone() if "Krylov" in method else None):
        alone = results()
    neighbour = Neighbour()
    with recorded_by(neighbour):
        beside = results()
    assert neighbour.runs
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))


LINEAR = {
    "cg": linear_solve.solve_cg(on_failure="ignore", maxiter=3),
    "normal_cg": linear_solve.solve_normal_cg(on_failure="ignore", maxiter=3),
    "bicgstab": linear_solve.solve_bicgstab(on_failure="ignore", maxiter=3),
    "gmres": linear_solve.solve_gmres(on_failure="ignore", maxiter=3),
    "gmres, restarted": linear_solve.solve_gmres(on_failure="ignore", maxiter=5, restart=2),
}


@pytest.mark.parametrize("linear", LINEAR)
def test_a_linear_system_does_not_notice_its_neighbours(linear):
    matrices = torch.stack([torch.diag(d) for d in torch.linspace(-1, 3, 20, dtype=F64).reshape(4, 5).T])
    # Of four lanes one has no finite matrix, and one the solution 0.
    matrices[3, 1, 2] = torch.inf
    sides = torch.ones(5, 4, dtype=F64)
    sides[4] = 0

    def solutions(recorder):
        with recorded_by(recorder):
            return vmap(lambda m, b: LINEAR[linear](lambda v: m @ v, b))(matrices, sides)

    neighbour = Neighbour()
    alone, beside = solutions(Alone()), solutions(neighbour)
    assert neighbour.runs
    assert torch.equal(alone.nan_to_num(7.0), beside.nan_to_num(7.0))
    one_by_one = [LINEAR[linear](lambda v, m=m: m @ v, b) for m, b in zip(matrices, sides, strict=True)]
    torch.testing.assert_close(beside, torch.stack(one_by_one), equal_nan=True)


def test_a_search_along_a_line_that_ends_does_not_notice_its_neighbours():
    # Lane 0 goes uphill at first, and the end of the line is lower all the same; lane 1 needs a second trial.
    def found(x):
        problem = BatchedProblem(
            {"fn": lambda x, _: [values(x[0])]}, Vectors([x], x.shape[:1]), flatten(x)[1], True, None
        )
        value, gradient = problem.fn.value_and_grad(x)
        memory = SimpleNamespace(value=value, grad=gradient, magnitude=value.abs())
        state = SimpleNamespace(memory=memory, status=torch.full(x.shape[:1], int(Status.RUNNING)))
        one = torch.ones_like(value)
        segment = Segment(one, lambda step: x + step[:, None])
        point, failed, _ = search(problem, x, state, torch.ones_like(x), one, segment=segment)
        return point.x, failed

    def values(x):
        return torch.where(x < 5, torch.sin(4 * x), (x - 10.1) ** 2)[:, 0]

    x, failed = found(torch.tensor([[0.0], [10.0]], dtype=F64))
    alone, failed_alone = found(torch.tensor([[0.0]], dtype=F64))
    assert (failed.tolist(), failed_alone.tolist()) == ([False, False], [False])
    assert torch.equal(x[:1], alone) and alone.item() == 1.0


def test_a_zero_step_beside_a_shortened_one_has_a_derivative():
    solver = solvers.levenberg_marquardt(lambda x, a: (x - a) * torch.tensor([1.0, 3.0], dtype=F64), radius=0.01)

    def stepped(x, a):
        return solver.update(x, solver.init(x, a), a)[0].sum()

    x, a = torch.tensor([[1.0, 1.0], [7.0, 5.0]], dtype=F64), torch.tensor([1.0, 2.0], dtype=F64)
    derivative = grad(stepped, 1)
    torch.testing.assert_close(vmap(derivative)(x, a), torch.stack([derivative(x[0], a[0]), derivative(x[1], a[1])]))
