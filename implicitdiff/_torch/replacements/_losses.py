"""Losses without second derivatives.

`hessian` is forward over reverse mode, and forward mode fails for these backward formulas: `mse_loss` writes into zero
tensors without storage (pytorch #123996, #112013); `huber_loss` and `soft_margin_loss` lack forward mode (no issue is
known). The backward formula of `multi_margin_loss` has no derivative in any mode (no issue is known).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from implicitdiff._torch.replacements._spelling import Operation, of_aten

_REDUCTIONS = ("none", "mean", "sum")


def _reduced(values: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return values
    return values.mean() if reduction == "mean" else values.sum()


def _is_plain(input: Tensor, target: Tensor, reduction: str) -> bool:
    # Other arguments are left to torch, which raises, warns of broadcasting, or promotes.
    return (
        input.is_floating_point()
        and target.is_floating_point()
        and input.shape == target.shape
        and input.dtype == target.dtype
        and (reduction in _REDUCTIONS)
    )


def _mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    if not (size_average is None and reduce is None and weight is None and _is_plain(input, target, reduction)):
        return functional.mse_loss(input, target, size_average, reduce, reduction, weight)  # type: ignore[call-arg]
    return _reduced((input - target).square(), reduction)


def _huber_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    if weight is not None or not delta > 0 or not _is_plain(input, target, reduction):
        return functional.huber_loss(input, target, reduction, delta, weight)  # type: ignore[call-arg]
    # a^2 / 2 for |a| <= delta, else delta (|a| - delta / 2).
    away = input - target
    size = away.abs()
    # Both branches have finite derivatives everywhere, so the branch not taken adds no nan.
    return _reduced(torch.where(size <= delta, 0.5 * away.square(), delta * (size - 0.5 * delta)), reduction)


def _soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    if not (size_average is None and reduce is None and _is_plain(input, target, reduction)):
        return functional.soft_margin_loss(input, target, size_average, reduce, reduction)
    # -logsigmoid(z) = log(1 + exp(-z)), without overflow.
    return _reduced(-functional.logsigmoid(target * input), reduction)


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
    fits = input.is_floating_point() and input.dim() in (1, 2) and target.shape == input.shape[:-1] and p in (1, 2)
    fits = fits and (weight is None or weight.shape == input.shape[-1:])
    if not (fits and size_average is None and reduce is None and reduction in _REDUCTIONS and input.numel() > 0):
        return functional.multi_margin_loss(input, target, p, margin, weight, size_average, reduce, reduction)
    # Mean over classes j other than the target y of max(0, margin - x_y + x_j)^p.
    at = target.unsqueeze(-1)
    short = (margin - input.gather(-1, at) + input).relu() ** p
    # The entry of the target class is set to 0 and leaves the sum.
    each = short.scatter(-1, at, 0.0).sum(-1) / input.shape[-1]
    return _reduced(each if weight is None else each * weight[target], reduction)


# --- torch.ops.aten, where the reduction is an index into _REDUCTIONS
# ---------------------------------------------------


def _aten_mse_loss(self: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    return _mse_loss(self, target, reduction=_REDUCTIONS[reduction])


def _aten_huber_loss(self: Tensor, target: Tensor, reduction: int = 1, delta: float = 1.0) -> Tensor:
    return _huber_loss(self, target, _REDUCTIONS[reduction], delta)


def _aten_soft_margin_loss(self: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    return _soft_margin_loss(self, target, reduction=_REDUCTIONS[reduction])


def _aten_multi_margin_loss(
    self: Tensor, target: Tensor, p: int = 1, margin: float = 1.0, weight: Tensor | None = None, reduction: int = 1
) -> Tensor:
    return _multi_margin_loss(self, target, p, margin, weight, reduction=_REDUCTIONS[reduction])


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
