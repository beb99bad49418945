"""The package as a whole: what a star import brings, and its version."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

import implicitdiff
import implicitdiff.__main__ as summary
from implicitdiff import _C, linear_solve, nn, objects, optim, projections, prox, pytree, schedule, solvers

PACKAGES = [implicitdiff, linear_solve, nn, objects, optim, projections, prox, pytree, schedule, solvers]
ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(implicitdiff.__file__).resolve().parent


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_a_star_import_brings_names_and_no_module(package: types.ModuleType) -> None:
    namespace: dict[str, object] = {}
    exec(f"from {package.__name__} import *", namespace)
    assert not [name for name, value in namespace.items() if isinstance(value, types.ModuleType)]
    assert {"__builtins__", *package.__all__} == namespace.keys()


def written_version() -> str:
    return re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]


def test_torch_may_lack_its_distributed_package():
    program = (
        "import sys, torch.distributed as c10d; c10d.is_available = lambda: False; import implicitdiff; "
        "assert 'implicitdiff.distributed' not in sys.modules; implicitdiff.solvers.newton"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


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


@pytest.fixture(scope="module")
def shown() -> list[str]:
    """Lines of the summary of the build, and a last one with the OpenMP runtimes of its process."""
    code = """if True:
        import re, runpy, sys
        runpy.run_module("implicitdiff", run_name="__main__")
        maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
        print(*sorted(set(re.findall(r"/.*/lib(?:gomp|omp|iomp).*", maps))))
    """
    # With -P: else Python would take the package of the current folder, which pytest may not.
    return subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()


def test_the_summary_of_the_build_begins_with_the_version_and_the_files(shown: list[str]) -> None:
    assert shown[0] == f"implicitdiff {implicitdiff.__version__}"
    assert shown[1].startswith(f"files        {FOLDER} (")


@pytest.mark.skipif(_C.cpu is None or sys.platform != "linux", reason="reads what Linux has mapped for the steps")
def test_the_compiled_steps_share_the_openmp_of_torch(shown: list[str]) -> None:
    assert [Path(library).parents[1].name for library in shown[-1].split()] == ["torch"]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A source tree without compiled steps."""
    clone = tmp_path / "clone"
    shutil.copytree(FOLDER, clone / "implicitdiff", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    (clone / "src" / "formulas").mkdir(parents=True)
    (clone / "setup.py").touch()
    return clone


def test_a_clone_tells_that_it_hides_the_installed_package(clone: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    for file, text in (("implicitdiff/__init__.py", ""), ("implicitdiff-9.dist-info/METADATA", "Name: implicitdiff\n")):
        (site / file).parent.mkdir(parents=True)
        (site / file).write_text(text)
    command, env = [sys.executable, "-m", "implicitdiff"], {**os.environ, "PYTHONPATH": str(site)}
    told = subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True, check=True).stdout
    assert f"files        {clone / 'implicitdiff'} (source tree)\n" in told
    assert "CPU steps    not built in this source tree\n" in told
    assert f"They hide the installed package {site / 'implicitdiff'}\n" in told
    assert f"python -m pip install --editable {clone}\n" in told


def test_a_clone_that_hides_nothing_tells_how_to_build(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_C, "cpu", None)
    monkeypatch.setattr(importlib.metadata, "distributions", lambda **_: [])
    advice = summary._advice(clone / "implicitdiff")
    assert "They hide" not in advice and f"python -m pip install --editable {clone}\n" in advice


def test_there_is_no_advice_for_what_needs_none(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_C, "cpu", object())
    assert summary._advice(clone / "implicitdiff") == ""
    monkeypatch.setattr(_C, "cpu", None)
    assert summary._advice(tmp_path / "implicitdiff") == ""  # installed without compiled steps: the lines above say why


# --- what is written down twice, or for others to read ----------------------------------------------------------------

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_citation_has_the_version() -> None:
    assert f"\nversion: {PROJECT['project']['version']}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_pin_of_the_dependency_groups_is_exact() -> None:
    groups = PROJECT["dependency-groups"]
    pins = [entry for group in groups.values() for entry in group if isinstance(entry, str)]
    assert not [pin for pin in pins if not re.fullmatch(r"[\w-]+(?:\[\w+\])?==[\d.]+", pin)]


def test_noxfile_has_no_pin() -> None:
    assert not re.findall(r"==\d", (ROOT / "noxfile.py").read_text())


def test_the_oldest_torch_that_is_tested_is_the_oldest_that_is_accepted() -> None:
    (floor,) = (pin for pin in PROJECT["project"]["dependencies"] if pin.startswith("torch"))
    assert [f"{floor.replace('>=', '==')}.0"] == PROJECT["dependency-groups"]["torch-oldest"]


def test_a_classifier_names_each_python_from_the_oldest_that_is_accepted() -> None:
    prefix = "Programming Language :: Python :: 3."
    minors = [int(name.removeprefix(prefix)) for name in PROJECT["project"]["classifiers"] if name.startswith(prefix)]
    oldest = int(PROJECT["project"]["requires-python"].removeprefix(">=3."))
    assert minors == list(range(oldest, oldest + len(minors)))


def test_the_former_name_of_the_objects_warns() -> None:
    fronts = importlib.import_module("implicitdiff.fronts")
    with pytest.warns(DeprecationWarning, match="now implicitdiff.objects"):
        assert fronts.MetaAdam is objects.MetaAdam
    with pytest.raises(AttributeError):
        fronts.no_such_name  # noqa: B018
