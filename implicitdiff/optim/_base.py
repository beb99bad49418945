"""Optimizers as pairs of pure functions: the type, application of updates, and chains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

import implicitdiff._torch.trees as pytree
import implicitdiff.optim._donation as _donation
import implicitdiff.optim._fused as _fused
from implicitdiff._calls import FactoryCall, Remembers, shown, shows_call
from implicitdiff._torch.trees import Tree
from implicitdiff.optim._columns import Columns


class GradientTransformation(NamedTuple):
    """A pair of pure functions that turns gradients into updates.

    Call ``state = init(params)`` once. In each step call ``updates, state = update(grads, state, params)``, then
    ``params = apply_updates(params, updates)``. The state holds everything that changes from step to step, so one pair
    serves any number of runs, and both functions work under every transform of torch.func.

    Attributes:
        init: ``init(params) -> state``, a pytree of tensors.
        update: ``update(grads, state, params=None, *, inplace=False) -> (updates, state)``. ``grads`` and ``updates``
            are nested like ``params``. A gradient may be None: its update is None, and its entries of the state do not
            change. ``inplace=True`` donates ``grads`` and ``state``: the call overwrites and returns their memory, and
            raises if a graph or a transform needs the old values. Callers pass ``params`` and ``inplace`` by keyword.

    Reference:
        The interface is that of Optax (DeepMind, 2020).

    Example:
        >>> import torch
        >>> from implicitdiff import adam, apply_updates
        >>> init, update = adam(lr=0.1)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> updates, state = update({"w": torch.tensor([0.5, -3.0])}, init(params))
        >>> apply_updates(params, updates)
        {'w': tensor([0.9000, 2.1000])}
    """

    init: Callable[[Tree], Tree]
    update: Callable[..., tuple[Tree, Tree]]

    def __repr__(self) -> str:
        if isinstance(self.update, Remembers):
            return repr(self.update)
        return f"GradientTransformation({shown(self.init)}, {shown(self.update)})"

    def remember(self, call: FactoryCall) -> None:
        """Set the call that `repr` shows."""
        if isinstance(self.update, Remembers):
            self.update.remember(call)

    def step(self, grads: Tree, state: Tree, params: Tree, *, inplace: bool = False) -> tuple[Tree, Tree]:
        """Return ``(params, state)`` after ``update`` and `apply_updates`.

        The optimizers of this library fuse both: a parameter is read, written and rounded once. ``inplace=True``
        donates ``params`` and ``state``; a chain overwrites ``grads`` as well.
        """
        # Pairs of this library are callable objects with a fused step. A user's plain function has none.
        fused = getattr(self.update, "step", None)
        if fused is not None:
            return fused(grads, state, params, inplace=inplace)  # type: ignore[no-any-return]
        if inplace:
            # A gradient that shares memory with a parameter is copied before `update` overwrites gradients.
            columns = Columns("step", "grads", grads)
            olds = columns.column("params", columns.match("params", params))
            grads = columns.tree_of(columns.leaves, _donation.copied_if_shared("step", olds, columns.first))
        updates, state = self.update(grads, state, params=params, inplace=inplace)
        return apply_updates(params, updates, inplace=inplace), state


def step_beside_grads(
    pair: GradientTransformation, grads: Tree, state: Tree, params: Tree, *, inplace: bool
) -> tuple[Tree, Tree]:
    """Return ``(params, state)`` after `GradientTransformation.step`, in which the gradients keep their memory."""
    if inplace and getattr(pair.update, "step", None) is None:  # an unfused step overwrites the gradients
        grads = pytree.map_tensors(torch.clone, grads)
    return pair.step(grads, state, params, inplace=inplace)


def apply_updates(params: Tree, updates: Tree, *, inplace: bool = False) -> Tree:
    """Return ``params + updates``, leaf by leaf.

    Args:
        params: a pytree of tensors.
        updates: a tree nested like ``params``, with tensors of equal shapes, dtypes and devices. None leaves a
            parameter unchanged.
        inplace: overwrite the parameters and return them. Leaves of a graph, such as an ``nn.Parameter``, are
            overwritten under `torch.no_grad`, as by an optimizer of torch.optim.

    Returns:
        A tree like ``params``.

    Raises:
        ValueError: the trees or their leaves do not match; ``inplace=True`` would overwrite a value that a graph or a
            transform needs; or two parameters share memory.

    Example:
        >>> import torch
        >>> from implicitdiff import apply_updates
        >>> apply_updates([torch.tensor(1.0), torch.tensor(2.0)], [torch.tensor(0.5), None])
        [tensor(1.5000), tensor(2.)]
    """
    columns = Columns("apply_updates", "updates", updates)
    leaves = columns.match("params", params)
    olds, news = columns.present("params", leaves), columns.first
    # Located are plain tensors of equal shapes, dtypes and devices, which need no further checks.
    memory = _fused.locate([news, olds], [1] if inplace else [])
    if memory is _fused.NOT_LOCATED:
        columns.checked().compare("params", olds)
    if not inplace:
        return columns.tree_of(leaves, [p + u for p, u in zip(olds, news, strict=True)])
    if not memory.is_donated:
        _donation.refuse_tracked("apply_updates", "updates", news)
        news = _donation.copied_if_shared("apply_updates", olds, news)
        _donation.refuse_unheld("apply_updates", olds, news)
    # An update with history was refused above, so no derivative is lost here.
    with torch.no_grad():
        for p, u in zip(olds, news, strict=True):
            p.add_(u)
    return params


@shows_call
def chain(*transformations: GradientTransformation) -> GradientTransformation:
    """Apply transformations in sequence: the updates of each are the gradients of the next.

    With ``inplace=True``, an error in one transformation does not undo the writes of earlier ones.

    Args:
        transformations: pairs, each a `GradientTransformation` or a plain ``(init, update)``.

    Returns:
        A pair whose state is the tuple of the inner states.

    Raises:
        TypeError: an argument is not a pair of functions.

    Example:
        >>> import torch
        >>> import implicitdiff
        >>> from implicitdiff.optim import scale
        >>> init, update = implicitdiff.chain(implicitdiff.clip_grad_norm(1.0), scale(-0.1))
        >>> update(torch.tensor([30.0, 40.0]), init(torch.zeros(2)))[0]
        tensor([-0.0600, -0.0800])
    """
    if others := [given for given in transformations if not _is_pair(given)]:
        raise TypeError(
            f"chain: each argument must be a pair (init, update) such as scale(0.1), got {type(others[0]).__name__}"
        )
    update = _Chain(transformations)
    return GradientTransformation(update.init, update)


def _is_pair(given: object) -> bool:
    return isinstance(given, (tuple, list)) and len(given) == 2 and all(map(callable, given))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Chain(Remembers):
    """``init`` and ``update`` of a chain."""

    links: Sequence[Sequence[Callable[..., Any]]]

    def init(self, params: Tree) -> tuple[Tree, ...]:
        return tuple(init(params) for init, _ in self.links)

    def __call__(
        self, updates: Tree, state: Tree, params: Tree = None, *, inplace: bool = False
    ) -> tuple[Tree, tuple[Tree, ...]]:
        if len(state) != len(self.links):
            raise ValueError(
                f"chain: the state must be of these {len(self.links)} transformations, got a state of {len(state)}; "
                "pass the state that init of the chain returned"
            )
        states = []
        for (_, apply), inner in zip(self.links, state, strict=True):
            # In place each transformation overwrites the updates of the last.
            updates, inner = apply(updates, inner, params=params, inplace=inplace)
            states.append(inner)
        return updates, tuple(states)
