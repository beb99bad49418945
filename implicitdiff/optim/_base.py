"""What an optimizer is: a pair of pure functions; how pairs are applied and chained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

import implicitdiff.optim._donation as _donation
import implicitdiff.optim._fused as _fused
from implicitdiff.optim._columns import Columns


class GradientTransformation(NamedTuple):
    """A pair of pure functions that makes updates out of gradients.

    ``state = init(params)``, then ``updates, state = update(grads, state, params)`` as often as wanted, each followed
    by ``params = apply_updates(params, updates)``. All that changes from step to step is in the state, so one pair
    serves any number of runs, and both functions go through every transform of torch.func.

    Attributes:
        init: ``init(params) -> state``, a pytree of tensors.
        update: ``update(grads, state, params=None, *, inplace=False) -> (updates, state)``. ``grads`` and ``updates``
            are nested like ``params``. A gradient may be None: its parameter and what belongs to it in the state are
            left alone, and its update is None. ``inplace=True`` donates ``grads`` and ``state``: their memory is
            overwritten and returned. That is refused where a graph or a transform needs the old values. Whoever writes
            a pair: it is called with ``params`` and ``inplace`` by keyword.

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

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]

    def step(self, grads: Any, state: Any, params: Any, *, inplace: bool = False) -> tuple[Any, Any]:
        """``update`` and `apply_updates` in one: returns ``(params, state)``.

        The optimizers of this library read and write every parameter once in it, and round once. ``inplace=True``
        donates ``params`` and ``state``; a chain overwrites ``grads`` as well.
        """
        fused = getattr(self.update, "step", None)
        if fused is not None:
            return fused(grads, state, params, inplace=inplace)  # type: ignore[no-any-return]
        if inplace:
            # Before the gradients are overwritten.
            columns = Columns("step", "grads", grads)
            olds = columns.column("params", columns.match("params", params))
            grads = columns.tree_of(columns.leaves, _donation.apart("step", olds, columns.first))
        updates, state = self.update(grads, state, params=params, inplace=inplace)
        return apply_updates(params, updates, inplace=inplace), state


def apply_updates(params: Any, updates: Any, *, inplace: bool = False) -> Any:
    """Add updates to parameters: ``params + updates``, leaf by leaf.

    Args:
        params: a pytree of tensors.
        updates: a tree nested like it, of tensors of the same shapes, dtypes and devices; where an update is None, the
            parameter is returned as it is.
        inplace: overwrite the parameters and return them. Leaves that require a gradient, such as an
            ``nn.Parameter``, are overwritten as an optimizer would: outside of any graph.

    Returns:
        A tree like ``params``.

    Raises:
        ValueError: the trees or their leaves do not match, or ``inplace=True`` would overwrite a value that a graph or
            a transform needs, or parameters that share memory.

    Example:
        >>> import torch
        >>> from implicitdiff import apply_updates
        >>> apply_updates([torch.tensor(1.0), torch.tensor(2.0)], [torch.tensor(0.5), None])
        [tensor(1.5000), tensor(2.)]
    """
    columns = Columns("apply_updates", "updates", updates)
    leaves = columns.match("params", params)
    olds, news = columns.present("params", leaves), columns.first
    memory = _fused.locate([news, olds], [1] if inplace else [])
    if memory is None:
        columns.checked().compare("params", olds)
    if not inplace:
        return columns.tree_of(leaves, [p + u for p, u in zip(olds, news, strict=True)])
    if memory is None or not memory.is_donated:
        _donation.refuse_tracked("apply_updates", "updates", news)
        news = _donation.apart("apply_updates", olds, news)
        _donation.refuse_unheld("apply_updates", olds, news)
    with torch.no_grad():
        for p, u in zip(olds, news, strict=True):
            p.add_(u)
    return params


def chain(*transformations: GradientTransformation) -> GradientTransformation:
    """Apply transformations one after the other: the updates of each are the gradients of the next.

    In place, a transformation that raises leaves behind what those before it have overwritten.

    Args:
        transformations: pairs, `GradientTransformation` or any ``(init, update)`` alike.

    Returns:
        A pair whose state is the tuple of their states.

    Raises:
        TypeError: an argument is no pair of functions.

    Example:
        >>> import torch
        >>> import implicitdiff
        >>> from implicitdiff.optim import scale
        >>> init, update = implicitdiff.chain(implicitdiff.clip_grad_norm(1.0), scale(-0.1))
        >>> update(torch.tensor([30.0, 40.0]), init(torch.zeros(2)))[0]
        tensor([-0.0600, -0.0800])
    """
    for given in transformations:
        if not (isinstance(given, (tuple, list)) and len(given) == 2 and all(map(callable, given))):
            raise TypeError(
                f"chain: each argument has to be a pair (init, update) such as scale(0.1), got {type(given).__name__}"
            )
    update = _Chain(transformations)
    return GradientTransformation(update.init, update)


@dataclasses.dataclass(frozen=True, eq=False)
class _Chain:
    """The pair of pairs."""

    links: Sequence[Sequence[Callable[..., Any]]]

    def init(self, params: Any) -> tuple[Any, ...]:
        return tuple(init(params) for init, _ in self.links)

    def __call__(
        self, updates: Any, state: Any, params: Any = None, *, inplace: bool = False
    ) -> tuple[Any, tuple[Any, ...]]:
        if len(state) != len(self.links):
            raise ValueError(f"chain: {len(self.links)} transformations, but a state of {len(state)}; give it its own")
        states = []
        for (_, apply), inner in zip(self.links, state, strict=True):
            updates, inner = apply(updates, inner, params=params, inplace=inplace)
            states.append(inner)
        return updates, tuple(states)
