"""The walk from a function to every place where it may look a value up.

The code of an installed package is trusted not to change: the global variables of its functions are not noted, unless
the function itself belongs to that package. Attributes of its modules, classes and objects are, as far as the user's
code, or the methods of the object itself, name them.
"""

from __future__ import annotations

import dis
import functools
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import (
    BuiltinMethodType,
    CodeType,
    CoroutineType,
    FunctionType,
    GeneratorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

import numpy as np
import torch
from torch.nn import Module

from implicitdiff._closures.packages import homes, is_installed, is_trusted, own, top
from implicitdiff._closures.variables import Absent, Attribute, Cell, Contents, Place, Variables

_ATOMS = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Absent)


_CONTAINERS = (list, dict, set, deque)


# Larger containers, and what lies behind so many places, are left to the comparison of operations.
_LARGE = 10_000


_MANY = 50_000


def tensors_within(fn: Any, args: Sequence[Any]) -> tuple[list[torch.Tensor], bool]:
    """The tensors that a function, and arguments that are no tensors, are seen to lead to; and whether these are all:
    nothing was met that may hold others out of sight."""
    walk = Walk(fn, args)
    return walk.tensors, not walk.is_blind and walk.count < _MANY


class _Kind:
    """A class of a user or of an installed package, and what is known of it.

    Attributes:
        bases: it and those of its bases whose members may be others later.
        names: attributes that its methods of installed packages look up. Only methods that are named somewhere count.
        stored: attributes that these methods set.
        members: which members are known.
        slots: attributes of its objects that lie in no dictionary.
        hidden: values of its own that attributes of an object would hide.
    """

    __slots__ = ("bases", "hidden", "members", "names", "slots", "stored")

    def __init__(self, bases: tuple[type, ...]) -> None:
        self.bases = bases
        self.names: set[str] = set()
        self.stored: set[str] = set()
        self.members: set[tuple[type, str]] = set()
        self.slots: set[str] = set()
        self.hidden: set[str] = set()


class Walk:
    """From a function to all that it may look up, breadth first.

    An attribute is looked up only where some function that is reached names it. So objects wait, and are looked at
    again when a function with new names is found.

    Attributes:
        places: where values are looked up.
        count: how many values these hold.
        tensors: the tensors that were met.
        is_blind: whether something was met that may lead to other tensors out of sight.
    """

    def __init__(self, fn: Any, args: Sequence[Any]) -> None:
        self.fn = fn
        self.places: list[Place] = []
        self.count = 0
        self.tensors: list[torch.Tensor] = []
        self.is_blind = False
        self.todo: deque[Any] = deque([fn, *args])
        # By id; with the objects themselves, so that no other takes an id over.
        self.seen: dict[int, Any] = {}
        self.variables: dict[int, Variables] = {}
        self.attributes: set[tuple[int, str]] = set()
        self.objects: list[tuple[Any, dict[str, Any], _Kind | None]] = []
        self.kinds: dict[type, _Kind] = {}
        self.names: set[str] = {*_OPERATORS, "forward"}
        # Names of attributes that some function sets. An object may not have them yet.
        self.stored: set[str] = set()
        self._run()

    def _run(self) -> None:
        looked_at = -1
        while self.todo or looked_at < self._extent():
            while self.todo and self.count < _MANY:
                value = self.todo.popleft()
                of: type = type(value)
                if (way := _way(of)) is not _pass_by and id(value) not in self.seen:
                    self._visit(value, way)
            if self.count >= _MANY:
                return
            looked_at = self._extent()
            for kind in [*self.kinds.values()]:
                self._members(kind)
            for waiting in self.objects:
                if self.count < _MANY:
                    self._attributes(*waiting)

    def _extent(self) -> int:
        """Grows with what is known."""
        return len(self.names) + len(self.stored) + len(self.objects) + len(self.kinds)

    @functools.cached_property
    def homes(self) -> frozenset[str]:
        return homes([self.fn])

    def _is_followed(self, module: Any) -> bool:
        """Whether the code of a module may change: that of a user, or of the package that the function belongs to."""
        return not is_trusted(module) and (not is_installed(module) or top(module) in self.homes)

    # --- places -----------------------------------------------------------------------------------------------------

    def _note(self, place: Place) -> None:
        self.places.append(place)
        self.count += 1
        self.todo.append(place.value)

    def _note_variables(self, owner: dict[str, Any], names: Iterable[str]) -> None:
        if (place := self.variables.get(id(owner))) is None:
            self.variables[id(owner)] = place = Variables(owner)
            self.places.append(place)
        fresh = place.add(names)
        self.count += len(fresh)
        self.todo += fresh

    def _note_attribute(self, owner: Any, name: str) -> None:
        if (id(owner), name) not in self.attributes:
            self.attributes.add((id(owner), name))
            self._note(Attribute(owner, name))

    # --- values -----------------------------------------------------------------------------------------------------

    def _visit(self, value: Any, way: Callable[[Walk, Any], None]) -> None:
        if way is Walk._object and isinstance(value, _LOOKED_INTO):  # a proxy says that it is of another class
            way = _way(value.__class__)
        if way is not _keep:
            self.seen[id(value)] = value
        way(self, value)

    def _function(self, fn: FunctionType) -> None:
        module = fn.__globals__.get("__name__")
        is_library = top(module) == "implicitdiff"
        for cell in fn.__closure__ or ():
            place = Cell(cell)
            # The library's own variables do not change.
            if is_library:
                self.todo.append(place.value)
            else:
                self._note(place)
        self.todo += fn.__defaults__ or ()
        self.todo += (fn.__kwdefaults__ or {}).values()
        if fn.__dict__:
            self.objects.append((fn, fn.__dict__, None))
        if self._is_followed(module):
            variables, attributes, stored = _names(fn.__code__)
            self.names |= attributes
            self.stored |= stored
            if found := variables & fn.__globals__.keys():
                self._note_variables(fn.__globals__, found)

    def _method(self, value: MethodType) -> None:
        self.todo += (value.__func__, value.__self__)

    def _builtin(self, value: BuiltinMethodType) -> None:
        self.todo.append(value.__self__)

    def _partial(self, value: functools.partial[Any]) -> None:
        self.todo += (value.func, *value.args, *value.keywords.values())

    def _fixed(self, value: tuple[Any, ...] | frozenset[Any]) -> None:
        self.todo += value

    def _container(self, value: Any) -> None:
        if len(value) > _LARGE:
            self.is_blind = True
        else:
            place = Contents(value)
            self.places.append(place)
            self.count += 1 + len(place.value)
            self.todo += place.value.values() if isinstance(place.value, dict) else place.value
        if isinstance(value, defaultdict):
            self.todo.append(value.default_factory)

    def _descriptor(self, value: Any) -> None:
        self.todo.append(_function_of(value))

    def _array(self, value: Any) -> None:
        self.is_blind = self.is_blind or value.dtype.hasobject
        self._object(value)

    def _module(self, value: ModuleType) -> None:
        if not is_trusted(value.__name__):
            self.objects.append((value, vars(value), None))

    def _class(self, value: type) -> None:
        if not is_trusted(value.__module__):
            self._kind(value)

    def _object(self, value: Any) -> None:
        of: type = type(value)
        self.is_blind = self.is_blind or _hides(of)
        own_ones, kind = own(value), self._kind(of)
        if isinstance(value, Module):
            simple = [name for name in own_ones.keys() - _OF_MODULES if isinstance(own_ones[name], _SIMPLE)]
            self._note_variables(own_ones, ("_parameters", "_buffers", "_modules", *simple))
        if "__wrapped__" in own_ones:
            self.todo.append(own_ones["__wrapped__"])
        if own_ones or kind is not None:
            self.objects.append((value, own_ones, kind))

    # --- attributes -------------------------------------------------------------------------------------------------

    def _kind(self, kind: type) -> _Kind | None:
        found = self.kinds.get(kind)
        if found is None and (bases := _of_users(kind)):
            self.kinds[kind] = found = _Kind(bases)
        return found

    def _attributes(self, value: Any, own_ones: dict[str, Any], kind: _Kind | None) -> None:
        """Note the attributes of an object or of a module that are named somewhere."""
        # What an object of the library holds, it looks up.
        is_library = type(value).__module__.startswith("implicitdiff")
        wanted = set(own_ones) if is_library else own_ones.keys() & self.names
        if own_ones:
            wanted |= self.stored
        if kind is not None:
            wanted |= own_ones.keys() & kind.names
            wanted |= kind.stored
            wanted |= kind.hidden
            for name in kind.slots:
                self._note_attribute(value, name)
        if isinstance(value, Module):
            wanted -= _OF_MODULES
        if wanted:
            self._note_variables(own_ones, wanted)

    def _members(self, kind: _Kind) -> None:
        """Look at the members of a class that are named somewhere, each once."""
        for base in kind.bases:
            held = vars(base)
            for name in held.keys() & self.names | held.keys() & kind.names:
                if (base, name) not in kind.members:
                    kind.members.add((base, name))
                    self._member(kind, base, name, held[name])

    def _member(self, kind: _Kind, base: type, name: str, member: Any) -> None:
        if isinstance(member, MemberDescriptorType):
            kind.slots.add(name)
        elif isinstance(member, _SIMPLE) and not isinstance(member, FunctionType):
            self._note_attribute(base, name)
            kind.hidden.add(name)
        else:
            if isinstance(member, functools.cached_property):
                kind.stored.add(name)
                member = member.func
            self._code(kind, _function_of(member))
            self.todo.append(member)

    def _code(self, kind: _Kind, fn: Any) -> None:
        """Note what a method of an installed package names: attributes of its own object, others are not looked at."""
        if not isinstance(fn, FunctionType):
            return
        self._code(kind, fn.__dict__.get("__wrapped__"))
        module = fn.__globals__.get("__name__")
        if not is_trusted(module) and not self._is_followed(module):
            before = len(kind.names)
            _, attributes, stored = _names(fn.__code__)
            kind.names |= attributes
            kind.stored |= stored
            if len(kind.names) > before:
                self._members(kind)


def _function_of(value: Any) -> Any:
    """The function of a descriptor of a class; other values are their own."""
    if isinstance(value, property):
        return value.fget
    return value.__func__ if isinstance(value, (staticmethod, classmethod)) else value


def _pass_by(walk: Walk, value: Any) -> None:
    """Leads nowhere."""


def _keep(walk: Walk, value: torch.Tensor) -> None:
    walk.tensors.append(value)


_SIMPLE = (*_ATOMS, torch.Tensor, *_CONTAINERS, FunctionType, tuple)


_OF_MODULES = frozenset(vars(Module())) - {"training"}


# Methods that Python calls without that their name is written.
_OPERATORS = {
    f"__{name}__"
    for name in (
        *("call", "getitem", "setitem", "iter", "next", "len", "contains", "enter", "exit", "getattr", "getattribute"),
        *("bool", "float", "int", "index", "torch_function", "matmul", "rmatmul", "add", "radd", "sub", "rsub"),
        *("mul", "rmul", "truediv", "rtruediv", "pow", "rpow", "neg", "abs"),
    )
}


# Objects that hold or make other objects, which the walk cannot see.
_OPAQUE: tuple[type, ...] = (GeneratorType, CoroutineType, ContextVar, threading.local, weakref.ReferenceType)


_OPAQUE += (type(functools.lru_cache(int)),)


@functools.lru_cache(maxsize=1024)
def _hides(kind: type) -> bool:
    """Whether an object of a class may lead to tensors that are not seen."""
    if issubclass(kind, (Iterator, Mapping)):
        return is_trusted(kind.__module__)
    return issubclass(kind, _OPAQUE)


# How values are looked into, by their class; the first that fits counts.
_WAYS: tuple[tuple[Any, Callable[[Walk, Any], None]], ...] = (
    (torch.Tensor, _keep),
    (_ATOMS, _pass_by),
    (FunctionType, Walk._function),
    (MethodType, Walk._method),
    (BuiltinMethodType, Walk._builtin),
    (functools.partial, Walk._partial),
    ((tuple, frozenset), Walk._fixed),
    (_CONTAINERS, Walk._container),
    ((property, staticmethod, classmethod), Walk._descriptor),
    (ModuleType, Walk._module),
    (np.ndarray, Walk._array),
    (type, Walk._class),
)


_LOOKED_INTO = tuple(kind for kinds, _ in _WAYS for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))


@functools.lru_cache(maxsize=1024)
def _way(kind: type) -> Callable[[Walk, Any], None]:
    return next((way for kinds, way in _WAYS if issubclass(kind, kinds)), Walk._object)


@functools.lru_cache(maxsize=1024)
def _of_users(kind: type) -> tuple[type, ...]:
    """A class and its bases as far as their code may change."""
    return tuple(base for base in kind.__mro__ if not is_trusted(base.__module__))


@functools.lru_cache(maxsize=4096)
def _names(code: CodeType) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """The global variables, and the attributes, that a function and the functions inside of it may look up, and the
    attributes that they may set.

    Of ``co_names``, where all are, each only as what it is: a global variable that happens to be called like an
    attribute may hold a graph. Names in strings may be given to `getattr`.
    """
    variables: set[str] = set()
    stored: set[str] = set()
    attributes = {c for c in code.co_consts if isinstance(c, str) and c.isidentifier()}
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            variables.add(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM"):
            attributes.add(instruction.argval)
        elif instruction.opname == "STORE_ATTR":
            stored.add(instruction.argval)
    inner = [_names(c) for c in code.co_consts if isinstance(c, CodeType)]
    union = [
        frozenset(own).union(*others) for own, *others in zip((variables, attributes, stored), *inner, strict=True)
    ]
    return union[0], union[1], union[2]
