"""Functions that give the same each time, of all kinds that programs have: `CONDITIONS`.

Each row makes a function ``c(x, theta)`` of two vectors of three, like them, with a small Jacobian. Rows that cannot
run under every transform, because torch does not, name those that they leave out.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations

F64 = torch.float64
Function = Callable[[Tensor, Tensor], Tensor]
W = torch.tensor([[0.4, -0.2, 0.1], [0.3, 0.2, -0.5], [-0.1, 0.2, 0.3]], dtype=F64)
ARRAY = W.numpy().copy()


class Row(NamedTuple):
    name: str
    make: Callable[[], Function]
    without: Collection[str] = ()

    def __str__(self) -> str:
        return self.name


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double().eval()


def of_module(make: Callable[[], nn.Module]) -> Callable[[], Function]:
    def fn() -> Function:
        net = seeded(make)
        return lambda x, theta: torch.tanh(net(x) + theta)

    return fn


def of_batch(make: Callable[[], nn.Module]) -> Callable[[], Function]:
    """Of a module that takes batches of sequences, here of one of one."""

    def fn() -> Function:
        net = seeded(make)

        def c(x: Tensor, theta: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivatives
                return torch.tanh(net((x + theta)[None, None])[0, 0])

        return c

    return fn


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(3, 1, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


class AsBatch(nn.Module):
    """One row as a batch of one."""

    def forward(self, x):
        return x[None]


def recurrent() -> Function:
    cell = seeded(lambda: nn.GRUCell(3, 3))
    return lambda x, theta: cell(theta[None], x[None])[0]


def hooked() -> Function:
    net = seeded(lambda: nn.Linear(3, 3))
    net.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    net.register_forward_hook(lambda module, args, out: out / 2)
    return lambda x, theta: torch.tanh(net(x) + theta)


def called_functionally() -> Function:
    net = seeded(lambda: nn.Linear(3, 3))
    params = {name: 0.5 * p.detach() for name, p in net.named_parameters()}
    return lambda x, theta: torch.tanh(functional_call(net, params, (x,)) + theta)


# --- custom Functions -------------------------------------------------------------------------------------------------


class Sine(torch.autograd.Function):
    """With all that a Function can say."""

    @staticmethod
    def forward(x, theta):
        return torch.sin(x) * theta

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, theta = ctx.saved_tensors
        return g * torch.cos(x) * theta, g * torch.sin(x)

    @staticmethod
    def jvp(ctx, dx, dtheta):
        x, theta = ctx.saved_tensors
        return dx * torch.cos(x) * theta + dtheta * torch.sin(x)

    @staticmethod
    def vmap(info, in_dims, x, theta):
        x, theta = (t if d is None else t.movedim(d, 0) for t, d in zip((x, theta), in_dims, strict=True))
        return Sine.apply(*torch.broadcast_tensors(x, theta)), 0


class SineByRule(torch.autograd.Function):
    generate_vmap_rule = True
    forward, setup_context, backward, jvp = Sine.forward, Sine.setup_context, Sine.backward, Sine.jvp


class SineOfReverseMode(torch.autograd.Function):
    generate_vmap_rule = True
    forward, backward = Sine.forward, Sine.backward

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)


class Rounded(torch.autograd.Function):
    """With an argument that is no tensor, and the derivative of the identity."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, digits):
        return x.clone() + 0 * digits

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g.clone(), None

    @staticmethod
    def jvp(ctx, dx, ddigits):
        return dx.clone()


# --- derivatives inside -----------------------------------------------------------------------------------------------


def energy(x: Tensor, theta: Tensor) -> Tensor:
    return (torch.cos(W @ x) * theta).sum() + (theta * x**2).sum() / 4


def by_rows(x: Tensor, theta: Tensor) -> Tensor:
    return vmap(lambda row, t: torch.sin(row @ x) * t)(W, theta)


def by_vjp(x: Tensor, theta: Tensor) -> Tensor:
    out, pull = vjp(lambda x: torch.sin(W @ x), x)
    return pull(theta)[0] + out


def by_jvp(x: Tensor, theta: Tensor) -> Tensor:
    return jvp(lambda x: torch.sin(W @ x), (x,), (theta,))[1]


# --- tensors made inside ----------------------------------------------------------------------------------------------


def in_place(x: Tensor, theta: Tensor) -> Tensor:
    y = x.clone()
    y.mul_(theta).sin_()
    y[0] = 2 * theta[1] * x[2]
    z = torch.zeros_like(theta)
    z += y
    z[1:].add_(theta[:-1], alpha=0.5)
    return z


def by_out_of_lists(x: Tensor, theta: Tensor) -> Tensor:
    parts = [a * b for a, b in zip(x.unbind(), theta.unbind(), strict=True)]
    parts.append(torch.ones((), dtype=F64))
    parts[0], parts[1] = parts[1], parts[0]
    return torch.stack(parts[:3]).sin() + sum(parts) / 10


def properties(x: Tensor, theta: Tensor) -> Tensor:
    outer = torch.outer(x, theta)
    z = torch.complex(x, theta)
    return torch.sin(outer.T @ theta + outer.mT[0] + outer.H[1] + z.real * z.imag + z.conj().real) / 2


def indices(x: Tensor, theta: Tensor) -> Tensor:
    y = x[[2, 0, 1]] + theta[torch.tensor([1, 2, 0])] + x[None, ..., ::2].sum() + x[-1:]
    return torch.sin(y[..., :3] + theta.gather(0, torch.arange(3)) + torch.where(theta > -9, x, theta)) / 2


def names_and_numbers(x: Tensor, theta: Tensor) -> Tensor:
    nothing = torch.full_like(x, float("nan")).nan_to_num(nan=0.25, posinf=float("inf"))
    y = torch.einsum("ij,j->i", W, x) + nothing + np.float64(0.5) * theta + np.int64(1)
    return torch.sin(torch.clamp(y, min=-float("inf"), max=9)).to(dtype=F64, device="cpu").reshape(torch.Size([3]))


def of_library_of_torch(x: Tensor, theta: Tensor) -> Tensor:
    y = torch.fft.ifft(torch.fft.fft(x) * 0.5).real + torch.softmax(theta * x, dim=0)
    z = torch.linalg.solve(torch.eye(3, dtype=F64) + torch.outer(x, x), theta)
    return torch.sin(y + z + torch.logsumexp(x, 0) + torch.sort(theta).values + torch.cumsum(x, 0)) / 4


def by_numpy(x: Tensor, theta: Tensor) -> Tensor:
    made = torch.from_numpy(np.linspace(0.1, 0.3, 3)) + torch.as_tensor(ARRAY)[0] + torch.tensor(ARRAY.tolist())[1]
    return torch.sin(made * x + torch.asarray([0.1, 0.2, 0.3], dtype=F64) * theta)


def fresh_numbers(x: Tensor, theta: Tensor) -> Tensor:
    noise = torch.randn(3, generator=torch.Generator().manual_seed(7), dtype=F64)
    shift = torch.as_tensor(np.random.default_rng(7).standard_normal(3))
    return torch.sin(x * noise + theta + shift)


def forked(x: Tensor, theta: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        noise = torch.rand(3, dtype=F64)
    return torch.sin(x * noise + theta)


def without_gradients(x: Tensor, theta: Tensor) -> Tensor:
    with torch.no_grad():
        weight = (W @ W).sin()
    with torch.set_grad_enabled(False):
        weight = weight + torch.eye(3, dtype=F64)
    return torch.sin(weight @ x + theta) / 2


def fallback(x: Tensor, theta: Tensor) -> Tensor:
    try:
        return x @ torch.ones(4, dtype=F64)
    except RuntimeError:
        return torch.sin(W @ x) * theta


def made_inside(x: Tensor, theta: Tensor) -> Tensor:
    norm, act = nn.LayerNorm(3, elementwise_affine=False), nn.Softplus(beta=2)
    return norm(act(x + theta)) * 0.1 + torch.sin(theta)


def looks_at_values(x: Tensor, theta: Tensor) -> Tensor:
    if bool((x.detach() > 50).any()) or theta.max().item() > 50:
        return x
    return torch.sin(x) * theta


# --- what is written down meanwhile -----------------------------------------------------------------------------------


def counting() -> Function:
    count = 0

    def c(x: Tensor, theta: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return torch.sin(x) * theta

    return c


def keeping_a_log() -> Function:
    class Log:
        last, seen = None, 0

    log: list[Any] = []

    def c(x: Tensor, theta: Tensor) -> Tensor:
        log.append(x.shape)
        Log.seen += 1
        Log.last = torch.sin(x) * theta
        logging.getLogger(__name__).debug("%s", x)
        return Log.last

    return c


def made_at_first_use() -> Function:
    class Lazy:
        matrix = None

    def c(x: Tensor, theta: Tensor) -> Tensor:
        if Lazy.matrix is None:
            Lazy.matrix = torch.eye(3, dtype=F64) / 2
        return torch.sin(Lazy.matrix @ x) * theta

    return c


def cached() -> Function:
    @functools.cache
    def matrix(n: int) -> Tensor:
        return torch.eye(n, dtype=F64) / 2

    return lambda x, theta: torch.sin(matrix(3) @ x) * theta


def differentiable_constants() -> Function:
    """What needs a gradient is captured, and is differentiated as well."""
    weight = W.clone().requires_grad_()
    scale = weight.sum().exp() / 9
    return lambda x, theta: torch.sin(weight @ x + scale * theta)


def direct(c: Function) -> Callable[[], Function]:
    return lambda: c


LANES, DUALS = {"vmap of grad"}, {"vmap of grad", "jacfwd"}
CONDITIONS = [
    Row("dropout in evaluation", of_module(lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)))),
    Row("normalisation in evaluation", of_batch(lambda: nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(3), AsBatch()))),
    Row("layer normalisation", of_module(lambda: nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.LayerNorm(3)))),
    Row("convolution", of_batch(lambda: nn.Conv1d(1, 1, 3, padding=1))),
    Row("attention", of_batch(Attention)),
    Row("transformer", of_batch(lambda: nn.TransformerEncoderLayer(3, 1, 4, dropout=0.1, batch_first=True))),
    Row("recurrent cell", recurrent, LANES),
    Row("hooks of a module", hooked),
    Row("weight normalisation", of_module(lambda: parametrizations.weight_norm(nn.Linear(3, 3)))),
    Row("spectral normalisation", of_module(lambda: parametrizations.spectral_norm(nn.Linear(3, 3)))),
    Row("orthogonal", of_module(lambda: parametrizations.orthogonal(nn.Linear(3, 3)))),
    Row("functional_call", called_functionally),
    Row("Function with all rules", direct(lambda x, theta: Sine.apply(x, theta))),
    Row("Function with a generated rule", direct(lambda x, theta: SineByRule.apply(x, theta))),
    Row("Function of reverse mode", direct(lambda x, theta: SineOfReverseMode.apply(x, theta)), {"jacfwd"}),
    Row("Function of a number", direct(lambda x, theta: Rounded.apply(torch.sin(x), 3) * theta)),
    Row("inner grad", direct(lambda x, theta: grad(energy)(x, theta) / 2)),
    Row("inner vmap", direct(by_rows)),
    Row("inner jacrev", direct(lambda x, theta: jacrev(lambda x: torch.sin(W @ x))(x) @ theta)),
    Row("inner jacfwd", direct(lambda x, theta: jacfwd(lambda x: torch.sin(W @ x))(x) @ theta)),
    Row("inner hessian", direct(lambda x, theta: hessian(energy)(x, theta) @ x / 3)),
    Row("inner vjp", direct(by_vjp)),
    Row("inner jvp", direct(by_jvp)),
    Row("in place on its own", direct(in_place)),
    Row("lists of tensors", direct(by_out_of_lists)),
    Row("properties of tensors", direct(properties)),
    Row("indices", direct(indices)),
    Row("names and numbers", direct(names_and_numbers)),
    Row("operations of many kinds", direct(of_library_of_torch)),
    Row("NumPy", direct(by_numpy)),
    Row("random numbers of a fixed seed", direct(fresh_numbers), DUALS),
    Row("random numbers of a fork", direct(forked), DUALS),
    Row("without gradients", direct(without_gradients)),
    Row("fallback", direct(fallback)),
    Row("modules made inside", direct(made_inside)),
    Row("looks at values", direct(looks_at_values), LANES),
    Row("counts", counting),
    Row("keeps a log", keeping_a_log),
    Row("makes a constant at first use", made_at_first_use, DUALS),
    Row("caches a constant", cached, DUALS),
    Row("captures what needs a gradient", differentiable_constants),
]
