"""What a matvec acts on, where it is not a tree like the right-hand side.

A matvec is a plain function: what it takes is nowhere written. A shape that it does not take makes it raise, so a
shape can be tried. Candidates are the sizes of the tensors that it computes with; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import implicitdiff._torch.trees as pytree

SHAPE_ERRORS = (RuntimeError, IndexError, TypeError)
"""What torch raises for a shape, or a tree, that does not fit."""


def refuse_other_errors(error: Exception) -> None:
    """Raise an error of a subclass, which says something else."""
    if type(error) not in SHAPE_ERRORS:
        raise error


def domain_of(name: str, matvec: Callable[[Any], Any], b: Any) -> Tensor | None:
    """A tensor like those that `matvec` acts on, found for a `b` that it does not take, or None if there is none, or
    if `b` is not one tensor.

    Tried are the shapes ``(n, *b.shape[1:])`` for every size ``n`` of a tensor that `matvec` computes with. One is
    taken if the result is like `b`, and if ``n + 1`` fails: a matvec that takes both would take any. A length of 1
    broadcasts, and is taken only if there is no other.

    Raises:
        ValueError: several lengths work.
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
            f"{name} takes vectors of several lengths, {', '.join(map(str, lengths))} among them, none of which is "
            f"that of b, {pytree.describe(b)}: pass init=, a tree like the unknowns, which says what it acts on"
        )
    return _ones(lengths[0], b) if lengths else None


class _Sizes(TorchFunctionMode):
    """Notes the sizes of all tensors that are computed with."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.sizes.update(size for t in pytree.tensors((args, kwargs)) for size in t.shape)
        return func(*args, **kwargs)


def _ones(n: int, b: Tensor) -> Tensor:
    return torch.ones((n, *b.shape[1:]), dtype=b.dtype, device=b.device)


def _accepts(matvec: Callable[[Any], Any], v: Tensor, b: Tensor) -> bool:
    """Whether it takes `v` to a tensor like `b`."""
    try:
        with torch.enable_grad():
            result = matvec(v)
    except SHAPE_ERRORS as error:
        refuse_other_errors(error)
        return False
    return isinstance(result, Tensor) and (result.shape, result.dtype) == (b.shape, b.dtype)
