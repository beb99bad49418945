"""Operations that torch differentiates wrongly or not at all, in terms of others that it differentiates right.

Each of them is right at first: what is wrong, or missing, are derivatives of derivatives, forward mode, or a vmap. The
files tell which, operation by operation. All others are right to every order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.overrides import TorchFunctionMode

import implicitdiff._torch.levels as functorch
from implicitdiff._torch.replacements import (
    _activations,
    _along,
    _attention,
    _distance,
    _linear_algebra,
    _losses,
    _normalisation,
    _recurrent,
)
from implicitdiff._torch.replacements._spelling import Operation
from implicitdiff._torch.settings import in_single

EXCHANGED: dict[Operation, Operation] = {
    **_normalisation.REPLACEMENTS,
    **_losses.REPLACEMENTS,
    **_attention.REPLACEMENTS,
    **_recurrent.REPLACEMENTS,
    **_linear_algebra.REPLACEMENTS,
    **_distance.REPLACEMENTS,
    **_activations.REPLACEMENTS,
    **_along.REPLACEMENTS,
}


# These torch's autocast computes in single precision.
_IN_SINGLE = {*_losses.REPLACEMENTS, *_distance.REPLACEMENTS, *_linear_algebra.REPLACEMENTS}


@contextmanager
def elementary() -> Iterator[None]:
    """Run the body with operations replaced whose higher derivatives torch gets wrong or lacks.

    Normalisations, attention, some losses, recurrent layers, distances and a few operations of linear algebra are
    computed by elementary operations then, with the same values. What is computed in the body has right derivatives to
    every order, in both modes and under every transform of torch.func, wherever they are taken. It takes more time and
    memory than the fused operations do.

    The functions that are given to this library (conditions, objectives, the steps of `unroll`) always run so. A loss
    that you differentiate yourself does not: such as that of `MetaOptimizer.step`, or what is computed of a solution or
    after an unrolled loop. Decorate it by ``@elementary()``, or run the program in ``with elementary():``.

    Dropout above 0 within an operation, packed sequences and nested tensors are left to torch, as is what
    `torch.compile` compiles and TorchScript. `torch.utils.checkpoint` computes again outside of the body, and raises if
    that does something else: give it a function that is itself decorated by ``@elementary()``.

    Example:
        >>> import torch
        >>> from torch.func import grad, jacrev
        >>> from implicitdiff import elementary
        >>> def loss(x):
        ...     return torch.nn.functional.layer_norm(x, (3,)).pow(3).sum()
        >>> def is_symmetric(loss):  # as third derivatives are
        ...     third = jacrev(jacrev(grad(loss)))(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
        ...     return torch.allclose(third, third.transpose(0, 2))
        >>> is_symmetric(loss), is_symmetric(elementary()(loss))
        (False, True)
    """
    with Exchange():
        yield


class Exchange(TorchFunctionMode):
    """Exchanges these operations."""

    # A compiled function would have the mode compiled as well, wrongly.
    @functorch.outside_compile
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fn, args, kwargs = exchanged(func, args, kwargs or {})
        return fn(*args, **kwargs)


def exchanged(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """The operation that is computed in the place of one, with its arguments."""
    # What writes to a given tensor has no derivative.
    fn = func if kwargs.get("out") is not None else EXCHANGED.get(func, func)
    if func in _IN_SINGLE:
        args, kwargs = in_single((args, kwargs))
    return fn, args, kwargs
