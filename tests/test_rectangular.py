"""Linear solvers on operators whose unknowns are another tree than the right-hand side: against torch.linalg.pinv and
lstsq, whose derivative is that of constant rank, closed forms and differences."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from checks.derivatives import backward_twice, lanes, parts
from checks.tensors import draw
from tables.linear_solvers import C64, C128, F32, F64
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from implicitdiff.errors import LinearSolveError, LinearSolveWarning
from implicitdiff.linear_solve import (
    solve_auto,
    solve_bicgstab,
    solve_cg,
    solve_cholesky,
    solve_gmres,
    solve_inv,
    solve_lstsq,
    solve_lu,
    solve_normal_cg,
)

THETA = torch.tensor([0.3, -0.2], dtype=F64)


def jacobi(a: Tensor) -> Callable[[Tensor], Tensor]:
    """The diagonal of the smaller one of ``A^H A`` and ``A A^H``, inverted."""
    product = a.mH @ a if a.shape[0] >= a.shape[1] else a @ a.mH
    diagonal = product.diagonal().detach()
    return lambda r: r / diagonal


SOLVERS = {
    "lstsq": lambda a: solve_lstsq(),
    "normal_cg": lambda a: solve_normal_cg(rtol=1e-13),
    "normal_cg, preconditioner": lambda a: solve_normal_cg(rtol=1e-13, preconditioner=jacobi(a)),
}
every_solver = pytest.mark.parametrize("solver", SOLVERS)
every_shape = pytest.mark.parametrize("shape", [(6, 3), (3, 6), (5, 1), (1, 5), (4, 3)], ids=str)
both = pytest.mark.parametrize("factory", [solve_lstsq, solve_normal_cg], ids=["lstsq", "normal_cg"])
numbers = pytest.mark.parametrize("dtype", [F64, C128], ids=str)


def matrix(shape: tuple[int, int], dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    return torch.eye(*shape, dtype=dtype) + 0.4 * draw(seed, *shape, dtype=dtype)


class Family:
    """Matrices of full rank, and right-hand sides that are not in the range of the tall ones."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.parts = [matrix(shape, dtype), *(0.3 * draw(seed, *shape, dtype=dtype) for seed in (1, 2))]
        self.sides = [draw(seed, shape[0], dtype=dtype) for seed in (3, 4)]

    def matrix(self, theta: Tensor) -> Tensor:
        return self.parts[0] + theta[0] * self.parts[1] + theta.prod().sin() * self.parts[2]

    def side(self, theta: Tensor) -> Tensor:
        return self.sides[0] + theta[1] * self.sides[1]

    def reference(self, theta: Tensor) -> Tensor:
        return torch.linalg.pinv(self.matrix(theta)) @ self.side(theta)

    def solution(self, solver: str) -> Callable[[Tensor], Tensor]:
        def solve(theta: Tensor) -> Tensor:
            a = self.matrix(theta)
            return SOLVERS[solver](a)(lambda v: a @ v, self.side(theta))

        return solve


def number(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda theta: (parts(f)(theta) ** 3).sum()


TRANSFORMS = {
    "value": lambda f, t: f(t),
    "vmap": lambda f, t: vmap(f)(lanes(t)),
    "jacfwd": lambda f, t: jacfwd(parts(f))(t),
    "jacrev": lambda f, t: jacrev(parts(f))(t),
    "vmap of grad": lambda f, t: vmap(grad(number(f)))(lanes(t)),
    "grad of vmap": lambda f, t: grad(lambda t: vmap(number(f))(t).sum())(lanes(t)),
    "jvp of vmap": lambda f, t: jvp(vmap(number(f)), (lanes(t),), (lanes(t).cos(),))[1],
    "hessian": lambda f, t: hessian(number(f))(t),
    "jacrev of jacrev": lambda f, t: jacrev(jacrev(number(f)))(t),
    "jacrev of jacfwd": lambda f, t: jacrev(jacfwd(number(f)))(t),
    "backward twice": lambda f, t: backward_twice(number(f), t),
}


def assert_close(result: Tensor, reference: Tensor, rtol: float = 1e-11) -> None:
    assert result.shape == reference.shape
    assert result.dtype == reference.dtype
    assert float((result - reference).abs().max()) <= rtol * (1 + float(reference.abs().max()))


# --- solutions and derivatives --------------------------------------------------------------------------------------


ROWS = [(solver, shape, F64) for solver in SOLVERS for shape in ((5, 3), (2, 4))]
ROWS += [("lstsq", (5, 3), C128), ("lstsq", (2, 4), C128), ("normal_cg", (5, 3), C128), ("normal_cg", (2, 4), C128)]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("solver", "shape", "dtype"), ROWS, ids=str)
def test_it_is_the_product_with_the_pseudoinverse_under_every_transform(solver, shape, dtype, transform):
    family = Family(shape, dtype)
    apply = TRANSFORMS[transform]
    assert_close(apply(family.solution(solver), THETA), apply(family.reference, THETA), rtol=1e-10)


@every_shape
@every_solver
def test_derivatives_in_the_matrix_are_central_differences(solver, shape):
    a, b = matrix(shape), draw(5, shape[0])

    def solve(a: Tensor, b: Tensor) -> Tensor:
        return SOLVERS[solver](a)(lambda v: a @ v, b)

    def reference(a: Tensor) -> Tensor:
        return torch.linalg.lstsq(a, b[:, None], driver="gelsd").solution[:, 0]

    h = 1e-5
    units = torch.eye(a.numel(), dtype=F64).reshape(-1, *shape)
    columns = [(reference(a + h * e) - reference(a - h * e)) / (2 * h) for e in units]
    differences = torch.stack(columns, -1).reshape(-1, *shape)
    for jacobian in (jacfwd, jacrev):
        assert_close(jacobian(solve)(a, b), differences, rtol=1e-8)
        assert_close(jacobian(solve, 1)(a, b), torch.linalg.pinv(a), rtol=1e-12)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)], ids=str)
@both
def test_of_a_matrix_of_less_than_full_rank_it_is_the_solution_of_least_norm(factory, shape):
    left, right, b = draw(1, shape[0], 2), draw(2, 2, shape[1]), draw(3, shape[0])

    def solve(t: Tensor) -> Tensor:
        return factory()(lambda v: left @ (right * t.exp() @ v) + t * left @ (right @ v), b)

    def reference(t: Tensor) -> Tensor:
        return torch.linalg.pinv(left @ (right * (t.exp() + t)), rtol=1e-10) @ b

    t = torch.linspace(-0.2, 0.3, shape[1], dtype=F64)[:1]
    assert_close(solve(t), reference(t), rtol=1e-8)
    if factory is solve_lstsq:
        assert_close(jacfwd(solve)(t), jacfwd(reference)(t))
        assert_close(jacrev(solve)(t), jacrev(reference)(t))


@pytest.mark.parametrize("dtype", [F32, C64], ids=str)
@every_shape
@both
def test_in_single_precision_it_is_right_to_its_rounding(factory, shape, dtype):
    a, b = matrix(shape, dtype), draw(3, shape[0], dtype=dtype)
    wide = C128 if dtype.is_complex else F64
    x = factory()(lambda v: a @ v, b)
    assert_close(x, (torch.linalg.pinv(a.to(wide)) @ b.to(wide)).to(dtype), rtol=2e-4)


@both
def test_lanes_of_the_matrix_and_columns_of_the_right_hand_side_are_solved_together(factory):
    a = torch.stack([matrix((5, 2), seed=seed) for seed in range(3)])
    b = draw(4, 4, 5)

    def solve(a: Tensor, b: Tensor) -> Tensor:
        return factory()(lambda v: a @ v, b)

    pairs = vmap(vmap(solve, (None, 0)), (0, None))(a, b)
    assert_close(pairs, torch.stack([torch.stack([torch.linalg.pinv(m) @ r for r in b]) for m in a]), rtol=1e-9)
    assert vmap(solve, (None, 0))(a[0], b[:0]).shape == (0, 2)


@pytest.mark.parametrize("rows", [5, 2])
@every_solver
def test_one_product_is_taken_for_each_number_of_the_smaller_side(solver, rows):
    a, seen = matrix((rows, 7 - rows)), []

    def matvec(v: Tensor) -> Tensor:
        seen.append(1)
        return a @ v

    SOLVERS[solver](a)(matvec, draw(1, rows))
    assert len(seen) <= 40


# --- what the operator acts on --------------------------------------------------------------------------------------


def test_the_solution_of_least_squares_needs_no_word_about_the_unknowns():
    tall = matrix((6, 3))
    x = solve_lstsq()(lambda v: tall @ v, torch.ones(6, dtype=F64))
    assert_close(x, torch.linalg.lstsq(tall, torch.ones(6, 1, dtype=F64)).solution[:, 0])


A, S = matrix((6, 3)), torch.tensor([0.5, 2.0, -1.0], dtype=F64)
FOUND = {
    "product": (lambda v: A @ v, A),
    "linear": (lambda v: torch.nn.functional.linear(v, A), A),
    "reversed": (lambda v: v @ A.T, A),
    "einsum": (lambda v: torch.einsum("ij,j->i", A, v), A),
    "wide": (lambda v: A.T @ v, A.T),
    "a length of 1 would broadcast": (lambda v: A @ (ONE * S * v), A * S),
    "rows one by one": (lambda v: torch.stack([row @ v for row in A]), A),
    "two factors": (lambda v: A @ (A[:3] @ v), A @ A[:3]),
    "cut to the length": (lambda v: A[:, : len(v)] @ v, A),
    "sparse": (lambda v: SPARSE @ v, A),
    "sparse, wide": (lambda v: SPARSE.T @ v, A.T),
}
ONE, SPARSE = torch.ones(1, dtype=F64), A.to_sparse()


@pytest.mark.parametrize("way", FOUND)
@both
def test_its_length_is_found_by_the_sizes_of_what_the_matvec_computes_with(factory, way):
    matvec, a = FOUND[way]
    b = draw(1, a.shape[0])
    assert_close(factory()(matvec, b), torch.linalg.pinv(a) @ b, rtol=1e-9)
    assert_close(vmap(lambda b: factory()(matvec, b))(b[None])[0], torch.linalg.pinv(a) @ b, rtol=1e-9)


@both
def test_a_matrix_of_right_hand_sides_and_a_number_do_too(factory):
    b = draw(1, 6, 2)
    assert_close(factory()(lambda v: A @ v, b), torch.linalg.pinv(A) @ b, rtol=1e-9)
    number = torch.tensor(2.0, dtype=F64)
    assert_close(factory()(lambda v: S @ v, number), number * S / (S @ S), rtol=1e-9)


@both
def test_a_matvec_that_takes_the_right_hand_side_is_square(factory):
    d = torch.arange(1.0, 7.0, dtype=F64)
    assert_close(factory()(lambda v: d * v, d), torch.ones(6, dtype=F64), rtol=1e-9)


def first_three(v: Tensor) -> Tensor:
    result = A @ v[:3]
    if len(v) == 6:
        raise RuntimeError("not six")
    return result


@both
def test_a_matvec_that_takes_several_lengths_is_refused(factory):
    with pytest.raises(ValueError, match=r"matvec accepts vectors of several lengths, 3, 4 among them.*pass init="):
        factory()(first_three, torch.ones(6, dtype=F64))
    x = factory(init=torch.zeros(4, dtype=F64))(first_three, torch.ones(6, dtype=F64))
    assert_close(x[:3], torch.linalg.pinv(A) @ torch.ones(6, dtype=F64), rtol=1e-9)
    assert x[3] == 0


@both
def test_what_cannot_be_found_is_asked_for(factory):
    b = torch.ones(5, dtype=F64)
    with pytest.raises(ValueError, match=r"matvec's result.*pass init=.*float64\[5\], got float64\[4\]"):
        factory()(lambda v: v[1:] - v[:-1], b)
    # The sum of x_i+1 - x_i = 1 has the solution of least norm x = -2.5, -1.5, ..., 2.5.
    x = factory(init=torch.zeros(6, dtype=F64))(lambda v: v[1:] - v[:-1], b)
    assert_close(x, torch.arange(-2.5, 3.0, dtype=F64), rtol=1e-9)
    with pytest.raises(ValueError, match=r"matvec fails on a tree like b, float64\[6\].*pass init="):
        factory()(lambda v: A @ v["x"], torch.ones(6, dtype=F64))


@numbers
@both
def test_both_sides_may_be_trees(factory, dtype):
    left = {k: draw(i, n, 4, dtype=dtype) for i, (k, n) in enumerate({"p": 2, "q": 5}.items())}
    b = {k: draw(9 + len(k), a.shape[0], dtype=dtype) for k, a in left.items()}
    init = [torch.zeros(2, dtype=dtype), (torch.zeros(1, 2, dtype=dtype), None)]

    def solve(a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        def matvec(v):
            flat = torch.cat([v[0], v[1][0].reshape(-1)])
            return {k: m @ flat for k, m in a.items()}

        x = factory(init=init, **({} if factory is solve_lstsq else {"rtol": 1e-13}))(matvec, b)
        assert x[1][1] is None
        return torch.cat([x[0], x[1][0].reshape(-1)])

    def reference(a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        return torch.linalg.pinv(torch.cat([*a.values()])) @ torch.cat([*b.values()])

    assert_close(solve(left, b), reference(left, b))
    for i in (0, 1):
        square = [lambda *args, f=f: f(*args).abs().square().sum() for f in (solve, reference)]
        ours, theirs = (grad(f, i)(left, b) for f in square)
        for k in ours:
            assert_close(ours[k], theirs[k])


@both
def test_trees_of_as_many_numbers_are_solved_though_they_differ(factory):
    a, b = matrix((4, 4)), draw(1, 4)
    x = factory(init=torch.zeros(2, 2, dtype=F64))(lambda v: a @ v.reshape(4), b)
    assert_close(x, torch.linalg.solve(a, b).reshape(2, 2), rtol=1e-8)


@both
def test_leaves_may_differ_in_precision(factory):
    x = factory(init=torch.zeros(3))(lambda v: A @ v.double(), torch.ones(6, dtype=F64))
    assert_close(x, (torch.linalg.pinv(A) @ torch.ones(6, dtype=F64)).float(), rtol=1e-4)


@both
def test_the_numbers_of_the_guess_do_not_move_the_solution(factory):
    for a in (A, A.T):
        b = draw(1, a.shape[0])
        x = torch.linalg.pinv(a) @ b
        other = draw(2, a.shape[1])
        # The last one solves the system too, and is not of least norm if that is wide.
        for init in (0 * x, other, 1e3 * other, x + other - torch.linalg.pinv(a) @ a @ other):
            assert_close(factory(init=init)(lambda v, a=a: a @ v, b), x, rtol=1e-8)


def test_a_guess_that_solves_a_tall_system_ends_the_iteration_at_once():
    b, seen = draw(1, 6), []

    def matvec(v: Tensor) -> Tensor:
        seen.append(1)
        return A @ v

    x = torch.linalg.pinv(A) @ b
    assert_close(solve_normal_cg(init=x)(matvec, b), x)
    warm, _ = len(seen), seen.clear()
    solve_normal_cg(init=0 * x)(matvec, b)
    assert warm < len(seen)


@both
def test_an_empty_side_has_the_solution_zero(factory):
    assert torch.equal(factory()(lambda v: A[:0] @ v, torch.zeros(0, dtype=F64)), torch.zeros(3, dtype=F64))
    assert factory()(lambda v: A[:, :0] @ v, torch.ones(6, dtype=F64)).shape == (0,)


# --- targets and failures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rtol", [1e-2, 1e-4, 1e-8])
def test_the_gradient_of_the_squares_is_judged(rtol):
    a, b = matrix((100, 60)), draw(1, 100)
    x = solve_normal_cg(rtol=rtol)(lambda v: a @ v, b)
    size = (a.T @ (b - a @ x)).norm()
    assert size <= rtol * (a.T @ b).norm()
    assert size >= 1e-4 * rtol * (a.T @ b).norm()
    x = solve_normal_cg(rtol=0.0, atol=rtol)(lambda v: a @ v, b)
    assert 1e-4 * rtol <= (a.T @ (b - a @ x)).norm() <= rtol


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-12, 1e12])
def test_a_right_hand_side_orthogonal_to_the_range_gives_zero(dtype, size):
    a, b = matrix((8, 3)), draw(1, 8)
    b = size * (b - a @ torch.linalg.pinv(a) @ b)
    a, b = a.to(dtype), b.to(dtype)
    x = solve_normal_cg()(lambda v: a @ v, b)
    assert float(x.norm()) <= 100 * torch.finfo(dtype).eps * float(b.norm())


def test_the_target_may_be_zero():
    b = draw(1, 6)
    x = solve_normal_cg(rtol=0.0)(lambda v: A @ v, b)
    assert_close(x, torch.linalg.pinv(A) @ b, rtol=1e-13)


@pytest.mark.parametrize("shape", [(8, 3), (3, 8)], ids=str)
@pytest.mark.parametrize("size", [1e-25, 1e25])
@every_solver
def test_the_units_of_the_operator_do_not_matter_in_single_precision(solver, shape, size):
    a, b = matrix(shape, F32), draw(1, shape[0], dtype=F32)
    x = SOLVERS[solver](a)
    if solver != "lstsq":
        scaled = jacobi(a)
        x = solve_normal_cg(preconditioner=scaled if "preconditioner" in solver else None)
    result = x(lambda v: size * (a @ v), b)
    assert_close(result * size, torch.linalg.pinv(a) @ b, rtol=1e-4)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)], ids=str)
def test_a_preconditioner_of_the_smaller_side_saves_iterations_also_in_the_derivative(shape):
    scale = torch.logspace(0, 2, 40, dtype=F64)
    a = 0.2 * matrix(shape) + torch.eye(*shape, dtype=F64)
    a = a * (scale if shape[1] == 40 else scale[:, None])
    b = draw(1, shape[0])
    counts = []
    for preconditioner in (None, jacobi(a)):
        seen = []

        def matvec(v: Tensor, seen=seen) -> Tensor:
            seen.append(1)
            return a @ v

        def solve(b: Tensor, preconditioner=preconditioner, matvec=matvec) -> Tensor:
            return solve_normal_cg(rtol=1e-10, maxiter=2000, preconditioner=preconditioner)(matvec, b)

        leaf = b.clone().requires_grad_()
        x = solve(leaf)
        assert_close(x.detach(), torch.linalg.pinv(a) @ b, rtol=1e-5)
        counts.append(len(seen))
        (gradient,) = torch.autograd.grad(x.square().sum(), leaf)
        assert_close(gradient, 2 * torch.linalg.pinv(a).T @ x.detach(), rtol=1e-5)
        counts.append(len(seen) - counts[-1])
    assert counts[2] < counts[0] / 2
    assert counts[3] < counts[1] / 1.2


@both
def test_lanes_that_fail_are_counted(factory):
    scale = torch.tensor([1.0, torch.nan, 2.0], dtype=F64)

    def solve(s: Tensor, how: str = "raise") -> Tensor:
        return factory(on_failure=how)(lambda v: s * (A @ v), torch.ones(6, dtype=F64))

    with pytest.raises(LinearSolveError, match=factory.__name__) as caught:
        vmap(solve)(scale)
    assert (caught.value.failed, caught.value.total) == (1, 3)
    with pytest.warns(LinearSolveWarning):
        vmap(lambda s: solve(s, "warn"))(scale)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = vmap(lambda s: solve(s, "ignore"))(scale)
    assert_close(x[2], torch.linalg.pinv(2 * A) @ torch.ones(6, dtype=F64), rtol=1e-9)


def test_a_budget_that_is_too_small_is_no_failure_and_a_net_is_one():
    a = matrix((30, 20)) * torch.logspace(0, 6, 20, dtype=F64)
    b = draw(1, 30)
    assert torch.isfinite(solve_normal_cg(maxiter=3)(lambda v: a @ v, b)).all()
    with pytest.raises(LinearSolveError, match="solve_normal_cg: no convergence"):
        solve_normal_cg(rtol=1e-12)(lambda v: a @ v, b)


def test_dependent_rows_under_a_preconditioner_are_reported():
    a = torch.ones(2, 4, dtype=F64)
    b = torch.tensor([1.0, 2.0], dtype=F64)
    with pytest.raises(LinearSolveError, match="solve_normal_cg"):
        solve_normal_cg(preconditioner=lambda r: r)(lambda v: a @ v, b)
    assert_close(solve_normal_cg()(lambda v: a @ v, b), torch.full((4,), 0.375, dtype=F64))


# --- what is refused ------------------------------------------------------------------------------------------------

SQUARE = [solve_auto, solve_bicgstab, solve_cg, solve_cholesky, solve_gmres, solve_inv, solve_lu]


@pytest.mark.parametrize("factory", SQUARE, ids=lambda f: f.__name__)
def test_every_other_solver_names_the_two(factory):
    words = rf"{factory.__name__}: matvec.*solve_lstsq.*solve_normal_cg"
    for a in (A, A.T):
        with pytest.raises(ValueError, match=words):
            factory()(lambda v, a=a: a @ v, torch.ones(a.shape[0], dtype=F64))
    with pytest.raises(ValueError, match=words):
        factory()(lambda v: v[1:], torch.ones(6, dtype=F64))


def test_a_ridge_needs_a_diagonal():
    with pytest.raises(ValueError, match=r"ridge needs a square A"):
        solve_normal_cg(ridge=0.1)(lambda v: A @ v, torch.ones(6, dtype=F64))
    # As the message says.
    b = (torch.ones(6, dtype=F64), torch.zeros(3, dtype=F64))
    x = solve_normal_cg(init=b[1])(lambda v: (A @ v, 0.1**0.5 * v), b)
    assert_close(x, torch.linalg.solve(A.T @ A + 0.1 * torch.eye(3, dtype=F64), A.T @ b[0]), rtol=1e-9)


@both
def test_an_operator_that_is_not_linear_is_refused(factory):
    for wrong in (lambda v: A @ v + 1, lambda v: A @ v.abs(), lambda v: A @ v**2):
        with pytest.raises(ValueError, match="matvec is not linear"):
            factory()(wrong, torch.ones(6, dtype=F64))


@pytest.mark.parametrize(
    "init", [torch.zeros(2, dtype=F64), torch.zeros(3), (S,), 0.0], ids=["shape", "dtype", "structure", "number"]
)
@both
def test_a_guess_that_the_operator_does_not_take_is_refused(factory, init):
    with pytest.raises(ValueError, match=rf"{factory.__name__}: init.*float64\[6\]"):
        factory(init=init)(lambda v: A @ v, torch.ones(6, dtype=F64))


@both
def test_a_result_that_is_not_like_the_right_hand_side_is_refused(factory):
    with pytest.raises(ValueError, match=r"matvec's result must have .* of b: expected float64\[6\], got float64\[4\]"):
        factory(init=S)(lambda v: A[:4] @ v, torch.ones(6, dtype=F64))


@pytest.mark.parametrize("wrong", [lambda r: r[:2], lambda r: (r,)], ids=["shape", "structure"])
def test_a_preconditioner_acts_on_trees_like_the_unknowns(wrong):
    with pytest.raises(ValueError, match=r"preconditioner's result must have .*float64\[3\]"):
        solve_normal_cg(preconditioner=wrong)(lambda v: A @ v, torch.ones(6, dtype=F64))
