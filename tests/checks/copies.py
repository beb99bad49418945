"""Copies of trees and objects, and their equality bit for bit."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch.utils import _pytree as pytree


def copied(tree: Any) -> Any:
    """Copies that share no memory, leaves of no graph."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), tree)


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def saved(value: Any, weights_only: bool = False) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def assert_same(tree: Any, expected: Any) -> None:
    """Assert that two trees are equal bit for bit, in structure, dtypes and values."""
    leaves, spec = pytree.tree_flatten(tree)
    others, other = pytree.tree_flatten(expected)
    assert spec == other
    for a, b in zip(leaves, others, strict=True):
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b)
        else:
            assert a == b
