"""Modules that distinguish given parameters (meta-parameters) from parameters of their own."""

from __future__ import annotations

import abc
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from implicitdiff._torch.slots import ParameterSlot, parameters_of
from implicitdiff._torch.tracking import is_continuous
from implicitdiff.nn._given import Given, TensorOrModule, find_given


class _ArgumentTracking(abc.ABCMeta):
    """Metaclass that records the tensors and modules among the arguments of a constructor."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        # The arguments are recorded before __init__, in which `__setattr__` asks whether a tensor is a meta-parameter.
        module: Any = cls.__new__(cls, *args, **kwargs)  # type: ignore[arg-type]
        constructor = cls.__init__  # type: ignore[misc]
        module.__dict__.update(_given=find_given(constructor, args, kwargs), _meta={}, _adopted={})
        constructor(module, *args, **kwargs)
        module._adopt()
        return module


class MetaGradientModule(nn.Module, metaclass=_ArgumentTracking):
    """A module with meta-parameters, passed to its constructor, and inner parameters, made by the constructor.

    Modules passed to ``__init__`` are meta-modules, in training or evaluation mode, frozen or not. Meta-parameters are
    their parameters, and each ``nn.Parameter`` or tensor that requires a gradient among the arguments. Dictionaries,
    lists, tuples, dataclasses and plain objects are searched. A meta-parameter that ``__init__`` does not assign
    becomes an attribute named after the argument. Tensors in other places, such as a function's closure, take part in
    derivatives, but are listed only if they are registered.

    Parameters and modules made in ``__init__`` are inner parameters and modules. A leaf that requires a gradient
    becomes an inner parameter without ``nn.Parameter``. A tensor with history is an attribute.

    Storage is that of ``nn.Module``: ``to``, ``state_dict``, ``load_state_dict``, ``train``, ``zero_grad`` and
    `torch.func.functional_call` treat both kinds. ``parameters`` and ``named_parameters`` list inner parameters alone.

    Example:
        >>> import torch
        >>> from implicitdiff.nn import MetaGradientModule
        >>> class Tuned(MetaGradientModule):
        ...     def __init__(self, net, config):
        ...         super().__init__()
        ...         self.net = net
        ...         self.head = torch.nn.Linear(2, 1)
        >>> tuned = Tuned(torch.nn.Linear(3, 2).eval(), {"penalty": torch.tensor(0.1, requires_grad=True)})
        >>> [name for name, _ in tuned.named_parameters()]
        ['head.weight', 'head.bias']
        >>> [name for name, _ in tuned.named_meta_parameters()]
        ['config_penalty', 'net.weight', 'net.bias']
    """

    _given: Given
    _meta: dict[str, None]
    _adopted: dict[str, torch.Tensor]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setattr__(self, name: str, value: Any) -> None:
        if not isinstance(value, torch.Tensor):
            super().__setattr__(name, value)
        # Before ``Module.__init__`` nothing can be registered.
        elif "_parameters" not in self.__dict__:
            if value.requires_grad:
                raise AttributeError(f"cannot assign the parameter {name!r} before Module.__init__() call")
            super().__setattr__(name, value)
        # Tensors that are no nn.Parameter are registered too; nn.Module refuses them.
        elif id(value) in self._meta_ids():
            self._keep(name, value)
            self._meta[name] = None
        elif _is_bare_leaf(value):
            self._keep(name, value)
        else:
            super().__setattr__(name, value)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterate over names and inner parameters.

        With ``remove_duplicate=False`` meta-parameters are included: `torch.func.functional_call` looks up tied tensors
        by such a call, and has to exchange both kinds.
        """
        metas = self._meta_ids() if remove_duplicate else set()
        named = super().named_parameters(prefix, recurse, remove_duplicate)
        return ((name, tensor) for name, tensor in named if id(tensor) not in metas)

    def named_meta_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
        """Iterate over names and meta-parameters, including those of meta-modules."""
        metas = self._meta_ids()
        named = super().named_parameters(prefix, recurse)
        return ((name, tensor) for name, tensor in named if id(tensor) in metas)

    def meta_parameters(self, recurse: bool = True) -> Iterator[torch.Tensor]:
        """Iterate over the meta-parameters, for an outer optimizer."""
        return (tensor for _, tensor in self.named_meta_parameters(recurse=recurse))

    def meta_modules(self) -> Iterator[nn.Module]:
        """Iterate over the meta-modules and their submodules."""
        items = self._meta_items()
        modules = (part for item in items if isinstance(item, nn.Module) for part in item.modules())
        return iter({id(part): part for part in modules}.values())

    def named_meta_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Iterate over names, as in ``named_modules``, and meta-modules with their submodules."""
        metas = set(map(id, self.meta_modules()))
        named = self.named_modules(memo, prefix, remove_duplicate)
        return ((name, module) for name, module in named if id(module) in metas)

    def named_meta_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Iterate over names and meta-modules that are attributes of this module."""
        metas = set(map(id, self.meta_modules()))
        return ((name, module) for name, module in self.named_children() if id(module) in metas)

    def meta_children(self) -> Iterator[nn.Module]:
        """Iterate over the meta-modules that are attributes of this module."""
        return (module for _, module in self.named_meta_children())

    def register_parameter(self, name: str, param: torch.Tensor | None) -> None:
        """Add an inner parameter: an ``nn.Parameter``, or another leaf that needs a gradient.

        Raises:
            ValueError: the tensor is a meta-parameter.
        """
        if id(param) in self._meta_ids():
            raise ValueError(f"parameter {name!r} is a meta-parameter; use register_meta_parameter")
        if _is_bare_leaf(param):
            self._keep(name, param)
        else:
            super().register_parameter(name, param)  # type: ignore[arg-type]  # raises for a wrong type

    def register_meta_parameter(self, name: str, param: torch.Tensor | None) -> None:
        """Add a meta-parameter: a floating-point or complex tensor, frozen or not; None keeps the name.

        Raises:
            TypeError: `param` is not such a tensor.
            KeyError: the name is that of another attribute.
        """
        if param is not None and not (isinstance(param, torch.Tensor) and is_continuous(param)):
            kind = param.dtype if isinstance(param, torch.Tensor) else type(param).__name__
            raise TypeError(f"meta-parameter {name!r} must be a floating-point or complex tensor or None, got {kind}")
        self._keep(name, param)
        self._meta[name] = None

    def register_meta_module(self, name: str, module: nn.Module | None) -> None:
        """Add a meta-module; None keeps the name.

        Raises:
            TypeError: `module` is not an ``nn.Module``.
            KeyError: the name is that of another attribute.
        """
        self.add_module(name, module)
        self._meta[name] = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of inner and meta-parameters."""
        # `nn.Module.zero_grad` visits ``parameters()``, the inner parameters alone.
        leaves = [slot.tensor for slot in parameters_of(self).values() if slot.tensor.is_leaf]
        for leaf, grad in [(leaf, leaf.grad) for leaf in leaves if leaf.grad is not None]:
            leaf.grad = None if set_to_none else torch.zeros_like(grad)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # `nn.Module._apply` writes to ``.data``, which loses history: tensors with history are taken out of their slots
        # and converted by differentiable operations.
        attached = [slot for slot in parameters_of(self).values() if not slot.tensor.is_leaf]
        for slot in attached:
            slot.put(None)
        try:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            with torch.enable_grad():
                for slot in attached:
                    slot.put(fn(slot.tensor))

    def _keep(self, name: str, tensor: torch.Tensor | None) -> None:
        """Register a tensor, ``nn.Parameter`` or not, as a parameter."""
        self.__dict__.pop(name, None)
        # The name is checked and registered by nn.Module with None, then filled: nn.Module accepts nn.Parameter alone.
        super().register_parameter(name, None)
        self._parameters[name] = tensor  # type: ignore[assignment]

    def _meta_items(self) -> list[TensorOrModule]:
        """Return the present meta-parameters and meta-modules, which `torch.func.functional_call` may exchange."""
        items = [*self.__dict__.get("_given", {}).values()]
        for path in self._meta:
            above, _, name = path.rpartition(".")
            owner = self.get_submodule(above)
            items += [held[name] for held in (owner._parameters, owner._modules) if held.get(name) is not None]
        return items

    def _meta_ids(self) -> set[int]:
        items = self._meta_items()
        tensors = (p for item in items if isinstance(item, nn.Module) for p in nn.Module.parameters(item))
        return {id(item) for item in items} | {id(slot) for slot in tensors}

    def _inner_slots(self) -> dict[str, ParameterSlot]:
        metas = self._meta_ids()
        return {name: slot for name, slot in parameters_of(self).items() if id(slot.tensor) not in metas}

    def _adopt(self) -> None:
        """Record the path of each given tensor or module, and make it an attribute if it has no path."""
        for argument, item in self.__dict__.pop("_given").items():
            # `super()`, since the override lists inner parameters alone.
            named = self.named_modules if isinstance(item, nn.Module) else super().named_parameters
            path = next((path for path, there in named(remove_duplicate=False) if there is item), None)
            if path is None:
                # Not assigned by __init__: an attribute named after the argument, with an underscore if the name is
                # taken.
                path = re.sub(r"\W", "_", argument)
                path += "_" * hasattr(self, path)
                if isinstance(item, nn.Module):
                    self.add_module(path, item)
                else:
                    self._keep(path, item)
                    self._adopted[path] = item
            self._meta[path] = None

    def _refuse_exchanged(self) -> None:
        """Raise if `functional_call` exchanged a meta-parameter that the module reads from inside of an argument."""
        adopted = self._adopted.items()
        if exchanged := [path for path, tensor in adopted if self._parameters.get(path) is not tensor]:
            raise ValueError(
                f"{type(self).__name__}: torch.func.functional_call replaced the meta-parameter {exchanged[0]!r}, but "
                "the module reads it from inside of an argument: assign it to an attribute in __init__, and read the "
                "attribute"
            )


def _is_bare_leaf(value: object) -> bool:
    """True for a leaf that requires a gradient and is no ``nn.Parameter``."""
    is_leaf = isinstance(value, torch.Tensor) and value.requires_grad and value.is_leaf
    return is_leaf and not isinstance(value, nn.Parameter)
