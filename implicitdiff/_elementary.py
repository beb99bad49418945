"""Operations that torch differentiates wrongly, silently, in terms of others.

The statistics that their fused derivatives save count as constants. So the second derivative of `weight_norm` is wrong,
and the third of normalisations, or already the second where it is taken outside of a vmap, as it is for a batch of
minimisers. There that of `select_scatter` is wrong as well. Other operations are right to every order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import implicitdiff._functorch as functorch

Operation = Callable[..., Any]


def elementary(fn: Operation) -> Operation:
    """A function that runs with these operations exchanged."""

    def run(*args: Any) -> Any:
        with Exchange():
            return fn(*args)

    return run


class Exchange(TorchFunctionMode):
    """Exchanges these operations."""

    # A compiled function would have the mode compiled as well, wrongly.
    @functorch.outside_compile
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _ELEMENTARY.get(func, func)(*args, **(kwargs or {}))


def is_exchanged(func: Any) -> bool:
    """Whether a torch function is one of those."""
    return func in _ELEMENTARY


def _wide(x: Tensor) -> torch.dtype:
    """The fused ones, too, compute half precision in single."""
    return torch.promote_types(x.dtype, torch.float32)


def _normalise(x: Tensor, dims: list[int], eps: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    wide = x.to(_wide(x))
    centred = wide - wide.mean(dims, keepdim=True)
    y = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


# What torch refuses is left to it.


def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    k = len(normalized_shape)
    if k == 0 or tuple(input.shape[-k:]) != tuple(normalized_shape):
        return functional.layer_norm(input, normalized_shape, weight, bias, eps)
    return _normalise(input, list(range(-k, 0)), eps, weight, bias)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training or input.dim() < 2 or input.numel() <= input.shape[1]:
        return functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    # Running statistics would be a side effect, which a condition must not have.
    return _normalise(input, [0, *range(2, input.dim())], eps, *_along_channels(input, weight, bias))


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats or input.dim() < 3 or input[0, 0].numel() == 1:
        return functional.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return _normalise(input, [*range(2, input.dim())], eps, *_along_channels(input, weight, bias))


def _along_channels(input: Tensor, *factors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.reshape(-1, *[1] * (input.dim() - 2)) for t in factors]


def _native_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _native_instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    return _instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    if not -v.dim() <= dim < v.dim():
        return torch._weight_norm(v, g, dim)
    # To torch, -1 is no dimension but all of them.
    others = [d for d in range(v.dim()) if dim == -1 or d != dim % v.dim()]
    square = v.to(_wide(v)).square()
    if others:
        square = square.sum(others, keepdim=True)
    return (v * (g / square.sqrt())).to(v.dtype)


def _select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    selected = input.select(dim, index)
    if selected.shape != src.shape:
        return torch.select_scatter(input, src, dim, index)
    at = index % input.shape[dim]
    before, after = input.narrow(dim, 0, at), input.narrow(dim, at + 1, input.shape[dim] - at - 1)
    return torch.cat([before, src.unsqueeze(dim).to(input.dtype), after], dim)


_ELEMENTARY: dict[Operation, Operation] = {
    functional.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    functional.batch_norm: _batch_norm,
    torch.batch_norm: _native_batch_norm,
    functional.instance_norm: _instance_norm,
    torch.instance_norm: _native_instance_norm,
    torch._weight_norm: _weight_norm,
    torch.select_scatter: _select_scatter,
    torch.Tensor.select_scatter: _select_scatter,
}
