"""The (init, update) pair over trees of a rule for one leaf.

A step takes the first possible of three ways: one kernel call for all leaves (`_fused.at_once`), one kernel call for
each group of leaves of equal device, dtype and hyper-parameters (`_fused.run`), or plain torch (`Step.results`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

import implicitdiff._torch.trees as pytree
import implicitdiff.optim._donation as _donation
import implicitdiff.optim._fused as _fused
from implicitdiff._calls import Remembers
from implicitdiff._torch.trees import Leaves, Number, Tree, TreeSpec
from implicitdiff.optim._base import GradientTransformation
from implicitdiff.optim._columns import (
    Columns,
    accumulator,
    is_optimized,
    refuse_misfits,
    refuse_others,
    value_of_each_leaf,
)
from implicitdiff.optim._inject import inject_hyperparams, schedules_among
from implicitdiff.optim._rule import UpdateRule
from implicitdiff.optim._step import Buffers, Operands, Step, flat


def transformation(
    name: str, rule: UpdateRule, state: type[Any], *, mask: Tree = None, use_accelerated_op: bool | None = None
) -> GradientTransformation:
    """Return the pair of a rule.

    Args:
        name: of the public factory, for error messages.
        rule: the step; its hyper-parameters may be schedules, tensors that broadcast to a leaf, or trees of these.
        state: the type of the state, a NamedTuple of ``count`` and the moments.
        mask: the parameters that decay: a mask for `Columns.mask_of_rows`, or a function from parameters to a mask.
            None: all.
        use_accelerated_op: True requires compiled steps, False forbids them, None takes them if faster.
    """
    if use_accelerated_op:
        _fused.require(name)
    others = {k: v for k, v in vars(rule).items() if not isinstance(v, (int, float))}
    if schedules := schedules_among(others):
        # `inject_hyperparams` evaluates the schedules in each update and makes the pair again with their values.
        at = functools.partial(_with_values, name, rule, state, mask, use_accelerated_op)
        return inject_hyperparams(at)(**schedules)
    # A scalar tensor is one number for all leaves, and a kernel reads its value; other tensors and trees vary.
    varied = tuple(k for k, v in others.items() if not isinstance(v, torch.Tensor) or v.ndim)
    tensors, numbers = tuple(pytree.tensors([*others.values()])), None if others else tuple(_fused.numbers_of(rule))
    moments = {f"state.{field}": field for field in rule.moments}
    update = _RuleUpdate(name, rule, state, mask, use_accelerated_op, varied, tensors, numbers, moments)
    return GradientTransformation(update.init, update)


def _with_values(
    name: str, rule: UpdateRule, state: type[Any], mask: Tree, use_accelerated_op: bool | None, **values: Any
) -> GradientTransformation:
    """Return the pair of a rule with some hyper-parameters replaced."""
    rule = dataclasses.replace(rule, **values)
    return transformation(name, rule, state, mask=mask, use_accelerated_op=use_accelerated_op)


def _initial(name: str, leaf: torch.Tensor | None, value: Number | complex | None) -> torch.Tensor | None:
    if not is_optimized(leaf):
        return None
    dtype = accumulator(leaf.dtype)
    if value is None:
        raise ValueError(
            f"{name}: {_PUBLIC['initial']} must not be None for a parameter, got None for one of shape "
            f"{list(leaf.shape)}"
        )
    if leaf.is_complex():  # the real and the imaginary part are accumulated as two reals, from one start each
        value = value * (1 + 1j)
    if not isinstance(value, torch.Tensor):
        return torch.full_like(leaf, value, dtype=dtype, requires_grad=False)
    # A sum, because a copy into new memory would lose the derivative and the lanes of a learned initial value.
    return torch.zeros_like(leaf, dtype=dtype, requires_grad=False) + value.to(leaf.device, dtype)


# Public spelling of the hyper-parameters that the rule names differently.
_PUBLIC = {"b1": "betas[0]", "b2": "betas[1]", "initial": "initial_accumulator_value"}


@dataclasses.dataclass(frozen=True, repr=False)
class _RuleUpdate(Remembers):
    """``init``, ``update`` and the fused ``step`` of a rule.

    Attributes:
        varied: names of the hyper-parameters that differ between leaves or elements.
        tensors: all tensors among the hyper-parameters.
        numbers: arguments of the kernel, or None if a hyper-parameter is a tensor or a tree.
        moments: fields of the state that are moments, by their spelling in error messages.
    """

    name: str
    rule: UpdateRule
    state: type[Any]
    mask: Tree
    use_accelerated_op: bool | None
    varied: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...]
    numbers: tuple[float, ...] | None
    moments: dict[str, str]

    def init(self, params: Tree) -> Tree:
        leaves, spec = pytree.leaves_of(params)
        refuse_others(self.name, leaves)
        for key, values in self._varied_values(spec).items():
            # An error in `init` names the hyper-parameter; in a step it would name a broken product.
            refuse_misfits(self.name, _PUBLIC.get(key, key), values, leaves, spec)
        moments = {field: self._begun(value, leaves, spec) for field, value in self.rule.moments.items()}
        device = next((leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)), None)
        return self.state(count=torch.zeros(len(leaves), dtype=torch.int64, device=device), **moments)

    def _varied_values(self, spec: TreeSpec) -> dict[str, list[Any]]:
        """Return the values of each varied hyper-parameter, one for each leaf."""
        named = {key: (_PUBLIC.get(key, key), getattr(self.rule, key)) for key in self.varied}
        return {key: value_of_each_leaf(self.name, *given, spec) for key, given in named.items()}

    def _begun(self, value: Tree, leaves: Leaves, spec: TreeSpec) -> Tree:
        """Return the initial values of a moment."""
        starts = value_of_each_leaf(self.name, _PUBLIC["initial"], value, spec)
        return pytree.unflatten([_initial(self.name, *pair) for pair in zip(leaves, starts, strict=True)], spec)

    def __call__(self, grads: Tree, state: Tree, params: Tree = None, *, inplace: bool = False) -> tuple[Tree, Tree]:
        columns = self._columns(grads, state)
        decayed = self._decayed(columns, params)
        outs, state = self._run(columns, state, decayed, [None] * len(decayed), 0, inplace)
        return columns.tree_of(columns.leaves, outs), state

    def step(self, grads: Tree, state: Tree, params: Tree, *, inplace: bool = False) -> tuple[Tree, Tree]:
        columns = self._columns(grads, state)
        leaves = columns.match("params", params)
        bases = columns.present("params", leaves)
        outs, state = self._run(columns, state, self._decayed(columns, params), bases, 2, inplace)
        return columns.tree_of(leaves, outs), state

    def _columns(self, grads: Tree, state: Tree) -> Columns:
        if not isinstance(state, self.state):
            raise TypeError(
                f"{self.name}: state must be the {self.state.__name__} of its init, got {type(state).__name__}"
            )
        # `count` is in the order of the state's leaves, so gradients are put into the same order.
        like = next(((name, getattr(state, field)) for name, field in self.moments.items()), None)
        return Columns(self.name, "grads", grads, like=like)

    def _decayed(self, columns: Columns, params: Tree) -> Operands:
        """Return for each row the parameter, or None without weight decay."""
        if not self.rule.decays:
            return [None] * len(columns.rows)
        if params is None:
            raise ValueError(f"{self.name}: weight_decay needs the parameters; call update(grads, state, params)")
        column = columns.present("params", columns.match("params", params))
        if self.mask is None:
            return column
        return columns.masked(column, self.mask, params)

    def _run(
        self, columns: Columns, state: Tree, decayed: Operands, bases: Operands, target: int, inplace: bool
    ) -> tuple[Leaves, Tree]:
        leaves = [columns.match(name, getattr(state, field)) for name, field in self.moments.items()]
        moments = [columns.present(name, column) for name, column in zip(self.moments, leaves, strict=True)]
        # Columns by index: 0 gradients, 1 decayed parameters, 2 bases, from 3 on moments. In place, updates take the
        # memory of gradients, new parameters that of the old: `target` is the index of either.
        table = [columns.first, decayed, bases, *moments]
        donated = [target, *range(3, len(table))] if inplace else []
        memory = _fused.locate(table, donated, state.count)
        if memory is _fused.NOT_LOCATED:
            self._check(columns, table)
        increment = _increment(self.name, columns, state.count)
        numbers = self._numbers_for(columns, memory, inplace)
        if numbers is not None:
            # In place the count increases before the kernel reads it.
            count = _increment_in_place(self.name, state.count, increment) if inplace else state.count + increment
            results = _fused.at_once(self.rule.kernel, numbers, columns.rows, count, table, donated, memory)
        else:
            # The general path: groups of leaves by kernel or in plain torch, under any transform.
            step = Step(self.rule, state.count + increment, columns.rows, columns.first, decayed, bases, moments)
            results, count = self._leaf_by_leaf(step, self._kinds(columns), state.count if inplace else None)
        news = zip(self.moments.values(), leaves, results[1:], strict=True)
        return results[0], self.state(count=count, **{field: columns.tree_of(old, new) for field, old, new in news})

    def _check(self, columns: Columns, table: Sequence[Operands]) -> None:
        """Raise unless the columns of a step agree in shape, dtype and device."""
        if self.rule.takes_sparse:
            columns.densify()
        columns.checked(_NOT_SPARSE.format(self.name))
        for column in table[1:3]:
            columns.compare("params", column)
        for name, column in zip(self.moments, table[3:], strict=True):
            columns.compare(name, column, accumulator)

    def _numbers_for(self, columns: Columns, memory: _fused.Located, inplace: bool) -> Sequence[float] | None:
        """Return the arguments of a kernel, or None if no single kernel call may compute the step."""
        if self.varied or not memory.sizes or self.use_accelerated_op is False:
            return None
        # `is_free`: no transform or graph needs the result. `is_donated`: memory may be overwritten besides.
        first, allowed = columns.first[0], memory.is_donated if inplace else memory.is_free
        if not allowed or _fused.missing(first.device, first.dtype) is not None:
            return None
        if self.numbers is not None:
            return self.numbers
        return _fused.numbers_of(self.rule) if all(map(_fused.is_number, self.tensors)) else None

    def _kinds(self, columns: Columns) -> list[tuple[UpdateRule, list[int]]]:
        """Return the groups of rows of equal device, dtype and hyper-parameters, with the rule of each."""
        if not self.varied and len({(leaf.device, leaf.dtype) for leaf in columns.first}) == 1:
            return [(self.rule, [*range(len(columns.rows))])]
        values = self._varied_values(columns.spec)
        for key, column in values.items():
            columns.refuse_misfits(_PUBLIC.get(key, key), column)
        varied = {key: columns.pick(column) for key, column in values.items()}
        kinds: defaultdict[Any, list[int]] = defaultdict(list)
        for row, (leaf, *own) in enumerate(zip(columns.first, *varied.values(), strict=True)):
            # Numbers are equal by value, tensors by identity. The types keep a tensor apart from a number of its hash.
            kinds[leaf.device, leaf.dtype, *map(type, own), *own].append(row)
        return [(self._rule_of(rows[0], varied), rows) for rows in kinds.values()]

    def _rule_of(self, row: int, varied: dict[str, list[Any]]) -> UpdateRule:
        # As tensors, so that the rule keeps a momentum of 0: the fields of the state must not differ by leaf.
        return dataclasses.replace(self.rule, **{key: _as_tensor(column[row]) for key, column in varied.items()})

    def _leaf_by_leaf(
        self, step: Step, kinds: Sequence[tuple[UpdateRule, list[int]]], count: torch.Tensor | None
    ) -> tuple[list[Leaves], torch.Tensor]:
        """Return the results and the count. With the old `count` given, both are written in place."""
        if self.use_accelerated_op:
            self._require_kernels(step.grads)
        if count is None:
            return self._results(step, kinds, step.no_buffers), step.count
        self._refuse_overwrite(step)
        with torch.no_grad():
            results = self._results(step, kinds, _donation.unshared_buffers(self.name, step))
        # The count changes last, so a step that raises leaves the count as it was.
        [[new]] = _donation.fill([[count]], [[step.count]])
        return results, new

    def _refuse_overwrite(self, step: Step) -> None:
        """Raise if the target or the moments may not be overwritten, or if the step has a derivative."""
        _donation.refuse_needed(self.name, "params", [p for p in step.bases if p is not None])
        # Decay reads a leaf of a graph by value, under no_grad, as torch.optim does.
        read = [p for p in step.decayed if p is not None and not _donation.is_leaf(p)]
        tracked = [*step.grads, *flat(step.moments), *self.tensors, *read]
        _donation.refuse_tracked(self.name, "gradients, state, hyper-parameters or decayed parameters", tracked)

    def _results(self, step: Step, kinds: Sequence[tuple[UpdateRule, list[int]]], buffers: Buffers) -> list[Leaves]:
        if len(kinds) == 1 and kinds[0][0] is step.rule:
            return self._results_of_one_kind(step, buffers)
        parts = [
            self._results_of_one_kind(step.subset(rows, rule), [[column[k] for k in rows] for column in buffers])
            for rule, rows in kinds
        ]
        # The rows of all groups, one group after the other, and where each row of the step is among them.
        joined = [flat(part[k] for part in parts) for k in range(len(buffers))]
        order = sorted(range(len(step.rows)), key=flat(rows for _, rows in kinds).__getitem__)
        return [[column[k] for k in order] for column in joined]

    def _require_kernels(self, leaves: Leaves) -> None:
        if lacks := list(filter(None, [_fused.missing(leaf.device, leaf.dtype.to_real()) for leaf in leaves])):
            raise ValueError(f"{self.name}: use_accelerated_op=True, but {lacks[0]}")

    def _results_of_one_kind(self, step: Step, buffers: Buffers) -> list[Leaves]:
        """Compute the results of leaves of one device, dtype and rule, in the buffers that can hold them."""
        first = step.grads[0]
        if first.is_complex():
            return self._results_of_complex(step, buffers)
        has_kernel = self.use_accelerated_op is not False and _fused.missing(first.device, first.dtype) is None
        # `serves` tells if a kernel may run under the present transforms.
        if has_kernel and _fused.serves(step, self.name, insists=bool(self.use_accelerated_op)):
            return _fused.run_kernel(step, buffers)
        return _donation.fill(buffers, step.results())

    def _results_of_complex(self, step: Step, buffers: Buffers) -> list[Leaves]:
        """Compute a step of complex leaves as one of pairs of reals, as torch.optim does."""
        # One view for each tensor: buffers are matched with operands by identity.
        pairs = {id(t): torch.view_as_real(t.resolve_conj()) for t in step.operands}
        # A number for each complex element is shared by its two reals.
        pairwise = step.rule.with_tensors(lambda v: v.unsqueeze(-1) if v.ndim else v)
        reals = dataclasses.replace(step.of([pairs[id(t)] for t in step.operands]), rule=pairwise)
        results = self._results_of_one_kind(reals, [[pairs.get(id(b)) for b in column] for column in buffers])
        return [
            [_complex_of(r, b, pairs) for b, r in zip(*columns, strict=True)]
            for columns in zip(buffers, results, strict=True)
        ]


_NOT_SPARSE = (
    " ({} also moves parameters whose gradient is zero, so sparse gradients would save nothing: use sgd or adagrad, "
    "torch.optim.SparseAdam, which is another algorithm, or grad.to_dense())"
)


def _as_tensor(value: Number | None) -> Any:
    return torch.tensor(value, dtype=torch.float64, device="cpu") if isinstance(value, (int, float)) else value


def _complex_of(real: torch.Tensor, buffer: torch.Tensor | None, pairs: dict[int, torch.Tensor]) -> torch.Tensor:
    """Return a real result as a complex tensor: the buffer, if the result was written into its pairs."""
    if buffer is None or pairs[id(buffer)] is not real:
        return torch.view_as_complex(real.contiguous())
    # `resolve_conj` of a lazy conjugate is a copy, so the result has to be copied into the buffer.
    return buffer.copy_(torch.view_as_complex(real)) if buffer.is_conj() else buffer


def _increment(name: str, columns: Columns, count: torch.Tensor) -> int | torch.Tensor:
    """Return the increment of `count`: 1 for each leaf with a gradient, else 0."""
    if count.dtype != torch.int64:
        raise TypeError(f"{name}: state.count must stay int64 when the state is converted, got {count.dtype}")
    total = len(columns.leaves)
    if count.shape != (total,):
        raise ValueError(
            f"{name}: state.count must have one entry for each of the {total} leaves of grads, got the shape "
            f"{list(count.shape)}"
        )
    if len(columns.rows) == total:
        return 1
    # A leaf without a gradient keeps its step number, so a bias correction counts gradients and not steps.
    rows = set(columns.rows)
    return torch.tensor([int(i in rows) for i in range(total)], device=count.device)


def _increment_in_place(name: str, count: torch.Tensor, increment: int | torch.Tensor) -> torch.Tensor:
    """Add the increment to the count in place."""
    # torch raises too, but after the addition.
    if count.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{name}: inplace=True would overwrite state.count, which was made in inference mode and can be "
            "overwritten only there; use inplace=False, or run init outside of inference mode"
        )
    return count.add_(increment)
