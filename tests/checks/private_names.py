"""The private names of torch in the source of the package, and canaries: assertions of behaviour about them.

The source is read. The package is not imported: with a new torch it may be what cannot be imported.
"""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Callable, Iterable
from functools import cache, reduce
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

PACKAGE = Path(find_spec("implicitdiff").origin).parent
A_MODULE = nn.Module()
MESSAGES = ("_UNTRANSFORMABLE", "_UNBATCHABLE")

# --- the private names that the source has --------------------------------------------------------------------------


def is_private(path: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in path.split("."))


class Names(ast.NodeVisitor):
    """The private names of torch in a file, each with the functions that use it.

    A name is a path of torch, ``.name`` for an attribute of a tensor or a module, or the beginning of a message.
    """

    def __init__(self, file: Path) -> None:
        self.file = file.relative_to(PACKAGE)
        self.imported: dict[str, str] = {}
        self.scope: list[str] = []
        self.found: dict[str, set[str]] = {}
        self.visit(ast.parse(file.read_text()))

    def add(self, name: str) -> None:
        self.found.setdefault(name, set()).add(f"{self.file}: {'.'.join(self.scope) or 'the module'}")

    def visit_Import(self, node: ast.Import) -> None:
        for name in node.names:
            if name.name.split(".")[0] == "torch":
                self.imported[name.asname or "torch"] = name.name if name.asname else "torch"

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if (node.module or "").split(".")[0] == "torch":
            self.imported |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}

    def visit_scope(self, node: Any) -> None:
        self.scope.append(node.name)
        self.generic_visit(node)
        self.scope.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = visit_scope

    def visit_Name(self, node: ast.Name) -> None:
        if is_private(path := self.imported.get(node.id, "")):
            self.add(path)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        parts: list[str] = []
        below: ast.expr = node
        while isinstance(below, ast.Attribute):
            parts.append(below.attr)
            below = below.value
        if isinstance(below, ast.Name) and below.id in self.imported:
            path = ".".join([self.imported[below.id], *reversed(parts)])
            if is_private(path):
                self.add(path)
            return
        if is_private(node.attr) and (hasattr(torch.Tensor, node.attr) or hasattr(A_MODULE, node.attr)):
            self.add(f".{node.attr}")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        # A class of a module that is looked up where it is loaded: `_is(tensor, "torch.module", "Class")`.
        texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        if texts and re.fullmatch(r"torch(\.\w+)+", texts[0]):
            self.add(".".join(texts[:2]))
        if "untransformable_function" in self.scope and getattr(node.func, "attr", "") == "startswith":
            self.messages(node.args)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        if names and names[0] in MESSAGES and isinstance(node.value, ast.Dict):
            self.scope.append(names[0])
            self.messages(node.value.keys)
            self.scope.pop()
        self.generic_visit(node)

    def messages(self, nodes: Iterable[Any]) -> None:
        for node in nodes:
            if isinstance(node, ast.Constant) and " " in node.value:
                self.add(f"message: {node.value}")


@cache
def private_names() -> dict[str, set[str]]:
    """Every private name, with its users."""
    users: dict[str, set[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        for name, where in Names(file).found.items():
            users.setdefault(name, set()).update(where)
    return users


def operations() -> set[str]:
    """The operations of ATen that the package replaces, by the keywords of `of_aten`."""
    calls = [
        node
        for file in (PACKAGE / "_torch" / "replacements").glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "of_aten"
    ]
    return {keyword.arg for call in calls for keyword in call.keywords if keyword.arg}


# --- canaries ---

Canary = Callable[..., None]
CANARIES: dict[str, tuple[tuple[str, ...], Canary]] = {}


def canary(*names: str) -> Callable[[Canary], Canary]:
    """Decorate the assertion about private names, which it takes as arguments in this order."""

    def enter(check: Canary) -> Canary:
        CANARIES.update({name: (names, check) for name in names})
        return check

    return enter


def find(path: str) -> Any:
    """What torch has under a path; AttributeError or ImportError if nothing."""
    if path.startswith(("message: ", ".")):
        return path.removeprefix("message: ").removeprefix(".")
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        with contextlib.suppress(ImportError):
            return reduce(getattr, parts[end:], import_module(".".join(parts[:end])))
    raise ImportError(path)


def verdict(name: str) -> str | None:
    """The reason why torch no longer does what the package takes for granted, with the functions at stake."""
    names, check = CANARIES[name]
    try:
        check(*map(find, names))
    except (Exception, pytest.fail.Exception) as error:
        users = "\n  ".join(sorted(private_names().get(name, {"nothing"})))
        return f"torch {torch.__version__}: {name}: {type(error).__name__}: {error}\nused by implicitdiff/\n  {users}"
    return None
