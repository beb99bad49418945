r"""The derivative of the least-squares solution of least norm.

Where the rank of ``A`` is constant, ``x = A^+ b`` has the derivative (Golub and Pereyra, 1973, (4.12))::

    x' = A^+ (b' - A' x) + A^+ A^{+H} A'^H r + (I - A^+ A) A'^H A^{+H} x,      r = b - A x,

where the second term is the motion of the range of ``A`` and the third that of its null space; both vanish for a
regular matrix. With ``y = A^{+H} x`` and ``q = A'^H y``, solutions and products suffice::

    x' = q + A^+ (b' - A' x + A^{+H} A'^H r - A q),

and the transposed map is, with ``u = A^{+H} x_bar``, ``w = A^+ u`` and ``p = x_bar - A^H u``::

    b_bar = u,      theta_bar = d/dtheta (- <u, A x> + <r, A w> + <y, A p>).

Each solution in the rules is an instance of the problem itself, so derivatives of any order follow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import implicitdiff._torch.levels as _levels
from implicitdiff._closures.below import DropGradientLayers, below_autodiff
from implicitdiff._implicit.checks import probe_vector
from implicitdiff._implicit.linear_problem import LinearProblem
from implicitdiff._implicit.system import Vectors, first_column
from implicitdiff._torch.trees import Leaves
from implicitdiff.linear_solve._outcome import OnFailure, report

RANK_CHANGES = (
    "the rank of the matrix changes in the direction of the derivative, so the solution of least norm has no "
    "derivative: A' maps vectors of the null space of A out of the range of A; describe A by parameters that keep "
    "its rank"
)


@dataclass(frozen=True)
class PseudoinverseProblem(LinearProblem):
    """The problem ``x = A^+ b`` with its derivative rules.

    Attributes:
        rtol: singular values up to ``rtol`` times the largest count as zero; None: up to rounding.
        on_failure: report of a change of rank: "raise", "warn" or "ignore".
    """

    rtol: float | None = None
    on_failure: OnFailure = "raise"

    def jvp(self, x: Leaves, theta: Leaves, tangents: dict[int, Tensor]) -> Leaves:
        moved = {i: t for i, t in tangents.items() if i >= self._sides}
        if not moved:
            return super().jvp(x, theta, tangents)
        self._check_rank(x, theta, moved)
        adjoint, operands = self._adjoint, self._operands(theta)
        # A'^H r, the second term of the derivative.
        of_range = adjoint.pushforward(self._misfit(x, theta), theta, moved)
        y, z = self._solve_each((x, of_range), x, theta, adjoint=True)
        q = adjoint.pushforward(y, theta, moved)
        # z = A^{+H} A'^H r, and `pushforward` of the problem gives A' x - b'.
        rhs = _difference(_difference(z, self.pushforward(x, theta, tangents)), self.product(q, operands))
        return [s + t for s, t in zip(q, self.solve(x, theta, rhs, adjoint=False), strict=True)]

    def vjp(self, x: Leaves, theta: Leaves, x_bar: Leaves, wanted: Sequence[int]) -> dict[int, Tensor]:
        moved = [i for i in wanted if i >= self._sides]
        if not moved:
            return super().vjp(x, theta, x_bar, wanted)
        if self._is_one_number(theta, moved):
            self._check_rank(x, theta, {moved[0]: torch.ones_like(theta[moved[0]])}, x_bar)
        u, y = self._solve_each((x_bar, x), x, theta, adjoint=True)
        w = self.solve(x, theta, u, adjoint=False)
        # ``p = (I - A^+ A) x_bar``, because ``A^H A^{+H} = A^+ A``: the part of the cotangent in the null space.
        p = _difference(x_bar, self._adjoint.product(u, self._operands(theta)))
        # The three products of theta_bar as one pullback, with x, w and p as columns.
        many, at = self._columns((x, w, p))
        _, cotangent = self._columns(([-t for t in u], self._misfit(x, theta), y))
        grads = many.pullback(at, [*at, *theta[self._sides :]], cotangent, moved)
        return grads | {i: u[i] for i in wanted if i < self._sides}

    def _check_rank(self, x: Leaves, theta: Leaves, tangents: dict[int, Tensor], x_bar: Leaves | None = None) -> None:
        """Report a change of rank along the tangents, in lanes with a cotangent other than zero."""
        if self.on_failure == "ignore":
            return
        value = _levels.plain_under_vmap
        # Values alone: the check must not be differentiated, and reads all lanes at once.
        with below_autodiff(DropGradientLayers):
            theta, along = [value(t) for t in theta], {i: value(t) for i, t in tangents.items()}
            gap, bound = self._rank_gap([value(t) for t in x], theta, along)
            if x_bar is not None:
                gap = torch.where(self._is_in_use([value(t) for t in x_bar]), gap, 0.0)
            # One tensor of both, so that gap and bound get the same lanes in front.
            (both,), _ = _levels.without_batch_layers([torch.stack(torch.broadcast_tensors(gap, bound), dim=-1)])
        gap, bound = both.reshape(-1, 2).unbind(dim=-1)
        failed = gap > bound
        if bool(failed.any()):
            worst = int(torch.where(failed, gap / bound, 0.0).argmax())
            report("solve_lstsq", RANK_CHANGES, failed, float(gap[worst]), float(bound[worst]), 0, self.on_failure)

    def _rank_gap(self, x: Leaves, theta: Leaves, tangents: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
        """Return for each lane ``|(I - A A^+) A' w|`` for a vector ``w`` of the null space, and a bound on its
        rounding.

        The rank is constant to first order if ``A'`` maps the null space of ``A`` into its range. A computed null
        vector is off by rounding times the condition number, and ``A'`` is known up to its own rounding and that of
        ``A``.
        """
        one, like = replace(self, columns=()), first_column(x, len(self.lanes), len(self.columns))
        vectors, operands, rest = Vectors(like, self.lanes), self._operands(theta), theta[self._sides :]
        theta = [*like, *rest]

        def norm(v: Leaves) -> Tensor:
            size: Tensor = torch.linalg.vector_norm(vectors.ravel(v), dim=-1, dtype=torch.float64)
            return size

        # w = (I - A^+ A) probe, with |A| estimated by |A probe| and |A^+| by |A^+ probe|.
        probe = probe_vector(like)
        image = one.product(probe, operands)
        inside, inverse = one._solve_each((image, probe), like, theta, adjoint=False)
        null = _difference(probe, inside)
        many, both = one._columns((null, probe))
        # ``A' w`` for the null vector, and ``A' probe`` for the size of ``A'``.
        of_null, of_probe = many._apart(many.pushforward(both, [*both, *rest], tangents))
        outside = _difference(of_null, one.product(one.solve(like, theta, of_null, adjoint=False), operands))
        condition = norm(image) * norm(inverse) / norm(probe) ** 2
        # Tolerance relative to |A' w|: rounding of A and of its rank decision, times the condition number.
        noise = vectors.eps**0.5 + 100 * max(self.rtol or 0.0, vectors.dimension * vectors.eps) * condition
        return norm(outside), noise * (norm(of_probe) + norm(image)) * norm(null) / norm(probe)

    def _is_in_use(self, x_bar: Leaves) -> Tensor:
        """True in lanes with a cotangent of the solution other than zero."""
        rows = Vectors(x_bar, (*self.lanes, *self.columns)).ravel(x_bar)
        return (rows.reshape(math.prod(self.lanes), math.prod(self.columns) * rows.shape[-1]) != 0).any(dim=-1)

    def _is_one_number(self, theta: Leaves, moved: Sequence[int]) -> bool:
        """True if the matrix of a lane depends on one real number.

        A cotangent of several numbers may be pulled back to parameters that keep the rank. A cotangent of one number is
        the derivative along that number, for which the rank can be checked.
        """
        at = moved[0]
        levels = zip(self.levels, reversed(self.lanes), strict=True)
        own = math.prod(size for dims, size in levels if dims[at - self._sides] is not None)
        return len(moved) == 1 and theta[at].numel() == own and not theta[at].is_complex()

    @property
    def _sides(self) -> int:
        """Number of tensors of ``b``, which precede the operands of ``A`` in theta."""
        return len(self.structure.slots)

    def _operands(self, theta: Leaves) -> Leaves:
        return theta[self._sides : self._sides + self.count]

    @property
    def _adjoint(self) -> PseudoinverseProblem:
        return replace(self, operator=self.operator.adjoint)

    def _misfit(self, x: Leaves, theta: Leaves) -> Leaves:
        """Return ``r = b - A x``."""
        return [-t for t in self.residual(x, theta)]

    def _solve_each(self, sides: Sequence[Leaves], x: Leaves, theta: Leaves, *, adjoint: bool) -> list[Leaves]:
        """Return the solutions for several right-hand sides, from one decomposition."""
        many, b = self._columns(sides)
        return many._apart(many.solve(x, theta, b, adjoint=adjoint))

    def _columns(self, vectors: Sequence[Leaves]) -> tuple[PseudoinverseProblem, Leaves]:
        """Return the problem with a further dimension of right-hand sides, and the vectors stacked along it."""
        stacked = [torch.stack(leaves, len(self.lanes)) for leaves in zip(*vectors, strict=True)]
        return replace(self, columns=(len(vectors), *self.columns)), stacked

    def _apart(self, columns: Leaves) -> list[Leaves]:
        """Split stacked vectors, the inverse of `_columns`."""
        return [list(leaves) for leaves in zip(*(t.unbind(len(self.lanes)) for t in columns), strict=True)]


def _difference(a: Leaves, b: Leaves) -> Leaves:
    return [s - t for s, t in zip(a, b, strict=True)]
