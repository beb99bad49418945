"""Implicit MAML written as its users write it: a module, plain gradient descent by torch.autograd inside the solver."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

from implicitdiff import custom_root
from implicitdiff.linear_solve import solve_inv, solve_normal_cg

SOLVES = {
    "normal CG, a budget of 5": solve_normal_cg(maxiter=5, atol=0),
    "Neumann, 100 terms": solve_inv(ns=True, maxiter=100, alpha=0.1),
    "default": None,
}
WEIGHT, BIAS = torch.tensor([[-0.0369, 0.0248, 0.0347, 0.0067]]), torch.tensor([0.3156])


def data():
    torch.manual_seed(0)
    x, w, b = torch.randn(20, 4), torch.randn(4, 1), torch.randn(1)
    y = x @ w + b + 0.5 * torch.randn(20, 1)
    net = nn.Linear(4, 1)
    nn.init.ones_(net.weight)
    nn.init.zeros_(net.bias)
    return x, y, net


def imaml_objective(params, meta_params, data):
    x, y, fmodel = data
    loss = nn.functional.mse_loss(functional_call(fmodel, params, (x,)), y)
    return loss + 0.5 * sum(((params[k] - meta_params[k]) ** 2).sum() for k in params)


def descend(objective, params):
    for _ in range(100):
        with torch.enable_grad():
            grads = torch.autograd.grad(objective(params), list(params.values()))
        for param, grad in zip(params.values(), grads, strict=True):
            param.sub_(0.02 * grad)
    return params


def mean_prediction_with_meta_params_passed(meta_params, solve):
    x, y, net = data()

    @custom_root(torch.func.grad(imaml_objective), argnums=1, solve=solve)
    def inner(params, meta_params, data):
        return descend(lambda p: imaml_objective(p, meta_params, data), params)

    return functional_call(net, inner(meta_params, meta_params, (x, y, net)), (x,)).mean()


def mean_prediction_with_meta_params_captured(meta_params, solve):
    x, y, net = data()

    def objective(params):
        return imaml_objective(params, meta_params, (x, y, net))

    @custom_root(torch.func.grad(objective), solve=solve)
    def inner(params):
        return descend(objective, params)

    return functional_call(net, inner(meta_params), (x,)).mean()


FORMS = pytest.mark.parametrize(
    "mean_prediction", [mean_prediction_with_meta_params_passed, mean_prediction_with_meta_params_captured]
)


@FORMS
@pytest.mark.parametrize("solve", SOLVES)
def test_meta_gradient_of_the_mean_prediction_by_autograd(mean_prediction, solve):
    meta_params = dict(data()[2].named_parameters())
    before = {k: v.detach().clone() for k, v in meta_params.items()}
    weight, bias = torch.autograd.grad(mean_prediction(meta_params, SOLVES[solve]), list(meta_params.values()))
    torch.testing.assert_close(weight, WEIGHT, atol=6e-5, rtol=0)
    torch.testing.assert_close(bias, BIAS, atol=6e-5, rtol=0)
    for k, v in meta_params.items():
        assert torch.equal(v, before[k]) and v.grad is None


@FORMS
@pytest.mark.parametrize("solve", SOLVES)
def test_meta_gradient_of_the_mean_prediction_by_torch_func(mean_prediction, solve):
    # The values keep their flags inside of torch.func.grad too, so the solver's own autograd works there.
    meta_params = dict(data()[2].named_parameters())
    grads = torch.func.grad(mean_prediction)(meta_params, SOLVES[solve])
    torch.testing.assert_close(grads["weight"].detach(), WEIGHT, atol=6e-5, rtol=0)
    torch.testing.assert_close(grads["bias"].detach(), BIAS, atol=6e-5, rtol=0)
