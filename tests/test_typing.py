"""Type checkers accept right programs and report each fault of wrong ones: mypy and pyright, both strict."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import implicitdiff

SAMPLES = Path(__file__).parent / "typing"
# Where an editable installation has the package, which type checkers do not find by themselves.
SOURCE = str(Path(implicitdiff.__file__).parent.parent)


def mypy(folder: Path) -> dict[str, set[int]]:
    config = folder / "mypy.ini"
    # mypy refuses a path to installed packages, which it finds by itself.
    path = "" if Path(SOURCE).name == "site-packages" else f"mypy_path = {SOURCE}\n"
    config.write_text(f"[mypy]\nstrict = True\nfollow_imports = silent\n{path}")
    output = run("mypy", "--config-file", str(config), "--no-incremental", *map(str, sorted(folder.glob("*.py"))))
    return lines_of(re.findall(r"(\w+\.py):(\d+): error", output), output)


def pyright(folder: Path) -> dict[str, set[int]]:
    (folder / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "strict", "extraPaths": [SOURCE]}))
    output = run("pyright", "--project", str(folder), "--pythonpath", sys.executable, "--outputjson")
    found = [d for d in json.loads(output)["generalDiagnostics"] if d["severity"] == "error"]
    return lines_of(((Path(d["file"]).name, d["range"]["start"]["line"] + 1) for d in found), output)


def run(tool: str, *arguments: str) -> str:
    result = subprocess.run([sys.executable, "-m", tool, *arguments], capture_output=True, text=True, check=False)
    assert result.stdout, result.stderr
    return result.stdout


def lines_of(found, output: str) -> dict[str, set[int]]:
    lines: dict[str, set[int]] = {sample.name: set() for sample in SAMPLES.glob("*.py")}
    for name, line in found:
        assert name in lines, output
        lines[name].add(int(line))
    return lines


@pytest.mark.parametrize("check", [mypy, pyright])
def test_type_checkers_find_the_faults_and_nothing_else(check, tmp_path):
    if importlib.util.find_spec(check.__name__) is None:
        pytest.skip(f"{check.__name__} is not installed")
    for sample in SAMPLES.glob("*.py"):
        shutil.copy(sample, tmp_path)
    found = check(tmp_path)
    wrong = (SAMPLES / "wrong.py").read_text().splitlines()
    assert found["right.py"] == found["lambdas.py"] == set()
    assert found["wrong.py"] == {i for i, line in enumerate(wrong, start=1) if line.endswith("# error")}


@pytest.mark.parametrize("name", ["right", "lambdas"])
def test_the_right_programs_run(name):
    subprocess.run([sys.executable, SAMPLES / f"{name}.py"], check=True)
