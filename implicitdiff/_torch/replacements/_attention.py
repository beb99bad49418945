"""Attention. The fused kernels lack second derivatives (pytorch #116350) and forward mode (pytorch #128971)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import implicitdiff._torch.levels as _levels
from implicitdiff._torch.replacements._spelling import Operation, of_aten, only_if


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    only_if(dropout_p <= 0, not (is_causal and attn_mask is not None))
    _only_if_shapes_fit(query, key, value)
    # Grouped queries: each head of key and value serves several heads of the query.
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], dim=-3) for t in (key, value))
    # Logits, softmax and output of half-precision operands are computed in float32, like the fused kernels.
    wide = torch.promote_types(query.dtype, torch.float32)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    # softmax(Q K' / sqrt(d)) V.
    logits = (query.to(wide) * scale) @ key.to(wide).mT
    # Query i sees the keys up to i.
    mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=query.device).tril() if is_causal else attn_mask
    weights = logits.softmax(-1) if mask is None else _masked_softmax(logits, mask, query.dtype)
    out = (weights @ value.to(wide)).to(query.dtype)
    # Keep torch's memory layout, with heads next to each other if the query has this layout: users call `view`.
    if query.dim() > 3 and query.transpose(-2, -3).is_contiguous():
        return out.transpose(-2, -3).contiguous().transpose(-2, -3)
    return out


def _only_if_shapes_fit(query: Tensor, key: Tensor, value: Tensor) -> None:
    # Other operands are left to torch, which raises or takes another path.
    tensors = query, key, value
    only_if(not any(t.is_nested for t in tensors))
    only_if(min(t.dim() for t in tensors) >= 2, query.dtype == key.dtype == value.dtype, query.is_floating_point())
    only_if(0 < query.shape[-1] == key.shape[-1], key.shape[-2] == value.shape[-2])


def _masked_softmax(logits: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    only_if(mask.dim() >= 2, mask.dtype in (torch.bool, dtype))
    logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask.to(logits.dtype)
    # A query whose keys are all masked has softmax 0 / 0. torch defines its weights as 0, with derivative 0.
    nothing = (logits == -math.inf).all(-1, keepdim=True)
    # The first fill keeps the softmax of such a row finite. Without the first fill, the derivative would be 0 * nan.
    return logits.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)


def _multi_head_attention_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    # With need_weights=True torch computes attention by elementary operations.
    result: Any = functional.multi_head_attention_forward(*args, **{**kwargs, "need_weights": True})
    out, weights = result
    # For a fully masked query torch returns 0 or nan, depending on the kernel. A read on the host, once for each call.
    only_if(not _levels.is_any(weights.isnan()))
    return out, weights if kwargs.get("need_weights", True) else None


REPLACEMENTS: dict[Operation, Operation] = {
    functional.scaled_dot_product_attention: _attention,
    functional.multi_head_attention_forward: _multi_head_attention_forward,
    **of_aten(scaled_dot_product_attention=_attention),
}
