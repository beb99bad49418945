"""What every front checks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

import implicitdiff._torch.trees as pytree
from implicitdiff.optim._base import GradientTransformation


def transformation(name: str, given: Any) -> GradientTransformation:
    """What was given, if it is a `GradientTransformation`."""
    if not isinstance(given, GradientTransformation):
        raise TypeError(
            f"{name}: transformation must be a GradientTransformation such as implicitdiff.adam(1e-3), "
            f"got {type(given).__name__}"
        )
    return given


Kinds = list[tuple[torch.dtype, torch.device]]


def kinds(params: Any) -> Kinds:
    """What the dtypes and the devices of a state depend on."""
    return [(t.dtype, t.device) for t in pytree.tensors(params)]


def fitted(given: Any, fresh: Any) -> Any:
    """A state in the dtypes and on the devices of a fresh one, for parameters that were converted since."""
    leaves, structure = pytree.flatten(fresh)
    pairs = zip(structure.tensors_of(given), leaves, strict=True)
    return structure.unflatten([t.to(like.device, like.dtype) for t, like in pairs])


def state(name: str, mine: Any, given: Any) -> Any:
    """A state to go on with, if it is nested like the present one, with tensors of the same shapes."""
    leaves, structure = pytree.flatten(mine)
    try:
        others = structure.tensors_of(given)
    except ValueError:
        others = []
    if [t.shape for t in others] != [t.shape for t in leaves]:
        raise ValueError(
            f"{name}: the state given is not one of this optimizer for these parameters: expected "
            f"{pytree.describe(mine)}, got {pytree.describe(given)}"
        )
    return given


def signature(first: str, factory: Callable[..., Any]) -> inspect.Signature:
    """How a front of a factory's transformation is called."""
    given = inspect.signature(factory)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return given.replace(
        parameters=[inspect.Parameter(first, kind), *given.parameters.values()],
        return_annotation=inspect.Signature.empty,
    )


def bound(front: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name, of a front that is called as `signature` has it."""
    try:
        return dict(front.__signature__.bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise TypeError(f"{front.__name__}: {error}; it takes {front.__signature__}") from None
