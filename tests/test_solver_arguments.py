"""The arguments of a solver's functions: by position and by keyword, and what is said where they do not fit."""

from __future__ import annotations

import inspect
import pydoc
from typing import Any

import pytest
import torch
from tables.solvers import SEARCHES, THETA, Row
from torch import Tensor
from torch.func import grad, jacfwd, vmap

import implicitdiff.solvers as solvers
from implicitdiff import custom_root
from implicitdiff.solvers import Solver

F64 = torch.float64
every_solver = pytest.mark.parametrize("row", SEARCHES, ids=str)
FIELDS = Solver._fields


def equal(tree: Any, other: Any) -> bool:
    leaves, others = (torch.utils._pytree.tree_leaves(t) for t in (tree, other))
    return all(torch.equal(a, b) for a, b in zip(leaves, others, strict=True))


# --- by keyword -------------------------------------------------------------------------------------------------------


@every_solver
def test_arguments_by_keyword_are_those_by_position(row: Row) -> None:
    solver, x = row.solver(), row.family.start(THETA)
    state = solver.init(x, THETA)
    assert equal(solver.init(params=x, theta=THETA), state)
    assert equal(solver.update(x, state, theta=THETA), solver.update(x, state, THETA))
    assert equal(solver.update(theta=THETA, state=state, params=x), solver.update(x, state, THETA))
    assert equal(solver.run(x, theta=THETA, keep_history=True), solver.run(x, THETA, keep_history=True))
    assert equal(solver.optimality_fn(x, theta=THETA), solver.optimality_fn(x, THETA))


@every_solver
def test_arguments_by_keyword_are_differentiated_and_batched(row: Row) -> None:
    solver, start = row.solver(), row.family.start

    def total(theta: Tensor, by_keyword: bool) -> Tensor:
        x = solver.run(start(theta), theta=theta) if by_keyword else solver.run(start(theta), theta)
        return x[0].square().sum()

    batch = torch.stack([THETA, 0.5 * THETA])
    assert equal(grad(total)(THETA, True), grad(total)(THETA, False))
    assert equal(*(vmap(grad(lambda theta, k=k: total(theta, k)))(batch) for k in (True, False)))


def keyword_only(fn: Any) -> Any:
    return lambda x, *, theta: fn(x, theta)


@every_solver
def test_keyword_only_arguments_are_differentiated_and_batched(row: Row) -> None:
    first, start = row.family.functions[0], row.family.start
    by_position, by_keyword = row.solver(first), row.solver(keyword_only(first))
    batch = torch.stack([THETA, 0.5 * THETA])
    ours = vmap(grad(lambda theta: by_keyword.run(start(theta), theta=theta)[0].square().sum()))(batch)
    theirs = vmap(grad(lambda theta: by_position.run(start(theta), theta)[0].square().sum()))(batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_keywords_reach_the_unrolled_search_with_checkpoints() -> None:
    solver = solvers.fixed_point_iteration(lambda x, *, c, scale=1.0: scale * x / 2 + c, rtol=0.0, atol=1e-12)
    how = {"implicit_diff": False, "checkpoint_every": 3}
    slope = grad(lambda c: solver.run(torch.tensor(0.0, dtype=F64), c=c, **how)[0])(torch.tensor(1.0, dtype=F64))
    torch.testing.assert_close(slope, torch.tensor(2.0, dtype=F64))


def test_arguments_of_a_quadratic_program_by_keyword() -> None:
    Q, c, G, h = 2 * torch.eye(3, dtype=F64), -THETA, torch.eye(3, dtype=F64), torch.zeros(3, dtype=F64)
    solver = solvers.qp()
    assert equal(solver.run(None, Q, c=c, h=h, G=G), solver.run(None, Q, c, None, None, G, h))
    jacobian = jacfwd(lambda h: solver.run(None, Q=Q, c=c, G=G, h=h)[0].primal)(h)
    torch.testing.assert_close(jacobian, torch.diag((THETA > 0).to(F64)))


def test_a_keyword_may_have_the_name_of_the_unknowns_or_of_the_state() -> None:
    solver = solvers.newton(lambda x, params, state: x**3 - params - state)
    one = torch.tensor(1.0, dtype=F64)
    assert equal(solver.run(one, params=4 * one, state=4 * one), solver.run(one, 4 * one, 4 * one))


def test_arguments_by_default_stay_at_their_defaults() -> None:
    solver = solvers.newton(lambda x, a=8.0, b=0.0: x**3 - a - b)
    x, _ = solver.run(torch.tensor(1.0, dtype=F64), b=19.0)
    torch.testing.assert_close(x, torch.tensor(3.0, dtype=F64))


def test_keywords_reach_the_condition_of_a_decorated_solver() -> None:
    solver = solvers.newton(lambda x, theta: x**3 - theta)
    cube_root = custom_root(solver.optimality_fn)(lambda init, *, theta: theta.detach().pow(1 / 3))
    eight = torch.tensor(8.0, dtype=F64)
    torch.testing.assert_close(grad(lambda theta: cube_root(None, theta=theta))(eight), eight.pow(-2 / 3) / 3)


# --- what does not fit ------------------------------------------------------------------------------------------------


@every_solver
def test_errors_and_help_name_the_public_function(row: Row) -> None:
    solver, x, name = row.solver(), row.family.start(THETA), row.name.split(",")[0]
    state = solver.init(x, THETA)
    for field, fn in zip(FIELDS, solver, strict=True):
        given = (x, state) if field == "update" else (x,)
        with pytest.raises(TypeError, match=rf"^{name}\.{field}: got an unexpected keyword argument 'foo'"):
            fn(*given, THETA, foo=1)
        with pytest.raises(TypeError, match=rf"^{name}\.{field}: got an unexpected keyword argument 'thta'"):
            fn(*given, thta=THETA)
        with pytest.raises(TypeError, match=rf"^{name}\.{field}: params is missing"):
            fn()
        assert repr(fn).startswith(f"{name}(") and repr(fn).endswith(f").{field}")
        assert fn.__name__ == field and fn.__qualname__ == f"{name}.{field}"
        text = pydoc.plain(pydoc.render_doc(fn))
        assert f"{field}(params, " in text and "Args:" in text and "Returns:" in text and "SolverImpl" not in text
    assert list(inspect.signature(solver.run).parameters)[2:-1] == [
        *("implicit_diff", "checkpoint_every", "keep_history", "verbose", "callback")
    ]


STATES = {type(row.solver().init(row.family.start(THETA), THETA)): row for row in SEARCHES}


@every_solver
def test_the_state_of_another_solver_is_refused(row: Row) -> None:
    solver, x, name = row.solver(), row.family.start(THETA), row.name.split(",")[0]
    own = type(solver.init(x, THETA))
    for kind, other in STATES.items():
        if kind is not own:
            state = other.solver().init(other.family.start(THETA), THETA)
            with pytest.raises(TypeError, match=rf"^{name}\.update: state must be a {own.__name__}.*{kind.__name__}"):
                solver.update(x, state, THETA)
    with pytest.raises(TypeError, match=rf"^{name}\.update: params must be"):
        solver.update(None, solver.init(x, THETA), THETA)


@every_solver
def test_tolerances_that_are_no_finite_numbers_are_refused(row: Row) -> None:
    for option in ("rtol", "atol"):
        for value in (float("inf"), float("nan"), -1.0):
            with pytest.raises(ValueError, match=rf"{row.name.split(',')[0]}: {option} must be a finite number >= 0"):
                row.solver(**{option: value})


@every_solver
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_integers_and_booleans_are_refused_with_what_to_do(row: Row, dtype: torch.dtype) -> None:
    solver, x = row.solver(), row.family.start(THETA)
    state = solver.init(x, THETA)
    calls = [
        lambda x: solver.init(x, THETA),
        lambda x: solver.update(x, state, THETA),
        lambda x: solver.run(x, THETA),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=rf"{row.name.split(',')[0]}.* dtype {dtype}.*convert the leaf"):
            call(torch.ones(3).to(dtype))


def test_a_parameter_with_the_name_of_an_option_is_given_by_position() -> None:
    solver = solvers.newton(lambda x, verbose: x**3 - verbose)
    x, eight = torch.tensor(1.0, dtype=F64), torch.tensor(8.0, dtype=F64)
    torch.testing.assert_close(solver.run(x, eight, verbose=False)[0], torch.tensor(2.0, dtype=F64))
    with pytest.raises(TypeError, match=r"newton\.run: .*verbose= is an option of run: give this argument by position"):
        solver.run(x, verbose=eight)


def test_a_function_without_a_signature_takes_arguments_by_position() -> None:
    with pytest.raises(TypeError, match=r"newton\.run: .*sub has no signature, so other"):
        solvers.newton(torch.sub).run(THETA, other=THETA)
    torch.testing.assert_close(solvers.newton(torch.sub).run(torch.zeros_like(THETA), THETA)[0], THETA)
    with pytest.raises(TypeError, match="invalid combination of arguments"):  # torch's own words
        solvers.newton(torch.sub).run(THETA)


def test_a_missing_argument_may_be_the_guess() -> None:
    solver = solvers.newton(lambda x, theta: x**3 - theta)
    for field in (solver.run, solver.init):
        with pytest.raises(
            TypeError, match=r"'theta', in a call of .*\(x, theta\); the first argument of \w+ is the init"
        ):
            field(THETA)
    with pytest.raises(TypeError, match=r"^a fault of the function$"):
        solvers.newton(faulty).run(THETA)


def faulty(x: torch.Tensor) -> torch.Tensor:
    raise TypeError("a fault of the function")


@pytest.mark.parametrize(
    ("factory", "option"),
    [
        (solvers.anderson, "ridge"),
        (solvers.anderson, "mixing"),
        (solvers.levenberg_marquardt, "radius"),
        (solvers.gradient_descent, "stepsize"),
        (solvers.mirror_descent, "stepsize"),
    ],
)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_that_are_not_finite_are_refused(factory: Any, option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{option} must be a finite number"):
        factory(lambda x: x, **{option: value})
