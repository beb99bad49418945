"""What torch differentiates wrongly in the graph of a step: an error in the place of a wrong number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def right_or_refused(name: str, loss: Tensor, grads: dict[int, Tensor], params: Sequence[Tensor]) -> dict[int, Tensor]:
    """The gradients of a loss, derivatives of which raise where torch has them wrong.

    Args:
        name: of the public function, for error messages.
        loss: a function of `params`, at which the graph of this step ends.
        grads: its gradients, with their graph.
    """
    ends = {_node(t) for t in params}
    for node in _nodes(list(grads.values()), ends):
        if (operation := _WRONG_AFTERWARDS.get(node.name())) is not None:
            node.register_hook(_Once(_message(name, operation, "third")))
    for node in _between([loss], ends):
        if (operation := _WRONG_TWICE.get(node.name())) is not None:
            return {i: _refused(g, _message(name, operation, "second")) for i, g in grads.items()}
    return grads


def _message(name: str, operation: str, which: str) -> str:
    return (
        f"{name}: torch gets the {which} derivative of {operation} wrong; compute the loss under "
        "implicitdiff.elementary(), as `with elementary(): loss = ...` or by a function with `@elementary()` above it"
    )


def _node(tensor: Tensor) -> Node | None:
    """Where autograd arrives at a tensor."""
    return torch.autograd.graph.get_gradient_edge(tensor).node if tensor.requires_grad else None


def _between(tensors: Sequence[Tensor], ends: set[Node | None]) -> list[Node]:
    """The nodes from tensors to those ends, and to nothing else."""
    nodes = list(_nodes(tensors, ends))
    above: dict[Node, list[Node]] = {}
    for node in nodes:
        for below, _ in node.next_functions:
            if below is not None:
                above.setdefault(below, []).append(node)
    found: set[Node] = set()
    todo = [node for end in ends - {None} for node in above.get(end, [])]  # type: ignore[arg-type]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += above.get(node, [])
    return [node for node in nodes if node in found]


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
        if not torch.is_grad_enabled():
            return None
        return tuple(None if t is None else _refused(t, self.message) for t in inputs)


def _refused(tensor: Tensor, message: str) -> Tensor:
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
