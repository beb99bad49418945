"""Ranks on unlike machines round differently: the first rank leads, and all have its solution."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as c10d
from checks.ranks import Broken, World
from checks.tensors import draw
from checks.traffic import counted
from torch import Tensor
from torch.func import grad, vmap

import implicitdiff.distributed as dist
from implicitdiff import linear_solve, solvers
from implicitdiff.distributed import _agreement

MACHINES = ({}, {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"})
N = 24
X, Y = draw(1, 80, N), draw(2, 80)
PENALTY = torch.linspace(-3.0, 1.0, N, dtype=torch.float64)


def objective(w: Tensor, penalty: Tensor) -> Tensor:
    """A logistic regression, whose penalty each rank computes by itself: with the rounding of its machine."""
    rank = c10d.get_rank() if c10d.is_initialized() else None
    rows = slice(None) if rank is None else slice(40 * rank, 40 * rank + 40)
    loss = lambda w: torch.nn.functional.softplus(-Y[rows].sign() * (X[rows] @ w)).sum()  # noqa: E731
    total = loss(w) if rank is None else dist.psum_of(loss)(w)
    return total / 80 + ((X @ w) ** 2).sum() / 1e4 + (torch.exp(penalty) * w**2).sum() / 50


def solved(solver: Callable[..., Any], **options: Any) -> Callable[[Tensor], Tensor]:
    return lambda penalty: solver(objective, **options).run(torch.zeros(N, dtype=torch.float64), penalty)[0]


def scored(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda penalty: (torch.cos(torch.arange(N)) * f(penalty)).sum()


def loss_of_tasks(penalty: Tensor) -> Tensor:
    """The mean loss of seven fits, whose derivatives each rank solves for by itself."""
    over_lanes = dist.vmap if c10d.is_initialized() else vmap

    def task(rows: Tensor) -> Tensor:
        def gradient(w: Tensor, penalty: Tensor) -> Tensor:
            return grad(lambda w: ((rows @ w - 1) ** 2).sum() + (penalty.exp() * w**2).sum())(w)

        w, _ = solvers.newton(gradient).run(torch.zeros(3, dtype=torch.float64), penalty)
        return ((rows @ w - 1) ** 2).sum()

    return over_lanes(task)(X[:42, :3].reshape(7, 6, 3)).mean() + (penalty**2).sum()


PROGRAMS: dict[str, Callable[[], Tensor]] = {
    "lbfgs": lambda: solved(solvers.lbfgs)(PENALTY),
    "newton_cg": lambda: solved(solvers.newton_cg)(PENALTY),
    "gradient of lbfgs": lambda: grad(scored(solved(solvers.lbfgs)))(PENALTY),
    "gradient by cg": lambda: grad(scored(solved(solvers.lbfgs, solve=linear_solve.solve_cg())))(PENALTY),
    "gradient by gmres": lambda: grad(scored(solved(solvers.lbfgs, solve=linear_solve.solve_gmres())))(PENALTY),
    "lanes": lambda: vmap(solved(solvers.lbfgs))(torch.stack([PENALTY, PENALTY + 1, PENALTY - 2])),
    "scipy": lambda: solved(solvers.scipy_minimize, method="BFGS", rtol=1e-6)(PENALTY),
    "tasks of a search": lambda: solvers.lbfgs(loss_of_tasks).run(PENALTY[:3])[0],
    "lanes over ranks": lambda: dist.vmap(lambda c: solvers.newton(lambda x, c: x**3 - c).run(c, c)[0])(X[:7, 0].abs()),
}


def run(name: str, leads: bool) -> Any:
    before = _agreement.rounds_differently
    if not leads:
        _agreement._rounds_differently[c10d.group.WORLD] = False
    try:
        result, calls, _ = counted(PROGRAMS[name])
    finally:
        _agreement._rounds_differently.clear()
    return result, calls.get("all_reduce"), before(c10d.group.WORLD)


@pytest.fixture(scope="module")
def unlike() -> Iterator[World]:
    with World(2, machines=MACHINES) as world:
        yield world


@pytest.mark.parametrize("name", PROGRAMS)
def test_all_ranks_have_what_the_first_found(unlike, name: str) -> None:
    (first, calls, is_unlike), (second, others, _) = unlike.call(run, name, True)
    assert is_unlike
    assert calls == others
    if name.startswith("gradient"):
        # Each rank computes the rest of the gradient by itself.
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-14)
    else:
        assert torch.equal(first, second)
    torch.testing.assert_close(first, PROGRAMS[name]() if name != "lanes over ranks" else X[:7, 0].abs() ** (1 / 3))


def test_without_a_leader_they_part() -> None:
    """Else the test above would show nothing."""
    with World(2, timeout=10.0, machines=MACHINES) as world:
        answers = world.call(run, "lbfgs", False)
    assert any(isinstance(answer, Broken) for answer in answers) or not torch.equal(answers[0][0], answers[1][0])
