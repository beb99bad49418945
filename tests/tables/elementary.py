"""Operations of torch that are replaced, by name."""

from __future__ import annotations

import torch
from checks.tensors import draw
from torch import nn
from torch.nn import functional as F

F64 = torch.float64


SHIFT = draw(1, 6, 4)
# Of two lanes.
X, W = draw(0, 2, 6, 4), draw(4, 2, 4)


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
