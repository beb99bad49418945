"""Modules that tell the parameters they were given from those they made."""

from __future__ import annotations

import abc
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import implicitdiff.nn._given as _given
from implicitdiff._torch.slots import Place, parameters_of


class _Adopting(abc.ABCMeta):
    """Makes modules that know what their constructor was given."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        module: Any = cls.__new__(cls, *args, **kwargs)  # type: ignore[arg-type]
        constructor = cls.__init__  # type: ignore[misc]
        module.__dict__.update(_given=_given.find(constructor, args, kwargs), _meta={}, _adopted={})
        constructor(module, *args, **kwargs)
        module._adopt()
        return module


class MetaGradientModule(nn.Module, metaclass=_Adopting):
    """A module with meta-parameters: those that it was given, as opposed to those that it made.

    Tensors and modules passed to ``__init__`` are meta-parameters and meta-modules, whatever their mode: a module in
    evaluation mode or with frozen parameters is one too, and so are an ``nn.Parameter`` and any other tensor that needs
    a gradient. They are found in dictionaries, lists, tuples, dataclasses and plain objects as well; where ``__init__``
    does not make them attributes, they become one, named after the argument. What hides elsewhere, as in a function's
    closure, takes part in derivatives but is in none of the lists here, unless it is registered.

    Parameters and modules made in ``__init__`` are inner ones. A tensor that needs a gradient may be an inner parameter
    as it is; one that depends on others is none, but an attribute.

    Everything is kept where an ``nn.Module`` keeps it: ``to``, ``state_dict``, ``load_state_dict``, ``train``,
    ``zero_grad`` and `torch.func.functional_call` are about both kinds. Only ``parameters`` and ``named_parameters``
    are about the inner ones.

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

    _given: dict[str, Any]
    _meta: dict[str, None]
    _adopted: dict[str, torch.Tensor]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setattr__(self, name: str, value: Any) -> None:
        if not isinstance(value, torch.Tensor):
            super().__setattr__(name, value)
        elif "_parameters" not in self.__dict__:
            if value.requires_grad:
                raise AttributeError(f"cannot assign parameters before Module.__init__() call, and {name!r} is one")
            super().__setattr__(name, value)
        elif id(value) in self._meta_ids():
            self._keep(name, value)
            self._meta[name] = None
        elif value.requires_grad and value.is_leaf and not isinstance(value, nn.Parameter):
            self._keep(name, value)
        else:
            super().__setattr__(name, value)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The inner parameters and their names, as ``nn.Module`` has them.

        With their duplicates they are those of both kinds: `torch.func.functional_call` asks so for what is tied.
        """
        metas = self._meta_ids() if remove_duplicate else set()
        named = super().named_parameters(prefix, recurse, remove_duplicate)
        return ((name, tensor) for name, tensor in named if id(tensor) not in metas)

    def named_meta_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
        """The meta-parameters and their names, those of meta-modules among them."""
        metas = self._meta_ids()
        named = super().named_parameters(prefix, recurse)
        return ((name, tensor) for name, tensor in named if id(tensor) in metas)

    def meta_parameters(self, recurse: bool = True) -> Iterator[torch.Tensor]:
        """The meta-parameters: what an outer optimizer is given."""
        return (tensor for _, tensor in self.named_meta_parameters(recurse=recurse))

    def meta_modules(self) -> Iterator[nn.Module]:
        """The meta-modules and the modules in them."""
        items = self._meta_items()
        modules = (part for item in items if isinstance(item, nn.Module) for part in item.modules())
        return iter({id(part): part for part in modules}.values())

    def named_meta_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """The meta-modules and the modules in them, with the names that ``named_modules`` gives them."""
        metas = set(map(id, self.meta_modules()))
        named = self.named_modules(memo, prefix, remove_duplicate)
        return ((name, module) for name, module in named if id(module) in metas)

    def named_meta_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Those meta-modules that are attributes of this module, and their names."""
        metas = set(map(id, self.meta_modules()))
        return ((name, module) for name, module in self.named_children() if id(module) in metas)

    def meta_children(self) -> Iterator[nn.Module]:
        """Those meta-modules that are attributes of this module."""
        return (module for _, module in self.named_meta_children())

    def register_parameter(self, name: str, param: torch.Tensor | None) -> None:
        """Add an inner parameter: an ``nn.Parameter``, or another leaf that needs a gradient.

        Raises:
            ValueError: it is a meta-parameter.
        """
        if param is not None and id(param) in self._meta_ids():
            raise ValueError(f"parameter {name!r} is a meta-parameter; use register_meta_parameter")
        if param is None or isinstance(param, nn.Parameter) or not (param.requires_grad and param.is_leaf):
            super().register_parameter(name, param)  # type: ignore[arg-type]  # which says what is wrong
        else:
            self._keep(name, param)

    def register_meta_parameter(self, name: str, param: torch.Tensor | None) -> None:
        """Add a meta-parameter: a floating-point or complex tensor, frozen or not; None keeps the name.

        Raises:
            TypeError: it is no such tensor.
            KeyError: there is another attribute of this name.
        """
        if param is not None and not (
            isinstance(param, torch.Tensor) and (param.is_floating_point() or param.is_complex())
        ):
            kind = param.dtype if isinstance(param, torch.Tensor) else type(param).__name__
            raise TypeError(f"meta-parameter {name!r} must be a floating-point or complex tensor or None, got {kind}")
        self._keep(name, param)
        self._meta[name] = None

    def register_meta_module(self, name: str, module: nn.Module | None) -> None:
        """Add a meta-module; None keeps the name.

        Raises:
            TypeError: it is no module.
            KeyError: there is another attribute of this name.
        """
        self.add_module(name, module)
        self._meta[name] = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of inner and meta-parameters."""
        for place in parameters_of(self).values():
            if place.tensor.is_leaf and place.tensor.grad is not None:
                place.tensor.grad = None if set_to_none else torch.zeros_like(place.tensor.grad)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # What depends on others is converted within the graph, not in place.
        attached = [place for place in parameters_of(self).values() if not place.tensor.is_leaf]
        for place in attached:
            place.put(None)
        try:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            with torch.enable_grad():
                for place in attached:
                    place.put(fn(place.tensor))

    def _keep(self, name: str, tensor: torch.Tensor | None) -> None:
        """Register a tensor of any kind."""
        self.__dict__.pop(name, None)
        super().register_parameter(name, None)
        self._parameters[name] = tensor  # type: ignore[assignment]

    def _meta_items(self) -> list[Any]:
        """The meta-parameters and meta-modules as they are now: `torch.func.functional_call` exchanges them."""
        items = [*self.__dict__.get("_given", {}).values()]
        for path in self._meta:
            above, _, name = path.rpartition(".")
            owner = self.get_submodule(above)
            items += [held[name] for held in (owner._parameters, owner._modules) if held.get(name) is not None]
        return items

    def _meta_ids(self) -> set[int]:
        items = self._meta_items()
        tensors = (p for item in items if isinstance(item, nn.Module) for p in nn.Module.parameters(item))
        return {id(item) for item in items} | {id(place) for place in tensors}

    def _inner_places(self) -> dict[str, Place]:
        metas = self._meta_ids()
        return {name: place for name, place in parameters_of(self).items() if id(place.tensor) not in metas}

    def _adopt(self) -> None:
        """Make what was given known by where it is kept, and keep what is not."""
        for argument, item in self.__dict__.pop("_given").items():
            named = self.named_modules if isinstance(item, nn.Module) else super().named_parameters
            path = next((path for path, there in named(remove_duplicate=False) if there is item), None)
            if path is None:
                path = re.sub(r"\W", "_", argument)
                path += "_" * hasattr(self, path)
                if isinstance(item, nn.Module):
                    self.add_module(path, item)
                else:
                    self._keep(path, item)
                    self._adopted[path] = item
            self._meta[path] = None

    def _refuse_exchanged(self) -> None:
        """Raise if a tensor was exchanged that is read where it came from, inside of an argument."""
        for path, tensor in self._adopted.items():
            if self._parameters.get(path) is not tensor:
                raise ValueError(
                    f"{type(self).__name__}: the meta-parameter {path!r} was exchanged (torch.func.functional_call), "
                    "but the module reads it inside of the argument that it came with: make it an attribute in "
                    "__init__, and read that"
                )
