"""Under hooks on what autograd saves, as checkpoints and offloading have them, solvers do what they do without."""

import pytest
import torch
from tables.solvers import MINIMISERS
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from implicitdiff import custom_root, linear_solve, solvers, unroll

F64 = torch.float64
T = torch.tensor([1.0, 2.0], dtype=F64)


def objective(x, t):
    return ((x - t) ** 4).sum() + ((x - 1) ** 2).sum()


def residual(x, t):
    return 4 * (x - t) ** 3 + 2 * (x - 1)


def image(x, t):
    return x - 0.1 * residual(x, t)


def newton(init, t):
    x = t.clone()
    for _ in range(50):
        x = x - residual(x, t) / (12 * (x - t) ** 2 + 2)
    return x


SOLVERS = {
    **{row.name: (row.factory, objective) for row in MINIMISERS},
    "newton": (solvers.newton, residual),
    "levenberg_marquardt": (solvers.levenberg_marquardt, residual),
    "anderson": (solvers.anderson, image),
    "scipy_root": (solvers.scipy_root, residual),
}
CALLS = {
    **{
        name: lambda fn, t, make=make: make(fn).run(torch.zeros(2, dtype=F64), t)[0]
        for name, (make, _) in SOLVERS.items()
    },
    "custom_root": lambda fn, t: custom_root(fn)(newton)(None, t),
    "unroll": lambda fn, t: unroll(fn, 40, 8)(t, t),
    "solve_cg": lambda fn, t: linear_solve.solve_cg()(lambda v: fn(v, t) - fn(0 * v, t), t),
}
FUNCTIONS = {
    **{name: fn for name, (_, fn) in SOLVERS.items()},
    "custom_root": residual,
    "unroll": image,
    "solve_cg": lambda v, t: v * (t + 1) + v.flip(0),
}
HOOKS = {
    "checkpoint": lambda f, t: checkpoint(f, t, use_reentrant=False),
    "save_on_cpu": lambda f, t: under(save_on_cpu(), f, t),
    "saved_tensors_hooks": lambda f, t: under(saved_tensors_hooks(lambda x: x.clone(), lambda x: x), f, t),
}


def under(hooks, f, t):
    with hooks:
        return f(t)


def gradient(name, hooks):
    """The gradient, and how often the function was evaluated."""
    calls = []

    def counted(*args):
        calls.append(1)
        return FUNCTIONS[name](*args)

    t = T.clone().requires_grad_()
    x = hooks(lambda t: CALLS[name](counted, t), t)
    return torch.autograd.grad(x.square().sum(), t)[0], len(calls)


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("name", CALLS)
def test_hooks_change_neither_the_derivative_nor_much_of_its_cost(name, hooks):
    expected, without = gradient(name, lambda f, t: f(t))
    found, evaluations = gradient(name, HOOKS[hooks])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    # A checkpoint runs the search a second time.
    assert evaluations <= 3 * without


@pytest.mark.parametrize("hooks", HOOKS)
def test_the_whole_step_may_run_under_hooks(hooks):
    def step(t):
        x = solvers.newton(residual).run(torch.zeros(2, dtype=F64), t)[0]
        return torch.autograd.grad(x.square().sum(), t)[0]

    if hooks == "checkpoint":
        pytest.skip("a checkpoint ends before a backward pass begins")
    t = T.clone().requires_grad_()
    torch.testing.assert_close(HOOKS[hooks](step, t), step(t))
