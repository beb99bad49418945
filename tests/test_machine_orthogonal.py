"""The machine's QR factorizations and eigenvalues are those of torch, in each lane."""

from __future__ import annotations

import math

import pytest
import torch
from checks.compiled import needs_cpu
from tables.machine import F32, F64, NUMBER, Operand, evaluate, instruction, sections, unwritten

from implicitdiff._C import cpu

pytestmark = needs_cpu
each_width = pytest.mark.parametrize("width", [1, 8])
LANES = 9
SHAPES = [(1, 1), (4, 1), (1, 4), (5, 5), (9, 4), (4, 9), (40, 21), (21, 40)]


def randn(*sizes, seed=0):
    return torch.randn(LANES, *sizes, generator=torch.Generator().manual_seed(seed), dtype=F64)


def laid(x, by_columns):
    """A batch of matrices, by rows or by columns."""
    stored = x.mT if by_columns else x
    return Operand(stored.reshape(len(x), -1).contiguous(), (1, x.shape[1]) if by_columns else (x.shape[2], 1))


def factorized(a, width, layout=0, rounded=False):
    """The factors and the numbers tau of each lane."""
    n, m = a.shape[1:]
    factors, tau = laid(torch.full_like(a, 7), layout & 1), unwritten(len(a), (min(n, m), 1))
    found = evaluate("QR", (n, m), [factors, tau], [laid(a, layout & 2)], width, rounded=rounded)
    return Operand(found[0], factors.strides).read((n, m)), found[1]


def applied(factors, tau, b, width, layout=0, transpose=False):
    n, m, k = *b.shape[1:], tau.shape[-1]
    row, column = laid(factors, layout & 1).strides
    out, given = (laid(x, layout & 2) for x in (torch.full_like(b, 7), b))
    inputs = [
        laid(factors, layout & 1)._replace(strides=(row, 0, column)),
        Operand(tau, (0, 0, 1)),
        given._replace(strides=(*given.strides, 0)),
    ]
    outputs = [out._replace(strides=(*out.strides, 0))]
    name = "APPLY_Q_TRANSPOSED" if transpose else "APPLY_Q"
    (found,) = evaluate(name, (n, m, k), outputs, inputs, width)
    (in_place,) = evaluate(name, (n, m, k), inputs[2:], inputs, width, aliases=[(0, 2)])
    assert torch.equal(found, in_place)
    return Operand(found, out.strides).read((n, m))


@each_width
@pytest.mark.parametrize("layout", range(4))
@pytest.mark.parametrize("shape", SHAPES)
def test_factors_are_those_of_lapack(shape, layout, width):
    a = randn(*shape)
    factors, tau = factorized(a, width, layout)
    expected, expected_tau = torch.geqrf(a)
    torch.testing.assert_close(factors, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(tau, expected_tau, rtol=1e-9, atol=1e-11)


@each_width
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("layout", range(4))
@pytest.mark.parametrize("columns", [1, 3, 13])
@pytest.mark.parametrize("shape", SHAPES)
def test_reflections_are_applied_as_by_lapack(shape, columns, layout, transpose, width):
    factors, tau = torch.geqrf(randn(*shape))
    b = randn(shape[0], columns, seed=1)
    given = factors[..., : tau.shape[-1]].contiguous()
    expected = torch.ormqr(given, tau, b, transpose=transpose)
    torch.testing.assert_close(applied(factors, tau, b, width, layout, transpose), expected, rtol=1e-11, atol=1e-12)


@each_width
def test_no_reflections_change_nothing(width):
    b = randn(4, 3)
    assert torch.equal(applied(torch.empty(LANES, 4, 0, dtype=F64), torch.empty(LANES, 0, dtype=F64), b, width), b)


@each_width
@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (0, 0)])
def test_a_matrix_of_no_elements_has_no_factors(shape, width):
    factors, tau = factorized(torch.empty(LANES, *shape, dtype=F64), width)
    assert factors.shape == (LANES, *shape) and tau.shape == (LANES, 0)


def with_zeros(a):
    a[:, :, 1] = 0
    return a


def of_rank_one(a):
    return a[:, :, :1] * a[:, :1]


def huge(a):
    return a * 1e200


def tiny(a):
    return a * 1e-250


def triangular(a):
    return a.triu()


@each_width
@pytest.mark.parametrize("special", [with_zeros, of_rank_one, huge, tiny, triangular])
def test_factors_of_special_matrices_are_their_factors(special, width):
    a = special(randn(7, 5))
    factors, tau = factorized(a, width)
    upper = torch.cat([factors[:, :5].triu(), torch.zeros(LANES, 2, 5, dtype=F64)], 1)
    size = a.abs().amax()
    torch.testing.assert_close(applied(factors, tau, upper / size, width), a / size, rtol=1e-13, atol=1e-13)
    assert (tau == 0).all() if special is triangular else (tau != 0).any()


@each_width
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_lane_that_is_not_finite_leaves_the_others_alone(number, width):
    a = randn(5, 3)
    expected, _ = factorized(a, width)
    a[4, 2, 0] = number
    factors, tau = factorized(a, width)
    assert factors[4, 0].isnan().all() and tau[4, 0].isnan()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(factors[others], expected[others])


@each_width
def test_factors_are_rounded_on_demand(width):
    exact, rounded = (factorized(randn(5, 3), width, rounded=rounded)[0] for rounded in (False, True))
    assert torch.equal(exact.to(F32).double(), rounded) and not torch.equal(exact, rounded)


# Eigenvalues


def decomposed(a, width, layout=0):
    n = a.shape[-1]
    vectors, values, work = laid(torch.zeros_like(a), layout & 1), unwritten(len(a), (n, 1)), unwritten(len(a), (n, n))
    found = evaluate("EIGH", (n, n), [vectors, values, work], [laid(a, layout & 2)], width)
    return found[1], Operand(found[0], vectors.strides).read((n, n))


@each_width
@pytest.mark.parametrize("layout", range(4))
@pytest.mark.parametrize("n", [0, 1, 2, 5, 24])
def test_eigenvalues_are_those_of_lapack(n, layout, width):
    a = randn(n, n)
    symmetric = a + a.mT
    # What is not of the lower triangle is not read.
    values, vectors = decomposed(torch.where(torch.ones_like(a).triu(1) != 0, math.nan, symmetric), width, layout)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(symmetric), rtol=1e-13, atol=1e-13 * max(n, 1))
    torch.testing.assert_close(symmetric @ vectors, vectors * values[:, None], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(n, dtype=F64).expand_as(a), rtol=1e-13, atol=1e-13)


@each_width
def test_repeated_eigenvalues_have_orthogonal_eigenvectors(width):
    q = torch.linalg.qr(randn(6, 6))[0]
    numbers = torch.tensor([2.0, 0.0, 2.0, -1.0, 2.0, 0.0], dtype=F64)
    values, vectors = decomposed((q * numbers) @ q.mT, width)
    torch.testing.assert_close(values, numbers.sort().values.expand(LANES, 6), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(6, dtype=F64).expand(LANES, 6, 6))


@each_width
def test_eigenvalues_of_a_lane_that_is_not_finite_are_nan(width):
    a = torch.eye(3, dtype=F64).repeat(LANES, 1, 1)
    a[4, 1, 0] = math.nan
    values, _ = decomposed(a, width)
    assert values[4].isnan().any() and torch.equal(values[5], torch.ones(3, dtype=F64))


# Singular values


def singular(a, width, layout=0):
    m, n = a.shape[1:]
    u, values = laid(torch.zeros_like(a), layout & 1), unwritten(len(a), (n, 1))
    v = laid(torch.zeros(len(a), n, n, dtype=F64), layout & 1)
    found = evaluate("SVD", (m, n), [u, values, v], [laid(a, layout & 2)], width)
    return Operand(found[0], u.strides).read((m, n)), found[1], Operand(found[2], v.strides).read((n, n))


def assert_decomposes(a, u, values, v):
    unit = torch.eye(a.shape[-1], dtype=F64).expand_as(v)
    for q in (u, v):
        torch.testing.assert_close(q.mT @ q, unit, rtol=1e-12, atol=1e-12)
    size = a.abs().amax().clamp(min=1e-300) if a.numel() else 1.0
    torch.testing.assert_close((u * (values / size)[:, None]) @ v.mT, a / size, rtol=1e-12, atol=1e-12)


@each_width
@pytest.mark.parametrize("layout", range(4))
@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (3, 0), (5, 5), (9, 4), (40, 21)])
def test_singular_values_are_those_of_lapack(shape, layout, width):
    a = randn(*shape)
    u, values, v = singular(a, width, layout)
    torch.testing.assert_close(values, torch.linalg.svdvals(a), rtol=1e-11, atol=1e-13)
    assert_decomposes(a, u, values, v)


def zero(a):
    return a * 0


@each_width
@pytest.mark.parametrize("special", [with_zeros, of_rank_one, huge, tiny, triangular, zero])
def test_singular_vectors_of_special_matrices_are_orthogonal(special, width):
    a = special(randn(7, 5))
    assert_decomposes(a, *singular(a, width))


@each_width
def test_small_singular_values_have_all_digits(width):
    # Their product is a determinant, here of well-conditioned matrices with columns in other units.
    a, units = randn(4, 4), torch.tensor([1.0, 1e-30, 1e-10, 1e-20], dtype=F64)
    values = singular(a * units, width)[1]
    expected = torch.linalg.det(a).abs() * units.prod()
    torch.testing.assert_close(values.prod(-1), expected, rtol=1e-12, atol=0)


@each_width
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_singular_values_of_a_lane_that_is_not_finite_are_nan(number, width):
    a = torch.eye(3, dtype=F64).repeat(LANES, 1, 1)
    a[4, 1, 0] = number
    found = singular(a, width)
    assert all(x[4].isnan().all() for x in found)
    assert all(x[5].isfinite().all() for x in found)


# Each with its only mistake: the operation, the sizes and the references, in an arena of 30 elements.
SQUARE, TAU, X = (0, 0, (3, 1)), (0, 20, (1, 0)), (0, 0, (1, 0, 0))
WRONG = {
    r"\(QR\): it has 1 dimensions, not 2": ("QR", (3,), [(0, 0, (1,))] * 3),
    r"\(QR\): the number of references is 2, not 3": ("QR", (3, 3), [SQUARE] * 2),
    r"\(QR\): an output reaches out of the arena": ("QR", (3, 3), [SQUARE, (0, 28, (1, 0)), SQUARE]),
    r"\(QR\): input 0 reaches out of the arena": ("QR", (3, 3), [SQUARE, TAU, (0, 22, (3, 1))]),
    r"\(QR\): input 0 is a shared array, which": ("QR", (3, 3), [SQUARE, TAU, (1, 0, (3, 1))]),
    r"\(APPLY_Q\): it has 2 dimensions, not 3": ("APPLY_Q", (3, 3), [SQUARE] * 4),
    r"\(APPLY_Q\): it has more reflections than rows": ("APPLY_Q", (3, 1, 4), [X] * 4),
    r"\(APPLY_Q\): input 0 reaches out": ("APPLY_Q", (3, 1, 3), [X, (0, 0, (10, 0, 9)), X, X]),
    r"\(APPLY_Q\): input 1 reaches out": ("APPLY_Q", (3, 1, 3), [X, X, (0, 0, (0, 0, 20)), X]),
    r"\(SVD\): it has fewer rows than columns": ("SVD", (2, 3), [SQUARE] * 4),
    r"\(SVD\): it has 1 dimensions, not 2": ("SVD", (3,), [(0, 0, (1,))] * 4),
    r"\(SVD\): an output reaches out": ("SVD", (3, 2), [SQUARE, (0, 20, (1, 0)), (0, 27, (3, 1)), SQUARE]),
    r"\(EIGH\): its matrix is not square": ("EIGH", (3, 2), [SQUARE] * 4),
    r"\(EIGH\): an output reaches out": ("EIGH", (3, 3), [SQUARE, (0, 28, (1, 0)), SQUARE, SQUARE]),
}  # fmt: skip


@pytest.mark.parametrize("sentence", WRONG)
def test_bad_instructions_are_refused(sentence):
    name, sizes, references = WRONG[sentence]
    with pytest.raises(ValueError, match=sentence):
        cpu.Machine(8, [instruction(name, sizes, *references)], [0, 0, 0, 0, 1], 30, [], [], [100], 0, 1)
    assert name in NUMBER


def test_a_matrix_may_lie_at_the_end_of_the_arena():
    code = [instruction("QR", (3, 3), SQUARE, (0, 9, (1, 0)), (0, 12, (3, 1)))]
    cpu.Machine(8, code, sections(code), 21, [], [], [], 0, 1)
    with pytest.raises(ValueError, match="reaches out"):
        cpu.Machine(8, code, sections(code), 20, [], [], [], 0, 1)
