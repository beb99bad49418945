"""The steady state of an ordinary differential equation, integrated by torchdiffeq's adaptive Dormand-Prince method."""

from __future__ import annotations

import pytest
import torch
from checks.differences import central
from torch.func import grad, jvp, vmap

from implicitdiff import TransformError, custom_fixed_point, custom_root

torchdiffeq = pytest.importorskip("torchdiffeq", reason="torchdiffeq is not installed")

RATES = torch.tensor([1.5, 0.8, 2.0], dtype=torch.float64)
START = torch.tensor([0.1, 0.1, 0.1], dtype=torch.float64)
DIRECTION = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64)
COUPLING = torch.tensor([[0.0, -0.4, 0.1], [0.3, 0.0, -0.2], [0.1, 0.5, 0.0]], dtype=torch.float64)


def velocity(y, rates):
    """A gene network: each product is made at a rate that the others control, and decays."""
    return rates * torch.sigmoid(COUPLING @ y) - y


def integrate(y, rates):
    times = torch.tensor([0.0, 30.0], dtype=y.dtype)
    return torchdiffeq.odeint(lambda t, y: velocity(y, rates), y, times, method="dopri5", rtol=1e-9, atol=1e-11)[-1]


STEADY = {
    "a root of the velocity": custom_root(velocity)(integrate),
    "a fixed point of one step": custom_fixed_point(lambda y, rates: y + 0.1 * velocity(y, rates))(integrate),
}


def backward(f, at):
    at = at.clone().requires_grad_()
    f(at).backward()
    return at.grad


ROUTES = {
    "backward": backward,
    "func.grad": lambda f, at: grad(f)(at),
    "func.jvp": lambda f, at: jvp(f, (at,), (torch.ones_like(at),))[1],
}


@pytest.mark.parametrize("steady", STEADY.values(), ids=STEADY)
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_derivatives_of_a_steady_state_are_central_differences(steady, route):
    def along(s):
        return steady(START, RATES + s * DIRECTION).square().sum()

    zero = torch.tensor(0.0, dtype=torch.float64)
    torch.testing.assert_close(route(along, zero), central(along, zero), rtol=1e-6, atol=1e-8)


def test_a_batch_of_integrations_raises_with_the_name_of_the_solver():
    with pytest.raises(TransformError, match="the solver integrate needs the values of a tensor that vmap batches"):
        vmap(lambda rates: STEADY["a root of the velocity"](START, rates))(torch.stack([RATES, 0.5 * RATES]))
