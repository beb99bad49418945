"""Write a solver and get its derivative

An implicit layer returns the ``z`` with ``z = tanh(W z + x)``, however it is found: by plain iteration, by Anderson
acceleration (Walker and Ni, 2011; by hand, then the library's), by Newton's method. Its derivatives come from this
equation, by one linear solve, or from the iterations that led to ``z``, by differentiating each of them.

The script checks that the solvers agree and in which order they finish; that both derivatives agree, and agree with
central differences; that the memory for the second grows with the iterations, and the memory for the first does not.
"""

import time
from collections.abc import Callable
from pathlib import Path
from weakref import WeakValueDictionary

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.func import grad, vmap

from implicitdiff import custom_fixed_point
from implicitdiff.solvers import anderson, fixed_point_iteration, newton

N, LANES, HISTORY, REPEATS, BUDGETS = 50, 128, 5, 9, [10, 20, 40, 80, 160]
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)  # operations as small as these lose time on several
torch.manual_seed(0)
A = torch.randn(N, N)  # W has norm 1, and x is small: most units are nearly linear, so that plain iteration is slow
W, x, z0 = (A + A.T) / torch.linalg.matrix_norm(A + A.T, 2), 0.3 * torch.randn(N), torch.zeros(N)


def f(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(W @ z + x)


# %%
# Anderson acceleration, by hand
# ------------------------------
# Combine the last steps such that the residual would be smallest if the map were linear. The derivative comes from the
# decorator, which knows the map and needs to know nothing of what happens in the solver.


@custom_fixed_point(f, has_aux=True, check=1e-10)
def anderson_by_hand(z: Tensor, W: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    residual, steps, changes = f(z, W, x) - z, [], []
    errors = [residual.norm()]
    while errors[-1] > 1e-12:
        step = residual
        if steps:
            S, Y = torch.stack(steps[-HISTORY:], dim=1), torch.stack(changes[-HISTORY:], dim=1)
            step = residual - (S + Y) @ torch.linalg.lstsq(Y, residual[:, None]).solution[:, 0]
        z, before = z + step, residual
        residual = f(z, W, x) - z
        steps, changes, errors = [*steps, step], [*changes, residual - before], [*errors, residual.norm()]
    return z, torch.stack(errors)


solvers = {"plain iteration": fixed_point_iteration(f, rtol=0.0, atol=1e-12)}
solvers["Anderson"] = anderson(f, history=HISTORY, rtol=0.0, atol=1e-12)
solvers["Newton"] = newton(lambda z, W, x: f(z, W, x) - z, rtol=0.0, atol=1e-12)
runs = {name: solver.run(z0, W, x, keep_history=True) for name, solver in solvers.items()}
found = {name: (z, state.history) for name, (z, state) in runs.items()}
found["Anderson by hand"] = anderson_by_hand(z0, W, x)
count = {name: len(curve) - 1 for name, (_, curve) in found.items()}
apart = {name: torch.dist(z, found["Newton"][0]).item() for name, (z, _) in found.items()}
print(*(f"{name:16} {n:4} iterations, {apart[name]:.1e} from Newton's point" for name, n in count.items()), sep="\n")

# %%
# Two derivatives
# ---------------
# Of ``|z|^2 / 2`` in ``W`` and ``x``. Both are right where the iteration has converged. Where it is cut short, the
# unrolled one is still that of what was computed, the implicit one only an estimate of that at the fixed point.


def derivative(run: Callable[..., tuple[Tensor, object]], **options: object) -> Tensor:
    gradient = grad(lambda W, x: (run(z0, W, x, **options)[0] ** 2).sum() / 2, argnums=(0, 1))(W, x)
    return torch.cat([g.flatten() for g in gradient])


def against_differences(gradient: Tensor, run: Callable[..., tuple[Tensor, object]], h: float = 1e-5) -> float:
    dW, dx = torch.randn(50, N, N) / N, torch.randn(50, N) / N
    ahead, behind = (vmap(run, (None, 0, 0))(z0, W + s * dW, x + s * dx)[0] for s in (h, -h))
    slopes, differences = torch.cat([dW.flatten(1), dx], 1) @ gradient, (ahead**2 - behind**2).sum(1) / (4 * h)
    return (torch.dist(slopes, differences) / differences.norm()).item()


exact, five = derivative(solvers["Newton"].run), anderson(f, maxiter=5).run
others = {f"{name}, unrolled": derivative(solver.run, implicit_diff=False) for name, solver in solvers.items()}
others["Anderson by hand"] = derivative(anderson_by_hand)
errors = {name: (torch.dist(d, exact) / exact.norm()).item() for name, d in others.items()}
errors["central differences"] = against_differences(exact, solvers["Newton"].run)
cut = {way: against_differences(derivative(five, implicit_diff=way), five) for way in (True, False)}
print("\nrelative distance from Newton's implicit derivative", *(f"{k:28}{e:.1e}" for k, e in errors.items()), sep="\n")
print(f"cut short after five, against differences of the five: implicit {cut[True]:.0e}, unrolled {cut[False]:.0e}")

# %%
# What they cost
# --------------
# A batch under ``vmap``; its lanes would stop one by one, were it not for the budget. Memory is that of the distinct
# tensors that autograd saves for the backward pass, inputs included, without what a pass needs as it runs (the implicit
# backward pass: an N x N matrix for each lane). Time is that of both passes, in interleaved repeats.

at = W.clone().requires_grad_(), (0.3 * torch.randn(LANES, N)).requires_grad_()


def cost(budget: int, implicit_diff: bool) -> tuple[float, float]:
    """MiB and milliseconds, counted in runs of their own."""
    solver, saved = fixed_point_iteration(f, rtol=0.0, atol=0.0, maxiter=budget), WeakValueDictionary()

    def loss() -> Tensor:
        return vmap(lambda x: solver.run(z0, at[0], x, implicit_diff=implicit_diff)[0])(at[1]).square().mean()

    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(id(v := t.detach()), v), lambda v: v):
        _value = loss()  # holds its graph until it is counted
    mib = sum({t.data_ptr(): t.nbytes for t in saved.values()}.values()) / 2**20
    began = time.perf_counter()
    torch.autograd.grad(loss(), at)
    return mib, 1e3 * (time.perf_counter() - began)


costs = torch.tensor([[[cost(n, way) for n in BUDGETS] for way in (True, False)] for _ in range(REPEATS)])
memory, (low, median, high) = costs[0, ..., 0], costs[..., 1].quantile(torch.tensor([0.25, 0.5, 0.75]), dim=0)
print("\niterations   MiB and median ms (quartiles): implicit, unrolled")
for i, n in enumerate(BUDGETS):
    spans = (f"{memory[k, i]:8.2f}{median[k, i]:8.1f} ({low[k, i]:.1f} to {high[k, i]:.1f})" for k in (0, 1))
    print(f"{n:10}", *(f"{span:34}" for span in spans))

assert max(apart.values()) < 1e-11, "the solvers disagree"
assert count["Newton"] < count["Anderson"] < count["plain iteration"], "acceleration should help"
assert max(errors.values()) < 1e-9, "the derivatives disagree"
assert cut[False] < 1e-8 < 1e-2 < cut[True], "only the unrolled derivative should be that of five iterations"
assert (memory[0].diff() == 0).all() and (memory[1].diff() > 0).all(), "memory should grow for the unrolled one only"

# %%
# The picture
# -----------
plt.rcParams.update({"font.size": 12, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False})
figure, (way, room, clock) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
for (name, (_, curve)), color in zip(found.items(), ("#8a8a8a", "#1b7f79", "#d9683c", "k"), strict=True):
    way.semilogy(curve, ":" if "hand" in name else "-", color=color, lw=2.5, label=name)
for k, (name, color) in enumerate({"implicit": "#1b7f79", "unrolled": "#5c4b8b"}.items()):
    room.plot(BUDGETS, memory[k], "o-", color=color, lw=2.5, label=name)
    spread = median[k] - low[k], high[k] - median[k]
    clock.errorbar(BUDGETS, median[k], spread, fmt="o-", color=color, lw=2.5, capsize=4, label=name)
way.set(title="Way to the fixed point", xlabel="iteration", ylabel="residual |tanh(W z + x) - z|")
room.set(title=f"Saved for backward, {LANES} lanes", xlabel="iterations", ylabel="MiB", xticks=BUDGETS)
clock.set(title="Time of both passes", xlabel="iterations", ylabel="ms (median, quartiles)", xticks=BUDGETS)
for axis in (way, room, clock):
    axis.legend()
figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)
