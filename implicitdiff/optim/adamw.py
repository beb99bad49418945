"""AdamW."""

from __future__ import annotations

import implicitdiff.optim._check as _check
from implicitdiff._calls import shows_call
from implicitdiff._torch.trees import Tree
from implicitdiff.optim._base import GradientTransformation
from implicitdiff.optim._rule import Hyperparameter
from implicitdiff.optim._transformation import transformation
from implicitdiff.optim.adam import AdamState, adam_rule


@shows_call
def adamw(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 1e-2,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    eps_root: Hyperparameter = 0.0,
    mask: Tree = None,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    """AdamW: `adam` with decoupled weight decay.

    The update is Adam's plus ``-lr * weight_decay * p``, so ``update`` needs ``params``. Hyper-parameters as in `adam`.

    Args:
        mask: the parameters that decay: a tree of bools nested like the parameters, a prefix of such a tree, or a
            function of the parameters that returns either. None: all.

    Returns:
        A pair of state `AdamState`.

    Raises:
        ValueError: as in `adam`; later, in ``update``: ``params`` is missing, or the mask does not fit.

    Reference:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2, with the learning rate as
        the schedule multiplier.

    Example:
        >>> import torch
        >>> from implicitdiff import adamw
        >>> params = {"weight": torch.tensor([1.0]), "bias": torch.tensor([1.0])}
        >>> init, update = adamw(lr=0.1, weight_decay=0.5, mask={"weight": True, "bias": False})
        >>> update({"weight": torch.zeros(1), "bias": torch.zeros(1)}, init(params), params)[0]
        {'weight': tensor([-0.0500]), 'bias': tensor([-0.])}
    """
    _check.require_non_negative("adamw", lr=lr)
    # The decay is multiplied by `lr`, as in torch.optim.AdamW.
    rule = adam_rule("adamw", lr, betas, eps, weight_decay, amsgrad, maximize, eps_root, decoupled=True)
    return transformation("adamw", rule, AdamState, mask=mask, use_accelerated_op=use_accelerated_op)
