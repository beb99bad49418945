"""Learn where fine-tuning starts

Implicit MAML learns where fine-tuning starts. The fine-tuned weights minimise the loss of a task plus the squared
distance to the meta-parameters, so they are a function of the meta-parameters, and its derivative follows from the
minimum, whatever found it: no step of the solver is kept.

Here the model is linear, so that all of it can be checked: the script computes the same meta-gradient from pure
functions, from a module that solves for its own parameters, by the closed form, and by central differences of the
whole fine-tuning.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from implicitdiff import SGD, apply_updates, custom_root, sgd
from implicitdiff.linear_solve import solve_normal_cg
from implicitdiff.nn import ImplicitMetaGradientModule

STEPS, LEARNING_RATE, REGULARISATION = 100, 2e-2, 1.0
torch.manual_seed(0)
x, w, b = torch.randn(20, 4), torch.randn(4, 1), torch.randn(1)
y = x @ w + b + 0.5 * torch.randn(20, 1)
linear_solve = solve_normal_cg(maxiter=5, atol=0)  # five unknowns, so five iterations are exact


def initial() -> nn.Linear:
    net = nn.Linear(4, 1)
    nn.init.ones_(net.weight)
    nn.init.zeros_(net.bias)
    return net


# %%
# As functions
# ------------
# The solver is written as it would be without derivatives: ``torch.autograd`` for its own gradients, updates in place.
# The decorator needs to know one thing, the gradient that is zero at the solution.
def objective(params: dict[str, Tensor], meta: dict[str, Tensor], x: Tensor, y: Tensor, net: nn.Module) -> Tensor:
    distance = sum(((params[name] - meta[name]) ** 2).sum() for name in params)
    return nn.functional.mse_loss(functional_call(net, params, (x,)), y) + REGULARISATION / 2 * distance


@custom_root(grad(objective), solve=linear_solve)
def fine_tune(params: dict[str, Tensor], meta: dict[str, Tensor], x: Tensor, y: Tensor, net: nn.Module):
    init, update = sgd(lr=LEARNING_RATE)
    state = init(params)
    for _ in range(STEPS):
        with torch.enable_grad():
            grads = torch.autograd.grad(objective(params, meta, x, y, net), list(params.values()))
        grads = dict(zip(params, grads, strict=True))
        updates, state = update(grads, state, inplace=True)
        params = apply_updates(params, updates, inplace=True)
    return params


net = initial()
meta = dict(net.named_parameters())
tuned = fine_tune(meta, meta, x, y, net)
functional_call(net, tuned, (x,)).mean().backward()
functional = torch.cat([net.weight.grad[0], net.bias.grad])
print("as functions         ", functional.numpy().round(4))


# %%
# As objects
# ----------
# What the module is given are meta-parameters, what it makes are its own, and ``solve`` brings these to the minimum of
# ``objective``. Afterwards they depend on the meta-parameters.
class FineTuned(ImplicitMetaGradientModule, linear_solve=linear_solve):
    def __init__(self, meta_net: nn.Module) -> None:
        super().__init__()
        self.meta_net = meta_net
        self.net = initial()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        pairs = zip(self.net.parameters(), self.meta_net.parameters(), strict=True)
        distance = sum(((p - q) ** 2).sum() for p, q in pairs)
        return nn.functional.mse_loss(self(x), y) + REGULARISATION / 2 * distance

    def solve(self, x: Tensor, y: Tensor) -> "FineTuned":
        params = tuple(self.parameters())
        optimizer = SGD(params, lr=LEARNING_RATE)
        with torch.enable_grad():
            for _ in range(STEPS):
                optimizer.zero_grad()
                self.objective(x, y).backward(inputs=params)
                optimizer.step()
        return self


meta_net = initial()
model = FineTuned(meta_net).solve(x, y)
model(x).mean().backward()
object_form = torch.cat([meta_net.weight.grad[0], meta_net.bias.grad])
print("as objects           ", object_form.numpy().round(4))

# %%
# The check
# ---------
# The minimum solves (2 X'X / n + I) v = 2 X'y / n + meta, with a column of ones in X.
X = torch.cat([x, torch.ones(20, 1)], dim=1).double()
H = 2 / 20 * X.T @ X + REGULARISATION * torch.eye(5, dtype=torch.float64)
exact = torch.linalg.solve(H, X.mean(0))
print("closed form          ", exact.numpy().round(4))


def mean_prediction(start: Tensor) -> Tensor:
    """The pipeline again, for central differences: in float64, with more steps, and with no derivative in it."""
    v = start.clone()
    for _ in range(20 * STEPS):
        v = v - LEARNING_RATE * (2 / 20 * X.T @ (X @ v - y[:, 0].double()) + REGULARISATION * (v - start))
    return (X @ v).mean()


shift, start = 1e-4 * torch.eye(5, dtype=torch.float64), torch.tensor([1.0, 1, 1, 1, 0], dtype=torch.float64)
central = torch.stack([(mean_prediction(start + d) - mean_prediction(start - d)) / 2e-4 for d in shift])
print("central differences  ", central.numpy().round(4))

expected = torch.tensor([-0.0369, 0.0248, 0.0347, 0.0067, 0.3156])
for found in functional, object_form:
    assert (found - expected).abs().max() < 6e-5, "the meta-gradient is another one"
    assert (found - exact).abs().max() < 1e-5, "the meta-gradient disagrees with the closed form"
assert (central - exact).abs().max() < 1e-8, "the closed form disagrees with central differences"

# %%
# The picture
# -----------
figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
bars = {"functions": functional, "objects": object_form, "closed form": exact, "central differences": central}
for i, (label, values) in enumerate(bars.items()):
    axis.bar(torch.arange(5) + 0.2 * i - 0.3, values.detach(), 0.19, label=label)
axis.axhline(0, color="#333333", lw=0.8)
axis.set(title="One meta-gradient, found four ways", ylabel="derivative of the mean prediction")
axis.set_xticks(range(5), [*(f"weight {i}" for i in range(4)), "bias"])
axis.legend(frameon=False)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)
