"""The functions of a solver as users call them: by public names, with arguments by keyword, and fit to be pickled."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from inspect import Parameter, Signature
from typing import Any, NamedTuple

import implicitdiff._torch.compile as _compile
from implicitdiff._closures.signature import name_of, show
from implicitdiff._torch.trees import Tree
from implicitdiff.solvers._loop.state import State


class SolverFunction:
    """One of the four functions of a solver, ``function(params, *args, **kwargs)``; `update` takes the state second.

    An argument by keyword goes to the parameter of that name of the user's first function, unless the keyword is an
    option of `run`.

    Attributes:
        maker: the `SolverImpl`, with a method for each of the four functions.
        field: the field of `Solver` that this function fills.
    """

    def __init__(self, maker: Any, field: str) -> None:
        self.maker, self.field = maker, field
        self.__name__, self.__qualname__, self.__module__ = field, f"{maker.factory}.{field}", "implicitdiff.solvers"
        self.__doc__ = getattr(maker, field).__doc__

    def __get__(self, instance: object, owner: type | None = None) -> SolverFunction:
        # An attribute with this method is a routine to `help`, which then shows the signature and the docstring.
        return self

    @_compile.outside_compile
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        maker, own = self.maker, self._own
        # Options of `run` come first, and hide parameters of the user's function of the same names.
        options = {name: kwargs.pop(name) for name in own.options if name in kwargs} if kwargs else {}
        for name in own.first[len(args) :]:
            if name not in kwargs:
                raise TypeError(f"{self.__qualname__}: {name} is missing, in a call of {self._shown}")
            args = (*args, kwargs.pop(name))
        (params, *state), args = args[: len(own.first)], args[len(own.first) :]
        if state:
            self._check_state(params, *state)
        if kwargs or maker.guess is not None or (options and self._hidden(options)):
            args, kwargs = self._bound(args, kwargs)
        if maker.guess is not None:
            params = maker.guess(params, *args, **kwargs)
        if kwargs:
            # The values of keywords become the last positional arguments: the implementation handles tuples alone.
            args, maker = (*args, *kwargs.values()), maker.with_last_by_keyword(tuple(kwargs))
        try:
            return getattr(maker, self.field)(params, *state, args, **options)
        except TypeError:
            # A signature takes long to read, so only a failed call is explained.
            if not kwargs:
                self._bound(args, {})  # raises an error of its own if the arguments are not those of the function
            raise

    def _bound(self, args: tuple[Tree, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of the user's function: by position as far as the signature allows, then by keyword."""
        fn = self.maker.functions[0]
        try:
            signature = inspect.signature(fn)
        except (TypeError, ValueError):  # some builtins have none
            if not kwargs:
                return args, kwargs
            raise TypeError(
                f"{self.__qualname__}: {name_of(fn)} has no signature, so {', '.join(kwargs)} cannot be given by "
                "keyword; give its arguments by position"
            ) from None
        try:
            bound = signature.bind(None, *args, **kwargs)
        except TypeError as error:
            called = self._shown if self.maker.is_named else f"{name_of(fn)}{show(fn)}"
            unknown = [name for name in kwargs if name not in signature.parameters]
            takes_any = any(p.kind is Parameter.VAR_KEYWORD for p in signature.parameters.values())
            cause = f"got an unexpected keyword argument {unknown[0]!r}" if unknown and not takes_any else str(error)
            raise TypeError(f"{self.__qualname__}: {cause}, in a call of {called}{self._advice(kwargs)}") from None
        return bound.args[1:], bound.kwargs

    def _advice(self, kwargs: dict[str, Any]) -> str:
        options = self._own.options
        if not kwargs and self.field in ("init", "run") and not self._hidden(options):
            return f"; the first argument of {self.field} is the initial guess"
        if hidden := self._hidden(options):
            return (
                f"; {hidden[0]}= is an option of {self.field}: give this argument by position, or rename the parameter"
            )
        return f"; the options of {self.field} are {', '.join(options)}" if options else ""

    def _hidden(self, options: Iterable[str]) -> list[str]:
        """Return the options whose names are parameters of the user's function as well."""
        try:
            return [name for name in inspect.signature(self.maker.functions[0]).parameters if name in options]
        except (TypeError, ValueError):  # some builtins have none
            return []

    def _check_state(self, params: Tree, state: Any) -> None:
        factory, kind = self.maker.factory, self.maker.method.memory
        if not (isinstance(state, State) and isinstance(state.memory, kind)):
            got = type(state).__name__
            if isinstance(state, State):
                got = f"one with a memory of type {type(state.memory).__name__}"
            raise TypeError(
                f"{self.__qualname__}: state must be a State with a memory of type {kind.__name__}, as {factory}.init "
                f"and {factory}.run return it, got {got}"
            )
        if params is None:
            raise TypeError(f"{self.__qualname__}: params must be the unknowns that belong to the state, got None")

    @property
    def _own(self) -> _Parameters:
        shown = self.maker.functions[0] if self.maker.is_named else None
        return _parameters(getattr(type(self.maker), self.field), shown)

    @property
    def _shown(self) -> str:
        return f"{self.__qualname__}{self._own.shown}"

    @property
    def __signature__(self) -> Signature:
        return self._own.signature

    def __repr__(self) -> str:
        return f"{self.maker!r}.{self.field}"

    def __reduce__(self) -> tuple[Any, ...]:
        return SolverFunction, (self.maker, self.field)


class _Parameters(NamedTuple):
    """The parameters of a solver's function.

    Attributes:
        first: names of the parameters before the arguments of the user's function.
        options: names of the options.
        signature: all parameters, the user's among them.
        shown: the signature as text.
    """

    first: tuple[str, ...]
    options: tuple[str, ...]
    signature: Signature
    shown: str


@functools.cache
def _parameters(method: Callable[..., Any], fn: Callable[..., Any] | None) -> _Parameters:
    """Return the parameters for a method ``method(self, *first, args, **options)`` of a `SolverImpl`.

    The parameters of `fn` after its first stand in the place of `args`; if `fn` is None, any arguments.
    """
    _, *first, _ = [p for p in _bare(method) if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
    options = [p for p in _bare(method) if p.kind is Parameter.KEYWORD_ONLY]
    args, kwargs = [Parameter("args", Parameter.VAR_POSITIONAL)], [Parameter("kwargs", Parameter.VAR_KEYWORD)]
    if fn is not None:
        args, kwargs = _bare(fn)[1:], []
    signature = Signature([*first, *args, *options, *kwargs])
    return _Parameters(tuple(p.name for p in first), tuple(p.name for p in options), signature, str(signature))


def _bare(method: Callable[..., Any]) -> list[Parameter]:
    return [p.replace(annotation=Parameter.empty) for p in inspect.signature(method).parameters.values()]


class LastByKeyword:
    """``fn(x, *args, **kwargs)`` as a function of positional arguments; the last arguments are the keywords' values."""

    def __init__(self, fn: Callable[..., Any], names: tuple[str, ...]) -> None:
        self.fn, self.names = fn, names
        self.__qualname__ = name_of(fn)

    def __call__(self, x: Any, *args: Any) -> Any:
        first = len(args) - len(self.names)
        return self.fn(x, *args[:first], **dict(zip(self.names, args[first:], strict=True)))
