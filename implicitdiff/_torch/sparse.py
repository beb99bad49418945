"""Products with sparse matrices under transforms of torch.func.

torch differentiates ``S @ v`` in reverse mode alone, and has batching rules for few spellings. Under a transform the
product is computed by gathers and sums of dense tensors, which every transform supports::

    (S v)_i = sum over the entries (i, j) of S_ij v_j.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import implicitdiff._torch.context as _context
import implicitdiff._torch.switches as _switches
import implicitdiff._torch.tracking as _tracking
from implicitdiff._torch.dispatch import tensors_among
from implicitdiff._torch.modes import no_modes

# A mode receives each spelling of the product as another function; the operator ``@`` arrives as `matmul`.
_REVERSED = {Tensor.__rmatmul__}
_PRODUCTS = {torch.matmul, torch.mm, torch.mv, torch.sparse.mm, *_REVERSED}
_PRODUCTS |= {Tensor.matmul, Tensor.mm, Tensor.mv, Tensor.__matmul__}
_BLOCKED = {torch.sparse_bsr, torch.sparse_bsc}


class SparseProducts(TorchFunctionMode):
    """The mode that runs every operation on a sparse tensor by `call`."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        with no_modes():
            is_sparse = have_sparse(args, kwargs)
        return call(func, args, kwargs) if is_sparse else func(*args, **kwargs)


def have_sparse(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """True if an argument of a torch function is a sparse tensor."""
    return any([t.layout is not torch.strided for t in tensors_among(args, kwargs)])


def call(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return the result of a torch function of sparse tensors."""
    tensors = tensors_among(args, kwargs)
    if func in _PRODUCTS and len(args) == 2 and not kwargs:
        if _runs_natively(tensors) and not _have_blocks(tensors):
            return func(*args, **kwargs)
        if not (all(map(_is_constant, tensors)) and all(map(_is_sparse, tensors))):
            return _sparse_product(*(reversed(args) if func in _REVERSED else args))
    if _runs_natively(tensors):
        return func(*args, **kwargs)
    if all(map(_is_constant, tensors)):
        # A constant of all transforms, such as a transpose of a constant matrix, is computed without levels.
        with _switches.no_levels():
            return func(*args, **kwargs)
    try:
        return func(*args, **kwargs)
    except (RuntimeError, NotImplementedError, IndexError) as error:
        layouts = sorted({_layout(t) for t in tensors_among(args, kwargs)} - {"strided"})
        raise NotImplementedError(
            f"torch cannot transform {getattr(func, '__name__', func)} of a tensor in the layout "
            f"{' or '.join(layouts)} ({str(error).splitlines()[0]}); write it as a product S @ v with a matrix S, or "
            "use S.to_dense()"
        ) from error


def _layout(tensor: Tensor) -> str:
    with no_modes():
        return str(tensor.layout).removeprefix("torch.")


def _is_sparse(tensor: Tensor) -> bool:
    with no_modes():
        return tensor.layout is not torch.strided


def _runs_natively(tensors: Sequence[Tensor]) -> bool:
    """True if no transform runs and no tensor has autograd history.

    With history, a later backward pass under vmap would meet sparse kernels without batching rules.
    """
    return _context.now().is_outside and not any(map(_tracking.is_tracked, tensors))


def _have_blocks(tensors: Sequence[Tensor]) -> bool:
    """True if a tensor has a blocked layout, for which torch lacks some products."""
    with no_modes():
        return any(t.layout in _BLOCKED for t in tensors)


def _is_constant(tensor: Tensor) -> bool:
    return _tracking.are_constant([tensor]) and not tensor.requires_grad


def _sparse_product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` for one sparse and one dense operand."""
    if _is_sparse(a) and _is_sparse(b):
        raise NotImplementedError(
            f"torch cannot transform the product of two sparse matrices, in the layouts {_layout(a)} and "
            f"{_layout(b)}; multiply the vector by one after the other, or use to_dense() of one"
        )
    if a.shape[-1] != b.shape[-2:][0]:
        raise RuntimeError(f"sizes do not match in the product of {list(a.shape)} and {list(b.shape)}")
    if a.dim() == 1:
        return _sparse_product(a[None], b)[0]
    if b.dim() == 1:
        return _sparse_product(a, b[:, None])[:, 0]
    if _is_sparse(a):
        return _summed(*_entries(a), a.shape[0], b)
    # a S = (S' a')'
    values, rows, columns = _entries(b)
    return _summed(values, columns, rows, b.shape[1], a.mT).mT


def _entries(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the values of a sparse matrix, their rows and their columns."""
    with _switches.no_levels() if _is_constant(matrix) else nullcontext():
        # Duplicate coordinates are summed, and indices of a coalesced tensor can be read.
        coordinates = matrix.to_sparse_coo().coalesce()
        rows, columns = coordinates.indices()
        return coordinates.values(), rows, columns


def _summed(values: Tensor, rows: Tensor, columns: Tensor, size: int, v: Tensor) -> Tensor:
    """Return the product of a sparse matrix with `size` rows and matrices ``v``."""
    # S_ij v_j for each entry, added up by rows.
    terms = values[:, None] * v.index_select(-2, columns)
    shape = (*v.shape[:-2], size, v.shape[-1])
    # Out of place: `index_add_` of batched terms into unbatched zeros raises under vmap.
    sums: Tensor = torch.zeros(shape, dtype=terms.dtype, device=v.device).index_add(-2, rows, terms)
    return sums
