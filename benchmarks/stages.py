"""Where the time of one small call goes: of each stage what it takes itself, without the stages inside of it.

Functions of the library are timed from outside. That adds about a microsecond to each call of a stage.

    python benchmarks/stages.py [--save] [row ...]
"""

from __future__ import annotations

import functools
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _report
import peers

RESULTS = Path(__file__).with_name("stages.json")
CALLS, TURNS = 200, 5
ROWS = ("root_forward", "root_autograd", "root_func", "run_func")
REST = "all else, torch.func's own transforms among it"
# What is said of them, and where they are; a stage may have several functions.
STAGES = {
    "the solver of the user": ["_implicit.solver_body:run_solver"],
    "matching of arguments": ["_closures.signature:Matcher.bind"],
    "variables noted": [
        "_closures.snapshot:Snapshot.__init__",
        "_closures.snapshot:Snapshot.keep_used",
        "_closures.snapshot:Snapshot.changed",
    ],
    "evaluations that are watched": ["_closures.lift:_run_watched", "_closures.lift:Lifted._run_again_watched"],
    "their operations": ["_closures.modes:Watch.__torch_function__"],
    "comparison of evaluations": ["_closures.program:Program.difference", "_closures.lift:Lifted.refuse_overwritten"],
    "closure conversion": ["_closures.lift:lift"],
    "the search": ["solvers._loop.solver:SolverImpl._implicit"],
    "the derivative is attached": ["_implicit.root:RootAt.attached"],
    "the derivative": ["_implicit.primitive:_pulled_back"],
    "the linear system": ["_implicit.linear:LinearProblem.primal"],
    "its matrix": ["_implicit.system:_materialise"],
    "its factorisation": ["linear_solve._direct:probed"],
    "products by autograd": ["_torch.functions:gradients"],
    "one level of torch.func": ["_torch.functions:apply"],
}


class Clock:
    """The time that each stage takes itself."""

    def __init__(self) -> None:
        self.own: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self.within: list[float] = [0.0]

    def timed(self, stage: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.within.append(0.0)
            began = time.process_time()
            try:
                return fn(*args, **kwargs)
            finally:
                taken = time.process_time() - began
                self.own[stage] += taken - self.within.pop()
                self.within[-1] += taken

        return run

    def install(self) -> None:
        for stage, places in STAGES.items():
            for place in places:
                name, path = place.split(":")
                owner: Any = importlib.import_module(f"implicitdiff.{name}")
                *above, last = path.split(".")
                for part in above:
                    owner = getattr(owner, part)
                fn = getattr(owner, last)
                wrapped = self.timed(stage, fn)
                setattr(owner, last, wrapped)
                if not above:
                    self._exchange(fn, wrapped)

    def _exchange(self, fn: Any, wrapped: Any) -> None:
        """In the modules that have imported it by name."""
        for module in [m for name, m in sys.modules.items() if name.startswith("implicitdiff")]:
            for name in [name for name, value in vars(module).items() if value is fn]:
                setattr(module, name, wrapped)


def measured(clock: Clock, call: Callable[[], Any]) -> dict[str, float]:
    """The microseconds of each stage of a call, and of all else in it."""
    for _ in range(20):
        call()
    clock.own = dict.fromkeys(STAGES, 0.0)
    began = time.process_time()
    for _ in range(CALLS):
        call()
    whole = 1e6 * (time.process_time() - began) / CALLS
    own = {stage: 1e6 * seconds / CALLS for stage, seconds in clock.own.items()}
    return {**own, REST: whole - sum(own.values())}


def main() -> None:
    parser = _report.arguments(__doc__, ROWS, RESULTS)
    options = parser.parse_args()
    names = _report.chosen(parser, options.rows, ROWS)
    _report.keep_threads()
    clock, results = Clock(), {}
    clock.install()
    for name in names:
        row = peers.ROWS[name]()
        turns = [measured(clock, row.entries["implicitdiff"]) for _ in range(TURNS)]
        own = {stage: statistics.median(turn[stage] for turn in turns) for stage in turns[0]}
        whole = sum(own.values())
        print(f"\n{row.title}: {whole:.0f} microseconds\n")
        for stage, took in sorted(own.items(), key=lambda pair: -pair[1]):
            print(f"{stage:50s} {took:8.0f} {100 * took / whole:5.0f} %")
        results[name] = {"title": row.title, "us": {stage: round(took, 1) for stage, took in own.items()}}
    if options.save:
        _report.save(RESULTS, results, ROWS)


if __name__ == "__main__":
    main()
