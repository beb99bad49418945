"""One step of a rule on all leaves: results and vector-Jacobian product."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch

import implicitdiff._torch.tracking as _tracking
import implicitdiff.optim._rule as _rule
from implicitdiff._torch.trees import Leaves, Tree

Item = TypeVar("Item")
Operands = Sequence[torch.Tensor | None]
# Memory for the results: a column for updates or parameters, then one for each moment. None asks for new memory.
Buffers = Sequence[Operands]

# Stands for an operand of a step without tensors.
_HOLE = torch.empty(0, device="meta")


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of a rule on the rows of a table of real tensors.

    Attributes:
        rule: the optimizer.
        count: the step number t of every leaf, an int64 vector.
        rows: the index of each row among the leaves.
        grads: a gradient for each row.
        decayed: the parameter that weight decay reads, or None for a row without decay.
        bases: the parameters to add updates to, or None in every row for updates alone.
        moments: the columns of moments, in the order of `UpdateRule.moments`.
    """

    rule: _rule.UpdateRule
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
        """True if no transform tracks an operand."""
        return _tracking.are_constant(self.operands)

    def of(self, operands: Sequence[torch.Tensor]) -> Step:
        """Return the step with other tensors, given in the order of `operands`."""
        rest = iter(operands)
        return self._with([[None if t is None else next(rest) for t in column] for column in self.columns])

    def emptied(self) -> Step:
        """Return the step without operands, for a backward pass to keep.

        Count and tensor hyper-parameters are copied, since a later step in place may overwrite those of the state.
        """
        numbers: dict[str, Tree] = {k: v.clone() for k, v in vars(self.rule).items() if isinstance(v, torch.Tensor)}
        rule = dataclasses.replace(self.rule, **numbers)
        return dataclasses.replace(self.of([_HOLE] * len(self.operands)), rule=rule, count=self.count.clone())

    @property
    def target(self) -> Operands:
        """The column whose memory updates or new parameters may take."""
        return self.bases if self.is_fused else self.grads

    @property
    def is_fused(self) -> bool:
        """True if the step computes new parameters instead of updates."""
        return any(base is not None for base in self.bases)

    @property
    def no_buffers(self) -> Buffers:
        """The request for new memory for all results."""
        return [[None] * len(self.rows) for _ in (self.grads, *self.moments)]

    def baseless(self) -> Step:
        """Return the step that computes updates instead of new parameters."""
        return dataclasses.replace(self, bases=[None] * len(self.rows))

    @property
    def places_of_bases(self) -> range:
        """Positions of the bases among `operands`."""
        first = sum(t is not None for column in self.columns[:2] for t in column)
        return range(first, first + sum(t is not None for t in self.bases))

    def subset(self, at: Sequence[int], rule: _rule.UpdateRule) -> Step:
        """Return the step of the rows at some positions, by a rule of their own."""
        # torch.compile cannot trace the cached property `columns`.
        columns = [self.grads, self.decayed, self.bases, *self.moments]
        picked = self._with([[column[k] for k in at] for column in columns])
        return dataclasses.replace(picked, rule=rule, rows=[self.rows[k] for k in at])

    def _with(self, columns: list[Any]) -> Step:
        grads, decayed, bases, *moments = columns
        return dataclasses.replace(self, grads=grads, decayed=decayed, bases=bases, moments=moments)

    def results(self) -> list[Leaves]:
        """Compute the columns of results in plain torch, see `_rule.apply_rule`."""
        counts = self.count if len(self.rows) == self.count.shape[0] else self.count[self.rows]
        return _rule.apply_rule(self.rule, counts, self.grads, self.decayed, self.bases, self.moments)

    def pullback(self, cotangents: Operands, wanted: Sequence[bool]) -> Operands:
        """Return the cotangents of the wanted operands in plain torch, and None for the others."""
        operands = self.operands

        def results(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            rest = iter(tensors)
            step = self.of([next(rest) if want else old for want, old in zip(wanted, operands, strict=True)])
            return tuple(flat(step.results()))

        primals = [t for t, want in zip(operands, wanted, strict=True) if want]
        # torch.func.vjp composes with all transforms that run, unlike torch.autograd.grad.
        linearised: Any = torch.func.vjp(results, *primals)
        values, pull = linearised
        bars = tuple(torch.zeros_like(v) if c is None else c for v, c in zip(values, cotangents, strict=True))
        grads = iter(pull(bars))
        return [next(grads) if want else None for want in wanted]


def flat(columns: Iterable[Iterable[Item]]) -> list[Item]:
    """Concatenate columns into one list."""
    return [t for column in columns for t in column]


def split(values: Sequence[Item], count: int) -> list[list[Item]]:
    """Split a list into `count` columns of equal length."""
    size = len(values) // count
    return [list(values[i * size : (i + 1) * size]) for i in range(count)]
