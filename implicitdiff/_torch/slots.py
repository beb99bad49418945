"""Where a module keeps its tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class Place:
    """A tensor of a module, and everywhere that it is kept: tied weights have several places.

    Attributes:
        tensor: what is there.
        slots: the module's dictionaries that hold it, each with its key there.
    """

    tensor: torch.Tensor
    slots: list[tuple[dict[str, Any], str]] = field(default_factory=list)

    def put(self, tensor: torch.Tensor | None) -> None:
        """Keep another tensor there, a parameter or not, or none."""
        for held, key in self.slots:
            held[key] = tensor


def parameters_of(module: nn.Module) -> dict[str, Place]:
    """The parameters of a module by the names that ``named_parameters`` gives them; frozen ones are among them."""
    return _places(module, lambda part: part._parameters)


def listed_parameters_of(module: nn.Module) -> dict[str, Place]:
    """Those parameters that ``module.parameters()`` lists: an `implicitdiff.nn.MetaGradientModule` lists its own."""
    listed = set(map(id, module.parameters()))
    return {name: place for name, place in parameters_of(module).items() if id(place.tensor) in listed}


def buffers_of(module: nn.Module) -> dict[str, Place]:
    """The buffers of a module, those that are not saved among them."""
    return _places(module, lambda part: part._buffers)


def _places(module: nn.Module, held_by: Callable[[nn.Module], dict[str, Any]]) -> dict[str, Place]:
    found: dict[int, tuple[str, Place]] = {}
    for path, part in module.named_modules():
        held = held_by(part)
        for key, tensor in held.items():
            if tensor is not None:
                name = f"{path}.{key}" if path else key
                _, place = found.setdefault(id(tensor), (name, Place(tensor)))
                place.slots.append((held, key))
    return dict(found.values())
