"""Rules of style that the sources of the package and of the tests keep."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import implicitdiff as idf

PACKAGE = {path: ast.parse(path.read_text()) for path in sorted(Path(idf.__file__).parent.rglob("*.py"))}
HERE = Path(__file__).parent
# Each sample of `typing/` stands alone, as a user's file does.
TESTS = {path: path.read_text() for path in sorted(HERE.rglob("*.py")) if path.parent.name != "typing"}
LONGEST = 600
# Fixed parts of the file of a solver, an optimizer and replaced operations; objects have the names of torch.optim.
ALLOWED = {"_start", "_step", "_size", "_newton_step", "_rule", "REPLACEMENTS", "vmap", *idf.objects.__all__}
# A clause in the place of a noun.
CLAUSES = ("What", "Where", "The same", "How")


def names_of(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def docstrings() -> Iterator[tuple[str, str]]:
    for path, tree in PACKAGE.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                yield f"{path.stem}.{getattr(node, 'name', '')}", text


def helpers(source: str) -> Iterator[str]:
    """Functions of a file of tests that are no tests, without annotations."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("test_") and not node.decorator_list:
            node.returns = None
            for argument in ast.walk(node):
                if isinstance(argument, ast.arg):
                    argument.annotation = None
            yield ast.dump(node)


def test_no_file_of_tests_is_longer_than_the_limit() -> None:
    lengths = {path.name: source.count("\n") for path, source in TESTS.items()}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_no_two_files_of_tests_define_one_helper() -> None:
    files = defaultdict(list)
    for path, source in TESTS.items():
        for helper in helpers(source):
            files[helper].append(path.name)
    assert [several for several in files.values() if len(several) > 1] == []


def test_no_two_modules_define_one_name() -> None:
    modules = defaultdict(list)
    for path, tree in PACKAGE.items():
        for name in {name for node in tree.body for name in names_of(node) if not name.startswith("__")}:
            modules[name].append(path.stem)
    several = {name: found for name, found in modules.items() if len(found) > 1}
    assert {name: found for name, found in several.items() if name not in ALLOWED} == {}


def test_no_docstring_begins_with_a_clause() -> None:
    beginnings = {where: text.splitlines()[0] for where, text in docstrings()}
    assert {where: line for where, line in beginnings.items() if line.startswith(CLAUSES)} == {}
