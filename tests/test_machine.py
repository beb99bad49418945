"""Each instruction of the compiled machine gives what torch gives, for any layout of its operands."""

from __future__ import annotations

import math

import pytest
import torch
from checks.compiled import needs_cpu
from tables.machine import (
    ALONG,
    BINARY,
    ELEMENTWISE,
    EXACT_BINARY,
    EXACT_UNARY,
    F32,
    F64,
    I64,
    NUMBER,
    OF_ONE_OR_MORE,
    ORTHOGONAL,
    OTHERS,
    REDUCTIONS,
    SPECIAL,
    TRIANGULAR,
    UNARY,
    Operand,
    contiguous,
    dense,
    evaluate,
    pairs_of_special,
    strided,
    unwritten,
)

pytestmark = needs_cpu
each_width = pytest.mark.parametrize("width", [1, 8])
# None, one incomplete block, one that is full, and several.
LANES = [0, 1, 5, 8, 20]
# By two implementations of a function, each with an error of few units in the last place.
FUNCTION = 4
# Of a function that loses digits at its zeros, one that torch flushes to zero, and otherwise of subnormal numbers.
ABSOLUTE = {"LGAMMA": 1e-15, "SIGMOID": 1e-307}
SUBNORMAL = 1e-320


def expected_of(name, inputs):
    """Torch's result. In single precision, some of its functions overflow early: it is then that of double, rounded."""
    if name in EXACT_UNARY or name in EXACT_BINARY or inputs[0].dtype == F64:
        return ELEMENTWISE[name](*inputs)
    return ELEMENTWISE[name](*(x.double() for x in inputs)).to(inputs[0].dtype)


def assert_function(name, actual, expected):
    """Signs of zeros count where a result is not one of two equal inputs."""
    if name in EXACT_UNARY or name in EXACT_BINARY:
        tolerance = {"rtol": 0, "atol": 0}
    else:
        tolerance = {"rtol": FUNCTION * torch.finfo(expected.dtype).eps, "atol": ABSOLUTE.get(name, SUBNORMAL)}
    torch.testing.assert_close(actual, expected.to(actual.dtype), **tolerance, equal_nan=True)
    if name not in ("MAXIMUM", "MINIMUM", "FMAX", "FMIN") and expected.is_floating_point():
        zero = (expected == 0) & (actual == 0)
        assert torch.equal(actual[zero].signbit(), expected[zero].signbit())


def of_special(name, dtype):
    if name in UNARY:
        return [torch.tensor([SPECIAL], dtype=F64).to(dtype)]
    return list(pairs_of_special(dtype))


def test_every_operation_is_tested():
    assert set(NUMBER) == {*ELEMENTWISE, *REDUCTIONS, *TRIANGULAR, *OTHERS, *ORTHOGONAL, *ALONG}


# Elementwise


@each_width
@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", UNARY | BINARY)
def test_special_numbers_give_what_they_give_in_torch(name, dtype, width):
    inputs = of_special(name, dtype)
    out = unwritten(1, inputs[0].shape[1:], dtype)
    (actual,) = evaluate(name, inputs[0].shape[1:], [out], [dense(x) for x in inputs], width, rounded=dtype == F32)
    assert_function(name, actual, expected_of(name, inputs))


@each_width
@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", UNARY | BINARY)
def test_many_numbers_give_what_they_give_in_torch(name, dtype, width):
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([1e-3, 0.3, 1.0, 6.0, 50.0], dtype=F64).repeat_interleave(200)
    inputs = [(torch.randn(3, 1000, generator=generator, dtype=F64) * scales).to(dtype) for _ in range(2)]
    inputs = inputs[: 1 if name in UNARY else 2]
    out = unwritten(3, (1000,), dtype)
    (actual,) = evaluate(name, (1000,), [out], [dense(x) for x in inputs], width, rounded=dtype == F32)
    assert_function(name, actual, expected_of(name, inputs))


@each_width
@pytest.mark.parametrize("name", [n for n in EXACT_BINARY if n not in ("DIV", "COPYSIGN")])
def test_integers_give_what_they_give_in_torch(name, width):
    x = torch.arange(-9, 9)
    inputs = [torch.cartesian_prod(x, x[x != 0])[:, i][None] for i in range(2)]
    out = unwritten(1, inputs[0].shape[1:], I64)
    (actual,) = evaluate(name, inputs[0].shape[1:], [out], [dense(x) for x in inputs], width)
    assert torch.equal(actual, ELEMENTWISE[name](*inputs).to(I64))


@each_width
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, I64], ids=str)
def test_integers_and_booleans_are_read_and_written(dtype, width):
    x = torch.tensor([[True, False, True]]) if dtype == torch.bool else torch.tensor([[3, -7, 2**31 - 1]], dtype=dtype)
    for name in "COPY", "NOT", "TO_BOOL":
        (actual,) = evaluate(name, (3,), [unwritten(1, (3,), dtype)], [dense(x)], width)
        assert torch.equal(actual, UNARY[name](x).to(dtype))


def test_numbers_that_an_integer_does_not_hold_become_zero():
    x = torch.tensor([[math.nan, math.inf, -1e30, 9.3e18, -(2.0**63), 5.0]], dtype=F64)
    (actual,) = evaluate("COPY", (6,), [unwritten(1, (6,), I64)], [dense(x)])
    assert actual.tolist() == [[0, 0, 0, 0, -(2**63), 5]]


# Sizes, and the strides of up to four operands; where there are fewer, the last ones are left out.
LAYOUTS = {
    "0-dim": ((), [(), (), (), ()]),
    "one": ((1,), [(1,), (5,), (0,), (1,)]),
    "contiguous": ((37,), [(1,), (1,), (1,), (1,)]),
    "first broadcast": ((37,), [(1,), (0,), (1,), (1,)]),
    "second broadcast": ((37,), [(1,), (1,), (0,), (1,)]),
    "third broadcast": ((37,), [(1,), (1,), (1,), (0,)]),
    "all broadcast": ((37,), [(1,), (0,), (0,), (0,)]),
    "every other": ((19,), [(2,), (3,), (1,), (2,)]),
    "reversed": ((19,), [(-1,), (1,), (-2,), (-1,)]),
    "matrix": ((5, 7), [(7, 1), (7, 1), (7, 1), (7, 1)]),
    "transposed": ((5, 7), [(7, 1), (1, 5), (7, 1), (1, 5)]),
    "written transposed": ((5, 7), [(1, 5), (7, 1), (1, 5), (7, 1)]),
    "row and column": ((5, 7), [(7, 1), (0, 1), (1, 0), (0, 0)]),
    "parts of rows": ((5, 7), [(9, 1), (8, 1), (7, 1), (20, 2)]),
    "three": ((3, 4, 9), [(36, 9, 1), (9, 27, 1), (0, 9, 1), (1, 3, 12)]),
    "six": ((2, 1, 3, 2, 2, 3), [(36, 1, 12, 6, 3, 1), (1, 0, 2, 6, 12, 24), (0, 0, 1, 0, 3, 6), (5, 0, 0, 0, 0, 1)]),
    "empty": ((3, 0, 2), [(0, 2, 1), (5, 5, 5), (0, 0, 0), (1, 1, 1)]),
}


@each_width
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["NEG", "SUB", "WHERE"])
def test_operands_may_have_any_layout(name, layout, width):
    sizes, strides = LAYOUTS[layout]
    count = {"NEG": 1, "SUB": 2, "WHERE": 3}[name]
    for lanes in LANES:
        out, *inputs = (strided(s, sizes, lanes, i) for i, s in enumerate(strides[: count + 1]))
        if name == "WHERE":
            inputs[0].storage.clamp_(min=0)
        expected = out.written(ELEMENTWISE[name](*(x.read(sizes) for x in inputs)))
        for threads in 1, 2:
            (actual,) = evaluate(name, sizes, [out], inputs, width, threads)
            assert torch.equal(actual, expected)


@each_width
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_mask_does_not_choose_is_kept(layout, width):
    sizes, strides = LAYOUTS[layout]
    out, value, mask = (strided(s, sizes, 20, i) for i, s in enumerate(strides[:3]))
    mask.storage.clamp_(min=0)
    (actual,) = evaluate("COMMIT", sizes, [out], [value, mask], width)
    expected = torch.where(mask.read(sizes) != 0, value.read(sizes), out.read(sizes))
    assert torch.equal(actual, out.written(expected))


@each_width
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared", [(True, True), (True, False), (False, True)])
def test_an_operand_may_be_the_same_for_all_lanes(shared, layout, width):
    sizes, strides = LAYOUTS[layout]
    out, *inputs = (strided(s, sizes, 20, i, i > 0 and shared[i - 1]) for i, s in enumerate(strides[:3]))
    for name, given in ("SUB", inputs), ("COPY", inputs[:1]):
        expected = ELEMENTWISE[name](*(x.read(sizes) for x in given)).expand(20, *sizes)
        (actual,) = evaluate(name, sizes, [out], given, width)
        assert torch.equal(actual, out.written(expected))


@each_width
@pytest.mark.parametrize("name", ["EXP", "ADD", "COMMIT", "WHERE"])
def test_a_result_may_replace_an_operand(name, width):
    sizes = (5, 7)
    count = {"EXP": 1, "ADD": 2, "COMMIT": 2, "WHERE": 3}[name]
    for i in range(count):
        out = strided((7, 1), sizes, 9, 100)
        inputs = [strided((7, 1), sizes, 9, j) for j in range(count)]
        separate = [x if j != i else Operand(out.storage.clone(), *out[1:]) for j, x in enumerate(inputs)]
        (expected,) = evaluate(name, sizes, [out], separate, width)
        (actual,) = evaluate(name, sizes, [out], inputs, width, aliases=[(0, i)])
        assert torch.equal(actual, expected)


@each_width
@pytest.mark.parametrize("name", ["ADD", "DIV", "POW", "SQRT", "SUM", "MATMUL", "CHOLESKY"])
def test_results_are_rounded_to_single_precision_on_demand(name, width):
    x, y = strided((4, 1), (4, 4), 3, 0), strided((4, 1), (4, 4), 3, 1)
    sizes, out, given, count = (4, 4), strided((4, 1), (4, 4), 3, 2), [x, y], 1
    x.storage.abs_()
    if name in ("SQRT", "SUM"):
        given = [x]
    if name == "SUM":
        out = strided((1, 0), (4, 4), 3, 2)
    if name == "MATMUL":
        sizes = (4, 4, 4)
        out, given = Operand(out.storage, (4, 1, 0)), [Operand(x.storage, (4, 0, 1)), Operand(y.storage, (0, 1, 4))]
    outputs = [out]
    if name == "CHOLESKY":
        matrix = x.read(sizes)
        given = [dense(matrix @ matrix.mT + torch.eye(4))]
        outputs, count = [out, unwritten(3, (1, 1), I64)], 2
    exact = evaluate(name, sizes, outputs, given, width)
    rounded = evaluate(name, sizes, outputs, given, width, rounded=True)
    assert len(rounded) == count and not torch.equal(exact[0], rounded[0])
    index = out.index(sizes[: len(out.strides)] if name != "SUM" else sizes)
    assert torch.equal(exact[0][:, index].float().double(), rounded[0][:, index])


# Reductions


@each_width
@pytest.mark.parametrize("layout", ["contiguous", "strided", "broadcast", "vector"])
@pytest.mark.parametrize(
    ["name", "size"],
    [(name, size) for name in REDUCTIONS for size in (0, 1, 3, 8, 33, 100) if size or name not in OF_ONE_OR_MORE],
)
def test_reductions_are_those_of_torch(name, size, layout, width):
    rows = {"contiguous": (3, 2), "strided": (2, 3), "broadcast": (2, 3), "vector": ()}[layout]
    strides = {"contiguous": (2 * size, size, 1), "strided": (1, 2, 6), "broadcast": (0, 1, 0), "vector": (1,)}[layout]
    x = strided(strides, (*rows, size), 11, 0)
    x.storage[5:].mul_(0.5).round_()
    out = strided((*contiguous(rows), 0), (*rows, size), 11, 1)
    (actual,) = evaluate(name, (*rows, size), [out], [x], width)
    expected = Operand(out.storage, out.strides[:-1], out.offset).written(REDUCTIONS[name](x.read((*rows, size))))
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-14)


@each_width
@pytest.mark.parametrize("at", [0, 7, 20, 24])
@pytest.mark.parametrize("special", [[math.nan], [math.inf], [-math.inf], [math.inf, math.nan, -math.inf], [-0.0]])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_of_special_numbers_are_those_of_torch(name, special, at, width):
    x = torch.randn(9, 25, generator=torch.Generator().manual_seed(0), dtype=F64)
    x[::2, at : at + len(special)] = torch.tensor(special, dtype=F64)[: 25 - at]
    x[1::2] = x[1::2] != x[1::2]
    (actual,) = evaluate(name, (25,), [Operand(torch.zeros(9, 1, dtype=F64), (0,))], [dense(x)], width)
    expected = REDUCTIONS[name](x)[:, None].double()
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-14, equal_nan=True)


# Matrices

SHAPES = [(20, 1, 20), (1, 20, 20), (5, 9, 7), (33, 17, 40), (1, 1, 100), (20, 20, 1), (3, 2, 0), (4, 0, 3), (0, 4, 3)]


def matrix_operand(x, transposed, shared=False):
    """A batch of matrices, by rows or by columns."""
    laid = x.mT if transposed else x
    return Operand(laid.reshape(len(x), -1).contiguous(), (1, x.shape[1]) if transposed else (x.shape[2], 1), 0, shared)


def randn(*sizes, seed=0):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=F64)


@each_width
@pytest.mark.parametrize("shared", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("transposed", range(8))
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_torch(shape, transposed, shared, width):
    i, j, k = shape
    a, b = randn(1 if shared[0] else 11, i, k), randn(1 if shared[1] else 11, k, j, seed=1)
    out = matrix_operand(torch.full((11, i, j), 7.0, dtype=F64), transposed & 1)
    left, right = matrix_operand(a, transposed & 2, shared[0]), matrix_operand(b, transposed & 4, shared[1])
    (actual,) = evaluate(
        "MATMUL",
        shape,
        [out._replace(strides=(*out.strides, 0))],
        [
            left._replace(strides=(left.strides[0], 0, left.strides[1])),
            right._replace(strides=(0, *right.strides[::-1])),
        ],
        width,
    )
    torch.testing.assert_close(actual, out.written((a @ b).expand(11, i, j)), rtol=1e-13, atol=1e-13)


# Sizes, and strides of the result and of both operands: batches, operands that vary with all, fewer dimensions.
PRODUCTS = {
    "batch": ((3, 2, 4, 5, 9), [(40, 20, 5, 1, 0), (72, 36, 9, 0, 1), (90, 45, 0, 1, 5)]),
    "batch, shared": ((3, 2, 4, 5, 9), [(40, 20, 5, 1, 0), (36, 0, 9, 0, 1), (0, 45, 0, 1, 5)]),
    "strided": ((4, 5, 9), [(10, 2, 0), (18, 0, 2), (0, 18, 2)]),
    "strided by columns": ((4, 16, 9), [(16, 1, 0), (2, 0, 8), (0, 1, 20)]),
    "varying": ((4, 5, 9), [(5, 1, 0), (9, 1, 1), (1, 9, 1)]),
    "vector": ((9,), [(0,), (1,), (2,)]),
    "rows": ((4, 9), [(1, 0), (9, 1), (9, 1)]),
}


@each_width
@pytest.mark.parametrize("shared", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("layout", PRODUCTS)
def test_products_of_any_layout_are_sums(layout, shared, width):
    sizes, (to, *strides) = PRODUCTS[layout]
    out = strided(to, sizes, 9, 0)
    a, b = (strided(s, sizes, 9, 1 + i, shared[i]) for i, s in enumerate(strides))
    (actual,) = evaluate("MATMUL", sizes, [out], [a, b], width)
    expected = (a.read(sizes) * b.read(sizes)).sum(-1)
    expected = Operand(out.storage, out.strides[:-1], out.offset).written(expected)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("transposed", range(8))
@pytest.mark.parametrize("shape", [(300, 1, 301), (1, 300, 301), (70, 50, 60), (3, 2, 20000)])
def test_a_large_product_of_one_lane_is_the_same_on_several_threads(shape, transposed):
    i, j, k = shape
    out, a = (
        matrix_operand(torch.zeros(1, i, j, dtype=F64), transposed & 1),
        matrix_operand(randn(1, i, k), transposed & 2),
    )
    b = matrix_operand(randn(1, k, j, seed=1), transposed & 4)
    outputs = [out._replace(strides=(*out.strides, 0))]
    inputs = [a._replace(strides=(a.strides[0], 0, a.strides[1])), b._replace(strides=(0, *b.strides[::-1]))]
    (expected,), *others = (evaluate("MATMUL", shape, outputs, inputs, 1, threads) for threads in (1, 2, 3))
    for (actual,) in others:
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


def factorized(a, width, transposed=0):
    """The factors, the pivots and the failures of matrices."""
    lanes, n, _ = a.shape
    outputs = [
        matrix_operand(torch.zeros_like(a), transposed & 1),
        unwritten(lanes, (n, 1), I64),
        unwritten(lanes, (1, 1)),
    ]
    lu, pivots, info = evaluate("LU", (n, n), outputs, [matrix_operand(a, transposed & 2)], width)
    return Operand(lu, outputs[0].strides), pivots, info[:, 0]


@each_width
@pytest.mark.parametrize("transposed", range(4))
@pytest.mark.parametrize("n", [0, 1, 2, 5, 8, 21, 70])
def test_factors_and_pivots_are_those_of_lapack(n, transposed, width):
    a = randn(9, n, n)
    lu, pivots, info = factorized(a, width, transposed)
    expected, expected_pivots, _ = torch.linalg.lu_factor_ex(a)
    torch.testing.assert_close(lu.read((n, n)), expected, rtol=1e-9, atol=1e-11)
    assert torch.equal(pivots + 1, expected_pivots.to(I64)) and not info.any()


@each_width
def test_the_first_zero_pivot_of_each_lane_is_reported(width):
    a = randn(9, 12, 12)
    for lane in range(9):
        a[lane, :, lane] = 0
    a[0] = torch.eye(12)
    a[8, :, 3] = 0
    lu, pivots, info = factorized(a, width)
    _, _, failures = torch.linalg.lu_factor_ex(a)
    assert info.tolist() == failures.tolist() == [0, 2, 3, 4, 5, 6, 7, 8, 4]
    assert lu.read((12, 12)).isfinite().all() and ((pivots >= 0) & (pivots < 12)).all()


@each_width
@pytest.mark.parametrize("transposed", range(4))
@pytest.mark.parametrize("m", [0, 1, 3, 8, 13])
@pytest.mark.parametrize("n", [1, 5, 21, 70])
def test_solutions_by_factors_solve(n, m, transposed, width):
    a, b = randn(9, n, n), randn(9, n, m, seed=1)
    lu, pivots, _ = factorized(a, width, transposed)
    given, out = matrix_operand(b, transposed & 1), matrix_operand(torch.zeros_like(b), transposed & 2)
    inputs = [lu, Operand(pivots, (1, 0)), given]
    (x,) = evaluate("LU_SOLVE", (n, m), [out], inputs, width)
    torch.testing.assert_close(a @ Operand(x, out.strides).read((n, m)), b, rtol=1e-8, atol=1e-8)
    (in_place,) = evaluate("LU_SOLVE", (n, m), [given], inputs, width, aliases=[(0, 2)])
    torch.testing.assert_close(Operand(in_place, given.strides).read((n, m)), Operand(x, out.strides).read((n, m)))


@each_width
@pytest.mark.parametrize("pivot", [-1.0, 3.0, 1e300, math.inf, math.nan])
def test_pivots_that_are_no_rows_exchange_nothing(pivot, width):
    b = randn(2, 3, 1)
    inputs = [
        dense(torch.eye(3, dtype=F64).expand(2, 3, 3)),
        Operand(torch.full((2, 3), pivot, dtype=F64), (1, 0)),
        dense(b),
    ]
    (x,) = evaluate("LU_SOLVE", (3, 1), [unwritten(2, (3, 1))], inputs, width)
    assert torch.equal(x, b[..., 0])


@each_width
@pytest.mark.parametrize("transposed", range(4))
@pytest.mark.parametrize("n", [0, 1, 2, 5, 21, 70])
def test_triangular_factors_are_those_of_torch(n, transposed, width):
    a = randn(9, n, n)
    a = a @ a.mT + n * torch.eye(n)
    read = torch.where(torch.ones_like(a).tril() != 0, a, math.nan)
    out, info = matrix_operand(torch.full_like(a, 7), transposed & 1), unwritten(9, (1, 1), I64)
    factor, info = evaluate("CHOLESKY", (n, n), [out, info], [matrix_operand(read, transposed & 2)], width)
    torch.testing.assert_close(
        Operand(factor, out.strides).read((n, n)), torch.linalg.cholesky(a), rtol=1e-12, atol=1e-12
    )
    assert not info.any()


@each_width
def test_the_first_minor_that_is_not_positive_is_reported(width):
    a = torch.eye(9, dtype=F64).repeat(12, 1, 1)
    for lane in range(9):
        a[lane, lane, lane] = [0.0, -1.0, math.nan][lane % 3]
    a[9, 8, 8] = a[9, 2, 2] = -1
    outputs = [unwritten(12, (9, 9)), unwritten(12, (1, 1), torch.int32)]
    _, info = evaluate("CHOLESKY", (9, 9), outputs, [dense(a)], width)
    assert info[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 3, 0, 0]


@each_width
@pytest.mark.parametrize("transposed", range(4))
@pytest.mark.parametrize("m", [0, 1, 3, 8, 13])
@pytest.mark.parametrize("n", [1, 5, 21, 70])
@pytest.mark.parametrize("name", TRIANGULAR)
def test_triangular_solutions_are_those_of_torch(name, n, m, transposed, width):
    upper, unit = TRIANGULAR[name]
    a, b = randn(9, n, n) / n + 2 * torch.eye(n), randn(9, n, m, seed=1)
    expected = torch.linalg.solve_triangular(a, b, upper=upper, unitriangular=unit)
    # What is not of the triangle is not read.
    other = torch.ones_like(a).tril(-1) if upper else torch.ones_like(a).triu(1)
    read = torch.where((other != 0) | (torch.eye(n) * unit != 0), math.nan, a)
    given, out = matrix_operand(b, transposed & 1), matrix_operand(torch.zeros_like(b), transposed & 1)
    inputs = [matrix_operand(read, transposed & 2), given]
    (x,) = evaluate(name, (n, m), [out], inputs, width)
    torch.testing.assert_close(Operand(x, out.strides).read((n, m)), expected, rtol=1e-11, atol=1e-11)
    (in_place,) = evaluate(name, (n, m), [given], inputs, width, aliases=[(0, 1)])
    assert torch.equal(x, in_place)
