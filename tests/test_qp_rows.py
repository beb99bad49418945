"""Rows of quadratic programs: their units, two bounds, dependence, rows that only touch; and the tables of programs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problem_sets import maros_meszaros
from problem_sets.quadratic_programs import PROGRAMS, QuadraticProgram
from torch.func import grad, jacfwd, jacrev, vmap

from implicitdiff import ConvergenceError, LinearSolveError
from implicitdiff.solvers import KKTSolution, Status, qp
from implicitdiff.solvers._qp.interior import interior_point
from implicitdiff.solvers._qp.program import make_program

F64 = torch.float64
ARGUMENTS = ("Q", "c", "A", "b", "G", "h", "l")
Data = tuple[torch.Tensor, ...]


def program(seed: int, n: int = 5, equalities: int = 1, inequalities: int = 8) -> Data:
    """With two bounds for each row: some rows end at the upper one, some at the lower one, some between."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=F64, generator=generator)

    half, inside = normal(n, n), normal(n)
    A, G = normal(equalities, n), normal(inequalities, n)
    width = torch.rand(2, inequalities, dtype=F64, generator=generator)
    middle = G @ inside
    return (
        half @ half.T + 0.1 * torch.eye(n, dtype=F64),
        3 * normal(n),
        A,
        A @ inside,
        G,
        middle + width[0],
        middle - width[1],
    )


def one_sided(Q, c, A, b, G, h, l) -> Data:  # noqa: E741
    return Q, c, A, b, torch.cat([G, -G]), torch.cat([h, -l])


def steps(at: torch.Tensor, step: float) -> torch.Tensor:
    return step * torch.eye(at.numel(), dtype=F64).reshape(-1, *at.shape)


def central(function, at: torch.Tensor, step: float = 1e-6) -> torch.Tensor:
    ahead, behind = (vmap(function)(at + e) for e in (steps(at, step), steps(at, -step)))
    return ((ahead - behind) / (2 * step)).reshape(at.shape)


# --- units ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [1e4, 1e8, 1e12])
@pytest.mark.parametrize("seed", range(3))
def test_the_units_of_rows_change_neither_iterations_nor_solution_nor_derivative(seed, unit):
    Q, c, A, b, G, h, l = program(seed)  # noqa: E741
    rows = torch.tensor([unit, 1.0, 1 / unit, 1.0, 1.0, unit, 1.0, 1.0], dtype=F64)

    def run(c, *constraints):
        solution, state = qp().run(None, Q, c, *constraints)
        return solution.primal, state

    plain = A, b, G, h, l
    scaled = unit * A, unit * b, rows[:, None] * G, rows * h, rows * l
    solution, state = run(c, *plain)
    other, other_state = run(c, *scaled)
    torch.testing.assert_close(other, solution, rtol=1e-9, atol=1e-9)
    assert other_state.iter_num == state.iter_num
    slope, other_slope = (jacrev(lambda c, t=t: run(c, *t)[0])(c) for t in (plain, scaled))
    torch.testing.assert_close(other_slope, slope, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("unit", [1e4, 1e8, 1e12])
@pytest.mark.parametrize("which", range(len(PROGRAMS)), ids=map(str, PROGRAMS))
def test_the_units_of_unknowns_and_of_the_objective_do_not_matter(which, unit):
    Q, c, A, b, G, h, l = PROGRAMS[which].arguments()  # noqa: E741
    columns = torch.ones(len(c), dtype=F64)
    columns[::3], columns[1::3] = unit, 1 / unit
    solution, state = qp().run(None, Q, c, A, b, G, h, l)
    other, other_state = qp().run(None, columns[:, None] * Q * columns, columns * c, A * columns, b, G * columns, h, l)
    assert other_state.iter_num == state.iter_num
    torch.testing.assert_close(columns * other.primal, solution.primal, rtol=1e-8, atol=1e-8)
    other, other_state = qp().run(None, unit * Q, unit * c, A, b, G, h, l)
    assert other_state.iter_num == state.iter_num
    torch.testing.assert_close(other.primal, solution.primal, rtol=1e-8, atol=1e-8)


def test_a_multiplier_that_is_small_in_its_units_is_a_multiplier():
    """The row is at its bound, to the rounding of large numbers, and presses with a multiplier below that rounding."""
    Q, c, far = torch.eye(2, dtype=F64), torch.tensor([-2.0, -3.0], dtype=F64), 1e12
    G = far * torch.tensor([[1.0 / 3, 1.0 / 7]], dtype=F64)
    slope = jacrev(lambda h: qp().run(None, Q, c, G=G, h=h)[0].primal)(torch.full((1,), far, dtype=F64) / 3)
    torch.testing.assert_close(slope[:, 0], G[0] / (G[0] @ G[0]))


# --- two bounds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_a_row_with_two_bounds_is_two_rows(seed):
    data = program(seed)
    solution, state = qp().run(None, *data)
    expected, _ = qp().run(None, *one_sided(*data))
    upper, lower = expected.dual_ineq.split(8)
    torch.testing.assert_close(list(solution), [expected.primal, expected.dual_eq, upper - lower], rtol=1e-7, atol=1e-9)
    assert seed or ((solution.dual_ineq < 0).any() and (solution.dual_ineq > 0).any())
    residual = qp().optimality_fn(solution, *data)
    assert state.status == Status.CONVERGED and max(t.abs().max() for t in residual) < 1e-8


@pytest.mark.parametrize("argument", range(7), ids=ARGUMENTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_derivatives_are_those_of_central_differences_and_of_unrolled_iterations(seed, argument):
    data = program(seed)

    def value(t, **how):
        t = (t + t.T) / 2 if argument == 0 else t
        solution, _ = qp().run(None, *data[:argument], t, *data[argument + 1 :], **how)
        flat = torch.cat(list(solution))
        return torch.cos(torch.arange(len(flat), dtype=F64)) @ flat

    found = grad(value)(data[argument])
    torch.testing.assert_close(found, central(value, data[argument]), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(jacfwd(value)(data[argument]), found, rtol=1e-9, atol=1e-10)
    unrolled = grad(lambda t: value(t, implicit_diff=False))(data[argument])
    torch.testing.assert_close(unrolled, found, rtol=1e-7, atol=1e-8)


def test_infinite_bounds_are_none_and_equal_bounds_are_an_equality():
    Q, c, A, b, G, h, l = program(2)  # noqa: E741
    inf = torch.inf
    high, low = torch.cat([h[:2], torch.full((2,), inf, dtype=F64), h[4:]]), torch.cat([l[:3], l[3:5] * inf, l[5:]])
    low = torch.where(torch.isinf(low), -inf, low)
    equal = torch.arange(8) == 6
    low = torch.where(equal, high, low)
    solution, _ = qp().run(None, Q, c, A, b, G, high, low)
    above, below = torch.isfinite(high) & ~equal, torch.isfinite(low) & ~equal
    rows, right = torch.cat([G[above], -G[below]]), torch.cat([high[above], -low[below]])
    expected, _ = qp().run(None, Q, c, torch.cat([A, G[equal]]), torch.cat([b, high[equal]]), rows, right)
    torch.testing.assert_close(solution.primal, expected.primal)
    torch.testing.assert_close(solution.dual_ineq[equal], expected.dual_eq[1:])

    def primal(both, c):
        bounds = torch.where(equal, both, high), torch.where(equal, both, low)
        return qp().run(None, Q, c, A, b, G, *bounds)[0].primal.sum()

    both = grad(primal, argnums=(0, 1))(high.clamp(max=9.0), c)
    assert all(bool(torch.isfinite(t).all()) for t in both)
    torch.testing.assert_close(both[0][6], central(lambda t: primal(torch.where(equal, t, high), c), high[6]))


def test_bounds_that_cross_are_infeasible_lane_by_lane():
    Q, c, A, b, G, h, l = program(3)  # noqa: E741
    lows = torch.stack([l, torch.where(torch.arange(8) == 3, h + 0.1, l), l - 1])
    solution, state = vmap(lambda low: qp(on_failure="ignore").run(None, Q, c, A, b, G, h, low))(lows)
    assert state.status.tolist() == [Status.CONVERGED, Status.INFEASIBLE, Status.CONVERGED]
    torch.testing.assert_close(solution.primal[2], qp().run(None, Q, c, A, b, G, h, l - 1)[0].primal)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rows_with_two_bounds_that_contradict_each_other_are_infeasible_and_open_ones_unbounded(sign):
    G = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=F64)
    h, l = torch.tensor([1.0, 1.0, 5.0], dtype=F64), torch.tensor([0.0, 0.0, 3.0], dtype=F64)  # noqa: E741
    low, high = (l, h) if sign > 0 else (-h, -l)
    Q, c = torch.zeros(2, 2, dtype=F64), torch.ones(2, dtype=F64)
    with pytest.raises(ConvergenceError) as caught:
        qp().run(None, Q, c, None, None, G, high, low)
    assert caught.value.status == Status.INFEASIBLE
    with pytest.raises(ConvergenceError) as caught:
        qp().run(None, Q, -sign * c, None, None, G, *((h + torch.inf, l) if sign > 0 else (-l, -h - torch.inf)))
    assert caught.value.status == Status.UNBOUNDED


def test_bounds_of_one_side_each_that_contradict_each_other_are_infeasible():
    inf, one = torch.inf, torch.ones(2, 1, dtype=F64)
    h, l = torch.tensor([inf, 2.0], dtype=F64), torch.tensor([3.0, -inf], dtype=F64)  # noqa: E741
    with pytest.raises(ConvergenceError) as caught:
        qp().run(None, one[:1], one[0], None, None, one, h, l)
    assert caught.value.status == Status.INFEASIBLE


def test_an_equality_of_two_bounds_that_does_not_press_is_an_equality():
    one = torch.ones(1, dtype=F64)

    def x(b):
        return qp().run(None, torch.eye(1, dtype=F64), -one, None, None, torch.eye(1, dtype=F64), b, b)[0].primal

    torch.testing.assert_close(jacrev(x)(one), torch.eye(1, dtype=F64))
    at, eye = KKTSolution(one, one[:0], 0 * one), torch.eye(1, dtype=F64)
    slope = jacrev(lambda b: qp().optimality_fn(at, eye, -one, None, None, eye, b, b).dual_ineq)(one)
    torch.testing.assert_close(slope, eye)


def test_every_iteration_keeps_values_between_both_bounds():
    data = program(0)
    params, state = KKTSolution(data[1], data[3], 0 * data[5]), qp().init(None, *data)
    for _ in range(4):
        params, state = qp().update(params, state, *data)
        assert bool(
            (state.memory.values[1:] >= data[6] - 1e-12).all() and (state.memory.values[1:] <= data[5] + 1e-12).all()
        )


def test_a_good_guess_and_a_loop_over_update():
    data = program(4)
    solution, _ = qp().run(None, *data)
    assert qp().run(solution, *data)[1].iter_num == 0
    params, state = KKTSolution(*(torch.zeros_like(t) for t in solution)), qp().init(None, *data)
    while state.status == Status.RUNNING:
        params, state = qp().update(params, state, *data)
    torch.testing.assert_close(params, solution)


def test_float32_is_enough_for_two_bounds():
    data = program(5, 20, 5, 30)
    solution, _ = qp().run(None, *(t.float() for t in data))
    torch.testing.assert_close(solution.primal.double(), qp().run(None, *data)[0].primal, rtol=1e-3, atol=1e-3)


def test_lower_bounds_that_do_not_fit_are_refused():
    Q, c, A, b, G, h, l = program(0)  # noqa: E741
    with pytest.raises(ValueError, match="l are lower bounds of G x"):
        qp().run(None, Q, c, A, b, None, None, l)
    with pytest.raises(ValueError, match=r"l \(3,\)"):
        qp().run(None, Q, c, A, b, G, h, l[:3])


# --- dependent rows ---------------------------------------------------------------------------------------------------


def dependent(A: torch.Tensor, b: torch.Tensor, G: torch.Tensor, h: torch.Tensor, l: torch.Tensor) -> Data:  # noqa: E741
    """Copies of rows, in other units, and a sum of equalities."""
    return (
        torch.cat([A, 3 * A, A.sum(dim=0, keepdim=True)]),
        torch.cat([b, 3 * b, b.sum(dim=0, keepdim=True)]),
        torch.cat([G, 2 * G]),
        torch.cat([h, 2 * h]),
        torch.cat([l, 2 * l]),
    )


@pytest.mark.parametrize("mode", [jacrev, jacfwd])
@pytest.mark.parametrize("argument", range(7), ids=ARGUMENTS)
def test_the_primal_has_its_derivative_where_rows_depend_on_each_other(argument, mode):
    data = program(0, equalities=2)

    def primal(t, rows):
        Q, c, *constraints = (*data[:argument], t, *data[argument + 1 :])
        return qp().run(None, Q, c, *rows(*constraints))[0].primal

    found = mode(lambda t: primal(t, dependent))(data[argument])
    torch.testing.assert_close(found, jacrev(lambda t: primal(t, lambda *t: t))(data[argument]), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("outer", [jacrev, jacfwd])
@pytest.mark.parametrize("inner", [jacrev, jacfwd])
def test_second_derivatives_with_dependent_rows(inner, outer):
    Q, c, A, b, G, h, l = program(0, equalities=2)  # noqa: E741

    def value(A, rows):
        return (qp().run(None, Q, c, *rows(A, b, G, h, l))[0].primal ** 2).sum()

    found, expected = (outer(inner(lambda A, r=r: value(A, r)))(A) for r in (dependent, lambda *t: t))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


def test_multipliers_of_dependent_rows():
    """Of two copies, forward mode gives each the half; reverse mode gives what both have together, and no part."""
    Q, c, A, b, G, h, l = program(0)  # noqa: E741

    def duals(c):
        return qp().run(None, Q, c, torch.cat([A, A]), torch.cat([b, b]), G, h, l)[0].dual_eq

    whole = jacrev(lambda c: qp().run(None, Q, c, A, b, G, h, l)[0].dual_eq)(c)
    torch.testing.assert_close(jacfwd(duals)(c), whole.repeat(2, 1) / 2)
    torch.testing.assert_close(jacrev(lambda c: duals(c).sum())(c), whole[0])
    with pytest.raises(LinearSolveError, match="a cotangent asks for multipliers that are not"):
        jacrev(duals)(c)


def test_changes_by_which_copies_contradict_each_other():
    Q, c, A, b, G, h, l = program(0)  # noqa: E741

    def primal(b):
        return qp().run(None, Q, c, torch.cat([A, A]), b, G, h, l)[0].primal

    both = torch.cat([b, b])
    with pytest.raises(LinearSolveError, match="contradict each other along a tangent"):
        jacfwd(primal)(both)
    whole = jacrev(lambda b: qp().run(None, Q, c, A, b, G, h, l)[0].primal)(b)
    torch.testing.assert_close(jacrev(primal)(both), whole.repeat(1, 2) / 2)


@pytest.mark.parametrize("mode", [jacrev, jacfwd])
def test_a_minimiser_that_is_not_unique_raises(mode):
    """Every point of the edge x + y = 1 of the triangle."""
    G = torch.tensor([[-1.0, 0.0], [0.0, -1.0], [1.0, 1.0], [1.0, 1.0]], dtype=F64)
    h = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=F64)
    with pytest.raises(LinearSolveError, match="the minimiser is not unique"):
        mode(lambda c: qp().run(None, torch.zeros(2, 2, dtype=F64), c, None, None, G, h)[0].primal)(
            -torch.ones(2, dtype=F64)
        )


def test_dependent_rows_in_one_lane_of_two():
    Q, c, A, b, G, h, l = program(0)  # noqa: E741
    other = torch.cat([A, torch.flip(A, [1])])
    As, bs = torch.stack([torch.cat([A, A]), other]), torch.stack([torch.cat([b, b]), torch.cat([b, b])])

    def primal(c, A, b):
        return qp().run(None, Q, c, A, b, G[:1], h[:1], l[:1])[0].primal

    lanes = vmap(jacrev(primal), (None, 0, 0))(c, As, bs)
    torch.testing.assert_close(lanes[0], jacrev(primal)(c, A, b))
    torch.testing.assert_close(lanes[1], jacrev(primal)(c, As[1], bs[1]))


# --- rows that touch without pressing ---------------------------------------------------------------------------------


def touching(side: float) -> Data:
    """The second row goes through the solution that the others determine."""
    Q, c, A, b, G, h, _ = program(1, 5, 1, 3)
    h = torch.stack([G[0] @ torch.linalg.solve(Q, -c) - 1.0, h[1], h[2]])
    low, high = torch.full((3,), -torch.inf, dtype=F64), torch.full((3,), torch.inf, dtype=F64)
    first = torch.tensor([True, False, False])
    x = qp().run(None, Q, c, A, b, G, torch.where(first, h, high), low)[0].primal
    image = G @ x
    if side > 0:
        return Q, c, A, b, G, torch.stack([h[0], image[1], image[2] + 1.0]), image - 2.0
    return Q, c, A, b, G, torch.stack([h[0], image[1] + 2.0, image[2] + 1.0]), image - torch.tensor([2.0, 0, 2.0])


@pytest.mark.parametrize("argument", range(7), ids=ARGUMENTS)
@pytest.mark.parametrize("side", [1.0, -1.0])
def test_a_row_that_touches_has_the_derivative_of_the_side_where_it_is_inactive(side, argument):
    data = touching(side)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0], dtype=F64)

    def value(t):
        t = (t + t.T) / 2 if argument == 0 else t
        solution, _ = qp().run(None, *data[:argument], t, *data[argument + 1 :])
        return weights @ solution.primal, solution.dual_ineq[1]

    at, step = data[argument], 1e-5
    (here, pressing), found = value(at), grad(lambda t: value(t)[0])(at).reshape(-1)
    assert pressing == 0
    inactive = 0
    for way in (step, -step):
        moved, dual = vmap(value)(at + steps(at, way))
        free = dual == 0
        torch.testing.assert_close(((moved - here) / way)[free], found[free], rtol=1e-3, atol=2e-4)
        inactive = inactive + free.sum()
    assert inactive >= at.numel()


@pytest.mark.parametrize("units", [1.0, 1e6, 1e-6])
def test_a_touching_bound_in_closed_form(units):
    """``min (x - t)^2 / 2`` with ``x <= h`` at ``t = h``: the derivative is 1 in t, and 0 in h."""
    one = torch.ones(1, dtype=F64)

    def x(t, h):
        return qp().run(None, units * torch.eye(1, dtype=F64), -units * t, G=torch.eye(1, dtype=F64), h=h)[0].primal[0]

    for start in (one, one / 3, 7e5 * one):
        torch.testing.assert_close(grad(x, argnums=(0, 1))(start, start.clone()), (one, 0 * one))


# --- tables -----------------------------------------------------------------------------------------------------------

SMALL = [p for p in maros_meszaros.programs() if sum(p.A.shape) <= 400 and p.name not in maros_meszaros.NOT_CONVEX]


def solved(problem: QuadraticProgram):
    solution, state = qp().run(None, *problem.arguments())
    return solution, state, solution.primal.numpy()


@pytest.mark.parametrize("problem", SMALL, ids=str)
def test_the_programs_of_maros_and_meszaros_are_solved(problem):
    _, state, x = solved(problem)
    optimum = problem.optimum
    assert abs(problem.objective(x) - optimum) <= 1e-8 * max(abs(optimum), 1.0) and problem.violation(x) <= 1e-9
    assert state.iter_num <= 60


def test_the_program_that_is_not_convex_is_refused():
    (problem,) = (p for p in maros_meszaros.programs() if p.name in maros_meszaros.NOT_CONVEX)
    assert np.linalg.eigvalsh(problem.P).min() < -1e-6
    with pytest.raises(ConvergenceError) as caught:
        qp().run(None, *problem.arguments())
    assert caught.value.status == Status.DIVERGED


@pytest.mark.parametrize("problem", PROGRAMS, ids=str)
def test_primal_and_dual_meet_on_the_classes_of_osqps_paper(problem):
    (x, y, z), state, _ = solved(problem)
    Q, c, A, b, G, h, l = problem.arguments()  # noqa: E741
    bound = torch.where(z > 0, h, torch.where(z < 0, l, 0.0))
    primal, dual = 0.5 * x @ Q @ x + c @ x, -0.5 * x @ Q @ x - y @ b - z @ bound
    torch.testing.assert_close(primal, dual, rtol=1e-9, atol=1e-9)
    assert problem.violation(x.numpy()) < 1e-10 and state.iter_num <= 20
    assert (Q @ x + c + A.T @ y + G.T @ z).abs().max() < 1e-8


# --- bounds at zero ---------------------------------------------------------------------------------------------------


def programs_with_bounds_near_zero(count: int, n: int, bound: float) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    B = torch.randn(count, n, n, dtype=torch.float64, generator=generator)
    c = 3 * torch.randn(count, n, dtype=torch.float64, generator=generator)
    Q = B @ B.mT / n + 0.1 * torch.eye(n, dtype=torch.float64)
    return Q, c, -torch.eye(n, dtype=torch.float64), torch.full((n,), bound, dtype=torch.float64)


@pytest.mark.parametrize("bound", [0.0, 1e-12, 1e-9, -1e-9, 1e-6])
def test_unknowns_at_bounds_of_any_size_have_their_derivative(bound):
    """An unknown at a bound of zero is some 1e-36 or none at all, and moves with the bound alone."""
    Q, c, G, h = programs_with_bounds_near_zero(40, 4, bound)

    def solve(Q, c):
        solution, state = qp().run(None, Q, c, None, None, G, h)
        return solution, state.status

    solution, status = vmap(solve)(Q, c)
    assert (status == Status.CONVERGED).all()
    slopes = vmap(jacrev(lambda c, Q: solve(Q, c)[0].primal))(c, Q)
    for matrix, y, slope in zip(Q, solution.dual_ineq, slopes, strict=True):
        free = y == 0
        expected = torch.zeros_like(matrix)
        expected[free.outer(free)] = -torch.linalg.inv(matrix[free][:, free]).flatten()
        torch.testing.assert_close(slope, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_interior_point_without_a_finite_inequality_meets_the_equalities(dtype: torch.dtype) -> None:
    """With no product of a slack and a multiplier, their mean is 0."""
    full = lambda *shape: torch.ones(1, *shape, dtype=dtype)  # noqa: E731
    Q = torch.diag_embed(torch.tensor([[1.0, 2, 3]], dtype=dtype))
    G, h, l = torch.eye(3, dtype=dtype)[None], torch.inf * full(3), full(0)  # noqa: E741
    program = make_program(Q, full(3), full(1, 3), full(1), G, h, l)
    x, _ = interior_point(program, torch.finfo(dtype).eps)
    # Stationarity is Q x + c + y = 0: x_i = -(1 + y) / i, with 1 = -(1 + y) (1 + 1/2 + 1/3).
    torch.testing.assert_close(x[0], torch.tensor([6.0, 3, 2], dtype=dtype) / 11, rtol=1e-3, atol=0)
