"""Losses without second derivatives.

`hessian` is forward over reverse mode, and forward mode fails for these backward formulas: `mse_loss` writes into zero
tensors without storage (pytorch #123996, #112013); `huber_loss` and `soft_margin_loss` lack forward mode (no issue is
known). The backward formula of `multi_margin_loss` has no derivative in any mode (no issue is known).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from implicitdiff._torch.replacements._spelling import Operation, of_aten, only_if

_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda t: t, "mean": Tensor.mean, "sum": Tensor.sum}
# The index is ATen's number.
_ATEN_REDUCTIONS = [*_REDUCTIONS]


def _only_if_plain(input: Tensor, target: Tensor, reduction: str, *options: object) -> None:
    # Other arguments are left to torch, which raises, warns of broadcasting, or promotes.
    only_if(input.is_floating_point(), input.shape == target.shape, input.dtype == target.dtype)
    only_if(reduction in _REDUCTIONS, *[option is None for option in options])


def _mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    _only_if_plain(input, target, reduction, size_average, reduce, weight)
    return _REDUCTIONS[reduction]((input - target).square())


def _huber_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    _only_if_plain(input, target, reduction, weight)
    only_if(delta > 0)
    # a^2 / 2 for |a| <= delta, else delta (|a| - delta / 2).
    away = input - target
    size = away.abs()
    # Both branches have finite derivatives everywhere, so the branch not taken adds no nan.
    return _REDUCTIONS[reduction](torch.where(size <= delta, 0.5 * away.square(), delta * (size - 0.5 * delta)))


def _soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    _only_if_plain(input, target, reduction, size_average, reduce)
    # -logsigmoid(z) = log(1 + exp(-z)), without overflow.
    return _REDUCTIONS[reduction](-functional.logsigmoid(target * input))


def _multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    only_if(input.is_floating_point(), input.dim() in (1, 2), input.numel() > 0, target.shape == input.shape[:-1])
    only_if(p in (1, 2), reduction in _REDUCTIONS, size_average is None, reduce is None)
    only_if(weight is None or weight.shape == input.shape[-1:])
    # Mean over classes j other than the target y of max(0, margin - x_y + x_j)^p.
    at = target.unsqueeze(-1)
    short = (margin - input.gather(-1, at) + input).relu() ** p
    # The entry of the target class is set to 0 and leaves the sum.
    each = short.scatter(-1, at, 0.0).sum(-1) / input.shape[-1]
    return _REDUCTIONS[reduction](each if weight is None else each * weight[target])


# --- torch.ops.aten, where the reduction is an index into _ATEN_REDUCTIONS --------------------------------------------


def _aten_mse_loss(self: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    return _mse_loss(self, target, reduction=_ATEN_REDUCTIONS[reduction])


def _aten_huber_loss(self: Tensor, target: Tensor, reduction: int = 1, delta: float = 1.0) -> Tensor:
    return _huber_loss(self, target, _ATEN_REDUCTIONS[reduction], delta)


def _aten_soft_margin_loss(self: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    return _soft_margin_loss(self, target, reduction=_ATEN_REDUCTIONS[reduction])


def _aten_multi_margin_loss(
    self: Tensor, target: Tensor, p: int = 1, margin: float = 1.0, weight: Tensor | None = None, reduction: int = 1
) -> Tensor:
    return _multi_margin_loss(self, target, p, margin, weight, reduction=_ATEN_REDUCTIONS[reduction])


REPLACEMENTS: dict[Operation, Operation] = {
    functional.mse_loss: _mse_loss,
    functional.huber_loss: _huber_loss,
    functional.soft_margin_loss: _soft_margin_loss,
    functional.multi_margin_loss: _multi_margin_loss,
    **of_aten(
        mse_loss=_aten_mse_loss,
        huber_loss=_aten_huber_loss,
        soft_margin_loss=_aten_soft_margin_loss,
        multi_margin_loss=_aten_multi_margin_loss,
    ),
}
