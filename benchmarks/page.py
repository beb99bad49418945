"""Write ``docs/benchmarks.md`` from the results in this folder, whose numbers are the only ones there.

python benchmarks/page.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs/benchmarks.md"
OURS = "implicitdiff"
# What is under it cannot be told from nothing: the kernel counts pages in portions.
LEAST_MIB = 0.25
JAX = ("jaxopt", "optimistix", "lineax")
Rows = dict[str, dict[str, Any]]

HEAD = """\
# Benchmarks

Each row is one computation. This library does it, other libraries do it, and plain torch does it by hand. Before a
computation is timed, its numbers are compared with a closed form or with those by hand, or its residual is compared
with a target.

Unless a row says otherwise, everything runs in float64, on one thread, in turns. A time is the median of the process
time of a call. JAX's times are those of compiled programs, without the compilation. Read the ratio "ours / its": above
1 this library is slower, and the ratio is **bold**. "Last" is the ratio of the previous measurement.

To measure on your machine and write this page again:

```sh
python3 -m nox -s bench-peers -- --save
python3 -m nox -s bench-growth -- --save
```
"""
MISSING = "\nNot measured yet.\n"
DERIVATIVES = """
## Derivatives

From `benchmarks/peers.py`. "By hand" is the same mathematics in plain torch, written for this one problem. It checks
neither convergence nor arguments nor the derivative, and has no further derivatives.
"""
STAGES = """
## A small call

From `benchmarks/stages.py`: the time of each stage of one call, without the stages inside of it. No stage dominates.
Each stage is some ten to thirty operations of torch or calls of Python. Thanks to the stages that check (variables,
watched evaluations, their comparison), a function that would lead to a wrong gradient raises an error.
"""
MEMORY = f"""
## Memory

The rise of the peak of resident memory during one call that follows another, each in a fresh process. A rise of less
than {LEAST_MIB} MiB cannot be measured.
"""
ITERATIONS = """
The gradient of a fixed point of 2^22 unknowns in float32 (16 MiB), by the number of iterations. The implicit gradient
keeps the solution, the unrolled one keeps every iterate.
"""
FAMILIES = """
## Solvers

From `benchmarks/solvers.py`: the time to the same residual, 1e-8, or 1e-6 for first-order methods and quadratic
programs. A solver that does not reach the residual is not timed, and its entry says "missed". Gradients are those of
the sum of the solution, and agree with closed forms to 1e-5. "Iterations" are those of this library: the median and the
largest of all problems.
"""
GROWTH = """
## Growth

From `benchmarks/growth.py`, which fails if a time grows faster over the last decade than the method predicts.

![Time of a solution with its gradient by unknowns, by problems in a batch and by parameters, beside plain
torch](_static/growth.svg)
"""
LOSSES = """
## Why small problems are slow

An iteration of this library is Python that calls torch, operation by operation. A call costs microseconds, and more
under `vmap` and `grad`. JAX compiles the whole loop into one program. So small problems lose most: the rows with n = 10
show the cost of a derivative of the smallest problem. The larger the operations, the smaller the ratio, as the figure
shows beside plain torch. At the largest sizes the rest of the ratio is further passes over the data: the function is
evaluated again, to differentiate it and to check the solution and the linear solve. The code by hand does not check.

The problems of a batch share the Python, and take as long as the slowest of them. Methods with few, expensive
iterations (`newton`, `newton_cg`, `qp`) lose less than methods with many cheap ones (`fixed_point_iteration`,
`bisection`).
"""


def number(value: float) -> str:
    """Three digits, and no exponent."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def median(ms: dict[str, list[float]], entry: str) -> float | None:
    return ms[entry][1] if entry in ms else None


def ratio(ms: dict[str, list[float]], entry: str) -> float | None:
    ours, its = median(ms, OURS), median(ms, entry)
    return ours / its if ours and its else None


def shown(value: float | None, mark: bool = False) -> str:
    if value is None:
        return ""
    text = f"{value:.2f}" if value < 10 else number(value)
    return f"**{text}**" if mark and float(text.replace(",", "")) > 1 else text


def table(*lines: tuple[str, ...]) -> str:
    head, *rest = lines
    return "\n" + "\n".join(f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *rest)) + "\n"


def beside(row: dict[str, Any], *left: str) -> Iterator[tuple[str, ...]]:
    """The lines of a row: ours, and for each other entry its time, the ratio, and that of the last run."""
    ms, missed = row["ms"], row.get("missed", {})
    left = (*left, time(OURS, ms, missed))
    for entry in [name for name in (*ms, *missed) if name != OURS] or [""]:
        ratios = shown(ratio(ms, entry), mark=True), shown(ratio(row.get("last", {}), entry))
        yield (*left, entry, time(entry, ms, missed), *ratios)
        left = ("",) * len(left)


def time(entry: str, ms: dict[str, list[float]], missed: dict[str, float]) -> str:
    return number(ms[entry][1]) if entry in ms else f"missed: {missed[entry]:.1e}" if entry in missed else ""


def count(rows: Rows, entries: list[str]) -> tuple[int, int]:
    """In how many comparisons ours is the slower one, and of how many."""
    ratios = [ratio(row["ms"], entry) for row in rows.values() for entry in entries]
    there = [value for value in ratios if value is not None]
    return sum(value > 1 for value in there), len(there)


def losses(rows: Rows) -> str:
    entries = sorted({entry for row in rows.values() for entry in row["ms"] if not entry.startswith(OURS)})
    by_jax = [entry for entry in entries if entry.startswith(JAX)]
    rest = [entry for entry in entries if entry not in ("by hand", *by_jax)]
    kinds = {"plain torch by hand": ["by hand"], "compiled JAX": by_jax, ", ".join(rest): rest}
    counts = {kind: count(rows, which) for kind, which in kinds.items()}
    told = [f"- {slower} of {total} with {kind}" for kind, (slower, total) in counts.items() if total]
    return "\nThe comparisons in which this library is the slower one:\n\n" + "\n".join(told) + "\n"


def derivatives(rows: Rows) -> str:
    timed = {name: row for name, row in rows.items() if "ms" in row}
    lines = [line for row in timed.values() for line in beside(row, row["title"])]
    head = ("computation", "ours, ms", "beside", "its ms", "ours / its", "last")
    return DERIVATIVES + losses(timed) + table(head, *lines)


def stages(rows: Rows) -> str:
    wholes = [sum(row["us"].values()) for row in rows.values()]
    names = sorted(next(iter(rows.values()))["us"], key=lambda name: -sum(row["us"][name] for row in rows.values()))
    lines = [(name, *(f"{row['us'][name]:.0f}" for row in rows.values())) for name in names]
    titles = [row["title"].removesuffix(", n = 10") for row in rows.values()]
    return STAGES + table(("microseconds, n = 10", *titles), *lines, ("**all**", *(f"{t:.0f}" for t in wholes)))


def mib(value: float) -> str:
    return f"< {LEAST_MIB}" if value < LEAST_MIB else number(value)


def memory(rows: Rows) -> str:
    flat = {name: row for name, row in rows.items() if "MiB" in row and not name.startswith("iterations")}
    lines = []
    for row in flat.values():
        left = row["title"], mib(row["MiB"][OURS])
        for entry in [name for name in row["MiB"] if name != OURS]:
            lines.append((*left, entry, mib(row["MiB"][entry])))
            left = "", ""
    growing = {name.split("_")[1]: row["MiB"] for name, row in rows.items() if name.startswith("iterations")}
    if not lines or not growing:
        return MEMORY + MISSING
    entries = list(next(iter(growing.values())))
    counts = [(entry, *(f"{peaks[entry]:.0f}" for peaks in growing.values())) for entry in entries]
    head = ("computation", "ours, MiB", "beside", "its MiB")
    return MEMORY + table(head, *lines) + ITERATIONS + table(("iterations, MiB", *growing), *counts)


def families(rows: Rows) -> str:
    parts = [FAMILIES, losses(rows)]
    for batch, title in ((False, "One problem, of 1000 unknowns if not said"), (True, "1000 problems of 20 unknowns")):
        lines = []
        for name, row in rows.items():
            if row["batch"] == batch:
                size = f", {row['unknowns']} unknowns" if not batch and row["unknowns"] != 1000 else ""
                middle, most = row["iterations"]
                label = f"`{name.split(',')[0]}`{', gradient' * (', gradient' in name)}{size}"
                lines += beside(row, label, f"{middle:.0f}, {most}")
        head = ("solver", "iterations", "ours, ms", "beside", "its ms", "ours / its", "last")
        parts += [f"\n### {title}\n", table(head, *lines)]
    return "".join(parts)


def growth(rows: Rows) -> str:
    lines = [
        (
            f"{row['title']}, to {row['sizes'][-1]:,} {row['axis']}",
            str(row["exponent"]),
            *(f"{row['slopes'][entry]:.2f}" for entry in (OURS, "by hand")),
            number(row["curves"][OURS][-1]),
            number(row["curves"]["by hand"][-1]),
        )
        for row in rows.values()
    ]
    head = ("slope of the last decade", "method", "ours", "by hand", "ours at the end, ms", "by hand")
    return GROWTH + table(head, *lines)


SECTIONS: dict[str, list[Callable[[Rows], str]]] = {
    "peers.json": [derivatives, memory],
    "stages.json": [stages],
    "solvers.json": [families],
    "growth.json": [growth],
}
TITLES = {
    "peers.json": DERIVATIVES,
    "stages.json": STAGES,
    "solvers.json": FAMILIES,
    "growth.json": GROWTH.split("\n!")[0],
}


def machines(results: dict[str, dict[str, Any]]) -> str:
    """What was measured where, and with which versions."""
    files: dict[str, list[str]] = {}
    for name, found in results.items():
        versions = dict(found["versions"])
        where = f"{versions.pop('processor')}; Python {versions.pop('python')}, "
        told = f"measured on {found['measured']}, on one core of {where}" + ", ".join(map(" ".join, versions.items()))
        files.setdefault(told, []).append(f"`{name}`")
    return "\n" + "\n".join(f"- {', '.join(names)}: {told}." for told, names in files.items()) + "\n"


def page(folder: Path) -> str:
    """The page, from the results in the folder."""
    files = [folder / name for name in SECTIONS]
    results = {path.name: json.loads(path.read_text()) for path in files if path.exists()}
    parts = [HEAD, machines(results)]
    for name, sections in SECTIONS.items():
        there = name in results
        parts += [section(results[name]["rows"]) for section in sections] if there else [TITLES[name], MISSING]
    return "".join([*parts, LOSSES])


if __name__ == "__main__":
    PAGE.write_text(page(Path(__file__).parent))
