"""Normalisations. Fused backward formulas treat saved statistics (mean, inverse deviation, norm) as constants.

The second derivative of `weight_norm` is therefore wrong (no issue is known), and so is the third derivative of
`layer_norm` (pytorch #175754), `batch_norm` (pytorch #186256) and `instance_norm`, which calls it. The second
derivative of these three is wrong in forward mode, or outside of a vmap, as for a batch of minimisers (pytorch #196700,
#196699).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from implicitdiff._torch.replacements._spelling import Operation, of_aten, only_if


def _wide(x: Tensor) -> torch.dtype:
    """Return the dtype of statistics: float32 for half precision, like the fused kernels."""
    return torch.promote_types(x.dtype, torch.float32)


def _statistics(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the centred input, its mean, and its inverse standard deviation ``(var + eps)^(-1/2)``."""
    wide = x.to(_wide(x))
    mean = wide.mean(dims, keepdim=True)
    centred = wide - mean
    return centred, mean, (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _normalise(x: Tensor, dims: list[int], eps: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    centred, _, inverse = _statistics(x, dims, eps)
    # (x - mean) / sqrt(var + eps) * weight + bias.
    y = centred * inverse
    y = y if weight is None else y * weight
    # torch's kernels return contiguous tensors, also for a transposed input, and users call `view`.
    return (y if bias is None else y + bias).to(x.dtype).contiguous()


def _only_if_sizes_match(input: Tensor, sizes: Sequence[int], wanted: Sequence[int], *factors: Tensor | None) -> None:
    """Require a floating-point dtype of the input, and `sizes` and the shapes of all factors equal to `wanted`."""
    shapes = [tuple(sizes), *(tuple(t.shape) for t in factors if t is not None)]
    only_if(input.is_floating_point(), len(wanted) > 0, all(shape == tuple(wanted) for shape in shapes))


def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    _only_if_sizes_match(input, input.shape[-len(normalized_shape) :], normalized_shape, weight, bias)
    return _normalise(input, list(range(-len(normalized_shape), 0)), eps, weight, bias)


def _native_layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y = _layer_norm(input, normalized_shape, weight, bias, eps)
    return y, *_statistics(input, list(range(-len(normalized_shape), 0)), eps)[1:]


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
    # `functional.batch_norm` raises for one number a channel, and `torch.batch_norm` does not.
    only_if(input.dim() >= 2)
    only_if(input.numel() != input.shape[1])
    return _torch_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, True)


def _only_if_channels_match(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, *factors: Tensor | None
) -> None:
    """Require statistics and factors with one number for each channel of the input."""
    only_if(input.dim() >= 2, input.numel() > 0, (running_mean is None) == (running_var is None))
    channels = input.shape[1:2]
    _only_if_sizes_match(input, channels, channels, running_mean, running_var, *factors)


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
    # torch raises for one number a channel, whose deviation is 0.
    only_if(use_input_stats, input.dim() > 2, math.prod(input.shape[2:]) > 1)
    _only_if_channels_match(input, running_mean, running_var, weight, bias)
    if running_mean is not None:
        with torch.no_grad():
            # As in `_torch_batch_norm`, only the update in place is wanted.
            functional.instance_norm(input.detach(), running_mean, running_var, None, None, True, momentum, eps)
    return _normalise(input, [*range(2, input.dim())], eps, *_along_channels(input, weight, bias))


def _but_channels(input: Tensor) -> list[int]:
    """Return all dimensions except the channels, dimension 1."""
    return [0, *range(2, input.dim())]


def _along_channels(input: Tensor, *factors: Tensor | None) -> list[Tensor | None]:
    """Reshape factors of the channels so that they broadcast to the input."""
    return [None if t is None else t.reshape(-1, *[1] * (input.dim() - 2)) for t in factors]


def _torch_batch_norm(
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
    only_if(training)
    _only_if_channels_match(input, running_mean, running_var, weight, bias)
    if running_mean is not None:
        with torch.no_grad():
            # torch's own operation updates the running statistics in place; its output is not used.
            torch.batch_norm(input.detach(), None, None, running_mean, running_var, True, momentum, eps, False)
    return _normalise(input, _but_channels(input), eps, *_along_channels(input, weight, bias))


def _native_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    y = _torch_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, False)
    _, mean, inverse = _statistics(input, _but_channels(input), eps)
    return y, mean.flatten(), inverse.flatten()


def _torch_instance_norm(
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
    only_if(-v.dim() <= dim < v.dim())
    # In torch, dim=-1 means a norm over all dimensions.
    others = [d for d in range(v.dim()) if dim == -1 or d != dim % v.dim()]
    square = v.to(_wide(v)).square()
    if others:
        square = square.sum(others, keepdim=True)
    # w = g v / |v|, with the norm over all dimensions but one.
    return (v * (g / square.sqrt())).to(v.dtype)


REPLACEMENTS: dict[Operation, Operation] = {
    functional.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    torch.native_layer_norm: _native_layer_norm,
    functional.batch_norm: _batch_norm,
    torch.batch_norm: _torch_batch_norm,
    torch.native_batch_norm: _native_batch_norm,
    functional.instance_norm: _instance_norm,
    torch.instance_norm: _torch_instance_norm,
    torch._weight_norm: _weight_norm,
    **of_aten(
        layer_norm=_layer_norm,
        native_layer_norm=_native_layer_norm,
        batch_norm=_torch_batch_norm,
        native_batch_norm=_native_batch_norm,
        instance_norm=_torch_instance_norm,
        _weight_norm=_weight_norm,
    ),
}
