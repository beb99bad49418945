"""Normalisations, whose fused derivatives take the statistics that they save for constants.

So the second derivative of `weight_norm` is wrong (no issue is known). The third of `layer_norm` (pytorch #175754), of
`batch_norm` (pytorch #186256) and with it of `instance_norm` is, or already the second where it is taken outside of a
vmap, as for a batch of minimisers, or in forward mode (pytorch #196700, #196699).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from implicitdiff._torch.replacements._spelling import Operation, of_aten


def _wide(x: Tensor) -> torch.dtype:
    """The fused ones, too, compute half precision in single."""
    return torch.promote_types(x.dtype, torch.float32)


def _statistics(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """What is centred, the means, and the inverse deviations."""
    wide = x.to(_wide(x))
    mean = wide.mean(dims, keepdim=True)
    centred = wide - mean
    return centred, mean, (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _normalise(x: Tensor, dims: list[int], eps: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    centred, _, inverse = _statistics(x, dims, eps)
    y = centred * inverse
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype).contiguous()


# What torch refuses is left to it.


def _fit(input: Tensor, sizes: Sequence[int], wanted: Sequence[int], *factors: Tensor | None) -> bool:
    """Whether the sizes that are normalised, or have factors, are those that are wanted, of the factors too."""
    shapes = [tuple(sizes), *(tuple(t.shape) for t in factors if t is not None)]
    return input.is_floating_point() and len(wanted) > 0 and all(shape == tuple(wanted) for shape in shapes)


def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    if not _fit(input, input.shape[-len(normalized_shape) :], normalized_shape, weight, bias):
        return functional.layer_norm(input, normalized_shape, weight, bias, eps)
    return _normalise(input, list(range(-len(normalized_shape), 0)), eps, weight, bias)


def _native_layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if not _fit(input, input.shape[-len(normalized_shape) :], normalized_shape, weight, bias):
        return torch.native_layer_norm(input, normalized_shape, weight, bias, eps)
    dims = list(range(-len(normalized_shape), 0))
    return _normalise(input, dims, eps, weight, bias), *_statistics(input, dims, eps)[1:]


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
    if not training or not _have_channels(input, running_mean, running_var, weight, bias) or _is_one_each(input):
        return functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _normalised_batch(input, running_mean, running_var, weight, bias, momentum, eps)


def _normalised_batch(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    if running_mean is not None:
        with torch.no_grad():
            # Torch's own updates the running statistics.
            torch.batch_norm(input.detach(), None, None, running_mean, running_var, True, momentum, eps, False)
    return _normalise(input, _but_channels(input), eps, *_along_channels(input, weight, bias))


def _have_channels(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, *factors: Tensor | None
) -> bool:
    """Whether all that goes with a batch has one number for each of its channels."""
    if input.dim() < 2 or input.numel() == 0 or (running_mean is None) != (running_var is None):
        return False
    channels = input.shape[1:2]
    return _fit(input, channels, channels, running_mean, running_var, *factors)


def _is_one_each(input: Tensor) -> bool:
    """Whether there is one number for each channel, which `functional.batch_norm` refuses."""
    return input.numel() == input.shape[1]


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
    fits = input.dim() > 2 and math.prod(input.shape[2:]) > 1
    if not (use_input_stats and fits and _have_channels(input, running_mean, running_var, weight, bias)):
        return functional.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    if running_mean is not None:
        with torch.no_grad():
            functional.instance_norm(input.detach(), running_mean, running_var, None, None, True, momentum, eps)
    return _normalise(input, [*range(2, input.dim())], eps, *_along_channels(input, weight, bias))


def _but_channels(input: Tensor) -> list[int]:
    return [0, *range(2, input.dim())]


def _along_channels(input: Tensor, *factors: Tensor | None) -> list[Tensor | None]:
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
    if not training or not _have_channels(input, running_mean, running_var, weight, bias):
        return torch.batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled)
    return _normalised_batch(input, running_mean, running_var, weight, bias, momentum, eps)


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
    if not training or not _have_channels(input, running_mean, running_var, weight, bias):
        return torch.native_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)
    y = _normalised_batch(input, running_mean, running_var, weight, bias, momentum, eps)
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
    if not -v.dim() <= dim < v.dim():
        return torch._weight_norm(v, g, dim)
    # To torch, -1 is no dimension but all of them.
    others = [d for d in range(v.dim()) if dim == -1 or d != dim % v.dim()]
    square = v.to(_wide(v)).square()
    if others:
        square = square.sum(others, keepdim=True)
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
