"""What the loop of a search costs, compiled and eager, beside JAXopt and Optimistix: the time to the same residual.

A row is one problem, or many in one vmapped call, in float64. The problems and the peers are those of `solvers.py`.
Each solver gets the loosest of the tolerances, FACTORS times the target, with which the residual, computed here for
all, is at most the target, and the solution near to one of SciPy's or a closed form; so none works for digits that the
others leave out. A gradient has to agree with its closed form. What misses that is not timed. "Of target" is the
residual or the error, whatever is worse, over what is allowed.

The entries take turns; times are medians of process time and of wall time, with their quartiles. A ratio is its time
over ours: above 1 ours is faster. JAX compiles beforehand. The column "first" is the process time of that, and for ours
what a solver's first call takes beyond a later one. Where the solvers have the option ``compile``, ours is measured
with each of its values: the first entry is the default, and the ratio of "off" is what the compiled loop gains over the
eager one.

    python benchmarks/loops.py [--save] [--threads 1 2] [row ...]
    python benchmarks/loops.py --lanes [--save]

Each number of threads is measured in a process of its own. ``--lanes`` measures the time of a problem by the number of
problems in a call and by that of unknowns, and draws it into ``docs/_static/loops.png``. With ``--save`` the results go
to ``benchmarks/loops.json``. Libraries that are missing are left out, and named.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import _report
import numpy as np
import solvers as families
import torch
from _loops_figure import draw
from _loops_profile import shares
from _loops_rows import CURVES, ROWS, Curve, Row, exact, instance
from measure import on_clocks, quartiles
from solvers import Array, Data, jax
from torch.func import vmap

Call = Callable[[], tuple[Any, Any]]
"""``call() -> (solution, iterations)``, or the gradient in place of the solution."""
Make = Callable[[float], Call]
"""``make(tol)``"""
RESULTS = Path(__file__).with_name("loops.json")
FIGURE = Path(__file__).parents[1] / "docs/_static/loops.png"
OURS, COMPILED, EAGER = "implicitdiff", ", always", ", off"
CLOCKS = {"ms": time.process_time, "wall_ms": time.perf_counter}
FACTORS = (1e4, 1e3, 100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
TURNS, TURN = 9, 0.03
"""The turns of an entry, and about how many seconds one takes."""
LONG = 2.0
"""What takes more seconds than this is called once, and as a point of a curve not measured again."""
GRADIENT_ERROR = 1e-5
"""Of a gradient, relative to its norm."""


# --- entries ----------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """Something to time.

    Attributes:
        call: what is timed.
        tol: the tolerance.
        iterations: of each lane.
        excess: how far what was computed is from what is asked for, over what is allowed; 1 or less is good.
        seconds: of a call, not the first if that is not long.
        first: the milliseconds by which the first call took longer.
    """

    call: Call
    tol: float
    iterations: Array
    excess: float
    seconds: float
    first: float

    @property
    def reached(self) -> bool:
        # Rounding differs a little between the residual here and the one that a solver looked at.
        return self.excess <= 1.01


Excess = Callable[[Array], float]


def entry(make: Make, tol: float, excess: Excess) -> Entry:
    call = make(tol)
    (found, iterations), first = clocked(call)
    later = first if first > LONG else clocked(call)[1]
    value = float(np.nan_to_num(excess(np.asarray(found)), nan=np.inf))
    return Entry(call, tol, np.asarray(iterations), value, later, max(0.0, 1e3 * (first - later)))


def clocked(call: Call) -> tuple[tuple[Any, Any], float]:
    began = time.process_time()
    return call(), time.process_time() - began


def modes(row: Row) -> dict[str, dict[str, str]]:
    """The options of each entry of ours."""
    if "compile" not in inspect.signature(row.family.ours).parameters:
        return {OURS: {}}
    return {OURS: {}, OURS + COMPILED: {"compile": "always"}, OURS + EAGER: {"compile": "off"}}


def ours(row: Row, operands: Data, options: dict[str, str], tol: float, gradient: bool = False) -> Call:
    solver = row.family.ours(row.family.problem.fn, rtol=0.0, atol=tol, on_failure="ignore", **options)
    tensors = [torch.tensor(v) for v in operands]

    def run(*operands: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        solution, state = solver.run(*operands)
        return solution, state.iter_num

    def differentiated() -> tuple[torch.Tensor, torch.Tensor]:
        at = 1 + row.family.gradient[0]
        leaf = tensors[at].detach().requires_grad_()
        solution, iterations = run(*tensors[:at], leaf, *tensors[at + 1 :])
        return torch.autograd.grad(solution.sum(), leaf)[0], iterations

    axes = tuple(None if i in row.shared else 0 for i in range(len(tensors)))
    return differentiated if gradient else partial(vmap(run, axes) if row.lanes else run, *tensors)


def peer(row: Row, operands: Data, solve: families.Solve, gradient: bool = False) -> tuple[Make, float]:
    """What makes the entry, and the milliseconds of the compilation."""
    run = partial(solve, row.family.problem)
    if gradient:
        run = families.differentiated(jax.grad, run, 1 + row.family.gradient[0])
    began = time.process_time()
    compiled = families.compiled(run, operands, bool(row.lanes), row.shared)
    return lambda tol: partial(compiled, tol), 1e3 * (time.process_time() - began)


def makers(row: Row, operands: Data, gradient: bool = False) -> dict[str, tuple[Make, float]]:
    """By entry. The eager one of ours is the last of ours, and is to be tried first: torch has first calls, too."""
    found: dict[str, tuple[Make, float]] = {}
    for name, options in modes(row).items():
        found[name] = partial(ours, row, operands, options, gradient=gradient), 0.0
    for name, solve in row.family.peers:
        if families.is_there(name):
            found[name] = peer(row, operands, solve, gradient)
    return found


def norms(vectors: Array) -> Array:
    return np.linalg.norm(np.atleast_1d(vectors), axis=-1)


def excess_of_solution(row: Row, operands: Data, solution: Array) -> Excess:
    """By the residual, or by how near the solution is, whatever is worse in the worst lane."""
    problem = row.family.problem

    def residual(x: Array) -> float:
        return norms(problem.residual(x, *operands[1:])).max() / problem.target

    if not residual(solution) <= 0.1:
        raise AssertionError(f"{row.title}: the solution to compare with is not exact")
    return lambda x: max(residual(x), norms((x - solution).reshape(max(1, row.lanes), -1)).max() / row.near)


def excess_of_gradient(row: Row, operands: Data, solution: Array) -> Excess:
    expected = row.family.gradient[1](solution, *operands[1:])
    return lambda x: np.linalg.norm(x - expected) / np.linalg.norm(expected) / GRADIENT_ERROR


def tried(made: dict[str, tuple[Make, float]], tolerances: dict[str, list[float]], excess: Excess) -> dict[str, Entry]:
    """Each entry with the first of its tolerances that is good, or the last; raise where ours has none."""
    found = {}
    # The eager one first, since torch itself has first calls.
    for name in sorted(tolerances, key=lambda name: not name.endswith(EAGER)):
        make, compilation = made[name]
        if refuses(name, make, tolerances[name][0]):
            continue
        for tol in tolerances[name]:
            one = entry(make, tol, excess)
            if one.reached:
                break
        if name.startswith(OURS) and not one.reached:
            raise AssertionError(f"{name} is off by {one.excess:.2g} times what is allowed")
        found[name] = one._replace(first=compilation or one.first)
    return {name: found[name] for name in made if name in found}


def refuses(name: str, make: Make, tol: float) -> bool:
    """Whether ours raises an error, which is shown, because it cannot compile the loop."""
    try:
        if name.endswith(COMPILED):
            make(tol)()
    except Exception as error:
        print(f"{name}: {error}", flush=True)
        return True
    return False


def solved(
    row: Row, operands: Data, solution: Array, at_most: dict[str, float], without: str | None = None
) -> dict[str, Entry]:
    """The entries, each with the loosest tolerance that is good; none is looser than `at_most` says."""
    made, target = makers(row, operands), row.family.problem.target
    tolerances = {
        name: [factor * target for factor in FACTORS if factor * target <= at_most.get(name, np.inf)]
        for name in made
        if name != without
    }
    return tried(made, tolerances, excess_of_solution(row, operands, solution))


# --- measuring --------------------------------------------------------------------------------------------------------


def measured(row: Row) -> dict[str, Any]:
    operands = instance(row)
    solution = exact(row, operands)
    found = solved(row, operands, solution, {})
    if row.gradient:
        tolerances = {name: [one.tol] for name, one in found.items() if one.reached}
        found = tried(makers(row, operands, True), tolerances, excess_of_gradient(row, operands, solution))
    there = {name: one for name, one in found.items() if one.reached}
    times = on_clocks({name: one.call for name, one in there.items()}, calls(there), TURNS, CLOCKS)
    return {
        "title": row.title,
        "threads": _report.THREADS,
        "iterations": {name: told(one.iterations) for name, one in there.items()},
        "of_target": {name: float(f"{one.excess:.2g}") for name, one in found.items()},
        **{clock: _report.rounded(ms) for clock, ms in times.items()},
        "first_ms": {name: float(f"{one.first:.3g}") for name, one in there.items()},
        "shares": shares(there[OURS].call, calls(there)[OURS]),
    }


def calls(entries: dict[str, Entry]) -> dict[str, int]:
    """Of a turn."""
    return {name: max(1, min(200, int(TURN / one.seconds))) for name, one in entries.items()}


def told(iterations: Array) -> list[float]:
    """The median, the largest, and the mean over the largest."""
    most = max(1, int(iterations.max()))
    return [float(np.median(iterations)), most, round(float(iterations.mean()) / most, 2)]


def over_ours(ms: dict[str, list[float]], name: str) -> float:
    return ms[name][1] / ms[OURS][1]


def show(row: dict[str, Any]) -> None:
    heads = "".join(f" {clock:>9s} {'quartiles':>19s} {'its/ours':>8s}" for clock in ("CPU ms", "wall ms"))
    print(f"\n{row['title']}, threads: {row['threads']}\n")
    print(f"{'':32s} {'iterations':>14s} {'of target':>9s}{heads} {'first ms':>9s}")
    for name, (median, most, share) in row["iterations"].items():
        cells = f" {row['of_target'][name]:9.2g}"
        for clock in CLOCKS:
            low, middle, high = row[clock][name]
            cells += f" {middle:9.3f} {low:8.3f} .. {high:7.3f} {over_ours(row[clock], name):8.3g}"
        count = f"{median:.0f}/{most:.0f} {share:.2f}"
        print(f"{name:32s} {count:>14s}{cells} {row['first_ms'][name]:9.0f}", flush=True)
    print(f"{OURS}: " + ", ".join(f"{part} {share:.0%}" for part, share in row["shares"].items()))
    for name in row["of_target"].keys() - row["ms"].keys():
        print(f"{name:32s} {'missed':>14s} {row['of_target'][name]:9.2g}", flush=True)


def measure(chosen: list[str]) -> _report.Rows:
    """All that is chosen, on the threads of this process."""
    _report.keep_threads()
    results: _report.Rows = {}
    for name in chosen:
        results[f"{name}, threads {_report.THREADS}"] = result = measured(ROWS[name])
        show(result)
    return results


def curve_of(curve: Curve) -> dict[str, Any]:
    """The milliseconds of a problem, by entry and size."""
    curves: dict[str, list[float]] = {}
    tolerances: dict[str, float] = {}
    print(f"\n{curve.row.title}, CPU ms of a problem, by {curve.axis}\n")
    for size in curve.sizes:
        row = curve.row._replace(**{curve.field: size})
        operands = instance(row)
        found = solved(row, operands, exact(row, operands), tolerances, without=OURS + COMPILED)
        # What a smaller size needs, a larger one needs as well: looser tolerances are not tried again.
        tolerances = {name: one.tol for name, one in found.items()}
        for name, ms in point(found).items():
            curves.setdefault(name, []).append(float(f"{ms / max(1, row.lanes):.4g}"))
        print(f"{size:12d} " + ", ".join(f"{name} {times[-1]:.4g}" for name, times in curves.items()), flush=True)
    return {"title": curve.row.title, "axis": curve.axis, "sizes": list(curve.sizes), "curves": curves}


def point(found: dict[str, Entry]) -> dict[str, float]:
    """The milliseconds of a call: the medians, or of what is long those of the only one."""
    if missed := [name for name, one in found.items() if not one.reached]:
        raise AssertionError(f"off by more than is allowed: {', '.join(missed)}")
    short = {name: one for name, one in found.items() if one.seconds <= LONG}
    times = quartiles({name: one.call for name, one in short.items()}, calls(short), 5)
    return {name: times[name][1] if name in times else 1e3 * one.seconds for name, one in found.items()}


def measure_curves() -> _report.Rows:
    _report.keep_threads()
    return {name: curve_of(curve) for name, curve in CURVES.items()}


def in_a_process(threads: int, work: Callable[..., _report.Rows], *args: Any) -> _report.Rows:
    """Libraries read the number of threads once, when they are imported."""
    os.environ["BENCHMARK_THREADS"] = str(threads)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, args)


def main() -> None:
    parser = _report.arguments(__doc__, ROWS, RESULTS)
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="of each process")
    parser.add_argument("--lanes", action="store_true", help=f"measure curves, and draw {FIGURE.name}")
    options = parser.parse_args()
    results: _report.Rows = {}
    if options.lanes:
        results = in_a_process(1, measure_curves)
        draw(results, FIGURE)
    else:
        chosen = _report.chosen(parser, options.rows, ROWS)
        for threads in options.threads:
            results |= in_a_process(threads, measure, chosen)
    if options.save:
        _report.save(RESULTS, results, ROWS | CURVES)


if __name__ == "__main__":
    main()
