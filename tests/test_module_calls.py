"""Calls of solve under transforms, inside of each other, a thousand times, and with exceptions."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from checks.differences import slope as slope_of
from tables.meta_modules import (
    F64,
    SLOPE,
    Net,
    Ridge,
    X,
    Y,
    by_a_new_parameter,
    by_steps,
    close,
    expected_grad,
    grad,
    leaf,
    meta_net,
    newton,
    ridge,
    zeros,
)
from torch import nn
from torch.func import functional_call

from implicitdiff.nn import ImplicitMetaGradientModule

# What an nn.Module does


def test_a_module_may_be_made_and_solved_within_a_transform():
    def outer(penalty):
        return (Ridge(penalty).solve(X, Y).w ** 3).sum()

    def closed(penalty):
        return (ridge(penalty) ** 3).sum()

    at = torch.tensor(0.7, dtype=F64)
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        close(transform(outer)(at), transform(closed)(at), 1e-11)


def test_an_optimizer_made_in_the_constructor_is_refused_within_a_transform():
    class Inner(Ridge):
        def __init__(self, penalty):
            super().__init__(penalty)
            self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)

        def solve(self, x, y):
            by_steps(lambda params: self.optimizer, 10)(self, x, y)
            return self

    with pytest.raises(ValueError, match=r"Inner\.solve: an optimizer was made in __init__ for.*'w'.*make.*in solve"):
        torch.func.grad(lambda penalty: Inner(penalty).solve(X, Y).w.sum())(torch.tensor(0.7, dtype=F64))


def test_an_exception_in_solve_under_a_transform_is_the_users():
    module = Failing(leaf(1.0), meta_net())
    module.failures = 1
    values = copy.deepcopy(module.state_dict())

    def outer(penalty):
        return (functional_call(module, {"penalty": penalty}, ()) ** 3).sum()

    with pytest.raises(KeyError, match="on purpose"):
        torch.func.grad(outer)(torch.tensor(1.0, dtype=F64))
    assert all(torch.equal(v, values[k]) for k, v in module.state_dict().items())


def test_a_solve_out_of_place_is_batched_by_vmap():
    class Inner(Ridge):
        def solve(self, x, y):
            by_a_new_parameter(self, x, y)
            return self.w

    module = Inner(leaf())
    scales = torch.tensor([1.0, 2.0, 3.0], dtype=F64)

    def outer(scale):
        return module.solve(scale * X, Y).prod()

    close(torch.func.vmap(outer)(scales).detach(), torch.stack([ridge(0.7, s * X).prod() for s in scales]))
    wanted = torch.func.vmap(torch.func.grad(lambda s: ridge(0.7, s * X).prod()))(scales)
    close(torch.func.vmap(torch.func.grad(outer))(scales).detach(), wanted)
    close(grad(module.solve(X, Y).sum(), module.penalty), SLOPE)


# Nesting


class Lower(ImplicitMetaGradientModule):
    """v - t + v^3 = 0."""

    def __init__(self, t):
        super().__init__()
        self.t, self.v = t, zeros()

    def objective(self):
        return 0.5 * (self.v - self.t) ** 2 + 0.25 * self.v**4

    def solve(self):
        for _ in range(30):
            self.v.sub_((self.v - self.t + self.v**3) / (1 + 3 * self.v**2))
        return self.v


class Upper(ImplicitMetaGradientModule):
    def __init__(self, goal):
        super().__init__()
        self.goal, self.t = goal, zeros()

    def objective(self):
        return 0.5 * (Lower(self.t).solve() - self.goal) ** 2 + 0.5 * self.t**2

    def solve(self):
        newton(self, steps=12)
        return self.t


def test_a_problem_may_have_the_solution_of_another_in_its_objective():
    goal = leaf(1.5)
    first = grad(Upper(goal).solve(), goal, create_graph=True)

    def at(value):
        return Upper(torch.tensor(value, dtype=F64)).solve().item()

    def slope(value):
        other = leaf(value)
        return grad(Upper(other).solve(), other).item()

    close(first.detach(), slope_of(at, 1.5), 1e-10)
    close(grad(first, goal), slope_of(slope, 1.5), 1e-10)


# What is left behind


@pytest.mark.parametrize("backward", [torch.Tensor.backward, torch.autograd.backward])
@pytest.mark.parametrize("had", [False, True])
def test_backward_in_solve_leaves_no_gradient_on_meta_parameters(backward, had):
    class Inner(Net):
        def solve(self, x, y):
            for _ in range(3):
                self.zero_grad()
                with torch.enable_grad():
                    backward(self.objective(x, y))
            super().solve(x, y)
            return self

    module = Inner(leaf(1.0), meta_net())
    metas = list(module.meta_parameters())
    for p in metas:
        p.grad = torch.full_like(p, 2.0) if had else None
    before = [p.grad for p in metas]
    module.solve(X, Y)
    assert all(p.grad is grad for p, grad in zip(metas, before, strict=True))
    assert not had or all(bool((p.grad == 2.0).all()) for p in metas)


def test_gradients_of_several_calls_accumulate_in_meta_parameters():
    class Inner(Ridge):
        def solve(self, x, y):
            self.zero_grad()
            with torch.enable_grad():
                self.objective(x, y).backward()
            return super().solve(x, y)

    penalty = leaf()
    module = Inner(penalty)
    for k in (1, 2):
        module.solve(k * X, Y).w.sum().backward()
    close(penalty.grad, expected_grad(lambda p: ridge(p).sum() + ridge(p, 2 * X).sum()))


@pytest.mark.parametrize("graph", ["alive", "used", "none"])
def test_a_module_is_freed_without_the_garbage_collector(graph):
    penalty, net = leaf(1.0), meta_net()
    gc.collect()
    gc.disable()
    try:
        module = Net(penalty, net).solve(X, Y)
        module.solve(X, -Y)
        out = module.net(X).sum()
        watched = [weakref.ref(module), weakref.ref(module.net), *map(weakref.ref, module._leaves.values())]
        solution = weakref.ref(module.net[0].weight)
        if graph == "used":
            out.backward()
        if graph != "alive":
            del out
        del module
        assert watched[0]() is None and watched[1]() is None
        if graph != "alive":
            assert solution() is None and not any(ref() is not None for ref in watched)
    finally:
        gc.enable()


def test_the_derivative_outlives_the_module():
    penalty = leaf()
    module = Ridge(penalty)
    w = module.solve(X, Y).w
    watched = weakref.ref(module)
    del module
    assert watched() is None
    close(grad(w.sum(), penalty), SLOPE)


def test_the_graph_of_the_call_before_is_freed():
    module = Ridge(leaf())
    gc.disable()
    try:
        watched = weakref.ref(module.solve(X, Y).w)
        module.solve(X, Y)
        assert watched() is None
    finally:
        gc.enable()


class Quick(ImplicitMetaGradientModule):
    """(1 + penalty) w = 1."""

    def __init__(self, penalty):
        super().__init__()
        self.penalty, self.w = penalty, zeros(1)

    def optimality(self):
        return (1 + self.penalty) * self.w - 1

    def solve(self):
        self.w.copy_(1 / (1 + self.penalty))
        return self.w


def test_a_thousand_outer_steps_keep_the_memory_flat():
    penalty = leaf()
    module, outer = Quick(penalty), torch.optim.SGD([penalty], lr=1e-4)

    def step():
        outer.zero_grad()
        module.solve().sum().backward()
        outer.step()

    def alive():
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    step()
    gc.collect()
    objects = len(gc.get_objects())
    gc.disable()
    try:
        before = alive()
        for _ in range(1000):
            step()
        assert alive() <= before
    finally:
        gc.enable()
    gc.collect()
    assert len(gc.get_objects()) <= objects + 100


class Failing(Net):
    def __init__(self, *args):
        super().__init__(*args)
        self.failures = 0

    def forward(self):
        return self.solve(X, Y).net(X)

    def solve(self, x, y):
        super().solve(x, y)
        with torch.enable_grad():
            self.objective(x, y).backward()
        if self.failures:
            self.net[0].weight = nn.Parameter(torch.ones(2, 2, dtype=F64))
            raise KeyError("on purpose")
        return self


@pytest.mark.parametrize("solved", [False, True])
def test_an_exception_in_solve_leaves_the_module_as_it_was(solved):
    penalty = leaf(1.0)
    module = Failing(penalty, meta_net())
    if solved:
        module.solve(X, 2 * Y)
    module.failures = 1
    params, values = list(module.parameters()), copy.deepcopy(module.state_dict())
    for _ in range(2):
        with pytest.raises(KeyError, match="on purpose"):
            module.solve(X, Y)
    assert all(a is b for a, b in zip(module.parameters(), params, strict=True))
    assert all(torch.equal(v, values[k]) for k, v in module.state_dict().items())
    assert all(p.grad is None for p in (*module.meta_parameters(), *module._leaves.values()))
    assert params[0].is_leaf != solved
    if solved:
        grad((module.net(X) ** 3).sum(), penalty)
    module.failures = 0
    close(
        grad((module.solve(X, Y).net(X) ** 3).sum(), penalty),
        grad((Net(penalty, module.meta_net).solve(X, Y).net(X) ** 3).sum(), penalty),
        1e-10,
    )
