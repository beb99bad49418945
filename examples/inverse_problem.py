"""Recover the ground from a few wells

Rain soaks into the ground between a river and a lake. The water table shows how well the ground conducts water, but
its height is known at 24 wells only, to a centimetre. Which conductivities of 240 cells of ground explain the wells?

A steady water table of height ``h`` above flat rock, in ground of conductivity ``K``, satisfies::

    div(K h grad h) + recharge = 0.

The equation is nonlinear in ``h``. `newton` finds the root ``h``, and the derivative of the root in all conductivities
follows from the equation: a gradient takes one linear solve with the transposed Jacobian, the adjoint equation, which
nobody has to derive. So the heights are a function of the ground like any other. `levenberg_marquardt` fits the ground
to the wells; the smoothness of a Gaussian process settles what the wells leave open.

The script checks the heights against a sparse solve of SciPy, the gradient against the adjoint equation written by hand
and against central differences, and the ground by twelve wells that were left out.
"""

import math
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import scipy.sparse
import torch
from scipy.sparse.linalg import spsolve
from torch import Tensor
from torch.func import grad, jacfwd, vmap

from implicitdiff.solvers import levenberg_marquardt, newton

ROWS, COLUMNS, CELL = 12, 20, 50.0  # cells of 50 m by 50 m
RIVER, LAKE, RECHARGE, NOISE = 12.0, 10.0, 1e-3, 0.01  # m, m, m/day, m
MEAN, SPREAD, LENGTH = math.log(10.0), 1.0, 150.0  # of the logarithm of a conductivity in m/day; in m
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)  # operations as small as these lose time on several
torch.manual_seed(0)
began = time.perf_counter()

# %%
# The water table as a function of the ground
# -------------------------------------------
# The flow between two cells is the product of the difference of their heights, their mean height and the harmonic mean
# of their conductivities. The river is on the left and the lake on the right; no water crosses the other two edges.


def flow(h: Tensor, h_next: Tensor, K: Tensor, K_next: Tensor) -> Tensor:
    return (h**2 - h_next**2) / (1 / K + 1 / K_next)


def balance(h: Tensor, log_K: Tensor) -> Tensor:
    """Return the water that enters each cell less the water that leaves it, in m^3/day."""
    K, edge = log_K.exp(), torch.ones(ROWS, 1)
    row = torch.cat([RIVER * edge, h, LAKE * edge], dim=1)
    K_row = torch.cat([K[:, :1], K, K[:, -1:]], dim=1)
    right = flow(row[:, :-1], row[:, 1:], K_row[:, :-1], K_row[:, 1:])
    down = torch.nn.functional.pad(flow(h[:-1], h[1:], K[:-1], K[1:]), (0, 0, 1, 1))
    return RECHARGE * CELL**2 - right.diff(dim=1) - down.diff(dim=0)


table = newton(balance)


def heights(log_K: Tensor) -> Tensor:
    return table.run(torch.full((ROWS, COLUMNS), RIVER), log_K)[0]


# %%
# The fit
# -------
# The unknowns ``code`` are independent standard normal numbers before anything is measured. The truth, an old bed of
# the river with gravel in it, is no sample of that process.

y, x = torch.meshgrid(CELL * (torch.arange(ROWS) + 0.5), CELL * (torch.arange(COLUMNS) + 0.5), indexing="ij")
truth = (4 + 36 * torch.exp(-(((y - 300 - 120 * torch.sin(x / 150)) / 80) ** 2))).log()
wells, left_out = torch.randperm(ROWS * COLUMNS)[:36].split([24, 12])
measured = heights(truth).flatten()[wells] + NOISE * torch.randn(24)

places = torch.stack([x.flatten(), y.flatten()], dim=1)
covariance = SPREAD**2 * torch.exp(-((torch.cdist(places, places) / LENGTH) ** 2) / 2)
factor = torch.linalg.cholesky(covariance + 1e-6 * torch.eye(ROWS * COLUMNS))


def ground(code: Tensor) -> Tensor:
    return MEAN + (factor @ code).view(ROWS, COLUMNS)


def errors(log_K: Tensor) -> Tensor:
    return (heights(log_K).flatten()[wells] - measured) / NOISE


fit = levenberg_marquardt(lambda code: torch.cat([errors(ground(code)), code]), rtol=1e-6)
code, state = fit.run(torch.zeros(ROWS * COLUMNS))
fitted = ground(code)
print(f"240 conductivities fitted in {int(state.iter_num)} iterations, {time.perf_counter() - began:.1f} s")

# %%
# What the wells tell
# -------------------
# The same linearisation gives the standard error of each logarithm. The best uniform ground is the comparison.

level, _ = levenberg_marquardt(lambda level: errors(level.expand(ROWS, COLUMNS))).run(torch.tensor(MEAN))
uniform = level.expand(ROWS, COLUMNS)
J = jacfwd(lambda code: errors(ground(code)))(code)
posterior = factor @ torch.linalg.solve(torch.eye(len(code)) + J.T @ J, factor.T)
spread = posterior.diagonal().sqrt().view(ROWS, COLUMNS)


def rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


predicted = {name: heights(log_K).flatten() for name, log_K in {"uniform": uniform, "fitted": fitted}.items()}
actual = heights(truth).flatten()
print("\nroot mean squared error        wells used   wells left out   log10 of conductivity")
for name, log_K in ("uniform", uniform), ("fitted", fitted):
    used, unused = (rms((predicted[name] - actual)[places]) for places in (wells, left_out))
    print(f"{name:26}{used:13.3f} m{unused:15.3f} m{rms(log_K - truth) / math.log(10):24.2f}")
assert rms((predicted["fitted"] - actual)[wells]) < 1.5 * NOISE, "the ground should explain the wells"
ratio = rms((predicted["fitted"] - actual)[left_out]) / rms((predicted["uniform"] - actual)[left_out])
assert ratio < 0.5, "the fitted ground should predict the wells that were left out"

# %%
# The gradient, by hand
# ---------------------
# The balance is linear in ``u = h^2``; Newton's method made no use of that. So ``M u = b``, with a sparse matrix ``M``
# of the conductances. For the sum of squares ``S`` of the wells the adjoint equation is ``M' v = dS/du``, and then
# ``dS = v'(db - dM u)``, summed over the faces between the cells.


def by_hand(log_K: np.ndarray, wells: np.ndarray, measured: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the heights and the gradient of the sum of squares in ``log_K``."""
    K, cells = np.exp(log_K.ravel()), np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS)
    one = np.concatenate([cells[:, :-1].ravel(), cells[:-1].ravel()])
    other = np.concatenate([cells[:, 1:].ravel(), cells[1:].ravel()])
    edge, outside = np.concatenate([cells[:, 0], cells[:, -1]]), np.repeat([RIVER**2, LAKE**2], ROWS)
    D = scipy.sparse.eye(len(K), format="csr")[one] - scipy.sparse.eye(len(K), format="csr")[other]
    C, C_edge = 1 / (1 / K[one] + 1 / K[other]), np.zeros(len(K))
    C_edge[edge] = K[edge] / 2
    b = np.full(len(K), RECHARGE * CELL**2)
    b[edge] += C_edge[edge] * outside
    M = (D.T @ scipy.sparse.diags(C) @ D + scipy.sparse.diags(C_edge)).tocsc()
    u = spsolve(M, b)
    h, slope = np.sqrt(u), np.zeros(len(K))
    slope[wells] = (h[wells] - measured) / NOISE**2 / (2 * h[wells])
    v = spsolve(M.T.tocsc(), slope)
    gradient, dC = np.zeros(len(K)), -(D @ v) * (D @ u) * C**2
    np.add.at(gradient, one, dC / K[one])
    np.add.at(gradient, other, dC / K[other])
    gradient[edge] += v[edge] * (outside - u[edge]) * C_edge[edge]
    return h.reshape(ROWS, COLUMNS), gradient.reshape(ROWS, COLUMNS)


def half_squares(log_K: Tensor) -> Tensor:
    return errors(log_K).square().sum() / 2


implicit = grad(half_squares)(uniform)
h, adjoint = by_hand(uniform.numpy(), wells.numpy(), measured.numpy())
shift = 1e-4 * torch.eye(ROWS * COLUMNS)[torch.randperm(ROWS * COLUMNS)[:20]].view(20, ROWS, COLUMNS)
central = (vmap(half_squares)(uniform + shift) - vmap(half_squares)(uniform - shift)) / 2e-4
slopes = (shift * implicit).sum((1, 2)) / 1e-4
height_error = abs(heights(uniform).numpy() - h).max()
adjoint_error = np.linalg.norm(implicit.numpy() - adjoint) / np.linalg.norm(adjoint)
central_error = (torch.dist(slopes, central) / central.norm()).item()
print(f"\nheights against the sparse solve: {height_error:.1e} m")
print(f"gradient against the adjoint equation by hand: {adjoint_error:.1e}")
print(f"twenty entries against central differences: {central_error:.1e}")
assert height_error < 1e-9, "the heights disagree with the sparse solve"
assert adjoint_error < 1e-9, "the gradient disagrees with the adjoint equation"
assert central_error < 1e-6, "the gradient disagrees with central differences"

# %%
# The picture
# -----------
plt.rcParams.update({"font.size": 12, "legend.frameon": False, "axes.titlesize": 13, "axes.titleweight": "bold"})
plt.rcParams.update({"axes.titlelocation": "left"})
figure, ((true, found), (doubt, tested)) = plt.subplots(2, 2, figsize=(13, 8), layout="constrained")
extent = (0, COLUMNS * CELL, 0, ROWS * CELL)
log10 = {"origin": "lower", "extent": extent, "cmap": "viridis", "norm": "log", "vmin": 3, "vmax": 45}
for axis, log_K, title in (true, truth, "Ground and water table [m]"), (found, fitted, "Recovered from 24 wells"):
    image = axis.imshow(log_K.exp(), **log10)
    lines = axis.contour(x, y, heights(log_K), levels=torch.arange(10, 13, 0.25), colors="white", linewidths=0.8)
    axis.clabel(lines, fontsize=9)
    axis.set_title(title)
    bar = figure.colorbar(image, ax=axis, label="conductivity [m/day]", ticks=[3, 10, 30], format="%d")
    bar.ax.minorticks_off()
image = doubt.imshow(spread.exp(), origin="lower", extent=extent, cmap="magma_r", vmin=1, vmax=2.7)
figure.colorbar(image, ax=doubt, label="factor", ticks=[1, 1.5, 2, 2.5])
doubt.set_title("Standard error of the recovered conductivity")
for axis in true, found, doubt:
    axis.plot(*places[wells].T, "o", color="white", mec="black", ms=6, label="well")
    axis.plot(*places[left_out].T, "x", color="#d9683c", ms=7, mew=2, label="left out")
    axis.set(xlabel="from the river [m]", ylabel="along the river [m]")
for name, color in ("uniform", "#8a8a8a"), ("fitted", "#1b7f79"):
    tested.plot(actual[left_out], predicted[name][left_out], "o", ms=8, color=color, mec="white", label=name)
tested.axline((11, 11), slope=1, color="#333333", lw=1, zorder=0)
tested.set(title="Wells that were left out", xlabel="height of the water [m]", ylabel="predicted height [m]")
tested.spines[["top", "right"]].set_visible(False)
tested.legend()
figure.legend(*true.get_legend_handles_labels(), loc="outside upper right", ncols=2)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)
print(f"figure drawn; {time.perf_counter() - began:.0f} s in total")
