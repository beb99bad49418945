"""An optimizer that keeps its state, for parameters in any pytree."""

from __future__ import annotations

from typing import Any

import torch

import implicitdiff._pytree as pytree
import implicitdiff.fronts._check as _check
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

    def step(self, loss: torch.Tensor, params: Any, inplace: bool | None = None) -> Any:
        """The parameters after a step down the gradient of a loss.

        Args:
            loss: a scalar that was computed from `params`.
            params: a pytree of tensors. Those that need no gradient, or that the loss does not depend on, are returned
                as they are.
            inplace: overwrite and return `params`; None is what the constructor was given.

        Returns:
            A tree like `params`, which is differentiable in them and in the hyper-parameters unless `inplace`.

        Raises:
            ValueError: the loss depends on none of the parameters.
        """
        inplace = self.inplace if inplace is None else inplace
        grads = gradients("FuncOptimizer.step", loss, params, create_graph=not inplace)
        state = self.transformation.init(params) if self.state is None else self.state
        with torch.set_grad_enabled(not inplace):
            params, self.state = self.transformation.step(grads, state, params, inplace=inplace)
        return params

    def state_dict(self) -> Any:
        """The state, a pytree of tensors; None before the first step. These are the tensors, not copies."""
        return self.state

    def load_state_dict(self, state_dict: Any) -> None:
        """Go on from a state that `state_dict` gave."""
        if self.state is not None and state_dict is not None:
            _check.state("FuncOptimizer.load_state_dict", self.state, state_dict)
        self.state = state_dict


def gradients(name: str, loss: torch.Tensor, params: Any, *, create_graph: bool) -> Any:
    """The gradients of a loss in a tree of parameters, None where there is none."""
    leaves, structure = pytree.flatten(params)
    at = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
    some = [leaves[i] for i in at]
    found: tuple[torch.Tensor | None, ...] = ()
    if some and loss.requires_grad:
        found = torch.autograd.grad(loss, some, create_graph=create_graph, allow_unused=True)
    grads = {i: grad for i, grad in zip(at, found, strict=bool(found)) if grad is not None}
    if not grads:
        raise ValueError(
            f"{name}: the loss depends on none of the parameters that need a gradient; compute it anew after each "
            "step, from the parameters that the step gave, with gradients enabled"
        )
    return structure.fill(grads)
