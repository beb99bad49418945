"""One step of a rule on all leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch

import implicitdiff._torch.levels as functorch
import implicitdiff.optim._rule as _rule
from implicitdiff._torch.trees import Leaves

Operands = Sequence[torch.Tensor | None]
# What results may be written into: a column for the updates, or parameters, and one for each moment; None where not.
Buffers = Sequence[Operands]


_HOLE = torch.empty(0, device="meta")


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of a rule on the rows of a table of real tensors.

    Attributes:
        rule: the optimizer.
        count: the number of this step for every leaf, an int64 vector.
        rows: the leaf of each row.
        grads: a gradient for each row.
        decayed: what weight decay reads, None where there is none.
        bases: what the update is added to, or None in every row.
        moments: the columns of the state.
    """

    rule: _rule.Rule
    count: torch.Tensor
    rows: list[int]
    grads: Leaves
    decayed: Operands
    bases: Operands
    moments: list[Leaves]

    @cached_property
    def columns(self) -> list[Operands]:
        return [self.grads, self.decayed, self.bases, *self.moments]

    @cached_property
    def operands(self) -> Leaves:
        return [t for column in self.columns for t in column if t is not None]

    @cached_property
    def sizes(self) -> list[int]:
        return [g.numel() for g in self.grads]

    @cached_property
    def is_constant(self) -> bool:
        """Whether no transform has to do with the tensors."""
        return functorch.are_constant(self.operands)

    def of(self, operands: Sequence[torch.Tensor]) -> Step:
        """The same step of other tensors, in the order of `operands`."""
        rest = iter(operands)
        return self._with([[None if t is None else next(rest) for t in column] for column in self.columns])

    def emptied(self) -> Step:
        """The step without its tensors, to be kept for a derivative: count and numbers are its own, since those of the
        state may be overwritten."""
        numbers: dict[str, Any] = {k: v.clone() for k, v in vars(self.rule).items() if isinstance(v, torch.Tensor)}
        rule = dataclasses.replace(self.rule, **numbers)
        return dataclasses.replace(self.of([_HOLE] * len(self.operands)), rule=rule, count=self.count.clone())

    def baseless(self) -> Step:
        """The step that gives the updates alone."""
        return dataclasses.replace(self, bases=[None] * len(self.rows))

    @property
    def places_of_bases(self) -> range:
        """Where the bases stand among the operands."""
        first = sum(t is not None for column in self.columns[:2] for t in column)
        return range(first, first + sum(t is not None for t in self.bases))

    def subset(self, at: Sequence[int]) -> Step:
        """The step of some of the rows."""
        # Not `columns`, whose cache torch.compile does not trace.
        columns = [self.grads, self.decayed, self.bases, *self.moments]
        picked = self._with([[column[k] for k in at] for column in columns])
        return dataclasses.replace(picked, rows=[self.rows[k] for k in at])

    def _with(self, columns: list[Any]) -> Step:
        grads, decayed, bases, *moments = columns
        return dataclasses.replace(self, grads=grads, decayed=decayed, bases=bases, moments=moments)

    def results(self) -> list[Leaves]:
        """By the plain formula: the updates, or new parameters where there are bases, and the new moments."""
        counts = self.count if len(self.rows) == self.count.shape[0] else self.count[self.rows]
        return _rule.run(self.rule, counts, self.grads, self.decayed, self.bases, self.moments)

    def pullback(self, cotangents: Operands, wanted: Sequence[bool]) -> Operands:
        """By the plain formula: the cotangents of those operands that are wanted, None for the others."""
        operands = self.operands

        def results(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            rest = iter(tensors)
            step = self.of([next(rest) if want else old for want, old in zip(wanted, operands, strict=True)])
            return tuple(flat(step.results()))

        primals = [t for t, want in zip(operands, wanted, strict=True) if want]
        linearised: Any = torch.func.vjp(results, *primals)
        values, pull = linearised
        bars = tuple(torch.zeros_like(v) if c is None else c for v, c in zip(values, cotangents, strict=True))
        grads = iter(pull(bars))
        return [next(grads) if want else None for want in wanted]


def flat(columns: Iterable[Iterable[Any]]) -> list[Any]:
    """One list out of columns."""
    return [t for column in columns for t in column]


def split(values: Sequence[Any], count: int) -> list[list[Any]]:
    """Columns of equal length out of one list."""
    size = len(values) // count
    return [list(values[i * size : (i + 1) * size]) for i in range(count)]
