"""The figure of `distributed.py`: the time of a gradient through many tasks, by their number and that of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

OURS, ALONE = "implicitdiff", "one process"
YTICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
COLORS = ("#1b7f79", "#d9683c", "#a8912a", "#7a7a7a")
Rows = dict[str, dict[str, Any]]


def draw(rows: Rows, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    titles = {row["title"].rpartition(", ")[0]: None for row in rows.values()}
    figure, axes = plt.subplots(1, len(titles), figsize=(10, 3.8), layout="constrained", squeeze=False)
    for axis, title in zip(axes[0], titles, strict=True):
        panel(axis, title, [row for row in rows.values() if row["title"].startswith(title)])
    axes[0, 0].set_ylabel("process time of the slowest process, ms")
    lines, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def panel(axis: Any, title: str, rows: list[dict[str, Any]]) -> None:
    worlds = sorted({row["ranks"] for row in rows})
    alone = [row for row in rows if row["ranks"] == worlds[-1]]
    line(axis, alone, ALONE, "torch.func.vmap, one process", color="#5c4b8b", marker="s")
    for ranks, color in zip(worlds, COLORS, strict=False):
        own = [row for row in rows if row["ranks"] == ranks]
        label = f"distributed.vmap, {ranks} process{'es' * (ranks > 1)}"
        line(axis, own, OURS, label, color=color, marker="o" if ranks > 1 else "^")
    last = max(alone, key=lambda row: row["tasks"])
    gain = last["ms"][ALONE][1] / last["ms"][OURS][1]
    axis.set_title(f"{title}\n{worlds[-1]} processes: {gain:.2g} times as fast at the right", fontsize=9)
    axis.set(xscale="log", yscale="log", xlabel="tasks")
    sizes = sorted({row["tasks"] for row in rows})
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.set_yticks(YTICKS, [str(ms) for ms in YTICKS])
    axis.set_ylim(*limits(rows))
    axis.minorticks_off()
    axis.grid(color="#dddddd", lw=0.5)


def limits(rows: list[dict[str, Any]]) -> tuple[float, float]:
    medians = [row["ms"][entry][1] for row in rows for entry in (OURS, ALONE)]
    return min(medians) / 1.3, max(medians) * 1.3


def line(axis: Any, rows: list[dict[str, Any]], entry: str, label: str, **style: str) -> None:
    ordered = sorted(rows, key=lambda row: row["tasks"])
    axis.plot([r["tasks"] for r in ordered], [r["ms"][entry][1] for r in ordered], lw=1.6, ms=4, label=label, **style)
