"""Searches inside of autocast run outside of it, in the precision of their unknowns."""

import pytest
import torch
from tables.solvers import MINIMISERS, SEARCHES, THETA, factories
from torch import nn
from torch.func import grad

from implicitdiff import custom_fixed_point, solvers

BF16 = torch.bfloat16
X = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
Y = torch.randn(16, generator=torch.Generator().manual_seed(1))


def inside(f):
    with torch.autocast("cpu", BF16):
        return f()


@pytest.mark.parametrize("row", SEARCHES, ids=str)
def test_a_search_is_what_it_is_outside(row):
    theta = THETA.clone().requires_grad_()

    def solve():
        x, state = row.solution_and_state(theta)
        return x, state.error, torch.autograd.grad(x.sum(), theta)[0]

    for found, expected in zip(inside(solve), solve(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def ridge(w, penalty):
    # Two products that autocast would take in bfloat16.
    return (X @ w - Y).square().mean() + penalty * (w @ w)


def closed_form(penalty):
    return torch.linalg.solve(X.T @ X / len(Y) + penalty * torch.eye(3), X.T @ Y / len(Y))


@pytest.mark.parametrize("factory", [*factories(MINIMISERS), solvers.scipy_minimize])
def test_a_minimiser_arrives_at_single_precision(factory):
    solver, penalty = factory(ridge), torch.tensor(0.1)

    def solution(penalty):
        return solver.run(torch.zeros(3), penalty)[0]

    torch.testing.assert_close(inside(lambda: solution(penalty)), closed_form(penalty), rtol=1e-3, atol=1e-4)
    found = inside(lambda: grad(lambda p: solution(p).sum())(penalty))
    torch.testing.assert_close(found, grad(lambda p: closed_form(p).sum())(penalty), rtol=1e-3, atol=1e-4)


def test_arguments_of_half_precision_are_cast():
    layer, inject = nn.Linear(3, 3), nn.Linear(3, 3)
    nn.init.orthogonal_(layer.weight, 0.5)
    solver = solvers.anderson(lambda z, x: torch.tanh(layer(z) + x))

    def solve():
        x = inject(X)
        z, _ = solver.run(torch.zeros_like(x), x)
        return x, z

    x, z = inside(solve)
    assert (x.dtype, z.dtype) == (BF16, torch.float32)
    expected, _ = solver.run(torch.zeros(16, 3), x.float())
    torch.testing.assert_close(z, expected)
    z.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (*layer.parameters(), *inject.parameters()))


def test_a_captured_tensor_of_half_precision_is_named():
    h, layer = X.to(BF16), nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="a search runs without autocast, in single precision"):
        inside(lambda: solvers.anderson(lambda z: torch.tanh(0.1 * z + layer(h))).run(torch.zeros(16, 3)))


def test_a_function_may_ask_for_autocast():
    layer = nn.Linear(3, 3)
    nn.init.orthogonal_(layer.weight, 0.2)
    seen = []

    def fn(z, x):
        with torch.autocast("cpu", BF16):
            y = layer(z)
            seen.append(y.dtype)
        return torch.tanh(y.float() + x)

    z, _ = solvers.fixed_point_iteration(fn, rtol=0, atol=0.1).run(torch.zeros(16, 3), X)
    assert set(seen) == {BF16}
    assert (fn(z, X) - z).norm() < 0.11


@pytest.mark.parametrize("wrapped", [False, True], ids=["solver", "decorator"])
def test_training_with_a_scaler(wrapped):
    """As loops of mixed precision have it: autocast, a scaled loss, a step."""
    torch.manual_seed(0)
    layer, inject, head = nn.Linear(8, 8), nn.Linear(3, 8), nn.Linear(8, 1)
    nn.init.orthogonal_(layer.weight, 0.5)
    solver = solvers.anderson(lambda z, x: torch.tanh(layer(z) + x))

    def deq(x):
        if not wrapped:
            return solver.run(torch.zeros(len(x), 8), x)[0]
        fixed_point = custom_fixed_point(lambda z, x: torch.tanh(layer(z) + x).float())
        return fixed_point(lambda init, x: solver.run(init, x)[0])(torch.zeros(len(x), 8), x)

    model = nn.ModuleList([layer, inject, head])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", BF16):
            loss = (head(deq(inject(X)))[:, 0].float() - Y).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
