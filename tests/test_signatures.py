"""Arguments of the solver reach the parameters of the same name in the condition, and mismatches fail at the call."""

from __future__ import annotations

import functools

import pytest
import torch

from implicitdiff import custom_root

A, B = torch.tensor(3.0, dtype=torch.float64), torch.tensor(5.0, dtype=torch.float64)


def quotient(init, a, b):
    return a / b


def solve_and_differentiate(condition, solver, *args, **kwargs):
    """``x`` and ``dx/da``, ``dx/db`` at A, B for a call in which they stand for themselves."""
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    swap = {id(A): a, id(B): b}
    args = [swap.get(id(value), value) for value in args]
    kwargs = {key: swap.get(id(value), value) for key, value in kwargs.items()}
    x = custom_root(condition)(solver)(*args, **kwargs)
    return [t.item() for t in (x, *torch.autograd.grad(x, (a, b)))]


EXPECTED = pytest.approx([3 / 5, 1 / 5, -3 / 25])


def by_position(x, p, q):
    return q * x - p


def in_another_order(x, b, a):
    return b * x - a


def keyword_only(x, *, b, a):
    return b * x - a


def variadic(x, *args):
    return args[1] * x - args[0]


def keywords(x, **named):
    return named["b"] * x - named["a"]


def one_of_each(x, a, *rest, **named):
    return (rest[0] if rest else named["b"]) * x - a


@pytest.mark.parametrize("condition", [by_position, in_another_order, keyword_only, variadic, keywords, one_of_each])
@pytest.mark.parametrize("call", ["positions", "one keyword", "keywords", "keywords in another order"])
def test_arguments_arrive_however_they_are_passed(condition, call):
    args, kwargs = {
        "positions": ((None, A, B), {}),
        "one keyword": ((None, A), {"b": B}),
        "keywords": ((None,), {"a": A, "b": B}),
        "keywords in another order": ((None,), {"b": B, "a": A}),
    }[call]
    assert solve_and_differentiate(condition, quotient, *args, **kwargs) == EXPECTED


def test_a_guess_may_be_passed_by_keyword():
    assert solve_and_differentiate(by_position, quotient, init=None, a=A, b=B) == EXPECTED


def test_keyword_only_and_variadic_solvers():
    def strict(init, *, a, b):
        return a / b

    def loose(init, *args, **kwargs):
        return args[0] / (args[1] if len(args) > 1 else kwargs["b"])

    assert solve_and_differentiate(in_another_order, strict, None, a=A, b=B) == EXPECTED
    assert solve_and_differentiate(by_position, loose, None, A, B) == EXPECTED
    assert solve_and_differentiate(one_of_each, loose, None, A, b=B) == EXPECTED


def test_partials_methods_and_gradients_of_objectives_have_their_own_signatures():
    class Problem:
        def condition(self, x, b, a):
            return b * x - a

        def solve(self, init, a, b):
            return a / b

    problem = Problem()
    assert solve_and_differentiate(problem.condition, problem.solve, None, A, B) == EXPECTED
    shifted = functools.partial(lambda x, b, a, shift: b * x - a + shift, shift=0.0)
    assert solve_and_differentiate(shifted, quotient, None, A, B) == EXPECTED
    objective = torch.func.grad(lambda x, b, a: b * x**2 / 2 - a * x)
    assert solve_and_differentiate(objective, quotient, None, A, B) == EXPECTED


def test_a_default_that_the_condition_needs_comes_from_the_solver_and_options_stay_there():
    def solver(init, a, b=B, maxiter=10):
        return a / b

    a = A.clone().requires_grad_()
    x = custom_root(in_another_order)(solver)(None, a)
    assert torch.autograd.grad(x, a)[0].item() == pytest.approx(1 / 5)

    def condition(x, a, b=100.0):
        return b * x - a

    assert torch.autograd.grad(custom_root(condition)(solver)(None, a), a)[0].item() == pytest.approx(1 / 5)


def missing(x, a):
    return x - a


def too_many(x, a, b, c):
    return b * x - a + c


@pytest.mark.parametrize(
    ("condition", "args", "kwargs", "message"),
    [
        (missing, (None, A, B), {}, "argument 'b' of the solver has no counterpart"),
        (missing, (None, A), {"b": B}, "argument 'b' of the solver has no counterpart"),
        (too_many, (None, A, B), {}, "no argument is given for parameter 'c'"),
        (by_position, (None, A), {}, "missing a required argument: 'b'"),
        (by_position, (None, A, B, A), {}, "too many positional arguments"),
        (by_position, (None, A, B), {"typo": A}, "unexpected keyword argument 'typo'"),
        (by_position, (), {}, "missing a required argument: 'init'"),
    ],
)
def test_a_mismatch_is_a_type_error_at_the_call_that_names_both(condition, args, kwargs, message):
    solver = custom_root(condition)(quotient)
    with pytest.raises(TypeError, match=message) as caught:
        solver(*args, **kwargs)
    assert "quotient(init, a, b)" in str(caught.value)
    assert f"{condition.__name__}(x, " in str(caught.value)


def test_an_option_passed_to_the_solver_alone_is_refused_and_not_dropped():
    def solver(init, a, scale=1.0):
        return a * scale

    with pytest.raises(TypeError, match="scale"):
        custom_root(missing)(solver)(None, A, scale=2.0)
