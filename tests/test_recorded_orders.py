"""Recorded operations that sort, factorize or take computed indices give what torch gives, in each lane."""

from __future__ import annotations

import pytest
import torch
from checks.compiled import needs_cpu, recorded_once

from implicitdiff._recorded.tape import NotRecordableError

pytestmark = needs_cpu
F64 = torch.float64
PLACES = torch.tensor([[2, 0, 3, 2], [1, 1, 0, 3], [0, 3, 2, 1]])
aten = torch.ops.aten


def at(x):
    """Indices that depend on values."""
    return x.argsort(dim=-1)


# Each of a matrix (4, 4) for each lane.
FUNCTIONS = {
    "sort": lambda x: x.sort(),
    "sort of columns": lambda x: x.sort(0, descending=True),
    "stable sort": lambda x: (x * 2).round().sort(stable=True, descending=True),
    "sort of a number": lambda x: x[0, 0].sort(),
    "argsort": lambda x: x.argsort(0),
    "msort": lambda x: x.msort(),
    "topk": lambda x: x.topk(2),
    "smallest of columns": lambda x: x.topk(3, 0, largest=False),
    "cumsum": lambda x: x.cumsum(-1),
    "cumsum of columns": lambda x: x.mT.cumsum(0),
    "count": lambda x: (x > 0).cumsum(1),
    "cumsum of a number": lambda x: x[1, 1].cumsum(0),
    "cumprod": lambda x: x.cumprod(0),
    "gather": lambda x: x.gather(1, at(x)),
    "gather of columns": lambda x: x.gather(0, at(x)),
    "gather of a part": lambda x: x.gather(0, at(x)[:2, :3]),
    "take along": lambda x: x.take_along_dim(at(x), 1),
    "rows": lambda x: x[at(x)[0]],
    "columns": lambda x: x[:, at(x)[0]],
    "from the end": lambda x: x[:, at(x)[0] - 4],
    "a row": lambda x: aten.index.Tensor(x, [x[0].argmax()]),
    "an entry": lambda x: aten.index.Tensor(x, [x[0].argmax(), x[1].argmin()]),
    "pairs": lambda x: x[at(x)[0], at(x)[1]],
    "pairs of a part": lambda x: x.reshape(2, 2, 2, 2)[:, at(x)[0] % 2, at(x)[1] % 2],
    "pairs apart": lambda x: x.reshape(2, 2, 2, 2)[at(x)[0] % 2, :, at(x)[1] % 2],
    "known and computed": lambda x: x[torch.arange(4), at(x)[1]],
    "index of a table": lambda x: x[at(x)[:2, :3]],
    "index select": lambda x: x.index_select(1, at(x)[2]),
    "take": lambda x: x.mT.take(at(x) - 5),
    "known indices": lambda x: x[PLACES],
    "known mask": lambda x: x[:, torch.tensor([True, False, True, True])],
    "scatter": lambda x: x.scatter(1, at(x), 2 * x),
    "scatter of a number": lambda x: x.scatter(0, at(x)[:1], 7.0),
    "scatter at known": lambda x: x.scatter(0, PLACES[2:], x[:1]),
    "scatter add": lambda x: x.scatter_add(0, at(x) // 2, x * x),
    "scatter add at known": lambda x: x.scatter_add(0, PLACES, x[:3] * x[1:]),
    "index put": lambda x: x.index_put((at(x)[0], at(x)[1]), x[0]),
    "index put of rows": lambda x: x.index_put((at(x)[0],), 2 * x),
    "index put of columns": lambda x: x.mT.index_put((torch.arange(4), at(x)[0] - 4), x[1]),
    "index add": lambda x: x.index_add(0, at(x)[0] // 2, x.exp()),
    "index copy": lambda x: x.index_copy(1, at(x)[0], x.exp()),
    "accumulated": lambda x: x.index_put((at(x)[0] // 2,), x, accumulate=True),
    "assigned": lambda x: assigned(x, at(x)[0]),
    "assigned at known": lambda x: assigned(x, PLACES[2]),
    "gradient of sorted": lambda x: torch.func.grad(lambda v: (v.sort(0).values * PLACES[:1].T).sum())(x),
    "gradient of gathered": lambda x: torch.func.grad(lambda v: v.exp().gather(1, at(x) // 2).sum())(x),
    "gradient of indexed": lambda x: torch.func.grad(lambda v: (v[at(x)[0] // 2] ** 2).sum())(x),
    "gradient of known": lambda x: torch.func.grad(lambda v: (v[PLACES] ** 2).sum())(x),
    "qr": lambda x: torch.linalg.qr(x),
    "complete qr": lambda x: torch.linalg.qr(x[:, :2], mode="complete"),
    "qr of a wide": lambda x: torch.linalg.qr(x[:2]),
    "r": lambda x: torch.linalg.qr(x[:, :3], mode="r").R,
    "qr of a batch": lambda x: torch.linalg.qr(x.reshape(2, 4, 2)),
    "geqrf": lambda x: torch.geqrf(x),
    "from the right": lambda x: torch.ormqr(*torch.geqrf(x), x.exp(), left=False, transpose=True),
    "householder product": lambda x: torch.linalg.householder_product(*torch.geqrf(x[:, :3])),
    "least squares": lambda x: torch.linalg.solve_triangular(torch.linalg.qr(x).R, x, upper=True),
    "singular values": lambda x: torch.linalg.svdvals(x[:3]),
    "singular vectors": lambda x: product(torch.linalg.svd(x)),
    "singular vectors of a wide": lambda x: product(torch.linalg.svd(x[:2], full_matrices=False)),
    "singular vectors of a batch": lambda x: product(torch.linalg.svd(x.reshape(2, 4, 2), full_matrices=False)),
    "eigenvalues": lambda x: torch.linalg.eigvalsh(x + x.mT),
    "eigenvectors": lambda x: function_of(x + x.mT),
    "eigenvalues of the upper": lambda x: torch.linalg.eigvalsh(x, UPLO="U"),
}


def assigned(x, places):
    new = x.clone()
    new[1:3, places] = x[2:]
    return new


def product(parts):
    u, values, v = parts
    return values, (u * values.exp().unsqueeze(-2)) @ v


def function_of(x):
    values, vectors = torch.linalg.eigh(x)
    return (vectors * values.exp()) @ vectors.mT


def flat(made):
    return [t[None] for t in ((made,) if isinstance(made, torch.Tensor) else tuple(made))]


def run_recorded(function, x, eager, width):
    """The function of each lane, by the compiled machine."""
    return recorded_once(lambda x: flat(function(x[0])), x, eager, width, [PLACES])[0]


def by_torch(function, x):
    return [torch.cat(parts) for parts in zip(*(flat(function(lane)) for lane in x), strict=True)]


def numbers(dtype=F64):
    return torch.randn(11, 4, 4, generator=torch.Generator().manual_seed(0), dtype=F64).to(dtype)


@pytest.mark.parametrize("width", [1, 8])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_recorded_function_is_that_of_torch(name, width):
    x = numbers()
    expected = by_torch(FUNCTIONS[name], x)
    for found, each in zip(run_recorded(FUNCTIONS[name], x, expected, width), expected, strict=True):
        torch.testing.assert_close(found, each, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["sort", "cumsum", "rows", "scatter add", "qr", "eigenvalues"])
def test_numbers_of_single_precision_are_rounded(name):
    x = numbers(torch.float32)
    expected = by_torch(FUNCTIONS[name], x)
    for found, each in zip(run_recorded(FUNCTIONS[name], x, expected, 8), expected, strict=True):
        torch.testing.assert_close(found, each, rtol=1e-4, atol=1e-5)


REFUSED = {
    "a mask": (lambda x: x[x > 0], "reads the value"),
    "many eigenvalues": (lambda x: torch.linalg.eigvalsh(torch.eye(40, dtype=F64) * x[0, 0]), "has 40 eigenvalues"),
    "many singular values": (lambda x: torch.linalg.svdvals(torch.eye(40, dtype=F64) * x[0, 0]), "has 40 singular"),
    "all singular vectors": (lambda x: torch.linalg.svd(x[:2]), "are asked for"),
    "another dtype": (lambda x: x * torch.full_like(x, 1.0).view(torch.int64), "interprets the memory"),
    "a factor": (lambda x: x.index_add(0, at(x)[0], x, alpha=2), "has a factor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_recorded_is_refused(name):
    function, message = REFUSED[name]
    with pytest.raises(NotRecordableError, match=message):
        run_recorded(function, numbers(), [numbers()], 8)


def test_a_decision_on_known_numbers_is_recorded():
    def function(x):
        return x.sort().values if float(torch.ones(3).sum()) == 3 else x

    x = numbers()
    (found,) = run_recorded(function, x, [x], 8)
    assert torch.equal(found, x.sort().values)
