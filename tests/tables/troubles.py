"""Small programs, each of which raises or warns: `TROUBLES`, by a short name, for the page of messages."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, vmap
from torch.utils.checkpoint import checkpoint

import implicitdiff as idf
from implicitdiff import _C, custom_root, linear_solve, optim, projections, pytree, schedule, solvers
from implicitdiff.linear_solve import solve_cg, solve_lstsq, solve_lu, solve_normal_cg
from implicitdiff.nn import ImplicitMetaGradientModule, MetaGradientModule

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


def dither(x: Tensor) -> Tensor:
    return x - torch.rand(())


SEARCHES = {
    "budget": lambda: solvers.newton(never_zero).run(T),
    "a warning": lambda: warned(lambda: solvers.newton(square, on_failure="warn").run(0 * T, T)),
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


# --- optimizers -------------------------------------------------------------------------------------------------------

adam = idf.adam(0.1)


def stepped(pair: Any = adam, grads: Any = V, params: Any = V, state: Any = None, **options: Any) -> Any:
    return pair.step(grads, pair.init(params) if state is None else state, params, **options)


def shared() -> None:
    memory = torch.ones(4)
    params = [memory[:3], memory[1:]]
    stepped(idf.adam(0.1), [torch.ones(3)] * 2, params, inplace=True)


def in_inference() -> None:
    with torch.inference_mode():
        state = adam.init(V)
    state = state._replace(mu=torch.zeros_like(V), nu=torch.zeros_like(V))
    stepped(params=V.clone(), grads=V.clone(), state=state, inplace=True)


def not_built() -> None:
    with mock.patch.object(_C, "cpu", None), mock.patch.object(_C, "cuda", None):
        idf.adam(0.1, use_accelerated_op=True)


def learned() -> None:
    with mock.patch.object(_C, "cpu", _C.cpu or object()):
        pair = idf.adam(torch.tensor(0.1, requires_grad=True), use_accelerated_op=True)
        stepped(pair, V.float(), V.float())


def meta_step() -> None:
    with mock.patch.object(_C, "cpu", _C.cpu or object()):
        params = torch.ones(3, device="meta")
        stepped(idf.adam(0.1, use_accelerated_op=True), params, params)


def per_lane() -> None:
    vmap(lambda g: idf.apply_updates(V.clone(), g, inplace=True))(M)


OPTIMIZERS = {
    "no pair": lambda: idf.chain(3),
    "state of a chain": lambda: idf.chain(adam, adam).update(V, (None,)),
    "betas": lambda: idf.adam(betas=0.9),
    "one for all": lambda: idf.clip_grad_norm(V),
    "integer rate": lambda: idf.sgd(torch.tensor(1)),
    "rate of other leaves": lambda: stepped(idf.sgd({"a": 0.1}), [V], [V]),
    "leaf of params": lambda: adam.init([1.0]),
    "rate does not broadcast": lambda: stepped(idf.sgd(torch.ones(2))),
    "sparse": lambda: stepped(grads=V.to_sparse()),
    "no gradient": lambda: stepped(grads=[1.0], params=[V]),
    "nesting": lambda: stepped(grads=[V], params=[V], state=adam.init([V, V])),
    "shapes": lambda: stepped(grads=torch.ones(2, dtype=F64), state=adam.init(V)),
    "rate missing": lambda: stepped(idf.sgd({"a": None}), {"a": V}, {"a": V}),
    "accumulator missing": lambda: idf.adagrad(initial_accumulator_value={"a": None}).init({"a": V}),
    "another state": lambda: stepped(state=idf.sgd(0.1).init(V)),
    "weight decay": lambda: idf.adamw(0.1).update(V, idf.adamw(0.1).init(V)),
    "decay in a chain": lambda: optim.add_decayed_weights(0.1).update(V, optim.add_decayed_weights(0.1).init(V)),
    "count of floats": lambda: stepped(state=adam.init(V)._replace(count=torch.zeros(1))),
    "count of other leaves": lambda: stepped(state=adam.init(V)._replace(count=torch.zeros(2).long())),
    "complex clip": lambda: optim.clip(1.0).update(V * 1j, optim.clip(1.0).init(V)),
    "nesterov": lambda: idf.sgd(0.1, nesterov=True),
    "mask": lambda: stepped(idf.adamw(0.1, mask=[True]), {"a": V}, {"a": V}),
    "piecewise": lambda: schedule.piecewise([schedule.constant(1.0)], [3]),
    "in place, differentiated": lambda: stepped(grads=V.clone().requires_grad_(), params=V.clone(), inplace=True),
    "in place, a graph": lambda: stepped(grads=V.clone(), params=V.clone().requires_grad_() * 1, inplace=True),
    "in place, lanes": per_lane,
    "in place, shared": shared,
    "in place, inference": in_inference,
    "not built": not_built,
    "compiled step, learned": learned,
    "compiled step, meta": meta_step,
    "trees": lambda: pytree.tree_map(lambda a, b: a, [V], V),
    "vdot of nothing": lambda: pytree.tree_vdot(None, None),
    "norm of nothing": lambda: pytree.tree_l2_norm(None),
    "vdot of shapes": lambda: pytree.tree_vdot(V, M),
}


# --- modules and objects ----------------------------------------------------------------------------------------------


class Inner(ImplicitMetaGradientModule):
    """The w that minimises |w - 1|^2 + penalty |w|^2."""

    def __init__(self, penalty: Any) -> None:
        super().__init__()
        self.penalty, self.w = penalty, nn.Parameter(torch.zeros(2, dtype=F64))

    def objective(self) -> Tensor:
        return ((self.w - 1) ** 2).sum() + self.penalty * (self.w**2).sum()

    def solve(self) -> Inner:
        with torch.no_grad():
            self.w.copy_(torch.ones(2) / (1 + self.penalty))
        return self


class Lost(Inner):
    def solve(self) -> Lost:
        del self.w
        return self


class Residuals(Inner):
    def optimality(self) -> Any:
        return self.w, self.w


class Listed(Inner):
    def __init__(self, penalty: Any) -> None:
        super().__init__(penalty)
        self.listed = [self.w]

    def objective(self) -> Tensor:
        return ((self.listed[0] - 1) ** 2).sum() + self.penalty * (self.w**2).sum()


class Stepping(Inner):
    def __init__(self, penalty: Any) -> None:
        super().__init__(penalty)
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)


class Config(Inner):
    def __init__(self, config: dict[str, Tensor]) -> None:
        super().__init__(None)
        self.config = config

    def objective(self) -> Tensor:
        return ((self.w - 1) ** 2).sum() + self.config["penalty"] * (self.w**2).sum()

    def forward(self) -> Tensor:
        return self.solve().w.sum()


class Eager(MetaGradientModule):
    def __init__(self) -> None:
        self.w = nn.Parameter(V)


def leaf() -> Tensor:
    return torch.tensor(0.5, dtype=F64, requires_grad=True)


def frozen() -> None:
    module = Inner(leaf())
    module.w.requires_grad_(False)
    module.solve()


def registered() -> None:
    module = MetaGradientModule()
    module.register_meta_parameter("rate", leaf())
    module.register_parameter("other", module.rate)


def linear() -> nn.Linear:
    return nn.Linear(3, 1).double()


def other_parameters() -> None:
    net = linear()
    inner = idf.MetaSGD(net, lr=0.1)
    net.more = linear()
    inner.step(net(V).sum())


def wrong_derivative() -> None:
    net, scale = nn.utils.parametrizations.weight_norm(linear()), leaf()
    idf.MetaSGD(net, lr=0.1).step((net(V) * scale).square().sum())
    torch.autograd.grad(net(V).sum(), scale)


def loaded(mine: Any, theirs: Any) -> None:
    for optimizer in (mine, theirs):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
    mine.load_state_dict(theirs.state_dict())


def parameters(size: int = 3) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(size))]


OBJECTS = {
    "no linear solve": lambda: type("Inner2", (Inner,), {}, linear_solve=3),
    "no solve": lambda: type("Mine", (ImplicitMetaGradientModule,), {"objective": lambda self: 0}),
    "no condition": lambda: type("Mine", (ImplicitMetaGradientModule,), {"solve": lambda self: self}),
    "no method": lambda: type("Mine", (ImplicitMetaGradientModule,), {"solve": lambda self: self, "objective": 3}),
    "no objective": lambda: (
        Residuals(leaf())
        and ImplicitMetaGradientModule.objective(
            type("Mine", (ImplicitMetaGradientModule,), {"solve": lambda self: self, "optimality": lambda self: 0})()
        )
    ),
    "no inner parameters": frozen,
    "lost": lambda: Lost(leaf()).solve(),
    "residuals": lambda: Residuals(leaf()).solve(),
    "read elsewhere": lambda: Listed(leaf()).solve(),
    "optimizer in __init__": lambda: grad(lambda p: Stepping(p).solve().w.sum())(T),
    "exchanged": lambda: grad(lambda p: functional_call(Config({"penalty": leaf()}), {"config_penalty": p}, ()))(T),
    "before __init__": Eager,
    "registered twice": registered,
    "no meta-parameter": lambda: MetaGradientModule().register_meta_parameter("rate", 0.1),
    "no transformation": lambda: idf.MetaOptimizer(linear(), torch.optim.SGD(parameters())),
    "no module": lambda: idf.MetaSGD([V], lr=0.1),
    "no parameters": lambda: idf.MetaSGD(nn.Tanh(), lr=0.1),
    "other parameters": other_parameters,
    "a loss without parameters": lambda: idf.MetaSGD(linear(), lr=0.1).step(leaf()),
    "a wrong derivative": wrong_derivative,
    "a wrong argument": lambda: idf.MetaSGD(linear(), rate=0.1),
    "no counterpart": lambda: idf.from_torch(torch.optim.Adafactor(parameters())),
    "options of a group": lambda: idf.Optimizer([{"params": parameters(), "lr": 0.1}], adam),
    "a mask": lambda: idf.AdamW(parameters(), mask=[True]),
}

SAVING = {
    "state of MetaSGD": lambda: idf.MetaAdam(linear(), lr=0.1).load_state_dict(
        idf.MetaSGD(linear(), lr=0.1).state_dict()
    ),
    "one state, many wanted": lambda: loaded(idf.Adam(parameters()), idf.Optimizer(parameters(), adam)),
    "many states, one wanted": lambda: loaded(idf.Optimizer(parameters(), adam), idf.Adam(parameters())),
    "another Optimizer": lambda: loaded(idf.Optimizer(parameters(), adam), idf.Optimizer(parameters(2), adam)),
    "another rule": lambda: loaded(idf.Adam(parameters()), idf.RMSprop(parameters())),
    "other shapes": lambda: loaded(idf.Adam(parameters()), idf.Adam(parameters(2))),
    "decoupled": lambda: loaded(idf.Adam(parameters()), idf.AdamW(parameters())),
    "a tree": lambda: idf.recover_state_dict([V], [M]),
    "a tuple": lambda: idf.recover_state_dict((V,), (V,)),
    "no ModuleState": lambda: idf.recover_state_dict(linear(), {}),
    "another module": lambda: idf.recover_state_dict(linear(), idf.extract_state_dict(nn.Linear(2, 1))),
    "a module in a list": lambda: idf.extract_state_dict([linear()]),
    "a view": lambda: idf.stop_gradient([(V.clone().requires_grad_() * 1)[:2]]),
    "the old name": lambda: warned(lambda: __import__("implicitdiff.fronts").fronts.MetaSGD),
    "no name of the old module": lambda: __import__("implicitdiff.fronts").fronts.nothing,
}


# --- projections ------------------------------------------------------------------------------------------------------

PROJECTIONS = {
    "v": lambda: projections.simplex(V.int()),
    "A": lambda: projections.polyhedron(V, [[1.0]], V),
    "one of two": lambda: projections.polyhedron(V, M, None),
    "bounds": lambda: projections.box(V, 1.0, 0.0),
    "a nested bound": lambda: projections.box(V, {"a": V}, 1.0),
    "zero": lambda: projections.hyperplane(V, 0 * V, 1.0),
    "zero vector": lambda: projections.l2_sphere(0 * V),
    "zero weights": lambda: projections.box_section(V, 0.0, 1.0, 0 * V, 1.0),
    "no entry": lambda: projections.simplex(V[:0]),
    "no point": lambda: projections.box_section(V, 0.0, 1.0, V, 9.0),
    "matrix": lambda: projections.transport(V, 1.0, 1.0),
    "matrix of rows": lambda: projections.affine_set(V, M[:, :2], ONES),
    "square": lambda: projections.birkhoff(M),
    "shape": lambda: projections.affine_set(V, M, V),
    "dependent": lambda: projections.affine_set(V, M, ONES),
    "totals": lambda: projections.transport(M, 1.0, 1.0),
}


# --- numbers ----------------------------------------------------------------------------------------------------------

NUMBERS = {
    "an integer": lambda: solvers.newton(square, maxiter=0),
    "an integer, history": lambda: solvers.lbfgs(square, history=0),
    "an integer, check_every": lambda: solvers.newton(square, check_every=0),
    "an integer, of a linear solve": lambda: solve_cg(maxiter=0),
    "an integer, restart": lambda: linear_solve.solve_gmres(restart=0),
    "an integer, dense_up_to": lambda: linear_solve.solve_auto(dense_up_to=-1),
    "an integer, k": lambda: projections.sparse_simplex(V, 1.5),
    "finite": lambda: solvers.newton(square, rtol=-1.0),
    "finite, atol": lambda: solve_cg(atol=-1.0),
    "finite, ridge": lambda: solve_lu(ridge=-1.0),
    "finite, alpha": lambda: linear_solve.solve_inv(ns=True, alpha=0.0),
    "finite, rate": lambda: idf.adam(-0.1),
    "finite, scale of a loss": lambda: solvers.levenberg_marquardt(lambda x: x, loss="huber", loss_scale=0.0),
    "finite, lstsq": lambda: solve_lstsq(rtol=-1.0),
    "finite, solve_cg": lambda: solve_cg(rtol=-1.0),
    "at least": lambda: idf.unroll(lambda x: x, -1),
    "at least, checkpoint_every": lambda: idf.unroll(lambda x: x, 3, checkpoint_every=0),
    "at least, betas": lambda: idf.adam(betas=(1.0, 0.9)),
    "at least, total": lambda: projections.simplex(V, -1.0),
    "at least, sums": lambda: projections.transport(M, 1.0, V - 2),
    "at least, steps": lambda: schedule.cosine(1.0, 0),
    "at least, k": lambda: projections.sparse_simplex(V, 0),
    "at least, norm_type": lambda: idf.clip_grad_norm(1.0, norm_type=0.5),
    "from 0 to 1": lambda: idf.adadelta(rho=1.1),
    "positive": lambda: schedule.exponential(1.0, 0.0),
    "a number": lambda: solvers.fixed_point_iteration(square, damping=1.0),
    "a number, rate": lambda: idf.adam("fast"),
    "a number, bound": lambda: projections.box(V, 0.0, None),
    "a number, bracket": lambda: solvers.bisection(lambda x: x, torch.ones(2), 1.0).run(V),
    "a number, radius": lambda: projections.l2_ball(V, V),
    "a number, sums": lambda: projections.transport(M, None, 1.0),
    "a number, b": lambda: projections.polyhedron(V, M, "b"),
    "a number, scale of a loss": lambda: solvers.levenberg_marquardt(lambda x: x, loss="huber", loss_scale=ONES).run(V),
    "one of": lambda: solvers.scipy_minimize(lambda x: x.sum(), "fast"),
    "one of, loss": lambda: solvers.levenberg_marquardt(lambda x: x, loss=3),
    "one of, by": lambda: idf.extract_state_dict(V, by="value"),
    "on_failure": lambda: solvers.newton(square, on_failure="stop"),
    "on_failure of a linear solve": lambda: solve_cg(on_failure="stop"),
    "a function": lambda: solvers.nonlinear_cg(lambda x: x.sum(), formula=3),
    "a function, callback": lambda: newton.run(T, T, callback=3),
    "a function, solve": lambda: solvers.newton(square, solve=linear_solve.solve_gmres),
    "a function, schedule": lambda: optim.scale_by_schedule(3),
    "a function, objective": lambda: solvers.make_kkt_optimality_fn(3),
}


# --- tensors without values -------------------------------------------------------------------------------------------


class Exported(nn.Module):
    def forward(self, t: Tensor) -> Tensor:
        return newton.run(t, t)[0]


def faked() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        t = mode.from_tensor(T)
        newton.run(t, t)


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    import torch.distributed as distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def distributed_tensor() -> None:
    with one_process():
        from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

        t = distribute_tensor(V, init_device_mesh("cpu", (1,)), [Shard(0)])
        newton.run(t, t)


VALUES = {
    "meta": lambda: newton.run(T.to("meta"), T.to("meta")),
    "fake": faked,
    "make_fx": lambda: torch.fx.experimental.proxy_tensor.make_fx(lambda t: newton.run(t, t)[0])(T),
    "export": lambda: torch.export.export(Exported(), (T,)),
    "trace": lambda: torch.jit.trace(lambda t: newton.run(t, t)[0], T),
    "DTensor": distributed_tensor,
    "sparse": lambda: grad(by_condition(lambda x, t: torch.einsum("ij,j->i", sparse_eye(T), x * V).sum() - t))(T),
    "two sparse matrices": lambda: grad(
        by_condition(lambda x, t: (sparse_eye(x) @ sparse_eye(x)).to_dense().sum() - t)
    )(T),
    "sparse shapes": lambda: grad(by_condition(lambda x, t: (sparse_eye(T) @ (x * V[:2])).sum() - t))(T),
}


def sparse_eye(x: Tensor) -> Tensor:
    index = torch.arange(3).repeat(2, 1)
    return torch.sparse_coo_tensor(index, x * V, (3, 3))


TROUBLES: dict[str, Callable[[], Any]] = {
    f"{place}: {name}": run
    for place, cases in {
        "functions": FUNCTIONS,
        "decorated": DECORATED,
        "linear": LINEAR,
        "searches": SEARCHES,
        "optimizers": OPTIMIZERS,
        "objects": OBJECTS,
        "saving": SAVING,
        "projections": PROJECTIONS,
        "numbers": NUMBERS,
        "values": VALUES,
    }.items()
    for name, run in cases.items()
}
