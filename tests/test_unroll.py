"""`unroll`: a loop with checkpoints has the derivatives of the loop, in less memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn import functional
from torch.utils._pytree import tree_leaves

import implicitdiff as idf

F64 = torch.float64
N = 7  # not a multiple of the interval
A = torch.tensor([[0.5, -0.2, 0.1], [0.3, 0.4, -0.6], [-0.1, 0.2, 0.7]], dtype=torch.float64)
W = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
TARGET = torch.tensor([0.2, 0.7, -0.4], dtype=torch.float64)
TARGETS = torch.stack([TARGET, 2 * TARGET, TARGET - 1])


def trained(checkpoint_every, captured=0.1):
    """The loss of a trained model in its initial weights and its data; a penalty is captured by the step."""
    opt = idf.adam(lr=0.05, eps_root=1e-3)

    def step(carry, target):
        w, state = carry
        gradient = grad(lambda w: ((A @ w - target).sin() ** 2).sum() + (captured * w**2).sum())(w)
        updates, state = opt.update(gradient, state)
        return idf.apply_updates(w, updates), state

    def loss(w, target):
        w, _ = idf.unroll(step, N, checkpoint_every)((w, opt.init(w)), target)
        return (w**2).sum()

    return loss


TRANSFORMS = {
    "value": lambda f: f(W, TARGET),
    "grad": lambda f: grad(f, (0, 1))(W, TARGET),
    "jacfwd": lambda f: jacfwd(f, (0, 1))(W, TARGET),
    "jvp": lambda f: jvp(f, (W, TARGET), (TARGET, W)),
    "hessian": lambda f: hessian(f, 1)(W, TARGET),
    "jacrev(jacrev)": lambda f: jacrev(jacrev(f, 1), 0)(W, TARGET),
    "jacrev(jacfwd)": lambda f: jacrev(jacfwd(f, 1), 0)(W, TARGET),
    "jacfwd(jacfwd)": lambda f: jacfwd(jacfwd(f, 1), 0)(W, TARGET),
    "vmap": lambda f: vmap(f, (None, 0))(W, TARGETS),
    "vmap(grad)": lambda f: vmap(grad(f, (0, 1)), (None, 0))(W, TARGETS),
    "grad(vmap)": lambda f: grad(lambda w: vmap(f, (None, 0))(w, TARGETS).sum())(W),
    "vmap(hessian)": lambda f: vmap(hessian(f), (None, 0))(W, TARGETS),
}


@pytest.mark.parametrize("every", [1, 3, N, N + 1])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_checkpoints_change_no_derivative(transform, every):
    expected = transform(trained(None))
    actual = transform(trained(every))
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_what_a_step_captures_is_differentiated_to_second_order():
    def derivatives(every):
        penalty = torch.full((3,), 0.1, dtype=torch.float64, requires_grad=True)
        target = TARGET.clone().requires_grad_()
        first = torch.autograd.grad(trained(every, penalty)(W, target), (penalty, target), create_graph=True)
        return *first, *torch.autograd.grad(first[0].sum(), (penalty, target))

    for a, b in zip(derivatives(3), derivatives(None), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_counters_and_absent_leaves_come_through():
    def step(carry, scale):
        return {"x": carry["x"] * scale, "n": carry["n"] + 1, "nothing": None}

    start = {"x": torch.tensor(1.0), "n": torch.tensor(0), "nothing": None}
    end = idf.unroll(step, 5, checkpoint_every=2)(start, torch.tensor(2.0))
    assert end["n"].item() == 5 and end["x"].item() == 32.0 and end["nothing"] is None
    assert (
        grad(lambda s: idf.unroll(step, 5, checkpoint_every=2)(start, s)["x"])(torch.tensor(2.0)).item() == 5 * 2.0**4
    )


def test_no_steps_return_the_carry():
    carry = object()
    assert idf.unroll(lambda c: None, 0, 3)(carry) is carry


PEAK = """
import re, sys, torch, implicitdiff as idf
torch.set_num_threads(1)
steps, every = int(sys.argv[1]), int(sys.argv[2]) or None
x = torch.ones(500_000)
loop = idf.unroll(lambda x: (x.sin() * x).cos(), steps, every)
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
torch.func.grad(lambda x: loop(x[:10]).sum())(x)
before = peak()
torch.func.grad(lambda x: loop(x).sum())(x)
print((peak() - before) * 1024 / x.nbytes)
"""


def peak_in_carries(steps, every):
    """How much memory the gradient of a loop takes at most, in units of the carry."""
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(steps), str(every)], capture_output=True, text=True, check=True
    )
    return float(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as on Linux")
def test_memory_is_of_the_order_of_the_root_of_the_number_of_steps():
    few = peak_in_carries(100, every=10)
    assert few < peak_in_carries(100, every=0) / 5
    assert peak_in_carries(400, every=20) < 3 * few  # theory says 2; linear growth would say 4


def test_random_steps_are_refused_where_they_would_be_drawn_again():
    noisy = idf.unroll(lambda x: x + torch.randn(()), 4, checkpoint_every=2)
    with pytest.raises(ValueError, match="random"):
        noisy(torch.tensor(0.0))
    assert idf.unroll(lambda x: x + torch.rand(()), 4)(torch.tensor(0.0)) > 0


@pytest.mark.parametrize(("n", "every"), [(-1, None), (3, 0), (3, -2)])
def test_counts_are_checked(n, every):
    with pytest.raises(ValueError, match="unroll"):
        idf.unroll(lambda x: x, n, every)


PASSING = {
    "shift": lambda x: x + 1,
    "identity": lambda x: x,
    "passing through": lambda c: (c[0] * 2, c[1]),
}


@pytest.mark.parametrize("name", PASSING)
def test_cotangents_may_pass_through_unchanged(name):
    start = (torch.ones(2), torch.ones(2)) if name == "passing through" else torch.ones(2)

    def end(start, every):
        return sum(t.sum() for t in tree_leaves(idf.unroll(PASSING[name], 4, every)(start)))

    for a, b in zip(tree_leaves(grad(end)(start, 2)), tree_leaves(grad(end)(start, None)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("transform", [grad, lambda f: lambda x: torch.autograd.grad(f(x.requires_grad_()), x)])
def test_steps_that_change_meanwhile_are_noticed(transform):
    numbers = iter(range(1, 100))
    with pytest.raises(RuntimeError, match="unroll: the step has changed since the call"):
        transform(idf.unroll(lambda x: x * next(numbers), 4, checkpoint_every=2))(torch.tensor(1.0))


def test_nothing_is_kept_where_nothing_is_recorded():
    weight = torch.tensor(2.0, requires_grad=True)
    with torch.no_grad():
        assert idf.unroll(lambda x: x * weight, 3, checkpoint_every=2)(torch.tensor(1.0)).item() == 8.0


def test_a_solver_in_segments_is_differentiated_in_a_batch():
    # The batched derivative of what a step passes on may be one number in all places.
    solver = idf.solvers.fixed_point_iteration(lambda x, theta: 0.5 * torch.cos(x) + theta)

    def solution(theta, checkpoint_every):
        return solver.run(torch.zeros(3, dtype=F64), theta, implicit_diff=False, checkpoint_every=checkpoint_every)[0]

    batch = torch.arange(6.0, dtype=F64).reshape(2, 3)
    result, expected = (vmap(jacrev(lambda theta, every=every: solution(theta, every)))(batch) for every in (3, None))
    torch.testing.assert_close(result, expected)


def normalised(kind):
    torch.manual_seed(0)
    if kind is nn.utils.parametrizations.weight_norm:
        return nn.Sequential(kind(nn.Linear(3, 5)), nn.Tanh(), nn.Linear(5, 1)).double()
    return nn.Sequential(nn.Linear(3, 5), kind, nn.Tanh(), nn.Linear(5, 1)).double()


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("every", [None, 2])
@pytest.mark.parametrize(
    "kind",
    [nn.LayerNorm(5), nn.BatchNorm1d(5, track_running_stats=False), nn.utils.parametrizations.weight_norm],
    ids=["layer_norm", "batch_norm", "weight_norm"],
)
def test_meta_gradients_through_normalisations_are_right(kind, every):
    net, generator = normalised(kind), torch.Generator().manual_seed(0)
    start = {name: p.detach() for name, p in net.named_parameters()}
    x, y = (torch.randn(4, 8, k, dtype=F64, generator=generator) for k in (3, 1))
    along = {name: torch.randn(p.shape, dtype=F64, generator=generator) for name, p in start.items()}

    def loss(params, x, y):
        return functional.mse_loss(functional_call(net, params, (x,)), y)

    def step(params, x, y):
        return {
            name: p - 0.3 * g for (name, p), g in zip(params.items(), grad(loss)(params, x, y).values(), strict=True)
        }

    def total(t):
        params = {name: p + t * along[name] for name, p in start.items()}
        return vmap(lambda x, y: loss(idf.unroll(step, 4, every)(params, x, y), x, y))(x, y).sum()

    h = 1e-5
    expected = (total(h) - total(-h)) / (2 * h)
    torch.testing.assert_close(grad(total)(torch.zeros((), dtype=F64)), expected, rtol=1e-6, atol=0)
