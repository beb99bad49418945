"""Modules with an inner problem, and their solutions by closed form or Newton's method."""

from __future__ import annotations

import numpy as np
import scipy.optimize
import torch
from torch import nn

from implicitdiff.nn import ImplicitMetaGradientModule

F64 = torch.float64
X = torch.tensor([[1.0, 0.5], [-0.3, 1.2], [0.7, -0.4]], dtype=F64)
Y = torch.tensor([1.0, 2.0, -1.0], dtype=F64)
EYE = torch.eye(2, dtype=F64)


def leaf(value=0.7, **options):
    return torch.tensor(value, dtype=F64, requires_grad=True, **options)


def zeros(*shape):
    return nn.Parameter(torch.zeros(shape, dtype=F64))


def ridge(penalty, x=X, y=Y):
    """The closed form that torch.autograd differentiates."""
    return torch.linalg.solve(x.T @ x + penalty * EYE.to(x), x.T @ y)


def close(actual, expected, tol=1e-12):
    expected = torch.as_tensor(expected, dtype=F64)
    torch.testing.assert_close(actual.to(F64), expected, rtol=tol, atol=tol)


def grad(output, *inputs, **options):
    found = torch.autograd.grad(output, inputs, **options)
    return found if len(found) > 1 else found[0]


def expected_grad(f, value=0.7):
    at = leaf(value)
    return grad(f(at), at)


SLOPE = expected_grad(lambda p: ridge(p).sum())


def newton(module, *args, steps=8, **kwargs):
    """Newton's method on the flat inner parameters, to rounding."""
    params = [p for p in module.parameters() if p.requires_grad]
    for _ in range(steps):
        with torch.enable_grad():
            grads = torch.autograd.grad(module.objective(*args, **kwargs), params, create_graph=True)
            flat = torch.cat([g.reshape(-1) for g in grads])
            rows = [torch.autograd.grad(g, params, retain_graph=True, materialize_grads=True) for g in flat]
        matrix = torch.stack([torch.cat([r.reshape(-1) for r in row]) for row in rows])
        step = torch.linalg.solve(matrix, flat.detach())
        for param, part in zip(params, step.split([p.numel() for p in params]), strict=True):
            param.sub_(part.reshape(param.shape))


class Ridge(ImplicitMetaGradientModule):
    def __init__(self, penalty):
        super().__init__()
        self.penalty = penalty
        self.w = zeros(2)

    def objective(self, x, y):
        return ((x @ self.w - y) ** 2).sum() + self.penalty * (self.w**2).sum()

    def solve(self, x, y):
        newton(self, x, y, steps=1)
        return self

    def forward(self, x=X, y=Y):
        return self.solve(x, y).w


class RidgeByResiduals(Ridge):
    def optimality(self, x, y):
        return x.T @ (x @ self.w - y) + self.penalty * self.w


class Net(ImplicitMetaGradientModule):
    """A small network that stays near a meta-network: not quadratic, several parameters."""

    def __init__(self, penalty, meta_net):
        super().__init__()
        self.penalty, self.meta_net = penalty, meta_net
        self.net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).to(F64)
        self.net.load_state_dict(meta_net.state_dict())

    def objective(self, x, y):
        loss = ((self.net(x)[:, 0] - y) ** 2).mean()
        pairs = zip(self.net.parameters(), self.meta_net.parameters(), strict=True)
        return loss + self.penalty * sum(((p - q) ** 2).sum() for p, q in pairs)

    def solve(self, x, y):
        newton(self, x, y)
        return self


def meta_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).to(F64)


def by_steps(make, steps):
    def solve(module, x, y):
        optimizer = make(module.parameters())
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.enable_grad():
                module.objective(x, y).backward()
            optimizer.step()

    return solve


def by_scipy(module, x, y):
    w = module.w

    def slope(at):
        w.data.copy_(torch.from_numpy(at))
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(module.objective(x, y), w)
        return slope.numpy()

    found = scipy.optimize.root(slope, np.zeros(2), tol=1e-13)
    w.copy_(torch.from_numpy(found.x))


def by_a_new_parameter(module, x, y):
    module.w = nn.Parameter(ridge(module.penalty, x, y))


def names(module):
    return [name for name, _ in module.named_parameters()], [name for name, _ in module.named_meta_parameters()]
