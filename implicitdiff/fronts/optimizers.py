"""The optimizers of this library as those of torch.optim, with their hyper-parameters in groups."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch

import implicitdiff.fronts._check as _check
import implicitdiff.optim as optim
from implicitdiff.fronts.optimizer import Group, Leaves, Optimizer, Pure, group_key
from implicitdiff.optim._base import GradientTransformation


class _Of(Optimizer):
    """An optimizer with the hyper-parameters of a factory in its groups, and the state of each parameter by itself.

    That has the names which torch.optim gives it: checkpoints of one can be loaded into the other.
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
        self._made: dict[int, tuple[Group, GradientTransformation]] = {}
        torch.optim.Optimizer.__init__(self, params, {**values, **self.marks})

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters, with hyper-parameters of their own where they are given.

        Raises:
            ValueError: a hyper-parameter is out of range.
        """
        values = self._hyperparameters({**self.defaults, **param_group})
        if schedules := [key for key, value in values.items() if callable(value)]:
            raise ValueError(
                f"{type(self).__name__}: {schedules[0]} is a function; a group's hyper-parameters are numbers, which "
                "torch.optim.lr_scheduler changes; for a schedule use "
                f"Optimizer(params, {self.factory.__name__}({schedules[0]}=...))"
            )
        self.factory(**values)
        self._check_marks(param_group)
        torch.optim.Optimizer.add_param_group(self, param_group)

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

    def _transformation_of(self, index: int) -> GradientTransformation:
        values = self._hyperparameters(self.param_groups[index])
        made = self._made.get(index)
        # By identity: a tensor's value may change, and is read in each step.
        if made is None or any(value is not made[0][key] for key, value in values.items()):
            made = self._made[index] = values, self.factory(**values)
        return made[1]

    def _pure(self, index: int, params: Leaves) -> Pure:
        transformation = self._transformation_of(index)
        empty = transformation.init([])
        names = dict(self._moments(empty))
        entries = [self._entry(transformation, p, self.state.get(p, {}), names) for p in params]
        if not entries:
            return Pure(transformation, params, empty)
        steps = torch.stack([entry["step"].to(params[0].device) for entry in entries])
        moments = {field: [entry[name] for entry in entries] for field, name in names.items()}
        return Pure(transformation, params, empty._replace(count=steps.to(torch.int64), **moments))

    def _moments(self, state: Any) -> Iterator[tuple[str, str]]:
        """The fields of a state in use that are trees, with torch's name for each."""
        return ((field, name) for field, name in self.names.items() if isinstance(getattr(state, field), list))

    def _entry(
        self, transformation: GradientTransformation, p: torch.Tensor, kept: Group, names: Mapping[str, str]
    ) -> Group:
        """The state of a parameter, begun where there is none."""
        if kept and kept.keys() >= {"step", *names.values()}:
            return kept
        fresh = transformation.init([p])
        begun = {name: getattr(fresh, field)[0] for field, name in names.items()}
        if "momentum_buffer" in begun.keys() - kept.keys():
            # A momentum that begins later does so as in a first step.
            kept = {key: value for key, value in kept.items() if key != "step"}
        return {"step": fresh.count[0].float(), **begun, **kept}

    def _keep(self, index: int, params: Leaves, state: Any) -> None:
        names = [(name, getattr(state, field)) for field, name in self._moments(state)]
        for i, (p, step) in enumerate(zip(params, state.count.float().unbind(), strict=True)):
            self.state[p] = {"step": step, **{name: column[i] for name, column in names}}

    def _load(self, index: int, saved: Group, states: dict[Any, Any]) -> None:
        self._check_marks(saved)
        if group_key(index) in states:
            raise ValueError(
                f"{type(self).__name__}: the state given is one for all parameters of a group; load it into Optimizer"
            )
        transformation = self._transformation_of(index)
        names = dict(self._moments(transformation.init([])))
        for key, p in zip(saved["params"], self.param_groups[index]["params"], strict=True):
            kept = {k: v for k, v in states.get(key, {}).items() if v is not None}
            if kept:
                self.state[p] = self._loaded(self._entry(transformation, p, {}, names), kept)

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
