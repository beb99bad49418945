"""Put a quadratic program into a network

Every day a factory makes the amounts ``x`` of six products that earn most: it maximises ``margin'x - x'x / 2`` subject
to ``recipe x <= hours`` and ``x >= 0``. Known are the market, the hours of two machines and, with noise, the amounts;
unknown, how many hours a product takes and how margins depend on the market. A network and a matrix for the two feed
the program, and are trained on the distance between its solution and the amounts.

Checked are the solutions, by the conditions of Karush, Kuhn and Tucker and against SciPy, the gradient through them
against central differences, and unseen days against a larger network that predicts amounts without a program.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import scipy.optimize
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import mse_loss, softplus

from implicitdiff import adam, apply_updates
from implicitdiff.schedule import cosine
from implicitdiff.solvers import KKTSolution, qp

PRODUCTS, MARKET, NOISE, STEPS = 6, 3, 0.02, 400
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)  # operations as small as these lose time on several
torch.manual_seed(0)
recipe, sensitivity = 0.3 + 0.7 * torch.rand(2, PRODUCTS), torch.randn(MARKET, PRODUCTS)


def plan(margin: Tensor, recipe: Tensor, hours: Tensor) -> KKTSolution:
    G, h = torch.cat([recipe, -torch.eye(PRODUCTS)]), torch.cat([hours, torch.zeros(PRODUCTS)])
    return qp().run(None, torch.eye(PRODUCTS), -margin, G=G, h=h)[0]


plans = vmap(plan, in_dims=(0, None, 0))


def made(days: Tensor) -> Tensor:
    return plans(1 + torch.sin(days[:, 2:] @ sensitivity), recipe, days[:, :2]).primal


days = torch.cat([0.5 + 2 * torch.rand(1100, 2), 2 * torch.rand(1100, MARKET) - 1], dim=1)  # hours, then market
seen, unseen = days.split([100, 1000])
observed, truth = made(seen) + NOISE * torch.randn(100, PRODUCTS), made(unseen)

# %%
# Two models of a hundred days
# ----------------------------
# What is never made has no gradient: the margins begin high enough for every product to be made.


class Factory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.margin = nn.Sequential(nn.Linear(MARKET, 24), nn.Tanh(), nn.Linear(24, PRODUCTS))
        self.recipe = nn.Parameter(torch.zeros(2, PRODUCTS))

    def program(self, days: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return 1.5 + self.margin(days[:, 2:]), softplus(self.recipe), days[:, :2]

    def forward(self, days: Tensor) -> Tensor:
        return plans(*self.program(days)).primal


def loss(params: dict[str, Tensor], model: nn.Module, days: Tensor, amounts: Tensor) -> Tensor:
    return mse_loss(functional_call(model, params, (days,)), amounts)


network = nn.Sequential(nn.Linear(2 + MARKET, 64), nn.Tanh(), nn.Linear(64, PRODUCTS))
models, curves = {"with the program": Factory(), "network alone": network}, {}
print("on unseen days        root mean squared error   a machine overdrawn by at most")
for name, model in models.items():
    params, curves[name] = {key: p.detach() for key, p in model.named_parameters()}, []
    init, update = adam(cosine(0.03, STEPS))
    state = init(params)
    for step in range(STEPS + 1):
        if step % 20 == 0:
            curves[name].append(loss(params, model, unseen, truth).sqrt().item())
        updates, state = update(grad(loss)(params, model, seen, observed), state)
        params = apply_updates(params, updates)
    model.load_state_dict(params)
    overdrawn = (model(unseen) @ recipe.T - unseen[:, :2]).max()
    print(f"{name:20}{curves[name][-1]:25.4f}{overdrawn:23.3f} h")

# %%
# What the solutions and their gradient are worth
# -----------------------------------------------
# The conditions of optimality on all unseen days, written out.
factory = models["with the program"].requires_grad_(False)
margin, learned, hours = factory.program(unseen)
x, _, dual = plans(margin, learned, hours)
slack = torch.cat([hours - x @ learned.T, x], dim=1)
residuals = {
    "stationarity": x - margin + dual[:, :2] @ learned - dual[:, 2:],
    "primal feasibility": slack.clamp(max=0),
    "dual feasibility": dual.clamp(max=0),
    "complementarity": dual * slack,
}
for name, residual in residuals.items():
    print(f"{name:32}{residual.abs().max():.1e}")


def slsqp(m: np.ndarray, h: np.ndarray, R: np.ndarray) -> np.ndarray:
    limits = {"type": "ineq", "fun": lambda x: h - R @ x, "jac": lambda x: -R}
    options = {"bounds": [(0, None)] * PRODUCTS, "constraints": limits, "tol": 1e-15}
    return scipy.optimize.minimize(lambda x: (x @ x / 2 - m @ x, x - m), 0 * m, jac=True, **options).x


fifty = zip(margin[:50].numpy(), hours[:50].numpy(), x[:50].numpy(), strict=True)
scipy_error = max(abs(slsqp(m, h, learned.numpy()) - solution).max() for m, h, solution in fifty)

params = dict(factory.named_parameters())
directions = {name: torch.randn(5, *p.shape) for name, p in params.items()}
slopes = sum((directions[k] * g).flatten(1).sum(dim=1) for k, g in grad(loss)(params, factory, seen, observed).items())
moved = vmap(lambda d, h: loss({k: p + h * d[k] for k, p in params.items()}, factory, seen, observed), (0, None))
differences = (moved(directions, 1e-7) - moved(directions, -1e-7)) / 2e-7  # too small a step to meet a kink
gradient_error = (torch.dist(slopes, differences) / differences.norm()).item()
print(f"{'fifty against SciPy (SLSQP)':32}{scipy_error:.1e}\n{'gradient against differences':32}{gradient_error:.1e}")

assert max(residual.abs().max() for residual in residuals.values()) < 1e-7, "a solution violates its conditions"
assert scipy_error < 1e-6, "the solutions disagree with SciPy"
assert gradient_error < 1e-6, "the gradient through the program disagrees with central differences"
layer, alone = curves.values()
assert layer[-1] < layer[0] / 5, "training should reduce the error"
assert layer[-1] < min(alone) / 1.5, "the program should help on unseen days"

# %%
# The picture
# -----------
plt.rcParams.update({"font.size": 12, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False})
figure, (training, recipes, growth) = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
for (name, curve), color in zip(curves.items(), ("#1b7f79", "#8a8a8a"), strict=True):
    training.plot(range(0, STEPS + 1, 20), curve, "o-", color=color, lw=2.5, label=name)
training.set(title="Error on unseen days", xlabel="training step", ylabel="root mean squared error [units]")
for k, color in enumerate(("#1b7f79", "#d9683c")):
    recipes.scatter(recipe[k], learned[k], s=70, color=color, edgecolor="white", label=f"machine {k + 1}")
recipes.axline((0.6, 0.6), slope=1, color="#333333", lw=1, zorder=0)
recipes.set(title="Recipes, never observed", xlabel="true [hours for a unit]", ylabel="learned [hours for a unit]")
grid = torch.linspace(0.0, 3.5, 200)[:, None]
growing = torch.cat([grid, grid, unseen[0, 2:].expand(200, -1)], dim=1)
for k, (true, model) in enumerate(zip(made(growing).T, factory(growing).T, strict=True)):
    growth.plot(grid, true, color=f"C{k}", lw=2, label="made" if k == 0 else None)
    growth.plot(grid, model, "--", color=f"C{k}", lw=2, label="learned" if k == 0 else None)
growth.set(title="One market, more and more hours", xlabel="hours of each machine", ylabel="amounts [units]")
for axis in (training, recipes, growth):
    axis.legend()
figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)
