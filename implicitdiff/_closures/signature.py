"""Match the arguments of a solver with those of the condition that its solution satisfies."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_ANYTHING = inspect.Signature([Parameter("args", Parameter.VAR_POSITIONAL), Parameter("kwargs", Parameter.VAR_KEYWORD)])

Route = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


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
    to_condition: Route


def name_of(fn: Any) -> str:
    """What an error message calls a function."""
    if isinstance(fn, functools.partial):
        return name_of(fn.func)
    return getattr(fn, "__qualname__", None) or getattr(fn, "__name__", None) or type(fn).__name__


class Matcher:
    """Binds calls of ``solver(init, *args, **kwargs)`` and routes the arguments to ``condition(x, *args, **kwargs)``.

    An argument goes to the condition's parameter of the same name; where there is none, to the one at the same
    position. A parameter of the solver that was left at its default and that the condition does not know is an option
    of the solver, and stays there.
    """

    def __init__(self, solver: Callable[..., Any], condition: Callable[..., Any]) -> None:
        self.names = (
            f"solver {name_of(solver)}{show(solver)} and optimality function {name_of(condition)}{show(condition)}"
        )
        self.solver = _signature(solver) or _ANYTHING
        kinds = [p.kind for p in self.solver.parameters.values()]
        # How many positional arguments the solver takes; None: any number.
        self.positions = None if Parameter.VAR_POSITIONAL in kinds else sum(kind in _POSITIONAL for kind in kinds)
        parameters = list((_signature(condition) or _ANYTHING).parameters.values())
        slots = [p for p in parameters if p.kind in _POSITIONAL][1:]
        self.slots = len(slots)
        self.named = {p.name: p for p in (*slots, *(p for p in parameters if p.kind is Parameter.KEYWORD_ONLY))}
        self.takes_more = any(p.kind is Parameter.VAR_POSITIONAL for p in parameters)
        self.takes_keywords = any(p.kind is Parameter.VAR_KEYWORD for p in parameters)
        self.routes: dict[tuple[Any, ...], Route] = {}

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        try:
            bound = self.solver.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{error}, in a call of the {self.names}") from None
        given = set(bound.arguments)
        bound.apply_defaults()
        positions, keywords = bound.args, bound.kwargs
        if not positions:
            raise TypeError(f"the initial guess must be a positional argument, in a call of the {self.names}")
        call = (len(positions), *keywords, frozenset(given))
        if call not in self.routes:
            named = [p.name for p in self.solver.parameters.values() if p.kind in _POSITIONAL]
            names = [named[i] if i < len(named) else None for i in range(1, len(positions))]
            options = {name for name in (*names, *keywords) if name in self.solver.parameters and name not in given}
            self.routes[call] = self._route(names, list(keywords), options)
        return Call(positions[0], positions[1:], keywords, self.routes[call])

    def _route(self, names: list[str | None], keywords: list[str], options: set[str | None]) -> Route:
        """Feed every parameter of the condition from a position, or a keyword, of the solver's call.

        `names` are the solver's for the positions, None for those of ``*args``; `options` may go nowhere.
        """
        keys: dict[str, int | str] = {name: i for i, name in enumerate(names) if name is not None}
        keys |= {name: name for name in keywords}
        source: dict[str, int | str] = {}
        for i, (name, parameter) in enumerate(self.named.items()):
            if name in keys:
                source[name] = keys[name]
            elif i < min(self.slots, len(names)) and self._may_stand_for(names[i], parameter, options):
                source[name] = i
            elif parameter.default is Parameter.empty:
                raise TypeError(
                    f"nothing is given for {name!r} of the optimality function, in a call of the {self.names}"
                )
        more: list[int] = []
        for key in (*range(len(names)), *keywords):
            called = names[key] if isinstance(key, int) else key
            if key in source.values() or called in options:
                continue
            if isinstance(key, int) and self.takes_more and key >= self.slots:
                more.append(key)
            elif called is not None and self.takes_keywords:
                source[called] = key
            else:
                self._refuse(f"argument {called or key!r}")
        return self._router(source, more)

    def _may_stand_for(self, name: str | None, parameter: Parameter, options: set[str | None]) -> bool:
        """Whether an argument of the solver may go to a parameter of another name at its position.

        Not an option of one to an option of the other: nothing but chance brings them together.
        """
        if name is None:
            return True
        return name not in self.named and name not in options and parameter.default is Parameter.empty

    def _router(self, source: dict[str, int | str], more: list[int]) -> Route:
        slots = list(self.named)[: self.slots]
        # A parameter that is left at its default ends the positional ones.
        filled = list(itertools.takewhile(source.__contains__, slots))
        if more and len(filled) < len(slots):
            self._refuse(f"argument {more[0] + 1}")
        positional = [*(source.pop(name) for name in filled), *more]

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


def show(fn: Callable[..., Any]) -> str:
    """The parameters of a function, for a message."""
    signature = _signature(fn)
    if signature is None:
        return "(...)"
    # Names alone: a default may be a large tensor.
    bare = [p.replace(annotation=Parameter.empty, default=Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare, __validate_parameters__=False))
