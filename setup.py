"""Build the compiled optimizer steps, `implicitdiff._C`. README.md names the switches."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

CPU, CUDA = "implicitdiff._C._cpu", "implicitdiff._C._cuda"

# No compiler contracts to fused multiply-adds, so that results on the CPU and on a GPU are the same.
GNU = ["-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fvisibility=hidden"]
FAST = ["-O3", "-g0"]
SANITIZED = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-wrapv"]
MSVC = ["/O2", "/std:c++17"]
NVCC = ["-std=c++17", "-O3", "--fmad=false", "--threads=0", "-shared", "-cudart=static", "-lrt", "-ldl", "-lpthread"]
NVCC += ["-Xcompiler=-fPIC,-fvisibility=hidden", "-Xlinker=--exclude-libs=ALL", "-Xlinker=--strip-all"]


def find_nvcc() -> str | None:
    wanted = os.environ.get("IMPLICITDIFF_CUDA")
    if wanted == "0" or (wanted != "1" and sys.platform != "linux"):
        return None
    nvcc = shutil.which("nvcc")
    if wanted == "1" and not nvcc:
        raise PlatformError("IMPLICITDIFF_CUDA=1, but there is no nvcc on PATH")
    return nvcc


class BuildC(build_ext):
    def build_extensions(self) -> None:
        # A module that an earlier build left in this folder must not get into the wheel.
        for name in (CPU, CUDA):
            Path(self.get_ext_fullpath(name)).unlink(missing_ok=True)
        if not self.compiles():
            if os.environ.get("IMPLICITDIFF_CUDA") == "1":
                raise PlatformError("IMPLICITDIFF_CUDA=1, but there is no working C++ compiler")
            self.warn("there is no working C++ compiler: implicitdiff is built without its extension")
            self.extensions = []
        self.parallel = True
        # The modules are compiled at once, and so are the files of a module.
        from pybind11.setup_helpers import ParallelCompile

        with ParallelCompile():
            super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        if ext.name == CUDA:
            self.build_cuda(ext)
            return
        if self.compiler.compiler_type == "msvc":
            flags, openmp = MSVC, "/openmp"
        else:
            sanitized = os.environ.get("IMPLICITDIFF_SANITIZE") == "1"
            flags, openmp = GNU + (SANITIZED if sanitized else FAST), "-fopenmp"
        if self.compiles(openmp):
            flags = [*flags, openmp]
        else:
            self.warn(f"the C++ compiler does not take {openmp}: {ext.name} will use one thread")
        ext.extra_compile_args = ext.extra_link_args = flags
        super().build_extension(ext)

    def build_cuda(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        architectures = os.environ.get("IMPLICITDIFF_CUDA_ARCHS", "80;90").split(";")
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
        codes += [f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}"]
        includes = [f"-I{folder}" for folder in (*ext.include_dirs, *self.include_dirs)]
        self.spawn([find_nvcc(), *NVCC, *codes, *includes, *ext.sources, "-o", str(target)])

    def compiles(self, *flags: str) -> bool:
        """True if a small program compiles and links with these flags."""
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder, "program.cpp")
            program.write_text("#include <cmath>\nint main() { return 0; }\n")
            try:
                objects = self.compiler.compile([str(program)], folder, extra_postargs=list(flags))
                module = str(Path(folder, "program.out"))
                self.compiler.link_shared_object(objects, module, extra_postargs=list(flags), target_lang="c++")
            except (CCompilerError, ExecError, PlatformError):
                return False
        return True


def extensions() -> list[Extension]:
    if os.environ.get("IMPLICITDIFF_NO_EXTENSIONS") == "1":
        return []
    import pybind11

    include = ["src", pybind11.get_include()]
    headers = [str(header) for header in Path("src").rglob("*.h")]
    sources = {CPU: sorted(Path("src/cpu").glob("*.cpp"))}
    if find_nvcc():
        sources[CUDA] = sorted(Path("src/cuda").glob("*.c*"))
    return [
        Extension(name, [str(file) for file in files], include_dirs=include, depends=headers, language="c++")
        for name, files in sources.items()
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildC})
