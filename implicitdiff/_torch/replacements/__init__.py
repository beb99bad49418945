"""Replacements for operations that torch differentiates wrongly or not at all.

First derivatives of these operations are right in reverse mode. Wrong, or missing, are higher derivatives, forward
mode, or batching rules. The docstrings of the files name the fault and the issue of each operation. Replacements
consist of operations with right derivatives to every order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.overrides import TorchFunctionMode

import implicitdiff._torch.compile as _compile
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
from implicitdiff._torch.replacements._spelling import Operation, or_torchs
from implicitdiff._torch.settings import in_single

# Keys are functions as a mode receives them: each spelling of an operation needs an entry.
EXCHANGED: dict[Operation, Operation] = {
    operation: or_torchs(operation, replacement)
    for operation, replacement in {
        **_normalisation.REPLACEMENTS,
        **_losses.REPLACEMENTS,
        **_attention.REPLACEMENTS,
        **_recurrent.REPLACEMENTS,
        **_linear_algebra.REPLACEMENTS,
        **_distance.REPLACEMENTS,
        **_activations.REPLACEMENTS,
        **_along.REPLACEMENTS,
    }.items()
}


# Operations that torch's autocast computes in single precision. The replacements consist of other operations, some of
# which autocast would run in half precision.
_IN_SINGLE = {*_losses.REPLACEMENTS, *_distance.REPLACEMENTS, *_linear_algebra.REPLACEMENTS}


@contextmanager
def elementary() -> Iterator[None]:
    """Replace, in the body, operations whose higher derivatives torch gets wrong or lacks.

    Normalisations, attention, some losses, recurrent layers, distances and a few operations of linear algebra are
    computed by elementary operations with equal values. Results of the body have right derivatives to every order, in
    both modes and under every transform of torch.func, also if the derivative is taken later. The elementary operations
    take more time and memory than fused kernels.

    Functions passed to this library (conditions, objectives, the steps of `unroll`) always run with replacements. A
    loss that you differentiate yourself does not, such as the loss of `MetaOptimizer.step`, or a function of a solution
    or of the result of an unrolled loop. Decorate such a function with ``@elementary()``, or run it in ``with
    elementary():``.

    Not replaced: dropout above 0 within an operation, packed sequences, nested tensors, TorchScript, and code that
    `torch.compile` compiles. `torch.utils.checkpoint` recomputes outside of the body, and raises if the recomputation
    differs: pass it a function decorated with ``@elementary()``.

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
    """Mode that replaces operations."""

    # torch.compile would trace the mode itself, with wrong results.
    @_compile.outside_compile
    def __torch_function__(
        self, func: Operation, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        fn, args, kwargs = exchanged(func, args, kwargs or {})
        return fn(*args, **kwargs)


def exchanged(
    func: Operation, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Operation, Sequence[Any], dict[str, Any]]:
    """Return the replacement of a torch function, or the function itself, with arguments."""
    # torch refuses derivatives of a function with ``out``, so the original may run.
    fn = func if kwargs.get("out") is not None else EXCHANGED.get(func, func)
    if func in _IN_SINGLE:
        args, kwargs = in_single((args, kwargs))
    return fn, args, kwargs
