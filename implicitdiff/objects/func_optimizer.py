"""An optimizer that keeps its state, for parameters in any pytree."""

from __future__ import annotations

from typing import Any

import torch

import implicitdiff._torch.trees as pytree
import implicitdiff.objects._check as _check
import implicitdiff.objects._hooks as _hooks
from implicitdiff.objects._derivatives import right_or_refused
from implicitdiff.optim._base import GradientTransformation


class FuncOptimizer:
    """A `GradientTransformation` that remembers its state from step to step.

    Args:
        transformation: the pair, e.g. ``implicitdiff.adam(1e-3)``.
        inplace: whether `step` overwrites the parameters, by default. Their updates are not differentiable then.

    Raises:
        TypeError: `transformation` is none.

    Example:
        >>> import torch
        >>> import implicitdiff
        >>> optimizer = implicitdiff.FuncOptimizer(implicitdiff.sgd(0.1))
        >>> params = {"w": torch.tensor([1.0, 2.0], requires_grad=True)}
        >>> params = optimizer.step((params["w"] ** 2).sum(), params)
        >>> params["w"].detach()
        tensor([0.8000, 1.6000])
    """

    def __init__(self, transformation: GradientTransformation, *, inplace: bool = False) -> None:
        self.transformation = _check.transformation("FuncOptimizer", transformation)
        self.inplace = inplace
        self.state: Any = None
        self._kinds: _check.Kinds | None = None

    def step(self, loss: torch.Tensor, params: Any, inplace: bool | None = None, *, first_order: bool = False) -> Any:
        """The parameters after a step down the gradient of a loss.

        Args:
            loss: a scalar that was computed from `params`.
            params: a pytree of tensors. Those that need no gradient, or that the loss does not depend on, are returned
                as they are.
            inplace: overwrite and return `params`; None is what the constructor was given.
            first_order: take the gradient for a constant, as in `MetaOptimizer.step`.

        Returns:
            A tree like `params`, which is differentiable in them and in the hyper-parameters unless `inplace`.

        Raises:
            ValueError: the loss depends on none of the parameters.
        """
        inplace = self.inplace if inplace is None else inplace
        grads = gradients("FuncOptimizer.step", loss, params, constant=inplace or first_order, keep=first_order)
        state, kinds = self.state, _check.kinds(params)
        if state is None or kinds != self._kinds:
            fresh = self.transformation.init(params)
            state = fresh if state is None else _check.fitted(state, fresh)
        with torch.set_grad_enabled(not inplace):
            stepped, self.state = self.transformation.step(grads, state, params, inplace=inplace)
        self._kinds = kinds
        for new, old in zip(pytree.tensors(stepped), pytree.tensors(params), strict=True):
            _hooks.inherit(new, old)
        return stepped

    def state_dict(self) -> Any:
        """The state, a pytree of tensors; None before the first step. These are the tensors, not copies."""
        return self.state

    def load_state_dict(self, state_dict: Any) -> None:
        """Go on from a state that `state_dict` gave."""
        if self.state is not None and state_dict is not None:
            _check.state("FuncOptimizer.load_state_dict", self.state, state_dict)
        self.state, self._kinds = state_dict, None


def gradients(name: str, loss: torch.Tensor, params: Any, *, constant: bool, keep: bool = False) -> Any:
    """The gradients of a loss in a tree of parameters, None where there is none.

    Args:
        constant: they are not to be differentiated.
        keep: the graph of the loss is kept even so.
    """
    leaves, structure = pytree.flatten(params)
    at = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
    some = [leaves[i] for i in at]
    found: tuple[torch.Tensor | None, ...] = ()
    if some and loss.requires_grad:
        found = torch.autograd.grad(
            loss, some, retain_graph=keep or not constant, create_graph=not constant, allow_unused=True
        )
    pairs = zip(at, found, strict=bool(found))
    with torch.set_grad_enabled(not constant):
        # Of what was converted within a graph (`module.double()`), autograd gives the gradient in the old dtype.
        grads = {i: _hooks.applied(leaves[i], grad.to(leaves[i].dtype)) for i, grad in pairs if grad is not None}
    if not grads:
        raise ValueError(
            f"{name}: the loss depends on none of the parameters that need a gradient; compute it anew after each "
            "step, from the parameters that the step gave, with gradients enabled"
        )
    if not constant:
        grads = right_or_refused(name, loss, grads, some)
    return structure.fill(grads)
