"""Parameters in a TensorDict: as unknowns, as arguments, and put into a module by the condition.

The condition may run under vmap, where `to_module` leaves frozen copies in the place of the module's parameters, unless
it is given ``preserve_module_state=False``.
"""

from __future__ import annotations

import copy

import pytest
import torch
from checks.differences import central
from torch import nn
from torch.func import functional_call, grad, vmap

from implicitdiff import adam, apply_updates, custom_root, solvers, unroll

tensordict = pytest.importorskip("tensordict", reason="tensordict is not installed")

generator = torch.Generator().manual_seed(0)
X, Y = (torch.randn(8, n, dtype=torch.float64, generator=generator) for n in (3, 1))
PENALTY = torch.tensor(0.3, dtype=torch.float64)
torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()
START = tensordict.TensorDict.from_module(NET).data.clone()


def called(params):
    return functional_call(NET, dict(params.flatten_keys(".").items()), (X,))


def put_into(params):
    with params.to_module(NET, preserve_module_state=False):
        return NET(X)


def objective(apply):
    """Fits the data near other parameters."""

    def value(params, penalty, prior):
        pull = sum(v.square().sum() for v in (params - prior).values(True, True))
        return ((apply(params) - Y) ** 2).mean() + penalty * pull

    return value


def by_solver(apply):
    return lambda penalty, prior: solvers.lbfgs(objective(apply)).run(START, penalty, prior)[0]


def by_decorator(apply):
    def solve(init, penalty, prior):
        return solvers.lbfgs(objective(apply)).run(START, penalty, prior)[0]

    decorated = custom_root(grad(objective(apply)))(solve)
    return lambda penalty, prior: decorated(None, penalty, prior)


@pytest.mark.parametrize("solution", [by_solver, by_decorator])
@pytest.mark.parametrize("apply", [called, put_into])
def test_a_solution_has_the_derivatives_of_solving_again(apply, solution):
    before = list(NET.parameters())
    fitted = solution(apply)

    def total(penalty, prior):
        return (apply(fitted(penalty, prior)) ** 2).sum()

    assert isinstance(fitted(PENALTY, START), tensordict.TensorDict)

    def along(s):
        return total(PENALTY + s, START - s)

    zero = torch.tensor(0.0, dtype=torch.float64)
    expected = central(along, zero)
    slope, slopes = grad(total, argnums=(0, 1))(PENALTY, START)
    torch.testing.assert_close(slope - sum(v.sum() for v in slopes.values(True, True)), expected, rtol=1e-6, atol=1e-8)
    penalty, prior = PENALTY.clone().requires_grad_(), START.clone().requires_grad_()
    total(penalty, prior).backward()
    found = penalty.grad - sum(v.grad.sum() for v in prior.values(True, True))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert all(a is b for a, b in zip(NET.parameters(), before, strict=True))


def test_the_parameters_of_a_module_are_arguments_that_have_gradients():
    live = tensordict.TensorDict.from_module(NET)
    fitted = by_solver(called)(PENALTY, live)
    found = torch.autograd.grad((called(fitted) ** 2).sum(), list(NET.parameters()))

    def total(prior):
        return (called(by_solver(called)(PENALTY, prior)) ** 2).sum()

    expected = grad(total)(START).flatten_keys(".")
    torch.testing.assert_close(dict(zip(dict(NET.named_parameters()), found, strict=True)), expected.to_dict())


def test_a_batch_of_solutions_is_one_tensordict():
    penalties = torch.stack([PENALTY, 2 * PENALTY])
    found = vmap(lambda penalty: by_solver(called)(penalty, START))(penalties)
    expected = torch.stack([by_solver(called)(penalty, START) for penalty in penalties])
    torch.testing.assert_close(found.to_dict(), expected.to_dict(), rtol=1e-6, atol=1e-8)


def test_steps_of_an_optimizer_are_those_of_torch():
    init, update = adam(0.1)

    def step(carry):
        params, state = carry
        gradients = grad(lambda params: ((called(params) - Y) ** 2).mean())(params)
        updates, state = update(gradients, state)
        return apply_updates(params, updates), state

    found, _ = unroll(step, 3)((START, init(START)))
    net = copy.deepcopy(NET)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        ((net(X) - Y) ** 2).mean().backward()
        optimizer.step()
    expected = tensordict.TensorDict.from_module(net).data
    torch.testing.assert_close(found.to_dict(), expected.to_dict(), rtol=1e-10, atol=1e-12)
