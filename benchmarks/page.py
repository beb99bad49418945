"""Write ``docs/benchmarks.md`` from the results in this folder, whose numbers are the only ones there.

python benchmarks/page.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs/benchmarks.md"
OURS, ALONE = "implicitdiff", "one process"
# What is under it cannot be told from nothing: the kernel counts pages in portions.
LEAST_MIB = 0.25
JAX = ("jaxopt", "optimistix", "lineax")
Rows = dict[str, dict[str, Any]]

HEAD = """\
# Benchmarks

Each row is one computation. This library does it, other libraries do it, and plain torch does it by hand. Before a
computation is timed, its numbers are compared with a closed form or with those by hand, or its residual is compared
with a target.

Unless a row says otherwise, everything runs in float64, on one thread of one core, in turns. A time is the median of
the process time of a call. JAX's times are those of compiled programs, without the compilation. Read the ratio "ours /
its": above 1 this library is slower, and the ratio is **bold**. "Last" is the ratio of the previous measurement.

To measure on your machine and write this page again:

```sh
python3 -m nox -s bench-peers -- --save
python3 -m nox -s bench-loops -- --save
python3 -m nox -s bench-growth -- --save
python3 -m nox -s bench-distributed -- --save
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
LOOPS = """
## Loops

From `benchmarks/loops.py`: the time of a search, and of its gradient where a row says so. Each library has the loosest
tolerance with which its residual, measured alike for all, reaches the same target; its solution is compared with that
of SciPy or a closed form. Here the ratio is "its / ours", in process time and in wall time: below 1 this library is
slower, and the ratio is **bold**. "First" is what JAX's compilation takes, and for this library what the first call of
a solver takes beyond a later one.
"""
MODES = f"""
"{OURS}, off" is this library with `compile="off"`, whose loop runs operation by operation, and "{OURS}, always" with
`compile="always"`; its other times are those of the default.
"""
SHARES = """
Where the time of this library goes: in the machine, which runs the loop; in the call of the function that is watched
for captured tensors; in the set-up of the derivative, with a second look at the function; in the backward pass. The
rest is Python of the library and the last evaluation of the error.
"""
CURVES = """
The time of one problem, by the number of problems in a call and by that of unknowns:

![Time of one problem by the number of problems in a call and by that of unknowns, beside
JAXopt](_static/loops.png)
"""
GROWTH = """
## Growth

From `benchmarks/growth.py`, which fails if a time grows faster over the last decade than the method predicts.

![Time of a solution with its gradient by unknowns, by problems in a batch and by parameters, beside plain
torch](_static/growth.svg)
"""
DISTRIBUTED = """
## Several processes

From `benchmarks/distributed.py`: the gradient of the mean loss of many ridge regressions of 50 rows and 20 unknowns, by
`distributed.vmap` in processes of one thread, beside `torch.func.vmap` in one of these processes, whose gradient is the
same to 1e-12. Times of several processes are those of the slowest one. Here the ratio is "one process / ours", in
process time and in wall time: below 1 the several processes are slower, and the ratio is **bold**. A process sends the
messages and the kilobytes of the last columns in each call; a message is a collective or the header of one.
"""
DISTRIBUTED_FIGURE = """
![Time of a gradient through many tasks by the number of tasks and of processes](_static/distributed.png)
"""
LOSSES = """
## Why small problems are slow

A search runs in [compiled code](compiled.md), but a call of this library is Python around this code: the function is
watched and fingerprinted, its operands are found, the error is measured once more, and the derivative is set up. JAX
compiles all of this into one program. So small problems lose most: the rows with n = 10 show the cost of a call. The
larger the operations, the smaller the ratio, as the figure shows beside plain torch. At the largest sizes the rest of
the ratio is further passes over the data: the function is evaluated again, to differentiate it and to check the
solution and the linear solve. The code by hand does not check.

In a batch the machine runs blocks of 8 problems, each block to its own end. An iteration executes some 50 instructions
of the stopping rule beside those of the function. They dominate where the function has a few operations on a few
numbers, as in `bisection` of scalars, and vanish where it has matrices. JAX fuses such operations.
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


def loops(rows: Rows) -> str:
    timed = [row for row in rows.values() if "ms" in row]
    lines = [line for row in timed for line in search(row)]
    head = ("search", "threads", "ours, ms", "first, ms", "beside", "its ms", "first, ms", "its / ours", "wall")
    modes = any(f"{OURS}, off" in row["ms"] for row in timed)
    return (
        LOOPS + MODES * modes + table(head, *lines) + shares(timed) + CURVES * any("curves" in r for r in rows.values())
    )


def shares(rows: list[dict[str, Any]]) -> str:
    """Where the time of the rows goes that were measured on one thread."""
    told = [(row["title"], row["shares"]) for row in rows if row["threads"] == 1 and "shares" in row]
    if not told:
        return ""
    lines = [(title, *map(percent, found.values()), percent(1 - sum(found.values()))) for title, found in told]
    return SHARES + table(("search", *told[0][1], "rest"), *lines)


def percent(share: float) -> str:
    return f"{share:.0%}"


def search(row: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The lines of a row of loops: ours, and for each other entry its time and ratios."""
    ms, first = row["ms"], row["first_ms"]
    left = row["title"], str(row["threads"]), number(ms[OURS][1]), number(first[OURS])
    for entry in [name for name in ms if name != OURS] or [""]:
        its = (number(ms[entry][1]), number(first[entry])) if entry else ("", "")
        yield (*left, entry, *its, *(behind(ratio(row[clock], entry)) for clock in ("ms", "wall_ms")))
        left = ("",) * len(left)
    for entry in [name for name in row["of_target"] if name not in ms]:
        yield (*left, entry, "missed", "", "", "")


def behind(ours_over_its: float | None) -> str:
    """The other ratio, bold where this library is slower."""
    if ours_over_its is None:
        return ""
    text = number(1 / ours_over_its)
    return f"**{text}**" if ours_over_its > 1 else text


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


def distributed(rows: Rows) -> str:
    """The section on several processes: from which size they pay, and all figures."""
    lines = [
        (
            row["title"],
            str(row["ranks"]),
            number(row["ms"][ALONE][1]),
            number(row["ms"][OURS][1]),
            *(behind(ratio(row[clock], ALONE)) for clock in ("ms", "wall_ms")),
            str(row["collectives"] + row["headers"]),
            number(row["bytes"] / 1000),
        )
        for row in rows.values()
    ]
    head = ("computation", "processes", "one process, ms", "ours, ms", "one / ours", "wall", "messages", "kB")
    return DISTRIBUTED + load(rows) + pays_from(rows) + table(head, *lines) + DISTRIBUTED_FIGURE


def load(rows: Rows) -> str:
    """How busy the machine was, where it was too busy for wall times."""
    loads, cores = [row["load"] for row in rows.values()], next(iter(rows.values()))["cores"]
    span = f"{min(loads):g} to {max(loads):g} on {cores} cores"
    busy = max(loads) > cores + 1
    return f"\nThe load of the machine was {span}: wall times say little here.\n" if busy else ""


def pays_from(rows: Rows) -> str:
    """The number of tasks from which on several processes take less process time each than one alone."""
    groups: dict[tuple[str, int], dict[int, float]] = {}
    for row in rows.values():
        if row["ranks"] > 1:
            gains = groups.setdefault((row["title"].rpartition(", ")[0], row["ranks"]), {})
            gains[row["tasks"]] = row["ms"][ALONE][1] / row["ms"][OURS][1]
    told = []
    for (title, ranks), gains in groups.items():
        slower = [tasks for tasks, gain in gains.items() if gain <= 1]
        enough = [tasks for tasks in gains if tasks > max(slower, default=0)]
        largest = max(gains)
        pays = f"from {min(enough)} tasks on" if enough else "at none of these sizes"
        told.append(f"- {title}: {ranks} processes pay {pays}; {gains[largest]:.2g} times as fast at {largest}")
    return "\nBy process time:\n\n" + "\n".join(told) + "\n" if told else ""


SECTIONS: dict[str, list[Callable[[Rows], str]]] = {
    "peers.json": [derivatives, memory],
    "stages.json": [stages],
    "solvers.json": [families],
    "loops.json": [loops],
    "growth.json": [growth],
    "distributed.json": [distributed],
}
TITLES = {
    "peers.json": DERIVATIVES,
    "stages.json": STAGES,
    "solvers.json": FAMILIES,
    "loops.json": LOOPS,
    "growth.json": GROWTH.split("\n!")[0],
    "distributed.json": DISTRIBUTED,
}


def machines(results: dict[str, dict[str, Any]]) -> str:
    """What was measured where, and with which versions."""
    files: dict[str, list[str]] = {}
    for name, found in results.items():
        versions = dict(found["versions"])
        where = f"{versions.pop('processor')}; Python {versions.pop('python')}, "
        told = f"measured on {found['measured']}, on {where}" + ", ".join(map(" ".join, versions.items()))
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
