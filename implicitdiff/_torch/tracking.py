"""Predicates of tensors: whether autograd or a transform differentiates or batches them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._C import _functorch as functorch
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

from implicitdiff._torch.context import now
from implicitdiff._torch.levels import PLAIN, are_plain, base, is_plain, layers_of, level, without_gradient_layers
from implicitdiff._torch.modes import no_modes


def is_continuous(tensor: torch.Tensor) -> bool:
    """Return whether a tensor holds floating-point or complex numbers; others have no derivative."""
    return tensor.is_floating_point() or tensor.is_complex()


def may_be_differentiated(tensor: torch.Tensor) -> bool:
    """Return whether a tensor requires a gradient, is a wrapper, or has a tangent. Modes are bypassed: a mode might
    replace the tensor."""
    with no_modes():
        if tensor.requires_grad or level(tensor) != PLAIN:
            return True
        return forward_ad._current_level >= 0 and _tangent(tensor) is not None


def is_tracked(tensor: torch.Tensor) -> bool:
    """Return whether autograd or forward mode records operations on a tensor, at any layer."""
    return is_in_graph(tensor) or _tangent(base(tensor)) is not None


def is_in_graph(tensor: torch.Tensor) -> bool:
    """Return whether autograd records operations on a tensor, at any layer."""
    # A layer answers for itself alone: a batch wrapper has `requires_grad` False also where the plain tensor inside has
    # a graph.
    return any([t.requires_grad for t in layers_of(tensor)])


def _tangent(tensor: torch.Tensor) -> torch.Tensor | None:
    # `unpack_dual` raises for sparse tensors and for tensors of inference mode, which have no tangent.
    if tensor.layout is not torch.strided or tensor.is_inference():
        return None
    # Without an open level of forward mode the tangent is None.
    tangent: torch.Tensor | None = forward_ad.unpack_dual(tensor).tangent
    return tangent


def is_quiet(tensors: Sequence[torch.Tensor], batched: Sequence[torch.Tensor] = ()) -> bool:
    """Return whether nothing differentiates these tensors, and only vmaps run.

    Args:
        tensors: tensors that must be plain as well.
        batched: tensors that may have batch layers.
    """
    return (
        now().only_vmaps
        and not any(map(may_be_differentiated, tensors))
        # `without_gradient_layers` returns the same object if there is no gradient layer.
        and not any(may_be_differentiated(base(t)) or without_gradient_layers(t) is not t for t in batched)
    )


def have_gradient_layer(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether a running grad, vjp, jvp or forward mode differentiates one of these tensors."""
    if are_constant(tensors):
        return False
    return any(_tangent(t) is not None if is_plain(t) else without_gradient_layers(t) is not t for t in tensors)


def are_constant(tensors: Sequence[torch.Tensor], *, plain: bool = False) -> bool:
    """Return whether all tensors are plain and have no tangent; autograd may record them. `plain` says that they are
    known to be plain."""
    if not plain and not are_plain(tensors):
        return False
    return not now().forward or all(_tangent(t) is None for t in tensors)


def have_legacy_batch(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether `torch.autograd.grad(..., is_grads_batched=True)` batches a tensor: its vmap has no level."""
    # `now` does not see this vmap: `torch._vmap_internals` keeps no interpreter.
    return any(map(functorch.is_legacy_batchedtensor, tensors))


def is_grad_alone(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether a grad or vjp runs with nothing but vmaps round it, and nothing else differentiates these
    tensors."""
    here = now()
    # Under jvp forward mode is on as well, so the kind of the innermost transform alone would not do.
    return not here.forward and here.has_one(TransformType.Grad) and _are_plain_inside(tensors)


def is_jvp_alone(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether a jvp runs with nothing but vmaps round it, and nothing else differentiates these tensors."""
    return now().has_one(TransformType.Jvp) and _are_plain_inside(tensors)


def _are_plain_inside(tensors: Sequence[torch.Tensor]) -> bool:
    return not any([may_be_differentiated(base(t)) for t in tensors])
