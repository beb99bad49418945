"""Operations that change the shape of a tensor in place, in recorded loops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checks.compiled import needs_cpu
from torch import Tensor

import implicitdiff as idf
from implicitdiff import solvers

pytestmark = needs_cpu
A = torch.tensor([[4.0, 1.0, 0.0], [1.0, 3.0, 1.0], [0.0, 1.0, 5.0]], dtype=torch.float64)
B = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)


def vector_times_matrix(x: Tensor) -> Tensor:
    # A product of a vector and a matrix is one of two matrices, and ``squeeze_``.
    return x @ A


def other_shapes_in_place(x: Tensor) -> Tensor:
    column = (A * x).sum(-1).unsqueeze_(1)
    return column.t_().squeeze_(0)


@pytest.mark.parametrize("product", [vector_times_matrix, other_shapes_in_place])
def test_a_tensor_may_change_its_shape_in_place(product: Callable[[Tensor], Tensor]) -> None:
    solver = solvers.newton(lambda x: product(x) - B, compile="always")
    x, _ = solver.run(torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(x, torch.linalg.solve(A, B))


def test_a_quadratic_form_is_compiled() -> None:
    solver = solvers.lbfgs(lambda x: x @ A @ x / 2 - B @ x, compile="always")
    x, _ = solver.run(torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(x, torch.linalg.solve(A, B))


def test_a_tensor_may_not_change_its_memory() -> None:
    solver = solvers.fixed_point_iteration(lambda x: x.detach().cos().resize_(2)[:1], compile="always")
    with pytest.raises(idf.CompileError, match=r"resize_.*changes the memory of a tensor"):
        solver.run(torch.zeros(1, dtype=torch.float64))
