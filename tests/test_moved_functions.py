"""Functions that have become others between the call and the derivative: that of the call is differentiated, or an
error says so."""

from __future__ import annotations

import functools
import re
import types

import pytest
import torch
from tables.changes import CHANGES, settings
from tables.moved import DOORS, ROUTES, UNUSUAL, WAYS, Door, T, by_search, root
from tables.noises import NOISES

from implicitdiff import solvers

F64 = torch.float64

# What an error has to say: that the function is another one, or what made it another one.
REASON = re.compile("has changed|in[- ]?place|random|other values|the library cannot find|side effects")


def agree(found, expected, tolerance=1e-8):
    assert found.shape == expected.shape
    assert ((found - expected).abs() <= tolerance * expected.abs() + 1e-12).all(), (found, expected)


def right_or_refused(found, expected, tolerance=1e-8):
    """Whether `found` is as expected, or raises an error that says why not."""
    try:
        value = found()
    except (ValueError, RuntimeError) as error:
        assert REASON.search(str(error)), f"{type(error).__name__}: {error}"
    else:
        agree(value, expected, tolerance)


# --- one number, by every route and door ------------------------------------------------------------------------------


def loop(door, route):
    """Solutions for s = 1 and 4 that are differentiated when the function has 9."""
    fn, put = route.make()

    def f(t):
        total = torch.zeros_like(t)
        for s in 1.0, 4.0:
            put(s)
            total = total + door.solve(fn, t, s)
        put(9.0)
        return total

    return f


def closed_loop(door):
    return lambda t: door.closed(t, 1.0) + door.closed(t, 4.0)


MAIN, OTHERS = DOORS[:2], DOORS[2:]
CELLS = [(route, door, way) for route in [*ROUTES, *UNUSUAL] for door in MAIN for way in WAYS]
# Each route by four other doors; each door by the first eight routes.
for i, route in enumerate([*ROUTES, *UNUSUAL]):
    doors = OTHERS if i in (0, 1, 3, 7, 8) else OTHERS[i % 8 :: 8]
    CELLS += [(route, door, list(WAYS)[(i + j) % len(WAYS)]) for j, door in enumerate(doors)]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("route", "door", "way"), [c for c in CELLS if c[0].exact], ids=str)
def test_the_number_is_that_of_the_call(route, door, way):
    agree(WAYS[way](loop(door, route)), WAYS[way](closed_loop(door)), door.tolerance)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("route", "door", "way"), [c for c in CELLS if not c[0].exact], ids=str)
def test_a_number_from_an_unusual_place_is_that_of_the_call_or_refused(route, door, way):
    right_or_refused(lambda: WAYS[way](loop(door, route)), WAYS[way](closed_loop(door)), door.tolerance)


# --- what happens to what the function uses ---------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def settings_are_put_back():
    with settings():
        yield


def solved_then_changed(door, change):
    fn, happen = change.make()

    def f(t):
        x = door.solve(fn, t, change.s)
        happen()
        return x

    return f


def occasions(exact):
    for i, change in enumerate(change for change in CHANGES if change.exact == exact):
        doors = [*MAIN, *OTHERS[i % 6 :: 6]]
        for j, door in enumerate(doors):
            ways = list(WAYS) if j < len(MAIN) else [list(WAYS)[(i + j) % len(WAYS)]]
            for way in ways:
                if not (change.outside and way not in ("backward", "twice")):
                    yield change, door, way


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("change", "door", "way"), list(occasions(exact=True)), ids=str)
def test_what_is_rebound_replaced_or_set_is_that_of_the_call(change, door, way):
    found = WAYS[way](solved_then_changed(door, change))
    agree(found, WAYS[way](lambda t: door.closed(t, change.s)), door.tolerance)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("change", "door", "way"), list(occasions(exact=False)), ids=str)
def test_what_is_overwritten_is_that_of_the_call_or_refused(change, door, way):
    expected = WAYS[way](lambda t: door.closed(t, change.s))
    right_or_refused(lambda: WAYS[way](solved_then_changed(door, change)), expected, door.tolerance)


# --- another value each time -----------------------------------------------------------------------------------------

# Searches end in many ways where the function is another one at each step; here they take what they have.
SPENT = Door("newton, a few steps", by_search(functools.partial(solvers.newton, maxiter=5)), root)
NO_SEARCH = (
    "custom_root",
    "custom_fixed_point",
    "root_vjp",
    "root_jvp",
    "module, optimality",
    "make_kkt_optimality_fn",
)
NOISY = [*(door for door in DOORS if door.name in (*NO_SEARCH, "unroll", "solve_lu", "solve_gmres")), SPENT]
DRAWS = [(name, door, way) for name in NOISES for door in NOISY[:1] for way in WAYS]
DRAWS += [
    (name, door, list(WAYS)[(i + j) % len(WAYS)]) for i, name in enumerate(NOISES) for j, door in enumerate(NOISY[1:])
]
# These call the function an even number of times in one evaluation, which makes one that alternates the same each time.
EVEN = ("unroll", "make_kkt_optimality_fn")
DRAWS = [row for row in DRAWS if not (row[0] == "a_selection_that_alternates" and row[1].name in EVEN)]


@pytest.mark.parametrize(("name", "door", "way"), DRAWS, ids=str)
def test_another_value_each_time_is_refused(name, door, way):
    fn = NOISES[name]()
    with pytest.raises((ValueError, RuntimeError)) as caught:
        WAYS[way](lambda t: door.solve(fn, t, 1.0))
    # A tensor that is kept from one evaluation to the next may be a dead wrapper of functorch's there.
    if door.name == "custom_root" and name != "a_counter_in_a_tensor":
        assert REASON.search(str(caught.value)), caught.value


# --- autocast, tensors that need a gradient, functions made in a loop ------------------------------------------------

THIRD = torch.full((1, 1), 3.0).rsqrt()  # single precision, the square of which bfloat16 rounds


def third(x, t):
    return (THIRD @ THIRD)[0, 0].double() * x**2 - t


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("door", [*MAIN, *OTHERS[1::4]], ids=str)
@pytest.mark.parametrize("at_the_call", [True, False])
def test_autocast_is_that_of_the_call(at_the_call, door, way):
    # A search runs outside of it.
    is_search = door.name.partition(",")[0] in solvers.__all__
    with torch.autocast("cpu", torch.bfloat16, enabled=at_the_call and not is_search):
        s = float(third(torch.ones(()), 0.0))

    def f(t):
        with torch.autocast("cpu", torch.bfloat16, enabled=at_the_call):
            return door.solve(third, t, s)

    with torch.autocast("cpu", torch.bfloat16, enabled=not at_the_call):
        found = WAYS[way](f)
    agree(found, WAYS[way](lambda t: door.closed(t, s)), door.tolerance)


@pytest.mark.parametrize("door", DOORS, ids=str)
@pytest.mark.parametrize("place", ["variable", "item", "attribute"])
def test_the_gradient_is_that_of_the_tensor_of_the_call(place, door):
    first, second = (torch.tensor(s, dtype=F64, requires_grad=True) for s in (1.0, 4.0))
    owner, items, variable = types.SimpleNamespace(s=first), [first], first
    fn = {
        "variable": lambda x, t: variable * x**2 - t,
        "item": lambda x, t: items[0] * x**2 - t,
        "attribute": lambda x, t: owner.s * x**2 - t,
    }[place]
    solution = door.solve(fn, T, 1.0)
    owner.s = items[0] = variable = second
    if not solution.requires_grad:  # a preconditioner moves no solution
        return
    solution.backward()
    s = torch.tensor(1.0, dtype=F64, requires_grad=True)
    expected = torch.autograd.grad(door.closed(T, s), s)[0]
    if door.name in ("root_vjp", "root_jvp"):  # these are given the solution, which then does not depend on s
        expected = -1 / (2 * s.detach() ** 2 * root(T, 1.0))
    agree(first.grad, expected, door.tolerance)
    assert second.grad is None


def wrapped(fn):
    @functools.wraps(fn)
    def wrapper(*args):
        return fn(*args)

    return wrapper


FORMS = {
    "a function": lambda fn: fn,
    "an argument of a partial": lambda fn: functools.partial(lambda fn, *args: fn(*args), fn),
    "a default argument": lambda fn: lambda *args, fn=fn: fn(*args),
    "an item of a list": lambda fn: (lambda functions: lambda *args: functions[0](*args))([fn]),
    "enable_grad": lambda fn: torch.enable_grad()(fn),
    "wraps": wrapped,
}


# ruff: noqa: B023
@pytest.mark.one_in(3)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("door", [*MAIN, *OTHERS[::4]], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_functions_made_in_a_loop_are_those_of_their_turns(form, door, way):
    def f(t):
        total = torch.zeros_like(t)
        for s in 1.0, 2.0, 4.0:

            def fn(x, t):
                return s * x**2 - t

            total = total + s * door.solve(FORMS[form](fn), t, s)
        return total

    agree(WAYS[way](f), WAYS[way](lambda t: sum(s * door.closed(t, s) for s in (1.0, 2.0, 4.0))), door.tolerance)
