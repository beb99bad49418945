"""A transformation in the interface of torch.optim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import implicitdiff._torch.trees as pytree
import implicitdiff.objects._check as _check
from implicitdiff._torch.trees import Leaves, Tree
from implicitdiff.optim._base import GradientTransformation, step_beside_grads

Group = dict[str, Any]


class Pure(NamedTuple):
    """A parameter group for pure functions.

    Attributes:
        transformation: the pair, with the hyper-parameters of the group.
        params: the list of parameters.
        state: the state of the pair for `params`.
    """

    transformation: GradientTransformation
    params: Leaves
    state: Tree


class Optimizer(torch.optim.Optimizer):
    """A `GradientTransformation` as a ``torch.optim.Optimizer``.

    Steps are in place, and hooks, ``GradScaler`` and checkpoints work as with torch.optim. The transformation acts on
    the list of parameters of a group, so a global norm is the norm of the group. For hyper-parameters by name, which
    schedulers of torch.optim can change, use `SGD`, `Adam` and the like. The state is converted with the parameters
    (``module.double()``).

    Args:
        params: tensors, named tensors, or a dictionary with ``params`` for each group.
        transformation: the pair, e.g. ``chain(clip_grad_norm(1.0), adam(1e-3))``.

    Raises:
        TypeError: `transformation` is not a `GradientTransformation`.

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

    def __init__(self, params: Tree, transformation: GradientTransformation) -> None:
        self._transformation = _check.check_transformation("Optimizer", transformation)
        self._structures: dict[int, tuple[pytree.Structure, _check.TensorOptions]] = {}
        super().__init__(params, {})

    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group, with a state of its own.

        Raises:
            ValueError: the group has hyper-parameters; pass these to the transformation.
        """
        if others := [key for key in param_group if key not in ("params", "param_names")]:
            raise ValueError(
                f"Optimizer: a parameter group has no options but params, got {others[0]!r}; pass hyper-parameters to "
                "the transformation, or use SGD, Adam or another optimizer whose groups have hyper-parameters"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all parameters that have a gradient, in place.

        Args:
            closure: recomputes loss and gradients. Its result is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            if any(p.grad is not None for p in group["params"]):
                self._step(*self._pure(index, self._params_to_step(group)), index)
        return loss

    def pure(self) -> list[Pure]:
        """Return for each group the pair, parameters and state, to continue with pure functions.

        The tensors are not copied: later steps of this object overwrite them.
        """
        return [self._pure(index, group["params"]) for index, group in enumerate(self.param_groups)]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a copy of a state that `state_dict` returned.

        Raises:
            ValueError: the state belongs to other parameters or to another optimizer. Nothing is changed then.
        """
        # torch writes its state before its hooks run, so an error in a hook has to be undone here.
        before = self.__getstate__()
        given: dict[str, Any] = {}

        def remember(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> None:
            given.update(loaded)

        def convert(_: torch.optim.Optimizer) -> None:
            for index, group in enumerate(given["param_groups"]):
                self._load_group(index, group, given["state"])

        # A user's pre-hook may replace the state, so `remember` runs after it; post-hooks see the converted state.
        hooks = [
            self.register_load_state_dict_pre_hook(remember),
            self.register_load_state_dict_post_hook(convert, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            self.__setstate__(before)
            raise
        finally:
            for hook in hooks:
                hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        # The cache of structures is made again at the next step.
        return {**super().__getstate__(), "_transformation": self._transformation, "_structures": {}}

    def _step(self, transformation: GradientTransformation, params: Leaves, state: Tree, index: int) -> None:
        # ``p.grad`` belongs to the user.
        _, state = step_beside_grads(transformation, [p.grad for p in params], state, params, inplace=True)
        self._store(index, params, state)

    def _params_to_step(self, group: Group) -> Leaves:
        """Return the parameters of a group that take part in a step."""
        return group["params"]  # type: ignore[no-any-return]

    def _pure(self, index: int, params: Leaves) -> Pure:
        # `self.state` holds the tensors of the state in plain dictionaries, as `state_dict` of torch requires.
        kept, options = self.state.get(group_key(index)), _check.tensor_options(params)
        structure, known = self._structures.get(index, _UNKNOWN)
        if kept and options == known:
            return Pure(self._transformation, params, structure.unflatten([*kept.values()]))
        state = self._transformation.init(params)
        # The nesting of the state, cached with dtypes and devices: `init` would allocate a state in every step.
        structure = pytree.flatten(state)[1]
        if kept:
            state = _check.convert_state(structure.unflatten([*kept.values()]), state)
            self._store(index, params, state)
        self._structures[index] = structure, options
        return Pure(self._transformation, params, state)

    def _store(self, index: int, params: Leaves, state: Tree) -> None:
        self.state[group_key(index)] = {str(i): leaf for i, leaf in enumerate(pytree.tensors(state))}

    def _load_group(self, index: int, saved: Group, states: dict[Any, Any]) -> None:
        """Check the state of a group after torch has loaded it, and convert dtypes and devices.

        Args:
            index: of the group.
            saved: the group in the loaded dictionary.
            states: the states in the loaded dictionary.
        """
        mine = pytree.tensors(self._transformation.init(self.param_groups[index]["params"]))
        kept = [*states.get(group_key(index), {}).values()]
        if any(key in states for key in saved["params"]):
            raise ValueError(
                "Optimizer: the given state is of an optimizer with a state for each parameter; load it into SGD, "
                "Adam or another optimizer of that kind"
            )
        if not kept:
            return
        # Shapes identify a state: it is saved without names.
        if [t.shape for t in kept] != [t.shape for t in mine]:
            raise ValueError(
                f"Optimizer: the given state of group {index} does not belong to this transformation and these "
                f"parameters: expected {pytree.describe(mine)}, got {pytree.describe(kept)}"
            )
        pairs = enumerate(zip(kept, mine, strict=True))
        self.state[group_key(index)] = {str(i): t.to(like.device, like.dtype, copy=True) for i, (t, like) in pairs}


# Of a group before its first step: the structure of no state, for no parameters.
_UNKNOWN: tuple[pytree.Structure, _check.TensorOptions | None] = (pytree.flatten(())[1], None)


def group_key(index: int) -> Any:  # `state` of torch.optim is typed for tensors as keys
    """Key of a group's state in `Optimizer.state`. torch uses parameters as keys, so a string cannot collide."""
    return f"group {index}"
