"""Learn a predictive controller from an operator

A crane carries a container over the quay. Twice a second its controller plans the accelerations of the next six
seconds, within the limits of drive and speed, applies the first, and plans again: model-predictive control. Each plan
is a quadratic program. Its weights say how much distance, speed, sway and effort matter. Nobody can name the weights,
but there are records of an operator who drives well. Which weights explain the operator's moves?

The plan is a function of the weights, and `qp` differentiates that function, active limits included. So the question is
a nonlinear least-squares problem in three unknowns, and `levenberg_marquardt` solves it. All 120 recorded moments are
programs of one ``vmap``.

The script checks the plans against SciPy, and against the Riccati equation where no limit is active; the derivative
against central differences; the weights against those of the operator; and journeys from new positions against those
of a linear controller fitted to the same records.
"""

import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import scipy.optimize
import torch
from torch import Tensor
from torch.func import jacfwd, vmap

from implicitdiff.solvers import levenberg_marquardt, qp

STEP, HORIZON, DRIVE, SPEED = 0.5, 12, 0.4, 1.5  # s, steps, m/s^2, m/s
ROPE, GRAVITY, NOISE = 12.0, 9.81, 0.01  # m, m/s^2, m/s^2
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)  # operations as small as these lose time on several
torch.manual_seed(0)
began = time.perf_counter()

# %%
# The controller
# --------------
# A state is the distance from the target in m, the speed in m/s, the sway of the rope in rad, and its rate. ``theta``
# holds the logarithms of three weights; that of the distance is 1.


def move(state: Tensor, push: Tensor) -> Tensor:
    """Return the state after one step at the acceleration ``push``."""
    distance, speed, sway, rate = state
    speed, rate = speed + STEP * push, rate - STEP * (GRAVITY * sway + push) / ROPE
    return torch.stack([distance + STEP * speed, speed, sway + STEP * rate, rate])


def programs(states: Tensor, theta: Tensor) -> tuple[Tensor, ...]:
    """Return ``Q, c, G, h, l`` of: min u'Q u / 2 + c'u subject to l <= G u <= h, for the accelerations ``u``."""
    speed, sway, effort = theta.exp()
    A, B = jacfwd(move, (0, 1))(torch.zeros(4), torch.zeros(()))
    powers = [torch.eye(4)]
    for _ in range(HORIZON):
        powers.append(A @ powers[-1])
    lag = torch.arange(HORIZON)[:, None] - torch.arange(HORIZON)
    response = torch.where(lag[..., None] >= 0, (torch.stack(powers) @ B)[lag.clamp(min=0)], 0.0)  # time, push, state
    weighted = response * torch.stack([torch.ones(()), speed, sway, torch.zeros(())])
    Q = torch.einsum("tus,tvs->uv", weighted, response) + effort * torch.eye(HORIZON)
    c = torch.einsum("tus,tsr,nr->nu", weighted, torch.stack(powers[1:]), states)
    G = torch.cat([torch.eye(HORIZON), STEP * torch.ones(HORIZON, HORIZON).tril()])  # accelerations, gains of speed
    limit = torch.tensor([DRIVE, SPEED]).repeat_interleave(HORIZON)
    gained = states[:, 1:2] * torch.tensor([0.0, 1.0]).repeat_interleave(HORIZON)
    return Q, c, G, limit - gained, -limit - gained


def plan(states: Tensor, theta: Tensor) -> Tensor:
    Q, c, G, upper, lower = programs(states, theta)
    return vmap(lambda c, h, l: qp().run(None, Q, c, G=G, h=h, l=l)[0].primal)(c, upper, lower)  # noqa: E741


def control(states: Tensor, theta: Tensor) -> Tensor:
    return plan(states, theta)[:, 0]


# %%
# The records, and the fit
# ------------------------
# The recorded accelerations are those of the operator with an error of 0.01 m/s^2. The Jacobian of the fit also tells
# how far the unknowns are determined: its standard errors are printed beside them.


def draw(count: int) -> Tensor:
    return torch.cat([16 * torch.rand(count, 1) - 8, torch.randn(count, 3) * torch.tensor([0.5, 0.1, 0.1])], dim=1)


operator, guess = torch.tensor([2.0, 300.0, 10.0]).log(), torch.zeros(3)
states = draw(120)
pushes = control(states, operator) + NOISE * torch.randn(120)

fit = levenberg_marquardt(lambda theta: control(states, theta) - pushes, atol=1e-5)
learned, state = fit.run(guess)
jacobian = jacfwd(control, 1)(states, learned)
standard_error = NOISE * torch.linalg.inv(jacobian.T @ jacobian).diagonal().sqrt()
print(f"{'unknown':20}{'guess':>8}{'learned':>20}{'operator':>10}")
for i, name in enumerate(("weight of speed", "weight of sway", "weight of effort")):
    value, spread = learned[i].exp(), standard_error[i] * learned[i].exp()
    print(f"{name:20}{guess[i].exp():8.2f}{value:12.2f} +-{spread:5.2f}{operator[i].exp():10.2f}")
assert ((learned - operator).abs() < 3 * standard_error).all(), "an unknown is more than three standard errors off"

# %%
# Journeys from new positions
# ---------------------------
# For comparison, a controller that is linear up to the limits of the drive, with four gains fitted to the same records.
# A linear function cannot look ahead to the limit of speed.

linear = levenberg_marquardt(lambda gain: (states @ gain).clamp(-DRIVE, DRIVE) - pushes)
gain, _ = linear.run(torch.tensor([-0.01, -0.1, 0.0, 0.0]))


def drive(controller: Callable[[Tensor], Tensor], states: Tensor, steps: int = 40) -> Tensor:
    """Return the states of journeys of the operator's crane."""
    journey = [states]
    for _ in range(steps):
        journey.append(vmap(move)(journey[-1], controller(journey[-1])))
    return torch.stack(journey)


new, both = torch.tensor([[12.0, 0, 0, 0], [-10.0, 0, 0, 0], [-8.0, 0.5, 0.1, 0]]), torch.stack([operator, learned])
planned = drive(lambda s: vmap(control)(s.view(2, 3, 4), both).flatten(), new.repeat(2, 1))
journeys = {"operator": planned[:, :3], "learned": planned[:, 3:]}
journeys["linear"] = drive(lambda s: (s @ gain).clamp(-DRIVE, DRIVE), new)
apart = {name: (path - journeys["operator"])[..., 0].square().mean().sqrt().item() for name, path in journeys.items()}
fastest = {name: path[..., 1].abs().max().item() for name, path in journeys.items()}
print(f"\ncontroller   distance from the operator's journey   highest speed (limit {SPEED} m/s)")
for name in journeys:
    print(f"{name:10}{apart[name]:22.3f} m{fastest[name]:36.3f} m/s")
assert apart["learned"] < apart["linear"] / 5, "the learned controller should drive like the operator"
assert fastest["learned"] < SPEED + 1e-6 < fastest["linear"], "only the program knows the limit of speed"

# %%
# Three checks of the plans and their derivative
# ----------------------------------------------
# SciPy solves twenty of the programs. Near the target no limit is active, and the first acceleration is a linear
# function of the state. The Riccati recursion gives the gains of that function without a program.


def slsqp(c: np.ndarray, upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    options = {"constraints": scipy.optimize.LinearConstraint(G, lower, upper), "tol": 1e-12}
    return scipy.optimize.minimize(
        lambda u: (u @ Q @ u / 2 + c @ u, Q @ u + c), 0 * c, jac=True, method="SLSQP", **options
    ).x


Q, c, G, upper, lower = (part.numpy() for part in programs(states[:20], learned))
found = np.stack([slsqp(*rows) for rows in zip(c, upper, lower, strict=True)])
scipy_error = abs(found - plan(states[:20], learned).numpy()).max()

speed, sway, effort = learned.exp()
A, B = jacfwd(move, (0, 1))(torch.zeros(4), torch.zeros(()))
W = torch.diag(torch.stack([torch.ones(()), speed, sway, torch.zeros(())]))
P = W
for step in range(HORIZON):
    K = (B @ P @ A) / (effort + B @ P @ B)
    P = (W if step < HORIZON - 1 else 0 * W) + A.T @ P @ (A - torch.outer(B, K))
near = 0.01 * torch.randn(4)
riccati_error = (jacfwd(lambda s: control(s[None], learned)[0])(near) + K).abs().max().item()

shift = 1e-5 * torch.eye(3)
central = torch.stack([(control(states, learned + s) - control(states, learned - s)) / 2e-5 for s in shift], dim=1)
central_error = (torch.dist(jacobian, central) / central.norm()).item()
print(f"\nplans against SciPy (SLSQP): {scipy_error:.1e} m/s^2")
print(f"gains against the Riccati recursion: {riccati_error:.1e}")
print(f"derivative in the unknowns against central differences: {central_error:.1e}")
assert scipy_error < 1e-5, "the plans disagree with SciPy"
assert riccati_error < 1e-10, "the gains disagree with the Riccati recursion"
assert central_error < 1e-6, "the derivative disagrees with central differences"

# %%
# The picture
# -----------
plt.rcParams.update({"font.size": 12, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False})
plt.rcParams.update({"axes.titlesize": 13, "axes.titleweight": "bold", "axes.titlelocation": "left"})
figure, (where, fast, fitted) = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
time_axis = STEP * torch.arange(len(planned))
styles = {"operator": {"color": "0.7", "lw": 6}, "learned": {"color": "#1b7f79", "lw": 2}}
styles["linear"] = {"color": "#d9683c", "lw": 2, "ls": "--"}
for name, path in journeys.items():
    for axis, part in (where, 0), (fast, 1):
        axis.plot(time_axis, path[:, :2, part], **styles[name], label=[name, None])
for limit in (-SPEED, SPEED):
    fast.axhline(limit, color="#333333", lw=1, ls=":")
fast.text(20, SPEED + 0.04, "limit", ha="right")
fast.set(ylim=(-2.1, 1.9))
where.set(title="Two new journeys", xlabel="time [s]", ylabel="distance from the target [m]")
fast.set(title="Their speeds", xlabel="time [s]", ylabel="speed [m/s]")
where.legend()
for theta, name, color in (guess, "first guess", "#a397c9"), (learned, "learned", "#1b7f79"):
    fitted.plot(pushes, control(states, theta), "o", ms=5, color=color, mec="white", mew=0.5, label=name)
fitted.axline((0, 0), slope=1, color="#333333", lw=1, zorder=0)
fitted.set(title="The 120 records", xlabel="recorded acceleration [m/s²]", ylabel="planned acceleration [m/s²]")
fitted.legend()
figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)
print(f"figure drawn; {time.perf_counter() - began:.0f} s in total")
