"""Train a deep equilibrium network

A deep network keeps the activations of all its layers for the backward pass. A deep equilibrium network has one layer,
applied until it changes nothing, and keeps its activations once. Here such a network reads handwritten digits: the
hidden state of an image ``x`` is the ``z`` with::

    z = tanh(W z + U x + b).

`anderson` finds ``z``. The derivative is that of the equation, not of the iterations: the backward pass is one linear
solve, and keeps as much after 80 iterations as after 5. The solver captures the parameters, as a loss does.

With ``W = (1 - m) I - A'A + B - B'`` every image has exactly one equilibrium, whatever the parameters are. Plain
iteration need not find it, and with the trained parameters it does not. The script checks the test accuracy, the
gradient against that of the unrolled iterations, and the memory.

Bai, Kolter and Koltun, "Deep equilibrium models", 2019; Winston and Kolter, "Monotone operator equilibrium networks",
2020, for ``W``.
"""

import time
from collections.abc import Callable
from pathlib import Path
from weakref import WeakSet

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.functional import cross_entropy

from implicitdiff.solvers import Solver, anderson, broyden, fixed_point_iteration

HIDDEN, MARGIN, EPOCHS, BATCH = 64, 0.2, 12, 128
FIGURE = Path(__file__).with_suffix(".png")

torch.set_num_threads(1)  # operations as small as these lose time on several
torch.manual_seed(0)
began = time.perf_counter()
digits = load_digits()
pixels = digits.data.astype("float32") / 16
split = train_test_split(pixels, digits.target, test_size=0.25, stratify=digits.target, random_state=0)
images, test_images, labels, test_labels = map(torch.from_numpy, split)


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.A, self.B = (nn.Parameter(0.5 * torch.randn(HIDDEN, HIDDEN) / HIDDEN**0.5) for _ in "AB")
        self.U = nn.Linear(64, HIDDEN)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        # The symmetric part of I - W is m I + A'A.
        Wz = (1 - MARGIN) * z - self.A.T @ (self.A @ z) + (self.B - self.B.T) @ z
        return torch.tanh(Wz + self.U(x))


net = nn.ModuleDict({"cell": Cell(), "readout": nn.Linear(HIDDEN, 10)})


# %%
# Equilibria of a batch
# ---------------------
# As lanes of ``vmap`` images stop one by one, each with its own acceleration: no answer depends on the others. And the
# derivative factorises a matrix of HIDDEN rows for each, where one long fixed point would have BATCH times as many.
def equilibria(solver: Solver, x: Tensor, **options: object) -> tuple[Tensor, tuple[Tensor, ...]]:
    return vmap(solver.run)(x.new_zeros(len(x), HIDDEN), x, **options)


def loss(solver: Solver, x: Tensor, y: Tensor, **options: object) -> Tensor:
    return cross_entropy(net["readout"](equilibria(solver, x, **options)[0]), y)


# %%
# Training
# --------
# The solver is made once; it sees the parameters as they are at each call.
solver = anderson(net["cell"], rtol=1e-3, atol=1e-3)
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, EPOCHS)
for epoch in range(1, EPOCHS + 1):
    for rows in torch.randperm(len(images)).split(BATCH):
        optimizer.zero_grad()
        loss(solver, images[rows], labels[rows]).backward()
        optimizer.step()
    decay.step()
    with torch.no_grad():
        z, state = equilibria(solver, test_images)
        accuracy = (net["readout"](z).argmax(dim=1) == test_labels).double().mean().item()
    print(f"epoch {epoch:2}: test accuracy {accuracy:.3f}, at most {state.iter_num.max()} iterations")
print(f"trained in {time.perf_counter() - began:.0f} s")


# %%
# Memory
# ------
# What autograd keeps for the gradient of a batch, in MiB.
def memory(iterations: int, **options: object) -> float:
    kept: WeakSet[Callable[[], Tensor]] = WeakSet()

    def pack(tensor: Tensor) -> Callable[[], Tensor]:
        tensor = tensor.detach()  # a result that held its own graph would never be freed
        kept.add(unpack := lambda: tensor)
        return unpack

    exactly = anderson(net["cell"], rtol=0.0, atol=0.0, maxiter=iterations)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda unpack: unpack()):
        _value = loss(exactly, images[:BATCH], labels[:BATCH], **options)  # holds its graph until it is counted
    return sum({unpack().data_ptr(): unpack().nbytes for unpack in kept}.values()) / 2**20


budgets = [5, 10, 20, 40, 80]
unrolled = [memory(n, implicit_diff=False) for n in budgets]
checkpointed = [memory(n, implicit_diff=False, checkpoint_every=10) for n in budgets]
implicit = [memory(n) for n in budgets]
print("\niterations   unrolled, MiB   with checkpoints   implicit")
for row in zip(budgets, unrolled, checkpointed, implicit, strict=True):
    print("{:10} {:15.2f} {:18.2f} {:10.2f}".format(*row))

# %%
# The gradient, against unrolling
# -------------------------------
# In float64 and at equilibria as exact as they get.
net.double()
exact = anderson(net["cell"], rtol=0.0, atol=1e-11)
batch = images[:BATCH].double(), labels[:BATCH]
gradients = torch.autograd.grad(loss(exact, *batch), list(net.parameters()))
by_unrolling = torch.autograd.grad(loss(exact, *batch, implicit_diff=False), list(net.parameters()))
errors = [((a - b).norm() / b.norm()).item() for a, b in zip(gradients, by_unrolling, strict=True)]
print(f"\nimplicit gradient against unrolled: largest relative error of a parameter {max(errors):.1e}")

# %%
# Iterations
# ----------
# Residuals of three methods with the trained parameters, a row for each test image.
methods, histories = {"plain": fixed_point_iteration, "Broyden": broyden, "Anderson": anderson}, {}
for name, method in methods.items():
    forty = method(net["cell"], rtol=0.0, atol=0.0, maxiter=40)
    histories[name] = equilibria(forty, test_images.double(), keep_history=True)[1].history
medians = {name: history[:, -1].quantile(0.5) for name, history in histories.items()}

assert accuracy >= 0.95, f"the test accuracy is only {accuracy:.3f}"
assert max(errors) < 1e-4, "the implicit gradient disagrees with the unrolled one"
assert max(implicit) == min(implicit) < unrolled[0], "memory grows with the iterations"
assert max(medians["Anderson"], medians["Broyden"]) < 1e-3 * medians["plain"], "acceleration should help"

# %%
# The picture
# -----------
plt.rcParams.update({"font.size": 12, "axes.titlesize": 13, "axes.titleweight": "bold", "axes.titlelocation": "left"})
plt.rcParams.update({"axes.titlepad": 12, "axes.spines.top": False, "axes.spines.right": False})
figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained", width_ratios=[1.2, 1])
for (name, history), color in zip(histories.items(), ("#8a8a8a", "#d9683c", "#1b7f79"), strict=True):
    low, median, high = history.quantile(torch.tensor([0.1, 0.5, 0.9]).double(), dim=0)
    left.fill_between(range(41), low, high, color=color, alpha=0.15, lw=0)
    left.semilogy(median, color=color, lw=2.5, label=name)
left.set(title="Way to the equilibria of the test images", xlabel="iteration", ylabel="residual |f(z) - z|")
left.legend(title="median, and 10 to 90 %", frameon=False, loc="lower left")
curves = (unrolled, "unrolled"), (checkpointed, "unrolled, a checkpoint every 10"), (implicit, "implicit")
for (curve, name), color in zip(curves, ("#5c4b8b", "#a397c9", "#1b7f79"), strict=True):
    right.loglog(budgets, curve, "o-", color=color, lw=2.5)
    right.annotate(name, (80, curve[-1]), (0, 10), textcoords="offset points", ha="right", color=color)
right.set(title="Memory kept for the gradient of a batch", xlabel="iterations", ylabel="MiB")
right.minorticks_off()
right.set(xticks=budgets, xticklabels=budgets, yticks=[0.1, 1, 10], yticklabels=["0.1", "1", "10"])
figure.savefig(FIGURE, dpi=150)
print(f"\n{FIGURE.name} drawn; {time.perf_counter() - began:.0f} s in total")
