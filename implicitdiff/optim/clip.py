"""Bounds on gradients."""

from __future__ import annotations

import functools
import math

import torch

import implicitdiff.optim._check as _check
from implicitdiff._calls import shows_call
from implicitdiff._torch.trees import Leaves, Number, Tree
from implicitdiff.optim._base import GradientTransformation
from implicitdiff.optim._columns import Columns, accumulator
from implicitdiff.optim._stateless import each, stateless


@shows_call
def clip(max_delta: float) -> GradientTransformation:
    """Clamp every element to ``[-max_delta, max_delta]``.

    Example:
        >>> import torch
        >>> from implicitdiff.optim import clip
        >>> init, update = clip(1.0)
        >>> update(torch.tensor([-3.0, 0.5]), init(None))[0]
        tensor([-1.0000,  0.5000])
    """
    _check.require_one_non_negative("clip", max_delta=max_delta)

    return stateless("clip", functools.partial(each, functools.partial(_clamped, max_delta)))


def _clamped(max_delta: float, g: torch.Tensor) -> torch.Tensor:
    if g.is_complex():
        raise TypeError(
            f"clip: a gradient must be real, because complex numbers have no order, got {g.dtype}; use clip_grad_norm"
        )
    return g.clamp(-max_delta, max_delta)


@shows_call
def nan_to_num(nan: float = 0.0, posinf: float | None = None, neginf: float | None = None) -> GradientTransformation:
    """Replace nan and infinities by finite numbers, as `torch.nan_to_num` does. Replaced entries have derivative 0."""
    replaced = functools.partial(torch.nan_to_num, nan=nan, posinf=posinf, neginf=neginf)
    return stateless("nan_to_num", functools.partial(each, replaced))


@shows_call
def clip_grad_norm(max_norm: Number, norm_type: float = 2.0, *, eps: float = 1e-6) -> GradientTransformation:
    """Scale all gradients together so that their global norm is at most `max_norm`.

    That is::

        update = min(1, max_norm / (|g| + eps)) g

    ``|g|`` is the norm of all leaves as one vector. Derivatives pass through the norm. Squares of large gradients do
    not overflow.

    Args:
        max_norm: a positive number, or a scalar tensor, which may be learned.
        norm_type: 2, infinity, or any p >= 1.
        eps: added to the norm.

    Raises:
        ValueError: ``max_norm`` is negative, or ``norm_type`` less than 1.

    Reference:
        Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks", 2013, algorithm 1, as in
        `torch.nn.utils.clip_grad_norm_`.

    Example:
        >>> import torch
        >>> from implicitdiff import clip_grad_norm
        >>> init, update = clip_grad_norm(1.0)
        >>> update([torch.tensor([3.0]), torch.tensor([4.0])], init(None))[0]
        [tensor([0.6000]), tensor([0.8000])]
    """
    _check.require_one_non_negative("clip_grad_norm", max_norm=max_norm, eps=eps)
    if not norm_type >= 1:
        raise ValueError(f"clip_grad_norm: norm_type must be at least 1, or infinity, got {norm_type!r}")

    return stateless("clip_grad_norm", functools.partial(_clipped_to_norm, max_norm, norm_type, eps))


def _clipped_to_norm(max_norm: Number, norm_type: float, eps: float, columns: Columns, params: Tree) -> Leaves:
    if not any(g.numel() for g in columns.first):
        return columns.first
    # Clamped at 1, where gradients are not scaled and the factor has derivative 0. `eps` in the divisor as in
    # `torch.nn.utils.clip_grad_norm_`.
    factor = (max_norm / (_global_norm(columns.first, norm_type) + eps)).clamp(max=1.0)
    return [(g * factor.to(g.device, accumulator(g.dtype.to_real()))).to(g.dtype) for g in columns.first]


def _global_norm(tensors: Leaves, p: float) -> torch.Tensor:
    # Powers and their sum are at least float32, on the device of the first gradient.
    widest = torch.float64 if any(t.dtype.to_real() == torch.float64 for t in tensors) else torch.float32
    # For p = 2 a complex tensor is a pair of reals: a sum of squares is smooth at 0, the absolute value is not.
    wide = [
        _reals(t).to(tensors[0].device, widest) if p == 2 else t.abs().to(tensors[0].device, widest) for t in tensors
    ]
    largest = torch.stack([t.abs().amax() for t in wide if t.numel()]).amax()
    if p == math.inf:
        return largest
    # |g| = unit |g / unit| for any constant unit; the largest entry keeps the powers in range.
    unit = torch.where((largest > 0) & largest.isfinite(), largest, 1.0).detach()
    # The global norm: the p-norm of all entries of all leaves.
    total = torch.stack([((t / unit) ** p).sum() for t in wide]).sum()
    # At zero gradients the update is g times a constant, so the norm may have derivative 0 there (see `safe_sqrt`).
    zero = total == 0
    return unit * torch.where(zero, 0.0, torch.where(zero, 1.0, total) ** (1 / p))


def _reals(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
