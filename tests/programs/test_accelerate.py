"""An implicit layer trained by Hugging Face's Accelerator, with torch's optimizer and with this library's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import implicitdiff
from implicitdiff import solvers

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

generator = torch.Generator().manual_seed(0)
X, Y = (torch.randn(12, n, dtype=torch.float64, generator=generator) for n in (3, 1))


class Equilibrium(nn.Module):
    """``z = tanh(W z + U x)`` and a readout."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.inner, self.readout = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 1)
        nn.init.orthogonal_(self.inner.weight, gain=0.5)
        self.double()

    def layer(self, z, x):
        return torch.tanh(self.inner(z) + self.encoder(x))

    def forward(self, x):
        z, _ = solvers.anderson(self.layer).run(x.new_zeros(len(x), 6), x)
        return self.readout(z)


class Unrolled(Equilibrium):
    def forward(self, x):
        z = x.new_zeros(len(x), 6)
        for _ in range(80):
            z = self.layer(z, x)
        return self.readout(z)


def trained(net, optimizer, batches, backward):
    """The parameters after some steps, and the gradient of the last."""
    for _ in range(2):
        for x, y in batches:
            optimizer.zero_grad()
            backward(((net(x) - y) ** 2).mean())
            optimizer.step()
    return [(parameter.detach(), parameter.grad) for parameter in net.parameters()]


@pytest.fixture
def accelerator():
    yield accelerate.Accelerator(cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("make", [torch.optim.Adam, implicitdiff.Adam], ids=["torch.optim.Adam", "implicitdiff.Adam"])
def test_an_accelerated_implicit_layer_is_trained_as_the_unrolled_one(accelerator, make):
    net = Equilibrium()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=4)
    prepared = accelerator.prepare(net, make(net.parameters(), lr=0.05), data)
    found = trained(*prepared, accelerator.backward)
    plain = Unrolled()
    batches = list(zip(X.split(4), Y.split(4), strict=True))
    expected = trained(plain, torch.optim.Adam(plain.parameters(), lr=0.05), batches, torch.Tensor.backward)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
