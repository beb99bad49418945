"""Operations whose derivatives are wrong in torch: of a condition they are right, against central differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, vmap
from torch.nn import functional as F

from implicitdiff import elementary
from implicitdiff.nn import ImplicitMetaGradientModule
from implicitdiff.solvers import gradient_descent, lbfgs, newton

F64 = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


SHIFT = draw(6, 4, seed=1)
# Of two lanes.
X, W = draw(2, 6, 4), draw(2, 4, seed=4)


def layer(kind, *sizes, **options):
    torch.manual_seed(0)
    return kind(*(sizes or (4, 4)), **options).double()


LSTM, GRU, RNN, RELU = layer(nn.LSTM), layer(nn.GRU), layer(nn.RNN), layer(nn.RNN, nonlinearity="relu")
CELL, HEADS = layer(nn.GRUCell), layer(nn.MultiheadAttention, 4, 2)
ENCODER = layer(nn.TransformerEncoderLayer, 4, 2, 8, 0.0, batch_first=True)
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
    "attention": lambda x, w: attention(x, w),
    "mse_loss": lambda x, w: (x * w).sin() + F.mse_loss(x * w, SHIFT),
    "LSTM": lambda x, w: LSTM(x * w)[0],
    "cdist": lambda x, w: torch.cdist(x * w, SHIFT)[:, :4],
    "solve": lambda x, w: torch.linalg.solve(square(x, w), x.T).T,
}


def square(x, w):
    return x.T @ x / 6 + torch.diag(w.exp()) + 0.3 * x[:4]


def lower(x, w):
    return torch.linalg.cholesky(x.T @ x / 6 + torch.diag(w.exp()))


def attention(x, w, **options):
    # Without both batch dimensions no fused kernel is taken.
    x = x[None, None]
    return F.scaled_dot_product_attention(x, x * w, x.sin(), **options)[0, 0]


def lu_solve(x, w, **options):
    return torch.linalg.lu_solve(*torch.linalg.lu_factor(square(x, w)), x.T[:, :4], **options)


def householder(x, w):
    return torch.linalg.householder_product(x.tril(-1) + torch.eye(6, 4, dtype=F64), w)


LABELS = torch.tensor([0, 3, 1, 1, 2, 0])
# Of these, derivatives by all routes are looked at, and not of minimisers as well.
MORE = {
    "layer_norm, aten": lambda x, w: torch.ops.aten.layer_norm(x, [4], w),
    "layer_norm, aten overload": lambda x, w: torch.ops.aten.layer_norm.default(x, [4], w),
    "native_layer_norm": lambda x, w: torch.native_layer_norm(x, [4], w, w.sin(), 1e-5)[0],
    "native_layer_norm, aten": lambda x, w: torch.ops.aten.native_layer_norm.default(x, [4], w, None, 1e-5)[0],
    "batch_norm, aten": lambda x, w: torch.ops.aten.batch_norm(x, w, None, None, None, True, 0.1, 1e-5, False),
    "native_batch_norm": lambda x, w: torch.native_batch_norm(x, w, w.sin(), None, None, True, 0.1, 1e-5)[0],
    "native_batch_norm, aten": lambda x, w: torch.ops.aten.native_batch_norm.default(
        x, w, w, None, None, True, 0.1, 1e-5
    )[0],
    "instance_norm, aten": lambda x, w: (
        torch.ops.aten.instance_norm(x.T[None], w, None, None, None, True, 0.1, 1e-5, False)[0].T
    ),
    "weight_norm, aten": lambda x, w: torch.ops.aten._weight_norm(x.T, w[:, None], 0).T,
    "select_scatter, aten": lambda x, w: torch.ops.aten.select_scatter(x, w, 0, 1),
    "attention, causal": lambda x, w: attention(x, w, is_causal=True),
    "attention, masked": lambda x, w: attention(x, w, attn_mask=SHIFT[:, :1] < SHIFT[:, 1]),
    "attention, aten": lambda x, w: torch.ops.aten.scaled_dot_product_attention.default(
        x[None, None], x[None, None] * w, x[None, None]
    ),
    "MultiheadAttention": lambda x, w: HEADS(x, x * w, x, need_weights=False)[0],
    "TransformerEncoderLayer": lambda x, w: ENCODER((x * w)[None]),
    "mse_loss, aten": lambda x, w: torch.ops.aten.mse_loss(x * w, SHIFT),
    "huber_loss": lambda x, w: F.huber_loss(x * w, SHIFT),
    "huber_loss, aten": lambda x, w: torch.ops.aten.huber_loss.default(x * w, SHIFT, 2, 0.7),
    "soft_margin_loss": lambda x, w: F.soft_margin_loss(x * w, SHIFT.sign()),
    "soft_margin_loss, aten": lambda x, w: torch.ops.aten.soft_margin_loss(x * w, SHIFT.sign(), 0),
    "multi_margin_loss": lambda x, w: F.multi_margin_loss(x * w, LABELS, 2, 1.3),
    "multi_margin_loss, aten": lambda x, w: torch.ops.aten.multi_margin_loss(x * w, LABELS, 1, 1.3),
    "cdist, cubes": lambda x, w: torch.cdist(x * w, SHIFT, 3.0),
    "hardsigmoid": lambda x, w: F.hardsigmoid(x * w),
    "hardsigmoid, aten": lambda x, w: torch.ops.aten.hardsigmoid(x * w),
    "glu": lambda x, w: F.glu(x * w),
    "glu, aten": lambda x, w: torch.ops.aten.glu.default(x * w),
    "cumprod": lambda x, w: torch.cumprod(torch.cat([x[:2], w - W]), 0),
    "cumprod, method": lambda x, w: torch.cat([x[:2], w - W]).cumprod(0),
    "GRU": lambda x, w: GRU(x * w)[0],
    "RNN": lambda x, w: RNN(x * w)[0],
    "RNN, relu": lambda x, w: RELU(x * w)[0],
    "GRUCell": lambda x, w: CELL(x * w),
    "solve_ex": lambda x, w: torch.linalg.solve_ex(square(x, w), x.T)[0],
    "solve, aten": lambda x, w: torch.ops.aten.linalg_solve(square(x, w), w),
    "solve, a row": lambda x, w: torch.linalg.solve(square(x, w), x, left=False),
    "tensorsolve": lambda x, w: torch.linalg.tensorsolve(square(x, w).reshape(4, 2, 2), w),
    "lu_solve": lu_solve,
    "lu_solve, adjoint": lambda x, w: lu_solve(x, w, adjoint=True),
    "lu_solve, right": lambda x, w: lu_solve(x, w, left=False),
    "lu_solve, right adjoint": lambda x, w: lu_solve(x, w, left=False, adjoint=True),
    "det": lambda x, w: torch.linalg.det(square(x, w) / 3),
    "slogdet": lambda x, w: torch.linalg.slogdet(square(x, w))[1],
    "logdet": lambda x, w: square(x, w).logdet(),
    "cholesky, old": lambda x, w: torch.cholesky(lower(x, w) @ lower(x, w).T + torch.diag(w * w)),
    "cholesky_solve": lambda x, w: torch.cholesky_solve(SHIFT[:4], torch.stack([lower(x, k * w) for k in range(4)])),
    "cholesky_solve, upper": lambda x, w: torch.cholesky_solve(
        SHIFT[:4], torch.stack([lower(x, k * w).T for k in range(4)]), True
    ),
    "cholesky_inverse": lambda x, w: torch.cholesky_inverse(lower(x, w)),
    "triangular_solve": lambda x, w: torch.triangular_solve(x.T, square(x, w), unitriangular=True)[0],
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
DEPRECATED = pytest.mark.filterwarnings("ignore:torch.(triangular_solve|cholesky) is deprecated:UserWarning")


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


ZERO = torch.zeros(2, dtype=F64)
DIRECTIONS = [(draw(6, 4, seed=2), draw(4, seed=3)), (draw(6, 4, seed=5), draw(4, seed=6))]
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
    **{name: (op, (X[0], W[0])) for name, op in MORE.items() if name not in ("cholesky, old", "triangular_solve")},
    "native_layer_norm, statistics": (
        lambda x, w: torch.native_layer_norm(x, [4], w, None, 0.1),
        (draw(3, 2, 4), draw(4)),
    ),
    "native_batch_norm, statistics": (
        lambda x, w: torch.native_batch_norm(x, w, None, None, None, True, 0.1, 0.1),
        (draw(5, 3, 2), draw(3)),
    ),
    "attention that scales": (lambda x: F.scaled_dot_product_attention(x, x, x, scale=0.3), (draw(2, 3, 5, 4),)),
    "attention to nothing": (
        lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=torch.tensor([[True], [False], [True]])),
        (draw(2, 2, 3, 4),),
    ),
    "attention with a bias": (lambda x, m: F.scaled_dot_product_attention(x, x, x, m), (draw(2, 2, 3, 4), draw(3, 3))),
    "attention in groups": (
        lambda x: F.scaled_dot_product_attention(x, x[:, :2], x[:, :2], enable_gqa=True),
        (draw(2, 4, 3, 4),),
    ),
    "MultiheadAttention, causal": (
        lambda x: HEADS(x, x, x, need_weights=False, is_causal=True, attn_mask=torch.ones(6, 6).triu(1).bool()),
        (draw(6, 4),),
    ),
    "MultiheadAttention with weights": (lambda x: HEADS(x, x, x), (draw(6, 4),)),
    "losses, not reduced": (
        lambda x, y: [f(x, y, reduction="none") for f in (F.mse_loss, F.huber_loss, F.soft_margin_loss)],
        (draw(3, 4), SHIFT[:3].sign()),
    ),
    "losses, summed": (
        lambda x, y: [f(x, y, reduction="sum") for f in (F.mse_loss, F.huber_loss, F.soft_margin_loss)],
        (draw(3, 4), SHIFT[:3].sign()),
    ),
    "mse_loss with weights": (lambda x, y: F.mse_loss(x, y, weight=y.exp()), (draw(3, 4), draw(3, 4, seed=1))),
    "multi_margin_loss with weights": (
        lambda x, w: F.multi_margin_loss(x, LABELS, weight=w.exp(), reduction="none"),
        (draw(6, 4), draw(4)),
    ),
    "multi_margin_loss of one": (lambda x: F.multi_margin_loss(x, LABELS[:1]), (draw(4),)),
    "LSTM in layers": (
        lambda x: layer(nn.LSTM, 4, 3, num_layers=2, bidirectional=True, proj_size=2, batch_first=True)(x),
        (draw(2, 5, 4),),
    ),
    "GRU in layers": (lambda x: layer(nn.GRU, 4, 3, num_layers=2, bidirectional=True)(x), (draw(5, 2, 4),)),
    "RNN without bias": (lambda x, h: layer(nn.RNN, 4, 3, bias=False)(x, h), (draw(5, 2, 4), draw(1, 2, 3))),
    "LSTM of a packed sequence": (
        lambda x: layer(nn.LSTM)(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3])))[0].data,
        (draw(5, 2, 4),),
    ),
    "LSTMCell": (lambda x: layer(nn.LSTMCell)(x), (draw(5, 4),)),
    "RNNCell": (lambda x: layer(nn.RNNCell)(x), (draw(5, 4),)),
    "cdist, 0 and infinity": (lambda x, y: [torch.cdist(x, y, p) for p in (0.0, torch.inf)], (draw(3, 4), draw(2, 4))),
    "solve of complex numbers": (
        lambda a, b: torch.linalg.solve(torch.complex(a, a.sin()), torch.complex(b, b)),
        (draw(3, 3), draw(3, 2)),
    ),
    "solve of a batch": (torch.linalg.solve, (draw(2, 1, 3, 3), draw(4, 3, 2))),
    "solve of vectors": (torch.linalg.solve, (draw(2, 3, 3), draw(2, 3))),
    "determinants of complex numbers": (
        lambda a: [*torch.linalg.slogdet(torch.complex(a, a.T)), torch.linalg.det(torch.complex(a, a.T))],
        (draw(3, 3),),
    ),
    "determinants of a singular matrix": (
        lambda a: [*torch.slogdet(a[:, None] * a), torch.det(a[:, None] * a)],
        (torch.arange(3.0),),
    ),
    "logarithms of determinants": (lambda a: a.logdet().nan_to_num(7.0), (draw(5, 3, 3),)),
    "weight_norm of all": (lambda v, g: torch._weight_norm(v, g, -1), (draw(4, 3), draw(1)[0])),
    "weight_norm of a vector": (lambda v, g: torch._weight_norm(v, g, 0), (draw(4), draw(4))),
    "select_scatter, another dimension": (lambda x, y: torch.select_scatter(x, y, 1, 3), (draw(3, 4), draw(3))),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_are_those_of_torch(name):
    fn, operands = VALUES[name]
    expected = fn(*operands)
    torch.testing.assert_close(elementary()(fn)(*operands), expected)


REFUSED = {
    "layer_norm of another shape": lambda: F.layer_norm(draw(3, 4), (5,)),
    "layer_norm of no dimension": lambda: F.layer_norm(draw(3, 4), ()),
    "batch_norm of one row": lambda: F.batch_norm(draw(1, 4), None, None, training=True),
    "instance_norm of no dimension": lambda: F.instance_norm(draw(3, 4)),
    "instance_norm of one element": lambda: F.instance_norm(draw(3, 4, 1)),
    "select_scatter out of range": lambda: torch.select_scatter(draw(3, 4), draw(4), 0, 3),
    "select_scatter of another shape": lambda: torch.select_scatter(draw(3, 4), draw(1), 0, 1),
    "attention with two masks": lambda: attention(X[0], W[0], attn_mask=SHIFT, is_causal=True),
    "attention of other sizes": lambda: F.scaled_dot_product_attention(draw(2, 3), draw(2, 4), draw(2, 4)),
    "mse_loss of other numbers": lambda: F.mse_loss(draw(2, 3), draw(2, 3), reduction="most"),
    "huber_loss without a delta": lambda: F.huber_loss(draw(2, 3), draw(2, 3), delta=-1.0),
    "glu of an odd number": lambda: F.glu(draw(2, 3)),
    "solve, not square": lambda: torch.linalg.solve(draw(2, 3), draw(2)),
    "solve of other sizes": lambda: torch.linalg.solve(draw(3, 3), draw(2, 2)),
    "solve, singular": lambda: torch.linalg.solve(torch.zeros(2, 2), torch.ones(2)),
    "det, not square": lambda: draw(2, 3).det(),
    "cdist of other sizes": lambda: torch.cdist(draw(2, 3), draw(2, 4)),
    "weight_norm out of range": lambda: torch._weight_norm(draw(3, 4), draw(3, 1), 2),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses_is_refused(name):
    with pytest.raises((RuntimeError, ValueError, IndexError)) as expected:
        REFUSED[name]()
    with pytest.raises(expected.type) as found:
        elementary()(REFUSED[name])()
    assert str(found.value).splitlines()[0] == str(expected.value).splitlines()[0]


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_running_statistics_move_as_those_of_torch(kind):
    x, layers = draw(4, 3, 5), [kind(3, track_running_stats=True).double() for _ in range(2)]
    elementary()(layers[0])(x)
    layers[1](x)
    torch.testing.assert_close(*[layer.state_dict() for layer in layers])


def test_what_writes_to_a_tensor_is_left_to_torch():
    a, b, out = draw(3, 3), draw(3), torch.empty(3, dtype=F64)
    with elementary():
        assert torch.linalg.solve(a, b, out=out) is out


def test_distances_of_coinciding_points_have_derivatives_of_zero():
    @elementary()
    def total(x):
        return (-torch.cdist(x, x).square()).exp().sum()

    x = draw(3, 2)
    expected = grad(lambda x: (-(x[:, None] - x).square().sum(-1)).exp().sum())(x)
    torch.testing.assert_close(grad(total)(x), expected)
    assert jacrev(grad(total))(x).isfinite().all()


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


# --- values at the edges, and what torch refuses ----------------------------------------------------------------------

MASK = torch.tensor([[True, True, True], [False, True, False], [False, False, True]])


def D(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=F64)


def attends(tensor: Tensor) -> Tensor:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(4, 2, batch_first=True).double().eval()
    return layer(tensor, tensor, tensor, attn_mask=MASK, need_weights=False)[0]


EDGES: dict[str, Callable[[], Any]] = {
    "cumprod that overflows in part": lambda: D(0.0, 1e200, 1e200).cumprod(0),
    "cumprod of one": lambda: D(3.0).cumprod(0),
    "cumprod of none": lambda: D().cumprod(0),
    "cumprod, viewed": lambda: torch.ones(2, 3, dtype=F64).cumprod(-1).view(-1),
    "layer_norm, viewed": lambda: F.layer_norm(D(1.0, 2.0, 4.0, 8.0).reshape(2, 2).t(), (2,)).view(-1),
    "attention, heads side by side": lambda: (
        F.scaled_dot_product_attention(*[torch.ones(2, 4, 3, 5).transpose(1, 2)] * 3).transpose(1, 2).view(2, 4, 15)
    ),
    "attention to nothing": lambda: attends(torch.ones(1, 3, 4, dtype=F64)),
    "batch_norm of one": lambda: torch.batch_norm(D(1.0, 2.0)[None], None, None, None, None, True, 0.1, 1e-5, False),
    "instance_norm of an empty batch": lambda: F.instance_norm(torch.ones(0, 2, 3, dtype=F64)),
    "cdist without features": lambda: torch.cdist(torch.ones(2, 0), torch.ones(3, 0), torch.inf),
    "solve_ex of a singular matrix": lambda: torch.linalg.solve_ex(torch.zeros(2, 2, dtype=F64), D(1.0, 1.0))[1],
    "triangular_solve's coefficient": lambda: torch.triangular_solve(
        torch.ones(2, 1), torch.tensor([[1.0, 2.0], [0.0, 1.0]]), transpose=True
    )[1],
    "a loss at its margin": lambda: grad(F.multi_margin_loss)(D(1.0, 0.0), torch.tensor(0)),
}
MISFITS: dict[str, Callable[[], Any]] = {
    "solve from the right": lambda: torch.linalg.solve(torch.ones(2, 3, 3), torch.ones(3, 2), left=False),
    "layer_norm's weight": lambda: F.layer_norm(torch.ones(2, 3), (3,), torch.ones(1)),
    "batch_norm's weight": lambda: F.batch_norm(torch.ones(4, 3), None, None, torch.ones(1), training=True),
    "one running statistic": lambda: F.batch_norm(torch.ones(4, 3), None, torch.ones(3), training=True),
    "integers": lambda: F.layer_norm(torch.ones(2, 3, dtype=torch.int64), (3,)),
    "multi_margin_loss's weight": lambda: F.multi_margin_loss(
        torch.ones(2, 3), torch.tensor([0, 1]), weight=torch.ones(7)
    ),
    "a mask of integers": lambda: F.scaled_dot_product_attention(
        *[torch.ones(2, 3, 4)] * 3, attn_mask=torch.ones(3, 3, dtype=torch.int64)
    ),
    "another state of a cell": lambda: nn.GRUCell(2, 3)(torch.ones(4, 2), torch.ones(1, 3)),
    "cdist's mode": lambda: torch.cdist(torch.ones(2, 2), torch.ones(2, 2), compute_mode="none"),
}


@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")
@pytest.mark.parametrize("case", EDGES)
def test_values_at_the_edges_are_torchs(case: str) -> None:
    expected = EDGES[case]()
    with elementary():
        found = EDGES[case]()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", MISFITS)
def test_arguments_that_do_not_fit_are_refused(case: str) -> None:
    with pytest.raises((RuntimeError, ValueError, IndexError)) as torchs:
        MISFITS[case]()
    with pytest.raises(type(torchs.value)), elementary():
        MISFITS[case]()


def test_a_result_is_a_tensor_of_its_own() -> None:
    x = D(1.0)
    with elementary():
        x.cumprod(0).add_(5)
    assert x.item() == 1.0


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_computes_losses_in_single_precision(low: torch.dtype) -> None:
    x, y = torch.full((3,), 300.0, dtype=low), torch.zeros(3, dtype=low)
    with torch.autocast("cpu", low):
        expected = F.mse_loss(x, y)
        with elementary():
            torch.testing.assert_close(F.mse_loss(x, y), expected)


SINGULAR = {
    "diagonal": torch.diag(D(1.0, 0.0, 2.0)),
    "zero": torch.zeros(3, 3, dtype=F64),
    "of rank one": torch.outer(D(1.0, 2.0, 3.0), D(2.0, -1.0, 1.0)),
    "regular": torch.diag(D(1.0, 3.0, 2.0)) + 0.1,
}


def by_permutations(a: Tensor) -> Tensor:
    even = a[0, 0] * a[1, 1] * a[2, 2] + a[0, 1] * a[1, 2] * a[2, 0] + a[0, 2] * a[1, 0] * a[2, 1]
    return even - a[0, 2] * a[1, 1] * a[2, 0] - a[0, 0] * a[1, 2] * a[2, 1] - a[0, 1] * a[1, 0] * a[2, 2]


DETERMINED = {
    "value": lambda f: f,
    "gradient": grad,
    "jacfwd": jacfwd,
    "Hessian": lambda f: jacfwd(grad(f)),
    "forward twice": lambda f: jacfwd(jacfwd(f)),
    "third": lambda f: jacfwd(jacrev(grad(f))),
}


@pytest.mark.parametrize("way", DETERMINED)
@pytest.mark.parametrize("case", [*SINGULAR, "all lanes"])
def test_the_determinant_is_a_polynomial_also_where_it_is_zero(case: str, way: str) -> None:
    take = DETERMINED[way]
    if case == "all lanes":
        matrices = torch.stack([*SINGULAR.values()])
        found = vmap(take(elementary()(torch.linalg.det)))(matrices)
        expected = vmap(take(by_permutations))(matrices)
    else:
        found, expected = (take(f)(SINGULAR[case]) for f in (elementary()(torch.linalg.det), by_permutations))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
