"""A linear solve that fails is reported, lane by lane, and a regular system never is."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import warnings

import pytest
import torch
from checks.tensors import draw
from tables.linear_solvers import F32, F64, SOLVERS, definite, spread
from tables.linear_systems import (
    CHECK,
    LANES,
    LOOK,
    NAN,
    ONES,
    Counted,
    failure_of,
    name_of,
    relative_error,
    rows,
    solve_beside,
    times,
    tolerance,
)
from torch import Tensor
from torch.func import grad, jvp, vmap

from implicitdiff import custom_root
from implicitdiff.errors import LinearSolveError, LinearSolveWarning
from implicitdiff.linear_solve import (
    LinearSolver,
    solve_auto,
    solve_bicgstab,
    solve_cg,
    solve_cholesky,
    solve_gmres,
    solve_inv,
    solve_lu,
    solve_normal_cg,
)

# --- failure --------------------------------------------------------------------------------------------------------


def hard(n: int) -> Tensor:
    """A diagonal so ill-conditioned that an iteration gets nowhere."""
    return torch.logspace(0, -14, n, dtype=F64)


INDEFINITE = torch.diag(torch.tensor([1.0, -2.0, 3.0], dtype=F64))
SINGULAR = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [1.0, 0.0, 1.0]], dtype=F64)
HALF_NAN = torch.diag(torch.tensor([1.0, NAN, 3.0], dtype=F64))
HALF_INF = torch.diag(torch.tensor([1.0, float("inf"), 3.0], dtype=F64))
LOPSIDED = torch.tensor([[3.0, 1.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 3.0]], dtype=F64)

FAILURES = [
    pytest.param(solve_cg, INDEFINITE, "not positive definite", id="cg, indefinite"),
    pytest.param(solve_cg, -definite(3), "not positive definite", id="cg, negative definite"),
    pytest.param(functools.partial(solve_cg, maxiter=20), INDEFINITE, "not positive definite", id="cg, with a budget"),
    pytest.param(solve_lu, SINGULAR, "singular", id="lu, singular"),
    pytest.param(solve_inv, SINGULAR, "singular", id="inv, singular"),
    pytest.param(solve_auto, SINGULAR, "singular", id="auto, singular"),
    pytest.param(solve_gmres, SINGULAR, "no convergence", id="gmres, singular"),
    pytest.param(solve_bicgstab, torch.zeros(3, 3, dtype=F64), "no convergence", id="bicgstab, zero"),
    pytest.param(solve_normal_cg, SINGULAR, "", id="normal_cg, singular"),
    pytest.param(solve_lu, torch.zeros(3, 3, dtype=F64), "singular", id="lu, zero"),
    pytest.param(solve_cholesky, SINGULAR @ SINGULAR.T, "not Hermitian positive definite", id="cholesky, singular"),
    pytest.param(solve_cholesky, INDEFINITE, "not Hermitian positive definite", id="cholesky, indefinite"),
    pytest.param(solve_cholesky, LOPSIDED, "not Hermitian positive definite", id="cholesky, not symmetric"),
    pytest.param(functools.partial(solve_inv, ns=True), 3 * definite(3), "diverges", id="neumann, divergent"),
    pytest.param(
        functools.partial(solve_inv, ns=True, maxiter=10), 3 * definite(3), "diverges", id="neumann, with a budget"
    ),
    *[pytest.param(r.factory, HALF_NAN, "finite", id=f"{r}, nan") for r in SOLVERS if r.name != "neumann"],
    *[pytest.param(r.factory, HALF_INF, "", id=f"{r}, inf") for r in SOLVERS],
]


@pytest.mark.parametrize(("factory", "a", "reason"), FAILURES)
def test_failure_is_raised_and_says_of_what(factory, a, reason):
    error = failure_of(lambda: factory()(times(a), ONES))
    assert error.solver.startswith(name_of(factory))
    assert str(error).startswith(name_of(factory))
    assert reason in str(error)
    assert (error.failed, error.total) == (1, 1)
    assert error.iterations >= 0
    assert not error.residual <= error.target


@pytest.mark.parametrize("factory", [solve_cg, solve_gmres, solve_lu], ids=["cg", "gmres", "lu"])
@pytest.mark.parametrize("derivative", ["reverse", "forward", "reverse over reverse"])
def test_failure_in_a_derivative_is_raised_too(factory, derivative):
    @custom_root(lambda x, theta: x**2 - theta, solve=factory())
    def square_root(init, theta):
        return theta.sqrt()

    def f(theta):
        return square_root(None, theta).sum()

    # The residual's derivative 2 x is singular at the second element.
    theta = torch.tensor([4.0, 0.0, 9.0], dtype=F64)
    calls = {
        "reverse": lambda: grad(f)(theta),
        "forward": lambda: jvp(f, (theta,), (ONES,)),
        "reverse over reverse": lambda: grad(lambda theta: grad(f)(theta).sum())(theta),
    }
    error = failure_of(calls[derivative])
    assert error.solver == factory.__name__
    assert (error.failed, error.total) == (1, 1)


def test_one_bad_lane_of_a_derivative_is_one_of_many():
    @custom_root(lambda x, theta: x**2 - theta, solve=solve_lu())
    def square_root(init, theta):
        return theta.sqrt()

    batch = torch.tensor([[4.0, 1.0], [1.0, 0.0], [9.0, 1.0]], dtype=F64)
    error = failure_of(lambda: vmap(grad(lambda theta: square_root(None, theta).sum()))(batch))
    assert (error.failed, error.total) == (1, 3)


def test_failure_in_the_derivative_of_a_solve_is_raised():
    """Zero is solved at once, the adjoint system is not solved at all."""
    d, zero = hard(40), torch.zeros(40, dtype=F64)

    def f(b):
        return solve_cg()(lambda v: d * v, b)

    assert torch.equal(f(zero), zero)
    for derivative in (lambda: grad(lambda b: f(b).sum())(zero), lambda: jvp(f, (zero,), (zero + 1,))):
        error = failure_of(derivative)
        assert (error.solver, error.failed, error.total) == ("solve_cg", 1, 1)


@pytest.mark.parametrize(("factory", "a", "reason"), FAILURES)
def test_on_failure_warn_warns_and_ignore_is_silent(factory, a, reason):
    with pytest.warns(LinearSolveWarning, match=name_of(factory)) as caught:
        warned = factory(on_failure="warn")(times(a), ONES)
    assert reason in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ignored = factory(on_failure="ignore")(times(a), ONES)
    assert torch.equal(warned.nan_to_num(), ignored.nan_to_num())


def test_on_failure_holds_in_derivatives_too():
    def square_root(on_failure):
        return custom_root(lambda x, theta: x**2 - theta, solve=solve_lu(on_failure=on_failure))(
            lambda init, theta: theta.sqrt()
        )

    def f(on_failure):
        return grad(lambda theta: square_root(on_failure)(None, theta).sum())(torch.zeros(2, dtype=F64))

    with pytest.warns(LinearSolveWarning, match="solve_lu"):
        f("warn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f("ignore")


@rows()
def test_a_right_hand_side_that_is_not_finite_fails(row):
    a = row.matrix(3)
    for value in (NAN, float("inf"), -float("inf")):
        b = torch.tensor([1.0, value, 1.0], dtype=F64)
        error = failure_of(lambda b=b: row.factory()(times(a), b))
        assert error.failed == 1


@rows()
def test_one_bad_lane_among_good_ones_is_counted_and_spoils_no_other(row):
    a, b = row.matrix(5), draw(5, 4, 5)
    b[2, 3] = NAN
    error = failure_of(lambda: vmap(lambda b: row.factory()(times(a), b))(b))
    assert (error.failed, error.total) == (1, 4)
    x = vmap(lambda b: row.factory(on_failure="ignore")(times(a), b))(b)
    good = [0, 1, 3]
    assert relative_error(x[good], b[good] @ torch.linalg.inv(a).T) <= tolerance(row)


@rows()
def test_one_bad_matrix_among_good_ones_is_counted_and_spoils_no_other(row):
    a, b = torch.stack([row.matrix(5)] * 4), draw(5, 4, 5)
    a[1, 2, 2] = NAN
    error = failure_of(lambda: vmap(lambda a, b: row.factory()(times(a), b))(a, b))
    assert (error.failed, error.total) == (1, 4)
    x = vmap(lambda a, b: row.factory(on_failure="ignore")(times(a), b))(a, b)
    good = [0, 2, 3]
    assert relative_error(x[good], b[good] @ torch.linalg.inv(a[0]).T) <= tolerance(row)


def test_a_lane_that_does_not_converge_is_counted_beside_one_that_breaks_down():
    d, b = torch.stack([hard(40), -hard(40), hard(40) + 1]), torch.ones(40, dtype=F64)
    error = failure_of(lambda: vmap(lambda d: solve_cg()(lambda v: d * v, b))(d))
    assert (error.failed, error.total) == (2, 3)


@pytest.mark.parametrize("factory", [solve_cg, solve_bicgstab, solve_normal_cg], ids=["cg", "bicgstab", "normal_cg"])
def test_meeting_the_safety_net_is_a_failure(factory):
    d, b = hard(40), torch.ones(40, dtype=F64)
    error = failure_of(lambda: factory()(lambda v: d * v, b))
    assert "no convergence" in str(error)
    assert 0 < error.iterations <= 400
    x = factory(on_failure="ignore")(lambda v: d * v, b)
    assert error.residual == pytest.approx(float(torch.linalg.vector_norm(b - d * x)), rel=1e-6)
    assert error.target == pytest.approx(torch.finfo(F64).eps ** (2 / 3) * 40**0.5)
    assert f"after {error.iterations} iterations" in str(error)


def test_the_attributes_of_an_error_are_in_the_units_of_the_right_hand_side():
    d, b = hard(40), torch.ones(40, dtype=F64)
    plain = failure_of(lambda: solve_cg(rtol=1e-6)(lambda v: d * v, b))
    scaled = failure_of(lambda: solve_cg(rtol=1e-6)(lambda v: d * v, 1e9 * b))
    assert scaled.residual == pytest.approx(1e9 * plain.residual)
    assert scaled.target == pytest.approx(1e9 * plain.target)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_the_error_tells_of_the_worst_lane(order):
    """The first lane meets a direction of negative curvature after a step of 1/3, the last one at once."""
    d = torch.tensor([[4.0, -1.0], [1.0, 1.0], [-1.0, -1.0]], dtype=F64)[list(order)]
    b = torch.tensor([[1.0, 0.5], [1.0, 0.5], [1e-3, 0.5e-3]], dtype=F64)[list(order)]

    def solve(d: Tensor, b: Tensor, **options) -> Tensor:
        return solve_cg(rtol=1e-6, **options)(lambda v: d * v, b)

    error = failure_of(lambda: vmap(solve)(d, b))
    assert (error.failed, error.total) == (2, 3)
    # Of the size of the right-hand side the first lane's residual is 2/3, the last one's all.
    assert error.residual == pytest.approx(1e-3 * 1.25**0.5, rel=1e-12)
    assert error.target == pytest.approx(1e-9 * 1.25**0.5, rel=1e-12)
    x = vmap(functools.partial(solve, on_failure="ignore"))(d, b)
    reached = torch.tensor([[1.0 / 3, 0.5 / 3], [1.0, 0.5], [0.0, 0.0]], dtype=F64)[list(order)]
    torch.testing.assert_close(x, reached, rtol=1e-12, atol=0.0)


@rows("maxiter", iterative=True)
def test_an_integer_maxiter_is_a_budget_and_no_failure(row):
    a, b = row.matrix(30), draw(5, 30)
    for budget in (1, 2, 3):
        x = row.factory(maxiter=budget)(times(a), b)
        residual = torch.linalg.vector_norm(b - a @ x)
        assert torch.isfinite(residual)
        assert residual > 1e-6
    matvec = Counted(times(a))
    row.factory(maxiter=3)(matvec, b)
    assert matvec.calls <= LOOK + 3 * (2 if row.name == "bicgstab" else 1) + 2 * CHECK


@LANES
@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("row", [r for r in SOLVERS if r.iterative], ids=str)
def test_values_that_are_not_finite_end_the_iteration(row, value, lanes):
    """The safety net is ten thousand iterations here."""
    d = torch.ones(1000, dtype=F64)
    d[7] = value
    matvec = Counted(lambda v: d * v)
    failure_of(lambda: solve_beside(lanes, row.factory(), matvec, torch.ones(1000, dtype=F64)))
    assert matvec.calls <= 200


SIZES = [2, 3, 4, 5, 7, 10, 14, 20, 33, 50, 100, 300]


def low_rank(seed: int, count: int, n: int, dtype: torch.dtype) -> Tensor:
    return draw(seed, count, n, n - 1, dtype=dtype) @ draw(seed + 1, count, n - 1, n, dtype=dtype)


def semidefinite(seed: int, count: int, n: int, dtype: torch.dtype) -> Tensor:
    factor = draw(seed, count, n, n - 1, dtype=dtype)
    return factor @ factor.mT


def laplacian(seed: int, count: int, n: int, dtype: torch.dtype) -> Tensor:
    """Of a complete graph with random weights: constants are in both null spaces."""
    w = draw(seed, count, n, n, dtype=dtype).abs()
    w = w + w.mT
    return torch.diag_embed(w.sum(dim=-1)) - w


def dependent_rows(seed: int, count: int, n: int, dtype: torch.dtype) -> Tensor:
    a = draw(seed, count, n, n, dtype=dtype)
    a[:, n // 2] = 3.3 * a[:, 0] if n > 2 else a[:, 0]
    return a


def scaled_low_rank(seed: int, count: int, n: int, dtype: torch.dtype) -> Tensor:
    exponents = torch.linspace(-8, 8, n, dtype=dtype)
    return 10 ** exponents[:, None] * low_rank(seed, count, n, dtype) * 10 ** -exponents.flip(0)


SINGULAR_FAMILIES = [low_rank, semidefinite, laplacian, dependent_rows, scaled_low_rank]


def failures(solver: LinearSolver, a: Tensor, b: Tensor) -> int:
    try:
        vmap(lambda a, b: solver(times(a), b))(a, b)
    except LinearSolveError as error:
        return error.failed
    return 0


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(
    ("factory", "family"),
    [
        *[(s, f) for s in (solve_lu, solve_inv) for f in SINGULAR_FAMILIES],
        *[(solve_auto, f) for f in SINGULAR_FAMILIES[:2]],
        *[(solve_cholesky, f) for f in (semidefinite, laplacian)],
    ],
    ids=lambda f: f.__name__,
)
def test_a_singular_matrix_always_fails(factory, family, dtype):
    missed = {}
    for n in SIZES:
        count = 15 if n <= 50 else 1
        a = family(n, count, n, dtype)
        b = draw(n + 5, count, n, dtype=dtype)
        b[::2] = (a @ draw(n + 6, count, n, 1, dtype=dtype))[::2, :, 0]
        # Together and alone: how one lane is scaled may depend on the others.
        together, few = failures(factory(), a, b), min(count, 5)
        alone = sum(failures(factory(), a[i : i + 1], b[i : i + 1]) for i in range(few))
        if found := count - together + few - alone:
            missed[n] = found
    assert not missed


def well_conditioned(seed: int, count: int, n: int, dtype: torch.dtype) -> Tensor:
    q = torch.linalg.qr(draw(seed, count, n, n))[0]
    return (q * spread(n) @ torch.linalg.qr(draw(seed + 1, count, n, n))[0]).to(dtype)


def well_conditioned_definite(seed: int, count: int, n: int, dtype: torch.dtype) -> Tensor:
    q = torch.linalg.qr(draw(seed, count, n, n))[0]
    return ((q * spread(n)) @ q.mT).to(dtype)


def badly_scaled_rows(seed: int, count: int, n: int, dtype: torch.dtype) -> Tensor:
    exponents = torch.linspace(-18, 18, n, dtype=F64)[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
    return (10 ** exponents[:, None] * well_conditioned(seed, count, n, F64)).to(dtype)


def badly_scaled_columns(seed: int, count: int, n: int, dtype: torch.dtype) -> Tensor:
    return badly_scaled_rows(seed, count, n, dtype).mT


def badly_scaled_diagonal(seed: int, count: int, n: int, dtype: torch.dtype) -> Tensor:
    return torch.diag_embed(10 ** torch.linspace(-20, 20, n, dtype=F64)).expand(count, n, n).to(dtype)


def badly_scaled_definite(seed: int, count: int, n: int, dtype: torch.dtype) -> Tensor:
    scale = 10 ** torch.linspace(-9, 9, n, dtype=F64)
    return (scale[:, None] * well_conditioned_definite(seed, count, n, F64) * scale).to(dtype)


REGULAR_FAMILIES = [well_conditioned, badly_scaled_rows, badly_scaled_columns, badly_scaled_diagonal]
DEFINITE_FAMILIES = [well_conditioned_definite, badly_scaled_definite, badly_scaled_diagonal]


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(
    ("factory", "family"),
    [
        *[(s, f) for s in (solve_lu, solve_inv) for f in (*REGULAR_FAMILIES, *DEFINITE_FAMILIES[:2])],
        *[(solve_auto, f) for f in REGULAR_FAMILIES[:2]],
        *[(solve_cholesky, f) for f in DEFINITE_FAMILIES],
    ],
    ids=lambda f: f.__name__,
)
def test_a_regular_matrix_never_fails_however_it_is_scaled(factory, family, dtype):
    solver = factory()
    for n in [1, *SIZES]:
        count = 10 if n <= 50 else 1
        a = family(n, count, n, dtype)
        b = (a.double() @ draw(n + 5, count, n, 1))[..., 0].to(dtype)
        assert failures(solver, a, b) == 0, n


def test_the_errors_survive_pickling_and_copying():
    error = failure_of(lambda: solve_cg()(times(INDEFINITE), ONES))
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert str(other) == str(error)
        assert vars(other) == vars(error)


@pytest.mark.parametrize("factory", [solve_lu, solve_cholesky, solve_inv, solve_auto])
def test_a_singular_matrix_is_reported_with_a_right_hand_side_of_zero_too(factory):
    with pytest.raises(LinearSolveError, match=r"singular|definite"):
        factory()(lambda v: 0 * v, torch.zeros(2, dtype=F64))


@pytest.mark.parametrize("factory", [solve_lu, solve_cholesky, solve_inv, solve_auto])
def test_a_lane_with_a_singular_matrix_is_nan_with_ignore(factory):
    # The second matrix is singular to working precision only, so a factorisation finds a finite x.
    matrices = torch.stack([torch.eye(2, dtype=F64), torch.tensor([[1.0, 1.0], [1.0, 1.0 + 2e-16]], dtype=F64)])
    x = vmap(lambda a: factory(on_failure="ignore")(lambda v: a @ v, torch.ones(2, dtype=F64)))(matrices)
    assert torch.equal(x[0], torch.ones(2, dtype=F64)) and x[1].isnan().all()


@pytest.mark.parametrize("factory", [solve_lu, solve_cholesky, solve_inv, solve_auto])
def test_a_cotangent_of_zero_does_not_hide_a_singular_matrix(factory):
    """The root of ``x^2 = c`` at c = 0: the loss ``x^2`` has the derivative 1, as a product of 0 and infinity."""

    def loss(c, on_failure):
        solve = factory(on_failure=on_failure)
        root = custom_root(lambda x, c: x**2 - c, solve=solve)(lambda init, c: c.sqrt())
        return root(None, c).square().sum()

    zero = torch.zeros(1, dtype=F64)
    with pytest.raises(LinearSolveError):
        grad(loss)(zero, "raise")
    with pytest.warns(LinearSolveWarning):
        assert grad(loss)(zero, "warn").isnan().all()
    assert grad(loss)(zero, "ignore").isnan().all()
