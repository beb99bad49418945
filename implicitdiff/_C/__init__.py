"""The compiled optimizer steps: the modules `cpu` and `cuda`, each None where it was not built."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch  # noqa: F401  # first: the extension then shares torch's OpenMP, one pool of threads


def _built(name: str) -> ModuleType | None:
    # Absence alone means "not built". A module that is there and does not load is broken, and raises.
    return import_module(name) if find_spec(name) else None


cpu = _built("implicitdiff._C._cpu")
cuda = _built("implicitdiff._C._cuda")
