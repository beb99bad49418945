"""Errors in place of derivatives that torch computes wrongly.

A step of a meta-optimizer differentiates a loss once; later derivatives go through the recorded graph. If the graph
contains an operation whose second or third derivative torch gets wrong, the derivative raises when it is taken. See
`implicitdiff._torch.replacements` for the issues, and for replacements that are right.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

# Names of autograd nodes of operations with a wrong second derivative, and, below, of their backward nodes with a wrong
# derivative, which makes the third derivative wrong.
_WRONG_SECOND = {"WeightNormInterfaceBackward0": "weight_norm"}
_WRONG_THIRD = {
    "NativeLayerNormBackwardBackward0": "layer_norm",
    "NativeBatchNormBackwardBackward0": "batch_norm",
    "CudnnBatchNormBackwardBackward0": "batch_norm",
    "MiopenBatchNormBackwardBackward0": "batch_norm",
}


def guard_derivatives(name: str, loss: Tensor, grads: dict[int, Tensor], params: Sequence[Tensor]) -> dict[int, Tensor]:
    """Return gradients whose derivatives raise if torch would compute them wrongly.

    Args:
        name: of the public function, for error messages.
        loss: the loss; the graph of this step lies between `loss` and `params`.
        grads: gradients of the loss by position of the parameter, with their graph.
        params: the parameters, which require a gradient.
    """
    # Backward nodes appear in the graph of the gradients, forward nodes in the graph of the loss.
    ends = {torch.autograd.graph.get_gradient_edge(t).node for t in params}
    for node in _nodes_behind(list(grads.values()), ends):
        if (operation := _WRONG_THIRD.get(node.name())) is not None:
            node.register_hook(_OnceDifferentiable(_message(name, operation, "third")))
    for node in _nodes_on_paths([loss], ends):
        if (operation := _WRONG_SECOND.get(node.name())) is not None:
            return {i: _not_differentiable(g, _message(name, operation, "second")) for i, g in grads.items()}
    return grads


def _message(name: str, operation: str, which: str) -> str:
    return (
        f"{name}: torch computes the {which} derivative of {operation} wrongly; compute the loss under "
        "implicitdiff.elementary(), as `with elementary(): loss = ...` or by a function with `@elementary()` above it"
    )


def _nodes_on_paths(tensors: Sequence[Tensor], ends: set[Node]) -> list[Node]:
    """Return the nodes on paths from tensors to `ends`.

    A node off all paths, such as a layer norm of data, takes no part in the gradient.
    """
    nodes = list(_nodes_behind(tensors, ends))
    above: defaultdict[Node | None, list[Node]] = defaultdict(list)
    for upper, lower in [(node, below) for node in nodes for below in _inputs_of(node)]:
        above[lower].append(upper)
    # Search upwards, from the ends against the direction of `next_functions`.
    found = set(_reached([node for end in ends for node in above[end]], above.__getitem__, set()))
    return [node for node in nodes if node in found]


def _nodes_behind(tensors: Sequence[Tensor], ends: set[Node]) -> Iterator[Node]:
    """Iterate over the graph behind tensors, up to `ends`."""
    return _reached([t.grad_fn for t in tensors], _inputs_of, {None, *ends})


def _inputs_of(node: Node) -> list[Node | None]:
    return [below for below, _ in node.next_functions]


def _reached(
    starts: Sequence[Node | None], following: Callable[[Node], Sequence[Node | None]], seen: set[Node | None]
) -> Iterator[Node]:
    """Iterate over the nodes that are reached from some nodes, except those `seen`."""
    # Iterative: graphs of long runs exceed Python's limit of recursion.
    todo: list[Any] = [*starts]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            yield node
            todo += following(node)


class _OnceDifferentiable:
    """A hook that replaces the gradients a node computes by equal tensors whose derivative raises."""

    def __init__(self, message: str) -> None:
        self.message = message

    def __call__(self, inputs: tuple[Tensor | None, ...], outputs: object) -> tuple[Tensor | None, ...] | None:
        # A backward pass without create_graph is the first derivative, which is right.
        if not torch.is_grad_enabled():
            return None
        return tuple(None if t is None else _not_differentiable(t, self.message) for t in inputs)


def _not_differentiable(tensor: Tensor, message: str) -> Tensor:
    refused: Tensor = _RaiseInBackward.apply(tensor, message)  # type: ignore[no-untyped-call]
    return refused


class _RaiseInBackward(torch.autograd.Function):
    """The identity, with a derivative that raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, message: str) -> Tensor:
        ctx.message = message
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, x_bar: Tensor) -> Any:
        raise RuntimeError(ctx.message)
