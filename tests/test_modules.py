"""Modules that solve for their inner parameters: derivatives, who is inner and who is meta, and what is left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from checks.differences import slope as slope_of
from tables.meta_modules import (
    F64,
    SLOPE,
    Net,
    Ridge,
    RidgeByResiduals,
    X,
    Y,
    by_a_new_parameter,
    by_scipy,
    by_steps,
    close,
    expected_grad,
    grad,
    leaf,
    meta_net,
    newton,
    ridge,
)
from torch import nn
from torch.func import functional_call

import implicitdiff
from implicitdiff import custom_root


class NetByResiduals(Net):
    def optimality(self, x, y):
        params = dict(self.net.named_parameters())
        found = torch.func.grad(lambda p: self.value(p, x, y))(params)
        return {f"net.{name}": 3 * found[name] for name in reversed(found)}

    def value(self, params, x, y):
        loss = ((functional_call(self.net, params, (x,))[:, 0] - y) ** 2).mean()
        return loss + self.penalty * sum(((params[k] - q) ** 2).sum() for k, q in self.meta_net.named_parameters())


class NetByTuple(NetByResiduals):
    def optimality(self, x, y):
        found = super().optimality(x, y)
        return tuple(found[name] for name, _ in self.named_parameters())


NETS = pytest.mark.parametrize("kind", [Net, NetByResiduals, NetByTuple])


# Derivatives


@NETS
def test_the_meta_gradient_is_that_of_central_differences_of_the_whole_pipeline(kind):
    net, penalty = meta_net(), leaf(1.0)

    def outer(module):
        return (module.solve(X, Y).net(X) ** 3).sum()

    weight = net[0].weight
    by_penalty, by_weight = grad(outer(kind(penalty, net)), penalty, weight)
    close(by_penalty, slope_of(lambda p: outer(kind(torch.tensor(p, dtype=F64), net)).item(), 1.0), 1e-9)

    def moved(value):
        other = copy.deepcopy(net)
        other[0].weight.data[0, 1] = value
        return outer(kind(penalty, other)).item()

    close(by_weight[0, 1], slope_of(moved, weight[0, 1].item()), 1e-9)


@NETS
def test_the_meta_gradient_is_that_of_the_functional_form(kind):
    net, penalty = meta_net(), leaf(1.0)
    module = kind(penalty, net).solve(X, Y)
    found = grad((module.net(X) ** 3).sum(), penalty, *net.parameters())

    def objective(params, penalty, near):
        loss = ((functional_call(net, params, (X,))[:, 0] - Y) ** 2).mean()
        return loss + penalty * sum(((params[k] - near[k]) ** 2).sum() for k in params)

    @custom_root(torch.func.grad(objective))
    def solution(params, penalty, near):
        return {k: v.detach() for k, v in module.net.named_parameters()}

    near = dict(net.named_parameters())
    wanted = torch.func.grad(lambda p, q: (functional_call(net, solution(q, p, q), (X,)) ** 3).sum(), argnums=(0, 1))
    by_penalty, by_net = wanted(penalty, near)
    for mine, other in zip(found, [by_penalty, *by_net.values()], strict=True):
        close(mine, other.detach(), 1e-10)


@pytest.mark.parametrize("kind", [Ridge, RidgeByResiduals])
def test_the_gradient_and_the_hessian_are_those_of_the_closed_form(kind):
    found, wanted = leaf(), leaf()
    outer = (kind(found).solve(X, Y).w ** 3).sum()
    (first,) = torch.autograd.grad(outer, found, create_graph=True)
    reference = grad((ridge(wanted) ** 3).sum(), wanted, create_graph=True)
    close(first.detach(), reference.detach())
    close(grad(first, found), grad(reference, wanted))


def test_third_derivatives_are_those_of_the_closed_form():
    found, wanted = leaf(), leaf()
    a, b = Ridge(found).solve(X, Y).w.sum(), ridge(wanted).sum()
    for _ in range(3):
        a, b = grad(a, found, create_graph=True), grad(b, wanted, create_graph=True)
        close(a.detach(), b.detach(), 1e-11)


def test_second_derivatives_through_a_network_are_central_differences_of_first_ones():
    net = meta_net()
    weight = net[2].weight

    def first(penalty):
        penalty = torch.as_tensor(penalty, dtype=F64).requires_grad_()
        outer = (Net(penalty, net).solve(X, Y).net(X) ** 2).sum()
        return penalty, grad(outer, penalty, weight, create_graph=True)

    penalty, (by_penalty, by_weight) = first(1.0)
    close(grad(by_penalty, penalty, retain_graph=True), slope_of(lambda p: first(p)[1][0].item(), 1.0), 1e-8)
    mixed = grad(by_weight[0, 0], penalty)
    close(mixed, slope_of(lambda p: first(p)[1][1][0, 0].item(), 1.0), 1e-8)


def test_gradients_flow_into_arguments_of_solve():
    x, y, penalty = X.clone().requires_grad_(), Y.clone().requires_grad_(), leaf()
    found = grad(Ridge(penalty).solve(x, y).w.prod(), x, y, penalty)
    wanted = grad(ridge(penalty, x, y).prod(), x, y, penalty)
    for mine, other in zip(found, wanted, strict=True):
        close(mine, other)


def test_gradients_flow_into_arguments_that_depend_on_others():
    scale = leaf(1.3)
    found = grad(Ridge(leaf()).solve(x=X * scale, y=Y).w.sum(), scale)
    close(found, expected_grad(lambda s: ridge(0.7, X * s).sum(), 1.3))


GLOBAL = leaf()


class Captures(Ridge):
    def __init__(self):
        super().__init__(None)

    def captured(self):
        raise NotImplementedError

    def objective(self, x, y):
        return ((x @ self.w - y) ** 2).sum() + self.captured() * (self.w**2).sum()


class CapturesGlobal(Captures):
    def captured(self):
        return GLOBAL


def test_gradients_flow_into_a_captured_global():
    close(grad(CapturesGlobal().solve(X, Y).w.sum(), GLOBAL), SLOPE)


def test_gradients_flow_into_a_captured_variable_of_a_function():
    penalty = leaf()

    class Inner(Captures):
        def captured(self):
            return penalty

    close(grad(Inner().solve(X, Y).w.sum(), penalty), SLOPE)


def test_gradients_flow_into_a_tensor_that_a_plain_attribute_holds():
    penalty = leaf()

    class Inner(Captures):
        def captured(self):
            return self.kept

    module = Inner()
    module.kept = penalty * 1
    assert [name for name, _ in module.named_parameters()] == ["w"]
    close(grad(module.solve(X, Y).w.sum(), penalty), SLOPE)


def test_gradients_flow_into_a_tensor_that_a_dictionary_holds():
    penalty = leaf()

    class Inner(Captures):
        def captured(self):
            return self.config["penalty"]

    module = Inner()
    module.config = {"penalty": penalty}
    close(grad(module.solve(X, Y).w.sum(), penalty), SLOPE)


def test_the_derivative_is_that_of_the_variables_at_the_time_of_the_call():
    data = X

    class Inner(Ridge):
        def objective(self, y):
            return ((data @ self.w - y) ** 2).sum() + self.penalty * (self.w**2).sum()

        def solve(self, y):
            newton(self, y, steps=1)
            return self

    penalty = leaf()
    w = Inner(penalty).solve(Y).w
    data = 3 * X
    close(grad(w.sum(), penalty), SLOPE)


def test_the_derivative_is_that_of_the_attributes_at_the_time_of_the_call():
    class Inner(Ridge):
        def __init__(self, penalty):
            super().__init__(penalty)
            self.factor, self.data = 1.0, X
            self.part = nn.Linear(1, 1)
            self.part.factor = 1.0
            self.part.requires_grad_(False)

        def objective(self):
            loss = ((self.data @ self.w - Y) ** 2).sum()
            sign = 1 if self.training else -1
            return loss + sign * self.factor * self.part.factor * self.penalty * (self.w**2).sum()

        def solve(self):
            newton(self, steps=1)
            return self

    penalty = leaf()
    module = Inner(penalty)
    w = module.solve().w
    module.factor = module.part.factor = 5.0
    module.data = 2 * X
    module.eval()
    close(grad(w.sum(), penalty), SLOPE)


def test_a_meta_parameter_changed_in_place_before_the_derivative_is_refused():
    penalty = leaf()
    w = Ridge(penalty).solve(X, Y).w
    with torch.no_grad():
        penalty.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grad(w.sum(), penalty)


def test_data_changed_in_place_before_the_derivative_is_refused():
    penalty, x = leaf(), X.clone()
    w = Ridge(penalty).solve(x, Y).w
    x.mul_(2)
    with pytest.raises(RuntimeError, match=r"inplace|in place"):
        grad(w.sum(), penalty)


def test_a_step_of_the_outer_optimizer_between_solve_and_solve_is_right():
    penalty = leaf()
    outer = torch.optim.SGD([penalty], lr=0.1)
    module = Ridge(penalty)
    for _ in range(3):
        at = penalty.item()
        outer.zero_grad()
        module.solve(X, Y).w.sum().backward()
        close(penalty.grad, expected_grad(lambda p: ridge(p).sum(), at))
        outer.step()


# Calls of solve


def test_each_of_two_calls_has_its_own_derivative_whenever_it_is_taken():
    penalty = leaf()
    module = Ridge(penalty)
    first = module.solve(X, Y).w
    second = module.solve(2 * X, Y).w
    close(second.detach(), ridge(0.7, 2 * X))
    close(first.detach(), ridge(0.7))
    close(grad(second.sum(), penalty), expected_grad(lambda p: ridge(p, 2 * X).sum()))
    close(grad(first.sum(), penalty), SLOPE)


def test_the_sum_over_calls_has_the_sum_of_the_derivatives():
    penalty = leaf()
    module = Ridge(penalty)
    sum(module.solve(k * X, Y).w.sum() for k in (1, 2, 3)).backward()
    close(penalty.grad, expected_grad(lambda p: sum(ridge(p, k * X).sum() for k in (1, 2, 3))))


def test_a_call_may_depend_on_the_solution_before_by_its_arguments():
    penalty = leaf()
    module = Ridge(penalty)
    first = module.solve(X, Y).w
    close(
        grad(module.solve(X, Y + X @ first).w.sum(), penalty),
        expected_grad(lambda p: ridge(p, X, Y + X @ ridge(p)).sum()),
    )


def test_the_next_call_begins_with_the_values_of_the_last():
    begun = []

    class Inner(Ridge):
        def solve(self, x, y):
            begun.append((type(self.w), self.w.detach().clone(), self.w.requires_grad, self.w.grad))
            return super().solve(x, y)

    penalty = leaf()
    module = Inner(penalty)
    module.solve(X, Y).w.sum().backward()
    module.solve(X, Y)
    (_, zero, *_), (kind, warm, needs_grad, no_grad) = begun
    assert torch.equal(zero, torch.zeros(2, dtype=F64))
    close(warm, ridge(0.7))
    assert kind is nn.Parameter and needs_grad and no_grad is None
    with torch.no_grad():
        module.w.fill_(3.0)
    module.solve(X, Y)
    assert torch.equal(begun[2][1], torch.full((2,), 3.0, dtype=F64))


def test_where_a_call_begins_has_no_derivative():
    penalty = leaf()
    module = Ridge(penalty)
    first = module.solve(X, Y).w
    second = module.solve(2 * X, Y).w
    assert first.requires_grad
    (found,) = torch.autograd.grad(second.sum(), first, allow_unused=True)
    assert found is None


def test_an_optimizer_made_in_the_constructor_serves_every_call():
    class Inner(Ridge):
        def __init__(self, penalty):
            super().__init__(penalty)
            self.optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.5)

        def solve(self, x, y):
            for _ in range(200):
                self.optimizer.zero_grad()
                with torch.enable_grad():
                    self.objective(x, y).backward()
                self.optimizer.step()
            return self

    penalty = leaf()
    module = Inner(penalty)
    for k in (1, 2):
        w = module.solve(k * X, Y).w
        close(w.detach(), ridge(0.7, k * X), 1e-10)
        close(grad(w.sum(), penalty), expected_grad(lambda p, k=k: ridge(p, k * X).sum()), 1e-10)


def test_what_solve_returns_comes_back_detached_but_for_inner_parameters():
    class Inner(Ridge):
        def solve(self, x, y):
            super().solve(x, y)
            with torch.enable_grad():
                return self.w, {"loss": self.objective(x, y)}, "done", self

    penalty = leaf()
    module = Inner(penalty)
    w, rest, word, same = module.solve(X, Y)
    assert w is module.w and same is module and word == "done" and not rest["loss"].requires_grad
    close(grad(w.sum(), penalty), SLOPE)


def test_without_gradients_solve_leaves_ordinary_parameters():
    module = Ridge(leaf())
    before = module.w
    with torch.no_grad():
        module.solve(X, Y)
    assert module.w is before and module.w.requires_grad
    close(module.w.detach(), ridge(0.7))


def test_without_gradients_solve_returns_the_parameter_itself():
    class Inner(Ridge):
        def solve(self, x, y):
            return super().solve(x, y).w

    module = Inner(leaf())
    with torch.no_grad():
        assert module.solve(X, Y) is module.w


def test_solve_without_anything_to_differentiate_leaves_ordinary_parameters():
    module = Ridge(torch.tensor(0.7, dtype=F64)).solve(X, Y)
    assert isinstance(module.w, nn.Parameter)
    close(module.w.detach(), ridge(0.7))


def test_a_call_after_one_without_gradients_has_its_derivative():
    penalty = leaf()
    module = Ridge(penalty)
    module.solve(X, Y)
    with torch.no_grad():
        module.solve(2 * X, Y)
    assert module.w.is_leaf
    close(grad(module.solve(X, Y).w.sum(), penalty), SLOPE)


# Solvers
# All go by gradients alone. Around the minimum, a search that compares values sees no change of less than 1e-16 of the
# value: it may stop at any distance up to (1e-16 value / curvature)^(1/2) = 1e-8.


def by_lbfgs(module, x, y):
    optimizer = torch.optim.LBFGS(module.parameters(), max_iter=50, tolerance_grad=1e-13, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = module.objective(x, y)
            loss.backward()
        return loss

    optimizer.step(closure)


def by_pure_functions(module, x, y):
    transformation = implicitdiff.sgd(0.2)
    params = list(module.parameters())
    state = transformation.init(params)
    for _ in range(150):
        with torch.enable_grad():
            grads = list(torch.autograd.grad(module.objective(x, y), params))
        updates, state = transformation.update(grads, state, inplace=True)
        implicitdiff.apply_updates(params, updates, inplace=True)


SOLVERS = {
    "torch.optim.LBFGS": by_lbfgs,
    "torch.optim.SGD": by_steps(lambda p: torch.optim.SGD(p, lr=0.2), 150),
    "SGD": by_steps(lambda p: implicitdiff.SGD(p, lr=0.2), 150),
    "Adam, then SGD": lambda *args: [
        by_steps(lambda p: implicitdiff.Adam(p, lr=0.1), 50)(*args),
        by_steps(lambda p: implicitdiff.SGD(p, lr=0.2), 150)(*args),
    ],
    "pure functions": by_pure_functions,
    "SciPy": by_scipy,
    "a new parameter": by_a_new_parameter,
}


@pytest.mark.parametrize("name", SOLVERS)
def test_any_method_may_solve(name):
    class Inner(Ridge):
        def solve(self, x, y):
            SOLVERS[name](self, x, y)
            return self

    penalty = leaf()
    module = Inner(penalty)
    for k in (1, 0.8):
        w = module.solve(k * X, Y).w
        close(w.detach(), ridge(0.7, k * X), 1e-9)
        close(grad(w.sum(), penalty), expected_grad(lambda p, k=k: ridge(p, k * X).sum()), 1e-9)
    assert penalty.grad is None
