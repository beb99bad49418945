"""Small programs, each of which raises or warns: optimizers, modules, objects, projections, unusual tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import implicitdiff as idf
from implicitdiff import _C, linear_solve, optim, projections, pytree, schedule, solvers
from implicitdiff.linear_solve import solve_cg, solve_lstsq, solve_lu
from implicitdiff.nn import ImplicitMetaGradientModule, MetaGradientModule
from tables.troubles import F64, ONES, M, T, V, by_condition, named, newton, square, warned

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
    "compile": lambda: solvers.newton(square, compile=True),
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


def distributed_tensor(*plain: torch.Tensor) -> None:
    with one_process():
        from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

        t = distribute_tensor(V, init_device_mesh("cpu", (1,)), [Shard(0)])
        newton.run(*plain, t, t)


VALUES = {
    "meta": lambda: newton.run(T.to("meta"), T.to("meta")),
    "fake": faked,
    "make_fx": lambda: torch.fx.experimental.proxy_tensor.make_fx(lambda t: newton.run(t, t)[0])(T),
    "export": lambda: torch.export.export(Exported(), (T,)),
    "trace": lambda: torch.jit.trace(lambda t: newton.run(t, t)[0], T),
    "DTensor": lambda: distributed_tensor(V),
    "DTensor as unknowns": distributed_tensor,
    "sparse": lambda: grad(by_condition(lambda x, t: torch.einsum("ij,j->i", sparse_eye(T), x * V).sum() - t))(T),
    "two sparse matrices": lambda: grad(
        by_condition(lambda x, t: (sparse_eye(x) @ sparse_eye(x)).to_dense().sum() - t)
    )(T),
    "sparse shapes": lambda: grad(by_condition(lambda x, t: (sparse_eye(T) @ (x * V[:2])).sum() - t))(T),
}


def sparse_eye(x: Tensor) -> Tensor:
    index = torch.arange(3).repeat(2, 1)
    return torch.sparse_coo_tensor(index, x * V, (3, 3))


TROUBLES = named(
    {
        "optimizers": OPTIMIZERS,
        "objects": OBJECTS,
        "saving": SAVING,
        "projections": PROJECTIONS,
        "numbers": NUMBERS,
        "values": VALUES,
    }
)
