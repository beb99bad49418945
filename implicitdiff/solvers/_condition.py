"""The equations that the families of solvers solve, made of the functions that users give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

import implicitdiff._pytree as pytree
from implicitdiff._lift import gradient, pullback
from implicitdiff._linear import check_leaves, check_like
from implicitdiff._signature import name_of

Parts = Mapping[str, Callable[..., Any]]


class Condition(NamedTuple):
    """What a solution satisfies.

    Attributes:
        parts: the user's functions by name, each as ``part(x, args, *more)``; their results are checked.
        optimality: ``optimality(parts, x, args)``, a tree like ``x`` that is zero at a solution.
    """

    parts: Parts
    optimality: Callable[[Parts, Any, tuple[Any, ...]], Any]


Pose = Callable[..., Condition]
"""``pose(*functions)`` makes the condition."""


def fixed_point(fn: Callable[..., Any]) -> Condition:
    """``fn(x, *args) = x``."""
    return Condition({"fn": _like_x(fn)}, _displacement)


def root(fn: Callable[..., Any]) -> Condition:
    """``fn(x, *args) = 0`` of as many equations as unknowns."""
    return Condition({"fn": _like_x(fn)}, lambda parts, x, args: parts["fn"](x, args))


def stationary(fn: Callable[..., Any]) -> Condition:
    """``grad fn(x, *args) = 0``."""
    return Condition({"fn": _scalar(fn)}, lambda parts, x, args: gradient(parts["fn"], x, args))


def least_squares(fn: Callable[..., Any]) -> Condition:
    """``J' r = 0`` for ``r = fn(x, *args)``, the gradient of ``|r|^2 / 2``."""

    def optimality(parts: Parts, x: Any, args: tuple[Any, ...]) -> Any:
        residuals, pull = pullback(parts["fn"], x, args)
        return pull(residuals)

    return Condition({"fn": _tensors(fn)}, optimality)


def proximal(fn: Callable[..., Any], prox: Callable[..., Any]) -> Condition:
    """``prox(x - grad fn(x, *args), 1) = x``."""

    def optimality(parts: Parts, x: Any, args: tuple[Any, ...]) -> Any:
        ahead = subtract(x, gradient(parts["fn"], x, args))
        return subtract(x, parts["prox"](ahead, args, 1.0))

    checked = _like_x(prox)
    return Condition({"fn": _scalar(fn), "prox": lambda v, args, stepsize=1.0: checked(v, (stepsize,))}, optimality)


def projected(fn: Callable[..., Any], projection: Callable[..., Any]) -> Condition:
    """``projection(x - grad fn(x, *args)) = x``."""
    checked = _like_x(projection)
    smooth = proximal(fn, projection)
    return smooth._replace(parts={**smooth.parts, "prox": lambda v, args, stepsize=1.0: checked(v, ())})


def _displacement(parts: Parts, x: Any, args: tuple[Any, ...]) -> Any:
    # In this order A = I - J, positive definite for a symmetric contraction.
    return subtract(x, parts["fn"](x, args))


def subtract(a: Any, b: Any) -> Any:
    """``a - b``, tensor by tensor."""
    leaves, structure = pytree.flatten(a)
    return structure.unflatten([p - q for p, q in zip(leaves, structure.tensors_of(b), strict=True)])


def _like_x(fn: Callable[..., Any]) -> Callable[..., Any]:
    def checked(x: Any, args: tuple[Any, ...]) -> Any:
        result = fn(x, *args)
        if not (isinstance(result, torch.Tensor) and isinstance(x, torch.Tensor) and _are_alike(result, x)):
            leaves, structure = pytree.flatten(x)
            check_like(f"{name_of(fn)}'s result", result, x, leaves, structure, "its first argument")
        return result

    return checked


def _are_alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def _scalar(fn: Callable[..., Any]) -> Callable[..., Any]:
    def checked(x: Any, args: tuple[Any, ...]) -> Any:
        value = fn(x, *args)
        if not (isinstance(value, torch.Tensor) and value.shape == () and value.is_floating_point()):
            raise ValueError(
                f"{name_of(fn)} must return one real number, a floating-point tensor of shape (), got "
                f"{pytree.describe(value)}"
            )
        return value

    return checked


def _tensors(fn: Callable[..., Any]) -> Callable[..., Any]:
    def checked(x: Any, args: tuple[Any, ...]) -> Any:
        result = fn(x, *args)
        check_leaves(f"{name_of(fn)}'s result", pytree.tensors(result))
        return result

    return checked
