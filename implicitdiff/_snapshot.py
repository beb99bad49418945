"""The variables of a function as they are now, and the function run with them later.

Python looks a variable up when the function runs. A condition runs again when the derivative is taken, often after the
loop that defined it has gone on to the next task. A snapshot notes the places where Python looks values up, with what
they hold: cells of closures, global variables, defaults, attributes, items of lists and dictionaries, the parameters,
buffers and flags of modules. Later the function itself runs, and for that time places that hold something else by then
are put back. Nothing is copied, so identities, registries and relative imports are those of the user's own function.

A snapshot cannot know every place. The operations of a function are compared as well, see `_program`.
"""

from __future__ import annotations

import dis
import functools
import sys
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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

_ABSENT: Any = object()
_ATOMS = (int, float, complex, str, bytes, type(None), torch.Tensor, torch.dtype, torch.device)
_CONTAINERS = (list, dict, set, deque)
# Their own code is trusted not to change: only what users hand them is looked at.
_TRUSTED = {"torch", "implicitdiff", "numpy", "scipy"} | sys.stdlib_module_names - {"__main__"}
# Larger containers, and what lies behind so many places, are left to the comparison of operations.
_LARGE, _MANY = 10_000, 50_000
# Putting back writes to variables that other threads may read.
_LOCK = threading.RLock()


class Snapshot:
    """The places where a function looks values up, with these values.

    Attributes:
        places: these places.
    """

    def __init__(self, fn: Any, args: Sequence[Any] = ()) -> None:
        """Note the places of a function and of its arguments that are no tensors."""
        self.places = _Walk().places_from([fn, *args])

    def replaced(self) -> list[torch.Tensor]:
        """The tensors that other values have taken the places of."""
        written = [place for place in self.places if not place.holds(place.now())]
        return [v for place in written for v in place.values() if isinstance(v, torch.Tensor) and not place.has(v)]

    def keep_used(self, is_used: Callable[[torch.Tensor], bool]) -> bool:
        """After one evaluation, forget the places that it has written itself (counters, caches, logs), and tensors that
        it has not used: in a script, one may hold the graph of the call before, which holds that of the call before.

        Returns whether it has put tensors into such places where there were none.
        """
        written: list[_Place] = []
        unchanged: list[_Place] = []
        for place in self.places:
            (unchanged if place.holds(place.now()) else written).append(place)
        self.places = [place for place in unchanged if place.keep_used(is_used)]
        return any(place.was_filled() for place in written)

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Run the body with every place as it was. Places that are as they were are not written to."""
        if all([place.holds(place.now()) for place in self.places]):
            yield
            return
        with _LOCK:
            changed = [(place, now) for place in self.places if not place.holds(now := place.now())]
            try:
                for place, _ in changed:
                    place.restore()
                yield
            finally:
                for place, now in reversed(changed):
                    place.put(now)


def tensors_within(fn: Any, args: Sequence[Any]) -> tuple[list[torch.Tensor], bool]:
    """The tensors that a function, and arguments that are no tensors, are seen to lead to; and whether these are all:
    nothing was met that may hold others out of sight."""
    walk = _Walk()
    walk.places_from([fn, *args])
    return walk.tensors, not walk.is_blind and len(walk.places) < _MANY


class _Place:
    """Where Python looks a value up.

    Attributes:
        owner: what holds the value.
        key: the value's name there.
        value: the value at the time of the snapshot.
    """

    __slots__ = ("key", "owner", "value")

    def __init__(self, owner: Any, key: Any = None) -> None:
        self.owner, self.key = owner, key
        self.value = self.now()

    def now(self) -> Any:
        raise NotImplementedError

    def put(self, value: Any) -> None:
        raise NotImplementedError

    def holds(self, now: Any) -> bool:
        return now is self.value

    def restore(self) -> None:
        self.put(self.value)

    def values(self) -> list[Any]:
        return [self.value]

    def has(self, value: Any) -> bool:
        return self.now() is value

    def was_filled(self) -> bool:
        """Whether a tensor stands there now, and nothing did at the time of the snapshot."""
        return (self.value is _ABSENT or self.value is None) and isinstance(self.now(), torch.Tensor)

    def keep_used(self, is_used: Callable[[torch.Tensor], bool]) -> bool:
        """Whether the place is worth keeping."""
        return not isinstance(self.value, torch.Tensor) or is_used(self.value)


class _Cell(_Place):
    """A variable of an enclosing function."""

    __slots__ = ()

    def now(self) -> Any:
        try:
            return self.owner.cell_contents
        except ValueError:  # not assigned yet
            return _ABSENT

    def put(self, value: Any) -> None:
        if value is not _ABSENT:
            self.owner.cell_contents = value
        elif self.now() is not _ABSENT:
            del self.owner.cell_contents


class _Item(_Place):
    """A value of a dictionary of variables or attributes."""

    __slots__ = ()

    def now(self) -> Any:
        return self.owner.get(self.key, _ABSENT)

    def put(self, value: Any) -> None:
        if value is _ABSENT:
            self.owner.pop(self.key, None)
        else:
            self.owner[self.key] = value


class _Attribute(_Place):
    """An attribute that lies in no dictionary: a slot of an object, or a class's own value."""

    __slots__ = ()

    def now(self) -> Any:
        if isinstance(self.owner, type):
            return vars(self.owner).get(self.key, _ABSENT)
        try:
            return object.__getattribute__(self.owner, self.key)
        except AttributeError:
            return _ABSENT

    def put(self, value: Any) -> None:
        setter = type.__setattr__ if isinstance(self.owner, type) else object.__setattr__
        if value is not _ABSENT:
            setter(self.owner, self.key, value)
        elif self.now() is not _ABSENT:
            delattr(self.owner, self.key)


class _Contents(_Place):
    """All that a list, a deque, a set or a dictionary holds. A tensor that the function does not use gives way to
    `_ABSENT`: whatever is there later, stays."""

    __slots__ = ()

    def now(self) -> Any:
        return dict(self.owner) if isinstance(self.owner, dict) else list(self.owner)

    def put(self, value: Any) -> None:
        self.owner.clear()
        self.owner.extend(value) if hasattr(self.owner, "extend") else self.owner.update(value)

    def holds(self, now: Any) -> bool:
        if len(now) != len(self.value):
            return False
        if isinstance(now, dict):
            return _are_same_keys(self.value, now) and _are_same(self.value.values(), now.values())
        return _are_same(self.value, now)

    def restore(self) -> None:
        now = self.now()
        if isinstance(now, dict):
            then = {k: now.get(k, _ABSENT) if v is _ABSENT else v for k, v in self.value.items()}
            self.put({k: v for k, v in then.items() if v is not _ABSENT})
        else:
            later = [*now, *[None] * len(self.value)]
            self.put([later[i] if v is _ABSENT else v for i, v in enumerate(self.value)])

    def values(self) -> list[Any]:
        return list(self.value.values() if isinstance(self.value, dict) else self.value)

    def has(self, value: Any) -> bool:
        now = self.now()
        return any(v is value for v in (now.values() if isinstance(now, dict) else now))

    def was_filled(self) -> bool:
        now = self.now()
        return isinstance(now, dict) and any(isinstance(now[k], torch.Tensor) for k in now.keys() - self.value.keys())

    def keep_used(self, is_used: Callable[[torch.Tensor], bool]) -> bool:
        items = self.value.items() if isinstance(self.value, dict) else enumerate(self.value)
        for key, held in list(items):
            if isinstance(held, torch.Tensor) and not is_used(held):
                self.value[key] = _ABSENT
        return True


def _are_same(then: Any, now: Any) -> bool:
    return all([a is b or a is _ABSENT for a, b in zip(then, now, strict=True)])


def _are_same_keys(then: Any, now: Any) -> bool:
    # Not by equality alone: keys may be tensors.
    return all([a is b or (type(a) in (str, int) and a == b) for a, b in zip(then, now, strict=True)])


class _Walk:
    """From a function to all that it may look up, breadth first.

    An attribute is looked up only where some function that is reached names it. So objects wait, and are looked at
    again when a function with new names is found.
    """

    def __init__(self) -> None:
        self.places: list[_Place] = []
        self.tensors: list[torch.Tensor] = []
        self.is_blind = False
        self.todo: deque[Any] = deque()
        # By id; with the objects themselves, so that no other takes an id over.
        self.seen: dict[int, Any] = {}
        self.objects: list[tuple[Any, set[str]]] = []
        self.names: set[str] = {"__call__", "forward"}
        # Names of attributes that some function sets. An object may not have them yet.
        self.stored: set[str] = set()

    def places_from(self, values: Sequence[Any]) -> list[_Place]:
        self.todo.extend(values)
        looked_at = -1
        while self.todo or looked_at < len(self.names) + len(self.stored):
            while self.todo and len(self.places) < _MANY:
                self._visit(self.todo.popleft())
            if len(self.places) >= _MANY:
                break
            looked_at = len(self.names) + len(self.stored)
            for held, known in self.objects[:]:
                self._attributes(held, known)
        return self.places

    def _note(self, place: _Place) -> None:
        self.places.append(place)
        self.todo.extend(place.values())

    def _visit(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self.tensors.append(value)
        self.is_blind = self.is_blind or _hides(value)
        if isinstance(value, _ATOMS) or id(value) in self.seen:
            return
        self.seen[id(value)] = value
        if isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, MethodType):
            self.todo += [value.__func__, value.__self__]
        elif isinstance(value, BuiltinMethodType):
            self.todo.append(value.__self__)
        elif isinstance(value, functools.partial):
            self.todo += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, (tuple, frozenset)):
            self.todo += value
        elif isinstance(value, _CONTAINERS):
            if len(value) <= _LARGE:
                self._note(_Contents(value))
            if isinstance(value, defaultdict):
                self.todo.append(value.default_factory)
        elif isinstance(value, (property, staticmethod, classmethod)):
            self.todo.append(getattr(value, "fget", None) or getattr(value, "__func__", None))
        elif isinstance(value, ModuleType):
            if not _is_trusted(value.__name__):
                self.objects.append((value, set()))
        elif isinstance(value, Module) or not isinstance(value, type):
            self._object(value)
        elif not _is_trusted(value.__module__):
            self.objects.append((value, set()))

    def _function(self, fn: FunctionType) -> None:
        for cell in fn.__closure__ or ():
            self._note(_Cell(cell))
        self.todo += [*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()]
        if fn.__dict__:
            self.objects.append((fn, set()))
        if _is_trusted(fn.__globals__.get("__name__", "")):
            return
        variables, attributes, stored = _names(fn.__code__)
        self.names |= attributes
        self.stored |= stored
        for name in variables & fn.__globals__.keys():
            self._note(_Item(fn.__globals__, name))

    def _object(self, value: Any) -> None:
        known = set()
        if isinstance(value, Module):
            known = set(_OF_MODULES)
            for name in ("_parameters", "_buffers", "_modules"):
                self._note(_Item(vars(value), name))
            for name in vars(value).keys() - known:
                if isinstance(vars(value)[name], _SIMPLE):
                    known.add(name)
                    self._note(_Item(vars(value), name))
        self.todo.append(_own(value).get("__wrapped__"))
        self.objects.append((value, known))

    def _attributes(self, value: Any, known: set[str]) -> None:
        """Note the attributes of an object, a class or a module that are named somewhere, each once."""
        is_class = isinstance(value, type)
        if not is_class:
            own = _own(value)
            # What an object of the library holds, it looks up.
            named = own.keys() if type(value).__module__.startswith("implicitdiff") else own.keys() & self.names
            for name in (named | (self.stored if own else set())) - known:
                known.add(name)
                self._note(_Item(own, name))
        kind: type = value if is_class else type(value)
        for base in _of_users(kind):
            self._of_class(None if is_class else value, base, known)

    def _of_class(self, value: Any, kind: type, known: set[str]) -> None:
        for name in vars(kind).keys() & (self.names | _OPERATORS):
            member, key = vars(kind)[name], f"{kind.__qualname__}.{name}"
            if key in known:
                continue
            known.add(key)
            if isinstance(member, MemberDescriptorType):
                if value is not None:
                    self._note(_Attribute(value, name))
            elif isinstance(member, functools.cached_property):
                self.stored.add(name)
                self.todo.append(member.func)
            elif isinstance(member, _SIMPLE) and not isinstance(member, FunctionType):
                self._note(_Attribute(kind, name))
                if value is not None and name not in known:  # an attribute of the object would hide it
                    known.add(name)
                    self._note(_Item(_own(value), name))
            else:
                self.todo.append(member)


_SIMPLE = (*_ATOMS, *_CONTAINERS, FunctionType, tuple)
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


def _hides(value: Any) -> bool:
    """Whether an object may lead to tensors that are not seen."""
    if isinstance(value, _CONTAINERS):
        return len(value) > _LARGE
    if isinstance(value, np.ndarray):
        return bool(value.dtype.hasobject)
    if isinstance(value, (Iterator, Mapping)):
        return _is_trusted(type(value).__module__)
    return isinstance(value, _OPAQUE)


def _own(value: Any) -> dict[str, Any]:
    """The attributes of an object's own, without that it notices."""
    try:
        own: dict[str, Any] = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return own


@functools.lru_cache(maxsize=1024)
def _of_users(kind: type) -> tuple[type, ...]:
    """A class and its bases as far as their code may change."""
    return tuple(base for base in kind.__mro__ if not _is_trusted(base.__module__))


def _is_trusted(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _TRUSTED


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
