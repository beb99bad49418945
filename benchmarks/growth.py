"""How the time of a solution with its gradient grows: with unknowns, with problems of a batch, with parameters.

Each curve is beside the same computation by hand in torch, which has to give the same numbers before its time counts.
Over the last decade of sizes a line is fitted in log-log; its slope may be at most the exponent that the method says,
and MARGIN more, or this fails. Times are medians of process time of turns, on one thread.

    python benchmarks/growth.py [--save] [curve ...]
    python benchmarks/growth.py --draw

With ``--save`` the results go to ``benchmarks/growth.json`` and into the figure ``docs/_static/growth.svg``, which
``--draw`` makes again without measuring.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import _report
import numpy as np
import torch
from measure import timed
from torch import Tensor
from torch.func import grad, vmap

from implicitdiff import custom_root, solvers
from implicitdiff import linear_solve as ls

RESULTS = Path(__file__).with_name("growth.json")
FIGURE = Path(__file__).parents[1] / "docs/_static/growth.svg"
# Between two runs a slope moves by about a tenth, since larger arrays leave one cache after another.
MARGIN = 0.2
# Seconds of process time that the turns of one entry take together, about.
BUDGET, TURNS = 0.5, 5
F64, F32 = torch.float64, torch.float32

Gradient = Callable[[], Tensor]


class Curve(NamedTuple):
    """What grows.

    Attributes:
        title: what is computed.
        axis: what the sizes count.
        make: ``make(size) -> (ours, by_hand)``.
        sizes: ascending, some of them within the last decade.
        exponent: of the time, as the method says.
        rtol: how near to each other both have to come, relative to the norm.
    """

    title: str
    axis: str
    make: Callable[[int], tuple[Gradient, Gradient]]
    sizes: tuple[int, ...]
    exponent: float
    rtol: float = 1e-7


def random(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def diagonal_plus_rank_one(n: int) -> tuple[Gradient, Gradient]:
    """``(D + u u') x = theta`` with five distinct numbers in D, which take ten iterations of CG at most."""
    d, u, theta = 1.0 + torch.arange(n, dtype=F64) % 5, random(n) / n**0.5, torch.ones(n, dtype=F64)
    solve = ls.solve_cg(rtol=1e-10)

    @custom_root(lambda x, theta: d * x + u * (u @ x) - theta, solve=solve)
    def decorated(init: None, theta: Tensor) -> Tensor:
        return solve(lambda x: d * x + u * (u @ x), theta)

    def ours() -> Tensor:
        leaf = theta.detach().requires_grad_()
        return torch.autograd.grad(decorated(None, leaf).square().sum(), leaf)[0]

    def conjugate_gradients(b: Tensor) -> Tensor:
        x, r = torch.zeros_like(b), b
        p, rho, target = r, r @ r, 1e-20 * (b @ b)
        while rho > target:
            q = d * p + u * (u @ p)
            alpha = rho / (p @ q)
            x, r = x + alpha * p, r - alpha * q
            rho, before = r @ r, rho
            p = r + rho / before * p
        return x

    return ours, lambda: conjugate_gradients(2 * conjugate_gradients(theta))


def dense(n: int) -> tuple[Gradient, Gradient]:
    """``A x = theta`` by a factorisation, as is the gradient."""
    a, theta = torch.eye(n, dtype=F64) + 0.5 * random(n, n) / n**0.5, torch.ones(n, dtype=F64)
    decorated = custom_root(lambda x, theta: a @ x - theta, solve=ls.solve_auto())(
        lambda init, theta: torch.linalg.solve(a, theta)
    )

    def ours() -> Tensor:
        leaf = theta.detach().requires_grad_()
        return torch.autograd.grad(decorated(None, leaf).square().sum(), leaf)[0]

    def by_hand() -> Tensor:
        return torch.linalg.solve(a.mT, 2 * torch.linalg.solve(a, theta))

    return ours, by_hand


def ridge_lanes(lanes: int, rows: int = 8, columns: int = 5) -> tuple[Gradient, Gradient]:
    """``vmap(grad)`` of a ridge regression in its penalty."""
    x, y = random(lanes, rows, columns), random(lanes, rows)
    penalty, identity = torch.ones(lanes, dtype=F64), torch.eye(columns, dtype=F64)

    @custom_root(lambda w, p, x, y: x.mT @ (x @ w - y) + p * w, solve=ls.solve_cholesky())
    def decorated(init: None, p: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return torch.linalg.solve(x.mT @ x + p * identity, x.mT @ y)

    def loss(p: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return decorated(None, p, x, y).square().sum()

    def by_hand() -> Tensor:
        factor = torch.linalg.cholesky(x.mT @ x + penalty[:, None, None] * identity)
        w = torch.cholesky_solve(x.mT @ y[..., None], factor)
        return -2 * (w * torch.cholesky_solve(w, factor)).sum((1, 2))

    return lambda: vmap(grad(loss))(penalty, x, y), by_hand


def newton_lanes(lanes: int, n: int = 5) -> tuple[Gradient, Gradient]:
    """A vmapped run of `newton` with its gradient, of ``x + x^3 / 10 + W x = b``.

    W and b are bounded, so that the problem with the most iterations does not have more the more problems there are.
    """
    w, b, identity = 0.2 * random(lanes, n, n).tanh(), random(lanes, n).tanh(), torch.eye(n, dtype=F64)
    zero = torch.zeros(n, dtype=F64)
    solver = solvers.newton(lambda x, w, b: x + 0.1 * x**3 + w @ x - b, rtol=0.0, atol=1e-10)

    def loss(b: Tensor, w: Tensor) -> Tensor:
        return solver.run(zero, w, b)[0].sum()

    def by_hand() -> Tensor:
        x = torch.zeros_like(b)
        while True:
            r = x + 0.1 * x**3 + (w @ x[..., None])[..., 0] - b
            jacobian = identity + torch.diag_embed(0.3 * x**2) + w
            if bool((r.square().sum(-1) <= 1e-20).all()):
                return torch.linalg.solve(jacobian.mT, torch.ones_like(x))
            x = x - torch.linalg.solve(jacobian, r)

    return lambda: vmap(grad(loss))(b, w), by_hand


def parameters(count: int) -> tuple[Gradient, Gradient]:
    """The gradient of the real root of ``x + x^3 = |theta|^2``, in theta."""
    theta = random(count, dtype=F32) / count**0.5

    def root(s: float) -> float:
        half = (s * s / 4 + 1 / 27) ** 0.5
        return float(np.cbrt(s / 2 + half) + np.cbrt(s / 2 - half))

    @custom_root(lambda x, theta: x + x**3 - theta @ theta)
    def decorated(init: None, theta: Tensor) -> Tensor:
        return theta.new_tensor(root(float(theta @ theta)))

    def ours() -> Tensor:
        leaf = theta.detach().requires_grad_()
        return torch.autograd.grad(decorated(None, leaf), leaf)[0]

    def by_hand() -> Tensor:
        x = root(float(theta @ theta))
        return theta * (2 / (1 + 3 * x * x))

    return ours, by_hand


def sizes(first: int, last: int) -> tuple[int, ...]:
    """Two of a decade."""
    steps = round(2 * np.log10(last / first))
    return tuple(round(first * 10 ** (i / 2)) for i in range(steps + 1))


CURVES = {
    "cg": Curve("CG, products of cost n", "unknowns", diagonal_plus_rank_one, sizes(10, 10**5), 1),
    "dense": Curve("dense, solve_auto", "unknowns", dense, (10, 30, 100, 200, 500, 1000, 2000), 3),
    "cholesky": Curve("Cholesky", "problems of 5 unknowns in a batch", ridge_lanes, sizes(1, 10**5), 1),
    "newton": Curve("newton", "problems of 5 unknowns in a batch", newton_lanes, sizes(1, 10**5), 1),
    "parameters": Curve("a scalar root", "parameters", parameters, sizes(10, 10**8), 1, 1e-4),
}

# --- measuring --------------------------------------------------------------------------------------------------------


def measure(curve: Curve, size: int) -> dict[str, list[float]]:
    """The quartiles of the milliseconds, ours and by hand, if both are the same."""
    ours, by_hand = curve.make(size)
    found, expected = ours(), by_hand()
    error = float((found - expected).norm() / expected.norm())
    if not error <= curve.rtol:
        raise AssertionError(f"{curve.title}, {size} {curve.axis}: off by {error:.1e}, above {curve.rtol:.0e}")
    return _report.rounded(timed({"implicitdiff": ours, "by hand": by_hand}, BUDGET, TURNS))


def slope(sizes: list[int], ms: list[float]) -> float:
    """Of the line through the last decade in log-log."""
    last = [(size, t) for size, t in zip(sizes, ms, strict=True) if size >= max(sizes) / 10.001]
    return float(np.polyfit(*np.log(np.array(last).T), 1)[0])


def result(curve: Curve) -> dict[str, Any]:
    print(f"\n{curve.title}, by {curve.axis}\n\n{'':>12s} {'ours, ms':>12s} {'by hand, ms':>12s} {'ratio':>8s}")
    ms: dict[str, list[float]] = {"implicitdiff": [], "by hand": []}
    for size in curve.sizes:
        measured = {entry: middle for entry, (_, middle, _) in measure(curve, size).items()}
        for entry, middle in measured.items():
            ms[entry].append(middle)
        ours, by_hand = measured.values()
        print(f"{size:12d} {ours:12.3f} {by_hand:12.3f} {ours / by_hand:8.2f}", flush=True)
    slopes = {entry: round(slope(list(curve.sizes), times), 2) for entry, times in ms.items()}
    print(f"slope of the last decade: {slopes['implicitdiff']}, by hand {slopes['by hand']}, at most {curve.exponent}")
    shared = {"title": curve.title, "axis": curve.axis, "exponent": curve.exponent, "sizes": list(curve.sizes)}
    return shared | {"curves": ms, "slopes": slopes}


# --- drawing ----------------------------------------------------------------------------------------------------------

COLORS = {"cg": "#1b7f79", "dense": "#d9683c", "cholesky": "#1b7f79", "newton": "#5c4b8b", "parameters": "#1b7f79"}
STYLES = {"implicitdiff": {"ls": "-", "lw": 2, "marker": "o", "ms": 3}, "by hand": {"ls": "--", "lw": 1.2}}
GUIDE = {"ls": ":", "lw": 0.9, "color": "#333333"}


def draw(rows: _report.Rows) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    # The salt: the same file from the same numbers.
    plt.rcParams.update({"font.size": 9, "svg.hashsalt": "growth", "legend.frameon": False})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    labels = list(dict.fromkeys(row["axis"] for row in rows.values()))
    figure, axes = plt.subplots(1, len(labels), figsize=(8, 3.9), layout="constrained", sharey=True, squeeze=False)
    for axis, label in zip(axes[0], labels, strict=True):
        panel(axis, {name: row for name, row in rows.items() if row["axis"] == label})
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.grid(color="#dddddd", lw=0.5)
        axis.legend(loc="lower left", bbox_to_anchor=(-0.05, 1.0), handlelength=1.2, labelspacing=0.3)
    axes[0, 0].set_ylabel("time of a solution with its gradient, ms")
    styles = STYLES | {"exponent of the method": GUIDE}
    lines = [Line2D([], [], label=name, **{"color": "#333333"} | style) for name, style in styles.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=3)
    figure.savefig(FIGURE, metadata={"Date": None} if FIGURE.suffix == ".svg" else {})
    plt.close(figure)


def panel(axis: Any, rows: _report.Rows) -> None:
    for name, row in rows.items():
        for entry, times in row["curves"].items():
            label = row["title"] if entry == "implicitdiff" else None
            axis.plot(row["sizes"], times, color=COLORS[name], label=label, **STYLES[entry])
        guide(axis, row)


def guide(axis: Any, row: dict[str, Any]) -> None:
    """A line as steep as the method says, above the last points."""
    last, exponent = row["sizes"][-1], row["exponent"]
    ends = np.array([last / 10 ** (2 if exponent == 1 else 0.8), last])
    times = 2 * row["curves"]["implicitdiff"][-1] * (ends / last) ** exponent
    axis.plot(ends, times, **GUIDE)
    axis.annotate(f"$n^{exponent}$" if exponent > 1 else "$n$", (last, times[-1]), (3, -2), textcoords="offset points")


def main() -> None:
    parser = _report.arguments(__doc__, CURVES, RESULTS)
    parser.add_argument("--draw", action="store_true", help=f"draw {FIGURE.name} from {RESULTS.name}, measure nothing")
    options = parser.parse_args()
    names = _report.chosen(parser, options.rows, CURVES)
    results: _report.Rows = {}
    if not options.draw:
        _report.keep_threads()
        results = {name: result(CURVES[name]) for name in names}
    if options.save:
        _report.save(RESULTS, results, CURVES)
    if options.draw or options.save:
        draw(_report.kept(RESULTS))
    steep = [name for name, row in results.items() if row["slopes"]["implicitdiff"] > row["exponent"] + MARGIN]
    if steep:
        raise SystemExit(f"grows faster than the method says: {', '.join(steep)}")


if __name__ == "__main__":
    main()
