"""Projections onto matrices of given row and column sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import implicitdiff._closures.modes as _modes
import implicitdiff._torch.compile as _compile
import implicitdiff._torch.functions as _functions
import implicitdiff._torch.levels as _levels
import implicitdiff._torch.settings as _settings
import implicitdiff._torch.switches as _switches
import implicitdiff._torch.trees as pytree
from implicitdiff._torch.modes import uncached
from implicitdiff._torch.trees import Leaves, Number, Tree
from implicitdiff._torch.values import refuse_valueless
from implicitdiff.projections._point import Point, check_vector, holds
from implicitdiff.solvers._loop.status import Status, report_failures


def transport(v: Tensor, row_sums: Number, column_sums: Number) -> Tensor:
    """Project a matrix onto the transport polytope ``{X: X >= 0, X 1 = row_sums, X' 1 = column_sums}``.

    With dual potentials ``f`` and ``g`` and the support ``s``::

        X_ij = max(v_ij + f_i + g_j, 0),    s = {ij: X_ij > 0}

    Newton's method on the dual, a piecewise quadratic function of ``f`` and ``g``, finds ``s``, in double precision,
    for each lane, below all transforms. For fixed ``s``, ``X`` is linear in ``v`` and the sums: ``f`` and ``g`` solve
    the equations ``sum of X_ij over s in a row or column = its sum``. One equation is redundant, and the solution of
    least norm is taken. Derivatives in the sums therefore hold for changes with equal totals.

    If ``s`` splits into blocks, as at a permutation, the derivative in the sums jumps. The blocks are then joined by
    entries of value 0 that become positive first, which gives the derivative of one side. Joining entries do not move
    with ``v``. If ``-inf`` keeps blocks apart, the totals of each block have to stay equal.

    A row or a column of sum 0 is a block too. Entries ``-inf`` of ``v`` give 0.

    Args:
        v: a matrix of shape (m, n).
        row_sums: a vector of shape (m,), or a number for all rows, at least 0.
        column_sums: of shape (n,), likewise, with an equal total up to rounding.

    Raises:
        TypeError: ``v`` is not a floating-point tensor.
        ValueError: ``v`` is not a matrix, a sum is negative, or the totals differ.
        ConvergenceError: no matrix has these sums and 0 where ``v`` is ``-inf``, or ``v`` is not finite otherwise.

    References:
        Blondel, Seguy and Rolet, "Smooth and Sparse Optimal Transport", AISTATS 2018, section 3; Lorenz, Manns and
        Meyer, "Quadratically Regularized Optimal Transport", Appl. Math. Optim. 83 (2021), section 3, for the method.

    Example:
        >>> from implicitdiff.projections import transport
        >>> transport(torch.tensor([[1.0, 0.0], [0.0, 0.5]]), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
        tensor([[0.6250, 0.3750],
                [0.3750, 1.6250]])
    """
    return _onto_transport("transport", v, row_sums, column_sums)


def birkhoff(v: Tensor) -> Tensor:
    """Project a matrix onto the Birkhoff polytope, the set of doubly stochastic matrices.

    Equals `transport` with all sums 1.

    Args:
        v: a matrix of shape (n, n).

    Raises:
        TypeError, ValueError, ConvergenceError: as `transport` does.

    Example:
        >>> from implicitdiff.projections import birkhoff
        >>> birkhoff(torch.tensor([[1.0, 0.5], [0.0, 0.5]]))
        tensor([[0.7500, 0.2500],
                [0.2500, 0.7500]])
    """
    _check_matrix("birkhoff", v)
    if v.shape[0] != v.shape[1]:
        raise ValueError(f"birkhoff: v must be a square matrix, got {pytree.describe(v)}")
    return _onto_transport("birkhoff", v, 1.0, 1.0)


def _check_matrix(function: str, v: Tree) -> None:
    Point.of(function, v)
    if not isinstance(v, Tensor) or v.ndim != 2:
        raise ValueError(f"{function}: v must be a matrix, got {pytree.describe(v)}")


def _onto_transport(function: str, v: Tensor, row_sums: Number, column_sums: Number) -> Tensor:
    _check_matrix(function, v)
    rows = _sums(function, "row_sums", row_sums, v, v.shape[0])
    columns = _sums(function, "column_sums", column_sums, v, v.shape[1])
    # Totals are compared up to the rounding of the coarsest dtype given.
    tensors = [t for t in (v, row_sums, column_sums) if isinstance(t, Tensor)]
    coarsest = max(torch.finfo(t.dtype).eps for t in tensors)
    gap = (rows.detach().sum() - columns.detach().sum()).abs()
    if not holds(gap <= 4 * (sum(v.shape) + 1) * coarsest * rows.detach().sum()):
        raise ValueError(f"{function}: row_sums and column_sums must have equal totals, got different ones")
    if not v.numel():
        return v
    packed = torch.cat([t.detach().double() for t in (v.flatten(), rows, columns)])
    # Derivatives in the sums alone need joined blocks.
    joined = len(tensors) > 1
    x, support, inverse = _below(function, partial(_search, function, (len(v), v.shape[1]), joined), packed)
    # x is a constant of double precision. All terms added to x are zero, and carry the derivative of the linear
    # equations for the support: dX = dv + df + dg on s, with row and column sums d(sums).
    moves = torch.where(support, v - v.detach(), 0.0)
    short = torch.cat([rows - rows.detach() - moves.sum(1), columns - columns.detach() - moves.sum(0)])
    # ``sum over s of (dv + df + dg) = d(sums)``: the pseudoinverse of the matrix gives ``df`` and ``dg`` of least norm.
    f, g = (inverse.to(v.dtype) @ short).split(list(v.shape))
    return x.to(v.dtype) + moves + torch.where(support, f[:, None] + g, 0.0)


def _sums(function: str, name: str, value: Number, v: Tensor, count: int) -> Tensor:
    check_vector(function, name, value, count)
    sums = value if isinstance(value, Tensor) else torch.full((), value, dtype=v.dtype, device=v.device)
    if not holds((sums >= 0) & sums.isfinite()):
        raise ValueError(f"{function}: {name} must be at least 0 and finite in every entry")
    return sums.to(v.dtype).expand(count)


# --- below the transforms ---------------------------------------------------------------------------------------------


@_compile.outside_compile
@_modes.one_operation
def _below(function: str, search: Callable[[Tensor], Leaves], values: Tensor) -> Leaves:
    """Run `search` below all transforms, on a row for each lane. The results are constants for every derivative."""
    refuse_valueless(function, [values])
    operands, layers = _levels.without_batch_layers(_levels.plain_values(_modes.alias([values])))
    with _modes.without_own_modes(), uncached(), _switches.nothing_running(), _settings.full_precision():
        (plain,) = _functions.out_of_inference(operands)
        lanes = plain.shape[:-1]
        found = [t.reshape(lanes + t.shape[1:]) for t in search(plain.reshape(lanes.numel(), plain.shape[-1]))]
    # The first dimension belongs to the outermost vmap.
    for layer in reversed(layers):
        found = [_levels.add_layer(t, 0, layer) for t in found]
    return found


class _State(NamedTuple):
    """Outcome of the iteration for each lane."""

    iter_num: Tensor
    error: Tensor
    target: Tensor
    status: Tensor


def _search(function: str, shape: tuple[int, int], joined: bool, values: Tensor) -> Leaves:
    """Return the solutions of all lanes, their supports, and pseudoinverses of the equations for ``f`` and ``g``.

    With `joined`, the blocks of a support are joined.
    """
    m, n = shape
    v, a, b = values.split([m * n, m, n], dim=-1)
    problem = _Transport.of(v.unflatten(-1, shape), a, b)
    potentials, state = problem.solve()
    report_failures(function, state, "raise", budget=False)
    return problem.finish(potentials, joined)


_LIMIT = 500
_EPS = torch.finfo(torch.float64).eps


class _Transport(NamedTuple):
    """The dual problem ``min sum of max(v_ij + f_i + g_j, 0)^2 / 2 - row_sums.f - column_sums.g`` of each lane.

    Potentials ``y = (f, g)`` are one vector of ``m + n`` entries.

    Attributes:
        v: ``(lanes, m, n)``.
        sums: row sums, then column sums, ``(lanes, m + n)``.
        zero: entries in a row or a column of sum 0, where the solution is 0, ``(lanes, m, n)``.
    """

    v: Tensor
    sums: Tensor
    zero: Tensor

    @classmethod
    def of(cls, v: Tensor, a: Tensor, b: Tensor) -> _Transport:
        # Totals may differ by rounding; scale both to their mean, so that the equations have a solution. Both totals
        # are the sum of all entries of the solution.
        totals = a.sum(-1, keepdim=True), b.sum(-1, keepdim=True)
        mean = (totals[0] + totals[1]) / 2
        a, b = (t * torch.where(total == 0, 1.0, mean / total) for t, total in zip((a, b), totals, strict=True))
        zero = (a == 0)[..., None] | (b == 0)[..., None, :]
        return cls(v, torch.cat([a, b], dim=-1), zero)

    def solve(self) -> tuple[Tensor, _State]:
        """Minimise the dual by a semismooth Newton method with a line search. Return potentials and outcome."""
        y = self._start()
        iter_num = torch.zeros(len(y), dtype=torch.long, device=y.device)
        for _ in range(_LIMIT):
            # Newton's method: y + t H^+ (sums - sums of X), for lanes that are not done.
            short, infeasible = self.short(y), self._is_proof(y)
            error, target = short.abs().amax(-1), self._target(y)
            active = ~(error <= target) & ~infeasible & error.isfinite()
            if not bool(active.any()):
                break
            iter_num = iter_num + active
            d = self._direction(y, short)
            y = torch.where(active[:, None], y + self._length(y, d, short) * d, y)
        # Lanes still active have used up the limit.
        status = torch.where(active, int(Status.BUDGET_SPENT), int(Status.CONVERGED))
        status = torch.where(error.isfinite(), status, int(Status.DIVERGED))
        status = torch.where(infeasible, int(Status.INFEASIBLE), status)
        return y, _State(iter_num, error, target, status)

    def _is_proof(self, y: Tensor) -> Tensor:
        """True if potentials prove that the polytope is empty.

        Every matrix X of the polytope has ``row_sums.f + column_sums.g = sum of X_ij (f_i + g_j)``, which is at most
        the total times the largest ``f_i + g_j`` over entries other than ``-inf``. A larger value is a certificate.
        """
        f, g = self._split(y)
        # Only entries that may be positive bound the right-hand side.
        largest = torch.where(self.zero | (self.v == -math.inf), -math.inf, f + g).amax((-2, -1)).clamp(min=0.0)
        total, rounding = self.sums.sum(-1) / 2, 4 * y.shape[-1] * _EPS * y.abs().amax(-1)
        return (self.sums * y).sum(-1) > total * (largest + rounding)

    def finish(self, y: Tensor, joined: bool) -> Leaves:
        """Return solution, support and pseudoinverse at potentials, with one step of refinement."""
        # A value within the rounding of the sums counts as 0.
        support = self.values(y) > self._target(y)[:, None, None]
        inverse = torch.linalg.pinv(self._matrix(support), hermitian=True)
        x = torch.where(support, self.values(y), 0.0)
        # Solve the linear equations for the support once more, for the residual that the iteration left.
        f, g = self._split((inverse @ (self.sums - _margins(x))[..., None])[..., 0])
        x = torch.where(support, x + f + g, 0.0).clamp(min=0.0)
        if joined:
            whole = self._joined(y, support, inverse)
            if bool((whole != support).any()):
                support, inverse = whole, torch.linalg.pinv(self._matrix(whole), hermitian=True)
        return [x, support, inverse]

    def _joined(self, y: Tensor, support: Tensor, inverse: Tensor) -> Tensor:
        """Return the support with as many further entries as join its blocks.

        Raising ``f`` and lowering ``g`` in one block by equal amounts leaves the dual optimal, until an entry in a row
        of the block and a column outside (or the reverse, for lowering ``f``) reaches 0. At this end of the set of dual
        solutions, that entry is the next to become positive: it joins the blocks.
        """
        m, n = self.v.shape[1:]
        matrix = self._matrix(support)
        # The null space has one vector (1, -1) for each block, so its projector is +-1 / size within a block, 0
        # outside.
        eye = torch.eye(m + n, dtype=y.dtype, device=y.device)
        blocks = (eye - inverse @ matrix).abs() > 0.5 / (m + n)
        is_row = torch.arange(m + n, device=y.device) < m
        lanes = torch.arange(len(y), device=y.device)
        y = self._feasible(y)
        inside = blocks[:, 0]
        for _ in range(m + n - 1):
            if bool(inside.all()):
                break
            f, g = self._split(y)
            # Distances of values below 0. Raising f of the block by a gap ahead, or lowering f by a gap behind, brings
            # the entry to 0.
            gaps = -(self.v + f + g)
            ahead = torch.where(inside[:, :m, None] & ~inside[:, None, m:], gaps, math.inf).flatten(1).min(-1)
            behind = torch.where(~inside[:, :m, None] & inside[:, None, m:], gaps, math.inf).flatten(1).min(-1)
            is_ahead = ahead.values <= behind.values
            step, at = (torch.where(is_ahead, p, q) for p, q in zip(ahead, behind, strict=True))
            found = step.isfinite()
            shift = torch.where(found, torch.where(is_ahead, step, -step), 0.0)[:, None]
            y = y + torch.where(inside, torch.where(is_row, shift, -shift), 0.0)
            row, column = at // n, at % n
            support = support.clone()
            support[lanes, row, column] |= found
            outside = torch.where(is_ahead, m + column, row)
            # If only -inf lies between `inside` and the rest, continue with another block.
            outside = torch.where(found, outside, (~inside).to(torch.int8).argmax(-1))
            inside = inside | blocks[lanes, outside]
        return support

    def _feasible(self, y: Tensor) -> Tensor:
        """Lower the potentials of rows and columns of sum 0 until no value in them is positive."""
        f, g = self._split(y)
        a, b = self._split(self.sums)
        top = torch.where(b > 0, self.v + g, -math.inf).amax(-1, keepdim=True)
        # v_ij + f_i + g_j <= 0 for all j is f_i <= -max (v_ij + g_j).
        f = torch.where(a > 0, f, torch.where(top == -math.inf, 0.0, -top))
        top = (self.v + f).amax(-2, keepdim=True)
        g = torch.where(b > 0, g, torch.where(top == -math.inf, 0.0, -top))
        return torch.cat([f[..., 0], g[..., 0, :]], dim=-1)

    def values(self, y: Tensor) -> Tensor:
        """Return ``v + f + g``, the solution before the cut at 0, with -inf in rows and columns of sum 0."""
        f, g = self._split(y)
        # Stationarity of ``|X - v|^2 / 2 - f.(X 1 - row_sums) - g.(X'1 - column_sums)`` on ``X >= 0``.
        return self.v.masked_fill(self.zero, -math.inf) + f + g

    def short(self, y: Tensor) -> Tensor:
        """Return the deficit of the row and column sums, the negative gradient of the dual."""
        return self.sums - _margins(self.values(y).clamp(min=0.0))

    def _split(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return f as a column and g as a row, which broadcast to a matrix."""
        f, g = y.split(list(self.v.shape[1:]), dim=-1)
        return f[..., None], g[..., None, :]

    def _target(self, y: Tensor) -> Tensor:
        """Rounding error of the sums of ``v + f + g``: the iteration cannot reduce the deficit below."""
        return 8 * y.shape[-1] * _EPS * (self.sums.amax(-1) + y.abs().amax(-1))

    def _start(self) -> Tensor:
        """Return potentials after 5 rounds of exact minimisation in f, then in g."""
        a, b = self.sums.split(list(self.v.shape[1:]), dim=-1)
        f, g = torch.zeros_like(a), torch.zeros_like(b)
        v = self.v.masked_fill(self.zero, -math.inf)
        # Each is a batch of projections onto simplices. The rounds are cheap next to a Newton step, and bring it near.
        for _ in range(5):
            f = _potential(v + g[..., None, :], a)
            g = _potential((v + f[..., None]).mT, b)
        return torch.cat([f, g], dim=-1)

    def _matrix(self, support: Tensor) -> Tensor:
        """Return the Hessian of the dual for a support s: ``[[diag(s 1), s], [s', diag(s' 1)]]``."""
        # The sum of row ``i`` is ``sum_j max(v_ij + f_i + g_j, 0)``: its derivative in ``f_i`` counts the row's
        # support, and its derivative in ``g_j`` is ``s_ij``.
        s = support.to(self.v.dtype)
        upper = torch.cat([torch.diag_embed(s.sum(-1)), s], dim=-1)
        lower = torch.cat([s.mT, torch.diag_embed(s.sum(-2))], dim=-1)
        return torch.cat([upper, lower], dim=-2)

    def _direction(self, y: Tensor, short: Tensor) -> Tensor:
        """Return the Newton direction. The Hessian is singular, (1, -1) at least, so a small multiple of I is added."""
        matrix = self._matrix(self.values(y) > 0)
        shift = 1e-9 * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        # Diagonal entries of the Hessian are counts, so 1e-9 is a relative shift.
        lower, _ = torch.linalg.cholesky_ex(matrix + shift)
        return torch.cholesky_solve(short[..., None], lower)[..., 0]

    def _length(self, y: Tensor, d: Tensor, short: Tensor) -> Tensor:
        """Return a step length t <= 1 at which the deficit along `d` has fallen to half or less, without a change of
        sign.

        If the deficit at t = 1 is above half, t is 1. Otherwise t is bracketed and bisected: `is_short` means a deficit
        above half, `is_long` a change of sign.
        """
        # The derivative of the dual along ``d`` is ``-short'd``; a full step on the right support reduces ``short`` to
        # 0.
        slope = (short * d).sum(-1, keepdim=True)
        low, high = torch.zeros_like(slope), torch.full_like(slope, math.inf)
        # The full step is exact once the support is right, since the dual is quadratic there.
        t = torch.ones_like(slope)
        for _ in range(200):
            left = (self.short(y + t * d) * d).sum(-1, keepdim=True)
            is_short, is_long = left > 0.5 * slope, left < -1e-6 * slope
            low, high = torch.where(is_short, t, low), torch.where(is_long, t, high)
            wrong = is_long | (is_short & (t < 1))
            if not bool(wrong.any()):
                break
            # Without a lower bound, shrink by 4.
            middle = torch.where(low > 0, (low + high) / 2, high / 4)
            t = torch.where(wrong, middle, t)
        return t


def _margins(x: Tensor) -> Tensor:
    """Return row sums, then column sums."""
    return torch.cat([x.sum(-1), x.sum(-2)], dim=-1)


def _potential(v: Tensor, sums: Tensor) -> Tensor:
    """Return for each row the potential p with ``sum of max(v + p, 0) = sums``, or 0 if the row is all -inf.

    -p is the threshold of a projection onto a simplex, see `onto_simplex`.
    """
    ranks = torch.arange(1, v.shape[-1] + 1, dtype=v.dtype, device=v.device)
    sorted_ = v.sort(dim=-1, descending=True).values
    thresholds = ((sorted_.cumsum(-1) - sums[..., None]) / ranks).amax(-1)
    return torch.where(thresholds.isfinite(), -thresholds, 0.0)
