"""Matching of a solver's arguments with the arguments of the condition for a solution."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter

from implicitdiff._torch.trees import Tree, UserFunction

_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_ANYTHING = inspect.Signature([Parameter("args", Parameter.VAR_POSITIONAL), Parameter("kwargs", Parameter.VAR_KEYWORD)])

Arguments = tuple[tuple[Tree, ...], dict[str, Tree]]
"""Positional arguments and keyword arguments."""
Route = Callable[[tuple[Tree, ...], dict[str, Tree]], Arguments]


@dataclass(frozen=True)
class Call:
    """One call of a solver, and the map from its arguments to the arguments of the condition.

    Attributes:
        init: the solver's first argument.
        args: the other positional arguments; keywords are moved to their positions if the signature allows.
        kwargs: the keyword-only arguments.
        to_condition: maps ``(args, kwargs)`` of the solver to ``(args, kwargs)`` of the condition.
    """

    init: Tree
    args: tuple[Tree, ...]
    kwargs: dict[str, Tree]
    to_condition: Route


def name_of(fn: object) -> str:
    """Return the name of a function for error messages."""
    if isinstance(fn, functools.partial):
        return name_of(fn.func)
    return getattr(fn, "__qualname__", None) or getattr(fn, "__name__", None) or type(fn).__name__


class Matcher:
    """Binds calls of ``solver(init, *args, **kwargs)`` and routes the arguments to ``condition(x, *args, **kwargs)``.

    An argument goes to the condition's parameter of the same name; without such a parameter, to the parameter at the
    same position. A parameter of the solver that was left at its default, and that the condition lacks, is an option of
    the solver, and is not routed.
    """

    def __init__(self, solver: UserFunction, condition: UserFunction) -> None:
        self.names = (
            f"solver {name_of(solver)}{show(solver)} and optimality function {name_of(condition)}{show(condition)}"
        )
        self.solver = _signature(solver) or _ANYTHING
        kinds = [p.kind for p in self.solver.parameters.values()]
        # The number of positional arguments that the solver takes; None: any number.
        self.positions = None if Parameter.VAR_POSITIONAL in kinds else sum(kind in _POSITIONAL for kind in kinds)
        parameters = list((_signature(condition) or _ANYTHING).parameters.values())
        slots = [p for p in parameters if p.kind in _POSITIONAL][1:]
        self.slots = len(slots)
        self.named = {p.name: p for p in (*slots, *(p for p in parameters if p.kind is Parameter.KEYWORD_ONLY))}
        self.takes_more = any(p.kind is Parameter.VAR_POSITIONAL for p in parameters)
        self.takes_keywords = any(p.kind is Parameter.VAR_KEYWORD for p in parameters)
        self.routes: dict[tuple[object, ...], Route] = {}

    def bind(self, args: tuple[Tree, ...], kwargs: dict[str, Tree]) -> Call:
        """Return the bound call; raise TypeError if the arguments do not fit the solver or the condition."""
        try:
            bound = self.solver.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{error}, in a call of the {self.names}") from None
        # Read before `apply_defaults`, which fills in the parameters that the caller left out.
        given = set(bound.arguments)
        bound.apply_defaults()
        positions, keywords = bound.args, bound.kwargs
        if not positions:
            raise TypeError(f"the initial guess must be a positional argument, in a call of the {self.names}")
        # The route depends only on the form of the call, so it is computed once for each form.
        call = (len(positions), *keywords, frozenset(given))
        if call not in self.routes:
            named = [p.name for p in self.solver.parameters.values() if p.kind in _POSITIONAL]
            names = [named[i] if i < len(named) else None for i in range(1, len(positions))]
            options = {name for name in (*names, *keywords) if name in self.solver.parameters and name not in given}
            self.routes[call] = self._route(names, list(keywords), options)
        return Call(positions[0], positions[1:], keywords, self.routes[call])

    def _route(self, names: list[str | None], keywords: list[str], options: set[str | None]) -> Route:
        """Assign to each parameter of the condition a position, or a keyword, of the solver's call.

        Args:
            names: the solver's name for each position, None for positions in ``*args``.
            keywords: the keywords of the call.
            options: parameters of the solver that may remain unassigned.
        """
        keys: dict[str, int | str] = {name: i for i, name in enumerate(names) if name is not None}
        keys |= {name: name for name in keywords}
        # First, find a source for each parameter of the condition.
        source: dict[str, int | str] = {}
        for i, (name, parameter) in enumerate(self.named.items()):
            if name in keys:
                source[name] = keys[name]
            elif i < min(self.slots, len(names)) and self._may_stand_for(names[i], parameter, options):
                source[name] = i
            elif parameter.default is Parameter.empty:
                raise TypeError(
                    f"no argument is given for parameter {name!r} of the optimality function, in a call of the "
                    f"{self.names}"
                )
        # Second, every argument without a destination goes to ``*args`` or ``**kwargs`` of the condition, or raises.
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
        """True if an argument of the solver may go to a parameter of another name at the same position.

        False for optional parameters: two options at the same position are unrelated.
        """
        if name is None:
            return True
        return name not in self.named and name not in options and parameter.default is Parameter.empty

    def _router(self, source: dict[str, int | str], more: list[int]) -> Route:
        """Return the route that takes each parameter from its source, and ``*args`` from the positions `more`."""
        slots = list(self.named)[: self.slots]
        # After a parameter that keeps its default, arguments can be passed by keyword only.
        filled = list(itertools.takewhile(source.__contains__, slots))
        if more and len(filled) < len(slots):
            self._refuse(f"argument {more[0] + 1}")
        # Names that are left in `source` go by keyword.
        positional = [*(source.pop(name) for name in filled), *more]

        def route(args: tuple[Tree, ...], kwargs: dict[str, Tree]) -> Arguments:
            def pick(key: int | str) -> Tree:
                return args[key] if isinstance(key, int) else kwargs[key]

            return tuple(pick(key) for key in positional), {name: pick(key) for name, key in source.items()}

        return route

    def _refuse(self, what: str) -> None:
        raise TypeError(
            f"{what} of the solver has no counterpart in the optimality function: the {self.names} must take the same "
            "arguments after the first; add this parameter to the optimality function, or fix its value in the "
            "solver by functools.partial"
        )


def _signature(fn: UserFunction) -> inspect.Signature | None:
    try:
        return inspect.signature(fn)
    except (TypeError, ValueError):  # some builtins have no signature
        return None


def show(fn: UserFunction) -> str:
    """Return the parameters of a function, for error messages."""
    signature = _signature(fn)
    if signature is None:
        return "(...)"
    # Without the defaults: a default may be a large tensor.
    bare = [p.replace(annotation=Parameter.empty, default=Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare, __validate_parameters__=False))
