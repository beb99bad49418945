"""How a solution is found does not matter: what a solver does in its body, under every transform."""

import collections
import contextvars
import functools
import itertools
import re
import threading
import weakref

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from implicitdiff import TransformError, custom_fixed_point, custom_root, solvers

F64 = torch.float64
T = torch.tensor(4.0, dtype=F64)
ONE = torch.ones((), dtype=F64)


class Root(torch.autograd.Function):
    """Has no setup_context."""

    @staticmethod
    def forward(ctx, t):
        return t.sqrt()

    @staticmethod
    def backward(ctx, g):
        raise AssertionError("a solver is not differentiated")


def reentrant(init, t):
    with torch.enable_grad():
        leaf = t.detach().requires_grad_()
        value = checkpoint(lambda x: x**1.5 / 1.5, leaf, use_reentrant=True)
        value.backward()  # of t^(3/2) / (3/2)
    return leaf.grad


def by_hooks(init, t):
    net = torch.nn.Identity()
    net.register_full_backward_hook(lambda *args: None)
    with torch.enable_grad():
        x = t.detach().reshape(1).requires_grad_()
        (net(x).pow(1.5).sum() / 1.5).backward()
    return x.grad[0]


def by_optimizer(init, t):
    x = torch.nn.Parameter(t / 2)
    optimizer = torch.optim.LBFGS([x], max_iter=100, tolerance_grad=1e-14, tolerance_change=0, history_size=5)

    def closure():
        optimizer.zero_grad()
        loss = x**3 / 3 - t * x
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return x.detach()


def by_transforms(init, t):
    x = t / 2
    for _ in range(60):
        objective = lambda x: x**3 / 3 - t * x  # noqa: E731
        slope = vmap(hessian(objective))(x[None])[0]
        x = x - grad(objective)(x) / slope
    return x


BODIES = {
    "an old autograd.Function": lambda init, t: Root.apply(t),
    "a reentrant checkpoint": reentrant,
    "a backward hook": by_hooks,
    "torch.optim": by_optimizer,
    "transforms": by_transforms,
    "a solver of the library": lambda init, t: solvers.newton(lambda x, t: x**2 - Root.apply(t) ** 2).run(t, t)[0],
    "NumPy": lambda init, t: torch.from_numpy(t.numpy() ** 0.5) if t.ndim else torch.tensor(t.item() ** 0.5, dtype=F64),
}
WAYS = {
    "grad": (lambda f: grad(f)(T), 0.25),
    "vjp": (lambda f: vjp(f, T)[1](ONE)[0], 0.25),
    "jvp": (lambda f: jvp(f, (T,), (ONE,))[1], 0.25),
    "jacrev": (lambda f: jacrev(f)(T), 0.25),
    "jacfwd": (lambda f: jacfwd(f)(T), 0.25),
    "grad of grad": (lambda f: grad(grad(f))(T), -1 / 32),
    "hessian": (lambda f: hessian(f)(T), -1 / 32),
    "jacfwd of jacfwd": (lambda f: jacfwd(jacfwd(f))(T), -1 / 32),
    "backward": (lambda f: torch.autograd.grad(f(t := T.clone().requires_grad_()), t)[0], 0.25),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("body", BODIES)
def test_a_body_does_what_it_likes(body, way):
    take, by_hand = WAYS[way]
    solver = custom_root(lambda x, t: x**2 - t)(BODIES[body])
    assert float(take(lambda t: solver(None, t))) == pytest.approx(by_hand, rel=1e-9)


def test_a_body_runs_once_in_reverse_mode():
    calls = []
    solver = custom_root(lambda x, t: x**2 - t)(lambda init, t: (calls.append(1), Root.apply(t))[1])
    grad(grad(lambda t: solver(None, t)))(T)
    assert len(calls) == 1


def test_under_vmap_the_error_names_cause_and_remedy():
    solver = custom_root(lambda x, t: x**2 - t)(BODIES["an old autograd.Function"])
    with pytest.raises(TransformError, match=r"the autograd.Function Root.*Python loop instead of vmap"):
        vmap(grad(lambda t: solver(None, t)))(T[None])
    looped = torch.stack([grad(lambda t: solver(None, t))(t) for t in torch.stack([T, 4 * T])])
    torch.testing.assert_close(looped, torch.tensor([0.25, 0.125], dtype=F64))


NUMBERS = {
    "control flow": lambda init, t: t.sqrt() if t > 0 else t,
    "item() or float()": lambda init, t: torch.tensor(t.item() ** 0.5),
    "NumPy": lambda init, t: torch.from_numpy(t.numpy() ** 0.5),
    "a shape that depends on them": lambda init, t: t[t > 0].sqrt(),
}


@pytest.mark.parametrize("what", NUMBERS)
def test_under_vmap_what_needs_numbers_is_named(what):
    solver = custom_root(lambda x, t: x**2 - t)(NUMBERS[what])
    with pytest.raises(TransformError, match=rf"needs the values of a tensor that vmap batches, for {re.escape(what)}"):
        vmap(grad(lambda t: solver(None, t).sum()))(torch.ones(2, 1, dtype=F64))


def test_a_captured_tensor_of_a_transform_is_to_be_an_argument():
    def f(t):
        s = 2 * t
        return custom_root(lambda x: x**2 - s)(lambda init: Root.apply(s))(None)

    with pytest.raises(TransformError, match="pass the tensors that the solver captures as arguments"):
        grad(f)(T)


# What is captured by a body that starts transforms of its own must not be taken for theirs.
INNER = {
    "grad": lambda s: grad(lambda x: x**2 * s)(ONE),
    "grad with an argument": lambda s: grad(lambda x, s: x**2 * s)(ONE, s),
    "jvp": lambda s: jvp(lambda x: x**2 * s, (ONE,), (ONE,))[1],
    "jacfwd": lambda s: jacfwd(lambda x: x**2 * s)(ONE),
    "hessian": lambda s: hessian(lambda x: x**2 * s)(ONE),
    "vmap": lambda s: vmap(lambda x: 2 * x**2 * s)(ONE[None])[0],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("place", ["closure", "tuple", "parameter", "generator"])
def test_captured_tensors_are_values(inner, way, place):
    seen = []
    net = torch.nn.ParameterDict({"s": T.clone()})

    def f(t):
        s = 3 * t
        held = (s,)
        forever = iter(lambda: s, None)
        get = {
            "closure": lambda: s,
            "tuple": lambda: held[0],
            "parameter": lambda: net["s"],
            "generator": lambda: next(forever),
        }[place]

        def solver(init, t):
            seen.append(INNER[inner](get()))
            return t.sqrt()

        def run(t):
            return custom_root(lambda x, t: x**2 - t)(solver)(None, t)

        return functional_call(Runs(net, run), {"net.s": s}, (t,)) if place == "parameter" else run(t)

    take, by_hand = WAYS[way]
    try:
        found = take(f)
    except TransformError as error:
        assert place == "generator"
        assert "such as a generator" in str(error)
        return
    assert float(found) == pytest.approx(by_hand, rel=1e-12)
    assert all(float(torch.as_tensor(s).detach()) == pytest.approx(24.0) for s in seen)


class Runs(torch.nn.Module):
    def __init__(self, net, run):
        super().__init__()
        self.net, self.run = net, run

    def forward(self, t):
        return self.run(t)


def test_fixed_points_run_as_roots_do():
    solver = custom_fixed_point(lambda x, t: 0.5 * (x + t / x))(BODIES["an old autograd.Function"])
    assert float(grad(lambda t: solver(None, t))(T)) == pytest.approx(0.25)


HIDDEN = contextvars.ContextVar("hidden")
LOCAL = threading.local()


def in_context(s):
    HIDDEN.set(s)
    return HIDDEN.get


def in_thread(s):
    LOCAL.s = s
    return lambda: LOCAL.s


def in_array(s):
    array = np.empty(1, dtype=object)
    array[0] = s
    return lambda: array[0]


def in_cache(s):
    cached = functools.cache(lambda: s)
    return lambda: cached()


HIDING = {
    "context": in_context,
    "thread": in_thread,
    "array": in_array,
    "cache": in_cache,
    "generator": lambda s: functools.partial(next, itertools.repeat(s)),
    "weak reference": lambda s: weakref.ref(s),
    "factory": lambda s: (lambda held: lambda: held["s"])(collections.defaultdict(lambda: s)),
    "builtin": lambda s: s.clone,
    "mapping": lambda s: (lambda held: lambda: held["s"])(collections.ChainMap({"s": s})),
}
LANES, INSIDE = torch.tensor([3.0, 4.0, 5.0], dtype=F64), torch.tensor([1.0, 10.0, 100.0], dtype=F64)


@pytest.mark.parametrize("derivative", [False, True], ids=["vmap", "vmap of grad"])
@pytest.mark.parametrize("place", HIDING)
def test_lanes_that_a_body_holds_out_of_sight_are_those_of_the_vmap(place, derivative):
    def f(t, s):
        get = HIDING[place](s)

        def solver(init):
            # A vmap of its own over as many lanes.
            return vmap(lambda x: x * get())(INSIDE).sum()

        return custom_root(lambda x: x - 111 * s)(solver)(None) + 0 * t

    lanes = vmap(grad(f) if derivative else f)(LANES, LANES)
    torch.testing.assert_close(lanes, torch.zeros(3, dtype=F64) if derivative else 111 * LANES)


def test_a_body_may_use_forward_mode_by_itself():
    def solver(init, t):
        x = t / 2
        for _ in range(60):
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(x, torch.ones_like(x))
                slope = forward_ad.unpack_dual(dual**2 - t).tangent
            x = x - (x**2 - t) / slope
        return x

    root = custom_root(lambda x, t: x**2 - t)(solver)
    assert float(grad(lambda t: root(None, t))(T)) == pytest.approx(0.25)
