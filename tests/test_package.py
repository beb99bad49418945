"""The package as a whole: what a star import brings, and its version."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import implicitdiff
from implicitdiff import linear_solve, nn, objects, optim, projections, prox, pytree, schedule, solvers

PACKAGES = [implicitdiff, linear_solve, nn, objects, optim, projections, prox, pytree, schedule, solvers]
ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_a_star_import_brings_names_and_no_module(package: types.ModuleType) -> None:
    namespace: dict[str, object] = {}
    exec(f"from {package.__name__} import *", namespace)
    assert not [name for name, value in namespace.items() if isinstance(value, types.ModuleType)]
    assert {"__builtins__", *package.__all__} == namespace.keys()


def written_version() -> str:
    return re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]


def test_the_version_is_that_of_the_installed_package() -> None:
    assert implicitdiff.__version__ == importlib.metadata.version("implicitdiff") == written_version()


@pytest.mark.parametrize("with_project", [True, False])
def test_the_version_of_a_source_tree_that_is_not_installed(tmp_path: Path, with_project: bool) -> None:
    package = tmp_path / "implicitdiff"
    package.mkdir()
    shutil.copy(ROOT / "implicitdiff" / "_version.py", package)
    if with_project:
        shutil.copy(ROOT / "pyproject.toml", tmp_path)
    # Without site-packages, so that no metadata is found.
    code = "import sys; sys.path.insert(0, sys.argv[1]); from _version import __version__; print(__version__)"
    found = subprocess.run([sys.executable, "-I", "-S", "-c", code, str(package)], capture_output=True, text=True)
    assert found.stdout.strip() == (written_version() if with_project else "0+unknown"), found.stderr


def test_the_summary_of_the_build_begins_with_the_version() -> None:
    shown = subprocess.run([sys.executable, "-m", "implicitdiff"], capture_output=True, text=True, check=True).stdout
    assert shown.startswith(f"implicitdiff {implicitdiff.__version__}\n")


def test_the_former_name_of_the_objects_warns() -> None:
    fronts = importlib.import_module("implicitdiff.fronts")
    with pytest.warns(DeprecationWarning, match="now implicitdiff.objects"):
        assert fronts.MetaAdam is objects.MetaAdam
    with pytest.raises(AttributeError):
        fronts.no_such_name  # noqa: B018
