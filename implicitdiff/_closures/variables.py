"""Locations where Python looks values up: cells of closures, variables, attributes, containers."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from itertools import filterfalse, repeat
from types import CellType
from typing import Any, Final

import torch

from implicitdiff._torch.tracking import may_be_differentiated


class Absent:
    """Type of the mark for a location without a value."""


# A mark of its own, since None is a value.
ABSENT: Final = Absent()


class Location:
    """A location where Python looks a value up.

    Attributes:
        owner: the object that holds the value.
        key: the name of the value in `owner`.
        value: the value at the time of the snapshot.
    """

    __slots__ = ("key", "owner", "value")

    def __init__(self, owner: Any, key: Any = None) -> None:
        self.owner, self.key = owner, key
        self.value = self.read()

    def read(self) -> Any:
        """Return the current value, or `ABSENT`."""
        raise NotImplementedError

    def write(self, value: Any) -> None:
        """Store a value that `read` returned, or delete the value for `ABSENT`."""
        raise NotImplementedError

    def is_unchanged(self) -> bool:
        """True if the location holds the recorded value."""
        # By identity: `==` of tensors or arrays gives no single truth value.
        return self.read() is self.value

    def restore(self) -> None:
        """Store the recorded value again."""
        self.write(self.value)

    def replaced(self) -> list[object]:
        """Return the recorded values that a changed location no longer holds."""
        return [self.value]

    def keep_unwritten(self) -> bool:
        """Forget the values that a changed location no longer holds. Return True if any value is left."""
        return False

    def keep_used(self, used: Container[int]) -> bool:
        """Forget the tensors that are not `used`, by id, and may have a graph. Return True if any value is left."""
        return not _unused([(self.key, self.value)], used)


def _unused(values: Iterable[tuple[Any, Any]], used: Container[int]) -> list[Any]:
    """Return the keys of the tensors that are not `used`, by id, and may have a graph."""
    # Unused constants stay: they have no graph that could grow from call to call. By type, which asks no proxy.
    tensors = [(key, v) for key, v in values if issubclass(type(v), torch.Tensor) and id(v) not in used]
    return [key for key, v in tensors if may_be_differentiated(v)]


class Variables(Location):
    """Some values of a dictionary of variables or attributes, by name.

    One object for all names of a dictionary: a function may look up many thousands.
    """

    __slots__ = ()

    def __init__(self, owner: dict[str, Any]) -> None:
        self.owner, self.key, self.value = owner, None, {}

    def add(self, names: Iterable[str]) -> list[object]:
        """Record the values of these names, and return the values of new names."""
        fresh = [*filterfalse(self.value.__contains__, names)]
        values = [*map(self.owner.get, fresh, repeat(ABSENT))]
        self.value.update(zip(fresh, values, strict=True))
        return values

    def read(self) -> Any:
        # The changed names alone: `write` of this result undoes `restore`.
        return {name: now for name, v in self.value.items() if (now := self.owner.get(name, ABSENT)) is not v}

    def write(self, value: Any) -> None:
        for name, v in value.items():
            if v is ABSENT:
                self.owner.pop(name, None)
            else:
                self.owner[name] = v

    def is_unchanged(self) -> bool:
        get = self.owner.get
        for name, v in self.value.items():  # noqa: SIM110 - the time of a call
            if get(name, ABSENT) is not v:
                return False
        return True

    def restore(self) -> None:
        self.write({name: self.value[name] for name in self.read()})

    def replaced(self) -> list[object]:
        return [self.value[name] for name in self.read()]

    def keep_unwritten(self) -> bool:
        for name in self.read():
            del self.value[name]
        return bool(self.value)

    def keep_used(self, used: Container[int]) -> bool:
        for name in _unused(self.value.items(), used):
            del self.value[name]
        return bool(self.value)


def contents_of(cells: Iterable[CellType]) -> list[Any]:
    """Return the values of variables of an enclosing function, without those that have no value yet."""
    values: list[Any] = []
    for cell in cells:
        try:
            values.append(cell.cell_contents)
        except ValueError:
            continue
    return values


class Attribute(Location):
    """An attribute outside of an instance dictionary: a slot of an object, or the contents of a closure's cell."""

    __slots__ = ()

    # Past any `__setattr__` of the class, such as that of a frozen dataclass.
    _set: Callable[[Any, str, Any], None] = staticmethod(object.__setattr__)

    def read(self) -> Any:
        # Without the owner's own `__getattribute__` and `__getattr__`, which may compute or raise.
        try:
            return object.__getattribute__(self.owner, self.key)
        except (AttributeError, ValueError):  # ValueError: a cell of a variable that has no value yet
            return ABSENT

    def write(self, value: Any) -> None:
        if value is not ABSENT:
            self._set(self.owner, self.key, value)
        elif self.read() is not ABSENT:
            delattr(self.owner, self.key)


class ClassAttribute(Attribute):
    """An attribute of a class."""

    __slots__ = ()

    _set = staticmethod(type.__setattr__)

    def read(self) -> Any:
        return vars(self.owner).get(self.key, ABSENT)


class Contents(Location):
    """The contents of a list, a deque or a set.

    `ABSENT` replaces a tensor that the function does not use: `restore` leaves the current item in its place.
    """

    __slots__ = ()

    values: Callable[[Any], Iterable[Any]] = staticmethod(iter)
    items: Callable[[Any], Iterable[tuple[Any, Any]]] = staticmethod(enumerate)

    def read(self) -> Any:
        return list(self.owner)

    def write(self, value: Any) -> None:
        # In place, since other references to the container must see the values.
        self.owner.clear()
        self.owner.extend(value) if hasattr(self.owner, "extend") else self.owner.update(value)

    def is_unchanged(self) -> bool:
        now, then = self.read(), self.value
        return len(now) == len(then) and all([v is w or v is ABSENT for v, w in zip(then, now, strict=True)])

    def restore(self) -> None:
        # Padded, because the list may be shorter now.
        later = [*self.read(), *[None] * len(self.value)]
        self.write([later[i] if v is ABSENT else v for i, v in enumerate(self.value)])

    def replaced(self) -> list[object]:
        # By id, since items may be tensors.
        there = set(map(id, self.values(self.read())))
        return [v for v in self.values(self.value) if id(v) not in there]

    def keep_used(self, used: Container[int]) -> bool:
        for key in _unused(self.items(self.value), used):
            self.value[key] = ABSENT
        return True


class Items(Contents):
    """The contents of a dictionary."""

    __slots__ = ()

    values = staticmethod(dict.values)
    items = staticmethod(dict.items)

    def read(self) -> Any:
        return dict(self.owner)

    def is_unchanged(self) -> bool:
        now, then = self.read(), self.value
        # Compare keys by identity first: `==` of tensors returns a tensor.
        return len(now) == len(then) and all(
            [
                (key is k or (type(key) in (str, int) and key == k)) and (v is w or v is ABSENT)
                for (key, v), (k, w) in zip(then.items(), now.items(), strict=True)
            ]
        )

    def restore(self) -> None:
        # `ABSENT` marks a forgotten item: the current item stays, if any.
        now = self.read()
        kept = {key: now.get(key, ABSENT) for key, v in self.value.items() if v is ABSENT}
        self.write({key: v for key, v in {**self.value, **kept}.items() if v is not ABSENT})
