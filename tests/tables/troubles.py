"""Small programs, each of which raises or warns, for the page of messages: functions, linear solves, searches."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import grad, jacfwd, vmap
from torch.utils.checkpoint import checkpoint

import implicitdiff as idf
from implicitdiff import custom_root, linear_solve, solvers
from implicitdiff.linear_solve import solve_cg, solve_lstsq, solve_lu, solve_normal_cg

F64 = torch.float64
T = torch.tensor(4.0, dtype=F64)
V = torch.ones(3, dtype=F64)
M = torch.ones(2, 3, dtype=F64)
ODD = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=F64)


def square(x: Tensor, t: Tensor) -> Tensor:
    return x**2 - t


def root(x: Tensor, t: Tensor) -> Tensor:
    return t.sqrt()


def backward(f: Callable[[Tensor], Tensor], at: Tensor = T) -> None:
    t = at.clone().requires_grad_()
    torch.autograd.grad(f(t).sum(), t)


def by_condition(condition: Callable[..., Any], solver: Callable[..., Any] = root) -> Callable[[Tensor], Tensor]:
    return lambda t: custom_root(condition)(solver)(None, t)


def product(a: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda v: a @ v


# --- functions that are evaluated more than once ----------------------------------------------------------------------


def counted() -> Callable[..., Tensor]:
    numbers = iter(range(1, 100))
    return lambda x, t: x**2 - t * next(numbers)


def changed_in_the_search() -> None:
    scale, t = [2.0], T.clone().requires_grad_()

    def schedule(iter_num: int, params: Tensor, state: Any) -> None:
        scale[0] = 2.0 if state.converged else 1.0

    solvers.newton(lambda x, t: x**2 - t * scale[0]).run(T, t, callback=schedule)


def changed_since() -> None:
    numbers = iter(range(1, 100))
    grad(idf.unroll(lambda x: x * next(numbers), 4, checkpoint_every=2))(T)


def overwritten() -> None:
    scale, t = torch.ones((), dtype=F64), T.clone().requires_grad_()
    x = custom_root(lambda x, t: scale * x**2 - t)(root)(None, t)
    scale.fill_(5)
    x.backward()


def flagged() -> None:
    scale, t = torch.ones((), dtype=F64), T.clone().requires_grad_()
    x = custom_root(lambda x, t: scale * x**2 - t)(root)(None, t)
    scale.requires_grad_()
    torch.autograd.grad(x, t, create_graph=True)


def exchanged() -> None:
    held = [T]

    def condition(x: Tensor, t: Tensor) -> Tensor:
        last, held[0] = held[0], (x + t).detach()
        return x**2 - t * last

    backward(by_condition(condition))


def in_place() -> None:
    count = torch.zeros((), dtype=F64)
    backward(by_condition(lambda x, t: x**2 - t + 0 * count.add_(1)))


def unseen() -> None:
    theta = T.clone().requires_grad_()
    custom_root(lambda x: x**2 - theta.as_subclass(torch.Tensor))(lambda init: theta.sqrt())(None)


def cached() -> None:
    def f(t: Tensor) -> Tensor:
        inverse = functools.cache(lambda: 1 / t)
        return custom_root(lambda x: inverse() * x**2 - 1)(lambda init: (1 / inverse()).sqrt())(None)

    backward(f)


class Cube(torch.autograd.Function):
    """x^3, without setup_context; the backward pass uses a result of the forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(3 * x**2)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0]


class Unbatched(torch.autograd.Function):
    """2 x, with setup_context and without a rule for vmap."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


@torch.library.custom_op("implicitdiff_troubles::squared", mutates_args=())
def squared(x: Tensor) -> Tensor:
    return x * x


def keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[0])


squared.register_autograd(lambda ctx, g: 2 * ctx.saved_tensors[0] * g, setup_context=keep)


def hooked(x: Tensor) -> Tensor:
    layer = nn.Identity()
    layer.register_full_backward_hook(lambda *_: None)
    return layer(x)


def in_condition(f: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
    """A function in a condition that torch.func transforms."""
    return lambda: grad(by_condition(lambda x, t: f(x) - t))(T)


def by_autograd(x: Tensor) -> Tensor:
    return torch.autograd.grad((x**3).sum(), x)[0]


def by_backward(x: Tensor) -> Tensor:
    y = x.detach().requires_grad_()
    (y**2).backward()
    return x


def assertion(init: Tensor, t: Tensor) -> Tensor:
    """Raise by hand the assertion of torch that a tensor from a generator fails in some releases."""
    raise RuntimeError('INTERNAL ASSERT FAILED at "aten/src/ATen/functorch/TensorWrapper.cpp":1')


def captured() -> None:
    def f(t: Tensor) -> Tensor:
        s = 2 * t
        return custom_root(lambda x: x**2 - s)(lambda init: Cube.apply(s))(None)

    grad(f)(T)


def half() -> None:
    h = torch.ones(2, 2, dtype=torch.bfloat16)
    layer = nn.Linear(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solvers.anderson(lambda z: torch.tanh(0.1 * z + layer(h))).run(torch.zeros(2, 2))


FUNCTIONS = {
    "changed since the call": changed_since,
    "changed at the call": lambda: backward(by_condition(counted())),
    "changed in the search": changed_in_the_search,
    "a constant overwritten": overwritten,
    "a flag set": flagged,
    "a tensor exchanged": exchanged,
    "random": lambda: backward(by_condition(lambda x, t: x**2 - t * torch.rand(()))),
    "in place": in_place,
    "unseen capture": unseen,
    "a cache of the solver": cached,
    "a wrong second derivative": lambda: solvers.lbfgs(lambda x, t: (Cube.apply(x) / 3 + x**2 - t * x).sum()).run(
        V, V.clone().requires_grad_()
    ),
    "autograd.grad": in_condition(by_autograd),
    "backward": in_condition(by_backward),
    "no setup_context": in_condition(Cube.apply),
    "no vmap rule": lambda: vmap(grad(by_condition(lambda x, t: Unbatched.apply(x) - t)))(T[None]),
    "a custom operator": lambda: vmap(grad(by_condition(lambda x, t: squared(x) - t)))(T[None]),
    "a backward hook": in_condition(hooked),
    "a reentrant checkpoint": in_condition(lambda x: checkpoint(torch.sin, x, use_reentrant=True)),
    "saved tensor hooks": in_condition(lambda x: checkpoint(torch.sin, x, use_reentrant=False)),
    "solver reads values": lambda: vmap(by_condition(square, lambda x, t: t.sqrt() if t > 0 else t))(T[None]),
    "solver reads an item": lambda: vmap(by_condition(square, lambda x, t: t.sqrt() * t.item()))(T[None]),
    "solver reads a shape": lambda: vmap(by_condition(square, lambda x, t: t[t > 0].sqrt()))(V[None]),
    "solver through NumPy": lambda: vmap(by_condition(square, lambda x, t: torch.as_tensor(np.sqrt(t.numpy()))))(
        T[None]
    ),
    "solver without setup_context": lambda: vmap(by_condition(square, lambda x, t: Cube.apply(t)))(T[None]),
    "a capture of the solver": captured,
    "a generator": lambda: vmap(by_condition(square, assertion))(T[None]),
    "half precision": half,
}


# --- decorated solvers ------------------------------------------------------------------------------------------------


def decorated(condition: Any = square, **options: Any) -> Callable[..., Any]:
    return custom_root(condition, **options)(root)


DECORATED = {
    "no decorator": lambda: custom_root(square)(T, T),
    "no condition": lambda: custom_root(3),
    "solve is no function": lambda: decorated(solve=3),
    "check": lambda: decorated(check=-1.0),
    "argnums": lambda: decorated(argnums=0),
    "argnums too large": lambda: decorated(argnums=5),
    "too few arguments": lambda: decorated()(T),
    "no positional guess": lambda: custom_root(square)(lambda **given: given["t"].sqrt())(t=T),
    "the condition needs more": lambda: decorated(lambda x, t, s: x**2 - t * s)(None, T),
    "the condition takes less": lambda: decorated(lambda x: x**2)(None, T),
    "no tensor": lambda: custom_root(lambda x: x)(lambda init: None)(T),
    "integers": lambda: custom_root(lambda x: x)(lambda init: torch.ones(2).int())(T),
    "several devices": lambda: custom_root(lambda x: x)(lambda init: [torch.ones(2), torch.ones(2, device="meta")])(T),
    "a number": lambda: custom_root(lambda x: x)(lambda init: [torch.ones(2), 3.0])(T),
    "unlike the solution": lambda: custom_root(lambda x, t: torch.stack([x, x]))(root)(None, T),
    "aux": lambda: decorated(has_aux=True)(None, T),
    "the solver changes an argument": lambda: custom_root(square)(lambda x, t: t.mul_(1.0).sqrt())(None, T.clone()),
    "no solution": lambda: custom_root(square, check=1e-6)(lambda x, t: t)(None, T),
    "tangents": lambda: idf.root_jvp(square, T.sqrt(), (T,), ()),
    "a tangent": lambda: idf.root_jvp(square, T.sqrt(), (T,), (V,)),
    "args": lambda: idf.root_vjp(square, T.sqrt(), T, T),
}


# --- linear solves ----------------------------------------------------------------------------------------------------


def preconditioned(make: Callable[..., Any], a: Tensor, b: Tensor = V, **options: Any) -> Callable[[], Any]:
    return lambda: make(**options)(product(a), b)


SINGULAR = torch.zeros(3, 3, dtype=F64)
INDEFINITE = torch.diag(torch.tensor([1.0, -1.0, 1.0], dtype=F64))
HILBERT = 1 / (torch.arange(12, dtype=F64)[:, None] + torch.arange(1, 13, dtype=F64))


def first_three(v: Tensor) -> Tensor:
    result = torch.ones(6, 3, dtype=F64) @ v[:3]
    if len(v) == 6:
        raise RuntimeError("not six")
    return result


def opening(t: Tensor) -> Tensor:
    return solve_lstsq()(lambda v: torch.stack([v[0], t * v[1], 0 * v[2]]), V)


def warned(run: Callable[[], Any]) -> None:
    with warnings.catch_warnings():
        for kind in idf.ConvergenceWarning, idf.LinearSolveWarning, DeprecationWarning:
            warnings.simplefilter("error", kind)
        run()


LINEAR = {
    "no matvec": lambda: solve_lu()(torch.eye(3), V),
    "matvec fails": lambda: solve_lstsq(init=V)(product(torch.ones(3, 2, dtype=F64)), V),
    "matvec fails on init": lambda: solve_lstsq(init=torch.ones(4, dtype=F64))(product(torch.ones(3, 2, dtype=F64)), V),
    "several lengths": lambda: solve_lstsq()(first_three, torch.ones(6, dtype=F64)),
    "not square": lambda: solve_lu()(product(torch.ones(3, 2, dtype=F64)), V),
    "affine": lambda: solve_lu()(lambda v: v + 1, V),
    "not linear": lambda: solve_lu()(lambda v: v * v.abs(), V),
    "ridge of a rectangle": lambda: solve_normal_cg(ridge=0.1)(product(torch.ones(3, 2, dtype=F64)), V),
    "a solve of yours": lambda: grad(
        lambda t: custom_root(square, solve=lambda matvec, b: b * torch.nan)(root)(None, t)
    )(T),
    "indefinite": preconditioned(solve_cg, INDEFINITE),
    "no Cholesky": preconditioned(linear_solve.solve_cholesky, INDEFINITE),
    "singular": preconditioned(solve_lu, SINGULAR),
    "singular, automatic": preconditioned(linear_solve.solve_auto, SINGULAR),
    "not finite": preconditioned(solve_lstsq, SINGULAR * torch.nan),
    "no convergence": preconditioned(linear_solve.solve_gmres, SINGULAR),
    "not finite, gmres": preconditioned(linear_solve.solve_gmres, SINGULAR * torch.nan),
    "not finite, bicgstab": preconditioned(linear_solve.solve_bicgstab, SINGULAR * torch.nan),
    "not finite, normal equations": lambda: solve_normal_cg()(product(M * torch.nan), ONES),
    "a program without a unique minimiser": lambda: grad(
        lambda c: solvers.qp().run(None, 0 * EYE, c, None, None, torch.cat([EYE, -EYE]), ONES.repeat(2))[0].primal.sum()
    )(0 * ONES),
    "Neumann": preconditioned(linear_solve.solve_inv, 5 * torch.eye(3, dtype=F64), ns=True),
    "normal equations": preconditioned(solve_normal_cg, SINGULAR * torch.nan),
    "dependent rows": lambda: solve_normal_cg(preconditioner=lambda v: -v)(
        product(torch.ones(2, 3, dtype=F64)), V[:2] * T
    ),
    "preconditioner of normal equations": lambda: solve_normal_cg(preconditioner=lambda v: -v)(product(INDEFINITE), V),
    "rank": lambda: jacfwd(opening)(torch.tensor(0.0, dtype=F64)),
    "a warning": lambda: warned(preconditioned(solve_lu, SINGULAR, on_failure="warn")),
    "options of the series": lambda: linear_solve.solve_inv(maxiter=3),
    "preconditioner": lambda: solve_cg(preconditioner=3),
}


# --- searches ---------------------------------------------------------------------------------------------------------


def never_zero(x: Tensor) -> Tensor:
    return x**2 + 1


EYE = torch.eye(2, dtype=F64)
ONES = torch.ones(2, dtype=F64)
newton = solvers.newton(square)


def without_tqdm() -> None:
    with mock.patch.dict(sys.modules, {"tqdm": None, "tqdm.auto": None}):
        newton.run(T, T, verbose=True)


def read(x: Tensor, t: Tensor) -> Tensor:
    return torch.expm1(x - t) if x.item() > 0 else x - t


def dither(x: Tensor) -> Tensor:
    return x - torch.rand(())


SEARCHES = {
    "a guess for an argument": lambda: solvers.newton(square).run(T),
    "no factory": lambda: idf.minimize(never_zero, V, solver=solvers.lbfgs(never_zero)),
    "budget": lambda: solvers.newton(never_zero).run(T),
    "a warning": lambda: warned(lambda: solvers.newton(square, on_failure="warn").run(0 * T, T)),
    "a loop that is not recorded": lambda: solvers.newton(read, compile="always").run(2 * T, T),
    "diverged": lambda: newton.run(0 * T, T),
    "stalled": lambda: solvers.newton(square, rtol=0.0, atol=1e-30).run(T.float(), T.float() / 2),
    "line search": lambda: solvers.scipy_root(lambda x: x**2 + 1, "hybr").run(torch.tensor([0.5, 0.3], dtype=F64)),
    "infeasible": lambda: solvers.qp().run(
        None, EYE, ONES, None, None, torch.cat([EYE, -EYE]), -torch.ones(4).double()
    ),
    "unbounded": lambda: solvers.qp().run(None, 0 * EYE, -ONES, None, None, -EYE, 0 * ONES),
    "no function": lambda: solvers.newton(3),
    "unknown option": lambda: solvers.newton(square, tolerance=1e-3),
    "unknown argument": lambda: newton.run(T, c=T),
    "a hidden argument": lambda: solvers.newton(lambda x, verbose: x - verbose).run(T, verbose=T),
    "no guess": lambda: newton.run(),
    "no state": lambda: newton.update(T, None, T),
    "no params": lambda: newton.update(None, newton.init(T, T), T),
    "no signature": lambda: solvers.newton(torch.sub).run(T, other=T),
    "not scalar": lambda: solvers.lbfgs(lambda x: x**2).run(V),
    "no tqdm": without_tqdm,
    "bisection has no steps": lambda: solvers.bisection(lambda x: x, -1.0, 1.0).run(T, implicit_diff=False),
    "SciPy has no steps": lambda: solvers.scipy_root(lambda x: x).run(V, implicit_diff=False),
    "checkpoint_every": lambda: newton.run(T, T, checkpoint_every=2),
    "changes its argument": lambda: solvers.newton(lambda x: x.mul_(1.0)).run(T.clone(), implicit_diff=False),
    "random steps": lambda: solvers.fixed_point_iteration(dither).run(T, implicit_diff=False),
    "no solver's linear solve": lambda: solvers.newton(square, linear_solve=lambda matvec, b: b),
    "brackets": lambda: solvers.bisection(lambda x: x + 5, -1.0, 1.0).run(T),
    "brackets without a guess": lambda: solvers.bisection(lambda x: x, [0.0], {"a": 1.0}).run(None),
    "too few residuals": lambda: solvers.gauss_newton(lambda x: x[:1]).run(V),
    "no transformation": lambda: solvers.from_optimizer(lambda x: (x**2).sum(), torch.optim.Adam),
    "bounds": lambda: solvers.lbfgs_b(lambda x: (x**2).sum(), bounds=3.0),
    "bounds crossed": lambda: solvers.lbfgs_b(lambda x: (x**2).sum(), bounds=(1.0, 0.0)).run(V),
    "bounds of lm": lambda: solvers.scipy_least_squares(lambda x: x, "lm", bounds=(0.0, 1.0)),
    "bounds of BFGS": lambda: solvers.scipy_minimize(lambda x: (x**2).sum(), "BFGS", bounds=(0.0, 1.0)),
    "options of SciPy": lambda: solvers.scipy_least_squares(lambda x: x, scipy_options={"max_nfev": 3}),
    "loss of complex": lambda: solvers.levenberg_marquardt(lambda x: x + 1j, loss="huber").run(V),
    "scale of the loss": lambda: solvers.levenberg_marquardt(lambda x: x, loss="huber", loss_scale=-V).run(V),
    "a loss of yours": lambda: solvers.levenberg_marquardt(lambda x: x, loss=lambda z: z.sum()).run(V),
    "multipliers without constraints": lambda: solvers.make_kkt_optimality_fn(lambda x: (x**2).sum())(
        solvers.KKTSolution(V, dual_eq=V)
    ),
    "constraints without multipliers": lambda: solvers.make_kkt_optimality_fn(
        lambda x: (x**2).sum(), eq_fn=lambda x: x
    )(solvers.KKTSolution(V)),
    "qp: guess": lambda: solvers.qp().run(V, EYE, ONES),
    "qp: integers": lambda: solvers.qp().run(None, EYE.int(), ONES),
    "qp: one of two": lambda: solvers.qp().run(None, EYE, ONES, EYE),
    "qp: lower": lambda: solvers.qp().run(None, EYE, ONES, l=ONES),
    "qp: shapes": lambda: solvers.qp().run(None, M, ONES),
    "qp: dtypes": lambda: solvers.qp().run(None, EYE, ONES.float()),
}


def named(places: dict[str, dict[str, Callable[[], Any]]]) -> dict[str, Callable[[], Any]]:
    """Return the programs of several places by one name."""
    return {f"{place}: {name}": run for place, cases in places.items() for name, run in cases.items()}


TROUBLES = named({"functions": FUNCTIONS, "decorated": DECORATED, "linear": LINEAR, "searches": SEARCHES})
