"""The Newton-type step by which minimisers judge their distance from a minimum."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tables.solvers import LINE_SEARCHES, factories
from torch import Tensor

from implicitdiff.solvers._loop.newton_step import NewtonStep, _with_hidden_step, conjugate_directions

F32, F64 = torch.float32, torch.float64


def orthogonal(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=F64))[0]


@pytest.mark.parametrize("factory", factories(LINE_SEARCHES))
def test_no_claim_far_from_the_minimum_of_a_singular_looking_fit(factory: Any) -> None:
    """The Hessian has the condition number 1e10, above 1 / eps, and is singular as a float32 matrix."""
    n = 12
    for seed in range(4):
        J = ((orthogonal(n, seed) * torch.logspace(0, -5, n, dtype=F64)) @ orthogonal(n, seed + 99)).to(F32)
        solution = torch.linspace(1, 2, n, dtype=F64)
        b = (J.to(F64) @ solution).to(F32)
        x, state = factory(lambda x, J=J, b=b: (J @ x - b).square().sum(), on_failure="ignore").run(torch.zeros(n))
        # Rounding moves the residual by a few eps of ``|b|``, and ``J^-1`` is at most 1e5.
        assert not state.converged or (x - solution).norm() <= 4 * torch.finfo(F32).eps * 1e5 * solution.norm()


@pytest.mark.parametrize("units", [0, 6])
@pytest.mark.parametrize("n", [2, 5, 12])
def test_conjugate_directions_resolve_curvatures_below_eps(n: int, units: int) -> None:
    """Products with ``J'J`` of condition number 1e10 give the Newton step in float32, in any units."""
    J = (orthogonal(n, n) * torch.logspace(0, -5, n, dtype=F64)) @ orthogonal(n, n + 99)
    J = (J * torch.logspace(0, units, n, dtype=F64)).to(F32)
    product = lambda v: (v @ J.mT) @ J  # noqa: E731
    grad, eps = torch.ones(1, n) @ J, torch.finfo(F32).eps
    step, gain = conjugate_directions(torch.ones(1, n), grad, product, n, eps=eps)
    exact = torch.linalg.solve(J.to(F64), torch.ones(n, dtype=F64))
    # ``J^-1`` of condition number 1e5 magnifies the rounding of ``J``.
    torch.testing.assert_close(J.to(F64) @ (step.d[0].to(F64) + exact), torch.zeros(n, dtype=F64), rtol=0, atol=0.1)
    assert abs(float(gain) - n / 2) <= 0.1 * n
    assert not step.bends_down


def test_a_curvature_of_rounding_size_has_no_part_in_the_step() -> None:
    """Two of three unknowns enter as their sum only."""
    J = torch.tensor([[1.0, 1.0, 0.3], [0.1, 0.1, 2.0]])
    step, _ = conjugate_directions(torch.ones(1, 3), torch.ones(1, 2) @ J, lambda v: (v @ J.mT) @ J, 3, eps=1.2e-7)
    torch.testing.assert_close(step.d @ J.mT, -torch.ones(1, 2), rtol=1e-5, atol=0)
    assert step.d.abs().max() < 10


def test_a_step_for_a_large_gradient_does_not_overflow() -> None:
    curvature, distance = torch.tensor([1e15, 1e14, 1e13]), torch.tensor([[1e4, -2e4, 3e4]])
    step, _ = conjugate_directions(distance, curvature * distance, lambda v: curvature * v, 3, eps=1.2e-7)
    torch.testing.assert_close(step.d, -distance, rtol=1e-3, atol=0)


@pytest.mark.parametrize("units", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("held", [0, 1, 2])
def test_a_basis_of_any_length_with_a_zero_row(units: float, held: int) -> None:
    """The step has no part along a zero row, and all of the others."""
    H = torch.tensor([[4.0, 1.0, 0.5], [1.0, 3.0, 0.2], [0.5, 0.2, 2.0]], dtype=F64)
    basis, grad = units * torch.eye(3, dtype=F64), torch.tensor([[1.0, -2.0, 3.0]], dtype=F64)
    basis[held] = 0
    step, _ = conjugate_directions(
        torch.ones(1, 3, dtype=F64), grad, lambda v: v @ H, 3, eps=torch.finfo(F64).eps, basis=basis[None]
    )
    free = [i for i in range(3) if i != held]
    expected = torch.zeros(3, dtype=F64)
    expected[free] = -torch.linalg.solve(H[free][:, free], grad[0, free])
    torch.testing.assert_close(step.d[0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("factory", factories(LINE_SEARCHES))
def test_the_null_space_of_a_dense_hessian_is_no_distance(factory: Any) -> None:
    """A product with the matrix along its null space is rounding, of either sign."""
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        B, aim = torch.randn(2, 5, generator=g, dtype=F64), torch.randn(5, generator=g, dtype=F64)
        A = B.mT @ B
        x, state = factory(lambda x, A=A, aim=aim: 0.5 * (x - aim) @ A @ (x - aim)).run(torch.zeros(5, dtype=F64))
        assert state.converged and (B @ (x - aim)).norm() <= 1e-9 and x.norm() <= 2 * aim.norm()


def test_rounding_hides_a_curvature_but_not_the_slope() -> None:
    """A dense float32 matrix of condition number 1e9 is singular to rounding."""
    flat, stiff = torch.tensor([0.6, 0.8]), torch.tensor([0.8, -0.6])
    H, slope = torch.outer(stiff, stiff) + 1e-9 * torch.outer(flat, flat), 1e-3
    step, _ = conjugate_directions(torch.ones(1, 2), slope * (flat + stiff)[None], lambda v: v @ H, 2, eps=1.2e-7)
    along = float(step.hidden[0] @ flat)
    # Downhill, by the step for the largest curvature that rounding can hide: one of 1 to 100 eps.
    assert along < 0 and abs(float(step.hidden[0] @ stiff)) <= 1e-5 * abs(along)
    assert 1.2e-7 <= slope / -along <= 1.2e-5
    # Along the conjugate direction the other step, to the minimum of ``u``, has made a part of the slope.
    assert 0.1 <= float(step.hope) / (-0.5 * slope * along) <= 10


@pytest.mark.parametrize(
    ("slope", "length", "falls"), [(1e-4, 0.5, True), (1e-4, 50.0, False), (0.0, 0.5, False), (1e-9, 0.5, False)]
)
def test_values_decide_on_hidden_directions(slope: float, length: float, falls: bool) -> None:
    """A step along them counts where the objective falls by more than rounding, and is not one along a null space."""
    x, zero, no = torch.ones(1, 2), torch.zeros(1), torch.zeros(1, dtype=torch.bool)
    d, hidden = torch.tensor([[0.0, 1e-3]]), torch.tensor([[-length, 0.0]])
    step = NewtonStep(x, d, no, no, zero, no, zero, zero, hidden, hope=torch.tensor([1e-2]))
    problem: Any = SimpleNamespace(fn=lambda x: 1 + slope * x[:, :1], eps=1.2e-7)
    found = _with_hidden_step(problem, x, problem.fn(x)[:, 0], step)
    assert found.promises.equal(torch.tensor([falls])) and found.counts.equal(found.promises)
    torch.testing.assert_close(found.d, d + hidden if falls else d, rtol=0, atol=0)
