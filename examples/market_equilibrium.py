"""Choose a tax on a market in equilibrium

Five kinds of household earn from work, farmland and oil, and buy food, fuel and everything else. Burning fuel harms
all of them. A tax on fuel, paid back as the same dividend to every household, moves all prices and incomes. Who gains,
who loses, and which tax is best?

Prices are in equilibrium where demand equals supply. So prices and dividend are the root of a system of equations,
which `newton` finds, and they are functions of the tax: comparative statics, how the equilibrium moves with the tax, is
the derivative of the root. The best tax makes the derivative of welfare zero, a root once more: a second `newton`
differentiates through the first. One ``vmap`` solves 300 economies, whose elasticities and shares differ.

The script checks equilibria against SciPy, against the closed form for Cobb-Douglas households, and by Walras' law; the
derivative against central differences; the best tax against a search by SciPy and, where all households are alike,
against Pigou's rule.
"""

import time
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import scipy.optimize
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from implicitdiff.solvers import newton

HOUSEHOLDS, ECONOMIES = 5, 300
HARM = 0.15  # the loss of all utilities by a unit of fuel
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)  # operations as small as these lose time on several
torch.manual_seed(0)
began = time.perf_counter()

# %%
# The economy
# -----------
# The price of a unit of everything else is 1. The supply of the other two goods has a constant elasticity, zero for a
# fixed stock, and the owners of land and oil get the profit. Demand has a constant elasticity of substitution.


class Economy(NamedTuple):
    tastes: Tensor  # (households, 3): the shares of food, fuel and everything else at prices of 1
    work: Tensor  # (households,): income from work
    owned: Tensor  # (households, 2): the shares of farmland and of oil
    size: Tensor  # (2,): the supply of food and fuel at prices of 1
    supply: Tensor  # (2,): the elasticities of supply
    substitution: Tensor  # the elasticity of substitution


class Market(NamedTuple):
    supplied: Tensor  # (2,)
    paid: Tensor  # (3,): prices with tax
    income: Tensor  # (households,)
    bought: Tensor  # (households, 3)


def market(unknowns: Tensor, tax: Tensor, economy: Economy) -> Market:
    """Return the market at logarithms of the prices of food and fuel and a dividend, in equilibrium or not."""
    price, dividend = unknowns[:2].exp(), unknowns[2]
    supplied = economy.size * price**economy.supply
    income = economy.work + economy.owned @ (price * supplied / (1 + economy.supply)) + dividend
    paid = torch.stack([price[0], price[1] + tax, torch.ones(())])
    shares = economy.tastes * paid ** (1 - economy.substitution)
    bought = income[:, None] * shares / shares.sum(1, keepdim=True) / paid
    return Market(supplied, paid, income, bought)


def imbalance(unknowns: Tensor, tax: Tensor, economy: Economy) -> Tensor:
    """Return the relative excess of demand for food and fuel, and of the dividends over the revenue."""
    supplied, _, _, bought = market(unknowns, tax, economy)
    excess = bought[:, :2].sum(0) / supplied - 1
    return torch.stack([*excess, HOUSEHOLDS * unknowns[2] - tax * bought[:, 1].sum()])


prices = newton(imbalance)


def equilibrium(tax: Tensor, economy: Economy) -> Market:
    return market(prices.run(torch.zeros(3), tax, economy)[0], tax, economy)


# %%
# The best tax
# ------------
# Real income is income in units of a basket of goods. Welfare is the sum of its logarithms, less the harm.


def outcome(tax: Tensor, economy: Economy) -> tuple[Tensor, Tensor]:
    """Return the real income of the households and the fuel burnt."""
    supplied, paid, income, _ = equilibrium(tax, economy)
    power = 1 - economy.substitution
    return income / (economy.tastes @ paid**power) ** (1 / power), supplied[1]


def welfare(tax: Tensor, economy: Economy) -> Tensor:
    real_income, fuel = outcome(tax, economy)
    return real_income.log().sum() - HARM * fuel


best = newton(grad(welfare), backtracking=True)


def best_tax(economy: Economy) -> Tensor:
    return best.run(torch.tensor(0.5), economy)[0]


base = Economy(
    tastes=torch.tensor([[0.35, 0.14], [0.28, 0.14], [0.22, 0.13], [0.17, 0.11], [0.10, 0.07]]),
    work=torch.tensor([1.0, 1.6, 2.3, 3.2, 4.5]),
    owned=torch.tensor([[0.3, 0.0], [0.15, 0.0], [0.15, 0.1], [0.15, 0.2], [0.25, 0.7]]),
    size=torch.tensor([2.5, 1.5]),
    supply=torch.tensor([0.3, 1.0]),
    substitution=torch.tensor(0.6),
)
base = base._replace(tastes=torch.cat([base.tastes, 1 - base.tastes.sum(1, keepdim=True)], dim=1))
chosen = best_tax(base)
(before, _), (after, _) = outcome(torch.tensor(0.0), base), outcome(chosen, base)
print(f"best tax on a unit of fuel: {chosen:.3f}")
print("real incomes change by " + ", ".join(f"{100 * gain:+.1f} %" for gain in after / before - 1))

# %%
# Three hundred economies at once
# -------------------------------
# Beside each economy stands the same economy with households that are all alike.


def alike(economy: Economy) -> Economy:
    tastes, work, owned = (part.mean(-1 - (part.dim() > 2), keepdim=True).expand_as(part) for part in economy[:3])
    return economy._replace(tastes=tastes, work=work, owned=owned)


def uniform(low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(ECONOMIES, *shape)


tastes, owned = base.tastes * uniform(0.7, 1.3, HOUSEHOLDS, 3), base.owned * uniform(0.5, 1.5, HOUSEHOLDS, 2)
many = Economy(
    tastes=tastes / tastes.sum(2, keepdim=True),
    work=base.work * uniform(0.7, 1.3, HOUSEHOLDS),
    owned=owned / owned.sum(1, keepdim=True),
    size=base.size.expand(ECONOMIES, 2),
    supply=uniform(0.1, 1.5, 2),
    substitution=uniform(0.4, 0.95),
)
both = Economy(*map(torch.cat, zip(many, alike(many), strict=True)))
taxes, taxes_alike = vmap(best_tax)(both).split(ECONOMIES)
print(f"of {ECONOMIES} economies: from {taxes.min():.2f} to {taxes.max():.2f}, {time.perf_counter() - began:.0f} s")

# %%
# Checks of the equilibrium
# -------------------------
# No equation asks the market of everything else to clear. By Walras' law it does: purchases, and the costs of producing
# food and fuel, add up to the work. Cobb-Douglas households, with an elasticity of substitution of 1, spend fixed
# shares of their income: with fixed stocks and no tax the revenues of food and fuel solve a linear system.

state = vmap(equilibrium)(taxes, many)
cost = state.paid[:, :2] - torch.stack([torch.zeros(ECONOMIES), taxes], dim=1)
cost = (cost * state.supplied * many.supply / (1 + many.supply)).sum(1)
walras = (state.bought[:, :, 2].sum(1) + cost - many.work.sum(1)).abs().max().item()

douglas = base._replace(supply=torch.zeros(2), substitution=torch.tensor(1.0))
spent = base.tastes[:, :2].T
revenue = torch.linalg.solve(torch.eye(2) - spent @ base.owned, spent @ base.work)
closed_form = (equilibrium(torch.tensor(0.0), douglas).paid[:2] - revenue / base.size).abs().max().item()


def by_scipy(tax: float, economy: tuple[np.ndarray, ...]) -> tuple[np.ndarray, float]:
    """Return the prices and the dividend, and the welfare."""
    tastes, work, owned, size, supply, sigma = economy

    def excess(unknowns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        price, dividend = np.exp(unknowns[:2]), unknowns[2]
        income = work + owned @ (size * price ** (1 + supply) / (1 + supply)) + dividend
        paid = np.array([price[0], price[1] + tax, 1.0])
        spread = tastes @ paid ** (1 - sigma)
        bought = (income / spread) @ (tastes * paid**-sigma)
        utility = np.log(income / spread ** (1 / (1 - sigma))).sum() - HARM * bought[1]
        return np.append(bought[:2] - size * price**supply, HOUSEHOLDS * dividend - tax * bought[1]), utility

    x = scipy.optimize.root(lambda unknowns: excess(unknowns)[0], np.zeros(3), tol=1e-13).x
    return x, excess(x)[1]


some = [tuple(part[i].numpy() for part in many) for i in range(10)]
found = vmap(prices.run, (None, 0, 0))(torch.zeros(3), taxes, many)[0]
scipy_error = max(abs(by_scipy(taxes[i].item(), some[i])[0] - found[i].numpy()).max() for i in range(10))
print(f"\nmarket of everything else, which no equation asks to clear: {walras:.1e}")
print(f"prices of Cobb-Douglas households against the closed form: {closed_form:.1e}")
print(f"ten equilibria against SciPy (hybr): {scipy_error:.1e}")
assert max(walras, closed_form, scipy_error) < 1e-9, "an equilibrium is wrong"

# %%
# Checks of the best tax
# ----------------------
# Where households are alike, Pigou's rule says: the best tax is the harm of a unit of fuel in money. A unit of money
# adds 1 / income to the utility of a household, so the harm in money is the harm times the income.

pigou = HARM * vmap(equilibrium)(taxes_alike, alike(many)).income[:, 0]
pigou_error = (taxes_alike - pigou).abs().max().item()
searched = [scipy.optimize.minimize_scalar(lambda t, e=e: -by_scipy(t, e)[1], (0, 1)).x for e in some]
search_error = (torch.tensor(searched) - taxes[:10]).abs().max().item()
slope = jvp(lambda tax: outcome(tax, base)[0], (chosen,), (torch.tensor(1.0),))[1]
central = (outcome(chosen + 1e-5, base)[0] - outcome(chosen - 1e-5, base)[0]) / 2e-5
central_error = (torch.dist(slope, central) / central.norm()).item()
print(f"best taxes of households that are alike against Pigou's rule: {pigou_error:.1e}")
print(f"best taxes of ten economies against a search by SciPy: {search_error:.1e}")
print(f"derivative of real incomes in the tax against central differences: {central_error:.1e}")
assert pigou_error < 1e-9, "the best tax breaks Pigou's rule"
assert search_error < 1e-6, "the best tax disagrees with a search"
assert central_error < 1e-8, "the derivative disagrees with central differences"

# %%
# The picture
# -----------
plt.rcParams.update({"font.size": 12, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False})
plt.rcParams.update({"axes.titlesize": 13, "axes.titleweight": "bold", "axes.titlelocation": "left"})
figure, (cost, gains, rule) = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
grid, point = torch.linspace(0, 2, 81), torch.tensor(0.5)


def three_prices(tax: Tensor) -> Tensor:
    paid = equilibrium(tax, base).paid
    return torch.stack([paid[1], paid[1] - tax, paid[0]])


value, slope = jvp(three_prices, (point,), (torch.tensor(1.0),))
near = torch.tensor([-0.5, 0.8])
for i, (name, color) in enumerate({"fuel, with tax": "#d9683c", "fuel, as sold": "#5c4b8b", "food": "#1b7f79"}.items()):
    cost.plot(grid, vmap(three_prices)(grid)[:, i], color=color, lw=2.5, label=name)
    cost.plot(point + near, value[i] + slope[i] * near, "k--", lw=1.2, label=None if i else "derivative")
cost.set(title="Who bears the tax", xlabel="tax on a unit of fuel", ylabel="price [unit of everything else]")
cost.legend()
colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, HOUSEHOLDS))
change = 100 * (vmap(outcome, (0, None))(grid, base)[0] / before - 1)
for i, (name, color) in enumerate(zip(("poorest", "2nd", "3rd", "4th", "richest"), colors, strict=True)):
    gains.plot(grid, change[:, i], color=color, lw=2.5)
    gains.text(2.03, change[-1, i], name, color=color, va="center")
gains.axvline(chosen, color="#333333", lw=1, ls=":")
gains.text(chosen - 0.03, change.min(), "best tax", ha="right")
gains.axhline(0, color="#333333", lw=1)
gains.set(title="Who gains, with an equal dividend", xlabel="tax on a unit of fuel", ylabel="change of real income [%]")
points = rule.scatter(taxes_alike, taxes, c=many.substitution, s=28, cmap="viridis")
rule.axline((0.4, 0.4), slope=1, color="#333333", lw=1, zorder=0)
rule.text(0.7, 0.37, "line: no reason to redistribute", fontsize=11, ha="right")
rule.set(title=f"Best taxes in {ECONOMIES} economies", xlabel="if households were alike: Pigou's rule")
rule.set(ylabel="best tax on a unit of fuel")
figure.colorbar(points, ax=rule, label="elasticity of substitution")
figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)
print(f"figure drawn; {time.perf_counter() - began:.0f} s in total")
