"""The optimizers of this library as those of torch.optim, with their hyper-parameters in groups."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch

import implicitdiff._torch.trees as pytree
import implicitdiff.objects._check as _check
import implicitdiff.optim as optim
from implicitdiff.objects.optimizer import Group, Leaves, Optimizer, Pure, group_key
from implicitdiff.optim import InjectState
from implicitdiff.optim._base import GradientTransformation
from implicitdiff.optim._columns import accumulator


class _Made(NamedTuple):
    """What was made of the hyper-parameters of a group.

    Attributes:
        values: the hyper-parameters.
        size: for how many parameters.
        transformation: the pair.
        empty: its state before any step, without moments.
        names: the fields that are moments, with torch's name for each.
    """

    values: Group
    size: int
    transformation: GradientTransformation
    empty: Any
    names: dict[str, str]


class _Of(Optimizer):
    """An optimizer with the hyper-parameters of a factory in its groups, and the state of each parameter by itself.

    That has the names which torch.optim gives it: checkpoints of one can be loaded into the other. A hyper-parameter of
    a group may be a schedule, or a list with a number, a tensor or a schedule for each of the group's parameters. The
    value that a schedule has is saved in the place of its function, and the group's number of steps as ``count``.
    """

    factory: ClassVar[Callable[..., GradientTransformation]]
    hyperparameters: ClassVar[Sequence[str]]
    names: ClassVar[Mapping[str, str]]
    marks: ClassVar[Mapping[str, bool]]
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(
        cls,
        factory: Callable[..., GradientTransformation] | None = None,
        names: Mapping[str, str] | None = None,
        marks: Mapping[str, bool] | None = None,
    ) -> None:
        super().__init_subclass__()
        if factory is not None and names is not None:
            # What is marked is what torch tells by a group's flags.
            cls.factory, cls.names, cls.marks = staticmethod(factory), names, marks or {}
            cls.__signature__ = _check.signature("params", factory)
            # What a mask does, groups do here.
            cls.hyperparameters = [key for key in inspect.signature(factory).parameters if key != "mask"]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = _check.bound(type(self), args, kwargs)
        if given.pop("mask", None) is not None:
            raise ValueError(f"{type(self).__name__}: give what a mask would leave out a group with weight_decay=0")
        params, defaults = given.pop("params"), inspect.signature(self.factory).parameters
        values = {key: given.get(key, defaults[key].default) for key in self.hyperparameters}
        self._made: dict[int, _Made] = {}
        torch.optim.Optimizer.__init__(self, params, {**values, **self.marks})

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters, with hyper-parameters of their own where they are given.

        Raises:
            ValueError: a hyper-parameter is out of range.
        """
        values = self._hyperparameters({**self.defaults, **param_group})
        transformation = self.factory(**values)
        self._check_marks(param_group)
        torch.optim.Optimizer.add_param_group(self, param_group)
        if any(not isinstance(value, (int, float, type(None))) for value in values.values()):
            try:
                transformation.init(self.param_groups[-1]["params"])
            except BaseException:
                self.param_groups.pop()
                raise
        if _schedules(values):
            self._count(self.param_groups[-1])

    def state_dict(self) -> dict[str, Any]:
        """The state, as torch.optim has it; schedules are no part of it, but what they give now is."""
        saved = torch.optim.Optimizer.state_dict(self)
        for group in saved["param_groups"]:
            mine = _schedules(self._hyperparameters(group))
            group.update({key: _value(group["count"], value) for key, value in mine.items()})
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a copy of a state that `state_dict` gave, with the schedules that this optimizer has.

        Raises:
            ValueError: it is of other parameters or of another optimizer; nothing is changed.
        """
        schedules = [_schedules(self._hyperparameters(group)) for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, mine in zip(self.param_groups, schedules, strict=True):
            group.update(mine)
            if mine:
                self._count(group)
            else:
                group.pop("count", None)

    def _count(self, group: Group) -> int:
        """How many steps a group with schedules has taken."""
        steps = [int(self.state[p]["step"]) for p in group["params"] if p in self.state]
        return int(group.setdefault("count", max(steps, default=0)))

    def __getstate__(self) -> dict[str, Any]:
        return {**torch.optim.Optimizer.__getstate__(self), "_made": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            # A checkpoint of torch's does not know all of them.
            known = [*self.hyperparameters, *self.marks]
            group.update({key: self.defaults[key] for key in known if key not in group})

    def _hyperparameters(self, group: Group) -> Group:
        return {key: group[key] for key in self.hyperparameters}

    def _stepped(self, group: Group) -> Leaves:
        # As torch does, keep no state for frozen parameters.
        return [p for p in group["params"] if p.grad is not None]

    def _made_for(self, index: int, params: Leaves) -> _Made:
        """The pair for those parameters of a group."""
        group = self.param_groups[index]
        values = self._hyperparameters(group)
        if len(params) < len(group["params"]):
            stepped = set(map(id, params))
            among = [id(p) in stepped for p in group["params"]]
            values = {key: _picked(value, among) for key, value in values.items()}
        made = self._made.get(index)
        # By identity: a tensor's value may change, and is read in each step.
        if made is None or made.size != len(params) or any(value is not made.values[k] for k, value in values.items()):
            transformation = self.factory(**values)
            empty = transformation.init([None] * len(params))
            names = {field: name for field, name in self.names.items() if isinstance(getattr(_own(empty), field), list)}
            made = self._made[index] = _Made(values, len(params), transformation, empty, names)
        return made

    def _pure(self, index: int, params: Leaves) -> Pure:
        _, _, transformation, outer, names = made = self._made_for(index, params)
        state = _own(outer)
        if params:
            entries = self._entries(made, params, [self.state.get(p, {}) for p in params])
            steps = torch.stack([entry["step"].to(params[0].device) for entry in entries])
            moments = {field: [entry[name] for entry in entries] for field, name in names.items()}
            state = state._replace(count=steps.to(torch.int64), **moments)
        if isinstance(outer, InjectState):
            count = torch.tensor(self._count(self.param_groups[index]), device="cpu")
            state = outer._replace(count=count, inner=state)
        return Pure(transformation, params, state)

    def _entries(self, made: _Made, params: Leaves, kept: list[Group]) -> list[Group]:
        """The state of each parameter, begun where there is none, and converted where the parameter was."""
        names = made.names
        needed = {"step", *names.values()}
        lacking = [not entry.keys() >= needed for entry in kept]
        if any(lacking):
            fresh = _own(
                made.transformation.init([p if lacks else None for p, lacks in zip(params, lacking, strict=True)])
            )
            begun = [{name: getattr(fresh, field)[i] for field, name in names.items()} for i in range(len(params))]
            kept = [
                self._begun(fresh.count[i].float(), begun[i], entry) if lacks else entry
                for i, (entry, lacks) in enumerate(zip(kept, lacking, strict=True))
            ]
        if not names:
            return kept
        moments = [*names.values()]
        return [_converted(entry, p, moments) for entry, p in zip(kept, params, strict=True)]

    def _begun(self, step: torch.Tensor, begun: Group, kept: Group) -> Group:
        if "momentum_buffer" in begun.keys() - kept.keys():
            # A momentum that begins later does so as in a first step.
            kept = {key: value for key, value in kept.items() if key != "step"}
        return {"step": step, **begun, **kept}

    def _keep(self, index: int, params: Leaves, state: Any) -> None:
        group = self.param_groups[index]
        if isinstance(state, InjectState):
            group["count"] = int(state.count)
        elif params and _schedules(self._hyperparameters(group)):
            # Those of parameters that have not been stepped.
            group["count"] = self._count(group) + 1
        state = _own(state)
        names = [(name, getattr(state, field)) for field, name in self._made[index].names.items()]
        for i, (p, step) in enumerate(zip(params, state.count.float().unbind(), strict=True)):
            self.state[p] = {"step": step, **{name: column[i] for name, column in names}}

    def _load(self, index: int, saved: Group, states: dict[Any, Any]) -> None:
        self._check_marks(saved)
        if group_key(index) in states:
            raise ValueError(
                f"{type(self).__name__}: the state given is one for all parameters of a group; load it into Optimizer"
            )
        params = self.param_groups[index]["params"]
        fresh = self._entries(self._made_for(index, params), params, [{} for _ in params])
        for key, p, entry in zip(saved["params"], params, fresh, strict=True):
            kept = {k: v for k, v in states.get(key, {}).items() if v is not None}
            if kept:
                self.state[p] = self._loaded(entry, kept)

    def _check_marks(self, group: Group) -> None:
        for key, value in self.marks.items():
            if group.get(key, value) != value:
                raise ValueError(
                    f"{type(self).__name__}: a group has {key}={group[key]}, but here it is {value}; use "
                    f"{'Adam' if isinstance(self, AdamW) else 'AdamW'}"
                )

    def _loaded(self, fresh: Group, kept: Group) -> Group:
        """A parameter's state with the tensors of a checkpoint, of the dtypes and on the devices that this optimizer
        uses: torch converts moments to the parameter's dtype, and half of one is no moment."""
        # Torch's SGD does not count.
        kept = {"step": 1.0, **kept} if "momentum_buffer" in fresh else kept
        if kept.keys() != fresh.keys():
            raise ValueError(
                f"{type(self).__name__}: the state given is of another optimizer, or of other hyper-parameters: of a "
                f"parameter it has {sorted(kept)}, expected {sorted(fresh)}"
            )
        if odd := [key for key in fresh if key != "step" and torch.as_tensor(kept[key]).shape != fresh[key].shape]:
            raise ValueError(
                f"{type(self).__name__}: the state given is of other parameters: {odd[0]} of shape "
                f"{list(torch.as_tensor(kept[odd[0]]).shape)} is given where {list(fresh[odd[0]].shape)} is needed"
            )
        return {key: torch.as_tensor(kept[key]).to(like.device, like.dtype, copy=True) for key, like in fresh.items()}


def _own(state: Any) -> Any:
    """The optimizer's own part of a state."""
    return state.inner if isinstance(state, InjectState) else state


def _schedules(values: Group) -> Group:
    """The hyper-parameters that are schedules, or trees with some."""
    return {k: v for k, v in values.items() if any(map(callable, pytree.leaves_of(v)[0]))}


def _value(count: int, value: Any) -> Any:
    """A hyper-parameter as it is after so many steps."""

    def now(leaf: Any) -> Any:
        found = leaf(torch.tensor(count, device="cpu")) if callable(leaf) else leaf
        return found.item() if callable(leaf) and isinstance(found, torch.Tensor) and found.ndim == 0 else found

    return pytree.map_leaves(now, value)


def _picked(value: Any, among: list[bool]) -> Any:
    """A hyper-parameter for some of the parameters."""
    if isinstance(value, tuple):  # betas
        return tuple(_picked(part, among) for part in value)
    if not isinstance(value, list) or len(value) != len(among):
        return value
    return [part for part, is_in in zip(value, among, strict=True) if is_in]


def _converted(entry: Group, p: torch.Tensor, moments: Sequence[str]) -> Group:
    """The state of a parameter in its dtype and on its device, which may be others than they were."""
    one = entry[moments[0]]
    if one is None or (one.dtype is accumulator(p.dtype) and one.device == p.device):
        return entry
    return entry | {name: entry[name].to(p.device, accumulator(p.dtype)) for name in moments}


_ADAM = {"mu": "exp_avg", "nu": "exp_avg_sq", "nu_max": "max_exp_avg_sq"}


class SGD(_Of, factory=optim.sgd, names={"trace": "momentum_buffer"}):
    """`Optimizer` of `implicitdiff.sgd`, whose arguments it takes."""


class Adam(_Of, factory=optim.adam, names=_ADAM, marks={"decoupled_weight_decay": False}):
    """`Optimizer` of `implicitdiff.adam`, whose arguments it takes."""


class AdamW(_Of, factory=optim.adamw, names=_ADAM, marks={"decoupled_weight_decay": True}):
    """`Optimizer` of `implicitdiff.adamw`, whose arguments it takes."""


class RMSProp(_Of, factory=optim.rmsprop, names={"nu": "square_avg", "mean": "grad_avg", "trace": "momentum_buffer"}):
    """`Optimizer` of `implicitdiff.rmsprop`, whose arguments it takes."""


class AdaGrad(_Of, factory=optim.adagrad, names={"total": "sum"}):
    """`Optimizer` of `implicitdiff.adagrad`, whose arguments it takes."""


class AdaDelta(_Of, factory=optim.adadelta, names={"nu": "square_avg", "delta": "acc_delta"}):
    """`Optimizer` of `implicitdiff.adadelta`, whose arguments it takes."""


class AdaMax(_Of, factory=optim.adamax, names={"mu": "exp_avg", "nu": "exp_inf"}):
    """`Optimizer` of `implicitdiff.adamax`, whose arguments it takes."""


class RAdam(_Of, factory=optim.radam, names={"mu": "exp_avg", "nu": "exp_avg_sq"}):
    """`Optimizer` of `implicitdiff.radam`, whose arguments it takes."""


# As torch.optim spells them.
RMSprop, Adagrad, Adadelta, Adamax = RMSProp, AdaGrad, AdaDelta, AdaMax
