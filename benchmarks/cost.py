"""What a derivative costs: implicit against unrolled, and one linear solver against another.

Times are medians of interleaved repetitions, with their quartiles; what counts is the ratio of two rows of one run,
since machines differ and are shared. Memory is in `peers.py`.

    python benchmarks/cost.py
"""

from __future__ import annotations

import functools

import torch
from measure import measure
from torch import Tensor
from torch.func import jacfwd, jacrev, vmap

from implicitdiff import custom_fixed_point, custom_root, root_jvp, root_vjp
from implicitdiff import linear_solve as ls

torch.set_num_threads(1)


def jacobians(n: int = 10, steps: int = 20) -> None:
    """The Jacobian in x of the fixed point z = tanh(W z + x)."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(n, n, dtype=torch.float64, generator=generator) / (1.5 * n**0.5)
    x = torch.randn(n, dtype=torch.float64, generator=generator)
    identity = torch.eye(n, dtype=torch.float64)
    zero = torch.zeros_like(x)

    def step(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(w @ z + x)

    def residual(z: Tensor, x: Tensor) -> Tensor:
        return z - step(z, x)

    def newton(z: Tensor, x: Tensor) -> Tensor:
        for _ in range(steps):
            z = z - torch.linalg.inv(jacrev(residual)(z, x)) @ residual(z, x)
        return z

    z = newton(zero, x)
    decorated = custom_fixed_point(step)(newton)
    measure(
        f"Jacobian of a fixed point, n = {n}, float64, one thread",
        {
            "implicit, given the solution: vmap of root_vjp": lambda: vmap(lambda u: root_vjp(residual, z, (x,), u)[0])(
                identity
            ),
            "implicit, given the solution: vmap of root_jvp": lambda: vmap(lambda t: root_jvp(residual, z, (x,), (t,)))(
                identity
            ),
            f"implicit, {steps} Newton steps included: jacrev": lambda: jacrev(lambda x: decorated(zero, x))(x),
            f"unrolled, {steps} Newton steps: jacrev": lambda: jacrev(lambda x: newton(zero, x))(x),
            f"unrolled, {steps} Newton steps: jacfwd": lambda: jacfwd(lambda x: newton(zero, x))(x),
            f"unrolled, {steps} Newton steps: autograd.functional.jacobian": lambda: torch.autograd.functional.jacobian(
                lambda x: newton(zero, x), x
            ),
        },
    )


def linear_solvers(n: int = 200) -> None:
    """One gradient of a ridge problem of condition 100 by every linear solver."""
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]
    a = (q * torch.logspace(0, 2, n, dtype=torch.float64)) @ q.T
    solution = torch.linalg.inv(a) @ torch.ones(n, dtype=torch.float64)
    solvers = {
        "solve_auto": ls.solve_auto(),
        "solve_lu": ls.solve_lu(),
        "solve_cholesky": ls.solve_cholesky(),
        "solve_inv": ls.solve_inv(),
        "solve_inv, Neumann series": ls.solve_inv(ns=True, alpha=0.01, rtol=1e-6, on_failure="ignore"),
        "solve_lstsq": ls.solve_lstsq(),
        "solve_cg": ls.solve_cg(),
        "solve_normal_cg": ls.solve_normal_cg(),
        "solve_bicgstab": ls.solve_bicgstab(),
        "solve_gmres": ls.solve_gmres(restart=100),
    }

    def gradient(solve: ls.LinearSolver) -> Tensor:
        theta = torch.ones(n, dtype=torch.float64, requires_grad=True)
        x = custom_root(lambda x, theta: a @ x - theta, solve=solve)(lambda init, theta: solution)(None, theta)
        return torch.autograd.grad(x.square().sum(), theta)[0]

    measure(
        f"one gradient of a linear problem of condition 100, n = {n}, float64, one thread",
        {name: functools.partial(gradient, solve) for name, solve in solvers.items()},
        repetitions=5,
    )


if __name__ == "__main__":
    jacobians()
    linear_solvers()
