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

Operation = Callable[..., Any]


def elementary(fn: Operation) -> Operation:
    """A function that runs with these operations exchanged."""

    def run(*args: Any) -> Any:
        with _Exchange():
            return fn(*args)

    return run


class _Exchange(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _ELEMENTARY.get(func, func)(*args, **(kwargs or {}))


def is_exchanged(func: Any) -> bool:
    """Whether a torch function is one of those."""
    return func in _ELEMENTARY


def _normalise(x: Tensor, dims: list[int], eps: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    # The fused ones, too, compute half precision in single.
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(dims, keepdim=True)
    y = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    return _normalise(input, list(range(-len(normalized_shape), 0)), eps, weight, bias)


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
    if not training:
        return functional.batch_norm(input, running_mean, running_var, weight, bias, eps=eps)
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
    if not use_input_stats:
        return functional.instance_norm(input, running_mean, running_var, weight, bias, False, eps=eps)
    return _normalise(input, [*range(2, input.dim())], eps, *_along_channels(input, weight, bias))


def _along_channels(input: Tensor, *factors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.reshape(-1, *[1] * (input.dim() - 2)) for t in factors]


def _as_torch_has_it(norm: Operation) -> Operation:
    """`torch.batch_norm` and `torch.instance_norm` take the arguments in another order."""

    def native(
        input: Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any, by_input: bool, *more: Any
    ) -> Tensor:
        momentum, eps, _ = more
        result: Tensor = norm(input, running_mean, running_var, weight, bias, by_input, momentum, eps)
        return result

    return native


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    square = v.square()
    if others := [d for d in range(v.dim()) if dim == -1 or d != dim]:
        square = square.sum(others, keepdim=True)
    return v * (g / square.sqrt())


def _select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    at = index % input.shape[dim]
    before, after = input.narrow(dim, 0, at), input.narrow(dim, at + 1, input.shape[dim] - at - 1)
    return torch.cat([before, src.unsqueeze(dim), after], dim)


_ELEMENTARY: dict[Operation, Operation] = {
    functional.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    functional.batch_norm: _batch_norm,
    torch.batch_norm: _as_torch_has_it(_batch_norm),
    functional.instance_norm: _instance_norm,
    torch.instance_norm: _as_torch_has_it(_instance_norm),
    torch._weight_norm: _weight_norm,
    torch.select_scatter: _select_scatter,
    torch.Tensor.select_scatter: _select_scatter,
}
