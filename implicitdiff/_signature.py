"""Match the arguments of a solver with those of the condition that its solution satisfies."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class Call:
    """One call of a solver, and the same arguments as the condition wants them.

    Attributes:
        init: the solver's first argument.
        args: its other positional arguments, resolved from keywords where the signature allows.
        kwargs: its keyword-only arguments.
        to_condition: picks the condition's ``(args, kwargs)`` out of ``(args, kwargs)``.
    """

    init: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    to_condition: Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


def name_of(fn: Any) -> str:
    """What an error message calls a function."""
    return getattr(fn, "__qualname__", None) or getattr(fn, "__name__", None) or repr(fn)


class Matcher:
    """Binds calls of ``solver(init, *args, **kwargs)`` and routes the arguments to ``condition(x, *args, **kwargs)``.

    An argument goes to the condition's parameter of the same name; where there is none, to the one at the same
    position. A parameter of the solver that was left at its default and that the condition does not know is an option
    of the solver, and stays there.
    """

    def __init__(self, solver: Callable[..., Any], condition: Callable[..., Any]) -> None:
        self.names = (
            f"solver {name_of(solver)}{_show(solver)} and optimality function {name_of(condition)}{_show(condition)}"
        )
        self.solver = _signature(solver) or inspect.Signature(
            [Parameter("args", Parameter.VAR_POSITIONAL), Parameter("kwargs", Parameter.VAR_KEYWORD)]
        )
        self.condition = _signature(condition)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        try:
            bound = self.solver.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{error}, in a call of the {self.names}") from None
        given = set(bound.arguments)
        bound.apply_defaults()
        if not bound.args:
            raise TypeError(
                f"the initial guess is missing, or is no positional argument, in a call of the {self.names}"
            )
        names = self._positional_names(len(bound.args))
        route = self._route(names[1:], list(bound.kwargs), given)
        return Call(bound.args[0], bound.args[1:], bound.kwargs, route)

    def _positional_names(self, count: int) -> list[str | None]:
        named: list[str | None] = [p.name for p in self.solver.parameters.values() if p.kind in _POSITIONAL]
        return named[:count] + [None] * (count - len(named))

    def _route(self, names: list[str | None], keywords: list[str], given: set[str]) -> Any:
        if self.condition is None:
            return lambda args, kwargs: (args, kwargs)
        parameters = list(self.condition.parameters.values())
        slots = [p.name for p in parameters if p.kind in _POSITIONAL][1:]
        by_keyword = {
            p.name for p in parameters if p.kind not in (*_POSITIONAL, Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
        }
        takes_rest = any(p.kind is Parameter.VAR_POSITIONAL for p in parameters)
        takes_keywords = any(p.kind is Parameter.VAR_KEYWORD for p in parameters)

        # Each of the condition's parameters is fed from a position or a keyword of the solver's call.
        source: dict[str, int | str] = {}
        rest: list[int] = []
        for i, name in enumerate(names):
            if name is not None and (name in slots or name in by_keyword):
                source[name] = i
        for i, name in enumerate(names):
            if name in source:
                continue
            if i < len(slots) and slots[i] not in source and slots[i] not in names and slots[i] not in keywords:
                source[slots[i]] = i
            elif takes_rest and i >= len(slots):
                rest.append(i)
            elif takes_keywords and name is not None:
                source.update({name: i} if name in given else {})
            elif name is None or name in given:
                self._refuse(f"argument {name or i + 1!r}")
        for name in keywords:
            if name in slots or name in by_keyword or takes_keywords:
                source[name] = name
            elif name in given or name not in self.solver.parameters:
                self._refuse(f"keyword argument {name!r}")
        required = [
            p.name for p in parameters[1:] if p.default is Parameter.empty and (p.name in slots or p.name in by_keyword)
        ]
        if missing := [name for name in required if name not in source]:
            raise TypeError(f"nothing is given for {missing} of the optimality function, in a call of the {self.names}")
        positional: list[int | str] = []
        for slot in slots:
            if slot not in source:
                break
            positional.append(source.pop(slot))
        if rest and len(positional) < len(slots):
            self._refuse(f"argument {rest[0] + 1}")
        positional += rest

        def route(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            def pick(key: int | str) -> Any:
                return args[key] if isinstance(key, int) else kwargs[key]

            return tuple(pick(key) for key in positional), {name: pick(key) for name, key in source.items()}

        return route

    def _refuse(self, what: str) -> None:
        raise TypeError(
            f"{what} of the solver has no counterpart in the optimality function: the {self.names} must take the same "
            "arguments after the first; give the optimality function this parameter, or bind it to the solver with "
            "functools.partial"
        )


def _signature(fn: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(fn)
    except (TypeError, ValueError):  # some builtins have none
        return None


def _show(fn: Callable[..., Any]) -> str:
    return str(_signature(fn) or "(...)")
