"""Matching of a solver's arguments with the arguments of the condition for a solution."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Set
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

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
    return getattr(fn, "__qualname__", getattr(fn, "__name__", type(fn).__name__))


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
        self.solver = _signature(solver)
        kinds = [p.kind for p in self.solver.parameters.values()]
        # The parameters of the solver that take a positional argument, and how many such arguments it takes.
        self.called = [p.name for p in self.solver.parameters.values() if p.kind in _POSITIONAL]
        self.positions = math.inf if Parameter.VAR_POSITIONAL in kinds else len(self.called)
        parameters = list(_signature(condition).parameters.values())
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
            names = [*self.called, *[None] * (len(positions) - len(self.called))][1:]
            self.routes[call] = self._route(names, list(keywords), self.solver.parameters.keys() - given)
        return Call(positions[0], positions[1:], keywords, self.routes[call])

    def _route(self, names: list[str | None], keywords: list[str], options: Set[str]) -> Route:
        """Assign to each parameter of the condition a position, or a keyword, of the solver's call.

        Args:
            names: the solver's name for each position, None for positions in ``*args``.
            keywords: the keywords of the call.
            options: parameters of the solver that may remain unassigned.
        """
        called: dict[int | str, str | None] = {**dict(enumerate(names)), **dict(zip(keywords, keywords, strict=True))}
        # First, find a source for each parameter of the condition.
        places = zip(self.named, range(self.slots), names, strict=False)
        sources: dict[str | None, int | str] = {
            name: i for name, i, other in places if self._may_stand_for(other, self.named[name], options)
        }
        sources |= {name: key for key, name in called.items()}
        source = {name: sources[name] for name in self.named if name in sources}
        required = [name for name, parameter in self.named.items() if parameter.default is Parameter.empty]
        if lacking := [name for name in required if name not in source]:
            raise TypeError(
                f"no argument is given for parameter {lacking[0]!r} of the optimality function, in a call of the "
                f"{self.names}"
            )
        # Second, every argument without a destination goes to ``*args`` or ``**kwargs`` of the condition, or raises.
        left = {key: name for key, name in called.items() if key not in source.values() and name not in options}
        more = [i for i in range(self.slots, len(names)) if i in left] if self.takes_more else []
        rest = {key: name for key, name in left.items() if key not in more}
        if unfit := [name or key for key, name in rest.items() if not (self.takes_keywords and name)]:
            self._refuse(f"argument {unfit[0]!r}")
        source |= {str(name): key for key, name in rest.items()}
        return self._router(source, more)

    def _may_stand_for(self, name: str | None, parameter: Parameter, options: Set[str]) -> bool:
        """True if an argument of the solver may go to a parameter of another name at the same position.

        False for optional parameters: two options at the same position are unrelated.
        """
        return name is None or (name not in self.named.keys() | options and parameter.default is Parameter.empty)

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
            given: dict[Any, Tree] = {**dict(enumerate(args)), **kwargs}
            return tuple([given[key] for key in positional]), {name: given[key] for name, key in source.items()}

        return route

    def _refuse(self, what: str) -> None:
        raise TypeError(
            f"{what} of the solver has no counterpart in the optimality function: the {self.names} must take the same "
            "arguments after the first; add this parameter to the optimality function, or fix its value in the "
            "solver by functools.partial"
        )


def _signature(fn: UserFunction) -> inspect.Signature:
    try:
        return inspect.signature(fn)
    except (TypeError, ValueError):  # some builtins have no signature
        return _ANYTHING


def show(fn: UserFunction) -> str:
    """Return the parameters of a function, for error messages."""
    signature = _signature(fn)
    if signature is _ANYTHING:
        return "(...)"
    # Without the defaults: a default may be a large tensor.
    bare = [p.replace(annotation=Parameter.empty, default=Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare, __validate_parameters__=False))
