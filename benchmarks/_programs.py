"""How often `qp`, OSQP and Clarabel arrive on two sets of quadratic programs, and how often they only say so.

A solver has arrived where its objective is the optimum to 1e-6 and no row is violated by more than 1e-6 of its terms.
A false claim is an end that the solver calls a solution, and is none. Without OSQP or Clarabel their rows are left out.

    python benchmarks/_programs.py
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import _report
import numpy as np
from scipy import sparse

from implicitdiff.solvers import Status, qp

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from problem_sets import maros_meszaros
from problem_sets.quadratic_programs import PROGRAMS, QuadraticProgram

OSQP, CLARABEL = map(_report.library, ("osqp", "clarabel"))
MAXITER = 2000


class End(NamedTuple):
    """Where a solver ended, whether it calls that a solution, and after how many iterations."""

    x: np.ndarray
    claimed: bool
    iterations: int


Solve = Callable[[QuadraticProgram], End]


def ours(program: QuadraticProgram) -> End:
    solution, state = qp(maxiter=MAXITER, on_failure="ignore").run(None, *program.arguments())
    return End(solution.primal.numpy(), int(state.status) == Status.CONVERGED, int(state.iter_num))


def osqp(program: QuadraticProgram) -> End:
    """With polishing, and tolerances in the place of 1e-3."""
    solver = OSQP.OSQP()
    solver.setup(
        sparse.csc_matrix(np.triu(program.P)),
        program.q,
        sparse.csc_matrix(program.A),
        program.l,
        program.u,
        verbose=False,
        eps_abs=1e-9,
        eps_rel=1e-9,
        max_iter=100_000,
        polishing=True,
    )
    result = solver.solve(raise_error=False)
    return End(result.x, result.info.status == "solved", result.info.iter)


def clarabel(program: QuadraticProgram) -> End:
    P, q, A, l, u = program.P, program.q, program.A, program.l, program.u  # noqa: E741
    equal, below, above = l == u, np.isfinite(l) & (l < u), np.isfinite(u) & (l < u)
    rows, right = np.vstack([A[equal], A[above], -A[below]]), np.concatenate([u[equal], u[above], -l[below]])
    settings = CLARABEL.DefaultSettings()
    settings.verbose = False
    cones = [CLARABEL.ZeroConeT(int(equal.sum())), CLARABEL.NonnegativeConeT(int(above.sum() + below.sum()))]
    result = CLARABEL.DefaultSolver(
        sparse.csc_matrix(np.triu(P)), q, sparse.csc_matrix(rows), right, cones, settings
    ).solve()
    return End(np.array(result.x), str(result.status) == "Solved", result.iterations)


def solvers() -> dict[str, Solve]:
    """Those that are installed."""
    peers: dict[str, Solve] = {"osqp": osqp, "clarabel": clarabel}
    return {"implicitdiff": ours} | {name: fn for name, fn in peers.items() if name not in _report.MISSING}


class Score(NamedTuple):
    """What became of a set: how many were solved, which claims were false, and what it took."""

    arrived: int
    false_claims: list[str]
    missed: list[str]
    iterations: int
    seconds: float


def score(solve: Solve, programs: Iterable[QuadraticProgram], references: dict[str, float]) -> Score:
    arrived, iterations, start = 0, 0, time.perf_counter()
    false_claims, missed = [], []
    for program in programs:
        end = solve(program)
        iterations += end.iterations
        if is_solution(program, end.x, references[program.name]):
            arrived += 1
        else:
            (false_claims if end.claimed else missed).append(program.name)
    return Score(arrived, false_claims, missed, iterations, time.perf_counter() - start)


def is_solution(program: QuadraticProgram, x: np.ndarray, optimum: float) -> bool:
    # The optima of the table have 9 digits; those that are zero have none.
    off = abs(program.objective(x) - optimum)
    return bool(off <= 1e-6 * max(abs(optimum), 1e-2) and program.violation(x) <= 1e-6)


def reference(program: QuadraticProgram) -> float:
    """The optimum: the table's, or the value at which primal and dual meet."""
    if program.optimum is not None:
        return program.optimum
    Q, c, A, b, G, h, low = (t.numpy() for t in program.arguments())
    (x, y, z), _ = qp().run(None, *program.arguments())
    x, y, z = x.numpy(), y.numpy(), z.numpy()
    bound = np.where(z > 0, h, np.where(z < 0, low, 0.0))
    primal, dual = program.objective(x), program.r - 0.5 * x @ Q @ x - y @ b - z @ bound
    slope = Q @ x + c + A.T @ y + G.T @ z
    if not abs(primal - dual) <= 1e-9 * (1 + abs(primal)) or not np.abs(slope).max() <= 1e-8:
        raise AssertionError(f"{program}: primal {primal}, dual {dual}")
    return primal


def table() -> str:
    """Both sets as a table in Markdown."""
    sets = {
        "Maros-Meszaros, n + m <= 600": [
            p for p in maros_meszaros.programs() if p.name not in maros_meszaros.NOT_CONVEX
        ],
        "classes of OSQP's paper": PROGRAMS,
    }
    lines = [
        "| set | solver | arrived | false claims | iterations | seconds | not solved |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, programs in sets.items():
        references = {p.name: reference(p) for p in programs}
        for name, solve in solvers().items():
            found = score(solve, programs, references)
            wrong, missed = " ".join(found.false_claims), " ".join(found.missed)
            lines.append(
                f"| {title} | {name} | {found.arrived} of {len(programs)} | {len(found.false_claims)} {wrong} | "
                f"{found.iterations} | {found.seconds:.1f} | {missed} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
