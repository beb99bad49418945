"""Modules that solve for their inner parameters: derivatives, who is inner and who is meta, and what is left behind."""

from __future__ import annotations

import abc
import copy
import dataclasses
import functools
import gc
import io
import pickle
import weakref

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import nn
from torch.func import functional_call

import implicitdiff
from implicitdiff import custom_root
from implicitdiff.errors import LinearSolveError
from implicitdiff.linear_solve import solve_cg, solve_normal_cg
from implicitdiff.nn import ImplicitMetaGradientModule, MetaGradientModule

F64 = torch.float64
X = torch.tensor([[1.0, 0.5], [-0.3, 1.2], [0.7, -0.4]], dtype=F64)
Y = torch.tensor([1.0, 2.0, -1.0], dtype=F64)
EYE = torch.eye(2, dtype=F64)


def leaf(value=0.7, **options):
    return torch.tensor(value, dtype=F64, requires_grad=True, **options)


def zeros(*shape):
    return nn.Parameter(torch.zeros(shape, dtype=F64))


def ridge(penalty, x=X, y=Y):
    """The closed form that torch.autograd differentiates."""
    return torch.linalg.solve(x.T @ x + penalty * EYE.to(x), x.T @ y)


def central(f, at, h=1e-4):
    """Richardson's extrapolation of central differences of a function of one number."""
    one, two = ((f(at + d) - f(at - d)) / (2 * d) for d in (h, 2 * h))
    return (4 * one - two) / 3


def close(actual, expected, tol=1e-12):
    expected = torch.as_tensor(expected, dtype=F64)
    torch.testing.assert_close(actual.to(F64), expected, rtol=tol, atol=tol)


def grad(output, *inputs, **options):
    found = torch.autograd.grad(output, inputs, **options)
    return found if len(found) > 1 else found[0]


def expected_grad(f, value=0.7):
    at = leaf(value)
    return grad(f(at), at)


SLOPE = expected_grad(lambda p: ridge(p).sum())


def newton(module, *args, steps=8, **kwargs):
    """Newton's method on the flat inner parameters, to rounding."""
    params = [p for p in module.parameters() if p.requires_grad]
    for _ in range(steps):
        with torch.enable_grad():
            grads = torch.autograd.grad(module.objective(*args, **kwargs), params, create_graph=True)
            flat = torch.cat([g.reshape(-1) for g in grads])
            rows = [torch.autograd.grad(g, params, retain_graph=True, materialize_grads=True) for g in flat]
        matrix = torch.stack([torch.cat([r.reshape(-1) for r in row]) for row in rows])
        step = torch.linalg.solve(matrix, flat.detach())
        for param, part in zip(params, step.split([p.numel() for p in params]), strict=True):
            param.sub_(part.reshape(param.shape))


class Ridge(ImplicitMetaGradientModule):
    def __init__(self, penalty):
        super().__init__()
        self.penalty = penalty
        self.w = zeros(2)

    def objective(self, x, y):
        return ((x @ self.w - y) ** 2).sum() + self.penalty * (self.w**2).sum()

    def solve(self, x, y):
        newton(self, x, y, steps=1)
        return self

    def forward(self, x=X, y=Y):
        return self.solve(x, y).w


class RidgeByResiduals(Ridge):
    def optimality(self, x, y):
        return x.T @ (x @ self.w - y) + self.penalty * self.w


class Net(ImplicitMetaGradientModule):
    """A small network that stays near a meta-network: not quadratic, several parameters."""

    def __init__(self, penalty, meta_net):
        super().__init__()
        self.penalty, self.meta_net = penalty, meta_net
        self.net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).to(F64)
        self.net.load_state_dict(meta_net.state_dict())

    def objective(self, x, y):
        loss = ((self.net(x)[:, 0] - y) ** 2).mean()
        pairs = zip(self.net.parameters(), self.meta_net.parameters(), strict=True)
        return loss + self.penalty * sum(((p - q) ** 2).sum() for p, q in pairs)

    def solve(self, x, y):
        newton(self, x, y)
        return self


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


def meta_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).to(F64)


NETS = pytest.mark.parametrize("kind", [Net, NetByResiduals, NetByTuple])


# Derivatives


@NETS
def test_the_meta_gradient_is_that_of_central_differences_of_the_whole_pipeline(kind):
    net, penalty = meta_net(), leaf(1.0)

    def outer(module):
        return (module.solve(X, Y).net(X) ** 3).sum()

    weight = net[0].weight
    by_penalty, by_weight = grad(outer(kind(penalty, net)), penalty, weight)
    close(by_penalty, central(lambda p: outer(kind(torch.tensor(p, dtype=F64), net)).item(), 1.0), 1e-9)

    def moved(value):
        other = copy.deepcopy(net)
        other[0].weight.data[0, 1] = value
        return outer(kind(penalty, other)).item()

    close(by_weight[0, 1], central(moved, weight[0, 1].item()), 1e-9)


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
    close(grad(by_penalty, penalty, retain_graph=True), central(lambda p: first(p)[1][0].item(), 1.0), 1e-8)
    mixed = grad(by_weight[0, 0], penalty)
    close(mixed, central(lambda p: first(p)[1][1][0, 0].item(), 1.0), 1e-8)


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


class Signature(Ridge):
    def objective(self, x, y, *others, scale=1.0, shift):
        loss = sum(((x @ self.w - scale * z - shift) ** 2).sum() for z in (y, *others))
        return loss + self.penalty * (self.w**2).sum()

    def solve(self, x, y, *others, scale=1.0, shift, steps=1):
        newton(self, x, y, *others, scale=scale, shift=shift, steps=steps)
        return self.w


@pytest.mark.parametrize("others", [(), (2 * Y,), (2 * Y, -Y)])
@pytest.mark.parametrize("scale", [{}, {"scale": 1.7}])
def test_solve_takes_arguments_by_position_by_keyword_and_by_default(others, scale):
    penalty, shift = leaf(), leaf(0.2)
    w = Signature(penalty).solve(X, Y, *others, **scale, shift=shift)
    factor, count = scale.get("scale", 1.0), 1 + len(others)

    def closed(penalty, shift):
        mean = sum(factor * z + shift for z in (Y, *others)) / count
        return ridge(penalty / count, X, mean)

    wanted = grad(closed(penalty, shift).sum(), penalty, shift)
    for mine, other in zip(grad(w.sum(), penalty, shift), wanted, strict=True):
        close(mine, other)


def test_keyword_arguments_may_come_in_any_order():
    penalty = leaf()
    close(grad(Ridge(penalty).solve(y=Y, x=X).w.sum(), penalty), SLOPE)


def test_arguments_may_be_trees():
    class Inner(Ridge):
        def objective(self, batch):
            return super().objective(*batch["data"])

        def solve(self, batch):
            newton(self, batch, steps=1)
            return self

    scale = leaf(1.3)
    w = Inner(leaf()).solve({"data": (X * scale, Y), "name": "train"}).w
    close(grad(w.sum(), scale), expected_grad(lambda s: ridge(0.7, X * s).sum(), 1.3))


def test_options_of_solve_alone_have_defaults_and_stay_there():
    class Inner(Ridge):
        def solve(self, x, y, steps=2, verbose=False):
            assert steps == 2 and verbose is False
            newton(self, x, y, steps=steps)
            return self

    penalty = leaf()
    close(grad(Inner(penalty).solve(X, Y).w.sum(), penalty), SLOPE)


def test_options_of_solve_alone_may_be_given_by_keyword():
    class Inner(Ridge):
        def solve(self, x, y, steps=2, verbose=False):
            assert steps == 3 and verbose is True
            newton(self, x, y, steps=steps)
            return self

    penalty = leaf()
    close(grad(Inner(penalty).solve(X, y=Y, steps=3, verbose=True).w.sum(), penalty), SLOPE)


def test_solve_is_inherited():
    class Inner(Ridge):
        pass

    penalty = leaf()
    close(grad(Inner(penalty).solve(X, Y).w.sum(), penalty), SLOPE)


def test_a_solve_may_call_its_parents_and_itself():
    calls = []

    class Inner(Ridge):
        def solve(self, x, y, again=True):
            calls.append(again)
            if again:
                self.solve(x, y, again=False)
            assert self.w.is_leaf
            return super().solve(x, y)

    penalty = leaf()
    close(grad(Inner(penalty).solve(X, Y).w.sum(), penalty), SLOPE)
    assert calls == [True, False]


def test_a_mixin_may_bring_solve():
    class Newton:
        def solve(self, x, y):
            newton(self, x, y, steps=1)
            return self

    class Problem(ImplicitMetaGradientModule, abc.ABC):
        objective = Ridge.objective

        def __init__(self, penalty):
            super().__init__()
            self.penalty, self.w = penalty, zeros(2)

    class Inner(Newton, Problem):
        pass

    penalty = leaf()
    close(grad(Inner(penalty).solve(X, Y).w.sum(), penalty), SLOPE)


class Counting:
    def __init__(self, solve):
        self.solve, self.calls = solve, 0

    def __call__(self, matvec, b):
        self.calls += 1
        return self.solve(matvec, b)


def test_the_linear_solve_is_inherited_overridden_and_reset():
    first, second = Counting(solve_cg()), Counting(solve_normal_cg())

    class Inner(Ridge, linear_solve=first):
        pass

    class Heir(Inner):
        pass

    class Other(Inner, linear_solve=second):
        pass

    class Default(Inner, linear_solve=None):
        pass

    for kind, calls in [(Inner, (1, 0)), (Heir, (2, 0)), (Other, (2, 1)), (Default, (2, 1))]:
        penalty = leaf()
        close(grad(kind(penalty).solve(X, Y).w.sum(), penalty), SLOPE, 1e-10)
        assert (first.calls, second.calls) == calls


def test_a_plain_function_may_be_the_linear_solve():
    def solve(matvec, b):
        (name,) = b
        columns = [matvec({name: e})[name] for e in EYE]
        return {name: torch.linalg.solve(torch.stack(columns, 1), b[name])}

    class Inner(Ridge, linear_solve=solve):
        pass

    penalty = leaf()
    close(grad(Inner(penalty).solve(X, Y).w.sum(), penalty), SLOPE)


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


def by_steps(make, steps):
    def solve(module, x, y):
        optimizer = make(module.parameters())
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.enable_grad():
                module.objective(x, y).backward()
            optimizer.step()

    return solve


def by_pure_functions(module, x, y):
    transformation = implicitdiff.sgd(0.2)
    params = list(module.parameters())
    state = transformation.init(params)
    for _ in range(150):
        with torch.enable_grad():
            grads = list(torch.autograd.grad(module.objective(x, y), params))
        updates, state = transformation.update(grads, state, inplace=True)
        implicitdiff.apply_updates(params, updates, inplace=True)


def by_scipy(module, x, y):
    w = module.w

    def slope(at):
        w.data.copy_(torch.from_numpy(at))
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(module.objective(x, y), w)
        return slope.numpy()

    found = scipy.optimize.root(slope, np.zeros(2), tol=1e-13)
    w.copy_(torch.from_numpy(found.x))


def by_a_new_parameter(module, x, y):
    module.w = nn.Parameter(ridge(module.penalty, x, y))


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


# Who is inner and who is meta


def names(module):
    return [name for name, _ in module.named_parameters()], [name for name, _ in module.named_meta_parameters()]


def test_what_is_given_is_meta_and_what_is_made_is_inner():
    module = Net(leaf(), meta_net())
    inner = [f"net.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]
    assert names(module) == (inner, ["penalty", *(f"meta_{name}" for name in inner)])
    assert [id(p) for p in module.parameters()] == [id(p) for p in module.net.parameters()]
    assert [id(p) for p in module.meta_parameters()][1:] == [id(p) for p in module.meta_net.parameters()]
    assert list(module.meta_modules()) == list(module.meta_net.modules())


def test_names_of_meta_parameters_take_a_prefix():
    assert [name for name, _ in Ridge(leaf()).named_meta_parameters("lower")] == ["lower.penalty"]


def test_own_meta_parameters_are_listed_without_those_of_meta_modules():
    assert [name for name, _ in Net(leaf(), meta_net()).named_meta_parameters(recurse=False)] == ["penalty"]


def test_a_frozen_and_evaluated_meta_module_is_meta():
    net = meta_net().eval().requires_grad_(False)
    module = Net(leaf(), net)
    assert len(list(module.meta_parameters())) == 5 and list(module.meta_modules()) == list(net.modules())
    before = copy.deepcopy(net.state_dict())
    module.solve(X, Y)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert not any(m.training for m in net.modules()) and not any(p.requires_grad for p in net.parameters())


def test_an_evaluated_meta_module_has_its_gradient():
    net, same = meta_net(), meta_net().eval()
    found = [grad((Net(leaf(), n).solve(X, Y).net(X) ** 3).sum(), *n.parameters()) for n in (net, same)]
    for mine, other in zip(*found, strict=True):
        close(mine, other)
        assert mine.abs().max() > 0


class Plain:
    def __init__(self, penalty):
        self.penalty, self.name = penalty, "plain"


class Slots:
    __slots__ = ("penalty", "unset")

    def __init__(self, penalty):
        self.penalty = penalty


@dataclasses.dataclass(frozen=True)
class Config:
    penalty: torch.Tensor
    rate: float = 0.1


CONTAINERS = {
    "dict": (lambda p: {"penalty": p, "rate": 0.1}, lambda c: c["penalty"], "config_penalty"),
    "list": (lambda p: ["a", p], lambda c: c[1], "config_1"),
    "tuple": (lambda p: (p,), lambda c: c[0], "config_0"),
    "dataclass": (Config, lambda c: c.penalty, "config_penalty"),
    "object": (Plain, lambda c: c.penalty, "config_penalty"),
    "slots": (Slots, lambda c: c.penalty, "config_penalty"),
    "partial": (lambda p: functools.partial(torch.mul, p), lambda c: c(1.0), "config_0"),
    "keyword of a partial": (lambda p: functools.partial(torch.add, 0.0, other=p), lambda c: c(), "config_other"),
    "nested": (lambda p: {"a": [Plain({"b": p})]}, lambda c: c["a"][0].penalty["b"], "config_a_0_penalty_b"),
}


class Contained(Ridge):
    def __init__(self, config, read):
        super().__init__(None)
        self.config, self.read = config, read

    def objective(self, x, y):
        return ((x @ self.w - y) ** 2).sum() + self.read(self.config) * (self.w**2).sum()


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("wrap", [lambda t: t, nn.Parameter, lambda t: nn.Parameter(t, requires_grad=False)])
def test_meta_parameters_are_found_in_containers_named_and_saved(kind, wrap):
    make, read, name = CONTAINERS[kind]
    penalty = wrap(leaf())
    module = Contained(make(penalty), read)
    assert names(module) == (["w"], [name])
    assert next(module.meta_parameters()) is penalty and torch.equal(module.state_dict()[name], penalty)
    w = module.solve(X, Y).w
    assert w.is_leaf != penalty.requires_grad
    if penalty.requires_grad:
        close(grad(w.sum(), penalty), SLOPE)


def test_a_meta_parameter_that_is_read_in_a_container_cannot_be_exchanged():
    module = Contained({"penalty": leaf()}, lambda c: c["penalty"])
    module.forward = lambda: module.solve(X, Y).w.sum()
    with pytest.raises(ValueError, match="'config_penalty' was exchanged"):
        torch.func.grad(lambda p: functional_call(module, {"config_penalty": p}, ()))(torch.tensor(0.3, dtype=F64))


def test_meta_modules_are_found_in_containers_of_any_arguments():
    class Inner(MetaGradientModule):
        def __init__(self, *args, **kwargs):
            super().__init__()
            self.w = zeros(2)

    net, other, penalty = nn.Linear(1, 1), nn.Linear(1, 1), leaf()
    module = Inner({"net": net}, penalty, more=[other], name="inner")
    assert names(module) == (
        ["w"],
        ["args_1", "args_0_net.weight", "args_0_net.bias", "kwargs_more_0.weight", "kwargs_more_0.bias"],
    )
    assert set(module.meta_modules()) == {net, other}


def test_what_a_closure_hides_takes_part_in_derivatives_but_is_not_listed_unless_registered():
    penalty = leaf()
    module = Contained(lambda: penalty, lambda f: f())
    assert names(module) == (["w"], [])
    close(grad(module.solve(X, Y).w.sum(), penalty), SLOPE)
    module.register_meta_parameter("hidden", penalty)
    assert names(module) == (["w"], ["hidden"])
    close(grad(module.solve(X, Y).w.sum(), penalty), SLOPE)


def test_tensors_that_need_no_gradient_and_optimizers_are_not_meta():
    net = nn.Linear(1, 1)

    class Inner(MetaGradientModule):
        def __init__(self, x, optimizer):
            super().__init__()
            self.x, self.optimizer = x, optimizer

    module = Inner(X, torch.optim.SGD(net.parameters(), lr=0.1))
    assert names(module) == ([], []) and module.x is X


def test_a_constructor_may_be_called_with_wrong_arguments_and_says_so():
    with pytest.raises(TypeError, match=r"__init__\(\) missing 1 required positional argument: 'penalty'"):
        Ridge()


def test_a_meta_parameter_may_be_registered_frozen_or_as_none():
    module = Ridge(leaf())
    module.register_meta_parameter("frozen", torch.ones(2))
    module.register_meta_parameter("none", None)
    assert names(module) == (["w"], ["penalty", "frozen"]) and module.none is None
    module.register_meta_parameter("none", torch.ones(1))
    assert names(module)[1] == ["penalty", "frozen", "none"]


def test_a_meta_module_may_be_registered_or_none():
    module, net = Ridge(leaf()), nn.Linear(1, 1)
    module.register_meta_module("net", net)
    module.register_meta_module("none", None)
    assert names(module) == (["w"], ["penalty", "net.weight", "net.bias"])
    assert list(module.meta_modules()) == [net]


def test_registering_says_what_is_wrong():
    penalty = leaf()
    module = Ridge(penalty)
    with pytest.raises(ValueError, match="'again' is a meta-parameter; use register_meta_parameter"):
        module.register_parameter("again", penalty)
    with pytest.raises(TypeError, match=r"'mask' must be a floating-point or complex tensor or None, got torch\.int64"):
        module.register_meta_parameter("mask", torch.ones(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="'rate' must be a floating-point or complex tensor or None, got float"):
        module.register_meta_parameter("rate", 0.1)
    with pytest.raises(KeyError, match="attribute 'solve' already exists"):
        module.register_meta_parameter("solve", leaf())
    with pytest.raises(KeyError, match="attribute 'solve' already exists"):
        module.register_meta_module("solve", nn.Linear(1, 1))
    with pytest.raises(TypeError, match="not a Module subclass"):
        module.register_meta_module("net", 3)
    with pytest.raises(TypeError, match="cannot assign"):
        module.register_parameter("data", X)
    assert names(module) == (["w"], ["penalty"])


def test_a_tensor_that_needs_a_gradient_is_refused_before_the_constructor_of_the_base():
    class Inner(MetaGradientModule):
        def __init__(self, penalty):
            self.penalty = penalty
            super().__init__()

    with pytest.raises(AttributeError, match=r"parameters before Module.__init__\(\) call, and 'penalty' is one"):
        Inner(leaf())


def test_plain_leaf_tensors_may_be_inner_parameters():
    class Inner(Ridge):
        def __init__(self, penalty):
            super().__init__(penalty)
            del self.w
            self.register_parameter("w", torch.zeros(2, dtype=F64, requires_grad=True))
            self.offset = leaf(0.0)

        def objective(self, x, y):
            return super().objective(x, y - self.offset) + self.penalty * self.offset**2

    penalty = leaf()
    module = Inner(penalty)
    assert names(module) == (["w", "offset"], ["penalty"])
    module.solve(X, Y)
    columns = torch.cat([X, torch.ones(3, 1, dtype=F64)], 1)

    def closed(p):
        return torch.linalg.solve(columns.T @ columns + p * torch.eye(3, dtype=F64), columns.T @ Y)

    close(torch.cat([module.w, module.offset[None]]).detach(), closed(0.7))
    close(grad(module.w.sum() + module.offset, penalty), expected_grad(lambda p: closed(p).sum()))


def test_a_tensor_that_depends_on_others_is_no_inner_parameter_but_an_attribute():
    module = Ridge(leaf())
    module.kept = module.penalty * 2
    assert names(module) == (["w"], ["penalty"]) and "kept" not in module.state_dict()


def test_an_output_of_another_network_may_be_a_meta_parameter():
    source = leaf()
    module = Ridge(source.exp())
    assert names(module) == (["w"], ["penalty"])
    close(grad(module.solve(X, Y).w.sum(), source), expected_grad(lambda s: ridge(s.exp()).sum()))


def test_weights_tied_in_the_inner_network_stay_tied():
    class Inner(ImplicitMetaGradientModule):
        def __init__(self, penalty):
            super().__init__()
            self.penalty = penalty
            self.a, self.b = nn.Linear(2, 1, bias=False).to(F64), nn.Linear(2, 1, bias=False).to(F64)
            self.b.weight = self.a.weight

        def objective(self):
            loss = ((self.a(X)[:, 0] - Y) ** 2).sum() + ((self.b(X)[:, 0] - 2 * Y) ** 2).sum()
            return loss + self.penalty * (self.a.weight**2).sum()

        def solve(self):
            newton(self, steps=1)
            return self

    penalty = leaf()
    module = Inner(penalty).solve()
    assert names(module) == (["a.weight"], ["penalty"])
    assert module.a.weight is module.b.weight
    close(
        grad(module.a.weight.sum() + module.b.weight.sum(), penalty),
        expected_grad(lambda p: 2 * ridge(p / 2, X, 1.5 * Y).sum()),
    )


class TiedToMeta(ImplicitMetaGradientModule):
    """An inner network whose first layer is the meta-network's."""

    def __init__(self, features):
        super().__init__()
        self.features = features
        self.net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).to(F64)
        self.net[0].weight = features.weight

    def objective(self):
        return ((self.net(X)[:, 0] - Y) ** 2).sum() + (self.net[1].weight ** 2).sum()

    def solve(self):
        newton(self, steps=1)
        return self

    def forward(self):
        return self.solve().net(X).prod()


def tied_to_meta(weight):
    x = X @ weight.T
    return (x @ ridge(1.0, x)).prod()


def test_an_inner_layer_tied_to_a_meta_parameter_is_meta():
    torch.manual_seed(0)
    features = nn.Linear(2, 2, bias=False).to(F64)
    module = TiedToMeta(features)
    assert names(module) == (["net.1.weight"], ["features.weight"])
    close(grad(module(), features.weight), grad(tied_to_meta(features.weight), features.weight))


def test_functional_call_replaces_tied_meta_parameters_together():
    torch.manual_seed(0)
    features = nn.Linear(2, 2, bias=False).to(F64)
    module, at = TiedToMeta(features), torch.randn(2, 2, dtype=F64)
    found = torch.func.grad(lambda w: functional_call(module, {"features.weight": w}, ()))(at)
    weight = at.clone().requires_grad_()
    close(found, grad(tied_to_meta(weight), weight))


def test_functional_call_is_strict_about_both_kinds():
    module = Ridge(leaf())
    tensors = {"penalty": torch.ones((), dtype=F64), "w": torch.zeros(2, dtype=F64, requires_grad=True)}
    functional_call(module, tensors, (), strict=True)
    with pytest.raises(RuntimeError, match="penalty"):
        functional_call(module, {"w": tensors["w"]}, (), strict=True)


def test_frozen_inner_layers_are_constants():
    net = meta_net()
    penalty = leaf(1.0)

    def outer(penalty):
        module = Net(penalty, net)
        module.net[0].requires_grad_(False)
        frozen = copy.deepcopy(module.net[0].state_dict())
        module.solve(X, Y)
        assert all(torch.equal(frozen[k], v) for k, v in module.net[0].state_dict().items())
        assert isinstance(module.net[0].weight, nn.Parameter) and not module.net[0].weight.requires_grad
        return (module.net(X) ** 3).sum()

    close(grad(outer(penalty), penalty), central(lambda p: outer(torch.tensor(p, dtype=F64)).item(), 1.0), 1e-9)


def test_a_meta_network_may_be_a_layer_of_the_inner_network():
    class Inner(ImplicitMetaGradientModule):
        def __init__(self, features):
            super().__init__()
            self.net = nn.Sequential(features, nn.Linear(2, 1, bias=False).to(F64))

        def objective(self):
            return ((self.net(X)[:, 0] - Y) ** 2).sum() + (self.net[1].weight ** 2).sum()

        def solve(self):
            newton(self, steps=1)
            return self

    torch.manual_seed(0)
    features = nn.Linear(2, 2, bias=False).to(F64)
    module = Inner(features)
    assert names(module) == (["net.1.weight"], ["net.0.weight"])
    close(grad(module.solve().net(X).prod(), features.weight), grad(tied_to_meta(features.weight), features.weight))


def test_the_inner_parameters_are_what_a_meta_optimizer_steps():
    class Inner(MetaGradientModule):
        def __init__(self, penalty):
            super().__init__()
            self.penalty, self.w = penalty, nn.Parameter(torch.ones(2, dtype=F64))

    penalty = leaf()
    module = Inner(penalty)
    implicitdiff.MetaSGD(module, lr=0.1).step(module.penalty * (module.w**2).sum())
    assert module.penalty is penalty
    close(grad(module.w.sum(), penalty), -0.4)  # of 2 (1 - 2 lr p)


# What an nn.Module does


def test_conversion_before_solve_is_about_both_kinds():
    penalty = torch.tensor(0.7, requires_grad=True)
    module = Ridge(penalty).to(torch.float32).to(F64)
    assert module.penalty is penalty and penalty.dtype == module.w.dtype == F64
    slope = grad(module.solve(X, Y).w.sum(), penalty)
    close(slope, expected_grad(lambda p: ridge(p).sum(), penalty.item()))


def test_conversion_after_solve_keeps_the_derivative():
    penalty = leaf()
    module = Ridge(penalty).solve(X, Y)
    w = module.w
    module.to(torch.float32)
    assert module.w.dtype == torch.float32 and module.penalty is penalty
    torch.testing.assert_close(module.w.detach(), w.detach().float())
    begun = []

    class Watched(Ridge):
        def solve(self, x, y):
            begun.append(self.w.dtype)
            return super().solve(x, y)

    module.__class__ = Watched
    module.solve(X.float(), Y.float())
    assert begun == [torch.float32]


def test_conversion_after_solve_goes_through_the_graph():
    source = leaf()
    module = Ridge(source.exp())
    module.solve(X, Y)
    module.to(torch.float32)
    slope = expected_grad(lambda s: ridge(s.exp()).sum())
    torch.testing.assert_close(grad(module.w.sum(), source, retain_graph=True).float(), slope.float())
    assert module.penalty.dtype == torch.float32
    slope = grad(module.solve(X.float(), Y.float()).w.sum(), source)
    torch.testing.assert_close(slope.float(), expected_grad(lambda s: ridge(s.exp()).sum()).float())


def test_single_precision_gives_single_precision():
    penalty = torch.tensor(0.7, requires_grad=True)
    module = Ridge(penalty).to(torch.float32)
    slope = grad(module.solve(X.float(), Y.float()).w.sum(), penalty)
    assert slope.dtype == torch.float32
    torch.testing.assert_close(slope, SLOPE.float())


@pytest.mark.parametrize("solved", [False, True])
def test_a_state_goes_round_by_state_dict(solved):
    module = Net(leaf(1.0), meta_net())
    if solved:
        module.solve(X, Y)
    state = module.state_dict()
    assert list(state) == ["penalty", *(f"{n}.{k}" for n in ("meta_net", "net") for k in meta_net().state_dict())]
    assert not any(v.requires_grad for v in state.values())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    penalty = leaf(2.0)
    other = Net(penalty, nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).to(F64))
    if solved:
        other.solve(X, -Y)
    other.load_state_dict(torch.load(file))
    assert other.penalty is penalty and penalty.item() == 1.0
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())
    assert all(isinstance(p, nn.Parameter) for p in other.parameters())
    found = [grad((m.solve(X, Y).net(X) ** 3).sum(), m.penalty) for m in (module, other)]
    close(*found, 1e-11)


def test_loading_a_state_leaves_the_derivative_of_the_solution_before():
    penalty = leaf()
    module = Ridge(penalty)
    w = module.solve(X, Y).w
    module.load_state_dict({"penalty": penalty.detach(), "w": torch.ones(2)}, strict=True)
    close(w.detach(), ridge(0.7))
    assert torch.equal(module.w, torch.ones(2, dtype=F64)) and module.w.is_leaf
    with pytest.raises(RuntimeError, match="inplace"):  # the penalty was loaded in place
        grad(w.sum(), penalty)


def test_zero_grad_is_about_both_kinds():
    penalty = leaf()
    module = Ridge(penalty)
    module.objective(X, Y).backward()
    assert penalty.grad is not None and module.w.grad is not None
    module.zero_grad(set_to_none=False)
    assert penalty.grad is not None and not penalty.grad.any() and not module.w.grad.any()
    module.zero_grad()
    assert penalty.grad is None and module.w.grad is None
    module.solve(X, Y).w.sum().backward()
    module.zero_grad()
    assert penalty.grad is None


def test_training_and_evaluation_mode_are_about_both_kinds():
    module = Net(leaf(), meta_net())
    module.eval()
    assert not module.meta_net.training and not module.net.training
    module.train()
    assert module.meta_net.training and module.net.training
    assert len(list(module.meta_parameters())) == 5


def copied(module):
    return copy.deepcopy(module)


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copied, pickled, saved])
def test_a_copy_knows_its_kinds_and_is_independent(again):
    module = Net(leaf(1.0), meta_net())
    other = again(module)
    assert names(other) == names(module)
    assert not {*map(id, module.parameters())} & {*map(id, other.parameters())}
    found = [grad((m.solve(X, Y).net(X) ** 3).sum(), *m.meta_parameters()) for m in (module, other)]
    for mine, its in zip(*found, strict=True):
        close(mine, its)


def test_functional_call_exchanges_meta_parameters():
    module, at = Ridge(leaf()), torch.tensor(1.3, dtype=F64)

    def outer(penalty):
        return (functional_call(module, {"penalty": penalty}, (X, Y)) ** 3).sum()

    def closed(penalty):
        return (ridge(penalty) ** 3).sum()

    for _ in range(2):
        for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
            close(transform(outer)(at), transform(closed)(at), 1e-11)
    close(grad(module.solve(X, Y).w.sum(), module.penalty), SLOPE)
    assert names(module) == (["w"], ["penalty"]) and module.penalty.item() == 0.7


def test_functional_call_exchanges_the_parameters_of_meta_modules():
    net = meta_net()

    class Inner(Net):
        def forward(self):
            return (self.solve(X, Y).net(X) ** 3).sum()

    module = Inner(leaf(1.0), net)
    metas = {name: p.detach() for name, p in module.named_meta_parameters()}
    found = torch.func.grad(lambda metas: functional_call(module, metas, ()))(metas)
    wanted = grad(module(), *module.meta_parameters())
    for mine, other in zip(found.values(), wanted, strict=True):
        close(mine, other, 1e-10)


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

    close(first.detach(), central(at, 1.5), 1e-10)
    close(grad(first, goal), central(slope, 1.5), 1e-10)


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


# What is refused


def method(self):
    return torch.zeros(())


def test_meta_modules_and_children_have_names():
    class Tuned(MetaGradientModule):
        def __init__(self, prior, deep):
            super().__init__()
            self.prior, self.again = prior, prior
            self.wrap = nn.Sequential(nn.Linear(1, 1), deep)

    prior, deep = nn.Sequential(nn.Linear(1, 1)), nn.Linear(1, 1)
    tuned = Tuned(prior, deep)
    assert dict(tuned.named_meta_children()) == {"prior": prior} and [*tuned.meta_children()] == [prior]
    named = {"prior": prior, "prior.0": prior[0], "wrap.1": deep}
    assert dict(tuned.named_meta_modules()) == named
    assert set(dict(tuned.named_meta_modules(prefix="of"))) == {f"of.{name}" for name in named}
    assert {name for name, _ in tuned.named_meta_modules(remove_duplicate=False)} == {*named, "again", "again.0"}


NO_CLASS = {
    "no solve": ({"objective": method}, r"Inner does not define solve\(\), and needs it; declare a base class"),
    "no condition": ({"solve": method}, r"Inner defines neither objective\(\) nor optimality\(\), and needs one"),
    "nothing": ({}, r"does not define solve.* and defines neither objective"),
    "a number": ({"solve": method, "objective": 3}, r"Inner: objective has to be a method, def.*got int"),
    "a loss": ({"solve": method, "objective": nn.MSELoss()}, r"objective has to be a method.*got MSELoss"),
    "static": ({"solve": method, "optimality": staticmethod(method)}, r"optimality has to be a method.*staticmethod"),
    "a property": ({"solve": property(method), "objective": method}, r"solve has to be a method.*property"),
}


@pytest.mark.parametrize(("body", "match"), NO_CLASS.values(), ids=NO_CLASS)
def test_a_class_that_cannot_be_used_is_not_made(body, match):
    with pytest.raises(TypeError, match=match):
        type(ImplicitMetaGradientModule)("Inner", (ImplicitMetaGradientModule,), dict(body))


def test_a_base_says_that_it_leaves_methods_to_its_subclasses():
    class Posed(ImplicitMetaGradientModule, abc.ABC):
        objective = Ridge.objective

    class Declared(ImplicitMetaGradientModule):
        @abc.abstractmethod
        def optimality(self, x, y):
            """Of each kind."""

    for base in (Posed, Declared):
        with pytest.raises(TypeError, match=r"abstract|does not define solve"):
            base()
        with pytest.raises(TypeError, match="does not define solve"):
            type(base)("Child", (base,), {"optimality": RidgeByResiduals.optimality})

    class Whole(Posed):
        solve = Ridge.solve

    assert isinstance(Whole(), Posed)


def test_an_objective_that_is_not_there_says_so():
    class Inner(Ridge):
        objective = ImplicitMetaGradientModule.objective
        optimality = RidgeByResiduals.optimality

    with pytest.raises(NotImplementedError, match=r"Inner does not define objective\(\)"):
        Inner(leaf()).objective()


def test_a_linear_solve_that_is_no_function_is_refused():
    with pytest.raises(TypeError, match=r"Inner: linear_solve must be a function solve\(matvec, b\), got str"):

        class Inner(Ridge, linear_solve="cg"):
            pass


def test_arguments_that_do_not_fit_are_refused():
    class Inner(Ridge):
        def solve(self, x):
            return self

    module = Ridge(leaf())
    with pytest.raises(TypeError, match=r"missing a required argument: 'y'.*Ridge\.solve.*Ridge\.objective"):
        module.solve(X)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'z'.*Ridge\.solve.*Ridge\.objective"):
        module.solve(X, Y, z=1)
    with pytest.raises(TypeError, match=r"nothing is given for 'y'.*Inner\.solve.*Ridge\.objective"):
        Inner(leaf()).solve(X)
    assert module.w.is_leaf and not module.w.any()


def test_a_module_without_inner_parameters_is_refused():
    class Inner(Ridge):
        def __init__(self, penalty):
            super().__init__(penalty)
            self.w.requires_grad_(False)

    with pytest.raises(ValueError, match=r"Inner\.solve: there are no inner parameters: make those to be solved for"):
        Inner(leaf()).solve(X, Y)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (lambda self: (self.w, self.w), r"one residual for each of the inner parameters \['w'\] is needed, got 2"),
        (lambda self: {"v": self.w}, "Inner.optimality"),
        (lambda self: (self.w[:1],), "Inner.optimality"),
        (lambda self: {"w": self.w.sum()}, "Inner.optimality"),
    ],
)
def test_residuals_that_are_not_like_the_inner_parameters_are_refused(found, message):
    class Inner(Ridge):
        def optimality(self, x, y):
            return found(self)

    module = Inner(leaf())
    with pytest.raises(ValueError, match=message):
        module.solve(X, Y)
    assert module.w.is_leaf and not module.w.any()


def test_inner_parameters_read_in_another_way_than_as_attributes_are_refused():
    class Listed(Ridge):
        def __init__(self, penalty):
            super().__init__(penalty)
            self.listed = [self.w]

        def objective(self, x, y):
            return ((x @ self.listed[0] - y) ** 2).sum() + self.penalty * (self.w**2).sum()

    class Bound(Ridge):
        def __init__(self, penalty):
            super().__init__(penalty)
            self.product = lambda x: x @ self.w

        def objective(self, x, y):
            return ((self.product(x) - y) ** 2).sum() + self.penalty * (self.w**2).sum()

    for kind in (Listed, Bound):
        module = kind(leaf())
        with pytest.raises(ValueError, match=r"inner parameter 'w' is read otherwise than as an attribute"):
            module.solve(X, Y)
        assert module.w.is_leaf and not module.w.any()


def test_inner_parameters_that_are_gone_are_named():
    class Inner(Ridge):
        def solve(self, x, y):
            del self.w
            return self

    with pytest.raises(ValueError, match=r"Inner\.solve: the inner parameter 'w' is gone after it"):
        Inner(leaf()).solve(X, Y)


def test_an_inner_parameter_that_nothing_determines_fails_in_the_derivative():
    class Inner(Ridge):
        def __init__(self, penalty):
            super().__init__(penalty)
            self.unused = zeros(1)

        def solve(self, x, y):
            by_scipy(self, x, y)
            return self

    penalty = leaf()
    w = Inner(penalty).solve(X, Y).w
    with pytest.raises(LinearSolveError, match="singular"):
        grad(w.sum(), penalty)


class Layered(ImplicitMetaGradientModule):
    def __init__(self, penalty, layer):
        super().__init__()
        self.penalty = penalty
        self.net = nn.Sequential(nn.Linear(2, 2), layer, nn.Linear(2, 1)).to(F64)
        self.net[1].load_state_dict(layer.state_dict())

    def objective(self):
        return (self.net(X) ** 2).sum() + self.penalty * sum((p**2).sum() for p in self.parameters())

    def solve(self):
        newton(self)
        return self


def test_dropout_in_training_mode_is_refused_and_in_evaluation_mode_is_not():
    module = Layered(leaf(), nn.Dropout(0.5))
    with pytest.raises(ValueError, match=r"Layered\.optimality draws random numbers.*dropout: use eval mode"):
        module.solve()
    assert module.eval().solve().net[0].weight.requires_grad


def test_batch_normalisation_in_training_mode_is_refused_and_in_evaluation_mode_is_not():
    module = Layered(leaf(), nn.BatchNorm1d(2, affine=False))
    with pytest.raises((ValueError, RuntimeError), match=r"in place|in-place"):
        module.solve()
    assert module.eval().solve().net[0].weight.requires_grad


def test_an_lstm_may_be_the_inner_network():
    class Inner(ImplicitMetaGradientModule):
        def __init__(self, penalty, state):
            super().__init__()
            self.penalty, self.net = penalty, nn.LSTM(2, 1).to(F64)
            self.net.load_state_dict(state)

        def objective(self):
            loss = ((self.net(X)[0][:, 0] - 0.3 * Y) ** 2).sum()
            return loss + self.penalty * sum((p**2).sum() for p in self.parameters())

        def solve(self):
            newton(self, steps=12)
            return self

    torch.manual_seed(0)
    state = {k: 0.1 * v for k, v in nn.LSTM(2, 1).to(F64).state_dict().items()}

    def outer(penalty):
        return (Inner(penalty, state).solve().net(X)[0] ** 2).sum()

    penalty = leaf(1.0)
    close(grad(outer(penalty), penalty), central(lambda p: outer(torch.tensor(p, dtype=F64)).item(), 1.0), 1e-8)
