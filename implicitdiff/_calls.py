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


def shown(value: Any) -> str:
    """Return an argument as text of one line: functions by name, large tensors by shape."""
    # A schedule is a partial as well, and shows the call of its factory.
    if isinstance(value, functools.partial) and not isinstance(value, Remembers):
        return repr(FactoryCall("partial", (value.func, *value.args), value.keywords))
    if isinstance(value, torch.nn.Module):
        return f"{type(value).__name__}(...)"
    if isinstance(value, torch.Tensor):
        text = f"Tensor(shape={tuple(value.shape)}, dtype={value.dtype})" if value.numel() > 8 else repr(value)
    elif type(value) is tuple:
        text = f"({', '.join(map(shown, value))}{',' * (len(value) == 1)})"
    elif isinstance(value, Remembers) or not callable(value):
        text = repr(value)
    else:
        text = getattr(value, "__name__", None) or type(value).__name__
    text = " ".join(text.split())
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."
