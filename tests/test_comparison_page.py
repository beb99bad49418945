"""The times in README.md and docs/comparison.md are those of docs/benchmarks.md."""

from __future__ import annotations

from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
PLACES = {
    "one problem of": "### One problem, of 1000 unknowns if not said",
    "1000 problems of": "### 1000 problems of 20 unknowns",
}


def rows_below(text: str, page: str) -> list[list[str]]:
    """The rows of the first table after a line, or of the table whose head the line is; an entry for each column."""
    lines = [text, *page.partition(f"\n{text}\n")[2].splitlines()]
    first = next(n for n, line in enumerate(lines) if line.startswith("|"))
    table = lines[first + 2 :]
    last = next((n for n, line in enumerate(table) if not line.startswith("|")), len(table))
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[:last]]


def ratios(heading: str, page: str) -> dict[tuple[str, str], float]:
    """The ratios by what is computed and beside what; a row without a name goes on with the last one."""
    found, name = {}, ""
    for row in rows_below(heading, page):
        name, beside, ratio = row[0] or name, row[-4], row[-2].strip("*")
        if ratio:
            found[name, beside] = float(ratio)
    return found


COMPARED = rows_below("## Time", (DOCS / "comparison.md").read_text())
HEAD = "| computation | beside | time, ours / its |"
QUOTED = sorted({tuple(row) for row in (*COMPARED, *rows_below(HEAD, (DOCS.parent / "README.md").read_text()))})


@pytest.mark.parametrize(("computation", "beside", "ratio"), QUOTED)
def test_a_ratio_is_that_of_the_benchmarks(computation: str, beside: str, ratio: str) -> None:
    benchmarks = (DOCS / "benchmarks.md").read_text()
    name, _, size = computation.rpartition(", ")
    heading = next((heading for start, heading in PLACES.items() if size.startswith(start)), None)
    if heading is None:
        measured = ratios("## Derivatives", benchmarks)[computation, beside]
    else:
        table = ratios(heading, benchmarks)
        unknowns = size.partition(" of ")[2]
        measured = table[(name, beside) if (name, beside) in table else (f"{name}, {unknowns}", beside)]
    # The page says when it was measured. A later measurement may differ by the noise of a machine, and not by more.
    assert float(ratio) == pytest.approx(measured, rel=0.5)
