"""Learn from tasks on several processes

Five hundred hospitals each want to tell who falls ill, from twelve measurements of each patient. A hospital has 20
patients, too few for a logistic regression of its own. But hospitals are alike: some measurements mean about the same
everywhere, others mean something else in each place. What they have in common is a prior: a center and a pull towards
it, for each measurement. Each hospital fits its weights under the prior. The prior descends the loss of 20 more
patients of each hospital, through the fits.

The fits of all hospitals are one ``vmap``. Run the script on two processes:

    torchrun --nproc-per-node 2 examples/distributed_tasks.py

Then `implicitdiff.distributed.vmap` gives each process half of the hospitals, and to each of them the losses of all.
That is the only difference to a program of one process. The derivative is the same, on every process: the script checks
each gradient against ``torch.func.vmap`` in each process alone. It also checks that under the learned prior the loss of
further hospitals is as low as under the prior that all were drawn from. ``python examples/distributed_tasks.py`` is a
world of one process.
"""

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.distributed as c10d
from torch import Tensor
from torch.func import grad_and_value
from torch.nn.functional import binary_cross_entropy_with_logits

from implicitdiff import adam, apply_updates
from implicitdiff import distributed as dist
from implicitdiff.solvers import lbfgs

HOSPITALS, PATIENTS, MEASUREMENTS, STEPS = 500, 20, 12, 30
Prior = dict[str, Tensor]
Over = Callable[..., Callable[..., Tensor]]
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
# The hospitals
# -------------
# Each process draws all of them. The seed is the same, so they are the same, and `vmap` compares them.
torch.manual_seed(0)
spread = torch.logspace(-1.5, 0.5, MEASUREMENTS)
truth = {"center": torch.randn(MEASUREMENTS), "log_pull": -2 * spread.log()}


def draw(count: int) -> tuple[Tensor, Tensor]:
    weights = truth["center"] + spread * torch.randn(count, MEASUREMENTS)
    x = torch.randn(count, 2 * PATIENTS, MEASUREMENTS)
    return x, torch.bernoulli(torch.einsum("tpm,tm->tp", x, weights).sigmoid())


seen, unseen = draw(HOSPITALS), draw(HOSPITALS)

# %%
# A hospital, and the mean loss of all
# ------------------------------------
# What is written for one hospital knows nothing of processes. ``over`` is a `vmap`.


def objective(weights: Tensor, prior: Prior, x: Tensor, y: Tensor) -> Tensor:
    pulled = prior["log_pull"].exp() * (weights - prior["center"]) ** 2
    return binary_cross_entropy_with_logits(x @ weights, y, reduction="sum") + pulled.sum() / 2


fit = lbfgs(objective)


def loss_of_one(prior: Prior, x: Tensor, y: Tensor) -> Tensor:
    weights, _ = fit.run(prior["center"].detach(), prior, x[:PATIENTS], y[:PATIENTS])
    return binary_cross_entropy_with_logits(x[PATIENTS:] @ weights, y[PATIENTS:])


def mean_loss(prior: Prior, hospitals: tuple[Tensor, Tensor], over: Over) -> Tensor:
    return over(loss_of_one, in_dims=(None, 0, 0))(prior, *hospitals).mean()


# %%
# The descent
# -----------
# By Adam, on every process with the same numbers. An error in one process, here or in a fit, is raised in all.
first, optimizer, losses, differences = dict.fromkeys(truth, torch.zeros(MEASUREMENTS)), adam(lr=0.2), [], []
prior, state = first, optimizer.init(first)
value_and_gradient = grad_and_value(mean_loss)
show(f"{ranks} processes, {HOSPITALS} hospitals\nstep      loss   gradient beside that of one process")
with dist.together():
    for step in range(STEPS + 1):
        gradient, loss = value_and_gradient(prior, seen, dist.vmap)
        alone, _ = value_and_gradient(prior, seen, torch.func.vmap)
        differences += [((gradient[key] - alone[key]).norm() / alone[key].norm()).item() for key in prior]
        losses.append(loss)
        if step % 10 == 0:
            show(f"{step:4}{loss:10.4f}   relative difference {max(differences[-2:]):.1e}")
        updates, state = optimizer.update(gradient, state)
        learned, prior = prior, apply_updates(prior, updates)

others = {"first": first, "learned": learned, "true": truth}
others = {name: mean_loss(p, unseen, dist.vmap).item() for name, p in others.items()}
show("loss of other hospitals: " + ", ".join(f"{loss:.4f} by the {name} prior" for name, loss in others.items()))
assert max(differences) < 1e-12, "several processes have another gradient than one"
assert others["learned"] < others["true"] + 0.01, "the learned prior is worse than the one the hospitals are from"

# %%
# The picture
# -----------
# A pull of ``1 / spread^2`` is that of a normal distribution of this spread.
if rank == 0:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.8), layout="constrained")
    left.plot(losses, color="#1b7f79", lw=2)
    left.set(title="Loss of a patient", xlabel="step")
    right.axline((0, 0), (1, 1), color="0.7", zorder=0)
    right.scatter(spread, (-learned["log_pull"] / 2).exp(), color="#1b7f79")
    right.set(
        title="Spread, for each measurement", xlabel="of the hospitals", ylabel="learned", xscale="log", yscale="log"
    )
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)
c10d.destroy_process_group()
