"""Sparse matrices in matvecs and conditions do what dense ones do, under every transform."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from implicitdiff import custom_root
from implicitdiff.linear_solve import solve_gmres, solve_lu
from implicitdiff.solvers import newton

F64 = torch.float64
A = torch.tensor([[4.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 0.0, 5.0]], dtype=F64)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch calls these layouts a beta
    LAYOUTS = {
        "coo": A.to_sparse_coo(),
        "csr": A.to_sparse_csr(),
        "csc": A.to_sparse_csc(),
        "bsr": A.to_sparse_bsr((1, 1)),
        "bsc": A.to_sparse_bsc((1, 1)),
    }
B = torch.tensor([[1.0, 2.0, 3.0], [0.5, -1.0, 2.0]], dtype=F64)
Product = Callable[[Tensor, Tensor], Tensor]
PRODUCTS: dict[str, Product] = {
    "matmul": lambda S, v: S @ v,
    "of a column": lambda S, v: (S @ v[:, None])[:, 0],
    "sparse.mm": lambda S, v: torch.sparse.mm(S, v[:, None])[:, 0],
    "mv": torch.mv,
    "from the left": lambda S, v: v @ S.t(),
    "transposed twice": lambda S, v: S.t().t() @ v,
}
EQUATIONS: dict[str, Callable[[Tensor, Product, Tensor], Tensor]] = {
    "solve_lu": lambda S, product, t: solve_lu()(lambda v: product(S, v), torch.sin(t)),
    "solve_gmres": lambda S, product, t: solve_gmres(rtol=1e-13)(lambda v: product(S, v), torch.sin(t)),
    "custom_root": lambda S, product, t: custom_root(lambda x, t: product(S, x) - torch.sin(t))(
        lambda init, t: torch.linalg.solve(A, torch.sin(t))
    )(None, t),
    "newton": lambda S, product, t: newton(lambda x, t: product(S, x) + x**3 - t).run(torch.zeros_like(t), t)[0],
}
ASKED: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "forward": lambda f: f(B[0]),
    "backward": lambda f: torch.autograd.grad((f(t := B[0].clone().requires_grad_()) ** 2).sum(), t),
    "grad": lambda f: grad(lambda t: (f(t) ** 2).sum())(B[0]),
    "jvp": lambda f: jvp(f, (B[0],), (B[1],)),
    "jacfwd": lambda f: jacfwd(f)(B[0]),
    "jacrev": lambda f: jacrev(f)(B[0]),
    "vmap": lambda f: vmap(f)(B),
    "hessian": lambda f: hessian(lambda t: (f(t) ** 2).sum())(B[0]),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sparse_constant_acts_as_a_dense_one(layout, product, equation):
    solve, times = EQUATIONS[equation], PRODUCTS[product]
    for name, ask in ASKED.items():
        got = ask(lambda t: solve(LAYOUTS[layout], times, t))
        want = ask(lambda t: solve(A, times if product != "sparse.mm" else torch.mv, t))
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("solve", ["captured", "argument", "matvec"])
@pytest.mark.parametrize("layout", ["coo", "csr"])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sparse_matrix_that_needs_a_gradient_gets_one(layout, solve):
    S, b = LAYOUTS[layout].detach().clone().requires_grad_(), B[0]
    x = {
        "captured": lambda: custom_root(lambda x: S @ x - b)(lambda init: torch.linalg.inv(A) @ b)(None),
        "argument": lambda: newton(lambda x, S: S @ x - b).run(torch.zeros_like(b), S)[0],
        "matvec": lambda: solve_lu()(lambda v: S @ v, b),
    }[solve]()
    dense = A.clone().requires_grad_()
    (want,) = torch.autograd.grad((torch.linalg.inv(dense) @ b).square().sum(), dense)
    (got,) = torch.autograd.grad(x.square().sum(), S)
    torch.testing.assert_close(got.to_dense(), want * (A != 0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_what_torch_cannot_transform_is_named_with_its_layout(layout):
    with pytest.raises(NotImplementedError, match=f"inner of a tensor in the layout sparse_{layout}.*to_dense"):
        grad(lambda t: solve_lu()(lambda v: torch.inner(LAYOUTS[layout], v), t).sum())(B[0])


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_a_batch_of_rows_times_a_sparse_matrix(batch: int) -> None:
    dense = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 0.0, 4.0]], dtype=torch.float64)
    sparse = dense.to_sparse()
    b = torch.arange(3.0 * batch, dtype=torch.float64).reshape(batch, 1, 3)

    def solution(matrix: Tensor, b: Tensor) -> Tensor:
        return solve_lu()(lambda v: v @ matrix.t(), b)

    assert (solution(sparse, b) - solution(dense, b)).abs().max() < 1e-12
    found, expected = (jvp(partial(solution, m), (b,), (b.square(),))[1] for m in (sparse, dense))
    assert (found - expected).abs().max() < 1e-12
