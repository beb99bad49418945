"""Packages whose code is assumed not to change between a call and its derivative."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterable
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

from implicitdiff._closures.variables import contents_of

# A walk does not enter modules and classes of these packages and of the standard library.
_TRUSTED = {"torch", "implicitdiff", "numpy", "scipy"} | sys.stdlib_module_names - {"__main__"}
_SITES = {"site-packages", "dist-packages"}


def top_package(module: object) -> str:
    """Return the top-level package of a module, given the module's name."""
    return str(module).partition(".")[0]


def is_trusted(module: object) -> bool:
    """True if a module belongs to torch, NumPy, SciPy, the standard library or this library."""
    return _has_trusted_top(str(module))


@functools.lru_cache(maxsize=4096)
def _has_trusted_top(module: str) -> bool:
    return top_package(module) in _TRUSTED


def is_installed(module: object) -> bool:
    """True if an installer wrote the file of a module. Packages installed in editable mode are not of this sort."""
    name = str(module)
    file = own_attributes(sys.modules.get(name)).get("__file__")
    # "__main__" is the user's program, in any folder.
    return isinstance(file, str) and name != "__main__" and _was_installed(file, name)


@functools.lru_cache(maxsize=4096)
def _was_installed(file: str, module: str) -> bool:
    """True if a file is in a folder of installed packages, or in the records of an installer."""
    path = Path(file)
    if not _SITES.isdisjoint(path.parts):
        return True
    # Elsewhere, such as `pip install --target`: go up from the file to the folder of the top-level package.
    depth = module.count(".") + (path.stem == "__init__")
    if depth >= len(path.parents):
        return False
    folder = path.parents[depth]
    return path.parts[len(folder.parts)] in _recorded(folder)


@functools.lru_cache(maxsize=256)
def _recorded(folder: Path) -> frozenset[str]:
    """Return the names in a folder that installers recorded (``*.dist-info/RECORD``) in the same folder."""
    found: set[str] = set()
    for record in folder.glob("*.dist-info/RECORD"):
        with contextlib.suppress(OSError), record.open(encoding="utf-8", errors="replace") as lines:
            found.update(line.partition(",")[0].partition("/")[0] for line in lines)
    return frozenset(found)


def home_packages(values: Iterable[object]) -> frozenset[str]:
    """Return the top-level packages of a user's functions, including functions inside wrappers of torch and of this
    library."""
    found: set[str] = set()
    seen: set[int] = set()
    # All values live in functions and objects that stay alive during the search, so no id is used twice.
    todo = [*values]
    while todo:
        value = todo.pop()
        if id(value) in seen or isinstance(value, type):
            continue
        seen.add(id(value))
        if isinstance(value, FunctionType):
            if is_trusted(value.__globals__.get("__name__")):
                todo += _wrapped(value)
            else:
                found.add(top_package(value.__module__))
        elif isinstance(value, functools.partial):
            todo.append(value.func)
        elif isinstance(value, MethodType):
            todo += (value.__func__, value.__self__)
        elif isinstance(value, (tuple, list)):
            todo += value
        elif type(value).__module__.startswith("implicitdiff"):
            todo += own_attributes(value).values()
        elif callable(value) and not is_trusted(type(value).__module__):
            found.add(top_package(type(value).__module__))
    return frozenset(found)


def _wrapped(fn: FunctionType) -> list[object]:
    """Return the values of a wrapper function among which the wrapped function may be."""
    return [*contents_of(fn.__closure__ or ()), *(fn.__defaults__ or ()), fn.__dict__.get("__wrapped__")]


def own_attributes(value: object) -> dict[str, Any]:
    """Return the instance dictionary of an object, without a call of the object's own `__getattribute__`."""
    try:
        found: dict[str, Any] = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return found
