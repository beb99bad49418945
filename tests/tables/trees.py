"""Drawn tensors, and runs of optimizers on trees of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_structure

import implicitdiff as idf

F16, BF16, F32, F64, INT = torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64

# A few steps, each computed to a few units of roundoff, on values of size 1.
CLOSE = {F64: 1e-12, F32: 1e-5, F16: 2e-3, BF16: 2e-2}


def drawn(seed: int, shape: tuple[int, ...] = (3,), dtype: torch.dtype = F64) -> Tensor:
    if dtype == INT:
        return torch.full(shape, seed, dtype=INT)
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(tree: Any, expected: Any) -> None:
    assert tree_structure(tree) == tree_structure(expected)
    for a, b in zip(tree_leaves(tree), tree_leaves(expected), strict=True):
        if a is None or b is None:
            assert a is b
        else:
            tolerance = CLOSE.get(a.dtype, 0.0)
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def trained(pair: idf.GradientTransformation, params: Any, grads: list[Any]) -> tuple[Any, Any]:
    state = pair.init(params)
    for g in grads:
        params, state = pair.step(g, state, params)
    return params, state


each_choice = pytest.mark.parametrize("accelerated", [None, False])

ONE = torch.ones(2)
PARAMS = {"net": [ONE, ONE], "b": torch.ones(())}


def _update(pair: idf.GradientTransformation, grads: Any, params: Any = None, like: Any = PARAMS) -> Any:
    return pair.update(grads, pair.init(like), params)
