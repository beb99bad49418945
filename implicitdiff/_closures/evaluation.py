"""Evaluation of a user's function: its derivatives, the modes around it, and its name in error messages."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

import implicitdiff._torch.context as _context
import implicitdiff._torch.messages as _messages
import implicitdiff._torch.trees as pytree
from implicitdiff._torch.replacements import Exchange
from implicitdiff._torch.sparse import SparseProducts
from implicitdiff._torch.switches import UNCHANGED
from implicitdiff._torch.trees import Leaves, Tree, UserFunction
from implicitdiff.errors import TransformError


class _OfThread(threading.local):
    """State of the thread, like grad mode.

    Attributes:
        is_alone: whether autograd alone differentiates the running function.
        compared: the numbers of compared evaluations of functions, by id, in the running derivative; None outside.
    """

    is_alone = False
    compared: Counter[int] | None = None


_evaluation = _OfThread()


class named_in_errors(AbstractContextManager["named_in_errors"]):
    """Context that raises `TransformError`, with the name of the user's function, if torch.func cannot transform the
    body."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Without a level torch.func cannot have refused anything: the error is the function's own.
        if error is None or _context.depth() == 0:
            return
        if (refusal := transform_error(self.name, error)) not in (None, error):
            raise refusal from error


def transform_error(name: str, error: BaseException | None) -> TransformError | None:
    """Return the `TransformError` for an error of torch.func in the user's function `name`; None for other errors."""
    if isinstance(error, TransformError):
        return error
    if not isinstance(error, RuntimeError) or (what := _messages.untransformable(error)) is None:
        return None
    return TransformError(
        f"{name} applies {what}; or compute a first derivative by backward() outside of torch.func, which needs "
        "autograd alone"
    )


def by_autograd_alone(is_alone: bool) -> AbstractContextManager[None]:
    """Record whether autograd alone, and not torch.func, differentiates the function in the body."""
    return UNCHANGED if is_alone == _evaluation.is_alone else _by_autograd_alone(is_alone)


@contextmanager
def _by_autograd_alone(is_alone: bool) -> Iterator[None]:
    _evaluation.is_alone = is_alone
    try:
        yield
    finally:
        _evaluation.is_alone = not is_alone


def is_by_autograd_alone() -> bool:
    """True if autograd alone differentiates the running function."""
    # A transform that the function starts itself differentiates as usual.
    return _evaluation.is_alone and _context.depth() == 0


COMPARISONS = 2
"""The number of evaluations of a function that are compared with the call, in one derivative. A function that changes
from one evaluation to the next differs at the second."""


class one_derivative:
    """Context of one derivative: compare each function with its call only in its first `COMPARISONS` evaluations.

    An iterative linear solver evaluates a function once for each product.
    """

    def __enter__(self) -> None:
        self.before = _evaluation.compared
        if self.before is None:
            _evaluation.compared = Counter()

    def __exit__(self, *error: object) -> None:
        _evaluation.compared = self.before


def compared_evaluations() -> Counter[int]:
    """Return the number of compared evaluations of each function, by id, in the running derivative, or new counts."""
    return Counter() if _evaluation.compared is None else _evaluation.compared


def gradient(fn: Callable[..., torch.Tensor], x: Tree, *args: Any) -> Tree:
    """Return the gradient of the real number ``fn(x, *args)``, a tree like ``x``.

    Works in functions that torch.func transforms, and in functions that autograd alone differentiates.
    """
    (value,), pull = pullback(fn, x, *args)
    return pull([torch.ones_like(value)])


def pullback(fn: UserFunction, x: Tree, *args: Any) -> tuple[Leaves, Callable[[Leaves], Tree]]:
    """Return the leaves of ``fn(x, *args)``, and the product ``u -> J' u``, a tree like ``x``; see `gradient`."""
    leaves, structure = pytree.flatten(x)

    def of_leaves(*leaves: torch.Tensor) -> Leaves:
        return pytree.tensors(fn(structure.unflatten(leaves), *args))

    if not is_by_autograd_alone():
        found: Any = torch.func.vjp(of_leaves, *leaves)
        return found[0], lambda u: structure.unflatten(found[1](u))
    # A view is a tensor of its own, so the gradient leaves out other uses of the same tensor, such as a capture. The
    # view stays in the caller's graph, so that the gradient can be differentiated again.
    with torch.enable_grad():
        # A leaf of its own: `requires_grad_` on the caller's tensor would be visible outside.
        leaves = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in leaves]
        values = of_leaves(*leaves)

    def pull(u: Leaves) -> Tree:
        # `torch.autograd.grad` refuses outputs without a graph. Their gradient is zero.
        pairs = [(value, v) for value, v in zip(values, u, strict=True) if value.requires_grad]
        if not pairs:
            return structure.unflatten([torch.zeros_like(t) for t in leaves])
        ys, us = zip(*pairs, strict=True)
        # Always with a graph, since the gradient may be a residual that is differentiated again.
        return structure.unflatten(torch.autograd.grad(ys, leaves, us, create_graph=True, materialize_grads=True))

    return values, pull


def with_replacements(needed: bool, is_sparse: bool) -> AbstractContextManager[object]:
    """Return a context that exchanges operations for their replacements, if `needed`, and multiplies sparse tensors.

    Enter the context before the mode that records operations: the record then has the operations of the user.
    """
    if not is_sparse:
        return Exchange() if needed else nullcontext()
    return _with_sparse_replacements(needed)


@contextmanager
def _with_sparse_replacements(needed: bool) -> Iterator[None]:
    # An operation reaches `Exchange` first, and the products of a replacement reach `SparseProducts`.
    with SparseProducts(), Exchange() if needed else nullcontext():
        yield
