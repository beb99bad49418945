"""Linear systems in the form that the algorithms receive.

An algorithm is independent of pytrees, transforms and batches. The algorithm receives a `System` of real vectors on
plain tensors, with one row for each pair of a lane and a right-hand side. A complex number is stored as a pair of real
numbers. Over the reals the adjoint is the transpose, and a map that is linear over the reals only is linear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial, reduce

import torch
from torch import Tensor

from implicitdiff._implicit.linearisation import OfOperands, Product
from implicitdiff._implicit.operators import Adjoint, Lane, Operator, Products, with_vectors
from implicitdiff._torch.lanes import over_levels, vmap
from implicitdiff._torch.trees import Leaves

RowMap = Callable[[Tensor], Tensor]
"""A linear map that is applied to each row of a matrix."""


class Vectors:
    """The conversion of lists of leaves with leading batch dimensions to rows of real numbers, and back.

    All rows have one dtype: the widest real dtype of the leaves and of `dtype`.
    """

    def __init__(self, like: Leaves, batch: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
        self.batch = tuple(batch)
        self.shapes, self.dtypes, self.sizes = [], [], []
        for t in like:
            self.shapes.append(shape := t.shape[len(self.batch) :])
            self.dtypes.append(t.dtype)
            # Rows are real, so a complex number counts twice.
            self.sizes.append(math.prod(shape) * (2 if t.dtype.is_complex else 1))
        self.dimension = sum(self.sizes)
        self.device = like[0].device
        # The precision of the leaves, but a dtype of at least single precision: LAPACK has no half precision.
        self.eps, self.dtype = _precision(tuple(self.dtypes), dtype)

    def ravel(self, leaves: Sequence[Tensor], lead: int | None = None) -> Tensor:
        """Return leaves ``(*batch, *shape)`` as rows ``(prod(batch), dimension)``, with `lead` as a first dimension."""
        rows = (math.prod(self.batch),) if lead is None else (lead, math.prod(self.batch))
        flat = []
        for t, n in zip(leaves, self.sizes, strict=True):
            # Not `view_as_real`: the strides that its derivative requires may be absent in a slice of a row.
            real = torch.stack([t.real, t.imag], dim=-1) if t.is_complex() else t
            row = real.reshape(*rows, n)
            # A conversion without effect takes ten times as long as the test, in each product.
            flat.append(row if row.dtype == self.dtype else row.to(self.dtype))
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=-1)

    def unravel(self, rows: Tensor) -> Leaves:
        """Return leaves from rows: the inverse of `ravel`. A leading dimension of the rows stays in front."""
        lead = (*rows.shape[:-2], *self.batch)
        if len(self.sizes) == 1:
            return [_leaf(rows, (*lead, *self.shapes[0]), self.dtypes[0])]
        parts = rows.split(self.sizes, dim=-1)
        return [_leaf(p, (*lead, *s), d) for p, s, d in zip(parts, self.shapes, self.dtypes, strict=True)]


@cache
def _precision(dtypes: tuple[torch.dtype, ...], least: torch.dtype) -> tuple[float, torch.dtype]:
    """Return the machine epsilon of the least precise dtype, and the widest real dtype, at least `least`."""
    return max([torch.finfo(d).eps for d in dtypes]), reduce(torch.promote_types, [d.to_real() for d in dtypes], least)


def _leaf(part: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    if dtype.is_complex:
        pairs = part.reshape(*shape, 2).to(dtype.to_real())
        return torch.complex(pairs[..., 0], pairs[..., 1])
    leaf = part.reshape(shape)
    return leaf if leaf.dtype == dtype else leaf.to(dtype)


@dataclass(frozen=True)
class System:
    """``A x = b`` for an algorithm: ``lanes`` matrices of shape ``(m, n)``, with ``columns`` right-hand sides each.

    Attributes:
        b: the right-hand sides, ``(lanes * columns, m)``, lane by lane; each row scaled to largest entry 1, or zero.
        unknowns: ``n``.
        is_square: whether the rows of ``x`` and of ``b`` represent trees of the same structure; then ``m = n``.
        eps: the precision of the least precise leaf, and so of the products.
        scale: the divisors of the rows of ``b``, ``(lanes * columns, 1)``.
        start: an initial guess in the form of ``x``, or None for zero.
        lanes: the number of matrices.
        matvec: ``v -> A v`` on rows.
        rmatvec: ``u -> A^T u`` on rows.
        precondition: ``r -> M^-1 r`` on rows, or None.
        of_range: whether `precondition` acts on rows like ``b``; else, or if square, on rows like ``x``.
        materialise: ``() -> A``, as ``(lanes, m, n)``.
        is_adjoint: whether the matrix is the adjoint of an operator, as for a cotangent ``b``.
    """

    b: Tensor
    unknowns: int
    is_square: bool
    eps: float
    scale: Tensor
    start: Tensor | None
    lanes: int
    matvec: RowMap
    rmatvec: RowMap
    precondition: RowMap | None
    of_range: bool
    materialise: Callable[[], Tensor]
    is_adjoint: bool

    def shifted(self, ridge: float) -> System:
        """Return the system of ``A + ridge I``."""
        if not ridge:
            return self
        if not self.is_square:
            raise AssertionError("refused at the call")

        def materialise() -> Tensor:
            a = self.materialise()
            return a + ridge * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)

        return replace(
            self,
            matvec=lambda v: self.matvec(v) + ridge * v,
            rmatvec=lambda u: self.rmatvec(u) + ridge * u,
            materialise=materialise,
        )


def make_system(
    operator: Operator,
    operands: Leaves,
    b: Leaves,
    lanes: Sequence[int],
    columns: Sequence[int],
    precondition: Callable[[], Product] | None,
    start: Leaves | None,
    lane: Lane | None = None,
) -> tuple[Vectors, System]:
    """Return the system of ``A(operands) x = b`` from plain tensors, and the conversion of ``x`` to leaves.

    The leaves of ``b`` have shape ``(*lanes, *columns, *shape)``; `operator` and `precondition` act on ``(*lanes,
    *shape)``. For a `Rectangular` operator the system contains its block only. `lane` is the operator of one lane, or
    None if unknown.
    """
    blocks, batch = operator.blocks, (*lanes, *columns)
    # Conversions of all leaves, then of each side of a rectangular block; a square system needs the first only.
    whole = Vectors(b, batch)
    one_column = first_column(b, len(lanes), len(columns))
    is_square = blocks.domain == blocks.range
    sides = [whole, whole] if is_square else [Vectors(b[block], batch, whole.dtype) for block in blocks[:2]]
    domain, range_ = sides
    of_range = blocks.smaller == blocks.range
    smaller = range_ if of_range else domain
    # All columns share the matrix, so the matrix is formed without columns.
    one = [Vectors(one_column[block], lanes, whole.dtype) for block in blocks[:2]] if columns else sides
    products = operator.block_products(operands, one_column, OfOperands)

    def rows(make: Callable[[], Product], source: Vectors, to: Vectors) -> RowMap:
        # Linearise at the first use only: many algorithms need one of the products.
        product = cache(lambda: map_columns(make(), len(lanes), len(columns)))
        return lambda v: to.ravel(product()(source.unravel(v)))

    # Each right-hand side is scaled to largest entry 1, so that squares and products neither overflow nor underflow.
    right = range_.ravel(b[blocks.range])
    scale = right.abs().amax(dim=-1, keepdim=True)
    # A row of zeros keeps the scale 1, since 0 / 0 is nan.
    scale = torch.where(scale > 0, scale, 1.0)
    system = System(
        b=right / scale,
        unknowns=domain.dimension,
        is_square=is_square,
        eps=whole.eps,
        scale=scale,
        start=None if start is None else domain.ravel(start[blocks.domain]) / scale,
        lanes=math.prod(lanes),
        matvec=rows(products.matvec, domain, range_),
        rmatvec=rows(products.rmatvec, range_, domain),
        precondition=None if precondition is None else rows(precondition, smaller, smaller),
        of_range=of_range,
        is_adjoint=isinstance(operator, Adjoint),
        materialise=partial(_materialise, operator, products, one[0], one[1])
        if lane is None or not lanes
        else partial(_materialise_each, lane, one_column, lanes, whole.dtype),
    )
    return domain, system


def first_column(leaves: Leaves, at: int, count: int) -> Leaves:
    """Return the leaves at index 0 of `count` dimensions from position `at` on; zeros for a dimension of size 0."""
    for _ in range(count):
        leaves = [t.select(at, 0) if t.shape[at] else t.new_zeros(t.shape[:at] + t.shape[at + 1 :]) for t in leaves]
    return leaves


def map_columns(product: Product, at: int, count: int) -> Product:
    """Return the product on leaves with `count` more batch dimensions from position `at` on."""
    for _ in range(count):
        product = vmap(product, at, at)
    return product


def _materialise(operator: Operator, products: Products, domain: Vectors, range_: Vectors, times: int = 1) -> Tensor:
    """Return the matrices of all lanes. `times` matrices are materialised at once, by an outer vmap."""
    rows_first = operator.rows_first
    product = products.rmatvec() if rows_first else products.matvec()
    source, to = (range_, domain) if rows_first else (domain, range_)
    lanes, n = math.prod(source.batch), source.dimension
    # The lanes share each unit vector, as a view of zero strides.
    basis = torch.eye(n, dtype=source.dtype, device=source.device)[:, None, :].expand(n, lanes, n)
    if n == 1:
        images = to.ravel(product(source.unravel(basis[0])))[None]
    else:
        # A bound on memory: at most `_MAX_HELD_NUMBERS` numbers of images at once.
        at_once = max(1, _MAX_HELD_NUMBERS // (times * lanes * max(n, to.dimension)))
        each = with_vectors(product, operator.one_by_one, at_once if at_once < n else None)
        images = to.ravel(each(source.unravel(basis)), lead=n)
    # images[i] is, for each lane, row i of A (products with the adjoint) or column i of A.
    return images.permute(1, 0, 2) if rows_first else images.permute(1, 2, 0)


def _materialise_each(lane: Lane, like: Leaves, lanes: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the matrices of all lanes, with the vmap over unit vectors inside the vmap over lanes.

    In the other order, a product with a matrix that differs between lanes would copy the matrix for each unit vector.
    """
    one, blocks, count = first_column(like, 0, len(lanes)), lane.operator.blocks, math.prod(lanes)
    domain, range_ = (Vectors(one[block], (), dtype) for block in blocks[:2])

    def matrix(operands: Leaves, _: Tensor) -> Tensor:
        products = lane.operator.block_products(operands, one)
        return _materialise(lane.operator, products, domain, range_, count)[0]

    # vmap requires a batched argument, and all operands may be shared by the lanes of a level.
    batched = torch.empty(tuple(lanes), dtype=dtype, device=domain.device)
    matrices: Tensor = over_levels(matrix, [(list(dims), 0) for dims in lane.levels])(lane.operands, batched)
    return matrices.reshape(count, range_.dimension, domain.dimension)


_MAX_HELD_NUMBERS = 2**22
