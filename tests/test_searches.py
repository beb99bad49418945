"""What is true of every solver of `implicitdiff.solvers`; the table of problems has their derivatives under every
transform."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from tables.solvers import SEARCHES, THETA, Row, in_single_precision, in_units
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from implicitdiff import custom_root
from implicitdiff.errors import ConvergenceError
from implicitdiff.solvers import Status, fixed_point_iteration, newton

F64 = torch.float64
DIRECTION = torch.tensor([0.6, -1.0, 0.8], dtype=F64)
WEIGHTS = torch.tensor([0.7, -1.1, 0.4], dtype=F64)
UNROLLED = [row for row in SEARCHES if row.unrolls]

every_solver = pytest.mark.parametrize("row", SEARCHES, ids=str)
every_unrolled_solver = pytest.mark.parametrize("row", UNROLLED, ids=str)


def central_difference(f, theta: Tensor, h: float = 2e-3) -> Tensor:
    """Along `DIRECTION`, extrapolated twice, so that what is left is of order h^6 and rounding."""
    once = [(f(theta + h * DIRECTION / 2**k) - f(theta - h * DIRECTION / 2**k)) / (2 * h / 2**k) for k in range(3)]
    twice = [(4 * fine - coarse) / 3 for coarse, fine in itertools.pairwise(once)]
    return (16 * twice[1] - twice[0]) / 15


def within(row: Row) -> dict[str, float]:
    return {"rtol": row.tolerance, "atol": row.tolerance / 10}


def assert_same_state(found, expected, **tolerances) -> None:
    assert type(found) is type(expected)
    for name, a, b in zip(found._fields, found, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}", **tolerances)


# --- derivatives ------------------------------------------------------------------------------------------------------


def truncated(row: Row, **how):
    """Three iterations, far from convergence."""
    solver = row.solver(rtol=0.0, atol=0.0, maxiter=3, on_failure="ignore")
    return lambda theta: solver.run(row.family.start(theta) + 0.02, theta, implicit_diff=False, **how)[0]


@pytest.mark.parametrize("checkpoint_every", [None, 2])
@every_unrolled_solver
def test_the_unrolled_derivative_is_that_of_the_iterations_that_were_made(
    row: Row, checkpoint_every: int | None
) -> None:
    run = truncated(row, checkpoint_every=checkpoint_every)
    expected = central_difference(truncated(row), THETA)
    forward = jvp(run, (THETA,), (DIRECTION,))[1]
    torch.testing.assert_close(forward, expected, rtol=1e-8, atol=1e-9)
    reverse = grad(lambda theta: WEIGHTS @ run(theta))(THETA)
    torch.testing.assert_close(reverse @ DIRECTION, WEIGHTS @ expected, rtol=1e-8, atol=1e-9)
    theta = THETA.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(WEIGHTS @ run(theta), theta)
    torch.testing.assert_close(by_autograd, reverse, rtol=1e-12, atol=1e-14)


@every_unrolled_solver
def test_the_second_unrolled_derivative_is_that_of_the_first(row: Row) -> None:
    gradient = grad(lambda theta: (WEIGHTS @ truncated(row)(theta)).sin())
    expected = central_difference(gradient, THETA)
    torch.testing.assert_close(jvp(gradient, (THETA,), (DIRECTION,))[1], expected, rtol=1e-7, atol=1e-8)
    product = grad(lambda theta: gradient(theta) @ DIRECTION)(THETA)
    torch.testing.assert_close(product @ DIRECTION, expected @ DIRECTION, rtol=1e-7, atol=1e-8)


@every_unrolled_solver
def test_the_unrolled_derivative_is_the_same_in_a_batch(row: Row) -> None:
    batch = torch.stack([THETA, 1.1 * THETA, 0.3 * THETA])
    run = truncated(row)
    expected = torch.stack([central_difference(run, theta) for theta in batch])
    forward = vmap(lambda theta: jvp(run, (theta,), (DIRECTION,))[1])(batch)
    torch.testing.assert_close(forward, expected, rtol=1e-8, atol=1e-9)
    reverse = grad(lambda batch: (vmap(run)(batch) @ WEIGHTS).sum())(batch)
    torch.testing.assert_close(reverse @ DIRECTION, expected @ WEIGHTS, rtol=1e-8, atol=1e-9)


@every_unrolled_solver
def test_implicit_and_unrolled_derivatives_and_central_differences_agree(row: Row) -> None:
    solver, start = row.solver(), row.family.start
    implicit = jvp(lambda theta: solver.run(start(theta), theta)[0], (THETA,), (DIRECTION,))[1]
    unrolled = jvp(lambda theta: solver.run(start(theta), theta, implicit_diff=False)[0], (THETA,), (DIRECTION,))[1]
    difference = central_difference(row.solution, THETA, h=2e-2)
    closed_form = jvp(row.family.closed_form, (THETA,), (DIRECTION,))[1]
    torch.testing.assert_close(implicit, closed_form, **within(row))
    torch.testing.assert_close(unrolled, closed_form, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(difference, closed_form, **within(row))


@every_solver
def test_the_solution_has_no_derivative_in_the_initial_guess(row: Row) -> None:
    solver, start = row.solver(), row.family.start(THETA)
    assert not jvp(lambda x: solver.run(x, THETA)[0], (start,), (DIRECTION,))[1].any()
    x = start.clone().requires_grad_()
    assert not torch.autograd.grad(solver.run(x, THETA * x.detach().exp().mean())[0].sum() + x.sum(), x)[0].sub(1).any()


@every_solver
def test_a_tensor_passed_and_captured_counts_both_ways(row: Row) -> None:
    fn = row.family.functions[0]

    def solution(theta: Tensor) -> Tensor:
        solver = row.solver(lambda x, given: fn(x, (theta + given) / 2))
        return solver.run(row.family.start(theta), theta)[0]

    expected = jacrev(row.family.closed_form)(THETA)
    for differentiate in jacrev, jacfwd:
        torch.testing.assert_close(differentiate(solution)(THETA), expected, **within(row))


@every_solver
def test_module_parameters_that_are_captured_get_their_gradients(row: Row) -> None:
    fn = row.family.functions[0]
    module = torch.nn.Linear(3, 3, dtype=F64)
    with torch.no_grad():
        module.weight.copy_(torch.eye(3, dtype=F64) + 0.1 * torch.outer(DIRECTION, WEIGHTS))
        module.bias.copy_(0.1 * WEIGHTS)
    parameters = [*module.parameters()]
    solver = row.solver(lambda x, theta: fn(x, module(theta)))
    found = torch.autograd.grad(WEIGHTS @ solver.run(row.family.start(THETA), THETA)[0], parameters)
    expected = torch.autograd.grad(WEIGHTS @ row.family.closed_form(module(THETA)), parameters)
    torch.testing.assert_close(found, expected, **within(row))


@every_solver
def test_a_solver_inside_the_condition_of_another(row: Row) -> None:
    solver, start = row.solver(), row.family.start

    def iterate(inner, theta: Tensor) -> Tensor:
        y = theta
        for _ in range(6):
            y = theta + 0.1 * inner(theta + 0.1 * y.sin())
        return y

    def inner(theta: Tensor) -> Tensor:
        return solver.run(start(theta), theta)[0]

    @custom_root(lambda y, theta: y - theta - 0.1 * inner(theta + 0.1 * y.sin()))
    def outer(init, theta):
        return iterate(row.family.closed_form, theta)

    def reference(theta: Tensor) -> Tensor:
        return iterate(row.family.closed_form, theta)

    batch = torch.stack([THETA, 1.1 * THETA])
    found = jacrev(vmap(lambda theta: outer(None, theta)))(batch)
    torch.testing.assert_close(found, jacrev(vmap(reference))(batch), **within(row))


@every_solver
def test_a_solver_inside_the_function_of_a_solver(row: Row) -> None:
    fn = row.family.functions[0]
    inner = fixed_point_iteration(lambda z, theta: theta + 0.02 * z.sin(), rtol=1e-13, atol=1e-13)
    solver = row.solver(lambda x, theta: fn(x, inner.run(theta, theta)[0]))

    def solution(theta: Tensor) -> Tensor:
        return solver.run(row.family.start(theta), theta)[0]

    def reference(theta: Tensor) -> Tensor:
        z = theta
        for _ in range(8):
            z = theta + 0.02 * z.sin()
        return row.family.closed_form(z)

    batch = torch.stack([THETA, 1.1 * THETA])
    for compose in (lambda f: vmap(jacfwd(f)), lambda f: jacrev(vmap(f))):
        torch.testing.assert_close(compose(solution)(batch), compose(reference)(batch), **within(row))


# --- batches ----------------------------------------------------------------------------------------------------------

HOPELESS = 3


def lanes_of(row: Row) -> tuple[Tensor, Tensor, Tensor]:
    """Thetas, initial guesses, and which lane is hopeless: one near its solution, one at it, one that takes long, and
    the hopeless one."""
    theta = torch.stack([0.9 * THETA, THETA, row.family.far * THETA, THETA])
    x = vmap(row.family.start)(theta)
    x[0] = row.family.closed_form(theta[0]) + 1e-4
    x[1] = row.family.closed_form(theta[1])
    if row.family.hopeless is None:
        theta[HOPELESS] = torch.nan
    return theta, x, torch.arange(4) == HOPELESS


def with_hopeless_lanes(row: Row):
    fn, other = row.family.functions[0], row.family.hopeless
    if other is None:
        return lambda x, theta, hopeless: fn(x, theta)
    return lambda x, theta, hopeless: torch.where(hopeless, other(x), fn(x, theta))


OPTIONS = {"rtol": 0.0, "maxiter": 70, "on_failure": "ignore"}


def assert_lanes_agree(row: Row, found, expected) -> None:
    """(x, state) against a list of those; in the hopeless lane, where rounding grows, the status alone."""
    x, state = found
    for i, (x_i, state_i) in enumerate(expected):
        assert (state.status[i] == Status.CONVERGED) == (state_i.status == Status.CONVERGED) == (i != HOPELESS)
        if i != HOPELESS:
            assert state.iter_num[i] == state_i.iter_num
            torch.testing.assert_close(x[i], x_i, **within(row))
            torch.testing.assert_close(state.target[i], state_i.target)
            assert state.error[i] <= state.target[i]


@every_solver
def test_a_batch_is_its_lanes_one_by_one(row: Row) -> None:
    theta, x, hopeless = lanes_of(row)
    solver = row.solver(with_hopeless_lanes(row), **OPTIONS)
    looped = [solver.run(*lane) for lane in zip(x, theta, hopeless, strict=True)]
    found = vmap(solver.run)(x, theta, hopeless)
    assert_lanes_agree(row, found, looped)
    state = found[1]
    assert state.iter_num[1] == 0 and torch.equal(found[0][1], x[1])
    assert len(set(state.iter_num.tolist())) >= 3
    assert all(field.shape[0] == 4 for field in state if isinstance(field, Tensor))


@every_solver
def test_what_is_captured_may_be_batched(row: Row) -> None:
    theta, x, hopeless = lanes_of(row)
    fn = with_hopeless_lanes(row)

    def captured(x: Tensor, theta: Tensor, hopeless: Tensor):
        return row.solver(lambda x: fn(x, theta, hopeless), **OPTIONS).run(x)

    looped = [captured(*lane) for lane in zip(x, theta, hopeless, strict=True)]
    assert_lanes_agree(row, vmap(captured)(x, theta, hopeless), looped)


@every_solver
def test_the_initial_guess_alone_may_be_batched(row: Row) -> None:
    solver = row.solver()
    x = torch.stack([row.family.start(THETA), row.family.start(THETA) + 0.05, row.family.closed_form(THETA)])
    found, state = vmap(lambda x: solver.run(x, THETA))(x)
    looped = [solver.run(x_i, THETA) for x_i in x]
    torch.testing.assert_close(found, torch.stack([x_i for x_i, _ in looped]), **within(row))
    assert state.iter_num.tolist() == [int(state_i.iter_num) for _, state_i in looped]


@every_solver
def test_vmap_of_vmap_is_a_double_loop(row: Row) -> None:
    theta, x, hopeless = lanes_of(row)
    solver = row.solver(with_hopeless_lanes(row), **OPTIONS)
    shift = torch.tensor([0.0, 0.01], dtype=F64)
    # The guess is batched by the inner vmap alone, the shift by the outer one, in the last dimension of what it is in.
    outer = vmap(
        lambda shift: vmap(lambda x, theta, flag: solver.run(x, theta + shift, flag), in_dims=(1, 0, 0))(
            x.T, theta, hopeless
        )
    )
    found, state = outer(shift)
    for j in range(2):
        looped = [
            solver.run(x_i, theta_i + shift[j], flag) for x_i, theta_i, flag in zip(x, theta, hopeless, strict=True)
        ]
        lane_j = type(state)(*(f[j] if isinstance(f, Tensor) else f for f in state))
        for i, (x_i, state_i) in enumerate(looped):
            if i != HOPELESS:
                torch.testing.assert_close(found[j, i], x_i, **within(row))
                assert lane_j.iter_num[i] == state_i.iter_num


@every_unrolled_solver
def test_an_unrolled_batch_is_its_lanes_one_by_one(row: Row) -> None:
    theta, x, hopeless = lanes_of(row)
    solver = row.solver(with_hopeless_lanes(row), **{**OPTIONS, "maxiter": 6})

    def run(*lane):
        return solver.run(*lane, implicit_diff=False)

    found, state = vmap(run)(x, theta, hopeless)
    for i, lane in enumerate(zip(x, theta, hopeless, strict=True)):
        x_i, state_i = run(*lane)
        assert state.iter_num[i] == state_i.iter_num and state.status[i] == state_i.status
        if i != HOPELESS:
            torch.testing.assert_close(found[i], x_i, **within(row))


# --- the loop ---------------------------------------------------------------------------------------------------------


@every_solver
def test_steps_after_convergence_change_nothing(row: Row) -> None:
    theta, x, hopeless = lanes_of(row)
    fn = with_hopeless_lanes(row)
    often, seldom = (vmap(row.solver(fn, **OPTIONS, check_every=n).run)(x, theta, hopeless) for n in (1, 7))
    torch.testing.assert_close(seldom[0], often[0], rtol=0, atol=0, equal_nan=True)
    assert_same_state(seldom[1], often[1], rtol=0, atol=0)


@every_unrolled_solver
def test_init_and_update_by_hand_are_run(row: Row) -> None:
    solver, x = row.solver(), row.family.start(THETA)
    state = solver.init(x, THETA)
    while state.status == Status.RUNNING:
        x, state = solver.update(x, state, THETA)
    for how in ({}, {"implicit_diff": False}, {"implicit_diff": False, "checkpoint_every": 3}):
        found, found_state = solver.run(row.family.start(THETA), THETA, **how)
        torch.testing.assert_close(found, x, rtol=1e-12, atol=1e-13)
        assert found_state.iter_num == state.iter_num and found_state.status == state.status
    # An update of what has stopped changes nothing.
    again, again_state = solver.update(x, state, THETA)
    assert torch.equal(again, x)
    assert_same_state(again_state, state, rtol=0, atol=0)


@every_solver
def test_the_solution_is_a_solution_as_the_optimality_function_has_it(row: Row) -> None:
    solver = row.solver()
    x, state = solver.run(row.family.start(THETA), THETA)
    torch.testing.assert_close(x, row.family.closed_form(THETA), **within(row))
    assert state.status == Status.CONVERGED and state.error <= state.target
    torch.testing.assert_close(solver.optimality_fn(x, THETA).norm(), state.error, rtol=1e-3, atol=1e-14)


@every_solver
def test_a_run_from_the_solution_takes_no_iteration(row: Row) -> None:
    solver = row.solver()
    x, _ = solver.run(row.family.start(THETA), THETA)
    again, state = solver.run(x, THETA)
    assert state.iter_num == 0 and state.status == Status.CONVERGED
    assert torch.equal(again, x)


@pytest.mark.parametrize("implicit_diff", [True, False])
@every_solver
def test_the_state_has_no_derivative(row: Row, implicit_diff: bool) -> None:
    if not (implicit_diff or row.unrolls):
        return
    solver, start = row.solver(maxiter=4, on_failure="ignore"), row.family.start

    def run(theta: Tensor):
        return solver.run(start(theta), theta, implicit_diff=implicit_diff)

    theta = THETA.clone().requires_grad_()
    x, state = run(theta)
    fields = [t for t in torch.utils._pytree.tree_leaves(state) if isinstance(t, Tensor)]
    assert x.requires_grad and not any(t.requires_grad for t in fields)
    _, tangents = jvp(lambda theta: run(theta)[1], (THETA,), (DIRECTION,))
    assert not any(t.any() for t in torch.utils._pytree.tree_leaves(tangents) if isinstance(t, Tensor))
    assert not grad(lambda theta: run(theta)[1].error)(THETA).any()


# --- what goes in -----------------------------------------------------------------------------------------------------


def split(x: Tensor) -> dict[str, Tensor]:
    """A scalar and a matrix, in an order that is not alphabetical."""
    return {"w": x[..., :2, None], "b": x[..., 2]}


def join(x: dict[str, Tensor]) -> Tensor:
    return torch.cat([x["w"].squeeze(-1), x["b"][..., None]], dim=-1)


def on_trees(fn):
    """A function of the family whose first argument, and its result if that is like it, are trees."""

    def on_tree(x, *args):
        result = fn(join(x), *args)
        return split(result) if result.shape == (3,) else result

    return on_tree


@every_solver
def test_parameters_may_be_a_tree_of_leaves_of_several_shapes(row: Row) -> None:
    if row.of_one_leaf:
        return
    solver = row.solver(*map(on_trees, row.family.functions))

    def solution(theta: Tensor) -> Tensor:
        return join(solver.run(split(row.family.start(theta)), theta)[0])

    torch.testing.assert_close(solution(THETA), row.family.closed_form(THETA), **within(row))
    expected = jacrev(row.family.closed_form)
    torch.testing.assert_close(jacrev(solution)(THETA), expected(THETA), **within(row))
    batch = torch.stack([THETA, 1.1 * THETA])
    torch.testing.assert_close(vmap(jacfwd(solution))(batch), vmap(expected)(batch), **within(row))


@every_solver
def test_arguments_may_be_trees_numbers_and_none(row: Row) -> None:
    fn = row.family.functions[0]
    solver = row.solver(lambda x, nothing, args, factor: fn(x, factor * args["theta"][0]) if nothing is None else None)

    def solution(theta: Tensor) -> Tensor:
        return solver.run(row.family.start(theta), None, {"theta": [theta], "count": 3, "name": "x"}, 2)[0]

    theta = THETA / 2
    expected = jacrev(lambda theta: row.family.closed_form(2 * theta))(theta)
    torch.testing.assert_close(jacrev(solution)(theta), expected, **within(row))
    torch.testing.assert_close(vmap(jacfwd(solution))(theta[None])[0], expected, **within(row))


@pytest.mark.parametrize("implicit_diff", [True, False])
@every_solver
def test_what_is_given_is_not_changed(row: Row, implicit_diff: bool) -> None:
    if not (implicit_diff or row.unrolls):
        return
    x, theta = row.family.start(THETA), THETA.clone()
    before = x.clone()
    solver = row.solver(maxiter=3, on_failure="ignore")
    for _ in range(2):
        solver.run(x, theta, implicit_diff=implicit_diff)
    assert torch.equal(x, before) and torch.equal(theta, THETA)
    assert x._version == 0 and theta._version == 0
    if row.unrolls:
        state = solver.init(x, theta)
        kept = torch.utils._pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, state)
        solver.update(x, state, theta)
        assert_same_state(state, kept, rtol=0, atol=0)


@every_solver
def test_single_precision_converges_to_its_own_precision(row: Row) -> None:
    """With the default tolerances."""
    solver = row.solver(*in_single_precision(row.family.functions), rtol=None, atol=None)
    theta = THETA.float()
    x, state = solver.run(row.family.start(theta), theta)
    assert x.dtype == state.error.dtype == torch.float32
    assert state.status == Status.CONVERGED
    torch.testing.assert_close(x, row.family.closed_form(THETA).float(), rtol=1e-3, atol=2e-4)


# --- default tolerances -----------------------------------------------------------------------------------------------

F32 = torch.float32
units = pytest.mark.parametrize("unit, dtype", [(1.0, F64), (1e-4, F64), (1e-8, F64), (1.0, F32), (1e-4, F32)], ids=str)


class InUnits(NamedTuple):
    """A row's problem in other units and another precision, with default tolerances."""

    row: Row
    unit: float
    dtype: torch.dtype

    def solver(self, **options):
        functions = in_units(self.row.family, self.unit)
        if self.dtype == F32:
            functions = in_single_precision(functions)
        factory = self.row.in_units(self.unit) if self.row.in_units else self.row.factory
        return factory(*functions, **options)

    def guess(self, x: Tensor) -> Tensor:
        return (self._of_x * x).to(self.dtype)

    def assert_solved(self, x: Tensor, theta: Tensor) -> None:
        rtol, atol = (1e-8, 1e-8) if self.dtype == F64 else (1e-3, 2e-4)
        if len(self.row.family.functions) > 1 or self.row.of_one_leaf:
            # In x - prox(x - grad, 1), a gradient that is small beside x is rounded.
            atol = atol + 20 * torch.finfo(self.dtype).eps / self.unit
        torch.testing.assert_close(x.double() / self._of_x, self.row.family.closed_form(theta), rtol=rtol, atol=atol)

    @property
    def _of_x(self) -> float:
        return self.unit if self.row.family.name == "fixed point" else 1.0


@units
@every_solver
def test_default_tolerances_do_not_depend_on_units(row: Row, unit: float, dtype: torch.dtype) -> None:
    problem = InUnits(row, unit, dtype)
    x, state = problem.solver().run(problem.guess(row.family.start(THETA)), THETA.to(dtype))
    assert state.status == Status.CONVERGED
    problem.assert_solved(x, THETA)


@units
@every_solver
def test_a_guess_that_is_a_solution_but_for_rounding_is_soon_accepted(
    row: Row, unit: float, dtype: torch.dtype
) -> None:
    problem = InUnits(row, unit, dtype)
    solver, theta = problem.solver(), THETA.to(dtype)
    first, cold = solver.run(problem.guess(row.family.start(THETA)), theta)
    # The brackets of bisection are as wide as ever.
    soon = 70 if row.name == "bisection" else 8
    # What was accepted as the most that rounding allows, or SciPy could do, may be looked at again.
    guesses = [(first, max(soon, int(cold.iter_num))), (problem.guess(row.family.closed_form(THETA)), soon)]
    for guess, limit in guesses:
        x, state = solver.run(guess, theta)
        assert state.status == Status.CONVERGED
        assert state.iter_num <= limit
        problem.assert_solved(x, THETA)


@pytest.mark.one_in(3)
@units
@every_solver
def test_default_tolerances_of_a_batch_are_those_of_its_lanes(row: Row, unit: float, dtype: torch.dtype) -> None:
    problem = InUnits(row, unit, dtype)
    solver = problem.solver()
    theta = torch.stack([THETA, 1.1 * THETA, THETA, 0.9 * THETA])
    x = torch.stack([row.family.start(THETA), *(row.family.closed_form(t) for t in (1.1 * THETA, 1.05 * THETA))])
    x = torch.cat([x, row.family.start(THETA)[None]])
    x, theta = problem.guess(x), theta.to(dtype)
    found, state = vmap(solver.run)(x, theta)
    looped = [solver.run(*lane)[1] for lane in zip(x, theta, strict=True)]
    assert state.status.tolist() == [int(s.status) for s in looped] == [Status.CONVERGED] * 4
    # The sizes of which targets are made are known to a few digits, as differences.
    torch.testing.assert_close(state.target, torch.stack([s.target for s in looped]), rtol=0.1, atol=0.0)
    for x_i, theta_i in zip(found, theta, strict=True):
        problem.assert_solved(x_i, theta_i.double())


def laplacian(n: int) -> Tensor:
    return 2 * torch.eye(n) - torch.diag(torch.ones(n - 1), 1) - torch.diag(torch.ones(n - 1), -1)


@pytest.mark.parametrize("unit", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize("backtracking", [False, True])
def test_no_error_has_to_be_smaller_than_rounding_makes_it(backtracking: bool, unit: float) -> None:
    """``L x = b`` with a smooth ``x``: the terms of ``L x`` are a thousand times as large as ``b``."""
    matrix, b = laplacian(100), 1e-3 * torch.sin(torch.linspace(0, 3, 100))
    solver = newton(lambda x, b: unit * (matrix @ x - b), backtracking=backtracking)
    x, state = solver.run(torch.zeros(100), b)
    assert state.status == Status.CONVERGED and state.iter_num <= 8
    assert state.target > torch.finfo(F32).eps ** (2 / 3) * unit * b.norm()
    exact = torch.linalg.solve(matrix.double(), b.double())
    torch.testing.assert_close(x.double(), exact, rtol=0, atol=1e-4 * float(exact.abs().max()))
    again, state = solver.run(x, b)
    assert state.status == Status.CONVERGED
    torch.testing.assert_close(again, x, rtol=0, atol=1e-4 * float(exact.abs().max()))
    with pytest.raises(ConvergenceError):
        newton(lambda x, b: unit * (matrix @ x - b), atol=0.0, maxiter=None).run(torch.zeros(100), b)


def test_steps_taken_by_hand_see_the_same_targets() -> None:
    matrix, b = laplacian(100), 1e-3 * torch.sin(torch.linspace(0, 3, 100)) * torch.tensor([[1.0], [-2.0]])
    solver = newton(lambda x, b: matrix @ x - b)
    x = torch.zeros(2, 100)
    state = vmap(solver.init)(x, b)
    for _ in range(10):
        x, state = vmap(solver.update)(x, state, b)
    assert state.status.tolist() == [Status.CONVERGED] * 2
    found, expected = vmap(solver.run)(torch.zeros(2, 100), b)
    torch.testing.assert_close(x, found, rtol=1e-4, atol=1e-4)
    assert state.iter_num.tolist() == expected.iter_num.tolist()


@every_solver
def test_gradients_that_are_off_stay_off(row: Row) -> None:
    theta = THETA.clone().requires_grad_()
    solver, start = row.solver(), row.family.start(THETA)
    expected = row.family.closed_form(THETA)
    with torch.no_grad():
        x, _ = solver.run(start, theta)
    assert not x.requires_grad
    torch.testing.assert_close(x, expected, **within(row))
    with torch.inference_mode():
        x, _ = solver.run(start.clone(), THETA.clone())
    torch.testing.assert_close(x.clone(), expected, **within(row))


@every_solver
def test_random_functions_are_refused(row: Row) -> None:
    fn = row.family.functions[0]
    solver = row.solver(lambda x, theta: fn(x, theta * torch.rand(3, dtype=F64)))
    with pytest.raises(ValueError, match="draws random numbers"):
        solver.run(row.family.start(THETA), THETA)


@every_solver
def test_functions_may_work_in_place_on_what_they_made(row: Row) -> None:
    fn = row.family.functions[0]

    def in_place(x: Tensor, theta: Tensor) -> Tensor:
        mine = theta.clone()
        mine.mul_(2.0)
        mine[0] += 0.0
        return fn(x.clone().add_(0.0), mine.div_(2.0))

    solver = row.solver(in_place)
    found = jacrev(lambda theta: solver.run(row.family.start(theta), theta)[0])(THETA)
    torch.testing.assert_close(found, jacrev(row.family.closed_form)(THETA), **within(row))
