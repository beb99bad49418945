"""The generalised minimal residual method."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Self

import torch
from torch import Tensor

import implicitdiff._torch.decisions as _decisions
from implicitdiff._calls import shows_call
from implicitdiff._implicit.linear import LinearSolver
from implicitdiff._torch.trees import Tree
from implicitdiff.linear_solve._arithmetic import Arithmetic, Iterations, OfOneRow, OfRecordedRows, RowScalar, norm
from implicitdiff.linear_solve._krylov import Cycle, iterative
from implicitdiff.linear_solve._outcome import OnFailure, check_integer

NOT_FINITE = "the iteration has produced values that are not finite: check that the operator is finite"


@shows_call
def solve_gmres(
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    maxiter: int | None = None,
    restart: int = 30,
    ridge: float = 0.0,
    preconditioner: Callable[[Tree], Tree] | None = None,
    init: Tree = None,
    on_failure: OnFailure = "raise",
) -> LinearSolver:
    r"""Make a restarted GMRES solver ``solve(matvec, b) -> x`` for ``A x = b``, ``A`` any non-singular operator.

    Minimises ``|b - A x|`` over a Krylov space of at most ``restart`` dimensions, which are stored, then restarts from
    the minimiser. In exact arithmetic and without a restart, the number of iterations for a diagonalisable ``A`` is at
    most the number of distinct eigenvalues. The preconditioner acts from the right, so the true residual is minimised
    and tested. Stopping test as in `solve_cg`.

    Args:
        restart: dimension of the Krylov space, an integer >= 1.
        rtol: relative tolerance; stops at ``|b - A x| <= max(rtol |b|, atol)``. None: ``eps^(2/3)`` of the dtype.
        atol: absolute tolerance, in the units of ``b``.
        maxiter: budget of iterations. None: ``max(100, 10 n)``; reaching this limit is a failure.
        ridge: solve ``(A + ridge I) x = b``; a number >= 0.
        preconditioner: ``r -> M^-1 r`` with ``M`` close to ``A``; changes the speed, not the solution.
        init: initial guess, a tree like ``b``; changes the speed, not the solution.
        on_failure: ``"raise"`` a `LinearSolveError`, ``"warn"`` with a `LinearSolveWarning`, or ``"ignore"``.

    Raises (when solving):
        LinearSolveError: no convergence with ``maxiter=None``, stagnation included, or values that are not finite.

    Reference:
        Saad and Schultz (1986); Saad, "Iterative Methods for Sparse Linear Systems", 2nd ed., algorithm 9.5.
        Orthogonalised by classical Gram-Schmidt, repeated as in Daniel, Gragg, Kaufman and Stewart, Mathematics of
        Computation 30 (1976); twice is enough: Giraud et al., Numerische Mathematik 101 (2005).

    Example:
        >>> import torch
        >>> from implicitdiff.linear_solve import solve_gmres
        >>> A = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> solve_gmres()(lambda v: A @ v, torch.tensor([1.0, 2.0])).round(decimals=4)
        tensor([-2.,  1.])
    """
    check_integer("solve_gmres", "restart", restart, 1)
    return iterative(
        "solve_gmres",
        partial(gmres, restart=restart),
        NOT_FINITE,
        rtol=rtol,
        atol=atol,
        maxiter=maxiter,
        ridge=ridge,
        preconditioner=preconditioner,
        init=init,
        on_failure=on_failure,
    )


def gmres(ops: Arithmetic, r: Tensor, target: RowScalar, limit: Iterations, *, restart: int) -> Cycle:
    """A `Method` for any operator: minimise over one Krylov space of at most `restart` dimensions."""
    m = min(restart, r.shape[-1])
    limit = ops.least(limit, m)

    def advance(space: AnySpace, active: RowScalar, left: Iterations) -> tuple[AnySpace, Iterations]:
        # Invariant: ``A M^-1 V = V_+ H`` with orthonormal ``V``, and ``residual`` is the least ``|r - A M^-1 V y|``.
        v = space.direction(active)
        return space.extended(v, ops.matvec(ops.precondition(v))), 1

    # A comparison with nan is False, so a row with a nan residual stops.
    space, used = ops.repeat(advance, _first_space(ops, r, limit, m), lambda space: space.residual > target, limit)
    # Right preconditioning: ``A M^-1 y = r``, and ``d = M^-1 y``.
    return Cycle(ops.precondition(space.minimiser()), used, ops.none, space.residual <= target)


def _first_space(ops: Arithmetic, r: Tensor, limit: Iterations, m: int) -> AnySpace:
    """Return the space of no dimension; it grows to `limit`, of which a recording knows the bound `m` alone."""
    if isinstance(ops, OfRecordedRows):
        return RecordedSpace.first(r, m)
    return SpaceOfOneRow(ops, r, limit) if isinstance(ops, OfOneRow) else SpaceOfRows(ops, r, limit)


class Space(ABC):
    """The Krylov space of ``r``, and the smallest residual over it (Saad, section 6.5.3).

    The orthonormal basis ``V`` satisfies ``A V = V_+ H`` with a Hessenberg matrix ``H`` of one row more than columns.
    One Givens rotation for each new column keeps ``H`` triangular. The rotations applied to ``|r| e_1`` give the
    right-hand side of the triangular system, and its last entry is the norm of the residual.

    Attributes:
        residual: norm of the smallest residual.
        next: the last image after orthogonalisation, not normalised: the next basis vector.
        length: norm of `next`.
    """

    residual: RowScalar
    next: Tensor
    length: RowScalar

    def __init__(self, ops: Arithmetic, r: Tensor, m: int) -> None:
        self.ops = ops
        self.next = r
        self.length = self.residual = ops.norm(r)
        self.dimension = 0
        # Basis vectors are rows of the last two dimensions, ``(m, n)``; the rows after `dimension` are not initialised.
        self.basis = r.new_empty(*r.shape[:-1], m, r.shape[-1])
        self.rounding = _rounding(r)

    @abstractmethod
    def direction(self, active: RowScalar) -> Tensor:
        """Add a basis vector and return it; zero in rows that are not active."""

    @abstractmethod
    def extend(self, w: Tensor) -> None:
        """Add the next column of ``H`` from the image of the last basis vector."""

    def extended(self, v: Tensor, w: Tensor) -> Self:
        """Return the space with the last basis vector `v`, whose image is `w`."""
        self.extend(w)
        return self

    @abstractmethod
    def minimiser(self) -> Tensor:
        """Return the combination of basis vectors with the smallest residual."""


class SpaceOfOneRow(Space):
    """Krylov space of one row, with ``H`` in lists of Python floats."""

    def __init__(self, ops: Arithmetic, r: Tensor, m: int) -> None:
        super().__init__(ops, r, m)
        self.columns: list[list[float]] = []
        self.rotations: list[tuple[float, float]] = []
        self.rhs = [self.residual]

    def direction(self, active: RowScalar) -> Tensor:
        self.last = self.basis[self.dimension]
        self.dimension += 1
        return torch.div(self.next, self.length, out=self.last)

    def extend(self, w: Tensor) -> None:
        column = self._orthogonalise(w)
        for i, (c, s) in enumerate(self.rotations):
            # Rotation ``i`` acts on the entries ``i`` and ``i + 1``.
            column[i], column[i + 1] = c * column[i] + s * column[i + 1], c * column[i + 1] - s * column[i]
        # A rotation (c, s) that maps (a, b) to (size, 0), applied to the right-hand side as well.
        b, a = column.pop(), column.pop()
        size = math.hypot(a, b)
        c, s = (a / size, b / size) if size else (1.0, 0.0)
        self.rotations.append((c, s))
        self.columns.append([*column, size])
        self.rhs[-1:] = c * self.rhs[-1], -s * self.rhs[-1]
        self.residual = abs(self.rhs[-1])

    def _orthogonalise(self, w: Tensor) -> list[float]:
        """Orthogonalise `w` against the basis. Return the coefficients and the length of the remainder."""
        V, last = self.basis[: self.dimension], self.last
        # For an operator near a multiple of the identity, w is nearly parallel to the last basis vector: remove this
        # component first, so that the test below compares lengths without it and rarely asks for a second pass.
        along = torch.dot(last, w).item()
        column = [0.0] * (self.dimension - 1) + [along]
        w, sizes = torch.add(w, last, alpha=-along), []
        for _ in range(2):
            overlap = torch.mv(V, w)
            w.addmv_(V.t(), overlap, alpha=-1)
            found, length = _decisions.of_leader([overlap])[0].tolist(), self.ops.norm(w)
            column = [a + b for a, b in zip(column, found, strict=True)]
            sizes.append(math.hypot(*found, length))
            # If w has shrunk below 0.7, cancellation may have left components in the space: orthogonalise again (Daniel
            # et al.). Twice is enough (Giraud et al.).
            if length >= 0.7 * sizes[-1]:
                break
        length = 0.0 if length <= self.rounding * math.hypot(sizes[0], along) else length
        self.next, self.length = w, length
        return [*column, length]

    def minimiser(self) -> Tensor:
        y = self.rhs[:-1]
        # Back substitution, column by column. A zero diagonal entry belongs to a direction without image: coefficient
        # 0.
        for j in reversed(range(self.dimension)):
            column = self.columns[j]
            y[j] = y[j] / column[j] if column[j] else 0.0
            y[:j] = [a - y[j] * h for a, h in zip(y, column[:j], strict=False)]
        return torch.mv(self.basis[: self.dimension].t(), self.basis.new_tensor(y))


class SpaceOfRows(Space):
    """Krylov spaces of several rows, with batched matrices. All rotations are kept as one product."""

    def __init__(self, ops: Arithmetic, r: Tensor, m: int) -> None:
        super().__init__(ops, r, m)
        self.size = self.residual
        # ``Q H = R``: `product` is ``Q``, ``(rows, m + 1, m + 1)``, and `triangle` is ``R``, ``(rows, m, m)``.
        self.product = torch.eye(m + 1, dtype=r.dtype, device=r.device).repeat(len(r), 1, 1)
        self.triangle = r.new_zeros(len(r), m, m)

    def direction(self, active: RowScalar) -> Tensor:
        # A division by infinity gives zero rows without a mask, and without 0 / 0.
        v = self.next / torch.where(active, self.length, math.inf)
        self.basis[:, self.dimension] = v
        self.dimension += 1
        return v

    def extend(self, w: Tensor) -> None:
        k = self.dimension
        # All earlier rotations at once: their product acts on the new column of H.
        column = torch.bmm(self._orthogonalise(w[:, None]), self.product[:, : k + 1, : k + 1].mT)
        # The last row of the product is still a unit vector, so ``b`` is the length of the remainder.
        a, b = column[..., -2:-1], column[..., -1:]
        size = torch.hypot(a, b)
        c, s = torch.where(size == 0, 1.0, a / size), torch.where(size == 0, 0.0, b / size)
        self.triangle[:, : k - 1, k - 1] = column[:, 0, :-2]
        self.triangle[:, k - 1, k - 1] = size[:, 0, 0]
        # ``[[c, s], [-s, c]]`` maps ``(a, b)`` to ``(size, 0)``, and acts on the last two rows of ``Q``.
        rotation = torch.cat([c, s, -s, c], dim=-1).reshape(-1, 2, 2)
        self.product[:, k - 1 : k + 1] = torch.bmm(rotation, self.product[:, k - 1 : k + 1])
        # The rotated right-hand side |r| Q e_1 is |r| times the first column of the product Q.
        self.residual = self.size * self.product[:, k, :1].abs()

    def _orthogonalise(self, w: Tensor) -> Tensor:
        overlap, self.next, self.length = _orthogonalised(w, self.basis[:, : self.dimension])
        return torch.cat([overlap, self.length], dim=-1)[:, None]

    def minimiser(self) -> Tensor:
        k = self.dimension
        # Solve R y = |r| Q e_1 without its last entry.
        rhs, diagonal = self.size * self.product[:, :k, 0], self.triangle.diagonal(dim1=-2, dim2=-1)
        # A row that stopped early has zeros on the diagonal: its coefficients there are 0.
        rhs = torch.where(diagonal[:, :k] == 0, 0.0, rhs)
        diagonal.masked_fill_(diagonal == 0, 1.0)
        y = torch.linalg.solve_triangular(self.triangle[:, :k, :k], rhs[..., None], upper=True)
        return torch.bmm(y.mT, self.basis[:, :k])[:, 0]


class RecordedSpace(NamedTuple):
    """Krylov spaces of several rows as tensors of fixed shapes, for a loop that is recorded once for all dimensions.

    Basis vectors and columns that do not exist yet are zero, and belong to an identity in the product of rotations.

    Attributes:
        size: ``|r|``.
        residual, next, length, basis: see `Space`.
        product, triangle: see `SpaceOfRows`.
        dimension: the number of basis vectors, a column.
    """

    size: Tensor
    residual: Tensor
    next: Tensor
    length: Tensor
    basis: Tensor
    product: Tensor
    triangle: Tensor
    dimension: Tensor

    @classmethod
    def first(cls, r: Tensor, m: int) -> RecordedSpace:
        """Return the space of ``r`` without a basis vector; it grows to `m`."""
        rows, n = r.shape
        size = norm(r)
        product = torch.eye(m + 1, dtype=r.dtype, device=r.device).repeat(rows, 1, 1)
        empty = r.new_zeros(rows, m, n), product, r.new_zeros(rows, m, m)
        return cls(size, size, r, size, *empty, torch.zeros_like(size, dtype=torch.int64))

    def direction(self, active: Tensor) -> Tensor:
        """Return the next basis vector; zero in rows that are not active."""
        return self.next / torch.where(active, self.length, math.inf)

    def extended(self, v: Tensor, w: Tensor) -> RecordedSpace:
        """Return the space with one more basis vector `v`, whose image is `w`."""
        # The place of the new vector and of the new column of H, among the entries of a column.
        places = torch.arange(self.product.shape[-1], device=v.device)
        here, below = places == self.dimension, places == self.dimension + 1
        basis = torch.where(here[:, :-1, None], v[:, None], self.basis)
        overlap, new, length = _orthogonalised(w[:, None], basis)
        column = torch.where(below, length, torch.cat([overlap, torch.zeros_like(length)], dim=-1))
        column = torch.bmm(column[:, None], self.product.mT)[:, 0]
        # The last entry is the length: no earlier rotation reaches it.
        a, first = (torch.where(here, each, 0.0) for each in (column, torch.ones_like(column)))
        a = a.sum(dim=-1, keepdim=True)
        size = torch.hypot(a, length)
        c, s = torch.where(size == 0, 1.0, a / size), torch.where(size == 0, 0.0, length / size)
        column = torch.where(here, size, torch.where(places < self.dimension, column, 0.0))
        triangle = torch.where(here[:, None, :-1], column[:, :-1, None], self.triangle)
        # Row `here` of the product, and row `below`, a unit vector until now; the rotation mixes the two.
        upper, lower = torch.bmm(first[:, None], self.product)[:, 0], below.to(v.dtype)
        upper, lower = c * upper + s * lower, c * lower - s * upper
        product = torch.where(below[..., None], lower[:, None], self.product)
        product = torch.where(here[..., None], upper[:, None], product)
        residual = self.size * lower[:, :1].abs()
        return RecordedSpace(self.size, residual, new, length, basis, product, triangle, self.dimension + 1)

    def minimiser(self) -> Tensor:
        """Return the combination of basis vectors with the smallest residual."""
        m = self.triangle.shape[-1]
        rhs, missing = self.size * self.product[:, :m, 0], self.triangle.diagonal(dim1=-2, dim2=-1) == 0
        # A direction without image, and one that does not exist, has the coefficient 0.
        rhs = torch.where(missing, 0.0, rhs)
        unit = torch.eye(m, dtype=torch.bool, device=rhs.device)
        triangle = torch.where(unit & missing[..., None], 1.0, self.triangle)
        y = torch.linalg.solve_triangular(triangle, rhs[..., None], upper=True)
        return torch.bmm(y.mT, self.basis)[:, 0]


AnySpace = Space | RecordedSpace


def _rounding(r: Tensor) -> float:
    """Return the relative size of the remainder that an image in the space leaves: rounding, and no direction."""
    return 10 * torch.finfo(r.dtype).eps


def _orthogonalised(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the products of `w` with the basis, the remainder, and the length of the remainder."""
    # Gram-Schmidt twice for all rows: a test for each row would wait for the device.
    size = norm(w)
    overlap = torch.bmm(w, basis.mT)
    w = torch.baddbmm(w, overlap, basis, alpha=-1)
    rest = torch.bmm(w, basis.mT)
    w = torch.baddbmm(w, rest, basis, alpha=-1)
    length = norm(w)
    # A remainder of rounding size has no direction: the space is invariant, and its minimiser solves the system (happy
    # breakdown; Saad, section 6.5.4).
    length = torch.where(length <= _rounding(w) * size, 0.0, length)
    return (overlap + rest)[:, 0], w[:, 0], length[:, 0]
