"""Compiled loops whose step solves a linear system by iteration, against eager ones, closed forms and SciPy."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import scipy.optimize
import torch
from checks.compiled import needs_cpu
from tables.solvers import F64, ROTATION, SKEW, rotated_cubic
from torch import Tensor
from torch.func import hessian, jacfwd, jacrev, vmap

import implicitdiff.linear_solve as linear_solve
import implicitdiff.solvers as solvers
from implicitdiff.errors import CompileError, LinearSolveError, LinearSolveWarning
from implicitdiff.solvers import Status
from implicitdiff.solvers._loop.recordings import Recording, kept

pytestmark = needs_cpu
METHODS = {"newton": solvers.newton, "chord": solvers.chord}
LINEAR = {
    "cg": linear_solve.solve_cg,
    "normal_cg": linear_solve.solve_normal_cg,
    "bicgstab": linear_solve.solve_bicgstab,
    "gmres": linear_solve.solve_gmres,
    "gmres, restarted": lambda **options: linear_solve.solve_gmres(restart=2, **options),
}
SCALES = torch.tensor([0.2, 1.0, -0.7, 3.0, 0.0, 1.3, 1e-9, -2.0, 0.5], dtype=F64)
THETA = SCALES[:, None] * torch.tensor([0.5, 0.3, -0.4], dtype=F64)


@pytest.fixture(autouse=True)
def no_recordings():
    kept.clear()
    yield
    kept.clear()


def symmetric(x: Tensor, theta: Tensor) -> Tensor:
    rotation = ROTATION.to(x.dtype)
    u = rotation @ x
    return rotation.T @ (u**3 + u - theta)


def skewed(x: Tensor, theta: Tensor) -> Tensor:
    r = symmetric(x, theta)
    return r + SKEW.to(x.dtype) @ r


def residual_for(linear: str) -> Any:
    return symmetric if linear == "cg" else skewed


def found(solver: Any, x: Tensor, *args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the solution, the status and the number of iterations; of each lane if the arguments have two dimensions,
    or one for numbers."""

    def one(*args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x1, state = solver.run(x, *args)
        return x1, state.status, state.iter_num

    result: tuple[Tensor, Tensor, Tensor] = (vmap(one) if args[0].dim() else one)(*args)
    return result


def recorded() -> list[Any]:
    return list(kept._recordings.values())


def assert_same(result: Any, expected: Any, rtol: float) -> None:
    for a, b in zip(result, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.allclose(a, b, rtol=rtol, atol=rtol, equal_nan=True), (a, b)


# --- every method with every linear solver ----------------------------------------------------------------------------


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batched", [False, True], ids=["one", "batch"])
@pytest.mark.parametrize("linear", LINEAR)
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_search_ends_as_the_eager_one(method, linear, batched, dtype):
    theta = THETA.to(dtype)
    target = 1e-12 if dtype == F64 else 1e-4

    def run(compile: str) -> tuple[Tensor, Tensor, Tensor]:
        options = {"rtol": target, "atol": target, "maxiter": 60, "compile": compile, "on_failure": "ignore"}
        solver = METHODS[method](residual_for(linear), linear_solve=LINEAR[linear](on_failure="ignore"), **options)

        def one(theta):
            x, state = solver.run(torch.zeros(3, dtype=dtype), theta)
            return x, state.status, state.iter_num

        return vmap(one)(theta) if batched else one(theta[1])

    for _ in range(2):
        x, status, iterations = run("always")
        expected = run("off")
        assert status.tolist() == expected[1].tolist() and iterations.tolist() == expected[2].tolist()
        assert_same([x], expected[:1], 1e-9 if dtype == F64 else 1e-4)
        closed = rotated_cubic(THETA[..., None])[..., 0] if batched else rotated_cubic(THETA[1])
        solved = (status == Status.CONVERGED)[..., None]
        assert solved.sum() >= (7 if method == "newton" or not batched else 5) * batched
        assert torch.allclose(
            torch.where(solved, x.double() - closed, 0.0), torch.zeros(()).double(), atol=100 * target
        )


@pytest.mark.parametrize("linear", ["cg", "gmres", "normal_cg"])
def test_backtracking(linear):
    def F(x, theta):
        return torch.atan(4 * x) - theta

    starts = torch.linspace(0.3, 3, 9, dtype=F64)

    def run(compile: str) -> tuple[Tensor, Tensor, Tensor]:
        linear_solver = LINEAR[linear](on_failure="ignore")
        solver = solvers.newton(F, linear_solver, True, compile=compile, on_failure="ignore", rtol=1e-12, atol=1e-12)

        def one(start, theta):
            x, state = solver.run(start.expand(2), theta.expand(2))
            return x, state.status, state.iter_num

        return vmap(one, (0, None))(starts, torch.tensor(0.7, dtype=F64))

    assert_same(run("always"), run("off"), 1e-10)
    assert torch.allclose(run("always")[0], torch.tensor(0.7, dtype=F64).tan() / 4)


def test_a_large_system_is_that_of_scipy():
    # The Bratu problem: u'' + 2 exp(u) = 0 on (0, 1).
    n = 60
    h = 1 / (n + 1)

    def bratu(u, strength):
        padded = torch.nn.functional.pad(u, (1, 1))
        return (2 * padded[1:-1] - padded[:-2] - padded[2:]) / h**2 - strength * u.exp()

    strengths = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=F64)
    solver = solvers.newton(bratu, linear_solve=linear_solve.solve_cg(), compile="always")
    u = vmap(lambda s: solver.run(torch.zeros(n, dtype=F64), s)[0])(strengths)
    for found_u, strength in zip(u, strengths, strict=True):
        result = scipy.optimize.root(lambda v, s=strength: bratu(torch.from_numpy(v), s).numpy(), [0.0] * n, tol=1e-12)
        assert torch.allclose(found_u, torch.from_numpy(result.x), rtol=1e-8)


@pytest.mark.parametrize("linear", LINEAR)
def test_derivatives_are_those_of_the_eager_search(linear):
    solve = LINEAR[linear](rtol=1e-13, on_failure="ignore")

    def derivatives(compile: str) -> tuple[Tensor, ...]:
        solver = solvers.newton(residual_for(linear), linear_solve=solve, compile=compile)
        of_theta = lambda theta: solver.run(torch.zeros(3, dtype=F64), theta)[0]  # noqa: E731
        second = hessian(lambda theta: of_theta(theta).sin().sum())(THETA[1])
        return jacrev(of_theta)(THETA[1]), vmap(jacfwd(of_theta))(THETA), second

    for _ in range(2):
        assert_same(derivatives("always"), derivatives("off"), 1e-8)
    assert_same(derivatives("always")[:1], [jacrev(rotated_cubic)(THETA[1])], 1e-8)


# --- numbers of other kinds -------------------------------------------------------------------------------------------


def test_unknowns_of_two_dtypes():
    def F(x, theta):
        return {"a": x["a"] + 0.1 * x["b"].double().sum() - theta, "b": (2 * x["b"] + x["a"].float() ** 2).float() - 1}

    start = {"a": torch.zeros(2, dtype=F64), "b": torch.zeros(2), "none": torch.zeros(0)}

    def residual(x, theta):
        return {**F(x, theta), "none": x["none"]}

    def run(compile: str) -> list[Tensor]:
        solver = solvers.newton(residual, linear_solve=linear_solve.solve_gmres(), compile=compile, maxiter=20)
        x, state = solver.run(start, torch.tensor([0.3, 0.4], dtype=F64))
        return [*x.values(), state.status, state.iter_num]

    assert_same(run("always"), run("off"), 1e-5)
    assert torch.allclose(run("always")[1], (1 - run("off")[0].float() ** 2) / 2, atol=1e-5)


LANES_OF_MATRICES = {
    "the identity": torch.eye(4, dtype=F64),
    "tiny": 1e-90 * torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64)),
    "large": 1e90 * torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64)),
    "two eigenvalues": torch.diag(torch.tensor([1.0, 1.0, 5.0, 5.0], dtype=F64)),
    "singular": torch.diag(torch.tensor([1.0, 2.0, 3.0, 0.0], dtype=F64)),
    "indefinite": torch.diag(torch.tensor([1.0, 2.0, 3.0, -4.0], dtype=F64)),
    "zero": torch.zeros(4, 4, dtype=F64),
    "nan": torch.full((4, 4), torch.nan, dtype=F64),
    "infinite": torch.diag(torch.tensor([1.0, 2.0, 3.0, torch.inf], dtype=F64)),
    "a cycle": torch.eye(4, dtype=F64).roll(1, 0),
    "four eigenvalues": torch.diag(torch.tensor([1.0, 10.0, 40.0, 90.0], dtype=F64)),
}
SIDES = [[1.0, 2.0, 3.0, 4.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0]]


@pytest.mark.parametrize("linear", LINEAR)
def test_a_lane_ends_as_alone_whatever_its_neighbours_are(linear):
    """Each of the lanes runs beside others whose matrices are singular, infinite, or of another size."""
    matrices = torch.stack([m for m in LANES_OF_MATRICES.values() for _ in SIDES])
    sides = torch.tensor(SIDES, dtype=F64).repeat(len(LANES_OF_MATRICES), 1)
    solve = LINEAR[linear](on_failure="ignore", maxiter=9)

    def direction(compile: str, m: Tensor, b: Tensor) -> Tensor:
        # The first step, from the point 0.
        solver = solvers.newton(
            lambda x, m, b: torch.where(x == 0, 0.0, x**3) + m @ x - b,
            linear_solve=solve,
            compile=compile,
            maxiter=1,
            on_failure="ignore",
        )
        result: Tensor = solver.run(torch.zeros(4, dtype=F64), m, b)[0]
        return result

    order = torch.randperm(len(matrices), generator=torch.Generator().manual_seed(0))
    kept_for = torch.eye(4, dtype=F64).expand(8, 4, 4), torch.tensor(SIDES[:1], dtype=F64).expand(8, 4)
    vmap(lambda m, b: direction("always", m, b))(*kept_for)
    result = vmap(lambda m, b: direction("always", m, b))(matrices[order], sides[order])
    assert all(isinstance(known, Recording) for known in recorded())
    for at, x in zip(order.tolist(), result, strict=True):
        name = [*LANES_OF_MATRICES][at // len(SIDES)]
        if (name == "singular" and sides[at, 3]) or (name, linear) == ("a cycle", "bicgstab"):
            continue  # no solution, or a breakdown: the iterates are what rounding makes of them
        expected = direction("off", matrices[at], sides[at])
        size = expected.nan_to_num(0, 0, 0).abs().max().item()
        assert torch.allclose(x, expected, rtol=1e-6, atol=1e-6 * size, equal_nan=True), (name, sides[at], x, expected)


def test_each_lane_has_its_own_budget():
    matrix = torch.diag(torch.arange(1.0, 7, dtype=F64))
    sides = torch.eye(6, dtype=F64).cumsum(0)

    def step(compile: str, b: Tensor) -> Tensor:
        solver = solvers.newton(
            lambda x, b: matrix @ x + x**3 - b,
            linear_solve=linear_solve.solve_cg(maxiter=3),
            compile=compile,
            maxiter=1,
            on_failure="ignore",
        )
        result: Tensor = solver.run(torch.zeros(6, dtype=F64), b)[0]
        return result

    assert_same([vmap(lambda b: step("always", b))(sides)], [torch.stack([step("off", b) for b in sides])], 1e-10)


OPTIONS: dict[str, tuple[Any, Any]] = {
    "rtol": (linear_solve.solve_cg(rtol=0.5), linear_solve.solve_cg(rtol=0.1)),
    "atol": (linear_solve.solve_cg(atol=0.5), linear_solve.solve_cg(atol=0.1)),
    "maxiter": (linear_solve.solve_cg(maxiter=1), linear_solve.solve_cg(maxiter=2)),
    "ridge": (linear_solve.solve_cg(ridge=0.5), linear_solve.solve_cg(ridge=0.1)),
    "restart": (linear_solve.solve_gmres(restart=1, maxiter=3), linear_solve.solve_gmres(restart=3, maxiter=3)),
    "the method": (linear_solve.solve_bicgstab(maxiter=1), linear_solve.solve_normal_cg(maxiter=1)),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_recording_is_not_taken_for_that_of_another_option(name):
    def run(compile: str, solve: Any) -> tuple[Tensor, Tensor, Tensor]:
        options = {"compile": compile, "on_failure": "ignore", "maxiter": 3}
        return found(solvers.newton(symmetric, linear_solve=solve, **options), torch.zeros(3, dtype=F64), THETA)

    for solve in (*OPTIONS[name], *OPTIONS[name]):
        assert_same(run("always", solve), run("off", solve), 1e-9)
    results = [run("off", solve)[0] for solve in OPTIONS[name]]
    assert not torch.allclose(*results, rtol=1e-6)


# --- failures ---------------------------------------------------------------------------------------------------------

SIGNS = torch.tensor([1.0, -1.0, 0.5, 2.0, -3.0, 1.0, 1.0, 1.0, 1.0], dtype=F64)


def bending(x: Tensor, sign: Tensor) -> Tensor:
    """The gradient of a convex function for positive signs; for others not convex at 0."""
    return sign * x + x**3 - 1


def bending_later(x: Tensor, sign: Tensor) -> Tensor:
    """The curvature is that of ``sign`` from the second iterate on."""
    return torch.where(x > 0.1, sign, 1.0) * x + x**3 - torch.tensor([1.0, 2.0], dtype=F64)


def search(F: Any, compile: str, on_failure: str, **options: Any) -> Any:
    solve = linear_solve.solve_cg(on_failure=on_failure)
    return solvers.newton(F, linear_solve=solve, compile=compile, on_failure="ignore", maxiter=15, **options)


@pytest.mark.parametrize("F", [bending, bending_later])
def test_a_failure_in_one_lane_is_that_of_this_lane(F):
    def run(compile: str) -> tuple[Tensor, Tensor, Tensor]:
        return found(search(F, compile, "ignore"), torch.zeros(2, dtype=F64), SIGNS)

    for _ in range(2):
        x, status, iterations = run("always")
        assert_same((x, status, iterations), run("off"), 1e-10)
        good = SIGNS > 0
        assert (status[good] == Status.CONVERGED).all() and (status[~good] != Status.CONVERGED).any()
        assert torch.allclose(vmap(F)(x[good], SIGNS[good]), torch.zeros((), dtype=F64), atol=1e-9)


@pytest.mark.parametrize("first", ["the good lanes", "all lanes"])
@pytest.mark.parametrize("F", [bending, bending_later])
def test_a_failed_linear_system_raises_as_in_the_eager_loop(F, first):
    def run(compile: str, signs: Tensor) -> Any:
        return found(search(F, compile, "raise"), torch.zeros(2, dtype=F64), signs)

    good = SIGNS.abs()
    if first == "the good lanes":
        run("always", good)
    errors = []
    for compile in ("always", "auto", "always", "off"):
        with pytest.raises(LinearSolveError, match="not positive definite") as error:
            run(compile, SIGNS)
        errors.append(error.value)
    assert len({(e.solver, e.failed, e.total) for e in errors}) == 1
    # The failure does not keep later calls from their compiled loop.
    assert_same(run("always", good), run("off", good), 1e-10)
    assert recorded() and all(isinstance(known, Recording) for known in recorded())


def test_a_recording_that_nothing_was_compared_with_is_not_kept():
    for sign in (-1.0, -1.0, 1.0, -1.0, 1.0):
        args = torch.zeros(2, dtype=F64), torch.tensor(sign, dtype=F64)
        if sign < 0:
            before = recorded()
            with pytest.raises(LinearSolveError):
                found(search(bending, "always", "raise"), *args)
            assert recorded() == before
        else:
            assert found(search(bending, "always", "raise"), *args)[1] == Status.CONVERGED
            assert len(recorded()) == 1


@pytest.mark.parametrize("F", [bending, bending_later])
def test_a_single_search_warns_of_the_same_steps(F):
    def run(compile: str, sign: float) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found(search(F, compile, "warn"), torch.zeros(2, dtype=F64), torch.tensor(sign, dtype=F64))
        return [str(w.message) for w in caught]

    run("always", 1.0)
    expected = run("off", -3.0)
    assert expected and run("always", -3.0) == expected


@pytest.mark.parametrize("F", [bending, bending_later])
def test_a_warned_search_goes_on_as_the_eager_one(F):
    def run(compile: str) -> Any:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = found(search(F, compile, "warn"), torch.zeros(2, dtype=F64), SIGNS)
        assert caught and {w.category for w in caught} == {LinearSolveWarning}
        return result, len(caught)

    for _ in range(2):
        result, expected = run("always"), run("off")
        assert_same(result[0], expected[0], 1e-10)
        # Lanes in other blocks may be ahead.
        assert result[1] <= expected[1]


@pytest.mark.parametrize("on_failure", ["raise", "warn"])
def test_a_lane_that_has_stopped_reports_nothing(on_failure):
    """Its residual is not a number, alone as well."""
    signs = torch.tensor([1.0, torch.nan, 2.0], dtype=F64)
    expected = [found(search(bending, "off", on_failure), torch.zeros(2, dtype=F64), sign) for sign in signs]
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = found(search(bending, "always", on_failure), torch.zeros(2, dtype=F64), signs)
        assert_same(result, [torch.stack(parts) for parts in zip(*expected, strict=True)], 1e-10)


def test_lanes_that_the_machine_has_solved_are_judged_by_the_function_too(monkeypatch):
    """Also where another lane was left to Python."""
    asked = []
    above = solvers._loop.row_search.unfinished
    monkeypatch.setattr(solvers._loop.row_search, "unfinished", lambda *args: asked.append(args) or above(*args))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found(search(bending_later, "always", "warn"), torch.zeros(2, dtype=F64), SIGNS)
    assert len(asked) == 1


# --- what stays eager -------------------------------------------------------------------------------------------------

DIAGONAL = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
EAGER = {
    "a preconditioner": linear_solve.solve_cg(preconditioner=lambda r: r / DIAGONAL),
    "jacobi": linear_solve.solve_gmres(preconditioner=linear_solve.jacobi_preconditioner(lambda v: v, DIAGONAL)),
    "a guess": linear_solve.solve_cg(init=DIAGONAL),
}


@pytest.mark.parametrize("name", EAGER)
def test_a_solver_with_a_function_or_tensors_of_its_own_is_eager(name):
    def run(compile: str) -> tuple[Tensor, Tensor, Tensor]:
        solver = solvers.newton(symmetric, linear_solve=EAGER[name], compile=compile)
        return found(solver, torch.zeros(3, dtype=F64), THETA[1])

    with pytest.raises(CompileError, match="preconditioner or an initial guess"):
        run("always")
    for _ in range(2):
        assert all(map(torch.equal, run("auto"), run("off")))
    assert not kept._recordings
