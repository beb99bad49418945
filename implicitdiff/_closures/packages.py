"""Whose code is trusted not to change between a call and its derivative."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any

# With the standard library. What these packages keep in their own variables is not looked at.
_TRUSTED = {"torch", "implicitdiff", "numpy", "scipy"} | sys.stdlib_module_names - {"__main__"}
_SITES = {"site-packages", "dist-packages"}


def top(module: Any) -> str:
    """The package of a module, by the module's name."""
    return module.partition(".")[0] if isinstance(module, str) else ""


def is_trusted(module: Any) -> bool:
    """Whether a module belongs to torch, NumPy, SciPy, the standard library or to this library."""
    return isinstance(module, str) and _has_trusted_top(module)


@functools.lru_cache(maxsize=4096)
def _has_trusted_top(module: str) -> bool:
    return top(module) in _TRUSTED


def is_installed(module: Any) -> bool:
    """Whether an installer has put a module's file where it is.

    A package that is installed in editable mode stays where its author writes it.
    """
    if not isinstance(module, str) or module == "__main__":  # a user's program, whoever starts it
        return False
    loaded = sys.modules.get(module)
    file = own(loaded).get("__file__")
    return isinstance(file, str) and _was_installed(file, module)


@functools.lru_cache(maxsize=4096)
def _was_installed(file: str, module: str) -> bool:
    path = Path(file)
    if not _SITES.isdisjoint(path.parts):
        return True
    depth = module.count(".") + (path.stem == "__init__")
    if depth >= len(path.parents):
        return False
    folder = path.parents[depth]
    return path.parts[len(folder.parts)] in _recorded(folder)


@functools.lru_cache(maxsize=256)
def _recorded(folder: Path) -> frozenset[str]:
    """What the installer's records in a folder name there: these are in any folder that packages are installed to."""
    found: set[str] = set()
    for record in folder.glob("*.dist-info/RECORD"):
        with contextlib.suppress(OSError), record.open(encoding="utf-8", errors="replace") as lines:
            found.update(line.partition(",")[0].partition("/")[0] for line in lines)
    return frozenset(found)


def homes(values: Any) -> frozenset[str]:
    """The packages of the functions that a user has given, also inside of wrappers of torch and of this library."""
    found, seen, todo = set(), set(), [*values]
    while todo:
        value = todo.pop()
        if id(value) in seen or isinstance(value, type):
            continue
        seen.add(id(value))
        if isinstance(value, FunctionType):
            if is_trusted(value.__globals__.get("__name__")):
                todo += _wrapped(value)
            else:
                found.add(top(value.__module__))
        elif isinstance(value, functools.partial):
            todo.append(value.func)
        elif isinstance(value, MethodType):
            todo += [value.__func__, value.__self__] if is_trusted(value.__func__.__module__) else [value.__func__]
        elif isinstance(value, (tuple, list)):
            todo += value
        elif type(value).__module__.startswith("implicitdiff"):
            todo += own(value).values()
        elif callable(value) and not is_trusted(type(value).__module__) and not isinstance(value, BuiltinMethodType):
            found.add(top(type(value).__module__))
    return frozenset(found)


def _wrapped(fn: FunctionType) -> Iterator[Any]:
    """What a function holds that may be another function."""
    for cell in fn.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield from fn.__defaults__ or ()
    yield fn.__dict__.get("__wrapped__")


def own(value: Any) -> dict[str, Any]:
    """The attributes of an object's own, without that it notices."""
    try:
        found: dict[str, Any] = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return found
