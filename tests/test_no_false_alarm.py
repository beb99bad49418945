"""Where nothing changes between the call and the derivative, nothing raises, and the derivative is right."""

from __future__ import annotations

import copy
import functools
import gc
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tables.solvers as searches
import torch
from checks.derivatives import ways_at
from tables.nestings import INNER, OUTER, PAIRS
from tables.steady import CONDITIONS
from torch import nn
from torch.func import grad, jacfwd, vmap

from implicitdiff import custom_fixed_point, custom_root, solvers, unroll

F64 = torch.float64
T = torch.tensor(0.6, dtype=F64)


# --- ways to take a derivative of a function of one number -----------------------------------------------------------


WAYS = ways_at(T)


def agree(found, expected, tolerance=1e-6):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


# --- calls of the library inside of each other ------------------------------------------------------------------------

# Without a tensor that needs a gradient, a module's solution is a parameter, and looks like one that was captured.
REFUSED = {"backward", "twice"}
NESTED = [(outer, inner, list(WAYS)[i % len(WAYS)]) for i, (outer, inner) in enumerate(PAIRS) if inner is not INNER[0]]
NESTED += [(outer, INNER[0], way) for outer in OUTER for way in WAYS]
NESTED = [cell for cell in NESTED if not (cell[1].name == "module" and cell[2] in REFUSED)]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("outer", "inner", "way"), NESTED, ids=str)
def test_one_call_of_the_library_may_be_in_the_function_of_another(outer, inner, way):
    agree(WAYS[way](outer.solve(inner)), WAYS[way](outer.reference(inner.plain)))


# --- functions of all kinds -------------------------------------------------------------------------------------------

THETA = torch.tensor([0.3, -0.4, 0.5], dtype=F64)
WEIGHTS = torch.tensor([1.0, -0.5, 0.7], dtype=F64)


def image(c, x, theta):
    """A contraction."""
    return (theta + 0.3 * c(x, theta)) / 2


def iterated(c, theta, steps=30):
    x = 0.5 * theta
    for _ in range(steps):
        x = image(c, x, theta)
    return x


def quietly(c, theta):
    with torch.no_grad():
        return iterated(c, theta)


DOORS = {
    "custom_root": lambda c, theta: custom_root(lambda x, theta: x - image(c, x, theta))(
        lambda init, theta: quietly(c, theta)
    )(None, theta),
    "custom_root, captured": lambda c, theta: custom_root(lambda x: x - image(c, x, theta))(
        lambda init: quietly(c, theta)
    )(None),
    "custom_fixed_point": lambda c, theta: custom_fixed_point(functools.partial(image, c))(
        lambda init, theta: quietly(c, theta)
    )(None, theta),
    "newton": lambda c, theta: solvers.newton(lambda x: x - image(c, x, theta)).run(0.5 * theta.detach())[0],
    "anderson": lambda c, theta: solvers.anderson(functools.partial(image, c)).run(0.5 * theta.detach(), theta)[0],
    "unroll": lambda c, theta: unroll(functools.partial(image, c), 30, 5)(0.5 * theta, theta),
}
CALLS = [(row, "custom_root", way) for row in CONDITIONS for way in WAYS]
CALLS += [
    (row, door, list(WAYS)[(i + j) % len(WAYS)])
    for i, row in enumerate(CONDITIONS)
    for j, door in enumerate(list(DOORS)[1:])
    if (i + j) % 5 < 3
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("row", "door", "way"), [c for c in CALLS if c[2] not in c[0].without], ids=str)
def test_a_function_that_gives_the_same_each_time_is_taken(row, door, way):
    c, again = row.make(), row.make()
    found = WAYS[way](lambda t: WEIGHTS @ DOORS[door](c, t * THETA))
    agree(found, WAYS[way](lambda t: WEIGHTS @ iterated(again, t * THETA)), 1e-8)


# --- precision, numbers taken out of tensors, compiled functions ------------------------------------------------------


def tanh_map(x, theta):
    return torch.tanh(W @ x * 0.5 + theta)


def slope_of_tanh_map(theta):
    """The gradient of the sum of the fixed point, by its closed form in double precision."""
    x, w = theta.double(), W.double() * 0.5
    for _ in range(60):
        x = torch.tanh(w @ x + theta.double())
    d = torch.diag(1 - x**2)
    return torch.linalg.solve((torch.eye(3, dtype=F64) - d @ w).T, torch.ones(3, dtype=F64)) @ d


W = torch.tensor([[0.5, 0.25, 0.0], [0.0, 0.5, -0.25], [0.25, 0.0, 0.5]], dtype=F64)  # bfloat16 has these entries
SINGLE = {
    "custom_root": lambda f, theta: custom_root(lambda x, theta: x - f(x, theta))(looped(f))(theta, theta),
    "custom_fixed_point": lambda f, theta: custom_fixed_point(lambda x: f(x, theta))(lambda x: looped(f)(x, theta))(
        theta
    ),
    "newton": lambda f, theta: solvers.newton(lambda x: x - f(x, theta)).run(theta.detach())[0],
    "anderson": lambda f, theta: solvers.anderson(f, rtol=1e-5, atol=1e-5).run(theta.detach(), theta)[0],
    "unroll": lambda f, theta: unroll(f, 30, 5)(theta.detach(), theta),
}


def looped(f):
    def solve(x, theta):
        for _ in range(30):
            x = f(x, theta)
        return x

    return solve


def in_single_precision(x, theta):
    return torch.tanh(W.float() @ x * 0.5 + theta)


def in_half_precision(x, theta):
    """Under autocast the product is in bfloat16."""
    return torch.tanh((W.float() @ x).float() * 0.5 + theta)


@pytest.mark.parametrize("way", ["backward", "grad", "vmap of grad", "jacfwd"])
@pytest.mark.parametrize("door", SINGLE)
def test_single_precision_raises_nothing(door, way):
    expected = slope_of_tanh_map(T * THETA) @ THETA
    found = single_of(way, lambda t: SINGLE[door](in_single_precision, t * THETA.float()).sum())
    torch.testing.assert_close(found.reshape(-1)[0].double(), expected, rtol=2e-5, atol=0)


def single_of(way, f):
    t = T.float()
    if way == "backward":
        t = t.clone().requires_grad_()
        f(t).backward()
        return t.grad
    return {"grad": grad(f), "vmap of grad": lambda t: vmap(grad(f))(t[None]), "jacfwd": jacfwd(f)}[way](t)


@pytest.mark.parametrize("held", ["call", "call and derivative"])
@pytest.mark.parametrize("door", ["custom_root", "custom_fixed_point", "unroll"])
def test_autocast_raises_nothing(door, held):
    theta = (T * THETA).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = SINGLE[door](in_half_precision, theta).sum()
        if held == "call and derivative":
            loss.backward()
    if held == "call":
        loss.backward()
    torch.testing.assert_close(theta.grad.double(), slope_of_tanh_map(T * THETA), rtol=2e-2, atol=0)


@pytest.mark.parametrize("transform", ["grad", "vmap of grad", "jacfwd"])
def test_autocast_of_a_transform_raises_nothing(transform):
    with torch.autocast("cpu", torch.bfloat16):
        found = single_of(transform, lambda t: SINGLE["custom_root"](in_half_precision, t * THETA.float()).sum())
    torch.testing.assert_close(found.reshape(-1)[0].double(), slope_of_tanh_map(T * THETA) @ THETA, rtol=2e-2, atol=0)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


DATA = torch.linspace(-1, 1, 400_001, dtype=torch.float32).sin() + 0.25


def norms(x):
    """Numbers that reductions by several threads may round otherwise each time; 1.3 and 1.7 or so."""
    data = DATA * x.detach().sum().float()
    return 1 + float(data.square().mean()), 1 + float((DATA @ DATA).sqrt() / 1000)


@pytest.mark.parametrize("fewer", [False, True])
@pytest.mark.parametrize("door", ["custom_root", "newton", "unroll"])
@pytest.mark.parametrize("way", ["backward", "twice", "grad", "jacfwd"])
def test_numbers_that_are_taken_out_of_tensors_raise_nothing(way, door, fewer, two_threads):
    """The scale of a residual does not move its root; nor does what multiplies the distance to the guess."""

    def residual(x, t):
        one, two = norms(x)
        return one * (x**3 + two * x / two - t)

    def f(t):
        if door == "custom_root":
            x = custom_root(residual)(lambda init, t: searches.cubic(t))(None, t)
        elif door == "newton":
            x = solvers.newton(residual).run(0.5 * t.detach(), t)[0]
        else:
            x = unroll(lambda x, t: x / norms(t)[1] * norms(t)[1] + t, 2, 1)(t, t) / 3
            x = searches.cubic(x)
        if fewer:
            torch.set_num_threads(1)
        return x

    agree(WAYS[way](f), WAYS[way](searches.cubic))


# torch.compile's "eager" fails on the library inside of torch.func.grad.
COMPILED = [("aot_eager", way) for way in ("backward", "grad", "vmap of grad")] + [("eager", "backward")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("backend", "way"), COMPILED)
@pytest.mark.parametrize("door", ["custom_root", "custom_fixed_point", "newton", "unroll"])
def test_a_compiled_function_raises_nothing(door, backend, way):
    def c(x, theta):
        return torch.sin(x) * theta

    torch._dynamo.reset()
    compiled = torch.compile(c, backend=backend)
    found = WAYS[way](lambda t: WEIGHTS @ DOORS[door](compiled, t * THETA))
    agree(found, WAYS[way](lambda t: WEIGHTS @ iterated(c, t * THETA)), 1e-8)


# --- what happens meanwhile and is no business of the function --------------------------------------------------------


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
        self.rates, self.names, self.history, self.last = [0.5, 0.25], {"scale": 1.0}, [], None
        self.double()

    def forward(self, x, theta):
        return torch.tanh(self.rates[0] * self.inner(x) + self.names["scale"] * theta)

    def solve(self, door, theta):
        x = DOORS[door](self, theta)
        self.last = x
        self.history.append(x.sum())
        return x


def step_of_another(model):
    optimizer = torch.optim.SGD(model.other.parameters(), lr=0.1)
    model.other(torch.ones(3, dtype=F64)).sum().backward()
    optimizer.step()


def draw(model):
    torch.manual_seed(5)
    random.random(), np.random.default_rng().random()


def write_around(model):
    model.rates.append(7.0)
    model.rates[1] = 8.0
    model.names["unused"] = model
    model.comment = "of no consequence"


MEANWHILE = {
    "nothing": lambda model: None,
    "a step of other parameters": step_of_another,
    "random numbers": draw,
    "gradients dropped": lambda model: model.zero_grad(),
    "no gradients needed any more": lambda model: model.requires_grad_(False),
    "a copy": lambda model: copy.deepcopy(model.inner),
    "a mode that changes nothing": lambda model: model.eval(),
    "garbage": lambda model: gc.collect(),
    "another solve": lambda model: model.solve("custom_root", 3 * THETA),
    "solve of another kind": lambda model: vmap(lambda t: model.solve("anderson", t))(THETA[None]),
    "other entries": write_around,
}


OUTSIDE = {"a step of other parameters", "no gradients needed any more"}  # torch refuses these inside of transforms
OCCASIONS = [(name, way) for name in MEANWHILE for way in (list(WAYS)[:2] if name in OUTSIDE else WAYS)]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("door", ["custom_root", "newton", "unroll"])
@pytest.mark.parametrize(("name", "way"), OCCASIONS)
def test_what_happens_meanwhile_and_changes_nothing_raises_nothing(name, door, way):
    model, plain = Model(), Model()

    def f(t):
        x = model.solve(door, t * THETA)
        MEANWHILE[name](model)
        return WEIGHTS @ x

    agree(WAYS[way](f), WAYS[way](lambda t: WEIGHTS @ iterated(plain, t * THETA)), 1e-8)


def by_two_passes(loss, leaf):
    loss.backward(retain_graph=True)
    first, leaf.grad = leaf.grad, None
    loss.backward()
    assert torch.equal(first, leaf.grad)


def by_thread(loss, leaf):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(loss.backward).result()


def without_gradients(loss, leaf):
    with torch.no_grad():
        loss.backward()


def for_a_graph_first(loss, leaf):
    torch.autograd.grad(loss, leaf, create_graph=True)
    loss.backward()


PASSES = {f.__name__: f for f in (by_two_passes, by_thread, without_gradients, for_a_graph_first)}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", PASSES)
def test_backward_in_another_way_raises_nothing(name, door):
    t, model = T.clone().requires_grad_(), Model()
    PASSES[name](WEIGHTS @ DOORS[door](model, t * THETA), t)
    agree(t.grad, grad(lambda t: WEIGHTS @ iterated(model, t * THETA))(T), 1e-8)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("way", WAYS)
def test_many_solutions_of_one_function_may_be_differentiated_together(way, door):
    model, plain = Model(), Model()
    found = WAYS[way](lambda t: sum(WEIGHTS @ model.solve(door, s * t * THETA) for s in (0.5, 1.0, 1.5)))
    agree(found, WAYS[way](lambda t: sum(WEIGHTS @ iterated(plain, s * t * THETA) for s in (0.5, 1.0, 1.5))), 1e-8)


# --- functions that look at what they are given -----------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["theta", "captured", "both"])
def test_a_condition_may_ask_which_tensors_need_gradients(wanted):
    w = torch.tensor(2.0, dtype=F64, requires_grad=wanted != "theta")

    def condition(x, t):
        if wanted != "captured" and x.requires_grad:
            x = x * 1.0
        if t.requires_grad:
            t = t + 0.0
        return w * x**2 - t

    t = T.clone().requires_grad_(wanted != "captured")
    root = custom_root(condition)(lambda init, t: (t / 2).sqrt())(None, t)
    for tensor, expected in ((t, 0.25 / root.detach()), (w, -root.detach() / 4)):
        if tensor.requires_grad:
            agree(torch.autograd.grad(root, tensor, retain_graph=True)[0], expected, 1e-12)
