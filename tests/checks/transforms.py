"""Nestings of transforms, as functions of a function and a point: `TRANSFORMS`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

WEIGHTS = torch.tensor([0.7, -1.1, 0.4, 0.9, -0.3, 1.3], dtype=torch.float64)


def scalar(f):
    """A scalar function of a solution, with no symmetry that could hide an error."""
    return lambda theta: (lambda x: (WEIGHTS[: x.shape[-1]] * x).sum() + (x**2).sum() / 2)(f(theta))


def total(f):
    return lambda batch: (vmap(f)(batch) ** 2).sum()


def direction(theta: Tensor) -> Tensor:
    return torch.cos(torch.arange(theta.numel(), dtype=theta.dtype)).reshape(theta.shape)


def lanes(theta: Tensor, count: int = 3) -> Tensor:
    return torch.stack([theta * (1 + 0.1 * i) for i in range(count)])


def autograd_backward(f, theta):
    theta = theta.clone().requires_grad_()
    scalar(f)(theta).backward()
    return theta.grad


def autograd_twice(f, theta):
    theta = theta.clone().requires_grad_()
    (first,) = torch.autograd.grad(scalar(f)(theta), theta, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), theta, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), theta)
    return torch.stack([second.detach(), third])


def dual_numbers(f, theta):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(theta, direction(theta)))).tangent


TRANSFORMS = {
    "value": lambda f, t: f(t),
    "grad": lambda f, t: grad(scalar(f))(t),
    "vjp": lambda f, t: (lambda out, pull: pull(direction(out))[0])(*vjp(f, t)),
    "jacrev": lambda f, t: jacrev(f)(t),
    "jacfwd": lambda f, t: jacfwd(f)(t),
    "jvp": lambda f, t: jvp(f, (t,), (direction(t),))[1],
    "vmap": lambda f, t: vmap(f)(lanes(t)),
    "vmap, chunk_size": lambda f, t: vmap(f, chunk_size=2)(lanes(t)),
    "vmap, last dimension": lambda f, t: vmap(f, in_dims=1, out_dims=1)(lanes(t).T),
    "vmap of grad": lambda f, t: vmap(grad(scalar(f)))(lanes(t)),
    "vmap of jacrev": lambda f, t: vmap(jacrev(f))(lanes(t)),
    "grad of vmap": lambda f, t: grad(total(f))(lanes(t)),
    "jacrev of vmap": lambda f, t: jacrev(vmap(f))(lanes(t, 2)),
    "jvp of vmap": lambda f, t: jvp(vmap(f), (lanes(t),), (direction(lanes(t)),))[1],
    "vmap of jvp": lambda f, t: vmap(lambda t: jvp(f, (t,), (direction(t),))[1])(lanes(t)),
    "vmap of vmap of grad": lambda f, t: vmap(vmap(grad(scalar(f))))(torch.stack([lanes(t), 1.05 * lanes(t)])),
    "grad of grad": lambda f, t: grad(lambda t: (grad(scalar(f))(t) ** 2).sum())(t),
    "grad of vmap of grad": lambda f, t: grad(lambda b: (vmap(grad(scalar(f)))(b) ** 2).sum())(lanes(t)),
    "hessian": lambda f, t: hessian(scalar(f))(t),
    "jacrev of jacfwd": lambda f, t: jacrev(jacfwd(f))(t),
    "jacfwd of jacrev": lambda f, t: jacfwd(jacrev(f))(t),
    "jacfwd of jacfwd": lambda f, t: jacfwd(jacfwd(f))(t),
    "jacrev of jacrev": lambda f, t: jacrev(jacrev(f))(t),
    "vmap of hessian": lambda f, t: vmap(hessian(scalar(f)))(lanes(t)),
    "hessian of vmap": lambda f, t: hessian(total(f))(lanes(t, 2)),
    "vmap of jacfwd of jacfwd": lambda f, t: vmap(jacfwd(jacfwd(f)))(lanes(t)),
    "three times reverse": lambda f, t: jacrev(jacrev(grad(scalar(f))))(t),
    "three times forward": lambda f, t: jacfwd(jacfwd(jacfwd(f)))(t),
    "forward, reverse, forward": lambda f, t: jacfwd(jacrev(jacfwd(f)))(t),
    "reverse, forward, reverse": lambda f, t: jacrev(jacfwd(grad(scalar(f))))(t),
    "four times, mixed": lambda f, t: jacfwd(jacrev(jacfwd(grad(scalar(f)))))(t),
    "backward()": autograd_backward,
    "autograd.grad three times": autograd_twice,
    "forward_ad": dual_numbers,
    "forward_ad of grad": lambda f, t: dual_numbers(grad(scalar(f)), t),
    "grad of forward_ad": lambda f, t: grad(lambda t: (dual_numbers(f, t) ** 2).sum())(t),
    "backward() of forward_ad": lambda f, t: autograd_backward(lambda t: dual_numbers(f, t), t),
}
# Derivatives of third and fourth order.
DEEP = (
    "three times reverse",
    "three times forward",
    "forward, reverse, forward",
    "reverse, forward, reverse",
    "four times, mixed",
    "autograd.grad three times",
)


def under_each(rows: Mapping[str, Any], transforms: Collection[str] = tuple(TRANSFORMS)) -> pytest.MarkDecorator:
    """Parametrize ``row`` and ``transform``. Every night all pairs; on each change a row has one deep transform."""
    deep = [name for name in DEEP if name in transforms]
    cells = [
        pytest.param(row, name, id=f"{label}-{name}", marks=[pytest.mark.nightly] * (name in deep and name != kept))
        for i, (label, row) in enumerate(rows.items())
        for kept in [deep[i % len(deep)]]
        for name in transforms
    ]
    return pytest.mark.parametrize(("row", "transform"), cells)
