"""Rows of a table measured in turns, so that whatever else the machine does meets them all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def measure(title: str, rows: dict[str, Callable[[], object]], repetitions: int = 21, calls: int = 5) -> None:
    """Print the milliseconds of every row, and its ratio to the first.

    The rows take turns. A turn is a call that is not counted, since what ran before leaves the caches cold, and the
    mean of some that are.
    """
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(repetitions + 3):
        for name, run in rows.items():
            run()
            began = time.perf_counter()
            for _ in range(calls):
                run()
            times[name].append(1e3 * (time.perf_counter() - began) / calls)
    base = statistics.median(next(iter(times.values()))[3:])
    print(f"\n{title}\n\n{'':58s} {'median ms':>10s} {'quartiles':>18s} {'ratio':>7s}")
    for name, measured in times.items():
        low, middle, high = statistics.quantiles(measured[3:], n=4)
        print(f"{name:58s} {middle:10.3f} {low:8.3f} .. {high:6.3f} {middle / base:7.2f}", flush=True)
