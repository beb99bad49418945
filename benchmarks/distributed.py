"""What `implicitdiff.distributed.vmap` gains: many small problems and a gradient through them, on several processes.

A row is a number of ridge regressions of 50 rows and 20 unknowns, and the gradient of their mean validation loss in
what they share, a penalty and a center. They are solved in three ways: by `lbfgs`, by a Cholesky factorisation under
`custom_root`, and by five steps of Adam (MAML). The processes have one thread each, and a core each as far as there are
cores. Beside them the first process computes the same alone by `torch.func.vmap`, while the others wait; its gradient
has to agree to RTOL before anything is timed.

Both take turns. Times are medians of TURNS turns, with quartiles: process time, that of the slowest process, and wall
time. Where other programs use the cores, as the load of the machine tells, the process time alone says something. A
ratio is the time of one process over ours: above 1 ours is faster. Messages and bytes are those that a process sends in
a call.

    python benchmarks/distributed.py [--save] [--ranks 1 2] [--tasks 64 256] [row ...]
    python benchmarks/distributed.py --draw

With ``--save`` the results go to ``benchmarks/distributed.json`` and into the figure ``docs/_static/distributed.png``,
which ``--draw`` makes again without measuring.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import _report
import torch
import torch.distributed as c10d
from _distributed_figure import draw
from torch import Tensor
from torch.func import grad

from implicitdiff import adam, apply_updates, custom_root, distributed, unroll
from implicitdiff.linear_solve import solve_cholesky
from implicitdiff.solvers import lbfgs

RESULTS = Path(__file__).with_name("distributed.json")
FIGURE = Path(__file__).parents[1] / "docs/_static/distributed.png"
OURS, ALONE = "implicitdiff", "one process"
TASKS, ROWS, COLUMNS, INNER_STEPS = (64, 256, 1024, 2048, 4096), 50, 20, 5
RTOL = 1e-12
TURNS, TURN = 9, 0.05
"""The turns of an entry, and about how many seconds one takes."""
CLOCKS = {"ms": time.process_time, "wall_ms": time.perf_counter}
COLLECTIVES = ("all_reduce", "all_gather", "broadcast")

Shared = dict[str, Tensor]
Data = tuple[Tensor, ...]
Fit = Callable[[Shared, Tensor, Tensor], Tensor]


# --- tasks ------------------------------------------------------------------------------------------------------------


def objective(w: Tensor, shared: Shared, x: Tensor, y: Tensor) -> Tensor:
    return ((x @ w - y) ** 2).mean() / 2 + shared["log_penalty"].exp() / 2 * ((w - shared["center"]) ** 2).sum()


fit_by_lbfgs = lbfgs(objective)


@custom_root(grad(objective), solve=solve_cholesky())
def by_cholesky(init: None, shared: Shared, x: Tensor, y: Tensor) -> Tensor:
    penalty = shared["log_penalty"].exp()
    matrix = x.mT @ x / ROWS + penalty * torch.eye(COLUMNS)
    right = (x.mT @ y[..., None])[..., 0] / ROWS + penalty * shared["center"]
    return torch.cholesky_solve(right[..., None], torch.linalg.cholesky(matrix))[..., 0]


def by_adam(shared: Shared, x: Tensor, y: Tensor) -> Tensor:
    init, update = adam(lr=0.1)

    def step(carry: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        w, state = carry
        updates, state = update(grad(objective)(w, shared, x, y), state)
        return apply_updates(w, updates), state

    w: Tensor = unroll(step, INNER_STEPS)((shared["center"], init(shared["center"])))[0]
    return w


FITS: dict[str, Fit] = {
    "lbfgs": lambda shared, x, y: fit_by_lbfgs.run(torch.zeros(COLUMNS), shared, x, y)[0],
    "custom_root": lambda shared, x, y: by_cholesky(None, shared, x, y),
    "MAML": by_adam,
}
TITLES = {"lbfgs": "lbfgs", "custom_root": "custom_root, Cholesky", "MAML": f"MAML, {INNER_STEPS} steps of Adam"}


def data(tasks: int) -> Data:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, tasks, ROWS, COLUMNS, generator=generator)
    w = torch.randn(tasks, COLUMNS, generator=generator)
    y = torch.einsum("htrc,tc->htr", x, w) + 0.5 * torch.randn(2, tasks, ROWS, generator=generator)
    return x[0], y[0], x[1], y[1]


def gradient(fit: Fit, over: Callable[..., Any], tasks: Data) -> Callable[[], Shared]:
    shared = {"log_penalty": torch.tensor(-2.0), "center": torch.zeros(COLUMNS)}

    def loss_of_one(shared: Shared, x: Tensor, y: Tensor, x_new: Tensor, y_new: Tensor) -> Tensor:
        return ((x_new @ fit(shared, x, y) - y_new) ** 2).mean()

    def mean_loss(shared: Shared) -> Tensor:
        mean: Tensor = over(loss_of_one, in_dims=(None, 0, 0, 0, 0))(shared, *tasks).mean()
        return mean

    return lambda: grad(mean_loss)(shared)


# --- measuring, in each process ---------------------------------------------------------------------------------------


def measured(name: str, tasks: int) -> dict[str, Any]:
    operands = data(tasks)
    calls = {OURS: gradient(FITS[name], distributed.vmap, operands)}
    calls[ALONE] = gradient(FITS[name], torch.func.vmap, operands) if c10d.get_rank() == 0 else lambda: {}
    found, expected = (call() for call in calls.values())
    if expected and not agree(found, expected):
        raise AssertionError(f"{name}, {tasks} tasks: several processes have another gradient than one")
    times = in_turns(calls, {entry: calls_of_a_turn(call) for entry, call in calls.items()})
    with counted() as sent:
        calls[OURS]()
    title = f"{TITLES[name]}, {tasks} tasks"
    machine = {"ranks": c10d.get_world_size(), "cores": len(ALLOWED), "load": round(os.getloadavg()[0], 1)}
    return {"title": title, "tasks": tasks, **machine, **times, **sent}


def agree(found: Shared, expected: Shared) -> bool:
    return all((found[key] - expected[key]).norm() <= RTOL * expected[key].norm() for key in expected)


def calls_of_a_turn(call: Callable[[], Any]) -> int:
    began = time.process_time()
    call()
    return int(of_all(max(1.0, TURN // max(time.process_time() - began, 1e-6)), c10d.ReduceOp.MIN))


def of_all(value: float, op: Any = c10d.ReduceOp.MAX) -> float:
    """The largest, or the smallest, of what the processes have."""
    told = torch.tensor(value)
    c10d.all_reduce(told, op=op)
    return told.item()


def in_turns(calls: dict[str, Callable[[], Any]], counts: dict[str, int]) -> dict[str, dict[str, list[float]]]:
    """The quartiles of the milliseconds of each call, by clock, of the process that takes longest."""
    times: dict[str, dict[str, list[float]]] = {clock: {entry: [] for entry in calls} for clock in CLOCKS}
    for _ in range(TURNS):
        for entry, call in calls.items():
            call()  # what ran before leaves the caches cold
            c10d.barrier()
            began = [clock() for clock in CLOCKS.values()]
            for _ in range(counts[entry]):
                call()
            spent = [clock() - start for clock, start in zip(CLOCKS.values(), began, strict=True)]
            for clock, seconds in zip(CLOCKS, spent, strict=True):
                times[clock][entry].append(1e3 * of_all(seconds) / counts[entry])
    return {
        clock: _report.rounded({entry: statistics.quantiles(ms, n=4) for entry, ms in found.items()})
        for clock, found in times.items()
    }


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Count the collectives of this process, and the bytes that it sends: of headers, of tensors."""
    sent = {"headers": 0, "collectives": 0, "bytes": 0}
    originals = {name: getattr(c10d, name) for name in COLLECTIVES}
    for name, original in originals.items():
        setattr(c10d, name, counting(original, sent))
    try:
        yield sent
    finally:
        for name, original in originals.items():
            setattr(c10d, name, original)


def counting(original: Callable[..., Any], sent: dict[str, int]) -> Callable[..., Any]:
    def run(first: Any, *rest: Any, **options: Any) -> Any:
        tensor = rest[0] if rest and isinstance(rest[0], Tensor) else first
        is_header = tensor.dtype is torch.int64
        sent["headers" if is_header else "collectives"] += 1
        sent["bytes"] += tensor.nbytes
        return original(first, *rest, **options)

    return run


# --- processes --------------------------------------------------------------------------------------------------------


def process(rank: int, ranks: int, store: str, chosen: list[str], sizes: list[int], results: Any) -> None:
    """What a process runs; the first one puts its rows into the queue."""
    _report.keep_threads()
    keep_core(rank)
    torch.set_default_dtype(torch.float64)
    c10d.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    rows = {}
    for name in chosen:
        for tasks in sizes:
            rows[f"{name}, {tasks} tasks, {ranks} ranks"] = row = measured(name, tasks)
            if rank == 0:
                show(row)
    if rank == 0:
        results.put(rows)
    c10d.destroy_process_group()


ALLOWED = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def keep_core(rank: int) -> None:
    if ALLOWED:
        os.sched_setaffinity(0, {ALLOWED[-1 - rank % len(ALLOWED)]})


def measure(ranks: int, chosen: list[str], sizes: list[int]) -> _report.Rows:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        options = str(Path(folder) / "store"), chosen, sizes, results
        processes = [context.Process(target=process, args=(rank, ranks, *options)) for rank in range(ranks)]
        for one in processes:
            one.start()
        for one in processes:
            one.join()
    if any(one.exitcode for one in processes):
        raise SystemExit("a process has failed")
    rows: _report.Rows = results.get()
    return rows


def show(row: dict[str, Any]) -> None:
    cells = f"{row['title']:44s} {row['ranks']:2d} ranks"
    for label, clock in (("CPU", "ms"), ("wall", "wall_ms")):
        for entry in (ALONE, OURS):
            low, middle, high = row[clock][entry]
            cells += f" {label} {entry[:4]} {middle:8.2f} [{low:7.2f} {high:7.2f}]"
        cells += f" ratio {row[clock][ALONE][1] / row[clock][OURS][1]:5.2f};"
    sent = f"{row['collectives']} collectives, {row['headers']} headers, {row['bytes']} bytes"
    print(f"{cells} {sent}; load {row['load']}", flush=True)


def main() -> None:
    parser = _report.arguments(__doc__, FITS, RESULTS)
    cores = len(ALLOWED) or os.cpu_count() or 1
    parser.add_argument("--ranks", nargs="+", type=int, default=sorted({1, 2, cores}), help="numbers of processes")
    parser.add_argument("--tasks", nargs="+", type=int, default=list(TASKS), help="numbers of tasks")
    parser.add_argument("--draw", action="store_true", help=f"draw {FIGURE.name} from {RESULTS.name}")
    options = parser.parse_args()
    if not options.draw:
        chosen = _report.chosen(parser, options.rows, FITS)
        results: _report.Rows = {}
        for ranks in options.ranks:
            results |= measure(ranks, chosen, options.tasks)
        if options.save:
            _report.save(RESULTS, results, FITS)
    if options.save or options.draw:
        draw(_report.kept(RESULTS), FIGURE)


if __name__ == "__main__":
    main()
