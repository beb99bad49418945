"""Linear solvers refuse bad options, wrong trees, and functions that are not linear."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from checks.tensors import draw
from tables.linear_solvers import C64, C128, F32, F64, SOLVERS, accepts, general
from tables.linear_systems import NAN, ONES, TRANSFORMS, WRONG_RESULTS, name_of, rows, times
from torch import Tensor
from torch.func import vmap

from implicitdiff.linear_solve import LinearSolver, solve_inv, solve_lstsq, solve_lu

# --- bad input ------------------------------------------------------------------------------------------------------


BAD_OPTIONS = {
    "rtol": [-1.0, NAN, "a"],
    "atol": [-1.0, NAN, "a", None],
    "maxiter": [0, -1, 2.5, "3"],
    "ridge": [-1.0, NAN, float("inf"), None, "a"],
    "restart": [0, -1, 2.5, None],
    "alpha": [0.0, -1.0, NAN, float("inf"), "a"],
    "on_failure": ["Raise", None, True],
    "preconditioner": [3, torch.eye(2)],
    "dense_up_to": [-1, 2.5, None, "a"],
}


@pytest.mark.parametrize(
    ("row", "option"),
    [
        pytest.param(row, option, id=f"{row}, {option}")
        for row in SOLVERS
        for option in BAD_OPTIONS
        if accepts(row, option)
        if not (row.name == "inv" and option in ("maxiter", "alpha", "rtol", "atol"))
        if not (row.name == "auto, matrix-free" and option == "dense_up_to")
    ],
)
def test_a_bad_option_is_refused_by_the_factory(row, option):
    for value in BAD_OPTIONS[option]:
        with pytest.raises((ValueError, TypeError), match=f"{name_of(row.factory)}.*{option}"):
            row.factory(**{option: value})


@pytest.mark.parametrize(
    "options", [{"maxiter": 3}, {"alpha": 0.5}, {"rtol": 1e-3}, {"atol": 1e-3}, {"init": torch.ones(2)}], ids=str
)
def test_options_of_the_series_need_the_series(options):
    with pytest.raises(ValueError, match="ns=True"):
        solve_inv(**options)


@rows()
def test_unknown_and_positional_options_are_refused(row):
    with pytest.raises(TypeError):
        row.factory(tolerance=1e-3)
    with pytest.raises(TypeError):
        row.factory(1e-3)


@pytest.mark.parametrize(
    ("b", "words"),
    [
        pytest.param(torch.arange(3), "floating point or complex", id="integer"),
        pytest.param(torch.ones(3) > 0, "floating point or complex", id="bool"),
        pytest.param({"a": torch.ones(2), "i": torch.arange(2)}, "floating point or complex", id="one integer leaf"),
        pytest.param(1.0, "no tensor", id="number"),
        pytest.param(np.ones(3), "no tensor", id="array"),
        pytest.param({}, "no tensor", id="empty tree"),
        pytest.param(None, "no tensor", id="None"),
    ],
)
@rows()
def test_a_right_hand_side_that_is_no_tree_of_numbers_is_refused(row, b, words):
    with pytest.raises(TypeError, match=f"{name_of(row.factory)}.*right-hand side.*{words}"):
        row.factory()(lambda v: v, b)


@pytest.mark.parametrize("wrong", WRONG_RESULTS)
@rows()
def test_a_matvec_whose_result_is_not_like_its_argument_is_refused(row, wrong):
    with pytest.raises(ValueError, match=f"{name_of(row.factory)}: matvec.*float64\\[3\\]"):
        row.factory()(WRONG_RESULTS[wrong], ONES)


@pytest.mark.parametrize("wrong", WRONG_RESULTS)
@rows("preconditioner")
def test_a_preconditioner_whose_result_is_not_like_its_argument_is_refused(row, wrong):
    with pytest.raises(ValueError, match=f"{name_of(row.factory)}: preconditioner.*float64\\[3\\]"):
        row.factory(preconditioner=WRONG_RESULTS[wrong])(times(row.matrix(3)), ONES)


@pytest.mark.parametrize(
    "init", [torch.zeros(2, dtype=F64), torch.zeros(3), (ONES,), 0.0], ids=["shape", "dtype", "structure", "number"]
)
@rows("init", iterative=True)
def test_an_initial_guess_that_is_not_like_the_right_hand_side_is_refused(row, init):
    with pytest.raises(ValueError, match=f"{name_of(row.factory)}: init.*float64\\[3\\]"):
        row.factory(init=init)(times(row.matrix(3)), ONES)


@rows()
def test_a_matvec_that_is_random_or_has_side_effects_is_refused(row):
    with pytest.raises(ValueError, match=f"{name_of(row.factory)}: matvec draws random numbers"):
        row.factory()(lambda v: v * torch.rand(3, dtype=F64), ONES)
    with pytest.raises(ValueError, match=f"{name_of(row.factory)}: matvec changes a tensor"):
        row.factory()(lambda v: v.mul_(2), ONES)


@rows()
def test_a_matrix_in_the_place_of_matvec_is_refused(row):
    with pytest.raises(TypeError, match=f"{name_of(row.factory)}.*matvec"):
        row.factory()(row.matrix(3), ONES)


@rows()
def test_an_error_inside_matvec_comes_through(row):
    def matvec(v):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        row.factory()(matvec, ONES)


@rows()
def test_a_solver_shows_its_name_and_can_be_copied(row):
    solver = row.factory()
    assert name_of(row.factory) in repr(solver)
    assert isinstance(solver, LinearSolver)
    a = row.matrix(3)
    assert torch.equal(copy.deepcopy(solver)(times(a), ONES), solver(times(a), ONES))
    assert torch.equal(solver(matvec=times(a), b=ONES), solver(times(a), ONES))


# --- what is not linear ---------------------------------------------------------------------------------------------


NOT_LINEAR = {
    "square": lambda v: v * v,
    "absolute value": torch.abs,
    "one side": torch.relu,
    "direction": lambda v: v / torch.linalg.vector_norm(v),
    "cubic term": lambda v: v + v**3,
    "bounds": lambda v: v.clamp(-0.5, 0.5),
    "order": lambda v: v.sort().values,
    "rescaled square": lambda v: v * v.abs() / v.abs().max(),
}
SIDES = {
    "ones": torch.ones(3, dtype=F64),
    "one": torch.ones(1, dtype=F64),
    "minus one": -torch.ones(1, dtype=F64),
    "mixed": torch.tensor([0.3, -2.0, 1.0, 0.0], dtype=F64),
    "many": draw(3, 40),
}


def is_linear_anyway(kind: str, b: Tensor) -> bool:
    return len(b) == 1 and kind in ("order", "rescaled square")


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", NOT_LINEAR)
def test_a_matvec_that_is_not_linear_is_refused(kind, side, dtype):
    b = SIDES[side].to(dtype)
    if is_linear_anyway(kind, b):
        pytest.skip("of one number it is linear")
    with pytest.raises(ValueError, match="solve_lu: matvec is not linear: A \\(b - 3 p\\)"):
        solve_lu()(NOT_LINEAR[kind], b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["square", "absolute value", "one side", "direction"])
def test_in_half_precision_too(kind, dtype):
    for b in SIDES.values():
        with pytest.raises(ValueError, match="matvec is not linear"):
            solve_lu()(NOT_LINEAR[kind], b.to(dtype))


@pytest.mark.parametrize("kind", ["square", "absolute value", "one side", "cubic term", "bounds"])
def test_also_where_the_right_hand_side_is_zero(kind):
    with pytest.raises(ValueError, match="matvec is not linear"):
        solve_lu()(NOT_LINEAR[kind], torch.zeros(3, dtype=F64))


@rows()
def test_every_solver_refuses_what_is_not_linear(row):
    with pytest.raises(ValueError, match=f"{name_of(row.factory)}: matvec is not linear"):
        row.factory()(lambda v: v * v, torch.tensor([4.0, 9.0], dtype=F64))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_what_is_not_linear_is_refused_under_every_transform(transform):
    def solution(theta, b):
        return solve_lu()(lambda v: theta @ v + 4 * v + v * v.abs(), b)

    with pytest.raises(ValueError, match="matvec is not linear"):
        TRANSFORMS[transform](solution, draw(7, 3, 3) / 2, draw(8, 3))


def test_one_lane_that_is_not_linear_is_refused():
    bend = torch.tensor([0.0, 0.0, 1e-2], dtype=F64)
    with pytest.raises(ValueError, match="matvec is not linear"):
        vmap(lambda c: solve_lu()(lambda v: v + c * v * v, torch.ones(3, dtype=F64)))(bend)


@pytest.mark.parametrize("bent", ["large", "small"])
def test_a_leaf_that_is_not_linear_is_refused_whatever_the_size_of_the_others(bent):
    b = {"large": 1e5 * draw(5, 3), "small": 1e-5 * draw(6, 3), "nothing": draw(7, 0)}

    def matvec(v):
        return v | {bent: v[bent].abs()}

    with pytest.raises(ValueError, match="matvec is not linear"):
        solve_lu()(matvec, b)


@pytest.mark.parametrize("fn", [lambda v: v * v, lambda v: v * v.abs(), lambda v: v / v.abs()])
def test_a_complex_function_that_is_not_linear_is_refused(fn):
    with pytest.raises(ValueError, match="matvec is not linear"):
        solve_lu()(fn, torch.tensor([1.0 + 2.0j, -0.5j], dtype=C128))


def difference_quotient(v: Tensor) -> Tensor:
    step = torch.finfo(v.dtype).eps ** 0.5
    x = torch.linspace(0.5, 1.5, v.numel(), dtype=v.dtype)
    return ((x + step * v).sin() - x.sin()) / step + 3 * v


def cancelling(v: Tensor) -> Tensor:
    """The last element is rounding alone."""
    return torch.cat([v[:-1] + v[-1:], (1e4 * v[-1:] + v[:1]) - 1e4 * v[-1:] - v[:1]])


ROUNDED = {
    "a difference quotient": difference_quotient,
    "cancellation": lambda v: (v + 1e2 * v.flip(0)) - 1e2 * v.flip(0),
    "half precision inside": lambda v: (v.to(torch.float16) * 3).to(v.dtype),
    "nothing": lambda v: 0.0 * v,
    "a part of rounding alone": cancelling,
}


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("n", [2, 7, 100])
@pytest.mark.parametrize("kind", ROUNDED)
def test_rounding_in_a_matvec_is_not_taken_for_a_bend(kind, n, dtype):
    if kind == "half precision inside" and dtype == F64:
        pytest.skip("no rounding of this dtype")
    solver = solve_lstsq(on_failure="ignore")
    for seed in range(20):
        assert torch.isfinite(solver(ROUNDED[kind], draw(seed, n, dtype=dtype))).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F32, F64, C64, C128], ids=str)
@pytest.mark.parametrize("size", [1e-38, 1e-25, 1e-4, 1.0, 1e4])
def test_a_linear_matvec_of_any_size_is_let_pass(size, dtype):
    for n in (1, 3, 30):
        a = draw(n, n, n, dtype=C128 if dtype.is_complex else F64).to(dtype)
        b = (size * draw(n + 1, n, dtype=C128 if dtype.is_complex else F64)).to(dtype)
        solve_lstsq(on_failure="ignore")(times(a), b)


def test_a_leaf_of_rounding_alone_is_let_pass_beside_others():
    def matvec(v):
        return {"a": 2 * v["a"], "b": (1e3 * v["b"] + v["a"]) - v["a"] - 1e3 * v["b"]}

    for seed in range(20):
        solve_lstsq()(matvec, {"a": draw(seed, 3), "b": draw(seed + 50, 3)})


def test_autocast_is_no_bend():
    a = general(20, F64).to(F32)
    for seed in range(20):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            solve_lstsq()(lambda v: (a @ v).to(F32), draw(seed, 20, dtype=F32))
