"""What torch differentiates wrongly in the graph of a step: an error in the place of a wrong number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

# By the names of their nodes: operations with a wrong second derivative, ...
_WRONG_TWICE = {"WeightNormInterfaceBackward0": "weight_norm"}
# ... and second derivatives with a wrong derivative.
_WRONG_AFTERWARDS = {
    "NativeLayerNormBackwardBackward0": "layer_norm",
    "NativeBatchNormBackwardBackward0": "batch_norm",
    "CudnnBatchNormBackwardBackward0": "batch_norm",
    "MiopenBatchNormBackwardBackward0": "batch_norm",
}


def right_or_refused(
    name: str, loss: Tensor, grads: Mapping[str, Tensor | None], params: Mapping[str, Tensor]
) -> dict[str, Tensor | None]:
    """The gradients of a loss, derivatives of which raise where torch has them wrong.

    Args:
        name: of the public function, for error messages.
        loss: a function of `params`, at which the graph of this step ends.
        grads: its gradients, with their graph.
    """
    ends = {t.grad_fn for t in params.values()}
    for node in _nodes([g for g in grads.values() if g is not None], ends):
        if (operation := _WRONG_AFTERWARDS.get(node.name())) is not None:
            node.register_hook(_Once(_message(name, operation, "third")))
    for node in _nodes([loss], ends):
        if (operation := _WRONG_TWICE.get(node.name())) is not None:
            return {key: _refused(g, _message(name, operation, "second")) for key, g in grads.items()}
    return dict(grads)


def _message(name: str, operation: str, which: str) -> str:
    return (
        f"{name}: torch gets the {which} derivative of {operation} wrong; compute the loss under "
        "implicitdiff.elementary(), as `with elementary(): loss = ...` or by a function with `@elementary()` above it"
    )


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
    """A hook of a node whose results may be used, and not be differentiated."""

    def __init__(self, message: str) -> None:
        self.message = message

    def __call__(self, inputs: tuple[Tensor | None, ...], outputs: Any) -> tuple[Tensor | None, ...] | None:
        return tuple(_refused(t, self.message) for t in inputs) if torch.is_grad_enabled() else None


def _refused(tensor: Tensor | None, message: str) -> Tensor | None:
    if tensor is None:
        return None
    refused: Tensor = _Refusal.apply(tensor, message)  # type: ignore[no-untyped-call]
    return refused


class _Refusal(torch.autograd.Function):
    """The same tensor, whose derivative raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, message: str) -> Tensor:
        ctx.message = message
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, x_bar: Tensor) -> Any:
        raise RuntimeError(ctx.message)
