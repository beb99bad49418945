"""The compiled optimizer steps: the modules `cpu` and `cuda`, each None if it was not built.

The stubs `_cpu.pyi` and `_cuda.pyi` give their signatures.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch  # noqa: F401  # first: the extension then shares torch's OpenMP, one pool of threads

__all__ = ["cpu", "cuda"]

# Only a missing file means "not built": a module that is there and does not load is broken, and raises.
if find_spec("implicitdiff._C._cpu"):
    import implicitdiff._C._cpu as cpu
else:
    cpu = None  # type: ignore[assignment]  # a type checker reads the stub; no annotation says "this module, or None"

if find_spec("implicitdiff._C._cuda"):
    import implicitdiff._C._cuda as cuda
else:
    cuda = None  # type: ignore[assignment]
