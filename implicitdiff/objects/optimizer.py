"""A transformation as an optimizer of torch.optim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import implicitdiff._torch.trees as pytree
import implicitdiff.objects._check as _check
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
    with named hyper-parameters, which torch's schedulers can change, there are `SGD`, `Adam` and kin. Parameters that
    are converted later (``module.double()``) take their state along.

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
        self._structures: dict[int, tuple[pytree.Structure, _check.Kinds]] = {}
        super().__init__(params, {})

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters, to be stepped by themselves.

        Raises:
            ValueError: the group has hyper-parameters, which belong to the transformation.
        """
        if others := [key for key in param_group if key not in ("params", "param_names")]:
            raise ValueError(
                f"Optimizer: a group has nothing but params, got {others[0]!r}, which would not be used; give the "
                "transformation its hyper-parameters, or use SGD, Adam or kin, whose groups have their own"
            )
        super().add_param_group(param_group)

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
        """Go on from a copy of a state that `state_dict` gave.

        Raises:
            ValueError: it is of other parameters or of another optimizer; nothing is changed.
        """
        before = self.__getstate__()
        given: dict[str, Any] = {}

        def look(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> None:
            given.update(loaded)

        def mend(_: torch.optim.Optimizer) -> None:
            for index, group in enumerate(given["param_groups"]):
                self._load(index, group, given["state"])

        # A hook may replace what is loaded; another one shall see it mended.
        hooks = [
            self.register_load_state_dict_pre_hook(look),
            self.register_load_state_dict_post_hook(mend, prepend=True),
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
        return {**super().__getstate__(), "_transformation": self._transformation, "_structures": {}}

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
        kept, kinds = self.state.get(group_key(index)), _check.kinds(params)
        structure, known = self._structures.get(index, (None, None))
        if kept and structure is not None and kinds == known:
            return Pure(self._transformation, params, structure.unflatten([*kept.values()]))
        state = self._transformation.init(params)
        structure = pytree.flatten(state)[1]
        if kept:
            state = _check.fitted(structure.unflatten([*kept.values()]), state)
            self._keep(index, params, state)
        self._structures[index] = structure, kinds
        return Pure(self._transformation, params, state)

    def _keep(self, index: int, params: Leaves, state: Any) -> None:
        self.state[group_key(index)] = {str(i): leaf for i, leaf in enumerate(pytree.tensors(state))}

    def _load(self, index: int, saved: Group, states: dict[Any, Any]) -> None:
        """Check, and mend, what torch has loaded of a group."""
        mine = pytree.tensors(self._transformation.init(self.param_groups[index]["params"]))
        kept = [*states.get(group_key(index), {}).values()]
        if any(key in states for key in saved["params"]):
            raise ValueError(
                "Optimizer: the state given is of an optimizer that keeps one for each parameter; load it into SGD, "
                "Adam or kin"
            )
        if kept and [t.shape for t in kept] != [t.shape for t in mine]:
            raise ValueError(
                f"Optimizer: the state of group {index} is none of this transformation for these parameters: it has "
                f"{pytree.describe(kept)}, expected {pytree.describe(mine)}"
            )
        if kept:
            pairs = enumerate(zip(kept, mine, strict=True))
            self.state[group_key(index)] = {str(i): t.to(like.device, like.dtype, copy=True) for i, (t, like) in pairs}


def group_key(index: int) -> Any:
    """Where a group's state is kept, beside the parameters, which torch has for keys."""
    return f"group {index}"
