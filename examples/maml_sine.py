"""Learn where gradient descent starts

Functional MAML on the classic tasks, each to fit a sine of random amplitude and phase from ten points. What is learned
is where the network starts: such that five gradient steps from there fit any of them. So the loss after the steps is
differentiated through the steps, in the initial weights, and all tasks of a meta-batch are one ``vmap``.

The inner optimizer is `sgd`, the outer one a chain of clipping and `adam` under a cosine schedule. The script checks
the meta-gradient against central differences, and that the loss after adaptation falls at least tenfold.

Finn, Abbeel and Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", 2017, section 5.1.
"""

import math
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from implicitdiff import adam, apply_updates, chain, clip_grad_norm, sgd, unroll
from implicitdiff.schedule import cosine

TASKS, SHOTS, INNER_STEPS, META_STEPS = 25, 10, 5, 1500
FIGURE = Path(__file__).with_suffix(".png")
Params = dict[str, Tensor]

torch.manual_seed(0)
began = time.perf_counter()
net = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
inner = sgd(lr=0.02)
outer = chain(clip_grad_norm(10.0), adam(lr=cosine(3e-3, META_STEPS)))


# %%
# Tasks
# -----
# A task has points to adapt to, and points to be judged on.
def draw_tasks(count: int) -> tuple[Tensor, ...]:
    amplitude = torch.empty(count, 1, 1).uniform_(0.1, 5.0)
    phase = torch.empty(count, 1, 1).uniform_(0.0, math.pi)
    x = torch.empty(2, count, SHOTS, 1).uniform_(-5.0, 5.0)
    y = amplitude * torch.sin(x - phase)
    return x[0], y[0], x[1], y[1]


def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    return ((functional_call(net, params, x) - y) ** 2).mean()


# %%
# Adaptation and the meta-loss
# ----------------------------
# Adaptation is a loop of steps, and the meta-loss is the loss after it, of all tasks at once.
def inner_step(carry: tuple[Params, object], x: Tensor, y: Tensor) -> tuple[Params, object]:
    params, state = carry
    updates, state = inner.update(grad(loss)(params, x, y), state)
    return apply_updates(params, updates), state


def adapt(params: Params, x: Tensor, y: Tensor) -> Params:
    return unroll(inner_step, INNER_STEPS)((params, inner.init(params)), x, y)[0]


def meta_loss(params: Params, tasks: tuple[Tensor, ...]) -> Tensor:
    return vmap(lambda x, y, x_new, y_new: loss(adapt(params, x, y), x_new, y_new))(*tasks).mean()


def check_meta_gradient(params: Params, tasks: tuple[Tensor, ...], h: float = 1e-5) -> float:
    """The relative error of the meta-gradient along a random direction, in float64."""
    params = {name: p.double() for name, p in params.items()}
    tasks = tuple(t.double() for t in tasks)
    direction = {name: torch.randn_like(p) for name, p in params.items()}
    slope = sum((g * direction[name]).sum() for name, g in grad(meta_loss)(params, tasks).items())
    ahead, behind = ({name: p + s * direction[name] for name, p in params.items()} for s in (h, -h))
    difference = (meta_loss(ahead, tasks) - meta_loss(behind, tasks)) / (2 * h)
    print(f"meta-gradient along a random direction {slope:.9f}, central difference {difference:.9f}")
    return abs(slope / difference - 1).item()


# %%
# Meta-training
# -------------
# First the check of the meta-gradient.
start = {name: p.detach() for name, p in net.named_parameters()}
unseen = draw_tasks(1000)
error = check_meta_gradient(start, draw_tasks(TASKS))
before = meta_loss(start, unseen).item()

params, state = start, outer.init(start)
for step in range(META_STEPS):
    meta_gradient = grad(meta_loss)(params, draw_tasks(TASKS))
    updates, state = outer.update(meta_gradient, state)
    params = apply_updates(params, updates)
    if (step + 1) % 300 == 0:
        print(f"{step + 1:5} meta-steps: loss on unseen tasks after adaptation {meta_loss(params, unseen):.3f}")
after = meta_loss(params, unseen).item()
print(f"before meta-training {before:.3f}, after {after:.3f}: {before / after:.0f} times lower")
print(f"{time.perf_counter() - began:.0f} s; figure: {FIGURE.name}")

assert error < 1e-6, f"the meta-gradient is off by {error:.1e}"
assert after < before / 10, f"the loss after adaptation fell only from {before} to {after}"

# %%
# The picture
# -----------
# Three unseen tasks.
figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True, layout="constrained")
grid = torch.linspace(-5, 5, 200)[:, None]
for axis, amplitude, phase in zip(axes, (1.0, 2.5, 4.5), (0.3, 1.4, 2.6), strict=True):
    x = torch.empty(SHOTS, 1).uniform_(-5.0, 5.0)
    y = amplitude * torch.sin(x - phase)
    axis.plot(grid, amplitude * torch.sin(grid - phase), color="0.6", label="task")
    axis.plot(grid, functional_call(net, params, grid), ":", color="C0", label="meta-learned, before adaptation")
    axis.plot(grid, functional_call(net, adapt(params, x, y), grid), color="C0", label=f"after {INNER_STEPS} steps")
    axis.plot(grid, functional_call(net, adapt(start, x, y), grid), "--", color="C1", label="from a random start")
    axis.plot(x, y, "k.", label=f"its {SHOTS} points")
    axis.set(title=f"amplitude {amplitude}, phase {phase}", xlabel="x")
axes[0].set_ylabel("y")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
figure.savefig(FIGURE, dpi=120)
