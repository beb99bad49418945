"""Places where Python looks a value up: cells of closures, variables, attributes, containers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Absent:
    """Stands where nothing is."""


ABSENT: Any = Absent()


class Place:
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

    def holds(self) -> bool:
        """Whether the place is as it was."""
        return self.now() is self.value

    def restore(self) -> None:
        self.put(self.value)

    def lost(self) -> list[Any]:
        """The values that are no longer there, where the place is not as it was."""
        return [self.value]

    def keep_unwritten(self) -> bool:
        """Forget what is no longer there; whether anything is left."""
        return False

    def keep_used(self, is_used: Callable[[torch.Tensor], bool]) -> bool:
        """Forget tensors that are not used; whether anything is left."""
        return not isinstance(self.value, torch.Tensor) or is_used(self.value)


class Cell(Place):
    """A variable of an enclosing function."""

    __slots__ = ()

    def now(self) -> Any:
        try:
            return self.owner.cell_contents
        except ValueError:  # not assigned yet
            return ABSENT

    def put(self, value: Any) -> None:
        if value is not ABSENT:
            self.owner.cell_contents = value
        elif self.now() is not ABSENT:
            del self.owner.cell_contents


class Variables(Place):
    """Some values of a dictionary of variables or attributes, by name. There may be many thousands of such places, so
    all of one dictionary are one."""

    __slots__ = ()

    def __init__(self, owner: dict[str, Any]) -> None:
        self.owner, self.key, self.value = owner, None, {}

    def add(self, names: Iterable[str]) -> list[Any]:
        """Note the values of these names; returns those of new ones."""
        get, known = self.owner.get, self.value
        fresh = {name: get(name, ABSENT) for name in names if name not in known}
        known.update(fresh)
        return list(fresh.values())

    def now(self) -> Any:
        return {name: now for name, v in self.value.items() if (now := self.owner.get(name, ABSENT)) is not v}

    def put(self, value: Any) -> None:
        for name, v in value.items():
            if v is ABSENT:
                self.owner.pop(name, None)
            else:
                self.owner[name] = v

    def holds(self) -> bool:
        get = self.owner.get
        for name, v in self.value.items():  # noqa: SIM110 - the time of a call
            if get(name, ABSENT) is not v:
                return False
        return True

    def restore(self) -> None:
        self.put({name: self.value[name] for name in self.now()})

    def lost(self) -> list[Any]:
        return [self.value[name] for name in self.now()]

    def keep_unwritten(self) -> bool:
        for name in self.now():
            del self.value[name]
        return bool(self.value)

    def keep_used(self, is_used: Callable[[torch.Tensor], bool]) -> bool:
        for name in [name for name, v in self.value.items() if isinstance(v, torch.Tensor) and not is_used(v)]:
            del self.value[name]
        return bool(self.value)


class Attribute(Place):
    """An attribute that lies in no dictionary: a slot of an object, or a class's own value."""

    __slots__ = ()

    def now(self) -> Any:
        if isinstance(self.owner, type):
            return vars(self.owner).get(self.key, ABSENT)
        try:
            return object.__getattribute__(self.owner, self.key)
        except AttributeError:
            return ABSENT

    def put(self, value: Any) -> None:
        setter = type.__setattr__ if isinstance(self.owner, type) else object.__setattr__
        if value is not ABSENT:
            setter(self.owner, self.key, value)
        elif self.now() is not ABSENT:
            delattr(self.owner, self.key)


class Contents(Place):
    """All that a list, a deque, a set or a dictionary holds. A tensor that the function does not use gives way to
    `ABSENT`: whatever is there later, stays."""

    __slots__ = ()

    def now(self) -> Any:
        return dict(self.owner) if isinstance(self.owner, dict) else list(self.owner)

    def put(self, value: Any) -> None:
        self.owner.clear()
        self.owner.extend(value) if hasattr(self.owner, "extend") else self.owner.update(value)

    def holds(self) -> bool:
        now = self.now()
        if len(now) != len(self.value):
            return False
        if not isinstance(now, dict):
            return all([a is b or a is ABSENT for a, b in zip(self.value, now, strict=True)])
        for (key, v), (key_now, v_now) in zip(self.value.items(), now.items(), strict=True):
            # Keys not by equality alone: they may be tensors.
            if key is not key_now and not (type(key) in (str, int) and key == key_now):
                return False
            if v is not v_now and v is not ABSENT:
                return False
        return True

    def restore(self) -> None:
        now = self.now()
        if isinstance(now, dict):
            then = {k: now.get(k, ABSENT) if v is ABSENT else v for k, v in self.value.items()}
            self.put({k: v for k, v in then.items() if v is not ABSENT})
        else:
            later = [*now, *[None] * len(self.value)]
            self.put([later[i] if v is ABSENT else v for i, v in enumerate(self.value)])

    def lost(self) -> list[Any]:
        then, now = self.value, self.now()
        if isinstance(now, dict):
            then, now = then.values(), now.values()
        there = set(map(id, now))
        return [v for v in then if id(v) not in there]

    def keep_used(self, is_used: Callable[[torch.Tensor], bool]) -> bool:
        items = self.value.items() if isinstance(self.value, dict) else enumerate(self.value)
        for key in [key for key, v in items if isinstance(v, torch.Tensor) and not is_used(v)]:
            self.value[key] = ABSENT
        return True
