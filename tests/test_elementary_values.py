"""Values of the replaced operations are torch's, at the edges too, and torch's refusals are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks.tensors import draw
from tables.elementary import F64, HEADS, LABELS, MORE, OPERATIONS, SHIFT, W, X, attention, layer
from torch import Tensor, nn
from torch.func import grad, jacfwd, jacrev, vmap
from torch.nn import functional as F

from implicitdiff import elementary

VALUES = {
    **{name: (op, (draw(0, 6, 4), draw(0, 4))) for name, op in OPERATIONS.items()},
    "layer_norm of two dimensions": (lambda x, w: F.layer_norm(x, (3, 4), w), (draw(0, 2, 3, 4), draw(0, 3, 4))),
    "layer_norm, keywords": (lambda x: F.layer_norm(x, normalized_shape=[4], bias=x[0], eps=0.1), (draw(0, 3, 4),)),
    "layer_norm, half": (lambda x: F.layer_norm(x, (4,), x[0]), (draw(0, 3, 4).half(),)),
    "layer_norm, bfloat16": (lambda x: F.layer_norm(x, (4,)), (draw(0, 3, 4).bfloat16(),)),
    "batch_norm of images": (
        lambda x, w: F.batch_norm(x, None, None, w, w, True, 0.2, 1e-3),
        (draw(0, 2, 3, 4, 5), draw(0, 3)),
    ),
    "batch_norm, evaluated": (
        lambda x, w: F.batch_norm(x, w, w.square(), w, w.sin(), momentum=0.3),
        (draw(0, 5, 3), draw(0, 3)),
    ),
    "instance_norm of images": (
        lambda x, w: F.instance_norm(x, weight=w, bias=w, eps=0.1),
        (draw(0, 2, 3, 4, 5), draw(0, 3)),
    ),
    "instance_norm, evaluated": (
        lambda x, w: F.instance_norm(x, w, w.square(), w, use_input_stats=False),
        (draw(0, 2, 3, 5), draw(0, 3)),
    ),
    "weight_norm, rows": (lambda v, g: torch._weight_norm(v, g, 0), (draw(0, 4, 3), draw(0, 4, 1))),
    "weight_norm of a kernel": (lambda v, g: torch._weight_norm(v, g, 1), (draw(0, 4, 3, 2), draw(0, 1, 3, 1))),
    "weight_norm, counted from the end": (
        lambda v, g: torch._weight_norm(v, g, -2),
        (draw(0, 4, 3, 2), draw(0, 1, 3, 1)),
    ),
    "weight_norm, half": (lambda v, g: torch._weight_norm(v, g, 0), (300 * draw(0, 4, 8).half(), draw(0, 4, 1).half())),
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
        (draw(0, 6, 4), draw(0, 4)),
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
        (draw(0, 2, 3, 4), draw(0, 3)),
    ),
    "select_scatter of another dtype": (
        lambda x, y: torch.select_scatter(x, src=y, dim=0, index=1),
        (draw(0, 3, 4).float(), draw(0, 4)),
    ),
    **{name: (op, (X[0], W[0])) for name, op in MORE.items() if name not in ("cholesky, old", "triangular_solve")},
    "native_layer_norm, statistics": (
        lambda x, w: torch.native_layer_norm(x, [4], w, None, 0.1),
        (draw(0, 3, 2, 4), draw(0, 4)),
    ),
    "native_batch_norm, statistics": (
        lambda x, w: torch.native_batch_norm(x, w, None, None, None, True, 0.1, 0.1),
        (draw(0, 5, 3, 2), draw(0, 3)),
    ),
    "attention that scales": (lambda x: F.scaled_dot_product_attention(x, x, x, scale=0.3), (draw(0, 2, 3, 5, 4),)),
    "attention to nothing": (
        lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=torch.tensor([[True], [False], [True]])),
        (draw(0, 2, 2, 3, 4),),
    ),
    "attention with a bias": (
        lambda x, m: F.scaled_dot_product_attention(x, x, x, m),
        (draw(0, 2, 2, 3, 4), draw(0, 3, 3)),
    ),
    "attention in groups": (
        lambda x: F.scaled_dot_product_attention(x, x[:, :2], x[:, :2], enable_gqa=True),
        (draw(0, 2, 4, 3, 4),),
    ),
    "MultiheadAttention, causal": (
        lambda x: HEADS(x, x, x, need_weights=False, is_causal=True, attn_mask=torch.ones(6, 6).triu(1).bool()),
        (draw(0, 6, 4),),
    ),
    "MultiheadAttention with weights": (lambda x: HEADS(x, x, x), (draw(0, 6, 4),)),
    "losses, not reduced": (
        lambda x, y: [f(x, y, reduction="none") for f in (F.mse_loss, F.huber_loss, F.soft_margin_loss)],
        (draw(0, 3, 4), SHIFT[:3].sign()),
    ),
    "losses, summed": (
        lambda x, y: [f(x, y, reduction="sum") for f in (F.mse_loss, F.huber_loss, F.soft_margin_loss)],
        (draw(0, 3, 4), SHIFT[:3].sign()),
    ),
    "mse_loss with weights": (lambda x, y: F.mse_loss(x, y, weight=y.exp()), (draw(0, 3, 4), draw(1, 3, 4))),
    "multi_margin_loss with weights": (
        lambda x, w: F.multi_margin_loss(x, LABELS, weight=w.exp(), reduction="none"),
        (draw(0, 6, 4), draw(0, 4)),
    ),
    "multi_margin_loss of one": (lambda x: F.multi_margin_loss(x, LABELS[:1]), (draw(0, 4),)),
    "LSTM in layers": (
        lambda x: layer(nn.LSTM, 4, 3, num_layers=2, bidirectional=True, proj_size=2, batch_first=True)(x),
        (draw(0, 2, 5, 4),),
    ),
    "GRU in layers": (lambda x: layer(nn.GRU, 4, 3, num_layers=2, bidirectional=True)(x), (draw(0, 5, 2, 4),)),
    "RNN without bias": (lambda x, h: layer(nn.RNN, 4, 3, bias=False)(x, h), (draw(0, 5, 2, 4), draw(0, 1, 2, 3))),
    "LSTM of a packed sequence": (
        lambda x: layer(nn.LSTM)(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3])))[0].data,
        (draw(0, 5, 2, 4),),
    ),
    "LSTMCell": (lambda x: layer(nn.LSTMCell)(x), (draw(0, 5, 4),)),
    "RNNCell": (lambda x: layer(nn.RNNCell)(x), (draw(0, 5, 4),)),
    "cdist, 0 and infinity": (
        lambda x, y: [torch.cdist(x, y, p) for p in (0.0, torch.inf)],
        (draw(0, 3, 4), draw(0, 2, 4)),
    ),
    "solve of complex numbers": (
        lambda a, b: torch.linalg.solve(torch.complex(a, a.sin()), torch.complex(b, b)),
        (draw(0, 3, 3), draw(0, 3, 2)),
    ),
    "solve of a batch": (torch.linalg.solve, (draw(0, 2, 1, 3, 3), draw(0, 4, 3, 2))),
    "solve of vectors": (torch.linalg.solve, (draw(0, 2, 3, 3), draw(0, 2, 3))),
    "determinants of complex numbers": (
        lambda a: [*torch.linalg.slogdet(torch.complex(a, a.T)), torch.linalg.det(torch.complex(a, a.T))],
        (draw(0, 3, 3),),
    ),
    "determinants of a singular matrix": (
        lambda a: [*torch.slogdet(a[:, None] * a), torch.det(a[:, None] * a)],
        (torch.arange(3.0),),
    ),
    "logarithms of determinants": (lambda a: a.logdet().nan_to_num(7.0), (draw(0, 5, 3, 3),)),
    "weight_norm of all": (lambda v, g: torch._weight_norm(v, g, -1), (draw(0, 4, 3), draw(0, 1)[0])),
    "weight_norm of a vector": (lambda v, g: torch._weight_norm(v, g, 0), (draw(0, 4), draw(0, 4))),
    "select_scatter, another dimension": (lambda x, y: torch.select_scatter(x, y, 1, 3), (draw(0, 3, 4), draw(0, 3))),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_are_those_of_torch(name):
    fn, operands = VALUES[name]
    expected = fn(*operands)
    torch.testing.assert_close(elementary()(fn)(*operands), expected)


REFUSED = {
    "layer_norm of another shape": lambda: F.layer_norm(draw(0, 3, 4), (5,)),
    "layer_norm of no dimension": lambda: F.layer_norm(draw(0, 3, 4), ()),
    "batch_norm of one row": lambda: F.batch_norm(draw(0, 1, 4), None, None, training=True),
    "instance_norm of no dimension": lambda: F.instance_norm(draw(0, 3, 4)),
    "instance_norm of one element": lambda: F.instance_norm(draw(0, 3, 4, 1)),
    "select_scatter out of range": lambda: torch.select_scatter(draw(0, 3, 4), draw(0, 4), 0, 3),
    "select_scatter of another shape": lambda: torch.select_scatter(draw(0, 3, 4), draw(0, 1), 0, 1),
    "attention with two masks": lambda: attention(X[0], W[0], attn_mask=SHIFT, is_causal=True),
    "attention of other sizes": lambda: F.scaled_dot_product_attention(draw(0, 2, 3), draw(0, 2, 4), draw(0, 2, 4)),
    "mse_loss of other numbers": lambda: F.mse_loss(draw(0, 2, 3), draw(0, 2, 3), reduction="most"),
    "huber_loss without a delta": lambda: F.huber_loss(draw(0, 2, 3), draw(0, 2, 3), delta=-1.0),
    "glu of an odd number": lambda: F.glu(draw(0, 2, 3)),
    "solve, not square": lambda: torch.linalg.solve(draw(0, 2, 3), draw(0, 2)),
    "solve of other sizes": lambda: torch.linalg.solve(draw(0, 3, 3), draw(0, 2, 2)),
    "solve, singular": lambda: torch.linalg.solve(torch.zeros(2, 2), torch.ones(2)),
    "det, not square": lambda: draw(0, 2, 3).det(),
    "cdist of other sizes": lambda: torch.cdist(draw(0, 2, 3), draw(0, 2, 4)),
    "weight_norm out of range": lambda: torch._weight_norm(draw(0, 3, 4), draw(0, 3, 1), 2),
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
    x, layers = draw(0, 4, 3, 5), [kind(3, track_running_stats=True).double() for _ in range(2)]
    elementary()(layers[0])(x)
    layers[1](x)
    torch.testing.assert_close(*[layer.state_dict() for layer in layers])


def test_what_writes_to_a_tensor_is_left_to_torch():
    a, b, out = draw(0, 3, 3), draw(0, 3), torch.empty(3, dtype=F64)
    with elementary():
        assert torch.linalg.solve(a, b, out=out) is out


def test_distances_of_coinciding_points_have_derivatives_of_zero():
    @elementary()
    def total(x):
        return (-torch.cdist(x, x).square()).exp().sum()

    x = draw(0, 3, 2)
    expected = grad(lambda x: (-(x[:, None] - x).square().sum(-1)).exp().sum())(x)
    torch.testing.assert_close(grad(total)(x), expected)
    assert jacrev(grad(total))(x).isfinite().all()


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
