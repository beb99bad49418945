"""The transformations as optimizers of torch.optim."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch

import implicitdiff._pytree as pytree
import implicitdiff.fronts._check as _check
import implicitdiff.optim as optim
from implicitdiff.optim._base import GradientTransformation

Group = dict[str, Any]
Leaves = list[torch.Tensor]


class Pure(NamedTuple):
    """A parameter group as pure functions see it.

    Attributes:
        transformation: the pair, with the group's hyper-parameters.
        params: the group's parameters.
        state: the pair's state for the list of them.
    """

    transformation: GradientTransformation
    params: Leaves
    state: Any


class Optimizer(torch.optim.Optimizer):
    """A `GradientTransformation` as a ``torch.optim.Optimizer``.

    It steps in place, as torch's do, and takes part in what is written for those: hooks, ``GradScaler``, checkpoints.
    What it steps is the list of a group's parameters, so that a global norm is that of the group. For transformations
    with named hyper-parameters, which torch's schedulers can change, there are `SGD`, `Adam` and kin.

    Args:
        params: tensors, named tensors, or dictionaries of ``params``, one for each group.
        transformation: the pair, e.g. ``chain(clip_grad_norm(1.0), adam(1e-3))``.

    Raises:
        TypeError: `transformation` is none.

    Example:
        >>> import torch
        >>> import implicitdiff
        >>> w = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> clipped = implicitdiff.chain(implicitdiff.clip_grad_norm(1.0), implicitdiff.sgd(0.5))
        >>> optimizer = implicitdiff.Optimizer([w], clipped)
        >>> (w**2).sum().backward()
        >>> optimizer.step()
        >>> w
        tensor([2.7000, 3.6000], requires_grad=True)
    """

    def __init__(self, params: Any, transformation: GradientTransformation) -> None:
        self._transformation = _check.transformation("Optimizer", transformation)
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all parameters that have a gradient, in place.

        Args:
            closure: computes the loss and its gradients anew; its result is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            if any(p.grad is not None for p in group["params"]):
                self._step(*self._pure(index, self._stepped(group)), index)
        return loss

    def pure(self) -> list[Pure]:
        """Each parameter group as the pair, the parameters and the state to go on with in pure functions.

        These are the tensors, not copies: steps of this object change them.
        """
        return [self._pure(index, group["params"]) for index, group in enumerate(self.param_groups)]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` gave.

        Raises:
            ValueError: it is of other parameters or of another optimizer; nothing is changed.
        """
        before = self.__getstate__()
        super().load_state_dict(state_dict)
        try:
            for index, group in enumerate(state_dict["param_groups"]):
                self._load(index, group, state_dict["state"])
        except ValueError:
            self.__setstate__(before)
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_transformation": self._transformation}

    def _step(self, transformation: GradientTransformation, params: Leaves, state: Any, index: int) -> None:
        grads = [p.grad for p in params]
        if getattr(transformation.update, "step", None) is None:
            # A chain overwrites the gradients that it is given.
            grads = pytree.map_tensors(torch.clone, grads)
        _, state = transformation.step(grads, state, params, inplace=True)
        self._keep(index, params, state)

    def _stepped(self, group: Group) -> Leaves:
        """The parameters that share a step."""
        return group["params"]  # type: ignore[no-any-return]

    def _pure(self, index: int, params: Leaves) -> Pure:
        # A checkpoint holds tensors in plain containers, so these are what is kept.
        state = self._transformation.init(params)
        if kept := self.state.get(_key(index)):
            state = pytree.flatten(state)[1].unflatten(list(kept.values()))
        return Pure(self._transformation, params, state)

    def _keep(self, index: int, params: Leaves, state: Any) -> None:
        self.state[_key(index)] = {str(i): leaf for i, leaf in enumerate(pytree.tensors(state))}

    def _load(self, index: int, saved: Group, states: dict[Any, Any]) -> None:
        """Check, and mend, what torch has loaded of a group."""
        mine = pytree.tensors(self._transformation.init(self.param_groups[index]["params"]))
        kept = [*self.state.get(_key(index), {}).values()]
        if kept and [t.shape for t in kept] != [t.shape for t in mine]:
            raise ValueError(
                f"Optimizer: the state of group {index} is none of this transformation for these parameters: it has "
                f"{pytree.describe(kept)}, expected {pytree.describe(mine)}"
            )


def _key(index: int) -> Any:
    """Where a group's state is kept, beside the parameters, which torch has for keys."""
    return f"group {index}"


class _Of(Optimizer):
    """An optimizer with the hyper-parameters of a factory in its groups, and the state of each parameter by itself.

    That has the names which torch.optim gives it: checkpoints of one can be loaded into the other.
    """

    factory: ClassVar[Callable[..., GradientTransformation]]
    hyperparameters: ClassVar[Sequence[str]]
    names: ClassVar[Mapping[str, str]]
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(
        cls, factory: Callable[..., GradientTransformation] | None = None, names: Mapping[str, str] | None = None
    ) -> None:
        super().__init_subclass__()
        if factory is not None and names is not None:
            cls.factory, cls.names = staticmethod(factory), names
            cls.__signature__ = _check.signature("params", factory)
            # What a mask does, groups do here.
            cls.hyperparameters = [key for key in inspect.signature(factory).parameters if key != "mask"]

    def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(self.factory).bind(*args, **kwargs)
        bound.apply_defaults()
        if bound.arguments.pop("mask", None) is not None:
            raise ValueError(f"{type(self).__name__}: give what a mask would leave out a group with weight_decay=0")
        self._made: dict[int, tuple[Group, GradientTransformation]] = {}
        torch.optim.Optimizer.__init__(self, params, bound.arguments)

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
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**torch.optim.Optimizer.__getstate__(self), "_made": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            # A checkpoint of torch's does not know all of them.
            group.update({key: value for key, value in self.defaults.items() if key not in group})

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
        if "step" in kept and all(name in kept for name in names.values()):
            return kept
        fresh = transformation.init([p])
        begun = {name: getattr(fresh, field)[0] for field, name in names.items()}
        return {"step": fresh.count[0].float(), **begun, **kept}

    def _keep(self, index: int, params: Leaves, state: Any) -> None:
        names = [(name, getattr(state, field)) for field, name in self._moments(state)]
        for i, (p, step) in enumerate(zip(params, state.count.float().unbind(), strict=True)):
            self.state[p] = {"step": step, **{name: column[i] for name, column in names}}

    def _load(self, index: int, saved: Group, states: dict[Any, Any]) -> None:
        decoupled = isinstance(self, AdamW)
        if isinstance(self, (Adam, AdamW)) and saved.get("decoupled_weight_decay", decoupled) != decoupled:
            raise ValueError(
                f"{type(self).__name__}: the state given is of an Adam with decoupled_weight_decay={not decoupled}; "
                f"load it into {'Adam' if decoupled else 'AdamW'}"
            )
        transformation = self._transformation_of(index)
        names = dict(self._moments(transformation.init([])))
        for key, p in zip(saved["params"], self.param_groups[index]["params"], strict=True):
            kept = {k: v for k, v in states.get(key, {}).items() if v is not None}
            if kept:
                self.state[p] = self._loaded(self._entry(transformation, p, {}, names), kept)

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
        if odd := [key for key in fresh if key != "step" and kept[key].shape != fresh[key].shape]:
            raise ValueError(
                f"{type(self).__name__}: the state given is of other parameters: {odd[0]} of shape "
                f"{list(kept[odd[0]].shape)} is given where {list(fresh[odd[0]].shape)} is needed"
            )
        return {key: torch.as_tensor(kept[key]).to(like.device, like.dtype) for key, like in fresh.items()}


_ADAM = {"mu": "exp_avg", "nu": "exp_avg_sq", "nu_max": "max_exp_avg_sq"}


class SGD(_Of, factory=optim.sgd, names={"trace": "momentum_buffer"}):
    """`Optimizer` of `implicitdiff.sgd`, whose arguments it takes."""


class Adam(_Of, factory=optim.adam, names=_ADAM):
    """`Optimizer` of `implicitdiff.adam`, whose arguments it takes."""


class AdamW(_Of, factory=optim.adamw, names=_ADAM):
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
