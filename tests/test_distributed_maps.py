"""The maps between replicated and varying values under every transform, against one process."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks.ranks import Raised, is_usable, outcome, rank
from checks.tensors import draw
from checks.transforms import TRANSFORMS, under_each
from tables.collectives import FUNCTIONS, THETA, in_one_process, transformed
from torch import Tensor
from torch.func import grad, linearize
from torch.utils._pytree import tree_flatten

import implicitdiff.distributed as dist


def check(on_ranks, size: int, row: str, transform: str) -> None:
    expected = TRANSFORMS[transform](in_one_process(row, size), THETA)
    for result in on_ranks(size, transformed, row, transform):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.one_in(3)
@under_each({name: name for name in FUNCTIONS})
def test_a_function_of_two_ranks_is_that_of_one_process_under(on_ranks, row: str, transform: str) -> None:
    check(on_ranks, 2, row, transform)


@pytest.mark.one_in(19)
@under_each({name: name for name in FUNCTIONS})
def test_a_function_of_four_ranks_is_that_of_one_process_under(on_ranks, row: str, transform: str) -> None:
    check(on_ranks, 4, row, transform)


# --- other tensors ----------------------------------------------------------------------------------------------------


def sums() -> dict[str, Any]:
    """Of ranks 0 and 1, which hold one time and two times a tensor."""
    mine, z = 1 + rank(), draw(3, 2, 3, dtype=torch.complex64)
    whole = torch.arange(6).reshape(2, 3)
    return {
        "int64": dist.psum(whole * mine),
        "uint8": dist.psum((whole * mine).to(torch.uint8)),
        "float32": dist.psum(whole.float() * mine),
        "bfloat16": dist.psum(whole.bfloat16() * mine),
        "complex64": dist.psum(z * mine),
        "conjugate": dist.psum((z * mine).conj()),
        "imaginary part of a conjugate": dist.psum((z * mine).conj().imag),
        "transposed": dist.psum(whole.T * mine),
        "every second": dist.psum((whole * mine)[:, ::2]),
        "expanded": dist.psum((whole[:1] * mine).expand(4, 3)),
        "no dimensions": dist.psum(torch.tensor(2.0) * mine),
        "no entries": dist.psum(torch.zeros(0, 3)),
        "tree": dist.psum({"a": (whole * mine, torch.tensor(1.5) * mine), "b": [z * mine, "text", None, 7]}),
        "no tensors": dist.psum(()),
        "mean": dist.pmean((whole * mine, z * mine)),
    }


def test_sums_of_other_tensors(on_ranks) -> None:
    whole, z = torch.arange(6).reshape(2, 3), draw(3, 2, 3, dtype=torch.complex64)
    expected = {
        "int64": 3 * whole,
        "uint8": (3 * whole).to(torch.uint8),
        "float32": 3 * whole.float(),
        "bfloat16": 3 * whole.bfloat16(),
        "complex64": 3 * z,
        "conjugate": 3 * z.conj(),
        "imaginary part of a conjugate": -3 * z.imag,
        "transposed": 3 * whole.T,
        "every second": 3 * whole[:, ::2],
        "expanded": 3 * whole[:1].expand(4, 3),
        "no dimensions": torch.tensor(6.0),
        "no entries": torch.zeros(0, 3),
        "tree": {"a": (3 * whole, torch.tensor(4.5)), "b": [3 * z, "text", None, 7]},
        "no tensors": (),
        "mean": (1.5 * whole, 1.5 * z),
    }
    for found in on_ranks(2, sums):
        assert list(found) == list(expected)
        for name in expected:
            assert_alike(found[name], expected[name])


def assert_alike(found: Any, expected: Any) -> None:
    """Dtypes and values, leaf by leaf."""
    leaves, spec = tree_flatten(found)
    others, other_spec = tree_flatten(expected)
    assert spec == other_spec
    for leaf, other in zip(leaves, others, strict=True):
        if isinstance(other, Tensor):
            torch.testing.assert_close(leaf.resolve_conj(), other.resolve_conj())
        else:
            assert leaf == other


def parts() -> dict[str, Any]:
    """Gathered, and split, along each dimension."""
    whole = torch.arange(24).reshape(4, 3, 2)
    gathered = {f"{dim}": dist.all_gather(whole + 100 * rank(), dim=dim) for dim in range(-3, 3)}
    split = {f"part {dim}": dist.shard(whole, dim=dim) for dim in (0, 2, -1, -3)}
    booleans = dist.all_gather(whole % 2 == rank())
    z = draw(3, 2, 3, dtype=torch.complex128)
    return {
        **gathered,
        **split,
        "booleans": booleans,
        "complex": dist.all_gather((z * (1 + rank())).conj().T),
        "one after the other": dist.all_gather(dist.shard({"a": whole, "b": z}, dim=0)),
    }


def test_gathered_and_split_tensors(on_ranks) -> None:
    whole, z = torch.arange(24).reshape(4, 3, 2), draw(3, 2, 3, dtype=torch.complex128)
    for place, found in enumerate(on_ranks(2, parts)):
        for dim in range(-3, 3):
            assert torch.equal(found[f"{dim}"], torch.cat([whole, whole + 100], dim))
        for dim in (0, 2, -1, -3):
            assert torch.equal(found[f"part {dim}"], whole.chunk(2, dim)[place])
        assert torch.equal(found["booleans"], torch.cat([whole % 2 == 0, whole % 2 == 1]))
        assert_alike(found["complex"], torch.cat([z.conj().T, 2 * z.conj().T]))
        assert_alike(found["one after the other"], {"a": whole, "b": z})


def derivatives_in_single_precision() -> Tensor:
    w = torch.tensor([0.5, -1.0])
    return grad(lambda w: dist.psum((dist.pvary(w) * (1 + rank())).sin().sum()))(w)


def test_derivatives_keep_the_dtype(on_ranks) -> None:
    w = torch.tensor([0.5, -1.0])
    for found in on_ranks(2, derivatives_in_single_precision):
        torch.testing.assert_close(found, grad(lambda w: w.sin().sum() + (2 * w).sin().sum())(w))


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a sum of booleans": (lambda: dist.psum(torch.ones(2) > 0), TypeError, "torch.bool"),
    "a sum of short integers": (lambda: dist.psum(torch.ones(2, dtype=torch.int16)), TypeError, "int16"),
    "a sparse tensor": (lambda: dist.psum(torch.eye(2).to_sparse()), TypeError, r"to_dense\(\)"),
    "no such dimension": (lambda: dist.all_gather(torch.ones(2, 3), dim=2), ValueError, r"shape \[2, 3\] has no .* 2"),
    "a number to gather": (lambda: dist.all_gather(torch.tensor(1.0)), ValueError, "has no dimension 0"),
    "a number to split": (lambda: dist.shard(torch.tensor(1.0)), ValueError, "has no dimension 0"),
    "linearize": (lambda: linearize(dist.psum_of(torch.sin), torch.ones(2)), NotImplementedError, "jvp in the place"),
    "linearize of vmap": (lambda: linearize(dist.vmap(torch.sin), torch.ones(2)), NotImplementedError, "make_fx"),
    "batched by autograd": (
        lambda: torch.autograd.functional.hessian(dist.psum_of(torch.prod), torch.ones(2), vectorize=True),
        NotImplementedError,
        "use torch.func.jacrev",
    ),
    "unequal parts": (lambda: dist.shard(torch.ones(4, 3), dim=1), ValueError, "multiple of 2"),
}


def refusal(name: str) -> Any:
    return outcome(REFUSED[name][0]), is_usable()


@pytest.mark.parametrize("name", REFUSED)
def test_a_tensor_is_refused_before_it_is_sent(on_ranks, name: str) -> None:
    _, kind, text = REFUSED[name]
    for error, usable in on_ranks(2, refusal, name):
        assert isinstance(error, Raised) and error.type is kind, error
        assert re.search(text, error.text), error
        assert usable


def compiled(w: Tensor) -> Any:
    """A part of a program of torch.compile, which runs eagerly."""
    total, lanes = dist.psum_of(lambda w: (w * (1 + rank())).sin().sum()), dist.vmap(torch.sin)
    return torch.compile(lambda w: 2 * total(w) + lanes(w).sum() + dist.psum(w).sum(), backend="eager")(w)


def test_torch_compile_leaves_them_as_they_are(on_ranks) -> None:
    w = draw(7, 4)
    expected = 2 * (w.sin().sum() + (2 * w).sin().sum()) + w.sin().sum() + 2 * w.sum()
    for found in on_ranks(2, compiled, w):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
