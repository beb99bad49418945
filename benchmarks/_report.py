"""What every benchmark needs: a number of threads, the libraries beside ours, and results that are kept.

Import it before NumPy, torch and JAX, which read the variables below when they are imported.
"""

from __future__ import annotations

import os

# One, unless a benchmark starts a process with another number.
os.environ["OMP_NUM_THREADS"] = os.environ.get("BENCHMARK_THREADS", "1")
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_cpu_multi_thread_eigen={str(os.environ['OMP_NUM_THREADS'] != '1').lower()}",
}

import argparse
import datetime
import importlib
import importlib.metadata
import json
import platform
import sys
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

THREADS = int(os.environ["OMP_NUM_THREADS"])
Rows = dict[str, dict[str, Any]]
"""Results by the name of the row. Those of a timing have "ms": the quartiles of each entry."""
MISSING: list[str] = []
PACKAGES = ("torch", "numpy", "scipy", "jax", "jaxopt", "optimistix", "lineax", "torchopt", "osqp")


def library(name: str) -> Any:
    """The module, or None, which is noted in MISSING."""
    try:
        return importlib.import_module(name)
    except ImportError:
        MISSING.append(name)
        return None


def keep_threads() -> None:
    """Keep this process on a core for each thread, in JAX with float64, and name what is missing."""
    warnings.simplefilter("ignore")
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < THREADS:
            raise SystemExit(f"{THREADS} threads need as many cores, there are {len(cores)}")
        os.sched_setaffinity(0, cores[-THREADS:])
    torch.set_num_threads(THREADS)
    if jax := sys.modules.get("jax"):
        jax.config.update("jax_enable_x64", True)
    if MISSING:
        print(f"not installed, and left out: {', '.join(sorted(set(MISSING)))}")


def arguments(doc: str, rows: Collection[str], results: Path) -> argparse.ArgumentParser:
    """Those that the benchmarks share: some rows, and whether to keep the results."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="row", help=f"of {', '.join(rows)}; all by default")
    parser.add_argument("--save", action="store_true", help=f"write {results.name}")
    return parser


def chosen(parser: argparse.ArgumentParser, names: list[str], rows: Collection[str]) -> list[str]:
    """The names, all rows' if there are none; exit where one is no row's."""
    if unknown := set(names) - set(rows):
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(rows)}")
    return names or list(rows)


def kept(results: Path) -> Rows:
    """The rows of the last run that was saved."""
    rows: Rows = json.loads(results.read_text())["rows"] if results.exists() else {}
    return rows


def save(results: Path, rows: Rows, names: Collection[str]) -> None:
    """Write what was measured into the file.

    The milliseconds that were there become those of the last run. The other rows of the file, and what else it has of
    these, stay if they are of the same machine and versions, and begin with one of the names, by which all are sorted.
    """
    found, before = versions(), kept(results)
    stays = bool(before) and json.loads(results.read_text())["versions"] == found
    merged = {name: row for name, row in before.items() if stays and name.split(",")[0] in names}
    for name, row in rows.items():
        last = before.get(name, {}).get("ms")
        merged[name] = merged.get(name, {}) | row | ({"last": last} if "ms" in row and last else {})
    order = list(names)
    ordered = dict(sorted(merged.items(), key=lambda item: order.index(item[0].split(",")[0])))
    day = datetime.date.today().isoformat()
    results.write_text(json.dumps({"measured": day, "versions": found, "rows": ordered}, indent=1) + "\n")


def rounded(quartiles: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: [float(f"{t:.4g}") for t in values] for name, values in quartiles.items()}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "processor": processor()}
    return found | {name: version for name in PACKAGES if (version := installed(name))}


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
