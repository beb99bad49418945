"""Prints what is built, and from which files: `python -m implicitdiff`."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch

from implicitdiff import _C, __version__

_FOLDER = Path(__file__).resolve().parent

_WITHOUT_STEPS = """
These files are a source tree without compiled steps: optimizers run in plain torch, with the same results to rounding.
"""
_HIDES = """
They hide the installed package {other}
because Python looks into the current folder, and into PYTHONPATH, first. To run the installed package, start Python in
another folder, or type
    python -P
"""
_EDITABLE = """
To build the steps in this source tree, with a C++ compiler on PATH, type
    python -m pip install --editable {clone}
"""


def _is_source_tree(folder: Path) -> bool:
    """True if the package in a folder is that of a clone or of an unpacked sdist."""
    return (folder.parent / "setup.py").is_file() and (folder.parent / "src" / "formulas").is_dir()


def _installed_beside(folder: Path) -> Path | None:
    """Return the folder of an installed copy that the package in `folder` hides, None if there is none."""
    for distribution in importlib.metadata.distributions(name="implicitdiff"):
        # An editable installation has no copy in site-packages, so the test for `__init__.py` leaves the entry out.
        other = Path(str(distribution.locate_file("implicitdiff"))).resolve()
        if other != folder and (other / "__init__.py").is_file():
            return other
    return None


def _files(folder: Path) -> str:
    return f"{folder} ({'source tree' if _is_source_tree(folder) else 'installed'})"


def _cpu() -> str:
    if _C.cpu is None:
        return _not_built("no C++ compiler on PATH")
    info = _C.cpu.info()
    openmp = "OpenMP" if info["openmp"] else "no OpenMP"
    return f"compiler {info['compiler']}, {openmp}, {info['simd']} on this machine"


def _cuda() -> str:
    if _C.cuda is None:
        return _not_built("no nvcc or C++ compiler on PATH")
    info = _C.cuda.info()
    archs = ", ".join(f"sm_{arch}" for arch in info["archs"])
    # CUDART_VERSION is 1000 times the major number plus 10 times the minor number.
    toolkit = f"toolkit {info['cuda'] // 1000}.{info['cuda'] % 1000 // 10}"
    return f"{toolkit}, built for {archs} and newer, {info['devices'] or 'no'} device(s) visible"


def _not_built(missing: str) -> str:
    if _C.cpu is None and _is_source_tree(_FOLDER):
        return "not built in this source tree"
    return f"not built: switched off, or {missing}, when it was installed"


def _advice(folder: Path) -> str:
    """Return what to type where a source tree without compiled steps runs; an empty string elsewhere."""
    if _C.cpu is not None or not _is_source_tree(folder):
        return ""
    other = _installed_beside(folder)
    hidden = "" if other is None else _HIDES.format(other=other)
    return _WITHOUT_STEPS + hidden + _EDITABLE.format(clone=folder.parent)


if __name__ == "__main__":
    print("implicitdiff", __version__)
    print("files       ", _files(_FOLDER))
    print("Python      ", platform.python_version(), "on", platform.platform())
    print("torch       ", torch.__version__, f"on {torch.get_num_threads()} thread(s)")
    print("CPU steps   ", _cpu())
    print("CUDA steps  ", _cuda())
    print(_advice(_FOLDER), end="")
