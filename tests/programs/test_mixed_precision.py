"""Solvers inside of torch's automatic mixed precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from implicitdiff import solvers

LOW = pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])


class Equilibrium(nn.Module):
    """A deep-equilibrium network: ``z = tanh(W z + U x)`` between an encoder and a readout."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.inner, self.readout = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        nn.init.orthogonal_(self.inner.weight, gain=0.6)
        self.solver = solvers.anderson(self.layer)

    def layer(self, z, x):
        return torch.tanh(self.inner(z) + x)

    def forward(self, x):
        x = self.encoder(x)
        z, self.state = self.solver.run(torch.zeros(x.shape), x)
        return self.readout(z)


class Unrolled(Equilibrium):
    def forward(self, x):
        x, z = self.encoder(x), torch.zeros(len(x), 8)
        for _ in range(60):
            z = self.layer(z, x)
        return self.readout(z)


def batch():
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(16, n, generator=generator) for n in (4, 1))


def in_full_precision():
    net, (x, y) = Unrolled(), batch()
    ((net(x) - y) ** 2).mean().backward()
    return net


@LOW
def test_scaled_gradients_of_an_equilibrium_are_those_of_full_precision(low):
    net, (x, y) = Equilibrium(), batch()
    optimizer, scaler = torch.optim.SGD(net.parameters(), lr=0.0), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with torch.autocast("cpu", low):
        loss = ((net(x) - y) ** 2).mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10  # no gradient has overflown
    error = 8 * torch.finfo(low).eps
    for found, expected in zip(net.parameters(), in_full_precision().parameters(), strict=True):
        assert found.dtype == found.grad.dtype == torch.float32
        assert (found.grad - expected.grad).norm() <= error * expected.grad.norm()


@LOW
def test_an_equilibrium_is_found_to_the_precision_of_its_unknowns(low):
    net, (x, _) = Equilibrium(), batch()
    with torch.autocast("cpu", low):
        net(x)
    assert net.state.status == solvers.Status.CONVERGED
    assert net.state.target < 1e-3


def test_a_ridge_regression_inside_of_autocast_is_the_closed_form():
    x, y = batch()

    def objective(w, penalty):
        return ((x @ w - y) ** 2).sum() + penalty * (w**2).sum()

    penalty = torch.tensor(0.5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        w, state = solvers.lbfgs(objective).run(torch.zeros(4, 1), penalty)
    assert state.status == solvers.Status.CONVERGED

    def closed(penalty):
        return torch.linalg.solve(x.T @ x + penalty * torch.eye(4), x.T @ y)

    torch.testing.assert_close(w, closed(penalty), rtol=1e-4, atol=1e-5)
    found, expected = (torch.autograd.grad(f.sum(), penalty) for f in (w, closed(penalty)))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
