"""solve_auto: which method solves which system."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checks.tensors import draw
from tables.linear_solvers import ALL, C128, F32, F64, FAMILIES, definite, general, indefinite, spread
from tables.linear_systems import BY_NAME, Counted, failure_of, relative_error, times, tolerance
from torch import Tensor
from torch.func import grad, vmap

from implicitdiff.linear_solve import solve_auto, solve_lu

# --- solve_auto -----------------------------------------------------------------------------------------------------


def large(n: int, kind: str) -> Tensor:
    values = spread(n) if kind == "definite" else spread(n).sqrt() * (-1) ** torch.arange(n)
    if kind == "general":
        return torch.eye(n, dtype=F64) + 0.5 * draw(1, n, n) / n**0.5
    q = torch.eye(n, dtype=F64)
    for seed in (2, 3):
        u = draw(seed, n)
        q = q - torch.outer(q @ u, u) * (2 / (u @ u))
    return (q * values) @ q.T


@pytest.mark.parametrize("kind", ["definite", "indefinite", "general"])
def test_auto_solves_a_large_system_without_its_matrix(kind):
    n = 1500
    a = large(n, kind)
    matvec = Counted(times(a))
    b = draw(5, n)
    x = solve_auto()(matvec, b)
    assert matvec.calls < n / 2
    assert relative_error(a @ x, b) <= torch.finfo(F64).eps ** (2 / 3)
    reference = torch.from_numpy(np.linalg.solve(a.numpy(), b.numpy()))
    assert relative_error(x, reference) <= tolerance(BY_NAME["auto, matrix-free"])


def test_auto_differentiates_a_large_system_without_its_matrix():
    n = 1500
    d, b = spread(n), draw(5, n)

    def f(d, b):
        return solve_auto()(lambda v: d * v + 0.1 * torch.roll(v, 1), b)

    x, u = f(d, b), solve_auto()(lambda v: d * v + 0.1 * torch.roll(v, -1), torch.ones(n, dtype=F64))
    by_d, by_b = grad(lambda d, b: f(d, b).sum(), (0, 1))(d, b)
    assert relative_error(by_b, u) <= tolerance(BY_NAME["auto, matrix-free"])
    assert relative_error(by_d, -u * x) <= tolerance(BY_NAME["auto, matrix-free"])


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("dtype", [F32, F64, C128], ids=str)
def test_auto_gives_the_same_with_and_without_the_matrix(family, dtype):
    a, b = FAMILIES[family](9, dtype), draw(5, 9, dtype=dtype)
    exact = solve_lu()(times(a), b)
    assert torch.equal(solve_auto()(times(a), b), exact)
    assert relative_error(solve_auto(dense_up_to=0)(times(a), b), exact) <= tolerance(
        BY_NAME["auto, matrix-free"], dtype
    )


def test_auto_materialises_up_to_the_bound():
    a, b = definite(8), draw(5, 8)
    for bound, error in ((8, "LU"), (7, "GMRES")):
        bad = failure_of(lambda bound=bound: solve_auto(dense_up_to=bound)(times(0 * a), b))
        assert error in bad.solver


def test_auto_turns_to_gmres_where_cg_breaks_down():
    a, b = indefinite(12), draw(5, 12)
    x = solve_auto(dense_up_to=0)(times(a), b)
    assert relative_error(x, torch.linalg.inv(a) @ b) <= tolerance(BY_NAME["auto, matrix-free"])


def test_auto_solves_lanes_of_different_kinds_together():
    a, b = torch.stack([definite(8), indefinite(8), general(8)]), draw(5, 3, 8)
    x = vmap(lambda a, b: solve_auto(dense_up_to=0)(times(a), b))(a, b)
    assert relative_error(x, torch.einsum("lij,lj->li", torch.linalg.inv(a), b)) <= tolerance(
        BY_NAME["auto, matrix-free"]
    )
