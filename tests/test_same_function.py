"""What is differentiated is what was solved: the rules of the call, one by one."""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import grad, jacfwd, vmap
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from implicitdiff import custom_fixed_point, custom_root, solvers
from implicitdiff._closures.snapshot import Snapshot
from implicitdiff.linear_solve import solve_lu
from implicitdiff.solvers._loop.lifted import LiftedProblem

F64 = torch.float64
FOUR = torch.tensor(4.0, dtype=F64)


def root_of(condition):
    """The square root of t by a condition that is equivalent to ``x^2 - t``."""
    return lambda t: custom_root(condition)(lambda init, t: t.sqrt())(None, t)


def backward(f):
    t = FOUR.clone().requires_grad_()
    (found,) = torch.autograd.grad(f(t), t)
    return found


PASSES = {"backward": backward, "grad": lambda f: grad(f)(FOUR), "jacfwd": lambda f: jacfwd(f)(FOUR)}


# --- argnums ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argnums", [2, 9, (1, 2)])
def test_argnums_beyond_the_solvers_arguments_are_refused_when_decorating(argnums):
    with pytest.raises(ValueError, match="argnums names argument"):
        custom_root(lambda x, t: x**2 - t, argnums=argnums)(lambda init, t: t.sqrt())


def test_argnums_beyond_the_arguments_of_a_call_are_refused():
    solver = custom_root(lambda x, *args: x**2 - args[0], argnums=2)(lambda init, *args: args[0].sqrt())
    solver(None, FOUR, FOUR)
    with pytest.raises(ValueError, match="argnums names argument 2"):
        solver(None, FOUR)


@pytest.mark.parametrize("argnums", [True, False, (True,), "1", 1.0])
def test_argnums_that_are_no_integers_are_refused(argnums):
    with pytest.raises((ValueError, TypeError)):
        custom_root(lambda x, t: x**2 - t, argnums=argnums)(lambda init, t: t.sqrt())


# --- unknowns that are no tensors -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Unregistered:
    value: torch.Tensor


OTHERS = [0.0, 3, True, 1j, np.ones(2), np.float32(1.0), Unregistered(FOUR), torch.float64]
FACTORIES = {
    "newton": lambda: solvers.newton(lambda x: {"a": x["a"] ** 2 - 4, "b": x["b"]}),
    "anderson": lambda: solvers.anderson(lambda x: {"a": x["a"] / 2, "b": x["b"]}),
    "lbfgs": lambda: solvers.lbfgs(lambda x: x["a"] ** 2),
    "levenberg_marquardt": lambda: solvers.levenberg_marquardt(lambda x: x["a"]),
    "scipy_minimize": lambda: solvers.scipy_minimize(lambda x: x["a"] ** 2),
}


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: type(other).__name__)
@pytest.mark.parametrize("factory", FACTORIES)
def test_a_guess_that_holds_more_than_tensors_is_refused(factory, other):
    with pytest.raises(TypeError, match="where a tensor was expected"):
        FACTORIES[factory]().run({"a": torch.ones((), dtype=F64), "b": other})
    with pytest.raises(TypeError, match="where a tensor was expected"):
        FACTORIES[factory]().init({"a": torch.ones((), dtype=F64), "b": other})


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: type(other).__name__)
def test_a_solution_that_holds_more_than_tensors_is_refused(other):
    solver = custom_root(lambda x, t: {"a": x["a"] ** 2 - t, "b": x["b"]}, check=1e-6)
    with pytest.raises(TypeError, match="where a tensor was expected"):
        solver(lambda init, t: {"a": t.sqrt(), "b": other})(None, FOUR)


def test_a_right_hand_side_that_holds_more_than_tensors_is_refused():
    with pytest.raises(TypeError, match="where a tensor was expected"):
        solve_lu()(lambda v: v, {"a": FOUR, "b": 1.0})


@pytest.mark.parametrize("factory", ["newton", "anderson"])
def test_none_and_strings_stay_beside_the_unknowns(factory):
    for other in None, "a name":
        x, _ = FACTORIES[factory]().run({"a": torch.ones((), dtype=F64), "b": other})
        assert x["b"] == other


# --- caches -----------------------------------------------------------------------------------------------------------


def orthogonal_layer():
    torch.manual_seed(0)
    return parametrizations.orthogonal(nn.Linear(3, 3).double())


def by_decorator(step, start):
    def iterate(z):
        for _ in range(80):
            z = step(z)
        return z

    return custom_fixed_point(step)(iterate)(start)


CACHED = {
    "custom_fixed_point": by_decorator,
    "anderson": lambda step, start: solvers.anderson(step).run(start)[0],
    "newton": lambda step, start: solvers.newton(lambda z: step(z) - z).run(start)[0],
    "levenberg_marquardt": lambda step, start: solvers.levenberg_marquardt(lambda z: step(z) - z).run(start)[0],
}


@pytest.mark.parametrize("door", CACHED)
def test_parameters_get_their_gradients_also_where_parametrisations_are_cached(door):
    layer, start = orthogonal_layer(), torch.zeros(3, dtype=F64)
    weight = layer.parametrizations.weight.original

    def gradient():
        z = CACHED[door](lambda z: torch.tanh(0.4 * layer(z) + torch.arange(1.0, 4.0)), start)
        return torch.autograd.grad(z.sum(), weight)[0]

    expected = gradient()
    assert expected.norm() > 1e-3
    with parametrize.cached():
        torch.testing.assert_close(gradient(), expected)
        torch.testing.assert_close(gradient(), expected)


@pytest.mark.parametrize("way", PASSES)
def test_a_cache_that_the_solver_fills_below_gradients_is_refused(way):
    def f(t):
        cache = {}

        def scale():
            if "scale" not in cache:
                cache["scale"] = 1 / t
            return cache["scale"]

        return custom_root(lambda x: scale() * x**2 - 1)(lambda init: (1 / scale()).sqrt())(None)

    with pytest.raises(ValueError, match="in a cache"):
        PASSES[way](f)


@pytest.mark.parametrize("way", PASSES)
def test_a_constant_that_the_solver_leaves_in_a_cache_is_one(way):
    def f(t):
        @functools.cache
        def two():
            return torch.full((), 2.0, dtype=F64).square() / 2

        return custom_root(lambda x, t: two() * x**2 - 2 * t)(lambda init, t: (2 * t / two()).sqrt())(None, t)

    torch.testing.assert_close(PASSES[way](f), FOUR / 16)


class Holder:
    """Something that a function may put a constant into."""


def kept_in_a_cache():
    return functools.cache(lambda: torch.full((), 2.0, dtype=F64).square() / 2)


def kept_in_an_attribute():
    holder = Holder()

    def two():
        if not hasattr(holder, "two"):
            holder.two = torch.full((), 2.0, dtype=F64).square() / 2
        return holder.two

    return two


def kept_in_a_list():
    kept = []

    def two():
        if not kept:
            kept.append(torch.full((), 2.0, dtype=F64).square() / 2)
        return kept[0]

    return two


@pytest.mark.parametrize("make", [kept_in_a_cache, kept_in_an_attribute, kept_in_a_list])
@pytest.mark.parametrize("way", PASSES)
def test_a_constant_made_at_the_first_use_is_one(way, make):
    two = make()

    def f(t):
        return custom_root(lambda x, t: two() * x**2 - 2 * t)(lambda init, t: t.sqrt())(None, t)

    torch.testing.assert_close(PASSES[way](f), FOUR / 16)


class Slot:
    last = None


def from_an_attribute():
    slot = Slot()

    def exchange(new):
        last, slot.last = slot.last, new
        return last

    return exchange


def from_a_dictionary():
    slot = {"last": None}

    def exchange(new):
        last, slot["last"] = slot["last"], new
        return last

    return exchange


def from_a_history():
    history = []

    def exchange(new):
        history.append(new)
        return history[-2] if len(history) > 1 else None

    return exchange


@pytest.mark.parametrize("make", [from_an_attribute, from_a_dictionary, from_a_history])
@pytest.mark.parametrize("way", PASSES)
def test_going_on_from_a_tensor_of_the_last_evaluation_is_refused(way, make):
    exchange = make()

    def condition(x, t):
        last = exchange((x.square() + t).detach())
        return x**3 - t * (1.0 if last is None else last)

    def f(t):
        return custom_root(condition)(lambda init, t: (2 * t) ** (1 / 3))(None, t)

    with pytest.raises((ValueError, RuntimeError), match=r"replaces a tensor|has changed"):
        PASSES[way](f)


# --- another function in the search -----------------------------------------------------------------------------------


def scheduled(solver, equation):
    """A solution of ``equation(x, t, 1)`` by a search whose callback makes the function ``equation(x, t, 2)`` before
    and after: evaluations at the call and at the solution agree, and neither is of the search."""

    def solution(t):
        scale = [2.0]

        def schedule(iter_num, params, state):
            scale[0] = 2.0 if bool(state.converged.all()) else 1.0

        return solver(lambda x, t: equation(x, t, scale[0])).run(t, t, callback=schedule)[0]

    return solution


@pytest.mark.parametrize(
    ("solver", "equation"),
    [
        (solvers.newton, lambda x, t, scale: x**2 - scale * t),
        (functools.partial(solvers.bisection, lower=0.0, upper=20.0), lambda x, t, scale: x**2 - scale * t),
        (solvers.anderson, lambda x, t, scale: 0.1 * scale * torch.cos(x) + t),
        (solvers.levenberg_marquardt, lambda x, t, scale: x**2 - scale * t),
        (solvers.newton_cg, lambda x, t, scale: (x - scale * t) ** 2 + x**4),
        (functools.partial(solvers.lbfgs_b, bounds=(0.0, None)), lambda x, t, scale: (x - scale * t) ** 2 + x**4),
    ],
    ids=["newton", "bisection", "anderson", "levenberg_marquardt", "newton_cg", "lbfgs_b"],
)
@pytest.mark.parametrize("way", [*PASSES, "vmap of grad"])
def test_a_function_that_is_another_in_the_search_is_refused(solver, equation, way):
    derivative = PASSES.get(way, lambda f: vmap(grad(f))(torch.stack([FOUR, FOUR + 1])))
    with pytest.raises(ValueError, match="the function has changed during the search"):
        derivative(scheduled(solver, equation))


def test_a_residual_that_rounding_alone_changes_is_taken(monkeypatch):
    judge = LiftedProblem._judge

    def far_off(self, accept, end, x, residual):
        judge(self, accept, end, x, [t + 1 for t in residual])

    # As at a kink, where another order of the same sums is on the other side.
    monkeypatch.setattr(LiftedProblem, "_judge", far_off)
    derivative = backward(lambda t: solvers.newton(lambda x, t: x**2 - t, compile="off").run(t, t)[0])
    torch.testing.assert_close(derivative, 0.5 * FOUR**-0.5)


# --- memory that belongs to others ------------------------------------------------------------------------------------


def test_an_initial_guess_may_be_overwritten_meanwhile():
    guess, theta = np.ones(1), torch.tensor(8.0, dtype=F64, requires_grad=True)
    x, _ = solvers.newton(lambda x, theta: x**3 - theta).run(torch.from_numpy(guess), theta)
    guess[:] = 5.0
    (slope,) = torch.autograd.grad(x.sum(), theta, create_graph=True)
    guess[:] = 7.0
    (curvature,) = torch.autograd.grad(slope, theta)
    # x = theta^(1/3)
    torch.testing.assert_close(torch.stack([slope, curvature]), torch.tensor([1 / 12, -1 / 144], dtype=F64))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.complex128])
@pytest.mark.parametrize("used", ["from_numpy", "as_tensor", "captured"])
@pytest.mark.parametrize("way", PASSES)
def test_an_array_that_is_overwritten_meanwhile_is_refused(way, used, dtype):
    array = np.ones(3, dtype)
    captured = torch.from_numpy(array)
    read = {
        "from_numpy": lambda: torch.from_numpy(array),
        "as_tensor": lambda: torch.as_tensor(array),
        "captured": lambda: captured,
    }[used]

    def f(t, overwrite):
        x = root_of(lambda x, t: read().real.mean() * x**2 - t)(t)
        array[:] = 1 + overwrite
        return x

    torch.testing.assert_close(PASSES[way](lambda t: f(t, 0)), FOUR / 16)
    array[:] = 1
    with pytest.raises(RuntimeError, match="changed in place since the call"):
        PASSES[way](lambda t: f(t, 4)) if way != "jacfwd" else backward(lambda t: f(t, 4))


# --- how often a function runs, and what is kept ----------------------------------------------------------------------


def test_an_ordinary_backward_runs_no_condition():
    calls = []

    def condition(x, t):
        calls.append(None)
        return x**2 - t

    t = FOUR.clone().requires_grad_()
    x = root_of(condition)(t)
    assert len(calls) == 2  # one to see what it captures, one for the graph of the derivative
    torch.autograd.grad(x, t, retain_graph=True)
    torch.autograd.grad(x, t, retain_graph=True)
    assert len(calls) == 2
    (first,) = torch.autograd.grad(x, t, create_graph=True)
    torch.testing.assert_close(first, FOUR / 16)
    assert len(calls) > 2


def test_a_second_backward_needs_the_graph_to_be_retained_as_always():
    t = FOUR.clone().requires_grad_()
    x = root_of(lambda x, t: x**2 - t)(t)
    x.backward()
    with pytest.raises(RuntimeError, match="second time"):
        x.backward()


def test_what_one_evaluation_saves_is_freed_by_the_derivative():
    saved = []

    class Save(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x * 1

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.kept = torch.ones(1000)
            saved.append(ctx.kept)

        @staticmethod
        def backward(ctx, g):
            return g

    t = FOUR.clone().requires_grad_()
    x = root_of(lambda x, t: Save.apply(x) * x - t)(t)
    refs = [weakref.ref(s) for s in saved]
    saved.clear()
    assert sum(ref() is not None for ref in refs) == 1
    x.backward()
    gc.collect()
    assert sum(ref() is not None for ref in refs) == 0


@pytest.mark.parametrize("solve", ["custom_root", "newton", "lbfgs"])
def test_a_solver_may_be_checkpointed(solve):
    doors = {
        "custom_root": root_of(lambda x, t: x**2 - t),
        "newton": lambda t: solvers.newton(lambda x, t: x**2 - t).run(torch.ones((), dtype=F64), t)[0],
        "lbfgs": lambda t: solvers.lbfgs(lambda x, t: x**3 / 3 - t * x).run(torch.ones((), dtype=F64), t)[0],
    }
    t = FOUR.clone().requires_grad_()
    x = checkpoint(lambda t: doors[solve](2 * t / 2), t, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(x, t)[0], FOUR / 16)


def test_variables_are_as_they_were_after_a_derivative_that_put_them_back():
    scale, box, owner = 1.0, [1.0], nn.Module()
    owner.scale = 1.0

    def f(t):
        nonlocal scale
        scale, box[:], owner.scale = 1.0, [1.0], 1.0
        x = root_of(lambda x, t: scale * box[0] * owner.scale * x**2 - t)(t)
        scale, box[:], owner.scale = 2.0, [3.0, 4.0], 5.0
        return x

    torch.testing.assert_close(grad(f)(FOUR), FOUR / 16)
    assert (scale, box, owner.scale) == (2.0, [3.0, 4.0], 5.0)


# --- what a function can reach ----------------------------------------------------------------------------------------


def test_of_what_a_function_can_reach_only_what_it_looks_up_is_noted(request):
    class Node:
        def __init__(self, following):
            self.scale, self.following = 1.0, following

        def residual(self, x):
            return self.scale * x**2 - 4.0

    class Trainer:
        """It reads one name of an object that knows the whole program."""

        def __init__(self):
            self.request, self.fn, self.count = request, abs, 0

        def __call__(self, x):
            self.count += len(self.request.node.name)
            return self.fn(x) ** 2 - 4.0

    node, data = None, [0.0] * 100_000
    for _ in range(1000):
        node = Node(node)
    for fn in node.residual, Trainer(), lambda x: data[1] * x:
        values = [location.value for location in Snapshot(fn).locations]
        assert sum(len(v) if isinstance(v, dict) else 1 for v in values) < 500


def test_a_switch_of_gradients_that_no_snapshot_sees_is_compared():
    records = contextvars.ContextVar("records")

    def condition(x, t):
        with torch.set_grad_enabled(records.get()):
            s = 2 * t
        return x**2 - s / 2

    for at_the_call in (True, False):
        records.set(at_the_call)
        t = FOUR.clone().requires_grad_()
        root = root_of(condition)(t)
        records.set(not at_the_call)
        with pytest.raises(RuntimeError, match=r"gradients are (on|off) for its operation 0, mul"):
            torch.autograd.grad(root, t, create_graph=True)
