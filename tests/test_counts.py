"""How often a call evaluates the user's function, factorises, asks autograd and looks at values: what a busy machine
cannot blur. A count that goes up is a cost that somebody pays."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from checks.compiled import needs_cpu
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, vmap

import implicitdiff
import implicitdiff._implicit.primitive as _primitive
import implicitdiff._torch.functions as _functions
from implicitdiff import custom_root, linear_solve, solvers

F64 = torch.float64
FACTORISATIONS = ("inv_ex", "lu_factor_ex", "cholesky_ex", "qr", "svd", "eigh", "ldl_factor_ex")


class Counts(Counter[str]):
    """Counts by name: ``evaluations`` of the function below, ``factorised`` matrices of all lanes at once, ``engine``
    runs of autograd for products, ``derived`` nodes of autograd, and ``looked`` at values."""

    def counted(self, name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self[name] += 1
            return fn(*args, **kwargs)

        return run


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counts]:
    counts = Counts()
    for name in FACTORISATIONS:
        monkeypatch.setattr(torch.linalg, name, counts.counted("factorised", getattr(torch.linalg, name)))
    monkeypatch.setattr(_functions, "gradients", counts.counted("engine", _functions.gradients))
    for name in ("__bool__", "__float__", "__int__", "item", "tolist"):
        monkeypatch.setattr(Tensor, name, counts.counted("looked", getattr(Tensor, name)))
    for function in (_primitive._ImplicitSolution, _primitive._UnrecordedVjp):
        monkeypatch.setattr(function, "forward", staticmethod(counts.counted("derived", function.forward)))
    return counts


W = 0.1 * torch.randn(10, 10, dtype=F64, generator=torch.Generator().manual_seed(0))
B = torch.linspace(-0.5, 0.5, 10, dtype=F64)
Z = torch.zeros(10, dtype=F64)
for _ in range(100):
    Z = torch.tanh(W @ Z + B)


def by_autograd(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(b: Tensor) -> Tensor:
        b = b.detach().requires_grad_()
        return torch.autograd.grad(fn(b).sum(), b)[0]

    return run


def by_func(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return grad(lambda b: fn(b).sum())


TRANSFORMS = {
    "forward": lambda fn: fn,
    "autograd": by_autograd,
    "grad": by_func,
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "vmap of grad": lambda fn: vmap(by_func(fn)),
}


def residual_of(counts: Counts) -> Callable[[Tensor, Tensor], Tensor]:
    def residual(z: Tensor, b: Tensor) -> Tensor:
        counts["evaluations"] += 1
        return z - torch.tanh(W @ z + b)

    return residual


def decorated(counts: Counts) -> Callable[[Tensor], Tensor]:
    return lambda b: custom_root(residual_of(counts))(lambda init, b: Z)(None, b)


def newton(counts: Counts) -> Callable[[Tensor], Tensor]:
    return lambda b: solvers.newton(residual_of(counts), rtol=0.0, atol=1e-6, compile="off").run(Z, b)[0]


def lbfgs(counts: Counts) -> Callable[[Tensor], Tensor]:
    residual = residual_of(counts)
    solver = solvers.lbfgs(lambda z, b: residual(z, b).square().sum(), rtol=0.0, atol=1e-6, compile="off")
    return lambda b: solver.run(Z, b)[0]


def by_cg(counts: Counts) -> Callable[[Tensor], Tensor]:
    diagonal = torch.ones(10, dtype=F64)

    def matvec(v: Tensor) -> Tensor:
        counts["evaluations"] += 1
        return diagonal * v

    return lambda b: linear_solve.solve_cg()(matvec, b)


# What a call costs where it starts at the solution, by what is called and how it is differentiated.
COSTS = {
    (decorated, "forward"): {"evaluations": 1, "derived": 1},
    (decorated, "autograd"): {"evaluations": 2, "derived": 1, "engine": 2, "factorised": 1, "looked": 2},
    (decorated, "grad"): {"evaluations": 2, "derived": 2, "engine": 2, "factorised": 1, "looked": 2},
    (decorated, "jacrev"): {"evaluations": 2, "derived": 1, "engine": 2, "factorised": 1, "looked": 2},
    (decorated, "jacfwd"): {"evaluations": 3, "derived": 1, "engine": 3, "factorised": 1, "looked": 2},
    (decorated, "vmap of grad"): {"evaluations": 3, "derived": 2, "engine": 1, "factorised": 1, "looked": 2},
    (newton, "forward"): {"evaluations": 3, "derived": 1, "looked": 3},
    (newton, "autograd"): {"evaluations": 3, "derived": 1, "engine": 2, "factorised": 1, "looked": 5},
    (newton, "grad"): {"evaluations": 4, "derived": 2, "engine": 2, "factorised": 1, "looked": 5},
    (newton, "jacrev"): {"evaluations": 4, "derived": 1, "engine": 2, "factorised": 1, "looked": 5},
    (newton, "jacfwd"): {"evaluations": 5, "derived": 1, "engine": 3, "factorised": 1, "looked": 5},
    (lbfgs, "forward"): {"evaluations": 3, "derived": 1, "engine": 1, "looked": 3},
    (lbfgs, "autograd"): {"evaluations": 3, "derived": 1, "engine": 3, "factorised": 1, "looked": 5},
    (lbfgs, "grad"): {"evaluations": 4, "derived": 2, "engine": 3, "factorised": 1, "looked": 5},
    (by_cg, "forward"): {"evaluations": 6},
    (by_cg, "autograd"): {"evaluations": 7, "derived": 1, "engine": 2},
    (by_cg, "grad"): {"evaluations": 7, "derived": 2, "engine": 2},
}


@pytest.mark.parametrize(("make", "way"), COSTS, ids=[f"{make.__name__}, {way}" for make, way in COSTS])
def test_a_call_from_the_solution_costs(make: Callable[..., Any], way: str, counts: Counts) -> None:
    expected = COSTS[make, way]
    TRANSFORMS[way](make(counts))(B.expand(5, 10) if way == "vmap of grad" else B)
    # Krylov methods look at values in each iteration.
    found = {name: n for name, n in counts.items() if name != "looked" or make is not by_cg}
    assert found == expected


@needs_cpu
def test_a_recording_repeats_one_evaluation(counts: Counts) -> None:
    """The first call records a step, and compares recorded steps with others; it calls the function for the first of
    them, and repeats the operations of that call for the others."""
    residual = residual_of(counts)
    solver = solvers.lbfgs(lambda z, b: residual(z, b).square().sum())
    evaluations = []
    for shift in (0.1, 0.2, 0.3):
        before = counts["evaluations"]
        solver.run(Z, B + shift)
        evaluations.append(counts["evaluations"] - before)
    assert evaluations == [5, 3, 3]


def test_a_second_derivative_takes_the_general_way_once(counts: Counts) -> None:
    """The first derivative is computed below the transform, and again where somebody differentiates it."""
    solution = decorated(counts)
    outer = torch.func.hessian(lambda b: solution(b).square().sum())(B)
    slope = torch.diag(1 - Z**2)
    jacobian = torch.linalg.solve(torch.eye(10, dtype=F64) - slope @ W, slope)
    by_differences = torch.stack(
        [(gradient_at(B + h) - gradient_at(B - h)) / 2e-5 for h in 1e-5 * torch.eye(10, dtype=F64)]
    )
    torch.testing.assert_close(outer, by_differences, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(gradient_at(B), 2 * jacobian.mT @ Z)
    assert (counts["factorised"], counts["evaluations"]) == (3, 7)


def gradient_at(b: Tensor) -> Tensor:
    z = Z
    for _ in range(200):
        z = torch.tanh(W @ z + b)
    slope = torch.diag(1 - z**2)
    return 2 * torch.linalg.solve(torch.eye(10, dtype=F64) - slope @ W, slope).mT @ z


def test_the_derivative_of_a_lazy_derivative_is_right() -> None:
    """A user may differentiate within one grad transform, by autograd."""

    def first(b: Tensor) -> Tensor:
        solver = custom_root(lambda x, b: x**3 - b)(lambda init, b: b ** (1 / 3))
        x = solver(None, b)
        (slope,) = torch.autograd.grad(x.sum(), b, create_graph=True)
        return slope.sum()

    b = torch.tensor([1.0, 8.0], dtype=F64)
    torch.testing.assert_close(grad(first)(b), -2 / 9 * b ** (-5 / 3))


def calls_of_the_package(run: Callable[[], object]) -> int:
    """How many Python functions of the package are called."""
    root, before, calls = str(Path(implicitdiff.__file__).parent), sys.getprofile(), 0

    def note(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename.startswith(root)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return calls


@needs_cpu
def test_a_solve_with_a_compiled_loop_calls_few_functions() -> None:
    # In Python 3.11 a comprehension is a call too.
    data, y = torch.tensor([[1.0, 0], [1, 1], [1, 2]], dtype=F64), torch.tensor([1.0, 2, 4], dtype=F64)
    run = solvers.lbfgs(lambda w, p: ((data @ w - y) ** 2).sum() / 2 + p * (w**2).sum() / 2).run
    w, p = torch.zeros(2, dtype=F64), torch.tensor(0.5, dtype=F64, requires_grad=True)
    run(w, p)[0].sum().backward()
    found = []
    assert calls_of_the_package(lambda: found.append(run(w, p)[0])) <= 480
    assert calls_of_the_package(lambda: found[0].sum().backward()) <= 110
    p = p.detach()
    assert calls_of_the_package(lambda: grad(lambda p: run(w, p)[0].sum())(p)) <= 840


@needs_cpu
def test_a_recording_calls_few_functions() -> None:
    # No other test records a function with this number.
    x, b = torch.zeros(2, dtype=F64), torch.tensor([1.0, 2.0], dtype=F64)
    solver = solvers.newton(lambda x, b: x**3 + 0.8125 * x - b, compile="always")
    assert calls_of_the_package(lambda: solver.run(x, b)) <= 43_000
