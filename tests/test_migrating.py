"""docs/migrating.md has a row for every public name of three libraries, and the code in all of its rows runs."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tables.foreign_names import JAXOPT_0_8_5, TORCHDEQ_0_1_0, TORCHOPT_0_7_3

import implicitdiff

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "migrating.md").read_text()
LIBRARIES = {"TorchOpt": TORCHOPT_0_7_3, "JAXopt": JAXOPT_0_8_5, "torchdeq": TORCHDEQ_0_1_0}
# With those that have rows for their main names only.
SECTIONS = (*LIBRARIES, "Optimistix", "SciPy", "torch.optim")


class Row(NamedTuple):
    theirs: str
    ours: str
    remark: str


def rows_of(library: str) -> list[Row]:
    section = PAGE.split(f"\n## From {library}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    rows = [Row(*(cell.strip() for cell in line.split("|")[1:-1])) for line in lines]
    return [row for row in rows if row.ours != "here"]


def code_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_public_name_has_a_row(library: str) -> None:
    found = {name for row in rows_of(library) for code in code_in(row.theirs) for name in re.findall(r"[\w.]+", code)}
    # A name stands alone or after its module.
    bare = {name.rpartition(".")[2] for name in found}
    missing = [
        f"{module}.{name}" for module, names in LIBRARIES[library].items() for name in names.split() if name not in bare
    ]
    assert not missing


@pytest.mark.parametrize("library", SECTIONS)
def test_what_is_not_provided_has_a_reason_and_an_alternative(library: str) -> None:
    for row in rows_of(library):
        assert code_in(row.ours) or (row.ours == "not provided" and len(row.remark) > 20), row


def distance(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return ((x - c) ** 2).sum()


def names() -> dict[str, Any]:
    """What the code in the rows may use."""
    modules = ("linear_solve", "nn", "optim", "projections", "prox", "pytree", "schedule", "solvers")
    ours = {name: getattr(implicitdiff, name) for name in (*implicitdiff.__all__, *modules)}
    return {
        **ours,
        "torch": torch,
        "partial": partial,
        "f": distance,
        "g": lambda x, c: 0.5 * x + c,
        "F": lambda x, c: x**3 + x - c,
        "x": torch.zeros(3),
        "c": torch.tensor([0.1, 0.2, 0.7]),
        "v": torch.tensor([0.5, -0.3, 0.4]),
        "s": 1.0,
        "module": torch.nn.Linear(1, 1),
        "solver": implicitdiff.solvers.fixed_point_iteration(lambda x, c: 0.5 * x + c),
    }


CODE = [(library, code) for library in SECTIONS for row in rows_of(library) for code in code_in(row.ours)]


@pytest.mark.parametrize(("library", "code"), CODE)
def test_the_code_of_a_row_runs(library: str, code: str) -> None:
    if "use_accelerated_op=True" in code and not implicitdiff.accelerated_op_available("cpu"):
        pytest.skip("_C is not built")
    eval(code, names())
