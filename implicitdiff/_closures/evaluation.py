"""How a user's function is evaluated: with whose derivatives, under which modes, and with which words in its errors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

import implicitdiff._torch.levels as functorch
import implicitdiff._torch.trees as pytree
from implicitdiff._torch.modes import uncached
from implicitdiff._torch.replacements import Exchange
from implicitdiff._torch.sparse import SparseProducts
from implicitdiff._torch.trees import Leaves
from implicitdiff.errors import TransformError

_evaluation = threading.local()


class named_in_errors(AbstractContextManager[Any]):
    """Raise `TransformError` where torch.func cannot transform a function of the user, of this name, in the body."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if functorch.depth() == 0:
            return
        if (refusal := transform_error(self.name, error)) not in (None, error):
            raise refusal from error


def transform_error(name: str, error: BaseException | None) -> TransformError | None:
    """Return the `TransformError` that an error of torch.func stands for, in a function of the user of this name; None
    for other errors."""
    if isinstance(error, TransformError):
        return error
    if not isinstance(error, RuntimeError) or (what := functorch.untransformable(error)) is None:
        return None
    return TransformError(
        f"{name} applies {what}; or take a first derivative by backward() outside of torch.func, which autograd alone "
        "can do"
    )


class by_autograd_alone:
    """Say how the function is evaluated that runs in the body."""

    def __init__(self, is_alone: bool) -> None:
        self.is_alone = is_alone

    def __enter__(self) -> None:
        self.before = getattr(_evaluation, "is_alone", False)
        _evaluation.is_alone = self.is_alone

    def __exit__(self, *error: object) -> None:
        _evaluation.is_alone = self.before


def is_by_autograd_alone() -> bool:
    """Whether autograd alone evaluates the function that is running."""
    return getattr(_evaluation, "is_alone", False) and functorch.depth() == 0


def gradient(fn: Callable[..., torch.Tensor], x: Any, *args: Any) -> Any:
    """The gradient of ``fn(x, *args)``, a real number, as a tree like ``x``; in functions that are evaluated here."""
    (value,), pull = pullback(fn, x, *args)
    return pull([torch.ones_like(value)])


def pullback(fn: Callable[..., Any], x: Any, *args: Any) -> tuple[Leaves, Callable[[Leaves], Any]]:
    """The leaves of ``fn(x, *args)``, and ``u -> J' u`` as a tree like ``x``; in functions that are evaluated here."""
    leaves, structure = pytree.flatten(x)

    def of_leaves(leaves: Leaves) -> Leaves:
        return pytree.tensors(fn(structure.unflatten(leaves), *args))

    if not is_by_autograd_alone():
        found: Any = torch.func.vjp(of_leaves, leaves)
        return found[0], lambda u: structure.unflatten(found[1](u)[0])
    with torch.enable_grad():
        leaves = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in leaves]
        values = of_leaves(leaves)

    def pull(u: Leaves) -> Any:
        pairs = [(value, v) for value, v in zip(values, u, strict=True) if value.requires_grad]
        if not pairs:
            return structure.unflatten([torch.zeros_like(t) for t in leaves])
        ys, us = zip(*pairs, strict=True)
        return structure.unflatten(torch.autograd.grad(ys, leaves, us, create_graph=True, materialize_grads=True))

    return values, pull


class as_evaluated:
    """Run the body without what the caller's frame has round it: caches of weights, hooks of saved tensors."""

    def __enter__(self) -> None:
        self.contexts = uncached(), functorch.without_saved_tensor_hooks()
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self.contexts):
            context.__exit__(*error)


def exchanged(needed: bool, is_sparse: bool) -> AbstractContextManager[object]:
    # Entered before the mode that compares operations, which then sees the operations that the user wrote.
    if not is_sparse:
        return Exchange() if needed else nullcontext()
    return _sparse_and_exchanged(needed)


@contextmanager
def _sparse_and_exchanged(needed: bool) -> Iterator[None]:
    with SparseProducts(), Exchange() if needed else nullcontext():
        yield
