"""The optimizers of this library in the interface of torch.optim, with hyper-parameters in parameter groups.

A group with schedules makes its transformation through `inject_hyperparams`, so the state is an `InjectState` around
the optimizer's own state. `self.state` holds moments for each parameter under the names of torch.optim, and the step
number.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch

import implicitdiff._torch.trees as pytree
import implicitdiff.objects._check as _check
import implicitdiff.optim as optim
from implicitdiff._torch.trees import Leaves, Tree
from implicitdiff.objects.optimizer import Group, Optimizer, Pure, group_key
from implicitdiff.optim import InjectState
from implicitdiff.optim._base import GradientTransformation
from implicitdiff.optim._columns import accumulator
from implicitdiff.optim._inject import schedules_among


class _GroupTransformation(NamedTuple):
    """The transformation of a group, cached from step to step.

    Attributes:
        values: the hyper-parameters of which the transformation is made.
        size: number of parameters that take part in a step.
        transformation: the pair.
        empty: an initial state with None for every leaf.
        names: names of torch.optim by the fields of the state that are moments.
    """

    values: Group
    size: int
    transformation: GradientTransformation
    empty: Tree
    names: dict[str, str]


class _NamedOptimizer(Optimizer):
    """An optimizer with the hyper-parameters of a factory in its groups, and a state for each parameter.

    States have the names of torch.optim, so checkpoints are exchangeable with torch.optim. A hyper-parameter of a group
    may be a schedule, or a list of a number, tensor or schedule for each parameter of the group. Checkpoints hold the
    present value of a schedule instead of the function, and the number of steps of the group as ``count``.

    Attributes:
        factory: returns the transformation.
        hyperparameters: names of the arguments of `factory` that groups have.
        names: names of torch.optim by the fields of the state that are moments.
        flags: entries of a group by which torch.optim distinguishes optimizers of one class.
    """

    factory: ClassVar[Callable[..., GradientTransformation]]
    hyperparameters: ClassVar[Sequence[str]]
    names: ClassVar[Mapping[str, str]]
    flags: ClassVar[Mapping[str, bool]]
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(
        cls,
        factory: Callable[..., GradientTransformation] | None = None,
        names: Mapping[str, str] = MappingProxyType({}),
        flags: Mapping[str, bool] = MappingProxyType({}),
    ) -> None:
        super().__init_subclass__()
        if factory is not None:
            cls.factory, cls.names, cls.flags = staticmethod(factory), names, flags
            cls.__signature__ = _check.object_signature("params", factory)
            # Groups with different weight_decay replace a mask.
            cls.hyperparameters = [key for key in inspect.signature(factory).parameters if key != "mask"]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = _check.bind_arguments(type(self), args, kwargs)
        if given.pop("mask", None) is not None:
            raise ValueError(f"{type(self).__name__}: has no mask; use a parameter group with weight_decay=0 instead")
        # Defaults of the factory are written into groups too, where schedulers and users change them.
        params, defaults = given.pop("params"), inspect.signature(self.factory).parameters
        values = {key: given.get(key, defaults[key].default) for key in self.hyperparameters}
        self._transformations: dict[int, _GroupTransformation] = {}
        # Not `Optimizer.__init__`, which expects a transformation.
        torch.optim.Optimizer.__init__(self, params, {**values, **self.flags})

    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group, with hyper-parameters where they differ from the defaults.

        Raises:
            ValueError: a hyper-parameter is out of range.
        """
        values = self._hyperparameters({**self.defaults, **param_group})
        transformation = self.factory(**values)
        self._check_flags(param_group)
        torch.optim.Optimizer.add_param_group(self, param_group)
        if any(not isinstance(value, (int, float, type(None))) for value in values.values()):
            # A tensor or a tree has to fit the parameters, which ``init`` checks.
            try:
                transformation.init(self.param_groups[-1]["params"])
            except BaseException:
                self.param_groups.pop()
                raise
        if schedules_among(values):
            self._count(self.param_groups[-1])

    def state_dict(self) -> dict[str, Any]:
        """Return the state in the layout of torch.optim, with present values instead of schedules."""
        saved = torch.optim.Optimizer.state_dict(self)
        for group in saved["param_groups"]:
            mine = schedules_among(self._hyperparameters(group))
            group.update({key: _current_value(group["count"], value) for key, value in mine.items()})
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a copy of a state that `state_dict` returned, with the schedules of this optimizer.

        Raises:
            ValueError: the state belongs to other parameters or to another optimizer. Nothing is changed then.
        """
        schedules = [schedules_among(self._hyperparameters(group)) for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, mine in zip(self.param_groups, schedules, strict=True):
            group.update(mine)
            if mine:
                self._count(group)
            else:
                group.pop("count", None)

    def _count(self, group: Group) -> int:
        """Number of steps of a group with schedules; of a checkpoint without ``count``, the most of any parameter."""
        if "count" not in group:
            group["count"] = max((int(self.state[p]["step"]) for p in group["params"] if p in self.state), default=0)
        return int(group["count"])

    def __getstate__(self) -> dict[str, Any]:
        return {**torch.optim.Optimizer.__getstate__(self), "_transformations": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            # Checkpoints of torch.optim lack hyper-parameters such as eps_root.
            known = [*self.hyperparameters, *self.flags]
            group.update({key: self.defaults[key] for key in known if key not in group})

    def _hyperparameters(self, group: Group) -> Group:
        return {key: group[key] for key in self.hyperparameters}

    def _params_to_step(self, group: Group) -> Leaves:
        # Like torch.optim, without a state for frozen parameters.
        return [p for p in group["params"] if p.grad is not None]

    def _transformation_for(self, index: int, params: Leaves) -> _GroupTransformation:
        """Return the transformation for some parameters of a group, made again if a hyper-parameter was replaced."""
        group = self.param_groups[index]
        values = self._hyperparameters(group)
        if len(params) < len(group["params"]):
            stepped = set(map(id, params))
            among = [id(p) in stepped for p in group["params"]]
            values = {key: _selected(value, among) for key, value in values.items()}
        made = self._transformations.get(index)
        # Compared by identity: a comparison of tensors by value would wait for the device, and values are read in each
        # step in any case.
        if made is None or made.size != len(params) or any(value is not made.values[k] for k, value in values.items()):
            transformation = self.factory(**values)
            # The nesting of a state without its tensors: the tensors are kept by parameter.
            empty = transformation.init([None] * len(params))
            names = {
                field: name
                for field, name in self.names.items()
                if isinstance(getattr(_inner_state(empty), field), list)
            }
            made = self._transformations[index] = _GroupTransformation(
                values, len(params), transformation, empty, names
            )
        return made

    def _pure(self, index: int, params: Leaves) -> Pure:
        _, _, transformation, outer, names = made = self._transformation_for(index, params)
        state = _inner_state(outer)
        if params:
            entries = self._param_states(made, params, [self.state.get(p, {}) for p in params])
            # torch.optim keeps a float32 step for each parameter; states of this library an int64 vector.
            steps = torch.stack([entry["step"].to(params[0].device) for entry in entries])
            moments = {field: [entry[name] for entry in entries] for field, name in names.items()}
            state = state._replace(count=steps.to(torch.int64), **moments)
        if isinstance(outer, InjectState):
            count = torch.tensor(self._count(self.param_groups[index]), device="cpu")
            state = outer._replace(count=count, inner=state)
        return Pure(transformation, params, state)

    def _param_states(self, made: _GroupTransformation, params: Leaves, kept: list[Group]) -> list[Group]:
        """Return the state of each parameter, initialised if missing, converted to its dtype and device."""
        names = made.names
        needed = {"step", *names.values()}
        lacking = [not entry.keys() >= needed for entry in kept]
        if any(lacking):
            # `init` for parameters without a state alone: None leaves the others out.
            fresh = _inner_state(
                made.transformation.init([p if lacks else None for p, lacks in zip(params, lacking, strict=True)])
            )
            begun = [{name: getattr(fresh, field)[i] for field, name in names.items()} for i in range(len(params))]
            kept = [
                self._with_initial(fresh.count[i].float(), begun[i], entry) if lacks else entry
                for i, (entry, lacks) in enumerate(zip(kept, lacking, strict=True))
            ]
        if not names:
            return kept
        moments = [*names.values()]
        return [_converted(entry, p, moments) for entry, p in zip(kept, params, strict=True)]

    def _with_initial(self, step: torch.Tensor, begun: Group, kept: Group) -> Group:
        if "momentum_buffer" in begun.keys() - kept.keys():
            # If momentum is switched on later, its first trace is the undamped gradient, as at step number 1.
            kept = {key: value for key, value in kept.items() if key != "step"}
        return {"step": step, **begun, **kept}

    def _store(self, index: int, params: Leaves, state: Tree) -> None:
        group = self.param_groups[index]
        if schedules_among(self._hyperparameters(group)):
            # Also where all schedules belong to parameters without a gradient, so that `state` has no count of updates.
            group["count"] = self._count(group) + 1
        state = _inner_state(state)
        names = [(name, getattr(state, field)) for field, name in self._transformations[index].names.items()]
        for i, (p, step) in enumerate(zip(params, state.count.float().unbind(), strict=True)):
            self.state[p] = {"step": step, **{name: column[i] for name, column in names}}

    def _load_group(self, index: int, saved: Group, states: dict[Any, Any]) -> None:
        self._check_flags(saved)
        if group_key(index) in states:
            raise ValueError(
                f"{type(self).__name__}: the given state is one state for all parameters of a group; load it into "
                "Optimizer"
            )
        params = self.param_groups[index]["params"]
        fresh = self._param_states(self._transformation_for(index, params), params, [{} for _ in params])
        # A checkpoint refers to parameters by number, in the order of the groups.
        for key, p, entry in zip(saved["params"], params, fresh, strict=True):
            kept = {k: v for k, v in states.get(key, {}).items() if v is not None}
            if kept:
                self.state[p] = self._checked_param_state(entry, kept)

    def _check_flags(self, group: Group) -> None:
        if odd := {key: value for key, value in self.flags.items() if group.get(key, value) != value}:
            [(key, value)] = odd.items()
            raise ValueError(
                f"{type(self).__name__}: {key} must be {value} in every parameter group, got {group[key]}; use "
                f"{'Adam' if value else 'AdamW'}"
            )

    def _checked_param_state(self, fresh: Group, kept: Group) -> Group:
        """Return the state of a parameter from a checkpoint, in the dtypes and on the devices of a fresh state.

        Tensors are taken from the checkpoint, not from torch's copies: torch converts moments to the dtype of the
        parameter, and moments of half precision have too few digits.
        """
        # torch.optim.SGD saves no step number. With 1, the loaded trace is not taken for a first one.
        kept = {"step": 1.0, **kept} if "momentum_buffer" in fresh else kept
        if kept.keys() != fresh.keys():
            raise ValueError(
                f"{type(self).__name__}: the given state is of another optimizer, or of other hyper-parameters: for a "
                f"parameter it must have {sorted(fresh)}, got {sorted(kept)}"
            )
        if odd := [key for key in fresh if key != "step" and torch.as_tensor(kept[key]).shape != fresh[key].shape]:
            raise ValueError(
                f"{type(self).__name__}: the given state is of other parameters: expected {odd[0]} of shape "
                f"{list(fresh[odd[0]].shape)}, got shape {list(torch.as_tensor(kept[odd[0]]).shape)}"
            )
        return {key: torch.as_tensor(kept[key]).to(like.device, like.dtype, copy=True) for key, like in fresh.items()}


def _inner_state(state: Tree) -> Tree:
    """Return the state of the optimizer without the `InjectState` around it."""
    return state.inner if isinstance(state, InjectState) else state


def _current_value(count: int, value: Tree) -> Tree:
    """Evaluate the schedules in a hyper-parameter after `count` steps."""

    def now(leaf: Tree) -> Tree:
        if not callable(leaf):
            return leaf
        found = leaf(torch.tensor(count, device="cpu"))
        return found.item() if isinstance(found, torch.Tensor) and found.ndim == 0 else found

    return pytree.map_leaves(now, value)


def _selected(value: Tree, among: list[bool]) -> Tree:
    """Restrict a hyper-parameter to the parameters whose entry in `among` is True."""
    if isinstance(value, tuple):  # betas
        return tuple(_selected(part, among) for part in value)
    if not isinstance(value, list) or len(value) != len(among):
        return value
    return [part for part, is_in in zip(value, among, strict=True) if is_in]


def _converted(entry: Group, p: torch.Tensor, moments: Sequence[str]) -> Group:
    """Convert the state of a parameter to its present dtype and device."""
    one = entry[moments[0]]
    if one is None or (one.dtype is accumulator(p.dtype) and one.device == p.device):
        return entry
    return entry | {name: entry[name].to(p.device, accumulator(p.dtype)) for name in moments}


_ADAM = {"mu": "exp_avg", "nu": "exp_avg_sq", "nu_max": "max_exp_avg_sq"}


class SGD(_NamedOptimizer, factory=optim.sgd, names={"trace": "momentum_buffer"}):
    """`Optimizer` of `implicitdiff.sgd`, whose arguments it takes."""


class Adam(_NamedOptimizer, factory=optim.adam, names=_ADAM, flags={"decoupled_weight_decay": False}):
    """`Optimizer` of `implicitdiff.adam`, whose arguments it takes."""


class AdamW(_NamedOptimizer, factory=optim.adamw, names=_ADAM, flags={"decoupled_weight_decay": True}):
    """`Optimizer` of `implicitdiff.adamw`, whose arguments it takes."""


class RMSProp(
    _NamedOptimizer, factory=optim.rmsprop, names={"nu": "square_avg", "mean": "grad_avg", "trace": "momentum_buffer"}
):
    """`Optimizer` of `implicitdiff.rmsprop`, whose arguments it takes."""


class AdaGrad(_NamedOptimizer, factory=optim.adagrad, names={"total": "sum"}):
    """`Optimizer` of `implicitdiff.adagrad`, whose arguments it takes."""


class AdaDelta(_NamedOptimizer, factory=optim.adadelta, names={"nu": "square_avg", "delta": "acc_delta"}):
    """`Optimizer` of `implicitdiff.adadelta`, whose arguments it takes."""


class AdaMax(_NamedOptimizer, factory=optim.adamax, names={"mu": "exp_avg", "nu": "exp_inf"}):
    """`Optimizer` of `implicitdiff.adamax`, whose arguments it takes."""


class RAdam(_NamedOptimizer, factory=optim.radam, names={"mu": "exp_avg", "nu": "exp_avg_sq"}):
    """`Optimizer` of `implicitdiff.radam`, whose arguments it takes."""


# Spelling of torch.optim.
RMSprop, Adagrad, Adadelta, Adamax = RMSProp, AdaGrad, AdaDelta, AdaMax
