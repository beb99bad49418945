"""An implicit graph network: the states of the nodes are a fixed point of a convolution of PyG."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad

from implicitdiff import custom_fixed_point, solvers

geometric = pytest.importorskip("torch_geometric.nn", reason="PyG (torch_geometric) is not installed")

EDGES = torch.tensor([[0, 1, 1, 2, 2, 3, 3, 0, 4, 1], [1, 0, 2, 1, 3, 2, 0, 3, 1, 4]])
NODES = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
HIDDEN = 4


class Mean(geometric.MessagePassing):
    """A convolution written by a user, with messages of its own."""

    def __init__(self, into, out):
        super().__init__(aggr="mean")
        self.linear = nn.Linear(into, out)

    def forward(self, x, edges):
        return self.propagate(edges, x=x)

    def message(self, x_i, x_j):
        return self.linear(x_j - 0.2 * x_i)


class Implicit(nn.Module):
    """``z = tanh(0.5 conv(z) + U x)``, with one number for the graph read from it."""

    def __init__(self, conv):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.inject, self.readout = conv(HIDDEN, HIDDEN), nn.Linear(3, HIDDEN), nn.Linear(HIDDEN, 1)
        self.double()

    def step(self, z, x, edges):
        return torch.tanh(0.5 * self.conv(z, edges) + self.inject(x))

    def forward(self, x, edges, solve):
        return self.readout(solve(self.step, x.new_zeros(len(x), HIDDEN), x, edges)).square().sum()


def iterate(step, z, *args):
    for _ in range(100):
        z = step(z, *args)
    return z


SOLVES = {
    "custom_fixed_point": lambda step, z, *args: custom_fixed_point(step)(lambda z, *args: iterate(step, z, *args))(
        z, *args
    ),
    "anderson": lambda step, z, *args: solvers.anderson(step).run(z, *args)[0],
}


@pytest.mark.parametrize("solve", SOLVES.values(), ids=SOLVES)
@pytest.mark.parametrize("conv", [geometric.GCNConv, geometric.SAGEConv, Mean])
def test_gradients_of_an_implicit_graph_network_are_those_of_the_unrolled_one(conv, solve):
    net, x = Implicit(conv), NODES.clone().requires_grad_()
    names, parameters = zip(*net.named_parameters(), strict=True)
    expected = torch.autograd.grad(net(x, EDGES, iterate), (*parameters, x))
    found = torch.autograd.grad(net(x, EDGES, solve), (*parameters, x))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)

    def value(params, x):
        return functional_call(net, params, (x, EDGES, solve))

    params, nodes = grad(value, argnums=(0, 1))({name: p.detach() for name, p in net.named_parameters()}, NODES)
    torch.testing.assert_close((*(params[name] for name in names), nodes), expected, rtol=1e-7, atol=1e-9)
