"""Checks for tensors without usable values: a search reads values, to decide when to stop."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

import implicitdiff._torch.levels as _levels


def refuse_valueless(name: str, tensors: Sequence[Tensor]) -> None:
    """Raise if a tensor has no values, if other processes hold its values, or if a tracer records the operations for
    later values."""
    plain = [*map(_levels.base, tensors)]
    _refuse(name, _reason_missing(plain) or _reason_unsuitable(plain))


def refuse_distributed(name: str, tensors: Sequence[Tensor]) -> None:
    """Raise if a tensor is a DTensor."""
    if _has([*map(_levels.base, tensors)], "torch.distributed.tensor", "DTensor"):
        raise NotImplementedError(f"{name}: {_DISTRIBUTED}")


_DISTRIBUTED = (
    "the values of a DTensor are distributed over processes; pass a plain tensor, by full_tensor(), or by to_local() "
    "with implicitdiff.distributed.psum over the processes"
)


def refuse_missing(name: str, tensors: Sequence[Tensor]) -> None:
    """Raise if a tensor has no values."""
    _refuse(name, _reason_missing([*map(_levels.base, tensors)]))


def _refuse(name: str, reason: str | None) -> None:
    if reason is not None:
        raise NotImplementedError(f"{name}: the control flow depends on the values of tensors, and {reason}")


def is_recorded_for_later() -> bool:
    """Return whether make_fx, `torch.export` or `torch.func.linearize` records the operations."""
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return proxies is not None and proxies.get_proxy_mode() is not None


def _reason_missing(tensors: Sequence[Tensor]) -> str | None:
    # Only of plain tensors and parameters: a FakeTensor has a message of its own below.
    if any([t.is_meta for t in tensors if type(t) in _USUAL]):
        return "a tensor on the meta device has no values; move the tensors to a real device, for example by to_empty"
    if is_recorded_for_later():
        return (
            "make_fx and torch.export record operations without values; call the solver outside of the exported "
            "function, or use torch.compile, which runs the solver eagerly"
        )
    if _has(tensors, "torch._subclasses.fake_tensor", "FakeTensor"):
        return "a FakeTensor has no values; call the solver outside of FakeTensorMode, on real tensors"
    return None


def _reason_unsuitable(tensors: Sequence[Tensor]) -> str | None:
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return (
            "torch.jit.trace would record the iterations for this input alone; call the solver outside of the traced "
            "function, or use torch.compile, which runs the solver eagerly"
        )
    if _has(tensors, "torch.distributed.tensor", "DTensor"):
        return _DISTRIBUTED
    return None


def is_distributed(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor."""
    return _has([tensor], "torch.distributed.tensor", "DTensor")


def is_shard(placement: object) -> bool:
    """Return whether a placement of `torch.distributed.tensor` is a ``Shard(dim)``."""
    return _has([placement], "torch.distributed.tensor", "Shard")


def _has(values: Sequence[object], module: str, name: str) -> bool:
    """Return whether one of the values is of a class that the user may not have imported."""
    if (kinds := set(map(type, values))) <= _USUAL:
        return False
    # Look in `sys.modules`: if the module is not imported yet, no value is of its class.
    loaded = sys.modules.get(module)
    return loaded is not None and any([issubclass(kind, getattr(loaded, name)) for kind in kinds])


_USUAL = {Tensor, torch.nn.Parameter}
