"""Ways to take derivatives, with and without torch.func."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, jacfwd, vmap


def by_backward(f: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    t = t.clone().requires_grad_()
    f(t).backward()
    return t.grad


def twice(f: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """First and second derivative of a function of one number."""
    t = t.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(t), t, create_graph=True)
    (second,) = torch.autograd.grad(first, t)
    return torch.stack([first.detach(), second])


def ways_at(t: Tensor) -> dict[str, Callable[[Callable[[Tensor], Tensor]], Tensor]]:
    """Ways to differentiate a function of one number at ``t``."""
    return {
        "backward": lambda f: by_backward(f, t),
        "twice": lambda f: twice(f, t),
        "grad": lambda f: grad(f)(t),
        "vmap of grad": lambda f: vmap(grad(f))(torch.stack([t, 1.1 * t])),
        "jacfwd": lambda f: jacfwd(f)(t),
    }


def backward_twice(f: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    """Hessian of a function of a vector."""
    theta = theta.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(theta), theta, create_graph=True)
    return torch.stack([torch.autograd.grad(g, theta, retain_graph=True)[0] for g in first])


def lanes(theta: Tensor) -> Tensor:
    """Three points, one of them zero."""
    return torch.stack([theta, -0.5 * theta, 0 * theta])


def parts(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function's result in real numbers."""
    return lambda theta: (lambda x: torch.view_as_real(x).flatten() if x.is_complex() else x)(f(theta))
