"""Search for the shape of a matvec's argument, for operators that are not square.

A matvec is a plain function, and does not state the shape of its argument. But a matvec raises for a wrong shape, so
shapes can be tried. Candidates are the sizes of the tensors that the matvec computes with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import implicitdiff._torch.trees as pytree
from implicitdiff._torch.trees import Tree

SHAPE_ERRORS = (RuntimeError, IndexError, TypeError)
"""Errors of torch and Python for an argument of another shape or nesting."""


def refuse_other_errors(error: Exception) -> None:
    """Raise an error of a subclass again: only the classes of `SHAPE_ERRORS` themselves mean a wrong shape."""
    if type(error) not in SHAPE_ERRORS:
        raise error


def domain_of(name: str, matvec: Callable[[Tree], Tree], b: Tree) -> Tensor | None:
    """Return a tensor of ones in the domain of `matvec`, for a `matvec` that refuses `b`; None if no shape is found, or
    if `b` is a tree.

    Tries the shapes ``(n, *b.shape[1:])`` for every size ``n`` of a tensor that `matvec` computes with. A length ``n``
    fits if the result is like `b`. If ``n + 1`` fits as well, `matvec` takes any length, and the domain is undecided.
    A length of 1 may fit by broadcasting, so 1 counts only if no other length fits.

    Raises:
        ValueError: several lengths fit.
    """
    if not isinstance(b, Tensor):
        return None
    with _Sizes() as seen:
        _accepts(matvec, b, b)
    fits = [n for n in sorted(seen.sizes) if _accepts(matvec, _ones(n, b), b)]
    fits = [n for n in fits if n != 1] or fits
    lengths = sorted({m for n in fits for m in (n, n + 1) if m == n or _accepts(matvec, _ones(m, b), b)})
    if len(lengths) > 1:
        raise ValueError(
            f"{name} accepts vectors of several lengths, {', '.join(map(str, lengths))} among them, but not the "
            f"length of b, {pytree.describe(b)}: pass init=, a tree like the unknowns, to name the length"
        )
    return _ones(lengths[0], b) if lengths else None


class _Sizes(TorchFunctionMode):
    """A mode that records the sizes of all tensors among the arguments of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        self.sizes.update(size for t in pytree.tensors((args, kwargs)) for size in t.shape)
        return func(*args, **kwargs)


def _ones(n: int, b: Tensor) -> Tensor:
    return torch.ones((n, *b.shape[1:]), dtype=b.dtype, device=b.device)


def _accepts(matvec: Callable[[Tree], Tree], v: Tensor, b: Tensor) -> bool:
    """True if `matvec` maps `v` to a tensor like `b`."""
    try:
        # A matvec may call `torch.autograd.grad`, also where the caller has gradients off.
        with torch.enable_grad():
            result = matvec(v)
    except SHAPE_ERRORS as error:
        refuse_other_errors(error)
        return False
    return isinstance(result, Tensor) and (result.shape, result.dtype) == (b.shape, b.dtype)
