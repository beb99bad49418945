"""An optimizer that keeps its state, for parameters in any pytree."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import implicitdiff._torch.trees as pytree
import implicitdiff.objects._check as _check
import implicitdiff.objects._hooks as _hooks
from implicitdiff._calls import FactoryCall
from implicitdiff._torch.trees import Tree
from implicitdiff.objects._derivatives import guard_derivatives
from implicitdiff.optim._base import GradientTransformation


class FuncOptimizer:
    """A `GradientTransformation` with its state, for functional parameters.

    Args:
        transformation: the pair, e.g. ``implicitdiff.adam(1e-3)``.
        inplace: default of `step`: overwrite the parameters, without a derivative of the step.

    Raises:
        TypeError: `transformation` is not a `GradientTransformation`.

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
        self.transformation = _check.check_transformation("FuncOptimizer", transformation)
        self.inplace = inplace
        self.state: Tree = None
        self._options: _check.TensorOptions | None = None

    def __repr__(self) -> str:
        given = {"inplace": True} if self.inplace else {}
        return repr(FactoryCall("FuncOptimizer", (self.transformation,), given))

    def step(self, loss: torch.Tensor, params: Tree, inplace: bool | None = None, *, first_order: bool = False) -> Tree:
        """Return the parameters after a step along the gradients of a loss.

        Args:
            loss: a scalar that was computed from `params`.
            params: a pytree of tensors. Tensors that need no gradient, or that the loss does not depend on, are
                returned unchanged.
            inplace: overwrite and return `params`; None: the default of the constructor.
            first_order: treat the gradients as constants, as in `MetaOptimizer.step`.

        Returns:
            A tree like `params`, differentiable in `params` and in the hyper-parameters unless `inplace`.

        Raises:
            ValueError: the loss depends on none of the parameters.
        """
        inplace = self.inplace if inplace is None else inplace
        grads = loss_gradients("FuncOptimizer.step", loss, params, constant=inplace or first_order, keep=first_order)
        state, options = _check.fitted(self.state, self._options, params, self.transformation.init)
        # A step in place has no derivative, and may overwrite leaves that require a gradient.
        with torch.set_grad_enabled(not inplace):
            stepped, self.state = self.transformation.step(grads, state, params, inplace=inplace)
        self._options = options
        # Unchanged tensors are their own replacement, for which `inherit` does nothing.
        for new, old in zip(pytree.tensors(stepped), pytree.tensors(params), strict=True):
            _hooks.inherit(new, old)
        return stepped

    def state_dict(self) -> Tree:
        """Return the state, a pytree of tensors, not copied. None before the first step."""
        return self.state

    def load_state_dict(self, state_dict: Tree) -> None:
        """Continue from a state that `state_dict` returned."""
        if self.state is not None and state_dict is not None:
            _check.check_state("FuncOptimizer.load_state_dict", self.state, state_dict)
        self.state, self._options = state_dict, None


def loss_gradients(name: str, loss: torch.Tensor, params: Tree, *, constant: bool, keep: bool = False) -> Tree:
    """Return the gradients of a loss in a tree of parameters, with None for parameters without a gradient.

    Args:
        name: of the public function, for error messages.
        loss: a scalar.
        params: a tree of tensors.
        constant: compute gradients without a graph.
        keep: keep the graph of the loss in any case.
    """
    # Frozen tensors have no gradient, and torch.autograd.grad refuses them.
    leaves, structure = pytree.flatten(params)
    at = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
    some = [leaves[i] for i in at]
    found: Sequence[torch.Tensor | None] = [None] * len(some)
    if some and loss.requires_grad:
        found = torch.autograd.grad(
            loss, some, retain_graph=keep or not constant, create_graph=not constant, allow_unused=True
        )
    with torch.set_grad_enabled(not constant):
        # After a conversion within a graph (`module.double()`), autograd returns gradients in the old dtype.
        grads = {
            i: _hooks.apply_inherited(leaves[i], grad.to(leaves[i].dtype))
            for i, grad in zip(at, found, strict=True)
            if grad is not None
        }
    if not grads:
        raise ValueError(
            f"{name}: the loss depends on none of the parameters that require a gradient; compute the loss again "
            "after each step, from the new parameters, with gradients enabled"
        )
    if not constant:
        grads = guard_derivatives(name, loss, grads, some)
    return structure.fill(grads)
