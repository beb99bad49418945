"""Derivatives and batches of linear solves, with real and complex matrices."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from checks.tensors import draw
from tables.linear_solvers import C128, F64, SOLVERS, Row, definite, general, with_eigenvalues, with_singular_values
from tables.linear_systems import (
    BY_NAME,
    CHECK,
    DERIVATIVE,
    LOOK,
    TRANSFORMS,
    TREE_SHAPES,
    TREE_SIZE,
    Counted,
    assert_same,
    distinct,
    on_trees,
    relative_error,
    row_of,
    rows,
    times,
    tolerance,
    tree_of,
)
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from implicitdiff.linear_solve import (
    jacobi_preconditioner,
    solve_cg,
    solve_gmres,
    solve_lstsq,
    solve_lu,
    solve_normal_cg,
)

# --- derivatives ----------------------------------------------------------------------------------------------------


def parametrised(row: Row, dtype: torch.dtype = F64) -> Callable[[Tensor], Tensor]:
    """A matrix that depends on a matrix of parameters, in the row's family near zero parameters."""
    base = row.matrix(3, dtype)
    eye = torch.eye(3, dtype=dtype)
    if row.families == ("definite",):
        return lambda theta: base + theta @ theta.mH + 0.1 * (theta + theta.mH)
    if row.families == ("contraction",):
        return lambda theta: eye - 0.5 * (eye - base) - 0.1 * theta
    return lambda theta: base + 0.3 * theta


def both(row: Row) -> tuple[Callable, Callable, Tensor, Tensor]:
    """A solution as a function of parameters and right-hand side, its closed form, and a point."""
    matrix, solver = parametrised(row), row.factory()
    return (
        lambda theta, b: solver(times(matrix(theta)), b),
        lambda theta, b: torch.linalg.inv(matrix(theta)) @ b,
        draw(7, 3, 3) / 2,
        draw(8, 3),
    )


@pytest.mark.parametrize("transform", TRANSFORMS)
@rows()
def test_a_solution_has_the_derivatives_of_the_inverse(row, transform):
    solution, reference, theta, b = both(row)
    apply = TRANSFORMS[transform]
    assert_same(apply(solution, theta, b), apply(reference, theta, b), DERIVATIVE)


@rows()
def test_gradcheck_in_both_modes_to_second_order(row):
    solution, _, theta, b = both(row)
    inputs = (theta.requires_grad_(), b.requires_grad_())
    assert torch.autograd.gradcheck(solution, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(solution, inputs, check_fwd_over_rev=True, fast_mode=True)


BASE = general(3)


class Model:
    def __init__(self, theta: Tensor) -> None:
        self.theta = theta

    def apply(self, v: Tensor) -> Tensor:
        return BASE @ v + 0.3 * (self.theta @ v)


def product(v: Tensor, theta: Tensor, *, scale: float) -> Tensor:
    return BASE @ v + scale * (theta @ v)


LAYER = torch.nn.Linear(3, 3, bias=False, dtype=F64, device="meta")


def shifted_layer(theta: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda v: torch.func.functional_call(LAYER, {"weight": BASE + 0.3 * theta}, (v,))


CAPTURES = {
    "closure": lambda theta: lambda v: BASE @ v + 0.3 * (theta @ v),
    "functools.partial": lambda theta: functools.partial(product, theta=theta, scale=0.3),
    "bound method": lambda theta: Model(theta).apply,
    "default argument": lambda theta: lambda v, theta=theta: product(v, theta, scale=0.3),
    "list": lambda theta: (lambda held: lambda v: product(v, held[0]["theta"], scale=0.3))([{"theta": theta}]),
    "functional_call": shifted_layer,
    "computed outside": lambda theta: times(BASE + 0.3 * theta),
    "einsum of a view": lambda theta: lambda v: BASE @ v + 0.3 * torch.einsum("ji,i->j", theta[:, :], v),
}


@pytest.mark.parametrize("transform", ["grad", "jacfwd", "hessian", "vmap of grad", "grad of vmap"])
@pytest.mark.parametrize("capture", CAPTURES)
def test_tensors_are_captured_in_every_way(capture, transform):
    make, apply, theta, b = CAPTURES[capture], TRANSFORMS[transform], draw(7, 3, 3), draw(8, 3)
    for solver in (solve_lu(), solve_gmres()):
        result = apply(lambda theta, b, solver=solver: solver(make(theta), b), theta, b)
        reference = apply(lambda theta, b: torch.linalg.inv(BASE + 0.3 * theta) @ b, theta, b)
        assert_same(result, reference, DERIVATIVE)


def test_the_weight_of_a_module_gets_its_gradient():
    layer = torch.nn.Linear(4, 4, bias=False, dtype=F64)
    with torch.no_grad():
        layer.weight.copy_(general(4))
    b = draw(5, 4).requires_grad_()
    solve_gmres()(layer, b).sum().backward()
    inverse = torch.linalg.inv(general(4))
    u = inverse.T.sum(dim=1)
    assert relative_error(b.grad, u) <= tolerance(BY_NAME["gmres"])
    assert relative_error(layer.weight.grad, -torch.outer(u, inverse @ b.detach())) <= 10 * tolerance(BY_NAME["gmres"])


def test_the_same_tensor_may_be_captured_and_be_the_right_hand_side():
    b = torch.tensor([1.0, 2.0, 4.0], dtype=F64)

    def ones(b):
        return solve_lu()(lambda v: b * v, b)

    assert torch.equal(ones(b), torch.ones(3, dtype=F64))
    assert jacrev(ones)(b).abs().max() <= 1e-15
    assert jacfwd(ones)(b).abs().max() <= 1e-15


def potential(x: Tensor) -> Tensor:
    return (x**4).sum() + 2 * (x**2).sum() + x[0] * x[1] * x[2].sin()


HESSIAN_PRODUCTS = {
    "forward over reverse": lambda x: lambda v: jvp(grad(potential), (x,), (v,))[1],
    "reverse over reverse": lambda x: lambda v: vjp(grad(potential), x)[1](v)[0],
    "gradient of a directional derivative": lambda x: lambda v: grad(lambda x: (grad(potential)(x) * v).sum())(x),
}


@pytest.mark.parametrize("transform", ["value", "grad", "jacfwd", "hessian", "vmap of grad", "grad of vmap"])
@pytest.mark.parametrize("hvp", HESSIAN_PRODUCTS)
@pytest.mark.parametrize("factory", [solve_lu, solve_cg, solve_normal_cg])
def test_matvec_may_be_a_hessian_vector_product(factory, hvp, transform):
    apply, x, b = TRANSFORMS[transform], torch.tensor([0.5, -0.7, 1.1], dtype=F64), draw(8, 3)
    result = apply(lambda x, b: factory()(HESSIAN_PRODUCTS[hvp](x), b), x, b)
    reference = apply(lambda x, b: torch.linalg.inv(hessian(potential)(x)) @ b, x, b)
    assert_same(result, reference, DERIVATIVE)


@pytest.mark.parametrize("transform", ["value", "grad", "jacfwd", "hessian", "vmap of grad", "grad of vmap"])
@pytest.mark.parametrize("outer", [solve_lu, solve_cg], ids=["lu", "cg"])
@pytest.mark.parametrize("inner", [solve_lu, solve_cg], ids=["lu", "cg"])
def test_matvec_may_itself_solve_a_linear_system(inner, outer, transform):
    base = definite(6)

    def matrix(theta):
        return base + theta @ theta.mT

    def by_schur_complement(theta, b):
        m = matrix(theta)
        p, q, r = m[:3, :3], m[:3, 3:], m[3:, 3:]
        return outer()(lambda v: r @ v - q.mT @ inner()(times(p), q @ v), b)

    apply, theta, b = TRANSFORMS[transform], draw(7, 6, 6) / 4, draw(8, 3)
    reference = apply(lambda theta, b: torch.linalg.inv(matrix(theta))[3:, 3:] @ b, theta, b)
    assert_same(apply(by_schur_complement, theta, b), reference, DERIVATIVE)


@rows()
def test_a_tree_has_the_derivatives_of_its_flat_system(row):
    dtypes = dict.fromkeys(TREE_SHAPES, F64)
    a, b = row.matrix(TREE_SIZE), draw(5, TREE_SIZE)

    def by_tree(a, b):
        return row_of(row.factory()(on_trees(a, dtypes), tree_of(b, dtypes)), F64)

    inverse = torch.linalg.inv(a)
    assert_same(jacrev(by_tree, 1)(a, b), inverse, DERIVATIVE)
    assert_same(jacfwd(by_tree, 1)(a, b), inverse, DERIVATIVE)
    u = inverse.T @ torch.ones(TREE_SIZE, dtype=F64)
    # For a Hermitian solver the derivative is along matrices of any kind, at a Hermitian one.
    assert_same(grad(lambda a: by_tree(a, b).sum())(a), -torch.outer(u, inverse @ b), DERIVATIVE)


def test_lstsq_has_the_pseudoinverse_as_its_derivative_in_the_right_hand_side():
    a = with_singular_values(torch.tensor([3.0, 2.0, 0.0, 0.0], dtype=F64))
    reference = torch.from_numpy(np.linalg.pinv(a.numpy(), rcond=1e-12))
    for jacobian in (jacrev, jacfwd):
        assert relative_error(jacobian(lambda b: solve_lstsq()(times(a), b))(draw(5, 4)), reference) <= 1e-13


@rows()
def test_without_gradients_there_is_no_graph(row):
    a, b = row.matrix(4), draw(5, 4).requires_grad_()
    with torch.no_grad():
        assert not row.factory()(times(a), b).requires_grad
    assert not row.factory()(times(a), b.detach()).requires_grad
    assert row.factory()(times(a), b).requires_grad
    assert row.factory()(times(a.requires_grad_()), b.detach()).requires_grad


def test_a_sparse_matrix_serves_the_iterations():
    a = torch.diag(torch.tensor([2.0, 3.0, 4.0], dtype=F64))
    a[0, 2] = a[2, 0] = 1.0
    sparse, b = a.to_sparse(), draw(5, 3)
    inverse = torch.linalg.inv(a)
    solver = solve_cg()
    assert relative_error(solver(lambda v: torch.mv(sparse, v), b), inverse @ b) <= tolerance(BY_NAME["cg"])
    result = grad(lambda b: solver(lambda v: torch.mv(sparse, v), b).sum())(b)
    assert relative_error(result, inverse.sum(dim=0)) <= tolerance(BY_NAME["cg"])


# --- vmap -----------------------------------------------------------------------------------------------------------


@rows(iterative=True)
def test_lanes_stop_by_themselves(row):
    """At a loose tolerance a lane that went on with the others would come to another result."""
    d = torch.stack([torch.linspace(1.0, c, 40, dtype=F64) for c in (1.0, 2.0, 10.0, 30.0, 100.0)])
    if row.families == ("contraction",):
        d = 1 - 0.7 * (1 - d / d.amax(dim=1, keepdim=True))
    if row.name == "normal_cg":
        # The squares are what it iterates with. At a condition of a thousand, rounding alone moves the result by 1e-3.
        d = d.sqrt()
    b = draw(5, *d.shape)
    b[1] = 0.0
    solver = row.factory(rtol=1e-2)
    together = vmap(lambda d, b: solver(lambda v: d * v, b))(d, b)
    alone = torch.stack([solver(lambda v, d=d_i: d * v, b_i) for d_i, b_i in zip(d, b, strict=True)])
    for x, y in zip(together, alone, strict=True):
        assert torch.linalg.vector_norm(x - y) <= 1e-10 * torch.linalg.vector_norm(y)


@pytest.mark.parametrize(
    "row", [r for r in SOLVERS if r.name in ("cg", "gmres", "lu", "cholesky", "inv", "auto")], ids=str
)
def test_lanes_of_condition_one_to_a_million_are_each_as_good_as_alone(row):
    conditions = [1.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6]
    a = torch.stack([with_eigenvalues(torch.logspace(0, -float(np.log10(c)), 12, dtype=F64)) for c in conditions])
    b = draw(5, 7, 12)
    b[3] = 0.0
    together = vmap(lambda a, b: row.factory()(times(a), b))(a, b)
    alone = torch.stack([row.factory()(times(a_i), b_i) for a_i, b_i in zip(a, b, strict=True)])
    for condition, a_i, b_i, x, y in zip(conditions, a, b, together, alone, strict=True):
        size = torch.linalg.vector_norm(y)
        assert torch.linalg.vector_norm(x - y) <= 2 * tolerance(row, condition=condition) * size
        exact = torch.from_numpy(np.linalg.solve(a_i.numpy(), b_i.numpy()))
        assert torch.linalg.vector_norm(x - exact) <= tolerance(row, condition=condition) * size


@rows()
def test_matrix_or_right_hand_side_or_both_are_batched(row):
    a = torch.stack([row.matrix(5), row.matrix(5).mT, row.matrix(5)])
    b = draw(5, 3, 5)
    inverses = torch.linalg.inv(a)
    solver = row.factory()
    both_ = vmap(lambda a, b: solver(times(a), b))(a, b)
    assert relative_error(both_, torch.einsum("lij,lj->li", inverses, b)) <= tolerance(row)
    matrix = vmap(lambda a: solver(times(a), b[0]))(a)
    assert relative_error(matrix, inverses @ b[0]) <= tolerance(row)
    side = vmap(lambda b: solver(times(a[0]), b))(b)
    assert relative_error(side, b @ inverses[0].T) <= tolerance(row)
    mixed = vmap(vmap(lambda a, b: solver(times(a), b), in_dims=(None, 0)), in_dims=(0, None))(a, b)
    assert relative_error(mixed, torch.einsum("lij,mj->lmi", inverses, b)) <= tolerance(row)


@rows(iterative=False)
def test_a_matrix_that_the_lanes_share_is_materialised_once(row):
    a, b = row.matrix(6), draw(5, 2, 3, 6)
    alone, together = Counted(times(a)), Counted(times(a))
    row.factory()(alone, b[0, 0])
    x = vmap(vmap(lambda b: row.factory()(together, b)))(b)
    assert together.calls == alone.calls
    assert relative_error(x, b @ torch.linalg.inv(a).T) <= tolerance(row)


@rows(iterative=False)
def test_a_shared_matrix_is_materialised_once_for_a_whole_jacobian(row):
    a, b = row.matrix(6), draw(5, 6)
    alone, together = Counted(times(a)), Counted(times(a))
    grad(lambda b: row.factory()(alone, b).sum())(b)
    jacobian = jacrev(lambda b: row.factory()(together, b))(b)
    assert together.calls == alone.calls
    assert relative_error(jacobian, torch.linalg.inv(a)) <= tolerance(row)


@rows()
def test_some_leaves_may_be_batched_and_others_not(row):
    a = row.matrix(5)
    b = {"a": draw(5, 3, 2), "b": draw(6, 3)}

    def matvec(v):
        y = a @ torch.cat([v["a"], v["b"]])
        return {"a": y[:2], "b": y[2:]}

    x = vmap(lambda b: row.factory()(matvec, b), in_dims=({"a": 0, "b": None},))(b)
    flat = torch.cat([b["a"], b["b"].expand(3, 3)], dim=1)
    assert relative_error(torch.cat([x["a"], x["b"]], dim=1), flat @ torch.linalg.inv(a).T) <= tolerance(row)


AID_TRANSFORMS = [
    "value",
    "grad",
    "jacfwd",
    "hessian",
    "vmap",
    "vmap over b",
    "vmap over the matrix",
    "vmap of vmap",
    "vmap of grad",
    "vmap of hessian",
    "grad of vmap",
    "hessian of vmap of vmap",
]


@pytest.mark.parametrize("transform", AID_TRANSFORMS)
@rows("preconditioner", "init")
def test_preconditioner_and_initial_guess_may_capture_what_is_transformed(row, transform):
    _, reference, theta, b = both(row)
    matrix = parametrised(row)

    def solution(theta, b):
        a = matrix(theta)
        diagonal = (a * a).sum(dim=0) if row.factory is solve_normal_cg else a.diagonal()
        return row.factory(preconditioner=lambda r: r / diagonal.abs(), init=0.1 * b)(times(a), b)

    apply = TRANSFORMS[transform]
    assert_same(apply(solution, theta, b), apply(reference, theta, b), DERIVATIVE)


@pytest.mark.parametrize("transform", AID_TRANSFORMS)
def test_the_jacobi_preconditioner_may_be_made_inside_transforms(transform):
    row = BY_NAME["cg"]
    _, reference, theta, b = both(row)
    matrix = parametrised(row)

    def solution(theta, b):
        matvec = times(matrix(theta))
        return solve_cg(preconditioner=jacobi_preconditioner(matvec, b))(matvec, b)

    apply = TRANSFORMS[transform]
    assert_same(apply(solution, theta, b), apply(reference, theta, b), DERIVATIVE)


def test_a_batch_that_went_through_vmap_takes_a_backward_pass():
    a, b = torch.stack([definite(4), 2 * definite(4)]).requires_grad_(), draw(5, 2, 4).requires_grad_()

    def solution(a, b):
        return solve_cg(preconditioner=lambda r: r / a.diagonal(), init=b)(times(a), b)

    vmap(solution)(a, b).sum().backward()
    inverse = torch.linalg.inv(a.detach())
    u = inverse.mT.sum(dim=-1)
    assert relative_error(b.grad, u) <= tolerance(BY_NAME["cg"])
    x = (inverse @ b.detach()[..., None])[..., 0]
    assert relative_error(a.grad, -u[:, :, None] * x[:, None, :]) <= 10 * tolerance(BY_NAME["cg"])


# --- complex --------------------------------------------------------------------------------------------------------


def central_differences(f: Callable[[Tensor], Tensor], z: Tensor, step: float = 1e-5) -> Tensor:
    """Of a real function of complex numbers: df/dRe + i df/dIm, as torch has it."""
    out = torch.zeros_like(z)
    for index in np.ndindex(*z.shape):
        for unit in (1.0, 1.0j):
            h = torch.zeros_like(z)
            h[index] = step * unit
            out[index] += unit * float(f(z + h) - f(z - h)) / (2 * step)
    return out


DIFFERENCES = 1e-8
"""Central differences with a step of 1e-5 leave 1e-10 times a third derivative, and rounding 1e-11."""


def real_loss(x: Tensor) -> Tensor:
    weights = torch.tensor([1.0 + 2.0j, -0.5 + 1.0j, 0.3 - 0.7j], dtype=C128)
    return (weights * x).sum().real + (x * x.conj() * torch.tensor([1.0, 2.0, 3.0], dtype=F64)).sum().real


@rows()
def test_derivatives_in_complex_parameters_match_central_differences(row):
    matrix, solver = parametrised(row, C128), row.factory()
    theta, b = draw(7, 3, 3, dtype=C128) / 2, draw(8, 3, dtype=C128)

    def loss(theta, b):
        return real_loss(solver(times(matrix(theta)), b))

    by_theta, by_b = grad(loss, argnums=(0, 1))(theta, b)
    assert_same(by_theta, central_differences(lambda theta: loss(theta, b), theta), DIFFERENCES)
    assert_same(by_b, central_differences(lambda b: loss(theta, b), b), DIFFERENCES)


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap of grad", "grad of vmap", "vmap of vmap"])
@rows()
def test_complex_transforms_match_the_inverse(row, transform):
    matrix, solver = parametrised(row, C128), row.factory()
    theta, b = draw(7, 3, 3, dtype=C128) / 2, draw(8, 3, dtype=C128)

    def parts(f):
        return lambda theta, b: torch.view_as_real(f(theta, b).resolve_conj())

    apply = TRANSFORMS[transform]
    result = apply(parts(lambda theta, b: solver(times(matrix(theta)), b)), theta, b)
    reference = apply(parts(lambda theta, b: torch.linalg.inv(matrix(theta)) @ b), theta, b)
    assert_same(result, reference, DERIVATIVE)


def test_complex_second_derivatives_match_those_of_the_inverse():
    base, theta, b = general(3, C128), draw(7, 3, 3, dtype=F64), draw(8, 3, dtype=C128)

    def f(solve):
        return lambda theta: real_loss(solve(base + (0.2 + 0.3j) * theta))

    reference = hessian(f(lambda a: torch.linalg.inv(a) @ b))(theta)
    for solver in (solve_lu(), solve_gmres(), solve_normal_cg()):
        assert_same(hessian(f(lambda a, solver=solver: solver(times(a), b)))(theta), reference, DERIVATIVE)


@pytest.mark.parametrize("row", [r for r in SOLVERS if "general" in r.families], ids=str)
def test_an_operator_that_is_linear_over_the_reals_alone_is_solved_and_differentiated(row):
    a, c = 2 + 0.3 * draw(7, 3, dtype=C128), 0.4 * draw(8, 3, dtype=C128)
    b = draw(9, 3, dtype=C128)
    solver = row.factory(**({"rtol": 1e-13} if row.iterative else {}))

    def solution(a, c, b):
        return solver(lambda v: a * v + c * v.conj(), b)

    def closed_form(a, c, b):
        return (a.conj() * b - c * b.conj()) / (a * a.conj() - c * c.conj())

    assert relative_error(solution(a, c, b), closed_form(a, c, b)) <= 1e-12
    result = grad(lambda *p: real_loss(solution(*p)), argnums=(0, 1, 2))(a, c, b)
    for i in range(3):

        def varied(z, i=i):
            point = [a, c, b]
            point[i] = z
            return real_loss(closed_form(*point))

        assert_same(result[i], central_differences(varied, (a, c, b)[i]), DIFFERENCES)


def test_complex_cg_takes_as_many_products_as_there_are_distinct_eigenvalues():
    matvec = Counted(times(with_eigenvalues(distinct(4, 12), C128)))
    solve_cg()(matvec, draw(5, 12, dtype=C128))
    assert matvec.calls == LOOK + 4 + CHECK


@pytest.mark.parametrize("row", SOLVERS, ids=lambda row: row.name)
def test_an_affine_matvec_is_refused(row):
    with pytest.raises(ValueError, match="does not map zero to zero"):
        row.factory()(lambda v: 2 * v + 1, torch.ones(3, dtype=torch.float64))
