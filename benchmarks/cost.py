"""What a derivative costs: implicit against unrolled, in time and in memory.

Prints two tables. Times are medians over interleaved repetitions, with the quartiles; what counts is the ratio of two
rows of one run, since machines differ and are shared. Memory is the peak that PyTorch's allocations reach in a fresh
process, over what the process had before.

    python benchmarks/cost.py
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jacrev

from implicitdiff import custom_fixed_point

N = 10
GENERATOR = torch.Generator().manual_seed(0)
W = torch.randn(N, N, dtype=torch.float64, generator=GENERATOR) / (1.5 * N**0.5)
X = torch.randn(N, dtype=torch.float64, generator=GENERATOR)


def step(z: Tensor, x: Tensor, w: Tensor = W) -> Tensor:
    return torch.tanh(z @ w.T + x)


def newton(z: Tensor, x: Tensor) -> Tensor:
    for _ in range(10):
        f = step(z, x)
        z = z - torch.linalg.inv(torch.eye(N, dtype=z.dtype) - (1 - f**2)[:, None] * W) @ (z - f)
    return z


def plain(z: Tensor, x: Tensor, w: Tensor = W, steps: int = 100) -> Tensor:
    for _ in range(steps):
        z = step(z, x, w)
    return z


def interleaved(rows: dict[str, Callable[[], object]], repetitions: int = 41) -> dict[str, list[float]]:
    """Milliseconds of every row, each measured once in turn."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(repetitions + 2):
        for name, run in rows.items():
            began = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: measured[2:] for name, measured in times.items()}


def time_table() -> None:
    solution = newton(torch.zeros_like(X), X)
    known = custom_fixed_point(step)(lambda z, x: solution)
    solved = custom_fixed_point(step)(newton)
    zero = torch.zeros_like(X)
    times = interleaved(
        {
            "implicit, given the solution": lambda: jacrev(lambda x: known(zero, x))(X),
            "implicit, with Newton's method": lambda: jacrev(lambda x: solved(zero, x))(X),
            "Newton's method unrolled": lambda: jacrev(lambda x: newton(zero, x))(X),
            "plain iteration unrolled": lambda: jacrev(lambda x: plain(zero, x))(X),
        }
    )
    base = statistics.median(times["implicit, given the solution"])
    print(f"Jacobian of z = tanh(W z + x) in x, n = {N}, float64, {torch.get_num_threads()} threads\n")
    print(f"{'':32s} {'median ms':>10s} {'quartiles':>16s} {'ratio':>7s}")
    for name, measured in times.items():
        low, middle, high = statistics.quantiles(measured, n=4)
        print(f"{name:32s} {middle:10.2f} {low:7.2f} .. {high:5.2f} {middle / base:7.1f}")


def peak(kind: str, steps: int) -> float:
    """Peak memory in MiB of one gradient, over the memory before, in this process."""
    w = torch.zeros(64, 64)
    x = torch.ones(4096, 64, requires_grad=True)
    solver = custom_fixed_point(step, solve=lambda matvec, b: b)(plain) if kind == "implicit" else plain
    solver(torch.zeros_like(x), x, w, steps=2).sum().backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    solver(torch.zeros_like(x), x, w, steps=steps).sum().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def memory_table() -> None:
    print("\npeak memory of a gradient, 4096 x 64 unknowns in float32 (1 MiB), by iterations of the solver, in MiB\n")
    counts = (10, 100, 1000)
    print(f"{'':32s}" + "".join(f"{count:>10d}" for count in counts))
    context = multiprocessing.get_context("spawn")
    for kind in ("implicit", "unrolled"):
        row = []
        for count in counts:
            with context.Pool(1) as pool:
                row.append(pool.apply(peak, (kind, count)))
        print(f"{kind:32s}" + "".join(f"{mib:10.1f}" for mib in row))


if __name__ == "__main__":
    time_table()
    memory_table()
