"""The figure of `loops.py`: the time of a problem by the number of problems in a call, and by that of unknowns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

OURS, EAGER = "implicitdiff", "implicitdiff, off"
STYLES = {
    EAGER: {"label": "this library, eager", "color": "#5c4b8b", "marker": "s"},
    OURS: {"label": "this library", "color": "#1b7f79", "marker": "o"},
    "jaxopt": {"label": "JAXopt, compiled", "color": "#d9683c", "marker": "^"},
}


def draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, len(rows), figsize=(10, 4), layout="constrained", squeeze=False)
    for axis, row in zip(axes[0], rows.values(), strict=True):
        panel(axis, row)
    axes[0, 0].set_ylabel("time of one problem (process time), ms")
    figure.suptitle(seen(list(rows.values())), fontsize=11)
    lines, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def panel(axis: Any, row: dict[str, Any]) -> None:
    for name, times in row["curves"].items():
        axis.plot(row["sizes"], times, lw=1.6, ms=4, **style(name, EAGER in row["curves"]))
    first, *_, last = quotients(row)
    beside = f"ours / JAXopt: {short(first)} at the left, {short(last)} at the right"
    axis.set_title(f"{row['title']}\n{beside}", fontsize=9)
    axis.set(xscale="log", yscale="log", xlabel=row["axis"])
    axis.grid(color="#dddddd", lw=0.5)


def style(name: str, modes: bool) -> dict[str, str]:
    if name == OURS and modes:
        return STYLES[OURS] | {"label": "this library, compiled"}
    return STYLES[name.split(".")[0]]


def quotients(row: dict[str, Any]) -> list[float]:
    """Our time over JAXopt's, by size."""
    its = next(times for name, times in row["curves"].items() if name.startswith("jaxopt"))
    return [ours / theirs for ours, theirs in zip(row["curves"][OURS], its, strict=True)]


def seen(rows: list[dict[str, Any]]) -> str:
    """What the figure shows."""
    beside = [quotient for row in rows for quotient in quotients(row)]
    gains = [
        eager / ours
        for row in rows
        for eager, ours in zip(row["curves"].get(EAGER, []), row["curves"][OURS], strict=False)
    ]
    gained = f"; its compiled loop is {span(gains)} times as fast as the eager one" if gains else ""
    return f"This library takes {span(beside)} times the time of JAXopt{gained}"


def span(values: list[float]) -> str:
    return f"{short(min(values))} to {short(max(values))}"


def short(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"
