"""A rule for one leaf made into an (init, update) pair over trees."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import torch

import implicitdiff._pytree as pytree
import implicitdiff.optim._donation as _donation
import implicitdiff.optim._fused as _fused
from implicitdiff._pytree import Leaves
from implicitdiff.optim._base import GradientTransformation
from implicitdiff.optim._columns import Columns, accumulator
from implicitdiff.optim._inject import inject_hyperparams
from implicitdiff.optim._rule import Rule
from implicitdiff.optim._step import Buffers, Operands, Step, flat


def transformation(
    name: str, rule: Rule, state: type[Any], *, mask: Any = None, use_accelerated_op: bool | None = None
) -> GradientTransformation:
    """The pair of a rule.

    Args:
        name: what error messages call it.
        rule: its hyper-parameters may be schedules.
        state: a NamedTuple of ``count`` and the moments.
        mask: which parameters weight decay is for, as `Columns.chosen` takes it, or a function of the parameters; None
            for all.
        use_accelerated_op: True insists on compiled steps, False forbids them, None takes them where they help.
    """
    if use_accelerated_op:
        _fused.require(name)
    schedules = {k: v for k, v in vars(rule).items() if callable(v)}
    if schedules:

        def at(**values: Any) -> GradientTransformation:
            return transformation(
                name, dataclasses.replace(rule, **values), state, mask=mask, use_accelerated_op=use_accelerated_op
            )

        return inject_hyperparams(at)(**schedules)
    update = _Update(name, rule, state, mask, use_accelerated_op)
    return GradientTransformation(update.init, update)


def _initial(name: str, leaf: Any, value: Any) -> torch.Tensor | None:
    if leaf is None:
        return None
    if not isinstance(leaf, torch.Tensor):
        raise TypeError(f"{name}: params have the leaf {leaf!r}; each has to be a tensor, or None")
    if not (leaf.is_floating_point() or leaf.is_complex()):
        return None
    dtype = accumulator(leaf.dtype)
    if leaf.is_complex():  # A pair of reals starts from a pair.
        value = value * (1 + 1j)
    if not isinstance(value, torch.Tensor):
        return torch.full_like(leaf, value, dtype=dtype, requires_grad=False)
    return torch.zeros_like(leaf, dtype=dtype, requires_grad=False) + value.to(leaf.device, dtype)


@dataclasses.dataclass(frozen=True)
class _Update:
    """The pair: ``init``, ``update``, and the step that gives the new parameters at once."""

    name: str
    rule: Rule
    state: type[Any]
    mask: Any
    use_accelerated_op: bool | None

    def init(self, params: Any) -> Any:
        leaves, spec = pytree.leaves_of(params)
        moments = {
            field: pytree.unflatten([_initial(self.name, leaf, value) for leaf in leaves], spec)
            for field, value in self.rule.moments.items()
        }
        device = next((leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)), None)
        return self.state(count=torch.zeros(len(leaves), dtype=torch.int64, device=device), **moments)

    def __call__(self, grads: Any, state: Any, params: Any = None, *, inplace: bool = False) -> tuple[Any, Any]:
        columns = self._columns(grads, state)
        decayed = self._decayed(columns, params)
        outs, state = self._run(columns, state, decayed, None, inplace)
        return columns.tree_of(columns.leaves, outs), state

    def step(self, grads: Any, state: Any, params: Any, *, inplace: bool = False) -> tuple[Any, Any]:
        columns = self._columns(grads, state)
        leaves = columns.match("params", params)
        bases = columns.present("params", leaves)
        outs, state = self._run(columns, state, self._decayed(columns, params), bases, inplace)
        return columns.tree_of(leaves, outs), state

    def _columns(self, grads: Any, state: Any) -> Columns:
        if not isinstance(state, self.state):
            raise TypeError(
                f"{self.name}: state is a {type(state).__name__}, not the {self.state.__name__} of its init"
            )
        # The rows are those of the state, where the leaves are counted.
        moments = [(f"state.{field}", getattr(state, field)) for field in self.rule.moments]
        return Columns(self.name, "grads", grads, like=next(iter(moments), None))

    def _decayed(self, columns: Columns, params: Any) -> Operands:
        """What weight decay reads of each leaf."""
        if not self.rule.decays:
            return [None] * len(columns.rows)
        if params is None:
            raise ValueError(f"{self.name}: weight_decay needs the parameters; call update(grads, state, params)")
        column = columns.present("params", columns.match("params", params))
        if self.mask is None:
            return column
        wanted = columns.chosen(self.mask(params) if callable(self.mask) else self.mask)
        return [p if want else None for p, want in zip(column, wanted, strict=True)]

    def _run(
        self, columns: Columns, state: Any, decayed: Operands, bases: Leaves | None, inplace: bool
    ) -> tuple[Leaves, Any]:
        trees = {f"state.{field}": getattr(state, field) for field in self.rule.moments}
        leaves = {name: columns.match(name, tree) for name, tree in trees.items()}
        moments = {name: columns.present(name, column) for name, column in leaves.items()}
        added: Operands = bases or [None] * len(decayed)
        memory = _fused.locate([columns.first, decayed, added, *moments.values()])
        if memory is None:
            columns.checked()
            columns.compare("params", decayed)
            columns.compare("params", added)
            for name, column in moments.items():
                columns.compare(name, column, accumulated=True)
        count = _next_count(self.name, columns, state.count)
        step = Step(self.rule, count, columns.rows, columns.first, decayed, added, [*moments.values()], memory)
        if inplace:
            results = self._overwrite(step)
            [[count]] = _donation.fill([[state.count]], [[count]])
        else:
            results = self._results(step, None)
        news = zip(self.rule.moments, leaves.values(), results[1:], strict=True)
        fields = {field: columns.tree_of(old, new) for field, old, new in news}
        return results[0], self.state(count=count, **fields)

    def _overwrite(self, step: Step) -> list[Leaves]:
        """The results in the memory of the parameters, or else the gradients, and of the moments."""
        learned = [h for h in vars(self.rule).values() if isinstance(h, torch.Tensor)]
        fused = any(base is not None for base in step.bases)
        if not step.is_constant or torch.is_grad_enabled() or learned:
            read = [p for p in step.decayed if p is not None and not fused]
            tracked = [*step.grads, *flat(step.moments), *learned, *read]
            _donation.refuse_tracked(self.name, "gradients, state, hyper-parameters or decayed parameters", tracked)
        if fused:
            _donation.refuse_needed(self.name, "params", [p for p in step.bases if p is not None])
        with torch.no_grad():
            return self._results(step, [step.bases if fused else step.grads, *step.moments])

    def _results(self, step: Step, buffers: Buffers | None) -> list[Leaves]:
        # What was located is all of one kind.
        some = step.grads[:1] if step.memory else step.grads
        devices, dtypes = {g.device for g in some}, {g.dtype for g in some}
        if self.use_accelerated_op:
            self._insist(devices, dtypes)
        if len(devices) <= 1 and len(dtypes) <= 1:
            return self._of_one_kind(step, buffers)
        if buffers is not None:
            buffers = _donation.own(self.name, step, buffers)
        results: list[Leaves] = [[torch.empty(0)] * len(step.rows) for _ in range(1 + len(step.moments))]
        for device, dtype in itertools.product(devices, dtypes):
            at = [row for row, g in enumerate(step.grads) if g.device == device and g.dtype == dtype]
            part = None if buffers is None else [[column[k] for k in at] for column in buffers]
            for column, values in zip(results, self._of_one_kind(step.subset(at), part), strict=True):
                for row, value in zip(at, values, strict=True):
                    column[row] = value
        return results

    def _insist(self, devices: Iterable[torch.device], dtypes: Iterable[torch.dtype]) -> None:
        for device, dtype in itertools.product(devices, dtypes):
            if lack := _fused.missing(device, dtype.to_real()):
                raise ValueError(f"{self.name}: use_accelerated_op=True, but {lack}")

    def _of_one_kind(self, step: Step, buffers: Buffers | None) -> list[Leaves]:
        """The results for leaves of one device and dtype."""
        if not step.grads:
            return [[] for _ in (step.grads, *step.moments)]
        device, dtype = step.grads[0].device, step.grads[0].dtype
        if dtype.is_complex:
            return self._of_complex(step, buffers)
        if self.use_accelerated_op is not False:
            served = _fused.missing(device, dtype) is None
            if served and _fused.serves(step, self.name, insists=bool(self.use_accelerated_op)):
                return _fused.run(self.name, step, buffers)
        results = step.results()
        return results if buffers is None else _donation.fill(_donation.own(self.name, step, buffers), results)

    def _of_complex(self, step: Step, buffers: Buffers | None) -> list[list[Any]]:
        """Complex numbers are pairs of reals, as in torch.optim."""
        # One view of each tensor: what is overwritten is known by identity.
        pairs = {id(t): torch.view_as_real(t.resolve_conj()) for t in step.operands}
        reals = step.of([pairs[id(t)] for t in step.operands])
        if buffers is None:
            results = self._of_one_kind(reals, None)
            return [[torch.view_as_complex(t.contiguous()) for t in column] for column in results]
        results = self._of_one_kind(
            reals, [[None if b is None else pairs[id(b)] for b in column] for column in buffers]
        )
        return [
            [_complex_of(r, b, pairs) for b, r in zip(*columns, strict=True)]
            for columns in zip(buffers, results, strict=True)
        ]


def _complex_of(real: torch.Tensor, buffer: torch.Tensor | None, pairs: dict[int, torch.Tensor]) -> torch.Tensor:
    """A result as complex numbers: the buffer, if it is in there."""
    if buffer is None or pairs[id(buffer)] is not real:
        return torch.view_as_complex(real.contiguous())
    # The pairs of a view of a conjugate are a copy.
    return buffer.copy_(torch.view_as_complex(real)) if buffer.is_conj() else buffer


def _next_count(name: str, columns: Columns, count: torch.Tensor) -> torch.Tensor:
    """The step number of each leaf, one more where there is a gradient."""
    if count.dtype != torch.int64:
        raise TypeError(f"{name}: state.count is {count.dtype}; it has to stay int64 when the state is converted")
    total = len(columns.leaves)
    if count.shape != (total,):
        raise ValueError(f"{name}: grads have {total} leaves, but state.count has the shape {list(count.shape)}")
    if len(columns.rows) == total:
        return count + 1
    chosen = set(columns.rows)
    return count + torch.tensor([int(i in chosen) for i in range(total)], device=count.device)
