"""What a solve and its derivative cost beside the same computation by other libraries, and by hand in torch.

Every entry of a row computes the same numbers: they are compared with a closed form before its time counts. The
entries take turns, in float64 on one thread; times are medians of process time, with their quartiles. What counts are
the ratios of one run, since machines differ and are shared. JAX compiles beforehand.

    python benchmarks/peers.py [--save] [--memory] [row ...]

``--memory`` measures peak memory in the place of time, where it is more than that of the libraries themselves: how far
one call, after another, raises the peak of resident memory, each entry in a fresh process. With ``--save`` the results
go to ``benchmarks/peers.json``; what they were before is shown beside them. Libraries that are missing are left out,
and named.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import _report
import numpy as np
import torch
from measure import timed
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, vmap

import implicitdiff as idf
from implicitdiff import custom_fixed_point, custom_root, solvers
from implicitdiff import linear_solve as ls

jax, jaxopt, optimistix, lineax, torchopt = map(_report.library, ("jax", "jaxopt", "optimistix", "lineax", "torchopt"))

Array = np.ndarray
Entry = Callable[[], Any]
RESULTS = Path(__file__).with_name("peers.json")
# Seconds that the turns of one entry take together, about.
BUDGET = 1.5
TURNS = 15
# Of which the median is the peak memory of an entry.
CALLS = 5


class Row(NamedTuple):
    """Entries that compute the same, ours first, and what that is.

    Attributes:
        title: what is computed.
        entries: by name; "implicitdiff" is ours, "by hand" plain torch.
        exact: the result.
        rtol: how near to it, relative to its norm, an entry has to come.
    """

    title: str
    entries: dict[str, Entry]
    exact: Array
    rtol: float = 1e-6


def compiled(fn: Callable[..., Any], *operands: Any) -> Entry:
    values = [jax.numpy.asarray(v) for v in operands]
    run = jax.jit(fn).lower(*values).compile()
    return lambda: jax.block_until_ready(run(*values))


def tensors(*arrays: Array) -> list[Tensor]:
    # Copies: memory of NumPy, which others may write to, is looked at in each call.
    return [torch.tensor(a) for a in arrays]


# --- rows -------------------------------------------------------------------------------------------------------------


def ridge_tasks(tasks: int = 256, rows: int = 40, columns: int = 20) -> Row:
    """The gradient of a validation loss in the penalty of each task, through a Cholesky factorisation."""
    rng = np.random.default_rng(0)
    x, y, v, z = (
        rng.standard_normal((tasks, *shape)) for shape in ((rows, columns), (rows,), (rows, columns), (rows,))
    )
    penalty = np.exp(rng.standard_normal(tasks))
    gram = x.mT @ x + penalty[:, None, None] * np.eye(columns)
    w = np.linalg.solve(gram, (x.mT @ y[..., None]))
    error = v @ w - z[..., None]
    exact = -(np.linalg.solve(gram, v.mT @ error) * w).sum((1, 2)) * 2 / rows

    @custom_root(lambda w, p, x, y: x.mT @ (x @ w - y) + p * w, solve=ls.solve_cholesky())
    def decorated(init: None, p: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return torch.linalg.solve(x.mT @ x + p * torch.eye(columns, dtype=p.dtype), x.mT @ y)

    def ours(p: Tensor, x: Tensor, y: Tensor, v: Tensor, z: Tensor) -> Tensor:
        return (v @ decorated(None, p, x, y) - z).square().mean()

    def solved(p: Tensor, x: Tensor, y: Tensor, v: Tensor, z: Tensor) -> Tensor:
        w = ls.solve_cholesky()(lambda w: x.mT @ (x @ w) + p * w, x.mT @ y)
        return (v @ w - z).square().mean()

    operands = tensors(penalty, x, y, v, z)

    def by_hand() -> Tensor:
        p, x, y, v, z = operands
        p = p.detach().requires_grad_()
        factor = torch.linalg.cholesky(x.mT @ x + p[:, None, None] * torch.eye(columns, dtype=p.dtype))
        w = torch.cholesky_solve(x.mT @ y[..., None], factor)
        return torch.autograd.grad((v @ w - z[..., None]).square().mean((1, 2)).sum(), p)[0]

    def lineax_loss(p: Any, x: Any, y: Any, v: Any, z: Any) -> Any:
        matrix = x.T @ x + p * jax.numpy.eye(columns)
        operator = lineax.MatrixLinearOperator(matrix, lineax.positive_semidefinite_tag)
        w = lineax.linear_solve(operator, x.T @ y, lineax.Cholesky()).value
        return ((v @ w - z) ** 2).mean()

    entries: dict[str, Entry] = {
        "implicitdiff": lambda: vmap(grad(ours))(*operands),
        "implicitdiff, solve_cholesky alone": lambda: vmap(grad(solved))(*operands),
        "by hand": by_hand,
    }
    if jax and lineax:
        entries["lineax"] = compiled(jax.vmap(jax.grad(lineax_loss)), penalty, x, y, v, z)
    return Row(f"{tasks} ridge regressions {rows} x {columns}, vmap(grad) of a Cholesky solve", entries, exact)


def ridge_cg(rows: int = 1000, columns: int = 200) -> Row:
    """A hypergradient by conjugate gradients in both directions."""
    rng = np.random.default_rng(0)
    x, y, v, z = (rng.standard_normal(shape) for shape in ((rows, columns), rows, (rows, columns), rows))
    penalty = 100.0
    gram = x.T @ x + penalty * np.eye(columns)
    w = np.linalg.solve(gram, x.T @ y)
    exact = np.asarray(-np.linalg.solve(gram, v.T @ (v @ w - z)) @ w * 2 / rows)
    xt, yt, vt, zt, pt = tensors(x, y, v, z, np.asarray(penalty))
    solve = ls.solve_cg(rtol=1e-8)

    def ours() -> Tensor:
        p = pt.detach().requires_grad_()
        w = solve(lambda w: xt.mT @ (xt @ w) + p * w, xt.mT @ yt)
        return torch.autograd.grad((vt @ w - zt).square().mean(), p)[0]

    def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
        x, r = torch.zeros_like(b), b
        p, rho, target = r, r @ r, 1e-16 * (b @ b)
        while rho > target:
            q = product(p)
            alpha = rho / (p @ q)
            x, r = x + alpha * p, r - alpha * q
            rho, before = r @ r, rho
            p = r + rho / before * p
        return x

    def by_hand() -> Tensor:
        def product(w: Tensor) -> Tensor:
            return xt.mT @ (xt @ w) + pt * w

        w = conjugate_gradients(product, xt.mT @ yt)
        return -conjugate_gradients(product, vt.mT @ (vt @ w - zt)) @ w * 2 / rows

    entries: dict[str, Entry] = {"implicitdiff": ours, "by hand": by_hand}
    if jax and jaxopt:

        def loss(p: Any, x: Any, y: Any, v: Any, z: Any) -> Any:
            cg = partial(jaxopt.linear_solve.solve_cg, tol=1e-8)
            residual = lambda w, p: x.T @ (x @ w - y) + p * w  # noqa: E731
            solver = jaxopt.implicit_diff.custom_root(residual, solve=cg)(
                lambda init, p: cg(lambda w: x.T @ (x @ w) + p * w, x.T @ y)
            )
            return ((v @ solver(None, p) - z) ** 2).mean()

        entries["jaxopt"] = compiled(jax.grad(loss), penalty, x, y, v, z)
    return Row(f"ridge regression {rows} x {columns}, hypergradient by CG", entries, exact)


def contraction(n: int) -> tuple[Array, Array, Array]:
    """``W`` and ``b`` of z = tanh(W z + b), and the gradient of the sum of z in b."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((n, n))
    w *= 0.7 / np.linalg.norm(w, 2)
    b = 0.5 * rng.standard_normal(n)
    z = np.zeros(n)
    for _ in range(200):
        z = np.tanh(w @ z + b)
    slope = 1 - z**2
    return w, b, slope * np.linalg.solve(np.eye(n) - (slope[:, None] * w).T, np.ones(n))


def fixed_point(n: int) -> Row:
    """A gradient through a fixed point that is iterated to 1e-8."""
    w, b, exact = contraction(n)
    wt, bt = tensors(w, b)
    solve = ls.solve_gmres(rtol=1e-8) if n > 100 else None
    zero = torch.zeros_like(bt)

    def step(z: Tensor, b: Tensor) -> Tensor:
        return torch.tanh(wt @ z + b)

    solver = solvers.fixed_point_iteration(step, rtol=0.0, atol=1e-8, solve=solve)

    def ours() -> Tensor:
        b = bt.detach().requires_grad_()
        return torch.autograd.grad(solver.run(zero, b)[0].sum(), b)[0]

    def by_hand() -> Tensor:
        with torch.no_grad():
            z, error = zero, 1.0
            while error > 1e-8:
                new = torch.tanh(wt @ z + bt)
                z, error = new, float((new - z).norm())
            slope = 1 - z.square()
            u, error = torch.ones_like(z), 1.0
            while error > 1e-8:
                new = wt.mT @ (slope * u) + 1
                u, error = new, float((new - u).norm() / new.norm())
        return slope * u

    entries: dict[str, Entry] = {"implicitdiff": ours, "by hand": by_hand}
    start = np.zeros(n)
    if jax and jaxopt:

        def with_jaxopt(b: Any, w: Any) -> Any:
            step = lambda z, b: jax.numpy.tanh(w @ z + b)  # noqa: E731
            how = partial(jaxopt.linear_solve.solve_bicgstab, tol=1e-8)
            solver = jaxopt.FixedPointIteration(step, tol=1e-8, maxiter=1000, implicit_diff_solve=how)
            return solver.run(jax.numpy.asarray(start), b).params.sum()

        entries["jaxopt"] = compiled(jax.grad(with_jaxopt), b, w)
    if jax and optimistix:

        def with_optimistix(b: Any, w: Any) -> Any:
            step = lambda z, b: jax.numpy.tanh(w @ z + b)  # noqa: E731
            solver = optimistix.FixedPointIteration(1e-9, 1e-9, optimistix.two_norm)
            how = optimistix.ImplicitAdjoint(lineax.GMRES(1e-8, 1e-8) if n > 100 else lineax.LU())
            return optimistix.fixed_point(step, solver, start, b, max_steps=1000, adjoint=how).value.sum()

        entries["optimistix"] = compiled(jax.grad(with_optimistix), b, w)
    return Row(f"fixed point of tanh, n = {n}, with its gradient", entries, exact)


def logistic_data(rows: int, columns: int) -> tuple[Array, Array, Array, Array]:
    """Data, penalties, the solution, and the gradient of its sum in the penalties."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, columns))
    noisy = x @ rng.standard_normal(columns) / np.sqrt(columns) + 0.5 * rng.standard_normal(rows)
    y, penalty = np.where(noisy > 0, 1.0, -1.0), np.full(columns, 1e-2)
    w = np.zeros(columns)
    for _ in range(30):
        half = 1 / (1 + np.exp(y * (x @ w)))
        hessian = (x.T * (half * (1 - half))) @ x / rows + np.diag(penalty)
        w = w - np.linalg.solve(hessian, -x.T @ (y * half) / rows + penalty * w)
    return x * y[:, None], penalty, w, -w * np.linalg.solve(hessian, np.ones(columns))


def logistic(rows: int = 2000, columns: int = 100, *, backward: bool = False) -> Row:
    """A logistic regression with its gradient, or from its solution the gradient alone."""
    x, penalty, w, exact = logistic_data(rows, columns)
    xt, pt, wt = tensors(x, penalty, w)
    start = wt if backward else torch.zeros_like(wt)

    def loss(w: Tensor, p: Tensor) -> Tensor:
        return -torch.nn.functional.logsigmoid(xt @ w).mean() + 0.5 * (p * w * w).sum()

    solver = solvers.lbfgs(loss, rtol=0.0, atol=1e-8)

    def ours() -> Tensor:
        p = pt.detach().requires_grad_()
        return torch.autograd.grad(solver.run(start, p)[0].sum(), p)[0]

    if backward:
        leaf = pt.detach().requires_grad_()
        found = solver.run(start, leaf)[0]

        def again() -> Tensor:
            return torch.autograd.grad(found.sum(), leaf, retain_graph=True)[0]

        def by_hand() -> Tensor:
            half = torch.sigmoid(-(xt @ wt))
            hessian = (xt.mT * (half * (1 - half))) @ xt / rows + torch.diag(pt)
            return -wt * torch.linalg.solve(hessian, torch.ones_like(wt))

        return Row(
            f"logistic regression {rows} x {columns}, backward alone",
            {"implicitdiff": again, "by hand": by_hand},
            exact,
        )
    entries: dict[str, Entry] = {"implicitdiff": ours}

    def jax_loss(w: Any, p: Any, x: Any) -> Any:
        return jax.numpy.logaddexp(-(x @ w), 0.0).mean() + 0.5 * (p * w * w).sum()

    zero = np.zeros(columns)
    if jax and jaxopt:

        def with_jaxopt(p: Any, x: Any) -> Any:
            cg = partial(jaxopt.linear_solve.solve_cg, tol=1e-8)
            solver = jaxopt.LBFGS(jax_loss, tol=1e-8, linesearch="zoom", implicit_diff_solve=cg)
            return solver.run(zero, p, x).params.sum()

        entries["jaxopt"] = compiled(jax.grad(with_jaxopt), penalty, x)
    if jax and optimistix:

        def with_optimistix(p: Any, x: Any) -> Any:
            solver = optimistix.LBFGS(1e-9, 1e-9, optimistix.two_norm)
            fn = lambda w, args: jax_loss(w, *args)  # noqa: E731
            return optimistix.minimise(fn, solver, zero, (p, x), max_steps=1000).value.sum()

        entries["optimistix"] = compiled(jax.grad(with_optimistix), penalty, x)
    return Row(f"logistic regression {rows} x {columns}, lbfgs with its gradient", entries, exact)


def fixed_costs(kind: str, n: int = 10) -> Row:
    """What is paid around a solution that is known: nothing is iterated."""
    w, b, exact = contraction(n)
    wt, bt = tensors(w, b)
    z = bt
    for _ in range(200):
        z = torch.tanh(wt @ z + bt)

    def residual(z: Tensor, b: Tensor) -> Tensor:
        return z - torch.tanh(wt @ z + b)

    decorated = custom_root(residual)(lambda init, b: z)
    solver = solvers.newton(residual, rtol=0.0, atol=1e-8)

    def by_autograd(run: Callable[[Tensor], Tensor]) -> Tensor:
        b = bt.detach().requires_grad_()
        return torch.autograd.grad(run(b).sum(), b)[0]

    def call(b: Tensor) -> Tensor:
        return decorated(None, b)

    def run(b: Tensor) -> Tensor:
        return solver.run(z, b)[0]

    def implicit() -> Tensor:
        slope = 1 - torch.tanh(wt @ z + bt).square()
        matrix = torch.eye(n, dtype=z.dtype) - slope[:, None] * wt
        return slope * torch.linalg.solve(matrix.mT, torch.ones_like(z))

    def jacobian() -> Tensor:
        slope = 1 - torch.tanh(wt @ z + bt).square()
        matrix = torch.eye(n, dtype=z.dtype) - slope[:, None] * wt
        return torch.linalg.solve(matrix, torch.diag(slope))

    whole = jacobian().numpy()
    found = z.clone().numpy()
    rows: dict[str, tuple[str, Entry, Entry, Array]] = {
        "forward": ("custom_root, forward", lambda: call(bt), lambda: residual(z, bt) + z, found),
        "autograd": ("custom_root, autograd.grad", lambda: by_autograd(call), implicit, exact),
        "func": ("custom_root, func.grad", lambda: grad(lambda b: call(b).sum())(bt), implicit, exact),
        "run": ("newton.run from the solution", lambda: run(bt), lambda: residual(z, bt) + z, found),
        "run_autograd": ("newton.run from the solution, autograd.grad", lambda: by_autograd(run), implicit, exact),
        "run_func": (
            "newton.run from the solution, func.grad",
            lambda: grad(lambda b: run(b).sum())(bt),
            implicit,
            exact,
        ),
        "jacrev": ("custom_root, jacrev", lambda: jacrev(call)(bt), jacobian, whole),
        "jacfwd": ("custom_root, jacfwd", lambda: jacfwd(call)(bt), jacobian, whole),
    }
    title, ours, by_hand, expected = rows[kind]
    entries: dict[str, Entry] = {"implicitdiff": ours, "by hand": by_hand}
    # It has no forward mode.
    if jax and jaxopt and kind in ("autograd", "func", "jacrev"):

        def jax_root(b: Any, w: Any, z: Any) -> Any:
            residual = lambda z, b: z - jax.numpy.tanh(w @ z + b)  # noqa: E731
            how = jaxopt.linear_solve.solve_lu
            return jaxopt.implicit_diff.custom_root(residual, solve=how)(lambda init, b: z)(None, b)

        fn = jax.jacrev(jax_root) if kind == "jacrev" else jax.grad(lambda *args: jax_root(*args).sum())
        entries["jaxopt"] = compiled(fn, b, w, found)
    return Row(f"{title}, n = {n}", entries, expected)


def steps_in_place(leaves: int = 10, size: int = 10, steps: int = 100) -> Row:
    """A plain training loop on tiny parameters."""
    rng = np.random.default_rng(0)
    start, slope = rng.standard_normal((2, leaves, size))
    exact = start - 1e-3 * steps * slope

    def ours() -> list[Tensor]:
        params, grads = tensors(*start.copy()), tensors(*slope)
        pair = idf.sgd(lr=1e-3)
        state = pair.init(params)
        for _ in range(steps):
            params, state = pair.step(grads, state, params, inplace=True)
        return params

    def with_torch(**options: bool) -> list[Tensor]:
        params = [t.requires_grad_() for t in tensors(*start.copy())]
        for p, g in zip(params, tensors(*slope), strict=True):
            p.grad = g
        optimizer = torch.optim.SGD(params, lr=1e-3, **options)
        for _ in range(steps):
            optimizer.step()
        return [p.detach() for p in params]

    entries: dict[str, Entry] = {
        "implicitdiff": ours,
        "torch.optim.SGD": with_torch,
        "torch.optim.SGD(fused=True)": partial(with_torch, fused=True),
    }
    if torchopt:

        def with_torchopt() -> Any:
            params, grads = tensors(*start.copy()), tensors(*slope)
            pair = torchopt.sgd(lr=1e-3)
            state = pair.init(params)
            for _ in range(steps):
                updates, state = pair.update(grads, state, params=params, inplace=False)
                params = torchopt.apply_updates(params, updates, inplace=True)
            return params

        entries["torchopt"] = with_torchopt
    return Row(f"{steps} SGD steps in place, {leaves} leaves of {size}", entries, exact)


def adam_step(size: int = 10, steps: int = 100) -> Row:
    rng = np.random.default_rng(0)
    start, slope = rng.standard_normal((2, size))
    expected, gradient = tensors(start.copy(), slope)
    expected.requires_grad_().grad = gradient
    reference = torch.optim.Adam([expected], lr=1e-3)
    for _ in range(steps):
        reference.step()

    def ours() -> Tensor:
        params, grads = tensors(start.copy(), slope)
        pair = idf.adam(lr=1e-3, use_accelerated_op=True)
        state = pair.init(params)
        for _ in range(steps):
            params, state = pair.step(grads, state, params, inplace=True)
        return params

    def fused() -> Tensor:
        params, grads = tensors(start.copy(), slope)
        params.requires_grad_().grad = grads
        optimizer = torch.optim.Adam([params], lr=1e-3, fused=True)
        for _ in range(steps):
            optimizer.step()
        return params.detach()

    entries: dict[str, Entry] = {"implicitdiff": ours, "torch.optim.Adam(fused=True)": fused}
    return Row(f"{steps} Adam steps in place, one leaf of {size}", entries, expected.detach().numpy())


def iterations(count: int, shape: tuple[int, int] = (4096, 1024)) -> Row:
    """The gradient of a fixed point of 2^22 unknowns in float32 (16 MiB), by the number of plain iterations."""
    start = torch.ones(shape)

    def step(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.5 * z + x)

    def plain(z: Tensor, x: Tensor) -> Tensor:
        for _ in range(count):
            z = step(z, x)
        return z

    def gradient(solver: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        x = start.detach().requires_grad_()
        return torch.autograd.grad(solver(torch.zeros_like(x), x).sum(), x)[0]

    z = 0.0
    for _ in range(100):
        z = np.tanh(0.5 * z + 1.0)
    slope = 1 - z**2
    exact = np.full(shape, slope / (1 - 0.5 * slope), np.float32)
    decorated = custom_fixed_point(step, solve=ls.solve_cg())(plain)
    entries: dict[str, Entry] = {
        "implicitdiff": partial(gradient, decorated),
        "unrolled by hand": partial(gradient, plain),
    }
    return Row(f"fixed point of tanh, 2^22 unknowns in float32, {count} iterations", entries, exact, rtol=1e-4)


ROWS: dict[str, Callable[[], Row]] = {
    "ridge_tasks": ridge_tasks,
    "ridge_cg": ridge_cg,
    "fixed_point_1000": partial(fixed_point, 1000),
    "fixed_point_10": partial(fixed_point, 10),
    "logistic": logistic,
    "logistic_backward": partial(logistic, backward=True),
    "root_forward": partial(fixed_costs, "forward"),
    "root_autograd": partial(fixed_costs, "autograd"),
    "root_func": partial(fixed_costs, "func"),
    "run": partial(fixed_costs, "run"),
    "run_autograd": partial(fixed_costs, "run_autograd"),
    "run_func": partial(fixed_costs, "run_func"),
    "jacrev": partial(fixed_costs, "jacrev"),
    "jacfwd": partial(fixed_costs, "jacfwd"),
    "sgd": steps_in_place,
    "adam": adam_step,
}

# The rows whose peak memory is measured.
MEMORY: dict[str, Callable[[], Row]] = {
    **{name: ROWS[name] for name in ("ridge_tasks", "ridge_cg", "fixed_point_1000", "logistic")},
    **{f"iterations_{count}": partial(iterations, count) for count in (10, 50, 100)},
}

# --- measuring --------------------------------------------------------------------------------------------------------


def check(row: Row) -> None:
    """Raise unless every entry computes what the row says."""
    for name, run in row.entries.items():
        result = run()
        found = np.stack([np.asarray(t) for t in result]) if isinstance(result, (list, tuple)) else np.asarray(result)
        error = np.linalg.norm(found - row.exact) / np.linalg.norm(row.exact)
        if not error <= row.rtol:
            raise AssertionError(f"{row.title}: {name} is off by {error:.1e}, above {row.rtol:.0e}")


def resident(field: str) -> float:
    """Of this process, in MiB: "VmRSS" now, "VmHWM" at the peak."""
    return int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) / 1024


def rise(run: Entry) -> float:
    """How far one call raises the peak of resident memory, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def peak(row: str, entry: str) -> float:
    """The median of some calls, as the kernel's count of pages lags a little."""
    _report.keep_threads()
    run = MEMORY[row]().entries[entry]
    run()
    return statistics.median(rise(run) for _ in range(CALLS))


def memory(name: str, row: Row) -> dict[str, float]:
    """The peak memory of each entry, in MiB."""
    # So that the allocator of the processes gives back what is freed, and a peak is that of one call.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    peaks = {}
    for entry in row.entries:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks[entry] = round(pool.apply(peak, (name, entry)), 2)
    return peaks


def show(title: str, measured: dict[str, list[float]], before: dict[str, list[float]]) -> None:
    print(f"\n{title}\n\n{'':38s} {'ms':>9s} {'quartiles':>19s} {'ours/it':>8s} {'before':>8s}")
    ours = measured["implicitdiff"][1]
    for name, (low, middle, high) in measured.items():
        last = f"{before['implicitdiff'][1] / before[name][1]:8.2f}" if name in before else ""
        print(f"{name:38s} {middle:9.3f} {low:8.3f} .. {high:7.3f} {ours / middle:8.2f} {last}", flush=True)


def show_memory(title: str, measured: dict[str, float], before: dict[str, float]) -> None:
    print(f"\n{title}\n\n{'':38s} {'MiB':>9s} {'before':>9s}")
    for name, mib in measured.items():
        print(f"{name:38s} {mib:9.2f} {before.get(name, ''):>9}", flush=True)


def main() -> None:
    parser = _report.arguments(__doc__, ROWS | MEMORY, RESULTS)
    parser.add_argument("--memory", action="store_true", help=f"measure memory, of {', '.join(MEMORY)}")
    options = parser.parse_args()
    rows = MEMORY if options.memory else ROWS
    names = _report.chosen(parser, options.rows, rows)
    _report.keep_threads()
    before, results = _report.kept(RESULTS), {}
    for name in names:
        row, last = rows[name](), before.get(name, {})
        check(row)
        if options.memory:
            measured = {"MiB": memory(name, row)}
            show_memory(row.title, measured["MiB"], last.get("MiB", {}))
        else:
            measured = {"ms": _report.rounded(timed(row.entries, BUDGET, TURNS))}
            show(row.title, measured["ms"], last.get("ms", {}))
        results[name] = {"title": row.title, **measured}
    if options.save:
        _report.save(RESULTS, results, ROWS | MEMORY)


if __name__ == "__main__":
    main()
