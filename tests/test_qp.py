"""Quadratic programs against closed forms, SciPy, the KKT conditions and central differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.func import grad, jacrev, vmap

from implicitdiff import ConvergenceError
from implicitdiff.solvers import Status, qp

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
