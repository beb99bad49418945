"""Quadratic programs against closed forms, SciPy, the KKT conditions and central differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, lsq_linear, minimize
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from implicitdiff import ConvergenceError, custom_root
from implicitdiff.linear_solve import solve_lstsq
from implicitdiff.solvers import KKTSolution, Status, make_kkt_optimality_fn, qp

F64 = torch.float64
ARGUMENTS = ("Q", "c", "A", "b", "G", "h")


def program(seed: int, n: int = 5, equalities: int = 2, inequalities: int = 4) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=F64, generator=generator)

    half, inside = normal(n, n), normal(n)
    A, G = normal(equalities, n), normal(inequalities, n)
    slack = torch.rand(inequalities, dtype=F64, generator=generator)
    return half @ half.T + 0.1 * torch.eye(n, dtype=F64), 3 * normal(n), A, A @ inside, G, G @ inside + slack


def violation(solution, Q, c, A, b, G, h) -> float:
    x, y, z = solution
    slack = h - G @ x
    parts = [Q @ x + c + A.T @ y + G.T @ z, A @ x - b, torch.minimum(z, slack)]
    return max(part.abs().max().item() for part in parts if part.numel())


@pytest.mark.parametrize("seed", range(8))
def test_the_solution_is_scipys_and_satisfies_the_conditions(seed):
    data = program(seed)
    Q, c, A, b, G, h = (t.numpy() for t in data)
    solution, _ = qp().run(None, *data)
    assert violation(solution, *data) < 1e-9
    constraints = [
        {"type": "eq", "fun": lambda x: A @ x - b, "jac": lambda x: A},
        {"type": "ineq", "fun": lambda x: h - G @ x, "jac": lambda x: -G},
    ]
    expected = minimize(
        lambda x: 0.5 * x @ Q @ x + c @ x,
        np.zeros(5),
        jac=lambda x: Q @ x + c,
        constraints=constraints,
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    np.testing.assert_allclose(solution.primal.numpy(), expected.x, atol=1e-5)


def test_the_closed_form_with_one_equality():
    Q, c = 2 * torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64), torch.ones(2, dtype=F64)
    A, b = torch.ones(1, 2, dtype=F64), torch.ones(1, dtype=F64)
    solution, _ = qp().run(None, Q, c, A, b, None, None)
    quarter = torch.tensor([0.25, 0.75], dtype=F64)
    torch.testing.assert_close(solution.primal, quarter)
    torch.testing.assert_close(solution.dual_eq, torch.tensor([-2.75], dtype=F64))
    derivative = jacrev(lambda b: qp().run(None, Q, c, A, b, None, None)[0].primal)(b)
    torch.testing.assert_close(derivative[:, 0], quarter)


@pytest.mark.parametrize("argument", range(6), ids=ARGUMENTS)
@pytest.mark.parametrize("seed", [0, 3])
def test_the_derivative_in_every_argument_is_that_of_central_differences(seed, argument):
    data = list(program(seed))
    weights = torch.cos(torch.arange(11, dtype=F64))

    def value(t):
        # A direction of Q that is not symmetric has no meaning.
        t = (t + t.T) / 2 if argument == 0 else t
        return weights @ torch.cat(qp(rtol=1e-13).run(None, *data[:argument], t, *data[argument + 1 :])[0])

    step = 1e-5 * torch.sin(1 + torch.arange(data[argument].numel(), dtype=F64)).reshape(data[argument].shape)
    expected = (value(data[argument] + step) - value(data[argument] - step)) / 2
    result = (grad(value)(data[argument]) * step).sum()
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-11)


@pytest.mark.parametrize("equalities", [True, False])
@pytest.mark.parametrize("inequalities", [True, False])
def test_any_constraints_may_be_absent(equalities, inequalities):
    Q, c, A, b, G, h = program(1)
    eq, ineq = (A, b) if equalities else (None, None), (G, h) if inequalities else (None, None)
    solution, _ = qp().run(None, Q, c, *eq, *ineq)
    few, many = (A, b) if equalities else (A[:0], b[:0]), (G, h) if inequalities else (G[:0], h[:0])
    assert violation([t if t is not None else Q[0, :0] for t in solution], Q, c, *few, *many) < 1e-9


INFEASIBLE = torch.tensor([-6.0, -6.0, 11.0], dtype=F64)
FEASIBLE = torch.tensor([-2.0, -3.0, 11.0], dtype=F64)
CORNER = torch.tensor([[-1.0, 0.0], [0.0, -1.0], [1.0, 1.0]], dtype=F64)


def corner(h, c=None, **options):
    c = torch.ones(2, dtype=F64) if c is None else c
    return qp(**options).run(None, torch.zeros(2, 2, dtype=F64), c, None, None, CORNER, h)


def test_an_infeasible_program_is_reported():
    with pytest.raises(ConvergenceError, match="no point satisfies the constraints") as caught:
        corner(INFEASIBLE)
    assert caught.value.status == Status.INFEASIBLE
    torch.testing.assert_close(corner(FEASIBLE)[0].primal, torch.tensor([2.0, 3.0], dtype=F64))


def test_an_unbounded_program_is_reported():
    G, h = -torch.eye(2, dtype=F64), torch.zeros(2, dtype=F64)
    with pytest.raises(ConvergenceError) as caught:
        qp().run(None, torch.zeros(2, 2, dtype=F64), -torch.ones(2, dtype=F64), None, None, G, h)
    assert caught.value.status == Status.UNBOUNDED


def test_weights_that_hide_each_other_stall_soon_at_the_best_point():
    """Curvatures from 1 to 1e16; the lanes without progress stop at their best review."""
    generator = torch.Generator().manual_seed(4)
    weights = 10 ** (16 * torch.rand(8, 6, dtype=F64, generator=generator))
    c, G, x = (torch.randn(*shape, dtype=F64, generator=generator) for shape in ((8, 6), (8, 8, 6), (8, 6)))
    h = (G @ x[..., None])[..., 0] + 0.1 * torch.randn(8, 8, dtype=F64, generator=generator).abs()

    def run(weights, c, G, h):
        return qp(on_failure="ignore").run(None, weights.diag(), c, None, None, G, h, keep_history=True)

    _, state = vmap(run)(weights, c, G, h)
    stalled = state.status == Status.STALLED
    assert stalled.any() and (stalled | state.converged).all()
    # Rounding may halve an error in a late review.
    patience = torch.clamp(8 * state.memory.halved, min=1280)
    assert (state.iter_num <= patience)[stalled].all()
    reviews = [10 * 2**k for k in range(10) if 10 * 2**k < state.history.shape[1]]
    assert (state.error <= 2 * state.history[:, reviews].amin(dim=1))[stalled].all()


def test_lanes_fail_alone():
    h = torch.stack([FEASIBLE, INFEASIBLE, FEASIBLE + 0.5])
    solution, state = vmap(lambda h: corner(h, on_failure="ignore"))(h)
    assert state.status.tolist() == [Status.CONVERGED, Status.INFEASIBLE, Status.CONVERGED]
    for lane in (0, 2):
        torch.testing.assert_close(solution.primal[lane], corner(h[lane])[0].primal)
    with pytest.raises(ConvergenceError) as caught:
        vmap(corner)(h)
    assert caught.value.lanes == (1,)


def test_a_thousand_box_programs_in_one_call_with_a_hypergradient_for_each():
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(1000, 20, 20, dtype=F64, generator=generator)
    Q = half @ half.mT / 20 + 0.1 * torch.eye(20, dtype=F64)
    c = torch.randn(1000, 20, dtype=F64, generator=generator)
    G = torch.cat([torch.eye(20, dtype=F64), -torch.eye(20, dtype=F64)])

    def value(bound, Q, c):
        solution, _ = qp().run(None, Q, c, None, None, G, bound.expand(40))
        return (solution.primal**2).sum()

    bound = torch.full((1000,), 0.5, dtype=F64)
    hypergradients = vmap(grad(value))(bound, Q, c)
    assert hypergradients.shape == (1000,) and bool((hypergradients > 0).any())
    for lane in (0, 17, 999):
        up, down = (value(bound[lane] + e, Q[lane], c[lane]) for e in (1e-6, -1e-6))
        torch.testing.assert_close(hypergradients[lane], (up - down) / 2e-6, rtol=1e-6, atol=1e-7)


def test_a_large_violation_of_the_constraints_does_not_hide_the_gradient():
    scales, f32 = torch.tensor([1.0, 2.0, 3.0]), torch.float32
    Q, c = 1e-4 * torch.diag(scales), torch.tensor([1.0, -1.0, 2.0])
    h = torch.tensor([-5000.0, 2500.0], dtype=f32)
    solution, _ = qp().run(None, Q, c, None, None, torch.eye(3)[:2], h)
    torch.testing.assert_close(solution.primal, torch.tensor([-10000.0, 2500.0, -20000.0 / 3]), rtol=1e-3, atol=0)


def test_a_target_below_rounding_is_not_asked_for():
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        half = torch.randn(5, 5, generator=generator)
        c, x, A = (torch.randn(*shape, generator=generator) for shape in ((5,), (5,), (2, 5)))
        _, state = qp().run(None, 1e3 * (half @ half.T + 0.1 * torch.eye(5)), c, A, A @ x)
        assert state.status == Status.CONVERGED


# --- derivatives ------------------------------------------------------------------------------------------------------

WEIGHTS = torch.cos(torch.arange(11, dtype=F64))


def weighed(solver, *data, **how):
    return WEIGHTS @ torch.cat(solver.run(None, *data, **how)[0]) ** 2


def entrywise(function, at, step):
    unit = step * torch.eye(at.numel(), dtype=F64).reshape(-1, *at.shape)
    return torch.stack([(function(at + e) - function(at - e)) / (2 * step) for e in unit]).reshape(at.shape)


@pytest.mark.parametrize("argument", range(6), ids=ARGUMENTS)
def test_unrolled_and_implicit_derivatives_agree(argument):
    data = program(0)
    implicit = grad(lambda *data: weighed(qp(), *data), argnums=argument)(*data)
    unrolled = grad(lambda *data: weighed(qp(), *data, implicit_diff=False), argnums=argument)(*data)
    torch.testing.assert_close(implicit, unrolled, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("argument", range(6), ids=ARGUMENTS)
def test_the_unrolled_derivative_is_that_of_so_many_iterations(argument):
    data = program(0)

    def value(t):
        return weighed(qp(maxiter=3), *data[:argument], t, *data[argument + 1 :], implicit_diff=False)

    expected = entrywise(value, data[argument], 1e-5)
    torch.testing.assert_close(grad(value)(data[argument]), expected, rtol=1e-6, atol=1e-6)


def test_derivatives_compose():
    data = program(0)

    def value(c, b):
        return weighed(qp(), data[0], c, data[2], b, *data[4:])

    c, b = data[1], data[3]
    gradient, curvature = grad(value)(c, b), hessian(value)(c, b)
    torch.testing.assert_close(jacfwd(value)(c, b), gradient)
    columns = [entrywise(lambda c, i=i: grad(value)(c, b)[i], c, 1e-5) for i in range(5)]
    torch.testing.assert_close(curvature, torch.stack(columns), rtol=1e-6, atol=1e-6)
    cs = c + torch.linspace(-1, 1, 15, dtype=F64).reshape(3, 5)
    torch.testing.assert_close(vmap(grad(value), (0, None))(cs, b), torch.stack([grad(value)(c, b) for c in cs]))
    unrolled = vmap(grad(lambda c: weighed(qp(), data[0], c, *data[2:], implicit_diff=False)))(cs)
    torch.testing.assert_close(unrolled, torch.stack([grad(value)(c, b) for c in cs]))


def test_a_loop_over_update_is_the_run():
    data, solver = program(0), qp()
    params = KKTSolution(torch.zeros(5, dtype=F64), torch.zeros(2, dtype=F64), torch.zeros(4, dtype=F64))
    state = solver.init(None, *data)
    while state.status == Status.RUNNING:
        params, state = solver.update(params, state, *data)
    torch.testing.assert_close(params, solver.run(None, *data)[0])
    assert max(t.abs().max() for t in solver.optimality_fn(params, *data)) < 1e-10


def test_where_multipliers_are_not_unique_the_primal_still_has_a_derivative():
    Q, c, A, b, G, h = program(0)
    twice = Q, c, torch.cat([A, A]), torch.cat([b, b]), torch.cat([G, G]), torch.cat([h, h])
    torch.testing.assert_close(qp().run(None, *twice)[0].primal, qp().run(None, Q, c, A, b, G, h)[0].primal)

    def primal(solver, c, data):
        return WEIGHTS[:5] @ solver.run(None, Q, c, *data)[0].primal

    for solver in (qp(), qp(solve=solve_lstsq())):
        least = grad(primal, argnums=1)(solver, c, twice[2:])
        torch.testing.assert_close(least, grad(primal, argnums=1)(qp(), c, (A, b, G, h)))


# --- harder programs --------------------------------------------------------------------------------------------------


def linear_program(seed: int, n: int, equalities: int, inequalities: int) -> tuple[torch.Tensor, ...]:
    """In a box, with a solution by duality."""
    Q, _, A, b, G, h = program(seed, n, equalities, inequalities)
    eye, inside = torch.eye(n, dtype=F64), torch.linalg.lstsq(torch.cat([A, G]), torch.cat([b, h - 0.5])).solution
    G, h = torch.cat([G, eye, -eye]), torch.cat([h, inside + 1, 1 - inside])
    multipliers = torch.rand(len(h), dtype=F64, generator=torch.Generator().manual_seed(seed))
    return torch.zeros_like(Q), -G.T @ multipliers, A, b, G, h


@pytest.mark.parametrize(("n", "equalities", "inequalities"), [(6, 0, 4), (20, 5, 30), (60, 30, 20), (120, 40, 100)])
def test_linear_programs_are_linprogs(n, equalities, inequalities):
    data = linear_program(1, n, equalities, inequalities)
    solution, state = qp().run(None, *data)
    _, c, A, b, G, h = (t.numpy() for t in data)
    expected = linprog(c, G, h, A if equalities else None, b if equalities else None, (None, None))
    assert violation(solution, *data) < 1e-8 and state.iter_num <= 20
    np.testing.assert_allclose(c @ solution.primal.numpy(), expected.fun, rtol=1e-9)


def test_bounded_least_squares_is_scipys():
    generator = torch.Generator().manual_seed(3)
    design = torch.randn(60, 30, dtype=F64, generator=generator)
    y, eye = torch.randn(60, dtype=F64, generator=generator), torch.eye(30, dtype=F64)
    bounds = torch.full((60,), 0.05, dtype=F64)
    solution, _ = qp().run(None, design.T @ design, -design.T @ y, G=torch.cat([eye, -eye]), h=bounds)
    expected = lsq_linear(design.numpy(), y.numpy(), (-0.05, 0.05), method="bvls", tol=1e-14)
    np.testing.assert_allclose(solution.primal.numpy(), expected.x, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("condition", [1e4, 1e8])
def test_ill_conditioned_and_badly_scaled_programs_are_solved(seed, condition):
    generator = torch.Generator().manual_seed(seed)
    _, c, A, b, G, h = program(seed, 30, 5, 40)
    basis = torch.linalg.qr(torch.randn(30, 30, dtype=F64, generator=generator))[0]
    Q = basis @ torch.diag(torch.logspace(0, -np.log10(condition), 30, dtype=F64)) @ basis.T
    data = Q, c, A, b, torch.cat([G, basis, -basis]), torch.cat([h, torch.full((60,), 30.0, dtype=F64)])
    solution, state = qp().run(None, *data)
    assert violation(solution, *data) < 1e-8 and state.iter_num <= 40
    columns, rows = (10.0 ** (4 * torch.rand(k, dtype=F64, generator=generator) - 2) for k in (30, 100))
    scaled, _ = qp().run(
        None,
        columns[:, None] * Q * columns,
        columns * c,
        A * columns,
        b,
        rows[:, None] * data[4] * columns,
        rows * data[5],
    )
    torch.testing.assert_close(columns * scaled.primal, solution.primal, rtol=1e-5, atol=1e-5)


def test_lanes_are_what_they_would_be_alone():
    """One converges, one is infeasible, one is unbounded, one is not convex, one is not finite."""
    eye, one = torch.eye(2, dtype=F64), torch.ones((), dtype=F64)
    Q = torch.stack([eye, eye, 0 * eye, torch.diag(torch.stack([one, -one])), torch.nan * eye])
    c = torch.ones(5, 2, dtype=F64)
    h = torch.tensor([[-6.0, -6.0, 20.0], [-6.0, -6.0, 11.0], [1.0, torch.inf, 3.0], [0.0] * 3, [0.0] * 3], dtype=F64)
    solver = qp(on_failure="ignore")
    solution, state = vmap(lambda *lane: solver.run(None, lane[0], lane[1], G=CORNER, h=lane[2]))(Q, c, h)
    expected = [Status.CONVERGED, Status.INFEASIBLE, Status.UNBOUNDED, Status.DIVERGED, Status.DIVERGED]
    assert state.status.tolist() == expected
    for lane in range(5):
        alone, its = solver.run(None, Q[lane], c[lane], G=CORNER, h=h[lane])
        torch.testing.assert_close([t[lane] for t in solution], list(alone), rtol=1e-6, atol=1e-9, equal_nan=True)
        assert its.status == state.status[lane] and its.iter_num == state.iter_num[lane]


@pytest.mark.parametrize(
    ("Q", "c", "A", "b", "status"),
    [
        ([[1.0, 0.0], [0.0, -1.0]], [0.0, 0.0], None, None, Status.UNBOUNDED),
        ([[1.0, 0.0], [0.0, 0.0]], [0.0, 1.0], None, None, Status.UNBOUNDED),
        ([[1.0, 0.0], [0.0, -1.0]], [0.0, 0.0], [[1.0, 0.0]], [1.0], Status.UNBOUNDED),
        ([[1.0, 0.0], [0.0, -1.0]], [0.0, 0.0], [[0.0, 1.0]], [1.0], Status.CONVERGED),
        ([[1.0, 0.0], [0.0, 0.0]], [1.0, 0.0], None, None, Status.CONVERGED),
        ([[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0], [[1.0, 1.0], [2.0, 2.0]], [1.0, 1.0], Status.INFEASIBLE),
        ([[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0], [[1.0, 1.0], [2.0, 2.0]], [1.0, 2.0], Status.CONVERGED),
    ],
)
def test_what_equalities_and_curvature_allow(Q, c, A, b, status):
    data = [None if t is None else torch.tensor(t, dtype=F64) for t in (Q, c, A, b)]
    _, state = qp(on_failure="ignore").run(None, *data)
    assert state.status == status


def test_a_program_that_is_convex_on_the_null_space_alone_is_solved():
    Q, A = torch.diag(torch.tensor([1.0, -1.0], dtype=F64)), torch.tensor([[0.0, 1.0]], dtype=F64)
    data = Q, torch.tensor([-3.0, 0.0], dtype=F64), A, A[0, 1:], torch.eye(2, dtype=F64)[:1], A[0, 1:]
    solution, _ = qp().run(None, *data)
    torch.testing.assert_close(list(solution), [torch.tensor(t, dtype=F64) for t in ([1.0, 1.0], [1.0], [2.0])])


def test_an_infinite_bound_is_no_constraint():
    Q, c, A, b, G, h = program(2)
    none = torch.tensor([False, True, False, True])
    some = qp().run(None, Q, c, A, b, G, torch.where(none, torch.inf, h))[0]
    expected = qp().run(None, Q, c, A, b, G[~none], h[~none])[0]
    torch.testing.assert_close(some.primal, expected.primal)
    torch.testing.assert_close(some.dual_ineq, torch.zeros(4, dtype=F64).masked_scatter(~none, expected.dual_ineq))
    gradient = grad(lambda h: (qp().run(None, Q, c, A, b, G, h)[0].primal ** 2).sum())(torch.where(none, torch.inf, h))
    assert bool(torch.isfinite(gradient).all()) and not gradient[none].any()


def test_a_good_guess_saves_the_iterations():
    data = program(4, 30, 5, 40)
    solution, cold = qp().run(None, *data)
    near = (data[0], data[1] + 1e-3, *data[2:])
    warm = qp().run(solution, *near)[1]
    assert warm.iter_num == 1 and cold.iter_num == 10
    assert qp().run(solution, *data)[1].iter_num == 0
    torch.testing.assert_close(qp().run(solution.primal, *near)[0], qp().run(None, *near)[0])


def test_float32_is_enough():
    data = [t.float() for t in program(0, 20, 5, 30)]
    solution, state = qp().run(None, *data)
    exact = qp().run(None, *(t.double() for t in data))[0]
    assert solution.primal.dtype == torch.float32 and state.status == Status.CONVERGED
    torch.testing.assert_close(solution.primal.double(), exact.primal, rtol=1e-3, atol=1e-3)


def test_a_matrix_that_is_not_symmetric_counts_as_its_symmetric_part():
    Q, *rest = program(0)
    skew = torch.arange(25, dtype=F64).reshape(5, 5)
    torch.testing.assert_close(qp().run(None, Q + skew - skew.T, *rest)[0], qp().run(None, Q, *rest)[0])
    gradient = grad(lambda Q: weighed(qp(), Q, *rest))(Q + skew - skew.T)
    torch.testing.assert_close(gradient, gradient.T)


def replaced(data, **other):
    return [other.get(name, t) for name, t in zip(ARGUMENTS, data, strict=True)]


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        ({"A": None}, ValueError, "A and b go together"),
        ({"h": None}, ValueError, "G and h go together"),
        ({"Q": torch.zeros(5, 4, dtype=F64)}, ValueError, r"shapes must be .* got Q \(5, 4\)"),
        ({"c": torch.zeros(3, 5, dtype=F64)}, ValueError, "batches by vmap"),
        ({"h": torch.zeros(3, dtype=F64)}, ValueError, r"h \(3,\)"),
        ({"c": torch.zeros(5)}, ValueError, "one dtype"),
        ({"Q": torch.zeros(5, 5, dtype=torch.int64)}, TypeError, "Q must be a real floating-point tensor"),
        ({"c": None}, TypeError, "c must be a real floating-point tensor"),
    ],
)
def test_what_does_not_fit_is_refused(other, error, message):
    with pytest.raises(error, match=message):
        qp().run(None, *replaced(program(0), **other))


def test_a_guess_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="its dual_eq must be float64\\[2\\], got float64\\[3\\]"):
        qp().run(KKTSolution(torch.zeros(5, dtype=F64), torch.zeros(3, dtype=F64)), *program(0))


# --- the conditions of other solvers ----------------------------------------------------------------------------------


def test_any_solver_that_gives_multipliers_has_derivatives():
    """The point of the ellipse x^2 + 4 y^2 <= r nearest to (2, 1), on the line x = p y, by SLSQP and trust-constr."""

    def objective(x, target):
        return ((x - target) ** 2).sum()

    def line(x, p):
        return (x[0] - p * x[1])[None]

    def ellipse(x, r):
        return (x[0] ** 2 + 4 * x[1] ** 2 - r)[None]

    @custom_root(make_kkt_optimality_fn(objective, line, ellipse), check=1e-6)
    def nearest(init, params_obj, params_eq, params_ineq):
        target, p, r = params_obj.detach().numpy(), float(params_eq), float(params_ineq)
        found = minimize(
            lambda x: ((x - target) ** 2).sum(),
            init.numpy(),
            jac=lambda x: 2 * (x - target),
            method="SLSQP",
            constraints=[
                {"type": "eq", "fun": lambda x: x[0] - p * x[1]},
                {"type": "ineq", "fun": lambda x: r - x[0] ** 2 - 4 * x[1] ** 2},
            ],
            options={"ftol": 1e-15},
        )
        x = found.x
        normals = np.array([[1.0, -p], [2 * x[0], 8 * x[1]]]).T
        dual = np.linalg.solve(normals, -2 * (x - target))
        return KKTSolution(*(torch.tensor(t, dtype=F64) for t in (x, dual[:1], dual[1:])))

    target, p, r = torch.tensor([2.0, 1.0], dtype=F64), torch.tensor(0.5, dtype=F64), torch.tensor(1.0, dtype=F64)
    start = torch.ones(2, dtype=F64)
    solution = nearest(start, target, p, r)
    y = 1 / (p**2 + 4) ** 0.5
    torch.testing.assert_close(solution.primal, torch.stack([p * y, y]))
    jacobian = jacrev(lambda p, r: nearest(start, target, p, r).primal, argnums=(0, 1))(p, r)
    expected = jacrev(lambda p, r: torch.stack([p, torch.ones_like(p)]) * (r / (p**2 + 4)) ** 0.5, argnums=(0, 1))(p, r)
    torch.testing.assert_close(jacobian, expected, rtol=1e-6, atol=1e-7)
    assert bool((jacrev(lambda t: nearest(start, t, p, r).primal)(target).abs() < 1e-6).all())


def test_the_two_statements_of_the_conditions_have_the_same_derivatives():
    Q, c, A, b, G, h = program(0)
    optimality_fn = make_kkt_optimality_fn(
        lambda x, c: 0.5 * x @ Q @ x + c @ x, lambda x: A @ x - b, lambda x, h: G @ x - h
    )
    solve = custom_root(optimality_fn)(
        lambda init, params_obj, params_ineq: qp().run(init, Q, params_obj, A, b, G, params_ineq)[0]
    )
    ours = jacrev(lambda c, h: qp().run(None, Q, c, A, b, G, h)[0], argnums=(0, 1))(c, h)
    torch.testing.assert_close(jacrev(lambda c, h: solve(None, c, h), argnums=(0, 1))(c, h), ours)
    assert sum(t.abs().sum() for t in optimality_fn(solve(None, c, h), c, None, h)) < 1e-9


def test_multipliers_and_constraints_go_together():
    x = torch.ones(2, dtype=F64)
    optimality_fn = make_kkt_optimality_fn(lambda x: (x**2).sum(), ineq_fn=lambda x: x)
    with pytest.raises(ValueError, match="dual_ineq must not be None"):
        optimality_fn(KKTSolution(x))
    with pytest.raises(ValueError, match="dual_eq must be None without a function of constraints"):
        optimality_fn(KKTSolution(x, x, x))
    with pytest.raises(ValueError, match="must have the structure, shapes and dtypes of dual_ineq"):
        optimality_fn(KKTSolution(x, None, x[:1]))
    with pytest.raises(TypeError, match="objective_fn must be a function"):
        make_kkt_optimality_fn(None)
    torch.testing.assert_close(optimality_fn(KKTSolution(x, x[:0], x)), KKTSolution(3 * x, x[:0], x))


def test_half_precision_under_autocast_is_cast_as_by_every_solver():
    eye, c = torch.eye(2), torch.tensor([1.0, -2.0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution, _ = qp().run(None, eye, c.bfloat16())
    assert solution.primal.dtype == torch.float32
    torch.testing.assert_close(solution.primal, -c)


def test_a_minimiser_that_is_not_unique_has_the_derivative_nan_in_its_lane_alone():
    """A linear program with tied costs in the second lane; a loss that does not depend on it has the derivative 0."""
    costs = torch.tensor([[1.0, 2.0], [1.0, 1.0]], dtype=F64)
    A, b, G, h = (
        torch.ones(1, 2, dtype=F64),
        torch.ones(1, dtype=F64),
        -torch.eye(2, dtype=F64),
        torch.zeros(2, dtype=F64),
    )
    Q = torch.diag(torch.tensor([1.0, 0.0], dtype=F64))  # strictly convex on A x = b, where the first cost decides

    def loss(costs, mask):
        def one(c, curvature):
            return qp(on_failure="ignore").run(None, curvature * Q, c, A, b, G, h)[0].primal

        x = vmap(one)(costs, torch.tensor([1.0, 0.0], dtype=F64))
        return torch.where(mask[:, None], x**2, 0.0).sum()

    both, first = torch.tensor([True, True]), torch.tensor([True, False])
    of_both = grad(loss)(costs, both)
    assert of_both[0].isfinite().all() and of_both[1].isnan().all()
    assert torch.equal(grad(loss)(costs, first), torch.stack([of_both[0], torch.zeros(2, dtype=F64)]))
