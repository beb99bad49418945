"""torch.compile round a caller gives eager's numbers: the implicit rules are neither dropped nor traced through."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, vmap

from implicitdiff import adam, apply_updates, custom_fixed_point, custom_root
from implicitdiff.linear_solve import solve_cg
from implicitdiff.solvers import gradient_descent

THETA = torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64)


@custom_fixed_point(lambda z, theta: 0.5 * torch.cos(z) * theta)
def fixed_point(init, theta):
    # Too few steps to differentiate through; close enough to a fixed point for its equation to hold to rounding.
    with torch.no_grad():
        for _ in range(60):
            init = 0.5 * torch.cos(init) * theta
    return init


@custom_root(lambda x, theta: x**3 - theta)
def cube_root(init, theta):
    return torch.from_numpy(theta.detach().numpy() ** (1 / 3))


def linear(theta):
    a = torch.outer(theta, theta) + torch.eye(3, dtype=theta.dtype)
    return solve_cg(rtol=1e-13)(lambda v: a @ v, theta.sin())


def trained(theta):
    init, update = adam(lr=0.1, eps_root=1e-3)
    w = torch.ones_like(theta)
    state = init(w)
    for _ in range(2):
        updates, state = update(w * theta.sin() - theta, state)
        w = apply_updates(w, updates)
    return (w**2).sum()


FUNCTIONS = {
    "optimizer": trained,
    "fixed point": lambda theta: (fixed_point(torch.zeros_like(theta), theta) ** 2).sum(),
    "root": lambda theta: (cube_root(None, theta) ** 2).sum(),
    "linear solve": lambda theta: (linear(theta) ** 2).sum(),
}


def derivative_of_compiled(f, theta):
    theta = theta.clone().requires_grad_()
    torch.compile(f, backend="aot_eager")(theta).backward()
    return theta.grad


WAYS = {
    "compile, then backward": derivative_of_compiled,
    "compile of grad": lambda f, theta: torch.compile(grad(f), backend="aot_eager")(theta),
    "compile of vmap of grad": lambda f, theta: torch.compile(
        lambda batch: vmap(grad(f))(batch) if f is not FUNCTIONS["root"] else torch.stack([grad(f)(t) for t in batch]),
        backend="aot_eager",
    )(torch.stack([theta, theta]))[0],
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.filterwarnings("ignore")
def test_compiled_callers_differentiate_like_eager_ones(function, way):
    torch._dynamo.reset()
    f = FUNCTIONS[function]
    torch.testing.assert_close(WAYS[way](f, THETA), grad(f)(THETA), rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_an_objective_may_be_compiled_that_has_operations_to_exchange():
    torch._dynamo.reset()
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4).sin()

    def objective(z, s):
        return ((torch.nn.functional.layer_norm(x * z, (4,)) - s * x) ** 2).sum() + 5 * (z**2).sum()

    def total(objective):
        return lambda s: gradient_descent(objective).run(torch.full((4,), 0.1, dtype=torch.float64), s)[0].sum()

    compiled = torch.compile(objective, backend="aot_eager")
    torch.testing.assert_close(grad(total(compiled))(THETA[1]), grad(total(objective))(THETA[1]), rtol=1e-10, atol=0)
