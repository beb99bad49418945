"""Return to an earlier state of a network

A meta-optimizer replaces a module's parameters by tensors that remember how they came about. Several inner loops from
one start, such as the tasks of a meta-batch, need a way back: ``extract_state_dict`` before, ``recover_state_dict``
after.

The network and its MetaAdam take two steps, go back, and take two steps again, on the same data: the same numbers, for
each way of extracting. The three ways differ in what is differentiable in what, which is shown too.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_diabetes
from torch import nn
from torch.func import functional_call

from implicitdiff import MetaAdam, adam, apply_updates, elementary, extract_state_dict, module_clone, recover_state_dict

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
data, target = load_diabetes(return_X_y=True, scaled=True)
x, y = torch.from_numpy(20 * data), torch.from_numpy((target - target.mean()) / target.std())[:, None]
net = nn.Sequential(nn.Linear(10, 16, bias=False), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))
rate = torch.tensor(0.05, requires_grad=True)


def loss_of(module: nn.Module, rows: slice) -> torch.Tensor:
    # Of batch normalisation torch has wrong higher derivatives.
    with elementary():
        return nn.functional.mse_loss(module(x[rows]), y[rows])


def steps(module: nn.Module, optimizer: MetaAdam, n: int = 2) -> list[float]:
    """The losses before each of n steps, and after them."""
    losses = []
    for _ in range(n):
        loss = loss_of(module, slice(0, 200))
        losses.append(loss.item())
        optimizer.step(loss)
    return [*losses, loss_of(module, slice(0, 200)).item()]


# %%
# Two steps, twice
# ----------------
# The optimizer's moments are part of where to return to. Buffers, here those of batch normalisation, which every
# forward pass overwrites, come back as they were.
runs: dict[str, list[list[float]]] = {}
for by in "reference", "copy", "deepcopy":
    inner = MetaAdam(net, lr=rate)
    steps(net, inner)  # not from the very beginning
    start, moments = extract_state_dict(net, by=by), extract_state_dict(inner, by=by)
    runs[by] = []
    for _ in range(3):
        runs[by].append(steps(net, inner))
        mean = net[1].running_mean.clone()
        recover_state_dict(net, start)
        recover_state_dict(inner, moments)
        assert not torch.equal(net[1].running_mean, mean), "the buffers did not come back"
    print(f"by {by:10s}", *(f"{loss:.6f}" for loss in runs[by][0]), "  again", *(f"{v:.6f}" for v in runs[by][1]))

# %%
# What is differentiable in what
# ------------------------------
# From a reference or a copy the graph leads on to what was before, from a deep copy it does not: the learning rate of
# the steps after it is all that the loss depends on.
through: dict[str, float] = {}
for by in "reference", "copy", "deepcopy":
    module = module_clone(net, by="deepcopy")
    inner = MetaAdam(module, lr=rate)
    steps(module, inner)
    recover_state_dict(module, extract_state_dict(module, by=by))
    recover_state_dict(inner, extract_state_dict(inner, by=by))
    steps(module, inner)
    through[by] = torch.autograd.grad(loss_of(module, slice(200, None)), rate)[0].item()
    print(f"by {by:10s} derivative of the validation loss in the learning rate {through[by]:.6f}")

# %%
# The same with pure functions
# ----------------------------
# There is nothing to go back from: a state is a value, and the start is still there.
origin = extract_state_dict(net, by="deepcopy")


def validation_loss(rate: torch.Tensor, n: int) -> torch.Tensor:
    init, update = adam(lr=rate)
    params = {name: p.detach() for name, p in origin.params.items()}
    state = init(params)

    def loss(params: dict[str, torch.Tensor], rows: slice) -> torch.Tensor:
        buffers = {name: buffer.clone() for name, buffer in origin.buffers.items()}
        return nn.functional.mse_loss(functional_call(net, (params, buffers), (x[rows],)), y[rows])

    for _ in range(n):
        updates, state = update(torch.func.grad(loss)(params, slice(0, 200)), state)
        params = apply_updates(params, updates)
    return loss(params, slice(200, None))


functional = torch.func.grad(validation_loss)(rate.detach(), 4).item()
above, below = (validation_loss(rate.detach() + d, 4).item() for d in (1e-5, -1e-5))
central = (above - below) / 2e-5
print(f"as functions                                                 {functional:.6f}")
print(f"central differences                                          {central:.6f}")

for by, losses in runs.items():
    assert losses[0] == losses[1] == losses[2], f"extracted by {by}, the steps were others"
assert abs(through["reference"] - functional) < 1e-10, "objects and functions disagree"
assert abs(through["copy"] - functional) < 1e-10, "a copy is not differentiable like the original"
assert abs(functional - central) < 1e-6, "the derivative disagrees with central differences"
assert abs(through["deepcopy"] - functional) > 1e-3, "a deep copy should cut the graph"

# %%
# The picture
# -----------
rates = torch.linspace(0.0, 0.12, 60)
figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
for n, color in zip((0, 2, 4), ("#999999", "#d9683c", "#1b7f79"), strict=True):
    axis.plot(rates, [validation_loss(r, n).item() for r in rates], color=color, lw=2.5, label=f"after {n} steps")
at = validation_loss(rate.detach(), 4).item()
near = torch.tensor([0.03, 0.07])
axis.plot(near, at + functional * (near - rate.item()), color="#333333", lw=1.5, ls="--", label="its derivative")
axis.plot([rate.item()], [at], "o", color="#333333")
axis.set(title="Validation loss after steps of Adam, by the rate", xlabel="learning rate", ylabel="mean squared error")
axis.legend(frameon=False)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)
