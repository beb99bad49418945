"""Locations where Python looks values up: cells of closures, variables, attributes, containers."""

from __future__ import annotations

from collections.abc import Container, Iterable
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
        # Unused constants stay: they have no graph that could grow from call to call.
        is_unused = isinstance(self.value, torch.Tensor) and id(self.value) not in used
        return not (is_unused and may_be_differentiated(self.value))


def contents_of(*cells: CellType) -> list[Any]:
    """Return the values of variables of an enclosing function, `ABSENT` for one without a value."""
    values: list[Any] = []
    for cell in cells:
        try:
            values.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            values.append(ABSENT)
    return values


class ClosureCell(Location):
    """A variable of an enclosing function."""

    __slots__ = ()

    def read(self) -> Any:
        return contents_of(self.owner)[0]

    def write(self, value: Any) -> None:
        if value is not ABSENT:
            self.owner.cell_contents = value
        elif self.read() is not ABSENT:
            del self.owner.cell_contents


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
        for name, v in [*self.value.items()]:
            if isinstance(v, torch.Tensor) and id(v) not in used and may_be_differentiated(v):
                del self.value[name]
        return bool(self.value)


class Attribute(Location):
    """An attribute outside of an instance dictionary: a slot of an object, or an attribute of a class."""

    __slots__ = ()

    def read(self) -> Any:
        if isinstance(self.owner, type):
            return vars(self.owner).get(self.key, ABSENT)
        # Without the owner's own `__getattribute__` and `__getattr__`, which may compute or raise.
        try:
            return object.__getattribute__(self.owner, self.key)
        except AttributeError:
            return ABSENT

    def write(self, value: Any) -> None:
        # Past any `__setattr__` of the class, such as that of a frozen dataclass.
        setter = type.__setattr__ if isinstance(self.owner, type) else object.__setattr__
        if value is not ABSENT:
            setter(self.owner, self.key, value)
        elif self.read() is not ABSENT:
            delattr(self.owner, self.key)


class Contents(Location):
    """The contents of a list, a deque, a set or a dictionary.

    `ABSENT` replaces a tensor that the function does not use: `restore` leaves the current item in its place.
    """

    __slots__ = ()

    def read(self) -> Any:
        return dict(self.owner) if isinstance(self.owner, dict) else list(self.owner)

    def write(self, value: Any) -> None:
        # In place, since other references to the container must see the values.
        self.owner.clear()
        self.owner.extend(value) if hasattr(self.owner, "extend") else self.owner.update(value)

    def is_unchanged(self) -> bool:
        now = self.read()
        if len(now) != len(self.value):
            return False
        if not isinstance(now, dict):
            return all([a is b or a is ABSENT for a, b in zip(self.value, now, strict=True)])
        for (key, v), (key_now, v_now) in zip(self.value.items(), now.items(), strict=True):
            # Compare keys by identity first: `==` of tensors returns a tensor.
            if key is not key_now and not (type(key) in (str, int) and key == key_now):
                return False
            if v is not v_now and v is not ABSENT:
                return False
        return True

    def restore(self) -> None:
        now = self.read()
        if isinstance(now, dict):
            # `ABSENT` marks a forgotten item: the current item stays, if any.
            then = {k: now.get(k, ABSENT) if v is ABSENT else v for k, v in self.value.items()}
            self.write({k: v for k, v in then.items() if v is not ABSENT})
        else:
            # Padded, because the list may be shorter now.
            later = [*now, *[None] * len(self.value)]
            self.write([later[i] if v is ABSENT else v for i, v in enumerate(self.value)])

    def replaced(self) -> list[object]:
        then, now = self.value, self.read()
        if isinstance(now, dict):
            then, now = then.values(), now.values()
        # By id, since items may be tensors.
        there = set(map(id, now))
        return [v for v in then if id(v) not in there]

    def keep_used(self, used: Container[int]) -> bool:
        for key, v in self.value.items() if isinstance(self.value, dict) else enumerate(self.value):
            if isinstance(v, torch.Tensor) and id(v) not in used and may_be_differentiated(v):
                # The keys stay, so the iteration may go on.
                self.value[key] = ABSENT
        return True
