"""The version of the package, of which pyproject.toml is the one source."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path


def _version() -> str:
    """That of the installed package; in a source tree that is not installed, that of its pyproject.toml."""
    try:
        return importlib.metadata.version("implicitdiff")
    except importlib.metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parents[1] / "pyproject.toml"
        written = re.findall(r'^version = "(.+)"$', project.read_text(), re.MULTILINE) if project.is_file() else []
        return next(iter(written), "0+unknown")


__version__ = _version()
