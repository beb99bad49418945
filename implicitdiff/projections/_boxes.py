"""Projections onto boxes, entry by entry."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

import implicitdiff._torch.trees as pytree
from implicitdiff._torch.trees import Number, Tree, X
from implicitdiff.projections._point import Point, holds, scale_of, sum_of
from implicitdiff.projections._simplices import nonempty


def box(v: X, lower: Tree, upper: Tree) -> X:
    """Project onto ``{x: lower <= x <= upper}``, entry by entry.

    Args:
        v: a tensor or a tree.
        lower: lower bounds: a number, a tensor that broadcasts to every leaf, or a tree of these, nested like ``v`` or
            a prefix of ``v``. May be ``-inf``.
        upper: upper bounds, likewise.

    Raises:
        ValueError: ``lower`` exceeds ``upper``, or one of them does not fit ``v``.

    Example:
        >>> from implicitdiff.projections import box
        >>> box(torch.tensor([-2.0, 0.5, 2.0]), 0.0, torch.tensor([1.0, 1.0, 3.0]))
        tensor([0.0000, 0.5000, 2.0000])
    """
    point = Point.of("box", v)
    return point.map(clamp, *_bounds(point, lower, upper))


def non_negative(v: X) -> X:
    """Project onto ``{x: x >= 0}``, entry by entry.

    Example:
        >>> from implicitdiff.projections import non_negative
        >>> non_negative({"a": torch.tensor([-1.0, 2.0]), "b": torch.tensor(-0.5)})
        {'a': tensor([0., 2.]), 'b': tensor(0.)}
    """
    return Point.of("non_negative", v).map(torch.relu)


def linf_ball(v: X, radius: Number = 1.0) -> X:
    """Project onto ``{x: |x_i| <= radius for all i}``, entry by entry.

    The result is ``sign(v) min(|v|, radius)``.

    Args:
        v: a tensor or a tree.
        radius: at least 0; may be ``inf``.

    Raises:
        ValueError: ``radius`` is negative.

    Example:
        >>> from implicitdiff.projections import linf_ball
        >>> linf_ball(torch.tensor([-2.0, 0.5, 1.5]))
        tensor([-1.0000,  0.5000,  1.0000])
    """
    point = Point.of("linf_ball", v)
    bound = point.scalar("radius", radius, least=0.0)
    return point.map(_onto_linf_ball, [bound] * len(point.leaves))


def box_section(v: X, lower: Tree, upper: Tree, w: Tree, c: Number) -> X:
    """Project onto ``{x: lower <= x <= upper, w.x = c}``, ``v`` being one vector.

    The solution has a multiplier ``tau`` of the plane, and a set ``s`` of entries between the bounds::

        x = clip(v + tau w, lower, upper),    s = {i: lower_i < x_i < upper_i}
        tau = (c - sum of w x outside of s - sum of w v over s) / (sum of w^2 over s)

    ``w.x`` is a nondecreasing, piecewise linear function of ``tau``, with kinks where an entry reaches a bound. The
    kinks are sorted, and a bisection over ranks finds ``s``: an exact method of cost ``O(n log n)``.

    Args:
        v: a tensor or a tree.
        lower: lower bounds, as of a `box`.
        upper: upper bounds, likewise.
        w: a tree like ``v``, or one that broadcasts to ``v`` as bounds do; of any signs, not all zero.
        c: a number or a scalar tensor.

    Raises:
        ValueError: ``lower`` exceeds ``upper``, ``w`` is zero, no ``x`` within the bounds has ``w.x = c`` but for
            rounding, or one of them does not fit ``v``.

    Reference:
        Held, Wolfe and Crowder, "Validation of Subgradient Optimization", Math. Prog. 6 (1974), section 3.

    Example:
        >>> from implicitdiff.projections import box_section
        >>> box_section(torch.tensor([0.5, 1.0, -1.0]), 0.0, 0.6, torch.tensor([1.0, 1.0, 2.0]), 1.0)
        tensor([0.4000, 0.6000, 0.0000])
    """
    point = nonempty("box_section", v)
    # Bounds of all leaves as vectors, in the order of the entries of v.
    low, high = (point.flat(bounds) for bounds in _bounds(point, lower, upper))
    offset, normal = point.scalar("c", c), point.normal("w", w)
    size = scale_of(normal)

    def project(v: Tensor, c: Tensor) -> Tensor:
        # The plane ``w.x = c`` does not change if both sides are divided by the largest ``|w_i|``.
        section = _Section(low.to(v.dtype), high.to(v.dtype), (normal / size).to(v.dtype), c / size.to(v.dtype))
        if not holds(section.is_met()):
            raise ValueError(
                "box_section: c must be w.x for some x within the bounds, got a smaller or a larger number"
            )
        return section.project(v)

    return point.map_flat(project, offset)


def _bounds(point: Point, lower: Tree, upper: Tree) -> tuple[list[Any], list[Any]]:
    lowers, uppers = point.operands("lower", lower), point.operands("upper", upper)
    if not all(holds(low <= high) for low, high in zip(lowers, uppers, strict=True)):
        raise ValueError(
            f"{point.function}: lower must be at most upper in every entry, got lower {pytree.describe(lower)} and "
            f"upper {pytree.describe(upper)}"
        )
    return lowers, uppers


def _onto_linf_ball(v: Tensor, radius: Tensor) -> Tensor:
    # At a bound the derivative is that of the bound, as in `clamp`.
    return torch.where(v.abs() >= radius, v.detach().sign() * radius, v)


class _Section(NamedTuple):
    """The intersection of a box and a plane ``w.x = c``, scaled so that the largest ``|w_i|`` is 1.

    As ``tau`` grows, entry i of ``v + tau w`` enters the box through one bound (the near side) and leaves through the
    other (the far side): lower, then upper for ``w_i > 0``, and the reverse for ``w_i < 0``.
    """

    lower: Tensor
    upper: Tensor
    w: Tensor
    c: Tensor

    @property
    def near(self) -> Tensor:
        return torch.where(self.w < 0, self.upper, self.lower)

    @property
    def far(self) -> Tensor:
        return torch.where(self.w < 0, self.lower, self.upper)

    def is_met(self) -> Tensor:
        """True if the intersection is not empty, up to rounding."""
        # w.x takes its extremes over the box where all entries are at the near side or all at the far side.
        # Entries with w = 0 take no part in the plane, and their bounds may be infinite: inf * 0 is nan.
        near, far = (torch.where(self.w == 0, 0.0, self.w * x) for x in (self.near, self.far))
        slack = [4 * t.numel() * torch.finfo(t.dtype).eps * (sum_of(t.abs()) + self.c.abs()) for t in (near, far)]
        return (sum_of(near) - slack[0] <= self.c) & (self.c <= sum_of(far) + slack[1])

    def project(self, v: Tensor) -> Tensor:
        # Stationarity of ``|x - v|^2 / 2 - tau (w.x - c)`` within the bounds gives ``x = clip(v + tau w)``.
        at = _Section(*(t.detach() for t in self))
        # Start near the solution: for a large tau, kinks of bounds close together would round to one number, and sums
        # of large terms would lose digits of c.
        v = v + self.w * at.nearby(v.detach())
        free, is_near, is_corner = at.active(v.detach())
        outside = torch.where(self.w == 0, clamp(v, self.lower, self.upper), torch.where(is_near, self.near, self.far))
        # At a corner the free entries keep their derivative in ``c`` only.
        v, w = (torch.where(free, t, 0.0) for t in (torch.where(is_corner, v.detach(), v), self.w))
        # tau from the equation of the plane, linear in the free entries. The fixed entries move with their bounds.
        fixed = torch.where(free, 0.0, outside)
        square = sum_of(w * w)
        # With ``x = v + tau w`` in the free entries: ``c = w.fixed + w.v + tau w.w``.
        tau = (self.c - sum_of(self.w * fixed) - sum_of(w * v)) / torch.where(square == 0, 1.0, square)
        x = torch.where(free, v + w * tau, fixed)
        # Clamp rounding errors of free entries into the box, and keep their derivative.
        return x + (x.detach().clamp(at.lower, at.upper) - x.detach())

    def nearby(self, v: Tensor) -> Tensor:
        """Return a finite end of the interval that contains the multiplier of the solution, or 0."""
        low, high, _, _ = self._interval(v, *self._crossings(v), self.w != 0)
        return torch.where(high.isfinite(), high, torch.where(low.isfinite(), low, 0.0))

    def active(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the free entries, the entries at the near side, and whether the solution is a corner.

        At a corner, where a kink is the solution, ``x`` does not move with ``v``, and moves with ``c`` along the free
        entries of one side.
        """
        enter, leave = self._crossings(v)
        # An entry with equal bounds is never free. A negated comparison is true for nan, which has to reach the result.
        moves = (self.w != 0) & ~(enter >= leave)
        _, high, is_first, is_end = self._interval(v, enter, leave, moves)
        # Entries whose own interval [enter, leave] contains the interval of the solution. `between` is free on the open
        # interval below ``high``, `inside` also at ``high``.
        between = moves & ~(enter >= high) & ~(leave < high)
        inside = between & ~(leave <= high)
        is_corner = is_end & ~inside.any(0, keepdim=True)
        # At a corner the free entries are those of one side of the kink: below ``high``, or above at the first kink.
        free = torch.where(is_corner, torch.where(is_first, moves & (enter == high), between), between)
        free = torch.where(is_end & ~is_corner, inside, free)
        # An entry with ``w = 0`` takes no part in the plane, and is free by its own bounds.
        still = (self.w == 0) & ~(v <= self.lower) & ~(v >= self.upper)
        return free | still, enter >= high, is_corner

    def _crossings(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ``tau`` at which each entry enters the box, and the ``tau`` at which the entry leaves the box."""
        step = torch.where(self.w == 0, 1.0, self.w)
        return (self.near - v) / step, (self.far - v) / step

    def _interval(
        self, v: Tensor, enter: Tensor, leave: Tensor, moves: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Find the interval between neighbouring kinks that contains the multiplier.

        Returns:
            Its ends, whether the upper end is the first kink, and whether the multiplier is the upper end.
        """
        # Kinks of entries that do not move are replaced by the last kink, which leaves the order of the others.
        last = torch.where(moves, leave, -math.inf).amax(0, keepdim=True)
        # All kinks in order, two for each entry.
        marks = torch.cat([torch.where(moves, t, last) for t in (enter, leave)]).sort().values

        def excess(tau: Tensor) -> Tensor:
            # w.x - c. At a kink the bound itself is taken: v + tau w may differ from it by rounding.
            x = (v + self.w * torch.where(tau.isfinite(), tau, 0.0)).clamp(self.lower, self.upper)
            x = torch.where(enter >= tau, self.near, torch.where(leave <= tau, self.far, x))
            return sum_of(torch.where(self.w == 0, 0.0, self.w * x)) - self.c

        # Bisection over ranks: excess < 0 at rank `below`, >= 0 at rank `above`. A fixed number of steps, for vmap.
        above = torch.full_like(last, len(marks) - 1, dtype=torch.long)
        below = torch.full_like(above, -1)
        for _ in range(len(marks).bit_length()):
            middle = torch.clamp((below + above) // 2, min=0)
            is_inside, is_short = above - below > 1, excess(marks.gather(0, middle)) < 0
            below, above = (
                torch.where(is_inside & is_short, middle, below),
                torch.where(is_inside & ~is_short, middle, above),
            )
        low, high = marks.gather(0, below.clamp(min=0)), marks.gather(0, above)
        is_first = below < 0
        return low, high, is_first, is_first | (excess(high) <= 0)


def clamp(v: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    return torch.where(v >= upper, upper, torch.where(v <= lower, lower, v))
