"""Search for tensors and modules in the arguments of a constructor."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import nn

TensorOrModule: TypeAlias = torch.Tensor | nn.Module
Given: TypeAlias = dict[str, TensorOrModule]
"""Tensors and modules by path: the argument's name and the keys or attributes, joined by underscores."""

_NOT_CONTAINERS = (str, bytes, int, float, complex, bool, type(None))
# Objects with attributes in which a search would find half of the program.
_NOT_SEARCHED = (torch.Tensor, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)


def find_given(constructor: Callable[..., None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    """Return modules, and tensors that require a gradient or are an ``nn.Parameter``, among the arguments, by path.

    The search enters mappings, lists, tuples, sets, partials, and attributes of objects, such as dataclasses.
    Optimizers are not entered: their parameters belong to other modules.
    """
    try:
        # None stands for `self`.
        named = inspect.signature(constructor).bind(None, *args, **kwargs).arguments
    except TypeError:  # the call of the constructor raises the better message
        return {}
    found: dict[int, tuple[str, TensorOrModule]] = {}
    seen: dict[int, object] = {}
    for name, value in named.items():
        for path, item in _find_in(name, value, seen):
            # An object with several paths is known by the first.
            found.setdefault(id(item), (path, item))
    return dict(found.values())


def _find_in(path: str, value: object, seen: dict[int, object]) -> Iterator[tuple[str, TensorOrModule]]:
    if isinstance(value, (nn.Module, nn.Parameter)) or _is_learned(value):
        yield path, value
    elif not isinstance(value, (*_NOT_SEARCHED, torch.optim.Optimizer)) and id(value) not in seen:
        # Guards against cycles. The value is kept alive, since a temporary's id may be used again.
        seen[id(value)] = value
        for name, part in [(name, part) for name, part in _children(value) if not isinstance(part, _NOT_CONTAINERS)]:
            yield from _find_in(f"{path}_{name}", part, seen)


def _is_learned(value: object) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and value.requires_grad


@functools.singledispatch
def _children(value: object) -> Iterable[tuple[object, object]]:
    """Return the parts of a container or an object, by key or attribute."""
    # Classes with __slots__ have no __dict__, or one with the other attributes.
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    in_slots = [(name, getattr(value, name)) for name in slots if hasattr(value, name)]
    return [*getattr(value, "__dict__", {}).items(), *in_slots]


@_children.register
def _in_mapping(value: Mapping) -> Iterable[tuple[object, object]]:  # type: ignore[type-arg]
    return value.items()


@_children.register
def _in_sequence(value: list | tuple | set | frozenset) -> Iterable[tuple[object, object]]:  # type: ignore[type-arg]
    return enumerate(value)


@_children.register
def _in_partial(value: functools.partial) -> Iterable[tuple[object, object]]:  # type: ignore[type-arg]
    return [*enumerate(value.args), *value.keywords.items()]
