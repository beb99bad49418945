"""The table: every problem under every transform, against a closed form or the unrolled iteration under the same
transform."""

from __future__ import annotations

import pytest
import torch
from checks.transforms import TRANSFORMS, under_each
from tables.problems import PROBLEMS, Problem


@under_each({problem.name: problem for problem in PROBLEMS})
def test_solution_is_right_under(row: Problem, transform: str) -> None:
    apply = TRANSFORMS[transform]
    result, expected = apply(row.solution, row.theta), apply(row.reference, row.theta)
    assert result.shape == expected.shape
    # A derivative that is nowhere zero would be missed by none of these; one that vanishes must vanish on the
    # problem's scale.
    error = (result - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
    assert error < row.tolerance


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_gradcheck_and_gradgradcheck_pass(problem: Problem) -> None:
    theta = problem.theta.clone().requires_grad_()
    assert torch.autograd.gradcheck(problem.solution, theta, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(problem.solution, theta, check_fwd_over_rev=True)
