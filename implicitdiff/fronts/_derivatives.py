"""What torch differentiates wrongly in the graph of a loss: an error in the place of a wrong number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

_REMEDY = (
    "compute the loss under implicitdiff.elementary(), as `with elementary(): loss = ...` or by a function that is "
    "decorated by `@elementary()`"
)
# By the names of their nodes: of operations with a wrong second derivative, ...
_WRONG_TWICE = {"WeightNormInterfaceBackward0": "weight_norm"}
# ... and of second derivatives with a wrong derivative.
_WRONG_AFTERWARDS = {
    "NativeLayerNormBackwardBackward0": "layer_norm",
    "NativeBatchNormBackwardBackward0": "batch_norm",
    "CudnnBatchNormBackwardBackward0": "batch_norm",
    "MiopenBatchNormBackwardBackward0": "batch_norm",
}


def refuse_wrong(name: str, loss: Tensor, grads: Sequence[Tensor | None], params: Sequence[Tensor]) -> None:
    """Raise if derivatives of these gradients of a loss are wrong, and see to it that wrong derivatives of those raise.

    Args:
        name: of the public function, for error messages.
        loss: a function of `params`.
        grads: its gradients, with their graph.
        params: at these the graph of this step ends.
    """
    ends = {t.grad_fn for t in params}
    for node in _nodes([loss], ends):
        if (operation := _WRONG_TWICE.get(node.name())) is not None:
            raise ValueError(f"{name}: torch gets the second derivative of {operation} wrong; {_REMEDY}")
    for node in _nodes([g for g in grads if g is not None], ends):
        if (operation := _WRONG_AFTERWARDS.get(node.name())) is not None:
            node.register_hook(_Once(f"torch gets the third derivative of {operation} wrong; {_REMEDY}"))


def _nodes(tensors: Sequence[Tensor], ends: set[Node | None]) -> Iterator[Node]:
    seen, todo = {None, *ends}, [t.grad_fn for t in tensors]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        todo += [below for below, _ in node.next_functions]


class _Once:
    """A hook after which a derivative may be used, and not be differentiated."""

    def __init__(self, message: str) -> None:
        self.message = message

    def __call__(self, inputs: tuple[Tensor | None, ...], outputs: Any) -> tuple[Tensor | None, ...] | None:
        if not torch.is_grad_enabled():
            return None
        refused: Any = _Refusal.apply
        return tuple(None if t is None else refused(t, self.message) for t in inputs)


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, message: str) -> Tensor:
        ctx.message = message
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, x_bar: Tensor) -> Any:
        raise RuntimeError(ctx.message)
