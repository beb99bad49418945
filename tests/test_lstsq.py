"""Derivatives of `solve_lstsq` at matrices that have no inverse: against torch.linalg.pinv, whose derivative is that of
constant rank, closed forms and differences."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import pytest
import torch
from checks.derivatives import backward_twice, lanes, parts
from checks.tensors import draw
from tables.linear_solvers import C64, C128, F32, F64, spread, unitary
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from implicitdiff import custom_root
from implicitdiff.errors import LinearSolveError, LinearSolveWarning
from implicitdiff.linear_solve import solve_lstsq

EPS = torch.finfo(F64).eps
THETA = torch.tensor([0.1, -0.2], dtype=F64)


class Family:
    """Matrices of one rank for all parameters, as products of two factors, and right-hand sides."""

    def __init__(
        self, n: int, rank: int, dtype: torch.dtype = F64, *, hermitian: bool = False, consistent: bool = False
    ) -> None:
        self.n, self.rank, self.hermitian, self.consistent = n, rank, hermitian, consistent
        # The singular values of a factor are the square roots of those of the matrix, nearly.
        size = spread(n).sqrt()[:rank].to(dtype)
        self.columns = [unitary(seed, n, dtype)[:, :rank] * size for seed in (1, 2)]
        self.turns = [[draw(seed + i, n, n, dtype=dtype) / n for i in range(3)] for seed in (3, 6)]
        self.sides = [draw(seed, n, dtype=dtype) for seed in (9, 10)]

    def left(self, theta: Tensor) -> Tensor:
        return self._factor(1, theta) if self.hermitian else self._factor(0, theta)

    def right(self, theta: Tensor) -> Tensor:
        return self._factor(1, theta).mH

    def _factor(self, i: int, theta: Tensor) -> Tensor:
        columns, turns = self.columns[i], self.turns[i]
        return columns + (theta[0] * turns[0] + theta[1].sin() * turns[1] + theta.prod() * turns[2]) @ columns

    def matrix(self, theta: Tensor) -> Tensor:
        return self.left(theta) @ self.right(theta)

    def side(self, theta: Tensor) -> Tensor:
        b = self.sides[0] + theta[1] * self.sides[1]
        return self.matrix(theta) @ b if self.consistent else b

    def reference(self, theta: Tensor) -> Tensor:
        return torch.linalg.pinv(self.matrix(theta), rtol=1e-8) @ self.side(theta)

    def within(self, theta: Tensor) -> Tensor:
        """The matrix has only parameters in matvec."""
        return solve_lstsq()(lambda v: self.left(theta) @ (self.right(theta) @ v), self.side(theta))

    def without(self, theta: Tensor) -> Tensor:
        """The matrix is made before."""
        a = self.matrix(theta)
        return solve_lstsq()(lambda v: a @ v, self.side(theta))

    def condition(self) -> float:
        s = torch.linalg.svdvals(self.matrix(THETA))[: self.rank]
        return float(s.max() / s.min()) if self.rank else 1.0


def number(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda theta: (lambda x: (x**3).sum() + x.cumsum(0).square().sum())(parts(f)(theta))


TRANSFORMS = {
    "jacfwd": (1, lambda f, t: jacfwd(parts(f))(t)),
    "jacrev": (1, lambda f, t: jacrev(parts(f))(t)),
    "vmap of grad": (1, lambda f, t: vmap(grad(number(f)))(lanes(t))),
    "grad of vmap": (1, lambda f, t: grad(lambda t: vmap(number(f))(t).sum())(lanes(t))),
    "jvp of vmap": (1, lambda f, t: jvp(vmap(number(f)), (lanes(t),), (lanes(t).cos(),))[1]),
    "hessian": (2, lambda f, t: hessian(number(f))(t)),
    "jacfwd of jacrev": (2, lambda f, t: jacfwd(jacrev(parts(f)))(t)),
    "jacrev of jacfwd": (2, lambda f, t: jacrev(jacfwd(parts(f)))(t)),
    "jacfwd of jacfwd": (2, lambda f, t: jacfwd(jacfwd(parts(f)))(t)),
    "jacrev of jacrev": (2, lambda f, t: jacrev(jacrev(parts(f)))(t)),
    "vmap of hessian": (2, lambda f, t: vmap(hessian(number(f)))(lanes(t))),
    "hessian of vmap": (2, lambda f, t: hessian(lambda t: vmap(number(f))(t).sum())(lanes(t))),
    "backward twice": (2, lambda f, t: backward_twice(number(f), t)),
    "three times, mixed": (3, lambda f, t: jacfwd(jacrev(grad(number(f))))(t)),
}


def assert_close(result: Tensor, reference: Tensor, family: Family, order: int) -> None:
    """To rounding, which each derivative multiplies by the condition, of both the solution and the reference."""
    assert result.shape == reference.shape
    allowed = 100 * family.n * EPS * family.condition() ** (order + 1)
    assert float((result - reference).abs().max()) <= allowed * (float(reference.abs().max()) + EPS)


RANKS = [(n, r) for n in (3, 4, 5, 6) for r in range(n + 1)]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("place", ["within", "without"])
@pytest.mark.parametrize("dtype", [F64, C128], ids=str)
@pytest.mark.parametrize(("n", "rank"), RANKS)
def test_derivatives_of_every_rank_are_those_of_the_pseudoinverse(n, rank, dtype, place):
    family = Family(n, rank, dtype)
    for name in ("jacfwd", "jacrev", "jacfwd of jacrev"):
        order, apply = TRANSFORMS[name]
        assert_close(apply(getattr(family, place), THETA), apply(family.reference, THETA), family, order)


FAMILIES = {
    "real": Family(4, 2),
    "complex": Family(4, 2, C128),
    "symmetric": Family(4, 2, hermitian=True),
    "Hermitian": Family(3, 1, C128, hermitian=True),
    "consistent": Family(4, 3, consistent=True),
    "complex, consistent": Family(3, 2, C128, consistent=True),
    "regular": Family(3, 3),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("place", ["within", "without"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_derivatives_under_every_transform_are_those_of_the_pseudoinverse(kind, place, transform):
    family, (order, apply) = FAMILIES[kind], TRANSFORMS[transform]
    assert_close(apply(getattr(family, place), THETA), apply(family.reference, THETA), family, order)


@pytest.mark.parametrize("kind", FAMILIES)
def test_derivatives_are_the_limits_of_differences(kind):
    family, h = FAMILIES[kind], 1e-3
    way = THETA.cos()

    def along(s: float) -> Tensor:
        return parts(family.without)(THETA + s * way)

    one, two = ((along(d) - along(-d)) / (2 * d) for d in (h, 2 * h))
    found = jvp(parts(family.within), (THETA,), (way,))[1]
    # Of fourth order in h, and of the rounding of a difference.
    allowed = 100 * (h**4 + EPS * family.condition() / h)
    assert float((found - (4 * one - two) / 3).abs().max()) <= allowed * float(found.abs().max())


@pytest.mark.parametrize("kind", FAMILIES)
def test_gradcheck_in_both_modes_to_second_order(kind):
    family, theta = FAMILIES[kind], THETA.clone().requires_grad_()
    assert torch.autograd.gradcheck(family.within, theta, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(family.within, theta, check_fwd_over_rev=True, fast_mode=True)


def test_the_solution_turns_with_the_null_space():
    """Of ``u v^T`` with ``v = (cos t, sin t)`` it is ``(u, b) v``, with derivative ``(u, b) v'``, in the null space."""
    u, b = torch.tensor([0.6, 0.8], dtype=F64), torch.tensor([1.0, 3.0], dtype=F64)
    t = torch.tensor(0.7, dtype=F64)
    solution = lambda t: solve_lstsq()(lambda v: u * (t.cos() * v[0] + t.sin() * v[1]), b)  # noqa: E731
    expected = 3.0 * torch.stack([-t.sin(), t.cos()])
    for jacobian in (jacfwd, jacrev):
        torch.testing.assert_close(jacobian(solution)(t), expected, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(jacobian(jacobian(solution))(t), -solution(t), rtol=1e-13, atol=1e-13)


def test_a_solution_that_does_not_fit_turns_with_the_range():
    """Of ``u v^T`` with ``u = (cos t, sin t)`` it is ``(u, b) v``, whatever the misfit."""
    v, b = torch.tensor([0.6, 0.8], dtype=F64), torch.tensor([1.0, 3.0], dtype=F64)
    t = torch.tensor(0.7, dtype=F64)
    solution = lambda t: solve_lstsq()(lambda w: (v @ w) * torch.stack([t.cos(), t.sin()]), b)  # noqa: E731
    for jacobian in (jacfwd, jacrev):
        expected = (3.0 * t.cos() - t.sin()) * v
        torch.testing.assert_close(jacobian(solution)(t), expected, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(jacobian(jacobian(solution))(t), -solution(t), rtol=1e-13, atol=1e-13)


def test_right_hand_sides_of_one_matrix_are_columns():
    family = FAMILIES["real"]
    sides = draw(3, 5, 4)

    def solutions(theta: Tensor) -> Tensor:
        return vmap(lambda b: solve_lstsq()(lambda v: family.left(theta) @ (family.right(theta) @ v), b))(sides)

    def reference(theta: Tensor) -> Tensor:
        return sides @ torch.linalg.pinv(family.matrix(theta), rtol=1e-8).T

    for order, derivative in [(1, jacfwd), (1, jacrev), (2, lambda f: jacfwd(jacrev(f))), (1, vmapped)]:
        assert_close(derivative(solutions)(THETA), derivative(reference)(THETA), family, order)


def vmapped(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Columns in lanes."""
    return lambda theta: vmap(jacrev(f))(lanes(theta))


def test_unknowns_in_several_leaves():
    family = FAMILIES["real"]

    def solution(theta: Tensor) -> Tensor:
        def matvec(v: dict[str, Tensor]) -> dict[str, Tensor]:
            y = family.matrix(theta) @ torch.cat([v["a"], v["b"].flatten()])
            return {"a": y[:2], "b": y[2:].reshape(1, 2), "none": v["none"]}

        b = family.side(theta)
        x = solve_lstsq()(matvec, {"a": b[:2], "b": b[2:].reshape(1, 2), "none": b[:0]})
        return torch.cat([x["a"], x["b"].flatten()])

    for name in ("jacfwd", "jacrev", "hessian", "hessian of vmap"):
        order, apply = TRANSFORMS[name]
        assert_close(apply(solution, THETA), apply(family.reference, THETA), family, order)


def test_an_operator_that_is_linear_over_the_reals_alone():
    """``a Re(c v)`` is of rank one over the reals."""
    b = torch.tensor(1.0 + 2.0j, dtype=C128)

    def factors(theta: Tensor) -> tuple[Tensor, Tensor]:
        return torch.polar(1 + theta[0], theta[1]), torch.polar(2 + theta[1], theta[0])

    def solution(theta: Tensor) -> Tensor:
        a, c = factors(theta)
        return solve_lstsq()(lambda v: a * (c * v).real, b)

    def closed_form(theta: Tensor) -> Tensor:
        a, c = factors(theta)
        return (a.conj() * b).real / (a.abs() * c.abs()).square() * c.conj()

    for name in ("jacfwd", "jacrev", "hessian"):
        order, apply = TRANSFORMS[name]
        reference = apply(lambda t: closed_form(t)[None], THETA).reshape(apply(solution, THETA).shape)
        assert_close(apply(solution, THETA), reference, Family(2, 1), order)


@pytest.mark.parametrize("dtype", [F32, C64], ids=str)
def test_single_precision(dtype):
    double = Family(4, 2, C128 if dtype.is_complex else F64)

    def solution(theta: Tensor) -> Tensor:
        a = double.matrix(theta.to(F64)).to(dtype)
        return solve_lstsq()(lambda v: a @ v, double.side(theta.to(F64)).to(dtype))

    for jacobian in (jacfwd, jacrev):
        found = jacobian(parts(solution))(THETA.to(F32)).to(F64)
        expected = jacobian(parts(double.reference))(THETA)
        allowed = 100 * 4 * torch.finfo(F32).eps * double.condition() ** 2
        assert float((found - expected).abs().max()) <= allowed * float(expected.abs().max())


def test_noise_below_rtol_counts_as_zero_in_derivatives_too():
    family, size = FAMILIES["real"], 1e-10
    noise = size * draw(20, 4, 4)

    def solution(theta: Tensor) -> Tensor:
        a = family.matrix(theta) + noise * theta.cos().sum()
        return solve_lstsq(rtol=1e-8)(lambda v: a @ v, family.side(theta))

    for jacobian in (jacfwd, jacrev):
        found, expected = jacobian(solution)(THETA), jacobian(family.reference)(THETA)
        assert float((found - expected).abs().max()) <= 100 * size * float(expected.abs().max())


def test_the_derivative_along_a_continuum_of_solutions():
    """A fit with more weights than data has ``w' = J^+ y'``, whose derivative is that of the pseudoinverse."""
    x = torch.tensor([[1.0, 2.0, 0.5]], dtype=F64)

    def model(w: Tensor) -> Tensor:
        return x @ (w + 0.1 * w**3)

    @custom_root(grad(lambda w, y: (model(w) - y).square().sum() / 2), solve=solve_lstsq())
    def fit(w: Tensor, y: Tensor) -> Tensor:
        for _ in range(30):
            w = w - torch.linalg.pinv(jacrev(model)(w)) @ (model(w) - y)
        return w

    def solution(y: Tensor) -> Tensor:
        return fit(torch.tensor([0.3, 0.2, 0.1], dtype=F64), y)

    def slope(w: Tensor) -> Tensor:
        return torch.linalg.pinv(jacrev(model)(w))[:, 0]

    y = torch.tensor([1.5], dtype=F64)
    w = solution(y)
    expected = jvp(slope, (w,), (slope(w),))[1]
    for outer in (jacfwd, jacrev):
        for inner in (jacfwd, jacrev):
            found = outer(inner(solution))(y)[:, 0, 0]
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


# --- where the rank changes -------------------------------------------------------------------------------------------

B = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
ZERO = torch.zeros((), dtype=F64)


def opening(t: Tensor, b: Tensor = B, **options) -> Tensor:
    """Of rank two, at zero of rank one."""
    return solve_lstsq(**options)(lambda v: torch.stack([v[0], t * v[1], 0 * v[2]]), b)


def outside(t: Tensor, **options) -> Tensor:
    a = torch.diag(torch.stack([torch.ones_like(t), t, torch.zeros_like(t)]))
    return solve_lstsq(**options)(lambda v: a @ v, B)


RANK = "solve_lstsq: the rank of the matrix changes .* systems failed; worst residual"
CHANGES = {
    "jvp": lambda: jvp(opening, (ZERO,), (ZERO + 1,)),
    "jacfwd": lambda: jacfwd(opening)(ZERO),
    "grad": lambda: grad(lambda t: opening(t).sum())(ZERO),
    "jacrev": lambda: jacrev(opening)(ZERO),
    "backward": lambda: opening(ZERO.clone().requires_grad_()).sum().backward(),
    "of a product": lambda: grad(lambda t: opening(2 * t).sum())(ZERO),
    "matrix made before": lambda: jacfwd(outside)(ZERO),
    "with an inconsistent tangent": lambda: jvp(opening, (ZERO, B), (ZERO + 1, B)),
    "jvp of vmap": lambda: jvp(vmap(opening), (torch.stack([ZERO, ZERO + 1]),), (torch.ones(2, dtype=F64),)),
    "vmap of grad": lambda: vmap(grad(lambda t: opening(t).sum()))(torch.stack([ZERO + 1, ZERO])),
    "grad of vmap": lambda: grad(lambda t: vmap(opening)(t).sum())(torch.stack([ZERO + 1, ZERO])),
    "columns": lambda: grad(lambda t: vmap(opening, (None, 0))(t, torch.stack([B, 2 * B])).sum())(ZERO),
    "from nothing": lambda: jacfwd(lambda t: solve_lstsq()(lambda v: t * v, B))(ZERO),
    "of a matrix": lambda: jvp(lambda a: solve_lstsq()(lambda v: a @ v, B), (torch.diag(B - 1),), (draw(1, 3, 3),)),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_of_rank_is_raised(case):
    with pytest.raises(LinearSolveError, match=RANK):
        CHANGES[case]()


@pytest.mark.parametrize("size", [1e-100, 1e-3, 1e100])
def test_the_size_of_the_matrix_does_not_matter(size):
    family = FAMILIES["real"]
    with pytest.raises(LinearSolveError, match=RANK):
        jacfwd(lambda t: solve_lstsq()(lambda v: size * torch.stack([v[0], t * v[1], 0 * v[2]]), B))(ZERO)
    found = jacfwd(lambda t: solve_lstsq()(lambda v: size * (family.matrix(t) @ v), family.side(t)))(THETA)
    assert_close(size * found, jacfwd(family.reference)(THETA), family, 1)


def test_lanes_where_the_rank_changes_are_counted():
    with pytest.raises(LinearSolveError) as caught:
        vmap(grad(lambda t: opening(t).sum()))(torch.tensor([1.0, 0.0, 2.0, 0.0, 3.0], dtype=F64))
    assert (caught.value.solver, caught.value.failed, caught.value.total) == ("solve_lstsq", 2, 5)
    assert caught.value.residual > 1e3 * caught.value.target


def test_on_failure_holds_where_the_rank_changes():
    for derivative in (jacfwd, jacrev):
        with pytest.warns(LinearSolveWarning, match=RANK):
            warned = derivative(functools.partial(opening, on_failure="warn"))(ZERO)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ignored = derivative(functools.partial(opening, on_failure="ignore"))(ZERO)
        torch.testing.assert_close(warned, ignored)


def test_no_derivative_is_asked_for_where_the_rank_changes():
    # Along another direction, for a part of the lanes, and in the right-hand side alone.
    assert not jvp(opening, (ZERO, B), (0 * ZERO, B))[1].isnan().any()
    t = torch.tensor([0.0, 2.0], dtype=F64)
    found = grad(lambda t: torch.where(t == 0, 0.0, vmap(opening)(t).sum(dim=1)).sum())(t)
    torch.testing.assert_close(found, torch.tensor([0.0, -0.5], dtype=F64))
    assert jacrev(opening, 1)(ZERO, B).diagonal().tolist() == [1.0, 0.0, 0.0]


def test_a_matrix_that_moves_along_one_rank_may_be_a_cotangents_intermediate():
    """The cotangent of a matrix is not for all directions, and is right for those of constant rank."""
    family = FAMILIES["real"]
    a, move = jvp(family.matrix, (THETA,), (THETA.cos(),))
    weights, b = draw(1, 4), draw(2, 4)
    cotangent = grad(lambda a: weights @ solve_lstsq()(lambda v: a @ v, b))(a)
    expected = jvp(lambda t: weights @ torch.linalg.pinv(family.matrix(t), rtol=1e-8) @ b, (THETA,), (THETA.cos(),))[1]
    assert_close((cotangent * move).sum(), expected, family, 1)
    with pytest.raises(LinearSolveError, match=RANK):
        jvp(lambda a: solve_lstsq()(lambda v: a @ v, b), (a,), (draw(3, 4, 4),))


def test_two_numbers_that_move_together_keep_the_rank():
    """``1 - s^2`` and ``c^2`` are the same on a circle alone."""

    def solution(t: Tensor) -> Tensor:
        c, s = t.cos(), t.sin()
        return solve_lstsq()(
            lambda v: torch.stack([(1 - s * s) * v[0] + c * s * v[1], c * s * v[0] + s * s * v[1]]), B[:2]
        )

    def closed_form(t: Tensor) -> Tensor:
        v = torch.stack([t.cos(), t.sin()])
        return v * (v @ B[:2])

    t = torch.tensor(0.4, dtype=F64)
    for derivative in (jacfwd, jacrev, lambda f: jacfwd(jacrev(f)), lambda f: jacrev(jacrev(f))):
        torch.testing.assert_close(derivative(solution)(t), derivative(closed_form)(t), rtol=1e-12, atol=1e-12)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("speed", [1e-8, 1e-4, 1.0, 1e4, 1e8])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6, 1e10])
def test_rounding_is_no_change_of_rank(condition, speed, dtype):
    if condition > 0.01 / torch.finfo(dtype).eps:
        pytest.skip("singular to working precision")
    for seed in range(6):
        q = [unitary(seed + i, 5, F64)[:, :3] for i in (10, 20)]
        values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), 3, dtype=F64)
        turns = [draw(seed + i, 5, 5) for i in (30, 40)]

        def solution(t: Tensor, q=q, values=values, turns=turns) -> Tensor:
            t = t.to(F64) * speed
            left, right = q[0] * values + t * turns[0] @ q[0], q[1] + (t * turns[1]).sin() @ q[1]
            a = (left @ right.T).to(dtype)
            return solve_lstsq()(lambda v: a @ v, torch.ones(5, dtype=dtype))

        for run in (jacfwd(solution), jacfwd(jacrev(solution))):
            run(torch.zeros((), dtype=dtype))


def test_a_derivative_that_is_rounding_alone_is_no_change_of_rank():
    """A rotation leaves ``R^T R`` at one, up to rounding, in its derivative too."""
    skew = draw(1, 4, 4) - draw(1, 4, 4).T

    def solution(t: Tensor) -> Tensor:
        r = torch.linalg.matrix_exp(t * skew)
        a = r.T @ r - torch.full((4, 4), 0.25, dtype=F64)
        return solve_lstsq(rtol=1e-12)(lambda v: a @ v, torch.ones(4, dtype=F64).cumsum(0))

    for t in torch.linspace(0, 3, 7, dtype=F64):
        _, tangent = jvp(solution, (t,), (torch.ones_like(t),))
        assert float(tangent.abs().max()) <= 1e3 * EPS


def test_a_pullback_through_a_regular_matrix_is_as_before():
    a, b = draw(1, 5, 5), draw(2, 5)
    x, pull = vjp(lambda a, b: solve_lstsq()(lambda v: a @ v, b), a, b)
    u = torch.linalg.solve(a.T, b.cos())
    condition = float(torch.linalg.cond(a))
    for found, expected in zip(pull(b.cos()), (-torch.outer(u, x), u), strict=True):
        assert float((found - expected).abs().max()) <= 100 * EPS * condition**2 * float(expected.abs().max())
