"""The dictionaries of parameters, buffers and attributes in which an `nn.Module` keeps tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class ParameterSlot:
    """A tensor of a module with every dictionary entry that holds it. Tied weights have several entries.

    Attributes:
        tensor: the tensor that the entries held when the slot was made.
        entries: pairs of a dictionary of a submodule (``_parameters`` or ``_buffers``) and the key in it.
    """

    tensor: torch.Tensor
    entries: list[tuple[dict[str, Any], str]] = field(default_factory=list)

    def put(self, tensor: torch.Tensor | None) -> None:
        """Write a tensor, or None, into all entries.

        The write bypasses ``nn.Module.__setattr__``, which refuses tensors that are no ``nn.Parameter``.
        """
        for held, key in self.entries:
            held[key] = tensor


def parameters_of(module: nn.Module) -> dict[str, ParameterSlot]:
    """Return all parameters, frozen ones included, by the names of ``named_parameters``."""
    return _slots_in(module, lambda part: part._parameters)


def listed_parameters_of(module: nn.Module) -> dict[str, ParameterSlot]:
    """Return the parameters that ``module.parameters()`` lists.

    An `implicitdiff.nn.MetaGradientModule` lists its inner parameters and no meta-parameters.
    """
    # By identity, since `==` compares entries.
    listed = set(map(id, module.parameters()))
    return {name: slot for name, slot in parameters_of(module).items() if id(slot.tensor) in listed}


def buffers_of(module: nn.Module) -> dict[str, ParameterSlot]:
    """Return all buffers by name, non-persistent ones included."""
    return _slots_in(module, lambda part: part._buffers)


def _slots_in(module: nn.Module, held_by: Callable[[nn.Module], dict[str, Any]]) -> dict[str, ParameterSlot]:
    found: dict[int, tuple[str, ParameterSlot]] = {}
    # `named_modules` yields a shared submodule once, under its first path.
    for path, part in module.named_modules():
        held = held_by(part)
        for key, tensor in held.items():
            if tensor is not None:
                name = f"{path}.{key}".removeprefix(".")
                # Tied tensors are known by identity and named after their first entry, as in `named_parameters`.
                _, slot = found.setdefault(id(tensor), (name, ParameterSlot(tensor)))
                slot.entries.append((held, key))
    return dict(found.values())
