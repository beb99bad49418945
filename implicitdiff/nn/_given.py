"""Tensors and modules among the arguments of a constructor."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

Given = dict[str, Any]

_ATOMS = (str, bytes, int, float, complex, bool, type(None))
_CLOSED = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)


def find(constructor: Callable[..., None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    """The modules, and the tensors that need a gradient or are an ``nn.Parameter``, by how they are reached.

    Looked through are dictionaries, lists, tuples, sets, partials, and what objects keep as attributes, dataclasses
    among them; but not optimizers, whose parameters are somebody else's.
    """
    try:
        named = inspect.signature(constructor).bind(None, *args, **kwargs).arguments
    except TypeError:  # the constructor says best what is wrong
        return {}
    found: dict[int, tuple[str, Any]] = {}
    seen: dict[int, Any] = {}
    for name, value in named.items():
        for path, item in _items(name, value, seen):
            found.setdefault(id(item), (path, item))
    return dict(found.values())


def _items(path: str, value: Any, seen: dict[int, Any]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, nn.Module):
        yield path, value
    elif isinstance(value, torch.Tensor):
        if value.requires_grad or isinstance(value, nn.Parameter):
            yield path, value
    elif not isinstance(value, (*_CLOSED, torch.optim.Optimizer)) and id(value) not in seen:
        seen[id(value)] = value
        for name, part in _parts(value):
            if not isinstance(part, _ATOMS):
                yield from _items(f"{path}_{name}", part, seen)


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from enumerate(value)
    elif isinstance(value, functools.partial):
        yield from enumerate(value.args)
        yield from value.keywords.items()
    else:
        yield from getattr(value, "__dict__", {}).items()
        slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        yield from ((name, getattr(value, name)) for name in slots if hasattr(value, name))
