"""Projections onto matrices of given sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import implicitdiff._closures.modes as _modes
import implicitdiff._torch.levels as functorch
import implicitdiff._torch.settings as _settings
import implicitdiff._torch.trees as pytree
from implicitdiff._torch.modes import uncached
from implicitdiff._torch.trees import Leaves
from implicitdiff._torch.values import refuse_valueless
from implicitdiff.projections._point import Number, Point, broadcasts, holds
from implicitdiff.solvers._loop.status import Status, report_failures


def transport(v: Tensor, row_sums: Number, column_sums: Number) -> Tensor:
    """Project a matrix onto the transport polytope ``{X: X >= 0, X 1 = row_sums, X' 1 = column_sums}``.

    That is, with the entries in ``s`` positive::

        X_ij = max(v_ij + f_i + g_j, 0),    s = {ij: X_ij > 0}

    Newton's method on the dual, a piecewise quadratic function of ``f`` and ``g``, finds ``s``, in double precision and
    lane by lane below all transforms. Given ``s``, ``X`` is linear in ``v`` and the sums: ``f`` and ``g`` solve the
    equations ``sum of X_ij over s in a row, or a column = its sum``. One of these is redundant, and the solution of
    least norm is taken. So derivatives in the sums hold for changes that keep the totals equal.

    Where ``s`` falls apart into blocks, as it does at a permutation, the derivative in the sums jumps. Then entries
    that are 0 and next to become positive join the blocks, so that the derivative is that of one side. They are not
    moved by ``v``. If ``-inf`` keeps blocks apart, their totals have to stay equal one by one.

    A row or a column of sum 0 is such a block. Entries of ``v`` that are ``-inf`` come out as 0.

    Args:
        v: a matrix of shape (m, n).
        row_sums: a vector of shape (m,), or a number for all, at least 0.
        column_sums: of shape (n,), likewise, with the same total but for rounding.

    Raises:
        TypeError: ``v`` is no floating-point tensor.
        ValueError: ``v`` is no matrix, a sum is negative, or the totals differ.
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
    """Project a matrix onto the Birkhoff polytope, of the doubly stochastic matrices.

    That is `transport` with all sums 1.

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
        raise ValueError(f"birkhoff: v has to be a square matrix, but it is {pytree.describe(v)}")
    return _onto_transport("birkhoff", v, 1.0, 1.0)


def _check_matrix(function: str, v: Any) -> None:
    Point.of(function, v)
    if not isinstance(v, Tensor) or v.ndim != 2:
        raise ValueError(f"{function}: v has to be a matrix, but it is {pytree.describe(v)}")


def _onto_transport(function: str, v: Tensor, row_sums: Number, column_sums: Number) -> Tensor:
    _check_matrix(function, v)
    rows = _sums(function, "row_sums", row_sums, v, v.shape[0])
    columns = _sums(function, "column_sums", column_sums, v, v.shape[1])
    coarsest = max(torch.finfo(t.dtype).eps for t in (v, row_sums, column_sums) if isinstance(t, Tensor))
    gap = (rows.detach().sum() - columns.detach().sum()).abs()
    if not holds(gap <= 4 * (sum(v.shape) + 1) * coarsest * rows.detach().sum()):
        raise ValueError(f"{function}: row_sums and column_sums have to have the same total, but they have not")
    if not v.numel():
        return v
    packed = torch.cat([t.detach().double() for t in (v.flatten(), rows, columns)])
    # Only the derivatives in the sums need whole supports.
    joined = isinstance(row_sums, Tensor) or isinstance(column_sums, Tensor)
    x, support, inverse = _below(function, partial(_search, function, (len(v), v.shape[1]), joined), packed)
    # The solution is a constant, and what is added to it is zero, with derivatives: its values are found in double
    # precision.
    moves = torch.where(support, v - v.detach(), 0.0)
    short = torch.cat([rows - rows.detach() - moves.sum(1), columns - columns.detach() - moves.sum(0)])
    f, g = (inverse.to(v.dtype) @ short).split(list(v.shape))
    return x.to(v.dtype) + moves + torch.where(support, f[:, None] + g, 0.0)


def _sums(function: str, name: str, value: Any, v: Tensor, count: int) -> Tensor:
    if not isinstance(value, (int, float, Tensor)):
        raise TypeError(f"{function}: {name} has to be a number or a tensor, but it is {pytree.describe(value)}")
    sums = value if isinstance(value, Tensor) else torch.full((), value, dtype=v.dtype, device=v.device)
    if not broadcasts(sums.shape, torch.Size([count])):
        raise ValueError(f"{function}: {name} has to be of shape {[count]}, but it is {pytree.describe(value)}")
    if not holds((sums >= 0) & sums.isfinite()):
        raise ValueError(f"{function}: {name} has to be at least 0 and finite")
    return sums.to(v.dtype).expand(count)


# --- below the transforms ---------------------------------------------------------------------------------------------


@functorch.outside_compile
@_modes.one_operation
def _below(function: str, search: Callable[[Tensor], Leaves], values: Tensor) -> Leaves:
    """What `search` finds for a vector, constant to every derivative; it is called with a row for each lane."""
    refuse_valueless(function, [values])
    operands = [functorch.plain_under_vmap(functorch.alive(t)) for t in _modes.alias([values])]
    operands, layers = functorch.without_batch_layers(operands)
    with _modes.without_own_modes(), uncached(), functorch.nothing_running(), _settings.full_precision():
        (plain,) = functorch.out_of_inference(operands)
        lanes = plain.shape[:-1]
        found = [t.reshape(lanes + t.shape[1:]) for t in search(plain.reshape(lanes.numel(), plain.shape[-1]))]
    # The lanes of the outermost vmap lie in front.
    for layer in reversed(layers):
        found = [functorch.add_layer(t, 0, layer) for t in found]
    return found


class _State(NamedTuple):
    """What a search reports of each lane."""

    iter_num: Tensor
    error: Tensor
    target: Tensor
    status: Tensor


def _search(function: str, shape: tuple[int, int], joined: bool, values: Tensor) -> Leaves:
    """The solutions of all rows, their supports, with blocks joined or not, and the pseudoinverses of the equations on
    these."""
    m, n = shape
    v, a, b = values.split([m * n, m, n], dim=-1)
    problem = _Transport.of(v.unflatten(-1, shape), a, b)
    potentials, state = problem.solve()
    report_failures(function, state, "raise", budget=False)
    return problem.finish(potentials, joined)


_LIMIT = 500
_EPS = torch.finfo(torch.float64).eps


class _Transport(NamedTuple):
    """The dual problem, ``min sum of max(v_ij + f_i + g_j, 0)^2 / 2 - row_sums.f - column_sums.g``, of each lane.

    Attributes:
        v: ``(lanes, m, n)``.
        sums: ``(lanes, m + n)``, of rows and columns.
        zero: ``(lanes, m, n)``, where a sum is 0, and so the solution.
    """

    v: Tensor
    sums: Tensor
    zero: Tensor

    @classmethod
    def of(cls, v: Tensor, a: Tensor, b: Tensor) -> _Transport:
        # Totals may differ by rounding.
        totals = a.sum(-1, keepdim=True), b.sum(-1, keepdim=True)
        mean = (totals[0] + totals[1]) / 2
        a, b = (t * torch.where(total == 0, 1.0, mean / total) for t, total in zip((a, b), totals, strict=True))
        zero = (a == 0)[..., None] | (b == 0)[..., None, :]
        return cls(v, torch.cat([a, b], dim=-1), zero)

    def solve(self) -> tuple[Tensor, _State]:
        y = self._start()
        iter_num = torch.zeros(len(y), dtype=torch.long, device=y.device)
        for _ in range(_LIMIT):
            short, infeasible = self.short(y), self._is_proof(y)
            error, target = short.abs().amax(-1), self._target(y)
            active = ~(error <= target) & ~infeasible & error.isfinite()
            if not bool(active.any()):
                break
            iter_num = iter_num + active
            d = self._direction(y, short)
            y = torch.where(active[:, None], y + self._length(y, d, short) * d, y)
        status = torch.where(active, int(Status.BUDGET_SPENT), int(Status.CONVERGED))
        status = torch.where(error.isfinite(), status, int(Status.DIVERGED))
        status = torch.where(infeasible, int(Status.INFEASIBLE), status)
        return y, _State(iter_num, error, target, status)

    def _is_proof(self, y: Tensor) -> Tensor:
        """Whether no matrix has these sums, as ``row_sums.f + column_sums.g = sum of X_ij (f_i + g_j)`` of every one
        of them is at most the total times the largest ``f_i + g_j``."""
        f, g = self._split(y)
        largest = torch.where(self.zero | (self.v == -math.inf), -math.inf, f + g).amax((-2, -1)).clamp(min=0.0)
        total, rounding = self.sums.sum(-1) / 2, 4 * y.shape[-1] * _EPS * y.abs().amax(-1)
        return (self.sums * y).sum(-1) > total * (largest + rounding)

    def finish(self, y: Tensor, joined: bool) -> Leaves:
        support = self.values(y) > self._target(y)[:, None, None]
        inverse = torch.linalg.pinv(self._matrix(support), hermitian=True)
        x = torch.where(support, self.values(y), 0.0)
        # What rounding leaves of the equations.
        f, g = self._split((inverse @ (self.sums - _margins(x))[..., None])[..., 0])
        x = torch.where(support, x + f + g, 0.0).clamp(min=0.0)
        if joined:
            whole = self._joined(y, support, inverse)
            if bool((whole != support).any()):
                support, inverse = whole, torch.linalg.pinv(self._matrix(whole), hermitian=True)
        return [x, support, inverse]

    def _joined(self, y: Tensor, support: Tensor, inverse: Tensor) -> Tensor:
        """The support with as many entries more as it takes to join its blocks.

        To raise ``f`` and lower ``g`` in one block changes no sum, until an entry from one of its rows to a column
        outside would become positive; at that corner of the dual solutions, it is next to do so.
        """
        m, n = self.v.shape[1:]
        matrix = self._matrix(support)
        # In absolute value, the projection onto the null space is 1 / size within a block.
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
            # Where nothing is found, another block begins.
            outside = torch.where(found, outside, (~inside).to(torch.int8).argmax(-1))
            inside = inside | blocks[lanes, outside]
        return support

    def _feasible(self, y: Tensor) -> Tensor:
        """The potentials with those of rows and columns of sum 0 so low that the values there are not positive."""
        f, g = self._split(y)
        a, b = self._split(self.sums)
        top = torch.where(b > 0, self.v + g, -math.inf).amax(-1, keepdim=True)
        f = torch.where(a > 0, f, torch.where(top == -math.inf, 0.0, -top))
        top = (self.v + f).amax(-2, keepdim=True)
        g = torch.where(b > 0, g, torch.where(top == -math.inf, 0.0, -top))
        return torch.cat([f[..., 0], g[..., 0, :]], dim=-1)

    def values(self, y: Tensor) -> Tensor:
        """What the entries of the solution would be if they could be negative."""
        f, g = self._split(y)
        return self.v.masked_fill(self.zero, -math.inf) + f + g

    def short(self, y: Tensor) -> Tensor:
        """What the sums lack, which is minus the gradient."""
        return self.sums - _margins(self.values(y).clamp(min=0.0))

    def _split(self, y: Tensor) -> tuple[Tensor, Tensor]:
        f, g = y.split(list(self.v.shape[1:]), dim=-1)
        return f[..., None], g[..., None, :]

    def _target(self, y: Tensor) -> Tensor:
        return 8 * y.shape[-1] * _EPS * (self.sums.amax(-1) + y.abs().amax(-1))

    def _start(self) -> Tensor:
        """Some rounds in which all rows, and then all columns, get the sums that they should have."""
        a, b = self.sums.split(list(self.v.shape[1:]), dim=-1)
        f, g = torch.zeros_like(a), torch.zeros_like(b)
        v = self.v.masked_fill(self.zero, -math.inf)
        for _ in range(5):
            f = _potential(v + g[..., None, :], a)
            g = _potential((v + f[..., None]).mT, b)
        return torch.cat([f, g], dim=-1)

    def _matrix(self, support: Tensor) -> Tensor:
        s = support.to(self.v.dtype)
        upper = torch.cat([torch.diag_embed(s.sum(-1)), s], dim=-1)
        lower = torch.cat([s.mT, torch.diag_embed(s.sum(-2))], dim=-1)
        return torch.cat([upper, lower], dim=-2)

    def _direction(self, y: Tensor, short: Tensor) -> Tensor:
        matrix = self._matrix(self.values(y) > 0)
        shift = 1e-9 * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        lower, _ = torch.linalg.cholesky_ex(matrix + shift)
        return torch.cholesky_solve(short[..., None], lower)[..., 0]

    def _length(self, y: Tensor, d: Tensor, short: Tensor) -> Tensor:
        """A length up to 1 at which the slope along `d` is still negative, and at most half of what it was."""
        slope = (short * d).sum(-1, keepdim=True)
        low, high = torch.zeros_like(slope), torch.full_like(slope, math.inf)
        t = torch.ones_like(slope)
        for _ in range(200):
            left = (self.short(y + t * d) * d).sum(-1, keepdim=True)
            is_short, is_long = left > 0.5 * slope, left < -1e-6 * slope
            low, high = torch.where(is_short, t, low), torch.where(is_long, t, high)
            wrong = is_long | (is_short & (t < 1))
            if not bool(wrong.any()):
                break
            middle = torch.where(low > 0, (low + high) / 2, high / 4)
            t = torch.where(wrong, middle, t)
        return t


def _margins(x: Tensor) -> Tensor:
    return torch.cat([x.sum(-1), x.sum(-2)], dim=-1)


def _potential(v: Tensor, sums: Tensor) -> Tensor:
    """Minus the thresholds of the projections of rows onto simplices; 0 where there are none."""
    ranks = torch.arange(1, v.shape[-1] + 1, dtype=v.dtype, device=v.device)
    sorted_ = v.sort(dim=-1, descending=True).values
    thresholds = ((sorted_.cumsum(-1) - sums[..., None]) / ranks).amax(-1)
    return torch.where(thresholds.isfinite(), -thresholds, 0.0)
