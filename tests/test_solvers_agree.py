"""Whatever finds the fixed point z = tanh(W z + x), the derivative is that of the equation."""

from __future__ import annotations

import time

import pytest
import torch
from torch.func import jacfwd, jacrev

from implicitdiff import custom_fixed_point

N = 10
W = torch.randn(N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) / N**0.5 / 1.5
X = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def step(z, x):
    return torch.tanh(W @ z + x)


def plain(z, x):
    for _ in range(300):
        z = step(z, x)
    return z


def newton(z, x):
    for _ in range(12):
        f = step(z, x)
        z = z - torch.linalg.inv(torch.eye(N, dtype=z.dtype) - (1 - f**2)[:, None] * W) @ (z - f)
    return z


def anderson(z, x, history=5):
    zs, fs = [z], [step(z, x)]
    for _ in range(80):
        residuals = torch.stack([f - z for z, f in zip(zs, fs, strict=True)])
        gram = residuals @ residuals.T
        gram = gram + 1e-14 * gram.diagonal().sum() * torch.eye(len(gram), dtype=z.dtype) + 1e-40 * torch.eye(len(gram))
        alpha = torch.linalg.inv(gram).sum(dim=1)
        z = (alpha / alpha.sum()) @ torch.stack(fs)
        zs, fs = [*zs, z][-history:], [*fs, step(z, x)][-history:]
    return z


SOLVERS = [plain, newton, anderson]


def unrolled_jacobian():
    return jacrev(lambda x: plain(torch.zeros_like(x), x))(X)


@pytest.mark.parametrize("solver", SOLVERS)
def test_jacobian_of_the_fixed_point_is_the_unrolled_one(solver):
    expected = unrolled_jacobian()
    z = solver(torch.zeros_like(X), X)
    closed_form = torch.linalg.inv(torch.eye(N, dtype=z.dtype) - (1 - z**2)[:, None] * W) @ torch.diag(1 - z**2)
    solution = custom_fixed_point(step)(solver)
    for jacobian in jacrev, jacfwd:
        found = jacobian(lambda x: solution(torch.zeros_like(x), x))(X)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found, closed_form, rtol=1e-9, atol=1e-11)


def test_differentiating_by_the_equation_calls_no_solver():
    """What is differentiated is the step itself, so the work does not depend on how many were taken."""
    calls = []

    def counted(z, x):
        calls.append(z)
        return step(z, x)

    x = X.clone().requires_grad_()
    z = custom_fixed_point(counted)(plain)(torch.zeros_like(X), x)
    made = len(calls)
    z.sum().backward()
    assert made == 2  # once to see what it captures, once for the graph of the derivative
    assert len(calls) == made


def test_a_solver_runs_once():
    runs = []

    @custom_fixed_point(step)
    def solver(z, x):
        runs.append(time.perf_counter())
        return plain(z, x)

    torch.func.hessian(lambda x: (solver(torch.zeros_like(x), x) ** 2).sum())(X)
    assert len(runs) == 1
