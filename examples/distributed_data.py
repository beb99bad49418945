"""Tune a penalty for each pixel, on data of several processes

Handwritten digits lie on several processes, and none has all of them. A logistic regression says whether a digit is
odd, with a penalty for each pixel. The penalties descend the loss of digits that are held out, through the fit.

Each process writes the loss of its own digits. `implicitdiff.distributed.psum_of` makes of this the loss of all digits,
a function that has the same values and derivatives on every process. The rest is as in one process: `newton` fits the
weights, the equation that they satisfy is differentiated, and Adam moves the penalties, on every process with the same
numbers. What the processes send each other is losses, gradients and products with Hessians; no digit.

    torchrun --nproc-per-node 2 examples/distributed_data.py

The script checks each gradient against that of one process that has all digits, and that the tuned penalties read
further digits better than the best single penalty. ``python examples/distributed_data.py`` is a world of one process.
"""

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.distributed as c10d
from sklearn.datasets import load_digits
from torch import Tensor
from torch.func import grad, grad_and_value, vmap
from torch.nn.functional import binary_cross_entropy_with_logits, pad

from implicitdiff import adam, apply_updates
from implicitdiff import distributed as dist
from implicitdiff.solvers import newton

TRAIN, HELD_OUT, PIXELS, STEPS = 200, 800, 65, 8  # one pixel is constant, for the bias
Data = dict[str, tuple[Tensor, Tensor]]
Summed = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)  # a process for each core, and not more threads than cores
if c10d.is_torchelastic_launched():  # by torchrun
    c10d.init_process_group("gloo")
else:  # a world of one process
    c10d.init_process_group("gloo", store=c10d.HashStore(), rank=0, world_size=1)
rank, ranks = c10d.get_rank(), c10d.get_world_size()


def show(line: str) -> None:
    if rank == 0:
        print(line, flush=True)


# %%
# The digits
# ----------
# Of each part a process has every second digit, if there are two processes.
pixels, classes = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
pixels, odd = pad(pixels / 16, (0, 1), value=1.0), (classes % 2).double()
order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
parts = {"train": order[:TRAIN], "held out": order[TRAIN:][:HELD_OUT], "test": order[TRAIN + HELD_OUT :]}
everything = {name: (pixels[rows], odd[rows]) for name, rows in parts.items()}
mine = {name: (x[rank::ranks], y[rank::ranks]) for name, (x, y) in everything.items()}

# %%
# The fit and the loss of the held-out digits
# -------------------------------------------
# ``summed`` is `psum_of` where the data are those of this process.


def loss_of(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(x @ weights, y, reduction="sum")


def held_out_loss(log_penalties: Tensor, data: Data, summed: Summed) -> tuple[Tensor, Tensor]:
    loss_of_all = summed(loss_of)

    def objective(weights: Tensor, log_penalties: Tensor) -> Tensor:
        return loss_of_all(weights, *data["train"]) / TRAIN + (log_penalties.exp() * weights**2).sum() / 2

    weights, _ = newton(grad(objective)).run(torch.zeros(PIXELS), log_penalties)
    return loss_of_all(weights, *data["held out"]) / HELD_OUT, weights


# %%
# One penalty for all pixels
# --------------------------
# The best of nine, by a `vmap` over the fits. It sends no more messages than one fit.
log_penalty = torch.linspace(-10.0, -2.0, 9)
shared = log_penalty[:, None].expand(-1, PIXELS)
losses, _ = vmap(held_out_loss, in_dims=(0, None, None))(shared, mine, dist.psum_of)
best = shared[losses.argmin()]

# %%
# A penalty for each pixel
# ------------------------
# Descent begins at the best one. An error in one process, in a fit or in a gradient, is raised in all.
log_penalties, optimizer, path, differences = best, adam(lr=0.4), [], []
state = optimizer.init(log_penalties)
value_and_gradient = grad_and_value(held_out_loss, has_aux=True)
show(f"{ranks} processes, {TRAIN} digits to fit\nstep  held out     test   gradient beside that of one process")
with dist.together():
    for step in range(STEPS + 1):
        gradient, (loss, weights) = value_and_gradient(log_penalties, mine, dist.psum_of)
        alone, _ = value_and_gradient(log_penalties, everything, lambda loss_of: loss_of)
        differences.append(((gradient - alone).norm() / alone.norm()).item())
        path.append((loss.item(), loss_of(weights, *everything["test"]).item() / len(parts["test"])))
        show(f"{step:4}{path[-1][0]:10.4f}{path[-1][1]:9.4f}   relative difference {differences[-1]:.1e}")
        updates, state = optimizer.update(gradient, state)
        tuned, log_penalties = log_penalties, apply_updates(log_penalties, updates)

assert max(differences) < 1e-12, "several processes have another gradient than one"
assert path[-1][0] < 0.8 * path[0][0], "the loss of the held-out digits should fall by a fifth"
assert path[-1][1] < path[0][1], "the loss of other digits should fall too"

# %%
# The picture
# -----------
# A bright pixel may have a large weight. The pixels at the left edge are empty in all digits, and keep their penalty.
if rank == 0:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
    left.plot([held_out for held_out, _ in path], "o-", color="#1b7f79", label="held out")
    left.plot([test for _, test in path], "o-", color="#d9683c", label="test")
    left.set(title="Loss of a digit", xlabel="step")
    left.legend(frameon=False)
    image = right.imshow((-tuned[:-1] / 2).view(8, 8), cmap="viridis")
    right.set(title="Freedom of a pixel, - log(penalty) / 2", xticks=(), yticks=())
    figure.colorbar(image)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)
c10d.destroy_process_group()
