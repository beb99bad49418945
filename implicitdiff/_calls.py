"""The call of a factory, remembered by its result for `repr`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch

FactoryT = TypeVar("FactoryT", bound=Callable[..., Any])
_WIDTH = 60  # characters of an argument


class FactoryCall(NamedTuple):
    """The call of a factory; its `repr` is one line."""

    factory: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __repr__(self) -> str:
        given = [*map(shown, self.args), *(f"{name}={shown(value)}" for name, value in self.kwargs.items())]
        return f"{self.factory}({', '.join(given)})"


class Remembers:
    """Base of an object made by a factory; its `repr` is the call that made it."""

    call: ClassVar[FactoryCall | None] = None

    def remember(self, call: FactoryCall) -> None:
        """Set the call; of two factories, one around the other, the outer is shown."""
        object.__setattr__(self, "call", call)  # dataclasses that inherit are frozen

    def __repr__(self) -> str:
        return object.__repr__(self) if self.call is None else repr(self.call)


def shows_call(factory: FactoryT) -> FactoryT:
    """Decorate a factory whose results have the method ``remember(call)``."""

    @functools.wraps(factory)
    def made(*args: Any, **kwargs: Any) -> Any:
        result = factory(*args, **kwargs)
        # A factory may call another decorated factory; the outer call comes last, and replaces the inner call.
        result.remember(FactoryCall(factory.__name__, args, kwargs))
        return result

    return made  # type: ignore[return-value]


@functools.singledispatch
def shown(value: Any) -> str:
    """Return an argument as text of one line: functions by name, large tensors by shape."""
    name = getattr(value, "__name__", None) or type(value).__name__
    return _in_one_line(name if callable(value) else repr(value))


@shown.register
def _shown_call(value: Remembers) -> str:
    return _in_one_line(repr(value))


@shown.register
def _shown_partial(value: functools.partial) -> str:  # type: ignore[type-arg]
    # A schedule is a partial as well, and shows the call of its factory.
    return repr(FactoryCall("partial", (value.func, *value.args), value.keywords))


@shown.register
def _shown_module(value: torch.nn.Module) -> str:
    return f"{type(value).__name__}(...)"


@shown.register
def _shown_tensor(value: torch.Tensor) -> str:
    text = f"Tensor(shape={tuple(value.shape)}, dtype={value.dtype})" if value.numel() > 8 else repr(value)
    return _in_one_line(text)


@shown.register
def _shown_tuple(value: tuple) -> str:  # type: ignore[type-arg]
    text = f"({', '.join(map(shown, value))}{',' * (len(value) == 1)})"
    return _in_one_line(text if type(value) is tuple else repr(value))


def _in_one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."
