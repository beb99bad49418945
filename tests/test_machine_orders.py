"""The machine sorts, sums up and takes computed indices as torch does, in each lane."""

from __future__ import annotations

import math

import pytest
import torch
from checks.compiled import needs_cpu
from tables.machine import F64, I64, Operand, dense, evaluate, instruction, strided, unwritten

from implicitdiff._C import cpu

pytestmark = needs_cpu
each_width = pytest.mark.parametrize("width", [1, 8])
LANES = 11
SORTS = {"SORT": False, "SORT_DESCENDING": True}
# Sizes, and the strides of a value: rows, columns, backwards, parts of larger ones.
LAYOUTS = {
    "vector": ((37,), (1,)),
    "every other": ((9,), (2,)),
    "reversed": ((9,), (-1,)),
    "one": ((1,), (1,)),
    "rows": ((3, 7), (7, 1)),
    "columns": ((3, 7), (1, 3)),
    "three": ((2, 3, 5), (1, 20, 4)),
}


def sorted_by_machine(name, x, width):
    shape = x.shape[1:]
    outputs = [unwritten(len(x), shape), unwritten(len(x), shape, I64)]
    found = evaluate(name, shape, outputs, [dense(x)], width)
    return [each.reshape(x.shape) for each in found]


@each_width
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SORTS)
def test_values_of_any_layout_are_sorted(name, layout, width):
    sizes, strides = LAYOUTS[layout]
    x, values, places = (strided(strides, sizes, LANES, seed) for seed in range(3))
    found = evaluate(name, sizes, [values, places], [x], width)
    expected = x.read(sizes).sort(-1, descending=SORTS[name])
    assert torch.equal(found[0], values.written(expected.values))
    assert torch.equal(found[1], places.written(expected.indices))


@each_width
@pytest.mark.parametrize("n", [1, 2, 5, 12, 13, 32, 33, 34, 100, 1000])
@pytest.mark.parametrize("name", SORTS)
def test_equal_values_and_nan_keep_their_order(name, n, width):
    numbers = torch.tensor([math.nan, -math.inf, -1.0, -0.0, 0.0, 1.0, math.inf], dtype=F64)
    x = numbers[torch.randint(7, (LANES, n), generator=torch.Generator().manual_seed(n))]
    expected = x.sort(dim=-1, descending=SORTS[name], stable=True)
    values, places = sorted_by_machine(name, x, width)
    assert torch.equal(places, expected.indices)
    torch.testing.assert_close(values, expected.values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(values.signbit(), expected.values.signbit())


@each_width
@pytest.mark.parametrize("name", SORTS)
def test_values_may_be_sorted_where_they_lie(name, width):
    for n in (20, 50):
        x = strided((1,), (n,), LANES, 0)
        expected = x.read((n,)).sort(-1, descending=SORTS[name])
        found = evaluate(name, (n,), [x, unwritten(LANES, (n,))], [x], width, aliases=[(0, 0)])
        assert torch.equal(found[0], x.written(expected.values))


@each_width
def test_nothing_is_sorted_and_nothing_added_up(width):
    values, places = sorted_by_machine("SORT", torch.empty(LANES, 3, 0, dtype=F64), width)
    assert values.shape == places.shape == (LANES, 3, 0)
    (sums,) = evaluate("CUMSUM", (0,), [unwritten(LANES, (0,))], [unwritten(LANES, (0,))], width)
    assert sums.shape == (LANES, 0)


@each_width
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["CUMSUM", "CUMPROD"])
def test_running_sums_and_products_are_those_of_torch(name, layout, width):
    sizes, strides = LAYOUTS[layout]
    x, out = strided(strides, sizes, LANES, 0), strided(strides, sizes, LANES, 1)
    x.storage[3, 1:4] = math.nan
    expected = out.written(getattr(x.read(sizes), name.lower())(-1))
    (found,) = evaluate(name, sizes, [out], [x], width)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0, equal_nan=True)
    (in_place,) = evaluate(name, sizes, [x], [x], width, aliases=[(0, 0)])
    torch.testing.assert_close(
        Operand(in_place, *x[1:]).read(sizes), out._replace(storage=found).read(sizes), equal_nan=True
    )


# Computed indices: rows of 6 picks from 5 elements.


def operands(sizes, strides):
    *outer, n = sizes
    x = strided(strides, sizes, LANES, 0)
    index = torch.randint(n, (LANES, *outer), generator=torch.Generator().manual_seed(1))
    return x, index, outer, n


@each_width
@pytest.mark.parametrize("strides", [(0, 1), (5, 1), (1, 6), (-5, 1), (5, -1)])
def test_elements_are_read_by_their_index(strides, width):
    x, index, outer, n = operands((6, 5), strides)
    out = unwritten(LANES, outer)
    inputs = [x, dense(index)._replace(strides=(1, 0))]
    (found,) = evaluate("GATHER", (6, n), [out._replace(strides=(1, 0))], inputs, width)
    assert torch.equal(found, x.read((6, n)).gather(-1, index[..., None])[..., 0])


OUTSIDE = [-1.0, 5.0, 1e300, -1e300, math.inf, -math.inf, math.nan, 2.0**63, -0.5]


@each_width
@pytest.mark.parametrize("index", OUTSIDE)
def test_an_index_of_no_element_gives_nan(index, width):
    x, at = strided((1,), (5,), LANES, 0), torch.ones(LANES, 1, dtype=F64)
    at[3] = index
    (found,) = evaluate("GATHER", (5,), [unwritten(LANES, (1,))], [x, Operand(at, (0,))], width)
    assert found[3].isnan() and torch.equal(found[4], x.read((5,))[4, 1:2])
    for name in ("SCATTER", "SCATTER_ADD"):
        inputs = [Operand(torch.ones(LANES, 1, dtype=F64), (0,)), Operand(at, (0,))]
        (found,) = evaluate(name, (5,), [unwritten(LANES, (5,))], inputs, width)
        assert found[3, 0].isnan() and (found[3, 1:] == 77).all()
        assert found[4].tolist() == [77, 78 if name == "SCATTER_ADD" else 1, 77, 77, 77]


@each_width
@pytest.mark.parametrize("name", ["SCATTER", "SCATTER_ADD"])
def test_elements_are_written_by_their_index(name, width):
    # In each row several values have one index where they are added.
    out, values = strided((4, 0, 1), (3, 6, 4), LANES, 0), strided((6, 1, 0), (3, 6, 4), LANES, 1)
    generator = torch.Generator().manual_seed(2)
    index = torch.randint(4, (LANES, 3, 6), generator=generator)
    if name == "SCATTER":
        index = torch.rand(LANES, 3, 4, generator=generator).argsort(-1)[..., [0, 2, 3, 1, 1, 1]]
        values.storage[:, :] = values.storage[:, :1]
    whole = Operand(out.storage, (4, 1), out.offset)
    given = values.read((3, 6, 1))[..., 0]
    change = torch.Tensor.scatter if name == "SCATTER" else torch.Tensor.scatter_add
    expected = whole.written(change(whole.read((3, 4)), -1, index, given))
    inputs = [values, dense(index)._replace(strides=(6, 1, 0))]
    (found,) = evaluate(name, (3, 6, 4), [out], inputs, width)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


# Each with its only mistake, in an arena of 20 elements.
WRONG = {
    r"\(SORT\): it has no dimension": ("SORT", (), [(0, 0, ())] * 3),
    r"\(SORT\): an output reaches out": ("SORT", (9,), [(0, 0, (1,)), (0, 12, (1,)), (0, 0, (1,))]),
    r"\(SORT\): input 0 reaches out": ("SORT", (9,), [(0, 0, (1,)), (0, 11, (1,)), (0, 0, (3,))]),
    r"\(SORT\): input 0 is a shared array": ("SORT", (9,), [(0, 0, (1,)), (0, 11, (1,)), (1, 0, (1,))]),
    r"\(CUMSUM\): it has no dimension": ("CUMSUM", (), [(0, 0, ())] * 2),
    r"\(CUMPROD\): an output reaches out": ("CUMPROD", (9,), [(0, 12, (1,)), (0, 0, (1,))]),
    r"\(GATHER\): it reads one of no elements": ("GATHER", (2, 0), [(0, 0, (1, 0))] * 3),
    r"\(GATHER\): an output reaches out": ("GATHER", (9, 3), [(0, 12, (1, 0)), (0, 0, (0, 1)), (0, 0, (1, 0))]),
    r"\(GATHER\): input 0 reaches out": ("GATHER", (9, 3), [(0, 0, (1, 0)), (0, 18, (0, 1)), (0, 0, (1, 0))]),
    r"\(GATHER\): input 1 reaches out": ("GATHER", (9, 3), [(0, 0, (1, 0)), (0, 0, (0, 1)), (0, 12, (1, 0))]),
    r"\(SCATTER\): an output reaches out": ("SCATTER", (9, 3), [(0, 18, (0, 1)), (0, 0, (1, 0)), (0, 0, (1, 0))]),
    r"\(SCATTER_ADD\): input 0 reaches out": ("SCATTER_ADD", (9, 3), [(0, 0, (0, 1)), (0, 12, (1, 0)), (0, 0, (1, 0))]),
    r"\(SCATTER\): input 1 reaches out": ("SCATTER", (9, 3), [(0, 0, (0, 1)), (0, 0, (1, 0)), (0, 12, (1, 0))]),
}  # fmt: skip


@pytest.mark.parametrize("sentence", WRONG)
def test_bad_instructions_are_refused(sentence):
    name, sizes, references = WRONG[sentence]
    with pytest.raises(ValueError, match=sentence):
        cpu.Machine(8, [instruction(name, sizes, *references)], [0, 0, 0, 0, 1], 20, [], [], [100], 0, 1)
