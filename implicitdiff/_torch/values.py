"""Tensors that a search, which looks at values, cannot run on."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

import implicitdiff._torch.levels as functorch


def refuse_valueless(name: str, tensors: Sequence[Tensor]) -> None:
    """Raise if a tensor has no values, if its values lie in other processes, or if a tracer records the operations for
    later values."""
    plain = [functorch.base(t) for t in tensors]
    _refuse(name, _missing(plain) or _unsuitable(plain))


def refuse_missing(name: str, tensors: Sequence[Tensor]) -> None:
    """Raise where there are no values."""
    _refuse(name, _missing([functorch.base(t) for t in tensors]))


def _refuse(name: str, reason: str | None) -> None:
    if reason is not None:
        raise NotImplementedError(f"{name}: what it does depends on values, and {reason}")


def _missing(tensors: Sequence[Tensor]) -> str | None:
    if any(t.is_meta and type(t) in (Tensor, torch.nn.Parameter) for t in tensors):
        return "a tensor on the meta device has none; put the tensors on a real device, e.g. by to_empty"
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    if proxies is not None and proxies.get_proxy_mode() is not None:
        return (
            "make_fx and torch.export record operations without them; call it outside of what is exported, or use "
            "torch.compile, which runs it eagerly"
        )
    if any(_is(t, "torch._subclasses.fake_tensor", "FakeTensor") for t in tensors):
        return "a FakeTensor has none; call it outside of FakeTensorMode, on real tensors"
    return None


def _unsuitable(tensors: Sequence[Tensor]) -> str | None:
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return (
            "torch.jit.trace would record the iterations for this input alone; call it outside of what is traced, or "
            "use torch.compile, which runs it eagerly"
        )
    if any(_is(t, "torch.distributed.tensor", "DTensor") for t in tensors):
        return "those of a DTensor are spread over processes; give it a plain tensor, by full_tensor() or to_local()"
    return None


def _is(tensor: Tensor, module: str, name: str) -> bool:
    # A module that nobody has imported has made no tensor.
    loaded = sys.modules.get(module)
    return type(tensor) is not Tensor and loaded is not None and isinstance(tensor, getattr(loaded, name))
