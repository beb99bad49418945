"""The page of benchmarks says what the results in the repository say."""

from __future__ import annotations

import importlib.util
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
