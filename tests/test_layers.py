"""A module imports only from layers below its own, or from earlier files of its own folder."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "implicitdiff"

# From the bottom up. A linear solver has the place of "linear_solve.*", an optimizer that of "optim.*", a solver that
# of "solvers.*", and each may use another of its kind.
ORDER = [
    "errors",
    "_C",
    "_pytree",
    "pytree",
    "_lanes",
    "_places",
    "_functorch",
    "_values",
    "_settings",
    "_packages",
    "_snapshot",
    "_elementary._spelling",
    "_elementary._activations",
    "_elementary._along",
    "_elementary._attention",
    "_elementary._distance",
    "_elementary._linear_algebra",
    "_elementary._losses",
    "_elementary._normalisation",
    "_elementary._recurrent",
    "_elementary",
    "_program",
    "_sparse",
    "_modes",
    "_lift",
    "_signature",
    "_operator",
    "_primitive",
    "_system",
    "_domain",
    "_linear",
    "linear_solve._outcome",
    "linear_solve._arithmetic",
    "linear_solve._krylov",
    "linear_solve._direct",
    "linear_solve._pseudoinverse",
    "linear_solve.*",
    "linear_solve",
    "_root",
    "_body",
    "implicit",
    "_unroll",
    "optim._check",
    "optim._columns",
    "optim._rule",
    "optim._step",
    "optim._donation",
    "optim._fused",
    "optim._base",
    "optim._stateless",
    "optim._inject",
    "optim._transformation",
    "optim.*",
    "optim",
    "schedule",
    "_point",
    "projections._boxes",
    "projections._simplices",
    "projections._balls",
    "projections._planes",
    "projections._orders",
    "prox",
    "solvers._status",
    "solvers._dense",
    "solvers._rows",
    "solvers._bounds",
    "solvers._losses",
    "solvers._equations",
    "solvers._state",
    "solvers._newton_step",
    "solvers._method",
    "solvers._termination",
    "solvers._report",
    "solvers._options",
    "solvers._below",
    "solvers._function",
    "solvers._solver",
    "solvers._backtracking",
    "solvers._low_rank",
    "solvers._newton",
    "solvers._proximal_gradient",
    "solvers._line_search",
    "solvers._scipy",
    "solvers._least_squares",
    "solvers._trust_region",
    "solvers._dogleg",
    "solvers._quadratic",
    "solvers._polish",
    "solvers._admm",
    "solvers._interior",
    "solvers._kkt_solve",
    "solvers.*",
    "solvers",
    "projections._polyhedra",
    "projections._transport",
    "projections",
    "nn._given",
    "nn._solve",
    "nn.*",
    "nn",
    "fronts._check",
    "fronts._derivatives",
    "fronts._hooks",
    "fronts.*",
    "fronts",
    "_version",
    "",
    "__main__",
]


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


def place(module: str) -> int:
    folder, _, name = module.partition(".")
    return ORDER.index(f"{folder}.*" if name and not name.startswith("_") else module)


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_point_down(module):
    for imported in imports(FILES[module]):
        siblings = ORDER[place(imported)].endswith(".*") and place(imported) == place(module)
        assert place(imported) < place(module) or siblings, f"{module} imports {imported}"


def test_imports_have_no_cycle():
    list(graphlib.TopologicalSorter({module: imports(path) for module, path in FILES.items()}).static_order())


@pytest.mark.parametrize("module", sorted(FILES))
def test_private_functorch_names_live_in_one_file(module):
    if module != "_functorch":
        source = FILES[module].read_text()
        assert "torch._C" not in source and "torch._functorch" not in source


@pytest.mark.parametrize("module", sorted(FILES))
def test_one_module_hands_addresses_to_compiled_code(module):
    assert "_C" not in imports(FILES[module]) or module in ("optim._fused", "__main__")
