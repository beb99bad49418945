"""Operations whose derivatives are wrong in torch: of a condition they are right, against central differences."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from implicitdiff._elementary import elementary
from implicitdiff.nn import ImplicitMetaGradientModule
from implicitdiff.solvers import gradient_descent, lbfgs, newton

F64 = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


SHIFT = draw(6, 4, seed=1)
# Each of a matrix (6, 4), and of factors for its four columns.
OPERATIONS = {
    "layer_norm": lambda x, w: F.layer_norm(x, (4,), w),
    "layer_norm, native": lambda x, w: torch.layer_norm(x, [4], w, w.sin()),
    "batch_norm": lambda x, w: F.batch_norm(x, None, None, w, w.sin(), training=True),
    "batch_norm, native": lambda x, w: torch.batch_norm(x, w, None, None, None, True, 0.1, 1e-5, False),
    "instance_norm": lambda x, w: F.instance_norm(x.T[None], weight=w)[0].T,
    "instance_norm, native": lambda x, w: (
        torch.instance_norm(x.T[None], w, None, None, None, True, 0.1, 1e-5, False)[0].T
    ),
    "weight_norm": lambda x, w: torch._weight_norm(x.T, w[:, None], 0).T,
    "select_scatter": lambda x, w: torch.select_scatter(x, w, 0, -2),
    "select_scatter, method": lambda x, w: x.select_scatter(w, 0, 1),
}


def minimiser(op):
    def stationary(p, s, x):
        def objective(p):
            z = op(x * p["x"] + SHIFT, 1 + p["w"])
            return ((z.sin() - s * x) ** 2).mean() + 10 * sum((q**2).sum() for q in p.values())

        return grad(objective)(p)

    zeros = {"x": torch.zeros(4, dtype=F64), "w": torch.zeros(4, dtype=F64)}
    return lambda s, x: sum(q.exp().sum() for q in newton(stationary, rtol=1e-13).run(zeros, s, x)[0].values())


def central(f, at, step=1e-4):
    return (f(at + step) - f(at - step)) / (2 * step)


# Of torch, where they run as they are.
SLOW = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


@SLOW
@pytest.mark.parametrize("name", OPERATIONS)
def test_derivatives_of_minimisers_are_right(name):
    f = minimiser(OPERATIONS[name])
    s, xs = torch.tensor(0.7, dtype=F64), draw(2, 6, 4)
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

    s, x = torch.tensor(0.7, dtype=F64), draw(6, 4)
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

    s, xs = torch.tensor(0.7, dtype=F64), draw(2, 6, 4)

    def over_lanes(shift):
        return vmap(lambda x: f(s, x.exp() + shift))(xs).sum()

    zero = torch.zeros((), dtype=F64)
    torch.testing.assert_close(grad(over_lanes)(zero), central(over_lanes, zero), rtol=1e-6, atol=0)


@SLOW
@pytest.mark.parametrize("name", OPERATIONS)
def test_torch_still_gets_them_wrong(name):
    """Else the operation need not be exchanged any longer."""
    op, x, w, v, u = OPERATIONS[name], draw(2, 6, 4), draw(2, 4), draw(6, 4, seed=2), draw(4, seed=3)

    def value(t, x, w):
        return (op(x + t * v, w + t * u) ** 3).sum()

    def slope(t, x, w):
        return grad(value)(t, x, w)

    zero = torch.zeros((), dtype=F64)
    expected = sum(central(lambda t, x=x, w=w: slope(t, x, w), zero) for x, w in zip(x, w, strict=True))
    inside = sum(grad(slope)(zero, x, w) for x, w in zip(x, w, strict=True))
    outside = grad(lambda t: vmap(slope, (None, 0, 0))(t, x, w).sum())(zero)
    assert not all(torch.allclose(found, expected, rtol=1e-3) for found in (inside, outside))


VALUES = {
    **{name: (op, (draw(6, 4), draw(4))) for name, op in OPERATIONS.items()},
    "layer_norm of two dimensions": (lambda x, w: F.layer_norm(x, (3, 4), w), (draw(2, 3, 4), draw(3, 4))),
    "layer_norm, keywords": (lambda x: F.layer_norm(x, normalized_shape=[4], bias=x[0], eps=0.1), (draw(3, 4),)),
    "layer_norm, half": (lambda x: F.layer_norm(x, (4,), x[0]), (draw(3, 4).half(),)),
    "layer_norm, bfloat16": (lambda x: F.layer_norm(x, (4,)), (draw(3, 4).bfloat16(),)),
    "batch_norm of images": (
        lambda x, w: F.batch_norm(x, None, None, w, w, True, 0.2, 1e-3),
        (draw(2, 3, 4, 5), draw(3)),
    ),
    "batch_norm, evaluated": (
        lambda x, w: F.batch_norm(x, w, w.square(), w, w.sin(), momentum=0.3),
        (draw(5, 3), draw(3)),
    ),
    "instance_norm of images": (
        lambda x, w: F.instance_norm(x, weight=w, bias=w, eps=0.1),
        (draw(2, 3, 4, 5), draw(3)),
    ),
    "instance_norm, evaluated": (
        lambda x, w: F.instance_norm(x, w, w.square(), w, use_input_stats=False),
        (draw(2, 3, 5), draw(3)),
    ),
    "weight_norm, rows": (lambda v, g: torch._weight_norm(v, g, 0), (draw(4, 3), draw(4, 1))),
    "weight_norm of a kernel": (lambda v, g: torch._weight_norm(v, g, 1), (draw(4, 3, 2), draw(1, 3, 1))),
    "weight_norm, counted from the end": (lambda v, g: torch._weight_norm(v, g, -2), (draw(4, 3, 2), draw(1, 3, 1))),
    "weight_norm, half": (lambda v, g: torch._weight_norm(v, g, 0), (300 * draw(4, 8).half(), draw(4, 1).half())),
    "batch_norm, native, keywords": (
        lambda x, w: torch.batch_norm(
            x,
            weight=w,
            bias=None,
            running_mean=None,
            running_var=None,
            training=True,
            momentum=0.1,
            eps=1e-5,
            cudnn_enabled=False,
        ),
        (draw(6, 4), draw(4)),
    ),
    "instance_norm, native, keywords": (
        lambda x, w: torch.instance_norm(
            x,
            weight=None,
            bias=w,
            running_mean=None,
            running_var=None,
            use_input_stats=True,
            momentum=0.1,
            eps=1e-5,
            cudnn_enabled=False,
        ),
        (draw(2, 3, 4), draw(3)),
    ),
    "select_scatter of another dtype": (
        lambda x, y: torch.select_scatter(x, src=y, dim=0, index=1),
        (draw(3, 4).float(), draw(4)),
    ),
    "weight_norm of all": (lambda v, g: torch._weight_norm(v, g, -1), (draw(4, 3), draw(1)[0])),
    "weight_norm of a vector": (lambda v, g: torch._weight_norm(v, g, 0), (draw(4), draw(4))),
    "select_scatter, another dimension": (lambda x, y: torch.select_scatter(x, y, 1, 3), (draw(3, 4), draw(3))),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_are_those_of_torch(name):
    fn, operands = VALUES[name]
    expected = fn(*operands)
    torch.testing.assert_close(elementary(fn)(*operands), expected)


REFUSED = {
    "layer_norm of another shape": lambda: F.layer_norm(draw(3, 4), (5,)),
    "layer_norm of no dimension": lambda: F.layer_norm(draw(3, 4), ()),
    "batch_norm of one row": lambda: F.batch_norm(draw(1, 4), None, None, training=True),
    "instance_norm of no dimension": lambda: F.instance_norm(draw(3, 4)),
    "instance_norm of one element": lambda: F.instance_norm(draw(3, 4, 1)),
    "select_scatter out of range": lambda: torch.select_scatter(draw(3, 4), draw(4), 0, 3),
    "select_scatter of another shape": lambda: torch.select_scatter(draw(3, 4), draw(1), 0, 1),
    "weight_norm out of range": lambda: torch._weight_norm(draw(3, 4), draw(3, 1), 2),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses_is_refused(name):
    with pytest.raises((RuntimeError, ValueError, IndexError)) as expected:
        REFUSED[name]()
    with pytest.raises(expected.type) as found:
        elementary(REFUSED[name])()
    assert str(found.value).splitlines()[0] == str(expected.value).splitlines()[0]


class Normalised(ImplicitMetaGradientModule):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale
        norms = nn.LayerNorm(3), nn.BatchNorm1d(3, track_running_stats=False)
        self.net = nn.Sequential(nn.Linear(2, 3), *norms, nn.Tanh(), nn.Linear(3, 1)).double()
        nn.utils.parametrizations.weight_norm(self.net[0])
        self.start = {name: draw(*p.shape, seed=i) for i, (name, p) in enumerate(self.net.named_parameters())}
        for name, p in self.net.named_parameters():
            p.data.copy_(self.start[name])

    def optimality(self):
        def objective(params):
            fit = functional_call(self.net, params, draw(7, 2))
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
