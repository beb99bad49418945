"""Operations whose derivatives are wrong in torch: of a condition they are right, against central differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checks.differences import central
from checks.tensors import draw
from tables.elementary import F64, MORE, OPERATIONS, SHIFT, W, X
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, vmap
from torch.nn import functional as F

from implicitdiff import elementary
from implicitdiff.nn import ImplicitMetaGradientModule
from implicitdiff.solvers import gradient_descent, lbfgs, newton


def minimiser(op):
    def stationary(p, s, x):
        def objective(p):
            z = op(x * p["x"] + SHIFT, 1 + p["w"])
            return ((z.sin() - s * x) ** 2).mean() + 10 * sum((q**2).sum() for q in p.values())

        return grad(objective)(p)

    zeros = {"x": torch.zeros(4, dtype=F64), "w": torch.zeros(4, dtype=F64)}
    return lambda s, x: sum(q.exp().sum() for q in newton(stationary, rtol=1e-13).run(zeros, s, x)[0].values())


# Of torch, where they run as they are.
SLOW = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
DEPRECATED = pytest.mark.filterwarnings("ignore:torch.(triangular_solve|cholesky) is deprecated:UserWarning")


@SLOW
@pytest.mark.parametrize("name", OPERATIONS)
def test_derivatives_of_minimisers_are_right(name):
    f = minimiser(OPERATIONS[name])
    s, xs = torch.tensor(0.7, dtype=F64), draw(0, 2, 6, 4)
    expected = torch.stack([central(lambda s, x=x: f(s, x), s) for x in xs])
    assert expected.abs().min() > 1e-4
    torch.testing.assert_close(vmap(grad(f), (None, 0))(s, xs), expected, rtol=1e-6, atol=0)
    over_lanes = grad(lambda s: vmap(f, (None, 0))(s, xs).sum())
    torch.testing.assert_close(over_lanes(s), expected.sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(grad(over_lanes)(s), central(over_lanes, s), rtol=1e-6, atol=0)


def test_an_operation_that_only_the_solution_meets_is_exchanged():
    def f(s, x):
        def objective(p, s):
            z = x * p + SHIFT
            z = F.layer_norm(z, (4,)) if p.detach().abs().sum() > 0 else z
            return ((z - s * x) ** 2).sum() + 10 * (p**2).sum()

        return lbfgs(objective, rtol=1e-12).run(torch.zeros(4, dtype=F64), s)[0].exp().sum()

    s, x = torch.tensor(0.7, dtype=F64), draw(0, 6, 4)
    slope = grad(f)
    torch.testing.assert_close(grad(slope)(s, x), central(lambda s: slope(s, x), s), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["layer_norm", "batch_norm"])
def test_derivatives_of_single_updates_are_right(name):
    def objective(w, s, x):
        return ((OPERATIONS[name](x, w) - s * x) ** 2).sum()

    def f(s, x):
        solver, w = gradient_descent(objective, stepsize=0.01), torch.ones(4, dtype=F64)
        state = solver.init(w, s, x)
        for _ in range(3):
            w, state = solver.update(w, state, s, x)
        return w.sin().sum()

    s, xs = torch.tensor(0.7, dtype=F64), draw(0, 2, 6, 4)

    def over_lanes(shift):
        return vmap(lambda x: f(s, x.exp() + shift))(xs).sum()

    zero = torch.zeros((), dtype=F64)
    torch.testing.assert_close(grad(over_lanes)(zero), central(over_lanes, zero), rtol=1e-6, atol=0)


ZERO = torch.zeros(2, dtype=F64)
DIRECTIONS = [(draw(2, 6, 4), draw(3, 4)), (draw(5, 6, 4), draw(6, 4))]
Value = Callable[[Tensor, Tensor, Tensor], Tensor]


def along(op) -> Value:
    """A number of two parameters, in which an operation's input moves, and of that input."""

    def value(t, x, w):
        (v, u), (r, q) = DIRECTIONS
        y = op(x + t[0] * v + t[1] * r, w + t[0] * u + t[1] * q)
        return (y.sin() * torch.linspace(1, 2, y.numel(), dtype=F64).reshape(y.shape)).sum()

    return value


def lane_by_lane(fn, value):
    return torch.stack([fn(value)(ZERO, x, w) for x, w in zip(X, W, strict=True)])


def over_lanes(fn, value):
    return vmap(fn(value), (None, 0, 0))(ZERO, X, W)


def outside(fn, value):
    return fn(lambda t: vmap(grad(value), (None, 0, 0))(t, X, W).sum(0))(ZERO)


# Ways to the second derivatives, (2, 2) for each lane, of which some give the sum.
ROUTES = {
    "reverse twice": lambda f: lane_by_lane(lambda f: jacrev(grad(f)), f),
    "forward over reverse": lambda f: lane_by_lane(lambda f: jacfwd(grad(f)), f),
    "forward twice": lambda f: lane_by_lane(lambda f: jacfwd(jacfwd(f)), f),
    "in a vmap, reverse twice": lambda f: over_lanes(lambda f: jacrev(grad(f)), f),
    "in a vmap, forward over reverse": lambda f: over_lanes(lambda f: jacfwd(grad(f)), f),
    "in a vmap, forward twice": lambda f: over_lanes(lambda f: jacfwd(jacfwd(f)), f),
    "outside of a vmap, reverse": lambda f: outside(jacrev, f),
    "outside of a vmap, forward": lambda f: outside(jacfwd, f),
}


def second_derivatives(value):
    """By central differences of the values, lane by lane."""
    h = 1e-3
    steps = [(a, b) for a in (1, -1) for b in (1, -1)]
    axes = h * torch.eye(2, dtype=F64)

    def lane(x, w):
        entry = [[sum(a * b * value(a * p + b * q, x, w) for a, b in steps) / (4 * h * h) for q in axes] for p in axes]
        return torch.stack([torch.stack(row) for row in entry])

    return torch.stack([lane(x, w) for x, w in zip(X, W, strict=True)])


def agrees(found, expected):
    expected = expected if found.dim() == 3 else expected.sum(0)
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@SLOW
@DEPRECATED
@pytest.mark.parametrize("name", [*OPERATIONS, *MORE])
def test_second_derivatives_are_right_by_every_route(name):
    value = along({**OPERATIONS, **MORE}[name])
    expected = second_derivatives(value)
    wrapped = elementary()(value)
    assert {route: True for route in ROUTES} == {route: agrees(way(wrapped), expected) for route, way in ROUTES.items()}


@SLOW
@DEPRECATED
@pytest.mark.parametrize("name", [*OPERATIONS, *MORE])
def test_torch_still_gets_them_wrong_or_lacks_them(name):
    """Else the operation need not be exchanged any longer."""
    value = along({**OPERATIONS, **MORE}[name])
    expected = second_derivatives(value)

    def holds(way):
        try:
            return agrees(way(value), expected)
        except (RuntimeError, NotImplementedError):
            return False

    assert not all(map(holds, ROUTES.values()))


class Normalised(ImplicitMetaGradientModule):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale
        norms = nn.LayerNorm(3), nn.BatchNorm1d(3, track_running_stats=False)
        self.net = nn.Sequential(nn.Linear(2, 3), *norms, nn.Tanh(), nn.Linear(3, 1)).double()
        nn.utils.parametrizations.weight_norm(self.net[0])
        self.start = {name: draw(i, *p.shape) for i, (name, p) in enumerate(self.net.named_parameters())}
        for name, p in self.net.named_parameters():
            p.data.copy_(self.start[name])

    def optimality(self):
        def objective(params):
            fit = functional_call(self.net, params, draw(0, 7, 2))
            away = sum((p - self.start[name]).square().sum() for name, p in params.items())
            return (fit - self.scale).square().mean() + 5 * away

        gradients = grad(objective)(dict(self.net.named_parameters()))
        return {f"net.{name}": g for name, g in gradients.items()}

    def solve(self):
        for _ in range(500):
            for p, g in zip(self.net.parameters(), self.optimality().values(), strict=True):
                p -= 0.05 * g
        return self


def test_layers_of_a_module_that_is_solved_for():
    def outcome(scale):
        return sum(p.sin().sum() for p in Normalised(scale).solve().net.parameters())

    scale = torch.tensor(0.3, dtype=F64, requires_grad=True)
    (first,) = torch.autograd.grad(outcome(scale), scale, create_graph=True)
    torch.testing.assert_close(first, central(outcome, scale.detach()).detach(), rtol=1e-6, atol=0)
