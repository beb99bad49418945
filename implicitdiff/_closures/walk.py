"""Search for all locations where a function may look a value up.

The code of an installed package is assumed not to change. So the search skips the global variables of its functions,
unless the user's function belongs to the same package. The search includes attributes of its modules, classes and
objects if the user's code, or a method of the object itself, mentions their names.
"""

from __future__ import annotations

import dis
import functools
import threading
import weakref
from collections import deque
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
import numpy.typing as npt
import torch
from torch.nn import Module

from implicitdiff._closures.packages import home_packages, is_installed, is_trusted, own_attributes, top_package
from implicitdiff._closures.variables import (
    Absent,
    Attribute,
    ClassAttribute,
    Contents,
    Items,
    Location,
    Variables,
    contents_of,
)

_ATOMIC_TYPES = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Absent)


_SEQUENCES = (list, set, deque)


# Limits on the items of one container and on all recorded values. Beyond them, only the comparison of operations
# (`program`) can show a change.
_MAX_ITEMS = 10_000


_MAX_VALUES = 50_000


def tensors_within(fn: object, args: Sequence[object], *, by_name: bool = True) -> tuple[list[torch.Tensor], bool]:
    """Return the tensors that can be reached from a function and from arguments other than tensors.

    The second result is True if the list is complete: no object was reached that may hide other tensors.

    Args:
        fn: the function.
        args: the arguments.
        by_name: follow the attributes of an object whose names occur in reached code alone. Code of installed packages
            is not read, and a name may be computed; False: follow all.
    """
    walk = Walk(fn, args, by_name=by_name)
    return walk.tensors, not walk.may_miss_tensors and walk.count < _MAX_VALUES


class _ClassInfo:
    """Facts about a class of the user or of an installed package.

    Attributes:
        bases: the class and its base classes, without classes of trusted packages.
        names: attributes that methods of the class from installed packages look up. Only methods whose names occur in
            reached code count.
        stored: attributes that these methods set.
        members: the members that were visited.
        slots: attributes of its instances that are stored outside of the instance dictionary.
        hidden: class attributes that an instance attribute of the same name would hide.
    """

    __slots__ = ("bases", "hidden", "members", "names", "slots", "stored")

    def __init__(self, bases: tuple[type, ...]) -> None:
        self.bases = bases
        self.names: set[str] = set()
        self.stored: set[str] = set()
        self.members: set[tuple[type, str]] = set()
        self.slots: set[str] = set()
        self.hidden: set[str] = set()


# Of a function or a module.
_NO_CLASS = _ClassInfo(())


class Walk:
    """Breadth-first search from a function to all values that the function may look up.

    An attribute is recorded only if a reached function mentions its name. So reached objects stay in a list, and are
    examined again whenever a function with new names is reached.

    Attributes:
        locations: the locations of the values.
        count: the number of recorded values.
        by_name: whether the attributes are followed by name.
        tensors: the reached tensors.
        may_miss_tensors: whether an object was reached that may hide other tensors.
    """

    def __init__(self, fn: object, args: Sequence[object], *, by_name: bool = True) -> None:
        self.fn = fn
        self.by_name = by_name
        self.locations: list[Location] = []
        self.count = 0
        self.tensors: list[torch.Tensor] = []
        self.may_miss_tensors = False
        # Breadth first: a limit cuts off the values that are farthest from the function.
        self.todo: deque[object] = deque([fn, *args])
        # By id. The objects are kept alive, so that Python does not reuse an id.
        self.seen: dict[int, object] = {}
        self.variables: dict[int, Variables] = {}
        self.attributes: set[tuple[int, str]] = set()
        # Objects with their dictionaries, examined again whenever a name is new.
        self.objects: list[tuple[object, dict[str, Any], _ClassInfo]] = []
        self.classes: dict[type, _ClassInfo] = {}
        # A name opens an attribute of every reached object, in whatever object the code meant.
        self.names: set[str] = {*_OPERATORS, "forward"}
        # Names of attributes that a reached function sets. An object may not have such an attribute yet.
        self.stored: set[str] = set()
        self._run()

    def _run(self) -> None:
        # Names and objects depend on each other: repeat until neither grows.
        found, looked_at = (self.names, self.stored, self.objects, self.classes), -1
        while self.todo or looked_at < sum(map(len, found)):
            self._visit_all()
            # The lists are incomplete from here on, and `tensors_within` says so.
            if self.count >= _MAX_VALUES:
                return
            looked_at = sum(map(len, found))
            # Members first: a method may mention new names of attributes.
            for info in [*self.classes.values()]:
                self._members(info)
            for waiting in self.objects:
                if self.count < _MAX_VALUES:
                    self._attributes(*waiting)

    def _visit_all(self) -> None:
        """Visit the waiting values, and all values reachable from them."""
        while self.todo and self.count < _MAX_VALUES:
            value = self.todo.popleft()
            of: type = type(value)
            visit = _visitor_of(of)
            if visit is Walk._object:
                of = _claimed_class(value)
                visit = _visitor_of(of)
            if visit is not _ignore and id(value) not in self.seen:
                self.seen[id(value)] = value
                visit(self, value)

    @functools.cached_property
    def homes(self) -> frozenset[str]:
        return home_packages([self.fn])

    def _is_followed(self, module: object) -> bool:
        """True if the code of a module may change: a module of the user, or of the package of the user's function."""
        return not is_trusted(module) and (not is_installed(module) or top_package(module) in self.homes)

    # --- locations --------------------------------------------------------------------------------------------------

    def _note(self, location: Location) -> None:
        self.locations.append(location)
        self.count += 1
        self.todo.append(location.value)

    def _note_variables(self, owner: dict[str, Any], names: Iterable[str]) -> None:
        if (location := self.variables.get(id(owner))) is None:
            self.variables[id(owner)] = location = Variables(owner)
            self.locations.append(location)
        fresh = location.add(names)
        self.count += len(fresh)
        self.todo += fresh

    def _note_attribute(self, attribute: type[Attribute], owner: object, name: str) -> None:
        if (id(owner), name) not in self.attributes:
            self.attributes.add((id(owner), name))
            self._note(attribute(owner, name))

    # --- values -----------------------------------------------------------------------------------------------------

    def _function(self, fn: FunctionType) -> None:
        module, cells = fn.__globals__.get("__name__"), fn.__closure__ or ()
        is_library = f"{module}.".startswith("implicitdiff.")
        # Variables of this library do not change, so their values are followed but not recorded.
        if is_library:
            self.todo += contents_of(cells)
        else:
            for cell in cells:
                self._note(Attribute(cell, "cell_contents"))
        self.todo += fn.__defaults__ or ()
        self.todo += (fn.__kwdefaults__ or {}).values()
        if fn.__dict__:
            self.objects.append((fn, fn.__dict__, _NO_CLASS))
        if not is_library and self._is_followed(module):
            variables, attributes, stored = _names_used(fn.__code__)
            self.names |= attributes
            self.stored |= stored
            # Builtins are not among the globals, and do not change.
            if found := variables & fn.__globals__.keys():
                self._note_variables(fn.__globals__, found)

    def _method(self, value: MethodType) -> None:
        self.todo += (value.__func__, value.__self__)

    def _builtin(self, value: BuiltinMethodType) -> None:
        self.todo.append(value.__self__)

    def _partial(self, value: functools.partial[Any]) -> None:
        self.todo += (value.func, *value.args, *value.keywords.values())

    def _fixed(self, value: tuple[object, ...] | frozenset[object]) -> None:
        self.todo += value

    def _tensor(self, value: torch.Tensor) -> None:
        self.tensors.append(value)

    def _sequence(self, value: Any, contents: type[Contents] = Contents) -> None:
        if len(value) > _MAX_ITEMS:
            self.may_miss_tensors = True
        else:
            location = contents(value)
            self.locations.append(location)
            self.count += 1 + len(location.value)
            self.todo += location.values(location.value)

    def _dictionary(self, value: dict[Any, Any]) -> None:
        self._sequence(value, Items)
        # That of a `defaultdict`.
        self.todo.append(getattr(value, "default_factory", None))

    def _descriptor(self, value: property | staticmethod[..., Any] | classmethod[Any, ..., Any]) -> None:
        self.todo.append(_function_of(value))

    def _array(self, value: npt.NDArray[Any]) -> None:
        # An array of dtype object may hold tensors.
        self.may_miss_tensors = self.may_miss_tensors or value.dtype.hasobject
        self._object(value)

    def _module(self, value: ModuleType) -> None:
        if not is_trusted(value.__name__):
            self.objects.append((value, vars(value), _NO_CLASS))

    def _class(self, value: type) -> None:
        self._class_info(value)

    def _object(self, value: object) -> None:
        of: type = type(value)
        self.may_miss_tensors = self.may_miss_tensors or _may_hide_tensors(of)
        attributes, info = own_attributes(value), self._class_info(of)
        if issubclass(of, Module):
            # Code of torch reads the registries of a module, and flags such as `training`, so no user code mentions the
            # names.
            simple = [name for name in attributes.keys() - _OF_MODULES if isinstance(attributes[name], _SIMPLE)]
            self._note_variables(attributes, ("_parameters", "_buffers", "_modules", *simple))
        self.todo.append(attributes.get("__wrapped__"))
        if attributes or info.bases:
            self.objects.append((value, attributes, info))

    # --- attributes -------------------------------------------------------------------------------------------------

    def _class_info(self, cls: type) -> _ClassInfo:
        if cls not in self.classes:
            self.classes[cls] = _ClassInfo(_changeable_bases(cls))
        return self.classes[cls]

    def _attributes(self, value: object, attributes: dict[str, Any], info: _ClassInfo) -> None:
        """Record the attributes of an object or a module whose names occur in reached code."""
        # Objects of this library use all of their attributes.
        is_library = type(value).__module__.startswith("implicitdiff")
        is_whole = is_library or not (self.by_name or issubclass(type(value), (ModuleType, Module)))
        wanted = set(attributes) if is_whole else attributes.keys() & self.names
        if attributes:
            # Attributes that the function may create: recorded as absent, and deleted again for a later evaluation.
            wanted |= self.stored
        wanted |= attributes.keys() & info.names
        wanted |= info.stored
        wanted |= info.hidden
        for name in info.slots:
            self._note_attribute(Attribute, value, name)
        if issubclass(type(value), Module):
            # Recorded in `_object`; the other attributes of every module belong to torch.
            wanted -= _OF_MODULES
        if wanted:
            self._note_variables(attributes, wanted)

    def _members(self, info: _ClassInfo) -> None:
        """Visit the members of a class whose names occur in reached code, each once."""
        for base in info.bases:
            held = vars(base)
            for name in held.keys() & self.names | held.keys() & info.names:
                if (base, name) not in info.members:
                    info.members.add((base, name))
                    self._member(info, base, name, held[name])

    def _member(self, info: _ClassInfo, base: type, name: str, member: object) -> None:
        """Record, or follow, one member of a class."""
        if isinstance(member, MemberDescriptorType):
            info.slots.add(name)
        elif isinstance(member, _VALUES):
            # A value of the class. Later code may set an instance attribute of the same name, which then counts.
            self._note_attribute(ClassAttribute, base, name)
            info.hidden.add(name)
        else:
            if isinstance(member, functools.cached_property):
                # The first use stores the value in the instance dictionary, under the same name.
                info.stored.add(name)
                member = member.func
            self._code(info, _function_of(member))
            self.todo.append(member)

    def _code(self, info: _ClassInfo, fn: object) -> None:
        """Record the attribute names in a method of an installed package, for instances of its class only."""
        if not isinstance(fn, FunctionType):
            return
        # Behind a decorator the wrapped function reads the attributes.
        self._code(info, fn.__dict__.get("__wrapped__"))
        module = fn.__globals__.get("__name__")
        if not is_trusted(module) and not self._is_followed(module):
            before = len(info.names)
            _, attributes, stored = _names_used(fn.__code__)
            info.names |= attributes
            info.stored |= stored
            if len(info.names) > before:
                self._members(info)


def _function_of(value: object) -> object:
    """Return the function of a property, staticmethod or classmethod; other values unchanged."""
    if isinstance(value, property):
        return value.fget
    return value.__func__ if isinstance(value, (staticmethod, classmethod)) else value


def _ignore(walk: Walk, value: object) -> None:
    """Do nothing: the value contains no other values."""


_VALUES = (*_ATOMIC_TYPES, torch.Tensor, *_SEQUENCES, dict, tuple)
_SIMPLE = (*_VALUES, FunctionType)


# The attributes that `nn.Module.__init__` sets. Of these, `training` alone is followed by name.
_OF_MODULES = frozenset(vars(Module())) - {"training"}


# Methods that Python calls by an operator or a statement, so that no code mentions their names.
_OPERATORS = {
    f"__{name}__"
    for name in (
        *("call", "getitem", "setitem", "iter", "next", "len", "contains", "enter", "exit", "getattr", "getattribute"),
        *("bool", "float", "int", "index", "torch_function", "matmul", "rmatmul", "add", "radd", "sub", "rsub"),
        *("mul", "rmul", "truediv", "rtruediv", "pow", "rpow", "neg", "abs"),
    )
}


# Objects that hold or make other objects, unseen by the search.
_OPAQUE: tuple[type, ...] = (GeneratorType, CoroutineType, ContextVar, threading.local, weakref.ReferenceType)


_OPAQUE += (type(functools.lru_cache(int)),)


@functools.lru_cache(maxsize=1024)
def _may_hide_tensors(cls: type) -> bool:
    """True if instances of a class may hide tensors from the search."""
    if issubclass(cls, (Iterator, Mapping)):
        # A user's iterator or mapping keeps its items in attributes; one of the standard library keeps the items in C.
        return is_trusted(cls.__module__)
    return issubclass(cls, _OPAQUE)


# The visitor of a value other than a tensor, by class: the first match applies.
_VISITORS: tuple[tuple[type | tuple[type, ...], Callable[[Walk, Any], None]], ...] = (
    (_ATOMIC_TYPES, _ignore),
    (torch.Tensor, Walk._tensor),
    (FunctionType, Walk._function),
    (MethodType, Walk._method),
    (BuiltinMethodType, Walk._builtin),
    (functools.partial, Walk._partial),
    ((tuple, frozenset), Walk._fixed),
    (_SEQUENCES, Walk._sequence),
    (dict, Walk._dictionary),
    ((property, staticmethod, classmethod), Walk._descriptor),
    (ModuleType, Walk._module),
    (np.ndarray, Walk._array),
    (type, Walk._class),
)


def _claimed_class(value: object) -> type:
    """Return the class of the value that a proxy stands for; of other values, and of a proxy without a value, their
    own."""
    try:
        claimed = value.__class__
    except Exception:  # of a `weakref.proxy` of a dead object, or of the user's own property
        return type(value)
    return claimed if isinstance(claimed, type) else type(value)


@functools.lru_cache(maxsize=1024)
def _visitor_of(cls: type) -> Callable[[Walk, Any], None]:
    return next((visit for kinds, visit in _VISITORS if issubclass(cls, kinds)), Walk._object)


@functools.lru_cache(maxsize=1024)
def _changeable_bases(cls: type) -> tuple[type, ...]:
    """Return a class and its base classes, without classes of trusted packages."""
    return tuple(base for base in cls.__mro__ if not is_trusted(base.__module__))


# The instructions that look a global variable up, that look an attribute up, and that set an attribute. Python 3.12 has
# no `LOAD_METHOD` any more, and has `LOAD_SUPER_ATTR`.
_LOOKUPS = (
    {"LOAD_GLOBAL", "LOAD_NAME"},
    {"LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM"},
    {"STORE_ATTR"},
)


@functools.lru_cache(maxsize=4096)
def _names_used(code: CodeType) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """Return the names of the global variables and of the attributes that a function may look up, and of the attributes
    that the function may set; functions nested inside included.

    ``co_names`` lists all names without their use. The instructions separate the uses: a global variable that merely
    shares its name with an attribute may hold a large graph. Strings count as attributes, as arguments of `getattr`.
    """
    instructions = [*dis.get_instructions(code)]
    variables, attributes, stored = ({i.argval for i in instructions if i.opname in names} for names in _LOOKUPS)
    attributes |= {c for c in code.co_consts if isinstance(c, str) and c.isidentifier()}
    inner = [_names_used(c) for c in code.co_consts if isinstance(c, CodeType)]
    union = [
        frozenset(own).union(*others) for own, *others in zip((variables, attributes, stored), *inner, strict=True)
    ]
    return union[0], union[1], union[2]
