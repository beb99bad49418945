"""The page of benchmarks says what the results in the repository say."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from operator import attrgetter
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def maker() -> ModuleType:
    if not (FOLDER / "peers.json").exists():
        pytest.skip("benchmarks/peers.json is not here")
    spec = importlib.util.spec_from_file_location("page_of_benchmarks", FOLDER / "page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_made_from_the_results(maker: ModuleType) -> None:
    assert maker.PAGE.read_text() == maker.page(FOLDER), "python benchmarks/page.py writes it again"


LOOP = {
    "title": "a search",
    "threads": 2,
    "ms": {"implicitdiff": [1, 2, 3], "faster": [0.5, 1, 2], "slower": [4, 6, 7]},
    "wall_ms": {"implicitdiff": [1, 4, 5], "faster": [1, 1, 2], "slower": [1, 2, 3]},
    "first_ms": {"implicitdiff": 7, "faster": 400, "slower": 500},
    "of_target": {"implicitdiff": 1.0, "faster": 0.5, "slower": 1.0, "wrong": 3.5},
}
CURVES = {"title": "by size", "sizes": [1, 10], "curves": {"implicitdiff": [2, 1], "jaxopt.X": [1, 2]}}


def test_a_loop_is_bold_where_it_is_the_slower_one(maker: ModuleType) -> None:
    text = maker.loops({"a, threads 2": LOOP})
    assert "| a search | 2 | 2 | 7 | faster | 1 | 400 | **0.5** | **0.25** |" in text
    assert "|  |  |  |  | slower | 6 | 500 | 3 | **0.5** |" in text
    assert "|  |  |  |  | wrong | missed |  |  |  |" in text


def test_the_figure_of_loops_is_shown_where_its_curves_are(maker: ModuleType) -> None:
    assert "loops.png" not in maker.loops({"a": LOOP})
    assert "loops.png" in maker.loops({"a": LOOP, "b": CURVES})


def of_ranks(tasks: int, ours: float) -> dict[str, object]:
    times = {"one process": [5, 6, 7], "implicitdiff": [ours, ours, ours]}
    row = {"title": f"a search, {tasks} tasks", "tasks": tasks, "ranks": 2, "ms": times, "wall_ms": times}
    return row | {"load": 4.5, "cores": 2, "collectives": 2, "headers": 3, "bytes": 1500}


def test_several_processes_pay_from_where_they_are_faster(maker: ModuleType) -> None:
    rows = {str(n): of_ranks(n, ours) for n, ours in ((64, 12), (256, 4), (1024, 8), (2048, 4), (4096, 3))}
    text = maker.distributed(rows)
    assert "- a search: 2 processes pay from 2048 tasks on; 2 times as fast at 4096" in text
    assert "| a search, 64 tasks | 2 | 6 | 12 | **0.5** | **0.5** | 5 | 1.5 |" in text


def test_the_functions_whose_time_is_measured_are_there() -> None:
    if not (FOLDER / "stages.py").exists():
        pytest.skip("benchmarks/stages.py is not here")
    source = ast.parse((FOLDER / "stages.py").read_text())
    places = [text.value for text in ast.walk(source) if isinstance(text, ast.Constant) and isinstance(text.value, str)]
    found = [
        place.split(":") for place in places if place.startswith(("_", "solvers.", "linear_solve.")) and ":" in place
    ]
    assert len(found) > 10
    for module, path in found:
        # A place of several functions ends where their names are put in.
        assert attrgetter(path.rstrip("."))(importlib.import_module(f"implicitdiff.{module}"))
