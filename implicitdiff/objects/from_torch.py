"""Conversion of optimizers of torch.optim."""

from __future__ import annotations

from collections.abc import Callable

import torch

from implicitdiff.objects.optimizer import Optimizer
from implicitdiff.objects.optimizers import SGD, AdaDelta, AdaGrad, Adam, AdaMax, AdamW, RAdam, RMSProp

_COUNTERPARTS: dict[type[torch.optim.Optimizer], Callable[..., Optimizer]] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: AdamW,
    torch.optim.RMSprop: RMSProp,
    torch.optim.Adagrad: AdaGrad,
    torch.optim.Adadelta: AdaDelta,
    torch.optim.Adamax: AdaMax,
    torch.optim.RAdam: RAdam,
}


def from_torch(optimizer: torch.optim.Optimizer) -> Optimizer:
    """Convert an optimizer of torch.optim, with its parameter groups and a copy of its state.

    The result continues the run on the same parameters. `Optimizer.pure` of the result gives pairs, parameters and
    states to continue with pure functions.

    Args:
        optimizer: an ``SGD, Adam, AdamW, RMSprop, Adagrad, Adadelta, Adamax`` or ``RAdam`` of torch.optim.

    Raises:
        TypeError: the optimizer is of another class.

    Example:
        >>> import torch
        >>> import implicitdiff
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> optimizer = torch.optim.Adam([w], lr=0.1)
        >>> (w**2).sum().backward()
        >>> optimizer.step()
        >>> (update, params, state), = implicitdiff.from_torch(optimizer).pure()
        >>> state.count, state.mu
        (tensor([1]), [tensor([0.2000, 0.4000])])
    """
    counterpart = _COUNTERPARTS.get(type(optimizer))
    if counterpart is None:
        raise TypeError(
            f"from_torch: {type(optimizer).__name__} has no counterpart here; there are "
            f"{', '.join(theirs.__name__ for theirs in _COUNTERPARTS)}"
        )
    # torch.optim.Adam with the flag decoupled_weight_decay is AdamW; here the two are classes.
    decoupled = any(group.get("decoupled_weight_decay") for group in optimizer.param_groups)
    # Copies of the groups, because `add_param_group` writes into its argument.
    made = (AdamW if counterpart is Adam and decoupled else counterpart)(
        [dict(group) for group in optimizer.param_groups]
    )
    made.load_state_dict(optimizer.state_dict())
    return made
