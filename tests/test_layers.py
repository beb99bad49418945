"""A module imports only from folders below its own, or from other files of its own folder, without a cycle."""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "implicitdiff"

# From the bottom up: folders, and the files of the hall. Projections that search stand on the solvers, the others
# below them.
ORDER = [
    "errors",
    "_C",
    "_calls",
    "_torch",
    "pytree",
    "_closures",
    "_recorded",
    "_implicit",
    "linear_solve",
    "implicit",
    "_unroll",
    "optim",
    "schedule",
    "projections, closed forms",
    "prox",
    "solvers._loop",
    "solvers._steps",
    "solvers._qp",
    "solvers",
    "distributed",
    "_problems",
    "projections",
    "nn",
    "objects",
    "fronts",
    "_version",
    "",
    "__main__",
]
SEARCHING = ("projections", "projections._polyhedra", "projections._transport")
# Beside these, whatever of torch begins with an underscore.
PRIVATE = re.compile(r"\b(?:torch(?:\.\w+)*|forward_ad|parametrize)\._[a-zA-Z]")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


FILES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "implicitdiff":
            inner = node.module.removeprefix("implicitdiff").removeprefix(".")
            names = {f"{inner}.{alias.name}".removeprefix(".") for alias in node.names}
            submodules = names & FILES.keys()
            found |= submodules or {inner}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("implicitdiff.") for a in node.names if a.name.startswith("implicitdiff")}
    return found


def room(module: str) -> str:
    if module.startswith("projections") and module not in SEARCHING:
        return "projections, closed forms"
    while module not in ORDER:
        module = module.rpartition(".")[0]
    return module


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_point_down(module):
    for imported in imports(FILES[module]):
        assert ORDER.index(room(imported)) <= ORDER.index(room(module)), f"{module} imports {imported}"


def test_imports_have_no_cycle():
    list(graphlib.TopologicalSorter({module: imports(path) for module, path in FILES.items()}).static_order())


@pytest.mark.parametrize("module", sorted(FILES))
def test_private_names_of_torch_live_in_one_folder(module):
    if room(module) != "_torch":
        assert not PRIVATE.findall(FILES[module].read_text())


@pytest.mark.parametrize("module", sorted(FILES))
def test_two_modules_hand_addresses_to_compiled_code(module):
    assert "_C" not in imports(FILES[module]) or module in ("optim._fused", "_recorded.step", "__main__")
