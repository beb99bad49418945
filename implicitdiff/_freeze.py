"""Functions with the variables that they use as these are now.

Python looks a captured variable up when the function runs. A condition runs again when the derivative is taken, often
after the loop that defined it has gone on to the next task's data.
"""

from __future__ import annotations

import builtins
import dis
import functools
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from torch.nn import Module

import implicitdiff._functorch as functorch


def freeze(fn: Any) -> Any:
    """The same function with its own copy of the variables that it captures: of enclosing functions and of its module.

    What the variables hold is not copied. Functions among them, partials and methods are frozen in turn, and of an
    ``nn.Module`` the parameters and buffers that it has now: `torch.func.functional_call` puts them there for the time
    of a call.
    """
    freezer = _Freezer()
    frozen = freezer(fn)
    parts = [part for module in freezer.modules_met for part in module.modules()]
    tensors = [(held, dict(held)) for part in parts for held in (part._parameters, part._buffers)]
    return _AsNow(frozen, tensors) if tensors else frozen


Held = dict[str, Any]


class _AsNow:
    """A function of modules that runs with the tensors which they had."""

    def __init__(self, fn: Any, tensors: list[tuple[Held, Held]]) -> None:
        functools.update_wrapper(self, fn)
        self.fn, self.tensors = fn, tensors

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        changed = [(held, dict(held), then) for held, then in self.tensors if not _are_same(held, then)]
        try:
            for held, _, then in changed:
                held.update(then)
            return self.fn(*args, **kwargs)
        finally:
            for held, now, _ in changed:
                held.update(now)


def _are_same(a: Held, b: Held) -> bool:
    return a.keys() == b.keys() and all(a[key] is b[key] for key in a)


class _Freezer:
    def __init__(self) -> None:
        self.functions: dict[int, FunctionType] = {}
        self.modules: dict[int, dict[str, Any]] = {}
        self.modules_met: list[Module] = []

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Module):
            self.modules_met.append(value)
        if type(value) is functools.partial:
            for argument in (*value.args, *value.keywords.values()):
                self(argument)
            return functools.partial(self(value.func), *value.args, **value.keywords)
        if isinstance(value, MethodType):
            return MethodType(self(value.__func__), self(value.__self__))
        if isinstance(value, FunctionType) and _is_users(value):
            return self.functions.get(id(value)) or self._function(value)
        return value

    def _function(self, fn: FunctionType) -> FunctionType:
        cells = tuple(CellType() for _ in fn.__closure__ or ())
        # What is never looked up is not kept: in a script it holds the graph of the call before, and so on.
        variables = self.modules.setdefault(id(fn.__globals__), {"__builtins__": builtins})
        looked_up = (_names(fn.__code__) | {"__name__"}) & fn.__globals__.keys() - variables.keys()
        variables.update({name: fn.__globals__[name] for name in looked_up})
        frozen = FunctionType(fn.__code__, variables, fn.__name__, fn.__defaults__, cells)
        frozen.__kwdefaults__ = fn.__kwdefaults__
        frozen.__qualname__ = fn.__qualname__
        frozen.__dict__.update(fn.__dict__)
        # Known before its variables are: it may be one of them.
        self.functions[id(fn)] = frozen
        for mine, theirs in zip(cells, fn.__closure__ or (), strict=True):
            try:
                mine.cell_contents = self(theirs.cell_contents)
            except ValueError:  # not assigned yet
                continue
        for name in looked_up:
            if isinstance(fn.__globals__[name], (FunctionType, Module)):
                variables[name] = self(fn.__globals__[name])
        return frozen


def _is_users(fn: FunctionType) -> bool:
    """Whether a function belongs to the user, or is one of torch.func's wrappers round a function that does."""
    package = fn.__globals__.get("__name__", "").partition(".")[0]
    return functorch.is_transform(fn) or package not in ("torch", "implicitdiff")


@functools.lru_cache
def _names(code: CodeType) -> frozenset[str]:
    """The global names that a function and the functions inside of it may look up.

    Of ``co_names``, where attributes are too, only these: a global that happens to be called like one may be a graph.
    """
    own = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(own).union(*map(_names, inner))
