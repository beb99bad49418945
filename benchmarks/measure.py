"""Rows of a table measured in turns, so that whatever else the machine does meets them all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

Run = Callable[[], object]
Clock = Callable[[], float]
# From how many seconds on a call is too long for cold caches to matter.
COLD = 0.1


def quartiles(
    runs: Mapping[str, Run], calls: Mapping[str, int], turns: int, clock: Clock = time.process_time
) -> dict[str, list[float]]:
    """The quartiles of the milliseconds of each call, as `on_clocks`."""
    return on_clocks(runs, calls, turns, {"": clock})[""]


def on_clocks(
    runs: Mapping[str, Run], calls: Mapping[str, int], turns: int, clocks: Mapping[str, Clock]
) -> dict[str, dict[str, list[float]]]:
    """The quartiles of the milliseconds of each call, on each of the clocks.

    The runs take turns. A turn is a call that is not counted, since what ran before leaves the caches cold, and the
    mean of some that are.
    """
    times: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in runs} for clock in clocks}
    first = times[next(iter(clocks))]
    for _ in range(turns):
        for name, run in runs.items():
            if calls[name] > 1 or not first[name] or first[name][-1] < 1e3 * COLD:
                run()
            began = [clock() for clock in clocks.values()]
            for _ in range(calls[name]):
                run()
            for (label, clock), start in zip(clocks.items(), began, strict=True):
                times[label][name].append(1e3 * (clock() - start) / calls[name])
    return {
        label: {name: statistics.quantiles(measured, n=4) for name, measured in found.items()}
        for label, found in times.items()
    }


def timed(runs: Mapping[str, Run], budget: float, turns: int) -> dict[str, list[float]]:
    """The quartiles, with as many calls as the turns of one run take `budget` seconds of process time with."""
    calls = {}
    for name, run in runs.items():
        began = time.process_time()
        run()
        calls[name] = max(1, min(200, int(budget / turns / max(time.process_time() - began, 1e-6))))
    return quartiles(runs, calls, turns)


def measure(title: str, rows: dict[str, Run], repetitions: int = 21, calls: int = 5) -> None:
    """Print the milliseconds of every row, and its ratio to the first."""
    for run in (run for run in rows.values() for _ in range(3)):
        run()
    times = quartiles(rows, dict.fromkeys(rows, calls), repetitions, time.perf_counter)
    base = next(iter(times.values()))[1]
    print(f"\n{title}\n\n{'':58s} {'median ms':>10s} {'quartiles':>18s} {'ratio':>7s}")
    for name, (low, middle, high) in times.items():
        print(f"{name:58s} {middle:10.3f} {low:8.3f} .. {high:6.3f} {middle / base:7.2f}", flush=True)
