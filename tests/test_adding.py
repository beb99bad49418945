"""The lists of CONTRIBUTING.md on adding a solver or an optimizer, followed with a dummy on a copy of the sources."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("implicitdiff", "tests", "benchmarks", "docs/api", "docs/solvers.md", "CHANGELOG.md", "pyproject.toml")
if not (ROOT / "CONTRIBUTING.md").exists():
    pytest.skip("the sources are not here", allow_module_level=True)


def section(heading: str) -> str:
    """A section of CONTRIBUTING.md."""
    return (ROOT / "CONTRIBUTING.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]


def steps(heading: str) -> list[str]:
    """The items of a list."""
    return [line for line in section(heading).splitlines() if line[:1].isdigit()]


def code_in(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


Edit = tuple[str, str, str]
"""A path, a text there, and what is put before it."""

AUTOSUMMARY = r"^   (\w+)$"
# The first column, which may have several names, and options that are no names of solvers.
ROW_OF_A_TABLE = r"^\| ((?:`\w+`(?:, )?)+)"


class List(NamedTuple):
    """A list, and what its steps are for a dummy.

    Attributes:
        section: the heading.
        package: the folder of the file.
        renamed: words of the model, each with the dummy's.
        exported: the dummy's public names; the last is the factory.
        edits: by step.
        table: where each public factory has a row.
        benchmark: where as well.
        battery: tests that the row brings.
        exempt: factories whose tests or benchmarks are elsewhere, by file.
        listings: other pages that have each factory, and how a line with it looks.
    """

    section: str
    package: str
    renamed: dict[str, str]
    exported: tuple[str, ...]
    edits: dict[str, list[Edit]]
    table: str
    benchmark: str
    battery: tuple[str, ...]
    exempt: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    listings: Mapping[str, str] = MappingProxyType({})

    @property
    def factory(self) -> str:
        return self.exported[-1]

    @property
    def stem(self) -> str:
        return self.factory.removeprefix("solve_")

    @property
    def page(self) -> str:
        return f"docs/api/{self.package.rpartition('/')[2]}.rst"


def exports(package: str, module: str, names: tuple[str, ...]) -> list[Edit]:
    file = f"{package}/__init__.py"
    # In front of the first name there is.
    return [
        (file, "\n__all__ = [\n", f"from {module} import {', '.join(names)}\n"),
        (file, "\n]\n", "".join(f'\n    "{name}",' for name in names)),
    ]


def under(problem: str) -> tuple[str, ...]:
    return tuple(f"test_transforms.py::test_solution_is_right_under[{problem}-{t}]" for t in TRANSFORMS)


NEWS = ("CHANGELOG.md", "- `custom_root`", "- `{}`.\n")
TRANSFORMS = ("value", "grad", "jvp", "vmap")
LINEAR_SOLVER = List(
    section="Adding a linear solver",
    package="implicitdiff/linear_solve",
    renamed={"solve_cg": "solve_dummy", "conjugate_gradients": "dummy_iterations"},
    exported=("solve_dummy",),
    edits={
        "export": exports("implicitdiff/linear_solve", "implicitdiff.linear_solve.dummy", ("solve_dummy",)),
        "docs": [("docs/api/linear_solve.rst", "   solve_lu\n", "   solve_dummy\n")],
        "row": [
            ("tests/tables/linear_solvers.py", "    solve_gmres,\n", "    solve_dummy,\n"),
            (
                "tests/tables/linear_solvers.py",
                '    Row("cg", ',
                '    Row("dummy", solve_dummy, ("definite",), iterative=True),\n',
            ),
        ],
        "benchmark": [("benchmarks/cost.py", '        "solve_cg": ', '        "solve_dummy": ls.solve_dummy(),\n')],
        "news": [NEWS],
    },
    table="tests/tables/linear_solvers.py",
    benchmark="benchmarks/cost.py",
    battery=under("solve, dummy"),
)
SOLVER = List(
    section="Adding a solver",
    package="implicitdiff/solvers",
    renamed={"fixed_point_iteration": "dummy_search", "FixedPointMemory": "DummyMemory"},
    exported=("DummyMemory", "dummy_search"),
    edits={
        "export": exports("implicitdiff/solvers", "implicitdiff.solvers.dummy_search", ("DummyMemory", "dummy_search")),
        "docs": [("docs/api/solvers.rst", "   newton\n", "   dummy_search\n   DummyMemory\n")],
        "index": [("docs/api/index.md", "   newton\n", "   dummy_search\n")],
        "choice": [("docs/solvers.md", "| `anderson` | first", "| `dummy_search` | never | `f` | one `f` |\n")],
        "row": [
            (
                "tests/tables/solvers.py",
                '    Row("anderson", ',
                '    Row("dummy_search", solvers.dummy_search, FIXED_POINT),\n',
            )
        ],
        "benchmark": [
            (
                "benchmarks/solvers.py",
                '    Row("anderson", ',
                '    Row("dummy_search", CONTRACTION, solvers.dummy_search, []),\n',
            )
        ],
        "news": [NEWS],
    },
    table="tests/tables/solvers.py",
    benchmark="benchmarks/solvers.py",
    battery=under("solvers.dummy_search"),
    exempt={"tests/tables/solvers.py": ("qp",), "benchmarks/solvers.py": ("qp",)},
    listings={"docs/api/index.md": AUTOSUMMARY, "docs/solvers.md": ROW_OF_A_TABLE},
)
OBJECTS = {
    "implicitdiff/objects/optimizers.py": ("Dummy", "_NamedOptimizer", "class Adam(", ", names=_ADAM"),
    "implicitdiff/objects/meta_optimizer.py": ("MetaDummy", "_NamedMetaOptimizer", "class MetaAdam(", ""),
}
OPTIMIZER = List(
    section="Adding an optimizer",
    package="implicitdiff/optim",
    # The kernel of the dummy is that of its model: to compile another takes a compiler.
    renamed={
        "AdamState": "DummyState",
        "Adam": "Dummy",
        "adam": "dummy",
        '"dummy"$': '"adam"',
        "dummy_ams": "adam_ams",
    },
    exported=("DummyState", "scale_by_dummy", "dummy"),
    edits={
        "export": [
            *exports("implicitdiff/optim", "implicitdiff.optim.dummy", ("DummyState", "scale_by_dummy", "dummy")),
            *exports("implicitdiff", "implicitdiff.optim", ("dummy",)),
            ("implicitdiff/optim/__init__.py", "        AdamState,\n", "        DummyState,\n"),
        ],
        "docs": [
            ("docs/api/optim.rst", "   adam\n", "   dummy\n   scale_by_dummy\n   DummyState\n"),
            ("docs/api/objects.rst", "   Adam\n", "   Dummy\n   MetaDummy\n"),
        ],
        "objects": [
            *(
                (file, before, f'class {name}({base}, factory=optim.dummy{more}):\n    """A dummy."""\n\n\n')
                for file, (name, base, before, more) in OBJECTS.items()
            ),
            *(
                edit
                for file, (name, *_) in OBJECTS.items()
                for package, module in (
                    ("implicitdiff/objects", file[:-3].replace("/", ".")),
                    ("implicitdiff", "implicitdiff.objects"),
                )
                for edit in exports(package, module, (name,))
            ),
        ],
        "row": [
            (
                "tests/tables/optimizers.py",
                "    (\n        idf.adamw,",
                "    (idf.dummy, torch.optim.Adam, [{}]),\n",
            ),
            ("tests/tables/fronts.py", "    idf.adam: ", "    idf.dummy: idf.Dummy,\n"),
            ("tests/tables/meta_fronts.py", "    idf.adam: ", "    idf.dummy: idf.MetaDummy,\n"),
            ("tests/test_pickling.py", "idf.adamw, ", "idf.dummy, "),
            ("tests/test_pickling.py", '    "scale_by_rmsprop": ', '    "scale_by_dummy": optim.scale_by_dummy(),\n'),
        ],
        "benchmark": [("benchmarks/steps.py", '    "adam": ', '    "dummy": (idf.dummy, torch.optim.Adam, {}),\n')],
        "news": [NEWS],
    },
    table="tests/tables/optimizers.py",
    benchmark="benchmarks/steps.py",
    battery=("test_torch_optim.py", "test_meta_optimizers.py", "test_pickling.py"),
)
LISTS = {one.section: one for one in (LINEAR_SOLVER, SOLVER, OPTIMIZER)}

# --- what a list forgets --------------------------------------------------------------------------------------------


def names_used(file: Path) -> set[str]:
    """The names in the code of a file, imports left out."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    return {n.id for n in nodes if isinstance(n, ast.Name)} | {n.attr for n in nodes if isinstance(n, ast.Attribute)}


def defined(file: Path) -> set[str]:
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def public(package: Path) -> list[str]:
    """The names of ``__all__``."""
    for node in ast.parse((package / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError(f"{package} has no __all__")


def factories(root: Path, one: List) -> list[str]:
    """The public names that have a file of their own; of an optimizer the top level has the name as well."""
    files = {file.stem for file in (root / one.package).glob("*.py")}
    named = [name for name in public(root / one.package) if name.removeprefix("solve_") in files]
    return named if one is not OPTIMIZER else [name for name in named if name in public(root / "implicitdiff")]


def listed_in(page: Path, pattern: str) -> set[str]:
    """The names in the lines of a page that look so."""
    lines = re.findall(pattern, page.read_text(), re.MULTILINE)
    return {name for line in lines for name in re.findall(r"\w+", line)}


def omissions(root: Path, one: List) -> list[str]:
    """The files that lack a name."""
    names, news = public(root / one.package), (root / "CHANGELOG.md").read_text()
    files = [file for file in sorted((root / one.package).glob("*.py")) if not file.name.startswith("_")]
    found = [f"{one.package}/__init__.py: {file.stem}" for file in files if not defined(file) & set(names)]
    listed = listed_in(root / one.page, AUTOSUMMARY)
    found += [f"{one.page}: {name}" for name in names if name not in listed]
    for path, pattern in one.listings.items():
        listed = listed_in(root / path, pattern)
        found += [f"{path}: {name}" for name in factories(root, one) if name not in listed]
    for path in (one.table, one.benchmark):
        used = names_used(root / path).union(one.exempt.get(path, ()))
        found += [f"{path}: {name}" for name in factories(root, one) if name not in used]
    return found + [f"CHANGELOG.md: {name}" for name in factories(root, one) if f"`{name}`" not in news]


# --- the dummy ------------------------------------------------------------------------------------------------------


def model_of(one: List) -> str:
    """The file that the first step names as the model."""
    return next(code for code in code_in(steps(one.section)[0]) if re.fullmatch(r"\w+\.py", code))


def write_file(root: Path, one: List) -> None:
    text = (root / one.package / model_of(one)).read_text()
    for old, new in one.renamed.items():
        text = re.sub(old if old.endswith("$") else rf"(?<![A-Za-z]){old}", new, text, flags=re.MULTILINE)
    (root / one.package / f"{one.stem}.py").write_text(text)


def follow(root: Path, one: List, without: str = "") -> None:
    """Take the steps, but for one."""
    write_file(root, one)
    for step, edits in one.edits.items():
        for path, before, text in edits if step != without else ():
            file = root / path
            old = file.read_text()
            assert before in old, f"{step}: {before!r} is not in {path}"
            text = text.format(one.factory) if path == "CHANGELOG.md" else text
            file.write_text(old.replace(before, text + before, 1))


def copied(to: Path) -> Path:
    for path in COPIED:
        if (ROOT / path).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "torchopt_suite", "programs")
            shutil.copytree(ROOT / path, to / path, ignore=ignored)
        else:
            shutil.copy(ROOT / path, to / path)
    return to


def run(root: Path, *arguments: str) -> str:
    """The output of a Python that imports the copy."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, *arguments], cwd=root, env=env, capture_output=True, text=True)
    return done.stdout + done.stderr


every_list = pytest.mark.parametrize("one", LISTS.values(), ids=LISTS)


@every_list
def test_a_list_has_at_most_six_lines_and_its_paths_are_there(one: List) -> None:
    text = section(one.section)
    assert len(steps(one.section)) == len(text.strip().splitlines()) <= 6
    for code in code_in(text):
        if "/" in code:
            folders = (ROOT, ROOT / "implicitdiff", ROOT / one.package)
            assert any((folder / code).exists() for folder in folders), code


@every_list
def test_every_list_is_followed_by_what_is_there(one: List) -> None:
    assert omissions(ROOT, one) == []


@every_list
def test_a_step_that_is_left_out_is_noticed(one: List, tmp_path: Path) -> None:
    expected = {
        "export": f"{one.package}/__init__.py: {one.stem}",
        "docs": f"{one.page}: {one.factory}",
        "row": f"{one.table}: {one.factory}",
        "benchmark": f"{one.benchmark}: {one.factory}",
        "news": f"CHANGELOG.md: {one.factory}",
        "index": f"docs/api/index.md: {one.factory}",
        "choice": f"docs/solvers.md: {one.factory}",
    }
    for step in one.edits.keys() & expected:
        root = copied(tmp_path / step)
        follow(root, one, without=step)
        assert expected[step] in omissions(root, one)
    root = copied(tmp_path / "none")
    follow(root, one)
    assert omissions(root, one) == []


def test_the_rows_of_the_dummies_bring_tests_that_pass(tmp_path: Path) -> None:
    root = copied(tmp_path)
    for one in LISTS.values():
        follow(root, one)
    (root / "tests" / "test_dummies.py").write_text(
        "import implicitdiff\n\n\n"
        f"def test_dummy_of_the_copy():\n    assert implicitdiff.__file__.startswith({str(root)!r})\n"
    )
    chosen = [f"tests/{test}" for one in LISTS.values() for test in one.battery]
    quick = "dummy and not finite and not central or every_factory"
    shown = run(
        root, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rA", "-k", quick, "tests/test_dummies.py", *chosen
    )
    passed = set(re.findall(r"^PASSED tests/(.+)$", shown, re.MULTILINE))
    assert passed and "FAILED" not in shown and "ERROR" not in shown, shown[-4000:]
    assert {test for one in (LINEAR_SOLVER, SOLVER) for test in one.battery} <= passed
    for file in OPTIMIZER.battery:
        assert any(test.startswith(file) and "dummy" in test for test in passed), file
    assert {"test_dummies.py::test_dummy_of_the_copy", "test_pickling.py::test_every_factory_is_here"} <= passed


def test_without_its_export_a_row_is_an_error(tmp_path: Path) -> None:
    # Without its export an optimizer's objects are an error before.
    root, both = copied(tmp_path), (LINEAR_SOLVER, SOLVER)
    for one in both:
        follow(root, one, without="export")
    tables = [(root / one.table).relative_to(root / "tests").with_suffix("") for one in both]
    tries = [f"try: import {'.'.join(table.parts)}\nexcept Exception as error: print(error)" for table in tables]
    shown = run(root, "-c", "\n".join(["import sys", "sys.path.insert(0, 'tests')", *tries]))
    for one in both:
        assert re.search(rf"(cannot import name|has no attribute) '{one.factory}'", shown), shown
