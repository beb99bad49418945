"""Checks and conversions that all optimizer objects share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

import implicitdiff._torch.trees as pytree
from implicitdiff._torch.trees import Tree
from implicitdiff.optim._base import GradientTransformation


def check_transformation(name: str, given: object) -> GradientTransformation:
    """Return the transformation, or raise a TypeError."""
    if not isinstance(given, GradientTransformation):
        raise TypeError(
            f"{name}: transformation must be a GradientTransformation such as implicitdiff.adam(1e-3), "
            f"got {type(given).__name__}"
        )
    return given


TensorOptions = list[tuple[torch.dtype, torch.device]]
"""Dtype and device of each parameter: a state is converted when they change."""


def tensor_options(params: Tree) -> TensorOptions:
    """Return the dtype and the device of each parameter."""
    return [(t.dtype, t.device) for t in pytree.tensors(params)]


def convert_state(given: Tree, fresh: Tree) -> Tree:
    """Return a state with the dtypes and devices of a fresh one, after the parameters were converted."""
    leaves, structure = pytree.flatten(fresh)
    pairs = zip(structure.tensors_of(given), leaves, strict=True)
    return structure.unflatten([t.to(like.device, like.dtype) for t, like in pairs])


def fitted(
    state: Tree, known: TensorOptions | None, params: Tree, init: Callable[[Tree], Tree]
) -> tuple[Tree, TensorOptions]:
    """Return a state with the dtypes and devices of the parameters, and these: `state`, or a fresh one without it.

    `known` are the dtypes and devices of `state`.
    """
    options = tensor_options(params)
    if state is None:
        return init(params), options
    return state if options == known else convert_state(state, init(params)), options


def is_shaped_like(given: Tree, like: Tree) -> bool:
    """Return whether two trees agree in nesting and in the shapes of their tensors."""
    leaves, structure = pytree.flatten(like)
    try:
        others = structure.tensors_of(given)
    except ValueError:
        others = []
    return [t.shape for t in others] == [t.shape for t in leaves]


def check_state(name: str, mine: Tree, given: Tree) -> Tree:
    """Return the given state, or raise if nesting or shapes differ from the present state."""
    # Dtypes and devices may differ: `convert_state` adapts them.
    if not is_shaped_like(given, mine):
        raise ValueError(
            f"{name}: the given state does not belong to this optimizer and these parameters: expected "
            f"{pytree.describe(mine)}, got {pytree.describe(given)}"
        )
    return given


def object_signature(first: str, factory: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a class whose constructor takes `first`, then the arguments of a factory."""
    given = inspect.signature(factory)
    # `first` is positional or a keyword, as in torch.optim.
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return given.replace(
        parameters=[inspect.Parameter(first, kind), *given.parameters.values()],
        return_annotation=inspect.Signature.empty,
    )


def bind_arguments(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a constructor by name, bound by the class's ``__signature__``."""
    try:
        return dict(cls.__signature__.bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise TypeError(f"{cls.__name__}: {error}; the signature is {cls.__signature__}") from None
