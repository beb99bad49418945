"""Prints what is built: `python -m implicitdiff`."""

from __future__ import annotations

import platform

import torch

from implicitdiff import _C, __version__


def _cpu() -> str:
    if _C.cpu is None:
        return "not built: switched off, or no C++ compiler on PATH, when it was installed"
    info = _C.cpu.info()
    openmp = "OpenMP" if info["openmp"] else "no OpenMP"
    return f"compiler {info['compiler']}, {openmp}, {info['simd']} on this machine"


def _cuda() -> str:
    if _C.cuda is None:
        return "not built: switched off, or no nvcc or C++ compiler on PATH, when it was installed"
    info = _C.cuda.info()
    archs = ", ".join(f"sm_{arch}" for arch in info["archs"])
    toolkit = f"toolkit {info['cuda'] // 1000}.{info['cuda'] % 1000 // 10}"
    return f"{toolkit}, built for {archs} and newer, {info['devices'] or 'no'} device(s) visible"


if __name__ == "__main__":
    print("implicitdiff", __version__)
    print("Python      ", platform.python_version(), "on", platform.platform())
    print("torch       ", torch.__version__, f"on {torch.get_num_threads()} thread(s)")
    print("CPU steps   ", _cpu())
    print("CUDA steps  ", _cuda())
