"""One penalty per feature

A logistic regression with a single L2 penalty has one number to tune, and a grid finds it. For a penalty for each of
thirty features it takes the gradient of the validation loss, which knows them only through the weights of a solver.

``custom_root`` supplies that gradient. The solver below is Newton's method, and its steps are not what is
differentiated: the weights satisfy ``grad(objective)(weights, ...) == 0``, and this alone says how they move with the
penalties. A fold is a 0/1 mask over the samples, so that all five are solved, and differentiated, as one ``vmap``.

The script checks the weights against SciPy's, the gradient against central differences, and the penalties on patients
that the tuning never saw. The best single penalty is shown too, as thirty numbers can learn five folds too well.
"""

import time
from pathlib import Path

import matplotlib
import numpy as np
import scipy.optimize
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import StratifiedKFold, train_test_split
from torch import Tensor
from torch.func import grad, grad_and_value, vmap
from torch.nn.functional import softplus

from implicitdiff import custom_root

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDS, NEWTON_STEPS, OUTER_STEPS, LEARNING_RATE = 5, 20, 100, 0.1
FIGURE = Path(__file__).with_suffix(".png")
torch.set_default_dtype(torch.float64)
began = time.perf_counter()

# The data: 455 patients to tune on, and 114 that nothing is tuned, scaled or chosen on.
cancer = load_breast_cancer()
split = train_test_split(cancer.data, 2.0 * cancer.target - 1, test_size=0.2, stratify=cancer.target, random_state=0)
raw, raw_test, y, y_test = map(torch.from_numpy, split)
center, scale = raw.mean(0), raw.std(0)
X, X_test = (torch.nn.functional.pad((rows - center) / scale, (0, 1), value=1.0) for rows in (raw, raw_test))
held_out = torch.zeros(FOLDS, len(y))
for mask, (_, rows) in zip(held_out, StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(raw, y), strict=True):
    mask[rows] = 1.0
fitted = 1.0 - held_out


# %%
# The problem (the last weight is the intercept) and Newton's method, of a fixed number of steps for a whole batch.
def log_loss(weights: Tensor, mask: Tensor) -> Tensor:
    return (mask * softplus(-y * (X @ weights))).sum() / mask.sum()


def objective(weights: Tensor, log_penalty: Tensor, mask: Tensor) -> Tensor:
    return log_loss(weights, mask) + 0.5 * (log_penalty.exp() * weights[:-1] ** 2).sum()


@custom_root(grad(objective))
def fit(weights: Tensor, log_penalty: Tensor, mask: Tensor) -> Tensor:
    penalty = torch.nn.functional.pad(log_penalty.exp(), (0, 1))
    for _ in range(NEWTON_STEPS):
        p = torch.sigmoid(X @ weights)
        slope = X.T @ (mask * (p - (y + 1) / 2)) / mask.sum() + penalty * weights
        curvature = X.T @ ((mask * p * (1 - p))[:, None] * X) / mask.sum() + torch.diag(penalty)
        weights = weights - torch.linalg.solve(curvature, slope)
    return weights


def validation_loss(log_penalty: Tensor) -> Tensor:
    weights = vmap(fit, in_dims=(None, None, 0))(torch.zeros(31), log_penalty, fitted)
    return vmap(log_loss)(weights, held_out).mean()


def test_loss(log_penalty: Tensor) -> Tensor:
    weights = fit(torch.zeros(31), log_penalty, torch.ones_like(y))
    return softplus(-y_test * (X_test @ weights)).mean()


# %%
# Tune all thirty from the same start. A grid finds one penalty that all features share.
start = torch.full((30,), 0.1).log()
log_penalty, path, losses = start.clone(), [], []
adam = torch.optim.Adam([log_penalty], lr=LEARNING_RATE)
for step in range(OUTER_STEPS + 1):
    log_penalty.grad, loss = grad_and_value(validation_loss)(log_penalty)
    path.append(log_penalty.clone())
    losses.append(loss.item())
    if step % 20 == 0:
        print(f"step {step:3d}   validation loss {loss:.5f}   largest derivative {log_penalty.grad.abs().max():.1e}")
    adam.step()
tuned = path[-1]
test_losses = vmap(test_loss)(torch.stack(path))  # every refit along the path, in one batch

grid = torch.linspace(-9, 0, 37)[:, None].expand(-1, 30)
shared = grid[vmap(validation_loss)(grid).argmin()]
print("\nlog-loss                     validation     test")
for label, choice in ("every penalty at 0.1", start), (f"best shared, {shared[0].exp():.4f}", shared), ("tuned", tuned):
    print(f"{label:26s} {validation_loss(choice):12.5f} {test_loss(choice):8.5f}")

# %%
# The solver against SciPy, which is given the first fold in NumPy and a gradient written by hand.
A, s, lam = X[fitted[0] > 0].numpy(), y[fitted[0] > 0].numpy(), np.append(tuned.exp().numpy(), 0.0)
scipy_fit = scipy.optimize.minimize(
    lambda w: np.logaddexp(0, -s * (A @ w)).mean() + lam @ w**2 / 2,
    np.zeros(31),
    jac=lambda w: -A.T @ (s / (1 + np.exp(s * (A @ w)))) / len(s) + lam * w,
    method="L-BFGS-B",
    options={"gtol": 1e-11, "ftol": 0.0, "maxiter": 20_000, "maxfun": 40_000, "maxcor": 31},
)
ours = fit(torch.zeros(31), tuned, fitted[0]).numpy()
weight_error = abs(ours - scipy_fit.x).max()
print(f"\nweights of one fold against SciPy's L-BFGS-B: largest difference {weight_error:.1e}")

# The gradient against central differences of the pipeline: sixty cross-validations in one batch.
shift = 1e-4 * torch.eye(30)
implicit = grad(validation_loss)(start)
central = (vmap(validation_loss)(start + shift) - vmap(validation_loss)(start - shift)) / 2e-4
relative = (implicit - central).abs() / central.abs()
print("\nderivative in the log-penalty of       implicit     central difference    relative error")
for j in range(0, 30, 5):
    print(f"{cancer.feature_names[j]:28s} {implicit[j]:18.10e} {central[j]:22.10e} {relative[j]:17.1e}")
print(f"largest relative error of all thirty: {relative.max():.1e}")

# %%
# The picture, and the claims.
KEPT, SUPPRESSED, INK = "#1b7f79", "#d9683c", "#333333"
plt.rcParams.update({"font.size": 12, "axes.titlesize": 13, "axes.titleweight": "bold", "axes.titlelocation": "left"})
plt.rcParams.update({"axes.titlepad": 12, "axes.spines.top": False, "axes.spines.right": False, "text.color": INK})
panels = [["loss", "penalty", "gradient"], ["loss", "penalty", "error"]]
figure, at = plt.subplot_mosaic(
    panels, figsize=(16, 7.2), layout="constrained", width_ratios=[1, 1.1, 1], height_ratios=[3, 1]
)
figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)

curves = ("test", test_losses, test_loss, SUPPRESSED), ("validation", losses, validation_loss, KEPT)
for label, curve, loss_of, color in curves:
    at["loss"].plot(curve, color=color, lw=2.5)
    at["loss"].text(OUTER_STEPS, curve[-1] + 0.001, label, color=color, ha="right", va="bottom")
    at["loss"].axhline(loss_of(shared), color=color, lw=1.2, ls=":")
at["loss"].text(OUTER_STEPS, validation_loss(shared) - 0.001, "dotted: the best\nshared penalty", ha="right", va="top")
at["loss"].set(title="Loss while thirty penalties are tuned", xlabel="outer step", ylabel="log-loss", ylim=(0.05, None))

order = tuned.argsort(descending=True)
colors = [KEPT if tuned[j] < start[j] else SUPPRESSED for j in order]
at["penalty"].barh(range(30), (tuned.exp() - start.exp())[order], left=start.exp(), color=colors, height=0.74)
at["penalty"].axvline(0.1, color=INK, lw=1)
at["penalty"].text(0.13, 29, "kept:\npenalty lowered", color=KEPT, va="top")
at["penalty"].text(0.08, 0, "suppressed:\npenalty raised", color=SUPPRESSED, ha="right")
at["penalty"].set(xscale="log", title="What each feature ends with", xlabel="penalty, from 0.1", ylim=(-0.7, 29.7))
at["penalty"].set_yticks(range(30), cancer.feature_names[order], fontsize=10)
at["penalty"].tick_params(axis="y", length=0)

at["gradient"].axline((0, 0), slope=1, color=INK, lw=1, zorder=0)
at["gradient"].scatter(1e3 * central, 1e3 * implicit, s=70, color=KEPT, edgecolor="white", lw=0.8)
at["gradient"].set(title="Thirty derivatives, each found twice", aspect="equal", adjustable="datalim")
at["gradient"].set(xlabel="central difference [1e-3]", ylabel="implicit [1e-3]")
at["error"].scatter(1e3 * central, relative, s=30, color=KEPT, edgecolor="white", lw=0.6)
at["error"].set(yscale="log", ylim=(1e-11, 1e-7), xlabel="central difference [1e-3]", ylabel="relative error")
figure.savefig(FIGURE, dpi=200)
print(f"\n{FIGURE.name} drawn; {time.perf_counter() - began:.1f} s in total")

assert weight_error < 1e-5, "the solver disagrees with SciPy"
assert relative.max() < 1e-7, "the implicit gradient disagrees with central differences"
assert losses[-1] < validation_loss(shared) < losses[0], "thirty penalties should beat one on validation"
assert test_losses[-1] < test_losses[0], "tuning should help patients it never saw"
